// block_weights: the weights H of a block, from logits that never reach memory.
//
//     H_pq = g_p exp(x_pq - lse_p) + g_q exp(x_pq - lse_q)
//
// in the compute dtype, rounded once, each term where the block serves that side; lse = +inf (a row
// without a negative) gives weight zero. Where |x| <= s <= 40 is proved:
//
//     H_pq = exp(x_pq - s) (g_p exp(s - lse_p) + g_q exp(s - lse_q))
//
// A program computes one tile; on a diagonal block it writes the tile's transpose as well.
#include "cuda/epilogue.cuh"

namespace gcl {
namespace {

template <class STORAGE>
struct Arguments {
  Block block;
  bool aligned;
  int row_tiles, col_tiles;
  Lines rows, cols;
  Matrix<STORAGE> out;
};

// x becomes H.
template <class STORAGE>
DEVICE void weigh(Sums& x, const Arguments<STORAGE>& a, int first_row, int first_col,
                  const Place& at) {
  const Block& block = a.block;
  const float s = *block.scale;
  const bool bounded = is_bounded(s, block.unit_rows);
  // lse and g of all of a thread's columns at once would not fit the registers beside the logits.
  constexpr int AT_ONCE = COLS_OF_THREAD / 2;
#pragma unroll
  for (int first = 0; first < COLS_OF_THREAD; first += AT_ONCE) {
    LineWeight q[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int col = first_col + at.col(first + j);
      q[j] = load_weight(a.cols, col, block.serves_cols && col < block.cols.length);
      if (bounded) q[j] = bounded_weight(q[j], s);
    }
#pragma unroll
    for (int i = 0; i < ROWS_OF_THREAD; ++i) {
      const int row = first_row + at.row(i);
      LineWeight p = load_weight(a.rows, row, block.serves_rows && row < block.rows.length);
      if (bounded) p = bounded_weight(p, s);
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
        x[i][first + j] = weight_of(x[i][first + j], s, bounded, p, q[j]);
    }
  }
}

template <class ELEMENT>
KERNEL(THREADS, 2) weights_kernel(const Arguments<typename ELEMENT::Storage> a) {
  const Block& block = a.block;
  const Place at(thread_index());
  const TilePlace tile = tile_of(program_index(), a.row_tiles, a.col_tiles, block.diagonal);
  const int first_row = tile.row * TILE, first_col = tile.col * TILE;
  Sums x;
  multiply_tile<ELEMENT, false>(x, block, a.aligned, first_row, first_col, at);
  scale_and_mask(x, *block.scale, block.sample_ids(), first_row, first_col, at);
  weigh(x, a, first_row, first_col, at);
  const int row = first_row + at.warp_row * ROWS_OF_WARP;
  const int col = first_col + at.warp_col * COLS_OF_WARP;
  store<ELEMENT, ROWS_OF_THREAD, COLS_OF_THREAD>(x, 0, 0, a.out, row, col, at);
  if (block.diagonal && tile.row != tile.col)
    store_transposed<ELEMENT, ROWS_OF_THREAD, COLS_OF_THREAD>(x, 0, 0, a.out, row, col, at);
}

}  // namespace

int block_weights(Product product, const Block& block, Lines rows, Lines cols, Output out,
                  Stream stream) {
  return with_element(product, [&](auto element) {
    using Element = decltype(element);
    using Storage = typename Element::Storage;
    const Arguments<Storage> arguments = {block,
                                          operands_aligned<Element>(block),
                                          ceil_div(block.rows.length, TILE),
                                          ceil_div(block.cols.length, TILE),
                                          rows,
                                          cols,
                                          matrix<Storage>(out, block)};
    static_assert(WARP_ROWS * WARP_COLS * Staging<Element>::BYTES_OF_WARP <= PRODUCT_BYTES);
    return launch(weights_kernel<Element>,
                  num_tiles(block.rows.length, block.cols.length, block.diagonal, TILE), THREADS,
                  PRODUCT_BYTES, stream, arguments);
  });
}

}  // namespace gcl

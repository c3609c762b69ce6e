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

// lse and g of one line such that a line which has no weight gets weight zero.
struct LineWeight {
  float lse, g;
};

DEVICE LineWeight load_weight(const Lines& lines, int64_t line, bool has_weight) {
  return has_weight ? LineWeight{lines.lse[line], lines.grad[line]} : LineWeight{INFINITE, 0};
}

// g exp(s - lse), the factor of exp(x - s), in place of g: for a bounded tile.
DEVICE LineWeight bounded_weight(LineWeight line, float s) {
  return {line.lse, line.g * exponential(s - line.lse)};
}

// H_pq = g_p exp(x_p - lse_p) + g_q exp(x_q - lse_q) of a logit's terms for both anchors.
DEVICE float weight_of(float x_p, float x_q, const LineWeight& p, const LineWeight& q) {
  return p.g * exponential(x_p - p.lse) + q.g * exponential(x_q - q.lse);
}

template <class STORAGE>
struct Matrix {
  STORAGE* at;
  int rows, cols;
  int64_t pitch;
  bool aligned;  // every row starts at a multiple of 16 bytes
};

template <class STORAGE>
Matrix<STORAGE> matrix(void* at, int64_t pitch, const Block& block) {
  const auto starts = reinterpret_cast<uintptr_t>(at) | pitch * sizeof(STORAGE);
  return {static_cast<STORAGE*>(at), block.rows.length, block.cols.length, pitch,
          starts % PIECE_BYTES == 0};
}

// A warp's values on their way to memory: rearranged in shared memory so that each lane stores 16
// bytes of a row and neighbours store neighbouring ones.
template <class ELEMENT>
struct Staging {
  using Storage = typename ELEMENT::Storage;
  static constexpr int WIDTH = LINE_BYTES / static_cast<int>(sizeof(Storage));
  static constexpr int ELEMENTS = PIECE_BYTES / static_cast<int>(sizeof(Storage));
  static constexpr int BYTES_OF_WARP = ROWS_OF_WARP * LINE_BYTES;

  unsigned char* lines;
  int lane;

  DEVICE Staging(const Place& at)
      : lines(shared_memory() + at.warp() * BYTES_OF_WARP), lane(at.lane) {}

  template <class VALUE>
  DEVICE void put(int line, int column, VALUE value) {
    const int offset = piece_offset(line, column / ELEMENTS) + column % ELEMENTS * sizeof(Storage);
    *reinterpret_cast<VALUE*>(lines + offset) = value;
  }

  // `count` lines to the matrix, whose corner they have there.
  DEVICE void store(const Matrix<Storage>& out, int first_row, int first_col, int count) {
    sync_warp();
    for (int line = lane / PIECES; line < count; line += LANES / PIECES) {
      const int piece = lane % PIECES;
      const int row = first_row + line, col = first_col + piece * ELEMENTS;
      if (row >= out.rows || col >= out.cols) continue;
      const unsigned char* from = lines + piece_offset(line, piece);
      Storage* to = out.at + row * out.pitch + col;
      if (out.aligned && col + ELEMENTS <= out.cols) {
        *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
        continue;
      }
#pragma unroll 1
      for (int e = 0; e < ELEMENTS && col + e < out.cols; ++e)
        to[e] = reinterpret_cast<const Storage*>(from)[e];
    }
    sync_warp();
  }
};

// A warp's values to the matrix, where their corner is (first_row, first_col).
template <class ELEMENT>
DEVICE void store(const Sums& values, const Matrix<typename ELEMENT::Storage>& out, int first_row,
                  int first_col, const Place& at) {
  Staging<ELEMENT> staging(at);
  constexpr int AT_ONCE = staging.WIDTH / LANES_OF_ROW;
  static_assert(AT_ONCE <= COLS_OF_THREAD);
#pragma unroll
  for (int first = 0; first < COLS_OF_THREAD; first += AT_ONCE) {
#pragma unroll
    for (int i = 0; i < ROWS_OF_THREAD; ++i)
#pragma unroll
      for (int j = first; j < first + AT_ONCE; j += 2)
        staging.put(at.warp_line(i), at.warp_column(j) - LANES_OF_ROW * first,
                    ELEMENT::round(values[i][j], values[i][j + 1]));
    staging.store(out, first_row, first_col + LANES_OF_ROW * first, ROWS_OF_WARP);
  }
}

// The same, transposed: their corner is (first_col, first_row).
template <class ELEMENT>
DEVICE void store_transposed(const Sums& values, const Matrix<typename ELEMENT::Storage>& out,
                             int first_row, int first_col, const Place& at) {
  Staging<ELEMENT> staging(at);
  constexpr int AT_ONCE = staging.WIDTH / LANES_OF_COL;
  static_assert(AT_ONCE <= ROWS_OF_THREAD);
#pragma unroll
  for (int first = 0; first < ROWS_OF_THREAD; first += AT_ONCE) {
#pragma unroll
    for (int i = first; i < first + AT_ONCE; ++i)
#pragma unroll
      for (int j = 0; j < COLS_OF_THREAD; j += 2) {
        const auto pair = ELEMENT::round(values[i][j], values[i][j + 1]);
        staging.put(at.warp_column(j), at.warp_line(i) - LANES_OF_COL * first, pair.v[0]);
        staging.put(at.warp_column(j + 1), at.warp_line(i) - LANES_OF_COL * first, pair.v[1]);
      }
    staging.store(out, first_col, first_row + LANES_OF_COL * first, COLS_OF_WARP);
  }
}

template <class STORAGE>
struct Arguments {
  Block block;
  bool aligned;
  int row_tiles, col_tiles;
  Lines rows, cols;
  Matrix<STORAGE> out;
};

// x becomes H.
template <bool ONE_SIDED, class STORAGE>
DEVICE void weigh(Sums& x, const Arguments<STORAGE>& a, int first_row, int first_col,
                  const Place& at) {
  const Block& block = a.block;
  const float s = *block.scale;
  const bool bounded = is_bounded(s, block);
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
      for (int j = 0; j < AT_ONCE; ++j) {
        float& value = x[i][first + j];
        if constexpr (ONE_SIDED) {
          const int col = first_col + at.col(first + j);
          value = weight_of(term_of(value, block.rows, row, block.cols, col),
                            term_of(value, block.cols, col, block.rows, row), p, q[j]);
        } else if (bounded) {
          value = exponential(value - s) * (p.g + q[j].g);
        } else {
          value = weight_of(value, value, p, q[j]);
        }
      }
    }
  }
}

// One-sided, it takes more registers: one program then, and nothing is spilled.
template <class ELEMENT, bool ONE_SIDED>
KERNEL(THREADS, ONE_SIDED ? 1 : 2) weights_kernel(const Arguments<typename ELEMENT::Storage> a) {
  const Block& block = a.block;
  const Place at(thread_index());
  const TilePlace tile = tile_of(program_index(), a.row_tiles, a.col_tiles, block.diagonal);
  const int first_row = tile.row * TILE, first_col = tile.col * TILE;
  Sums x;
  multiply_tile<ELEMENT>(x, block, a.aligned, first_row, first_col, at);
  scale_and_mask(x, *block.scale, block.sample_ids(), first_row, first_col, at);
  weigh<ONE_SIDED>(x, a, first_row, first_col, at);
  const int row = first_row + at.warp_row * ROWS_OF_WARP;
  const int col = first_col + at.warp_col * COLS_OF_WARP;
  store<ELEMENT>(x, a.out, row, col, at);
  if (block.diagonal && tile.row != tile.col) store_transposed<ELEMENT>(x, a.out, row, col, at);
}

}  // namespace

int block_weights(Product product, const Block& block, Lines rows, Lines cols, void* out,
                  int64_t pitch, Stream stream) {
  return with_element(product, [&](auto element) {
    using Element = decltype(element);
    using Storage = typename Element::Storage;
    const Arguments<Storage> arguments = {block,
                                          operands_aligned<Element>(block),
                                          ceil_div(block.rows.length, TILE),
                                          ceil_div(block.cols.length, TILE),
                                          rows,
                                          cols,
                                          matrix<Storage>(out, pitch, block)};
    static_assert(WARP_ROWS * WARP_COLS * Staging<Element>::BYTES_OF_WARP <= PRODUCT_BYTES);
    return launch(block.one_sided() ? weights_kernel<Element, true> : weights_kernel<Element, false>,
                  num_tiles(block.rows.length, block.cols.length, block.diagonal, TILE), THREADS,
                  PRODUCT_BYTES, stream, arguments);
  });
}

}  // namespace gcl

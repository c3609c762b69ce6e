// block_stats: row and column statistics of a block of logits that never reaches memory.
//
//     m_i = max_j x_ij        l_i = sum_j exp(x_ij - m_i)        (and the same over i)
//
// A program computes one tile and writes (m, l) of its rows and of its columns to a slot of its own
// in tables [2, slots, lines]; fold() adds the slots in their order. No atomics: the same inputs
// give the same bits. Where |x| <= s <= 40 is proved, m = s: one exponential serves both sides.
// Tile (a, b) of a diagonal block fills slot b of rows a and, transposed, slot a of rows b.
#include "cuda/epilogue.cuh"

namespace gcl {
namespace {

struct Arguments {
  Block block;
  bool aligned;
  int row_tiles, col_tiles;
  float* row_table;
  float* col_table;
};

// Over the lanes of a warp that share a row, or a column.
struct AlongRow {
  static constexpr int FIRST = 1, END = LANES_OF_ROW;
};
struct AlongCol {
  static constexpr int FIRST = LANES_OF_ROW, END = LANES;
};

template <class LANES_ALONG>
DEVICE float sum_along(float value) {
#pragma unroll
  for (int mask = LANES_ALONG::FIRST; mask < LANES_ALONG::END; mask *= 2)
    value += shuffle_xor(value, mask);
  return value;
}

template <class LANES_ALONG>
DEVICE float max_along(float value) {
#pragma unroll
  for (int mask = LANES_ALONG::FIRST; mask < LANES_ALONG::END; mask *= 2)
    value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// (m, l) of the tile's lines, as far as one warp has seen them.
struct WarpStatistics {
  float row_max[WARP_COLS][TILE], row_sum[WARP_COLS][TILE];
  float col_max[WARP_ROWS][TILE], col_sum[WARP_ROWS][TILE];
};

// Of logits, or of what `term(x, i, j)` makes of them.
template <class TERM>
DEVICE void reduce_rows(const Sums& x, float s, bool bounded, const TERM& term,
                        WarpStatistics& out, const Place& at) {
#pragma unroll
  for (int i = 0; i < ROWS_OF_THREAD; ++i) {
    float m = s, sum = 0;
    if (!bounded) {
      m = FINITE_MIN;  // not -inf: where all is masked, -inf - -inf would be NaN
#pragma unroll
      for (int j = 0; j < COLS_OF_THREAD; ++j) m = fmaxf(m, term(x[i][j], i, j));
      m = max_along<AlongRow>(m);
    }
#pragma unroll
    for (int j = 0; j < COLS_OF_THREAD; ++j)
      sum += bounded ? x[i][j] : exponential(term(x[i][j], i, j) - m);
    sum = sum_along<AlongRow>(sum);
    if (at.lane % LANES_OF_ROW == 0) {
      out.row_max[at.warp_col][at.row(i)] = m;
      out.row_sum[at.warp_col][at.row(i)] = sum;
    }
  }
}

template <class TERM>
DEVICE void reduce_cols(const Sums& x, float s, bool bounded, const TERM& term,
                        WarpStatistics& out, const Place& at) {
#pragma unroll
  for (int j = 0; j < COLS_OF_THREAD; ++j) {
    float m = s, sum = 0;
    if (!bounded) {
      m = FINITE_MIN;
#pragma unroll
      for (int i = 0; i < ROWS_OF_THREAD; ++i) m = fmaxf(m, term(x[i][j], i, j));
      m = max_along<AlongCol>(m);
    }
#pragma unroll
    for (int i = 0; i < ROWS_OF_THREAD; ++i)
      sum += bounded ? x[i][j] : exponential(term(x[i][j], i, j) - m);
    sum = sum_along<AlongCol>(sum);
    if (at.lane < LANES_OF_ROW) {
      out.col_max[at.warp_row][at.col(j)] = m;
      out.col_sum[at.warp_row][at.col(j)] = sum;
    }
  }
}

// (m, l) of a line of the tile from those of its warps, to a table [2, slots, length].
template <int WARPS>
DEVICE void write_statistics(const float (&maxima)[WARPS][TILE], const float (&sums)[WARPS][TILE],
                             int line_of_tile, float* table, int slot, int slots, int64_t length,
                             int64_t line) {
  float m = FINITE_MIN, l = 0;
  for (const auto& of_warp : maxima) m = fmaxf(m, of_warp[line_of_tile]);
  for (int w = 0; w < WARPS; ++w)
    l += sums[w][line_of_tile] * exponential(maxima[w][line_of_tile] - m);
  table[slot * length + line] = m;
  table[(slots + slot) * length + line] = l;
}

// One-sided, it takes more registers: one program then, and nothing is spilled.
template <class ELEMENT, bool ONE_SIDED>
KERNEL(THREADS, ONE_SIDED ? 1 : 2) stats_kernel(const Arguments a) {
  const Block& block = a.block;
  const Place at(thread_index());
  const TilePlace tile = tile_of(program_index(), a.row_tiles, a.col_tiles, block.diagonal);
  const int first_row = tile.row * TILE, first_col = tile.col * TILE;
  Sums x;
  multiply_tile<ELEMENT>(x, block, a.aligned, first_row, first_col, at);
  const float s = *block.scale;
  scale_and_mask(x, s, block.sample_ids(), first_row, first_col, at);
  const bool bounded = is_bounded(s, block);
  if (bounded) {
#pragma unroll
    for (auto& row : x)
#pragma unroll
      for (float& value : row) value = exponential(value - s);
  }
  auto& of_warps = *reinterpret_cast<WarpStatistics*>(shared_memory());
  if constexpr (ONE_SIDED) {
    const auto for_row = [&](float value, int i, int j) {
      return term_of(value, block.rows, first_row + at.row(i), block.cols, first_col + at.col(j));
    };
    const auto for_col = [&](float value, int i, int j) {
      return term_of(value, block.cols, first_col + at.col(j), block.rows, first_row + at.row(i));
    };
    reduce_rows(x, s, bounded, for_row, of_warps, at);
    reduce_cols(x, s, bounded, for_col, of_warps, at);
  } else {
    const auto itself = [](float value, int, int) { return value; };
    reduce_rows(x, s, bounded, itself, of_warps, at);
    reduce_cols(x, s, bounded, itself, of_warps, at);
  }
  sync_threads();
  // Half of the threads write a row each, the others a column.
  const int line = thread_index() % TILE;
  if (thread_index() < TILE) {
    if (block.serves_rows && first_row + line < block.rows.length)
      write_statistics(of_warps.row_max, of_warps.row_sum, line, a.row_table, tile.col, a.col_tiles,
                       block.rows.length, first_row + line);
  } else if (block.serves_cols && !(block.diagonal && tile.row == tile.col)) {
    if (first_col + line < block.cols.length)
      write_statistics(of_warps.col_max, of_warps.col_sum, line, a.col_table, tile.row, a.row_tiles,
                       block.cols.length, first_col + line);
  }
}

}  // namespace

int block_stats(Product product, const Block& block, float* row_table, float* col_table,
                Stream stream) {
  return with_element(product, [&](auto element) {
    using Element = decltype(element);
    const Arguments arguments = {block,
                                 operands_aligned<Element>(block),
                                 ceil_div(block.rows.length, TILE),
                                 ceil_div(block.cols.length, TILE),
                                 row_table,
                                 col_table};
    static_assert(sizeof(WarpStatistics) <= PRODUCT_BYTES);
    return launch(block.one_sided() ? stats_kernel<Element, true> : stats_kernel<Element, false>,
                  num_tiles(block.rows.length, block.cols.length, block.diagonal, TILE), THREADS,
                  PRODUCT_BYTES, stream, arguments);
  });
}

}  // namespace gcl

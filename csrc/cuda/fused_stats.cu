// fused_block_stats: block_stats for the V x V logits of every pair of samples, from four products.
//
//     m_vj = max_{w,k} x_vw[j,k]        l_vj = sum_{w,k} exp(x_vw[j,k] - m_vj)
//
// over the views w that are candidates of v, and the same for columns. Tables: [2, slots, V lines].
// A thread meets all views: sums of its columns stay in its registers while it goes through the
// views of its rows, whose sums wait in shared memory.
#include "cuda/fused.cuh"

namespace gcl {
namespace {

struct Arguments {
  Block block;
  Views views;
  bool aligned;
  int row_tiles, col_tiles;
  float* row_table;
  float* col_table;
};

struct alignas(16) OfRows {
  float v[SAMPLES];
};

struct Shared {
  PerBase* rows;  // [V][FUSED_TILE]
  PerBase* cols;
  OfRows* max;  // [V][THREADS]: of the thread's rows, as far as its warp has seen them
  OfRows* sum;
  float* row_max;  // [V][WARP_COLS][FUSED_TILE]: of a warp's rows
  float* row_sum;
  float* col_max;  // [V][WARP_ROWS][FUSED_TILE]
  float* col_sum;

  DEVICE explicit Shared(int views) {
    Carver carver;
    max = carver.take<OfRows>(views * THREADS);
    sum = carver.take<OfRows>(views * THREADS);
    rows = carver.take<PerBase>(views * FUSED_TILE);
    cols = carver.take<PerBase>(views * FUSED_TILE);
    row_max = carver.take<float>(views * WARP_COLS * FUSED_TILE);
    row_sum = carver.take<float>(views * WARP_COLS * FUSED_TILE);
    col_max = carver.take<float>(views * WARP_ROWS * FUSED_TILE);
    col_sum = carver.take<float>(views * WARP_ROWS * FUSED_TILE);
  }

  static constexpr int BYTES_OF_VIEW =
      2 * THREADS * sizeof(OfRows) + 2 * FUSED_TILE * sizeof(PerBase) +
      2 * (WARP_COLS + WARP_ROWS) * FUSED_TILE * sizeof(float);
};

// Calls visit(i, j, x) for the thread's negatives of the views (v, w).
template <class VISIT>
DEVICE void for_each_logit(const Sums& y, float s, const Negatives& negative,
                           const PerBase* rows, const PerBase* cols, const Place& at,
                           VISIT visit) {
  PerBase of_col[SAMPLES];
#pragma unroll
  for (int j = 0; j < SAMPLES; ++j) of_col[j] = cols[at.sample_col(j)];
#pragma unroll
  for (int i = 0; i < SAMPLES; ++i) {
    const PerBase of_row = rows[at.sample_row(i)];
#pragma unroll
    for (int j = 0; j < SAMPLES; ++j) {
      const float x = fused_logit(s, of_row, toward_bases(y, i, j, of_col[j]));
      visit(i, j, negative(i, j) ? x : -INFINITE);
    }
  }
}

// The maxima of a warp's rows and columns, where s cannot stand for them.
DEVICE void reduce_maxima(const Sums& y, float s, const Negatives& negative, const Views& views,
                          const Shared& shared, const Place& at) {
#pragma unroll 1
  for (int w = 0; w < views.count; ++w) {
    float col_max[SAMPLES];
#pragma unroll
    for (float& m : col_max) m = FINITE_MIN;
#pragma unroll 1
    for (int v = 0; v < views.count; ++v) {
      OfRows& row_max = shared.max[v * THREADS + thread_index()];
      OfRows own = row_max;
      if (w == 0)
#pragma unroll
        for (float& m : own.v) m = FINITE_MIN;
      const bool of_rows = views.meets(v, w), of_cols = views.meets(w, v);
      if (of_rows || of_cols)
        for_each_logit(y, s, negative, shared.rows + v * FUSED_TILE, shared.cols + w * FUSED_TILE,
                       at, [&](int i, int j, float x) {
                         if (of_rows) own.v[i] = fmaxf(own.v[i], x);
                         if (of_cols) col_max[j] = fmaxf(col_max[j], x);
                       });
      if (w == views.count - 1)
#pragma unroll
        for (float& m : own.v) m = max_along<AlongRow>(m);
      row_max = own;
    }
#pragma unroll
    for (int j = 0; j < SAMPLES; ++j)
      shared.col_max[(w * WARP_ROWS + at.warp_row) * FUSED_TILE + at.sample_col(j)] =
          max_along<AlongCol>(col_max[j]);
  }
  sync_warp();
}

// The sums of a warp's rows and columns, and the maxima to which they belong.
DEVICE void sum_exponentials(const Sums& y, float s, bool bounded, const Negatives& negative,
                             const Views& views, const Shared& shared, const Place& at) {
#pragma unroll 1
  for (int w = 0; w < views.count; ++w) {
    const int cols_of_warp = (w * WARP_ROWS + at.warp_row) * FUSED_TILE;
    float col_max[SAMPLES], col_sum[SAMPLES];
#pragma unroll
    for (int j = 0; j < SAMPLES; ++j) {
      col_max[j] = bounded ? s : shared.col_max[cols_of_warp + at.sample_col(j)];
      col_sum[j] = 0;
    }
#pragma unroll 1
    for (int v = 0; v < views.count; ++v) {
      const int own = v * THREADS + thread_index();
      OfRows row_max = shared.max[own], row_sum = shared.sum[own];
#pragma unroll
      for (int i = 0; i < SAMPLES; ++i) {
        if (bounded) row_max.v[i] = s;
        if (w == 0) row_sum.v[i] = 0;
      }
      const bool of_rows = views.meets(v, w), of_cols = views.meets(w, v);
      if (of_rows || of_cols)
        for_each_logit(y, s, negative, shared.rows + v * FUSED_TILE, shared.cols + w * FUSED_TILE,
                       at, [&](int i, int j, float x) {
                         const float e = exponential(x - row_max.v[i]);
                         if (of_rows) row_sum.v[i] += e;
                         if (of_cols) col_sum[j] += bounded ? e : exponential(x - col_max[j]);
                       });
      shared.sum[own] = row_sum;
      if (w < views.count - 1) continue;
#pragma unroll
      for (int i = 0; i < SAMPLES; ++i) {
        const int line = (v * WARP_COLS + at.warp_col) * FUSED_TILE + at.sample_row(i);
        const float sum = sum_along<AlongRow>(row_sum.v[i]);
        if (at.lane % 4 == 0) shared.row_max[line] = row_max.v[i], shared.row_sum[line] = sum;
      }
    }
#pragma unroll
    for (int j = 0; j < SAMPLES; ++j) {
      const int line = cols_of_warp + at.sample_col(j);
      const float sum = sum_along<AlongCol>(col_sum[j]);
      if (at.lane < 4) shared.col_max[line] = col_max[j], shared.col_sum[line] = sum;
    }
  }
}

// (m, l) of the tile's lines in all views, from those of its warps, to its slot of a table.
DEVICE void write_views(const float* warp_max, const float* warp_sum, int warps, int views,
                        float* table, int slot, int slots, int first, int64_t length) {
  for (int n = thread_index(); n < views * FUSED_TILE; n += THREADS) {
    const int v = n / FUSED_TILE, line = n % FUSED_TILE, of_warps = v * warps * FUSED_TILE + line;
    if (first + line < length)
      write_statistics(warp_max + of_warps, warp_sum + of_warps, warps, FUSED_TILE, table, slot,
                       slots, views * length, v * length + first + line);
  }
}

template <class ELEMENT>
KERNEL(THREADS, 2) fused_stats_kernel(const Arguments a) {
  const Block& block = a.block;
  const Views& views = a.views;
  const Place at(thread_index());
  const TilePlace tile = tile_of(program_index(), a.row_tiles, a.col_tiles, block.diagonal);
  const int first_row = tile.row * FUSED_TILE, first_col = tile.col * FUSED_TILE;
  Sums y;
  multiply_tile<ELEMENT, true>(y, block, a.aligned, first_row, first_col, at);
  const float s = *block.scale;
  const bool bounded = is_bounded(s, block.unit_rows);
  const Negatives negative(block.sample_ids(), first_row, first_col, at);
  const Shared shared(views.count);
  for (int n = thread_index(); n < views.count * FUSED_TILE; n += THREADS) {
    const int v = n / FUSED_TILE, line = n % FUSED_TILE;
    shared.rows[n] = load_coefficients(views.row_coefficients, views.row_samples, v,
                                       first_row + line, block.rows.length);
    shared.cols[n] = load_coefficients(views.col_coefficients, views.col_samples, v,
                                       first_col + line, block.cols.length);
  }
  sync_threads();
  if (!bounded) reduce_maxima(y, s, negative, views, shared, at);
  sum_exponentials(y, s, bounded, negative, views, shared, at);
  sync_threads();
  write_views(shared.row_max, shared.row_sum, WARP_COLS, views.count, a.row_table, tile.col,
              a.col_tiles, first_row, block.rows.length);
  if (!(block.diagonal && tile.row == tile.col))
    write_views(shared.col_max, shared.col_sum, WARP_ROWS, views.count, a.col_table, tile.row,
                a.row_tiles, first_col, block.cols.length);
}

}  // namespace

int fused_block_stats(Product product, const Block& block, const Views& views, float* row_table,
                      float* col_table, Stream stream) {
  return with_element(product, [&](auto element) {
    using Element = decltype(element);
    const int row_tiles = ceil_div(block.rows.length, FUSED_TILE);
    const int col_tiles = ceil_div(block.cols.length, FUSED_TILE);
    const Arguments arguments = {block,     views,     operands_aligned<Element>(block),
                                 row_tiles, col_tiles, row_table,
                                 col_table};
    static_assert(MAX_VIEWS * Shared::BYTES_OF_VIEW <= MOST_SHARED_BYTES);
    const int bytes = views.count * Shared::BYTES_OF_VIEW;
    return launch(fused_stats_kernel<Element>,
                  num_tiles(block.rows.length, block.cols.length, block.diagonal, FUSED_TILE),
                  THREADS, bytes > PRODUCT_BYTES ? bytes : PRODUCT_BYTES, stream, arguments);
  });
}

}  // namespace gcl

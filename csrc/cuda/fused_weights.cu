// fused_block_weights: the weights of all pairs of views, folded to those of the bases.
//
//     H_vw[j,k] = g_vj exp(x_vw - lse_vj) + g_wk exp(x_vw - lse_wk)    (each where a candidate)
//     F_bc[j,k] = sum_vw k_vb k_wc H_vw                    (coefficients of sample j, and of k)
//     U_vb[j] = sum_wk H_vw T_bw      U_wc[k] = sum_vj H_vw T_vc      T_vc = sum_b k_vb y_bc
//
// With G_bw = sum_v k_vb H_vw, which a thread has after the views of its rows,
//
//     F_bc = sum_w k_wc G_bw              U_wc[k] = sum_j sum_b y_bc G_bw
//
// F is written in the compute dtype. U goes to tables [slots, V, 2, lines], summed by fold(). A
// diagonal block computes the tiles on and above its diagonal: F_bc[k,j] = F_cb[j,k].
#include "cuda/fused.cuh"

namespace gcl {
namespace {

template <class STORAGE>
struct Arguments {
  Block block;
  Views views;
  bool aligned;
  int row_tiles, col_tiles;
  Lines rows, cols;
  Matrix<STORAGE> out;
  int64_t plane;
  float* row_table;
  float* col_table;
};

// What a view brings to a sample.
struct alignas(16) Line4 {
  PerBase k;
  LineWeight weight;
};

struct Shared {
  Line4* rows;          // [V][FUSED_TILE]
  Line4* cols;
  PerBase* inner;       // [V][SAMPLES][THREADS]: U of the thread's rows
  float* row_inner;     // [V][2][WARP_COLS][FUSED_TILE]: U of a warp's rows
  float* col_inner;     // [V][2][WARP_ROWS][FUSED_TILE]

  DEVICE explicit Shared(int views) {
    Carver carver;
    rows = carver.take<Line4>(views * FUSED_TILE);
    cols = carver.take<Line4>(views * FUSED_TILE);
    inner = carver.take<PerBase>(views * SAMPLES * THREADS);
    row_inner = carver.take<float>(views * 2 * WARP_COLS * FUSED_TILE);
    col_inner = carver.take<float>(views * 2 * WARP_ROWS * FUSED_TILE);
  }

  static constexpr int BYTES_OF_VIEW =
      2 * FUSED_TILE * sizeof(Line4) + SAMPLES * THREADS * sizeof(PerBase) +
      2 * (WARP_COLS + WARP_ROWS) * FUSED_TILE * sizeof(float);
};

DEVICE void load_lines(Line4* to, const Views& views, const float* coefficients, int64_t samples,
                       const Lines& lines, int first, int length, float s, bool bounded) {
  for (int n = thread_index(); n < views.count * FUSED_TILE; n += THREADS) {
    const int v = n / FUSED_TILE, sample = first + n % FUSED_TILE;
    Line4 line = {load_coefficients(coefficients, samples, v, sample, length),
                  load_weight(lines, v * samples + sample, sample < length)};
    if (bounded) line.weight = bounded_weight(line.weight, s);
    to[n] = line;
  }
}

// A line that does not count the others among its candidates gives them no weight.
DEVICE LineWeight if_candidate(const LineWeight& line, bool candidate) {
  return candidate ? line : LineWeight{INFINITE, 0};
}

// All that row i gives to and takes from the columns of view w: adds to F, to U of the row (in
// shared memory) and to U of the columns.
DEVICE void weigh_row(int i, int w, const Sums& y, float s, bool bounded, const Negatives& negative,
                      const Views& views, const Shared& shared, const Line4 (&cols)[SAMPLES],
                      Sums& f, PerBase (&col_inner)[SAMPLES], const Place& at) {
  PerBase toward[SAMPLES], g[SAMPLES];
#pragma unroll
  for (int j = 0; j < SAMPLES; ++j) {
    toward[j] = toward_bases(y, i, j, cols[j].k);
    g[j] = {0, 0};
  }
#pragma unroll 1
  for (int v = 0; v < views.count; ++v) {
    PerBase& inner = shared.inner[(v * SAMPLES + i) * THREADS + thread_index()];
    PerBase sum = inner;
    if (w == 0) sum = {0, 0};
    const bool of_rows = views.meets(v, w), of_cols = views.meets(w, v);
    if (of_rows || of_cols) {
      const Line4 row = shared.rows[v * FUSED_TILE + at.sample_row(i)];
      const LineWeight p = if_candidate(row.weight, of_rows);
#pragma unroll
      for (int j = 0; j < SAMPLES; ++j) {
        const float x = negative(i, j) ? fused_logit(s, row.k, toward[j]) : -INFINITE;
        const float h = weight_of(x, s, bounded, p, if_candidate(cols[j].weight, of_cols));
        g[j].b0 += row.k.b0 * h;
        g[j].b1 += row.k.b1 * h;
        sum.b0 += h * toward[j].b0;
        sum.b1 += h * toward[j].b1;
      }
    }
    inner = sum;
  }
#pragma unroll
  for (int j = 0; j < SAMPLES; ++j) {
    f[i][j] += cols[j].k.b0 * g[j].b0;
    f[i][SAMPLES + j] += cols[j].k.b1 * g[j].b0;
    f[SAMPLES + i][j] += cols[j].k.b0 * g[j].b1;
    f[SAMPLES + i][SAMPLES + j] += cols[j].k.b1 * g[j].b1;
    col_inner[j].b0 += y[i][j] * g[j].b0 + y[SAMPLES + i][j] * g[j].b1;
    col_inner[j].b1 += y[i][SAMPLES + j] * g[j].b0 + y[SAMPLES + i][SAMPLES + j] * g[j].b1;
  }
}

// F of the thread's samples; U of the warp's, in shared memory.
DEVICE void weigh(const Sums& y, float s, bool bounded, const Negatives& negative,
                  const Views& views, const Shared& shared, Sums& f, const Place& at) {
#pragma unroll
  for (auto& row : f)
#pragma unroll
    for (float& sum : row) sum = 0;
#pragma unroll 1
  for (int w = 0; w < views.count; ++w) {
    Line4 cols[SAMPLES];
    PerBase col_inner[SAMPLES];
#pragma unroll
    for (int j = 0; j < SAMPLES; ++j) {
      cols[j] = shared.cols[w * FUSED_TILE + at.sample_col(j)];
      col_inner[j] = {0, 0};
    }
#pragma unroll
    for (int i = 0; i < SAMPLES; ++i)
      weigh_row(i, w, y, s, bounded, negative, views, shared, cols, f, col_inner, at);
#pragma unroll
    for (int j = 0; j < SAMPLES; ++j) {
      const PerBase sum = {sum_along<AlongCol>(col_inner[j].b0),
                                sum_along<AlongCol>(col_inner[j].b1)};
      float* to = shared.col_inner + (2 * w * WARP_ROWS + at.warp_row) * FUSED_TILE;
      if (at.lane >= 4) continue;
      to[at.sample_col(j)] = sum.b0;
      to[WARP_ROWS * FUSED_TILE + at.sample_col(j)] = sum.b1;
    }
  }
#pragma unroll 1
  for (int n = 0; n < views.count * SAMPLES; ++n) {
    const int v = n / SAMPLES, i = n % SAMPLES;
    const PerBase own = shared.inner[n * THREADS + thread_index()];
    const PerBase sum = {sum_along<AlongRow>(own.b0), sum_along<AlongRow>(own.b1)};
    float* to = shared.row_inner + (2 * v * WARP_COLS + at.warp_col) * FUSED_TILE;
    if (at.lane % 4 != 0) continue;
    to[at.sample_row(i)] = sum.b0;
    to[WARP_COLS * FUSED_TILE + at.sample_row(i)] = sum.b1;
  }
}

// The sum over warps of U of every line, to the tile's slot of a table.
DEVICE void write_inner(const float* of_warps, int warps, int views, float* table, int slot,
                        int first, int length) {
  for (int n = thread_index(); n < 2 * views * FUSED_TILE; n += THREADS) {
    const int value = n / FUSED_TILE, line = n % FUSED_TILE;
    if (first + line >= length) continue;
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp)
      sum += of_warps[(value * warps + warp) * FUSED_TILE + line];
    table[(int64_t(slot) * 2 * views + value) * length + first + line] = sum;
  }
}

template <class ELEMENT>
KERNEL(THREADS, 1) fused_weights_kernel(const Arguments<typename ELEMENT::Storage> a) {
  const Block& block = a.block;
  const Views& views = a.views;
  const Place at(thread_index());
  const TilePlace tile = tile_of(program_index(), a.row_tiles, a.col_tiles, block.diagonal);
  const int first_row = tile.row * FUSED_TILE, first_col = tile.col * FUSED_TILE;
  Sums y, f;
  multiply_tile<ELEMENT, true>(y, block, a.aligned, first_row, first_col, at);
  const float s = *block.scale;
  const bool bounded = is_bounded(s, block.unit_rows);
  const Negatives negative(block.sample_ids(), first_row, first_col, at);
  const Shared shared(views.count);
  load_lines(shared.rows, views, views.row_coefficients, views.row_samples, a.rows, first_row,
             block.rows.length, s, bounded);
  load_lines(shared.cols, views, views.col_coefficients, views.col_samples, a.cols, first_col,
             block.cols.length, s, bounded);
  sync_threads();
  weigh(y, s, bounded, negative, views, shared, f, at);
  sync_threads();
  const bool mirrored = block.diagonal && tile.row != tile.col;
  write_inner(shared.row_inner, WARP_COLS, views.count, a.row_table, tile.col, first_row,
              block.rows.length);
  if (!block.diagonal || mirrored)
    write_inner(shared.col_inner, WARP_ROWS, views.count, a.col_table, tile.row, first_col,
                block.cols.length);
  sync_threads();
  const int row = first_row + at.warp_row * ROWS_OF_WARP / 2;
  const int col = first_col + at.warp_col * COLS_OF_WARP / 2;
#pragma unroll
  for (int b = 0; b < 2; ++b)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      auto out = a.out;
      out.at = a.out.at + (2 * b + c) * a.plane;
      store<ELEMENT, SAMPLES, SAMPLES>(f, b * SAMPLES, c * SAMPLES, out, row, col, at);
      if (!mirrored) continue;
      out.at = a.out.at + (2 * c + b) * a.plane;
      store_transposed<ELEMENT, SAMPLES, SAMPLES>(f, b * SAMPLES, c * SAMPLES, out, row, col, at);
    }
}

}  // namespace

int fused_block_weights(Product product, const Block& block, const Views& views, Lines rows,
                        Lines cols, Output out, float* row_table, float* col_table,
                        Stream stream) {
  return with_element(product, [&](auto element) {
    using Element = decltype(element);
    using Storage = typename Element::Storage;
    const int row_tiles = ceil_div(block.rows.length, FUSED_TILE);
    const int col_tiles = ceil_div(block.cols.length, FUSED_TILE);
    const Arguments<Storage> arguments = {block,     views,
                                          operands_aligned<Element>(block),
                                          row_tiles, col_tiles,
                                          rows,      cols,
                                          matrix<Storage>(out, block),
                                          out.plane, row_table,
                                          col_table};
    static_assert(MAX_VIEWS * Shared::BYTES_OF_VIEW <= MOST_SHARED_BYTES);
    const int bytes = views.count * Shared::BYTES_OF_VIEW;
    return launch(fused_weights_kernel<Element>,
                  num_tiles(block.rows.length, block.cols.length, block.diagonal, FUSED_TILE),
                  THREADS, bytes > PRODUCT_BYTES ? bytes : PRODUCT_BYTES, stream, arguments);
  });
}

}  // namespace gcl

// From the sums of a tile to logits, their statistics, and matrices in memory.
#pragma once

#include <cmath>

#include "cuda/product.cuh"

namespace gcl {

constexpr float INFINITE = INFINITY;
constexpr float FINITE_MIN = -3.4028234663852886e38f;

// |x| <= s <= 40: exp(x - s) >= e^-80 is a normal float32, and exp(s - lse) <= e^80 is finite.
constexpr float MAX_BOUNDED_SCALE = 40.0f;

// Whether |x| <= s is known and so small that s may replace every maximum. False for NaN.
DEVICE bool is_bounded(float s, bool unit_rows) {
  return unit_rows && s >= 0 && s <= MAX_BOUNDED_SCALE;
}

// x = s <z_row, z_col>, -inf where that is no negative.
DEVICE void scale_and_mask(Sums& x, float s, const SampleIds& ids, int first_row, int first_col,
                           const Place& at) {
#pragma unroll
  for (auto& row : x)
#pragma unroll
    for (float& value : row) value *= s;
  if (!ids.must_mask(first_row, first_col, TILE)) return;
  int64_t col_ids[COLS_OF_THREAD];
#pragma unroll
  for (int j = 0; j < COLS_OF_THREAD; ++j) col_ids[j] = ids.col_id(first_col + at.col(j));
#pragma unroll
  for (int i = 0; i < ROWS_OF_THREAD; ++i) {
    const int row = first_row + at.row(i);
    const int64_t row_id = ids.row_id(row);
#pragma unroll
    for (int j = 0; j < COLS_OF_THREAD; ++j)
      if (!ids.is_negative(row, first_col + at.col(j), row_id, col_ids[j])) x[i][j] = -INFINITE;
  }
}

// Over the lanes of a warp that share a row (4 of them), or a column (8).
struct AlongRow {
  static constexpr int FIRST = 1, END = 4;
};
struct AlongCol {
  static constexpr int FIRST = 4, END = LANES;
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

// (m, l) of a line, l = sum exp(x - m): of each warp in [warp][line], of the tile in a table
// [2, slots, length] at a slot of its own.
DEVICE void write_statistics(const float* warp_max, const float* warp_sum, int warps, int stride,
                             float* table, int slot, int slots, int64_t length, int64_t line) {
  float m = FINITE_MIN, l = 0;
  for (int w = 0; w < warps; ++w) m = fmaxf(m, warp_max[w * stride]);
  for (int w = 0; w < warps; ++w) l += warp_sum[w * stride] * exponential(warp_max[w * stride] - m);
  table[slot * length + line] = m;
  table[(slots + slot) * length + line] = l;
}

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

// H_pq = g_p exp(x - lse_p) + g_q exp(x - lse_q)
DEVICE float weight_of(float x, float s, bool bounded, const LineWeight& p, const LineWeight& q) {
  if (bounded) return exponential(x - s) * (p.g + q.g);
  return p.g * exponential(x - p.lse) + q.g * exponential(x - q.lse);
}

template <class STORAGE>
struct Matrix {
  STORAGE* at;
  int rows, cols;
  int64_t pitch;
  bool aligned;  // every row starts at a multiple of 16 bytes
};

template <class STORAGE>
Matrix<STORAGE> matrix(const Output& out, const Block& block) {
  constexpr std::size_t SIZE = sizeof(STORAGE);
  const auto starts = reinterpret_cast<uintptr_t>(out.at) | out.pitch * SIZE | out.plane * SIZE;
  return {static_cast<STORAGE*>(out.at), block.rows.length, block.cols.length, out.pitch,
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

  // `count` lines of `width` columns to the matrix, whose corner they have there.
  template <int WIDTH_USED>
  DEVICE void store(const Matrix<Storage>& out, int first_row, int first_col, int count) {
    constexpr int PIECES_USED = WIDTH_USED / ELEMENTS;
    sync_warp();
    for (int line = lane / PIECES_USED; line < count; line += LANES / PIECES_USED) {
      const int piece = lane % PIECES_USED;
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

// Writes ROWS x COLS of a thread's values, from (i0, j0) on; the warp's corner in the matrix is
// (first_row, first_col).
template <class ELEMENT, int ROWS, int COLS>
DEVICE void store(const Sums& values, int i0, int j0, const Matrix<typename ELEMENT::Storage>& out,
                  int first_row, int first_col, const Place& at) {
  Staging<ELEMENT> staging(at);
  constexpr int WIDTH = staging.WIDTH < 4 * COLS ? staging.WIDTH : 4 * COLS;
#pragma unroll
  for (int first = 0; first < COLS; first += WIDTH / 4) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = first; j < first + WIDTH / 4; j += 2)
        staging.put(at.warp_line(i), at.warp_column(j) - 4 * first,
                    ELEMENT::round(values[i0 + i][j0 + j], values[i0 + i][j0 + j + 1]));
    staging.template store<WIDTH>(out, first_row, first_col + 4 * first, 8 * ROWS);
  }
}

// The same, transposed: the warp's corner in the matrix is (first_col, first_row).
template <class ELEMENT, int ROWS, int COLS>
DEVICE void store_transposed(const Sums& values, int i0, int j0,
                             const Matrix<typename ELEMENT::Storage>& out, int first_row,
                             int first_col, const Place& at) {
  Staging<ELEMENT> staging(at);
  constexpr int WIDTH = staging.WIDTH;
  static_assert(WIDTH <= 8 * ROWS, "a line of the staging memory is filled at once");
#pragma unroll
  for (int first = 0; first < ROWS; first += WIDTH / 8) {
#pragma unroll
    for (int i = first; i < first + WIDTH / 8; ++i)
#pragma unroll
      for (int j = 0; j < COLS; j += 2) {
        const auto pair = ELEMENT::round(values[i0 + i][j0 + j], values[i0 + i][j0 + j + 1]);
        staging.put(at.warp_column(j), at.warp_line(i) - 8 * first, pair.v[0]);
        staging.put(at.warp_column(j + 1), at.warp_line(i) - 8 * first, pair.v[1]);
      }
    staging.template store<WIDTH>(out, first_col, first_row + 8 * first, 4 * COLS);
  }
}

}  // namespace gcl

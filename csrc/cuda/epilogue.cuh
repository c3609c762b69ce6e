// From the sums of a tile to its logits.
#pragma once

#include <cmath>

#include "cuda/product.cuh"

namespace gcl {

constexpr float INFINITE = INFINITY;
constexpr float FINITE_MIN = -3.4028234663852886e38f;

// |x| <= s <= 40: exp(x - s) >= e^-80 is a normal float32, and exp(s - lse) <= e^80 is finite.
constexpr float MAX_BOUNDED_SCALE = 40.0f;

// Whether |x| <= s is known and so small that s may replace every maximum. False for NaN. Weights
// have no bound.
DEVICE bool is_bounded(float s, const Block& block) {
  return block.unit_rows && s >= 0 && s <= MAX_BOUNDED_SCALE && !block.one_sided();
}

// A logit as a term of an anchor: with its candidate's log weight, -inf above the anchor's limit.
// Lines beyond the block's, whose logits are masked, are not read.
DEVICE float term_of(float x, const Side& anchors, int anchor, const Side& candidates,
                     int candidate) {
  if (anchor >= anchors.length || candidate >= candidates.length) return x;
  if (anchors.limits != nullptr && x > anchors.limits[anchor]) return -INFINITE;
  return candidates.log_weights == nullptr ? x : x + candidates.log_weights[candidate];
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

}  // namespace gcl

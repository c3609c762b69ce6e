// What the kernels of score fusion share. A tile covers FUSED_TILE x FUSED_TILE samples, of which a
// thread holds SAMPLES x SAMPLES pairs (j, k), each with its four products
//
//     y_bc = <z_b^j, z_c^k>               in sums[b * SAMPLES + i][c * SAMPLES + j]
//
// and the logits of a pair of views (v, w), with their coefficients k_v of sample j and k_w of k,
//
//     x_vw = s sum_b k_vb T_bw            T_bw = sum_c k_wc y_bc
#pragma once

#include "cuda/epilogue.cuh"

namespace gcl {

constexpr int SAMPLES = ROWS_OF_THREAD / 2;

// The mask of a thread's pairs of samples, one bit each; views have no part in it.
struct Negatives {
  uint32_t bits;

  DEVICE Negatives(const SampleIds& ids, int first_row, int first_col, const Place& at)
      : bits((1u << SAMPLES * SAMPLES) - 1) {
    if (!ids.must_mask(first_row, first_col, FUSED_TILE)) return;
    bits = 0;
#pragma unroll
    for (int i = 0; i < SAMPLES; ++i)
#pragma unroll
      for (int j = 0; j < SAMPLES; ++j) {
        const int row = first_row + at.sample_row(i), col = first_col + at.sample_col(j);
        const bool negative = ids.is_negative(row, col, ids.row_id(row), ids.col_id(col));
        bits |= uint32_t(negative) << (i * SAMPLES + j);
      }
  }

  DEVICE bool operator()(int i, int j) const { return bits >> (i * SAMPLES + j) & 1; }
};

// One number for each base: coefficients, or products with the base.
struct PerBase {
  float b0, b1;
};

// T_0w and T_1w of a pair of samples.
DEVICE PerBase toward_bases(const Sums& y, int i, int j, const PerBase& of_col) {
  return {of_col.b0 * y[i][j] + of_col.b1 * y[i][SAMPLES + j],
          of_col.b0 * y[SAMPLES + i][j] + of_col.b1 * y[SAMPLES + i][SAMPLES + j]};
}

DEVICE float fused_logit(float s, const PerBase& of_row, const PerBase& toward) {
  return s * (of_row.b0 * toward.b0 + of_row.b1 * toward.b1);
}

// Shared memory after the product, given out in order.
class Carver {
 public:
  DEVICE Carver() : next_(shared_memory()) {}

  template <class TYPE>
  DEVICE TYPE* take(int count) {
    auto* taken = reinterpret_cast<TYPE*>(next_);
    next_ += count * sizeof(TYPE);
    return taken;
  }

 private:
  unsigned char* next_;
};

// Coefficients of view v of a sample; padding has none.
DEVICE PerBase load_coefficients(const float* coefficients, int64_t samples, int v, int sample,
                                      int length) {
  if (sample >= length) return {0, 0};
  const float* base = coefficients + 2 * v * samples + sample;
  return {base[0], base[samples]};
}

}  // namespace gcl

// The strips' arguments, and the functions for the instruction set of this processor.
#pragma once

#include <cmath>
#include <cstdint>

#include "fused_sample.h"

namespace gcl {

constexpr int max_views = 16;

constexpr int64_t product_cols = 64;     // of C, that one call of the kernel makes at most
constexpr int64_t product_tile_rows = 6;  // of C: a call makes a multiple, but for the last

// The mask rule: two embeddings of one sample are no negatives of each other. They are found by
// equal ids, or under the default ids (no id given) on the block's diagonals `j - i = offset`.
struct Mask {
  const int64_t *row_ids, *col_ids;
  const int64_t* offsets;
  int64_t num_offsets;
  int64_t first_row;  // of the strip, in the block
};

// Adds statistics to running ones.
template <class T>
void fold(T& running_max, T& running_sum, T max, T sum) {
  const T most = max > running_max ? max : running_max;
  running_sum = running_sum * std::exp(running_max - most) + sum * std::exp(max - most);
  running_max = most;
}

// A strip of rows of one block. Row arrays start at the strip's first row; column arrays are the
// block's, padded to whole vectors.
template <class T>
struct StatsStrip {
  const T* dots;
  int64_t stride, rows, cols;
  T scale;
  Mask mask;
  bool serves_rows, serves_cols;
  T *row_max, *row_sum;  // running
  T *col_max, *col_sum;  // of this strip alone
  T* buffer;             // rows x buffer_stride, for logits of any range
  int64_t buffer_stride;
};

template <class T>
struct WeightsStrip {
  const T* dots;
  int64_t stride, rows, cols;
  T scale;
  bool bounded;
  Mask mask;
  const T *row_lse, *row_factor, *col_lse, *col_factor;
  T* out;
  int64_t out_stride;
};

template <class T>
struct Embedding {
  int views;
  int64_t samples, dim;
  bool normalize;
  T eps, scale, absent;
  const T* e[max_views];
  int64_t pitch[max_views];
  bool pairs[max_views * max_views];  // which own-sample dots were asked for
  T *z, *norm, *inverse, *own, *own_logits;
};

template <class T>
struct EmbeddingGradient {
  int views;
  int64_t samples, dim;
  bool normalize;
  T eps, scale;
  const T *z, *norm, *inverse, *own, *hz, *grad_own_logits;
  T* grad[max_views];  // null: not needed
  T* grad_scale;       // each row's share
};

// The bases of score fusion, and V views of them, in either pass.
template <class T>
struct FusedSamples {
  int views;
  int64_t samples, dim;
  bool normalize;
  bool self;  // some view's own-sample logit with itself was asked for
  T eps, scale;
  int bases[max_views];  // -1: a combination
  T *z, *inverse, *lengths, *coefficients, *dots;

  FusedSample<T> sample(int64_t j) const {
    return {views,   bases,   normalize,    self, scale,   eps,
            inverse, lengths, coefficients, dots, samples, j};
  }
};

template <class T>
struct FusedEmbedding : FusedSamples<T> {
  T absent;
  const T* e[2];
  int64_t pitch[2];
  bool pairs[max_views * max_views];  // whose own-sample logits were asked for
  const T* mixing;                    // [V, 2]
  T* own_logits;
};

template <class T>
struct FusedGradient : FusedSamples<T> {
  const T *r, *inner, *grad_own_logits;
  T* grad[2];  // null: not needed
  T* shares;   // [2 V + 1, N]: each sample's of the gradients of mixing and of the scale
};

// A strip of rows of one block over samples; arrays of V rows have the pitches given.
template <class T>
struct FusedStrip {
  const T* y[2][2];
  int64_t stride, rows, cols;
  int views;
  T scale;
  bool bounded, serves_cols;
  int bases[max_views];  // -1: a combination
  bool candidates[max_views * max_views];
  Mask mask;
  const T *row_coefficient, *col_coefficient;
  int64_t row_pitch, col_pitch;
  T *row_max, *row_sum, *col_max, *col_sum, *buffer;         // statistics
  const T *row_lse, *row_factor, *col_lse, *col_factor;      // weights
  int64_t row_factor_pitch;
  T *row_inner, *col_inner;
  T* out[2][2];
  int64_t out_stride;
};

// C = A B or C += A B. A transposed matrix lies in memory by columns, its pitch apart.
template <class T>
struct Product {
  int64_t rows, cols, depth;
  const T *a, *b;
  int64_t a_pitch, b_pitch;
  bool a_transposed, b_transposed;
  T* c;
  int64_t c_pitch;
  bool add;
};

template <class T>
struct Kernels {
  void (*product)(const Product<T>&, int64_t first, int64_t last, int64_t start, int64_t stop);
  void (*mirror)(const Product<T>&, int64_t start, int64_t stop);
  void (*stats_bounded)(const StatsStrip<T>&);
  void (*stats_running)(const StatsStrip<T>&);
  void (*weights)(const WeightsStrip<T>&);
  void (*embed)(const Embedding<T>&, int64_t start, int64_t stop);
  void (*embed_backward)(const EmbeddingGradient<T>&, int64_t start, int64_t stop);
  void (*embed_fused)(const FusedEmbedding<T>&, int64_t start, int64_t stop);
  void (*fused_gradients)(const FusedGradient<T>&, int64_t start, int64_t stop);
  void (*fused_stats_bounded)(const FusedStrip<T>&);
  void (*fused_stats_running)(const FusedStrip<T>&);
  void (*fused_weights)(const FusedStrip<T>&);
};

// For the instruction set in use: of those of this processor, the widest, or the one chosen.
template <class T>
const Kernels<T>& kernels();

enum class Isa { baseline, avx2, avx512 };

bool supported(Isa isa);
Isa isa_in_use();
void use_isa(Isa isa);

// Whether `product` is faster than PyTorch's: with AVX-512, but not on Intel's processors, where MKL
// is at home.
bool product_pays();

}  // namespace gcl

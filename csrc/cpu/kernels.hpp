// The strips' arguments, and the functions for the instruction set of this processor.
#pragma once

#include <cmath>
#include <cstdint>

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

// V views, and a table of them: in a block whose samples are candidates of whose anchors, over
// samples whose own-sample logits were asked for.
struct Views {
  int count = 0;
  int bases[max_views] = {};  // for each view the base that it is, or -1: a combination of the two
  bool pairs[max_views * max_views] = {};
  bool pairs_itself = false;  // some view with itself
};

// A strip of rows of one block: of embeddings, or in score fusion of samples. Row arrays start at
// the strip's first row; column arrays are the block's, padded to whole vectors. Of score fusion
// they have a row for each view, or for each view's two coefficients, of the pitches given.
template <class T>
struct Strip {
  const T* y[2][2];  // products: the first alone, or those of two bases
  int64_t stride, rows, cols;
  T scale;
  bool bounded, one_sided, serves_rows, serves_cols;
  Mask mask;
  int64_t row_pitch, col_pitch;
  T *row_max, *row_sum;                                  // running
  T *col_max, *col_sum;                                  // of this strip alone
  T* buffer;                                             // for logits of any range: of col_pitch
  const T *row_lse, *row_factor, *col_lse, *col_factor;  // weights
  int64_t row_factor_pitch;
  // Where one_sided: of candidates and of anchors, as problem.py has them.
  const T *row_log_weight, *row_limit, *col_log_weight, *col_limit;
  T* out[2][2];
  int64_t out_stride;
  // Of score fusion:
  int views;
  const int* bases;
  const bool* candidates;
  const T *row_coefficient, *col_coefficient;
  T *row_inner, *col_inner;
};

// B bases of N samples, and views of them. Tables are [rows, N].
template <class T>
struct Samples {
  const Views* views;
  int bases;
  int64_t count, dim;
  bool normalize;
  T eps, scale;
  T *z, *inverse, *lengths, *coefficients, *dots;  // as problem.py's Embedded
};

template <class T>
struct Embedding {
  Samples<T> of;
  const T* e[max_views];
  int64_t pitch[max_views];
  const T* mixing;  // [V, 2], or null: each view is its own base
  T absent;
  T* own_logits;
};

template <class T>
struct EmbeddingGradient {
  Samples<T> of;
  const T* sums;
  const T* inner;  // of `mixing`, or null
  const T* grad_own_logits;
  T* grad[max_views];  // null: not needed
  T* shares;           // [2 V + 1, N]: each sample's of the gradients of mixing and of the scale
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
  void (*stats_bounded)(const Strip<T>&);
  void (*stats_running)(const Strip<T>&);
  void (*weights)(const Strip<T>&);
  void (*fused_stats_bounded)(const Strip<T>&);
  void (*fused_stats_running)(const Strip<T>&);
  void (*fused_weights)(const Strip<T>&);
  void (*embed)(const Embedding<T>&, int64_t start, int64_t stop);
  void (*gradients)(const EmbeddingGradient<T>&, int64_t start, int64_t stop);
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

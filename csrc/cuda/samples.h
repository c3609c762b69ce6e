// What the launchers over samples take: unit vectors, own-sample similarities, and their gradients
// (gcl_kernels/embeddings.py has the formulas). Tables are float32 [..., samples].
#pragma once

#include "cuda/block.h"

namespace gcl {

// Views [samples, dim] of one dtype; the elements of a sample lie side by side.
struct Embeddings {
  const void* at[MAX_VIEWS];
  int64_t stride[MAX_VIEWS];  // elements from a sample to the next
  int count;
  int64_t samples;
  int dim;
};

// Memory for each view's gradient [samples, dim] in its dtype; null where none is needed.
struct Gradients {
  void* at[MAX_VIEWS];
};

struct Embed {
  Embeddings views;
  bool normalize;
  uint64_t pairs;  // bit a * count + b, a <= b: own[a, b] is asked for
  const float* scale;
  float absent;  // the logit of a pair that was not asked for
  void* z;       // [V, N, D] in the views' dtype
  float* norm;   // [V, N], and so is inverse; neither is written without normalize
  float* inverse;
  float* own;  // [V, V, N], and so are own_logits
  float* own_logits;
};

struct EmbedBackward {
  Embeddings units;  // z, or where that is rounded the embeddings
  bool normalize, rounded;
  const float* norm;
  const float* inverse;
  const float* own;
  const float* hz;  // [V, N, D]
  const float* grad_own_logits;
  const float* scale;
  Gradients grads;
  float* shares;  // [N]: each sample's of dL/ds
};

// How views are made of two bases, and what embed_fused found of them.
struct Mixture {
  int views;
  int base_of[MAX_VIEWS];  // the base that a view is, or -1
  bool normalize;
  bool self;             // some view is paired with itself
  float* inverse;        // [2, N]
  float* lengths;        // [V, N]
  float* coefficients;   // [V, 2, N]
  float* dots;           // [2, 2, N]
};

struct EmbedFused {
  Embeddings bases;  // two
  Mixture mixture;
  uint64_t pairs;  // as in Embed
  const float* scale;
  float absent;
  const float* mixing;  // [V, 2]
  void* z;              // [2, N, D]
  float* own_logits;    // [V, V, N]
};

struct FusedGradients {
  Embeddings units;  // of the bases, as in EmbedBackward
  Mixture mixture;
  bool rounded;
  const float* r;      // [2, N, D]
  const float* inner;  // [V, 2, N]
  const float* grad_own_logits;
  const float* scale;
  Gradients grads;
  float* shares;  // [2 V + 1, N]: each sample's of the gradients of mixing and of the scale
};

// Each starts one kernel and returns 0 or an error for error_text(). Of Product the dtype counts.
int embed(Product, const Embed&, Stream);
int embed_backward(Product, const EmbedBackward&, Stream);
int embed_fused(Product, const EmbedFused&, Stream);
int fused_gradients(Product, const FusedGradients&, Stream);

}  // namespace gcl

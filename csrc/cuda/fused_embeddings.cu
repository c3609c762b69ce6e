// embed_fused: unit vectors of the two bases of score fusion, and how the views are made of them:
// k_vb = mixing[v, b] |e_b| / |e_v|, where |e_v| is that of the sum itself, since its length by the
// law of cosines would cancel; and the own-sample logits of all views.
// fused_gradients: 1/|e_b| (s R_b + sum_c Q_bc z_c) of each base, and each sample's shares of the
// gradients of mixing and of the scale.
#include "common/fused_sample.h"
#include "cuda/samples.cuh"

namespace gcl {
namespace {

template <class SAMPLE>
DEVICE FusedSample<float> fused_sample(const SAMPLE& at, const Mixture& m, float scale) {
  return {m.views,   m.base_of, m.normalize,    m.self, scale,      NORM_EPS,
          m.inverse, m.lengths, m.coefficients, m.dots, at.samples, at.index};
}

// The length of mixing[v, 0] e_0 + mixing[v, 1] e_1.
template <class ELEMENT, int WIDTH>
DEVICE float mixed_length(const Sample<ELEMENT, WIDTH>& at, const Embeddings& bases, float of_0,
                          float of_1) {
  float sum = 0;
  for (int col = at.first(); col < at.dim; col = at.next(col)) {
    typename Sample<ELEMENT, WIDTH>::Part e_0, e_1;
    at.read(e_0, bases, 0, col, 1);
    at.read(e_1, bases, 1, col, 1);
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      const float mixed = e_0[e] * of_0 + e_1[e] * of_1;
      sum += mixed * mixed;
    }
  }
  return sqrtf(sum_along<AlongWarp>(sum));
}

template <class ELEMENT, int WIDTH>
KERNEL(THREADS, 2) embed_fused_kernel(const EmbedFused a) {
  const Sample<ELEMENT, WIDTH> at(a.bases);
  if (at.index >= at.samples) return;
  const Mixture& m = a.mixture;
  float norm_0 = 1, norm_1 = 1, factor_0 = 1, factor_1 = 1;
  if (m.normalize) {
    norm_0 = at.length(a.bases, 0);
    norm_1 = at.length(a.bases, 1);
    factor_0 = inverse_norm(norm_0);
    factor_1 = inverse_norm(norm_1);
    at.set_number(m.inverse, 0, factor_0);
    at.set_number(m.inverse, 1, factor_1);
  }
  for (int v = 0; v < m.views; ++v) {
    float of_0 = a.mixing[2 * v], of_1 = a.mixing[2 * v + 1];
    if (m.normalize) {
      const int base = m.base_of[v];
      float length = base == 0 ? norm_0 : norm_1;
      if (base < 0) {
        length = mixed_length(at, a.bases, of_0, of_1);
        // A zero vector's are zero; a length of NaN is none, nor is one that overflowed.
        const bool zero = length <= NORM_EPS;
        of_0 = (zero ? 0 : of_0 / (factor_0 * length)) + length * 0;
        of_1 = (zero ? 0 : of_1 / (factor_1 * length)) + length * 0;
      }
      at.set_number(m.lengths, v, length);
    }
    at.set_number(m.coefficients, 2 * v, of_0);
    at.set_number(m.coefficients, 2 * v + 1, of_1);
  }
  float dot_00 = 0, dot_01 = 0, dot_11 = 0;
  for (int col = at.first(); col < at.dim; col = at.next(col)) {
    typename Sample<ELEMENT, WIDTH>::Part z_0, z_1;
    at.read(z_0, a.bases, 0, col, factor_0);
    at.read(z_1, a.bases, 1, col, factor_1);
    at.write(z_0, a.z, 0, col);
    at.write(z_1, a.z, 1, col);
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      dot_00 += z_0[e] * z_0[e];
      dot_01 += z_0[e] * z_1[e];
      dot_11 += z_1[e] * z_1[e];
    }
  }
  dot_01 = sum_along<AlongWarp>(dot_01);
  at.set_number(m.dots, 0, sum_along<AlongWarp>(dot_00));
  at.set_number(m.dots, 1, dot_01);
  at.set_number(m.dots, 2, dot_01);
  at.set_number(m.dots, 3, sum_along<AlongWarp>(dot_11));
  sync_warp();  // one lane wrote what all of them read
  const auto sample = fused_sample(at, m, *a.scale);
  for (int pair = at.lane; pair < m.views * m.views; pair += LANES) {
    const int v = pair / m.views, w = pair % m.views;
    const bool asked = a.pairs >> (v < w ? pair : w * m.views + v) & 1;
    a.own_logits[pair * at.samples + at.index] = asked ? sample.own(v, w) * *a.scale : a.absent;
  }
}

template <class ELEMENT, int WIDTH>
KERNEL(THREADS, 2) fused_gradients_kernel(const FusedGradients a) {
  const Sample<ELEMENT, WIDTH> at(a.units);
  if (at.index >= at.samples) return;
  const Mixture& m = a.mixture;
  const auto pulls = fused_sample(at, m, *a.scale)
                         .pulls(a.inner, a.grad_own_logits, [&](int v, float to_0, float to_1) {
                           at.set_number(a.shares, 2 * v, to_0);
                           at.set_number(a.shares, 2 * v + 1, to_1);
                         });
  at.set_number(a.shares, 2 * m.views, pulls.share);
  const float inverse_0 = m.normalize ? at.number(m.inverse, 0) : 1;
  const float inverse_1 = m.normalize ? at.number(m.inverse, 1) : 1;
  const float factor_0 = a.rounded ? inverse_0 : 1, factor_1 = a.rounded ? inverse_1 : 1;
  for (int b = 0; b < 2; ++b) {
    if (a.grads.at[b] == nullptr) continue;
    const float inverse = b == 0 ? inverse_0 : inverse_1, of_r = inverse * *a.scale;
    const float of_0 = inverse * (b == 0 ? pulls.q_00 : pulls.q_01);
    const float of_1 = inverse * (b == 0 ? pulls.q_01 : pulls.q_11);
    for (int col = at.first(); col < at.dim; col = at.next(col)) {
      typename Sample<ELEMENT, WIDTH>::Part grad, z_0, z_1;
      at.read(grad, a.r, b, col);
      at.read(z_0, a.units, 0, col, factor_0);
      at.read(z_1, a.units, 1, col, factor_1);
#pragma unroll
      for (int e = 0; e < WIDTH; ++e)
        grad[e] = grad[e] * of_r + of_0 * z_0[e] + of_1 * z_1[e];
      at.write(grad, a.grads.at[b], 0, col);
    }
  }
}

}  // namespace

int embed_fused(Product product, const EmbedFused& arguments, Stream stream) {
  return with_dtype(product, [&](auto element) {
    using Element = decltype(element);
    return launch_over_samples<Element>(embed_fused_kernel<Element, WIDE<Element>>,
                                        embed_fused_kernel<Element, 1>, arguments,
                                        arguments.bases, 0, stream);
  });
}

int fused_gradients(Product product, const FusedGradients& arguments, Stream stream) {
  return with_dtype(product, [&](auto element) {
    using Element = decltype(element);
    return launch_over_samples<Element>(fused_gradients_kernel<Element, WIDE<Element>>,
                                        fused_gradients_kernel<Element, 1>, arguments,
                                        arguments.units, 0, stream);
  });
}

}  // namespace gcl

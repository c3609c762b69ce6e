// embed: unit vectors z, lengths, and own-sample similarities of the unrounded unit vectors.
// embed_backward, from H z and dL/d own:
//
//     dL/dz_a = s (H z)_a + sum_b K_ab z_b        K_ab = s (d own_logits_ab + d own_logits_ba)
//     dL/de_a = (dL/dz_a - <dL/dz_a, z_a> z_a) / |e_a|        (no projection where |e| < eps)
//
// Rows are read from memory once and then from the cache.
#include "cuda/samples.cuh"

namespace gcl {
namespace {

template <class ELEMENT, int WIDTH>
KERNEL(THREADS, 2) embed_kernel(const Embed a) {
  const Embeddings& views = a.views;
  const Sample<ELEMENT, WIDTH> at(views);
  if (at.index >= at.samples) return;
  float* factors = reinterpret_cast<float*>(shared_memory()) + at.warp * MAX_VIEWS;
  for (int v = 0; v < views.count; ++v) {
    float factor = 1;
    if (a.normalize) {
      const float norm = at.length(views, v);
      factor = inverse_norm(norm);
      at.set_number(a.norm, v, norm);
      at.set_number(a.inverse, v, factor);
    }
    if (at.lane == 0) factors[v] = factor;
    for (int col = at.first(); col < at.dim; col = at.next(col)) {
      typename Sample<ELEMENT, WIDTH>::Part unit;
      at.read(unit, views, v, col, factor);
      at.write(unit, a.z, v, col);
    }
  }
  sync_warp();
  for (int v = 0; v < views.count; ++v)
    for (int w = v; w < views.count; ++w) {
      const bool asked = a.pairs >> (v * views.count + w) & 1;
      float dot = 0;
      if (asked) {
        for (int col = at.first(); col < at.dim; col = at.next(col)) {
          typename Sample<ELEMENT, WIDTH>::Part of_v, of_w;
          at.read(of_v, views, v, col, factors[v]);
          at.read(of_w, views, w, col, factors[w]);
#pragma unroll
          for (int e = 0; e < WIDTH; ++e) dot += of_v[e] * of_w[e];
        }
        dot = sum_along<AlongWarp>(dot);
      }
      const float logit = asked ? dot * *a.scale : a.absent;
      for (const int row : {v * views.count + w, w * views.count + v}) {
        at.set_number(a.own, row, dot);
        at.set_number(a.own_logits, row, logit);
      }
    }
}

template <class ELEMENT, int WIDTH>
KERNEL(THREADS, 2) embed_backward_kernel(const EmbedBackward a) {
  using Part = typename Sample<ELEMENT, WIDTH>::Part;
  const Embeddings& units = a.units;
  const Sample<ELEMENT, WIDTH> at(units);
  if (at.index >= at.samples) return;
  const float s = *a.scale;
  const int count = units.count;
  const auto factor = [&](int v) { return a.rounded && a.normalize ? at.number(a.inverse, v) : 1; };
  float* pulls = reinterpret_cast<float*>(shared_memory()) + at.warp * MAX_VIEWS;
  float share = 0;
  for (int v = 0; v < count; ++v) {
    float along = 0;
    sync_warp();  // the last view's are read
    for (int w = 0; w < count; ++w) {
      const float own = at.number(a.own, v * count + w);
      const float grad_own = at.number(a.grad_own_logits, v * count + w);
      const float pull = (grad_own + at.number(a.grad_own_logits, w * count + v)) * s;
      along += pull * own;
      share += grad_own * own;
      if (at.lane == 0) pulls[w] = pull;
    }
    sync_warp();
    if (a.grads.at[v] == nullptr) continue;
    float inner = 0;
    for (int col = at.first(); col < at.dim; col = at.next(col)) {
      Part unit, hz;
      at.read(unit, units, v, col, factor(v));
      at.read(hz, a.hz, v, col);
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) inner += hz[e] * unit[e];
    }
    inner = sum_along<AlongWarp>(inner);
    share += 0.5f * inner;
    float inverse = 1;
    if (a.normalize) {
      inverse = at.number(a.inverse, v);
      // Times zero, so that NaN stays.
      along = (along + inner * s) * (at.number(a.norm, v) > NORM_EPS ? 1.0f : 0.0f);
    } else {
      along = 0;
    }
    for (int col = at.first(); col < at.dim; col = at.next(col)) {
      Part grad, unit;
      at.read(grad, a.hz, v, col);
#pragma unroll
      for (float& value : grad) value *= s;
      for (int w = 0; w < count; ++w) {
        const float pull = w == v ? pulls[w] - along : pulls[w];
        at.read(unit, units, w, col, factor(w));
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) grad[e] += pull * unit[e];
      }
#pragma unroll
      for (float& value : grad) value *= inverse;
      at.write(grad, a.grads.at[v], 0, col);
    }
  }
  at.set_number(a.shares, 0, share);
}

}  // namespace

int embed(Product product, const Embed& arguments, Stream stream) {
  return with_dtype(product, [&](auto element) {
    using Element = decltype(element);
    return launch_over_samples<Element>(embed_kernel<Element, WIDE<Element>>,
                                        embed_kernel<Element, 1>, arguments,
                                        arguments.views, MAX_VIEWS, stream);
  });
}

int embed_backward(Product product, const EmbedBackward& arguments, Stream stream) {
  return with_dtype(product, [&](auto element) {
    using Element = decltype(element);
    return launch_over_samples<Element>(embed_backward_kernel<Element, WIDE<Element>>,
                                        embed_backward_kernel<Element, 1>, arguments,
                                        arguments.units, MAX_VIEWS, stream);
  });
}

}  // namespace gcl

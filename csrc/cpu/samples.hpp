// The O(M D) side over all samples: unit vectors and own-sample logits, and their gradients.
#pragma once

#include <numeric>
#include <vector>

#include "blocks.hpp"

namespace gcl {

// What both functions over samples are given, as problem.py's Embedded lies in memory.
struct Embedded {
  int threads;
  const Views* views;
  int bases;
  int64_t samples, dim;
  bool normalize;
  double eps, scale;
  Address z, inverse, lengths, coefficients, dots;

  template <class T>
  Samples<T> as() const {
    return {views,    bases,          samples,        dim,
            normalize, T(eps),        T(scale),       at<T>(z),
            at<T>(inverse), at<T>(lengths), at<T>(coefficients), at<T>(dots)};
  }
};

// Samples in ranges, one a thread: no sample's result depends on another.
template <class F>
static void for_samples(const Embedded& s, const F& body) {
  py::gil_scoped_release release;
  const int64_t parts = s.bases * s.samples * s.dim < parallel_copies ? 1 : s.threads;
  for_each_strip(parts, s.threads, parts > 1, [&](int64_t part) {
    body(s.samples * part / parts, s.samples * (part + 1) / parts);
  });
}

// Mixing: 0 where each view is its own base.
template <class T>
static void embed(const Embedded& embedded, const std::vector<Address>& bases,
                  const std::vector<int64_t>& pitches, Address mixing, double absent,
                  Address own_logits) {
  Embedding<T> s{};
  s.of = embedded.as<T>();
  for (size_t b = 0; b < bases.size(); ++b) s.e[b] = at<T>(bases[b]), s.pitch[b] = pitches[b];
  s.mixing = at<T>(mixing), s.absent = T(absent), s.own_logits = at<T>(own_logits);
  for_samples(embedded, [&](int64_t start, int64_t stop) { kernels<T>().embed(s, start, stop); });
}

// By halves: the error does not grow with the number of terms.
template <class T>
static T sum(const T* terms, int64_t count) {
  if (count <= 64) return std::accumulate(terms, terms + count, T(0));
  return sum(terms, count / 2) + sum(terms + count / 2, count - count / 2);
}

// Inner, grad_mixing: 0 where each view is its own base; a base's gradient: 0 where not needed.
template <class T>
static void gradients(const Embedded& embedded, Address sums, Address inner,
                      Address grad_own_logits, const std::vector<Address>& grads,
                      Address grad_mixing, Address grad_scale) {
  const int64_t views = embedded.views->count, samples = embedded.samples;
  std::vector<T> shares((2 * views + 1) * samples);
  EmbeddingGradient<T> s{};
  s.of = embedded.as<T>();
  s.sums = at<T>(sums), s.inner = at<T>(inner), s.grad_own_logits = at<T>(grad_own_logits);
  for (size_t b = 0; b < grads.size(); ++b) s.grad[b] = at<T>(grads[b]);
  s.shares = shares.data();
  for_samples(embedded,
              [&](int64_t start, int64_t stop) { kernels<T>().gradients(s, start, stop); });
  const auto total = [&](int64_t row) { return sum(shares.data() + row * samples, samples); };
  for (int64_t row = 0; grad_mixing && row < 2 * views; ++row) at<T>(grad_mixing)[row] = total(row);
  *at<T>(grad_scale) = total(2 * views);
}

}  // namespace gcl

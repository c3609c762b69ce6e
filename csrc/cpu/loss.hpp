// A loss and all its gradients in one call, for a batch whose tiles all stay in memory: what lies
// between the passes in Python is most of a small batch's time. The algebra is that of
// gcl_kernels/losses.py, sample by sample.

#pragma once

#include <memory>
#include <vector>

#include "passes.hpp"
#include "samples.hpp"

namespace gcl {

// As a LossSpec: V x V tables.
struct Terms {
  int views;
  std::vector<double> weights;
  std::vector<bool> inside;  // own-sample embeddings that are in an anchor's denominator
  bool keeps_self;
  bool compete;  // all of them in one denominator, or each positive in one of its own
};

// One sample's loss from its own logits x [V, V] and its negatives' logsumexp [V], and the gradients
// of both. Entries lie `pitch` apart; weights: those of the terms, over the reduction's divisor.
template <class T>
static T sample_loss(const Terms& t, const T* weights, int64_t pitch, const T* x, const T* neg_lse,
                     T* grad_x, T* grad_lse) {
  T loss = 0;
  for (int a = 0; a < t.views; ++a) {
    const T negatives = neg_lse[a * pitch];
    const auto own = [&](int b) { return x[(a * t.views + b) * pitch]; };
    const auto to = [&](int b) -> T& { return grad_x[(a * t.views + b) * pitch]; };
    const auto weight = [&](int b) { return weights[a * t.views + b]; };
    const auto inside = [&](int b) { return t.inside[a * t.views + b]; };
    T total = 0;
    for (int b = 0; b < t.views; ++b) to(b) = 0, total += weight(b);
    grad_lse[a * pitch] = 0;
    if (total == 0) continue;
    if (t.compete) {
      // Comparisons with NaN are false, and its exponential is NaN.
      T most = negatives, sum = 0;
      bool alone = true;
      for (int b = 0; b < t.views; ++b)
        if (inside(b)) alone = false, most = own(b) > most ? own(b) : most;
      for (int b = 0; b < t.views; ++b)
        if (inside(b)) sum += std::exp(own(b) - most);
      const T of_negatives = std::exp(negatives - most);
      // The log of the denominator less `most`; with nothing of its own sample 0, and so log 0
      // without a negative.
      const T log_sum = alone ? T(0) : std::log(sum + of_negatives);
      for (int b = 0; b < t.views; ++b) {
        if (weight(b) != 0) loss += weight(b) * (most - own(b) + log_sum), to(b) -= weight(b);
        if (inside(b)) to(b) += total * (std::exp(own(b) - most) / (sum + of_negatives));
      }
      grad_lse[a * pitch] = alone ? total : total * (of_negatives / (sum + of_negatives));
      continue;
    }
    // -log(1 + exp(log(den - own term) - x)): its gradient keeps full relative precision where the
    // batch is nearly solved.
    T rest = negatives, pull = 0;
    T of_self = 0, of_negatives = 1;
    if (t.keeps_self) {
      const T most = own(a) > negatives ? own(a) : negatives;
      of_self = std::exp(own(a) - most), of_negatives = std::exp(negatives - most);
      rest = most + std::log(of_self + of_negatives);
    }
    for (int b = 0; b < t.views; ++b) {
      if (weight(b) == 0) continue;
      const T margin = rest - own(b);
      // A positive that is no candidate is not in its denominator (a decoupled loss).
      T part = weight(b);
      if (inside(b)) {
        const T small = std::exp(margin > 0 ? -margin : margin);
        loss += weight(b) * ((margin > 0 ? margin : T(0)) + std::log1p(small));
        part *= (margin > 0 ? T(1) : small) / (1 + small);
      } else {
        loss += weight(b) * margin;
      }
      to(b) -= part, pull += part;
    }
    if (t.keeps_self) to(a) += pull * (of_self / (of_self + of_negatives));
    grad_lse[a * pitch] = pull * (of_negatives / (of_self + of_negatives));
  }
  return loss;
}

// Memory that is cut into tables.
template <class T>
class Arena {
 public:
  explicit Arena(int64_t size) : memory_(new T[size]), next_(memory_.get()) {}
  Address table(int64_t size) {
    T* begin = next_;
    next_ += size;
    return address(begin);
  }

 private:
  std::unique_ptr<T[]> memory_;
  T* next_;
};

// Embedded and problem come without their tables' addresses; elements: of all tiles of the plan.
// Mixing, and a base's gradient, as in `embed` and `gradients`. Z: as products take z, all else
// takes what it is rounded from.
template <class T, class Z = T>
static void loss(Embedded e, Problem p, const std::vector<BlockPlace>& plan, int64_t elements,
                 const Terms& terms, double divisor, const std::vector<Address>& bases,
                 const std::vector<int64_t>& pitches, Address mixing, double absent,
                 const std::vector<bool>& needs_base, Address out,
                 const std::vector<Address>& grads, Address grad_mixing, Address grad_scale) {
  const int64_t n = e.samples, v = e.views->count, b = e.bases, numbers = b * n * e.dim;
  const int64_t mixed = mixing ? 2 * v * n : 0;
  Arena<T> arena(2 * numbers + elements + 2 * mixed + (b + b * b + 3 * v + 2 * v * v + 1) * n);
  e.z = p.z = arena.table(numbers);
  e.inverse = arena.table(b * n), e.lengths = arena.table(v * n), e.dots = arena.table(b * b * n);
  e.coefficients = p.row_coefficients = p.col_coefficients = arena.table(mixed);
  const Address own = arena.table(v * v * n), lse = arena.table(v * n);
  embed<T>(e, bases, pitches, mixing, absent, own);
  std::unique_ptr<Z[]> half;
  if constexpr (std::is_same<Z, Bfloat16>::value) {
    half.reset(new Z[numbers]);
    for (int64_t k = 0; k < numbers; ++k) half[k] = rounded(at<T>(e.z)[k]);
    p.z = address(half.get());
  }
  const Address kept = arena.table(elements);
  statistics<T, Z>(p, plan, kept, elements, lse);

  const Address grad_own = arena.table(v * v * n), grad_lse = arena.table(v * n);
  T* losses = at<T>(arena.table(n));
  std::vector<T> weights;
  for (double weight : terms.weights) weights.push_back(T(weight / divisor));
  for (int64_t j = 0; j < n; ++j)
    losses[j] = sample_loss(terms, weights.data(), n, at<T>(own, j), at<T>(lse, j),
                            at<T>(grad_own, j), at<T>(grad_lse, j));
  *at<T>(out) = sum(losses, n);

  const Address sums = arena.table(numbers), inner = mixing ? arena.table(mixed) : 0;
  if (inner) std::fill_n(at<T>(inner), mixed, T(0));
  matrix_gradient<T, Z>(p, plan, kept, elements, lse, grad_lse, needs_base, sums, inner);
  gradients<T>(e, sums, inner, grad_own, grads, grad_mixing, grad_scale);
}

}  // namespace gcl

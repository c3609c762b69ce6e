// Score fusion's arithmetic of one sample: similarities of its V views from those of the two bases,
// and the numbers of its gradient. The formulas are those of gcl_kernels/score_fusion.py.
#pragma once

#include <cstdint>

namespace gcl {

// Of one sample Q_bc, which is symmetric, and its share of the scale's gradient.
template <class T>
struct FusedPulls {
  T q_00, q_01, q_11, share;
};

// Tables are [rows, samples].
template <class T>
struct FusedSample {
  int views;
  const int* bases;  // for each view the base that it is, or -1
  bool normalize;
  bool self;  // some view is paired with itself
  T scale, eps;
  const T* inverse;       // [2, N], and with it lengths [V, N]: null without normalize
  const T* lengths;
  const T* coefficients;  // [V, 2, N]
  const T* dots;          // [2, 2, N]
  int64_t samples, index;

  T number(const T* table, int row) const { return table[row * samples + index]; }
  T k(int v, int b) const { return number(coefficients, 2 * v + b); }

  bool has_length(int v) const { return number(lengths, v) > eps; }
  bool is_constant(int v, int w) const {
    return self && normalize && v == w && has_length(v);
  }

  // <z_v, z_b>
  T toward(int v, int b) const {
    return k(v, 0) * number(dots, b) + k(v, 1) * number(dots, 2 + b);
  }

  // <z_v, z_w>; exactly one of a unit vector with itself, since a sum of products rounds.
  T own(int v, int w) const {
    if (is_constant(v, w)) return 1;
    return toward(v, 0) * k(w, 0) + toward(v, 1) * k(w, 1);
  }

  // inner [V, 2, N]: U_vb. set_mixing(v, to_0, to_1) takes the shares of the gradient of mixing.
  template <class SET_MIXING>
  FusedPulls<T> pulls(const T* inner, const T* grad_own_logits,
                                  const SET_MIXING& set_mixing) const {
    FusedPulls<T> sum = {0, 0, 0, 0};
    for (int v = 0; v < views; ++v) {
      const T k_0 = k(v, 0), k_1 = k(v, 1);
      const T u_0 = number(inner, 2 * v), u_1 = number(inner, 2 * v + 1);
      sum.share += T(0.5) * (k_0 * u_0 + k_1 * u_1);
      // <G_v, z_b>; of a view that is a base only its own entry is used, and only that is filled.
      T along_0 = u_0 * scale, along_1 = u_1 * scale, mixed_0 = 0, mixed_1 = 0;
      for (int w = 0; w < views; ++w) {
        const T grad_own = number(grad_own_logits, v * views + w);
        sum.share += grad_own * own(v, w);
        if (is_constant(v, w)) continue;
        const T pull = (grad_own + number(grad_own_logits, w * views + v)) * scale;
        along_0 += pull * toward(w, 0);
        along_1 += pull * toward(w, 1);
        mixed_0 += pull * k(w, 0);
        mixed_1 += pull * k(w, 1);
      }
      if (normalize) {
        // Times zero, so that NaN stays.
        const T along = (k_0 * along_0 + k_1 * along_1) * T(has_length(v) ? 1 : 0);
        mixed_0 -= along * k_0;
        mixed_1 -= along * k_1;
        along_0 -= along * toward(v, 0);
        along_1 -= along * toward(v, 1);
        const T length = has_length(v) ? number(lengths, v) : T(0);
        along_0 *= length > 0 ? 1 / (length * number(inverse, 0)) : T(0);
        along_1 *= length > 0 ? 1 / (length * number(inverse, 1)) : T(0);
      }
      const bool combined = bases[v] < 0;  // else its row of mixing is a constant
      set_mixing(v, combined ? along_0 : T(0), combined ? along_1 : T(0));
      sum.q_00 += k_0 * mixed_0;
      sum.q_01 += k_0 * mixed_1;
      sum.q_11 += k_1 * mixed_1;
    }
    return sum;
  }
};

}  // namespace gcl

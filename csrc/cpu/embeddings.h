// The O(M D) side, sample by sample: unit vectors, own-sample similarities, and their gradients.
// The formulas are those of gcl_kernels/backends/base.py. Included like kernels.h.

template <class T>
INLINE T dot(const T* a, const T* b, int64_t size) {
  auto even = splat<T>(0), odd = splat<T>(0);
  int64_t k = 0;
  for (; k + 2 * lanes<T> <= size; k += 2 * lanes<T>) {
    even += load<T>(a + k) * load<T>(b + k);
    odd += load<T>(a + k + lanes<T>) * load<T>(b + k + lanes<T>);
  }
  T tail = 0;
  for (; k < size; ++k) tail += a[k] * b[k];
  return horizontal_sum<T>(even + odd) + tail;
}

// |e|; of one number without its square, which may overflow.
template <class T>
INLINE T length_of(const T* e, int64_t size) {
  return size == 1 ? std::abs(e[0]) : std::sqrt(dot(e, e, size));
}

// |m0 a + m1 b|, from the sum itself: by the law of cosines it would cancel.
template <class T>
INLINE T mixed_length(const T* a, const T* b, T m0, T m1, int64_t size) {
  if (size == 1) return std::abs(a[0] * m0 + b[0] * m1);
  auto sum = splat<T>(0);
  int64_t k = 0;
  for (; k + lanes<T> <= size; k += lanes<T>) {
    const auto mixed = load<T>(a + k) * m0 + load<T>(b + k) * m1;
    sum += mixed * mixed;
  }
  T tail = 0;
  for (; k < size; ++k) {
    const T mixed = a[k] * m0 + b[k] * m1;
    tail += mixed * mixed;
  }
  return std::sqrt(horizontal_sum<T>(sum) + tail);
}

// to = factor * from
template <class T>
INLINE void scaled_copy(T* to, const T* from, T factor, int64_t size) {
  int64_t k = 0;
  for (; k + lanes<T> <= size; k += lanes<T>) store<T>(to + k, load<T>(from + k) * factor);
  for (; k < size; ++k) to[k] = from[k] * factor;
}

// to = factor * from + sum_b coefficient[b] * part[b], four parts at a time: a loop over them
// took a tenth longer. Both lists have room for four more.
template <class T>
INLINE void combine(T* to, const T* from, T factor, const T** part, T* coefficient, int parts,
                    int64_t size) {
  for (; parts % 4 || !parts; ++parts) part[parts] = from, coefficient[parts] = 0;
  for (int b = 0; b < parts; b += 4, from = to, factor = 1) {
    const T *p = part[b], *q = part[b + 1], *r = part[b + 2], *s = part[b + 3];
    const T of_p = coefficient[b], of_q = coefficient[b + 1], of_r = coefficient[b + 2],
            of_s = coefficient[b + 3];
    int64_t k = 0;
    for (; k + lanes<T> <= size; k += lanes<T>)
      store<T>(to + k, load<T>(from + k) * factor + load<T>(p + k) * of_p +
                           load<T>(q + k) * of_q + load<T>(r + k) * of_r + load<T>(s + k) * of_s);
    for (; k < size; ++k)
      to[k] = from[k] * factor + p[k] * of_p + q[k] * of_q + r[k] * of_r + s[k] * of_s;
  }
}

// One sample: views v, w and bases b, c. A view is made of the bases from first(v) to last(v).
template <class T>
struct Sample {
  const Samples<T>& s;
  int64_t j;

  INLINE T& of(T* table, int row) const { return table[row * s.count + j]; }
  INLINE T of(const T* table, int row) const { return table[row * s.count + j]; }
  INLINE T* z(int b) const { return s.z + (b * s.count + j) * s.dim; }

  INLINE int first(int v) const { return s.views->bases[v] < 0 ? 0 : s.views->bases[v]; }
  INLINE int last(int v) const { return s.views->bases[v] < 0 ? 2 : s.views->bases[v] + 1; }
  INLINE T k(int v, int b) const {
    return s.views->bases[v] < 0 ? of(s.coefficients, 2 * v + b) : T(1);
  }
  INLINE bool has_length(int v) const { return of(s.lengths, v) > s.eps; }

  // A unit vector with itself.
  INLINE bool is_constant(int v, int w) const {
    return v == w && s.normalize && s.views->pairs_itself && has_length(v);
  }

  // <z_v, z_b>
  INLINE T toward(int v, int b) const {
    T sum = 0;
    for (int c = first(v); c < last(v); ++c) sum += k(v, c) * of(s.dots, c * s.bases + b);
    return sum;
  }

  // <z_v, z_w>; exactly one of a unit vector with itself, since a sum of products rounds.
  INLINE T own(int v, int w) const {
    if (is_constant(v, w)) return 1;
    T sum = 0;
    for (int b = first(w); b < last(w); ++b) sum += toward(v, b) * k(w, b);
    return sum;
  }
};

template <class T>
void embed(const Embedding<T>& given, int64_t start, int64_t stop) {
  const Samples<T>& s = given.of;
  const int views = s.views->count;
  for (int64_t j = start; j < stop; ++j) {
    const Sample<T> sample{s, j};
    T norm[max_views], inverse[max_views];
    for (int b = 0; b < s.bases; ++b) {
      const T* e = given.e[b] + j * given.pitch[b];
      T* z = sample.z(b);
      if (!s.normalize) {
        // NaN where e is infinite: its logits of -inf would pass for candidates of weight zero.
        for (int64_t k = 0; k < s.dim; ++k) z[k] = e[k] + e[k] * 0;
        continue;
      }
      norm[b] = length_of(e, s.dim);
      // A length that overflowed to inf makes NaN, where 1 / inf would make zero.
      inverse[b] = T(1) / (norm[b] > s.eps ? norm[b] : s.eps) + norm[b] * 0;
      scaled_copy(z, e, inverse[b], s.dim);
      sample.of(s.inverse, b) = inverse[b];
    }
    for (int b = 0; b < s.bases; ++b)
      for (int c = b; c < s.bases; ++c) {
        const bool asked = given.mixing || s.views->pairs[b * views + c];
        sample.of(s.dots, b * s.bases + c) = sample.of(s.dots, c * s.bases + b) =
            asked ? dot(sample.z(b), sample.z(c), s.dim) : T(0);
      }
    for (int v = 0; v < views; ++v) {
      const int base = s.views->bases[v];
      const auto m = [&](int b) { return given.mixing[2 * v + b]; };
      T length = 0;
      if (s.normalize) {
        length = base >= 0 ? norm[base]
                           : mixed_length(given.e[0] + j * given.pitch[0],
                                          given.e[1] + j * given.pitch[1], m(0), m(1), s.dim);
        sample.of(s.lengths, v) = length;
      }
      for (int b = 0; given.mixing && b < 2; ++b) {
        T coefficient = m(b);
        if (s.normalize && base < 0)
          // A zero vector's are zero; a length of NaN is none, nor is one that overflowed.
          coefficient = length <= s.eps ? T(0) : m(b) / (inverse[b] * length) + length * T(0);
        sample.of(s.coefficients, 2 * v + b) = coefficient;
      }
    }
    for (int v = 0; v < views; ++v)
      for (int w = v; w < views; ++w)
        sample.of(given.own_logits, v * views + w) = sample.of(given.own_logits, w * views + v) =
            s.views->pairs[v * views + w] ? s.scale * sample.own(v, w) : given.absent;
  }
}

template <class T>
void gradients(const EmbeddingGradient<T>& given, int64_t start, int64_t stop) {
  const Samples<T>& s = given.of;
  const int views = s.views->count;
  for (int64_t j = start; j < stop; ++j) {
    const Sample<T> sample{s, j};
    T q[max_views][max_views], share = 0;
    for (int b = 0; b < s.bases; ++b) std::fill_n(q[b], s.bases, T(0));
    const auto sums = [&](int b) { return given.sums + (b * s.count + j) * s.dim; };
    for (int v = 0; v < views; ++v) {
      const int first = sample.first(v), last = sample.last(v);
      // Of bases `first` to `last` <G_v, z_b>, and of all sum_w K_vw k_wc.
      T along[max_views], mixed[max_views];
      std::fill_n(mixed, s.bases, T(0));
      for (int b = first; b < last; ++b) {
        const T inner = given.inner     ? sample.of(given.inner, 2 * v + b)
                        : given.grad[b] ? dot(sums(b), sample.z(b), s.dim)
                                        : T(0);
        share += T(0.5) * sample.k(v, b) * inner;
        along[b] = s.scale * inner;
      }
      for (int w = 0; w < views; ++w) {
        const T grad_own = sample.of(given.grad_own_logits, v * views + w);
        share += grad_own * sample.own(v, w);
        if (sample.is_constant(v, w)) continue;
        const T pull = s.scale * (grad_own + sample.of(given.grad_own_logits, w * views + v));
        for (int b = first; b < last; ++b) along[b] += pull * sample.toward(w, b);
        for (int c = sample.first(w); c < sample.last(w); ++c) mixed[c] += pull * sample.k(w, c);
      }
      T g = 0;
      if (s.normalize) {
        for (int b = first; b < last; ++b) g += sample.k(v, b) * along[b];
        g *= T(sample.has_length(v) ? 1 : 0);  // times zero, so that NaN stays
        for (int b = first; b < last; ++b) mixed[b] -= g * sample.k(v, b);
      }
      for (int b = first; b < last; ++b)
        for (int c = 0; c < s.bases; ++c) q[b][c] += sample.k(v, b) * mixed[c];
      for (int b = 0; given.inner && b < 2; ++b) {
        // Of a view that is a base the row of mixing is a constant.
        T to = s.views->bases[v] < 0 ? along[b] : T(0);
        if (s.views->bases[v] < 0 && s.normalize) {
          to -= g * sample.toward(v, b);
          to *= sample.has_length(v) ? 1 / (sample.of(s.lengths, v) * sample.of(s.inverse, b)) : T(0);
        }
        sample.of(given.shares, 2 * v + b) = to;
      }
    }
    sample.of(given.shares, 2 * views) = share;
    for (int b = 0; b < s.bases; ++b) {
      if (!given.grad[b]) continue;
      const T inverse = s.normalize ? sample.of(s.inverse, b) : T(1);
      const T* z[max_views + 4];
      T coefficient[max_views + 4];
      int parts = 0;
      for (int c = 0; c < s.bases; ++c) {
        if (q[b][c] == 0) continue;  // zero times NaN is not zero
        z[parts] = sample.z(c), coefficient[parts++] = q[b][c] * inverse;
      }
      combine(given.grad[b] + j * s.dim, sums(b), s.scale * inverse, z, coefficient, parts, s.dim);
    }
  }
}

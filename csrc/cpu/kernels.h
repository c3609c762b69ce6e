// What one thread computes of a block: strips of rows. Included like simd.h, once per instruction
// set. Sums run in one order that depends on shapes alone: the same bits with any thread count.
//
// Rows are worked on in chunks of columns that lie in the first-level cache, padded to whole
// vectors. Where a logit is masked (equal sample ids) or padding it becomes -inf, whose exponential
// is exactly zero.

constexpr int chunk = 512;

// Calls masked(q) for every column q in [at, at + count) that is of row i's own sample.
template <class F>
INLINE void for_masked(const Mask& m, int64_t i, int64_t at, int count, const F& masked) {
  for (int64_t n = 0; n < m.num_offsets; ++n) {
    const int64_t q = m.first_row + i + m.offsets[n] - at;
    if (q >= 0 && q < count) masked(int(q));
  }
  if (m.row_ids)
    for (int q = 0; q < count; ++q)
      if (m.row_ids[i] == m.col_ids[at + q]) masked(q);
}

// to[k] = x of row i and column at + k, -inf where masked and in the padding. Returns the padded
// length.
template <class T, class Strip>
INLINE int load_logits(T* to, const Strip& s, int64_t i, int64_t at, int count) {
  const T* from = s.dots + i * s.stride + at;
  int k = 0;
  for (; k + lanes<T> <= count; k += lanes<T>) store<T>(to + k, load<T>(from + k) * s.scale);
  for (; k < count; ++k) to[k] = from[k] * s.scale;
  for (; k % lanes<T>; ++k) to[k] = -std::numeric_limits<T>::infinity();
  for_masked(s.mask, i, at, count, [&](int q) { to[q] = -std::numeric_limits<T>::infinity(); });
  return k;
}

// Every x is at most `bound`, which takes every maximum's place: one exponential for both sides.
template <class T>
void stats_bounded(const StatsStrip<T>& s) {
  T x[chunk];
  for (int64_t i = 0; i < s.rows; ++i) {
    T row_sum = 0;
    for (int64_t at = 0; at < s.cols; at += chunk) {
      const int count = int(std::min<int64_t>(chunk, s.cols - at));
      const int padded = load_logits(x, s, i, at, count);
      auto sum = splat<T>(0);
      for (int k = 0; k < padded; k += lanes<T>) {
        const auto e = exponential<T>(load<T>(x + k) - s.scale);
        sum += e;
        store<T>(s.col_sum + at + k, load<T>(s.col_sum + at + k) + e);
      }
      row_sum += horizontal_sum<T>(sum);
    }
    if (s.serves_rows) s.row_sum[i] += row_sum;
  }
}

// Any range: rows fold into their running statistics; the strip's columns get their own maximum.
template <class T>
void stats_running(const StatsStrip<T>& s) {
  for (int64_t i = 0; i < s.rows; ++i) {
    T* x = s.buffer + i * s.buffer_stride;
    auto most = splat<T>(std::numeric_limits<T>::lowest());
    for (int64_t at = 0; at < s.cols; at += chunk) {
      const int count = int(std::min<int64_t>(chunk, s.cols - at));
      const int padded = load_logits(x + at, s, i, at, count);
      for (int k = 0; k < padded; k += lanes<T>) {
        const auto v = load<T>(x + at + k);
        most = v > most ? v : most;
        const auto col = load<T>(s.col_max + at + k);
        store<T>(s.col_max + at + k, v > col ? v : col);
      }
    }
    if (!s.serves_rows) continue;
    const T row_max = horizontal_max<T>(most);
    auto sum = splat<T>(0);
    for (int64_t k = 0; k < s.cols; k += lanes<T>) sum += exponential<T>(load<T>(x + k) - row_max);
    fold(s.row_max[i], s.row_sum[i], row_max, horizontal_sum<T>(sum));
  }
  if (!s.serves_cols) return;
  for (int64_t i = 0; i < s.rows; ++i) {
    const T* x = s.buffer + i * s.buffer_stride;
    for (int64_t k = 0; k < s.cols; k += lanes<T>) {
      const auto e = exponential<T>(load<T>(x + k) - load<T>(s.col_max + k));
      store<T>(s.col_sum + k, load<T>(s.col_sum + k) + e);
    }
  }
}

// H_pq = g_p exp(x - lse_p) + g_q exp(x - lse_q). A side that is not served has g = 0, lse = +inf.
template <class T>
void weights(const WeightsStrip<T>& s) {
  T x[chunk];
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t at = 0; at < s.cols; at += chunk) {
      const int count = int(std::min<int64_t>(chunk, s.cols - at));
      const int padded = load_logits(x, s, i, at, count);
      for (int k = 0; k < padded; k += lanes<T>) {
        const auto v = load<T>(x + k);
        typename Simd<T>::Vec h;
        if (s.bounded) {
          // exp(x - lse) = exp(x - s) exp(s - lse): the factors are in `row` and `col`.
          h = exponential<T>(v - s.scale) * (load<T>(s.col_factor + at + k) + s.row_factor[i]);
        } else {
          h = exponential<T>(v - s.row_lse[i]) * s.row_factor[i] +
              exponential<T>(v - load<T>(s.col_lse + at + k)) * load<T>(s.col_factor + at + k);
        }
        store<T>(x + k, h);
      }
      std::memcpy(s.out + i * s.out_stride + at, x, count * sizeof(T));
    }
  }
}

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

// to = factor * from
template <class T>
INLINE void scaled_copy(T* to, const T* from, T factor, int64_t size) {
  int64_t k = 0;
  for (; k + lanes<T> <= size; k += lanes<T>) store<T>(to + k, load<T>(from + k) * factor);
  for (; k < size; ++k) to[k] = from[k] * factor;
}

// 1 / max(norm, eps). 0 * norm: a length that overflowed to inf makes NaN, where 1 / inf would make
// zero.
template <class T>
INLINE T inverse_norm(T norm, T eps) {
  return T(1) / (norm > eps ? norm : eps) + norm * 0;
}

// z = e, NaN where e is infinite: its logits of -inf would pass for candidates of weight zero.
template <class T>
INLINE void checked_copy(T* z, const T* e, int64_t size) {
  for (int64_t k = 0; k < size; ++k) z[k] = e[k] + e[k] * 0;
}

template <class T>
struct Length {
  T norm, inverse;
};

// z = e / max(|e|, eps), or e itself where `s` does not normalise.
template <class T, class S>
INLINE Length<T> write_unit(T* z, const T* e, const S& s) {
  if (!s.normalize) {
    checked_copy(z, e, s.dim);
    return {1, 1};
  }
  const T norm = length_of(e, s.dim), inverse = inverse_norm(norm, s.eps);
  scaled_copy(z, e, inverse, s.dim);
  return {norm, inverse};
}

// to = factor * from + sum_b coefficient[b] * part[b]
template <class T>
INLINE void combine(T* to, const T* from, T factor, const T* const* part, const T* coefficient,
                    int parts, int64_t size) {
  int64_t k = 0;
  for (; k + lanes<T> <= size; k += lanes<T>) {
    auto sum = load<T>(from + k) * factor;
    for (int b = 0; b < parts; ++b) sum += load<T>(part[b] + k) * coefficient[b];
    store<T>(to + k, sum);
  }
  for (; k < size; ++k) {
    T sum = from[k] * factor;
    for (int b = 0; b < parts; ++b) sum += part[b][k] * coefficient[b];
    to[k] = sum;
  }
}

// z = e / max(|e|, eps) and the own-sample dots of samples `start` to `stop`.
template <class T>
void embed(const Embedding<T>& s, int64_t start, int64_t stop) {
  for (int64_t j = start; j < stop; ++j) {
    for (int v = 0; v < s.views; ++v) {
      const int64_t row = v * s.samples + j;
      const auto length = write_unit(s.z + row * s.dim, s.e[v] + j * s.pitch[v], s);
      if (s.normalize) s.norm[row] = length.norm, s.inverse[row] = length.inverse;
    }
    for (int a = 0; a < s.views; ++a) {
      for (int b = a; b < s.views; ++b) {
        const bool asked = s.pairs[a * s.views + b];
        const T* z_a = s.z + (a * s.samples + j) * s.dim;
        const T own = asked ? dot(z_a, s.z + (b * s.samples + j) * s.dim, s.dim) : T(0);
        for (const int64_t at : {a * s.views + b, b * s.views + a}) {
          s.own[at * s.samples + j] = own;
          s.own_logits[at * s.samples + j] = asked ? s.scale * own : s.absent;
        }
      }
    }
  }
}

// dL/de of samples `start` to `stop`, and their rows' shares of dL/ds. A view whose gradient is not
// needed has none, and no share of its <z_a, (H z)_a>.
template <class T>
void embed_backward(const EmbeddingGradient<T>& s, int64_t start, int64_t stop) {
  const int views = s.views;
  const auto at = [&](int a, int b, int64_t j) { return (a * views + b) * s.samples + j; };
  for (int64_t j = start; j < stop; ++j) {
    for (int a = 0; a < views; ++a) {
      const int64_t row = a * s.samples + j;
      T share = 0;
      for (int b = 0; b < views; ++b) share += s.grad_own_logits[at(a, b, j)] * s.own[at(a, b, j)];
      s.grad_scale[row] = share;
      if (!s.grad[a]) continue;
      const T* hz = s.hz + row * s.dim;
      const T q = dot(hz, s.z + row * s.dim, s.dim);
      s.grad_scale[row] += q / 2;
      T coefficient[max_views];
      T along = s.scale * q;
      for (int b = 0; b < views; ++b) {
        coefficient[b] =
            s.scale * (s.grad_own_logits[at(a, b, j)] + s.grad_own_logits[at(b, a, j)]);
        along += coefficient[b] * s.own[at(a, b, j)];
      }
      T inverse = 1;
      if (s.normalize) {
        if (s.norm[row] > s.eps) coefficient[a] -= along;
        inverse = s.inverse[row];
      }
      const T* z[max_views];
      for (int b = 0; b < views; ++b) {
        coefficient[b] *= inverse;
        z[b] = s.z + (b * s.samples + j) * s.dim;
      }
      combine(s.grad[a] + j * s.dim, hz, s.scale * inverse, z, coefficient, views, s.dim);
    }
  }
}

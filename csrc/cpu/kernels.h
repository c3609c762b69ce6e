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
template <class T>
INLINE int load_logits(T* to, const Strip<T>& s, int64_t i, int64_t at, int count) {
  const T* from = s.y[0][0] + i * s.stride + at;
  int k = 0;
  for (; k + lanes<T> <= count; k += lanes<T>) store<T>(to + k, load<T>(from + k) * s.scale);
  for (; k < count; ++k) to[k] = from[k] * s.scale;
  for (; k % lanes<T>; ++k) to[k] = -std::numeric_limits<T>::infinity();
  for_masked(s.mask, i, at, count, [&](int q) { to[q] = -std::numeric_limits<T>::infinity(); });
  return k;
}

// Every x is at most `bound`, which takes every maximum's place: one exponential for both sides.
template <class T>
void stats_bounded(const Strip<T>& s) {
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

// What a logit of row i of view v against columns of view w is to the row's anchor and to the
// column's: with the candidate's log weight, -inf above the anchor's limit.
template <class T, bool one_sided>
struct Terms {
  T row_log_weight, row_limit;
  const T *col_log_weight, *col_limit;

  INLINE Terms(const Strip<T>& s, int64_t i, int64_t at, int v = 0, int w = 0) {
    if (!one_sided) return;
    row_log_weight = s.row_log_weight[v * s.row_pitch + i];
    row_limit = s.row_limit[v * s.row_pitch + i];
    col_log_weight = s.col_log_weight + w * s.col_pitch + at;
    col_limit = s.col_limit + w * s.col_pitch + at;
  }

  INLINE typename Simd<T>::Vec row(typename Simd<T>::Vec x, int64_t k) const {
    if (!one_sided) return x;
    return (x > row_limit ? splat<T>(-std::numeric_limits<T>::infinity()) : x) +
           load<T>(col_log_weight + k);
  }

  INLINE typename Simd<T>::Vec col(typename Simd<T>::Vec x, int64_t k) const {
    if (!one_sided) return x;
    return (x > load<T>(col_limit + k) ? splat<T>(-std::numeric_limits<T>::infinity()) : x) +
           row_log_weight;
  }
};

// Any range: rows fold into their running statistics; the strip's columns get their own maximum.
template <class T, bool one_sided>
INLINE void stats_of_any_range(const Strip<T>& s) {
  for (int64_t i = 0; i < s.rows; ++i) {
    const Terms<T, one_sided> terms(s, i, 0);
    T* x = s.buffer + i * s.col_pitch;
    auto most = splat<T>(std::numeric_limits<T>::lowest());
    for (int64_t at = 0; at < s.cols; at += chunk) {
      const int count = int(std::min<int64_t>(chunk, s.cols - at));
      const int padded = load_logits(x + at, s, i, at, count);
      for (int k = 0; k < padded; k += lanes<T>) {
        const auto v = load<T>(x + at + k);
        const auto of_row = terms.row(v, at + k), of_col = terms.col(v, at + k);
        most = of_row > most ? of_row : most;
        const auto col = load<T>(s.col_max + at + k);
        store<T>(s.col_max + at + k, of_col > col ? of_col : col);
      }
    }
    if (!s.serves_rows) continue;
    const T row_max = horizontal_max<T>(most);
    auto sum = splat<T>(0);
    for (int64_t k = 0; k < s.cols; k += lanes<T>)
      sum += exponential<T>(terms.row(load<T>(x + k), k) - row_max);
    fold(s.row_max[i], s.row_sum[i], row_max, horizontal_sum<T>(sum));
  }
  if (!s.serves_cols) return;
  for (int64_t i = 0; i < s.rows; ++i) {
    const Terms<T, one_sided> terms(s, i, 0);
    const T* x = s.buffer + i * s.col_pitch;
    for (int64_t k = 0; k < s.cols; k += lanes<T>) {
      const auto e = exponential<T>(terms.col(load<T>(x + k), k) - load<T>(s.col_max + k));
      store<T>(s.col_sum + k, load<T>(s.col_sum + k) + e);
    }
  }
}

template <class T>
void stats_running(const Strip<T>& s) {
  s.one_sided ? stats_of_any_range<T, true>(s) : stats_of_any_range<T, false>(s);
}

// H_pq = g_p exp(x - lse_p) + g_q exp(x - lse_q). A side that is not served has g = 0, lse = +inf.
template <class T, bool one_sided>
INLINE void weights_of(const Strip<T>& s) {
  T x[chunk];
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t at = 0; at < s.cols; at += chunk) {
      const int count = int(std::min<int64_t>(chunk, s.cols - at));
      const int padded = load_logits(x, s, i, at, count);
      const Terms<T, one_sided> terms(s, i, at);
      for (int k = 0; k < padded; k += lanes<T>) {
        const auto v = load<T>(x + k);
        typename Simd<T>::Vec h;
        if (s.bounded) {
          // exp(x - lse) = exp(x - s) exp(s - lse): the factors are in `row` and `col`.
          h = exponential<T>(v - s.scale) * (load<T>(s.col_factor + at + k) + s.row_factor[i]);
        } else {
          h = exponential<T>(terms.row(v, k) - s.row_lse[i]) * s.row_factor[i] +
              exponential<T>(terms.col(v, k) - load<T>(s.col_lse + at + k)) *
                  load<T>(s.col_factor + at + k);
        }
        store<T>(x + k, h);
      }
      std::memcpy(s.out[0][0] + i * s.out_stride + at, x, count * sizeof(T));
    }
  }
}

template <class T>
void weights(const Strip<T>& s) {
  s.one_sided ? weights_of<T, true>(s) : weights_of<T, false>(s);
}

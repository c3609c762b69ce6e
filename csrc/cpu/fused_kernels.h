// Score fusion: the strips of rows of a block over samples, whose four products give the logits of
// V x V pairs of views. Included like kernels.h.
//
//   toward[w][b] = <z_b^j, z_w^k>          (base b against view w)
//   away[v][c]   = <z_v^j, z_c^k>          (view v against base c)
//   x_vw         = s * sum_b coefficient[v][b] toward[w][b]

constexpr int fused_chunk = 128;

// One row of one chunk of columns.
template <class T>
struct FusedRow {
  T y[2][2][fused_chunk];
  T mixed_toward[max_views][2][fused_chunk];
  T mixed_away[max_views][2][fused_chunk];
  typename Simd<T>::Lane keep[fused_chunk];
  const T* toward[max_views][2];
  const T* away[max_views][2];
  int padded;
};

template <class T>
INLINE void load_row(FusedRow<T>& r, const Strip<T>& s, int64_t i, int64_t at, bool need_away) {
  const int count = int(std::min<int64_t>(fused_chunk, s.cols - at));
  r.padded = (count + lanes<T> - 1) / lanes<T> * lanes<T>;
  for (int b = 0; b < 2; ++b) {
    for (int c = 0; c < 2; ++c) {
      std::memcpy(r.y[b][c], s.y[b][c] + i * s.stride + at, count * sizeof(T));
      for (int k = count; k < r.padded; ++k) r.y[b][c][k] = 0;
    }
  }
  for (int k = 0; k < r.padded; ++k) r.keep[k] = -(k < count);
  for_masked(s.mask, i, at, count, [&](int q) { r.keep[q] = 0; });
  for (int v = 0; v < s.views; ++v) {
    for (int b = 0; b < 2; ++b) {
      if (s.bases[v] >= 0) {
        r.toward[v][b] = r.y[b][s.bases[v]];
        r.away[v][b] = r.y[s.bases[v]][b];
        continue;
      }
      const T* c0 = s.col_coefficient + (v * 2 + 0) * s.col_pitch + at;
      const T* c1 = s.col_coefficient + (v * 2 + 1) * s.col_pitch + at;
      for (int k = 0; k < r.padded; k += lanes<T>)
        store<T>(r.mixed_toward[v][b] + k, load<T>(r.y[b][0] + k) * load<T>(c0 + k) +
                                               load<T>(r.y[b][1] + k) * load<T>(c1 + k));
      r.toward[v][b] = r.mixed_toward[v][b];
      if (!need_away) continue;
      const T r0 = s.row_coefficient[(v * 2 + 0) * s.row_pitch + i];
      const T r1 = s.row_coefficient[(v * 2 + 1) * s.row_pitch + i];
      for (int k = 0; k < r.padded; k += lanes<T>)
        store<T>(r.mixed_away[v][b] + k,
                 load<T>(r.y[0][b] + k) * r0 + load<T>(r.y[1][b] + k) * r1);
      r.away[v][b] = r.mixed_away[v][b];
    }
  }
}

// x_vw of one row, -inf where masked.
template <class T>
struct PairLogits {
  const T *toward0, *toward1;
  const typename Simd<T>::Lane* keep;
  T scale0, scale1;

  INLINE PairLogits(const FusedRow<T>& r, const Strip<T>& s, int64_t i, int v, int w)
      : toward0(r.toward[w][0]), toward1(r.toward[w][1]), keep(r.keep) {
    if (s.bases[v] >= 0) {
      toward0 = toward1 = r.toward[w][s.bases[v]];
      scale0 = s.scale;
      scale1 = 0;
    } else {
      scale0 = s.row_coefficient[(v * 2 + 0) * s.row_pitch + i] * s.scale;
      scale1 = s.row_coefficient[(v * 2 + 1) * s.row_pitch + i] * s.scale;
    }
  }

  INLINE typename Simd<T>::Vec operator()(int k) const {
    typename Simd<T>::Int mask;
    __builtin_memcpy(&mask, keep + k, sizeof(mask));
    const auto x = load<T>(toward0 + k) * scale0 + load<T>(toward1 + k) * scale1;
    return mask != 0 ? x : splat<T>(-std::numeric_limits<T>::infinity());
  }
};

template <class T>
void fused_stats_bounded(const Strip<T>& s) {
  FusedRow<T> r;
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t at = 0; at < s.cols; at += fused_chunk) {
      load_row(r, s, i, at, false);
      for (int v = 0; v < s.views; ++v) {
        auto row_sum = splat<T>(0);
        for (int w = 0; w < s.views; ++w) {
          const bool row = s.candidates[v * s.views + w], col = s.candidates[w * s.views + v];
          if (!row && !col) continue;
          const PairLogits<T> logits(r, s, i, v, w);
          T* col_sum = s.col_sum + w * s.col_pitch + at;
          for (int k = 0; k < r.padded; k += lanes<T>) {
            const auto e = exponential<T>(logits(k) - s.scale);
            if (row) row_sum += e;
            if (col) store<T>(col_sum + k, load<T>(col_sum + k) + e);
          }
        }
        s.row_sum[v * s.row_pitch + i] += horizontal_sum<T>(row_sum);
      }
    }
  }
}

template <class T, bool one_sided>
INLINE void fused_stats_of_any_range(const Strip<T>& s) {
  FusedRow<T> r;
  const int pairs = s.views * s.views;
  const auto logits_of = [&](int64_t i, int pair) {
    return s.buffer + (i * pairs + pair) * s.col_pitch;
  };
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t at = 0; at < s.cols; at += fused_chunk) {
      load_row(r, s, i, at, false);
      for (int v = 0; v < s.views; ++v) {
        for (int w = 0; w < s.views; ++w) {
          const PairLogits<T> logits(r, s, i, v, w);
          T* x = logits_of(i, v * s.views + w) + at;
          T* col_max = s.col_max + w * s.col_pitch + at;
          const bool col = s.candidates[w * s.views + v];
          const Terms<T, one_sided> terms(s, i, at, v, w);
          for (int k = 0; k < r.padded; k += lanes<T>) {
            const auto value = logits(k), of_col = terms.col(value, k);
            store<T>(x + k, value);
            const auto most = load<T>(col_max + k);
            if (col) store<T>(col_max + k, of_col > most ? of_col : most);
          }
        }
      }
    }
    for (int v = 0; v < s.views; ++v) {
      auto most = splat<T>(std::numeric_limits<T>::lowest());
      for (int w = 0; w < s.views; ++w) {
        if (!s.candidates[v * s.views + w]) continue;
        const T* x = logits_of(i, v * s.views + w);
        const Terms<T, one_sided> terms(s, i, 0, v, w);
        for (int64_t k = 0; k < s.cols; k += lanes<T>) {
          const auto value = terms.row(load<T>(x + k), k);
          most = value > most ? value : most;
        }
      }
      const T row_max = horizontal_max<T>(most);
      auto sum = splat<T>(0);
      for (int w = 0; w < s.views; ++w) {
        if (!s.candidates[v * s.views + w]) continue;
        const T* x = logits_of(i, v * s.views + w);
        const Terms<T, one_sided> terms(s, i, 0, v, w);
        for (int64_t k = 0; k < s.cols; k += lanes<T>)
          sum += exponential<T>(terms.row(load<T>(x + k), k) - row_max);
      }
      fold(s.row_max[v * s.row_pitch + i], s.row_sum[v * s.row_pitch + i], row_max,
           horizontal_sum<T>(sum));
    }
  }
  if (!s.serves_cols) return;
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int v = 0; v < s.views; ++v) {
      for (int w = 0; w < s.views; ++w) {
        if (!s.candidates[w * s.views + v]) continue;
        const T* x = logits_of(i, v * s.views + w);
        const T* col_max = s.col_max + w * s.col_pitch;
        T* col_sum = s.col_sum + w * s.col_pitch;
        const Terms<T, one_sided> terms(s, i, 0, v, w);
        for (int64_t k = 0; k < s.cols; k += lanes<T>) {
          const auto e = exponential<T>(terms.col(load<T>(x + k), k) - load<T>(col_max + k));
          store<T>(col_sum + k, load<T>(col_sum + k) + e);
        }
      }
    }
  }
}

template <class T>
void fused_stats_running(const Strip<T>& s) {
  s.one_sided ? fused_stats_of_any_range<T, true>(s) : fused_stats_of_any_range<T, false>(s);
}

// F_bc = sum_vw coefficient[v][b] coefficient[w][c] H_vw, and what the coefficients' gradients are
// made of: row_inner[v][b] = sum over w, k of H_vw toward[w][b], col_inner[w][c] = sum over v, j of
// H_vw away[v][c].
template <class T, bool one_sided>
INLINE void fused_weights_of(const Strip<T>& s) {
  FusedRow<T> r;
  T f[2][2][fused_chunk], g[2][fused_chunk];
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t at = 0; at < s.cols; at += fused_chunk) {
      load_row(r, s, i, at, true);
      std::memset(f, 0, sizeof(f));
      for (int v = 0; v < s.views; ++v) {
        std::memset(g, 0, sizeof(g));
        const int base_v = s.bases[v];
        const T row_factor = s.row_factor[v * s.row_factor_pitch + i];
        const T row_lse = s.row_lse[v * s.row_factor_pitch + i];
        auto inner0 = splat<T>(0), inner1 = splat<T>(0);
        for (int w = 0; w < s.views; ++w) {
          const bool row = s.candidates[v * s.views + w], col = s.candidates[w * s.views + v];
          if (!row && !col) continue;
          const PairLogits<T> logits(r, s, i, v, w);
          const Terms<T, one_sided> terms(s, i, at, v, w);
          const int base_w = s.bases[w];
          const T* col_lse = s.col_lse + w * s.col_pitch + at;
          const T* col_factor = s.col_factor + w * s.col_pitch + at;
          const T* toward0 = r.toward[w][base_v >= 0 ? base_v : 0];
          const T* toward1 = r.toward[w][1];
          const T* away0 = r.away[v][base_w >= 0 ? base_w : 0];
          const T* away1 = r.away[v][1];
          T* col_inner0 = s.col_inner + (w * 2 + (base_w >= 0 ? base_w : 0)) * s.col_pitch + at;
          T* col_inner1 = s.col_inner + (w * 2 + 1) * s.col_pitch + at;
          T* g0 = g[base_w >= 0 ? base_w : 0];
          const T* c0 = s.col_coefficient + (w * 2 + 0) * s.col_pitch + at;
          const T* c1 = s.col_coefficient + (w * 2 + 1) * s.col_pitch + at;
          for (int k = 0; k < r.padded; k += lanes<T>) {
            const auto x = logits(k);
            auto h = splat<T>(0);
            if (s.bounded) {
              auto factor = splat<T>(row ? row_factor : T(0));
              if (col) factor += load<T>(col_factor + k);
              h = exponential<T>(x - s.scale) * factor;
            } else {
              if (row) h = exponential<T>(terms.row(x, k) - row_lse) * row_factor;
              if (col)
                h += exponential<T>(terms.col(x, k) - load<T>(col_lse + k)) *
                     load<T>(col_factor + k);
            }
            inner0 += h * load<T>(toward0 + k);
            if (base_v < 0) inner1 += h * load<T>(toward1 + k);
            store<T>(col_inner0 + k, load<T>(col_inner0 + k) + h * load<T>(away0 + k));
            if (base_w >= 0) {
              store<T>(g0 + k, load<T>(g0 + k) + h);
            } else {
              store<T>(col_inner1 + k, load<T>(col_inner1 + k) + h * load<T>(away1 + k));
              store<T>(g[0] + k, load<T>(g[0] + k) + h * load<T>(c0 + k));
              store<T>(g[1] + k, load<T>(g[1] + k) + h * load<T>(c1 + k));
            }
          }
        }
        s.row_inner[(v * 2 + (base_v >= 0 ? base_v : 0)) * s.row_pitch + i] +=
            horizontal_sum<T>(inner0);
        if (base_v < 0) s.row_inner[(v * 2 + 1) * s.row_pitch + i] += horizontal_sum<T>(inner1);
        for (int b = 0; b < 2; ++b) {
          if (base_v >= 0 && base_v != b) continue;
          const T coefficient = s.row_coefficient[(v * 2 + b) * s.row_pitch + i];
          for (int c = 0; c < 2; ++c)
            for (int k = 0; k < r.padded; k += lanes<T>)
              store<T>(f[b][c] + k, load<T>(f[b][c] + k) + load<T>(g[c] + k) * coefficient);
        }
      }
      const int count = int(std::min<int64_t>(fused_chunk, s.cols - at));
      for (int b = 0; b < 2; ++b)
        for (int c = 0; c < 2; ++c)
          std::memcpy(s.out[b][c] + i * s.out_stride + at, f[b][c], count * sizeof(T));
    }
  }
}

template <class T>
void fused_weights(const Strip<T>& s) {
  s.one_sided ? fused_weights_of<T, true>(s) : fused_weights_of<T, false>(s);
}

// The product and the block functions: blocks cut into strips, strips shared among threads.
//
// Addresses and sizes in, no tensors. The caller (gcl_kernels/backends/cpu.py) answers for shapes,
// dtypes and contiguity. Whatever the number of threads, results are the same bits: strips depend
// on shapes alone, and what several strips add to one column is folded in their order.

#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "products.hpp"

namespace py = pybind11;

namespace gcl {

using Address = uintptr_t;

constexpr int64_t strip_rows = 32;
constexpr int64_t fused_strip_rows = 8;
constexpr int64_t padding = 16;
// Less work than this is done before another thread has woken up: logits, and numbers to copy.
constexpr int64_t parallel_elements = 16384;
constexpr int64_t parallel_copies = 65536;
constexpr int64_t parallel_products = 1 << 20;
constexpr int64_t product_part_rows = 96;

template <class T>
T* at(Address address, int64_t offset = 0) {
  return reinterpret_cast<T*>(address) + offset;
}

// How many parts of this size make up the whole, the last one maybe short.
static int64_t parts_of(int64_t whole, int64_t size) { return (whole + size - 1) / size; }

static int64_t padded(int64_t count) { return parts_of(count, padding) * padding; }

template <class F>
static void for_each_strip(int64_t count, int threads, bool parallel, const F& body) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parallel && threads > 1)
#endif
  for (int64_t strip = 0; strip < count; ++strip) body(strip);
  (void)threads, (void)parallel;
}

// The own product's parts of C come in any order: none depends on another, nor on how C is cut.
template <class T>
static void product(int threads, int64_t rows, int64_t depth, int64_t cols, Address a,
                    int64_t a_pitch, bool a_transposed, Address b, int64_t b_pitch,
                    bool b_transposed, Address c, int64_t c_pitch, bool add) {
  const Product<T> s{rows,         cols, depth,        at<T>(a), at<T>(b), a_pitch, b_pitch,
                     a_transposed, b_transposed, at<T>(c), c_pitch,  add};
  if (products_in_use == Products::blas) {
    py::gil_scoped_release release;
    blas_product(s);
    return;
  }
  const bool parallel = rows * cols * depth >= parallel_products;
  // Narrower panels where a few wide ones would leave threads without work.
  int64_t width = product_cols;
  while (parallel && width > padding &&
         parts_of(cols, width) * parts_of(rows, product_part_rows) < threads)
    width /= 2;
  const int64_t panels = parts_of(cols, width);
  // Several parts a thread, so that none waits long for another; but each copies its slice of a
  // transposed B anew, which many rows must pay for.
  const int64_t wanted = parts_of(4 * threads, panels);
  const int64_t parts = std::max<int64_t>(1, std::min(rows / product_part_rows, wanted));
  const int64_t part_rows = parts_of(rows / parts, product_tile_rows) * product_tile_rows;
  // C = A A^T: multiplied from the diagonal's panel on, and mirrored.
  const bool symmetric = a == b && a_pitch == b_pitch && !a_transposed && b_transposed &&
                         rows == cols && !add;
  py::gil_scoped_release release;
  for_each_strip(panels * parts_of(rows, part_rows), threads, parallel, [&](int64_t task) {
    const int64_t start = task % panels * width, first = task / panels * part_rows;
    const int64_t stop = std::min(cols, start + width);
    const int64_t last = std::min(symmetric ? stop : rows, first + part_rows);
    if (first < last) kernels<T>().product(s, first, last, start, stop);
  });
  if (!symmetric) return;
  for_each_strip(panels, threads, parallel, [&](int64_t panel) {
    const int64_t start = panel * width;
    kernels<T>().mirror(s, start, std::min(cols, start + width));
  });
}

// A block's place, whom it serves, and its mask under the default ids. Made once for a plan.
struct BlockPlace {
  int64_t row_start, rows, col_start, cols;
  bool serves_rows, serves_cols, diagonal;
  std::vector<int64_t> offsets;

  // The columns of a block on the diagonal are its rows: sums of both would count them twice.
  bool sums_cols() const { return serves_cols && !diagonal; }

  // Ids: 0 for the default ones.
  Mask mask(int64_t first_row, Address row_ids, Address col_ids) const {
    if (row_ids)
      return {at<const int64_t>(row_ids, row_start + first_row),
              at<const int64_t>(col_ids, col_start), nullptr, 0, first_row};
    return {nullptr, nullptr, offsets.data(), int64_t(offsets.size()), first_row};
  }
};

// What the blocks of a pass share: rows against columns, the same ones in a square problem.
struct Problem {
  int threads;
  double scale;
  bool bounded;
  Address row_ids, col_ids;  // 0: the default ones
  Address z;                 // of a square problem; of two bases in score fusion
  int64_t rows, cols, dim;   // of embeddings; of samples in score fusion
  const Views* fused;        // score fusion's views, or null
  Address row_coefficients, col_coefficients;
  // 0, or tables in the accumulation dtype as problem.py has them, rows and columns alike: all four
  // then.
  Address row_log_weights, col_log_weights, row_limits, col_limits;

  bool one_sided() const { return row_limits != 0; }
  int bases() const { return fused ? 2 : 1; }
  int64_t views() const { return fused ? fused->count : 1; }
  int64_t strip_size() const { return fused ? fused_strip_rows : strip_rows; }
  int64_t strips(const BlockPlace& b) const { return parts_of(b.rows, strip_size()); }
};

// A block's columns of an array of `rows` rows, each padded with zeros.
template <class T>
static std::vector<T> columns(const Problem& p, const BlockPlace& b, Address from, int64_t rows) {
  const int64_t pitch = padded(b.cols);
  std::vector<T> to(rows * pitch, T(0));
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(to.data() + r * pitch, at<T>(from, r * p.cols + b.col_start), b.cols * sizeof(T));
  return to;
}

// Calls body(strip, its number, its first row) with what all passes ask of a strip.
template <class T, class F>
static void for_strips(const Problem& p, const BlockPlace& b, Address tile, int64_t stride,
                       const F& body) {
  const int64_t views = p.one_sided() ? p.views() : 0;
  const auto coefficients = columns<T>(p, b, p.col_coefficients, p.fused ? 2 * p.views() : 0);
  const auto log_weights = columns<T>(p, b, p.col_log_weights, views);
  const auto limits = columns<T>(p, b, p.col_limits, views);
  py::gil_scoped_release release;
  const bool parallel = b.rows * b.cols >= parallel_elements;
  for_each_strip(p.strips(b), p.threads, parallel, [&](int64_t number) {
    const int64_t start = number * p.strip_size();
    Strip<T> s{};
    for (int base = 0; base < p.bases() * p.bases(); ++base)
      s.y[base / 2][base % 2] = at<T>(tile, (base * b.rows + start) * stride);
    s.stride = stride, s.rows = std::min(p.strip_size(), b.rows - start), s.cols = b.cols;
    s.scale = T(p.scale), s.bounded = p.bounded;
    s.mask = b.mask(start, p.row_ids, p.col_ids);
    s.serves_rows = b.serves_rows, s.serves_cols = b.sums_cols();
    s.row_pitch = p.rows, s.col_pitch = padded(b.cols);
    if ((s.one_sided = p.one_sided())) {
      s.row_log_weight = at<T>(p.row_log_weights, b.row_start + start);
      s.row_limit = at<T>(p.row_limits, b.row_start + start);
      s.col_log_weight = log_weights.data(), s.col_limit = limits.data();
    }
    if (p.fused) {
      s.views = p.fused->count, s.bases = p.fused->bases, s.candidates = p.fused->pairs;
      s.row_coefficient = at<T>(p.row_coefficients, b.row_start + start);
      s.col_coefficient = coefficients.data();
    }
    body(s, number, start);
  });
}

template <class T>
static void block_stats(const Problem& p, const BlockPlace& b, Address tile, int64_t stride,
                        Address max, Address sum, Address col_max, Address col_sum) {
  const int64_t pitch = padded(b.cols), size = p.views() * pitch, strips = p.strips(b);
  std::vector<T> strip_max(p.bounded ? 0 : strips * size, std::numeric_limits<T>::lowest());
  std::vector<T> strip_sum(strips * size, T(0));
  for_strips<T>(p, b, tile, stride, [&](Strip<T>& s, int64_t number, int64_t start) {
    const Kernels<T>& of = kernels<T>();
    s.row_sum = at<T>(sum, b.row_start + start);
    s.col_sum = strip_sum.data() + number * size;
    if (p.bounded) {
      (p.fused ? of.fused_stats_bounded : of.stats_bounded)(s);
      return;
    }
    std::vector<T> buffer(s.rows * p.views() * size);
    s.row_max = at<T>(max, b.row_start + start);
    s.col_max = strip_max.data() + number * size;
    s.buffer = buffer.data();
    (p.fused ? of.fused_stats_running : of.stats_running)(s);
  });
  for (int64_t number = 0; b.sums_cols() && number < strips; ++number) {
    for (int64_t v = 0; v < p.views(); ++v) {
      const int64_t part = number * size + v * pitch, total = v * p.cols + b.col_start;
      for (int64_t k = 0; k < b.cols; ++k) {
        if (p.bounded)
          at<T>(col_sum, total)[k] += strip_sum[part + k];
        else
          fold(at<T>(col_max, total)[k], at<T>(col_sum, total)[k], strip_max[part + k],
               strip_sum[part + k]);
      }
    }
  }
}

// A side's factor: g exp(s - lse) of a bounded problem, else g; zero where it is not served.
template <class T>
static void factors(T* factor, T* lse, const T* from_grad, const T* from_lse, int64_t count,
                    bool serves, bool bounded, T scale) {
  for (int64_t k = 0; k < count; ++k) {
    lse[k] = serves ? from_lse[k] : std::numeric_limits<T>::infinity();
    factor[k] = !serves ? T(0) : bounded ? from_grad[k] * std::exp(scale - lse[k]) : from_grad[k];
  }
}

// Inner: of score fusion alone.
template <class T>
static void block_weights(const Problem& p, const BlockPlace& b, Address tile, int64_t stride,
                          Address row_lse, Address row_grad, Address row_inner, Address col_lse,
                          Address col_grad, Address col_inner, Address out, int64_t out_stride) {
  const int64_t views = p.views(), pitch = padded(b.cols), size = 2 * views * pitch;
  // Padded columns have factor zero and, being masked, logits of -inf.
  auto col_l = columns<T>(p, b, col_lse, views), col_f = columns<T>(p, b, col_grad, views);
  std::vector<T> row_l(views * b.rows), row_f(views * b.rows);
  for (int64_t v = 0; v < views; ++v) {
    T *of_cols = col_f.data() + v * pitch, *l = col_l.data() + v * pitch;
    factors(of_cols, l, of_cols, l, b.cols, b.serves_cols, p.bounded, T(p.scale));
    const int64_t from = v * p.rows + b.row_start;
    factors(row_f.data() + v * b.rows, row_l.data() + v * b.rows, at<T>(row_grad, from),
            at<T>(row_lse, from), b.rows, b.serves_rows, p.bounded, T(p.scale));
  }
  const int64_t strips = p.fused ? p.strips(b) : 0;
  std::vector<T> strip_inner(strips * size, T(0));
  for_strips<T>(p, b, tile, stride, [&](Strip<T>& s, int64_t number, int64_t start) {
    s.row_lse = row_l.data() + start, s.row_factor = row_f.data() + start;
    s.row_factor_pitch = b.rows;
    s.col_lse = col_l.data(), s.col_factor = col_f.data();
    s.row_inner = at<T>(row_inner, b.row_start + start);
    s.col_inner = strip_inner.data() + number * size;
    for (int base = 0; base < p.bases() * p.bases(); ++base)
      s.out[base / 2][base % 2] = at<T>(out, (base * b.rows + start) * out_stride);
    s.out_stride = out_stride;
    (p.fused ? kernels<T>().fused_weights : kernels<T>().weights)(s);
  });
  for (int64_t number = 0; b.sums_cols() && number < strips; ++number) {
    for (int64_t v = 0; v < views * 2; ++v) {
      const T* part = strip_inner.data() + number * size + v * pitch;
      T* total = at<T>(col_inner, v * p.cols + b.col_start);
      for (int64_t k = 0; k < b.cols; ++k) total[k] += part[k];
    }
  }
}

}  // namespace gcl

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

template <class T>
static void block_stats(int threads, Address dots, int64_t stride, const BlockPlace& b,
                        Address row_ids, Address col_ids, double scale, bool bounded, Address max,
                        Address sum, Address col_max, Address col_sum) {
  const int64_t strips = parts_of(b.rows, strip_rows), pitch = padded(b.cols);
  std::vector<T> strip_max(bounded ? 0 : strips * pitch, std::numeric_limits<T>::lowest());
  std::vector<T> strip_sum(strips * pitch, T(0));
  {
    py::gil_scoped_release release;
    for_each_strip(strips, threads, b.rows * b.cols >= parallel_elements, [&](int64_t strip) {
      const int64_t start = strip * strip_rows, rows = std::min(strip_rows, b.rows - start);
      StatsStrip<T> s{};
      s.dots = at<T>(dots, start * stride);
      s.stride = stride, s.rows = rows, s.cols = b.cols;
      s.scale = T(scale);
      s.mask = b.mask(start, row_ids, col_ids);
      s.serves_rows = b.serves_rows, s.serves_cols = b.sums_cols();
      s.row_sum = at<T>(sum, b.row_start + start);
      s.col_sum = strip_sum.data() + strip * pitch;
      if (bounded) {
        kernels<T>().stats_bounded(s);
        return;
      }
      std::vector<T> buffer(rows * pitch);
      s.row_max = at<T>(max, b.row_start + start);
      s.col_max = strip_max.data() + strip * pitch;
      s.buffer = buffer.data(), s.buffer_stride = pitch;
      kernels<T>().stats_running(s);
    });
    if (!b.sums_cols()) return;
    T *total_max = at<T>(col_max, b.col_start), *total_sum = at<T>(col_sum, b.col_start);
    for (int64_t strip = 0; strip < strips; ++strip) {
      const T* part = strip_sum.data() + strip * pitch;
      for (int64_t k = 0; k < b.cols; ++k) {
        if (bounded)
          total_sum[k] += part[k];
        else
          fold(total_max[k], total_sum[k], strip_max[strip * pitch + k], part[k]);
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

template <class T>
static void block_weights(int threads, Address dots, int64_t stride, const BlockPlace& b,
                          Address row_ids, Address col_ids, double scale, bool bounded,
                          Address row_lse, Address row_grad, Address col_lse, Address col_grad,
                          Address out, int64_t out_stride) {
  const int64_t pitch = padded(b.cols);
  std::vector<T> numbers(2 * b.rows + 2 * pitch, T(0));
  T *row_factor = numbers.data(), *row_l = row_factor + b.rows, *col_factor = row_l + b.rows,
    *col_l = col_factor + pitch;
  factors(row_factor, row_l, at<T>(row_grad, b.row_start), at<T>(row_lse, b.row_start), b.rows,
          b.serves_rows, bounded, T(scale));
  factors(col_factor, col_l, at<T>(col_grad, b.col_start), at<T>(col_lse, b.col_start), b.cols,
          b.serves_cols, bounded, T(scale));
  const int64_t strips = parts_of(b.rows, strip_rows);
  py::gil_scoped_release release;
  for_each_strip(strips, threads, b.rows * b.cols >= parallel_elements, [&](int64_t strip) {
    const int64_t start = strip * strip_rows, rows = std::min(strip_rows, b.rows - start);
    kernels<T>().weights({at<T>(dots, start * stride), stride, rows, b.cols, T(scale), bounded,
                          b.mask(start, row_ids, col_ids), row_l + start, row_factor + start,
                          col_l, col_factor, at<T>(out, start * out_stride), out_stride});
  });
}

// What both passes of a block over samples share.
template <class T>
static FusedStrip<T> fused_strip(const BlockPlace& b, Address y, int64_t stride,
                                 const std::vector<int>& bases, const std::vector<bool>& candidates,
                                 double scale, bool bounded, Address row_coefficients,
                                 int64_t row_samples, const T* col_coefficients, int64_t pitch) {
  if (bases.size() > size_t(max_views))
    throw std::invalid_argument("expected at most " + std::to_string(max_views) + " views, got " +
                                std::to_string(bases.size()));
  FusedStrip<T> s{};
  const int64_t tile = b.rows * stride;
  for (int base = 0; base < 4; ++base) s.y[base / 2][base % 2] = at<T>(y, base * tile);
  s.stride = stride, s.rows = b.rows, s.cols = b.cols;
  s.views = int(bases.size()), s.scale = T(scale), s.bounded = bounded;
  s.serves_cols = b.sums_cols();
  std::copy(bases.begin(), bases.end(), s.bases);
  std::copy(candidates.begin(), candidates.end(), s.candidates);
  s.row_coefficient = at<T>(row_coefficients, b.row_start);
  s.row_pitch = row_samples;
  s.col_coefficient = col_coefficients, s.col_pitch = pitch;
  return s;
}

// Rows of a [rows, samples] array from the block's first column on, padded with zeros.
template <class T>
static std::vector<T> gather(Address from, int64_t rows, int64_t samples, int64_t start,
                             int64_t count, int64_t pitch) {
  std::vector<T> to(rows * pitch, T(0));
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(to.data() + r * pitch, at<T>(from, r * samples + start), count * sizeof(T));
  return to;
}

// Moves a strip of the whole block to `start`.
template <class T>
static void advance(FusedStrip<T>& s, int64_t start, int64_t rows) {
  for (auto& of_base : s.y)
    for (auto& tile : of_base) tile += start * s.stride;
  s.rows = rows;
  s.row_coefficient += start;
}

template <class T>
static void fused_block_stats(int threads, Address y, int64_t stride, const BlockPlace& b,
                              Address row_ids, Address col_ids,
                              const std::vector<int>& bases, const std::vector<bool>& candidates,
                              double scale, bool bounded, Address row_coefficients,
                              int64_t row_samples, Address col_coefficients, int64_t col_samples,
                              Address max, Address sum, Address col_max, Address col_sum) {
  const int64_t views = bases.size(), pitch = padded(b.cols);
  const auto columns =
      gather<T>(col_coefficients, views * 2, col_samples, b.col_start, b.cols, pitch);
  FusedStrip<T> block = fused_strip<T>(b, y, stride, bases, candidates, scale, bounded,
                                       row_coefficients, row_samples, columns.data(), pitch);
  const int64_t strips = parts_of(b.rows, fused_strip_rows), size = views * pitch;
  std::vector<T> strip_max(bounded ? 0 : strips * size, std::numeric_limits<T>::lowest());
  std::vector<T> strip_sum(strips * size, T(0));
  py::gil_scoped_release release;
  for_each_strip(strips, threads, b.rows * b.cols >= parallel_elements, [&](int64_t strip) {
    const int64_t start = strip * fused_strip_rows;
    FusedStrip<T> s = block;
    advance(s, start, std::min(fused_strip_rows, b.rows - start));
    s.mask = b.mask(start, row_ids, col_ids);
    s.row_max = at<T>(max, b.row_start + start), s.row_sum = at<T>(sum, b.row_start + start);
    s.col_sum = strip_sum.data() + strip * size;
    if (bounded) {
      kernels<T>().fused_stats_bounded(s);
      return;
    }
    std::vector<T> buffer(s.rows * views * size);
    s.col_max = strip_max.data() + strip * size, s.buffer = buffer.data();
    kernels<T>().fused_stats_running(s);
  });
  if (!b.sums_cols()) return;
  for (int64_t strip = 0; strip < strips; ++strip) {
    for (int64_t v = 0; v < views; ++v) {
      const T* part = strip_sum.data() + strip * size + v * pitch;
      T* total_sum = at<T>(col_sum, v * col_samples + b.col_start);
      T* total_max = at<T>(col_max, v * col_samples + b.col_start);
      for (int64_t k = 0; k < b.cols; ++k) {
        if (bounded)
          total_sum[k] += part[k];
        else
          fold(total_max[k], total_sum[k], strip_max[strip * size + v * pitch + k], part[k]);
      }
    }
  }
}

template <class T>
static void fused_block_weights(int threads, Address y, int64_t stride, const BlockPlace& b,
                                Address row_ids, Address col_ids,
                                const std::vector<int>& bases, const std::vector<bool>& candidates,
                                double scale, bool bounded, Address row_coefficients,
                                int64_t row_samples, Address col_coefficients, int64_t col_samples,
                                Address row_lse, Address row_grad, Address col_lse,
                                Address col_grad, Address row_inner, Address col_inner,
                                Address out, int64_t out_stride) {
  const int64_t views = bases.size(), pitch = padded(b.cols);
  const auto columns =
      gather<T>(col_coefficients, views * 2, col_samples, b.col_start, b.cols, pitch);
  auto col_l = gather<T>(col_lse, views, col_samples, b.col_start, b.cols, pitch);
  auto col_f = gather<T>(col_grad, views, col_samples, b.col_start, b.cols, pitch);
  FusedStrip<T> block = fused_strip<T>(b, y, stride, bases, candidates, scale, bounded,
                                       row_coefficients, row_samples, columns.data(), pitch);
  // Padded columns have factor zero and, being masked, logits of -inf.
  for (int64_t v = 0; v < views; ++v)
    factors(col_f.data() + v * pitch, col_l.data() + v * pitch, col_f.data() + v * pitch,
            col_l.data() + v * pitch, b.cols, true, bounded, T(scale));
  std::vector<T> row_l(views * b.rows), row_f(views * b.rows);
  for (int64_t v = 0; v < views; ++v)
    factors(row_f.data() + v * b.rows, row_l.data() + v * b.rows,
            at<T>(row_grad, v * row_samples + b.row_start),
            at<T>(row_lse, v * row_samples + b.row_start), b.rows, true, bounded, T(scale));
  const int64_t strips = parts_of(b.rows, fused_strip_rows);
  const int64_t size = views * 2 * pitch, out_tile = b.rows * out_stride;
  std::vector<T> strip_inner(strips * size, T(0));
  py::gil_scoped_release release;
  for_each_strip(strips, threads, b.rows * b.cols >= parallel_elements, [&](int64_t strip) {
    const int64_t start = strip * fused_strip_rows;
    FusedStrip<T> s = block;
    advance(s, start, std::min(fused_strip_rows, b.rows - start));
    s.mask = b.mask(start, row_ids, col_ids);
    s.row_lse = row_l.data() + start, s.row_factor = row_f.data() + start;
    s.row_factor_pitch = b.rows;
    s.col_lse = col_l.data(), s.col_factor = col_f.data();
    s.row_inner = at<T>(row_inner, b.row_start + start);
    s.col_inner = strip_inner.data() + strip * size;
    for (int base = 0; base < 4; ++base)
      s.out[base / 2][base % 2] = at<T>(out, base * out_tile + start * out_stride);
    s.out_stride = out_stride;
    kernels<T>().fused_weights(s);
  });
  if (!b.sums_cols()) return;
  for (int64_t strip = 0; strip < strips; ++strip) {
    for (int64_t v = 0; v < views * 2; ++v) {
      const T* part = strip_inner.data() + strip * size + v * pitch;
      T* total = at<T>(col_inner, v * col_samples + b.col_start);
      for (int64_t k = 0; k < b.cols; ++k) total[k] += part[k];
    }
  }
}

}  // namespace gcl

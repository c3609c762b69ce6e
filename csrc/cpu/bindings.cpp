// gcl_kernels._cpu: blocks cut into strips, strips shared among threads.
//
// Addresses and sizes in, no tensors: the module links no PyTorch and serves every version of it.
// The caller (gcl_kernels/backends/cpu.py) answers for shapes, dtypes and contiguity. Whatever the
// number of threads, results are the same bits: strips depend on shapes alone, and what several
// strips add to one column is folded in their order.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"

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

// Parts of C in any order: none depends on another, nor on how C is cut.
template <class T>
static void product(int threads, int64_t rows, int64_t depth, int64_t cols, Address a,
                    int64_t a_pitch, bool a_transposed, Address b, int64_t b_pitch,
                    bool b_transposed, Address c, int64_t c_pitch, bool add) {
  const Product<T> s{rows,         cols, depth,        at<T>(a), at<T>(b), a_pitch, b_pitch,
                     a_transposed, b_transposed, at<T>(c), c_pitch,  add};
  if (!kernels<T>().product) throw std::invalid_argument("product: needs AVX-512");
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

// A block's place, whom it serves, and its mask.
struct BlockPlace {
  int64_t row_start, rows, col_start, cols;
  bool serves_rows, serves_cols, diagonal;
  std::vector<int64_t> offsets;
  Address row_ids, col_ids;  // 0: the default ids

  BlockPlace(const py::tuple& t, Address row_ids, Address col_ids)
      : row_start(t[0].cast<int64_t>()), rows(t[1].cast<int64_t>()),
        col_start(t[2].cast<int64_t>()), cols(t[3].cast<int64_t>()),
        serves_rows(t[4].cast<bool>()), serves_cols(t[5].cast<bool>()),
        diagonal(t[6].cast<bool>()), offsets(t[7].cast<std::vector<int64_t>>()),
        row_ids(row_ids), col_ids(col_ids) {}

  // The columns of a block on the diagonal are its rows: sums of both would count them twice.
  bool sums_cols() const { return serves_cols && !diagonal; }

  Mask mask(int64_t first_row) const {
    if (row_ids)
      return {at<const int64_t>(row_ids, row_start + first_row),
              at<const int64_t>(col_ids, col_start), nullptr, 0, first_row};
    return {nullptr, nullptr, offsets.data(), int64_t(offsets.size()), first_row};
  }
};

template <class T>
static void block_stats(int threads, Address dots, int64_t stride, const py::tuple& where,
                        Address row_ids, Address col_ids, double scale, bool bounded, Address max,
                        Address sum, Address col_max, Address col_sum) {
  const BlockPlace b(where, row_ids, col_ids);
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
      s.mask = b.mask(start);
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
static void block_weights(int threads, Address dots, int64_t stride, const py::tuple& where,
                          Address row_ids, Address col_ids, double scale, bool bounded,
                          Address row_lse, Address row_grad, Address col_lse, Address col_grad,
                          Address out, int64_t out_stride) {
  const BlockPlace b(where, row_ids, col_ids);
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
                          b.mask(start), row_l + start, row_factor + start, col_l, col_factor,
                          at<T>(out, start * out_stride), out_stride});
  });
}

// The tiles of a pass: the first ones in memory that outlives it, as many as fit, the others one
// after the other in one place. As Workspace of gcl_kernels/problem.py lays them out.
template <class T>
class Tiles {
 public:
  struct Tile {
    T* data;
    int64_t pitch;
    bool kept;
  };

  Tiles(const std::vector<py::tuple>& plan, Address kept, int64_t elements)
      : kept_(at<T>(kept)), left_(elements) {
    for (const py::tuple& where : plan) {
      const BlockPlace b(where, 0, 0);
      most_ = std::max(most_, b.rows * padded(b.cols));
    }
  }

  Tile next(const BlockPlace& b) {
    const int64_t size = b.rows * b.cols;
    full_ = full_ || size > left_;
    if (full_) return scratch(b);
    const Tile tile{kept_, b.cols, true};
    kept_ += size, left_ -= size;
    return tile;
  }

  Tile scratch(const BlockPlace& b) {
    if (!scratch_) scratch_.reset(new T[most_]);
    return {scratch_.get(), padded(b.cols), false};
  }

  // An operator's result must not be left to chance.
  void clear_rest() { std::fill(kept_, kept_ + left_, T(0)); }

 private:
  T* kept_;
  int64_t left_, most_ = 0;
  bool full_ = false;
  std::unique_ptr<T[]> scratch_;
};

template <class T>
static Address address(T* pointer) {
  return reinterpret_cast<Address>(pointer);
}

// Ctrl-C ends a long pass between two blocks.
static void check_signals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// neg_lse of all rows of z.
template <class T>
static void statistics(int threads, const std::vector<py::tuple>& plan, Address z, int64_t rows,
                       int64_t dim, double scale, bool bounded, Address kept,
                       int64_t kept_elements, Address ids, Address neg_lse) {
  Tiles<T> tiles(plan, kept, kept_elements);
  std::vector<T> max(rows, bounded ? T(scale) : std::numeric_limits<T>::lowest()), sum(rows, T(0));
  const Address m = address(max.data()), l = address(sum.data());
  for (const py::tuple& where : plan) {
    const BlockPlace b(where, ids, ids);
    const auto tile = tiles.next(b);
    check_signals();
    product<T>(threads, b.rows, dim, b.cols, address(at<T>(z, b.row_start * dim)), dim, false,
               address(at<T>(z, b.col_start * dim)), dim, true, address(tile.data), tile.pitch,
               false);
    block_stats<T>(threads, address(tile.data), tile.pitch, where, ids, ids, scale, bounded, m, l,
                   m, l);
  }
  tiles.clear_rest();
  for (int64_t p = 0; p < rows; ++p) at<T>(neg_lse)[p] = std::log(sum[p]) + max[p];
}

// H z, for the views that need it: the others' rows are zero.
template <class T>
static void matrix_gradient(int threads, const std::vector<py::tuple>& plan, Address z,
                            int64_t rows, int64_t dim, double scale, bool bounded, Address kept,
                            int64_t kept_elements, Address ids, Address neg_lse, Address grad,
                            const std::vector<bool>& needs_view, Address hz) {
  Tiles<T> tiles(plan, kept, kept_elements);
  const int64_t samples = rows / int64_t(needs_view.size());
  // exp(x - inf) = 0: a row without a negative has no weights, whatever its masked x are.
  std::vector<T> lse(at<T>(neg_lse), at<T>(neg_lse) + rows);
  for (T& value : lse)
    if (value == -std::numeric_limits<T>::infinity()) value = -value;
  const Address l = address(lse.data());
  // The first product of a row is written, not added to zeros.
  std::vector<char> begun(rows, false);
  const auto clear = [&](int64_t start, int64_t stop) {
    for (int64_t p = start; p < stop; ++p)
      if (!begun[p]) std::fill_n(at<T>(hz, p * dim), dim, T(0));
  };
  for (const py::tuple& where : plan) {
    const BlockPlace b(where, ids, ids);
    const auto dots = tiles.next(b);
    check_signals();
    const auto add = [&](int64_t start, int64_t count, Address weights, int64_t pitch,
                         bool transposed, int64_t from, int64_t depth) {
      const bool adds = std::count(begun.begin() + start, begun.begin() + start + count, true) > 0;
      if (adds) clear(start, start + count);
      product<T>(threads, count, depth, dim, weights, pitch, transposed,
                 address(at<T>(z, from * dim)), dim, false, address(at<T>(hz, start * dim)), dim,
                 adds);
      std::fill_n(begun.begin() + start, count, true);
    };
    const bool needs_rows = needs_view[b.row_start / samples];
    const bool needs_cols = needs_view[b.col_start / samples] && !b.diagonal;
    if (!needs_rows && !needs_cols) continue;
    if (!dots.kept)
      product<T>(threads, b.rows, dim, b.cols, address(at<T>(z, b.row_start * dim)), dim, false,
                 address(at<T>(z, b.col_start * dim)), dim, true, address(dots.data), dots.pitch,
                 false);
    const auto weights = tiles.scratch(b);
    block_weights<T>(threads, address(dots.data), dots.pitch, where, ids, ids, scale, bounded, l,
                     grad, l, grad, address(weights.data), weights.pitch);
    if (needs_rows)
      add(b.row_start, b.rows, address(weights.data), weights.pitch, false, b.col_start, b.cols);
    if (needs_cols)
      add(b.col_start, b.cols, address(weights.data), weights.pitch, true, b.row_start, b.rows);
  }
  clear(0, rows);
}

// Samples in `threads` ranges: no sample's result depends on another.
template <class F>
static void for_samples(int64_t samples, int64_t elements, int threads, const F& body) {
  py::gil_scoped_release release;
  const int64_t parts = elements < parallel_copies ? 1 : threads;
  for_each_strip(parts, threads, parts > 1, [&](int64_t part) {
    body(samples * part / parts, samples * (part + 1) / parts);
  });
}

template <class T>
static void embed(int threads, const std::vector<Address>& views,
                  const std::vector<int64_t>& pitches, int64_t samples, int64_t dim,
                  bool normalize, double eps, const std::vector<int64_t>& pairs, double scale,
                  double absent, Address z, Address norm, Address inverse, Address own,
                  Address own_logits) {
  Embedding<T> s{};
  s.scale = T(scale), s.absent = T(absent), s.own_logits = at<T>(own_logits);
  s.views = int(views.size());
  s.samples = samples, s.dim = dim, s.normalize = normalize, s.eps = T(eps);
  for (int v = 0; v < s.views; ++v) s.e[v] = at<T>(views[v]), s.pitch[v] = pitches[v];
  for (size_t i = 0; i + 1 < pairs.size(); i += 2) s.pairs[pairs[i] * s.views + pairs[i + 1]] = true;
  s.z = at<T>(z), s.norm = at<T>(norm), s.inverse = at<T>(inverse), s.own = at<T>(own);
  for_samples(samples, s.views * samples * dim, threads,
              [&](int64_t start, int64_t stop) { kernels<T>().embed(s, start, stop); });
}

template <class T>
static void embed_backward(int threads, int64_t samples, int64_t dim, bool normalize, double eps,
                           double scale, Address z, Address norm, Address inverse, Address own,
                           Address hz, Address grad_own_logits,
                           const std::vector<Address>& grads, Address grad_scale) {
  EmbeddingGradient<T> s{};
  s.views = int(grads.size());
  s.samples = samples, s.dim = dim, s.normalize = normalize, s.eps = T(eps), s.scale = T(scale);
  s.z = at<T>(z), s.norm = at<T>(norm), s.inverse = at<T>(inverse), s.own = at<T>(own);
  s.hz = at<T>(hz), s.grad_own_logits = at<T>(grad_own_logits);
  s.grad_scale = at<T>(grad_scale);
  for (int v = 0; v < s.views; ++v) s.grad[v] = at<T>(grads[v]);
  for_samples(samples, s.views * samples * dim, threads,
              [&](int64_t start, int64_t stop) { kernels<T>().embed_backward(s, start, stop); });
}

template <class T>
static void embed_fused(int threads, const std::vector<Address>& views,
                        const std::vector<int64_t>& pitches, int64_t samples, int64_t dim,
                        const std::vector<int>& bases, Address mixing, bool normalize, double eps,
                        Address z, Address inverse, Address lengths, Address coefficients,
                        Address dots) {
  FusedEmbedding<T> s{};
  s.views = int(bases.size());
  s.samples = samples, s.dim = dim, s.normalize = normalize, s.eps = T(eps);
  for (int b = 0; b < 2; ++b) s.e[b] = at<T>(views[b]), s.pitch[b] = pitches[b];
  std::copy(bases.begin(), bases.end(), s.bases);
  s.mixing = at<T>(mixing), s.z = at<T>(z), s.inverse = at<T>(inverse);
  s.lengths = at<T>(lengths), s.coefficients = at<T>(coefficients), s.dots = at<T>(dots);
  for_samples(samples, 2 * samples * dim, threads,
              [&](int64_t start, int64_t stop) { kernels<T>().embed_fused(s, start, stop); });
}

template <class T>
static void fused_gradients(int threads, int64_t samples, int64_t dim, bool normalize,
                            double scale, Address z, Address inverse, Address r, Address towards,
                            const std::vector<Address>& grads) {
  FusedGradient<T> s{};
  s.samples = samples, s.dim = dim, s.scale = T(scale);
  s.z = at<T>(z), s.r = at<T>(r), s.towards = at<T>(towards);
  s.inverse = normalize ? at<T>(inverse) : nullptr;
  for (int b = 0; b < 2; ++b) s.grad[b] = at<T>(grads[b]);
  for_samples(samples, 2 * samples * dim, threads,
              [&](int64_t start, int64_t stop) { kernels<T>().fused_gradients(s, start, stop); });
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
static void fused_block_stats(int threads, Address y, int64_t stride, const py::tuple& where,
                              Address row_ids, Address col_ids,
                              const std::vector<int>& bases, const std::vector<bool>& candidates,
                              double scale, bool bounded, Address row_coefficients,
                              int64_t row_samples, Address col_coefficients, int64_t col_samples,
                              Address max, Address sum, Address col_max, Address col_sum) {
  const BlockPlace b(where, row_ids, col_ids);
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
    s.mask = b.mask(start);
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
static void fused_block_weights(int threads, Address y, int64_t stride, const py::tuple& where,
                                Address row_ids, Address col_ids,
                                const std::vector<int>& bases, const std::vector<bool>& candidates,
                                double scale, bool bounded, Address row_coefficients,
                                int64_t row_samples, Address col_coefficients, int64_t col_samples,
                                Address row_lse, Address row_grad, Address col_lse,
                                Address col_grad, Address row_inner, Address col_inner,
                                Address out, int64_t out_stride) {
  const BlockPlace b(where, row_ids, col_ids);
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
    s.mask = b.mask(start);
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

static const std::pair<const char*, Isa> instruction_sets[] = {
    {"baseline", Isa::baseline}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}};

}  // namespace gcl

PYBIND11_MODULE(_cpu, m) {
  using namespace gcl;
  m.doc() = "Products and epilogues of the tiles on a CPU; see gcl_kernels/backends/cpu.py.";
  m.def("supported_instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto& [name, isa] : instruction_sets)
      if (supported(isa)) names.push_back(name);
    return names;
  });
  m.def("instruction_set", [] {
    for (const auto& [name, isa] : instruction_sets)
      if (isa == isa_in_use()) return name;
    throw std::logic_error("an instruction set without a name");
  });
  // For tests and comparisons: every later call takes this one.
  m.def("use_instruction_set", [](const std::string& chosen) {
    for (const auto& [name, isa] : instruction_sets)
      if (name == chosen && supported(isa)) return use_isa(isa);
    throw std::invalid_argument("instruction set: not supported by this processor: " + chosen);
  });
  m.def("product_pays", product_pays);
  m.attr("max_views") = max_views;
  const auto both = [&m](const char* name, auto single, auto twice) {
    m.def((std::string(name) + "_float32").c_str(), single);
    m.def((std::string(name) + "_float64").c_str(), twice);
  };
  both("product", product<float>, product<double>);
  both("block_stats", block_stats<float>, block_stats<double>);
  both("block_weights", block_weights<float>, block_weights<double>);
  both("statistics", statistics<float>, statistics<double>);
  both("matrix_gradient", matrix_gradient<float>, matrix_gradient<double>);
  both("embed", embed<float>, embed<double>);
  both("embed_backward", embed_backward<float>, embed_backward<double>);
  both("embed_fused", embed_fused<float>, embed_fused<double>);
  both("fused_gradients", fused_gradients<float>, fused_gradients<double>);
  both("fused_block_stats", fused_block_stats<float>, fused_block_stats<double>);
  both("fused_block_weights", fused_block_weights<float>, fused_block_weights<double>);
}

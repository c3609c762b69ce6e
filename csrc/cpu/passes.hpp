// Whole passes over a plan's blocks in one call: in Python a block costs some hundred microseconds,
// a small batch's time. The passes are those of gcl_kernels/negatives.py and score_fusion.py.

#pragma once

#include <memory>

#include "blocks.hpp"

namespace gcl {

template <class T>
static Address address(T* pointer) {
  return reinterpret_cast<Address>(pointer);
}

// Ctrl-C ends a long pass between two blocks.
static void check_signals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// A block's tiles: one, or the four products of score fusion.
template <class T>
struct Tile {
  T* data;
  int64_t pitch;
  bool kept;
};

// The tiles of a pass: the first ones in memory that outlives it, as many as fit, the others one
// after the other in one place. As Workspace of gcl_kernels/problem.py lays them out.
template <class T>
class Tiles {
 public:
  Tiles(const std::vector<BlockPlace>& plan, int64_t tiles_of_block, Address kept, int64_t elements)
      : count_(tiles_of_block), kept_(at<T>(kept)), left_(elements) {
    for (const BlockPlace& b : plan) most_ = std::max(most_, count_ * b.rows * padded(b.cols));
  }

  Tile<T> next(const BlockPlace& b) {
    const int64_t size = count_ * b.rows * b.cols;
    full_ = full_ || size > left_;
    if (full_) return scratch(b);
    const Tile<T> tile{kept_, b.cols, true};
    kept_ += size, left_ -= size;
    return tile;
  }

  Tile<T> scratch(const BlockPlace& b) {
    if (!scratch_) scratch_.reset(new T[most_]);
    return {scratch_.get(), padded(b.cols), false};
  }

  // An operator's result must not be left to chance.
  void clear_rest() { std::fill(kept_, kept_ + left_, T(0)); }

 private:
  int64_t count_;
  T* kept_;
  int64_t left_, most_ = 0;
  bool full_ = false;
  std::unique_ptr<T[]> scratch_;
};

// Rows that products are added to. The first product of a row is written, not added to zeros.
template <class T>
class Sums {
 public:
  Sums(T* out, int64_t rows, int64_t dim) : out_(out), dim_(dim), begun_(rows, false) {}

  // Rows `start` on += weights (or their transpose: count x depth) * z.
  void add(int threads, int64_t start, int64_t count, const T* weights, int64_t pitch,
           bool transposed, const T* z, int64_t depth) {
    const auto first = begun_.begin() + start, last = first + count;
    const bool adds = std::find(first, last, true) != last;
    if (adds) clear(start, start + count);
    product<T>(threads, count, depth, dim_, address(weights), pitch, transposed, address(z), dim_,
               false, address(out_ + start * dim_), dim_, adds);
    std::fill(first, last, true);
  }

  // Rows that nothing was added to are zero.
  void finish() { clear(0, begun_.size()); }

 private:
  void clear(int64_t start, int64_t stop) {
    for (int64_t p = start; p < stop; ++p)
      if (!begun_[p]) std::fill_n(out_ + p * dim_, dim_, T(0));
  }

  T* out_;
  int64_t dim_;
  std::vector<char> begun_;
};

// exp(x - inf) = 0: a row without a negative has no weights, whatever its masked x are.
template <class T>
static std::vector<T> subtractable(Address neg_lse, int64_t count) {
  std::vector<T> lse(at<T>(neg_lse), at<T>(neg_lse) + count);
  for (T& value : lse)
    if (value == -std::numeric_limits<T>::infinity()) value = -value;
  return lse;
}

// What `statistics` of both kinds gathers in.
template <class T>
struct Statistics {
  std::vector<T> max, sum;

  Statistics(int64_t rows, bool bounded, double scale)
      : max(rows, bounded ? T(scale) : std::numeric_limits<T>::lowest()), sum(rows, T(0)) {}

  void write(Address neg_lse) const {
    for (size_t p = 0; p < sum.size(); ++p) at<T>(neg_lse)[p] = std::log(sum[p]) + max[p];
  }
};

template <class T>
static void multiply(int threads, const BlockPlace& b, const T* z, int64_t dim,
                     const Tile<T>& tile) {
  product<T>(threads, b.rows, dim, b.cols, address(z + b.row_start * dim), dim, false,
             address(z + b.col_start * dim), dim, true, address(tile.data), tile.pitch, false);
}

// neg_lse of all rows of z.
template <class T>
static void statistics(int threads, const std::vector<BlockPlace>& plan, Address z, int64_t rows,
                       int64_t dim, double scale, bool bounded, Address kept,
                       int64_t kept_elements, Address ids, Address neg_lse) {
  Tiles<T> tiles(plan, 1, kept, kept_elements);
  Statistics<T> stats(rows, bounded, scale);
  const Address m = address(stats.max.data()), l = address(stats.sum.data());
  for (const BlockPlace& b : plan) {
    check_signals();
    const Tile<T> dots = tiles.next(b);
    multiply(threads, b, at<T>(z), dim, dots);
    block_stats<T>(threads, address(dots.data), dots.pitch, b, ids, ids, scale, bounded, m, l,
                   m, l);
  }
  tiles.clear_rest();
  stats.write(neg_lse);
}

// H z, for the views that need it: the others' rows are zero.
template <class T>
static void matrix_gradient(int threads, const std::vector<BlockPlace>& plan, Address z,
                            int64_t rows, int64_t dim, double scale, bool bounded, Address kept,
                            int64_t kept_elements, Address ids, Address neg_lse, Address grad,
                            const std::vector<bool>& needs_view, Address hz) {
  Tiles<T> tiles(plan, 1, kept, kept_elements);
  Sums<T> sums(at<T>(hz), rows, dim);
  const int64_t samples = rows / int64_t(needs_view.size());
  const std::vector<T> lse = subtractable<T>(neg_lse, rows);
  const Address l = address(lse.data());
  for (const BlockPlace& b : plan) {
    check_signals();
    const Tile<T> dots = tiles.next(b);
    const bool needs_rows = needs_view[b.row_start / samples];
    const bool needs_cols = needs_view[b.col_start / samples] && !b.diagonal;
    if (!needs_rows && !needs_cols) continue;
    if (!dots.kept) multiply(threads, b, at<T>(z), dim, dots);
    const Tile<T> h = tiles.scratch(b);
    block_weights<T>(threads, address(dots.data), dots.pitch, b, ids, ids, scale, bounded, l,
                     grad, l, grad, address(h.data), h.pitch);
    if (needs_rows)
      sums.add(threads, b.row_start, b.rows, h.data, h.pitch, false, at<T>(z, b.col_start * dim),
               b.cols);
    if (needs_cols)
      sums.add(threads, b.col_start, b.cols, h.data, h.pitch, true, at<T>(z, b.row_start * dim),
               b.rows);
  }
  sums.finish();
}

// The four products of two bases' samples.
template <class T>
static void fused_multiply(int threads, const BlockPlace& b, const T* z, int64_t samples,
                           int64_t dim, const Tile<T>& y) {
  const int64_t tile = b.rows * y.pitch;
  for (int base = 0; base < 2; ++base) {
    for (int other = 0; other < 2; ++other) {
      T* out = y.data + (2 * base + other) * tile;
      if (b.diagonal && base > other) {
        const T* from = y.data + (2 * other + base) * tile;
        for (int64_t i = 0; i < b.rows; ++i)
          for (int64_t k = 0; k < b.cols; ++k) out[i * y.pitch + k] = from[k * y.pitch + i];
        continue;
      }
      product<T>(threads, b.rows, dim, b.cols, address(z + (base * samples + b.row_start) * dim),
                 dim, false, address(z + (other * samples + b.col_start) * dim), dim, true,
                 address(out), y.pitch, false);
    }
  }
}

// neg_lse [V, samples] of the views that are combinations of the bases z.
template <class T>
static void fused_statistics(int threads, const std::vector<BlockPlace>& plan, Address z,
                             int64_t samples, int64_t dim, const std::vector<int>& bases,
                             const std::vector<bool>& candidates, double scale, bool bounded,
                             Address coefficients, Address kept, int64_t kept_elements,
                             Address ids, Address neg_lse) {
  Tiles<T> tiles(plan, 4, kept, kept_elements);
  Statistics<T> stats(int64_t(bases.size()) * samples, bounded, scale);
  const Address m = address(stats.max.data()), l = address(stats.sum.data());
  for (const BlockPlace& b : plan) {
    check_signals();
    const Tile<T> y = tiles.next(b);
    fused_multiply(threads, b, at<T>(z), samples, dim, y);
    fused_block_stats<T>(threads, address(y.data), y.pitch, b, ids, ids, bases, candidates,
                         scale, bounded, coefficients, samples, coefficients, samples, m, l, m, l);
  }
  tiles.clear_rest();
  stats.write(neg_lse);
}

// R [2, samples, dim], for the bases that need it (the others' rows are zero), and U, which is
// added to `inner`.
template <class T>
static void fused_matrix_gradient(int threads, const std::vector<BlockPlace>& plan, Address z,
                                  int64_t samples, int64_t dim, const std::vector<int>& bases,
                                  const std::vector<bool>& candidates, double scale, bool bounded,
                                  Address coefficients, Address kept, int64_t kept_elements,
                                  Address ids, Address neg_lse, Address grad,
                                  const std::vector<bool>& needs_base, Address r, Address inner) {
  Tiles<T> tiles(plan, 4, kept, kept_elements);
  Sums<T> sums(at<T>(r), 2 * samples, dim);
  const std::vector<T> lse = subtractable<T>(neg_lse, int64_t(bases.size()) * samples);
  const Address l = address(lse.data());
  for (const BlockPlace& b : plan) {
    check_signals();
    const Tile<T> y = tiles.next(b);
    if (!y.kept) fused_multiply(threads, b, at<T>(z), samples, dim, y);
    const Tile<T> f = tiles.scratch(b);
    fused_block_weights<T>(threads, address(y.data), y.pitch, b, ids, ids, bases, candidates,
                           scale, bounded, coefficients, samples, coefficients, samples, l, grad,
                           l, grad, inner, inner, address(f.data), f.pitch);
    for (int base = 0; base < 2; ++base) {
      if (!needs_base[base]) continue;
      for (int other = 0; other < 2; ++other) {
        const T* z_other = at<T>(z, other * samples * dim);
        const int64_t tile = b.rows * f.pitch, out = base * samples;
        sums.add(threads, out + b.row_start, b.rows, f.data + (2 * base + other) * tile, f.pitch,
                 false, z_other + b.col_start * dim, b.cols);
        if (!b.diagonal)
          sums.add(threads, out + b.col_start, b.cols, f.data + (2 * other + base) * tile, f.pitch,
                   true, z_other + b.row_start * dim, b.rows);
      }
    }
  }
  sums.finish();
}

}  // namespace gcl

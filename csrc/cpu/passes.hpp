// Whole passes over a plan's blocks in one call: in Python a block costs some hundred microseconds,
// a small batch's time. The passes are those of gcl_kernels/passes.py, on either road.

#pragma once

#include <memory>

#include "half_product.hpp"

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

// Rows that products are added to. The first product of a row is written, not added to zeros. Z: of
// embeddings, to which weights are rounded.
template <class T, class Z>
class Sums {
 public:
  Sums(T* out, int64_t rows, int64_t dim) : out_(out), dim_(dim), begun_(rows, false) {}

  // Rows `start` on += weights (or their transpose: count x depth) * z.
  void add(int threads, int64_t start, int64_t count, const T* weights, int64_t pitch,
           bool transposed, const Z* z, int64_t depth) {
    const auto first = begun_.begin() + start, last = first + count;
    const bool adds = std::find(first, last, true) != last;
    if (adds) clear(start, start + count);
    product_of<Z, T>(threads, count, depth, dim_, address(weights), pitch, transposed, address(z),
                     dim_, false, address(out_ + start * dim_), dim_, adds);
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

// The block's tiles: products of its rows and columns, in score fusion those of two bases.
template <class T, class Z>
static void multiply(const Problem& p, const BlockPlace& b, const Tile<T>& y) {
  const auto rows_of = [&](int base, int64_t start) {
    return address(at<Z>(p.z, (base * p.rows + start) * p.dim));
  };
  for (int base = 0; base < p.bases(); ++base) {
    for (int other = 0; other < p.bases(); ++other) {
      T* out = y.data + (2 * base + other) * b.rows * y.pitch;
      if (b.diagonal && base > other) {
        const T* from = y.data + (2 * other + base) * b.rows * y.pitch;
        for (int64_t i = 0; i < b.rows; ++i)
          for (int64_t k = 0; k < b.cols; ++k) out[i * y.pitch + k] = from[k * y.pitch + i];
        continue;
      }
      product_of<Z>(p.threads, b.rows, p.dim, b.cols, rows_of(base, b.row_start), p.dim, false,
                    rows_of(other, b.col_start), p.dim, true, address(out), y.pitch, false);
    }
  }
}

// neg_lse of all rows of z, or of all views of all samples. T: of all numbers but z's, Z.
template <class T, class Z = T>
static void statistics(const Problem& p, const std::vector<BlockPlace>& plan, Address kept,
                       int64_t kept_elements, Address neg_lse) {
  Tiles<T> tiles(plan, p.bases() * p.bases(), kept, kept_elements);
  const int64_t rows = p.views() * p.rows;
  std::vector<T> max(rows, p.bounded ? T(p.scale) : std::numeric_limits<T>::lowest());
  std::vector<T> sum(rows, T(0));
  const Address m = address(max.data()), l = address(sum.data());
  for (const BlockPlace& b : plan) {
    check_signals();
    const Tile<T> y = tiles.next(b);
    multiply<T, Z>(p, b, y);
    block_stats<T>(p, b, address(y.data), y.pitch, m, l, m, l);
  }
  tiles.clear_rest();
  for (int64_t row = 0; row < rows; ++row) at<T>(neg_lse)[row] = std::log(sum[row]) + max[row];
}

// H z, or R and, added to `inner`, U: of the bases that need it, the others' rows are zero.
template <class T, class Z = T>
static void matrix_gradient(const Problem& p, const std::vector<BlockPlace>& plan, Address kept,
                            int64_t kept_elements, Address neg_lse, Address grad,
                            const std::vector<bool>& needs_base, Address out, Address inner) {
  Tiles<T> tiles(plan, p.bases() * p.bases(), kept, kept_elements);
  Sums<T, Z> sums(at<T>(out), p.bases() * p.rows, p.dim);
  const std::vector<T> lse = subtractable<T>(neg_lse, p.views() * p.rows);
  const Address l = address(lse.data());
  // Of views that are given each is a base, and a side of a block lies in one where some are frozen.
  const auto needs = [&](int base, int64_t start) {
    return needs_base[p.fused ? base : start * int64_t(needs_base.size()) / p.rows];
  };
  for (const BlockPlace& b : plan) {
    check_signals();
    const Tile<T> y = tiles.next(b);
    if (!p.fused && !needs(0, b.row_start) && !needs(0, b.col_start)) continue;
    if (!y.kept) multiply<T, Z>(p, b, y);
    const Tile<T> h = tiles.scratch(b);
    block_weights<T>(p, b, address(y.data), y.pitch, l, grad, inner, l, grad, inner,
                     address(h.data), h.pitch);
    for (int base = 0; base < p.bases(); ++base) {
      for (int other = 0; other < p.bases(); ++other) {
        const int64_t size = b.rows * h.pitch, first = base * p.rows;
        const Z* z = at<Z>(p.z, other * p.rows * p.dim);
        if (needs(base, b.row_start))
          sums.add(p.threads, first + b.row_start, b.rows, h.data + (2 * base + other) * size,
                   h.pitch, false, z + b.col_start * p.dim, b.cols);
        if (!b.diagonal && needs(base, b.col_start))
          sums.add(p.threads, first + b.col_start, b.cols, h.data + (2 * other + base) * size,
                   h.pitch, true, z + b.row_start * p.dim, b.rows);
      }
    }
  }
  sums.finish();
}

}  // namespace gcl

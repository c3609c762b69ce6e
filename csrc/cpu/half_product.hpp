// A product of bfloat16, cut into parts that threads share.
#pragma once

#include <memory>
#include <type_traits>

#include "bfloat16.hpp"
#include "blocks.hpp"

namespace gcl {

// A: Bfloat16, or float, which is rounded to it. B is packed once, then parts of C come in any order:
// none depends on another, nor on how C is cut.
template <class A>
static void half_product(int threads, int64_t rows, int64_t depth, int64_t cols, Address a,
                         int64_t a_pitch, bool a_transposed, Address b, int64_t b_pitch,
                         bool b_transposed, Address c, int64_t c_pitch, bool add) {
  const HalfProduct<A> s{rows,         cols, depth,        at<A>(a), at<Bfloat16>(b), a_pitch, b_pitch,
                         a_transposed, b_transposed, at<float>(c), c_pitch, add};
  const HalfKernels* of = half_kernels();
  if (!of) throw std::runtime_error("bfloat16: this processor has no product of it");
  const bool parallel = rows * cols * depth >= parallel_products;
  const int64_t panels = parts_of(cols, of->cols);
  const int64_t panel_size = parts_of(depth, half_depth_multiple) * half_depth_multiple * of->cols;
  // Several parts a thread, so that none waits long for another, of whole blocks.
  const int64_t wanted = parts_of(rows, parallel ? 4 * threads : 1);
  const int64_t part_rows = std::min(half_part_rows, parts_of(wanted, strip_rows) * strip_rows);
  const int64_t parts = parts_of(rows, part_rows);
  // C = A A^T: multiplied from the diagonal's panel on, and mirrored.
  const bool symmetric = std::is_same<A, Bfloat16>::value && a == b && a_pitch == b_pitch &&
                         !a_transposed && b_transposed && rows == cols && !add;
  py::gil_scoped_release release;
  // Not initialised: a vector would write it all first.
  const std::unique_ptr<Bfloat16[]> packed(new Bfloat16[panels * panel_size]);
  for_each_strip(panels, threads, parallel, [&](int64_t panel) {
    const int64_t start = panel * of->cols;
    of->pack(packed.get() + panel * panel_size, s.b + start * (b_transposed ? b_pitch : 1), b_pitch,
             b_transposed, depth, cols - start);
  });
  for_each_strip(parts, threads, parallel, [&](int64_t part) {
    const int64_t first = part * part_rows, last = std::min(rows, first + part_rows);
    const int64_t start = symmetric ? first / of->cols * of->cols : 0;
    if constexpr (std::is_same<A, float>::value)
      of->multiply_rounded(s, packed.get(), first, last, start);
    else
      of->multiply(s, packed.get(), first, last, start);
  });
  if (!symmetric) return;
  const Product<float> whole{rows,  cols, depth, nullptr,     nullptr, 0,
                             0, false, false, at<float>(c), c_pitch, false};
  for_each_strip(parts, threads, parallel, [&](int64_t part) {
    const int64_t first = part * part_rows;
    kernels<float>().mirror(whole, first, std::min(rows, first + part_rows));
  });
}

// The product that `Z` asks for, with A of this type.
template <class Z, class A = Z, class... Arguments>
static void product_of(const Arguments&... arguments) {
  if constexpr (std::is_same<Z, Bfloat16>::value)
    half_product<A>(arguments...);
  else
    product<Z>(arguments...);
}

}  // namespace gcl

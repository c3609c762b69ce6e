// Who multiplies: the extension's own product (product.h), or the BLAS that PyTorch itself calls,
// whose functions gcl_kernels/backends/cpu.py finds and hands over. Where it finds none and the own
// product does not pay, Python calls PyTorch between the blocks.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace gcl {

enum class Products { own, blas, pytorch };

inline Products products_in_use = product_pays() ? Products::own : Products::pytorch;

// Fortran's ?gemm with 32-bit integers, as PyTorch declares it.
template <class T>
using Gemm = void (*)(const char* transpose_a, const char* transpose_b, const int* rows,
                      const int* cols, const int* depth, const T* alpha, const T* a,
                      const int* a_pitch, const T* b, const int* b_pitch, const T* beta, T* c,
                      const int* c_pitch);

template <class T>
inline Gemm<T> gemm = nullptr;

// C = A B by rows is C^T = B^T A^T by columns, as Fortran has it.
template <class T>
void blas_product(const Product<T>& s) {
  const auto whole = [](int64_t size) {
    if (size > std::numeric_limits<int>::max())
      throw std::overflow_error("product: expected sizes below 2^31, got " + std::to_string(size));
    return int(size);
  };
  // A single line may have any pitch here, but not there.
  const auto pitch_of = [&](int64_t pitch, int64_t line) {
    return whole(std::max<int64_t>({pitch, line, 1}));
  };
  const int rows = whole(s.rows), cols = whole(s.cols), depth = whole(s.depth);
  const int a_pitch = pitch_of(s.a_pitch, s.a_transposed ? rows : depth);
  const int b_pitch = pitch_of(s.b_pitch, s.b_transposed ? depth : cols);
  const int c_pitch = pitch_of(s.c_pitch, cols);
  const T one = 1, beta = s.add ? T(1) : T(0);  // 0: C is not read
  gemm<T>(s.b_transposed ? "T" : "N", s.a_transposed ? "T" : "N", &cols, &rows, &depth, &one, s.b,
          &b_pitch, s.a, &a_pitch, &beta, s.c, &c_pitch);
}

}  // namespace gcl

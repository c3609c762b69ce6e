// The kernels once per instruction set, and the choice among them when the module is loaded.

#include "kernels.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#define INLINE inline __attribute__((always_inline))

#define KERNELS_OF_THIS_NAMESPACE                                                             \
  template <class T>                                                                          \
  constexpr Kernels<T> table = {                                                              \
      product<T>,       mirror<T>,              stats_bounded<T>,       stats_running<T>,     \
      weights<T>,       fused_stats_bounded<T>, fused_stats_running<T>, fused_weights<T>,     \
      embed<T>,         gradients<T>};

namespace gcl {
namespace baseline {
constexpr int vector_bytes = 16, tile_vectors = 2;
#include "simd.h"
#include "product.h"
#include "kernels.h"
#include "fused_kernels.h"
#include "embeddings.h"
KERNELS_OF_THIS_NAMESPACE
}  // namespace baseline
}  // namespace gcl

#if defined(__x86_64__)
#define GCL_X86 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace gcl {
namespace avx2 {
constexpr int vector_bytes = 32, tile_vectors = 2;
#include "simd.h"
#include "product.h"
#include "kernels.h"
#include "fused_kernels.h"
#include "embeddings.h"
KERNELS_OF_THIS_NAMESPACE
}  // namespace avx2
}  // namespace gcl
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#endif
namespace gcl {
namespace avx512 {
constexpr int vector_bytes = 64, tile_vectors = 4;
#include "simd.h"
#include "product.h"
#include "kernels.h"
#include "fused_kernels.h"
#include "embeddings.h"
KERNELS_OF_THIS_NAMESPACE
}  // namespace avx512
}  // namespace gcl
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace gcl {

bool supported(Isa isa) {
#ifdef GCL_X86
  __builtin_cpu_init();
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::baseline;
}

static Isa in_use = supported(Isa::avx512) ? Isa::avx512
                    : supported(Isa::avx2) ? Isa::avx2
                                           : Isa::baseline;

Isa isa_in_use() { return in_use; }

void use_isa(Isa isa) { in_use = isa; }

bool product_pays() {
#ifdef GCL_X86
  return supported(Isa::avx512) && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

template <class T>
const Kernels<T>& kernels() {
#ifdef GCL_X86
  if (in_use == Isa::avx512) return avx512::table<T>;
  if (in_use == Isa::avx2) return avx2::table<T>;
#endif
  return baseline::table<T>;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace gcl

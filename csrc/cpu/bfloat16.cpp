// The products of bfloat16 once per instruction, and the choice among these when the module is
// loaded. Here are the instructions, and a model of each; all else is bfloat16.h, the same for all.

#include "bfloat16.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels.hpp"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define GCL_BFLOAT16 1
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#define GCL_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define INLINE inline __attribute__((always_inline))

namespace gcl {
namespace bfloat16_model {
constexpr int vector_bytes = 16, tile_vectors = 2;
#include "simd.h"
#include "product.h"
#include "bfloat16.h"

INLINE float widened(Bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

struct Tiles {
  struct Scope {
    Scope() {}
  };
  static constexpr int row_bytes = 64;
  alignas(64) static inline thread_local char tile[8][16][row_bytes];

  template <int t>
  static void zero() {
    std::memset(tile[t], 0, sizeof(tile[t]));
  }
  template <int t>
  static void load(const void* from, int64_t row) {
    for (int i = 0; i < 16; ++i)
      std::memcpy(tile[t][i], static_cast<const char*>(from) + i * row, row_bytes);
  }
  template <int t>
  static void store(void* to, int64_t row) {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * row, tile[t][i], row_bytes);
  }
  template <int c, int a, int b>
  static void add_product() {
    float sum[16];
    Bfloat16 of_a[32], of_b[32];
    for (int i = 0; i < 16; ++i) {
      std::memcpy(sum, tile[c][i], row_bytes), std::memcpy(of_a, tile[a][i], row_bytes);
      for (int q = 0; q < 16; ++q) {
        std::memcpy(of_b, tile[b][q], row_bytes);
        for (int p = 2 * q; p < 2 * q + 2; ++p)
          for (int j = 0; j < 16; ++j) sum[j] += widened(of_a[p]) * widened(of_b[2 * j + p % 2]);
      }
      std::memcpy(tile[c][i], sum, row_bytes);
    }
  }
};

struct Vectors {
  struct Sum {
    float lane[16];
  };
  struct Pairs {
    Bfloat16 lane[16][2];
  };
  static Sum zero() { return {}; }
  static Sum load_sum(const float* from) {
    Sum sum;
    std::memcpy(sum.lane, from, sizeof(sum));
    return sum;
  }
  static void store_sum(float* to, const Sum& sum) { std::memcpy(to, sum.lane, sizeof(sum)); }
  static Pairs load_pairs(const Bfloat16* from) {
    Pairs pairs;
    std::memcpy(pairs.lane, from, sizeof(pairs));
    return pairs;
  }
  static Pairs repeat_pair(const Bfloat16* from) {
    Pairs pairs;
    for (auto& lane : pairs.lane) std::memcpy(lane, from, sizeof(lane));
    return pairs;
  }
  static Sum add_product(Sum sum, const Pairs& a, const Pairs& b) {
    for (int p = 0; p < 2; ++p)
      for (int j = 0; j < 16; ++j) sum.lane[j] += widened(a.lane[j][p]) * widened(b.lane[j][p]);
    return sum;
  }
};
}  // namespace bfloat16_model
}  // namespace gcl

#ifdef GCL_BFLOAT16
#if defined(__clang__)
#pragma clang attribute push(                                                                    \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma,prefer-vector-width=512")
#endif
namespace gcl {
namespace avx512_bf16 {
constexpr int vector_bytes = 64, tile_vectors = 4;
#include "simd.h"
#include "product.h"
#include "bfloat16.h"

struct Vectors {
  using Sum = __m512;
  using Pairs = __m512bh;
  INLINE static Sum zero() { return _mm512_setzero_ps(); }
  INLINE static Sum load_sum(const float* from) { return _mm512_loadu_ps(from); }
  INLINE static void store_sum(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }
  INLINE static Pairs load_pairs(const Bfloat16* from) { return (Pairs)_mm512_loadu_si512(from); }
  INLINE static Pairs repeat_pair(const Bfloat16* from) {
    int pair;
    __builtin_memcpy(&pair, from, sizeof(pair));
    return (Pairs)_mm512_set1_epi32(pair);
  }
  INLINE static Sum add_product(Sum sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }
};
}  // namespace avx512_bf16
}  // namespace gcl
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#ifdef GCL_AMX
#if defined(__clang__)
#pragma clang attribute push(                                                            \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,amx-tile,amx-bf16,fma"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,amx-tile,amx-bf16,fma,prefer-vector-width=512")
#endif
namespace gcl {
namespace amx {
constexpr int vector_bytes = 64, tile_vectors = 4;
#include "simd.h"
#include "product.h"
#include "bfloat16.h"

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);
static const TileConfig eight_tiles = {1,
                                       0,
                                       {},
                                       {64, 64, 64, 64, 64, 64, 64, 64},
                                       {16, 16, 16, 16, 16, 16, 16, 16}};

// The intrinsics take a tile's number as it is spelled.
struct Tiles {
  // Another library may count on a configuration of its own.
  struct Scope {
    TileConfig before;
    INLINE Scope() {
      _tile_storeconfig(&before);
      _tile_loadconfig(&eight_tiles);
    }
    INLINE ~Scope() { _tile_loadconfig(&before); }
  };
  template <int t>
  INLINE static void zero();
  template <int t>
  INLINE static void load(const void* from, int64_t row);
  template <int t>
  INLINE static void store(void* to, int64_t row);
  template <int c, int a, int b>
  INLINE static void add_product();
};

// GCC does not say that a load reads memory: what was stored must not be moved behind it.
#define GCL_TILE(t)                                           \
  template <>                                                 \
  INLINE void Tiles::zero<t>() {                              \
    _tile_zero(t);                                            \
  }                                                           \
  template <>                                                 \
  INLINE void Tiles::load<t>(const void* from, int64_t row) { \
    __asm__ volatile("" ::: "memory");                        \
    _tile_loadd(t, from, row);                                \
  }                                                           \
  template <>                                                 \
  INLINE void Tiles::store<t>(void* to, int64_t row) {        \
    _tile_stored(t, to, row);                                 \
  }
GCL_TILE(0)
GCL_TILE(1)
GCL_TILE(2)
GCL_TILE(3)
GCL_TILE(4)
GCL_TILE(5)
GCL_TILE(6)
GCL_TILE(7)
#undef GCL_TILE

#define GCL_TILE_PRODUCT(c, a, b)                \
  template <>                                    \
  INLINE void Tiles::add_product<c, a, b>() {    \
    _tile_dpbf16ps(c, a, b);                     \
  }
GCL_TILE_PRODUCT(0, 4, 6)
GCL_TILE_PRODUCT(1, 4, 7)
GCL_TILE_PRODUCT(2, 5, 6)
GCL_TILE_PRODUCT(3, 5, 7)
#undef GCL_TILE_PRODUCT
}  // namespace amx
}  // namespace gcl
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace gcl {

#ifdef GCL_BFLOAT16
// Of the processor; that the system saves AVX-512's registers is supported(Isa::avx512).
static bool has_feature(unsigned leaf, unsigned subleaf, bool in_edx, int bit) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d) && ((in_edx ? d : a) >> bit & 1);
}
#endif

#ifdef GCL_AMX
// Linux gives tiles to a process that asks; it refuses where it does not know them.
static bool ask_for_tiles() {
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

bool supported(HalfInstruction instruction) {
#ifdef GCL_AMX
  if (instruction == HalfInstruction::amx) {
    static const bool has_tiles = supported(Isa::avx512) && has_feature(7, 0, true, 22) &&
                                  has_feature(7, 0, true, 24) && ask_for_tiles();
    return has_tiles;
  }
#endif
#ifdef GCL_BFLOAT16
  if (instruction == HalfInstruction::avx512_bf16)
    return supported(Isa::avx512) && has_feature(7, 1, false, 5);
#endif
  return instruction != HalfInstruction::amx && instruction != HalfInstruction::avx512_bf16;
}

static HalfInstruction in_use =
    supported(HalfInstruction::amx)           ? HalfInstruction::amx
    : supported(HalfInstruction::avx512_bf16) ? HalfInstruction::avx512_bf16
                                              : HalfInstruction::none;

HalfInstruction half_instruction_in_use() { return in_use; }

void use_half_instruction(HalfInstruction instruction) { in_use = instruction; }

const HalfKernels* half_kernels() {
  switch (in_use) {
#ifdef GCL_AMX
    case HalfInstruction::amx:
      return &amx::half_table<amx::TileBlock<amx::Tiles>>;
#endif
#ifdef GCL_BFLOAT16
    case HalfInstruction::avx512_bf16:
      return &avx512_bf16::half_table<avx512_bf16::VectorBlock<avx512_bf16::Vectors>>;
#endif
    case HalfInstruction::amx_model:
      return &bfloat16_model::half_table<bfloat16_model::TileBlock<bfloat16_model::Tiles>>;
    case HalfInstruction::avx512_bf16_model:
      return &bfloat16_model::half_table<bfloat16_model::VectorBlock<bfloat16_model::Vectors>>;
    default:
      return nullptr;
  }
}

}  // namespace gcl

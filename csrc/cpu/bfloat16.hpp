// Products of bfloat16 into float32: which instruction multiplies, and the functions for it.
#pragma once

#include <cstdint>

namespace gcl {

struct Bfloat16 {
  uint16_t bits;
};

inline __attribute__((always_inline)) Bfloat16 rounded(Bfloat16 value) { return value; }

// To the nearest, ties to even; NaN stays NaN.
inline __attribute__((always_inline)) Bfloat16 rounded(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : nearest)};
}

constexpr int64_t half_depth_multiple = 32;  // of what an instruction reads, the rest being zeros
constexpr int64_t half_part_rows = 128;      // of C, that one call makes at most

// C = A B or C += A B, as Product. A of float32 is rounded to bfloat16 as it is packed.
template <class A>
struct HalfProduct {
  int64_t rows, cols, depth;
  const A* a;
  const Bfloat16* b;
  int64_t a_pitch, b_pitch;
  bool a_transposed, b_transposed;
  float* c;
  int64_t c_pitch;
  bool add;
};

struct HalfKernels {
  // A panel of B, this many of its columns: rows 2 q and 2 q + 1 lie side by side, [depth / 2, cols,
  // 2], with zeros up to whole panels and whole multiples of the depth.
  int64_t cols;
  void (*pack)(Bfloat16* to, const Bfloat16* b, int64_t pitch, bool transposed, int64_t depth,
               int64_t cols);
  // Rows `first` to `last` of C, and its columns from `start`, where a panel begins, on. `panels`:
  // all of B.
  void (*multiply)(const HalfProduct<Bfloat16>&, const Bfloat16* panels, int64_t first,
                   int64_t last, int64_t start);
  void (*multiply_rounded)(const HalfProduct<float>&, const Bfloat16* panels, int64_t first,
                           int64_t last, int64_t start);
};

// The models compute what the instruction does, number by number and on any processor: tests run
// the same packing and loops with them.
enum class HalfInstruction { none, amx, avx512_bf16, amx_model, avx512_bf16_model };

bool supported(HalfInstruction instruction);
HalfInstruction half_instruction_in_use();
void use_half_instruction(HalfInstruction instruction);

// Null where there is none.
const HalfKernels* half_kernels();

}  // namespace gcl

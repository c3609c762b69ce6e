// PTX and CUDA's runtime, one function for each instruction. sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "host_device.h"

namespace gcl::machine {

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int program_index() { return blockIdx.x; }
DEVICE void sync_threads() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Copies `bytes` (16 or 0) to shared memory and fills 16 up with zeros, asynchronously.
DEVICE void copy_async(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last PENDING committed groups of this thread.
template <int PENDING>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of line l % 8 of matrix l / 8.
DEVICE void load_matrices(uint32_t (&to)[4], const void* line) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(line));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// Volatile: all lanes of a warp multiply together, so no part may move into a branch of some.
#define GCL_MULTIPLY(NAME, SHAPE_AND_TYPES)                                                       \
  DEVICE void NAME(float& c0, float& c1, float& c2, float& c3,                \
                                       const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {        \
    asm volatile("mma.sync.aligned." SHAPE_AND_TYPES                                              \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
                 : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                 \
  }
GCL_MULTIPLY(multiply_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
GCL_MULTIPLY(multiply_float16, "m16n8k16.row.col.f32.f16.f16.f32")
GCL_MULTIPLY(multiply_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef GCL_MULTIPLY

// To the nearest tf32. Without it mma.sync cuts bits off, which shrinks every product a little.
DEVICE uint32_t round_tf32(uint32_t value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(value)));
  return rounded;
}

DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

DEVICE uint32_t pack_float16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// e^x; below 2^-126 zero.
DEVICE float exponential(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}

// Starts a kernel of one argument; 0 or CUDA's error, which is then no longer pending.
template <class Arguments>
int launch(void (*kernel)(Arguments), int64_t programs, int threads, int shared_bytes,
           void* stream, Arguments arguments) {
  void* pointers[] = {&arguments};
  const cudaError_t error = cudaLaunchKernel(
      reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(programs)), dim3(threads),
      pointers, shared_bytes, static_cast<cudaStream_t>(stream));
  cudaGetLastError();
  return error;
}

}  // namespace gcl::machine

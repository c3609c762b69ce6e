// The functions of csrc/cuda/gpu.cuh on a CPU: the same kernels compiled by a plain C++ compiler,
// one fiber for every thread of a program, one program after the other.
//
// A fiber runs until it waits for others (a barrier, or an instruction of its whole warp); who runs
// next is the schedule's choice, so that a missing barrier shows as a result that depends on the
// schedule. Asynchronous copies land when they are issued or as late as their wait allows. Shared
// memory starts as NaN. Instructions check what hardware would: alignment, bounds of shared memory,
// and that ldmatrix meets no bank twice; the address sanitizer watches the rest.
#pragma once

#include <cstdint>
#include <functional>

namespace gcl::machine {

int thread_index();
int program_index();
unsigned char* shared_memory();
void sync_threads();
void sync_warp();
float shuffle_xor(float value, int mask);

void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_for_copies(int pending);

template <int PENDING>
void wait_copies() {
  wait_for_copies(PENDING);
}

using Fragment = uint32_t[4];
void load_matrices(Fragment& to, const void* line);
void multiply_bfloat16(float& c0, float& c1, float& c2, float& c3, const Fragment& a, uint32_t b0,
                       uint32_t b1);
void multiply_float16(float& c0, float& c1, float& c2, float& c3, const Fragment& a, uint32_t b0,
                      uint32_t b1);
void multiply_tf32(float& c0, float& c1, float& c2, float& c3, const Fragment& a, uint32_t b0,
                   uint32_t b1);
uint32_t round_tf32(uint32_t value);
uint32_t pack_bfloat16(float low, float high);
uint32_t pack_float16(float low, float high);
float exponential(float x);

int run_programs(const std::function<void()>& kernel, int64_t programs, int threads,
                 int shared_bytes);

template <class Arguments>
int launch(void (*kernel)(Arguments), int64_t programs, int threads, int shared_bytes,
           void* /*stream*/, Arguments arguments) {
  return run_programs([=] { kernel(arguments); }, programs, threads, shared_bytes);
}

}  // namespace gcl::machine

// Fibers, their schedule, the instructions, and the device that the host build reports. See
// emulated_gpu.h. This file itself is compiled without sanitizers, for speed.
#include "emulated_gpu.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/block.h"

#ifdef KERNELS_ARE_SANITIZED
#include <sanitizer/common_interface_defs.h>
#endif

namespace gcl::machine {
namespace {

constexpr std::size_t STACK_BYTES = 256 * 1024;
constexpr int WARP = 32;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};

// Where a stack goes on. Unlike swapcontext, the compiler's jumps make no system call.
using Resume = void* [5];

[[noreturn]] __attribute__((noinline)) void jump(Resume& resume) { __builtin_longjmp(resume, 1); }

struct Fiber {
  ucontext_t start;
  bool started = false;
  Resume resume;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK_BYTES]};
  std::vector<std::vector<Copy>> groups;  // the last one is not committed yet
  bool done = false;
};

// Threads that wait for each other.
struct Meeting {
  const char* instruction = nullptr;
  std::vector<int> waiting;
  void* operands[WARP] = {};
};

enum class Order { first_come, last_come, random };

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  Meeting barrier, warps[THREADS / WARP];
  Resume scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  std::vector<unsigned char> shared;
  int current = 0, program = 0, threads = 0;
  std::string error;
  std::string refusal;  // of the next launch

  Order order = Order::first_come;
  bool copies_are_late = true;
  std::mt19937 random;
} machine;

// Changes stacks; the address sanitizer wants to know which.
__attribute__((noinline)) void change_to_fiber(int number) {
  Fiber& fiber = machine.fibers[number];
  machine.current = number;
  [[maybe_unused]] void* fake = nullptr;
#ifdef KERNELS_ARE_SANITIZED
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), STACK_BYTES);
#endif
  if (__builtin_setjmp(machine.scheduler) == 0) {
    if (std::exchange(fiber.started, true)) jump(fiber.resume);
    setcontext(&fiber.start);
  }
#ifdef KERNELS_ARE_SANITIZED
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void entered_fiber([[maybe_unused]] void* fake) {
#ifdef KERNELS_ARE_SANITIZED
  __sanitizer_finish_switch_fiber(fake, &machine.scheduler_stack, &machine.scheduler_bytes);
#endif
}

__attribute__((noinline)) void change_to_scheduler() {
  Fiber& fiber = machine.fibers[machine.current];
  [[maybe_unused]] void* fake = nullptr;
#ifdef KERNELS_ARE_SANITIZED
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fake, machine.scheduler_stack,
                                 machine.scheduler_bytes);
#endif
  if (__builtin_setjmp(fiber.resume) == 0) jump(machine.scheduler);
  entered_fiber(fake);
}

void run_fiber() {
  entered_fiber(nullptr);
  (*machine.kernel)();
  machine.fibers[machine.current].done = true;
  change_to_scheduler();
}

// Remembers the first thing that hardware would not allow; the launch then fails with it.
void fail(const char* what) {
  if (machine.error.empty()) machine.error = what;
}

// Waits for the rest of the meeting; who comes last completes it.
template <class FUNCTION>
void meet(Meeting& meeting, const char* instruction, std::size_t size, FUNCTION complete) {
  if (meeting.waiting.empty()) meeting.instruction = instruction;
  if (meeting.instruction != instruction) fail("threads of a warp wait at different instructions");
  if (meeting.waiting.size() + 1 < size) {
    meeting.waiting.push_back(machine.current);
    change_to_scheduler();
    return;
  }
  complete();
  machine.ready.insert(machine.ready.end(), meeting.waiting.begin(), meeting.waiting.end());
  meeting.waiting.clear();
}

// The last lane of the warp to come calls function(operands of all lanes).
void with_warp(const char* instruction, void* operand,
               const std::function<void(void* const*)>& function) {
  Meeting& warp = machine.warps[machine.current / WARP];
  warp.operands[machine.current % WARP] = operand;
  meet(warp, instruction, WARP, [&] { function(warp.operands); });
}

int next_fiber() {
  auto& ready = machine.ready;
  std::size_t pick = 0;
  if (machine.order == Order::last_come) pick = ready.size() - 1;
  if (machine.order == Order::random) pick = machine.random() % ready.size();
  const int fiber = ready[pick];
  ready.erase(ready.begin() + pick);
  return fiber;
}

void land(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    // Of variable size: a call, which the address sanitizer intercepts.
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
  }
}

void run_program(int program) {
  machine.program = program;
  std::fill(machine.shared.begin(), machine.shared.end(), 0xff);
  machine.ready.clear();
  for (int thread = 0; thread < machine.threads; ++thread) {
    Fiber& fiber = machine.fibers[thread];
    fiber.done = fiber.started = false;
    fiber.groups.assign(1, {});
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
    machine.ready.push_back(thread);
  }
  while (!machine.ready.empty()) change_to_fiber(next_fiber());
  for (int thread = 0; thread < machine.threads; ++thread) {
    const Fiber& fiber = machine.fibers[thread];
    if (!fiber.done) fail("a thread waits for others that have ended");
    for (const auto& group : fiber.groups)
      if (!group.empty()) fail("a thread ended before its copies");
  }
  machine.barrier.waiting.clear();
  for (Meeting& warp : machine.warps) warp.waiting.clear();
}

// --- Instructions -------------------------------------------------------------------------------

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float from_bfloat16(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }

float from_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(float(mantissa), -24);
  return sign * std::ldexp(float(mantissa + 1024), exponent - 25);
}

// To the nearest multiple of 2^drop of the bit pattern, ties to even.
uint32_t round_bits(uint32_t bits, int drop) {
  return bits + (1u << (drop - 1)) - 1 + (bits >> drop & 1);
}

uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fff;
  return uint16_t(round_bits(float_to_bits(value), 16) >> 16);
}

uint16_t to_float16(float value) {
  const uint16_t sign = float_to_bits(value) >> 16 & 0x8000;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(std::ldexp(size, 24)));
  if (size >= 65520.0f) return sign | 0x7c00;
  return sign | uint16_t((round_bits(float_to_bits(size), 13) >> 13) - (112 << 10));
}

// mma.sync m16n8k(16 or 8): PTX ISA, "Matrix fragments for mma". A register of A and B holds
// PER_WORD elements of neighbouring k.
template <int PER_WORD, class DECODE>
void multiply(float& c0, float& c1, float& c2, float& c3, const Fragment& a, uint32_t b0,
              uint32_t b1, DECODE decode) {
  struct Operand {
    const uint32_t* a;
    uint32_t b[2];
    float* c[4];
  } operand{a, {b0, b1}, {&c0, &c1, &c2, &c3}};
  with_warp("mma.sync", &operand, [decode](void* const* lanes) {
    constexpr int K = 8 * PER_WORD;
    float a[16][K], b[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* own = static_cast<const Operand*>(lanes[lane]);
      for (int part = 0; part < PER_WORD; ++part)
        for (int upper = 0; upper < 2; ++upper) {
          const int k = (lane % 4) * PER_WORD + part + upper * K / 2;
          a[lane / 4][k] = decode(own->a[2 * upper], part);
          a[lane / 4 + 8][k] = decode(own->a[2 * upper + 1], part);
          b[k][lane / 4] = decode(own->b[upper], part);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int n = 0; n < 4; ++n) {
        float& sum = *static_cast<const Operand*>(lanes[lane])->c[n];
        for (int k = 0; k < K; ++k)
          sum += a[lane / 4 + n / 2 * 8][k] * b[k][lane % 4 * 2 + n % 2];
      }
  });
}

}  // namespace

int thread_index() { return machine.current; }
int program_index() { return machine.program; }
unsigned char* shared_memory() { return machine.shared.data(); }

void sync_threads() { meet(machine.barrier, "bar.sync", machine.threads, [] {}); }

void sync_warp() {
  with_warp("bar.warp.sync", nullptr, [](void* const*) {});
}

float shuffle_xor(float value, int mask) {
  struct Operand {
    float value, result;
    int mask;
  } operand{value, 0, mask};
  with_warp("shfl.sync", &operand, [](void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* own = static_cast<Operand*>(lanes[lane]);
      own->result = static_cast<Operand*>(lanes[lane ^ own->mask])->value;
    }
  });
  return operand.result;
}

void load_matrices(Fragment& to, const void* line) {
  struct Operand {
    uint32_t* to;
    const unsigned char* line;
  } operand{to, static_cast<const unsigned char*>(line)};
  with_warp("ldmatrix", &operand, [](void* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;
      for (int row = 0; row < 8; ++row) {
        const auto* line = static_cast<Operand*>(lanes[8 * matrix + row])->line;
        const auto offset = static_cast<uintptr_t>(line - shared_memory());
        if (offset % 16 != 0) fail("ldmatrix: address is not a multiple of 16");
        if (offset + 16 > machine.shared.size()) return fail("ldmatrix: not in shared memory");
        banks |= 1u << (offset / 16 % 8);
        for (int column = 0; column < 4; ++column)
          std::memcpy(static_cast<Operand*>(lanes[4 * row + column])->to + matrix,
                      line + 4 * column, 4);
      }
      if (banks != 0xff) fail("ldmatrix: bank conflict");
    }
  });
}

void copy_async(void* shared, const void* global, int bytes) {
  const Copy copy = {static_cast<unsigned char*>(shared),
                     static_cast<const unsigned char*>(global), bytes};
  if ((reinterpret_cast<uintptr_t>(global) | (copy.to - shared_memory())) % 16 != 0)
    fail("cp.async: address is not a multiple of 16");
  if (static_cast<std::size_t>(copy.to - shared_memory()) + 16 > machine.shared.size())
    return fail("cp.async: not in shared memory");
  if (machine.copies_are_late)
    machine.fibers[machine.current].groups.back().push_back(copy);
  else
    land({copy});
}

void commit_copies() { machine.fibers[machine.current].groups.emplace_back(); }

void wait_for_copies(int pending) {
  auto& groups = machine.fibers[machine.current].groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    land(groups.front());
    groups.erase(groups.begin());
  }
}

uint32_t round_tf32(uint32_t value) {
  if (std::isnan(bits_to_float(value))) return 0x7fffffff;
  return (value + 0x1000) & ~0x1fffu;  // ties away from zero
}

uint32_t pack_bfloat16(float low, float high) {
  return to_bfloat16(low) | uint32_t(to_bfloat16(high)) << 16;
}

uint32_t pack_float16(float low, float high) {
  return to_float16(low) | uint32_t(to_float16(high)) << 16;
}

float exponential(float x) {
  const float result = std::exp(x);
  return result < 0x1p-126f ? 0.0f : result;
}

void multiply_bfloat16(float& c0, float& c1, float& c2, float& c3, const Fragment& a, uint32_t b0,
                       uint32_t b1) {
  multiply<2>(c0, c1, c2, c3, a, b0, b1, [](uint32_t word, int part) {
    return from_bfloat16(uint16_t(word >> 16 * part));
  });
}

void multiply_float16(float& c0, float& c1, float& c2, float& c3, const Fragment& a, uint32_t b0,
                      uint32_t b1) {
  multiply<2>(c0, c1, c2, c3, a, b0, b1, [](uint32_t word, int part) {
    return from_float16(uint16_t(word >> 16 * part));
  });
}

// Hardware reads the upper 19 bits of an operand.
void multiply_tf32(float& c0, float& c1, float& c2, float& c3, const Fragment& a, uint32_t b0,
                   uint32_t b1) {
  multiply<1>(c0, c1, c2, c3, a, b0, b1,
              [](uint32_t word, int) { return bits_to_float(word & ~0x1fffu); });
}

int run_programs(const std::function<void()>& kernel, int64_t programs, int threads,
                 int shared_bytes) {
  if (machine.fibers.empty()) machine.fibers.resize(THREADS);
  machine.error = std::exchange(machine.refusal, "");
  machine.kernel = &kernel;
  machine.threads = threads;
  machine.shared = std::vector<unsigned char>(shared_bytes);
  for (int64_t program = 0; program < programs && machine.error.empty(); ++program)
    run_program(static_cast<int>(program));
  return machine.error.empty() ? 0 : 1;
}

}  // namespace gcl::machine

namespace gcl {

const char* const DEVICE_TYPE = "cpu";

int device_count(int* count) { return *count = 1, 0; }
int use_device(int) { return 0; }
const char* error_text(int) { return machine::machine.error.c_str(); }

}  // namespace gcl

// For the tests, by ctypes.
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void emulated_gpu_schedule(int order, int seed, int copies_are_late) {
  using gcl::machine::machine;
  machine.order = static_cast<gcl::machine::Order>(order);
  machine.random.seed(seed);
  machine.copies_are_late = copies_are_late;
}

EXPORTED void emulated_gpu_refuse_next_launch(const char* text) {
  gcl::machine::machine.refusal = text;
}

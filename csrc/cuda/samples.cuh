// A warp takes a sample, WIDTH neighbouring elements of its row a lane at a time: 16 bytes where
// all rows are aligned, else one. Sums along D end in every lane.
#pragma once

#include <cmath>

#include "cuda/epilogue.cuh"
#include "cuda/samples.h"

namespace gcl {

constexpr int SAMPLES_OF_PROGRAM = THREADS / LANES;
constexpr float NORM_EPS = 1e-12f;

template <class STORAGE, int WIDTH>
struct alignas(WIDTH * sizeof(STORAGE)) Elements {
  STORAGE v[WIDTH];
};

template <class ELEMENT, int WIDTH>
DEVICE void load(float (&to)[WIDTH], const typename ELEMENT::Storage* from) {
  using Storage = typename ELEMENT::Storage;
  constexpr int AT_ONCE = WIDTH * sizeof(Storage) > PIECE_BYTES ? WIDTH / 2 : WIDTH;
#pragma unroll
  for (int first = 0; first < WIDTH; first += AT_ONCE) {
    const auto elements = *reinterpret_cast<const Elements<Storage, AT_ONCE>*>(from + first);
#pragma unroll
    for (int e = 0; e < AT_ONCE; ++e) to[first + e] = ELEMENT::widen(elements.v[e]);
  }
}

template <class ELEMENT, int WIDTH>
DEVICE void store(const float (&values)[WIDTH], typename ELEMENT::Storage* to) {
  Elements<typename ELEMENT::Storage, WIDTH> elements;
  if constexpr (WIDTH == 1) {
    elements.v[0] = ELEMENT::round(values[0], 0).v[0];
  } else {
#pragma unroll
    for (int e = 0; e < WIDTH; e += 2) {
      const auto pair = ELEMENT::round(values[e], values[e + 1]);
      elements.v[e] = pair.v[0];
      elements.v[e + 1] = pair.v[1];
    }
  }
  *reinterpret_cast<decltype(elements)*>(to) = elements;
}

struct AlongWarp {
  static constexpr int FIRST = 1, END = LANES;
};

// A warp's sample, and how it reads and writes rows.
template <class ELEMENT, int WIDTH>
struct Sample {
  using Storage = typename ELEMENT::Storage;
  using Part = float[WIDTH];

  int lane = thread_index() % LANES;
  int warp = thread_index() / LANES;
  int64_t index = int64_t(program_index()) * SAMPLES_OF_PROGRAM + warp;
  int64_t samples;
  int dim;

  DEVICE explicit Sample(const Embeddings& views) : samples(views.samples), dim(views.dim) {}

  // The columns of this lane: first(), next(col), while col < dim.
  DEVICE int first() const { return lane * WIDTH; }
  DEVICE int next(int col) const { return col + LANES * WIDTH; }

  // Infinite elements become NaN: their logits of -inf would pass for candidates of weight zero.
  DEVICE void read(Part& to, const Embeddings& views, int view, int col, float factor) const {
    const auto* row = static_cast<const Storage*>(views.at[view]) + index * views.stride[view];
    load<ELEMENT>(to, row + col);
#pragma unroll
    for (float& value : to) {
      value *= factor;
      value += value * 0;
    }
  }

  // Of float32 [.., samples, dim].
  DEVICE void read(Part& to, const float* matrix, int line, int col) const {
    load<Float32>(to, matrix + (line * samples + index) * dim + col);
  }

  // To [.., samples, dim].
  DEVICE void write(const Part& values, void* matrix, int line, int col) const {
    store<ELEMENT>(values, static_cast<Storage*>(matrix) + (line * samples + index) * dim + col);
  }

  // This sample's number in a row of a table.
  DEVICE float number(const float* table, int row) const { return table[row * samples + index]; }
  DEVICE void set_number(float* table, int row, float value) const {
    if (lane == 0) table[row * samples + index] = value;
  }

  DEVICE float length(const Embeddings& views, int view) const {
    float sum = 0;
    for (int col = first(); col < dim; col = next(col)) {
      Part e;
      read(e, views, view, col, 1);
#pragma unroll
      for (float value : e) sum += value * value;
    }
    return sqrtf(sum_along<AlongWarp>(sum));
  }
};

// NaN where the length overflowed: 1 / inf would silently give zero.
DEVICE float inverse_norm(float norm) { return 1 / fmaxf(norm, NORM_EPS) + norm * 0; }

// Whether every row read or written starts at a multiple of 16 bytes.
template <class ELEMENT>
bool rows_aligned(const Embeddings& views) {
  constexpr std::size_t SIZE = sizeof(typename ELEMENT::Storage);
  std::size_t starts = views.dim * SIZE;
  for (int v = 0; v < views.count; ++v)
    starts |= reinterpret_cast<uintptr_t>(views.at[v]) | views.stride[v] * SIZE;
  return starts % PIECE_BYTES == 0;
}

// Starts a program for each SAMPLES_OF_PROGRAM samples of the kernel for aligned rows, or for any.
template <class ELEMENT, class ARGUMENTS>
int launch_over_samples(void (*aligned)(ARGUMENTS), void (*any)(ARGUMENTS),
                        const ARGUMENTS& arguments, const Embeddings& views, int shared_numbers,
                        Stream stream) {
  const int64_t programs = (views.samples + SAMPLES_OF_PROGRAM - 1) / SAMPLES_OF_PROGRAM;
  const int shared_bytes = SAMPLES_OF_PROGRAM * shared_numbers * int(sizeof(float));
  return launch(rows_aligned<ELEMENT>(views) ? aligned : any, programs, THREADS, shared_bytes,
                stream, arguments);
}

// Elements in 16 bytes.
template <class ELEMENT>
constexpr int WIDE = PIECE_BYTES / static_cast<int>(sizeof(typename ELEMENT::Storage));

// Of Product the dtype.
template <class FUNCTION>
int with_dtype(Product product, FUNCTION function) {
  switch (product) {
    case Product::bfloat16: return function(BFloat16());
    case Product::float16: return function(Float16());
    default: return function(Float32());
  }
}

}  // namespace gcl

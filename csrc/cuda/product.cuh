// The product of a tile: <z_row, z_col> of TILE x TILE lines, in float32, in registers.
//
// All threads copy slices of LINE_BYTES of every line to shared memory, STAGES - 1 slices ahead of
// the multiplication. A slice means the same bytes to every dtype: tensor cores take 32 of a line
// at a time (16 half elements or 8 of tf32), and ldmatrix places them alike for both.
#pragma once

#include <cmath>

#include "cuda/block.h"
#include "cuda/machine.cuh"

namespace gcl {

using namespace machine;

// STAGES x 16 KiB: what a program gets without asking for more, and two programs fit every chip
// since sm_80 (sm_86, sm_89 and sm_120 have 100 KiB), so that one multiplies while the other
// exponentiates.
constexpr int STAGES = 3;
constexpr int OPERAND_BYTES = TILE * LINE_BYTES;
constexpr int STAGE_BYTES = 2 * OPERAND_BYTES;
constexpr int PRODUCT_BYTES = STAGES * STAGE_BYTES;
static_assert(PRODUCT_BYTES <= 48 * 1024);

using Sums = float[ROWS_OF_THREAD][COLS_OF_THREAD];

struct alignas(16) Piece {
  uint32_t words[4];
};

// A slice of both operands into the sums, by mma.sync. ELEMENT names the instruction.
template <class ELEMENT>
struct OnTensorCores {
  static DEVICE void multiply_slice(Sums& sums, const unsigned char* rows,
                                         const unsigned char* cols, const Place& at) {
    const int a_line = at.warp_row * ROWS_OF_WARP + at.lane % 16, a_piece = at.lane / 16;
    const int b_line = at.warp_col * COLS_OF_WARP + at.lane % 8 + at.lane / 16 * 8;
    const int b_piece = at.lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < PIECES / 2; ++step) {
      uint32_t b[COLS_OF_THREAD / 4][4];
#pragma unroll
      for (int n = 0; n < COLS_OF_THREAD / 4; ++n) {
        load_matrices(b[n], cols + piece_offset(b_line, 2 * step + b_piece) + 16 * n * LINE_BYTES);
        ELEMENT::prepare(b[n]);
      }
#pragma unroll
      for (int m = 0; m < ROWS_OF_THREAD / 2; ++m) {
        uint32_t a[4];
        load_matrices(a, rows + piece_offset(a_line, 2 * step + a_piece) + 16 * m * LINE_BYTES);
        ELEMENT::prepare(a);
#pragma unroll
        for (int n = 0; n < COLS_OF_THREAD / 2; ++n) {
          float(&top)[COLS_OF_THREAD] = sums[2 * m];
          float(&bottom)[COLS_OF_THREAD] = sums[2 * m + 1];
          ELEMENT::multiply(top[2 * n], top[2 * n + 1], bottom[2 * n], bottom[2 * n + 1], a,
                            b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
  }
};

template <class STORAGE>
struct alignas(2 * sizeof(STORAGE)) Pair {
  STORAGE v[2];
};

// Two 16-bit numbers from one register.
DEVICE Pair<uint16_t> halves(uint32_t packed) {
  return {{static_cast<uint16_t>(packed), static_cast<uint16_t>(packed >> 16)}};
}

struct BFloat16 : OnTensorCores<BFloat16> {
  using Storage = uint16_t;
  static DEVICE void prepare(uint32_t (&)[4]) {}
  static DEVICE void multiply(float& c0, float& c1, float& c2, float& c3,
                                   const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_bfloat16(c0, c1, c2, c3, a, b0, b1);
  }
  static DEVICE Pair<Storage> round(float low, float high) {
    return halves(pack_bfloat16(low, high));
  }
};

struct Float16 : OnTensorCores<Float16> {
  using Storage = uint16_t;
  static DEVICE void prepare(uint32_t (&)[4]) {}
  static DEVICE void multiply(float& c0, float& c1, float& c2, float& c3,
                                   const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_float16(c0, c1, c2, c3, a, b0, b1);
  }
  static DEVICE Pair<Storage> round(float low, float high) {
    return halves(pack_float16(low, high));
  }
};

struct TensorFloat32 : OnTensorCores<TensorFloat32> {
  using Storage = float;
  static DEVICE void prepare(uint32_t (&fragment)[4]) {
#pragma unroll
    for (uint32_t& value : fragment) value = round_tf32(value);
  }
  static DEVICE void multiply(float& c0, float& c1, float& c2, float& c3,
                                   const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_tf32(c0, c1, c2, c3, a, b0, b1);
  }
  static DEVICE Pair<Storage> round(float low, float high) { return {{low, high}}; }
};

// IEEE float32, on the ordinary arithmetic units.
struct Float32 {
  using Storage = float;

  static DEVICE void multiply_slice(Sums& sums, const unsigned char* rows,
                                         const unsigned char* cols, const Place& at) {
    // Two elements of D at a time: with four, operands and sums would not fit the registers.
#pragma unroll 1
    for (int k = 0; k < LINE_BYTES; k += sizeof(Pair<float>)) {
      // The pieces of lines that differ by 8, or within an even pair, are in the same order.
      const int piece = k / PIECE_BYTES, in_piece = k % PIECE_BYTES;
      const unsigned char* a_line = rows + piece_offset(at.row(0), piece) + in_piece;
      const unsigned char* b_line = cols + piece_offset(at.col(0), piece) + in_piece;
      Pair<float> b[COLS_OF_THREAD];
#pragma unroll
      for (int j = 0; j < COLS_OF_THREAD; ++j)
        b[j] = *reinterpret_cast<const Pair<float>*>(b_line + (8 * (j / 2) + j % 2) * LINE_BYTES);
#pragma unroll
      for (int i = 0; i < ROWS_OF_THREAD; ++i) {
        const auto a = *reinterpret_cast<const Pair<float>*>(a_line + 8 * i * LINE_BYTES);
#pragma unroll
        for (int j = 0; j < COLS_OF_THREAD; ++j)
          sums[i][j] = fmaf(a.v[1], b[j].v[1], fmaf(a.v[0], b[j].v[0], sums[i][j]));
      }
    }
  }

  static DEVICE Pair<Storage> round(float low, float high) { return {{low, high}}; }
};

// One thread's share of copying slices: a piece of so many lines of either operand.
template <class STORAGE>
struct Copier {
  static constexpr int STEP = THREADS / PIECES, LINES = TILE / STEP;
  const unsigned char* rows[LINES];  // the thread's piece of the next slice
  const unsigned char* cols[LINES];
  int left;                          // bytes of a line from there on
  int to;                            // where the first piece goes
  bool aligned;                      // every line starts at a multiple of 16 bytes

  DEVICE Copier(const Block& block, bool aligned, int first_row, int first_col)
      : aligned(aligned) {
    const int line = thread_index() / PIECES, piece = thread_index() % PIECES;
    left = block.dim * static_cast<int>(sizeof(STORAGE)) - piece * PIECE_BYTES;
    to = piece_offset(line, piece);
#pragma unroll
    for (int n = 0; n < LINES; ++n) {
      rows[n] = start_of(block.rows, block.dim, first_row + line + n * STEP) + piece * PIECE_BYTES;
      cols[n] = start_of(block.cols, block.dim, first_col + line + n * STEP) + piece * PIECE_BYTES;
    }
  }

  static DEVICE const unsigned char* start_of(const Side& side, int dim, int line) {
    // Padding repeats the last row and is masked: copies need no predicate for rows.
    const int64_t inside = line < side.length ? line : side.length - 1;
    return reinterpret_cast<const unsigned char*>(static_cast<const STORAGE*>(side.z) +
                                                  inside * dim);
  }

  DEVICE void copy_slice(unsigned char* stage) {
#pragma unroll
    for (int n = 0; n < LINES; ++n) {
      copy_piece(stage + to + n * STEP * LINE_BYTES, rows[n]);
      copy_piece(stage + OPERAND_BYTES + to + n * STEP * LINE_BYTES, cols[n]);
    }
    left -= LINE_BYTES;
  }

  DEVICE void copy_piece(unsigned char* piece, const unsigned char*& from) const {
    if (aligned)
      // Where the line has ended, its last bytes are an address as good as any: none is read.
      copy_async(piece, left > 0 ? from : from + left - PIECE_BYTES, left > 0 ? PIECE_BYTES : 0);
    else
      *reinterpret_cast<Piece*>(piece) = load_elements(from);
    from += LINE_BYTES;
  }

  // A piece by its elements, for lines that start anywhere; zeros after the line's end.
  DEVICE Piece load_elements(const unsigned char* at) const {
    constexpr int SIZE = sizeof(STORAGE);
    Piece piece = {};
#pragma unroll
    for (int e = 0; e < PIECE_BYTES / SIZE; ++e) {
      if (e * SIZE >= left) continue;
      if constexpr (SIZE == 4) {
        piece.words[e] = *reinterpret_cast<const uint32_t*>(at + 4 * e);
      } else {
        const uint32_t element = *reinterpret_cast<const uint16_t*>(at + 2 * e);
        piece.words[e / 2] |= element << (e % 2 * 16);
      }
    }
    return piece;
  }
};

// The sums of the tile with this corner, counted from the block's. When it returns, all threads are
// done with shared memory.
template <class ELEMENT>
DEVICE void multiply_tile(Sums& sums, const Block& block, bool aligned, int first_row,
                          int first_col, const Place& at) {
  using Storage = typename ELEMENT::Storage;
  unsigned char* const shared = shared_memory();
  Copier<Storage> copier(block, aligned, first_row, first_col);
#pragma unroll
  for (auto& row : sums)
#pragma unroll
    for (float& sum : row) sum = 0;

  const int slices = ceil_div(block.dim * static_cast<int>(sizeof(Storage)), LINE_BYTES);
#pragma unroll 1
  for (int slice = 1 - STAGES; slice < slices; ++slice) {
    if (slice >= 0) {
      wait_copies<STAGES - 2>();
      // All threads' copies of this slice have arrived, and all have left the stage filled next.
      sync_threads();
    }
    const int next = slice + STAGES - 1;
    if (next < slices) copier.copy_slice(shared + next % STAGES * STAGE_BYTES);
    commit_copies();  // also an empty group, which wait_copies counts
    if (slice < 0) continue;
    const unsigned char* stage = shared + slice % STAGES * STAGE_BYTES;
    ELEMENT::multiply_slice(sums, stage, stage + OPERAND_BYTES, at);
  }
  sync_threads();
}

// Calls function(ELEMENT()) for the product asked for.
template <class FUNCTION>
int with_element(Product product, FUNCTION function) {
  switch (product) {
    case Product::float32: return function(Float32());
    case Product::tf32: return function(TensorFloat32());
    case Product::bfloat16: return function(BFloat16());
    default: return function(Float16());
  }
}

// Whether every line of both operands starts at a multiple of 16 bytes.
template <class ELEMENT>
bool operands_aligned(const Block& block) {
  constexpr std::size_t SIZE = sizeof(typename ELEMENT::Storage);
  const auto rows = reinterpret_cast<uintptr_t>(block.rows.z);
  const auto cols = reinterpret_cast<uintptr_t>(block.cols.z);
  return (rows | cols | block.dim * SIZE) % PIECE_BYTES == 0;
}

}  // namespace gcl

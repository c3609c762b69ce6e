// What the launchers take: plain pointers and numbers, no CUDA header and no PyTorch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/geometry.h"

namespace gcl {

// How operands are multiplied.
enum class Product { float32, tf32, bfloat16, float16 };

// The rows or the columns of a block. Pointers are those of its first row or column.
struct Side {
  const void* z;         // embeddings, `dim` elements each
  int64_t base_stride;   // fused: elements from base 0's embedding of a sample to base 1's
  const int64_t* ids;    // null: the default ids
  int length;
};

struct Block {
  Side rows, cols;
  const float* scale;
  int dim;
  int id_offset, id_period;  // see SampleIds
  bool unit_rows, diagonal, serves_rows, serves_cols;

  HOST_DEVICE SampleIds sample_ids() const {
    return {rows.ids, cols.ids, id_offset, id_period, rows.length, cols.length};
  }
};

// lse and g of a block's rows or columns. Fused: [V, N] at its first sample.
struct Lines {
  const float* lse;
  const float* grad;
};

// Where weights go: rows `pitch` elements apart, the four matrices of a fused block `plane` apart.
struct Output {
  void* at;
  int64_t pitch, plane;
};

// The views of a fused block, as combinations of its bases. Pointers are those of the first sample.
struct Views {
  int count;
  uint64_t candidates;  // bit v * count + w: candidates[v][w]
  const float* row_coefficients;  // [V, 2, N]
  const float* col_coefficients;
  int64_t row_samples, col_samples;  // N

  HOST_DEVICE bool meets(int v, int w) const { return candidates >> (v * count + w) & 1; }
};

// Tables of one slot per tile: float32 [values, slots, lines]. A fold adds the slots of a line, in
// their order, to what `lines` of `groups` (views, bases) hold at `stride` from each other.
struct Fold {
  const float* table;
  int slots, length, groups;
  int64_t stride;
  float* max;  // null: sums only
  float* sum;
};

// A stream of the current device.
using Stream = void*;

// Each starts one kernel and returns 0 or an error for error_text().
int block_stats(Product, const Block&, float* row_table, float* col_table, Stream);
int block_weights(Product, const Block&, Lines rows, Lines cols, Output out, Stream);
int fused_block_stats(Product, const Block&, const Views&, float* row_table, float* col_table,
                      Stream);
int fused_block_weights(Product, const Block&, const Views&, Lines rows, Lines cols, Output out,
                        float* row_table, float* col_table, Stream);
int fold(const Fold& rows, const Fold& cols, Stream);

// Shared memory that a launch may ask for; chips since sm_80 have 99 KiB and more.
constexpr int MOST_SHARED_BYTES = 96 * 1024;
constexpr int MAX_VIEWS = 7;  // so many fit the shared memory of every chip, and 49 bits

// The machine: what CUDA's runtime says. Each returns 0 or an error for error_text().
int device_count(int* count);
int use_device(int device);
const char* error_text(int error);
extern const char* const DEVICE_TYPE;  // PyTorch's name of where pointers point to

}  // namespace gcl

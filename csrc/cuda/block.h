// What the launchers take: plain pointers and numbers, no CUDA header and no PyTorch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "geometry.h"

namespace gcl {

// How operands are multiplied.
enum class Product { float32, tf32, bfloat16, float16 };

// The rows or the columns of a block. Pointers are those of its first row or column.
struct Side {
  const void* z;       // embeddings, `dim` elements each
  const int64_t* ids;  // null: the default ids
  // As candidates and as anchors, see problem.py; null: all zero, no limits.
  const float *log_weights, *limits;
  int length;
};

struct Block {
  Side rows, cols;
  const float* scale;
  int dim;
  int id_offset, id_period;  // see SampleIds
  bool unit_rows, diagonal, serves_rows, serves_cols;

  // Whether a pair's term may be another for the row's anchor than for the column's.
  HOST_DEVICE bool one_sided() const {
    return rows.log_weights != nullptr || rows.limits != nullptr;
  }

  HOST_DEVICE SampleIds sample_ids() const {
    return {rows.ids, cols.ids, id_offset, id_period, rows.length, cols.length};
  }
};

// lse and g of a block's rows or columns.
struct Lines {
  const float* lse;
  const float* grad;
};

// A table of one slot per tile, float32 [2, slots, length]: its maxima, then its sums. A fold adds
// the slots of each line, in their order, to the line's running maximum and sum.
struct Fold {
  const float* table;
  int slots, length;
  float* max;
  float* sum;
};

// A stream of the current device.
using Stream = void*;

// Each starts one kernel and returns 0 or an error for error_text().
int block_stats(Product, const Block&, float* row_table, float* col_table, Stream);
// Of weights, rows go to `out`, `pitch` elements apart.
int block_weights(Product, const Block&, Lines rows, Lines cols, void* out, int64_t pitch, Stream);
int fold(const Fold& rows, const Fold& cols, Stream);

// The machine: what CUDA's runtime says. Each returns 0 or an error for error_text().
int device_count(int* count);
int use_device(int device);
const char* error_text(int error);
extern const char* const DEVICE_TYPE;  // PyTorch's name of where pointers point to

}  // namespace gcl

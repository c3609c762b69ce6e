// Which tile a program computes, and where its entries lie: integer arithmetic only.
//
// A block of the similarity matrix is cut into TILE x TILE tiles; a diagonal block computes those
// on and above its diagonal.
//
// A tile's entries belong to threads as mma.sync's sums do. Warps form a grid of WARP_ROWS x
// WARP_COLS; a lane holds the rows lane / 4 + 8 i of its warp's 64, and of its 32 columns the pairs
// 2 (lane % 4) + {0, 1} + 8 j.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace gcl {

constexpr int TILE = 128;
constexpr int LANES = 32;
constexpr int WARP_ROWS = 2;
constexpr int WARP_COLS = 4;
constexpr int THREADS = LANES * WARP_ROWS * WARP_COLS;
constexpr int ROWS_OF_WARP = TILE / WARP_ROWS;
constexpr int COLS_OF_WARP = TILE / WARP_COLS;
constexpr int ROWS_OF_THREAD = 8;
constexpr int COLS_OF_THREAD = 8;
constexpr int LANES_OF_ROW = COLS_OF_WARP / COLS_OF_THREAD;
constexpr int LANES_OF_COL = ROWS_OF_WARP / ROWS_OF_THREAD;

HOST_DEVICE inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

HOST_DEVICE inline int64_t num_tiles(int rows, int cols, bool diagonal, int tile) {
  const int64_t row_tiles = ceil_div(rows, tile), col_tiles = ceil_div(cols, tile);
  return diagonal ? row_tiles * (row_tiles + 1) / 2 : row_tiles * col_tiles;
}

struct TilePlace {
  int row, col;
};

// The tile of a program; on a diagonal block one with row <= column.
HOST_DEVICE inline TilePlace tile_of(int program, int row_tiles, int col_tiles, bool diagonal) {
  if (!diagonal) return {program / col_tiles, program % col_tiles};
  // Rows r and T-1-r of the triangle hold T+1 tiles together: the triangle as a rectangle.
  const int row = program / (row_tiles + 1), col = program % (row_tiles + 1);
  if (col < row_tiles - row) return {row, row + col};
  return {row_tiles - 1 - row, col - 1};
}

// Which embeddings are of one sample. Given ids are compared; under the default ids the equal pairs
// are the diagonals col - row = offset (mod period) of the block.
struct SampleIds {
  const int64_t* rows;  // of the block's first row, or null
  const int64_t* cols;
  int offset, period;
  int num_rows, num_cols;

  HOST_DEVICE int64_t row_id(int row) const {
    if (rows == nullptr) return (uint32_t(row) + uint32_t(offset)) % uint32_t(period);
    return rows[row < num_rows ? row : num_rows - 1];
  }

  HOST_DEVICE int64_t col_id(int col) const {
    if (cols == nullptr) return uint32_t(col) % uint32_t(period);
    return cols[col < num_cols ? col : num_cols - 1];
  }

  // The mask rule: inside the block, and not of one sample.
  HOST_DEVICE bool is_negative(int row, int col, int64_t row_id, int64_t col_id) const {
    return row < num_rows && col < num_cols && row_id != col_id;
  }

  // Whether any entry of a tile with this corner may be no negative.
  HOST_DEVICE bool must_mask(int first_row, int first_col, int tile) const {
    if (rows != nullptr || first_row + tile > num_rows || first_col + tile > num_cols) return true;
    // The largest difference col - row of the tile lies `past` a diagonal of equal ids; the
    // differences are 2 tile - 1 consecutive numbers.
    const uint32_t n = period, last = first_col + tile - 1;
    const uint32_t past = (last + n - (uint32_t(first_row) + uint32_t(offset)) % n) % n;
    return past <= uint32_t(2 * tile - 2);
  }
};

// The entries of a tile that a thread holds.
struct Place {
  int lane, warp_row, warp_col;

  HOST_DEVICE explicit Place(int thread)
      : lane(thread % LANES),
        warp_row(thread / LANES / WARP_COLS),
        warp_col(thread / LANES % WARP_COLS) {}

  HOST_DEVICE int warp() const { return warp_row * WARP_COLS + warp_col; }
  // Within the warp, and within the tile.
  HOST_DEVICE int warp_line(int i) const { return 8 * i + lane / 4; }
  HOST_DEVICE int warp_column(int j) const { return 8 * (j / 2) + 2 * (lane % 4) + j % 2; }
  HOST_DEVICE int row(int i) const { return warp_row * ROWS_OF_WARP + warp_line(i); }
  HOST_DEVICE int col(int j) const { return warp_col * COLS_OF_WARP + warp_column(j); }
};

// Operands wait in shared memory as lines of LINE_BYTES, in pieces of 16 bytes. The order of a
// line's pieces changes with its number, so that the same piece of 8 consecutive lines, or all
// pieces of 2, touch all 32 banks once.
constexpr int LINE_BYTES = 64;
constexpr int PIECE_BYTES = 16;
constexpr int PIECES = LINE_BYTES / PIECE_BYTES;

HOST_DEVICE inline int piece_offset(int line, int piece) {
  return line * LINE_BYTES + (piece ^ (line / 2 % PIECES)) * PIECE_BYTES;
}

}  // namespace gcl

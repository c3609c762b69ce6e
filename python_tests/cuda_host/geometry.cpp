// csrc/cuda/geometry.h, exhaustively on small shapes, against the definitions.
#include "cuda/geometry.h"

#include <cstdio>
#include <cstdlib>
#include <set>
#include <utility>
#include <vector>

using namespace gcl;

static void check(bool holds, const char* what, int line) {
  if (holds) return;
  std::fprintf(stderr, "geometry.cpp:%d: %s\n", line, what);
  std::exit(1);
}
#define CHECK(condition) check(condition, #condition, __LINE__)

// Every tile once, on and above the diagonal of a diagonal block.
static void tiles_are_visited_once() {
  for (int rows = 1; rows <= 24; ++rows)
    for (int cols = 1; cols <= 24; ++cols)
      for (const bool diagonal : {false, true}) {
        if (diagonal && rows != cols) continue;
        const int64_t count = num_tiles(rows * 5 - 2, cols * 5, diagonal, 5);
        std::set<std::pair<int, int>> seen;
        for (int program = 0; program < count; ++program) {
          const TilePlace tile = tile_of(program, rows, cols, diagonal);
          CHECK(0 <= tile.row && tile.row < rows && tile.col < cols);
          CHECK(tile.col >= (diagonal ? tile.row : 0));
          seen.emplace(tile.row, tile.col);
        }
        CHECK(int64_t(seen.size()) == count);
        CHECK(count == (diagonal ? rows * (rows + 1) / 2 : rows * cols));
      }
  CHECK(num_tiles(1 << 24, 1 << 24, false, 128) == int64_t(1) << 34);
}

// Every entry of a tile has one thread, and every lane of a row or column is where sums expect it.
static void entries_have_one_owner() {
  std::vector<int> owner(TILE * TILE, -1);
  for (int thread = 0; thread < THREADS; ++thread) {
    const Place at(thread);
    CHECK(at.warp() == thread / LANES && at.lane == thread % LANES);
    for (int i = 0; i < ROWS_OF_THREAD; ++i)
      for (int j = 0; j < COLS_OF_THREAD; ++j) {
        int& own = owner[at.row(i) * TILE + at.col(j)];
        CHECK(own == -1);
        own = thread;
        for (int lane = 1; lane < LANES; ++lane) {
          const Place other(thread ^ lane);
          CHECK((at.row(i) == other.row(i)) == (lane < LANES_OF_ROW));
          CHECK((at.col(j) == other.col(j)) == (lane % LANES_OF_ROW == 0));
        }
      }
  }
  for (const int thread : owner) CHECK(thread >= 0);
}

// Pieces fill a stage without overlap, and 8 lines' equal pieces lie in different banks.
static void pieces_are_spread_over_banks() {
  std::set<int> offsets;
  for (int line = 0; line < TILE; ++line)
    for (int piece = 0; piece < PIECES; ++piece) {
      const int offset = piece_offset(line, piece);
      CHECK(offset % PIECE_BYTES == 0 && offset / LINE_BYTES == line);
      offsets.insert(offset);
      std::set<int> banks, pair;
      for (int n = 0; n < 8; ++n) {
        banks.insert(piece_offset(line / 8 * 8 + n, piece) / PIECE_BYTES % 8);
        pair.insert(piece_offset(line / 2 * 2 + n / 4, n % 4) / PIECE_BYTES % 8);
      }
      CHECK(banks.size() == 8 && pair.size() == 8);
      CHECK(piece_offset(line, piece) + 8 * LINE_BYTES == piece_offset(line + 8, piece));
    }
  CHECK(int(offsets.size()) == TILE * PIECES);
}

// The mask rule of all blocks that can be cut from a matrix of several views of N samples.
static void masks_are_the_definition(int samples, int tile) {
  const int rows_in_all = 3 * samples;
  for (int row_start = 0; row_start < rows_in_all; row_start += 3)
    for (int col_start = row_start; col_start < rows_in_all; col_start += 2)
      for (const int num_rows : {1, 7, tile, 2 * tile + 1})
        for (const int num_cols : {2, 2 * tile, 3 * tile - 1}) {
          // The smallest diagonal that is not negative, as the launcher finds it.
          const int offset = ((row_start - col_start) % samples + samples) % samples;
          const SampleIds ids = {nullptr, nullptr, offset, samples, num_rows, num_cols};
          for (int first_row = 0; first_row < num_rows; first_row += tile)
            for (int first_col = 0; first_col < num_cols; first_col += tile) {
              bool masked = false;
              for (int i = first_row; i < first_row + tile; ++i)
                for (int j = first_col; j < first_col + tile; ++j) {
                  const bool same = (row_start + i - col_start - j) % samples == 0;
                  const bool inside = i < num_rows && j < num_cols;
                  const bool negative = ids.is_negative(i, j, ids.row_id(i), ids.col_id(j));
                  CHECK(negative == (inside && !same));
                  masked |= !negative;
                }
              CHECK(ids.must_mask(first_row, first_col, tile) == masked);
            }
        }
}

static void given_ids_are_read_inside_the_block_only() {
  const std::vector<int64_t> rows = {int64_t(1) << 62, 5, -7}, cols = {5, -7};
  const SampleIds ids = {rows.data(), cols.data(), 0, 1, 3, 2};
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) {
      const bool inside = i < 3 && j < 2;
      const bool negative = ids.is_negative(i, j, ids.row_id(i), ids.col_id(j));
      CHECK(negative == (inside && rows[i] != cols[j]));
    }
  CHECK(ids.must_mask(0, 0, 1));
}

int main() {
  tiles_are_visited_once();
  entries_have_one_owner();
  pieces_are_spread_over_banks();
  for (const int samples : {1, 2, 5, 16, 23, 40})
    for (const int tile : {4, 8}) masks_are_the_definition(samples, tile);
  given_ids_are_read_inside_the_block_only();
}

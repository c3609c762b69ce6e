// The blocked product of bfloat16. Included like kernels.h, once per instruction; a Block makes a
// block of C, `rows` x `cols`, from packed operands: A's rows, `a_pitch` apart, and a panel of B.
//
// Both operands are copied, once for a whole product or part of C, with zeros where they end: only
// C has edges. An element of C is summed over slices of half_depth in their order, whatever the
// number of threads.

constexpr int64_t half_depth = 512;  // a slice of a block's rows: 32 KiB, in the first-level cache
constexpr int words = lanes<float>;  // two bfloat16 of one row or column, in a vector's lane

// to[i][p] = from[i][p], zero outside of rows x cols.
template <class A>
INLINE void copy_rows(Bfloat16* to, int64_t to_rows, int64_t to_cols, const A* from, int64_t pitch,
                      int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < to_rows; ++i, to += to_cols) {
    const int64_t count = i < rows ? std::max<int64_t>(0, std::min(cols, to_cols)) : 0;
    for (int64_t p = 0; p < count; ++p) to[p] = rounded(from[i * pitch + p]);
    for (int64_t p = count; p < to_cols; ++p) to[p] = {};
  }
}

// to[q][j] = the pair from[2 q][j], from[2 q + 1][j], zero outside of depth x cols.
template <class A>
INLINE void interleave_rows(Bfloat16* to, int64_t to_pairs, int64_t to_cols, const A* from,
                            int64_t pitch, int64_t depth, int64_t cols) {
  for (int64_t q = 0; q < to_pairs; ++q, to += 2 * to_cols) {
    const A *even = from + 2 * q * pitch, *odd = even + pitch;
    int64_t j = 0;
    if (2 * q + 1 < depth)
      for (; j < std::min(cols, to_cols); ++j)
        to[2 * j] = rounded(even[j]), to[2 * j + 1] = rounded(odd[j]);
    else if (2 * q < depth)
      for (; j < std::min(cols, to_cols); ++j)
        to[2 * j] = rounded(even[j]), to[2 * j + 1] = {};
    for (; j < to_cols; ++j) to[2 * j] = to[2 * j + 1] = {};
  }
}

// to[p][i] = from[i][p] of a square of words.
INLINE void transpose_words(Bfloat16* to, int64_t to_pitch, const Bfloat16* from) {
  transpose_square<float>(reinterpret_cast<float*>(to), to_pitch,
                          reinterpret_cast<const float*>(from), words);
}

template <class Block>
void pack_panel(Bfloat16* to, const Bfloat16* b, int64_t pitch, bool transposed, int64_t depth,
                int64_t cols) {
  const int64_t pairs =
      (depth + half_depth_multiple - 1) / half_depth_multiple * half_depth_multiple / 2;
  if (!transposed) return interleave_rows(to, pairs, Block::cols, b, pitch, depth, cols);
  alignas(64) Bfloat16 square[2 * words * words];
  for (int64_t j = 0; j < Block::cols; j += words) {
    for (int64_t q = 0; q < pairs; q += words) {
      copy_rows(square, words, 2 * words, b + j * pitch + 2 * q, pitch, cols - j, depth - 2 * q);
      transpose_words(to + 2 * (q * Block::cols + j), Block::cols, square);
    }
  }
}

// A slice of rows of A, `depth` of them from `p` on: to[i][depth], whole blocks of rows.
template <class A>
INLINE void pack_rows(Bfloat16* to, const HalfProduct<A>& s, int64_t first, int64_t last, int64_t p,
                      int64_t depth, int64_t block_rows) {
  const int64_t rows = last - first, left = s.depth - p;
  const int64_t to_rows = (rows + block_rows - 1) / block_rows * block_rows;
  if (!s.a_transposed)
    return copy_rows(to, to_rows, depth, s.a + first * s.a_pitch + p, s.a_pitch, rows, left);
  alignas(64) Bfloat16 square[2 * words * words];
  for (int64_t i = 0; i < to_rows; i += words) {
    for (int64_t q = 0; q < depth / 2; q += words) {
      interleave_rows(square, words, words, s.a + (p + 2 * q) * s.a_pitch + first + i, s.a_pitch,
                      left - 2 * q, rows - i);
      transpose_words(to + i * depth + 2 * q, depth / 2, square);
    }
  }
}

template <class Block, class A>
void multiply_half(const HalfProduct<A>& s, const Bfloat16* panels, int64_t first, int64_t last,
                   int64_t start) {
  const typename Block::Scope scope;
  alignas(64) Bfloat16 a[half_part_rows * half_depth];
  alignas(64) float edge[Block::rows * Block::cols];
  const int64_t whole_depth =
      (s.depth + half_depth_multiple - 1) / half_depth_multiple * half_depth_multiple;
  for (int64_t p = 0; p < whole_depth; p += half_depth) {
    const int64_t depth = std::min(half_depth, whole_depth - p);
    const bool add = s.add || p > 0;
    // Rows of whole squares of words.
    pack_rows(a, s, first, last, p, depth, std::max<int64_t>(Block::rows, words));
    for (int64_t j = start; j < s.cols; j += Block::cols) {
      const Bfloat16* b = panels + j * whole_depth + p * Block::cols;
      const int64_t cols = std::min<int64_t>(Block::cols, s.cols - j);
      for (int64_t i = first; i < last; i += Block::rows) {
        const int64_t rows = std::min<int64_t>(Block::rows, last - i);
        const Bfloat16* of_rows = a + (i - first) * depth;
        float* c = s.c + i * s.c_pitch + j;
        if (rows == Block::rows && cols == Block::cols) {
          Block::multiply(of_rows, depth, b, depth, c, s.c_pitch, add);
          continue;
        }
        Block::multiply(of_rows, depth, b, depth, edge, Block::cols, false);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t k = 0; k < cols; ++k)
            c[r * s.c_pitch + k] = (add ? c[r * s.c_pitch + k] : 0) + edge[r * Block::cols + k];
      }
    }
  }
}

// Of tiles, 16 rows of 64 bytes: four of C from two of A and two of B, which hold 32 numbers of
// each row of A and of each column of B.
template <class Tiles>
struct TileBlock {
  static constexpr int rows = 32, cols = 32;
  using Scope = typename Tiles::Scope;

  INLINE static void multiply(const Bfloat16* a, int64_t a_pitch, const Bfloat16* b, int64_t depth,
                              float* c, int64_t c_pitch, bool add) {
    constexpr int64_t b_row = cols * 2 * sizeof(Bfloat16);
    const int64_t a_row = a_pitch * sizeof(Bfloat16), c_row = c_pitch * sizeof(float);
    float* const below = c + 16 * c_pitch;
    if (add) {
      Tiles::template load<0>(c, c_row), Tiles::template load<1>(c + 16, c_row);
      Tiles::template load<2>(below, c_row), Tiles::template load<3>(below + 16, c_row);
    } else {
      Tiles::template zero<0>(), Tiles::template zero<1>();
      Tiles::template zero<2>(), Tiles::template zero<3>();
    }
    for (int64_t p = 0; p < depth; p += half_depth_multiple) {
      Tiles::template load<4>(a + p, a_row);
      Tiles::template load<5>(a + 16 * a_pitch + p, a_row);
      Tiles::template load<6>(b + p * cols, b_row);
      Tiles::template load<7>(b + p * cols + 2 * 16, b_row);
      Tiles::template add_product<0, 4, 6>(), Tiles::template add_product<1, 4, 7>();
      Tiles::template add_product<2, 5, 6>(), Tiles::template add_product<3, 5, 7>();
    }
    Tiles::template store<0>(c, c_row), Tiles::template store<1>(c + 16, c_row);
    Tiles::template store<2>(below, c_row), Tiles::template store<3>(below + 16, c_row);
  }
};

// Of vectors of 16 lanes, each the sum of a pair's products: 24 of C, 3 of B and a pair of A in all
// lanes, of the 32 registers of AVX-512.
template <class Vectors>
struct VectorBlock {
  static constexpr int rows = 8, cols = 48;
  struct Scope {
    Scope() {}
  };

  INLINE static void multiply(const Bfloat16* a, int64_t a_pitch, const Bfloat16* b, int64_t depth,
                              float* c, int64_t c_pitch, bool add) {
    constexpr int vectors = cols / 16;
    typename Vectors::Sum sum[rows][vectors];
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < vectors; ++j)
        sum[i][j] = add ? Vectors::load_sum(c + i * c_pitch + j * 16) : Vectors::zero();
    for (int64_t p = 0; p < depth; p += 2) {
      typename Vectors::Pairs row[vectors];
      for (int j = 0; j < vectors; ++j) row[j] = Vectors::load_pairs(b + p * cols + j * 2 * 16);
      for (int i = 0; i < rows; ++i) {
        const auto pair = Vectors::repeat_pair(a + i * a_pitch + p);
        for (int j = 0; j < vectors; ++j) sum[i][j] = Vectors::add_product(sum[i][j], pair, row[j]);
      }
    }
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < vectors; ++j) Vectors::store_sum(c + i * c_pitch + j * 16, sum[i][j]);
  }
};

template <class Block>
constexpr HalfKernels half_table = {Block::cols, pack_panel<Block>, multiply_half<Block, Bfloat16>,
                                    multiply_half<Block, float>};

// Matrix products: C = A B or C += A B.
//
// A register tile of C, tile_rows x tile_vectors vectors, takes one broadcast element of A and
// one row of B at a time. B is read where it lies; only where its columns are contiguous instead of
// its rows, or end within a vector, a slice of it is copied first. An element of C is summed over
// slices of product_depth in their order, whatever the number of threads.

// A register tile of 6 x 4 vectors keeps sums in 24 of the 32 registers of AVX-512, one of 6 x 2 in
// 12 of the 16 of AVX2: enough to hide the latency of an FMA. kernels.cpp defines tile_vectors.
constexpr int tile_rows = product_tile_rows;
constexpr int product_depth = 256;  // a slice of 64 columns: 64 KiB, in the second-level cache

// One slice of one register tile. A's element (i, p) is a[i * a_row + p * a_col].
template <class T, int vectors>
INLINE void register_tile(const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row,
                          int64_t depth, T* c, int64_t c_row, bool add) {
  typename Simd<T>::Vec sum[tile_rows][vectors];
  for (int i = 0; i < tile_rows; ++i)
    for (int j = 0; j < vectors; ++j) sum[i][j] = splat<T>(0);
  for (int64_t p = 0; p < depth; ++p) {
    typename Simd<T>::Vec row[vectors];
    for (int j = 0; j < vectors; ++j) row[j] = load<T>(b + p * b_row + j * lanes<T>);
    for (int i = 0; i < tile_rows; ++i) {
      const auto element = splat<T>(a[i * a_row + p * a_col]);
      for (int j = 0; j < vectors; ++j) sum[i][j] += element * row[j];
    }
  }
  for (int i = 0; i < tile_rows; ++i) {
    for (int j = 0; j < vectors; ++j) {
      T* to = c + i * c_row + j * lanes<T>;
      store<T>(to, add ? load<T>(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// A register tile at C's lower or right edge: computed beside C, of which it may touch `rows` x
// `cols`. Surplus rows repeat the last one; B has its surplus columns.
template <class T, int vectors>
INLINE void edge_tile(const T* a, int64_t a_row, int64_t a_col, int64_t rows, const T* b,
                      int64_t b_row, int64_t depth, T* c, int64_t c_row, int64_t cols, bool add) {
  constexpr int64_t columns = vectors * lanes<T>;
  T copy[tile_rows * product_depth], part[tile_rows * columns];
  if (rows < tile_rows) {
    for (int64_t p = 0; p < depth; ++p)
      for (int64_t i = 0; i < tile_rows; ++i)
        copy[p * tile_rows + i] = a[std::min(i, rows - 1) * a_row + p * a_col];
    a = copy, a_row = 1, a_col = tile_rows;
  }
  register_tile<T, vectors>(a, a_row, a_col, b, b_row, depth, part, columns, false);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < cols; ++k)
      c[i * c_row + k] = (add ? c[i * c_row + k] : T(0)) + part[i * columns + k];
}

// One slice of all rows of a panel of C, `cols` wide: `vectors` registers, the last one maybe in
// part.
template <class T, int vectors, bool a_transposed>
void panel(const T* a, int64_t a_pitch, int64_t rows, const T* b, int64_t b_row, int64_t depth,
           T* c, int64_t c_row, int64_t cols, bool add) {
  // Constants to the compiler: one of them is 1.
  const int64_t a_row = a_transposed ? 1 : a_pitch, a_col = a_transposed ? a_pitch : 1;
  for (int64_t i = 0; i < rows; i += tile_rows) {
    if (i + tile_rows <= rows && cols == vectors * lanes<T>)
      register_tile<T, vectors>(a + i * a_row, a_row, a_col, b, b_row, depth, c + i * c_row, c_row,
                                add);
    else
      edge_tile<T, vectors>(a + i * a_row, a_row, a_col, std::min<int64_t>(tile_rows, rows - i), b,
                            b_row, depth, c + i * c_row, c_row, cols, add);
  }
}

// Lanes of two registers in turn, from number `first` on. Spelled out, it becomes one instruction.
template <class T, int first, int... lane>
INLINE typename Simd<T>::Vec interleave(typename Simd<T>::Vec a, typename Simd<T>::Vec b,
                                            std::integer_sequence<int, lane...>) {
  return typename Simd<T>::Vec{(lane % 2 ? b : a)[first + lane / 2]...};
}

// to[p][j] = from[j][p] of a square: every round of interleaving halves the distance to go.
template <class T>
INLINE void transpose_square(T* to, int64_t to_row, const T* from, int64_t from_row) {
  constexpr int n = lanes<T>;
  using Lanes = std::make_integer_sequence<int, n>;
  typename Simd<T>::Vec rows[n], mixed[n];
  for (int i = 0; i < n; ++i) rows[i] = load<T>(from + i * from_row);
  for (int round = 1; round < n; round *= 2) {
    for (int i = 0; i < n / 2; ++i) {
      mixed[2 * i] = interleave<T, 0>(rows[i], rows[i + n / 2], Lanes());
      mixed[2 * i + 1] = interleave<T, n / 2>(rows[i], rows[i + n / 2], Lanes());
    }
    for (int i = 0; i < n; ++i) rows[i] = mixed[i];
  }
  for (int i = 0; i < n; ++i) store<T>(to + i * to_row, rows[i]);
}

// to[p][j] = B(p, j) for `cols` columns, zero in the padding up to a multiple of `width`.
template <class T>
INLINE void copy_slice(T* to, int64_t to_row, const T* b, int64_t b_pitch, bool transposed,
                       int64_t depth, int64_t cols) {
  int64_t j = 0;
  if (transposed)
    for (; j + lanes<T> <= cols; j += lanes<T>) {
      int64_t p = 0;
      for (; p + lanes<T> <= depth; p += lanes<T>)
        transpose_square(to + p * to_row + j, to_row, b + j * b_pitch + p, b_pitch);
      for (; p < depth; ++p)
        for (int k = 0; k < lanes<T>; ++k) to[p * to_row + j + k] = b[(j + k) * b_pitch + p];
    }
  for (int64_t p = 0; p < depth; ++p) {
    int64_t k = j;
    for (; k < cols; ++k) to[p * to_row + k] = transposed ? b[k * b_pitch + p] : b[p * b_pitch + k];
    for (; k % lanes<T>; ++k) to[p * to_row + k] = T(0);
  }
}

template <class T>
using Panel = decltype(&panel<T, 1, false>);

// By width, each with A as it lies and transposed.
template <class T, int... n>
constexpr std::array<Panel<T>, sizeof...(n)> all_panels(std::integer_sequence<int, n...>) {
  return {panel<T, n / 2 + 1, n % 2 != 0>...};
}

// Rows `first` to `last` and columns `start` to `stop` of C, at most product_cols of them.
template <class T>
void product(const Product<T>& s, int64_t first, int64_t last, int64_t start, int64_t stop) {
  static constexpr auto by_width =
      all_panels<T>(std::make_integer_sequence<int, 2 * tile_vectors>());
  alignas(64) T copy[product_depth * product_cols];
  const T* a = s.a + first * (s.a_transposed ? 1 : s.a_pitch);
  constexpr int64_t panel_cols = tile_vectors * lanes<T>;
  const bool ragged = (stop - start) % lanes<T> != 0;
  for (int64_t p = 0; p < s.depth; p += product_depth) {
    const int64_t depth = std::min<int64_t>(product_depth, s.depth - p);
    const bool copied = s.b_transposed || ragged;
    const T* b = s.b + (s.b_transposed ? start * s.b_pitch + p : p * s.b_pitch + start);
    if (copied) copy_slice(copy, product_cols, b, s.b_pitch, s.b_transposed, depth, stop - start);
    for (int64_t j = start; j < stop; j += panel_cols) {
      const int64_t cols = std::min<int64_t>(panel_cols, stop - j);
      const int64_t vectors = (cols + lanes<T> - 1) / lanes<T>;
      by_width[2 * (vectors - 1) + s.a_transposed](
          a + p * (s.a_transposed ? s.a_pitch : 1), s.a_pitch, last - first,
          copied ? copy + (j - start) : b + (j - start), copied ? product_cols : s.b_pitch, depth,
          s.c + first * s.c_pitch + j, s.c_pitch, cols, s.add || p > 0);
    }
  }
}

// C's columns up to `start` in rows `start` to `stop`, from those above the diagonal.
template <class T>
void mirror(const Product<T>& s, int64_t start, int64_t stop) {
  copy_slice(s.c + start * s.c_pitch, s.c_pitch, s.c + start, s.c_pitch, true, stop - start, start);
}

// Vectors of one register and their exponential.
//
// No include guard and no includes: kernels.cpp includes this once per instruction set, each time
// inside another namespace, which says how long a register is. (GCC splits longer vectors by way of
// memory: with AVX2 a step of N = 1024 took up to twice as long with vectors of 64 bytes.)

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(vector_bytes)));
  typedef int32_t Int __attribute__((vector_size(vector_bytes)));
  typedef int32_t Lane;
  static constexpr int mantissa_bits = 23;
  static constexpr int taylor_terms = 7;      // remainder 0.35^8 / 8! = 5e-9
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float lowest = -87.0f;     // exp of less is no normal number: zero here
  static constexpr float highest = 88.0f;
  static constexpr float ln2_high = 0.693359375f;  // few bits: its product with an integer is exact
  static constexpr float ln2_low = -2.12194440e-4f;
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(vector_bytes)));
  typedef int64_t Int __attribute__((vector_size(vector_bytes)));
  typedef int64_t Lane;
  static constexpr int mantissa_bits = 52;
  static constexpr int taylor_terms = 13;     // remainder 0.35^14 / 14! = 4e-18
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -708.0;
  static constexpr double highest = 709.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
};

template <class T>
constexpr int lanes = vector_bytes / sizeof(T);

template <class T>
INLINE typename Simd<T>::Vec load(const T* from) {
  typename Simd<T>::Vec v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class T>
INLINE void store(T* to, typename Simd<T>::Vec v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

template <class T>
INLINE typename Simd<T>::Vec splat(T value) {
  return value - typename Simd<T>::Vec{};  // x - 0 is x, x + 0 is not for -0: an instruction more
}

// The lanes in one fixed order.
template <class T>
INLINE T horizontal_sum(typename Simd<T>::Vec v) {
  T parts[lanes<T>];
  __builtin_memcpy(parts, &v, sizeof(v));
  for (int width = lanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

template <class T>
INLINE T horizontal_max(typename Simd<T>::Vec v) {
  T parts[lanes<T>];
  __builtin_memcpy(parts, &v, sizeof(v));
  T most = parts[0];
  for (int i = 1; i < lanes<T>; ++i) most = parts[i] > most ? parts[i] : most;
  return most;
}

// exp(x) = 2^n exp(r), |r| <= ln 2 / 2, exp(r) by its Taylor polynomial: one rounding of the last
// place or two. Below `lowest` zero; NaN stays NaN (every comparison with it is false).
template <class T>
INLINE typename Simd<T>::Vec exponential(typename Simd<T>::Vec x) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  using Int = typename S::Int;
  Vec clamped = x < S::lowest ? splat<T>(S::lowest) : x;
  clamped = clamped > S::highest ? splat<T>(S::highest) : clamped;
  const Vec shifted = clamped * T(1.44269504088896340736) + S::round_magic;
  const Vec n = shifted - S::round_magic;
  const Vec r = (clamped - n * S::ln2_high) - n * S::ln2_low;
  // 1 / k! for k = 13 down to 0; the last `taylor_terms + 1` of them.
  constexpr T inverse_factorial[] = {
      T(1.0 / 6227020800.0), T(1.0 / 479001600.0), T(1.0 / 39916800.0), T(1.0 / 3628800.0),
      T(1.0 / 362880.0),     T(1.0 / 40320.0),     T(1.0 / 5040.0),     T(1.0 / 720.0),
      T(1.0 / 120.0),        T(1.0 / 24.0),        T(1.0 / 6.0),        T(0.5),
      T(1.0),                T(1.0)};
  Vec p = splat<T>(inverse_factorial[13 - S::taylor_terms]);
  for (int k = 14 - S::taylor_terms; k < 14; ++k) p = p * r + inverse_factorial[k];
  // The low bits of `shifted` hold n: move them to the exponent.
  Int bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << S::mantissa_bits);
  Int of_p;
  __builtin_memcpy(&of_p, &p, sizeof(of_p));
  of_p += bits;
  Vec result;
  __builtin_memcpy(&result, &of_p, sizeof(result));
  result = clamped == clamped ? result : clamped;
  return x < S::lowest ? Vec{} : result;
}

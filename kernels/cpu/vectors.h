// Vectors of VECTOR_BYTES in GCC/Clang vector types, what loads them, and the elementary functions: one source for
// every instruction set. Included once by each of rows_*.cpp, inside its own namespace and target pragma.

template <class T>
struct Vec;

template <>
struct Vec<float> {
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t Scalar;
  typedef uint32_t Unsigned;
  typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int lanes = VECTOR_BYTES / 4;
  static constexpr int mantissa = 23, bias = 127, scaled = SCALED_FLOAT;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  static constexpr float largest = 3.40282346638528860e+38f;
  static constexpr float least_normal = 1.17549435082228751e-38f;
};

template <>
struct Vec<double> {
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t Scalar;
  typedef uint64_t Unsigned;
  typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int lanes = VECTOR_BYTES / 8;
  static constexpr int mantissa = 52, bias = 1023, scaled = SCALED_DOUBLE;
  static constexpr double magic = 6755399441055744.0;
  static constexpr double largest = 1.79769313486231571e+308;
  static constexpr double least_normal = 2.22507385850720138e-308;
};

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

template <class T> using V = typename Vec<T>::V;
template <class T> using I = typename Vec<T>::I;
template <class T> using U = typename Vec<T>::U;

template <class T> INLINE V<T> all(T x) { return x - V<T>{}; }

template <class T> constexpr T minus_inf() { return T(-__builtin_inf()); }

// Combines the lanes of x: the first with the one half a vector on, and so forth, until one is left.
template <class T, int BYTES, class X, class F> INLINE T reduce(X x, F f) {
  if constexpr (BYTES == sizeof(T)) {
    return x[0];
  } else {
    typedef T Shorter __attribute__((vector_size(BYTES / 2)));
    Shorter low, high;
    __builtin_memcpy(&low, &x, BYTES / 2);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&x) + BYTES / 2, BYTES / 2);
    return reduce<T, BYTES / 2>(f(low, high), f);
  }
}

// The larger of two; b where either is NaN.
#if VECTOR_BYTES == 64
INLINE V<float> larger(V<float> a, V<float> b) { return (V<float>)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE V<double> larger(V<double> a, V<double> b) { return (V<double>)_mm512_max_pd((__m512d)a, (__m512d)b); }
#else
template <class X> INLINE X larger(X a, X b) { return a > b ? a : b; }
#endif

// MaskOf: what a comparison gives. where: x where that holds, else 0; add_where: a + x there, else a; count_where: n + 1
// there, else n.
#if VECTOR_BYTES == 64
template <class T> struct MaskOf { typedef __mmask16 type; };
template <> struct MaskOf<double> { typedef __mmask8 type; };
INLINE __mmask16 unequal(V<float> a, V<float> b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NEQ_UQ); }
INLINE __mmask8 unequal(V<double> a, V<double> b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NEQ_UQ); }
INLINE __mmask16 at_least(V<float> a, V<float> b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
INLINE __mmask8 at_least(V<double> a, V<double> b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GE_OQ); }
INLINE V<float> where(__mmask16 m, V<float> x) { return (V<float>)_mm512_maskz_mov_ps(m, (__m512)x); }
INLINE V<double> where(__mmask8 m, V<double> x) { return (V<double>)_mm512_maskz_mov_pd(m, (__m512d)x); }
INLINE V<float> add_where(__mmask16 m, V<float> a, V<float> x) {
  return (V<float>)_mm512_mask_add_ps((__m512)a, m, (__m512)a, (__m512)x);
}
INLINE V<double> add_where(__mmask8 m, V<double> a, V<double> x) {
  return (V<double>)_mm512_mask_add_pd((__m512d)a, m, (__m512d)a, (__m512d)x);
}
INLINE I<float> count_where(__mmask16 m, I<float> n) {
  return (I<float>)_mm512_mask_add_epi32((__m512i)n, m, (__m512i)n, _mm512_set1_epi32(1));
}
INLINE I<double> count_where(__mmask8 m, I<double> n) {
  return (I<double>)_mm512_mask_add_epi64((__m512i)n, m, (__m512i)n, _mm512_set1_epi64(1));
}
#else
template <class T> struct MaskOf { typedef I<T> type; };
template <class X> INLINE auto unequal(X a, X b) { return a != b; }
template <class X> INLINE auto at_least(X a, X b) { return a >= b; }
template <class M, class X> INLINE X where(M m, X x) { return m ? x : X{}; }
template <class M, class X> INLINE X add_where(M m, X a, X x) { return a + (m ? x : X{}); }
template <class M, class N> INLINE N count_where(M m, N n) { return n - (N)m; }
#endif

template <class T> INLINE T sum_of(V<T> x) {
  return reduce<T, VECTOR_BYTES>(x, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

template <class T> INLINE T max_of(V<T> x) {
  return reduce<T, VECTOR_BYTES>(x, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

template <class T> INLINE int64_t count_of(I<T> n) {
  typedef typename Vec<T>::Scalar S;
  return reduce<S, VECTOR_BYTES>(n, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

template <class T> INLINE bool any(I<T> mask) {
  typedef typename Vec<T>::Scalar S;
  return reduce<S, VECTOR_BYTES>(mask, [](auto a, auto b) __attribute__((always_inline)) { return a | b; }) != 0;
}

#if VECTOR_BYTES == 64
INLINE V<float> square_root(V<float> x) { return (V<float>)_mm512_sqrt_ps((__m512)x); }
INLINE V<double> square_root(V<double> x) { return (V<double>)_mm512_sqrt_pd((__m512d)x); }
#elif VECTOR_BYTES == 32
INLINE V<float> square_root(V<float> x) { return (V<float>)_mm256_sqrt_ps((__m256)x); }
INLINE V<double> square_root(V<double> x) { return (V<double>)_mm256_sqrt_pd((__m256d)x); }
#elif defined(__SSE2__)
INLINE V<float> square_root(V<float> x) { return (V<float>)_mm_sqrt_ps((__m128)x); }
INLINE V<double> square_root(V<double> x) { return (V<double>)_mm_sqrt_pd((__m128d)x); }
#else
template <class X> INLINE X square_root(X x) {
  for (unsigned k = 0; k < sizeof x / sizeof x[0]; k++) x[k] = __builtin_sqrt(x[k]);
  return x;
}
#endif

// a b + c, rounded once where the processor can. Written as a * b + c it is the compiler's choice, which may differ from
// place to place.
#if VECTOR_BYTES == 64
INLINE V<float> fused(V<float> a, V<float> b, V<float> c) {
  return (V<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE V<double> fused(V<double> a, V<double> b, V<double> c) {
  return (V<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif VECTOR_BYTES == 32
INLINE V<float> fused(V<float> a, V<float> b, V<float> c) {
  return (V<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE V<double> fused(V<double> a, V<double> b, V<double> c) {
  return (V<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#elif defined(__aarch64__)
INLINE V<float> fused(V<float> a, V<float> b, V<float> c) { return (V<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE V<double> fused(V<double> a, V<double> b, V<double> c) { return (V<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
template <class X> INLINE X fused(X a, X b, X c) { return a * b + c; }
#endif

// ---- tables of a vector's length

#if VECTOR_BYTES == 64
INLINE V<float> choose(V<float> table, I<float> place) {  // table[place], by the low bits of that
  return (V<float>)_mm512_permutexvar_ps((__m512i)place, (__m512)table);
}
// See PowerTable.
INLINE V<float> exponent_power(V<float> low, V<float> high, I<float> exponent) {
  return (V<float>)_mm512_permutex2var_ps((__m512)low, (__m512i)exponent, (__m512)high);
}
INLINE __mmask16 special_numbers(V<float> x) { return _mm512_fpclass_ps_mask((__m512)x, 0xb9); }  // NaN, infinite, subnormal
INLINE bool any_where(__mmask16 m, I<float> x, uint32_t bits) {
  return _mm512_mask_test_epi32_mask(m, (__m512i)x, _mm512_set1_epi32(int(bits)));
}
template <class T> INLINE bool any(__mmask16 mask) { return mask != 0; }
#elif VECTOR_BYTES == 32
INLINE V<float> choose(V<float> table, I<float> place) {
  return (V<float>)_mm256_permutevar8x32_ps((__m256)table, (__m256i)place);
}
INLINE V<float> exponent_power(V<float> low, V<float> high, I<float> exponent) {
  return choose(low, exponent) * choose(high, exponent >> 3);
}
INLINE I<float> special_numbers(V<float> x) {
  const I<float> magnitude = (I<float>)x & 0x7fffffff;
  return (magnitude >= 0x7f800000) | ((magnitude < 0x00800000) & (magnitude != 0));
}
INLINE bool any_where(I<float> m, I<float> x, uint32_t bits) {
  return !_mm256_testz_si256((__m256i)m, (__m256i)(x & int(bits)));
}
#endif

// ---- loads: any input type into vectors of its arithmetic type

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

template <class In> struct Arithmetic { typedef float type; };
template <> struct Arithmetic<double> { typedef double type; };

INLINE V<float> load(const float* x) {
  V<float> v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

INLINE V<double> load(const double* x) {
  V<double> v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

INLINE V<float> load(const BFloat* x) {
  Halves raw;
  __builtin_memcpy(&raw, x, sizeof raw);
  return (V<float>)(__builtin_convertvector(raw, U<float>) << 16);
}

INLINE V<float> load(const Half* x) {
#if defined(__F16C__) && VECTOR_BYTES == 64
  return (V<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
#elif defined(__F16C__) && VECTOR_BYTES == 32
  return (V<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
#else
  Halves raw;
  __builtin_memcpy(&raw, x, sizeof raw);
  U<float> h = __builtin_convertvector(raw, U<float>);
  V<float> magnitude = (V<float>)((h & 0x7fff) << 13) * 5.192296858534828e+33f;  // 2^112, subnormals included
  U<float> special = (h & 0x7fff) << 13 | 0x7f800000;  // infinity and NaN
  U<float> bits = (h & 0x7c00) == 0x7c00 ? special : (U<float>)magnitude;
  return (V<float>)(bits | (h & 0x8000) << 16);
#endif
}

// Which lanes are at or after `first`.
template <class T> INLINE I<T> from_lane(int64_t first) {
  I<T> lane;
  for (int k = 0; k < Vec<T>::lanes; k++) lane[k] = k;
  return lane >= typename Vec<T>::Scalar(first);
}

// The k < lanes elements that end at `end` in the last lanes, `padding` in the others. `before`: how many
// elements there are before those, which may be read but not used.
#if VECTOR_BYTES == 64
// A masked load touches nothing before the k elements.
INLINE V<float> load_masked(const float* x, uint32_t mask) { return (V<float>)_mm512_maskz_loadu_ps(mask, x); }
INLINE V<double> load_masked(const double* x, uint32_t mask) { return (V<double>)_mm512_maskz_loadu_pd(mask, x); }
INLINE V<float> load_masked(const Half* x, uint32_t mask) {
  return (V<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
}
INLINE V<float> load_masked(const BFloat* x, uint32_t mask) {
  return (V<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16);
}

template <class T, class In> INLINE V<T> load_last(const In* end, int64_t k, int64_t, T padding) {
  constexpr int64_t lanes = Vec<T>::lanes;
  V<T> v = load_masked(end - lanes, uint32_t((1u << lanes) - (1u << (lanes - k))));
  return from_lane<T>(lanes - k) ? v : all<T>(padding);
}
#else
template <class T, class In> INLINE V<T> load_last(const In* end, int64_t k, int64_t before, T padding) {
  constexpr int64_t lanes = Vec<T>::lanes;
  V<T> v;
  if (before >= lanes - k) {
    v = load(end - lanes);
  } else {
    In held[lanes] = {};
    __builtin_memcpy(held + (lanes - k), end - k, k * sizeof(In));
    v = load(held);
  }
  return from_lane<T>(lanes - k) ? v : all<T>(padding);
}
#endif

// The n <= lanes first columns of some rows, a row a lane; lanes without a row hold the first.
#if VECTOR_BYTES == 64
INLINE V<float> pick(V<float> a, I<float> lanes, V<float> b) {
  return (V<float>)_mm512_permutex2var_ps((__m512)a, (__m512i)lanes, (__m512)b);
}
INLINE V<double> pick(V<double> a, I<double> lanes, V<double> b) {
  return (V<double>)_mm512_permutex2var_pd((__m512d)a, (__m512i)lanes, (__m512d)b);
}

template <class T, class In> INLINE void load_columns(const In* x, int64_t stride, int64_t rows, int64_t n, V<T>* out) {
  constexpr int lanes = Vec<T>::lanes;
  V<T> from[lanes], to[lanes];
  UNROLL for (int row = 0; row < lanes; row++)
    from[row] = load_masked(x + (row < rows ? row : 0) * stride, uint32_t((1u << n) - 1));
  // Rows to columns: the first half of them interleaved with the second, as often as that takes.
  I<T> low, high;
  for (int k = 0; k < lanes; k++) low[k] = k / 2 + k % 2 * lanes, high[k] = low[k] + lanes / 2;
  UNROLL for (int step = 1; step < lanes; step *= 2) {
    UNROLL for (int i = 0; i < lanes / 2; i++) {
      to[2 * i] = pick(from[i], low, from[i + lanes / 2]);
      to[2 * i + 1] = pick(from[i], high, from[i + lanes / 2]);
    }
    UNROLL for (int i = 0; i < lanes; i++) from[i] = to[i];
  }
  for (int64_t k = 0; k < n; k++) out[k] = from[k];
}
#else
template <class T, class In> INLINE void load_columns(const In* x, int64_t stride, int64_t rows, int64_t n, V<T>* out) {
  constexpr int lanes = Vec<T>::lanes;
  In columns[lanes][lanes];
  for (int64_t row = 0; row < lanes; row++)
    for (int64_t k = 0; k < n; k++)
      __builtin_memcpy(&columns[k][row], x + ((row < rows ? row : 0) * stride + k), sizeof(In));  // may lie anywhere
  for (int64_t k = 0; k < n; k++) out[k] = load(columns[k]);
}
#endif

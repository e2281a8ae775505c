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

// Combine the lanes of x pair by pair, by halves.
template <class T, int BYTES, class X, class F> INLINE T reduce(X x, F f) {
  if constexpr (BYTES == sizeof(T)) {
    return x[0];
  } else {
    typedef T Half __attribute__((vector_size(BYTES / 2)));
    Half low, high;
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

// What a comparison gives; x where it holds, else 0; and sums, and counts, of where it does.
#if VECTOR_BYTES == 64
template <class T> struct MaskOf { typedef __mmask16 type; };
template <> struct MaskOf<double> { typedef __mmask8 type; };
INLINE __mmask16 unequal(V<float> a, V<float> b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NEQ_UQ); }
INLINE __mmask8 unequal(V<double> a, V<double> b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NEQ_UQ); }
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
  int64_t total = 0;
  for (int k = 0; k < Vec<T>::lanes; k++) total += n[k];
  return total;
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

// a b + c, fused where the processor can, which is otherwise the compiler's choice, place by place.
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
INLINE V<float> choose(V<float> table, I<float> place) {  // by its low bits
  return (V<float>)_mm512_permutexvar_ps((__m512i)place, (__m512)table);
}
// See PowerTable.
INLINE V<float> exponent_power(V<float> low, V<float> high, I<float> exponent) {
  return (V<float>)_mm512_permutex2var_ps((__m512)low, (__m512i)exponent, (__m512)high);
}
INLINE __mmask16 odd_numbers(V<float> x) { return _mm512_fpclass_ps_mask((__m512)x, 0xb9); }  // NaN, infinite, subnormal
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
INLINE I<float> odd_numbers(V<float> x) {
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

// ---- 2^x and log2 x. tests/test_cpu.py holds the bounds that are stated here.

// 2^f * UNIT for |f| <= 1/2, UNIT a power of two; relative error of the polynomial 2^-29.0 (float), 2^-58.2 (double).
template <int SHIFT> INLINE V<float> exp2_fraction(V<float> f) {
  constexpr float UNIT = float(int64_t(1) << SHIFT);
  V<float> p = (0.0001534586335765198f * UNIT) * f + 0.0013399929739534855f * UNIT;
  p = p * f + 0.009618489071726799f * UNIT;
  p = p * f + 0.05550328642129898f * UNIT;
  p = p * f + 0.24022646248340607f * UNIT;
  p = p * f + 0.6931471824645996f * UNIT;
  return p * f + UNIT;
}

template <int SHIFT> INLINE V<double> exp2_fraction(V<double> f) {
  constexpr double UNIT = double(int64_t(1) << SHIFT / 2) * double(int64_t(1) << (SHIFT - SHIFT / 2));
  V<double> p = (4.4352888650675365e-10 * UNIT) * f + 7.074104573753809e-09 * UNIT;
  p = p * f + 1.0178197976954745e-07 * UNIT;
  p = p * f + 1.3215433095891532e-06 * UNIT;
  p = p * f + 1.5252733490108938e-05 * UNIT;
  p = p * f + 0.00015403530462501698 * UNIT;
  p = p * f + 0.0013333558146789778 * UNIT;
  p = p * f + 0.009618129107588346 * UNIT;
  p = p * f + 0.055504108664819925 * UNIT;
  p = p * f + 0.24022650695910155 * UNIT;
  p = p * f + 0.6931471805599453 * UNIT;
  return p * f + UNIT;
}

// e^x - 1 - x for |x| <= 1; relative error of the polynomial 2^-25.7 (float), 2^-54.8 (double).
INLINE V<float> exp_tail(V<float> x) {
  V<float> p = 2.806280235745362e-06f * x + 2.535851308493875e-05f;
  p = p * x + 0.00019838102161884308f;
  p = p * x + 0.001388539676554501f;
  p = p * x + 0.008333339355885983f;
  p = p * x + 0.04166673496365547f;
  p = p * x + 0.1666666716337204f;
  p = p * x + 0.5f;
  return p * x * x;
}

INLINE V<double> exp_tail(V<double> x) {
  V<double> p = 7.746178593018827e-13 * x + 1.1639194124150522e-11;
  p = p * x + 1.6057679623801638e-10;
  p = p * x + 2.0874435575864273e-09;
  p = p * x + 2.5052117695907823e-08;
  p = p * x + 2.755733506893373e-07;
  p = p * x + 2.7557319191381816e-06;
  p = p * x + 2.4801587246096818e-05;
  p = p * x + 0.00019841269841324198;
  p = p * x + 0.0013888888888981404;
  p = p * x + 0.008333333333333299;
  p = p * x + 0.04166666666666609;
  p = p * x + 0.16666666666666666;
  p = p * x + 0.5;
  return p * x * x;
}

// 2^y * 2^SHIFT of any y <= 0, -inf included, or NaN; relative error of the polynomials 2^-26.1 (of y - floor(y)) and
// 2^-29.0.
#if VECTOR_BYTES == 64
template <int SHIFT> INLINE V<float> exp2_nonpositive(V<float> y) {
  constexpr float UNIT = float(int64_t(1) << SHIFT);
  V<float> f = (V<float>)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  V<float> p = (0.00021612929413095117f * UNIT) * f + 0.0012467841152101755f * UNIT;
  p = p * f + 0.00967545248568058f * UNIT;
  p = p * f + 0.055485282093286514f * UNIT;
  p = p * f + 0.2402293086051941f * UNIT;
  p = p * f + 0.6931470632553101f * UNIT;
  p = p * f + UNIT;
  return (V<float>)_mm512_scalef_ps((__m512)p, (__m512)y);
}
#else
template <int SHIFT> INLINE V<float> exp2_nonpositive(V<float> y) {
  constexpr float bias = Vec<float>::bias + SHIFT, magic = Vec<float>::magic + bias;
  y = larger(all(-bias), y);
  V<float> rounded = y + magic;  // the low bits are those of the result's exponent, 0 for y = -bias, which makes it 0
  return exp2_fraction<0>(y - (rounded - magic)) * (V<float>)((U<float>)rounded << Vec<float>::mantissa);
}
#endif

// 2^x * 2^SHIFT, where x = n + f, n an integer held in `rounded` = n + magic, |f| <= 1/2; 0 where `zero`: at
// least where the result would be below the normal numbers.
#if VECTOR_BYTES == 64
INLINE V<float> scale(V<float> p, V<float> n) { return (V<float>)_mm512_scalef_ps((__m512)p, (__m512)n); }
INLINE V<double> scale(V<double> p, V<double> n) { return (V<double>)_mm512_scalef_pd((__m512d)p, (__m512d)n); }

template <class T, int SHIFT> INLINE V<T> exp2_parts(V<T>, V<T> n, V<T> f, I<T> zero) {
  V<T> e = scale(exp2_fraction<SHIFT>(f), n);
  return zero ? V<T>{} : e;
}
#else
template <class T, int SHIFT> INLINE V<T> exp2_parts(V<T> rounded, V<T>, V<T> f, I<T> zero) {
  V<T> power = (V<T>)(((U<T>)rounded + (Vec<T>::bias + SHIFT)) << Vec<T>::mantissa);
  V<T> e = exp2_fraction<0>(f) * power;
  return zero ? V<T>{} : e;
}
#endif

// 2^(whole + part) * 2^SHIFT, part small, the sum at most 127 - SHIFT (1023); 0 where `zero` and, if CLAMP, where the
// result would be below the normal numbers.
template <class T, bool CLAMP, int SHIFT = 0> INLINE V<T> exp2_sum(V<T> whole, V<T> part, I<T> zero) {
  V<T> x = whole + part;
  if constexpr (CLAMP) {
    const T lowest = T(1 - Vec<T>::bias - SHIFT);
    zero |= x < lowest;
    x = x > lowest ? x : all<T>(lowest);
  }
  V<T> rounded = x + Vec<T>::magic;
  V<T> n = rounded - Vec<T>::magic;
  return exp2_parts<T, SHIFT>(rounded, n, (whole - n) + part, zero);
}

// log2 of positive finite x as exponent + log, |log| <= 1/2; absolute error of log 2^-23.3 (float; 2^-24.3 of it
// the polynomial), 2^-52 (double).
INLINE V<float> log2_mantissa(V<float> m) {
  V<float> t = m - 1.0f;
  V<float> q = 0.2368849217891693f - 0.14573530852794647f * t;
  q = q * t - 0.2500697672367096f;
  q = q * t + 0.2867082357406616f;
  q = q * t - 0.36008724570274353f;
  q = q * t + 0.48093941807746887f;
  q = q * t - 0.7213571667671204f;
  q = q * t + 1.4426947832107544f;
  return q * t;
}

INLINE V<double> log2_mantissa(V<double> m) {
  V<double> s = (m - 1.0) / (m + 1.0), u = s * s;
  V<double> q = 0.21367066635364648 * u + 0.22091187639284415;
  q = q * u + 0.2623344014601578;
  q = q * u + 0.32059853392980525;
  q = q * u + 0.4121985858510587;
  q = q * u + 0.5770780163454703;
  q = q * u + 0.9617966939259899;
  q = q * u + 2.8853900817779268;
  return q * s;
}

#if VECTOR_BYTES == 64
INLINE V<float> exponent_of(V<float> x) { return (V<float>)_mm512_getexp_ps((__m512)x); }
INLINE V<double> exponent_of(V<double> x) { return (V<double>)_mm512_getexp_pd((__m512d)x); }
INLINE V<float> mantissa_of(V<float> x) {
  return (V<float>)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
}
INLINE V<double> mantissa_of(V<double> x) {
  return (V<double>)_mm512_getmant_pd((__m512d)x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
}

template <class T> INLINE void log2_parts(V<T> x, V<T>* exponent, V<T>* log) {
  V<T> m = mantissa_of(x), e = exponent_of(x);
  I<T> high = m >= T(1.4142135);
  *log = log2_mantissa(high ? m * T(0.5) : m);
  *exponent = high ? e + T(1) : e;
}
#else
template <class T> INLINE void log2_parts(V<T> x, V<T>* exponent, V<T>* log) {
  // 2^-1/2 in bits: the mantissa comes out in [2^-1/2, 2^1/2)
  constexpr typename Vec<T>::Unsigned half = sizeof(T) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd;
  I<T> subnormal = x < Vec<T>::least_normal;
  x = subnormal ? x * T(int64_t(1) << Vec<T>::mantissa) : x;
  // Unsigned, which may wrap: of a NaN.
  I<T> e = (I<T>)((U<T>)x - (typename Vec<T>::U{} + half)) >> Vec<T>::mantissa;
  *log = log2_mantissa((V<T>)((U<T>)x - ((U<T>)e << Vec<T>::mantissa)));
  *exponent = __builtin_convertvector(e + (subnormal & -Vec<T>::mantissa), V<T>);
}
#endif

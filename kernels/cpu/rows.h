// The kernels, in GCC/Clang vector types of VECTOR_BYTES: one source for every instruction set.
// Included once by each of rows_*.cpp, inside its own namespace and target pragma.

template <class T>
struct Vec;

template <>
struct Vec<float> {
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t Scalar;
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
  typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int lanes = VECTOR_BYTES / 8;
  static constexpr int mantissa = 52, bias = 1023, scaled = SCALED_DOUBLE;
  static constexpr double magic = 6755399441055744.0;
  static constexpr double largest = 1.79769313486231571e+308;
  static constexpr double least_normal = 2.22507385850720138e-308;
};

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

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

template <class T> INLINE T sum_of(V<T> x) {
  return reduce<T, VECTOR_BYTES>(x, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

template <class T> INLINE T max_of(V<T> x) {
  return reduce<T, VECTOR_BYTES>(x, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

template <class T> INLINE bool any(I<T> mask) {
  typedef typename Vec<T>::Scalar S;
  return reduce<S, VECTOR_BYTES>(mask, [](auto a, auto b) __attribute__((always_inline)) { return a | b; }) != 0;
}

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
    for (int64_t j = 0; j < k; j++) held[lanes - k + j] = end[j - k];
    v = load(held);
  }
  return from_lane<T>(lanes - k) ? v : all<T>(padding);
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
  V<T> power = (V<T>)(((I<T>)rounded + (Vec<T>::bias + SHIFT)) << Vec<T>::mantissa);
  V<T> e = exp2_fraction<0>(f) * power;
  return zero ? V<T>{} : e;
}
#endif

// 2^(whole + part), part small, the sum at most 127 (1023); 0 where `zero` and, if CLAMP, below the normal numbers.
template <class T, bool CLAMP> INLINE V<T> exp2_sum(V<T> whole, V<T> part, I<T> zero) {
  V<T> x = whole + part;
  if constexpr (CLAMP) {
    const T lowest = T(1 - Vec<T>::bias);
    zero |= x < lowest;
    x = x > lowest ? x : all<T>(lowest);
  }
  V<T> rounded = x + Vec<T>::magic;
  V<T> n = rounded - Vec<T>::magic;
  return exp2_parts<T, 0>(rounded, n, (whole - n) + part, zero);
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
  constexpr int64_t half = sizeof(T) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd;
  I<T> subnormal = x < Vec<T>::least_normal;
  x = subnormal ? x * T(int64_t(1) << Vec<T>::mantissa) : x;
  I<T> e = ((I<T>)x - typename Vec<T>::I{} - half) >> Vec<T>::mantissa;
  *log = log2_mantissa((V<T>)((I<T>)x - (e << Vec<T>::mantissa)));
  *exponent = __builtin_convertvector(e + (subnormal & -Vec<T>::mantissa), V<T>);
}
#endif

// ---- logits

template <class T> struct Softmax {
  T max, high, low;  // z log2(e) = (f - max) (high + low)
  T lowest;          // the difference below which exp is 0

  Softmax(double max_, const LogitsPlan& plan) : max(T(max_)), high(T(plan.scale)) {
    low = sizeof(T) == 4 ? T(plan.scale - double(high)) : T(plan.scale_low);
    lowest = sizeof(T) == 4 ? T(plan.lowest_float) : T(plan.lowest_double);
  }

  // 2^SCALED exp(z), z = (f - max) / T, 0 where `without`; d = f - max is handed out, no less than `lowest`
  INLINE V<T> exp(const Softmax& s, V<T> f, V<T>* d, I<T> without = I<T>{}) {
    V<T> exact = f - s.max;
    V<T> held = exact < s.lowest ? all<T>(s.lowest) : exact;
    V<T> rounded = held * s.high + Vec<T>::magic;
    V<T> n = rounded - Vec<T>::magic;
    V<T> fraction = held * s.low + (held * s.high - n);
    if constexpr (sizeof(T) == 8) {  // what the subtraction rounded away grows with |z|
      V<T> back = exact - f;
      V<T> lost = (f - (exact - back)) - (s.max + back);
      fraction += lost * s.high;
    }
    *d = held;
    return exp2_parts<T, Vec<T>::scaled>(rounded, n, fraction, (exact < s.lowest) | without);
  }
};

// Calls step(u, v, i, first) on every vector of x: u < WIDTH the accumulator to use, i where it begins, `first`
// its first lane that counts, 0 but in a last vector that is not full; flush() after each BLOCK elements, so that
// no sum of floats grows long.
constexpr int64_t BLOCK = 512;

template <int WIDTH, class T, class In, class Step, class Flush>
INLINE void for_blocks(const In* x, int64_t n, T padding, Step step, Flush flush) {
  constexpr int64_t lanes = Vec<T>::lanes;
  for (int64_t i = 0; i < n;) {
    const int64_t end = i + BLOCK < n ? i + BLOCK : n;
    for (; i + WIDTH * lanes <= end; i += WIDTH * lanes) {
      UNROLL for (int u = 0; u < WIDTH; u++) step(u, load(x + i + u * lanes), i + u * lanes, 0);
    }
    UNROLL for (int u = 0; u < WIDTH; u++) {
      if (i + lanes <= end) {
        step(u, load(x + i), i, 0);
        i += lanes;
      }
    }
    if (i < end) {
      step(0, load_last<T>(x + end, end - i, i, padding), i, lanes - (end - i));
      i = end;
    }
    flush();
  }
}

// Adds the accumulators of a block to a running total and clears them.
template <int WIDTH, class T> INLINE void add_up(V<T>* total, V<T>* sums) {
  V<T> sum = sums[0];
  UNROLL for (int u = 1; u < WIDTH; u++) sum += sums[u];
  UNROLL for (int u = 0; u < WIDTH; u++) sums[u] = V<T>{};
  *total += sum;
}

template <int WIDTH, class T> INLINE double take(V<T>* sums) {
  V<T> total = {};
  add_up<WIDTH, T>(&total, sums);
  return double(sum_of<T>(total));
}

template <class T, class In> static void max_of_row(const In* f, int64_t n, LogitsState* state) {
  constexpr int W = 4;
  V<T> most[W];
  I<T> nan[W] = {};
  UNROLL for (int u = 0; u < W; u++) most[u] = all<T>(minus_inf<T>());
  for_blocks<W, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        most[u] = v > most[u] ? v : most[u];
        nan[u] |= v != v;
      },
      [] {});
  V<T> m = most[0];
  UNROLL for (int u = 1; u < W; u++) {
    m = most[u] > m ? most[u] : m;
    nan[0] |= nan[u];
  }
  state->max = max_of<T>(m);
  state->nan = any<T>(nan[0]);
}

// MORE: all sums, else that of the exponentials alone, which comes out the same to the bit. KEEP: store them.
template <class T, class In, bool MORE, bool KEEP>
static void sums_of_row(const In* f, int64_t n, const LogitsPlan& plan, LogitsState* state, T* kept) {
  constexpr int W = 2;
  const Softmax<T> softmax(state->max, plan);
  const double unit = __builtin_ldexp(1.0, -Vec<T>::scaled);
  const bool sum_z = plan.sums & SUMLOGP;
  V<T> ties[W] = {}, exp[W] = {}, squares[W] = {}, exp_z[W] = {}, z[W] = {};
  V<T> all_exp = {}, all_squares = {}, all_exp_z = {};
  double all_z = 0;
  for_blocks<W, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t i, int64_t first) __attribute__((always_inline)) {
        const I<T> top = v == softmax.max;
        V<T> d, e = Softmax<T>::exp(softmax, v, &d, top);
        if constexpr (KEEP) {
          V<T> with_top = top ? all<T>(T(1 / unit)) : e;
          __builtin_memcpy(kept + i, &with_top, sizeof e);
        }
        ties[u] += top ? all<T>(T(1)) : V<T>{};
        exp[u] += e;
        if constexpr (MORE) {
          squares[u] += e * e;
          exp_z[u] += e * d;
          if (sum_z) {
            V<T> difference = v - softmax.max;
            if (first) difference = from_lane<T>(first) ? difference : V<T>{};  // the padding is no masked class
            z[u] += difference;
          }
        }
      },
      [&] {
        add_up<W, T>(&all_exp, exp);
        if constexpr (MORE) {
          add_up<W, T>(&all_squares, squares);
          add_up<W, T>(&all_exp_z, exp_z);
          if (sum_z) all_z += take<W, T>(z);
        }
      });
  state->ties = take<W, T>(ties);
  state->exp = unit * sum_of<T>(all_exp);
  if constexpr (MORE) {
    state->squares = unit * unit * sum_of<T>(all_squares);
    state->exp_z = unit / plan.temperature * sum_of<T>(all_exp_z);
    state->z = all_z / plan.temperature;
  }
}

template <class T, class In>
static void power_sum_of_row(const In* f, int64_t n, const LogitsPlan& plan, int which, LogitsState* state) {
  LogitsPlan sharper = plan;
  set_scale(&sharper, plan.scale * plan.power[which], plan.scale_low * plan.power[which]);
  const Softmax<T> softmax(state->max, sharper);
  V<T> exp[4] = {};
  for_blocks<4, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        V<T> d;
        exp[u] += Softmax<T>::exp(softmax, v, &d, v == softmax.max);
      },
      [&] { state->powers[which] += take<4, T>(exp); });
  state->powers[which] *= __builtin_ldexp(1.0, -Vec<T>::scaled);
}

// Where the maximum is so far above the rest that float exponentials vanish: the rest again, from a pivot of
// its own.
template <class T, class In>
static void rest_of_row(const In* f, int64_t n, const LogitsPlan& plan, LogitsState* state) {
  const T top = T(state->max);
  V<T> most[2] = {all<T>(minus_inf<T>()), all<T>(minus_inf<T>())};
  for_blocks<2, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) { most[u] = v < top && v > most[u] ? v : most[u]; }, [] {});
  const double pivot = max_of<T>(most[0] > most[1] ? most[0] : most[1]);
  if (pivot == -__builtin_inf()) return;
  const Softmax<T> softmax(pivot, plan);
  V<T> exp[2] = {}, squares[2] = {}, exp_z[2] = {};
  double sum = 0, square = 0, sum_z = 0;
  for_blocks<2, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        V<T> d, e = Softmax<T>::exp(softmax, v < top ? v : all<T>(minus_inf<T>()), &d);
        exp[u] += e;
        squares[u] += e * e;
        exp_z[u] += e * d;
      },
      [&] { sum += take<2, T>(exp), square += take<2, T>(squares), sum_z += take<2, T>(exp_z); });
  const double gap = (pivot - state->max) / plan.temperature, w = __builtin_exp(gap);
  const double unit = __builtin_ldexp(1.0, -Vec<T>::scaled);
  state->exp = w * unit * sum;
  state->squares = w * w * unit * unit * square;
  state->exp_z = w == 0 ? 0 : w * unit * (sum_z / plan.temperature + gap * sum);
}

template <class In> static void logits(const void* data, int64_t n, const LogitsPlan& plan, LogitsState* state, void* kept) {
  typedef typename Arithmetic<In>::type T;
  const In* f = static_cast<const In*>(data);
  T* keep = static_cast<T*>(kept);
  max_of_row<T>(f, n, state);
  const double infinity = __builtin_inf();
  if (plan.sums == 0 || state->nan || state->max == infinity || state->max == -infinity) return;
  const bool more = plan.sums & (SQUARES | PLOGP | SUMLOGP);
  if (more && keep)
    sums_of_row<T, In, true, true>(f, n, plan, state, keep);
  else if (more)
    sums_of_row<T, In, true, false>(f, n, plan, state, keep);
  else if (keep)
    sums_of_row<T, In, false, true>(f, n, plan, state, keep);
  else
    sums_of_row<T, In, false, false>(f, n, plan, state, keep);
  if (sizeof(T) == 4 && state->exp < 0x1p-128) rest_of_row<T>(f, n, plan, state);
  for (int r = 0; r < plan.power_sums; r++) power_sum_of_row<T>(f, n, plan, r, state);
}

template <class In>
static double tv(const void* data, int64_t n, const LogitsPlan& plan, double max, double total, double uniform, const void* kept) {
  typedef typename Arithmetic<In>::type T;
  const T scale = T(__builtin_ldexp(1 / total, -Vec<T>::scaled)), level = T(uniform);
  V<T> above[4] = {}, sum = {};
  auto add = [&](int u, V<T> e) __attribute__((always_inline)) {
    V<T> p = e * scale - level;
    above[u] += p > 0 ? p : V<T>{};
  };
  auto flush = [&] { add_up<4, T>(&sum, above); };
  if (kept) {
    const int64_t whole = (n + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;  // the padding has p = 0
    for_blocks<4, T>(
        static_cast<const T*>(kept), whole, T(0), [&](int u, V<T> e, int64_t, int64_t) __attribute__((always_inline)) { add(u, e); }, flush);
  } else {
    const Softmax<T> softmax(max, plan);
    for_blocks<4, T>(
        static_cast<const In*>(data), n, minus_inf<T>(),
        [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
          V<T> d;
          add(u, Softmax<T>::exp(softmax, v, &d));
        },
        flush);
  }
  return sum_of<T>(sum);
}

// ---- norms

template <int P, class T> INLINE V<T> integer_power(V<T> x) {
  if constexpr (P == 1) return x;
  else if constexpr (P % 2) return integer_power<P / 2, T>(x) * integer_power<P / 2, T>(x) * x;
  else return integer_power<P / 2, T>(x) * integer_power<P / 2, T>(x);
}

template <int P, class T> INLINE double sum_of_powers(const T* y, int64_t n) {
  V<T> sums[4] = {};
  for_blocks<4, T>(
      y, n, T(0), [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) { sums[u] += integer_power<P, T>(v); }, [] {});
  return take<4, T>(sums);
}

template <class T> static double sum_of_powers(const T* y, int64_t n, int p) {
  switch (p) {
    case 1: return sum_of_powers<1, T>(y, n);
    case 2: return sum_of_powers<2, T>(y, n);
    case 3: return sum_of_powers<3, T>(y, n);
    case 4: return sum_of_powers<4, T>(y, n);
    case 5: return sum_of_powers<5, T>(y, n);
    case 6: return sum_of_powers<6, T>(y, n);
    case 7: return sum_of_powers<7, T>(y, n);
    default: return sum_of_powers<8, T>(y, n);
  }
}

// Sums of integer powers 1..6 of y * scale in one pass, as far as `most`.
template <int MOST, class T> static void integer_sums(const T* a, int64_t n, T s1, T s2, double* sum) {
  constexpr int W = MOST > 2 ? 2 : 4;
  V<T> s[MOST][W] = {};
  for_blocks<W, T>(
      a, n, T(0),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        V<T> y = v * s1 * s2, y2 = y * y;
        s[0][u] += y;
        if constexpr (MOST >= 2) s[1][u] += y2;
        if constexpr (MOST >= 3) {
          V<T> y3 = y2 * y;
          s[2][u] += y3;
          s[3][u] += y2 * y2;
          s[4][u] += y2 * y3;
          s[5][u] += y3 * y3;
        }
      },
      [] {});
  UNROLL for (int p = 0; p < MOST; p++) sum[p + 1] += take<W, T>(s[p]);
}

// Sums of y^multiple, y = |h|^base, for all multiples of a group.
template <class T, bool SCALED>
static void group_sums(const T* a, int64_t whole, const PowerGroup& group, const NormsState& s, T* power, double* sum) {
  // base = high + low, high so short that its product with an exponent is exact
  const T base = T(group.base), high = T(group.high), low = T(group.base - double(high));
  const T shift = T(s.shift), shift_log = T(s.shift_log);
  const bool keep = group.multiples > 1 || group.multiple[0] > 1;
  V<T> sums[4] = {};
  for_blocks<4, T>(
      a, whole, T(0),
      [&](int u, V<T> v, int64_t i, int64_t) __attribute__((always_inline)) {
        V<T> e, l;
        log2_parts<T>(v, &e, &l);
        if constexpr (SCALED) {
          e -= shift;
          l -= shift_log;
        }
        V<T> y = exp2_sum<T, SCALED>(e * high, e * low + l * base, v == 0);
        if (keep) __builtin_memcpy(power + i, &y, sizeof y);
        sums[u] += y;
      },
      [] {});
  const double first = take<4, T>(sums);
  for (int j = 0; j < group.multiples; j++)
    sum[group.slot[j]] += group.multiple[j] == 1 ? first : sum_of_powers<T>(power, whole, group.multiple[j]);
}

// |h| of a tile, with its maximum, whether there is a NaN, and how many are not zero.
template <class T, bool COUNT, class In> static void read_tile(const In* h, int64_t m, T* a, NormsState* state, double* max) {
  V<T> most[4] = {}, nonzero[4] = {};
  I<T> nan[4] = {};
  for_blocks<4, T>(
      h, m, T(0),
      [&](int u, V<T> v, int64_t i, int64_t) __attribute__((always_inline)) {
        v = (V<T>)((U<T>)v << 1 >> 1);
        __builtin_memcpy(a + i, &v, sizeof v);
        most[u] = v > most[u] ? v : most[u];
        nan[u] |= v != v;
        if constexpr (COUNT) nonzero[u] += v == 0 ? V<T>{} : all<T>(T(1));
      },
      [] {});
  V<T> top = most[0];
  UNROLL for (int u = 1; u < 4; u++) {
    top = most[u] > top ? most[u] : top;
    nan[0] |= nan[u];
  }
  *max = max_of<T>(top);
  state->nan |= any<T>(nan[0]);
  if constexpr (COUNT) state->nonzero += take<4, T>(nonzero);
}

template <class In> static void norms(const void* data, int64_t n, const NormsPlan& plan, NormsState* state) {
  typedef typename Arithmetic<In>::type T;
  const In* h = static_cast<const In*>(data);
  T a[BLOCK], power[BLOCK];
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t m = n - start < BLOCK ? n - start : BLOCK;
    const int64_t whole = (m + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;  // the rest is zeros
    double max;
    if (plan.count) read_tile<T, true>(h + start, m, a, state, &max);
    else read_tile<T, false>(h + start, m, a, state, &max);
    state->max = max > state->max ? max : state->max;
    if (max == 0 || max == __builtin_inf() || state->nan) continue;
    if (max > state->reference) rescale(plan, state, max);

    if (plan.integers) {
      const int k = -int(state->shift) - 1, k1 = k < -126 ? -126 : k > 126 ? 126 : k;
      const T s1 = T(__builtin_ldexp(1.0, k1)), s2 = T(__builtin_ldexp(1.0, k - k1));
      if (plan.integers >> 3) integer_sums<6, T>(a, whole, s1, s2, state->sum);
      else if (plan.integers >> 2) integer_sums<2, T>(a, whole, s1, s2, state->sum);
      else integer_sums<1, T>(a, whole, s1, s2, state->sum);
    }
    for (int g = 0; g < plan.groups; g++) {
      if (plan.group[g].scaled) group_sums<T, true>(a, whole, plan.group[g], *state, power, state->sum);
      else group_sums<T, false>(a, whole, plan.group[g], *state, power, state->sum);
    }
  }
}

static void exp2_of(const float* x, float* out, int64_t n) {
  for_blocks<1, float>(
      x, n, 0.0f,
      [&](int, V<float> v, int64_t i, int64_t first) {
        V<float> y = exp2_sum<float, true>(v, V<float>{}, V<float>{} != V<float>{});
        for (int64_t k = first; k < Vec<float>::lanes; k++) out[i + k - first] = y[k];
      },
      [] {});
}

static void log2_of(const float* x, float* out, int64_t n) {
  for_blocks<1, float>(
      x, n, 1.0f,
      [&](int, V<float> v, int64_t i, int64_t first) {
        V<float> e, l;
        log2_parts<float>(v, &e, &l);
        for (int64_t k = first; k < Vec<float>::lanes; k++) out[i + k - first] = e[k] + l[k];
      },
      [] {});
}

#define KERNELS(NAME)                                                              \
  {NAME,                                                                           \
   {logits<Half>, logits<BFloat>, logits<float>, logits<double>},                  \
   {tv<Half>, tv<BFloat>, tv<float>, tv<double>},                                  \
   {norms<Half>, norms<BFloat>, norms<float>, norms<double>}, exp2_of, log2_of}

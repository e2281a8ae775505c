// 2^x, log2 x and e^x - 1 - x of vectors. tests/kernels/cpu/test_elementary.py holds the bounds that are stated here. Included by rows.h.

// 2^f * FACTOR for |f| <= 1/2, FACTOR a power of two; relative error of the polynomial 2^-29.0 (float), 2^-58.2 (double).
template <int SCALED> INLINE V<float> exp2_fraction(V<float> f) {
  constexpr float FACTOR = float(int64_t(1) << SCALED);
  V<float> p = (0.0001534586335765198f * FACTOR) * f + 0.0013399929739534855f * FACTOR;
  p = p * f + 0.009618489071726799f * FACTOR;
  p = p * f + 0.05550328642129898f * FACTOR;
  p = p * f + 0.24022646248340607f * FACTOR;
  p = p * f + 0.6931471824645996f * FACTOR;
  return p * f + FACTOR;
}

template <int SCALED> INLINE V<double> exp2_fraction(V<double> f) {
  constexpr double FACTOR = double(int64_t(1) << SCALED / 2) * double(int64_t(1) << (SCALED - SCALED / 2));
  V<double> p = (4.4352888650675365e-10 * FACTOR) * f + 7.074104573753809e-09 * FACTOR;
  p = p * f + 1.0178197976954745e-07 * FACTOR;
  p = p * f + 1.3215433095891532e-06 * FACTOR;
  p = p * f + 1.5252733490108938e-05 * FACTOR;
  p = p * f + 0.00015403530462501698 * FACTOR;
  p = p * f + 0.0013333558146789778 * FACTOR;
  p = p * f + 0.009618129107588346 * FACTOR;
  p = p * f + 0.055504108664819925 * FACTOR;
  p = p * f + 0.24022650695910155 * FACTOR;
  p = p * f + 0.6931471805599453 * FACTOR;
  return p * f + FACTOR;
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

// 2^y * 2^SCALED of any y <= 0, -inf included, or NaN; relative error of the polynomials 2^-26.1 (of y - floor(y)) and
// 2^-29.0.
#if VECTOR_BYTES == 64
template <int SCALED> INLINE V<float> exp2_nonpositive(V<float> y) {
  constexpr float FACTOR = float(int64_t(1) << SCALED);
  V<float> f = (V<float>)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  V<float> p = (0.00021612929413095117f * FACTOR) * f + 0.0012467841152101755f * FACTOR;
  p = p * f + 0.00967545248568058f * FACTOR;
  p = p * f + 0.055485282093286514f * FACTOR;
  p = p * f + 0.2402293086051941f * FACTOR;
  p = p * f + 0.6931470632553101f * FACTOR;
  p = p * f + FACTOR;
  return (V<float>)_mm512_scalef_ps((__m512)p, (__m512)y);
}
#else
template <int SCALED> INLINE V<float> exp2_nonpositive(V<float> y) {
  constexpr float bias = Vec<float>::bias + SCALED, magic = Vec<float>::magic + bias;
  y = larger(all(-bias), y);
  V<float> rounded = y + magic;  // the low bits are those of the result's exponent, 0 for y = -bias, which makes it 0
  return exp2_fraction<0>(y - (rounded - magic)) * (V<float>)((U<float>)rounded << Vec<float>::mantissa);
}
#endif

// 2^x * 2^SCALED, where x = n + f, n an integer held in `rounded` = n + magic, |f| <= 1/2; 0 where `zero`: at
// least where the result would be below the normal numbers.
#if VECTOR_BYTES == 64
INLINE V<float> times_exp2(V<float> p, V<float> n) { return (V<float>)_mm512_scalef_ps((__m512)p, (__m512)n); }
INLINE V<double> times_exp2(V<double> p, V<double> n) { return (V<double>)_mm512_scalef_pd((__m512d)p, (__m512d)n); }

template <class T, int SCALED> INLINE V<T> exp2_parts(V<T>, V<T> n, V<T> f, I<T> zero) {
  V<T> e = times_exp2(exp2_fraction<SCALED>(f), n);
  return zero ? V<T>{} : e;
}
#else
template <class T, int SCALED> INLINE V<T> exp2_parts(V<T> rounded, V<T>, V<T> f, I<T> zero) {
  V<T> power = (V<T>)(((U<T>)rounded + (Vec<T>::bias + SCALED)) << Vec<T>::mantissa);
  V<T> e = exp2_fraction<0>(f) * power;
  return zero ? V<T>{} : e;
}
#endif

// 2^(whole + part) * 2^SCALED, part small, the sum at most 127 - SCALED (1023); 0 where `zero` and, if CLAMP, where the
// result would be below the normal numbers.
template <class T, bool CLAMP, int SCALED = 0> INLINE V<T> exp2_sum(V<T> whole, V<T> part, I<T> zero) {
  V<T> x = whole + part;
  if constexpr (CLAMP) {
    const T lowest = T(1 - Vec<T>::bias - SCALED);
    zero |= x < lowest;
    x = x > lowest ? x : all<T>(lowest);
  }
  V<T> rounded = x + Vec<T>::magic;
  V<T> n = rounded - Vec<T>::magic;
  return exp2_parts<T, SCALED>(rounded, n, (whole - n) + part, zero);
}

// log2 of positive finite x as exponent + log, |log| <= 1/2; absolute error of log 2^-23.3 (float; 2^-24.3 of it
// the polynomial), 2^-52 (double).
INLINE V<float> log2_mantissa(V<float> m) {
  V<float> x = m - 1.0f;
  V<float> q = 0.2368849217891693f - 0.14573530852794647f * x;
  q = q * x - 0.2500697672367096f;
  q = q * x + 0.2867082357406616f;
  q = q * x - 0.36008724570274353f;
  q = q * x + 0.48093941807746887f;
  q = q * x - 0.7213571667671204f;
  q = q * x + 1.4426947832107544f;
  return q * x;
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
  constexpr typename Vec<T>::Unsigned root_half = sizeof(T) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd;
  I<T> subnormal = x < Vec<T>::least_normal;
  x = subnormal ? x * T(int64_t(1) << Vec<T>::mantissa) : x;
  // Unsigned, which may wrap: of a NaN.
  I<T> e = (I<T>)((U<T>)x - (typename Vec<T>::U{} + root_half)) >> Vec<T>::mantissa;
  *log = log2_mantissa((V<T>)((U<T>)x - ((U<T>)e << Vec<T>::mantissa)));
  *exponent = __builtin_convertvector(e + (subnormal & -Vec<T>::mantissa), V<T>);
}
#endif

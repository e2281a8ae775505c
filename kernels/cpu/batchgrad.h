// BatchGrad (Eq. 6), the one kernel that is bound by arithmetic. Included by rows.h.
//
// A class of probability p adds, with x = h / T,
//   (1 - p) |G - p x| + p |G + (1 - p) x| = max(|G|, |(2p - 1) G + 2p (1 - p) x|)   for each feature:
// one multiplication, one fused multiply-add, one maximum, one addition.

template <class T> INLINE V<T> largest_magnitude(V<T> a, V<T> b) {
#if VECTOR_BYTES == 64
  constexpr int ABSOLUTE = 3, POSITIVE = 2 << 2;
  if constexpr (sizeof(T) == 4) return (V<T>)_mm512_range_ps((__m512)a, (__m512)b, POSITIVE | ABSOLUTE);
  else return (V<T>)_mm512_range_pd((__m512d)a, (__m512d)b, POSITIVE | ABSOLUTE);
#else
  const V<T> x = (V<T>)((U<T>)a << 1 >> 1), y = (V<T>)((U<T>)b << 1 >> 1);
  return x > y ? x : y;
#endif
}

// How many classes share a load of h, by the number of registers.
constexpr int ABREAST = VECTOR_BYTES == 64 ? 4 : 2;

template <class T, int K>
INLINE double classes_abreast(const T* h, int64_t n, const T* G, int64_t stride, const int* classes, const T* turn, const T* pull) {
  V<T> sum[K] = {};
  const T* g[K];
  for (int k = 0; k < K; k++) g[k] = G + classes[k] * stride;
  for (int64_t i = 0; i < n; i += Vec<T>::lanes) {
    const V<T> x = load(h + i);
    UNROLL for (int k = 0; k < K; k++) {
      const V<T> a = load(g[k] + i);
      sum[k] += largest_magnitude<T>(a, a * turn[k] + x * pull[k]);
    }
  }
  UNROLL for (int k = 1; k < K; k++) sum[0] += sum[k];
  return sum_of<T>(sum[0]);
}

// Of `count` classes: rows `classes` of G [., stride], n of its columns, n a multiple of 16; turn = 2p - 1 and
// pull = 2p (1 - p) / T of each.
template <class T>
static double batchgrad(const void* h_, int64_t n, const void* G_, int64_t stride, const int* classes, const void* turn_,
                        const void* pull_, int count) {
  const T *h = static_cast<const T*>(h_), *G = static_cast<const T*>(G_);
  const T *turn = static_cast<const T*>(turn_), *pull = static_cast<const T*>(pull_);
  double total = 0;
  int k = 0;
  for (; k + ABREAST <= count; k += ABREAST)
    total += classes_abreast<T, ABREAST>(h, n, G, stride, classes + k, turn + k, pull + k);
  for (; k < count; k++) total += classes_abreast<T, 1>(h, n, G, stride, classes + k, turn + k, pull + k);
  return total;
}

// The arithmetic of `batchgrad` on registers alone: what it could reach if all its data were there. For benchmarks.
template <class T> static double batchgrad_peak(int64_t steps) {
  V<T> sum[ABREAST] = {}, x = all<T>(T(0.5)), a = all<T>(T(0.25));
  T turn[ABREAST], pull[ABREAST];
  for (int k = 0; k < ABREAST; k++) turn[k] = T(-0.5 - k), pull[k] = T(0.1 * k);
  for (int64_t i = 0; i < steps; i += ABREAST) {
    UNROLL for (int k = 0; k < ABREAST; k++) {
      __asm__ volatile("" : "+x"(a), "+x"(x));  // not the same as the last time, for all that the compiler knows
      sum[k] += largest_magnitude<T>(a, a * turn[k] + x * pull[k]);
    }
  }
  double total = 0;
  for (int k = 0; k < ABREAST; k++) total += sum_of<T>(sum[k]);
  return total;
}

// e^z of n elements, in the arithmetic type; `out` has a vector's width to spare.
template <class In>
static void exponentials(const void* f, int64_t n, const LogitsPlan& plan, double f_max, void* out) {
  typedef typename Arithmetic<In>::type T;
  const Softmax<T> softmax(all<T>(T(f_max)), plan);
  const T descale = T(__builtin_ldexp(1.0, -Vec<T>::scaled));
  T* to = static_cast<T*>(out);
  for_blocks<1, T>(
      static_cast<const In*>(f), n, minus_inf<T>(),
      [&](int, V<T> v, int64_t i, int64_t first) __attribute__((always_inline)) {
        V<T> d, e = softmax.exp(v, &d) * descale;
        for (int64_t k = first; k < Vec<T>::lanes; k++) to[i + k - first] = e[k];
      },
      [] {});
}

// Copies n elements in the arithmetic type, and gives the sum of their magnitudes.
template <class In> static double widen(const void* x, int64_t n, void* out) {
  typedef typename Arithmetic<In>::type T;
  T* to = static_cast<T*>(out);
  V<T> sum = {};
  double total = 0;
  for_blocks<1, T>(
      static_cast<const In*>(x), n, T(0),
      [&](int, V<T> v, int64_t i, int64_t first) __attribute__((always_inline)) {
        store<T>(to, v, i, first);
        sum += (V<T>)((U<T>)v << 1 >> 1);
      },
      [&] { total += sum_of<T>(sum), sum = V<T>{}; });
  return total;
}

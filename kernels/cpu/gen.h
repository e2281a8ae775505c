// GEN: a sum over the largest probabilities. Included by rows.h.

template <class T, class In> static int64_t count_at_least(const In* f, int64_t n, T threshold) {
  I<T> reach[4] = {};
  const V<T> thresholds = all<T>(threshold);
  for_blocks<4, T, int64_t(1) << 40>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) { reach[u] = count_where(at_least(v, thresholds), reach[u]); },
      [] {});
  return count_of<T>((reach[0] + reach[1]) + (reach[2] + reach[3]));
}

// The place of a float in their order, and the float at a place.
template <class T> INLINE typename Vec<T>::Scalar place_of(T x) {
  typename Vec<T>::Scalar bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  return bits < 0 ? bits ^ typename Vec<T>::Scalar(~typename Vec<T>::Unsigned(0) >> 1) : bits;
}
template <class T> INLINE T float_at(typename Vec<T>::Scalar place) {
  if (place < 0) place ^= typename Vec<T>::Scalar(~typename Vec<T>::Unsigned(0) >> 1);
  T x;
  __builtin_memcpy(&x, &place, sizeof x);
  return x;
}

// The M-th largest of a row of numbers, M <= n: bisection over the floats in their order.
template <class T, class In> static T largest_but(const In* f, int64_t n, int64_t M, T f_max) {
  typedef typename Vec<T>::Scalar S;
  S low = place_of(minus_inf<T>()), high = place_of(f_max);  // count_at_least(low) >= M, and what is above high is too few
  while (low < high) {
    const S middle = S((low & high) + ((low ^ high) >> 1)) + S((low ^ high) & 1);  // their mean, rounded up
    if (count_at_least<T>(f, n, float_at<T>(middle)) >= M) low = middle;
    else high = middle - 1;
  }
  return float_at<T>(low);
}

// Sum over the M largest p of p^gamma (1 - p)^gamma; total: sum e^z.
template <class In>
static double gen(const void* data, int64_t n, const LogitsPlan& plan, double f_max, double total, double rest, double gamma,
                  int64_t M) {
  typedef typename Arithmetic<In>::type T;
  const In* f = static_cast<const In*>(data);
  const T least = M < n ? largest_but<T>(f, n, M, T(f_max)) : minus_inf<T>();
  const Softmax<T> softmax(all<T>(T(f_max)), plan);
  const T gamma_scale = T(plan.scale * gamma), power = T(gamma), per_total = T(__builtin_ldexp(1 / total, -Vec<T>::scaled));
  const T log_total = T(gamma * __builtin_log2(total));
  const double descale = __builtin_ldexp(1.0, -Vec<T>::scaled);
  auto term = [&](V<T> v) __attribute__((always_inline)) {
    V<T> d, p = softmax.exp(v, &d) * per_total, whole, part;
    log2_parts<T>(1 - p, &whole, &part);
    return exp2_sum<T, true, Vec<T>::scaled>((v - softmax.pivot) * gamma_scale - log_total, (whole + part) * power,
                                             v == minus_inf<T>());
  };
  V<T> sums[2] = {}, above[2] = {};
  Total total_sum;
  double count = 0;
  for_blocks<2, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        const I<T> wanted = (v > least) & (v != softmax.pivot);
        if (!any<T>(wanted)) return;
        sums[u] += wanted ? term(v) : V<T>{};
        above[u] += wanted ? all<T>(T(1)) : V<T>{};
      },
      [&] { total_sum += take<2, T>(sums), count += take<2, T>(above); });
  // The maximum, whose 1 - p is rest / total; then what is equal to the M-th, as often as there is room for it.
  const double log_rest = rest > 0x1p-900 ? __builtin_log2(rest) : log2_rest_again<T>(f, n, plan, f_max);
  const double of_max = __builtin_exp2(gamma * (log_rest - 2 * __builtin_log2(total)));
  const double ties = double(count_at_least<T>(f, n, T(f_max))), most = double(M < n ? M : n);
  if (least >= f_max) return most * of_max;
  const double sum = descale * total_sum + ties * of_max;
  return least > minus_inf<T>() ? sum + (most - count - ties) * descale * double(term(all<T>(least))[0]) : sum;
}

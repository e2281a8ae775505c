// A row of logits: its maximum, the sums of exponentials beside it, and what a second look adds. Included by rows.h.

template <class T> struct Softmax {
  V<T> pivot;
  T high, low;  // plan.scale; in float the high part will do
  T lowest;     // see plan.h

  Softmax(V<T> pivot, const LogitsPlan& plan) : pivot(pivot), high(T(sizeof(T) == 4 && plan.scale > 1e38 ? 1e38 : plan.scale)) {
    if (high == 0) high = sizeof(T) == 4 ? T(0x1p-149) : T(0x1p-1074);  // -inf * 0 is no number
    low = T(plan.scale_low);
    lowest = sizeof(T) == 4 ? T(plan.lowest_float) : T(plan.lowest_double);
  }

  // Returns 2^SCALED e^((f - pivot) / T), and in *d the difference f - pivot, but no less than `lowest`.
  inline __attribute__((always_inline)) V<T> exp(V<T> f, V<T>* d) const {
    V<T> exact = f - pivot;
    V<T> held = *d = larger(all<T>(lowest), exact);
    if constexpr (sizeof(T) == 4) return exp2_nonpositive<Vec<T>::scaled>(exact * high);
    V<T> rounded = held * high + Vec<T>::magic;
    V<T> n = rounded - Vec<T>::magic;
    V<T> minus_pivot = exact - f;  // as it was rounded
    V<T> lost = (f - (exact - minus_pivot)) - (pivot + minus_pivot);  // what the subtraction rounded away grows with |z|
    V<T> fraction = held * low + (held * high - n) + lost * high;
    return exp2_parts<T, Vec<T>::scaled>(rounded, n, fraction, exact < lowest);
  }
};

// The largest element that is a number.
template <class T, class In> static T max_of_row(const In* f, int64_t n) {
  constexpr int W = 4;
  V<T> most[W];
  UNROLL for (int u = 0; u < W; u++) most[u] = all<T>(minus_inf<T>());
  for_blocks<W, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) { most[u] = larger(v, most[u]); }, [] {});
  return max_of<T>(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

template <class T, class In> static bool any_nan(const In* f, int64_t n) {
  I<T> nan = {};
  for_blocks<1, T>(
      f, n, minus_inf<T>(), [&](int, V<T> v, int64_t, int64_t) __attribute__((always_inline)) { nan |= v != v; }, [] {});
  return any<T>(nan);
}

// Differences to the pivot are divided by the power of two below T before they are multiplied by exponentials, for with a
// small T these products might be subnormal; and they are summed times this, as their sum may be beyond the type.
template <class T> constexpr T difference_factor() { return sizeof(T) == 4 ? T(0x1p-12) : T(DIFFERENCE); }

static double power_of_2_below(double x) { return __builtin_ldexp(1.0, __builtin_ilogb(x)); }

// MORE: all sums, else that of the exponentials alone, which comes out the same to the bit. KEEP: store them.
template <class T, class In, bool MORE, bool KEEP>
static void sums_of_row(const In* f, int64_t n, const LogitsPlan& plan, const In* next, LogitsState* state, T* kept) {
  constexpr int W = 2;
  constexpr int64_t lanes = Vec<T>::lanes;
  const Softmax<T> softmax(all<T>(T(state->f_max)), plan);
  const double descale = __builtin_ldexp(1.0, -Vec<T>::scaled), power = power_of_2_below(plan.temperature);
  const T per_T = T(1 / power);
  const bool sum_differences = plan.sums & SUMLOGP;
  V<T> exp[W] = {}, squares[W] = {}, exp_d[W] = {}, differences[W] = {};
  I<T> others[W] = {};
  Total all_exp, all_squares, all_exp_d, all_differences;
  for_blocks<W, T, 16 * W * lanes>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t i, int64_t first) __attribute__((always_inline)) {
        __builtin_prefetch(next + i);
        V<T> d, e = softmax.exp(v, &d);
        if constexpr (KEEP) __builtin_memcpy(kept + i, &e, sizeof e);
        const auto below = unequal(v, softmax.pivot);
        others[u] = count_where(below, others[u]);
        exp[u] = add_where(below, exp[u], e);
        if constexpr (MORE) {
          e = where(below, e);
          squares[u] += e * e;
          exp_d[u] += e * (d * per_T);
          if (sum_differences) {
            V<T> difference = v * difference_factor<T>() - softmax.pivot * difference_factor<T>();
            if (first) difference = from_lane<T>(first) ? difference : V<T>{};  // the padding is no masked class
            differences[u] += difference;
          }
        }
      },
      [&] {
        all_exp += take<W, T>(exp);
        if constexpr (MORE) {
          all_squares += take<W, T>(squares);
          all_exp_d += take<W, T>(exp_d);
          if (sum_differences) all_differences += take<W, T>(differences);
        }
      });
  state->ties = double((n + lanes - 1) / lanes * lanes - count_of<T>(others[0] + others[1]));
  state->e_below = descale * all_exp;
  if constexpr (MORE) {
    state->squares_below = descale * descale * all_squares;
    state->rest_z = descale * power / plan.temperature * all_exp_d;
    state->differences = all_differences * (DIFFERENCE / difference_factor<T>());
  }
}

template <class T, class In>
static void power_sum_of_row(const In* f, int64_t n, const LogitsPlan& plan, int which, LogitsState* state) {
  const Softmax<T> softmax(all<T>(T(state->f_max)), sharper(plan, plan.power[which]));
  V<T> exp[4] = {};
  Total total;
  for_blocks<4, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        V<T> d, e = softmax.exp(v, &d);
        exp[u] = add_where(unequal(v, softmax.pivot), exp[u], e);
      },
      [&] { total += take<4, T>(exp); });
  state->powers_below[which] = total * __builtin_ldexp(1.0, -Vec<T>::scaled);
}

// The largest element below the maximum.
template <class T, class In> static T largest_below(const In* f, int64_t n, T f_max) {
  V<T> most[2] = {all<T>(minus_inf<T>()), all<T>(minus_inf<T>())};
  for_blocks<2, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        most[u] = v < f_max && v > most[u] ? v : most[u];
      },
      [] {});
  return max_of<T>(larger(most[0], most[1]));
}

// What is below the maximum, where that is so far above it that float exponentials vanish: relative to a lower pivot.
template <class T, class In>
static void rest_again(const In* f, int64_t n, const LogitsPlan& plan, LogitsState* state) {
  const T f_max = T(state->f_max);
  const double pivot = largest_below<T>(f, n, f_max);
  if (pivot == -__builtin_inf()) return;
  const Softmax<T> softmax(all<T>(T(pivot)), plan);
  const double power = power_of_2_below(plan.temperature);
  const T per_T = T(1 / power);
  V<T> exp[2] = {}, squares[2] = {}, exp_d[2] = {};
  Total all_exp, all_squares, all_exp_d;
  for_blocks<2, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        V<T> d, e = softmax.exp(v < f_max ? v : all<T>(minus_inf<T>()), &d);
        exp[u] += e;
        squares[u] += e * e;
        exp_d[u] += e * (d * per_T);
      },
      [&] { all_exp += take<2, T>(exp), all_squares += take<2, T>(squares), all_exp_d += take<2, T>(exp_d); });
  const double gap = (pivot - state->f_max) / plan.temperature, weight = __builtin_exp(gap);
  const double descale = __builtin_ldexp(1.0, -Vec<T>::scaled);
  // The weight last, for it may be next to the smallest double.
  state->e_below = weight * (descale * all_exp);
  state->squares_below = weight * weight * (descale * descale * all_squares);
  state->rest_z = weight == 0 ? 0 : weight * (descale * (power / plan.temperature * all_exp_d + gap * all_exp));
}

template <class In>
static void logits(const void* data, int64_t n, const LogitsPlan& plan, const void* next, LogitsState* state, void* kept) {
  typedef typename Arithmetic<In>::type T;
  const In* f = static_cast<const In*>(data);
  T* keep = static_cast<T*>(kept);
  state->f_max = max_of_row<T>(f, n);
  const double infinity = __builtin_inf();
  state->nan = false;
  if (plan.sums == 0 || state->f_max == infinity || state->f_max == -infinity) {
    state->nan = any_nan<T>(f, n);
    return;
  }
  const bool more = plan.sums & (SQUARES | PLOGP | SUMLOGP);
  if (more && keep)
    sums_of_row<T, In, true, true>(f, n, plan, static_cast<const In*>(next), state, keep);
  else if (more)
    sums_of_row<T, In, true, false>(f, n, plan, static_cast<const In*>(next), state, keep);
  else if (keep)
    sums_of_row<T, In, false, true>(f, n, plan, static_cast<const In*>(next), state, keep);
  else
    sums_of_row<T, In, false, false>(f, n, plan, static_cast<const In*>(next), state, keep);
  state->nan = state->e_below != state->e_below;
  if (sizeof(T) == 4 && state->e_below < 0x1p-128) rest_again<T>(f, n, plan, state);
  for (int r = 0; r < plan.power_sums; r++) power_sum_of_row<T>(f, n, plan, r, state);
}

template <class In>
static double tv(const void* data, int64_t n, const LogitsPlan& plan, double f_max, double total, double uniform_p,
                 const void* kept) {
  typedef typename Arithmetic<In>::type T;
  const T per_total = T(__builtin_ldexp(1 / total, -Vec<T>::scaled)), uniform = T(uniform_p);
  V<T> above[4] = {}, sum = {};
  auto add = [&](int u, V<T> e) __attribute__((always_inline)) {
    V<T> p = e * per_total - uniform;
    above[u] += p > 0 ? p : V<T>{};
  };
  auto flush = [&] { add_up<4, T>(&sum, above); };
  if (kept) {
    const int64_t padded = (n + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;  // the padding has p = 0
    for_blocks<4, T>(
        static_cast<const T*>(kept), padded, T(0), [&](int u, V<T> e, int64_t, int64_t) __attribute__((always_inline)) { add(u, e); }, flush);
  } else {
    const Softmax<T> softmax(all<T>(T(f_max)), plan);
    for_blocks<4, T>(
        static_cast<const In*>(data), n, minus_inf<T>(),
        [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
          V<T> d;
          add(u, softmax.exp(v, &d));
        },
        flush);
  }
  return sum_of<T>(sum);
}

// log2 of the sum of e^z below the maximum, also where that vanishes.
template <class T, class In> static double log2_rest_again(const In* f, int64_t n, const LogitsPlan& plan, double f_max) {
  const T pivot = largest_below<T>(f, n, T(f_max));
  if (pivot == minus_inf<T>()) return pivot;
  const Softmax<T> softmax(all<T>(pivot), plan);
  V<T> sums[2] = {};
  Total sum;
  for_blocks<2, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        V<T> d;
        sums[u] += softmax.exp(v < T(f_max) ? v : all<T>(minus_inf<T>()), &d);
      },
      [&] { sum += take<2, T>(sums); });
  return (pivot - f_max) * plan.scale + __builtin_log2(sum) - Vec<T>::scaled;
}

template <class In> static double log2_rest(const void* f, int64_t n, const LogitsPlan& plan, double f_max) {
  return log2_rest_again<typename Arithmetic<In>::type>(static_cast<const In*>(f), n, plan, f_max);
}

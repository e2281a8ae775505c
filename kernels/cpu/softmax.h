// A row of logits: its maximum, the sums of exponentials beside it, and what a second look adds. Included by rows.h.

template <class T> struct Softmax {
  V<T> max;
  T high, low;  // z log2(e) = (f - max) (high + low); in float the high part will do
  T lowest;     // see plan.h

  Softmax(V<T> max, const LogitsPlan& plan) : max(max), high(T(sizeof(T) == 4 && plan.scale > 1e38 ? 1e38 : plan.scale)) {
    if (high == 0) high = sizeof(T) == 4 ? T(0x1p-149) : T(0x1p-1074);  // -inf * 0 is no number
    low = T(plan.scale_low);
    lowest = sizeof(T) == 4 ? T(plan.lowest_float) : T(plan.lowest_double);
  }

  // 2^SCALED exp(z), z = (f - max) / T; d = f - max is handed out, no less than `lowest`
  inline __attribute__((always_inline)) V<T> exp(V<T> f, V<T>* d) const {
    V<T> exact = f - max;
    V<T> held = *d = larger(all<T>(lowest), exact);
    if constexpr (sizeof(T) == 4) return exp2_nonpositive<Vec<T>::scaled>(exact * high);
    V<T> rounded = held * high + Vec<T>::magic;
    V<T> n = rounded - Vec<T>::magic;
    V<T> back = exact - f;
    V<T> lost = (f - (exact - back)) - (max + back);  // what the subtraction rounded away grows with |z|
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

// Differences to the maximum are multiplied by exponentials in the unit of the power of two below T, for with a small T
// they might be subnormal; and summed in this one, for they may be beyond the type, as their sum may be.
template <class T> constexpr T difference_unit() { return sizeof(T) == 4 ? T(0x1p-12) : T(DIFFERENCE); }

static double power_below(double x) { return __builtin_ldexp(1.0, __builtin_ilogb(x)); }

// MORE: all sums, else that of the exponentials alone, which comes out the same to the bit. KEEP: store them.
template <class T, class In, bool MORE, bool KEEP>
static void sums_of_row(const In* f, int64_t n, const LogitsPlan& plan, const In* next, LogitsState* state, T* kept) {
  constexpr int W = 2;
  constexpr int64_t lanes = Vec<T>::lanes;
  const Softmax<T> softmax(all<T>(T(state->max)), plan);
  const double unit = __builtin_ldexp(1.0, -Vec<T>::scaled), power = power_below(plan.temperature);
  const T per_T = T(1 / power);
  const bool sum_z = plan.sums & SUMLOGP;
  V<T> exp[W] = {}, squares[W] = {}, exp_z[W] = {}, z[W] = {};
  I<T> others[W] = {};
  Total all_exp, all_squares, all_exp_z, all_z;
  for_blocks<W, T, 16 * W * lanes>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t i, int64_t first) __attribute__((always_inline)) {
        __builtin_prefetch(next + i);
        V<T> d, e = softmax.exp(v, &d);
        if constexpr (KEEP) __builtin_memcpy(kept + i, &e, sizeof e);
        const auto below = unequal(v, softmax.max);
        others[u] = count_where(below, others[u]);
        exp[u] = add_where(below, exp[u], e);
        if constexpr (MORE) {
          e = where(below, e);
          squares[u] += e * e;
          exp_z[u] += e * (d * per_T);
          if (sum_z) {
            V<T> difference = v * difference_unit<T>() - softmax.max * difference_unit<T>();
            if (first) difference = from_lane<T>(first) ? difference : V<T>{};  // the padding is no masked class
            z[u] += difference;
          }
        }
      },
      [&] {
        all_exp += take<W, T>(exp);
        if constexpr (MORE) {
          all_squares += take<W, T>(squares);
          all_exp_z += take<W, T>(exp_z);
          if (sum_z) all_z += take<W, T>(z);
        }
      });
  state->ties = double((n + lanes - 1) / lanes * lanes - count_of<T>(others[0] + others[1]));
  state->exp = unit * all_exp;
  if constexpr (MORE) {
    state->squares = unit * unit * all_squares;
    state->exp_z = unit * power / plan.temperature * all_exp_z;
    state->below = all_z * (DIFFERENCE / difference_unit<T>());
  }
}

template <class T, class In>
static void power_sum_of_row(const In* f, int64_t n, const LogitsPlan& plan, int which, LogitsState* state) {
  const Softmax<T> softmax(all<T>(T(state->max)), sharper(plan, plan.power[which]));
  V<T> exp[4] = {};
  Total total;
  for_blocks<4, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        V<T> d, e = softmax.exp(v, &d);
        exp[u] = add_where(unequal(v, softmax.max), exp[u], e);
      },
      [&] { total += take<4, T>(exp); });
  state->powers[which] = total * __builtin_ldexp(1.0, -Vec<T>::scaled);
}

// The largest element below the maximum.
template <class T, class In> static T largest_below(const In* f, int64_t n, T max) {
  V<T> most[2] = {all<T>(minus_inf<T>()), all<T>(minus_inf<T>())};
  for_blocks<2, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) { most[u] = v < max && v > most[u] ? v : most[u]; },
      [] {});
  return max_of<T>(larger(most[0], most[1]));
}

// Where the maximum is so far above the rest that float exponentials vanish: the rest again, from a pivot of
// its own.
template <class T, class In>
static void rest_of_row(const In* f, int64_t n, const LogitsPlan& plan, LogitsState* state) {
  const T top = T(state->max);
  const double pivot = largest_below<T>(f, n, top);
  if (pivot == -__builtin_inf()) return;
  const Softmax<T> softmax(all<T>(T(pivot)), plan);
  const double power = power_below(plan.temperature);
  const T per_T = T(1 / power);
  V<T> exp[2] = {}, squares[2] = {}, exp_z[2] = {};
  Total sum, square, sum_z;
  for_blocks<2, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        V<T> d, e = softmax.exp(v < top ? v : all<T>(minus_inf<T>()), &d);
        exp[u] += e;
        squares[u] += e * e;
        exp_z[u] += e * (d * per_T);
      },
      [&] { sum += take<2, T>(exp), square += take<2, T>(squares), sum_z += take<2, T>(exp_z); });
  const double gap = (pivot - state->max) / plan.temperature, w = __builtin_exp(gap);
  const double unit = __builtin_ldexp(1.0, -Vec<T>::scaled);
  // w last, which may be next to the end of the doubles.
  state->exp = w * (unit * sum);
  state->squares = w * w * (unit * unit * square);
  state->exp_z = w == 0 ? 0 : w * (unit * (power / plan.temperature * sum_z + gap * sum));
}

template <class In>
static void logits(const void* data, int64_t n, const LogitsPlan& plan, const void* next, LogitsState* state, void* kept) {
  typedef typename Arithmetic<In>::type T;
  const In* f = static_cast<const In*>(data);
  T* keep = static_cast<T*>(kept);
  state->max = max_of_row<T>(f, n);
  const double infinity = __builtin_inf();
  state->nan = false;
  if (plan.sums == 0 || state->max == infinity || state->max == -infinity) {
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
  state->nan = state->exp != state->exp;
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
    const Softmax<T> softmax(all<T>(T(max)), plan);
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

// log2 of the sum of the exponentials below the maximum, where that itself may be below the doubles.
template <class T, class In> static double log2_of_rest(const In* f, int64_t n, const LogitsPlan& plan, double max) {
  const T pivot = largest_below<T>(f, n, T(max));
  if (pivot == minus_inf<T>()) return pivot;
  const Softmax<T> softmax(all<T>(pivot), plan);
  V<T> sums[2] = {};
  Total sum;
  for_blocks<2, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        V<T> d;
        sums[u] += softmax.exp(v < T(max) ? v : all<T>(minus_inf<T>()), &d);
      },
      [&] { sum += take<2, T>(sums); });
  return (pivot - max) * plan.scale + __builtin_log2(sum) - Vec<T>::scaled;
}

template <class In> static double log2_rest(const void* f, int64_t n, const LogitsPlan& plan, double max) {
  return log2_of_rest<typename Arithmetic<In>::type>(static_cast<const In*>(f), n, plan, max);
}

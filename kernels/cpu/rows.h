// The kernels: what reduces a chunk of a row to its partial sums. Included after vectors.h, in the same way.

// ---- logits

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

// Calls step(u, v, i, first) on every vector of x: u < WIDTH the accumulator to use, i where it begins, `first`
// its first lane that counts, 0 but in a last vector that is not full; flush() after each LENGTH elements, so that
// no lane's sum grows long.
constexpr int64_t BLOCK = 512;

template <class T, int WIDTH>
constexpr int64_t SHORT = 32 * WIDTH * Vec<T>::lanes < BLOCK ? 32 * WIDTH * Vec<T>::lanes : BLOCK;

template <int WIDTH, class T, int64_t LENGTH = SHORT<T, WIDTH>, class In, class Step, class Flush>
INLINE void for_blocks(const In* x, int64_t n, T padding, Step step, Flush flush) {
  constexpr int64_t lanes = Vec<T>::lanes;
  for (int64_t i = 0; i < n;) {
    const int64_t end = i + LENGTH < n ? i + LENGTH : n;
    for (; i + WIDTH * lanes <= end; i += WIDTH * lanes) {
      UNROLL for (int u = 0; u < WIDTH; u++) step(u, load(x + i + u * lanes), i + u * lanes, 0);
    }
    // The last vectors go to the accumulators in turn, full or not: a padded copy of the row sums in the same order.
    UNROLL for (int u = 0; u < WIDTH; u++) {
      if (i + lanes <= end) {
        step(u, load(x + i), i, 0);
        i += lanes;
      } else if (i < end) {
        step(u, load_last<T>(x + end, end - i, i, padding), i, lanes - (end - i));
        i = end;
      }
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

// A sum of many doubles, in parts, or it would grow long itself.
struct Total {
  double sum = 0, part = 0;
  int parts = 0;
  void operator+=(double x) {
    part += x;
    if (++parts % 16 == 0) sum += part, part = 0;
  }
  operator double() const { return sum + part; }
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

// ---- nearly flat rows, read again

// e^x - 1 and e^x - 1 - x, of x that no e^x overflows for.
template <class T> INLINE void exp_beside_1(V<T> x, V<T>* expm1, V<T>* tail) {
  const I<T> near = (x < 1) & (x > -1);
  *tail = exp_tail(x);
  *expm1 = x + *tail;
  if (!any<T>(~near)) return;
  const V<T> e = exp2_sum<T, true>(x * T(1.4426950408889634), V<T>{}, x != x) - 1;
  *expm1 = near ? *expm1 : e;
  *tail = near ? *tail : e - x;
}

template <class In>
static void level_sums(const void* data, int64_t, int64_t, int64_t n, double temperature, const double* level,
                       const double* shift, LevelSums* out) {
  typedef typename Arithmetic<In>::type T;
  const V<T> centre = all<T>(T(*level)), away = all<T>(T(*shift));
  const T per_T = T(1 / temperature);
  V<T> expm1[2] = {}, tail[2] = {}, above[2] = {};
  LevelSums sums = {};
  for_blocks<2, T, 32 * Vec<T>::lanes>(
      static_cast<const In*>(data), n, T(*level),
      [&](int u, V<T> v, int64_t, int64_t first) __attribute__((always_inline)) {
        V<T> rise, beyond;
        exp_beside_1<T>((v - centre) * per_T - away, &rise, &beyond);
        if (first) {  // the padding is no class
          rise = from_lane<T>(first) ? rise : V<T>{};
          beyond = from_lane<T>(first) ? beyond : V<T>{};
        }
        expm1[u] += rise;
        tail[u] += beyond;
        above[u] += rise > 0 ? rise : V<T>{};
      },
      [&] { sums.expm1 += take<2, T>(expm1), sums.tail += take<2, T>(tail), sums.above += take<2, T>(above); });
  *out = sums;
}

// ---- GEN

template <class T, class In> static int64_t count_at_least(const In* f, int64_t n, T level) {
  I<T> below[4] = {};
  for_blocks<4, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) { below[u] -= v >= level; }, [] {});
  return count_of<T>((below[0] + below[1]) + (below[2] + below[3]));
}

// The M-th largest of a row of numbers, M <= n: bisection over the floats in their order.
template <class T, class In> static T largest_but(const In* f, int64_t n, int64_t M, T max) {
  typedef typename Vec<T>::Scalar S;
  constexpr S sign = S(typename Vec<T>::Unsigned(1) << (sizeof(T) * 8 - 1));
  auto key = [](T x) { S bits; __builtin_memcpy(&bits, &x, sizeof x); return bits < 0 ? S(bits ^ ~sign) : bits; };
  auto value = [](S bits) { T x; if (bits < 0) bits ^= ~sign; __builtin_memcpy(&x, &bits, sizeof x); return x; };
  S low = key(minus_inf<T>()), high = key(max);  // count_at_least(low) >= M, and what is above high is too few
  while (low < high) {
    const S middle = S((low & high) + ((low ^ high) >> 1)) + S((low ^ high) & 1);  // their mean, rounded up
    if (count_at_least<T>(f, n, value(middle)) >= M) low = middle;
    else high = middle - 1;
  }
  return value(low);
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

// Sum over the M largest p of p^gamma (1 - p)^gamma; total and rest: of the exponentials relative to the maximum.
template <class In>
static double gen(const void* data, int64_t n, const LogitsPlan& plan, double max, double total, double rest, double gamma,
                  int64_t M) {
  typedef typename Arithmetic<In>::type T;
  const In* f = static_cast<const In*>(data);
  const T level = M < n ? largest_but<T>(f, n, M, T(max)) : minus_inf<T>();
  const Softmax<T> softmax(all<T>(T(max)), plan);
  const T scale = T(plan.scale * gamma), power = T(gamma), per_total = T(__builtin_ldexp(1 / total, -Vec<T>::scaled));
  const T log_total = T(gamma * __builtin_log2(total));
  const double unit = __builtin_ldexp(1.0, -Vec<T>::scaled);
  auto term = [&](V<T> v) __attribute__((always_inline)) {
    V<T> d, p = softmax.exp(v, &d) * per_total, e, l;
    log2_parts<T>(1 - p, &e, &l);
    return exp2_sum<T, true, Vec<T>::scaled>((v - softmax.max) * scale - log_total, (e + l) * power, v == minus_inf<T>());
  };
  V<T> sums[2] = {}, above[2] = {};
  Total total_sum;
  double count = 0;
  for_blocks<2, T>(
      f, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        const I<T> wanted = (v > level) & (v != softmax.max);
        if (!any<T>(wanted)) return;
        sums[u] += wanted ? term(v) : V<T>{};
        above[u] += wanted ? all<T>(T(1)) : V<T>{};
      },
      [&] { total_sum += take<2, T>(sums), count += take<2, T>(above); });
  // The maximum, whose 1 - p is rest / total; then what is equal to the M-th, as often as there is room for it.
  const double log_rest = rest > 0x1p-900 ? __builtin_log2(rest) : log2_of_rest<T>(f, n, plan, max);
  const double top = __builtin_exp2(gamma * (log_rest - 2 * __builtin_log2(total)));
  const double ties = double(count_at_least<T>(f, n, T(max))), most = double(M < n ? M : n);
  if (level >= max) return most * top;
  const double sum = unit * total_sum + ties * top;
  return level > minus_inf<T>() ? sum + (most - count - ties) * unit * double(term(all<T>(level))[0]) : sum;
}

// ---- few classes: a row a lane

// The same sums, and TV, of `rows` rows of n <= FEW elements, each of them to its own state.
template <class In>
static void few_logits(const void* data, int64_t stride, int64_t rows, int64_t n, const LogitsPlan& plan,
                       LogitsState* states, double* tv) {
  typedef typename Arithmetic<In>::type T;
  constexpr int lanes = Vec<T>::lanes;
  const double unit = __builtin_ldexp(1.0, -Vec<T>::scaled), power = power_below(plan.temperature);
  const T per_T = T(1 / power);
  const bool more = plan.sums & (SQUARES | PLOGP | SUMLOGP);
  for (int64_t start = 0; start < rows; start += lanes) {
    const int64_t count = rows - start < lanes ? rows - start : lanes;
    const In* f = static_cast<const In*>(data) + start * stride;
    V<T> x[FEW], max = all<T>(minus_inf<T>()), nan = {};
    for (int64_t k = 0; k < n; k += lanes) load_columns<T>(f + k, stride, count, n - k < lanes ? n - k : lanes, x + k);
    for (int64_t k = 0; k < n; k++) {
      max = larger(x[k], max);
      nan = add_where(unequal(x[k], x[k]), nan, all<T>(T(1)));
    }
    V<T> e[FEW], rest = {}, exp = {}, squares = {}, exp_z = {}, z = {}, above = {};
    const Softmax<T> softmax(max, plan);
    for (int64_t k = 0; k < n && plan.sums; k++) {
      V<T> d;
      e[k] = softmax.exp(x[k], &d);
      const auto below = unequal(x[k], max);
      rest = add_where(below, rest, all<T>(T(1)));
      exp = add_where(below, exp, e[k]);
    }
    for (int64_t k = 0; k < n && more; k++) {
      const V<T> d = x[k] - max, held = larger(all<T>(softmax.lowest), d);
      squares = add_where(unequal(x[k], max), squares, e[k] * e[k]);
      exp_z += e[k] * (held * per_T);
      z += x[k] * difference_unit<T>() - max * difference_unit<T>();
    }
    if (plan.sums & TV) {
      const V<T> scale = 1 / (all<T>(T(n)) - rest + exp * T(unit));
      for (int64_t k = 0; k < n; k++) {
        V<T> p = e[k] * T(unit) * scale - T(1.0 / double(n));
        above += p > 0 ? p : V<T>{};
      }
    }
    for (int64_t row = 0; row < count; row++) {
      LogitsState* s = states + start + row;
      s->max = max[row];
      s->n = n;
      s->nan = nan[row] != 0;
      s->ties = n - rest[row];
      s->exp = unit * exp[row];
      if (more) {
        s->squares = unit * unit * squares[row];
        s->exp_z = unit * power / plan.temperature * exp_z[row];
        s->below = z[row] * (DIFFERENCE / difference_unit<T>());
      }
      if (plan.sums & TV) tv[start + row] = above[row];
      if (sizeof(T) == 4 && plan.sums && s->exp < 0x1p-128 && __builtin_isfinite(s->max) && !s->nan)
        rest_of_row<T>(f + row * stride, n, plan, s);
    }
    for (int r = 0; r < plan.power_sums; r++) {
      const Softmax<T> sharp(max, sharper(plan, plan.power[r]));
      V<T> power = {};
      for (int64_t k = 0; k < n; k++) {
        V<T> d;
        power = add_where(unequal(x[k], max), power, sharp.exp(x[k], &d));
      }
      for (int64_t row = 0; row < count; row++) states[start + row].powers[r] = unit * power[row];
    }
  }
}

template <class In>
static void few_level_sums(const void* data, int64_t stride, int64_t rows, int64_t n, double temperature,
                           const double* level, const double* shift, LevelSums* out) {
  typedef typename Arithmetic<In>::type T;
  constexpr int lanes = Vec<T>::lanes;
  const T per_T = T(1 / temperature);
  for (int64_t start = 0; start < rows; start += lanes) {
    const int64_t count = rows - start < lanes ? rows - start : lanes;
    const In* f = static_cast<const In*>(data) + start * stride;
    V<T> x[FEW], centre, away, expm1 = {}, tail = {}, above = {};
    for (int row = 0; row < lanes; row++) {
      const int64_t i = start + (row < count ? row : 0);
      centre[row] = T(level[i]), away[row] = T(shift[i]);
    }
    for (int64_t k = 0; k < n; k += lanes) load_columns<T>(f + k, stride, count, n - k < lanes ? n - k : lanes, x + k);
    for (int64_t k = 0; k < n; k++) {
      V<T> rise, beyond;
      exp_beside_1<T>((x[k] - centre) * per_T - away, &rise, &beyond);
      expm1 += rise;
      tail += beyond;
      above += rise > 0 ? rise : V<T>{};
    }
    for (int64_t row = 0; row < count; row++) out[start + row] = {double(expm1[row]), double(tail[row]), double(above[row])};
  }
}

// ---- norms

template <int P, class T> INLINE V<T> integer_power(V<T> x) {
  if constexpr (P == 1) return x;
  else if constexpr (P % 2) return integer_power<P / 2, T>(x) * integer_power<P / 2, T>(x) * x;
  else return integer_power<P / 2, T>(x) * integer_power<P / 2, T>(x);
}

// Sum of y^P, or where there are roots of their products with those.
template <int P, class T> static double sum_of_powers(const T* y, const T* roots, int64_t n) {
  V<T> sums[4] = {}, total = {};
  for_blocks<4, T>(
      y, n, T(0),
      [&](int u, V<T> v, int64_t i, int64_t) __attribute__((always_inline)) {
        const V<T> power = integer_power<P, T>(v);
        sums[u] = roots ? fused(power, load(roots + i), sums[u]) : sums[u] + power;
      },
      [&] { add_up<4, T>(&total, sums); });
  return sum_of<T>(total);
}

template <class T> static double sum_of_powers(const T* y, const T* roots, int64_t n, int p) {
  switch (p) {
    case 1: return sum_of_powers<1, T>(y, roots, n);
    case 2: return sum_of_powers<2, T>(y, roots, n);
    case 3: return sum_of_powers<3, T>(y, roots, n);
    default: return sum_of_powers<4, T>(y, roots, n);
  }
}

// Sums of integer powers 1..6 of y * scale in one pass, as far as `most`; those that are `wanted` are added, times unit^p.
template <int MOST, class T>
static void integer_sums(const T* a, int64_t n, T s1, T s2, uint64_t wanted, double unit, double* sum) {
  constexpr int W = 2;
  V<T> s[MOST][W] = {}, total[MOST] = {};
  for_blocks<W, T>(
      a, n, T(0),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        V<T> y = v * s1 * s2;
        s[0][u] += y;
        if constexpr (MOST >= 2) s[1][u] = fused(y, y, s[1][u]);
        if constexpr (MOST >= 3) {
          V<T> y2 = y * y, y3 = y2 * y;
          s[2][u] += y3;
          s[3][u] += y2 * y2;
          s[4][u] += y2 * y3;
          s[5][u] += y3 * y3;
        }
      },
      [&] { UNROLL for (int p = 0; p < MOST; p++) add_up<W, T>(&total[p], s[p]); });
  double scale = 1;
  for (int p = 0; p < MOST; p++) {
    scale *= unit;
    if (wanted >> (p + 1) & 1) sum[p + 1] += scale * sum_of<T>(total[p]);
  }
}

// Sums of y^multiple, y = |h|^base, times the square root of |h| if that is asked for, of the slots of a group that are
// wanted. ROOTED: of some it is.
template <class T, bool SCALED, bool ROOTED>
static void group_sums(const T* a, int64_t whole, const PowerGroup& group, uint64_t wanted, const NormsState& s, double* sum) {
  // base = high + low, high so short that its product with an exponent is exact
  const T base = T(group.base), high = T(group.high), low = T(group.base - double(high));
  const T shift = T(s.shift), shift_log = T(s.shift_log);
  T power[BLOCK], root[BLOCK];
  bool powers = false;
  for (int j = 0; j < group.multiples; j++) powers |= group.multiple[j] && wanted >> group.slot[j] & 1;
  V<T> sums[4] = {}, total = {}, roots[4] = {}, all_roots = {};
  for_blocks<4, T>(
      a, whole, T(0),
      [&](int u, V<T> v, int64_t i, int64_t) __attribute__((always_inline)) {
        if constexpr (ROOTED) {
          const V<T> square = square_root(v);
          __builtin_memcpy(root + i, &square, sizeof square);
          roots[u] += square;
          if (!powers) return;
        }
        V<T> e, l;
        log2_parts<T>(v, &e, &l);
        if constexpr (SCALED) {
          e -= shift;
          l -= shift_log;
        }
        V<T> y = exp2_sum<T, SCALED>(e * high, e * low + l * base, v == 0);
        if (!SCALED) __builtin_memcpy(power + i, &y, sizeof y);
        sums[u] += y;
      },
      [&] {
        add_up<4, T>(&total, sums);
        if constexpr (ROOTED) add_up<4, T>(&all_roots, roots);
      });
  for (int j = 0; j < group.multiples; j++) {
    if (!(wanted >> group.slot[j] & 1)) continue;
    if (group.multiple[j] == 0) sum[group.slot[j]] += sum_of<T>(all_roots);
    else if (group.multiple[j] == 1 && !group.rooted[j]) sum[group.slot[j]] += sum_of<T>(total);
    else sum[group.slot[j]] += sum_of_powers<T>(power, group.rooted[j] ? root : nullptr, whole, group.multiple[j]);
  }
}

template <class T>
static void group_sums(const T* a, int64_t whole, const PowerGroup& group, uint64_t wanted, const NormsState& s, double* sum) {
  bool some = false, rooted = false;
  for (int j = 0; j < group.multiples; j++) {
    if (!(wanted >> group.slot[j] & 1)) continue;
    some = true;
    rooted |= group.rooted[j];
  }
  if (!some) return;
  if (group.scaled) group_sums<T, true, false>(a, whole, group, wanted, s, sum);
  else if (rooted) group_sums<T, false, true>(a, whole, group, wanted, s, sum);
  else group_sums<T, false, false>(a, whole, group, wanted, s, sum);
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

// What is wanted of any chunk of any row.
template <class T, class In>
static void norms_with_care(const In* h, int64_t n, const NormsPlan& plan, uint64_t wanted, NormsState* state) {
  T a[BLOCK];
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t m = n - start < BLOCK ? n - start : BLOCK;
    const int64_t whole = (m + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;  // the rest is zeros
    double max;
    if (plan.count && wanted & EXTREMES) read_tile<T, true>(h + start, m, a, state, &max);
    else read_tile<T, false>(h + start, m, a, state, &max);
    state->max = max > state->max ? max : state->max;
    if (max == 0 || max == __builtin_inf() || state->nan) continue;
    if (max > state->reference) rescale(plan, state, max);

    const uint64_t integers = wanted & 0x7e;
    if (integers) {
      const int k = -int(state->shift) - 1, k1 = k < -126 ? -126 : k > 126 ? 126 : k;
      const T s1 = T(__builtin_ldexp(1.0, k1)), s2 = T(__builtin_ldexp(1.0, k - k1));
      const double unit = plan.scaled_integers ? 1 : 2 * state->unit;
      if (integers >> 3) integer_sums<6, T>(a, whole, s1, s2, integers, unit, state->sum);
      else if (integers >> 2) integer_sums<2, T>(a, whole, s1, s2, integers, unit, state->sum);
      else integer_sums<1, T>(a, whole, s1, s2, integers, unit, state->sum);
    }
    for (int g = 0; g < plan.groups; g++) group_sums<T>(a, whole, plan.group[g], wanted, *state, state->sum);
  }
}

#if VECTOR_BYTES >= 32
// As for_blocks, but each accumulator has a block of its own, side by side: sums that are added up in the order of the
// blocks are the same for any WIDTH.
template <int WIDTH, class T, int64_t LENGTH, class In, class Step, class Flush>
INLINE void for_blocks_abreast(const In* x, int64_t n, T padding, Step step, Flush flush) {
  constexpr int64_t lanes = Vec<T>::lanes;
  for (int64_t start = 0; start < n; start += WIDTH * LENGTH) {
    if (start + WIDTH * LENGTH <= n) {
      for (int64_t i = start; i < start + LENGTH; i += lanes) {
        UNROLL for (int u = 0; u < WIDTH; u++) step(u, load(x + i + u * LENGTH), i + u * LENGTH, 0);
      }
    } else {
      UNROLL for (int u = 0; u < WIDTH; u++) {
        int64_t i = start + u * LENGTH;
        const int64_t end = i + LENGTH < n ? i + LENGTH : n;
        for (; i + lanes <= end; i += lanes) step(u, load(x + i), i, 0);
        if (i < end) step(u, load_last<T>(x + end, end - i, i, padding), i, lanes - (end - i));
      }
    }
    flush();
  }
}

template <int WIDTH, class T> INLINE void add_in_turn(V<T>* total, V<T>* sums) {
  UNROLL for (int u = 0; u < WIDTH; u++) {
    *total += sums[u];
    sums[u] = V<T>{};
  }
}

// In one pass over at most SPAN elements: the sums of TABLES fractional powers from the table `first` on, and of their
// products with square roots; with the first of them those of square roots and of the INTEGERS first integer powers, and,
// with 6 of those, the extremes. Gives the slots that are done, of all that are wanted: each by itself, or an order's bits
// would hang on those beside it. The others need care: where an element is not finite, or for the tables subnormal, or an
// integer power out of range.
constexpr int64_t SPAN = 2048;

template <int TABLES, int INTEGERS, bool PRODUCTS, class In>
static uint64_t norms_at_once(const In* h, int64_t n, const NormsPlan& plan, int first, const In* next, NormsState* state) {
  typedef V<float> F;
  typedef PowerTable<Vec<float>::lanes> Table;
  constexpr int W = TABLES < 2 && INTEGERS < 6 ? 2 : 1;
  constexpr int EXPONENT = 23 + Table::WINDOW_BITS, MANTISSA = 23 - Table::BITS;  // the bits above these are a place in a table
#if VECTOR_BYTES == 64
  const Table* table = plan.wide + first;
#else
  const Table* table = plan.narrow + first;
#endif
  const F centre = load(table[0].centre);
  const int* product_slot = plan.product_slot + first;
  bool multiplied = false;
  for (int k = 0; k < TABLES && PRODUCTS; k++) multiplied |= product_slot[k] != 0;
  const bool rooted = plan.root || multiplied;
  F low[TABLES + 1], high[TABLES + 1], mantissa[TABLES + 1];
  F power[TABLES + 1][W] = {}, product[TABLES + 1][W] = {}, root[W] = {}, integer[INTEGERS + 1][W] = {};
  F all_power[TABLES + 1] = {}, all_product[TABLES + 1] = {}, all_root = {}, all_integer[INTEGERS + 1] = {}, most = {}, nonzero = {};
  UNROLL for (int k = 0; k < TABLES; k++) {
    low[k] = load(table[k].exponent[0]);
    high[k] = load(table[k].exponent[1]);
    mantissa[k] = load(table[k].mantissa);
  }
  typename MaskOf<float>::type odd{};
  for_blocks_abreast<W, float, 256>(
      h, n, 0.0f,
      [&](int u, F v, int64_t i, int64_t) __attribute__((always_inline)) {
        __builtin_prefetch(next + i);
        const I<float> bits = (I<float>)v, magnitude = bits & 0x7fffffff;
        const F a = (F)magnitude;
        const auto some = unequal(a, F{});
        F square = {};
        if (rooted) root[u] += square = square_root(a);
        if constexpr (TABLES > 0) {
          F scale[TABLES];
          UNROLL for (int k = 0; k < TABLES; k++) scale[k] = exponent_power(low[k], high[k], bits >> 23);
          const I<float> above = magnitude - (Table::WINDOW << 23);
          if (__builtin_expect(any_where(some, above, -1u << EXPONENT), 0)) {
            odd |= odd_numbers(v);
            UNROLL for (int k = 0; k < TABLES; k++) scale[k] *= choose(load(table[k].far), above >> EXPONENT);
          }
          const F m = (F)((bits & 0x007fffff) | 0x3f800000);
          const F t = m * choose(centre, bits >> MANTISSA) - 1.0f;
          F kept[TABLES];
          UNROLL for (int k = 0; k < TABLES; k++) {
            const F c = choose(mantissa[k], bits >> MANTISSA);
            F series = all<float>(table[k].t[Table::DEGREE]);
            UNROLL for (int d = Table::DEGREE - 1; d > 0; d--) series = fused(series, t, all<float>(table[k].t[d]));
            power[k][u] += kept[k] = where(some, scale[k] * fused(c * t, series, c));
          }
          if (PRODUCTS && multiplied)
            UNROLL for (int k = 0; k < TABLES; k++)
              if (product_slot[k]) product[k][u] = fused(kept[k], square, product[k][u]);
        }
        if constexpr (INTEGERS > 0) {
          integer[0][u] += a;
          integer[1][u] = fused(a, a, integer[1][u]);
        }
        if constexpr (INTEGERS == 6) {
          const F a2 = a * a, a3 = a2 * a;
          integer[2][u] += a2 * a;
          integer[3][u] += a2 * a2;
          integer[4][u] += a3 * a2;
          integer[5][u] += a3 * a3;
          most = larger(a, most);
          nonzero = add_where(some, nonzero, all<float>(1.0f));
        }
      },
      [&] {
        UNROLL for (int k = 0; k < TABLES; k++) {
          add_in_turn<W, float>(&all_power[k], power[k]);
          if (PRODUCTS) add_in_turn<W, float>(&all_product[k], product[k]);
        }
        add_in_turn<W, float>(&all_root, root);
        UNROLL for (int p = 0; p < INTEGERS; p++) add_in_turn<W, float>(&all_integer[p], integer[p]);
      });
  uint64_t done = 0;
  auto add = [&](int slot, double sum) {
    state->sum[slot] += sum;
    done |= uint64_t(1) << slot;
  };
  const double roots = sum_of<float>(all_root);
  if (plan.root && first == 0 && roots < __builtin_inf()) add(plan.root, roots);
  for (int k = 0; k < TABLES && !any<float>(odd); k++) {
    if (plan.table_slot[first + k]) add(plan.table_slot[first + k], sum_of<float>(all_power[k]));
    if (product_slot[k]) add(product_slot[k], sum_of<float>(all_product[k]));
  }
  if constexpr (INTEGERS > 0) {
    const double all_of_them = sum_of<float>(all_integer[0]);
    for (int p = 1; p <= INTEGERS; p++) {
      const double sum = sum_of<float>(all_integer[p - 1]);
      // What underflows in a power then counts for nothing in its sum.
      if (all_of_them == 0 || (sum >= 0x1p-70 && sum < __builtin_inf())) add(p, sum);
    }
    if (INTEGERS == 6 && all_of_them < __builtin_inf()) {
      const double max = max_of<float>(most);
      state->max = max > state->max ? max : state->max;
      state->nonzero += sum_of<float>(nonzero);
      done |= EXTREMES;
    }
  }
  return done;
}

template <class In> using AtOnce = uint64_t (*)(const In*, int64_t, const NormsPlan&, int, const In*, NormsState*);

template <int INTEGERS, class In> static AtOnce<In> with_tables(const NormsPlan& plan, int first) {
  switch (plan.tables - first) {
    case 0: return norms_at_once<0, INTEGERS, false, In>;
    case 1: return plan.product_slot[first] ? norms_at_once<1, INTEGERS, true, In> : norms_at_once<1, INTEGERS, false, In>;
    case 2: return norms_at_once<2, INTEGERS, true, In>;
    case 3: return norms_at_once<3, INTEGERS, true, In>;
    default: return norms_at_once<TABLES_AT_ONCE, INTEGERS, true, In>;
  }
}
#endif

template <class In>
static void norms(const void* data, int64_t n, const NormsPlan& plan, const void* next, NormsState* state) {
  typedef typename Arithmetic<In>::type T;
  const In* h = static_cast<const In*>(data);
#if VECTOR_BYTES >= 32
  if constexpr (sizeof(T) == 4) {
    if (plan.tables || plan.root || plan.integers) {
      const AtOnce<In> at_once = plan.extremes || plan.integers >> 3 ? with_tables<6, In>(plan, 0)
                                 : plan.integers                     ? with_tables<2, In>(plan, 0)
                                                                     : with_tables<0, In>(plan, 0);
      for (int64_t start = 0; start < n; start += SPAN) {
        const int64_t m = n - start < SPAN ? n - start : SPAN;
        const In* after = static_cast<const In*>(next) + start;
        uint64_t done = at_once(h + start, m, plan, 0, after, state);
        for (int first = TABLES_AT_ONCE; first < plan.tables; first += TABLES_AT_ONCE)
          done |= with_tables<0, In>(plan, first)(h + start, m, plan, first, after, state);
        if (plan.wanted & ~done) norms_with_care<T>(h + start, m, plan, plan.wanted & ~done, state);
      }
      return;
    }
  }
#endif
  norms_with_care<T>(h, n, plan, plan.wanted, state);
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

static void log1p_of(double* x, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec<double>::lanes) {
    // What rounding took from u counts where log u is small, and there 1 / u is near 2 - u.
    const V<double> v = load(x + i), u = v + 1.0, lost = u < 1.5 ? (v - (u - 1.0)) * (2.0 - u) : V<double>{};
    V<double> e, l;
    log2_parts<double>(u, &e, &l);
    const V<double> y = (e + l) * 0.6931471805599453 + lost;
    __builtin_memcpy(x + i, &y, sizeof y);
  }
}

static void power_of(double* x, int64_t n, double exponent) {
  for (int64_t i = 0; i < n; i += Vec<double>::lanes) {
    const V<double> v = load(x + i);
    V<double> e, l;
    log2_parts<double>(v, &e, &l);
    const V<double> y = (e + l) * exponent, held = y < 1023.5 ? y : all<double>(1023.5);
    V<double> power = exp2_sum<double, true>(held, V<double>{}, v == 0);
    power = y < 1024.0 ? power : all<double>(__builtin_inf());
    __builtin_memcpy(x + i, &power, sizeof power);
  }
}

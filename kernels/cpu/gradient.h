// Norms of last-layer gradients for any distribution q of the label, from a second sweep over a row whose softmax is
// known. Included after rows.h, in the same way.

// n <= BLOCK label probabilities from `start` on, in the arithmetic type: where they lie, or converted to `out`.
template <class T, class In> static const T* converted(const void* x, int64_t start, int64_t n, T* out) {
  for_blocks<1, typename Arithmetic<In>::type>(
      static_cast<const In*>(x) + start, n, typename Arithmetic<In>::type(0),
      [&](int, auto v, int64_t i, int64_t first) __attribute__((always_inline)) {
        constexpr int64_t lanes = Vec<typename Arithmetic<In>::type>::lanes;
        if (first == 0)
          UNROLL for (int64_t k = 0; k < lanes; k++) out[i + k] = T(v[k]);
        else
          for (int64_t k = first; k < lanes; k++) out[i + k - first] = T(v[k]);
      },
      [] {});
  return out;
}

template <class T> static const T* labels_of(const void* q, int type, int64_t start, int64_t n, T* out) {
  if (type == (sizeof(T) == 8 ? FLOAT64 : FLOAT32)) return static_cast<const T*>(q) + start;
  switch (type) {
    case FLOAT16: return converted<T, Half>(q, start, n, out);
    case BFLOAT16: return converted<T, BFloat>(q, start, n, out);
    case FLOAT32: return converted<T, float>(q, start, n, out);
    default: return converted<T, double>(q, start, n, out);
  }
}

// Calls step(u, v, w, i, first), w the q of the elements v, 0 in the padding, and sums up the q: NaN where one is
// negative. done(start, n) after each block.
template <class T, class In, class Step, class Done>
INLINE void for_labels(const In* f, int64_t n, const GradientPlan& g, const GradientRow& row, GradientState* state, Step step,
                       Done done) {
  T held[BLOCK];
  const bool given = g.labels == GIVEN;
  const V<T> uniform = all<T>(T(row.uniform)), nan = all<T>(T(__builtin_nan("")));
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t m = n - start < BLOCK ? n - start : BLOCK;
    const T* q = given ? labels_of<T>(row.labels, row.labels_type, start, m, held) : nullptr;
    V<T> sums[2] = {};
    for_blocks<2, T>(
        f + start, m, minus_inf<T>(),
        [&](int u, V<T> v, int64_t i, int64_t first) __attribute__((always_inline)) {
          V<T> w = uniform;
          if (given) {
            w = first ? load_last<T>(q + m, m - i, i, T(0)) : load(q + i);
            sums[u] += w >= 0 ? w : nan;
          }
          if (first) w = from_lane<T>(first) ? w : V<T>{};
          step(u, v, w, i, first);
        },
        [] {});
    state->labels += take<2, T>(sums);
    done(start, m);
  }
}

// || q - p ||: the differences of a block, then their powers as those of features.
template <class T, class In>
static void gradient_inside(const In* f, int64_t n, const LogitsPlan& plan, const GradientPlan& g, const NormsPlan& norms_plan,
                            const GradientRow& row, GradientState* state) {
  const Softmax<T> softmax(all<T>(T(row.max)), plan);
  const T per_total = T(__builtin_ldexp(1 / row.total, -Vec<T>::scaled)), not_p = T(row.not_p);
  const bool sure = row.total < 2;  // of one class: there q - p = (q - 1) + (1 - p), which keeps 1 - p when q = 1
  T out[BLOCK];
  for_labels<T>(
      f, n, g, row, state,
      [&](int, V<T> v, V<T> w, int64_t i, int64_t first) __attribute__((always_inline)) {
        V<T> d, difference = w - softmax.exp(v, &d) * per_total;
        if (sure) difference = v == softmax.max ? (w - T(1)) + not_p : difference;
        if (first == 0) __builtin_memcpy(out + i, &difference, sizeof difference);
        else
          for (int64_t k = first; k < Vec<T>::lanes; k++) out[i + k - first] = difference[k];
      },
      [&](int64_t, int64_t m) { norms<T>(out, m, norms_plan, out, &state->difference); });
}

// What a class below the maximum, of probability p, has for || e_y - p ||^power, times 2^-row.shift. p <= 1/2 there, so
// that nothing cancels; the maximum is left to the caller, in double.
enum Norm { LINEAR, SQUARE, GENERAL };  // orders 1 and infinity, (1 - p)^power times a number; 2; any

template <class T, int NORM> struct ClassNorm {
  const Softmax<T> powers;  // e^(r z)
  const T order, exponent, power, sum, log_p, shift;
  const bool plain;

  ClassNorm(const LogitsPlan& plan, const GradientPlan& g, const GradientRow& row)
      : powers(all<T>(T(row.max)), NORM == GENERAL ? sharper(plan, g.order) : plan), order(T(g.order)),
        exponent(T(NORM == LINEAR ? g.power : g.power / g.order)), power(T(g.power)), sum(T(row.power_sum)),
        log_p(T(-g.order * row.log_total)), shift(T(row.shift)), plain(NORM != GENERAL && exponent == 1) {}

  inline __attribute__((always_inline)) V<T> operator()(V<T> v, V<T> p) const {
    V<T> x, e, l, held = all<T>(-shift);
    if constexpr (NORM == LINEAR) x = 1 - p;
    if constexpr (NORM == SQUARE) x = (1 - 2 * p) + sum;
    if constexpr (NORM == GENERAL) {
      // (1 - p) (1 + the others' (p_k / (1 - p))^r)^(1/r): no high order underflows
      log2_parts<T>(1 - p, &e, &l);
      V<T> d, others = sum - powers.exp(v, &d) * T(__builtin_ldexp(1.0, -Vec<T>::scaled));
      x = 1 + others * exp2_sum<T, true>(log_p - order * (e + l), V<T>{}, I<T>{});
      held += power * (e + l);
    }
    if (plain) return x;
    log2_parts<T>(x, &e, &l);
    return exp2_sum<T, true>((e + l) * exponent + held, V<T>{}, I<T>{});
  }
};

// Sum of q || e_y - p ||^power over the classes below the maximum; of the maximum, its q alone.
template <class T, int NORM, class In>
static void gradient_outside(const In* f, int64_t n, const LogitsPlan& plan, const GradientPlan& g, const GradientRow& row,
                             GradientState* state) {
  const V<T> max = all<T>(T(row.max));
  const bool predicted = g.labels == PREDICTED, logs = g.labels == LOG_PREDICTED;
  // Where float exponentials vanish and are the weights too, they have a pivot of their own.
  double pivot = row.max;
  if (predicted && row.total - 1 < 0x1p-50) pivot = largest_below<T>(f, n, T(row.max));
  const bool apart = pivot < row.max;
  if (pivot == -__builtin_inf()) return;
  const double unit = __builtin_exp2((pivot - row.max) * plan.scale) / row.total * __builtin_ldexp(1.0, -Vec<T>::scaled);
  const Softmax<T> softmax(all<T>(T(pivot)), plan);
  const ClassNorm<T, NORM> norm(plan, g, row);
  const T per_total = T(unit), log_total = T(row.log_total);
  V<T> sums[2] = {}, tops[2] = {};
  double sum = 0;
  for_labels<T>(
      f, n, g, row, state,
      [&](int u, V<T> v, V<T> w, int64_t, int64_t first) __attribute__((always_inline)) {
        const auto below = unequal(v, max);
        tops[u] = add_where(~below, tops[u], w);
        V<T> d, e = softmax.exp(apart ? (v < max ? v : all<T>(minus_inf<T>())) : v, &d);
        if (predicted) w = e;
        if (logs) {
          w = (v - max) * softmax.high - log_total;
          if (first) w = from_lane<T>(first) ? w : V<T>{};
        }
        sums[u] = add_where(below, sums[u], w * norm(v, e * per_total));
      },
      [&](int64_t, int64_t) { sum += take<2, T>(sums); });
  state->sum += predicted ? unit * sum : sum;
  state->top += take<2, T>(tops);
}

// Over n elements of a row, added to `state`.
template <class In>
static void gradient(const void* data, int64_t n, const LogitsPlan& plan, const GradientPlan& g, const NormsPlan& norms_plan,
                     const GradientRow& row, GradientState* state) {
  typedef typename Arithmetic<In>::type T;
  const In* f = static_cast<const In*>(data);
  if (!g.outside) gradient_inside<T>(f, n, plan, g, norms_plan, row, state);
  else if (g.order == 1 || g.order == __builtin_inf()) gradient_outside<T, LINEAR>(f, n, plan, g, row, state);
  else if (g.order == 2) gradient_outside<T, SQUARE>(f, n, plan, g, row, state);
  else gradient_outside<T, GENERAL>(f, n, plan, g, row, state);
}

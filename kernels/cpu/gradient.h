// Norms of last-layer gradients for any distribution q of the label, from a second sweep over a row whose softmax is
// known. Included by rows.h.

// n <= BLOCK label probabilities in the arithmetic type: where they lie, or converted to `out`.
template <class T, class In> static const T* converted(const In* q, int64_t n, T* out) {
  typedef typename Arithmetic<In>::type From;
  for_blocks<1, From>(
      q, n, From(0),
      [&](int, V<From> v, int64_t i, int64_t first) __attribute__((always_inline)) {
        if (first == 0)
          for (int64_t k = 0; k < Vec<From>::lanes; k++) out[i + k] = T(v[k]);
        else
          for (int64_t k = first; k < Vec<From>::lanes; k++) out[i + k - first] = T(v[k]);
      },
      [] {});
  return out;
}

template <class T> static const T* labels_of(const void* q, int type, int64_t start, int64_t n, T* out) {
  if (type == (sizeof(T) == 8 ? FLOAT64 : FLOAT32)) return static_cast<const T*>(q) + start;
  switch (type) {
    case FLOAT16: return converted<T>(static_cast<const Half*>(q) + start, n, out);
    case BFLOAT16: return converted<T>(static_cast<const BFloat*>(q) + start, n, out);
    case FLOAT32: return converted<T>(static_cast<const float*>(q) + start, n, out);
    default: return converted<T>(static_cast<const double*>(q) + start, n, out);
  }
}

// What a sweep reads and fills.
template <class In> struct Sweep {
  const In* f;
  int64_t n;
  const typename Arithmetic<In>::type* kept;  // the exponentials of f, or null
  const void* q;
  int q_type;
  const LogitsPlan& plan;
  const GradientPlan& gradient;
  const NormsPlan& norms;
  const GradientRow& row;
  GradientState* state;
};

// Calls step(u, v, e, w, i, first) for each vector v, with e its exponentials and w its q, both 0 in the padding, and
// done(n) after each block of n. Adds the q to state->labels, NaN where one is negative.
template <class T, class In, class Step, class Done>
INLINE void for_labels(const Sweep<In>& s, const Softmax<T>& softmax, Step step, Done done) {
  T held[BLOCK];
  const bool given = s.gradient.labels == GIVEN;
  const V<T> uniform = all<T>(T(s.row.uniform)), nan = all<T>(T(__builtin_nan("")));
  for (int64_t start = 0; start < s.n; start += BLOCK) {
    const int64_t m = s.n - start < BLOCK ? s.n - start : BLOCK;
    const T* kept = s.kept ? s.kept + start : nullptr;
    const T* q = given ? labels_of<T>(s.q, s.q_type, start, m, held) : nullptr;
    V<T> sums[2] = {};
    for_blocks<2, T>(
        s.f + start, m, minus_inf<T>(),
        [&](int u, V<T> v, int64_t i, int64_t first) __attribute__((always_inline)) {
          V<T> w = uniform;
          if (given) {
            w = first ? load_last<T>(q + m, m - i, i, T(0)) : load(q + i);
            sums[u] += w >= 0 ? w : nan;
          } else if (first) {
            w = from_lane<T>(first) ? w : V<T>{};
          }
          V<T> d, e = kept ? load(kept + i) : softmax.exp(v, &d);
          step(u, v, e, w, i, first);
        },
        [] {});
    s.state->labels += take<2, T>(sums);
    done(m);
  }
}

// || q - p ||: the differences of a block, then their powers as those of features.
template <class T, class In> static void gradient_inside(const Sweep<In>& s) {
  const Softmax<T> softmax(all<T>(T(s.row.f_max)), s.plan);
  const T per_total = T(__builtin_ldexp(1 / s.row.total, -Vec<T>::scaled)), one_minus_p_max = T(s.row.one_minus_p_max);
  const bool above_half = s.row.total < 2;  // p_max is: then q - p = (q - 1) + (1 - p), which keeps 1 - p where q is 1
  T out[BLOCK];
  for_labels<T>(
      s, softmax,
      [&](int, V<T> v, V<T> e, V<T> w, int64_t i, int64_t) __attribute__((always_inline)) {
        V<T> difference = w - e * per_total;
        if (above_half) difference = v == softmax.pivot ? (w - T(1)) + one_minus_p_max : difference;
        __builtin_memcpy(out + i, &difference, sizeof difference);
      },
      [&](int64_t m) {
        const int64_t padded = (m + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;  // the padding is 0
        norms<T>(out, padded, s.norms, out, &s.state->difference);
      });
}

// || e_y - p ||^power times 2^-row.shift, for a class y below the maximum and its p. There p <= 1/2, so that nothing
// cancels; the maximum's is worked out in double, in gradient.cpp.
// LINEAR: orders 1 and infinity, of which the norm is 2 (1 - p) and 1 - p; SQUARE: order 2; GENERAL: any.
enum Norm { LINEAR, SQUARE, GENERAL };

template <class T, int NORM> struct ClassNorm {
  const Softmax<T> powers;  // e^(r z)
  const double ratio;
  const T exponent, order, power, power_sum, log_p_max, shift;

  ClassNorm(const LogitsPlan& plan, const GradientPlan& g, const GradientRow& row)
      : powers(all<T>(T(row.f_max)), NORM == GENERAL ? sharper(plan, g.order) : plan),
        ratio(NORM == LINEAR ? g.power : g.power / g.order), exponent(T(ratio)), order(T(g.order)), power(T(g.power)),
        power_sum(T(row.power_sum)), log_p_max(T(-g.order * row.log_total)), shift(T(row.shift)) {}

  inline __attribute__((always_inline)) V<T> operator()(V<T> v, V<T> p) const {
    V<T> x, whole, part, log_one_minus_p = {};
    if constexpr (NORM == LINEAR) x = 1 - p;
    if constexpr (NORM == SQUARE) x = (1 - 2 * p) + power_sum;
    if constexpr (NORM == GENERAL) {
      // (1 - p) (1 + the others' (p_k / (1 - p))^r)^(1/r): no high order underflows
      log2_parts<T>(1 - p, &whole, &part);
      log_one_minus_p = whole + part;
      V<T> d, others = power_sum - powers.exp(v, &d) * T(__builtin_ldexp(1.0, -Vec<T>::scaled));
      // log2 of (p_max / (1 - p))^r, the unit of these; at most 0 but for rounding.
      const V<T> log_ratio = log_p_max - order * log_one_minus_p;
      x = 1 + others * exp2_sum<T, true>(log_ratio < 0 ? log_ratio : V<T>{}, V<T>{}, I<T>{});
    }
    if (NORM != GENERAL && ratio == 1) return x;
    if (NORM != GENERAL && ratio == 0.5) return square_root(x);
    log2_parts<T>(x, &whole, &part);
    return exp2_sum<T, true>((whole + part) * exponent + (log_one_minus_p * power - shift), V<T>{}, I<T>{});
  }
};

// Sum of q || e_y - p ||^power over the classes below the maximum; of those at it, q alone.
template <class T, int NORM, class In> static void gradient_outside(const Sweep<In>& s) {
  const V<T> f_max = all<T>(T(s.row.f_max)), half_max = f_max * T(0.5);
  const bool predicted = s.gradient.labels == PREDICTED, logs = s.gradient.labels == LOG_PREDICTED;
  // Where float exponentials vanish and q = p, they are relative to a lower pivot.
  double pivot = s.row.f_max;
  if (predicted && s.row.total - 1 < 0x1p-50) pivot = largest_below<T>(s.f, s.n, T(s.row.f_max));
  if (pivot == -__builtin_inf()) return;
  const bool apart = pivot < s.row.f_max;
  const double p_pivot = __builtin_exp2((pivot - s.row.f_max) * s.plan.scale) / s.row.total;  // perhaps subnormal
  const double descale = __builtin_ldexp(1.0, -Vec<T>::scaled);
  const Softmax<T> softmax(all<T>(T(pivot)), s.plan);
  const ClassNorm<T, NORM> norm(s.plan, s.gradient, s.row);
  const T per_total = T(p_pivot * descale), log_total = T(s.row.log_total * s.row.log_unit);
  const T log_scale = T(softmax.high * s.row.log_unit);
  V<T> sums[2] = {}, q_max[2] = {};
  Total sum;
  for_labels<T>(
      s, softmax,
      [&](int u, V<T> v, V<T> e, V<T> w, int64_t, int64_t first) __attribute__((always_inline)) {
        const auto below = unequal(v, f_max);
        q_max[u] = add_where(~below, q_max[u], w);
        if (apart) {
          V<T> d;
          e = softmax.exp(v < f_max ? v : all<T>(minus_inf<T>()), &d);
        }
        if (predicted) w = e;
        if (logs) {
          w = (v * T(0.5) - half_max) * log_scale * 2 - log_total;  // no difference leaves the type
          if (first) w = from_lane<T>(first) ? w : V<T>{};
        }
        sums[u] = add_where(below, sums[u], w * norm(v, e * per_total));
      },
      [&](int64_t) { sum += take<2, T>(sums), s.state->q_max += take<2, T>(q_max); });
  s.state->sum_below += predicted ? p_pivot * (descale * sum) : sum;
}

template <class In>
static void gradient(const void* f, int64_t n, const void* kept, const void* q, int q_type, const LogitsPlan& plan,
                     const GradientPlan& gradient, const NormsPlan& norms, const GradientRow& row, GradientState* state) {
  typedef typename Arithmetic<In>::type T;
  const Sweep<In> sweep{static_cast<const In*>(f), n, static_cast<const T*>(kept), q, q_type, plan, gradient, norms, row,
                        state};
  if (!gradient.outside) gradient_inside<T>(sweep);
  else if (gradient.order == 1 || gradient.order == __builtin_inf()) gradient_outside<T, LINEAR>(sweep);
  else if (gradient.order == 2) gradient_outside<T, SQUARE>(sweep);
  else gradient_outside<T, GENERAL>(sweep);
}

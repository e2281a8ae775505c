// Rows of few classes: a row a lane. Included by rows.h.

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

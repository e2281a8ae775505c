// Rows of few classes: a row a lane. Included by rows.h.

// As many exponentials are added up before they join the sum: of 48 equal ones one after the other, the rounding errors would
// add up, and a power sum has them r times.
constexpr int64_t PART = 16;

// The sums of softmax.h, and TV, of `rows` rows of n <= FEW elements, a state for each row.
template <class In>
static void few_logits(const void* data, int64_t stride, int64_t rows, int64_t n, const LogitsPlan& plan,
                       LogitsState* states, double* tv) {
  typedef typename Arithmetic<In>::type T;
  constexpr int lanes = Vec<T>::lanes;
  const double descale = __builtin_ldexp(1.0, -Vec<T>::scaled), power = power_of_2_below(plan.temperature);
  const T per_T = T(1 / power);
  const bool more = plan.sums & (SQUARES | PLOGP | SUMLOGP);
  for (int64_t start = 0; start < rows; start += lanes) {
    const int64_t count = rows - start < lanes ? rows - start : lanes;
    const In* f = static_cast<const In*>(data) + start * stride;
    V<T> x[FEW], f_max = all<T>(minus_inf<T>()), nan = {};
    for (int64_t k = 0; k < n; k += lanes) load_columns<T>(f + k, stride, count, n - k < lanes ? n - k : lanes, x + k);
    for (int64_t k = 0; k < n; k++) {
      f_max = larger(x[k], f_max);
      nan = add_where(unequal(x[k], x[k]), nan, all<T>(T(1)));
    }
    V<T> e[FEW], others = {}, exp = {}, squares = {}, exp_d = {}, differences = {}, above = {};
    const Softmax<T> softmax(f_max, plan);
    for (int64_t start_of_part = 0; start_of_part < n && plan.sums; start_of_part += PART) {
      V<T> part = {};
      for (int64_t k = start_of_part; k < n && k < start_of_part + PART; k++) {
        V<T> d;
        e[k] = softmax.exp(x[k], &d);
        const auto below = unequal(x[k], f_max);
        others = add_where(below, others, all<T>(T(1)));
        part = add_where(below, part, e[k]);
      }
      exp += part;
    }
    for (int64_t k = 0; k < n && more; k++) {
      const V<T> d = x[k] - f_max, held = larger(all<T>(softmax.lowest), d);
      squares = add_where(unequal(x[k], f_max), squares, e[k] * e[k]);
      exp_d += e[k] * (held * per_T);
      differences += x[k] * difference_factor<T>() - f_max * difference_factor<T>();
    }
    if (plan.sums & TV) {
      const V<T> per_total = 1 / (all<T>(T(n)) - others + exp * T(descale));
      for (int64_t k = 0; k < n; k++) {
        V<T> p = e[k] * T(descale) * per_total - T(1.0 / double(n));
        above += p > 0 ? p : V<T>{};
      }
    }
    for (int64_t row = 0; row < count; row++) {
      LogitsState* s = states + start + row;
      s->f_max = f_max[row];
      s->n = n;
      s->nan = nan[row] != 0;
      s->ties = n - others[row];
      s->e_below = descale * exp[row];
      if (more) {
        s->squares_below = descale * descale * squares[row];
        s->rest_z = descale * power / plan.temperature * exp_d[row];
        s->differences = differences[row] * (DIFFERENCE / difference_factor<T>());
      }
      if (plan.sums & TV) tv[start + row] = above[row];
      if (sizeof(T) == 4 && plan.sums && s->e_below < 0x1p-128 && __builtin_isfinite(s->f_max) && !s->nan)
        rest_again<T>(f + row * stride, n, plan, s);
    }
    for (int r = 0; r < plan.power_sums; r++) {
      const Softmax<T> sharp(f_max, sharper(plan, plan.power[r]));
      V<T> power = {};
      for (int64_t start_of_part = 0; start_of_part < n; start_of_part += PART) {
        V<T> part = {};
        for (int64_t k = start_of_part; k < n && k < start_of_part + PART; k++) {
          V<T> d;
          part = add_where(unequal(x[k], f_max), part, sharp.exp(x[k], &d));
        }
        power += part;
      }
      for (int64_t row = 0; row < count; row++) states[start + row].powers_below[r] = descale * power[row];
    }
  }
}

#include "state.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastood {

constexpr double NaN = std::numeric_limits<double>::quiet_NaN();
constexpr double INF = std::numeric_limits<double>::infinity();

// ---- logits

void set_scale(LogitsPlan* plan, double scale, double scale_low) {
  constexpr double most_float = std::numeric_limits<float>::max(), most_double = std::numeric_limits<double>::max();
  plan->scale = scale;
  plan->scale_low = scale_low;
  plan->lowest_float = float(-std::min((126 + SCALED_FLOAT) / scale, most_float));
  plan->lowest_double = -std::min((1022 + SCALED_DOUBLE) / scale, most_double);
}

LogitsPlan sharper(const LogitsPlan& plan, double r) {
  LogitsPlan of_power = plan;
  set_scale(&of_power, plan.scale * r, plan.scale_low * r);
  return of_power;
}

// The sums of `s` relative to a larger maximum than its own.
static void lower(const LogitsPlan& plan, LogitsState* s, double max) {
  const double gap = (s->max - max) / plan.temperature;
  s->below += double(s->n) * (s->max * DIFFERENCE - max * DIFFERENCE);
  const double w = std::exp(gap), mass = s->ties + s->exp;
  s->exp_z = w == 0 ? 0 : w * (s->exp_z + gap * mass);
  s->exp = w * mass;
  s->squares = w * w * (s->ties + s->squares);
  for (int r = 0; r < plan.power_sums; r++)
    s->powers[r] = std::exp(gap * plan.power[r]) * (s->ties + s->powers[r]);
  s->ties = 0;
}

void merge(const LogitsPlan& plan, LogitsState* a, const LogitsState& b) {
  LogitsState other = b;
  const bool finite = std::isfinite(a->max) && std::isfinite(other.max);
  if (a->max < other.max) {
    if (finite) lower(plan, a, other.max);
    else if (other.max < INF) a->below = a->n ? -INF : 0;  // all masked so far
    a->max = other.max;
  } else if (other.max < a->max) {
    if (finite) lower(plan, &other, a->max);
    else if (a->max < INF) other.below = other.n ? -INF : 0;
  }
  a->ties += other.ties;
  a->exp += other.exp;
  a->squares += other.squares;
  a->exp_z += other.exp_z;
  a->below += other.below;
  for (int r = 0; r < plan.power_sums; r++) a->powers[r] += other.powers[r];
  a->n += other.n;
  a->nan |= other.nan;
}

// What formulas are made of, of one row.
struct Quantities {
  const LogitsPlan& plan;
  const LogitsState& s;
  double classes, swept, log1p, log_C;

  double fmax() const { return s.max; }
  double T() const { return plan.temperature; }
  double C() const { return classes; }
  double r1() const { return ::fastood::rest(s); }
  double p_max() const { return 1 / (1 + r1()); }
  double log_sum() const { return log1p; }
  double r2() const { return (s.ties - 1) + s.squares; }
  double mean_z() const { return ::fastood::mean_z(plan, s, int64_t(classes)); }
  double tv() const { return swept; }
  double kl_uniform() const { return (log1p - log_C) - mean_z(); }
  // All in doubles: without a weight.
  double rest() const { return r1(); }
  double rest_squares() const { return r2(); }
  double rest_log() const { return log1p; }
  double rest_z() const { return s.exp_z; }
  double log(double x) const { return std::log(x); }
};

// In units of a rest that is next to 0.
struct QuantitiesOfRest : Quantities {
  double log2_rest;
  double r1() const { return 0; }
  double p_max() const { return 1; }
  double r2() const { return 0; }
  double rest() const { return 1; }
  double rest_squares() const { return 0; }
  double log(double x) const { return std::log(x) + 0.6931471805599453 * log2_rest; }
};

double statistic_of_rest(Stat stat, const LogitsPlan& plan, const LogitsState& s, double log2_rest) {
  double value = NaN;
  with_formula(stat, [&](auto formula) { value = formula(QuantitiesOfRest{{plan, s, 0, 0, 0, 0}, log2_rest}); });
  return value;
}

void statistics(Stat stat, int power, const LogitsPlan& plan, const LogitsState* states, int64_t count, int64_t classes,
                const double* swept, const double* log1p, double* out) {
  auto each = [&](auto formula) {
    const double C = double(classes), log_C = stat == Stat::kl_uniform ? std::log(C) : 0;
    for (int64_t i = 0; i < count; i++) {
      const LogitsState& s = states[i];
      if (std::isfinite(s.max) && !s.nan) out[i] = formula(Quantities{plan, s, C, swept[i], log1p[i], log_C});
      else out[i] = !s.nan && ABOUT[int(stat)].infinite ? s.max : NaN;
    }
  };
  switch (stat) {
    case Stat::power_sum:
      return each([&](const Quantities& q) {
        return (q.s.ties + q.s.powers[power]) / std::pow(1 + q.r1(), plan.power[power]);
      });
    case Stat::gradient: return each([](const Quantities& q) { return q.swept; });
    case Stat::gen: return each([](const Quantities&) { return NaN; });  // from the row itself
    default: return with_formula(stat, each);
  }
}

// ---- norms

constexpr int FIRST_GROUP_SLOT = 7;

template <int LANES> static void fill(PowerTable<LANES>* table, double r) {
  typedef PowerTable<LANES> Table;
  // The binomial series to t^5, its last terms folded back by Chebyshev polynomials on |t| <= w.
  const double w2 = 1.0 / ((2 * LANES + 1) * (2 * LANES + 1));
  double b[6] = {1};
  for (int n = 1; n < 6; n++) b[n] = b[n - 1] * (r - n + 1) / n;
  b[1] -= b[5] * w2 * w2 * 5 / 16;
  b[3] += b[5] * w2 * 5 / 4;
  if (Table::DEGREE == 3) {
    b[0] -= b[4] * w2 * w2 / 8;
    b[2] += b[4] * w2;
  }
  for (int n = 0; n <= Table::DEGREE; n++) table->t[n] = float(b[n] / b[0]);
  constexpr int window = 1 << Table::WINDOW_BITS, first = Table::WINDOW;
  for (int i = 0; i < LANES; i++) {
    const double middle = 1 + (i + 0.5) / LANES;
    table->centre[i] = float(1 / middle);
    table->mantissa[i] = float(b[0] * std::pow(double(table->centre[i]), -r));
    table->far[i] = float(std::exp2(r * window * (i < LANES / 2 ? i : i - LANES)));
    if (LANES == 8) {
      table->exponent[0][i] = float(std::exp2(r * i));
      table->exponent[1][(first / 8 + i) % 8] = float(std::exp2(r * (first + 8 * i - 127)));
    }
  }
  for (int i = 0; LANES == 16 && i < window; i++) {
    const int place = (first + i) % window;
    table->exponent[place / LANES][place % LANES] = float(std::exp2(r * (first + i - 127)));
  }
}

static int table_of(double r, NormsPlan* plan) {
  for (int k = 0; k < plan->tables; k++)
    if (plan->table_order[k] == r) return k;
  plan->table_order[plan->tables] = r;
  fill(&plan->wide[plan->tables], r);
  fill(&plan->narrow[plan->tables], r);
  return plan->tables++;
}

void plan_norms(const double* orders, int count, bool float32, NormsPlan* plan, Order* out) {
  *plan = NormsPlan{};
  plan->slots = FIRST_GROUP_SLOT;
  plan->scaled_integers = !float32;
  for (int p = 1; p <= 6; p++) plan->order[p] = p, plan->scaled[p] = true;
  for (int j = 0; j < count; j++) {
    const double r = orders[j] > (float32 ? 1e9 : 1e18) ? INF : orders[j];  // from which no sum can tell it
    const int same = int(std::find(orders, orders + j, orders[j]) - orders);
    if (same < j) {
      out[j] = out[same];
      continue;
    }
    if (r == 0 || r == INF) {
      plan->extremes = true;
      plan->wanted |= EXTREMES;
      plan->count |= r == 0;
      out[j] = {r, -1};
      continue;
    }
    if (r <= 6 && r == std::floor(r)) {
      plan->integers |= 1 << int(r);
      plan->wanted |= 1 << int(r);
      out[j] = {r, int(r)};
      continue;
    }
    const int tenths = int(std::round(r / 0.1));
    const bool shares = r <= UNSCALED && tenths >= 1 && std::fabs(tenths * 0.1 - r) <= 1e-15 * r;
    const double base = shares ? 0.1 : r;
    int g = 0;
    while (g < plan->groups && !(plan->group[g].base == base)) g++;
    PowerGroup& group = plan->group[g];
    if (g == plan->groups) {
      int exponent;
      const double mantissa = std::frexp(base, &exponent);
      const int bits = float32 ? 12 : 40;
      group.base = base;
      group.high = std::ldexp(std::round(std::ldexp(mantissa, bits)), exponent - bits);
      group.scaled = r > UNSCALED;
      plan->groups++;
    }
    const int slot = plan->slots++;
    group.rooted[group.multiples] = shares && tenths >= 5;
    group.multiple[group.multiples] = shares ? tenths % 5 : 1;
    group.slot[group.multiples++] = slot;
    plan->order[slot] = r;
    plan->scaled[slot] = group.scaled;
    out[j] = {r, slot};
    plan->wanted |= uint64_t(1) << slot;
    if (float32 && r == 0.5) plan->root = slot;
    else if (float32 && r < 0.5) plan->table_slot[table_of(r, plan)] = slot;
    else if (float32 && r <= UNSCALED) plan->product_slot[table_of(std::round((r - 0.5) * 1e12) / 1e12, plan)] = slot;
  }
}

void clear(const NormsPlan& plan, NormsState* s) {
  s->max = s->reference = s->shift = s->shift_log = s->nonzero = 0;
  s->unit = 1;
  s->nan = false;
  for (int slot = 0; slot < plan.slots; slot++) s->sum[slot] = 0;
}

void rescale(const NormsPlan& plan, NormsState* s, double max) {
  const double shift = std::ilogb(max);
  if (s->reference > 0) {
    for (int p = 1; p < FIRST_GROUP_SLOT && plan.scaled_integers; p++) s->sum[p] *= std::exp2(p * (s->shift - shift));
    for (int slot = FIRST_GROUP_SLOT; slot < plan.slots; slot++)
      if (plan.scaled[slot]) s->sum[slot] *= std::pow(s->reference / max, plan.order[slot]);
  }
  s->reference = max;
  s->shift = shift;
  s->unit = std::exp2(shift);
  s->shift_log = std::log2(std::ldexp(max, -int(shift)));
}

void merge(const NormsPlan& plan, NormsState* a, const NormsState& b) {
  NormsState other = b;
  if (other.reference > a->reference) rescale(plan, a, other.reference);
  else if (other.reference > 0 && other.reference < a->reference) rescale(plan, &other, a->reference);
  for (int slot = 1; slot < plan.slots; slot++) a->sum[slot] += other.sum[slot];
  a->max = other.max > a->max ? other.max : a->max;
  a->nonzero += other.nonzero;
  a->nan |= other.nan;
}

double sum_of_powers(const Order& order, const NormsState& s) { return order.slot < 0 ? 0 : s.sum[order.slot]; }

// Scaled integer powers are of |h| / 2^(shift + 1), other scaled ones of |h| / reference.
static bool integer(const Order& order) { return order.slot < FIRST_GROUP_SLOT; }

double norm(const Order& order, const NormsPlan& plan, const NormsState& s, double root) {
  if (s.nan) return NaN;
  if (order.r == 0) return s.nonzero;
  if (order.r == INF || s.max == INF) return s.max;
  if (integer(order)) return plan.scaled_integers ? 2 * root * s.unit : root;
  return plan.scaled[order.slot] ? s.reference * root : root;
}

void norms_from_roots(const Order& order, const NormsPlan& plan, const NormsState* states, int64_t count, const double* root,
                      double* out) {
  for (int64_t i = 0; i < count; i++) {
    out[i] = norm(order, plan, states[i], root[i]);
    if (states[i].max < INF) out[i] = std::min(out[i], std::numeric_limits<double>::max());  // finite, as the features are
  }
}

double log_norm(const Order& order, const NormsPlan& plan, const NormsState& s) {
  if (s.nan) return NaN;
  if (order.r == 0) return std::log(s.nonzero);
  if (order.r == INF || s.max == INF) return std::log(s.max);
  const double log = std::log(sum_of_powers(order, s)) / order.r;
  if (integer(order)) return plan.scaled_integers ? (s.shift + 1) * 0.6931471805599453 + log : log;
  return plan.scaled[order.slot] ? std::log(s.reference) + log : log;
}

}  // namespace fastood

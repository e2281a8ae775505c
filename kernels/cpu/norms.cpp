// What the sums of a row of features come to: orders are planned, chunks merged, roots taken. Scalar double arithmetic.
#include "state.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastood {

constexpr double NaN = std::numeric_limits<double>::quiet_NaN();
constexpr double INF = std::numeric_limits<double>::infinity();

constexpr int FIRST_GROUP_SLOT = 7;

template <int LANES> static void fill(PowerTable<LANES>* table, double r) {
  typedef PowerTable<LANES> Table;
  // The binomial series to x^5, its last terms folded back by Chebyshev polynomials on |x| <= w.
  const double w2 = 1.0 / ((2 * LANES + 1) * (2 * LANES + 1));
  double b[6] = {1};
  for (int n = 1; n < 6; n++) b[n] = b[n - 1] * (r - n + 1) / n;
  b[1] -= b[5] * w2 * w2 * 5 / 16;
  b[3] += b[5] * w2 * 5 / 4;
  if (Table::DEGREE == 3) {
    b[0] -= b[4] * w2 * w2 / 8;
    b[2] += b[4] * w2;
  }
  for (int n = 0; n <= Table::DEGREE; n++) table->series[n] = float(b[n] / b[0]);
  constexpr int window = 1 << Table::WINDOW_BITS, first = Table::WINDOW;
  for (int i = 0; i < LANES; i++) {
    const double middle = 1 + (i + 0.5) / LANES;
    table->per_middle[i] = float(1 / middle);
    table->mantissa[i] = float(b[0] * std::pow(double(table->per_middle[i]), -r));
    table->outside[i] = float(std::exp2(r * window * (i < LANES / 2 ? i : i - LANES)));
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
    // Beyond these no sum tells an order from INF, and rounding may take the power of the largest itself for 0.
    const double r = orders[j] > (float32 ? 0x1p28 : 1e18) ? INF : orders[j];
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
  s->max = s->unit = s->shift = s->shift_fraction = s->nonzero = 0;
  s->unit_whole = 1;
  s->nan = false;
  for (int slot = 0; slot < plan.slots; slot++) s->sum[slot] = 0;
}

void rescale(const NormsPlan& plan, NormsState* s, double unit) {
  const double shift = std::ilogb(unit);
  if (s->unit > 0) {
    for (int p = 1; p < FIRST_GROUP_SLOT && plan.scaled_integers; p++) s->sum[p] *= std::exp2(p * (s->shift - shift));
    for (int slot = FIRST_GROUP_SLOT; slot < plan.slots; slot++)
      if (plan.scaled[slot]) s->sum[slot] *= std::pow(s->unit / unit, plan.order[slot]);
  }
  s->unit = unit;
  s->shift = shift;
  s->unit_whole = std::exp2(shift);
  s->shift_fraction = std::log2(std::ldexp(unit, -int(shift)));
}

void merge(const NormsPlan& plan, NormsState* a, const NormsState& b) {
  NormsState other = b;
  if (other.unit > a->unit) rescale(plan, a, other.unit);
  else if (other.unit > 0 && other.unit < a->unit) rescale(plan, &other, a->unit);
  for (int slot = 1; slot < plan.slots; slot++) a->sum[slot] += other.sum[slot];
  a->max = other.max > a->max ? other.max : a->max;
  a->nonzero += other.nonzero;
  a->nan |= other.nan;
}

double sum_of_powers(const Order& order, const NormsState& s) { return order.slot < 0 ? 0 : s.sum[order.slot]; }

// Scaled integer powers are of |h| / (2 unit_whole), other scaled ones of |h| / unit.
static bool integer(const Order& order) { return order.slot < FIRST_GROUP_SLOT; }

double norm(const Order& order, const NormsPlan& plan, const NormsState& s, double root) {
  if (s.nan) return NaN;
  if (order.r == 0) return s.nonzero;
  if (order.r == INF || s.max == INF) return s.max;
  if (integer(order)) return plan.scaled_integers ? 2 * root * s.unit_whole : root;
  return plan.scaled[order.slot] ? s.unit * root : root;
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
  return plan.scaled[order.slot] ? std::log(s.unit) + log : log;
}

}  // namespace fastood

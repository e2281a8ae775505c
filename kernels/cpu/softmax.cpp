// What the sums of a row of logits come to: chunks merged, and statistics made of them. Scalar double arithmetic.
#include "state.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastood {

constexpr double NaN = std::numeric_limits<double>::quiet_NaN();
constexpr double INF = std::numeric_limits<double>::infinity();

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
static void lower(const LogitsPlan& plan, LogitsState* s, double f_max) {
  const double gap = (s->f_max - f_max) / plan.temperature;
  s->differences += double(s->n) * (s->f_max * DIFFERENCE - f_max * DIFFERENCE);
  const double weight = std::exp(gap), total = s->ties + s->e_below;
  s->rest_z = weight == 0 ? 0 : weight * (s->rest_z + gap * total);
  s->e_below = weight * total;
  s->squares_below = weight * weight * (s->ties + s->squares_below);
  for (int r = 0; r < plan.power_sums; r++)
    s->powers_below[r] = std::exp(gap * plan.power[r]) * (s->ties + s->powers_below[r]);
  s->ties = 0;
}

void merge(const LogitsPlan& plan, LogitsState* a, const LogitsState& b) {
  LogitsState other = b;
  const bool finite = std::isfinite(a->f_max) && std::isfinite(other.f_max);
  if (a->f_max < other.f_max) {
    if (finite) lower(plan, a, other.f_max);
    else if (other.f_max < INF) a->differences = a->n ? -INF : 0;  // all masked so far
    a->f_max = other.f_max;
  } else if (other.f_max < a->f_max) {
    if (finite) lower(plan, &other, a->f_max);
    else if (a->f_max < INF) other.differences = other.n ? -INF : 0;
  }
  a->ties += other.ties;
  a->e_below += other.e_below;
  a->squares_below += other.squares_below;
  a->rest_z += other.rest_z;
  a->differences += other.differences;
  for (int r = 0; r < plan.power_sums; r++) a->powers_below[r] += other.powers_below[r];
  a->n += other.n;
  a->nan |= other.nan;
}

// What formulas are made of, of one row.
struct Quantities {
  const LogitsPlan& plan;
  const LogitsState& s;
  double classes, swept, log1p, log_C;

  double fmax() const { return s.f_max; }
  double T() const { return plan.temperature; }
  double C() const { return classes; }
  double r1() const { return ::fastood::rest(s); }
  double p_max() const { return 1 / (1 + r1()); }
  double log_sum() const { return log1p; }
  double r2() const { return (s.ties - 1) + s.squares_below; }
  double mean_z() const { return ::fastood::mean_z(plan, s, int64_t(classes)); }
  double tv() const { return swept; }
  double kl_uniform() const { return (log1p - log_C) - mean_z(); }
  // All in doubles: without a weight.
  double rest() const { return r1(); }
  double rest_squares() const { return r2(); }
  double rest_log() const { return log1p; }
  double rest_z() const { return s.rest_z; }
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
      if (std::isfinite(s.f_max) && !s.nan) out[i] = formula(Quantities{plan, s, C, swept[i], log1p[i], log_C});
      else out[i] = !s.nan && ABOUT[int(stat)].infinite ? s.f_max : NaN;
    }
  };
  switch (stat) {
    case Stat::power_sum:
      return each([&](const Quantities& row) {
        return (row.s.ties + row.s.powers_below[power]) / std::pow(1 + row.r1(), plan.power[power]);
      });
    case Stat::gradient: return each([](const Quantities& row) { return row.swept; });
    case Stat::gen: return each([](const Quantities&) { return NaN; });  // from the row itself
    default: return with_formula(stat, each);
  }
}

}  // namespace fastood

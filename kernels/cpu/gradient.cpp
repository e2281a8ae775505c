// Norms of last-layer gradients: what the kernel in gradient.h is told of a row, and what is made of its sums.
#include <algorithm>
#include <cmath>

#include "run.h"

namespace fastood {

// x^r, at once for the few r that are usual.
static double raised(double x, double r) { return r == 1 ? x : r == 2 ? x * x : r == 0.5 ? std::sqrt(x) : std::pow(x, r); }

GradientRow gradient_row(const Call& call, const LogitsState& s) {
  const GradientPlan& g = call.plan.gradient;
  const double r1 = rest(s), total = 1 + r1;
  GradientRow row{s.f_max, total, std::log2(total), r1 / total, 1.0 / double(call.logits.columns), 0, 0, 1};
  if (!g.outside || g.order == 1 || g.order == INFINITY) return row;
  row.power_sum = g.order == 2 ? (s.ties + s.squares_below) / (total * total) : s.ties + s.powers_below[0];
  if (g.power > g.order) {  // below the maximum, where p <= 1/2, || e_y - p ||^power is between 2^-power and 2^shift
    const double others = g.order == 2 ? row.power_sum : row.power_sum * std::pow(std::min(1.0, 2 / total), g.order);
    row.shift = std::log2(1 + others) * g.power / g.order;
  }
  return row;
}

void merge(const Call& call, GradientState* a, const GradientState& b) {
  a->sum_below += b.sum_below;
  a->q_max += b.q_max;
  a->labels += b.labels;
  merge(call.gradient_norms(), &a->difference, b.difference);
}

// log2 of the sum of e^(rz) but for one maximum; from the row itself where float exponentials may have vanished.
static double log2_others(const Call& call, int64_t row, const LogitsState& s, double r, double sum_below) {
  if (s.ties > 1 || sum_below > 0x1p-100) return std::log2((s.ties - 1) + sum_below);
  const LogitsPlan plan = sharper(call.plan.logits, r);
  return kernels->log2_rest[call.logits.type](call.logits.at(row, 0), call.logits.columns, plan, s.f_max);
}

// || e_y - p ||^power, y the maximum, without its 2^power where the order is 1.
static double norm_of_max(const Call& call, int64_t row, const LogitsState& s, const GradientRow& about) {
  const GradientPlan& g = call.plan.gradient;
  const bool linear = g.order == 1 || g.order == INFINITY;
  if (linear && about.one_minus_p_max > 0x1p-100) return raised(about.one_minus_p_max, g.power);
  if (g.order == 2 && about.one_minus_p_max > 0x1p-100) {
    const double others = ((s.ties - 1) + s.squares_below) / (about.total * about.total);
    return raised(about.one_minus_p_max * about.one_minus_p_max + others, g.power / 2);
  }
  const double log_one_minus_p_max = log2_others(call, row, s, 1, s.e_below) - about.log_total;
  if (log_one_minus_p_max == -INFINITY) return 0;
  if (linear) return std::exp2(g.power * log_one_minus_p_max);
  // (1 - p) (1 + sum of the others' (p_k / (1 - p))^order)^(1 / order)
  const double log_sum = log2_others(call, row, s, g.order, g.order == 2 ? s.squares_below : s.powers_below[0]);
  // The difference of two logarithms that may be large: ratios that add up to 1 have powers that add up to between 1 and
  // C^(1 - order).
  const double limit = (1 - g.order) * std::log2(double(call.logits.columns));
  double log_ratio = log_sum - g.order * (about.log_total + log_one_minus_p_max);
  log_ratio = std::min(std::max(log_ratio, std::min(limit, 0.0)), std::max(limit, 0.0));
  return std::exp2(g.power * log_one_minus_p_max + g.power / g.order * std::log2(1 + std::exp2(log_ratio)));
}

// x y, where what has no weight does not count even if it has overflowed.
static double weighed(double x, double y) { return x == 0 ? 0 : x * y; }

double gradient(const Call& call, int64_t row, const LogitsState& s, const GradientRow& about,
                const GradientState& state) {
  const GradientPlan& g = call.plan.gradient;
  if (g.labels == PREDICTED && !g.outside) return 0;  // E_p[e_Y - p] = 0, exactly
  // Probabilities in a half type do not sum to 1 exactly.
  if (g.labels == GIVEN && !(std::fabs(state.labels - 1) < 1e-2)) return NAN;
  if (!g.outside) {
    const Order& order = call.gradient_order();
    const double root = raised(sum_of_powers(order, state.difference), 1 / order.r);
    return raised(norm(order, call.gradient_norms(), state.difference, root), g.power);
  }
  const double q_max = g.labels == PREDICTED       ? s.ties / about.total
                       : g.labels == LOG_PREDICTED ? -s.ties * std::log1p(about.total - 1)
                                                   : state.q_max;
  const double unit = g.labels == LOG_PREDICTED ? 0.6931471805599453 : 1;
  const double sum_below = weighed(state.sum_below, std::exp2(about.shift)) * unit;
  return (sum_below + weighed(q_max, norm_of_max(call, row, s, about))) * (g.order == 1 ? std::exp2(g.power) : 1);
}

}  // namespace fastood

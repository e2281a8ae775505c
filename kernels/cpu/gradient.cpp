// Norms of last-layer gradients: what the kernel in gradient.h is told of a row, and what is made of its sums.
#include <algorithm>
#include <cmath>

#include "run.h"

namespace fastood {

// x^r, at once for the few r that are usual.
static double raised(double x, double r) { return r == 1 ? x : r == 2 ? x * x : r == 0.5 ? std::sqrt(x) : std::pow(x, r); }

GradientRow gradient_row(const Request& q, const LogitsState& s) {
  const GradientPlan& g = q.plan.gradient;
  const double r1 = rest(s), total = 1 + r1;
  GradientRow row{s.max, total, std::log2(total), r1 / total, 1.0 / double(q.logits.columns), 0, 0};
  if (!g.outside || g.order == 1 || g.order == INFINITY) return row;
  row.power_sum = g.order == 2 ? (s.ties + s.squares) / (total * total) : s.ties + s.powers[0];
  if (g.power > g.order) {  // below the maximum, where p <= 1/2, || e_y - p ||^power is between 2^-power and 2^shift
    const double others = g.order == 2 ? row.power_sum : row.power_sum * std::pow(std::min(1.0, 2 / total), g.order);
    row.shift = std::log2(1 + others) * g.power / g.order;
  }
  return row;
}

void merge(const Request& q, GradientState* a, const GradientState& b) {
  a->sum += b.sum;
  a->top += b.top;
  a->labels += b.labels;
  merge(q.gradient_norms(), &a->difference, b.difference);
}

// log2 of the sum of e^(rz) but for one maximum; from the row itself where float exponentials may have vanished.
static double log2_others(const Request& q, int64_t row, const LogitsState& s, double r, double below) {
  if (s.ties > 1 || below > 0x1p-100) return std::log2((s.ties - 1) + below);
  const LogitsPlan plan = sharper(q.plan.logits, r);
  return kernels->log2_rest[q.logits.type](q.logits.at(row, 0), q.logits.columns, plan, s.max);
}

// || e_y - p ||^power, y the maximum, without its 2^power where the order is 1.
static double norm_of_top(const Request& q, int64_t row, const LogitsState& s, const GradientRow& about) {
  const GradientPlan& g = q.plan.gradient;
  const bool linear = g.order == 1 || g.order == INFINITY;
  if (linear && about.not_p > 0x1p-100) return raised(about.not_p, g.power);
  if (g.order == 2 && about.not_p > 0x1p-100)
    return raised(about.not_p * about.not_p + ((s.ties - 1) + s.squares) / (about.total * about.total), g.power / 2);
  const double log_not_p = log2_others(q, row, s, 1, s.exp) - about.log_total;
  if (log_not_p == -INFINITY) return 0;
  if (linear) return std::exp2(g.power * log_not_p);
  // (1 - p) (1 + sum of the others' (p_k / (1 - p))^order)^(1 / order)
  const double log_sum = log2_others(q, row, s, g.order, g.order == 2 ? s.squares : s.powers[0]);
  // The difference of two logarithms that may be large: ratios that add up to 1 have powers that add up to between 1 and
  // C^(1 - order).
  const double limit = (1 - g.order) * std::log2(double(q.logits.columns));
  double log_ratio = log_sum - g.order * (about.log_total + log_not_p);
  log_ratio = std::min(std::max(log_ratio, std::min(limit, 0.0)), std::max(limit, 0.0));
  return std::exp2(g.power * log_not_p + g.power / g.order * std::log2(1 + std::exp2(log_ratio)));
}

double gradient(const Request& q, int64_t row, const LogitsState& s, const GradientRow& about, const GradientState& state) {
  const GradientPlan& g = q.plan.gradient;
  if (g.labels == PREDICTED && !g.outside) return 0;  // E_p[e_Y - p] = 0, exactly
  // Probabilities in a half type do not sum to 1 exactly.
  if (g.labels == GIVEN && !(std::fabs(state.labels - 1) < 1e-2)) return NAN;
  if (!g.outside) {
    const Order& order = q.gradient_order();
    const double root = raised(sum_of_powers(order, state.difference), 1 / order.r);
    return raised(norm(order, q.gradient_norms(), state.difference, root), g.power);
  }
  const double top = g.labels == PREDICTED       ? s.ties / about.total
                     : g.labels == LOG_PREDICTED ? -s.ties * std::log1p(about.total - 1)
                                                 : state.top;
  const double below = state.sum * std::exp2(about.shift) * (g.labels == LOG_PREDICTED ? 0.6931471805599453 : 1);
  return (below + top * norm_of_top(q, row, s, about)) * (g.order == 1 ? std::exp2(g.power) : 1);
}

}  // namespace fastood

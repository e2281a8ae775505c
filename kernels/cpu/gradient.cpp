// Norms of last-layer gradients: what the kernel in gradient.h is told of a row, and what is made of its sums.
#include <algorithm>
#include <cmath>

#include "run.h"

namespace fastood {

static GradientRow known(const Request& q, int64_t row, const LogitsState& s) {
  const GradientPlan& g = q.plan.gradient;
  const double r1 = rest(s), total = 1 + r1;
  GradientRow known{s.max, total, std::log2(total), r1 / total, 1.0 / double(q.logits.columns), 0, 0, nullptr, q.labels.type};
  if (!g.outside || g.order == 1 || g.order == INFINITY) return known;
  known.power_sum = g.order == 2 ? (s.ties + s.squares) / (total * total) : s.ties + s.powers[0];
  // || e_y - p ||^power below the maximum, where p <= 1/2: between 2^-power and this.
  const double others = g.order == 2 ? known.power_sum : known.power_sum * std::pow(std::min(1.0, 2 / total), g.order);
  if (g.power != g.order) known.shift = std::log2(1 + others) * g.power / g.order;
  return known;
}

void gradient_chunk(const Request& q, int64_t row, int64_t start, int64_t n, const LogitsState& s, GradientState* state) {
  GradientRow about = known(q, row, s);
  if (q.labels.data) about.labels = q.labels.at(row, start);
  kernels->gradient[q.logits.type](q.logits.at(row, start), n, q.plan.logits, q.plan.gradient, q.gradient_norms(), about, state);
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

// || e_y - p ||^power, y the maximum: (1 - p) (1 + sum of the others' (p_k / (1 - p))^order)^(1 / order).
static double norm_of_top(const Request& q, int64_t row, const LogitsState& s, double log_total) {
  const GradientPlan& g = q.plan.gradient;
  const double log_not_p = log2_others(q, row, s, 1, s.exp) - log_total;
  if (log_not_p == -INFINITY) return 0;
  if (g.order == 1 || g.order == INFINITY) return std::exp2(g.power * log_not_p);
  const double log_others = log2_others(q, row, s, g.order, g.order == 2 ? s.squares : s.powers[0]) - g.order * log_total;
  return std::exp2(g.power * log_not_p + g.power / g.order * std::log2(1 + std::exp2(log_others - g.order * log_not_p)));
}

double gradient(const Request& q, int64_t row, const LogitsState& s, const GradientState& state) {
  const GradientPlan& g = q.plan.gradient;
  // Probabilities in a half type do not sum to 1 exactly.
  if (g.labels == GIVEN && !(std::fabs(state.labels - 1) < 1e-2)) return NAN;
  if (!g.outside) {
    const Order& order = q.gradient_order();
    const double sum = sum_of_powers(order, state.difference);
    return std::pow(norm(order, q.gradient_norms(), state.difference, order.r == 2 ? std::sqrt(sum) : std::pow(sum, 1 / order.r)), g.power);
  }
  const GradientRow about = known(q, row, s);
  const double top = g.labels == PREDICTED       ? s.ties / about.total
                     : g.labels == LOG_PREDICTED ? -s.ties * std::log1p(about.total - 1)
                                                 : state.top;
  const double below = state.sum * std::exp2(about.shift) * (g.labels == LOG_PREDICTED ? 0.6931471805599453 : 1);
  return (below + top * norm_of_top(q, row, s, about.log_total)) * (g.order == 1 ? std::exp2(g.power) : 1);
}

}  // namespace fastood

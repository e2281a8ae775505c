// Merging partial sums and turning them into statistics: scalar double arithmetic, a few operations per row.
#pragma once

#include "plan.h"

namespace fastood {

// What an order r of a norm is made from.
struct Order {
  double r;
  int slot;  // in NormsState.sum; -1 for r = 0 and infinity
};

void merge(const LogitsPlan& plan, LogitsState* a, const LogitsState& b);
inline double rest(const LogitsState& s) { return (s.ties - 1) + s.e_below; }
// mean z; finite where the sum of z, or one z, is not.
inline double mean_z(const LogitsPlan& plan, const LogitsState& s, int64_t classes) {
  return s.differences / double(classes) / (plan.temperature * DIFFERENCE);
}
// Whether a row is so near the uniform distribution that its sums do not tell KL(u || p), or TV; `value` is what they gave,
// false for NaN.
inline bool nearly_flat(Stat stat, double value, const LogitsPlan& plan, const LogitsState& s, int64_t classes) {
  if (stat == Stat::tv) return value < FLAT_TV;
  return value < FLAT_KL || value < -FLAT_KL_SHARE * mean_z(plan, s, classes);
}

// One statistic of `count` rows. log1p: their log (1 + r1); swept: their TV or gradient norm, from a second sweep.
void statistics(Stat stat, int power, const LogitsPlan& plan, const LogitsState* states, int64_t count, int64_t classes,
                const double* swept, const double* log1p, double* out);
// A statistic that is a logarithm, of a row whose rest is next to 0: from log2 of the rest.
double statistic_of_rest(Stat stat, const LogitsPlan& plan, const LogitsState& s, double log2_rest);

void plan_norms(const double* orders, int count, bool float32, NormsPlan* plan, Order* out);
void clear(const NormsPlan& plan, NormsState* s);
void merge(const NormsPlan& plan, NormsState* a, const NormsState& b);
// ||h||_r from the sum of powers and from its root sum^(1/r).
double sum_of_powers(const Order& order, const NormsState& s);
double norm(const Order& order, const NormsPlan& plan, const NormsState& s, double root);
void norms_from_roots(const Order& order, const NormsPlan& plan, const NormsState* states, int64_t count, const double* root,
                      double* out);
double log_norm(const Order& order, const NormsPlan& plan, const NormsState& s);

}  // namespace fastood

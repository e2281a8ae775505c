// Merging partial sums and turning them into statistics: scalar double arithmetic, a few operations per row.
#pragma once

#include "plan.h"

namespace fastood {

// The statistics of kernels/__init__.py, in its order.
enum Stat : int {
  FMAX, LSE, ENERGY, MSP, ONE_MINUS_MSP, LOG_MSP, S2, ONE_MINUS_S2, TOTAL_VARIATION, PLOGP_STAT, SUMLOGP_STAT, POWER_SUM, GEN
};

// What an order r of a norm is made from.
struct Order {
  double r;
  int slot;  // in NormsState.sum; -1 for r = 0 and infinity
};

int sums_for(int stat);
void merge(const LogitsPlan& plan, LogitsState* a, const LogitsState& b);
double statistic(int stat, int power, const LogitsPlan& plan, const LogitsState& s, int64_t classes, double tv);

void plan_norms(const double* orders, int count, bool float32, NormsPlan* plan, Order* out);
void merge(const NormsPlan& plan, NormsState* a, const NormsState& b);
double norm(const Order& order, const NormsPlan& plan, const NormsState& s, bool log);

}  // namespace fastood

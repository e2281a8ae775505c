// A plan: what is wanted. A request: one call of it, what is read and where it goes.
#pragma once

#include <vector>

#include "state.h"

namespace fastood {

struct Matrix {
  const char* data = nullptr;
  int type = FLOAT32;
  int64_t columns = 0, stride = 0;  // stride in elements

  const void* at(int64_t row, int64_t column) const {
    static constexpr int size[TYPES] = {2, 2, 4, 8};
    return data + (row * stride + column) * size[type];
  }
};

// factor * stats[stat] * (norms[order] / divisor)^power; -1 for a term that is not there
struct Product {
  int stat, order, power;
  double factor, divisor;
};

// What is wanted, worked out once for many calls.
struct Plan {
  LogitsPlan logits{};
  NormsPlan norms[2]{};  // for float32 arithmetic, and for float64
  std::vector<Order> orders[2];
  bool bias = false, log = false;
  std::vector<int> stats, power_of_stat;
  std::vector<Product> products;
};

struct Request {
  const Plan& plan;
  int64_t rows = 0;
  Matrix logits, feats;
  // Either the statistics themselves ...
  double* stats_out = nullptr;  // [stats, rows]
  double* norms_out = nullptr;  // [rows, orders]
  // ... or finished products, float or double.
  void* out = nullptr;
  bool out_double = false;
  int64_t row_stride = 0, product_stride = 0;

  const NormsPlan& norms_plan() const { return plan.norms[feats.type == FLOAT64]; }
  const std::vector<Order>& orders() const { return plan.orders[feats.type == FLOAT64]; }
};

// torch_parallel_for of libtorch_cpu, or null for one thread
typedef int (*ParallelFor)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
extern ParallelFor parallel_for;

// The instruction set in use.
extern const Kernels* kernels;

void run(const Request& q);

}  // namespace fastood

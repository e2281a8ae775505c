// One call: what is read, what is wanted, where it goes.
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

struct Request {
  int64_t rows = 0;
  Matrix logits, feats;
  LogitsPlan logits_plan{};
  NormsPlan norms_plan{};
  bool bias = false, log = false;
  std::vector<int> stats, power_of_stat;
  std::vector<Order> orders;
  // Either the statistics themselves ...
  double* stats_out = nullptr;  // [stats, rows]
  double* norms_out = nullptr;  // [rows, orders]
  // ... or finished products, float or double.
  std::vector<Product> products;
  void* out = nullptr;
  bool out_double = false;
  int64_t row_stride = 0, product_stride = 0;
};

// torch_parallel_for of libtorch_cpu, or null for one thread
typedef int (*ParallelFor)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
extern ParallelFor parallel_for;

// The instruction set in use.
extern const Kernels* kernels;

void run(const Request& q);

}  // namespace fastood

// A plan: what is wanted. A call: one run of a plan, with what it reads and where its results go.
#pragma once

#include <vector>

#include "isa.h"
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

// A finished score: the sum of coefficient * stats[stat], stat -1 for the number 1, times (norms[order] / divisor)^power,
// order -1 for no norm.
struct Term {
  int stat;
  double coefficient;
};
struct Column {
  std::vector<Term> terms;
  int order, power;
  double divisor;
};

// What is wanted, worked out once for many calls.
struct Plan {
  LogitsPlan logits{};
  NormsPlan norms[2]{};  // for float32 arithmetic, and for float64
  std::vector<Order> orders[2];
  bool bias = false, log = false;
  std::vector<Stat> stats;
  std::vector<int> power_of_stat;
  std::vector<double> gamma;  // of each statistic that is a gen, as is M
  std::vector<int64_t> M;
  std::vector<Column> columns;  // none: statistics, then norms, as they are
  GradientPlan gradient{};
  NormsPlan gradient_norms[2]{};  // its order, as above
  Order gradient_order[2]{};
};

struct Call {
  const Plan& plan;
  int64_t rows = 0;
  Matrix logits, feats, labels;
  void* out = nullptr;  // float or double; of statistics and norms, [stats + orders, rows] double
  bool out_double = false;
  int64_t row_stride = 0, column_stride = 0;
  // Or null: writes a row's logits to logits.data, of stride 0, each time before a row is read there.
  void (*write)(void* context, int64_t row) = nullptr;
  void* context = nullptr;

  const NormsPlan& norms_plan() const { return plan.norms[feats.type == FLOAT64]; }
  const std::vector<Order>& orders() const { return plan.orders[feats.type == FLOAT64]; }
  const NormsPlan& gradient_norms() const { return plan.gradient_norms[logits.type == FLOAT64]; }
  const Order& gradient_order() const { return plan.gradient_order[logits.type == FLOAT64]; }
};

// E_p || (1/T) (e_Y - p) h^T + G ||_1 of every row.
struct BatchGrad {
  const Plan& plan;  // for the temperature, and the sum of the exponentials
  int64_t rows;
  Matrix logits, feats;
  bool bias;                 // h means [h; 1]
  const void* G;             // [classes, columns], float, or double where feats are
  int64_t columns;           // a multiple of 16, padded with zeros
  const double* norms;       // [classes]: ||G_c||_1
  double norm;               // their sum
  double* out;               // [rows]; NaN or infinite where a logit or feature is: the caller works these rows out anew
};

// The energy of r (logits - bias) + bias, r of sum h and the sum of its k largest: e^(their ratio), or its square.
struct Scaling {
  const Plan& energy;
  int64_t rows;
  Matrix logits, feats;
  const void* bias;   // [classes], float, or double where logits are; null for 0
  int64_t k;          // 1 to the number of features
  bool relu, square;  // of max(h, 0); the square
  void* out;          // [rows], float, or double where logits are
};

// torch_parallel_for of libtorch_cpu, or null for one thread
typedef int (*ParallelFor)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
extern ParallelFor parallel_for;

void run(const Call& call);
void run_here(const Call& call);  // on this thread
bool run(const BatchGrad& b);  // whether all results are finite
bool run(const Scaling& s);    // the same

// task(begin, end, context) over 0..tasks, `grain` of them or more to a thread.
void share(int64_t tasks, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context);
// The sums over a row and, in `swept`, the TV or gradient that is asked for. kept: room for the row's exponentials, so
// that it is read once: its length and 16 more; or null.
LogitsState logits_row(const Call& call, int64_t row, double* kept, double* swept);

// The gradient of a row whose sums are known: what its sweep needs of them, and what comes of the states of all chunks.
GradientRow gradient_row(const Call& call, const LogitsState& s);
void merge(const Call& call, GradientState* a, const GradientState& b);
double gradient(const Call& call, int64_t row, const LogitsState& s, const GradientRow& about,
                const GradientState& state);

}  // namespace fastood

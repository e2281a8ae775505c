#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>

namespace fastood {

static const char PLAN[] = "fastood plan";

static void free_plan(PyObject* capsule) { delete static_cast<Plan*>(PyCapsule_GetPointer(capsule, PLAN)); }

static void read_temperature(PyObject* temperature, LogitsPlan* logits) {
  const double T = logits->temperature = PyFloat_AsDouble(temperature);
  // log2(e) / T in two parts: the quotient, and what it rounded away and log2(e) lacks as a double.
  const double log2e = 1.4426950408889634, log2e_low = 2.0355273740931033e-17;
  const double scale = std::min(log2e / T, 1e300);
  set_scale(logits, scale, scale < 1e300 ? (std::fma(-scale, T, log2e) + log2e_low) / T : 0);
}

static bool read_stats(PyObject* numbers, PyObject* exponents, PyObject* counts, Plan* plan) {
  LogitsPlan& logits = plan->logits;
  for (Py_ssize_t j = 0; j < PyTuple_Size(numbers); j++) {
    const long number = PyLong_AsLong(PyTuple_GetItem(numbers, j));
    if (number < 0 || number >= long(std::size(ABOUT))) {
      PyErr_Format(PyExc_ValueError, "no statistic %ld", number);
      return false;
    }
    const double exponent = PyFloat_AsDouble(PyTuple_GetItem(exponents, j));
    plan->stats.push_back(Stat(number));
    plan->power_of_stat.push_back(logits.power_sums);
    logits.sums |= ABOUT[number].sums;
    if (Stat(number) == Stat::power_sum && logits.power_sums < MAX_POWER_SUMS) logits.power[logits.power_sums++] = exponent;
    plan->gamma.push_back(exponent);
    plan->M.push_back(PyLong_AsLongLong(PyTuple_GetItem(counts, j)));
  }
  return true;
}

static void read_orders(PyObject* orders, Plan* plan) {
  const Py_ssize_t n = PyTuple_Size(orders);
  double order[MAX_ORDERS];
  for (Py_ssize_t j = 0; j < n; j++) order[j] = PyFloat_AsDouble(PyTuple_GetItem(orders, j));
  for (int is_double = 0; is_double < 2; is_double++) {
    plan->orders[is_double].resize(n);
    plan_norms(order, int(n), !is_double, &plan->norms[is_double], plan->orders[is_double].data());
  }
}

static void read_columns(PyObject* columns, Plan* plan) {
  for (Py_ssize_t k = 0; k < PyTuple_Size(columns); k++) {
    PyObject* c = PyTuple_GetItem(columns, k);
    PyObject* terms = PyTuple_GetItem(c, 0);
    Column column{{}, int(PyLong_AsLong(PyTuple_GetItem(c, 1))), int(PyLong_AsLong(PyTuple_GetItem(c, 2))),
                  PyFloat_AsDouble(PyTuple_GetItem(c, 3))};
    for (Py_ssize_t i = 0; i < PyTuple_Size(terms); i++) {
      PyObject* t = PyTuple_GetItem(terms, i);
      column.terms.push_back({int(PyLong_AsLong(PyTuple_GetItem(t, 0))), PyFloat_AsDouble(PyTuple_GetItem(t, 1))});
    }
    plan->columns.push_back(std::move(column));
  }
}

static void read_gradient(PyObject* gradient, Plan* plan) {
  if (PyTuple_Size(gradient) != 4) return;
  GradientPlan& g = plan->gradient;
  g = {true, bool(PyObject_IsTrue(PyTuple_GetItem(gradient, 0))), int(PyLong_AsLong(PyTuple_GetItem(gradient, 1))),
       PyFloat_AsDouble(PyTuple_GetItem(gradient, 2)), PyFloat_AsDouble(PyTuple_GetItem(gradient, 3))};
  LogitsPlan& logits = plan->logits;
  if (g.outside && g.order == 2) logits.sums |= SQUARES;
  else if (g.outside && g.order != 1 && g.order != INFINITY) logits.power[logits.power_sums++] = g.order;
  for (int is_double = 0; is_double < 2; is_double++)
    plan_norms(&g.order, 1, !is_double, &plan->gradient_norms[is_double], &plan->gradient_order[is_double]);
}

PyObject* new_plan(PyObject* const* args) {
  if (PyTuple_Size(args[1]) > MAX_STATS || PyTuple_Size(args[4]) > MAX_ORDERS)
    return PyErr_Format(PyExc_ValueError, "at most %d statistics and %d orders at a time", MAX_STATS, MAX_ORDERS);
  std::unique_ptr<Plan> plan(new Plan);
  read_temperature(args[0], &plan->logits);
  if (!read_stats(args[1], args[2], args[3], plan.get())) return nullptr;
  read_orders(args[4], plan.get());
  plan->bias = PyObject_IsTrue(args[5]);
  plan->log = PyObject_IsTrue(args[6]);
  read_columns(args[7], plan.get());
  read_gradient(args[8], plan.get());
  if (PyErr_Occurred()) return nullptr;
  return PyCapsule_New(plan.release(), PLAN, free_plan);
}

const Plan* read_plan(PyObject* const* args, Py_ssize_t count, Py_ssize_t wanted) {
  if (count == wanted) return static_cast<Plan*>(PyCapsule_GetPointer(args[0], PLAN));
  PyErr_Format(PyExc_TypeError, "takes %zd arguments", wanted);
  return nullptr;
}

bool read_matrix(PyObject* const* args, Matrix* m) {
  m->data = static_cast<const char*>(PyLong_AsVoidPtr(args[0]));
  m->type = int(PyLong_AsLong(args[1]));
  m->columns = PyLong_AsLongLong(args[2]);
  m->stride = PyLong_AsLongLong(args[3]);
  return !PyErr_Occurred();
}

static bool read_tensor(PyObject* x, int64_t* rows, Matrix* m) {
  Plain p;
  if (!(is_array(x) ? read_array(x, &p) : read_plain(x, &p)) || p.device_type != CPU_DEVICE) return false;
  *rows = p.rows, m->data = p.data, m->type = p.type, m->columns = p.columns, m->stride = p.stride;
  return true;
}

bool read_tensors(PyObject* const* tensors, Call* call) {
  const bool logits = !call->plan.stats.empty(), feats = !call->plan.orders[0].empty();
  const bool labels = call->plan.gradient.wanted && call->plan.gradient.labels == GIVEN;
  int64_t rows[3] = {-1, -1, -1};
  Matrix f, h;
  if (tensors[0] == Py_None ? logits : !read_tensor(tensors[0], &rows[0], &f)) return false;
  if (tensors[1] == Py_None ? feats : !read_tensor(tensors[1], &rows[1], &h)) return false;
  if ((tensors[2] != Py_None) != labels || (labels && !read_tensor(tensors[2], &rows[2], &call->labels))) return false;
  int arrays = 0, given = 0;
  for (int i = 0; i < 3; i++) given += tensors[i] != Py_None, arrays += is_array(tensors[i]);
  if (arrays && (arrays != given || call->plan.columns.empty())) return false;  // the latter are for PyTorch
  if (logits) call->logits = f;
  if (feats) call->feats = h;
  call->out_double = call->plan.columns.empty() || f.type == FLOAT64 || h.type == FLOAT64;
  call->rows = std::max(rows[0], rows[1]);
  for (int i = 0; i < 2; i++)
    if (tensors[i] != Py_None && rows[i] != call->rows) return false;
  return !labels || (rows[2] == call->rows && call->labels.columns == call->logits.columns);
}

int64_t numbers(const Plan& plan) {
  return plan.columns.empty() ? plan.stats.size() + plan.orders[0].size() : plan.columns.size();
}

void set_strides(Call* call, bool by_row) {
  const int64_t columns = numbers(call->plan);
  call->row_stride = by_row ? columns : 1;
  call->column_stride = by_row ? 1 : call->rows;
}

}  // namespace fastood

// The Python module: one function over raw pointers, rows shared out over torch's own threads.
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "state.h"

namespace fastood {

namespace base { extern const Kernels kernels; }
#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

static std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found = {&base::kernels};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();  // asks the operating system too
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      found.push_back(&avx512::kernels);
  }
#endif
  return found;
}

static const Kernels* kernels = nullptr;

// torch_parallel_for of libtorch_cpu, or null for one thread
typedef int (*ParallelFor)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
static ParallelFor parallel_for = nullptr;

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

static int64_t chunks(int64_t columns) { return (columns + CHUNK - 1) / CHUNK; }

static void logits_chunk(const Request& q, int64_t row, int64_t chunk, void* kept, LogitsState* s) {
  const int64_t start = chunk * CHUNK;
  s->ties = s->exp = s->squares = s->exp_z = s->z = 0;
  for (int r = 0; r < q.logits_plan.power_sums; r++) s->powers[r] = 0;
  s->n = std::min(CHUNK, q.logits.columns - start);
  const void* next = start + s->n < q.logits.columns ? q.logits.at(row, start + s->n) : q.logits.at(row + 1, 0);
  kernels->logits[q.logits.type](q.logits.at(row, start), s->n, q.logits_plan, next, s, kept);
}

static double tv_chunk(const Request& q, int64_t row, int64_t chunk, const LogitsState& s, const void* kept) {
  const int64_t start = chunk * CHUNK, n = std::min(CHUNK, q.logits.columns - start);
  return kernels->tv[q.logits.type](q.logits.at(row, start), n, q.logits_plan, s.max, s.ties + s.exp,
                                    1.0 / double(q.logits.columns), kept);
}

static bool needs_tv(const Request& q, const LogitsState& s) {
  return (q.logits_plan.sums & TV) && !s.nan && std::isfinite(s.max);
}

static NormsState norms_chunk(const Request& q, int64_t row, int64_t chunk) {
  NormsState s{};
  const int64_t start = chunk * CHUNK, n = std::min(CHUNK, q.feats.columns - start);
  const void* next = q.stats.empty() ? q.feats.at(row + 1, 0) : q.logits.at(row + 1, 0);
  kernels->norms[q.feats.type](q.feats.at(row, start), n, q.norms_plan, next, &s);
  return s;
}

// `s` and `h` are read only where statistics and norms were asked for.
static void emit(const Request& q, int64_t row, const LogitsState& s, double tv, NormsState* h) {
  double stats[MAX_STATS], norms[MAX_ORDERS];
  for (size_t j = 0; j < q.stats.size(); j++)
    stats[j] = statistic(q.stats[j], q.power_of_stat[j], q.logits_plan, s, q.logits.columns, tv);
  if (q.bias && !q.orders.empty()) {
    const double one = 1;
    NormsState last{};
    kernels->norms[FLOAT64](&one, 1, q.norms_plan, &one, &last);
    merge(q.norms_plan, h, last);
  }
  for (size_t j = 0; j < q.orders.size(); j++) norms[j] = norm(q.orders[j], q.norms_plan, *h, q.log);

  if (!q.out) {
    for (size_t j = 0; j < q.stats.size(); j++) q.stats_out[j * q.rows + row] = stats[j];
    for (size_t j = 0; j < q.orders.size(); j++) q.norms_out[row * q.orders.size() + j] = norms[j];
    return;
  }
  for (size_t k = 0; k < q.products.size(); k++) {
    const Product& p = q.products[k];
    double score = p.stat < 0 ? p.factor : p.factor * stats[p.stat];
    if (p.order >= 0) {
      const double u = norms[p.order] / p.divisor;
      score = p.power == 2 ? u * u * score : u * score;
    }
    const int64_t at = row * q.row_stride + int64_t(k) * q.product_stride;
    if (q.out_double) static_cast<double*>(q.out)[at] = score;
    else static_cast<float*>(q.out)[at] = float(score);
  }
}

// ---- many rows: each thread takes whole rows

static void rows_task(int64_t begin, int64_t end, void* context) {
  const Request& q = *static_cast<const Request*>(context);
  const int64_t logit_chunks = chunks(q.logits.columns), feat_chunks = chunks(q.feats.columns);
  std::unique_ptr<double[]> kept;
  // With a vector's width to spare, for the padding.
  if ((q.logits_plan.sums & TV) && logit_chunks == 1) kept.reset(new double[q.logits.columns + 16]);
  for (int64_t row = begin; row < end; row++) {
    LogitsState s, next;
    NormsState h;
    double tv = 0;
    if (!q.stats.empty()) {
      logits_chunk(q, row, 0, kept.get(), &s);
      for (int64_t c = 1; c < logit_chunks; c++) {
        logits_chunk(q, row, c, nullptr, &next);
        merge(q.logits_plan, &s, next);
      }
      if (needs_tv(q, s))
        for (int64_t c = 0; c < logit_chunks; c++) tv += tv_chunk(q, row, c, s, kept.get());
    }
    if (!q.orders.empty()) {
      h = feat_chunks ? norms_chunk(q, row, 0) : NormsState{};
      for (int64_t c = 1; c < feat_chunks; c++) merge(q.norms_plan, &h, norms_chunk(q, row, c));
    }
    emit(q, row, s, tv, &h);
  }
}

// ---- few long rows: each thread takes chunks, merged in the same order as above

struct Split {
  const Request& q;
  int64_t logit_chunks, feat_chunks;
  std::vector<LogitsState> logits;  // [rows, logit_chunks]
  std::vector<NormsState> norms;    // [rows, feat_chunks]
  std::vector<LogitsState> merged;  // [rows]
  std::vector<double> tv;           // [rows, logit_chunks]
};

static void sums_task(int64_t begin, int64_t end, void* context) {
  Split& split = *static_cast<Split*>(context);
  const int64_t first_norm = split.logits.size();
  for (int64_t i = begin; i < end; i++) {
    if (i < first_norm)
      logits_chunk(split.q, i / split.logit_chunks, i % split.logit_chunks, nullptr, &split.logits[i]);
    else
      split.norms[i - first_norm] =
          norms_chunk(split.q, (i - first_norm) / split.feat_chunks, (i - first_norm) % split.feat_chunks);
  }
}

static void tv_task(int64_t begin, int64_t end, void* context) {
  Split& split = *static_cast<Split*>(context);
  for (int64_t i = begin; i < end; i++) {
    const LogitsState& s = split.merged[i / split.logit_chunks];
    if (needs_tv(split.q, s)) split.tv[i] = tv_chunk(split.q, i / split.logit_chunks, i % split.logit_chunks, s, nullptr);
  }
}

static void share(int64_t tasks, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context) {
  if (!(parallel_for && tasks > grain && parallel_for(0, tasks, grain, task, context) == 0)) task(0, tasks, context);
}

static void run_split(const Request& q) {
  Split split{q, q.stats.empty() ? 0 : chunks(q.logits.columns), q.orders.empty() ? 0 : chunks(q.feats.columns), {}, {}, {}, {}};
  split.logits.resize(q.rows * split.logit_chunks);
  split.norms.resize(q.rows * split.feat_chunks);
  share(split.logits.size() + split.norms.size(), 1, sums_task, &split);
  for (int64_t row = 0; row < q.rows && split.logit_chunks; row++) {
    LogitsState s = split.logits[row * split.logit_chunks];
    for (int64_t c = 1; c < split.logit_chunks; c++) merge(q.logits_plan, &s, split.logits[row * split.logit_chunks + c]);
    split.merged.push_back(s);
  }
  if (q.logits_plan.sums & TV) {
    split.tv.assign(split.logits.size(), 0);
    share(split.tv.size(), 1, tv_task, &split);
  }
  for (int64_t row = 0; row < q.rows; row++) {
    double tv = 0;
    for (size_t c = 0; c < split.tv.size() / q.rows; c++) tv += split.tv[row * split.logit_chunks + c];
    NormsState h{};
    if (split.feat_chunks) h = split.norms[row * split.feat_chunks];
    for (int64_t c = 1; c < split.feat_chunks; c++) merge(q.norms_plan, &h, split.norms[row * split.feat_chunks + c]);
    emit(q, row, split.logit_chunks ? split.merged[row] : LogitsState{}, tv, &h);
  }
}

static void run(const Request& q) {
  constexpr int64_t worth_a_thread = 32768;  // elements; torch's own grain
  const int64_t width = (q.stats.empty() ? 0 : q.logits.columns) + (q.orders.empty() ? 0 : q.feats.columns);
  if (q.rows < 8 && width > 2 * worth_a_thread)
    run_split(q);
  else
    share(q.rows, std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, width)), rows_task, const_cast<Request*>(&q));
}

// ---- Python

static bool read_matrix(PyObject* const* args, Matrix* m) {
  m->data = static_cast<const char*>(PyLong_AsVoidPtr(args[0]));
  m->type = int(PyLong_AsLong(args[1]));
  m->columns = PyLong_AsLongLong(args[2]);
  m->stride = PyLong_AsLongLong(args[3]);
  return !PyErr_Occurred();
}

// The arguments that both functions begin with: rows, logits (address, type, columns, stride), feats (the same),
// temperature, stats (numbers of Stat), powers (the r of each, 0 where it has none), orders, bias, log.
constexpr Py_ssize_t COMMON = 15;

static bool read_request(PyObject* const* args, Request* q) {
  q->rows = PyLong_AsLongLong(args[0]);
  if (!read_matrix(args + 1, &q->logits) || !read_matrix(args + 5, &q->feats)) return false;
  LogitsPlan& plan = q->logits_plan;
  const double T = plan.temperature = PyFloat_AsDouble(args[9]);
  // log2(e) / T in two parts: the quotient, and what it rounded away and log2(e) lacks as a double.
  const double log2e = 1.4426950408889634, log2e_low = 2.0355273740931033e-17;
  const double scale = std::min(log2e / T, 1e38);
  set_scale(&plan, scale, scale < 1e38 ? (std::fma(-scale, T, log2e) + log2e_low) / T : 0);
  const Py_ssize_t stats = PyTuple_Size(args[10]), orders = PyTuple_Size(args[12]);
  if (stats > MAX_STATS || orders > MAX_ORDERS) {
    PyErr_Format(PyExc_ValueError, "at most %d statistics and %d orders at a time", MAX_STATS, MAX_ORDERS);
    return false;
  }
  for (Py_ssize_t j = 0; j < stats; j++) {
    const int stat = int(PyLong_AsLong(PyTuple_GetItem(args[10], j)));
    q->stats.push_back(stat);
    q->power_of_stat.push_back(plan.power_sums);
    plan.sums |= sums_for(stat);
    if (stat == POWER_SUM && plan.power_sums < MAX_POWER_SUMS)
      plan.power[plan.power_sums++] = PyFloat_AsDouble(PyTuple_GetItem(args[11], j));
  }
  double order[MAX_ORDERS];
  for (Py_ssize_t j = 0; j < orders; j++) order[j] = PyFloat_AsDouble(PyTuple_GetItem(args[12], j));
  if (orders) {
    q->orders.resize(orders);
    plan_norms(order, int(orders), q->feats.type != FLOAT64, &q->norms_plan, q->orders.data());
  }
  q->bias = PyObject_IsTrue(args[13]);
  q->log = PyObject_IsTrue(args[14]);
  return !PyErr_Occurred();
}

static PyObject* run_without_lock(const Request& q) {
  if (PyErr_Occurred()) return nullptr;
  PyThreadState* held = PyEval_SaveThread();
  if (q.rows) run(q);
  PyEval_RestoreThread(held);
  Py_RETURN_NONE;
}

// row_stats(..., address of [stats, rows] double, address of [rows, orders] double)
static PyObject* row_stats(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != COMMON + 2) return PyErr_Format(PyExc_TypeError, "row_stats takes %zd arguments", COMMON + 2);
  Request q;
  if (!read_request(args, &q)) return nullptr;
  q.stats_out = static_cast<double*>(PyLong_AsVoidPtr(args[COMMON]));
  q.norms_out = static_cast<double*>(PyLong_AsVoidPtr(args[COMMON + 1]));
  return run_without_lock(q);
}

// products(..., tuple of Product, address of the result, its type, whether it is [rows, products])
static PyObject* products(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != COMMON + 4) return PyErr_Format(PyExc_TypeError, "products takes %zd arguments", COMMON + 4);
  Request q;
  if (!read_request(args, &q)) return nullptr;
  const Py_ssize_t size = PyTuple_Size(args[COMMON]);
  for (Py_ssize_t k = 0; k < size; k++) {
    PyObject* p = PyTuple_GetItem(args[COMMON], k);  // stat, order, factor, power, divisor
    q.products.push_back({int(PyLong_AsLong(PyTuple_GetItem(p, 0))), int(PyLong_AsLong(PyTuple_GetItem(p, 1))),
                          int(PyLong_AsLong(PyTuple_GetItem(p, 3))), PyFloat_AsDouble(PyTuple_GetItem(p, 2)),
                          PyFloat_AsDouble(PyTuple_GetItem(p, 4))});
  }
  q.out = PyLong_AsVoidPtr(args[COMMON + 1]);
  q.out_double = PyLong_AsLong(args[COMMON + 2]) == FLOAT64;
  const bool by_row = PyObject_IsTrue(args[COMMON + 3]);
  q.row_stride = by_row ? size : 1;
  q.product_stride = by_row ? 1 : q.rows;
  return run_without_lock(q);
}

static PyObject* levels(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Kernels* k : supported()) {
    PyObject* name = PyUnicode_FromString(k->name);
    PyList_Append(names, name);
    Py_DECREF(name);
  }
  return names;
}

static PyObject* level(PyObject*, PyObject*) { return PyUnicode_FromString(kernels->name); }

static PyObject* use_level(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const Kernels* found = nullptr;
  for (const Kernels* k : supported())
    if (std::strcmp(k->name, PyBytes_AsString(bytes)) == 0) found = k;
  Py_DECREF(bytes);
  if (!found) return PyErr_Format(PyExc_ValueError, "%R is not an instruction set of this processor", name);
  kernels = found;
  Py_RETURN_NONE;
}

static PyObject* use_threads_of(PyObject*, PyObject* address) {
  parallel_for = reinterpret_cast<ParallelFor>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

template <int WHICH>
static PyObject* apply(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "takes in, out, n");
  const float* x = static_cast<const float*>(PyLong_AsVoidPtr(args[0]));
  float* out = static_cast<float*>(PyLong_AsVoidPtr(args[1]));
  const int64_t n = PyLong_AsLongLong(args[2]);
  if (PyErr_Occurred()) return nullptr;
  (WHICH == 0 ? kernels->exp2f : kernels->log2f)(x, out, n);
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"row_stats", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(row_stats)), METH_FASTCALL, nullptr},
    {"products", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(products)), METH_FASTCALL, nullptr},
    {"levels", levels, METH_NOARGS, "Instruction sets that this processor has, the best last."},
    {"level", level, METH_NOARGS, "The one in use."},
    {"use_level", use_level, METH_O, "Use another one."},
    {"use_threads_of", use_threads_of, METH_O, "The address of torch_parallel_for; 0 for one thread."},
    {"exp2f", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(apply<0>)), METH_FASTCALL, nullptr},
    {"log2f", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(apply<1>)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "fastood's C++ kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace fastood

PyMODINIT_FUNC PyInit__native() {
  fastood::kernels = fastood::supported().back();
  return PyModule_Create(&fastood::definition);
}

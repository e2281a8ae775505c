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

struct Request {
  int64_t rows = 0;
  Matrix logits, feats;
  LogitsPlan logits_plan{};
  NormsPlan norms_plan{};
  bool bias = false, log = false;
  std::vector<int> stats, power_of_stat;
  std::vector<Order> orders;
  double* stats_out = nullptr;  // [stats, rows]
  double* norms_out = nullptr;  // [rows, orders]
};

static int64_t chunks(int64_t columns) { return (columns + CHUNK - 1) / CHUNK; }

static LogitsState logits_chunk(const Request& q, int64_t row, int64_t chunk, void* kept) {
  LogitsState s{};
  const int64_t start = chunk * CHUNK;
  s.n = std::min(CHUNK, q.logits.columns - start);
  kernels->logits[q.logits.type](q.logits.at(row, start), s.n, q.logits_plan, &s, kept);
  return s;
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
  kernels->norms[q.feats.type](q.feats.at(row, start), n, q.norms_plan, &s);
  return s;
}

static void write_stats(const Request& q, int64_t row, const LogitsState& s, double tv) {
  for (size_t j = 0; j < q.stats.size(); j++)
    q.stats_out[j * q.rows + row] = statistic(q.stats[j], q.power_of_stat[j], q.logits_plan, s, q.logits.columns, tv);
}

static void write_norms(const Request& q, int64_t row, NormsState s) {
  if (q.bias) {
    const double one = 1;
    NormsState last{};
    kernels->norms[FLOAT64](&one, 1, q.norms_plan, &last);
    merge(q.norms_plan, &s, last);
  }
  for (size_t j = 0; j < q.orders.size(); j++)
    q.norms_out[row * q.orders.size() + j] = norm(q.orders[j], q.norms_plan, s, q.log);
}

// ---- many rows: each thread takes whole rows

static void rows_task(int64_t begin, int64_t end, void* context) {
  const Request& q = *static_cast<const Request*>(context);
  const int64_t logit_chunks = chunks(q.logits.columns), feat_chunks = chunks(q.feats.columns);
  std::unique_ptr<double[]> kept;
  // With a vector's width to spare, for the padding.
  if ((q.logits_plan.sums & TV) && logit_chunks == 1) kept.reset(new double[q.logits.columns + 16]);
  for (int64_t row = begin; row < end; row++) {
    if (!q.stats.empty()) {
      LogitsState s = logits_chunk(q, row, 0, kept.get());
      for (int64_t c = 1; c < logit_chunks; c++) merge(q.logits_plan, &s, logits_chunk(q, row, c, nullptr));
      double tv = 0;
      if (needs_tv(q, s))
        for (int64_t c = 0; c < logit_chunks; c++) tv += tv_chunk(q, row, c, s, kept.get());
      write_stats(q, row, s, tv);
    }
    if (!q.orders.empty()) {
      NormsState s{};
      if (feat_chunks) s = norms_chunk(q, row, 0);
      for (int64_t c = 1; c < feat_chunks; c++) merge(q.norms_plan, &s, norms_chunk(q, row, c));
      write_norms(q, row, s);
    }
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
      split.logits[i] = logits_chunk(split.q, i / split.logit_chunks, i % split.logit_chunks, nullptr);
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
    if (split.logit_chunks) {
      double tv = 0;
      for (int64_t c = 0; c < split.logit_chunks && !split.tv.empty(); c++) tv += split.tv[row * split.logit_chunks + c];
      write_stats(q, row, split.merged[row], tv);
    }
    if (!q.orders.empty()) {
      NormsState s{};
      if (split.feat_chunks) s = split.norms[row * split.feat_chunks];
      for (int64_t c = 1; c < split.feat_chunks; c++) merge(q.norms_plan, &s, split.norms[row * split.feat_chunks + c]);
      write_norms(q, row, s);
    }
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

// row_stats(rows, logits, type, C, stride, feats, type, D, stride, temperature, stats, powers, orders, bias, log,
//           stats_out, norms_out); stats is a tuple of numbers of Stat, powers the r of each (0 where it has none)
static PyObject* row_stats(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 17) return PyErr_Format(PyExc_TypeError, "row_stats takes 17 arguments, got %zd", count);
  Request q;
  q.rows = PyLong_AsLongLong(args[0]);
  if (!read_matrix(args + 1, &q.logits) || !read_matrix(args + 5, &q.feats)) return nullptr;
  const double T = PyFloat_AsDouble(args[9]);
  LogitsPlan& plan = q.logits_plan;
  plan.temperature = T;
  // log2(e) / T in two parts: the quotient, and what it rounded away and log2(e) lacks as a double.
  const double log2e = 1.4426950408889634, log2e_low = 2.0355273740931033e-17;
  plan.scale = std::min(log2e / T, 1e38);
  plan.scale_low = plan.scale < 1e38 ? (std::fma(-plan.scale, T, log2e) + log2e_low) / T : 0;
  for (Py_ssize_t j = 0; j < PyTuple_Size(args[10]); j++) {
    const int stat = int(PyLong_AsLong(PyTuple_GetItem(args[10], j)));
    q.stats.push_back(stat);
    q.power_of_stat.push_back(plan.power_sums);
    plan.sums |= sums_for(stat);
    if (stat == POWER_SUM) {
      if (plan.power_sums == MAX_POWER_SUMS) return PyErr_Format(PyExc_ValueError, "at most %d power sums", MAX_POWER_SUMS);
      plan.power[plan.power_sums++] = PyFloat_AsDouble(PyTuple_GetItem(args[11], j));
    }
  }
  std::vector<double> orders;
  for (Py_ssize_t j = 0; j < PyTuple_Size(args[12]); j++) orders.push_back(PyFloat_AsDouble(PyTuple_GetItem(args[12], j)));
  if (orders.size() > MAX_ORDERS) return PyErr_Format(PyExc_ValueError, "at most %d orders", MAX_ORDERS);
  q.orders.resize(orders.size());
  plan_norms(orders.data(), int(orders.size()), q.feats.type != FLOAT64, &q.norms_plan, q.orders.data());
  q.bias = PyObject_IsTrue(args[13]);
  q.log = PyObject_IsTrue(args[14]);
  q.stats_out = static_cast<double*>(PyLong_AsVoidPtr(args[15]));
  q.norms_out = static_cast<double*>(PyLong_AsVoidPtr(args[16]));
  if (PyErr_Occurred()) return nullptr;
  PyThreadState* held = PyEval_SaveThread();
  if (q.rows) run(q);
  PyEval_RestoreThread(held);
  Py_RETURN_NONE;
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

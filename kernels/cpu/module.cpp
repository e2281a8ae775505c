// The Python module: functions over raw pointers, and which instruction sets this processor has.
#include "../tensors.h"
#include "../triton/launcher.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <vector>

#include "run.h"

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
  // F16C, which older Clangs cannot be asked about, is older than AVX2 and was never left out beside it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      found.push_back(&avx512::kernels);
  }
#endif
  return found;
}

// ---- Python

static bool read_matrix(PyObject* const* args, Matrix* m) {
  m->data = static_cast<const char*>(PyLong_AsVoidPtr(args[0]));
  m->type = int(PyLong_AsLong(args[1]));
  m->columns = PyLong_AsLongLong(args[2]);
  m->stride = PyLong_AsLongLong(args[3]);
  return !PyErr_Occurred();
}

static const char PLAN[] = "fastood plan";

static void free_plan(PyObject* capsule) { delete static_cast<Plan*>(PyCapsule_GetPointer(capsule, PLAN)); }

// prepare(temperature, stats, powers, counts, orders, bias, log, columns, gradient): stats are their numbers, powers
// the r or gamma of each and counts the M, 0 where it has none, columns tuples of (((stat, coefficient), ...), order,
// power, divisor), gradient (outside, labels, order, power) or ().
static PyObject* prepare(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 9) return PyErr_Format(PyExc_TypeError, "prepare takes 9 arguments");
  std::unique_ptr<Plan> plan(new Plan);
  LogitsPlan& logits = plan->logits;
  const double T = logits.temperature = PyFloat_AsDouble(args[0]);
  // log2(e) / T in two parts: the quotient, and what it rounded away and log2(e) lacks as a double.
  const double log2e = 1.4426950408889634, log2e_low = 2.0355273740931033e-17;
  const double scale = std::min(log2e / T, 1e300);
  set_scale(&logits, scale, scale < 1e300 ? (std::fma(-scale, T, log2e) + log2e_low) / T : 0);
  const Py_ssize_t stats = PyTuple_Size(args[1]), orders = PyTuple_Size(args[4]), columns = PyTuple_Size(args[7]);
  if (stats > MAX_STATS || orders > MAX_ORDERS)
    return PyErr_Format(PyExc_ValueError, "at most %d statistics and %d orders at a time", MAX_STATS, MAX_ORDERS);
  for (Py_ssize_t j = 0; j < stats; j++) {
    const long number = PyLong_AsLong(PyTuple_GetItem(args[1], j));
    if (number < 0 || number >= long(std::size(ABOUT))) return PyErr_Format(PyExc_ValueError, "no statistic %ld", number);
    const Stat stat = Stat(number);
    plan->stats.push_back(stat);
    plan->power_of_stat.push_back(logits.power_sums);
    logits.sums |= ABOUT[number].sums;
    if (stat == Stat::power_sum && logits.power_sums < MAX_POWER_SUMS)
      logits.power[logits.power_sums++] = PyFloat_AsDouble(PyTuple_GetItem(args[2], j));
    plan->gamma.push_back(PyFloat_AsDouble(PyTuple_GetItem(args[2], j)));
    plan->M.push_back(PyLong_AsLongLong(PyTuple_GetItem(args[3], j)));
  }
  double order[MAX_ORDERS];
  for (Py_ssize_t j = 0; j < orders; j++) order[j] = PyFloat_AsDouble(PyTuple_GetItem(args[4], j));
  for (int is_double = 0; is_double < 2; is_double++) {
    plan->orders[is_double].resize(orders);
    plan_norms(order, int(orders), !is_double, &plan->norms[is_double], plan->orders[is_double].data());
  }
  plan->bias = PyObject_IsTrue(args[5]);
  plan->log = PyObject_IsTrue(args[6]);
  for (Py_ssize_t k = 0; k < columns; k++) {
    PyObject* c = PyTuple_GetItem(args[7], k);
    PyObject* terms = PyTuple_GetItem(c, 0);
    Column column{{}, int(PyLong_AsLong(PyTuple_GetItem(c, 1))), int(PyLong_AsLong(PyTuple_GetItem(c, 2))),
                  PyFloat_AsDouble(PyTuple_GetItem(c, 3))};
    for (Py_ssize_t i = 0; i < PyTuple_Size(terms); i++) {
      PyObject* t = PyTuple_GetItem(terms, i);
      column.terms.push_back({int(PyLong_AsLong(PyTuple_GetItem(t, 0))), PyFloat_AsDouble(PyTuple_GetItem(t, 1))});
    }
    plan->columns.push_back(std::move(column));
  }
  if (PyTuple_Size(args[8]) == 4) {
    GradientPlan& g = plan->gradient;
    g = {true, bool(PyObject_IsTrue(PyTuple_GetItem(args[8], 0))), int(PyLong_AsLong(PyTuple_GetItem(args[8], 1))),
         PyFloat_AsDouble(PyTuple_GetItem(args[8], 2)), PyFloat_AsDouble(PyTuple_GetItem(args[8], 3))};
    if (g.outside && g.order == 2) logits.sums |= SQUARES;
    else if (g.outside && g.order != 1 && g.order != INFINITY) logits.power[logits.power_sums++] = g.order;
    for (int is_double = 0; is_double < 2; is_double++)
      plan_norms(&g.order, 1, !is_double, &plan->gradient_norms[is_double], &plan->gradient_order[is_double]);
  }
  if (PyErr_Occurred()) return nullptr;
  return PyCapsule_New(plan.release(), PLAN, free_plan);
}

template <class Work> static PyObject* without_lock(Work work) {
  bool done = true;
  PyThreadState* held = PyEval_SaveThread();
  try {
    work();
  } catch (const std::bad_alloc&) {
    done = false;
  }
  PyEval_RestoreThread(held);
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

static PyObject* run_without_lock(const Request& q) {
  if (PyErr_Occurred()) return nullptr;
  return without_lock([&] { if (q.rows) run(q); });
}

// What both functions begin with: the plan, rows, logits (address, type, columns, stride), feats (the same).
constexpr Py_ssize_t COMMON = 10;

static const Plan* read_plan(PyObject* const* args, Py_ssize_t count, Py_ssize_t wanted) {
  if (count == wanted) return static_cast<Plan*>(PyCapsule_GetPointer(args[0], PLAN));
  PyErr_Format(PyExc_TypeError, "takes %zd arguments", wanted);
  return nullptr;
}

static bool read_matrices(PyObject* const* args, Request* q) {
  q->rows = PyLong_AsLongLong(args[1]);
  return read_matrix(args + 2, &q->logits) && read_matrix(args + 6, &q->feats);
}

static void set_strides(Request* q, bool by_row) {
  const Plan& plan = q->plan;
  const int64_t columns = plan.columns.empty() ? plan.stats.size() + plan.orders[0].size() : plan.columns.size();
  q->row_stride = by_row ? columns : 1;
  q->column_stride = by_row ? 1 : q->rows;
}

// run(..., address of the result, its type, whether it is [rows, columns], labels (4))
static PyObject* run_plan(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Plan* plan = read_plan(args, count, COMMON + 7);
  if (!plan) return nullptr;
  Request q{*plan};
  if (!read_matrices(args, &q)) return nullptr;
  q.out = PyLong_AsVoidPtr(args[COMMON]);
  q.out_double = PyLong_AsLong(args[COMMON + 1]) == FLOAT64;
  set_strides(&q, PyObject_IsTrue(args[COMMON + 2]));
  if (!read_matrix(args + COMMON + 3, &q.labels)) return nullptr;
  return run_without_lock(q);
}

// batchgrad(plan, rows, logits (4), feats (4), bias, address of G, its columns, address of its rows' norms, their sum,
// address of [rows] double): whether all of these came out finite
static PyObject* batchgrad(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Plan* plan = read_plan(args, count, COMMON + 6);
  if (!plan) return nullptr;
  Request q{*plan};
  if (!read_matrices(args, &q)) return nullptr;
  const BatchGrad b{*plan, q.rows, q.logits, q.feats, bool(PyObject_IsTrue(args[COMMON])),
                    PyLong_AsVoidPtr(args[COMMON + 1]), PyLong_AsLongLong(args[COMMON + 2]),
                    static_cast<double*>(PyLong_AsVoidPtr(args[COMMON + 3])), PyFloat_AsDouble(args[COMMON + 4]),
                    static_cast<double*>(PyLong_AsVoidPtr(args[COMMON + 5]))};
  if (PyErr_Occurred()) return nullptr;
  bool finite = true;
  PyObject* done = without_lock([&] { finite = !b.rows || run(b); });
  if (!done) return nullptr;
  Py_DECREF(done);
  return PyBool_FromLong(finite);
}

// batchgrad_peak(steps): its arithmetic on registers, `steps` vectors of floats; gives their width.
static PyObject* batchgrad_peak(PyObject*, PyObject* steps) {
  const int64_t n = PyLong_AsLongLong(steps);
  if (PyErr_Occurred()) return nullptr;
  const double sum = kernels->batchgrad_peak(n);
  return sum < 0 ? PyLong_FromLong(0) : PyLong_FromLong(kernels->float_lanes);  // which it must run to know
}

// ---- plain tensors

static bool read_plain(PyObject* x, int64_t* rows, Matrix* m) {
  Plain p;
  if (!read_plain(x, &p) || p.device_type != CPU_DEVICE) return false;
  *rows = p.rows, m->data = p.data, m->type = p.type, m->columns = p.columns, m->stride = p.stride;
  return true;
}

// What a plan needs of logits, feats and labels, where they are plain and fit together; logits and feats may be there
// without being needed.
static bool read_plain(PyObject* const* tensors, Request* q) {
  const bool logits = !q->plan.stats.empty(), feats = !q->plan.orders[0].empty();
  const bool labels = q->plan.gradient.wanted && q->plan.gradient.labels == GIVEN;
  int64_t rows[3] = {-1, -1, -1};
  Matrix unread;
  if (tensors[0] == Py_None ? logits : !read_plain(tensors[0], &rows[0], logits ? &q->logits : &unread)) return false;
  if (tensors[1] == Py_None ? feats : !read_plain(tensors[1], &rows[1], feats ? &q->feats : &unread)) return false;
  if ((tensors[2] != Py_None) != labels || (labels && !read_plain(tensors[2], &rows[2], &q->labels))) return false;
  q->rows = std::max(rows[0], rows[1]);
  for (int i = 0; i < 2; i++)
    if (tensors[i] != Py_None && rows[i] != q->rows) return false;
  return !labels || (rows[2] == q->rows && q->labels.columns == q->logits.columns);
}

// Whether torch does so many elements on more than one thread.
static bool shared_out(int64_t elements) { return elements > 32768; }  // at::internal::GRAIN_SIZE

// plain(plan, shape, logits, feats, labels), those that are not needed None: the columns for plain CPU tensors as
// float32 of `shape`, in which -1 stands for the rows; None where they are any others, and a longer way must be gone,
// which can tell what is wrong with them.
static PyObject* plain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Plan* plan = read_plan(args, count, 5);
  if (!plan) return nullptr;
  Request q{*plan};
  // Without a pool (a forked child) what torch itself would share out, such as filling a result where it is told to be
  // deterministic, goes the longer way too, which sees to torch's threads first.
  if (watched() || !read_plain(args + 2, &q) ||
      (!parallel_for && shared_out(q.rows * int64_t(plan->columns.size())))) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const bool with_logits = !plan->stats.empty();
  const int type = with_logits ? q.logits.type : q.feats.type;
  PyObject* out = empty_beside(args[with_logits ? 2 : 3], type, OF_FLOAT32, args[1], q.rows, &q.out);
  if (!out) return nullptr;
  set_strides(&q, PyLong_AsLong(PyTuple_GetItem(args[1], 0)) < 0);
  PyObject* done = run_without_lock(q);
  if (!done) {
    Py_DECREF(out);
    return nullptr;
  }
  Py_DECREF(done);
  return out;
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

static PyObject* statistics(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const About& about : ABOUT) {
    PyObject* name = PyUnicode_FromString(about.name);
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
    {"prepare", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(prepare)), METH_FASTCALL, nullptr},
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run_plan)), METH_FASTCALL, nullptr},
    {"batchgrad", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(batchgrad)), METH_FASTCALL, nullptr},
    {"batchgrad_peak", batchgrad_peak, METH_O, nullptr},
    {"plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain)), METH_FASTCALL, nullptr},
    {"route", route, METH_VARARGS, nullptr},
    {"add_program", add_program, METH_VARARGS, nullptr},
    {"launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(launch)), METH_FASTCALL, nullptr},
    {"use_driver", use_driver, METH_VARARGS, nullptr},
    {"use_torch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(use_torch)), METH_FASTCALL, nullptr},
    {"statistics", statistics, METH_NOARGS, "Their names, by number."},
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

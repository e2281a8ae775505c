// The Python module: calls over raw addresses and over plain tensors.
#include "arguments.h"

#include <cstring>
#include <new>

#include "../triton/launcher.h"
#include "isa.h"

namespace fastood {

// prepare(temperature, stats, powers, counts, orders, bias, log, columns, gradient): stats are their numbers, powers
// the r or gamma of each and counts the M, 0 where it has none, columns tuples of (((stat, coefficient), ...), order,
// power, divisor), gradient (outside, labels, order, power) or ().
static PyObject* prepare(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != OF_A_PLAN) return PyErr_Format(PyExc_TypeError, "prepare takes %zd arguments", OF_A_PLAN);
  return new_plan(args);
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

static PyObject* run_without_lock(const Call& call) {
  if (PyErr_Occurred()) return nullptr;
  return without_lock([&] { if (call.rows) run(call); });
}

// What both functions begin with: the plan, rows, logits (address, type, columns, stride), feats (the same).
constexpr Py_ssize_t COMMON = 10;

static bool read_matrices(PyObject* const* args, Call* call) {
  call->rows = PyLong_AsLongLong(args[1]);
  return read_matrix(args + 2, &call->logits) && read_matrix(args + 6, &call->feats);
}

// run(..., address of the result, its type, whether it is [rows, columns], labels (4))
static PyObject* run_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Plan* plan = read_plan(args, count, COMMON + 7);
  if (!plan) return nullptr;
  Call call{*plan};
  if (!read_matrices(args, &call)) return nullptr;
  call.out = PyLong_AsVoidPtr(args[COMMON]);
  call.out_double = PyLong_AsLong(args[COMMON + 1]) == FLOAT64;
  set_strides(&call, PyObject_IsTrue(args[COMMON + 2]));
  if (!read_matrix(args + COMMON + 3, &call.labels)) return nullptr;
  return run_without_lock(call);
}

// Whether all results are finite.
template <class Work> static PyObject* run_and_tell(const Work& work) {
  bool finite = true;
  PyObject* done = without_lock([&] { finite = !work.rows || run(work); });
  if (!done) return nullptr;
  Py_DECREF(done);
  return PyBool_FromLong(finite);
}

// batchgrad(plan, rows, logits (4), feats (4), bias, address of G, its columns, address of its rows' norms, their sum,
// address of [rows] double): whether all of these came out finite
static PyObject* batchgrad(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Plan* plan = read_plan(args, count, COMMON + 6);
  if (!plan) return nullptr;
  Call call{*plan};
  if (!read_matrices(args, &call)) return nullptr;
  const BatchGrad b{*plan, call.rows, call.logits, call.feats, bool(PyObject_IsTrue(args[COMMON])),
                    PyLong_AsVoidPtr(args[COMMON + 1]), PyLong_AsLongLong(args[COMMON + 2]),
                    static_cast<double*>(PyLong_AsVoidPtr(args[COMMON + 3])), PyFloat_AsDouble(args[COMMON + 4]),
                    static_cast<double*>(PyLong_AsVoidPtr(args[COMMON + 5]))};
  if (PyErr_Occurred()) return nullptr;
  return run_and_tell(b);
}

// scaled(plan of the energy, rows, logits (4), feats (4), address of the bias or 0, k, relu, square,
// address of the result): the same
static PyObject* scaled(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Plan* plan = read_plan(args, count, COMMON + 5);
  if (!plan) return nullptr;
  Call call{*plan};
  if (!read_matrices(args, &call)) return nullptr;
  const Scaling s{*plan, call.rows, call.logits, call.feats, PyLong_AsVoidPtr(args[COMMON]), PyLong_AsLongLong(args[COMMON + 1]),
                  bool(PyObject_IsTrue(args[COMMON + 2])), bool(PyObject_IsTrue(args[COMMON + 3])),
                  PyLong_AsVoidPtr(args[COMMON + 4])};
  if (PyErr_Occurred()) return nullptr;
  return run_and_tell(s);
}

// batchgrad_peak(steps): its arithmetic on registers, `steps` vectors of floats; gives their width.
static PyObject* batchgrad_peak(PyObject*, PyObject* steps) {
  const int64_t n = PyLong_AsLongLong(steps);
  if (PyErr_Occurred()) return nullptr;
  const double sum = kernels->batchgrad_peak(n);
  return sum < 0 ? PyLong_FromLong(0) : PyLong_FromLong(kernels->float_lanes);  // which it must run to know
}

// Whether torch does so many elements on more than one thread.
static bool shared_out(int64_t elements) { return elements > 32768; }  // at::internal::GRAIN_SIZE

// quick(plan, shape, logits, feats, labels), those that are not needed None: the result for plain CPU tensors, or the
// columns for plain arrays, of `shape`, in which -1 stands for the rows. None where they are of any other kind: then the
// call takes the long way through Python, which reads all that is allowed and says what is wrong with the rest.
static PyObject* quick(PyObject*, PyObject* const* args, Py_ssize_t count) {
  const Plan* plan = read_plan(args, count, 5);
  if (!plan) return nullptr;
  Call call{*plan};
  // In a forked child, which has no pool (`parallel_for` is null), a large result takes the long way too: torch may share
  // out the work of making it (where it is told to be deterministic it fills what is empty), and its threads are set
  // right there first.
  if (watched() || !read_tensors(args + 2, &call) ||
      (!parallel_for && shared_out(call.rows * numbers(*plan)))) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const bool with_logits = !plan->stats.empty();
  const int type = with_logits ? call.logits.type : call.feats.type;
  const Kind kind = call.out_double ? OF_FLOAT64 : OF_FLOAT32;
  PyObject* out = empty_beside(args[with_logits ? 2 : 3], type, kind, args[1], call.rows, &call.out);
  if (!out) return nullptr;
  set_strides(&call, PyLong_AsLong(PyTuple_GetItem(args[1], 0)) < 0);
  PyObject* done = run_without_lock(call);
  if (!done) {
    Py_DECREF(out);
    return nullptr;
  }
  Py_DECREF(done);
  return out;
}

static PyObject* isas(PyObject*, PyObject*) {
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

static PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(kernels->name); }

static PyObject* use_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const Kernels* found = nullptr;
  for (const Kernels* k : supported())
    if (std::strcmp(k->name, PyBytes_AsString(bytes)) == 0) found = k;
  Py_DECREF(bytes);
  if (!found) {
    PyObject* names = isas(nullptr, nullptr);
    PyErr_Format(PyExc_ValueError, "must be one of %R, which this processor has, got %R", names, name);
    Py_XDECREF(names);
    return nullptr;
  }
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
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run_call)), METH_FASTCALL, nullptr},
    {"batchgrad", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(batchgrad)), METH_FASTCALL, nullptr},
    {"scaled", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(scaled)), METH_FASTCALL, nullptr},
    {"batchgrad_peak", batchgrad_peak, METH_O, nullptr},
    {"quick", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(quick)), METH_FASTCALL, nullptr},
    {"route", route, METH_VARARGS, nullptr},
    {"add_program", add_program, METH_VARARGS, nullptr},
    {"launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(launch)), METH_FASTCALL, nullptr},
    {"use_driver", use_driver, METH_VARARGS, nullptr},
    {"use_torch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(use_torch)), METH_FASTCALL, nullptr},
    {"use_numpy", use_numpy, METH_VARARGS, nullptr},
    {"statistics", statistics, METH_NOARGS, "Their names, by number."},
    {"isas", isas, METH_NOARGS, "Instruction sets that this processor has, the best last."},
    {"isa", isa, METH_NOARGS, "The one in use."},
    {"use_isa", use_isa, METH_O, "Use another one."},
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

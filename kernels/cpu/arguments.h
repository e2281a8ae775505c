// Reads the arguments that Python calls with: the numbers of a plan, addresses, plain tensors. A function that fails returns
// false or null and has set a Python exception; read_tensors alone may return false without one.
#pragma once

#include "../tensors.h"

#include "run.h"

namespace fastood {

// A plan as a capsule, of prepare's arguments: see module.cpp.
constexpr Py_ssize_t OF_A_PLAN = 9;
PyObject* new_plan(PyObject* const* args);

// The plan that a call of `wanted` arguments begins with.
const Plan* read_plan(PyObject* const* args, Py_ssize_t count, Py_ssize_t wanted);

// A matrix as four arguments: its address, type, columns, stride.
bool read_matrix(PyObject* const* args, Matrix* m);

// Reads (logits, feats, labels), None for what is not given; logits or feats that the plan does not need are checked, and
// decide on the result's type alone. False, perhaps with an exception set, where one is no plain tensor of the CPU, nor all
// are plain arrays, one is missing, or their sizes do not fit.
bool read_tensors(PyObject* const* tensors, Call* call);

// How many numbers a row gives.
int64_t numbers(const Plan& plan);
// The strides of a result [rows, columns], or [columns, rows].
void set_strides(Call* call, bool by_row);

}  // namespace fastood

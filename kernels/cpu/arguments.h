// What Python hands over, read: the numbers of a plan, addresses, plain tensors. What gives false or null leaves an
// exception, but for read_tensors.
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

// What a plan needs of logits, feats and labels, where they are plain and fit together; logits and feats may be there
// without being needed. False, perhaps with an exception, where they are anything else.
bool read_tensors(PyObject* const* tensors, Call* call);

// The strides of a result [rows, columns], or [columns, rows].
void set_strides(Call* call, bool by_row);

}  // namespace fastood

// Plain tensors, read and made without Python code between: DLPack's C functions behind torch.Tensor.
#pragma once

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/plan.h"

namespace fastood {

constexpr int32_t CPU_DEVICE = 1;  // as DLPack numbers them

// A matrix of any device with the elements of a row beside each other.
struct Plain {
  const char* data;
  int type;  // FLOAT16, BFLOAT16 or FLOAT32
  int32_t device_type, device_id;
  int64_t rows, columns, stride;
};

// Whether tensors have to go through torch's own operations: because a tracer or transform is watching these, or because
// use_torch, which says how tensors are read, has not been called.
bool watched();
// False where x is no such matrix, or has to be worked on by torch before it is read; perhaps with an exception set.
bool read_plain(PyObject* x, Plain* out);
// An empty tensor beside `x`, of float32, float64 or bytes, and of `shape` with `rows` for its -1; its address.
enum Kind { OF_FLOAT32, OF_FLOAT64, OF_BYTES, KINDS };
PyObject* empty_beside(PyObject* x, int type, Kind kind, PyObject* shape, int64_t rows, void** data);
// What torch queues work of this thread on.
bool current_stream(int32_t device_type, int32_t device_id, void** stream);

// use_torch(torch.Tensor, ({"dtype": torch.float32}, the same of float64 and of uint8), its exchange capsule,
// (watchers), torch.autograd.forward_ad)
PyObject* use_torch(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace fastood

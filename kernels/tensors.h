// Plain tensors and arrays, read and made without Python code between: DLPack's C functions behind torch.Tensor, and the
// buffer protocol.
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
  int type;
  int32_t device_type, device_id;
  int64_t rows, columns, stride;
};

// Whether tensors have to go through torch's own operations: because a tracer or transform is watching these, or because
// use_torch, which says how tensors are read, has not been called.
bool watched();
// False where x is no such matrix, or has to be worked on by torch before it is read; perhaps with an exception set.
bool read_plain(PyObject* x, Plain* out);
// The same of numpy's arrays.
bool is_array(PyObject* x);
bool read_array(PyObject* x, Plain* out);
// An empty tensor beside `x`, or an array beside an array, of float32, float64 or bytes, and of `shape` with `rows` for
// its -1; its address.
enum Kind { OF_FLOAT32, OF_FLOAT64, OF_BYTES, KINDS };
PyObject* empty_beside(PyObject* x, int type, Kind kind, PyObject* shape, int64_t rows, void** data);
// What torch queues work of this thread on.
bool current_stream(int32_t device_type, int32_t device_id, void** stream);

// use_torch(torch.Tensor, ({"dtype": torch.float32}, the same of float64 and of uint8), its exchange capsule,
// (watchers), torch.autograd.forward_ad)
PyObject* use_torch(PyObject*, PyObject* const* args, Py_ssize_t count);
// use_numpy(numpy.ndarray, numpy.empty)
PyObject* use_numpy(PyObject*, PyObject* args);

}  // namespace fastood

// Launches of compiled Triton kernels, laid out once: a warm call reads the tensors, packs the arguments and launches.
#pragma once

#include "../tensors.h"

namespace fastood {

// route(shape, of_float64): what programs are collected in; their result's shape, in which -1 stands for the rows.
PyObject* route(PyObject*, PyObject* args);
// add_program(route, inputs, device_type, device_id, block, group, most, buffers, launches, kept), as launch.py makes them:
// inputs, of logits, feats and labels: None, or (type, columns, stride, offset from 16 bytes of the first row); buffers:
// (bytes a row, bytes a block); launches: (function, threads, shared, rows, grid x a block, grid y, arguments), arguments
// (base, bytes, at, per row, per block).
PyObject* add_program(PyObject*, PyObject* args);
// launch(route, logits, feats, labels): the result, or None where there is no program for such tensors.
PyObject* launch(PyObject*, PyObject* const* args, Py_ssize_t count);
// use_driver(addresses of cuLaunchKernel, cuCtxGetCurrent, cuCtxPushCurrent, cuCtxPopCurrent)
PyObject* use_driver(PyObject*, PyObject* args);

}  // namespace fastood

#include "tensors.h"

namespace fastood {

// How DLPack 1.x lends a tensor to C (DLTensor), and the functions behind torch.Tensor.__dlpack_c_exchange_api__.
struct Borrowed {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Exchange {
  uint32_t major, minor;
  void *older, *allocate, *take, *give;
  int (*borrow)(void* tensor, Borrowed* out);
  int (*stream)(int32_t device_type, int32_t device_id, void** out);
};
constexpr uint8_t FLOAT_CODE = 2, BFLOAT_CODE = 4;

static PyObject *tensor_type = nullptr, *as_kind[KINDS] = {};
static PyObject *array_type = nullptr, *empty_array = nullptr;
static const Exchange* exchange = nullptr;
// Of no arguments: whether something looks into torch's operations.
constexpr int WATCHERS = 3;
static PyObject *watchers[WATCHERS] = {}, *forward_ad = nullptr;
enum Name { REQUIRES_GRAD, IS_NEG, NEW_EMPTY, CURRENT_LEVEL, NAMES };
static PyObject* names[NAMES] = {};

static long number(PyObject* value) {  // steals `value`; an error is -1
  const long n = value ? PyLong_AsLong(value) : -1;
  Py_XDECREF(value);
  return n;
}

bool watched() {
  if (!exchange) return true;
  for (PyObject* watcher : watchers)
    if (number(PyObject_CallNoArgs(watcher)) != 0) return true;
  return number(PyObject_GetAttr(forward_ad, names[CURRENT_LEVEL])) >= 0 || PyErr_Occurred();
}

static bool is_false(PyObject* value) {  // steals `value`
  Py_XDECREF(value);
  return value == Py_False;
}

static bool borrow(PyObject* x, Borrowed* out) {
  return reinterpret_cast<PyObject*>(Py_TYPE(x)) == tensor_type && exchange->borrow(x, out) == 0;
}

bool read_plain(PyObject* x, Plain* out) {
  Borrowed b;
  if (!borrow(x, &b) || b.ndim != 2 || b.shape[1] == 0 || b.lanes != 1) return false;
  if (b.code == FLOAT_CODE && b.bits == 32) out->type = FLOAT32;
  else if (b.code == FLOAT_CODE && b.bits == 64) out->type = FLOAT64;
  else if (b.code == FLOAT_CODE && b.bits == 16) out->type = FLOAT16;
  else if (b.code == BFLOAT_CODE && b.bits == 16) out->type = BFLOAT16;
  else return false;
  if (!is_false(PyObject_GetAttr(x, names[REQUIRES_GRAD])) || !is_false(PyObject_CallMethodObjArgs(x, names[IS_NEG], nullptr)))
    return false;
  out->device_type = b.device_type, out->device_id = b.device_id;
  out->rows = b.shape[0], out->columns = b.shape[1], out->stride = b.strides[0];
  out->data = static_cast<char*>(b.data) + b.byte_offset;
  return (b.strides[1] == 1 || out->columns == 1) && (b.data || out->rows == 0);  // a zero tensor has no memory
}

bool is_array(PyObject* x) { return reinterpret_cast<PyObject*>(Py_TYPE(x)) == array_type; }

bool read_array(PyObject* x, Plain* out) {
  Py_buffer b;
  if (!is_array(x) || PyObject_GetBuffer(x, &b, PyBUF_RECORDS_RO) != 0) return false;
  const char code = b.format[0] && !b.format[1] ? b.format[0] : 0;  // of another byte order it has two letters
  out->type = code == 'f' ? FLOAT32 : code == 'd' ? FLOAT64 : FLOAT16;
  bool plain = b.ndim == 2 && (code == 'f' || code == 'd' || code == 'e');
  if (plain) {
    const Py_ssize_t size = b.itemsize, step = b.shape[0] > 1 ? b.strides[0] : 0;
    out->device_type = CPU_DEVICE, out->device_id = 0;
    out->rows = b.shape[0], out->columns = b.shape[1], out->stride = step / size;
    out->data = static_cast<char*>(b.buf);
    plain = out->columns && (b.strides[1] == size || out->columns == 1) && step >= 0 && step % size == 0 &&
            reinterpret_cast<uintptr_t>(b.buf) % size == 0;
  }
  PyBuffer_Release(&b);
  return plain;
}

static PyObject* empty_tensor(PyObject* x, int type, Kind kind, PyObject* sizes, void** data) {
  const bool alike = type == (kind == OF_FLOAT32 ? FLOAT32 : kind == OF_FLOAT64 ? FLOAT64 : TYPES);
  PyObject* method = PyObject_GetAttr(x, names[NEW_EMPTY]);
  PyObject* out = method ? PyObject_Call(method, sizes, alike ? nullptr : as_kind[kind]) : nullptr;
  Py_XDECREF(method);
  Borrowed b;
  if (out && !borrow(out, &b)) Py_CLEAR(out);
  if (out) *data = b.data;
  return out;
}

static PyObject* new_array(Kind kind, PyObject* sizes, void** data) {
  static PyObject* const codes[KINDS] = {PyUnicode_FromString("f"), PyUnicode_FromString("d"), PyUnicode_FromString("B")};
  PyObject* out = PyObject_CallFunctionObjArgs(empty_array, sizes, codes[kind], nullptr);
  Py_buffer b;
  if (out && PyObject_GetBuffer(out, &b, PyBUF_WRITABLE) != 0) Py_CLEAR(out);
  if (out) *data = b.buf, PyBuffer_Release(&b);
  return out;
}

PyObject* empty_beside(PyObject* x, int type, Kind kind, PyObject* shape, int64_t rows, void** data) {
  const Py_ssize_t n = PyTuple_Size(shape);
  PyObject *sizes = PyTuple_New(n), *out = nullptr;
  for (Py_ssize_t i = 0; sizes && i < n; i++) {
    const int64_t size = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
    PyTuple_SetItem(sizes, i, PyLong_FromLongLong(size < 0 ? rows : size));
  }
  if (sizes) out = is_array(x) ? new_array(kind, sizes, data) : empty_tensor(x, type, kind, sizes, data);
  Py_XDECREF(sizes);
  return out;
}

bool current_stream(int32_t device_type, int32_t device_id, void** stream) {
  return exchange->stream(device_type, device_id, stream) == 0;
}

PyObject* use_torch(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static const char* spelled[NAMES] = {"requires_grad", "is_neg", "new_empty", "_current_level"};
  if (count != 5 || !PyTuple_Check(args[1]) || PyTuple_Size(args[1]) != KINDS || !PyTuple_Check(args[3]) ||
      PyTuple_Size(args[3]) != WATCHERS)
    return PyErr_Format(PyExc_TypeError, "use_torch takes a type, %d keywords, a capsule, %d functions and a module", KINDS, WATCHERS);
  auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(args[2], "dlpack_exchange_api"));
  if (!found) return nullptr;
  for (int i = 0; i < NAMES; i++)
    if (!names[i] && !(names[i] = PyUnicode_InternFromString(spelled[i]))) return nullptr;
  Py_INCREF(tensor_type = args[0]);
  for (int i = 0; i < KINDS; i++) Py_INCREF(as_kind[i] = PyTuple_GetItem(args[1], i));
  for (int i = 0; i < WATCHERS; i++) Py_INCREF(watchers[i] = PyTuple_GetItem(args[3], i));
  Py_INCREF(forward_ad = args[4]);
  exchange = found->major == 1 && found->borrow && found->stream ? found : nullptr;
  Py_RETURN_NONE;
}

PyObject* use_numpy(PyObject*, PyObject* args) {
  if (!PyArg_ParseTuple(args, "OO", &array_type, &empty_array)) return nullptr;
  Py_INCREF(array_type);
  Py_INCREF(empty_array);
  Py_RETURN_NONE;
}

}  // namespace fastood

#include "launcher.h"

#include <algorithm>
#include <climits>
#include <memory>
#include <vector>

namespace fastood {

// The driver's functions, by address: nothing is linked.
static int (*launch_kernel)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                            void* stream, void** arguments, void** extra) = nullptr;
static int (*current_context)(void** context) = nullptr;
static int (*push_context)(void* context) = nullptr;
static int (*pop_context)(void** context) = nullptr;

constexpr int INPUTS = 3;                     // logits, feats, labels
enum Base { NUMBER, INPUT = 1, OUT = INPUT + INPUTS, BUFFER };  // BUFFER + i: the i-th
constexpr size_t MOST_ARGUMENTS = 32, MOST_BUFFERS = 8;       // of a kernel; of a program

// Of a kernel: base + at + per_row rows + per_block blocks.
struct Argument {
  int base, bytes;
  int64_t at, per_row, per_block;
};

struct Launch {
  void* function;
  unsigned threads, shared;
  int64_t rows, grid_x, grid_y;  // of a program; programs for each of ceil(N / rows)
  std::vector<Argument> arguments;
};

struct Input {
  bool wanted = false;
  int type;
  int64_t columns, stride, offset;
};

struct Buffer {
  int64_t per_row, per_block;
  int64_t bytes(int64_t rows, int64_t blocks) const { return (per_row * rows + per_block * blocks + 255) / 256 * 256; }
};

// What a call on tensors of one layout and device comes to.
struct Program {
  Input inputs[INPUTS];
  int32_t device_type, device_id;
  void* context;
  int64_t block, group, most;  // rows of a block; rows that share the buffers, or all; most rows that it can do
  std::vector<Buffer> buffers;
  std::vector<Launch> launches;
  PyObject* kept;  // the kernels, and tensors whose addresses are constants

  ~Program() { Py_XDECREF(kept); }
};

struct Route {
  PyObject* shape;
  Kind kind;
  std::vector<std::shared_ptr<const Program>> programs;

  ~Route() { Py_XDECREF(shape); }
};

static const char ROUTE[] = "fastood route";
constexpr size_t MOST_PROGRAMS = 1024;  // the others are launched by Triton

static void free_route(PyObject* capsule) { delete static_cast<Route*>(PyCapsule_GetPointer(capsule, ROUTE)); }

PyObject* route(PyObject*, PyObject* args) {
  PyObject* shape;
  int of_float64;
  if (!PyArg_ParseTuple(args, "O!p", &PyTuple_Type, &shape, &of_float64)) return nullptr;
  Py_INCREF(shape);
  return PyCapsule_New(new Route{shape, of_float64 ? OF_FLOAT64 : OF_FLOAT32, {}}, ROUTE, free_route);
}

// Calls read(item) with each item of a tuple.
template <class Read> static bool each(PyObject* tuple, Read read) {
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); i++)
    if (!read(PyTuple_GetItem(tuple, i))) return false;
  return !PyErr_Occurred();
}

// For so many rows all numbers that depend on them fit: the grid, and arguments of 4 bytes.
static int64_t rows_that_fit(const Launch& l, int64_t block) {
  int64_t rows = INT_MAX / l.grid_x * l.rows;
  for (const Argument& a : l.arguments)
    if (const int64_t of_block = a.per_row * block + a.per_block; a.base == NUMBER && a.bytes == 4 && of_block)
      rows = std::min(rows, (INT_MAX - a.at) / of_block * block);
  return rows;
}

PyObject* add_program(PyObject*, PyObject* args) {
  PyObject *capsule, *inputs, *buffers, *launches, *kept;
  long long block, group, most;
  auto made = std::make_shared<Program>();
  Program& p = *made;
  p.kept = nullptr;
  if (!PyArg_ParseTuple(args, "OO!iiLLLO!O!O", &capsule, &PyTuple_Type, &inputs, &p.device_type, &p.device_id, &block,
                        &group, &most, &PyTuple_Type, &buffers, &PyTuple_Type, &launches, &kept))
    return nullptr;
  p.block = block, p.group = group, p.most = most ? most : INT64_MAX;
  auto* r = static_cast<Route*>(PyCapsule_GetPointer(capsule, ROUTE));
  if (!r) return nullptr;
  Input* input = p.inputs;
  const bool read = each(inputs, [&](PyObject* x) {
    Input& in = *input++;
    if (x == Py_None) return true;
    long long columns, stride, offset;
    in.wanted = PyArg_ParseTuple(x, "iLLL", &in.type, &columns, &stride, &offset);
    in.columns = columns, in.stride = stride, in.offset = offset;
    return in.wanted;
  }) && each(buffers, [&](PyObject* x) {
    long long per_row, per_block;
    if (!PyArg_ParseTuple(x, "LL", &per_row, &per_block)) return false;
    p.buffers.push_back({per_row, per_block});
    return true;
  }) && each(launches, [&](PyObject* x) {
    unsigned long long function;
    long long rows, grid_x, grid_y;
    PyObject* arguments;
    Launch l{};
    if (!PyArg_ParseTuple(x, "KIILLLO!", &function, &l.threads, &l.shared, &rows, &grid_x, &grid_y, &PyTuple_Type, &arguments))
      return false;
    l.function = reinterpret_cast<void*>(function), l.rows = rows, l.grid_x = grid_x, l.grid_y = grid_y;
    if (!each(arguments, [&](PyObject* y) {
          Argument a;
          long long at, per_row, per_block;
          if (!PyArg_ParseTuple(y, "iiLLL", &a.base, &a.bytes, &at, &per_row, &per_block)) return false;
          a.at = at, a.per_row = per_row, a.per_block = per_block;
          l.arguments.push_back(a);
          return true;
        }))
      return false;
    p.launches.push_back(std::move(l));
    return true;
  });
  if (!read) return nullptr;
  if (p.buffers.size() > MOST_BUFFERS) return PyErr_Format(PyExc_ValueError, "at most %zu buffers", MOST_BUFFERS);
  for (const Launch& l : p.launches) {
    if (l.arguments.size() > MOST_ARGUMENTS) return PyErr_Format(PyExc_ValueError, "at most %zu arguments", MOST_ARGUMENTS);
    const int64_t fit = rows_that_fit(l, p.block);
    if (!p.group || p.group > fit) p.most = std::min(p.most, fit);
  }
  p.context = nullptr;
  current_context(&p.context);  // the one that the kernels were loaded in
  Py_INCREF(p.kept = kept);
  if (r->programs.size() < MOST_PROGRAMS) r->programs.push_back(std::move(made));
  Py_RETURN_NONE;
}

static bool fits(const Program& p, const Plain* given, const bool* there, int64_t rows) {
  if (rows > p.most) return false;
  for (int i = 0; i < INPUTS; i++) {
    const Input& in = p.inputs[i];
    if (in.wanted && !there[i]) return false;
    if (!there[i]) continue;
    const Plain& x = given[i];
    if (x.rows != rows || x.device_type != p.device_type || x.device_id != p.device_id) return false;
    if (in.wanted && (x.type != in.type || x.columns != in.columns || x.stride != in.stride ||
                      int64_t(reinterpret_cast<uintptr_t>(x.data) % 16) != in.offset))
      return false;
  }
  return true;
}

// The launches of `rows` rows; an error of the driver, 0 for none.
static int launch_all(const Program& p, const int64_t* bases, int64_t rows, void* stream) {
  const int64_t blocks = (rows + p.block - 1) / p.block;
  int64_t values[MOST_ARGUMENTS];
  void* addresses[MOST_ARGUMENTS];
  for (int64_t i = 0; i < int64_t(MOST_ARGUMENTS); i++) addresses[i] = &values[i];
  for (const Launch& l : p.launches) {
    int64_t* value = values;
    for (const Argument& a : l.arguments) *value++ = bases[a.base] + a.at + a.per_row * rows + a.per_block * blocks;
    const int64_t grid = (rows + l.rows - 1) / l.rows * l.grid_x;
    if (const int error = launch_kernel(l.function, unsigned(grid), unsigned(l.grid_y), 1, l.threads, 1, 1, l.shared, stream,
                                        addresses, nullptr))
      return error;
  }
  return 0;
}

static int launch_on(const Program& p, const Plain* given, int64_t rows, char* out, int64_t out_row, char* memory, void* stream) {
  void* before = nullptr;
  current_context(&before);
  const bool elsewhere = before != p.context;
  if (elsewhere)
    if (const int error = push_context(p.context)) return error;
  static constexpr int64_t size[TYPES] = {2, 2, 4, 8};
  int error = 0;
  const int64_t group = p.group ? p.group : rows;
  int64_t bases[BUFFER + MOST_BUFFERS] = {};  // 0 of a number
  for (int64_t first = 0; first < rows && !error; first += group) {
    const int64_t n = std::min(group, rows - first);
    for (int i = 0; i < INPUTS; i++)
      if (p.inputs[i].wanted)
        bases[INPUT + i] = reinterpret_cast<int64_t>(given[i].data) + first * given[i].stride * size[given[i].type];
    bases[OUT] = reinterpret_cast<int64_t>(out) + first * out_row;
    int64_t next = reinterpret_cast<int64_t>(memory);
    for (size_t i = 0; i < p.buffers.size(); i++) {
      bases[BUFFER + i] = next;
      next += p.buffers[i].bytes(n, (n + p.block - 1) / p.block);
    }
    error = launch_all(p, bases, n, stream);
  }
  if (elsewhere) pop_context(&before);
  return error;
}

PyObject* launch(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 1 + INPUTS) return PyErr_Format(PyExc_TypeError, "launch takes %d arguments", 1 + INPUTS);
  auto* r = static_cast<Route*>(PyCapsule_GetPointer(args[0], ROUTE));
  if (!r) return nullptr;
  if (r->programs.empty() || watched()) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  Plain given[INPUTS];
  bool there[INPUTS];
  int first = -1;
  for (int i = 0; i < INPUTS; i++) {
    there[i] = args[1 + i] != Py_None;
    if (!there[i]) continue;
    if (!read_plain(args[1 + i], &given[i]) || given[i].type == FLOAT64) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    if (first < 0) first = i;
  }
  if (first < 0) Py_RETURN_NONE;
  const int64_t rows = given[first].rows;
  std::shared_ptr<const Program> found;
  for (const auto& p : r->programs)
    if (fits(*p, given, there, rows)) {
      found = p;
      break;
    }
  void* stream = nullptr;
  if (!found || !current_stream(found->device_type, found->device_id, &stream)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  PyObject *x = args[1 + first], *scratch = nullptr;
  void *out_data = nullptr, *memory = nullptr;
  PyObject* out = empty_beside(x, given[first].type, r->kind, r->shape, rows, &out_data);
  if (!out || rows == 0) return out;
  if (!found->buffers.empty()) {
    const int64_t n = found->group ? std::min(found->group, rows) : rows, blocks = (n + found->block - 1) / found->block;
    int64_t bytes = 0;
    for (const Buffer& b : found->buffers) bytes += b.bytes(n, blocks);
    static PyObject* const flat = Py_BuildValue("(i)", -1);
    scratch = empty_beside(x, given[first].type, OF_BYTES, flat, bytes, &memory);
    if (!scratch) {
      Py_DECREF(out);
      return nullptr;
    }
  }
  const int64_t out_row = r->kind == OF_FLOAT64 ? 8 : 4;  // of what is done in groups, which has one column
  PyThreadState* held = PyEval_SaveThread();
  const int error = launch_on(*found, given, rows, static_cast<char*>(out_data), out_row, static_cast<char*>(memory), stream);
  PyEval_RestoreThread(held);
  found.reset();
  Py_XDECREF(scratch);  // the stream is done with it before it hands it on
  if (!error) return out;
  Py_DECREF(out);
  return PyErr_Format(PyExc_RuntimeError, "the CUDA driver could not launch a kernel of fastood: error %d", error);
}

PyObject* use_driver(PyObject*, PyObject* args) {
  unsigned long long launch, get, push, pop;
  if (!PyArg_ParseTuple(args, "KKKK", &launch, &get, &push, &pop)) return nullptr;
  launch_kernel = reinterpret_cast<decltype(launch_kernel)>(launch);
  current_context = reinterpret_cast<decltype(current_context)>(get);
  push_context = reinterpret_cast<decltype(push_context)>(push);
  pop_context = reinterpret_cast<decltype(pop_context)>(pop);
  Py_RETURN_NONE;
}

}  // namespace fastood

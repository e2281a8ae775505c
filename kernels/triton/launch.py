"""From a call to launches of the kernels in device/. Imports Triton: only __init__.py imports this, and late.

A *program* says what a call on tensors of one layout comes to: which kernels, on how many programs for each row, with
which arguments. It is worked out once. On a GPU its kernels are then compiled and loaded, and all further calls are
launched by launcher.cpp, which reads the tensors, adds up addresses and hands them to the driver: Triton's own launch
takes several times as long. Where that cannot be (in the interpreter, without the C++ part, on other drivers than
CUDA's), Triton launches it.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastood.kernels.contract import Anchors, Request, Run, Scaling
from fastood.kernels.cpu import _TYPES, _native
from fastood.kernels.triton import device, shapes
from fastood.kernels.triton.shapes import Plan

Made = TypeVar("Made")

# ---- programs

# What an argument is relative to; BUFFER + i is the i-th buffer. launcher.cpp has the same numbers.
NUMBER, LOGITS, FEATS, LABELS, OUT, BUFFER = range(6)


class Argument(NamedTuple):
    """A whole number or an address: base + at + per_row * rows + per_block * blocks, of addresses in bytes."""

    base: int
    at: int = 0
    per_row: int = 0
    per_block: int = 0


class Buffer(NamedTuple):
    """Memory that is there for one call: so many elements a row, and a block of rows."""

    dtype: torch.dtype
    per_row: int = 0
    per_block: int = 0


class Launch(NamedTuple):
    """Of one kernel, on grid[0] * ceil(rows / shape.rows) times grid[1] programs."""

    kernel: Any
    arguments: tuple[Any, ...]  # Argument, float, Tensor of constants, or None
    constants: dict[str, Any]
    shape: shapes.Shape
    grid: tuple[int, int] = (1, 1)


class Program(NamedTuple):
    launches: tuple[Launch, ...]
    buffers: tuple[Buffer, ...] = ()
    block: int = 1  # rows
    group: int = 0  # rows that share the buffers; 0: all
    most: int = 0  # rows that it is for; 0: any number


class Layout(NamedTuple):
    """What of a matrix a program depends on: the stride and the offset of its rows, from 16 bytes, in elements."""

    dtype: torch.dtype
    columns: int
    stride: int
    offset: int

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def arguments(self, base: int, tile: shapes.Tile) -> tuple[Argument, Argument, Argument]:
        """Of a kernel that reads from a 16-byte boundary on, and counts in groups of vec or, shifted, in elements."""
        unit = 1 if tile.shifted else tile.vec
        address = Argument(base, -self.offset * self.itemsize)
        return address, Argument(NUMBER, self.stride // unit), Argument(NUMBER, self.offset // unit)


def layout(x: Tensor | None) -> Layout | None:
    if x is None:
        return None
    return Layout(x.dtype, x.shape[1], x.stride(0), x.data_ptr() % 16 // x.element_size())


@lru_cache(maxsize=1024)
def scores(
    on: torch.device, f: Layout | None, h: Layout | None, q: None, plan: Plan, bias: bool, log: bool, by_row: bool
) -> tuple[Program]:
    """The columns of a plan, [N, columns], or [columns, N] where not `by_row`."""
    C, D = f.columns if f else 0, h.columns if h else 0
    shape = shapes.launch_shape(C, D, f.itemsize if f else 0, plan.sums, plan.block)
    x_tile, x_tiles = shapes.logits_tile(*f[1:], f.itemsize, shape.lanes) if f else (shapes.NOTHING, 0)
    y_tile = shapes.feats_tile(*h[1:], h.itemsize, shape.lanes) if h else shapes.NOTHING
    nothing = None, Argument(NUMBER), Argument(NUMBER)
    logits = f.arguments(LOGITS, x_tile) if f else nothing
    feats = h.arguments(FEATS, y_tile) if h else nothing
    half = h is not None and h.dtype == torch.float16
    constants = shapes.constants(plan, x_tile, x_tiles, y_tile, half, bias, log, shape.rows)
    strides = (Argument(NUMBER, plan.columns), Argument(NUMBER, 1))
    if not by_row:
        strides = (Argument(NUMBER, 1), Argument(NUMBER, 0, 1))
    arguments = (*logits, *feats, _table(plan.table, on), Argument(OUT), *strides, Argument(NUMBER, 0, 1))
    return (Program((Launch(device.scores.scores, arguments, constants, shape),)),)


@lru_cache(maxsize=1024)
def gradient(
    on: torch.device, f: Layout, h: None, q: Layout | None, stat: tuple[str, str, float, float, str], temperature: float
) -> tuple[Program]:
    """A gradient norm, [N] float64; q for the labels "given"."""
    _, labels, order, power, expectation = stat
    order = order if order <= shapes.MOST_GRADIENT_ORDER else math.inf
    given = [x for x in (f, q) if x]
    strides, itemsize = tuple(x.stride for x in given), max(x.itemsize for x in given)
    constants, shape = shapes.gradient_constants(labels, order, power, expectation, f.columns, strides, itemsize)
    table = _table(shapes.gradient_table(order, power, temperature), on)
    rows = [Argument(NUMBER, x.stride // constants["S"].vec) for x in given]
    given_labels: tuple[Any, ...] = (Argument(LABELS), rows[1]) if q else (None, Argument(NUMBER))
    arguments = (Argument(LOGITS), rows[0], *given_labels, table, Argument(OUT), Argument(NUMBER, 0, 1))
    return (Program((Launch(device.gradient.gradient, arguments, constants, shape),)),)


# Bits of a float32 that logits of a narrower type leave 0.
UNUSED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


@lru_cache(maxsize=1024)
def gen(
    on: torch.device, f: Layout, h: None, q: None, stat: tuple[str, float, int], temperature: float
) -> tuple[Program]:
    """[N] float64."""
    _, gamma, M = stat
    constants, shape = shapes.gen_constants(M, f.columns, f.stride, f.itemsize, UNUSED_BITS[f.dtype])
    table = _table((math.log2(math.e) / temperature, gamma, float(min(M, f.columns))), on)
    row = Argument(NUMBER, f.stride // constants["S"].vec)
    arguments = (Argument(LOGITS), row, table, Argument(OUT), Argument(NUMBER, 0, 1))
    return (Program((Launch(device.gen.gen, arguments, constants, shape),)),)


# G and the sums of its blocks as the kernel reads them.
Turned = Callable[[], tuple[Tensor, Tensor]]


def batchgrad(
    on: torch.device, f: Layout, h: Layout, q: None, anchors: Anchors, turned: Turned, plan: Plan
) -> tuple[Program, ...]:
    """anchors.sign times BatchGrad, [N] float32. `plan`: of the maximum, its probability and the rest's."""
    of_rows = shapes.BATCHGRAD_BLOCKS.items()
    return tuple(_batchgrad(on, f, h, anchors, turned(), plan, blocks, most) for most, blocks in of_rows)


def _batchgrad(
    on: torch.device,
    f: Layout,
    h: Layout,
    anchors: Anchors,
    g_and_sums: tuple[Tensor, Tensor],
    plan: Plan,
    of_program: shapes.Blocks,
    most: int,
) -> Program:
    """For up to `most` rows."""
    g, g_sums = g_and_sums
    T, C, D = anchors.temperature, f.columns, anchors.G.shape[1]
    rows, feats = of_program.rows, of_program.feats
    class_blocks, feat_blocks = shapes.blocks_of(C, D)
    parts = feat_blocks * class_blocks
    buffers = (
        Buffer(torch.float32, 0, feat_blocks * feats * rows),  # turned features
        Buffer(torch.float32, 0, feat_blocks * rows),  # their sums
        Buffer(torch.float32, 0, parts * rows),
        Buffer(torch.float32, plan.columns),  # statistics
    )
    x, sums, part, stats = (Argument(BUFFER + i) for i in range(4))
    N, blocks = Argument(NUMBER, 0, 1), Argument(NUMBER, 0, 0, 1)
    ((of_logits,), *_), *_ = scores(on, f, None, None, plan, bias=False, log=False, by_row=False)
    where = of_logits.kernel.arg_names.index("out_ptr")
    arguments = (*of_logits.arguments[:where], stats, *of_logits.arguments[where + 1 :])
    turned = Launch(
        device.batchgrad.turned,
        (Argument(FEATS), Argument(NUMBER, h.stride), x, sums, N, Argument(NUMBER, h.columns), _number(feat_blocks)),
        {"BIAS": anchors.bias, "ROWS": rows, "FEATS": feats, "SOME": shapes.TURNED_ROWS},
        shapes.Shape(rows, 4),
        (rows // shapes.TURNED_ROWS, feat_blocks),
    )
    steps = _number(math.ceil(D / of_program.step))
    counts = (N, _number(C), steps, blocks, _number(class_blocks), _number(feat_blocks))
    summed = Launch(
        device.batchgrad.partial_sums,
        (Argument(LOGITS), _number(f.stride), stats, math.log2(math.e) / T, 1 / T, x, sums, g, g_sums, part, *counts),
        {"B": of_program},
        shapes.Shape(rows, of_program.warps, shapes.BATCHGRAD_REGISTERS),
        (feat_blocks * class_blocks, 1),
    )
    merged = Launch(
        device.batchgrad.merged,
        (part, Argument(OUT), N, Argument(NUMBER, 0, 0, rows), _number(parts), float(anchors.sign)),
        dict(shapes.MERGED),
        shapes.Shape(shapes.MERGED["SOME"], 4),
    )
    group = shapes.batchgrad_rows(C, D)
    return Program((of_logits._replace(arguments=arguments), turned, summed, merged), buffers, rows, group, most)


def batchgrad_route(anchors: Anchors) -> Route:
    plan = shapes.plan_of(Request(("fmax", "msp", "one_minus_msp"), (), (), (3, -1), anchors.temperature))
    assert plan is not None
    turned = cache(partial(_turned, anchors))  # once for all layouts
    programs = partial(batchgrad, anchors=anchors, turned=turned, plan=plan)
    return Route((-1,), torch.float32, (True, True, False), programs)


def scaling(
    on: torch.device, f: Layout, h: Layout, q: None, scaled: Scaling, bias: Callable[[], Tensor | None]
) -> tuple[Program]:
    """[N] float32."""
    k, T = scaled.k(h.columns), scaled.temperature
    of_h, h_shape = shapes.gen_constants(k, h.columns, h.stride, h.itemsize, UNUSED_BITS[h.dtype])
    of_f, f_shape = shapes.gen_constants(f.columns, f.columns, f.stride, f.itemsize, 0)
    of_f = {name: x for name, x in of_f.items() if name not in ("SELECT", "SHIFT")}
    N, factor = Argument(NUMBER, 0, 1), Argument(BUFFER)
    factors = Launch(
        device.scaling.factors,
        (Argument(FEATS), _number(h.stride // of_h["S"].vec), factor, N, _number(k)),
        {"RELU": scaled.relu, "SQUARE": scaled.square, **of_h},
        h_shape,
    )
    table = _table((math.log2(math.e) / T, T), on)
    rows = _number(f.stride // of_f["S"].vec)
    arguments = (Argument(LOGITS), rows, bias(), factor, table, Argument(OUT), N)
    energies = Launch(device.scaling.energies, arguments, of_f, f_shape)
    return (Program((factors, energies), (Buffer(torch.float64, 1),)),)


def scaling_route(scaled: Scaling) -> Route:
    def bias() -> Tensor | None:
        b = scaled.bias
        return None if b is None else _kept(b.device, lambda: b.float().contiguous())

    programs = partial(scaling, scaled=scaled, bias=cache(bias))  # which is read once for all layouts
    return Route((-1,), torch.float32, (True, True, False), programs)


def _number(n: int) -> Argument:
    return Argument(NUMBER, n)


def _turned(anchors: Anchors) -> tuple[Tensor, Tensor]:
    classes, feats = shapes.BATCHGRAD.classes, shapes.BATCHGRAD.feats
    C, D = anchors.G.shape

    def make() -> tuple[Tensor, Tensor]:
        G = torch.nn.functional.pad(anchors.G.float(), (0, -D % feats, 0, -C % classes))
        G = G.unflatten(1, (-1, feats)).unflatten(0, (-1, classes)).transpose(1, 2)  # by class and feature block
        above, below = (x.clamp(min=0).sum(-1, dtype=torch.float64) for x in (G, -G))
        return G.transpose(2, 3).contiguous(), torch.stack([above, below], -1).float()

    return _kept(anchors.G.device, make)


# ---- calls


class Route(Run):
    """Calls that give a result of `shape`, -1 standing for the rows, and of `dtype`; a program for each layout, or
    several for different numbers of rows. `reads`: logits, feats, labels."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        reads: tuple[bool, bool, bool],
        programs: Callable[..., tuple[Program, ...]],
    ) -> None:
        self.shape, self.dtype, self.reads, self.programs = shape, dtype, reads, programs
        self.native = _native.route(shape, dtype == torch.float64) if _native else None
        super().__init__(self._launched, partial(_native.launch, self.native) if self.native else None)
        self.known: set[Any] = set()  # for which native has its programs, or never will

    def _launched(self, f: Tensor | None, h: Tensor | None, q: Tensor | None) -> Tensor:
        f, h, q = (
            _readable(x) if x is not None and read else None for x, read in zip((f, h, q), self.reads, strict=True)
        )
        x = next(x for x in (f, h, q) if x is not None)
        key = x.device, *map(layout, (f, h, q))
        if self.native and len(x) and has_driver(x.device):
            out = _native.launch(self.native, f, h, q)
            if out is None and key not in self.known and self._add(key, f, h, q):
                out = _native.launch(self.native, f, h, q)
            if out is not None:
                return out
        out = torch.empty([len(x) if n < 0 else n for n in self.shape], dtype=self.dtype, device=x.device)
        with _on(x.device):
            fitting = (p for p in self.programs(*key) if not p.most or p.most >= len(x))
            _launched_by_triton(next(fitting), (f, h, q), out)
        return out

    def _add(self, key: tuple[Any, ...], *tensors: Tensor | None) -> bool:
        """Whether launcher.cpp can launch the programs of `key`, the device and layouts, compiled and loaded here."""
        on = key[0]
        self.known.add(key)
        with _on(on), _beside_capture(on):
            inputs = tuple(
                None if x is None else (_TYPES[x.dtype], x.shape[1], x.stride(0), x.data_ptr() % 16) for x in tensors
            )
            for program in self.programs(*key):
                loaded = [_loaded(launch, program, tensors, self.dtype) for launch in program.launches]
                if not all(loaded):
                    return False
                launches, kept = zip(*(x for x in loaded if x), strict=True)
                buffers = tuple((b.per_row * b.dtype.itemsize, b.per_block * b.dtype.itemsize) for b in program.buffers)
                sizes = (program.block, program.group, program.most)
                if on.type == "cuda":
                    _bind_context(on)
                _native.add_program(self.native, inputs, *dlpack_device(on), *sizes, buffers, launches, kept)
        return True


class Compiled(NamedTuple):
    """What the driver needs to know of a loaded kernel, and how many bytes each of its arguments has."""

    function: int
    threads: int
    shared: int
    sizes: tuple[int, ...]
    kernel: Any


def _loaded(
    launch: Launch, program: Program, tensors: tuple[Tensor | None, ...], out: torch.dtype
) -> tuple[Any, Any] | None:
    """A launch as launcher.cpp reads it, and what has to stay alive for it; None for a kernel that it does not know."""

    def example(x: Any) -> Any:
        """What Triton compiles for: pointers are known by their type, and by whether they are aligned."""
        if not isinstance(x, Argument):
            return x
        if x.base == NUMBER:
            return 2 if x.per_row or x.per_block else x.at
        if x.base >= BUFFER:
            return program.buffers[x.base - BUFFER].dtype
        tensor = None if x.base == OUT else tensors[x.base - LOGITS]
        if tensor is None:
            return out
        return tensor.dtype if x.at or tensor.data_ptr() % 16 == 0 else tensor

    given = [x for x in launch.arguments if x is not None]
    compiled = compiled_kernel(launch, tuple(map(example, launch.arguments)))
    if compiled is None or len(compiled.sizes) < len(given):
        return None
    arguments = []
    for x, size in zip(given, compiled.sizes, strict=False):
        if isinstance(x, float):
            x = Argument(NUMBER, int.from_bytes(struct.pack("<f", x), "little"))
        elif isinstance(x, Tensor):
            x = Argument(NUMBER, x.data_ptr())
        arguments.append((x.base, size, *x[1:]))
    # What comes after our arguments are Triton's own pointers to scratch memory, of which these kernels have none.
    arguments += [(NUMBER, size, 0, 0, 0) for size in compiled.sizes[len(given) :]]
    description = (*compiled[:3], launch.shape.rows, *launch.grid, tuple(arguments))
    return description, (compiled.kernel, given)


def compiled_kernel(launch: Launch, examples: tuple[Any, ...]) -> Compiled | None:
    kernel = launch.kernel.warmup(*examples, grid=(1,), **launch.constants, **launch.shape.options)
    kernel._init_handles()
    about = kernel.metadata
    header = re.search(r"\.entry\s+\w+\((.*?)\)", kernel.asm["ptx"], re.S)
    scratch = getattr(about, "global_scratch_size", 0) or getattr(about, "profile_scratch_size", 0)
    if header is None or scratch:
        return None
    sizes = tuple(int(bits) // 8 for bits in re.findall(r"\.param\s+\.[a-z]+(\d+)", header[1]))
    return Compiled(kernel.function, 32 * about.num_warps, about.shared, sizes, kernel)


def _launched_by_triton(program: Program, tensors: tuple[Tensor | None, ...], out: Tensor) -> None:
    rows = next(len(x) for x in tensors if x is not None)
    for first in range(0, rows, program.group or max(1, rows)):
        n = min(program.group or rows, rows - first)
        blocks = math.ceil(n / program.block)
        some = [x if x is None else x[first : first + n] for x in tensors]
        some.append(out[first : first + n] if program.group else out)
        for buffer in program.buffers:
            size = buffer.per_row * n + buffer.per_block * blocks
            some.append(torch.empty(size, dtype=buffer.dtype, device=out.device))
        for launch in program.launches:
            arguments = [_value(x, some, n, blocks) for x in launch.arguments]
            grid = (math.ceil(n / launch.shape.rows) * launch.grid[0], launch.grid[1])
            launch.kernel[grid](*arguments, **launch.constants, **launch.shape.options)


def _value(x: Any, tensors: list[Any], rows: int, blocks: int) -> Any:
    if not isinstance(x, Argument):
        return x
    value = x.at + x.per_row * rows + x.per_block * blocks
    if x.base == NUMBER:
        return value
    base = tensors[x.base - LOGITS]
    return base.as_strided((1,), (1,), base.storage_offset() + value // base.element_size()) if value else base


# ---- tensors and devices


def _readable(x: Tensor) -> Tensor:
    """`x` with the elements of a row beside each other, in memory that may be read from a 16-byte boundary on."""
    x = x.detach().resolve_neg()
    if x.dtype == torch.float64:  # labels, which the kernel reads as float32
        x = x.float()
    if (x.stride(1) != 1 and x.shape[1] != 1) or (x.data_ptr() == 0 and x.numel()):
        x = x.clone(memory_format=torch.contiguous_format)  # the second: torch's tensor of zeros without memory
    if x.data_ptr() % 16 and (x.data_ptr() - x.storage_offset() * x.element_size()) % 16:
        x = x.clone(memory_format=torch.contiguous_format)  # memory of someone else's, which begins anywhere
    return x


@lru_cache(maxsize=1 << 16)  # a CUDA graph has the addresses
def _table(numbers: tuple[float, ...], on: torch.device) -> Tensor:
    return _kept(on, lambda: torch.tensor(numbers, dtype=torch.float64, device=on))


def _kept(on: torch.device, make: Callable[[], Made]) -> Made:
    """What `make` makes of tensors that are there already, in memory that no CUDA graph counts among its own.

    A compiler that warms up a graph takes all that its thread allocates for the graph's, and refuses what stays.
    """

    def apart() -> Made:
        with torch.no_grad(), torch.cuda.device(on), _relaxed(on):
            made = make()
            torch.cuda.current_stream().synchronize()  # other streams read it too
            return made

    if on.type != "cuda":
        with torch.inference_mode(False):
            return make()
    if not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(on).synchronize()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(apart).result()


def _on(on: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(on) if on.type == "cuda" else nullcontext()


@lru_cache
def _driver() -> Any:
    """The CUDA driver's library, told to launcher.cpp; None without one."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    names = ("cuLaunchKernel", "cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2")
    _native.use_driver(*(ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names))
    return library


def _bind_context(on: torch.device) -> None:
    """A thread in which nothing ran yet has no context, and where all its kernels are loaded already it gets none."""
    context = ctypes.c_void_p()
    _driver().cuCtxGetCurrent(ctypes.byref(context))
    if not context:
        _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), on.index)
        _driver().cuCtxSetCurrent(context)


def has_driver(on: torch.device) -> bool:
    return on.type == "cuda" and not torch.version.hip and _driver() is not None


def dlpack_device(on: torch.device) -> tuple[int, int]:
    return (2, on.index) if on.type == "cuda" else (1, 0)


def _beside_capture(on: torch.device) -> AbstractContextManager[Any]:
    """Kernels that are loaded here stay out of a CUDA graph that this thread captures."""
    return _relaxed(on) if on.type == "cuda" and torch.cuda.is_current_stream_capturing() else nullcontext()


@contextmanager
def _relaxed(on: torch.device) -> Iterator[None]:
    """On a stream of its own, this thread may do what a capture, its own or another's, forbids it by default."""
    mode = ctypes.c_int(2)
    if has_driver(on):
        _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        with torch.cuda.stream(torch.cuda.Stream(on)):
            yield
    finally:
        if has_driver(on):
            _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

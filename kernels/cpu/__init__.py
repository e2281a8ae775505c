"""C++ over torch's own threads, for CPU tensors: one read of each row, whatever is asked for."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastood.kernels import reference
from fastood.kernels.contract import Anchors, Column, Request, Run, Scaling, Work, result_dtype
from fastood.kernels.seam import MODES

_native: Any = None
MISSING = ""  # why there is no C++ part
# The statistics' numbers, as the C++ part was built with them: one that the table got since is left to the reference.
_STATS: dict[str, int] = {}
try:
    _native = import_module("fastood.kernels.cpu._native")
    _STATS = {name: i for i, name in enumerate(_native.statistics())}
    _native.use_numpy(np.ndarray, np.empty)
except (ImportError, AttributeError) as error:  # the second is of a part that was built from older sources
    _native, MISSING = None, str(error)

# The numbers that plan.h gives them.
_LABELS = {"uniform": 0, "predicted": 1, "log_predicted": 2, "given": 3}
_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_MOST_POWER_SUMS, _MOST_ORDERS = 8, 32  # of one call; as many statistics as orders


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    if _native is None:
        return f"its C++ part was not built; reinstall fastood where there is a C++ compiler ({MISSING})"
    if device.type != "cpu":
        return "it serves CPU tensors"
    return None


def _within(temperature: float) -> bool:
    """Whether no float sum overflows."""
    return 2.0**-100 <= temperature <= 2.0**80


def supports(work: Work, C: int, D: int) -> bool:
    if not _within(work.temperature):
        return False
    if isinstance(work, Request):
        return _supports(work)
    return isinstance(work, Anchors) or D > 0


def _supports(request: Request) -> bool:
    names = [s if isinstance(s, str) else s[0] for s in request.stats]
    return (
        all(name in _STATS for name in names)  # one of somebody's own, the reference knows
        and max(len(names), len(request.orders)) <= _MOST_ORDERS
        and names.count("power_sum") <= _MOST_POWER_SUMS
        and ("gradient" not in names or (len(names) == 1 and _float32_will_do(*request.stats[0][1:])))
    )


def _float32_will_do(q: Any, order: Any, power: Any, expectation: Any) -> bool:
    """Not for || q - p || in orders near 0: there what float32 does not hold of p counts, where q is 0."""
    return q != "given" or expectation == "outside" or order >= 0.4


def compile(request: Request) -> Run:
    plan = _plan_of(request)
    # Python's part of the long way takes longer than a row of 1000 logits.
    return Run(partial(_scores, plan, request), partial(_native.quick, plan, request.shape))


def _scores(plan: Any, request: Request, logits: Tensor | None, feats: Tensor | None, labels: Tensor | None) -> Tensor:
    f, f_arguments = _argument(logits if request.stats else None)
    h, h_arguments = _argument(feats if request.orders else None)
    q, q_arguments = _argument(labels)
    x = logits if logits is not None else feats
    assert x is not None
    dtype = result_dtype(logits, feats) if request.columns else torch.float64
    out = x.new_empty(request.sized(len(x)), dtype=dtype)  # beside x, whatever the default device
    arguments = out.data_ptr(), _TYPES[dtype], request.by_row, *q_arguments
    _native.run(plan, len(x), *f_arguments, *h_arguments, *arguments)
    del f, h, q  # their addresses were read: until here they needed a name
    return out


def _plan_of(request: Request) -> Any:
    """The request as the C++ part reads it."""
    stats: list[Any] = [(s,) if isinstance(s, str) else s for s in request.stats]
    numbers = tuple(_STATS[s[0]] for s in stats)
    exponents = tuple(float(s[1]) if s[0] in ("power_sum", "gen") else 0.0 for s in stats)
    counts = tuple(min(int(s[2]), 1 << 62) if s[0] == "gen" else 0 for s in stats)
    gradient: tuple[Any, ...] = ()
    if stats and stats[0][0] == "gradient":
        _, q, order, power, expectation = stats[0]
        gradient = expectation == "outside", _LABELS[q], order, power
    options = request.orders, request.bias, request.log, request.columns
    return _native.prepare(request.temperature, numbers, exponents, counts, *options, gradient)


def batchgrad(anchors: Anchors) -> Run:
    return Run(_BatchGrad(anchors))


def _again(out: Tensor, definition: Run, logits: Tensor, feats: Tensor) -> None:
    """What holds, or comes to, an infinity or a NaN is left to the definition."""
    for rows in out.isfinite().logical_not().nonzero()[:, 0].split(64):
        out[rows] = definition(logits[rows], feats[rows]).to(out.dtype)


class _BatchGrad:
    def __init__(self, anchors: Anchors) -> None:
        self.anchors = anchors
        self.sums = _plan_of(Request(("lse",), (), (), (1, -1), anchors.temperature))
        self.norms = anchors.G.abs().sum(-1, dtype=torch.float64)
        self.norm = self.norms.sum().item()
        self.padded: dict[torch.dtype, Tensor] = {}

    def __call__(self, logits: Any, feats: Any, labels: Any) -> Tensor:
        anchors = self.anchors
        dtype = result_dtype(logits, feats, anchors.G)
        if dtype == torch.float64:
            logits, feats = logits.double(), feats.double()
        if dtype not in self.padded:
            padded = torch.nn.functional.pad(anchors.G.to(dtype), (0, -anchors.G.shape[1] % 16))
            self.padded[dtype] = padded.contiguous()
        G = self.padded[dtype]
        f, f_arguments = _argument(logits)
        h, h_arguments = _argument(feats)
        out = logits.new_empty(len(logits), dtype=torch.float64)
        arguments = (G.data_ptr(), G.shape[1], self.norms.data_ptr(), self.norm, out.data_ptr())
        finite = _native.batchgrad(self.sums, len(out), *f_arguments, *h_arguments, anchors.bias, *arguments)
        del f, h
        if anchors.sign < 0:
            out.neg_()
        if not finite:
            _again(out, reference.batchgrad(anchors), logits, feats)
        return out.to(dtype)


def scaled(scaling: Scaling) -> Run:
    energy = Request(("energy",), (), (Column(((0, 1.0),)),), (-1,), scaling.temperature)
    return Run(partial(_scaled_energy, _plan_of(energy), scaling))


def _scaled_energy(plan: Any, scaling: Scaling, logits: Any, feats: Any, labels: Any) -> Tensor:
    dtype = result_dtype(logits, feats)
    if dtype == torch.float64:
        logits, feats = logits.double(), feats.double()
    f, f_arguments = _argument(logits)
    h, h_arguments = _argument(feats)
    b = None if scaling.bias is None else scaling.bias.to(dtype).contiguous()
    out = logits.new_empty(len(logits), dtype=dtype)
    options = scaling.k(feats.shape[1]), scaling.relu, scaling.square, out.data_ptr()
    finite = _native.scaled(plan, len(out), *f_arguments, *h_arguments, 0 if b is None else b.data_ptr(), *options)
    del f, h, b
    if not finite:
        _again(out, reference.scaled(scaling), logits, feats)
    return out


def _argument(x: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    """A matrix with inner stride 1, and its address, type, columns and row stride."""
    if x is None:
        return None, (0, _TYPES[torch.float32], 0, 0)
    x = x.resolve_neg()  # a view that is to be negated when it is read
    if (x.stride(1) != 1 and x.shape[1] > 1) or (x.data_ptr() == 0 and x.numel()):
        x = x.clone(memory_format=torch.contiguous_format)  # the second: torch's tensor of zeros without memory
    return x, (x.data_ptr(), _TYPES[x.dtype], x.shape[1], x.stride(0))


def _torch_threads() -> int:
    """The address of torch's own thread pool (torch_parallel_for, since 2.10), so that set_num_threads holds; or 0."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


if _native is not None:
    _kinds = tuple({"dtype": dtype} for dtype in (torch.float32, torch.float64, torch.uint8))
    # Since 2.10. Without it no tensor is read in C++, and every call goes the long way.
    if exchange := getattr(Tensor, "__dlpack_c_exchange_api__", None):
        _native.use_torch(Tensor, _kinds, exchange, MODES, forward_ad)
    _native.use_threads_of(_torch_threads())
    # A forked child has the parent's thread pool but not its threads, and would wait for them for ever.
    os.register_at_fork(after_in_child=lambda: _native.use_threads_of(0))
    if isa := os.environ.get("FASTOOD_CPU_ISA"):
        try:
            _native.use_isa(isa)
        except ValueError as error:
            raise ValueError(f"FASTOOD_CPU_ISA {error}") from None

"""C++ over torch's own threads, for CPU tensors: one read of each row, whatever is asked for."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastood.kernels import reference
from fastood.kernels.seam import MODES, traced

_native: Any = None
MISSING = ""  # why there is no C++ part
# The statistics' numbers, as the C++ part was built with them: one that the table got since is left to the reference.
_STATS: dict[str, int] = {}
try:
    _native = import_module("fastood.kernels.cpu._native")
    _STATS = {name: i for i, name in enumerate(_native.statistics())}
except (ImportError, AttributeError) as error:  # the second is of a part that was built from older sources
    _native, MISSING = None, str(error)

if TYPE_CHECKING:
    from fastood.kernels import Anchors, Job, Product, Stat, Want

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


def _left(temperature: float) -> bool:
    """Whether float sums may overflow, which is left to the reference."""
    return not 2.0**-100 <= temperature <= 2.0**80


def row_stats(
    logits: Tensor | None, feats: Tensor | None, want: Want, labels: Tensor | None = None
) -> tuple[dict[Stat, Tensor], Tensor | None]:
    if _left(want.temperature) or traced(logits, feats, labels):
        return reference.row_stats(logits, feats, want, labels)
    if _prepared(want) is not None:
        return _run(logits, feats, want, labels)
    ours = tuple(s for s in want.stats if _name(s) in _STATS)
    others = want._replace(stats=tuple(s for s in want.stats if s not in ours), orders=())
    stats = reference.row_stats(logits, None, others, labels)[0]
    n = 1 if _gradients(want) else _MOST_POWER_SUMS  # in parts that fit one call
    for i in range(0, len(ours), n):
        stats |= _run(logits, None, want._replace(stats=ours[i : i + n], orders=()), labels)[0]
    norms = []
    for i in range(0, len(want.orders), _MOST_ORDERS):
        norms.append(_run(None, feats, want._replace(stats=(), orders=want.orders[i : i + _MOST_ORDERS]))[1])
    return stats, torch.cat([x for x in norms if x is not None], -1) if norms else None


def products(
    logits: Tensor | None,
    feats: Tensor | None,
    job: Job,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    by_row: bool,
    labels: Tensor | None = None,
) -> Tensor | None:
    plan = prepared(job)
    if plan is None or _left(job.want.temperature) or traced(logits, feats, labels):
        return None
    f, f_arguments = _argument(logits if job.want.stats else None)
    h, h_arguments = _argument(feats if job.want.orders else None)
    q, q_arguments = _argument(labels)
    x = logits if logits is not None else feats
    assert x is not None
    out = x.new_empty(shape, dtype=dtype)  # beside x, whatever the default device
    rows = shape[0 if by_row else 1]
    _native.products(plan, rows, *f_arguments, *h_arguments, out.data_ptr(), _TYPES[dtype], by_row, *q_arguments)
    del f, h, q  # their addresses were read: until here they needed a name
    return out


def plain(work: Job | Anchors, shape: tuple[int, ...]) -> Callable[[Any, Any, Any], Any] | None:
    """Python's part of ``products`` takes longer than a row of 1000 logits."""
    return partial(_native.plain, work.prepared["cpu"], shape) if "cpu" in work.prepared else None


def batchgrad(logits: Tensor, feats: Tensor, anchors: Anchors) -> Tensor:
    if _left(anchors.temperature) or traced(logits, feats, anchors.G):
        return reference.batchgrad(logits, feats, anchors)
    dtype = torch.float32
    if torch.float64 in (logits.dtype, feats.dtype, anchors.G.dtype):
        dtype, logits, feats = torch.float64, logits.double(), feats.double()
    if dtype not in anchors.prepared:
        plan = _native.prepare(anchors.temperature, (_STATS["lse"],), (0.0,), (0,), (), False, False, (), ())
        norms = anchors.G.abs().sum(-1, dtype=torch.float64)
        padded = torch.nn.functional.pad(anchors.G.to(dtype), (0, -anchors.G.shape[1] % 16)).contiguous()
        anchors.prepared[dtype] = plan, padded, norms, norms.sum().item()
    plan, G, norms, norm = anchors.prepared[dtype]
    f, f_arguments = _argument(logits)
    h, h_arguments = _argument(feats)
    out = logits.new_empty(len(logits), dtype=torch.float64)
    arguments = (G.data_ptr(), G.shape[1], norms.data_ptr(), norm, out.data_ptr())
    finite = _native.batchgrad(plan, len(out), *f_arguments, *h_arguments, anchors.bias, *arguments)
    del f, h
    if anchors.sign < 0:
        out.neg_()
    if not finite:  # what holds, or comes to, an infinity or a NaN is left to the definition
        for rows in out.isfinite().logical_not().nonzero()[:, 0].split(64):
            out[rows] = reference.batchgrad(logits[rows], feats[rows], anchors)
    return out


def _run(
    logits: Tensor | None, feats: Tensor | None, want: Want, labels: Tensor | None = None
) -> tuple[dict[Stat, Tensor], Tensor | None]:
    x = logits if logits is not None else feats
    assert x is not None
    f, f_arguments = _argument(logits if want.stats else None)
    h, h_arguments = _argument(feats if want.orders else None)
    q, q_arguments = _argument(labels)
    stats = x.new_empty((len(want.stats), len(x)), dtype=torch.float64)
    norms = x.new_empty((len(x), len(want.orders)), dtype=torch.float64)
    out = stats.data_ptr(), norms.data_ptr()
    _native.row_stats(_prepared(want), len(x), *f_arguments, *h_arguments, *out, *q_arguments)
    del f, h, q
    return dict(zip(want.stats, stats.unbind(), strict=True)), norms if want.orders else None


def prepared(job: Job) -> object | None:
    """The job as the C++ part reads it, worked out once; None where it cannot do it in one call."""
    if "cpu" not in job.prepared:
        job.prepared["cpu"] = _prepared(job.want, job.products)
    return job.prepared["cpu"]


@lru_cache
def _prepared(want: Want, products: tuple[Product, ...] = ()) -> object | None:
    powers, gradients = sum(s[0] == "power_sum" for s in want.stats), _gradients(want)
    if max(len(want.orders), len(want.stats)) > _MOST_ORDERS or powers > _MOST_POWER_SUMS:
        return None
    if gradients and len(want.stats) > 1:
        return None
    if not all(_name(s) in _STATS for s in want.stats):  # one of somebody's own, which the reference knows
        return None
    stats = tuple(_STATS[_name(s)] for s in want.stats)
    exponents = tuple(float(s[1]) if s[0] in ("power_sum", "gen") else 0.0 for s in want.stats)
    counts = tuple(min(int(s[2]), 1 << 62) if len(s) == 3 and s[0] == "gen" else 0 for s in want.stats)
    gradient: tuple[Any, ...] = ()
    for _, q, order, power, expectation in gradients:
        gradient = expectation == "outside", _LABELS[q], order, power
    options = want.orders, want.bias, want.log, products
    return _native.prepare(want.temperature, stats, exponents, counts, *options, gradient)


def _name(stat: Stat) -> str:
    return stat if isinstance(stat, str) else stat[0]


def _gradients(want: Want) -> list[Any]:
    return [s for s in want.stats if s[0] == "gradient"]


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
        _native.use_level(isa)

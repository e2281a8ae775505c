"""Row statistics, and the one place that decides who computes them.

Every score of fastood is an O(N) formula over a few numbers per row. A *backend* is a module in
this folder that computes those numbers; it has five functions:

``row_stats(logits, feats, want, labels) -> (stats, norms)``
    ``stats`` maps each name in ``want.stats`` to a tensor ``[N]``; ``norms`` is ``[N, P]`` with one
    column per order in ``want.orders`` (``None`` where none was asked for). Both come in float32
    or wider; norms and gradients always in float64, so that U * V overflows only where the product does.
    The norm of finite features is finite, the largest double where it is beyond them.
    ``labels`` is the q of a gradient whose q is "given", [N, C] of any float type, not yet checked: a row
    that is no distribution gives NaN.
``products(logits, feats, job, shape, dtype, by_row, labels) -> out | None``
    Finished scores in one go: each ``Product`` of the job, [N, K] where `by_row`, else [K, N], as `shape`; or
    None where it has no such kernel (for these inputs), and ``row_stats`` is asked instead.
``plain(work, shape) -> call | None``
    The short way for tensors that need nothing done to them, of a job or of anchors that the backend served before:
    ``call(logits, feats, labels)`` gives float32 of `shape`, in which -1 stands for the rows, or None where the long
    way must be gone, which can tell what is wrong with the tensors. None where a backend has no such way.
``batchgrad(logits, feats, anchors) -> out``
    The one score that is no product of row statistics, raw times ``anchors.sign``, [N].
``unusable(device, dtype) -> str | None``
    Why it cannot serve tensors of that device and dtype here, or None where it can.

Which statistics exist, and what each one means, is ``STATISTICS`` below, made from the table in
statistics.py: the contract between scores and backends. A backend leaves those that it lacks to
the reference.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from fastood.kernels import cpu, operator, reference, triton
from fastood.kernels.operator import Operator
from fastood.kernels.seam import constant, differentiated, exporting
from fastood.kernels.statistics import TABLE

if TYPE_CHECKING:
    from torch import Tensor

# A statistic is named by a string, or by a tuple of a string and its parameters.
Stat = str | tuple[str, float] | tuple[str, float, int] | tuple[str, str, float, float, str]

STATISTICS: dict[str, str] = {s.name: s.meaning for s in TABLE}


class Want(NamedTuple):
    """What one call asks a backend for. Work is proportional to it."""

    stats: tuple[Stat, ...] = ()
    orders: tuple[float, ...] = ()
    temperature: float = 1.0
    bias: bool = False  # norms of [h; 1] instead of h
    log: bool = False  # log ||h||_r instead of ||h||_r


class Product(NamedTuple):
    """One finished score: factor * stats[stat] * (norms[order] / divisor) ** power; -1 for a term that is not there."""

    stat: int
    order: int
    factor: float
    power: int
    divisor: float


class Job:
    """Finished scores that are asked for again and again."""

    def __init__(self, want: Want, products: tuple[Product, ...]) -> None:
        self.want, self.products = want, products
        self.prepared: dict[Any, Any] = {}  # what backends made of it


class Anchors:
    """The constant of BatchGrad: G = sum_i (1/T) (e_{y_i} - p(x_i)) h_i^T of its anchors."""

    def __init__(self, G: Tensor, temperature: float, bias: bool, sign: int = 1) -> None:
        self.G, self.temperature, self.bias, self.sign = G, temperature, bias, sign
        self.prepared: dict[Any, Any] = {}  # what backends made of it

    def __reduce__(self) -> Any:
        return Anchors, (self.G, self.temperature, self.bias, self.sign)  # copies and pickles prepare their own


class Backend(Protocol):
    def row_stats(
        self, logits: Tensor | None, feats: Tensor | None, want: Want, labels: Tensor | None = None
    ) -> tuple[dict[Stat, Tensor], Tensor | None]: ...

    def products(
        self,
        logits: Tensor | None,
        feats: Tensor | None,
        job: Job,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        by_row: bool,
        labels: Tensor | None = None,
    ) -> Tensor | None: ...

    def plain(self, work: Job | Anchors, shape: tuple[int, ...]) -> Callable[[Any, Any, Any], Any] | None: ...

    def batchgrad(self, logits: Tensor, feats: Tensor, anchors: Anchors) -> Tensor: ...

    def unusable(self, device: torch.device, dtype: torch.dtype) -> str | None: ...


# What "auto" stands for, for a whole process.
DEFAULT = os.environ.get("FASTOOD_BACKEND", "auto")

# In order of preference: "auto" takes the first that can serve the tensors at hand.
BACKENDS: dict[str, Backend] = {"cpu": cpu, "triton": triton, "reference": reference}


class BackendStatus(NamedTuple):
    usable: bool
    why: str


def select(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called `name` ("auto": the best usable one) for tensors of this device and dtype.

    While torch.compile traces, that is an ``Operator`` which calls it when the graph runs: see kernels/operator.py.
    """
    if torch.compiler.is_compiling():
        # What is exported holds plain torch operations, so that it loads without fastood, but where a name is given.
        plain = (name == "auto" and exporting()) or differentiated()
        chosen = "reference" if plain else _name_of(name, device, dtype)
        return (
            Operator(chosen, always=name != "auto")
            if chosen != "reference" and device.type in operator.DEVICES
            else reference
        )
    return BACKENDS[_name_of(name, device, dtype)]


@constant
def _name_of(name: str, device: torch.device, dtype: torch.dtype) -> str:
    if name == "auto":
        name = DEFAULT
    if name == "auto":
        if cpu.MISSING and device.type == "cpu":
            advice = "Reinstall fastood where there is a C++ compiler."
            _warn_once(f"fastood's C++ kernels were not built ({cpu.MISSING})", advice)
        if device.type == "cuda" and (reason := triton.missing()):
            _warn_once(f"fastood's Triton kernels cannot be used ({reason})", "Install a newer Triton.")
        return next(name for name, b in BACKENDS.items() if b.unusable(device, dtype) is None)
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend (or FASTOOD_BACKEND) must be 'auto' or one of {sorted(BACKENDS)}, got {name!r}")
    if reason := BACKENDS[name].unusable(device, dtype):
        raise RuntimeError(f"backend {name!r} cannot serve {dtype} on {device}: {reason}")
    return name


@cache
def _warn_once(what: str, advice: str) -> None:
    warnings.warn(f"{what}: plain PyTorch does their work, several times slower. {advice}", stacklevel=4)


def backends(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, BackendStatus]:
    """Every backend, in the order "auto" tries them, with whether and why it can serve here.

    Parameters
    ----------
    device, dtype
        The tensors that it would have to serve.

    Returns
    -------
    dict
        Name -> ``BackendStatus(usable, why)``.

    Examples
    --------
    >>> import fastood
    >>> fastood.backends()["reference"].usable
    True
    """
    status = {}
    for name, backend in BACKENDS.items():
        reason = backend.unusable(torch.device(device), dtype)
        status[name] = BackendStatus(reason is None, reason or (backend.__doc__ or "").strip().split("\n")[0])
    return status

"""Row statistics, and the one place that decides who computes them.

contract.py says what is asked of a backend, statistics.py which statistics there are. A call comes here for a backend
(``select``) and for its request as that backend carries it out (``prepared``): with the reference's help where the
backend does not support it as a whole. BatchGrad and SCALE have no parts (``supporting``).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastood._fork import one_thread_if_forked
from fastood.kernels import cpu, operator, reference, triton
from fastood.kernels.contract import (
    NO_NORM,
    ONE,
    Anchors,
    Backend,
    Column,
    Request,
    Run,
    Scaling,
    Stat,
    Work,
    result_dtype,
)
from fastood.kernels.operator import Operator
from fastood.kernels.seam import constant, differentiated, exporting, traced
from fastood.kernels.statistics import TABLE

__all__ = [
    "BACKENDS", "NO_NORM", "ONE", "STATISTICS", "Anchors", "Backend", "Column", "Request", "Run", "Scaling", "Stat",
    "backends", "linear", "operator_name", "prepared", "select", "supporting",
]  # fmt: skip

STATISTICS: dict[str, str] = {s.name: s.meaning for s in TABLE}
"""What each row statistic is, by name: ``row_stats`` gives them, and a ``Score`` is made of them."""

# What "auto" stands for, for a whole process.
DEFAULT = os.environ.get("FASTOOD_BACKEND", "auto")

# In order of preference: "auto" takes the first that can serve the tensors at hand.
BACKENDS: dict[str, Backend] = {"cpu": cpu, "triton": triton, "reference": reference}


def supporting(backend: Backend, work: Work, C: int, D: int) -> Backend:
    """The backend where it carries this out, for rows of C logits and D features; else the reference."""
    return backend if backend.supports(work, C, D) else reference


def prepared(backend: Backend, request: Request, C: int, D: int) -> Run:
    """The request as the backend carries it out for rows of C logits and D features, worked out once."""
    if torch.compiler.is_compiling():  # which traces what there is, with sizes that are no numbers yet
        return backend.compile(request)
    return _prepared(backend, request, *_read(request, C, D))


@lru_cache(maxsize=1024)
def _prepared(backend: Backend, request: Request, C: int, D: int) -> Run:
    if backend.supports(request, C, D):
        return backend.compile(request)
    taken: list[bool] = []
    whole: list[Column] = []
    for column in request.columns:
        some = request.only([*whole, column])
        taken.append(backend.supports(some, *_read(some, C, D)))
        if taken[-1]:
            whole.append(column)
    if whole and not all(taken):
        return _of_columns(backend, request, taken, C, D)
    return _of_parts(backend, request, C, D)


def _of_columns(backend: Backend, request: Request, taken: list[bool], C: int, D: int) -> Run:
    """The columns that a backend makes together, those that are `taken`, and then the others."""
    of_each = [*zip(request.columns, taken, strict=True)]
    some = [request.only([column for column, its in of_each if its is one]) for one in (True, False)]
    neighbours = [(its, len([*group])) for its, group in groupby(taken)]

    def made(found: list[Tensor], dtype: torch.dtype) -> Tensor:
        parts = {
            one: iter(columns.split([n for its, n in neighbours if its is one]))
            for one, columns in zip((True, False), found, strict=True)
        }
        out = torch.cat([next(parts[its]) for its, _ in neighbours])
        return (out.T if request.by_row else out).reshape(request.sized(out.shape[1]))

    return _of_several([_prepared(backend, x, *_read(x, C, D)) for x in some], made)


def _of_parts(backend: Backend, request: Request, C: int, D: int) -> Run:
    """Statistics and norms from as few calls as it takes, the reference's for those that the backend does not know, and
    the columns made of them in PyTorch."""
    parts = [*(((s,), ()) for s in request.stats), *(((), (r,)) for r in request.orders)]
    groups: list[tuple[Backend, Request]] = []
    for stats, orders in parts:
        alone = request.of(stats, orders)
        by = supporting(backend, alone, *_read(alone, C, D))
        for i, (other, group) in enumerate(groups):
            both = request.of((*group.stats, *stats), (*group.orders, *orders))
            if other is by and by.supports(both, *_read(both, C, D)):
                groups[i] = by, both
                break
        else:
            groups.append((by, alone))
    names = [name for _, group in groups for name in (*group.stats, *group.orders)]
    places = [names.index(name) for name in (*request.stats, *request.orders)]

    def made(found: list[Tensor], dtype: torch.dtype) -> Tensor:
        columns = [column for some in found for column in some.unbind()]
        values = [columns[i] for i in places]
        return reference.multiplied(values, request, dtype) if request.columns else torch.stack(values)

    return _of_several([by.compile(group) for by, group in groups], made)


def _of_several(runs: list[Run], made: Callable[[list[Tensor], torch.dtype], Tensor]) -> Run:
    """What is made of the results of several runs."""

    def call(logits: Tensor | None, feats: Tensor | None, labels: Tensor | None) -> Tensor:
        return made([run(logits, feats, labels) for run in runs], result_dtype(logits, feats))

    def quick(logits: Any, feats: Any, labels: Any) -> Tensor | None:
        found: list[Tensor] = []
        for run in runs:
            out = run.quick and run.quick(logits, feats, labels)
            if not isinstance(out, Tensor):
                return None
            found.append(out)
        one_thread_if_forked()
        return made(found, result_dtype(logits, feats))

    return Run(call, quick if all(run.quick for run in runs) else None)


def _read(request: Request, C: int, D: int) -> tuple[int, int]:
    return C if request.stats else 0, D if request.orders else 0


def linear(
    backend: Backend, request: Request, feats: Tensor, weight: Tensor, bias: Tensor | None, predict: bool
) -> tuple[list[Tensor], Tensor | None] | None:
    """What a ``FromLayer`` gives, None also of a backend that is none."""
    own = getattr(backend, "linear", None)
    return own and own(request, feats, weight, bias, predict)


class BackendStatus(NamedTuple):
    usable: bool
    why: str


def select(name: str, device: torch.device, dtype: torch.dtype, *tensors: Tensor | None) -> Backend:
    """The backend called `name` ("auto": the best usable one) for these tensors, of this device and result type.

    The reference, whatever the name, where something looks into torch's operations. While torch.compile traces, an
    ``Operator`` which calls the backend when the graph runs: see kernels/operator.py.
    """
    if torch.compiler.is_compiling():
        chosen = "reference" if differentiated() else operator_name(name, device, dtype)
        return reference if chosen == "reference" else Operator(chosen, always=name != "auto")
    backend = BACKENDS[_name_of(name, device, dtype)]
    return reference if traced(*tensors) else backend


def operator_name(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend whose operator a graph is to hold; "reference" for plain operations."""
    return _checked(*_found_for_graph(name, device, dtype))


@constant
def _found_for_graph(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    # What is exported holds plain operations, so that it loads without fastood, but where a name is given.
    if name == "auto" and exporting():
        return "reference", ""
    found, mistake = _found(name, device, dtype)
    return (found if mistake or device.type in operator.DEVICES else "reference"), mistake


def _name_of(name: str, device: torch.device, dtype: torch.dtype) -> str:
    return _checked(*_found(name, device, dtype))


def _checked(found: str, mistake: str) -> str:
    if mistake:
        raise (RuntimeError if found else ValueError)(mistake)
    return found


@constant
def _found(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend's name, "" of an unknown one, and what is wrong: to raise it here would be an error of the compiler's
    for one that traces."""
    if name == "auto":
        name = DEFAULT
    if name == "auto":
        if cpu.MISSING and device.type == "cpu":
            advice = "Reinstall fastood where there is a C++ compiler."
            _warn_once(f"fastood's C++ kernels were not built ({cpu.MISSING})", advice)
        if device.type == "cuda" and (reason := triton.missing()):
            _warn_once(f"fastood's Triton kernels cannot be used ({reason})", "Install a newer Triton.")
        return next(name for name, b in BACKENDS.items() if b.unusable(device, dtype) is None), ""
    if not isinstance(name, str) or name not in BACKENDS:
        return "", f"backend (or FASTOOD_BACKEND) must be 'auto' or one of {sorted(BACKENDS)}, got {name!r}"
    if reason := BACKENDS[name].unusable(device, dtype):
        return name, f"backend {name!r} cannot serve {dtype} on {device}: {reason}"
    return name, ""


@cache
def _warn_once(what: str, advice: str) -> None:
    warnings.warn(f"{what}: plain PyTorch does their work, several times slower. {advice}", stacklevel=5)


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

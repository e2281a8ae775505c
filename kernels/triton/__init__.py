"""Triton kernels, for CUDA tensors: one launch from logits and features to finished scores, one read of each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastood.kernels import reference
from fastood.kernels.cpu import _native
from fastood.kernels.seam import traced
from fastood.kernels.triton import shapes

if TYPE_CHECKING:
    from fastood.kernels import Anchors, Job, Stat, Want

OLDEST = 3, 6  # Triton that the kernels were tried with; pyproject.toml says with which else


@lru_cache
def _launch() -> Any:
    """launch.py, and with it Triton, which is only imported when there is something to run."""
    from fastood.kernels.triton import launch

    return launch


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := missing():
        return reason
    if dtype == torch.float64:
        return "float64 is left to the reference backend"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _unusable_device(device)


@lru_cache
def missing() -> str | None:
    """What is wrong with the Triton that is installed; found without importing it, which takes long."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return "it needs Triton: pip install 'fastood[triton]'"
    version = re.search(r"^__version__ = ['\"](.*)['\"]", Path(spec.origin).read_text(), re.MULTILINE)
    if version and tuple(int(n) for n in version[1].split(".")[:2]) < OLDEST:
        return f"it needs Triton {OLDEST[0]}.{OLDEST[1]} or newer, found {version[1]}"
    return None


@lru_cache
def _unusable_device(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return "it serves CUDA tensors"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def row_stats(
    logits: Tensor | None, feats: Tensor | None, want: Want, labels: Tensor | None = None
) -> tuple[dict[Stat, Tensor], Tensor | None]:
    if traced(logits, feats, labels) or (want.orders and feats is not None and feats.shape[1] == 0):
        return reference.row_stats(logits, feats, want, labels)
    ours = want._replace(stats=tuple(s for s in want.stats if s in shapes.STATS))
    plan = shapes.plan_of(ours, None)
    if plan is None:
        return reference.row_stats(logits, feats, want, labels)
    C = 0 if logits is None else logits.shape[1]
    alone = {s: _alone(s, want, C) for s in want.stats if s not in shapes.STATS}
    others = tuple(s for s, call in alone.items() if call is None)
    stats = reference.row_stats(logits, None, want._replace(stats=others, orders=()), labels)[0]
    stats |= {
        s: call(logits, None, labels if s[1] == "given" else None) for s, call in alone.items() if call is not None
    }
    if not plan.columns:
        return stats, None
    out = _columns(ours)(logits if ours.stats else None, feats if want.orders else None)
    stats |= zip(ours.stats, out, strict=False)
    return stats, out[len(ours.stats) :].T if want.orders else None


def products(
    logits: Tensor | None,
    feats: Tensor | None,
    job: Job,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    by_row: bool,
    labels: Tensor | None = None,
) -> Tensor | None:
    want = job.want
    if traced(logits, feats, labels) or (want.orders and feats is not None and feats.shape[1] == 0):
        return None
    call = _prepared(job, (-1, *shape[1:]) if by_row else (*shape[:-1], -1))
    if call is None:
        return None
    return call(logits if want.stats else None, feats if want.orders else None, labels)


def plain(work: Job | Anchors, shape: tuple[int, ...]) -> Callable[[Any, Any, Any], Any] | None:
    """See kernels/__init__.py: of work that was done before."""
    call = work.prepared.get(("triton", shape))
    return partial(_native.launch, call.native) if call and call.native else None


def batchgrad(logits: Tensor, feats: Tensor, anchors: Anchors) -> Tensor:
    if traced(logits, feats, anchors.G) or feats.shape[1] == 0:
        return reference.batchgrad(logits, feats, anchors)
    key = "triton", (-1,)
    if key not in anchors.prepared:
        anchors.prepared[key] = _launch().batchgrad_route(anchors)
    call = anchors.prepared[key]
    return reference.batchgrad(logits, feats, anchors) if call is None else call(logits, feats)


def linear(
    feats: Tensor, weight: Tensor, bias: Tensor | None, want: Want, predict: bool
) -> tuple[dict[Stat, Tensor], Tensor | None, Tensor | None] | None:
    """`want` of the logits feats weight^T + bias, as row_stats gives it, and where `predict` their classes; None for
    what is better done of logits."""
    from fastood.kernels.triton import fused_linear

    if not fused_linear.serves(feats, weight, want.stats, want.temperature):
        return None
    _, norms = row_stats(None, feats, want._replace(stats=()))
    stats, classes = fused_linear.linear(feats, weight, bias, want.stats, want.temperature, predict)
    return stats, norms, classes


def _prepared(job: Job, shape: tuple[int, ...]) -> Any:
    """How the job is called, worked out once; None for what the kernels do not do."""
    key = "triton", shape
    if key not in job.prepared:
        plan = shapes.plan_of(job.want, job.products)
        job.prepared[key] = None if plan is None else _route(plan, job.want, shape, torch.float32)
    return job.prepared[key]


@lru_cache(maxsize=256)
def _columns(want: Want) -> Any:
    """Statistics, then norms, [columns, N] float64."""
    plan = shapes.plan_of(want, None)
    assert plan is not None
    return _route(plan, want, (plan.columns, -1), torch.float64)


def _alone(stat: Any, want: Want, C: int) -> Callable[..., Tensor] | None:
    """How a statistic that takes launches of its own is called; None for what the kernels do not do.

    That is gradient norms to powers which leave float32 with the weights that they are summed with, and GEN of rows
    that no program's registers hold.
    """
    if stat[0] == "power_sum":
        softer = want._replace(stats=("msp", "one_minus_msp"), orders=())
        sharper = softer._replace(temperature=want.temperature / stat[1])
        return partial(_power_sum, softer, sharper, stat[1]) if shapes.plan_of(sharper, None) else None
    if shapes.takes_gradient(stat) or shapes.takes_gen(stat, C):
        return _route_of(stat, want.temperature)
    return None


def _power_sum(softer: Want, sharper: Want, r: float, logits: Tensor, *_: None) -> Tensor:
    """S_r = sum_k e^(r z_k) / (sum_k e^z_k)^r, z relative to the maximum: two sums, at T / r and at T."""
    (p, not_p), (p_r, not_p_r) = (_columns(want)(logits, None) for want in (softer, sharper))
    return (1 + not_p_r / p_r) * (-r * (not_p / p).log1p()).exp()


@lru_cache(maxsize=256)
def _route_of(stat: Any, temperature: float) -> Any:
    launch = _launch()
    program = launch.gen if stat[0] == "gen" else launch.gradient
    return launch.Route((-1,), torch.float64, partial(program, stat=stat, temperature=temperature))


def _route(plan: shapes.Plan, want: Want, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    launch = _launch()
    program = partial(launch.scores, plan=plan, bias=want.bias, log=want.log, by_row=shape[0] < 0)
    return launch.Route(shape, dtype, program)

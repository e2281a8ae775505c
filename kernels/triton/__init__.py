"""Triton kernels, for CUDA tensors: one launch from logits and features to finished scores, one read of each."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastood.kernels import reference
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
    # gen sorts, power sums, log_one_minus_s2 and high powers are other kinds of work: plain PyTorch does them.
    ours = want._replace(stats=tuple(s for s in want.stats if s in shapes.STATS))
    plan = shapes.plan_of(ours, None)
    if plan is None:
        return reference.row_stats(logits, feats, want, labels)
    x = logits if logits is not None else feats
    assert x is not None
    gradients = [s for s in want.stats if shapes.takes_gradient(s)]
    others = tuple(s for s in want.stats if s not in shapes.STATS and s not in gradients)
    stats = reference.row_stats(logits, None, want._replace(stats=others, orders=()), labels)[0]
    for s in gradients:
        stats[s] = _launch().gradient(logits, labels if s[1] == "given" else None, s, want.temperature)
    out = torch.empty(plan.columns, len(x), dtype=torch.float64, device=x.device).T
    if plan.columns:
        _launch().run(logits if ours.stats else None, feats if want.orders else None, plan, want.bias, want.log, out)
    stats |= zip(ours.stats, out.unbind(1), strict=False)
    return stats, out[:, len(ours.stats) :] if want.orders else None


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
    plan = shapes.plan_of(want, job.products)
    if plan is None or traced(logits, feats) or (want.orders and feats is not None and feats.shape[1] == 0):
        return None
    x = logits if logits is not None else feats
    assert x is not None
    out = torch.empty(shape, dtype=dtype, device=x.device)
    columns = out.view(len(x), plan.columns) if by_row else out.view(plan.columns, len(x)).T
    _launch().run(logits if want.stats else None, feats if want.orders else None, plan, want.bias, want.log, columns)
    return out


def batchgrad(logits: Tensor, feats: Tensor, anchors: Anchors) -> Tensor:
    out = None
    if not traced(logits, feats, anchors.G) and feats.shape[1] > 0:
        out = _launch().batchgrad(logits, feats, anchors)
    return reference.batchgrad(logits, feats, anchors) if out is None else out

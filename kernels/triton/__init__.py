"""Triton kernels, for CUDA tensors: one launch from logits and features to finished scores, one read of each."""

from __future__ import annotations

import os
import re
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastood.kernels.contract import Anchors, Request, Run, Scaling, Work
from fastood.kernels.triton import shapes

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


def supports(work: Work, C: int, D: int) -> bool:
    if not 2.0**-100 <= work.temperature <= 2.0**100:  # what float32 can divide by
        return False
    if isinstance(work, Request):
        return _supports(work, C, D)
    held = isinstance(work, Anchors) or max(C, D) <= shapes.HELD_CLASSES  # by registers, a whole row
    return held and D > 0


def _supports(request: Request, C: int, D: int) -> bool:
    if request.orders and D == 0:
        return False
    if len(request.stats) == 1 and request.stats[0][0] in ("power_sum", "gen", "gradient"):  # by launches of its own
        return not request.orders and not request.columns and _serves_alone(request, C)
    return shapes.plan_of(request) is not None


def _serves_alone(request: Request, C: int) -> bool:
    """Not gradient norms to powers which leave float32 with the weights that they are summed with, nor GEN of rows that
    no program's registers hold."""
    (stat,) = request.stats
    if stat[0] == "power_sum":
        return shapes.plan_of(_sharper(request)) is not None
    return shapes.takes_gradient(stat) or shapes.takes_gen(stat, C)


def compile(request: Request) -> Run:
    launch = _launch()
    plan = shapes.plan_of(request)
    if plan is not None:
        dtype = torch.float32 if request.columns else torch.float64
        options = {"bias": request.bias, "log": request.log, "by_row": request.by_row}
        reads = bool(request.stats), bool(request.orders), False
        return launch.Route(request.shape, dtype, reads, partial(launch.scores, plan=plan, **options))
    (stat,) = request.stats
    if stat[0] == "power_sum":
        return Run(partial(_power_sum, compile(_softer(request)), compile(_sharper(request)), float(stat[1])))
    program = partial(launch.gen if stat[0] == "gen" else launch.gradient, stat=stat, temperature=request.temperature)
    reads = True, False, stat[0] == "gradient" and stat[1] == "given"
    return launch.Route(request.shape, torch.float64, reads, program)


def _softer(request: Request) -> Request:
    return request.of(("msp", "one_minus_msp"))


def _sharper(request: Request) -> Request:
    return _softer(request)._replace(temperature=request.temperature / float(request.stats[0][1]))


def _power_sum(softer: Run, sharper: Run, r: float, logits: Tensor | None, *_: Tensor | None) -> Tensor:
    """S_r = sum_k e^(r z_k) / (sum_k e^z_k)^r, z relative to the maximum: two sums, at T / r and at T."""
    (p, one_minus_p), (p_r, one_minus_p_r) = softer(logits, None), sharper(logits, None)
    return ((1 + one_minus_p_r / p_r) * (-r * (one_minus_p / p).log1p()).exp())[None]


def batchgrad(anchors: Anchors) -> Run:
    return _launch().batchgrad_route(anchors)


def scaled(scaling: Scaling) -> Run:
    return _launch().scaling_route(scaling)


def linear(
    request: Request, feats: Tensor, weight: Tensor, bias: Tensor | None, predict: bool
) -> tuple[list[Tensor], Tensor | None] | None:
    from fastood.kernels.triton import fused_linear

    if not fused_linear.serves(feats, weight, request.stats, request.temperature):
        return None
    stats, classes = fused_linear.linear(feats, weight, bias, request.stats, request.temperature, predict)
    norms = request.of((), request.orders)
    return [*stats, *(compile(norms)(None, feats) if request.orders else ())], classes

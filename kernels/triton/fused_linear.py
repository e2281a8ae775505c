"""From features and the last layer to statistics of the logits, which nobody stores: the launches of device/linear.py.

Imports Triton: only __init__.py imports this, and late.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastood.kernels.contract import Stat
from fastood.kernels.statistics import EXP, FORMULAS, SQUARES
from fastood.kernels.triton import device, shapes

# The quantities that one sweep gives to the numeric contract, and the statistics that are made of no others.
QUANTITIES = {"fmax", "T", "C", "r1", "p_max", "log_sum", "r2"}
STATS = {name: shapes.STATS[name] for name, s in FORMULAS.items() if s.quantities <= QUANTITIES}


class Tiling(NamedTuple):
    """Rows and classes of a tile of logits, features that are multiplied at a time and how often they are in flight,
    warps; the tiles that a program goes through, and how many blocks of rows share their classes while these are in
    the cache. Nothing here looks at the number of rows: a row's bits do not depend on its batch."""

    rows: int = 128
    classes: int = 128
    step: int = 64
    stages: int = 3
    warps: int = 4
    tiles: int = 4
    group: int = 16

    def constants(self, D: int, squares: bool) -> dict[str, Any]:
        """The compile-time arguments of device.linear.partial_sums."""
        return {
            "SUMS": int(EXP | SQUARES if squares else EXP),
            "ROWS": self.rows,
            "CLASSES": self.classes,
            "STEP": self.step,
            "TILES": self.tiles,
            "GROUP": self.group,
            "EVEN": D % self.step == 0,
            "STAGES": self.stages,
        }


# Of wgmma's accumulators four warps hold 128 x 128; of other tensor cores' they would spill.
HOPPER, OTHERS = Tiling(), Tiling(warps=8)
MERGED = {"PARTS": 32, "ROWS": 32}


def tiling_on(device: torch.device) -> Tiling:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return HOPPER if hopper else OTHERS


def serves(feats: Tensor, weight: Tensor, stats: tuple[Stat, ...], temperature: float) -> bool:
    """Of halves, which tensor cores multiply exactly, in rows that loads of 16 bytes can read; temperatures that
    float32 can divide by."""
    return (
        all(s in STATS for s in stats)
        and feats.dtype == weight.dtype
        and feats.dtype in (torch.float16, torch.bfloat16)
        and 2.0**-100 <= temperature <= 2.0**100
        and feats.shape[1] > 0
        and all(
            x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 and x.data_ptr() % 16 == 0
            for x in (feats, weight)
        )
    )


def linear(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: tuple[Stat, ...],
    temperature: float,
    predict: bool,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`stats`, [stats, N] float64, and where `predict` the class of the largest logit, [N] int64."""
    N, D, C = *feats.shape, weight.shape[0]
    on = feats.device
    tiling = tiling or tiling_on(on)
    out = torch.empty([len(stats), N], dtype=torch.float64, device=on)
    best = torch.empty(N, dtype=torch.int64, device=on) if predict else None
    if N:
        parts = math.ceil(C / (tiling.classes * tiling.tiles))
        part = torch.empty([parts, 4, N], device=on)
        classes = torch.empty([parts, N], dtype=torch.int32, device=on) if predict else None
        scale = math.log2(math.e) / temperature
        bias = None if bias is None else bias.contiguous()
        constants = tiling.constants(D, any(FORMULAS[str(s)].sums & SQUARES for s in stats))
        with torch.cuda.device(on) if on.type == "cuda" else nullcontext():
            device.linear.partial_sums[math.ceil(N / tiling.rows) * parts,](
                feats, feats.stride(0), weight, weight.stride(0), bias, part, classes, N, C, D, scale,
                **constants, num_warps=tiling.warps,
            )  # fmt: skip
            device.linear.merged[math.ceil(N / MERGED["ROWS"]),](
                part, classes, out, best, N, C, parts, scale, temperature,
                STATS=tuple(STATS[str(s)] for s in stats), SUMS=constants["SUMS"], **MERGED,
            )  # fmt: skip
    return out, best

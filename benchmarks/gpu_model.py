"""How fast a kernel should run, from its machine code: a model with two constants, fitted to measured kernels.

What a warp does is read from machine code (gpu_static.py). gpu_measured.json holds that of kernels whose time was
measured, with their share of the read ceiling, the card, the versions and the commit. A multiprocessor has four things
to do for each warp, each of which takes so many clocks where it has nothing else to do:

    memory   bytes read and written, at the read ceiling
    issue    instructions, 4 a clock
    special  special functions, 16 lanes a clock
    waiting  `step` for each instruction, which waits for what came before it, loads among it: shared by the warps that
             the multiprocessor holds

They overlap, but not perfectly: the time is the norm of order `overlap` of the four. `python -m benchmarks.gpu_static
--fit` fits the two by least squares of the logarithm of the share, in which more than all of the ceiling, which is
torch.sum's, counts as all, and prints the error: 5.3% rms, 14% at most, 5.8% for a kernel that is left out of the fit.
A time for each load, by the bytes in flight, was tried: these kernels hold twice the warps of those before; none fits.
The model knows no barriers, and no second sweep from the cache: rows beyond 24576 classes are not predicted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MEASURED = Path(__file__).with_name("gpu_measured.json")


class Warp(NamedTuple):
    """What a warp does, and how many of them a multiprocessor holds."""

    read: float  # bytes of the tensors' rows
    written: float
    in_flight: float  # bytes that are loaded before any of them is used
    instructions: float
    special: float
    warps: int

    def units(self, bytes_per_clock: float) -> tuple[float, float, float]:
        """Clocks that memory, issue and special functions take, each by itself."""
        return (self.read + self.written) / bytes_per_clock, self.instructions / 4, 2 * self.special

    def bound(self, bytes_per_clock: float) -> float:
        """The share of the read ceiling that the busiest of them allows: no order of the same instructions has more."""
        return self.read / bytes_per_clock / max(self.units(bytes_per_clock))


class Model(NamedTuple):
    step: float  # clocks
    overlap: float  # 1: nothing overlaps; infinite: everything does

    def share(self, warp: Warp, bytes_per_clock: float) -> float:
        """Of the read ceiling, in which the bytes of the rows count once and nothing else does."""
        waiting = self.step * warp.instructions / warp.warps
        work = (*warp.units(bytes_per_clock), waiting)
        return warp.read / bytes_per_clock / sum(t**self.overlap for t in work) ** (1 / self.overlap)


FITTED = Model(step=6.48, overlap=4.23)


class Measured(NamedTuple):
    on: dict[str, Any]  # card, versions, commit, ceiling in bytes a second, multiprocessors, clock
    kernels: list[dict[str, Any]]  # what, dtype, C, D, share in percent, and its warp

    @property
    def bytes_per_clock(self) -> float:
        """Of one multiprocessor, at the read ceiling."""
        return self.on["read_ceiling"] / self.on["multiprocessors"] / self.on["clock"]


def measured() -> Measured:
    return Measured(**json.loads(MEASURED.read_text()))


def write(of: Measured) -> None:
    kernels = ",\n".join("  " + json.dumps(kernel, ensure_ascii=False) for kernel in of.kernels)
    MEASURED.write_text(f'{{\n "on": {json.dumps(of.on)},\n "kernels": [\n{kernels}\n ]\n}}\n')


def errors(model: Sequence[float], of: Measured) -> list[float]:
    """The logarithm of predicted over measured, of each kernel."""
    shares = (Model(*model).share(Warp(**k["warp"]), of.bytes_per_clock) for k in of.kernels)
    return [math.log(s / min(1, k["share"] / 100)) for s, k in zip(shares, of.kernels, strict=True)]


def fit(of: Measured) -> Model:
    from scipy.optimize import least_squares

    found = least_squares(errors, FITTED, bounds=((0, 1), (math.inf,) * 2), x_scale=FITTED, args=(of,))
    return Model(*map(float, found.x))


def rms(of: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in of) / len(of))


def report(of: Measured) -> str:
    """The constants fitted anew, each kernel as measured and as predicted, and the error of the fit."""
    model = fit(of)
    off = errors(model, of)
    lines = [", ".join(f"{name} {value}" for name, value in of.on.items())]
    lines += [f"{'share of the read ceiling':50s} measured predicted  warps  KB in flight"]
    for kernel, error in zip(of.kernels, off, strict=True):
        warp, predicted = Warp(**kernel["warp"]), min(100, kernel["share"]) * math.exp(error)
        name = f"{kernel['what']}, C={kernel['C']} D={kernel['D']} {kernel['dtype']}"
        in_flight = warp.warps * warp.in_flight / 1024
        lines += [f"{name:50s} {kernel['share']:7d}% {predicted:8.0f}% {warp.warps:6d} {in_flight:13.0f}"]
    alone = [of._replace(kernels=[kernel]) for kernel in of.kernels]
    others = [of._replace(kernels=of.kernels[:i] + of.kernels[i + 1 :]) for i in range(len(of.kernels))]
    left_out = [errors(fit(rest), one)[0] for rest, one in zip(others, alone, strict=True)]
    lines += [", ".join(f"{name} {value:.4g}" for name, value in model._asdict().items())]
    most = max(map(abs, off))
    lines += [f"error of the fit: {rms(off):.1%} rms, {most:.0%} at most; {rms(left_out):.1%} rms of a kernel left out"]
    return "\n".join(lines)

"""Rows whose classes lie in slices, each somewhere else: a few numbers of each, and the statistics of whole rows.

The numbers are sums relative to the slice's own maximum, the rest to relative precision. They follow from what any
backend gives of the slice as if it were all, and are merged as the C++ part merges the chunks of a row
(LogitsState in cpu/softmax.cpp). The formulas over the quantities that come of it are those of statistics.py.

TV alone needs a second look at the logits, once the level is known at which a class has the probability 1 / C. So that
TV and KL(u || p) of nearly flat rows keep their relative precision, that is merged as levels and not as sums: with
C_i of the C classes in slice i, P_i their probability, u_i and p_i the two distributions within it,

    KL(u || p) = sum_i C_i / C (log (C_i / C) - log P_i) + sum_i C_i / C KL(u_i || p_i)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fastood.kernels import Backend, Request, Stat, prepared
from fastood.kernels.reference import Level, Powers, Softmax, exp_quotient, exp_tail, lazy, relative, row_sum, working
from fastood.kernels.statistics import FORMULAS

# What of each slice the quantities of statistics.py are merged from, beside "max" and "rest", which always are there.
PARTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("fmax", "T", "C", "r1", "p_max", "log_sum", "rest", "rest_log"), ()),
    "r2": ("squares",),
    "rest_squares": ("squares",),
    "rest_z": ("rest_z",),
    "mean_z": ("mean_z",),
    "tv": ("level",),
    "kl_uniform": ("level", "kl"),
}

# How they follow from the slice's own statistics, s: z and its sums are relative to the slice's maximum.
_Found = Mapping[Stat, Tensor]
_MADE: dict[str, tuple[tuple[str, ...], Callable[[_Found, int], Tensor]]] = {
    # "fmax" is NaN for a row without a softmax, whether that holds NaN or inf or is all masked.
    "max": (("fmax", "energy"), lambda s, C: torch.where(s["fmax"].isnan(), s["energy"], s["fmax"])),
    "rest": (("msp", "one_minus_msp"), lambda s, C: _rest(s)),  # sum of e^z
    "log_rest": (("log_one_minus_s2",), lambda s, C: _log_rest(s)),  # finite where that is 0
    "squares": (("s2", "one_minus_s2"), lambda s, C: _squares(s)),  # of the rest: sum of e^2z
    "rest_z": (("plogp", "log_msp"), lambda s, C: (s["plogp"] - s["log_msp"]) / s["msp"]),  # sum of z e^z
    "mean_z": (("sumlogp", "log_msp"), lambda s, C: s["sumlogp"] / C - s["log_msp"]),
    "kl": (("kl_uniform",), lambda s, C: s["kl_uniform"]),  # KL(u_i || p_i)
    "level": (("tv",), lambda s, C: _rest(s).log1p() - math.log(C)),  # log of the mean of e^z
}
_TILE = 1 << 20  # elements of the largest temporary


def _rest(s: _Found) -> Tensor:
    return s["one_minus_msp"] / s["msp"]


def _log_rest(s: _Found) -> Tensor:
    rest = _rest(s)
    return torch.where(rest > 1e-30, rest.log(), s["log_one_minus_s2"] - math.log(2))  # 1 - S_2 = 2 r, by then


def _squares(s: _Found) -> Tensor:
    # Each to the precision of what it is of: S_2 = (1 + r2) / (1 + r1)^2, 1 - S_2 = (2 r1 + r1^2 - r2) / (1 + r1)^2.
    rest, square = _rest(s), s["msp"].square()
    return torch.where(s["s2"] > 0.5, rest * (2 + rest) - s["one_minus_s2"] / square, s["s2"] / square - 1)


def parts_for(stats: Iterable[Stat]) -> list[Stat]:
    """The parts, a number per row each, that statistics of whole rows are merged from."""
    parts: dict[Stat, None] = {"max": None, "rest": None}  # in this order
    for stat in stats:
        if stat in FORMULAS:
            formula = FORMULAS[stat]
            of_stat: list[Stat] = [part for name in sorted(formula.quantities) for part in PARTS[name]]
            if formula.is_log:
                of_stat.append("log_rest")
        elif stat[0] == "power_sum":
            of_stat = [stat]
        elif stat[0] == "gen":
            of_stat = ["log_rest"]  # and the largest logits
        else:
            name = stat if isinstance(stat, str) else stat[0]
            raise ValueError(f"stats: {name} is not known of rows whose classes are split")
        parts |= dict.fromkeys(of_stat)
    return list(parts)


def parts_of(f: Tensor, parts: Sequence[Stat], request: Request, backend: Backend) -> Tensor:
    """The parts of a slice, logits [N, C_i] with N and C_i above 0: float64 [parts, N]."""
    C = f.shape[1]
    stats: dict[Stat, None] = {}
    for part in parts:
        stats |= dict.fromkeys(_MADE[part][0] if isinstance(part, str) else (part,))
    s = dict(zip(stats, prepared(backend, request.of(tuple(stats)), C, 0)(f, None), strict=True))
    out = torch.stack([_MADE[part][1](s, C) if isinstance(part, str) else s[part] for part in parts])
    if "level" in parts:
        # Next to log C_i that of a nearly flat row would be rounded away: it is found as in the reference.
        for rows in (s["tv"] < 1 / 4).nonzero()[:, 0].split(max(1, _TILE // C)):
            out[parts.index("level"), rows] = -Level(f[rows], request.temperature).x.amax(-1)
    out[1:].masked_fill_(s["fmax"].isnan(), 0)  # a masked slice weighs nothing; a NaN stays in "max"
    return out


def above_level(f: Tensor, T: float, f_max: Tensor, level: Tensor) -> Tensor:
    """Sum of max(C p_k - 1, 0) over a slice of the classes, float64 [N]: C times its share of TV."""
    sums = [level.new_zeros(0)]
    n = max(1, _TILE // f.shape[1])
    for some, largest, away in zip(f.split(n), f_max.split(n), level.split(n), strict=True):
        x = working(some)
        # Relative to a number of x's type next to the level: no difference to that rounds to more than itself.
        rounded = (largest + T * away).to(x.dtype)
        rounded = torch.where(rounded.isfinite(), rounded, largest.to(x.dtype))  # of a T so large that any will do
        beside = (rounded.double() - largest) / T - away
        x = relative(x, rounded, T).add_(beside.to(x.dtype)[:, None])
        sums.append(row_sum(x.expm1_().relu_()).double())
    return torch.cat(sums)


class Whole(Softmax):
    """Statistics of whole rows, from the parts of their slices: a Softmax over the slices' maxima, with their sums.

    parts
        Of each slice, float64 [N, slices].
    classes
        Of each slice, how many.
    largest
        float64 [N, any], for "gen": the largest logits of each slice, -inf where it has no more.
    above
        float64 [N], for "tv": ``above_level`` of all slices. It is asked for once ``level`` is known.
    """

    above: Tensor

    def __init__(
        self, parts: Mapping[Stat, Tensor], classes: Sequence[int], T: float, largest: Tensor | None = None
    ) -> None:
        super().__init__(parts["max"], T)
        self.parts, self.largest = parts, largest
        self.C = sum(classes)
        self.share = self.f.new_tensor(classes) / self.C  # C_i / C

    def _at_max(self, x: Tensor) -> Tensor:
        """Of the slice with the maximum, the first of several."""
        return x.gather(-1, self.argmax[:, None])[:, 0]

    def _merged(self, at_max: Tensor, others: Tensor) -> Tensor:
        return self._at_max(at_max) + row_sum(others.scatter(-1, self.argmax[:, None], 0))

    @lazy
    def gaps(self) -> Tensor:
        """Of each slice's maximum: z <= 0."""
        return relative(self.f, self.f_max, self.T)

    @lazy
    def weights(self) -> Tensor:
        """e^z of that."""
        return exp_quotient(self.f, self.f_max[:, None], self.T)

    @lazy
    def masses(self) -> Tensor:
        """Sum of each slice's e^z, relative to its own maximum."""
        return 1 + self.parts["rest"]

    @lazy
    def r1(self) -> Tensor:
        return self._or_nan(self._merged(self.parts["rest"], self.weights * self.masses))

    @lazy
    def r2(self) -> Tensor:
        squares = self.parts["squares"]
        return self._merged(squares, self.weights.square() * (1 + squares))

    @lazy
    def rest_z(self) -> Tensor:
        z = self.parts["rest_z"] + self.gaps.clamp(min=-1e4) * self.masses  # exp(-1e4) = 0, and 0 * -inf would be NaN
        return self._merged(self.parts["rest_z"], self.weights * z)

    @lazy
    def mean_z(self) -> Tensor:
        return self._mean(self.parts["mean_z"] + self.gaps)

    def _mean(self, x: Tensor) -> Tensor:
        """Of a number per class that in each slice has the mean x."""
        return row_sum(torch.where(self.share > 0, x, 0) * self.share)

    # ---- in units of e^gap, for logarithms

    @lazy
    def gap(self) -> Tensor:
        others = self.gaps.scatter(-1, self.argmax[:, None], -math.inf).amax(-1)
        unit = torch.maximum(others, self._at_max(self.parts["log_rest"]))
        return torch.where(unit == -math.inf, 0, unit)

    @lazy
    def weight(self) -> Tensor:
        return self.gap.exp()

    @lazy
    def rest(self) -> Tensor:
        of_max = (self.parts["log_rest"] - self.gap[:, None]).exp()
        return self._merged(of_max, (self.gaps - self.gap[:, None]).exp() * self.masses)

    @lazy
    def rest_squares(self) -> Tensor:
        return torch.where(self.weight > 0, self.r2 / self.weight, 0)

    # ---- relative to the level, at which p_k = 1 / C: log (1 / C) = z - log_sum there

    @lazy
    def levels(self) -> Tensor:
        """Of each slice."""
        return self.gaps + self.parts["level"]

    @lazy
    def level(self) -> Tensor:
        highest = self.levels.where(self.share > 0, -math.inf).amax(-1)
        away = self._mean((self.levels - highest[:, None]).expm1())
        return torch.where(away > -0.5, highest + away.log1p(), self.log_sum - math.log(self.C))

    @lazy
    def kl_uniform(self) -> Tensor:
        return self._or_nan(self._mean(self.parts["kl"] + exp_tail(self.levels - self.level[:, None])))

    @lazy
    def tv(self) -> Tensor:
        return self._or_nan(self.above / self.C)

    # ---- those with parameters

    def power_sum(self, r: float) -> Tensor:
        log_p = self.gaps + self.parts["rest"].log1p() - self.log_sum[:, None]
        p = log_p.exp()
        # Of p itself where it is there: the error of r log p would grow with r log C.
        power = torch.where(p > 1e-290, Powers(p)(r), (r * log_p).exp())
        return row_sum(power * self.parts["power_sum", r])

    def gen(self, gamma: float, M: int) -> Tensor:
        assert self.largest is not None
        f = self.largest.topk(min(M, self.C), -1).values[:, 1:]
        log_p = relative(f, self.f_max, self.T) - self.log_sum[:, None]
        others = (gamma * (log_p + (-log_p.exp()).log1p())).exp()
        return (gamma * (self.log_r1 + 2 * self.log_msp)).exp() + row_sum(others)

    def stat(self, stat: Stat) -> Tensor:
        return getattr(self, stat) if isinstance(stat, str) else getattr(self, stat[0])(*stat[1:])

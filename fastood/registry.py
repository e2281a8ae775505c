"""The registry: each score is one small declaration over the row statistics.

Raw formulas are written as in the paper; which way a score points is said once, in ``higher``, and
turned in one place, :meth:`Score.compose`, so that what fastood returns is higher = more
in-distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastood._inputs import choice, number
from fastood.kernels import STATISTICS, Stat
from fastood.kernels.reference import LARGEST, Powers, times_norm
from fastood.kernels.statistics import FORMULAS

# What completes as a method; the last is any that was registered.
Method = (
    Literal[
        "msp",
        "energy",
        "varsum",
        "tv",
        "max_logit",
        "neg_entropy",
        "kl_uniform",
        "gen",
        "norm",
        "gradnorm",
        "exgrad",
        "eg_u_l1",
        "eg_u_l2sq",
        "eg_p_l2sq",
        "eg_p_logp_l2sq",
        "norm_eg_p_l2sq",
    ]
    | str
)


class RowStats(dict[Stat, Tensor]):
    """What a formula sees: statistics [N] by name, the number of classes ``C``, the temperature ``T``."""

    def __init__(self, stats: Mapping[Stat, Tensor], C: int, T: float, wide: bool = False) -> None:
        super().__init__({name: stat.double() for name, stat in stats.items()})
        self.C, self.T = C, T
        self.wide = wide  # whether scores come in float64, in which the largest double and infinity are two


def stat_of(stat: Any) -> Stat:
    """`stat`, if it names a row statistic with good parameters."""
    name, *params = stat if isinstance(stat, tuple) and stat else (stat,)
    name = choice("stats", name, tuple(STATISTICS))
    if name == "power_sum":
        if len(params) != 1:
            raise ValueError(f"stats: power_sum is asked for as ('power_sum', r), got {stat!r}")
        return name, number("stats: r of power_sum", params[0], above=0)
    if name == "gen":
        if len(params) != 2:
            raise ValueError(f"stats: gen is asked for as ('gen', gamma, M), got {stat!r}")
        gamma, M = params
        M = number("M", M, at_least=1)
        if int(M) != M:
            raise ValueError(f"M must be a whole number of classes, got {M!r}")
        return name, number("gamma", gamma, above=0), int(M)
    if name == "gradient":
        raise ValueError("stats: gradient is asked for by fastood.gradient_norm")
    if params and name in FORMULAS:
        raise ValueError(f"stats: {name} takes no parameters, got {stat!r}")
    return (name, *params) if params else name  # of one's own statistics nobody here knows what they take


@dataclass(frozen=True, eq=False)
class Score:
    """One score: S = U * V, with V a row statistic or a formula over several, and U a norm of the features.

    Parameters
    ----------
    name : str
        What ``fastood.score(..., method=name)`` calls it.
    formula : str
        The raw formula, for people.
    source : str
        The paper's equation or table row, or another reference.
    higher : {"in", "out"}
        Which inputs the *raw* formula is larger for: in- or out-of-distribution ones.
    stats : tuple, or callable of the score's parameters that gives one
        The row statistics that V is made of, as ``fastood.row_stats`` takes them: names of ``fastood.STATISTICS``,
        ``("power_sum", r)`` and ``("gen", gamma, M)``.
    v : tuple of float, or callable
        The coefficients of `stats` of which V is the sum, which kernels work out themselves: ``(1.0,)`` where left out,
        V = 1 where there are no `stats`. Or ``v(s, **params)`` -> V, float64 [N], from ``s["name"]``, ``s.C`` and
        ``s.T``, for any other formula.
    log_v, log_stats : optional
        log V over statistics of its own, where that is more exact than the logarithm of V.
    positive : bool
        False for a V that is never above 0. It has no logarithm, and decides on ``multiplied``.
    gradient : dict, optional
        Of a last-layer gradient score: the arguments that make ``fastood.gradient_norm`` (and, for all
        parameters, ``fastood.deep_gradient_norm``) the same raw quantity. U is then fixed to
        ``(||h||_order / T) ** power``.
    params : dict
        Parameters of the formula with their defaults.

    Raises
    ------
    ValueError
        Where `higher` or a statistic is not one that fastood knows, or a statistic does not take its parameters.

    Examples
    --------
    A score of one's own, the margin between the free energy and the largest logit:

    >>> import fastood, torch
    >>> _ = fastood.register(fastood.Score(
    ...     "margin", formula="T lse - max f", source="mine", higher="out",
    ...     stats=("energy", "fmax"), v=(1, -1)))
    >>> fastood.score(torch.tensor([[2.0, 2.0]]), method="margin")
    tensor([-0.6931])
    >>> del fastood.SCORES["margin"]
    """

    name: str
    formula: str
    source: str
    higher: Literal["in", "out"]
    stats: tuple[Stat, ...] | Callable[..., tuple[Stat, ...]] = ()
    v: Sequence[float] | Callable[..., Tensor] = (1.0,)
    log_v: Callable[..., Tensor] | None = None
    log_stats: tuple[Stat, ...] = ()
    positive: bool = True
    gradient: Mapping[str, Any] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.higher not in ("in", "out"):
            raise ValueError(f"higher must be 'in' or 'out', got {self.higher!r}")
        if isinstance(self.stats, str):
            raise TypeError(f"stats must be a tuple of names, got {self.stats!r}")
        if callable(self.stats):
            self.stats_for(self.params)
        else:
            # That of a gradient is made, and was checked, by fastood.gradient_norm.
            own = (s if self.gradient and s[:1] == ("gradient",) else stat_of(s) for s in self.stats)
            object.__setattr__(self, "stats", tuple(own))
        object.__setattr__(self, "log_stats", tuple(map(stat_of, self.log_stats)))
        if not callable(self.v):
            v, wanted = tuple(number("v", x) for x in self.v), max(1, len(self.stats_for(self.params)))
            if len(v) != wanted:
                raise ValueError(f"v must have {wanted} coefficients, one for each of stats, got {self.v!r}")
            object.__setattr__(self, "v", v)

    @property
    def needs(self) -> tuple[str, ...]:
        """The inputs without which it cannot be computed: "logits", "feats"."""
        logits = ("logits",) if self.stats else ()
        return logits + (("feats",) if self.gradient or not self.stats else ())

    @property
    def multiplied(self) -> bool:
        """Whether ||h||_r multiplies V where features are given and the caller names no norm.

        Not a V that is never above 0 once turned to higher = more in-distribution: a larger U would lower
        it. Nor a gradient score, whose U is fixed.
        """
        return not self.gradient and self.positive == (self.higher == "in")

    @property
    def power(self) -> float:
        """Of U."""
        return float(self.gradient["power"]) if self.gradient else 1.0

    def divisor(self, T: float) -> float:
        """Of ||h||: a gradient is 1/T times as large as the features."""
        return T if self.gradient else 1.0

    def sign(self, oriented: bool) -> int:
        """-1 where the raw formula is turned round; the one place where a sign is decided."""
        return -1 if oriented and self.higher == "out" else 1

    def stats_for(self, params: Mapping[str, Any], log: bool = False) -> tuple[Stat, ...]:
        """What V, or with `log` its logarithm, is made of where the score has these parameters."""
        if log and self.log_v:
            return self.log_stats
        return tuple(map(stat_of, self.stats(**params))) if callable(self.stats) else self.stats

    def compose(self, s: RowStats, v: Any, u: Tensor | None, *, log: bool, oriented: bool) -> Tensor:
        """U * V, or log U + log V with `u` already a logarithm; `v` is the ``value`` of `s`."""
        if u is None:
            raw = v
        elif log:
            of_norm = self.power * (u - math.log(self.divisor(s.T))) if self.gradient else u
            raw = of_norm + v if self.stats else of_norm
        else:
            T = self.divisor(s.T)
            if self.power in (1, 2):
                raw = times_norm(v, u, int(self.power), T, s.wide)
            else:
                factor = Powers(u / T)(self.power)
                raw = factor.masked_fill((v == 0) & factor.isinf() & u.isfinite(), 0) * v
                if s.wide:
                    raw = torch.where(u == LARGEST, raw * LARGEST, raw)
        return raw if self.sign(oriented) > 0 else -raw

    def value(self, s: RowStats, params: Mapping[str, Any], log: bool) -> Any:
        """V, or its logarithm."""
        if log and self.log_v:
            return self.log_v(s, **params)
        if not self.stats:
            return 0.0 if log else 1.0
        if callable(self.v):
            v = self.v(s, **params)
        else:
            named = zip(self.v, self.stats_for(params), strict=True)
            terms = [s[stat] if x == 1 else x * s[stat] for x, stat in named]
            v = sum(terms[1:], start=terms[0])
        return v.log() if log else v


SCORES: dict[str, Score] = {}
"""The paper's scores by name, and those of one's own: ``register`` adds one; ``del SCORES[name]`` takes it away."""


def register(score: Score) -> Score:
    """Add a score to ``SCORES``, so that every function of fastood knows it by name.

    Raises
    ------
    TypeError
        Where it is no ``fastood.Score``, whose page has an example.
    ValueError
        Where the name is taken, or the power of ``gradient`` is one that fastood has no formula for.
    """
    if not isinstance(score, Score):
        raise TypeError(f"score must be a fastood.Score, got {type(score).__name__}")
    if score.name in SCORES:
        raise ValueError(f"name: a score called {score.name!r} is registered already")
    if score.gradient and score.gradient["power"] not in (1, 2):
        raise ValueError(f"gradient: power must be 1 or 2, got {score.gradient['power']!r}")
    SCORES[score.name] = score
    return score


# ---- V terms: multiplied by any ||h||_r, or alone

register(
    Score(
        "msp",
        "max_k p_k",
        "Section 4.2, Table 2; Hendrycks & Gimpel (2016)",
        "in",
        stats=("msp",),
        log_stats=("log_msp",),
        log_v=lambda s: s["log_msp"],
    )
)
register(
    Score(
        "energy",
        "T log sum_k exp(f_k / T)",
        "Section 4.2, Table 2; Liu et al. (2020), sign turned",
        "in",
        stats=("energy",),
    )
)
register(
    Score(
        "varsum",
        "1 - sum_k p_k (1 - p_k) = sum_k p_k^2",
        "Section 4.2, Table 2; the order of DOCTOR's alpha score, Granese et al. (2021)",
        "in",
        stats=("s2",),
        log_stats=("s2", "one_minus_s2"),
        # near S_2 = 1 from 1 - S_2, or its logarithm would lose what 1 - S_2 keeps
        log_v=lambda s: (-s["one_minus_s2"]).log1p().where(s["s2"] > 0.5, s["s2"].log()),
    )
)
register(Score("tv", "1/2 sum_k |1/C - p_k|", "V of Eq. 4, Table 2", "in", stats=("tv",)))
register(Score("max_logit", "max_k f_k", "Hendrycks et al. (2022)", "in", stats=("fmax",)))
register(Score("neg_entropy", "sum_k p_k log p_k", "minus the entropy of p", "in", stats=("plogp",), positive=False))
register(
    Score(
        "kl_uniform",
        "KL(u || p) = -log C - 1/C sum_k log p_k",
        "the divergence inside Eq. 1",
        "in",
        stats=("kl_uniform",),
    )
)
register(Score(
    "gen", "-sum over the M largest p of p^gamma (1 - p)^gamma", "GEN, Liu et al. (2023)", "in",
    stats=lambda gamma, M: (("gen", gamma, M),), v=(-1,),
    positive=False, params={"gamma": 0.1, "M": 100},
))  # fmt: skip

# ---- U alone

NORM = register(Score("norm", "||h||_r", "U of Section 4.3, Figure 2", "in"))


# ---- gradients of the last layer, Table 1 (shallow): (||h||_order / T)^power times V


def _gradient(labels: str, order: float, power: int, expectation: str) -> dict[str, Any]:
    return {"labels": labels, "order": order, "power": power, "expectation": expectation}


register(
    Score(
        "gradnorm",
        "(2/T) ||h||_1 TV",
        "Eq. 1, 2 and 4; Table 1: || grad E_u[log p] ||_1",
        "in",
        stats=("tv",),
        v=(2,),
        gradient=_gradient("uniform", 1, 1, "inside"),
    )
)
register(
    Score(
        "exgrad",
        "(2/T) ||h||_1 (1 - S_2)",
        "Eq. 3 and 5; Table 1: E_p || grad log p ||_1",
        "out",
        stats=("one_minus_s2",),
        v=(2,),
        log_stats=("log_one_minus_s2",),
        log_v=lambda s: s["log_one_minus_s2"] + math.log(2),
        gradient=_gradient("predicted", 1, 1, "outside"),
    )
)
register(
    Score(
        "eg_u_l1",
        "(2/T) ||h||_1 (C - 1)/C, a constant times ||h||_1",
        "Table 1: E_u || grad log p ||_1",
        "in",
        stats=("one", "uniform"),
        v=(2, -2),
        gradient=_gradient("uniform", 1, 1, "outside"),
    )
)
register(
    Score(
        "eg_u_l2sq",
        "(1/T^2) ||h||_2^2 (1 - 2/C + S_2)",
        "Table 1: E_u || grad log p ||_2^2",
        "in",
        stats=("one", "uniform", "s2"),
        v=(1, -2, 1),
        gradient=_gradient("uniform", 2, 2, "outside"),
    )
)
register(
    Score(
        "eg_p_l2sq",
        "(1/T^2) ||h||_2^2 (1 - S_2)",
        "Table 1: E_p || grad log p ||_2^2",
        "out",
        stats=("one_minus_s2",),
        log_stats=("log_one_minus_s2",),
        log_v=lambda s: s["log_one_minus_s2"],
        gradient=_gradient("predicted", 2, 2, "outside"),
    )
)
register(
    Score(
        "eg_p_logp_l2sq",
        "(1/T^2) ||h||_2^2 ((1 + S_2) sum_k log p_k - 2 sum_k p_k log p_k) <= 0",
        "Table 1: E_p[ (log p / p) || grad log p ||_2^2 ]",
        "out",
        stats=("s2_sumlogp", "plogp"),
        v=(1, -2),
        positive=False,
        gradient=_gradient("log_predicted", 2, 2, "outside"),
    )
)
register(
    Score(
        "norm_eg_p_l2sq",
        "0, for E_p[e_Y - p] = 0: what the paper ranked by is rounding noise",
        "Table 1: || E_p[grad log p] ||_2^2",
        "in",
        stats=("msp",),
        v=(0,),
        gradient=_gradient("predicted", 2, 2, "inside"),
    )
)

TABLE_1 = tuple(e for e in SCORES.values() if e.gradient)  # whatever becomes of SCORES

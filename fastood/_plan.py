"""A call worked out once: what it needs of a backend, and how scores are made of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fastood._inputs import (
    choice,
    did_you_mean,
    flag,
    give,
    label_probabilities,
    logits_and_feats,
    number,
    result_dtype,
    temperature_of,
)
from fastood.kernels import STATISTICS, Backend, Job, Product, Stat, Want, select
from fastood.registry import RowStats, Score


class Plan:
    """What scores need of a backend, and how they are made of it; worked out once for the same arguments."""

    def __init__(
        self,
        scores: Sequence[tuple[Score, float | None]],
        shape: tuple[int, ...],
        temperature: float,
        bias: bool,
        log: bool,
        oriented: bool,
        params: Mapping[str, Any],
    ) -> None:
        T = temperature_of(temperature)
        self.scores, self.shape, self.oriented = scores, shape, flag("oriented", oriented)
        bias, log = flag("bias", bias), flag("log", log)
        self.params = _bind_params([e for e, _ in scores], params)
        for entry, _ in scores:
            if log and not entry.positive:
                raise ValueError(f"log: {entry.name} is never above 0, so it has no logarithm")
        stats = tuple(dict.fromkeys(s for e, _ in scores for s in e.stats_for(self.params[e.name], log)))
        orders = tuple(dict.fromkeys(r for _, r in scores if r is not None))
        self.want = Want(stats, orders, T, bias, log)
        self.ways: dict[Backend, Callable[[Any, Any, Any], Any]] = {}  # the short ones, once a longer one was gone
        self.job = None
        if not log and all(e.v is None and e.power in (1, 2) for e, _ in scores):
            places = {stat: i for i, stat in enumerate(stats)}  # tuple.index is beyond torch.compile
            self.job = Job(self.want, tuple(self._product(e, r, places) for e, r in scores))

    def _product(self, entry: Score, order: float | None, places: Mapping[Stat, int]) -> Product:
        stats = entry.stats_for(self.params[entry.name])
        return Product(
            places[stats[0]] if stats else -1,
            -1 if order is None else self.want.orders.index(order),
            float(entry.sign(self.oriented) * entry.factor),
            int(entry.power),
            entry.divisor(self.want.temperature),
        )

    def run(self, logits: Any, feats: Any, backend: str, labels: Any = None) -> Any:
        """All scores as `shape`, in which -1 stands for the rows: it is the first or the last of it."""
        for way in self.ways.values():
            out = way(logits, feats, labels)
            if out is not None:
                return out
        f, h, as_numpy = logits_and_feats(logits, feats)
        x = f if f is not None else h
        assert x is not None
        if f is None or h is None:
            self._check_given(f, h)
        q = None if labels is None or f is None else label_probabilities(labels, f, as_numpy)
        dtype = result_dtype(f, h)
        chosen = select(backend, x.device, dtype)
        shape = tuple(x.shape[0] if n < 0 else n for n in self.shape)
        by_row = self.shape[0] < 0
        out = None
        if self.job is not None:
            out = chosen.products(f, h, self.job, shape, dtype, by_row, q)
            short = None if out is None else chosen.plain(self.job, self.shape)
            if short is not None and chosen not in self.ways:
                self.ways = {**self.ways, chosen: short}  # another thread may be going through them
        if out is None:
            out = self._composed(f, h, q, chosen, dtype, by_row).reshape(shape).to(dtype)
        return give(out, as_numpy)

    def _composed(
        self, f: Tensor | None, h: Tensor | None, q: Tensor | None, chosen: Backend, dtype: torch.dtype, by_row: bool
    ) -> Tensor:
        found, norms = chosen.row_stats(f, h, self.want, q)
        return self.composed(found, norms, 0 if f is None else f.shape[1], dtype, by_row)

    def composed(
        self, found: Mapping[Stat, Tensor], norms: Tensor | None, C: int, dtype: torch.dtype, by_row: bool
    ) -> Tensor:
        """The scores, from what a backend gives for `want`: float64 [N, K] where `by_row`, else [K, N]."""
        stats = RowStats(found, C, self.want.temperature, wide=dtype == torch.float64)
        columns = []
        for entry, order in self.scores:
            u = None if order is None or norms is None else norms[:, self.want.orders.index(order)]
            params = self.params[entry.name]
            columns.append(entry.compose(stats, u, params=params, log=self.want.log, oriented=self.oriented))
        return torch.stack(columns, -1 if by_row else 0)

    def _check_given(self, f: Tensor | None, h: Tensor | None) -> None:
        for entry, _ in self.scores:
            for name, x in (("logits", f), ("feats", h)):
                if x is None and name in entry.needs:
                    raise ValueError(f"{name} must be given: {entry.name} = {entry.formula}")
        if h is None and self.want.orders:
            raise ValueError(f"feats must be given for norm={self.want.orders[0]:g}")


_PLANS: dict[Any, Plan] = {}


def typed(params: Mapping[str, Any]) -> list[tuple[str, Any, type]]:
    """Parameters as part of a key: True equals 1, but is refused where 1 is not (and 1 where True is not)."""
    return [(name, x, x.__class__) for name, x in params.items()]


def known_plan(key: Any) -> Plan | None:
    """The plan kept under `key`. A plan costs more than scoring one row."""
    return None if torch.compiler.is_compiling() else kept(key)


def kept(key: Any) -> Plan | None:
    """The same, for who knows that no compiler is at work."""
    try:
        return _PLANS.get(key)
    except TypeError:  # an argument that has no hash is also one that has no meaning: let it be refused
        return None


def keep(key: Any, plan: Plan) -> Plan:
    if not torch.compiler.is_compiling():
        if len(_PLANS) >= 256:
            _PLANS.clear()
        with suppress(TypeError):  # no hash
            _PLANS[key] = plan
    return plan


def _bind_params(entries: Sequence[Score], params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters of each score: its defaults, overridden by the caller's."""
    for name in params:
        if not any(name in e.params for e in entries):
            known = (
                "norm",
                "temperature",
                "bias",
                "log",
                "oriented",
                "backend",
                *(p for e in entries for p in e.params),
            )
            of_scores, hint = ", ".join(e.name for e in entries), did_you_mean(name, known)
            raise TypeError(f"{name}: no such argument, nor a parameter of {of_scores}{hint}")
    bound = {e.name: {**e.params, **{k: x for k, x in params.items() if k in e.params}} for e in entries}
    for entry in entries:
        if entry.params:
            for stat in entry.stats_for(bound[entry.name]):
                stat_of(stat)
    return bound


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
    return name

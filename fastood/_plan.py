"""A call worked out once: what it needs of a backend, and how scores are made of that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastood._fork import one_thread_if_forked
from fastood._inputs import (
    did_you_mean,
    flag,
    give,
    label_probabilities,
    logits_and_feats,
    result_dtype,
    temperature_of,
)
from fastood.kernels import NO_NORM, ONE, Column, Request, Stat, prepared, reference, select
from fastood.registry import SCORES, RowStats, Score


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
        self.stats = tuple(dict.fromkeys(s for e, _ in scores for s in e.stats_for(self.params[e.name], log)))
        self.orders = tuple(dict.fromkeys(r for _, r in scores if r is not None))
        columns: tuple[Column, ...] = ()
        if not log and all(not callable(e.v) and e.power in (1, 2) for e, _ in scores):
            places = {stat: i for i, stat in enumerate(self.stats)}  # tuple.index is beyond torch.compile
            columns = tuple(self._column(e, r, places, T) for e, r in scores)
        as_they_are = (len(self.stats) + len(self.orders), -1)
        self.request = Request(self.stats, self.orders, columns, shape if columns else as_they_are, T, bias, log)
        self.composed = len(columns) == 0  # in PyTorch, of statistics and norms; `not` is beyond torch.compile
        self.named: list[Score] = []
        self.quick: tuple[Callable[[Any, Any, Any], Any], ...] = ()  # short ways, once a longer one was gone

    def _column(self, entry: Score, order: float | None, places: Mapping[Stat, int], T: float) -> Column:
        assert not callable(entry.v)
        sign = float(entry.sign(self.oriented))
        stats = entry.stats_for(self.params[entry.name])
        return Column(
            tuple((places[s], sign * x) for s, x in zip(stats, entry.v, strict=True)) if stats else ((ONE, sign),),
            NO_NORM if order is None else self.orders.index(order),
            int(entry.power),
            entry.divisor(T),
        )

    def run(self, logits: Any, feats: Any, backend: str, labels: Any = None) -> Any:
        """All scores as `shape`, in which -1 stands for the rows: it is the first or the last of it."""
        for quick in self.quick:
            out = quick(logits, feats, labels)
            if out is not None:
                return self._made_of_all(out, logits, feats) if self.composed else out
        f, h, as_numpy = logits_and_feats(logits, feats)
        if as_numpy and labels is None:  # of which the short ways read plain ones, and only to make columns
            return give(self.run(f, h, backend), as_numpy)
        x = f if f is not None else h
        assert x is not None
        if f is None or h is None:
            self._check_given(f, h)
        q = None if labels is None or f is None else label_probabilities(labels, f, as_numpy)
        dtype = result_dtype(f, h)
        C, D = (0 if matrix is None else matrix.shape[1] for matrix in (f, h))
        run = prepared(select(backend, x.device, dtype, f, h, q), self.request, C, D)
        out = run(f, h, q)
        if run.quick is not None and run.quick not in self.quick:
            self.quick = (*self.quick, run.quick)  # a new one: another thread may be going through them
        return give(self._made_of_all(out, f, h) if self.composed else out, as_numpy)

    def _made_of_all(self, values: Tensor, f: Tensor | None, h: Tensor | None) -> Tensor:
        one_thread_if_forked()
        return self.made_of(values.unbind(), 0 if f is None else f.shape[1], result_dtype(f, h))

    def made_of(self, values: Sequence[Tensor], C: int, dtype: torch.dtype) -> Tensor:
        """The scores, from the request's statistics and then norms, [N] each, where no backend made its columns."""
        if self.request.columns:
            return reference.multiplied(values, self.request, dtype)
        n = len(self.stats)  # zip of unequal lengths is beyond torch 2.8's compiler
        found = dict(zip(self.stats, values[:n], strict=True))
        stats = RowStats(found, C, self.request.temperature, wide=dtype == torch.float64)
        norms = dict(zip(self.orders, values[n:], strict=True))
        vs: dict[str, Any] = {}
        columns = []
        for e, r in self.scores:
            if e.name not in vs:  # once for all norms
                vs[e.name] = e.value(stats, self.params[e.name], self.request.log)
            u = None if r is None else norms[r]
            columns.append(e.compose(stats, vs[e.name], u, log=self.request.log, oriented=self.oriented))
        return reference.arranged(columns, self.shape, dtype)

    def _check_given(self, f: Tensor | None, h: Tensor | None) -> None:
        for entry, _ in self.scores:
            for name, x in (("logits", f), ("feats", h)):
                if x is None and name in entry.needs:
                    raise ValueError(f"{name} must be given: {entry.name} = {entry.formula}")
        if h is None and self.orders:
            raise ValueError(f"feats must be given for norm={self.orders[0]:g}")


_PLANS: dict[Any, Plan] = {}


def key_of(
    asked: Any,
    feats: bool,
    norm: Any,
    backend: str,
    temperature: float = 1.0,
    bias: bool = False,
    log: bool = False,
    oriented: bool = True,
    params: Mapping[str, Any] | None = None,
) -> Any:
    """What a plan is kept under: the arguments of a call, in `asked` those that other calls have not.

    With the types of numbers and flags: True equals 1, but is refused where 1 is not (and 1 where True is not). One by
    one, for ``typed`` of them all takes a tenth of the time of scoring one row.
    """
    key = (
        asked, feats, norm, backend, temperature, bias, log, oriented,
        norm.__class__, temperature.__class__, bias.__class__, log.__class__, oriented.__class__,
    )  # fmt: skip
    return (key, *params, typed(params.values())) if params else key


def typed(values: Collection[Any]) -> tuple[Any, ...]:
    """More numbers or flags of a key."""
    return (*values, *map(type, values))


def known_plan(key: Any, names: tuple[Any, ...] = ()) -> Plan | None:
    """The plan kept under `key`, unless one of the scores `names` was registered anew. It costs more than a row."""
    return None if is_compiling() else kept(key, names)


def kept(key: Any, names: tuple[Any, ...] = ()) -> Plan | None:
    """The same, for who knows that no compiler is at work."""
    try:
        plan = _PLANS.get(key)
    except TypeError:  # an argument that has no hash is also one that has no meaning: let it be refused
        return None
    return plan if not names or plan is None or plan.named == [*map(SCORES.get, names)] else None


def keep(key: Any, plan: Plan, named: Sequence[Score] = ()) -> Plan:
    """Keeps `plan` under `key`; `named` are the scores that names in the key stand for."""
    plan.named = [*named]
    if not is_compiling():
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
    return {e.name: {**e.params, **{k: x for k, x in params.items() if k in e.params}} for e in entries}

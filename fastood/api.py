"""score, scores, sweep, norms, row_stats: check the arguments, ask one backend once, compose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from fastood import kernels
from fastood._inputs import (
    ArrayT,
    choice,
    flag,
    give,
    logits_and_feats,
    norm_of,
    number,
    order_of,
    result_dtype,
    take,
    temperature_of,
)
from fastood.kernels import STATISTICS, Backend, Job, Product, Stat, Want, select
from fastood.registry import SCORES, RowStats, Score

PAPER_V = ("energy", "tv", "msp", "varsum")  # Figure 2
PAPER_NORMS = (0, 0.1, 0.3, 0.5, 0.8, 1, 2, 3, 4, 5, 6, math.inf)
BEST_NORM = 0.3  # Section 4.3: ||h||_0.3 x energy, chosen on the paper's own test set


def score(
    logits: ArrayT | None,
    feats: ArrayT | None = None,
    method: str = "energy",
    *,
    norm: float | EllipsisType | None = ...,
    temperature: float = 1.0,
    bias: bool = False,
    log: bool = False,
    oriented: bool = True,
    backend: str = "auto",
    **params: Any,
) -> ArrayT:
    """How in-distribution each row is: one OOD score S = U * V per sample. Higher = more in-distribution.

    V is a function of p = softmax(logits / T), U a norm of the features (Section 4.2 of the paper);
    the last-layer gradient scores (Table 1) have closed forms of the same kind.

    Parameters
    ----------
    logits : Tensor or ndarray [N, C]
        What the classifier puts out before its softmax; float16, bfloat16, float32 or float64. A logit
        of -inf is a masked class. May be None for ``method="norm"``.
    feats : Tensor or ndarray [N, D], optional
        Penultimate features h, the input of the last layer.
    method : str
        A name in ``fastood.SCORES``.
    norm : float or None
        Order r >= 0 (fractions and ``math.inf`` too) of the ||h||_r that multiplies a V term; None for
        U = 1. Left out: 0.3 with feats (the paper's best on ImageNet), None without. A gradient score
        has its own norm and takes none.
    temperature : float
        T > 0 of the softmax.
    bias : bool
        Take [h; 1] for h: the last layer's bias counted among its weights (Appendix B).
    log : bool
        log(U * V) = log U + log V, finite where U * V overflows; NaN where U * V < 0.
    oriented : bool
        False for the paper's raw formula, in which ExGrad and its kin are larger for OOD inputs.
    backend : str
        "auto", or a name in ``fastood.backends()``; a backend asked for by name never falls back.
    **params
        Parameters of the score itself: ``gamma`` and ``M`` of "gen".

    Returns
    -------
    Tensor or ndarray [N]
        Of the kind and on the device of the inputs; float32, or float64 where an input is float64.
        NaN for a row that holds NaN, and (but for energy, then infinite) for one of logits that are
        all -inf or hold +inf.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was wanted.
    RuntimeError
        Where a backend asked for by name cannot run here.

    Notes
    -----
    Energy can be negative (small logits, many of them below 0), and a larger U then *lowers* U * V;
    the same holds for every V that is negative: neg_entropy, gen, max_logit.

    Examples
    --------
    >>> import torch, fastood
    >>> logits, feats = torch.tensor([[4.0, 0.0], [0.1, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    >>> fastood.score(logits, method="msp")
    tensor([0.9820, 0.5250])
    >>> fastood.score(logits, feats, norm=2)
    tensor([20.0907,  0.7444])
    >>> fastood.score(logits, feats, "exgrad", oriented=False)
    tensor([0.4946, 0.9975])
    """
    key: Any = (method, norm, feats is None, temperature, bias, log, oriented, backend, type(norm), type(temperature))
    if params:
        key = (key, *_typed(params))
    plan = _known_plan(key)
    if plan is None or plan.scores[0][0] is not SCORES.get(method):
        entry = _entry(method)
        order = _order(entry, norm, feats is not None)
        plan = _keep(key, _Plan([(entry, order)], (-1,), temperature, bias, log, oriented, params))
    return plan.run(logits, feats, backend)


def scores(
    logits: ArrayT | None,
    feats: ArrayT | None = None,
    methods: Iterable[str] | None = None,
    *,
    norm: float | EllipsisType | None = ...,
    temperature: float = 1.0,
    bias: bool = False,
    log: bool = False,
    oriented: bool = True,
    backend: str = "auto",
    **params: Any,
) -> dict[str, ArrayT]:
    """Many scores from one read of logits and feats: name -> [N]. Higher = more in-distribution.

    The arguments are those of ``fastood.score``; `norm` multiplies the V terms among the methods.

    Parameters
    ----------
    methods : iterable of str, optional
        Names in ``fastood.SCORES``. Left out: every score that the given inputs (and ``log=True``) allow.

    Examples
    --------
    >>> import torch, fastood
    >>> fastood.scores(torch.tensor([[4.0, 0.0]]), methods=["msp", "tv"])
    {'msp': tensor([0.9820]), 'tv': tensor([0.4820])}
    """
    entries: list[Score]
    if methods is None:
        given = {name for name, x in (("logits", logits), ("feats", feats)) if x is not None}
        entries = [e for e in SCORES.values() if given.issuperset(e.needs) and (e.positive or not log)]
        if norm is None:
            entries = [e for e in entries if e.stats]
    else:
        entries = [_entry(m, "methods") for m in _names("methods", methods)]
    options: tuple[float, bool, bool, bool] = (temperature, bias, log, oriented)
    key = (*entries, norm, type(norm), feats is None, *options, backend, type(temperature), *_typed(params))
    plan = _known_plan(key)
    if plan is None:
        columns = [(e, _order(e, ... if e.gradient else norm, feats is not None)) for e in entries]
        plan = _keep(key, _Plan(columns, (len(entries), -1), *options, params))
    if not entries:
        logits_and_feats(logits, feats)
        return {}
    out = plan.run(logits, feats, backend)
    return {e.name: x for e, x in zip(entries, out, strict=True)}


def sweep(
    logits: ArrayT,
    feats: ArrayT,
    v: Sequence[str] = PAPER_V,
    norms: Sequence[float | None] = PAPER_NORMS,
    *,
    temperature: float = 1.0,
    bias: bool = False,
    log: bool = False,
    oriented: bool = True,
    backend: str = "auto",
    **params: Any,
) -> ArrayT:
    """Every V times every ||h||_r, the grid of Figure 2, from one read: [N, V, P].

    Higher = more in-distribution. ``out[:, i, j]`` is ``score(logits, feats, v[i], norm=norms[j])``; the
    other arguments are those of ``fastood.score``.

    Parameters
    ----------
    v : sequence of str
        V terms: names in ``fastood.SCORES`` that take a norm.
    norms : sequence of float or None
        Orders r; None for U = 1.

    Examples
    --------
    >>> import torch, fastood
    >>> fastood.sweep(torch.randn(5, 10), torch.randn(5, 32)).shape
    torch.Size([5, 4, 12])
    """
    entries: list[Score] = [_entry(name, "v") for name in _names("v", v)]
    orders: list[Any] = _names("norms", norms)
    options: tuple[float, bool, bool, bool] = (temperature, bias, log, oriented)
    key = (
        "sweep",
        *entries,
        *orders,
        *map(type, orders),
        type(temperature),
        feats is None,
        *options,
        backend,
        *_typed(params),
    )
    plan = _known_plan(key)
    if plan is None:
        for entry in entries:
            if entry.gradient or not entry.stats:
                raise ValueError(f"v must name V terms, which take any norm, got {entry.name!r}")
        orders = [None if r is None else order_of("norms", r) for r in orders]
        for argument, given in (("v", entries), ("norms", orders)):
            if not given:
                raise ValueError(f"{argument} must not be empty")
        columns = [(e, r) for e in entries for r in orders]
        plan = _keep(key, _Plan(columns, (-1, len(entries), len(orders)), *options, params))
    return plan.run(logits, feats, backend)


def norms(
    feats: ArrayT, orders: Sequence[float], *, log: bool = False, bias: bool = False, backend: str = "auto"
) -> ArrayT:
    """||h||_r of every row for several orders from one read: [N, P]. Higher = more in-distribution.

    ||h||_r = (sum_i |h_i|^r)^(1/r) for any r > 0, the number of nonzero entries for r = 0, max |h_i| for
    r = inf (Section 4.3 of the paper). float32, or float64 for float64 feats.

    Parameters
    ----------
    feats : Tensor or ndarray [N, D]
    orders : sequence of float
        Each r >= 0 or ``math.inf``.
    log : bool
        log ||h||_r instead, finite where a small r makes ||h||_r overflow (r = 0.1 from D = 7132 on).
    bias : bool
        Of [h; 1].

    Examples
    --------
    >>> import torch, fastood
    >>> fastood.norms(torch.tensor([[3.0, -4.0]]), [0, 1, 2, float("inf")])
    tensor([[2., 7., 5., 4.]])
    """
    (h,), as_numpy = take(feats=feats)
    if h is None:
        raise TypeError("feats must be a torch tensor or a numpy array, got None")
    wanted = tuple(order_of("orders", r) for r in _names("orders", orders))
    if not wanted:
        raise ValueError("orders must not be empty")
    _, u = select(backend, h.device, h.dtype).row_stats(
        None, h, Want(orders=wanted, bias=flag("bias", bias), log=flag("log", log))
    )
    assert u is not None
    return give(u.to(result_dtype(h)), as_numpy)


def row_stats(
    logits: ArrayT, stats: Iterable[Stat] | None = None, *, temperature: float = 1.0, backend: str = "auto"
) -> dict[Stat, ArrayT]:
    """The row statistics under every score, for scores of one's own: name -> [N].

    Parameters
    ----------
    logits : Tensor or ndarray [N, C]
    stats : iterable, optional
        Names in ``fastood.STATISTICS`` (which says what each one is), or ``("power_sum", r)`` and
        ``("gen", gamma, M)``. Left out: all that need no parameter.
    temperature : float
        T > 0.

    Examples
    --------
    >>> import torch, fastood
    >>> fastood.row_stats(torch.tensor([[80.0, 0.0]]), ["msp", "one_minus_msp"])
    {'msp': tensor([1.]), 'one_minus_msp': tensor([1.8049e-35])}
    """
    f, _, as_numpy = logits_and_feats(logits, None)
    assert f is not None
    if stats is None:
        stats = [name for name in STATISTICS if name not in ("power_sum", "gen", "gradient")]
    wanted = tuple(_stat(s) for s in _names("stats", stats))
    want = Want(wanted, temperature=temperature_of(temperature))
    found, _ = select(backend, f.device, f.dtype).row_stats(f, None, want)
    return {s: give(found[s].to(result_dtype(f)), as_numpy) for s in wanted}


class _Plan:
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
        self.plain: Callable[[Any, Any], Any] | None = None  # the short way, once a longer one was gone
        self.job = None
        if not log and not any(e.v for e, _ in scores):
            self.job = Job(self.want, tuple(self._product(e, r) for e, r in scores))

    def _product(self, entry: Score, order: float | None) -> Product:
        stats = entry.stats_for(self.params[entry.name])
        return Product(
            self.want.stats.index(stats[0]) if stats else -1,
            -1 if order is None else self.want.orders.index(order),
            float(entry.sign(self.oriented) * entry.factor),
            entry.power,
            entry.divisor(self.want.temperature),
        )

    def run(self, logits: Any, feats: Any, backend: str) -> Any:
        """All scores as `shape`, in which -1 stands for the rows: it is the first or the last of it."""
        if self.plain is not None:
            out = self.plain(logits, feats)
            if out is not None:
                return out
        f, h, as_numpy = logits_and_feats(logits, feats)
        x = f if f is not None else h
        assert x is not None
        if f is None or h is None:
            self._check_given(f, h)
        dtype = result_dtype(f, h)
        chosen = select(backend, x.device, dtype)
        shape = tuple(x.shape[0] if n < 0 else n for n in self.shape)
        by_row = self.shape[0] < 0
        out = None
        if self.job is not None:
            out = chosen.products(f, h, self.job, shape, dtype, by_row)
            if out is not None and chosen is kernels.cpu and f is not None:
                self.plain = kernels.cpu.plain(self.job, self.shape)  # a plan is of one `backend`
        if out is None:
            out = self._composed(f, h, chosen, by_row).reshape(shape).to(dtype)
        return give(out, as_numpy)

    def _composed(self, f: Tensor | None, h: Tensor | None, chosen: Backend, by_row: bool) -> Tensor:
        found, norms = chosen.row_stats(f, h, self.want)
        stats = RowStats(found, f.shape[1] if f is not None else 0, self.want.temperature)
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


_PLANS: dict[Any, _Plan] = {}


def _typed(params: Mapping[str, Any]) -> list[tuple[str, Any, type]]:
    """Parameters as part of a key: True equals 1, but is refused where 1 is not."""
    return [(name, x, x.__class__) for name, x in params.items()]


def _known_plan(key: Any) -> _Plan | None:
    """The plan kept under `key`. A plan costs more than scoring one row."""
    try:
        return None if torch.compiler.is_compiling() else _PLANS.get(key)
    except TypeError:  # an argument that has no hash is also one that has no meaning: let it be refused
        return None


def _keep(key: Any, plan: _Plan) -> _Plan:
    if not torch.compiler.is_compiling():
        if len(_PLANS) >= 256:
            _PLANS.clear()
        with suppress(TypeError):  # no hash
            _PLANS[key] = plan
    return plan


def _entry(method: str, argument: str = "method") -> Score:
    entry = SCORES.get(method) if isinstance(method, str) else None
    return entry or SCORES[choice(argument, method, tuple(SCORES))]


def _names(argument: str, names: Any) -> list[Any]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{argument} must be a list, got {names!r}")
    return list(names)


def _order(entry: Score, norm: float | EllipsisType | None, with_feats: bool) -> float | None:
    """The order of U: fixed for a gradient score, the caller's for any other."""
    if entry.gradient:
        if norm is not ...:
            raise ValueError(f"norm: {entry.name} = {entry.formula} has a norm of its own, got norm={norm!r}")
        return float(entry.gradient["order"])
    order = norm_of(norm, BEST_NORM if with_feats or not entry.stats else None)
    if order is None and not entry.stats:
        raise ValueError(f"norm must be an order r >= 0 for {entry.name!r}, got None")
    return order


def _bind_params(entries: Sequence[Score], params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters of each score: its defaults, overridden by the caller's."""
    for name in params:
        if not any(name in e.params for e in entries):
            raise TypeError(f"{name}: no such argument, nor a parameter of {', '.join(e.name for e in entries)}")
    bound = {e.name: {**e.params, **{k: x for k, x in params.items() if k in e.params}} for e in entries}
    for entry in entries:
        for stat in entry.stats_for(bound[entry.name]):
            _stat(stat)
    return bound


def _stat(stat: Any) -> Stat:
    """`stat`, if it names a row statistic with good parameters."""
    name, *params = stat if isinstance(stat, tuple) and stat else (stat,)
    choice("stats", name, tuple(STATISTICS))
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
    return str(name)

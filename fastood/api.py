"""score, scores, sweep, norms, row_stats: check the arguments, make a plan of them, run it on one backend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastood._compiled import short_way, short_when_compiled
from fastood._fork import one_thread_if_forked
from fastood._inputs import ArrayT, Order, choice, flag, logits_and_feats, order_of, rows_along
from fastood._plan import Plan, keep, kept, key_of, known_plan, typed
from fastood.kernels import Stat
from fastood.kernels.statistics import FORMULAS
from fastood.registry import NORM, SCORES, Method, Score
from fastood.successors import SUCCESSORS, Fitted
from fastood.successors.declaration import HeadMethod
from fastood.successors.fitted import Head, successor_of

PAPER_V = ("energy", "tv", "msp", "varsum")  # Figure 2
PAPER_NORMS = (0, 0.1, 0.3, 0.5, 0.8, 1, 2, 3, 4, 5, 6, math.inf)
TYPED_NORMS = typed(PAPER_NORMS)  # once: it takes a tenth of the time of a call
BEST_NORM = 0.3  # Section 4.3: ||h||_0.3 x energy, chosen on the paper's own test set


@short_when_compiled
def score(
    logits: ArrayT | None,
    feats: ArrayT | None = None,
    method: Method | HeadMethod | Fitted = "energy",
    *,
    norm: Order = "auto",
    temperature: float = 1.0,
    bias: bool = False,
    log: bool = False,
    oriented: bool = True,
    backend: str = "auto",
    dim: int | None = None,
    head: Head | None = None,
    **params: Any,
) -> ArrayT:
    """How in-distribution each row is: one OOD score S = U * V per sample. Higher = more in-distribution.

    V is a function of p = softmax(logits / T), U a norm of the features (Section 4.2 of the paper);
    the last-layer gradient scores (Table 1) have closed forms of the same kind.

    Parameters
    ----------
    logits : Tensor or ndarray [N, C]
        What the classifier puts out before its softmax; float16, bfloat16, float32 or float64, or FP8
        (float8_e4m3fn, float8_e5m2, their fnuz kinds), which is read as the same numbers in float16. A
        logit of -inf is a masked class; of FP8 float8_e5m2 alone has one. May be None for ``method="norm"``.
    feats : Tensor or ndarray [N, D], optional
        Penultimate features h, the input of the last layer.
    method : str or Fitted
        A name in ``fastood.SCORES``; of a score that came after the paper, a name in ``fastood.SUCCESSORS`` that needs
        no fit, or a ``fastood.Fitted`` of any. Those take no `norm`, `bias` or `log`.
    norm : float, None or "auto"
        Order r >= 0 (fractions and ``math.inf`` too) of the ||h||_r that multiplies a V term; None for
        U = 1. Left out: 0.3 with feats (the paper's best on ImageNet), None without, and None for a V
        that is never above 0 (``multiplied`` in the registry: neg_entropy, gen). A gradient score has its
        own norm and takes none.
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
    dim : int, optional
        Where the classes of logits, and the features of feats, lie in tensors of more dimensions; all others are
        positions, each of which is a row. 1 for the pixels of [N, C, H, W], -1 for the members of [M, N, C].
    head : nn.Linear, 1x1 nn.Conv2d or (weight [C, D], bias [C] or None), optional
        The last layer, for the successors that take it: ``fastood.attach(model).head``.
    **params
        Parameters of the score itself: ``gamma`` and ``M`` of "gen", ``percentile`` of "scale".

    Returns
    -------
    Tensor or ndarray [N]
        Of the kind and on the device of the inputs, with `dim` of their shape without that dimension; float32, or
        float64 where an input is float64. NaN for a row that holds NaN, and (but for energy, then infinite)
        for one of logits that are all -inf or hold +inf. An infinite feature makes U infinite (but for r = 0),
        and U * V infinite with the sign of V, or NaN where V is 0.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was wanted.
    RuntimeError
        Where a backend asked for by name cannot run here.

    Notes
    -----
    Where V is negative, a larger U *lowers* U * V: larger features then count against a row. Energy and
    max_logit can be negative (logits mostly below 0; the softmax does not see a constant added to them,
    U * V does): use ``norm=None`` there. neg_entropy and gen always are, so a norm multiplies them only
    where it is asked for, and then as the formula says.

    With ``dim=1`` nothing is copied of pixels that lie in memory one after the other, as in ``torch.channels_last``, or
    that are of one image; of others a copy is made. Features of pixels must have the logits' height and width.

    Of an ensemble's logits [M, N, C], the mean of scores is ``score(logits, dim=-1).mean(0)``. The score of the mean
    prediction is ``score(logits.log_softmax(-1).logsumexp(0), method="msp")``: logits of the members' mean
    probabilities, of which every score of p is right (their energy is log M, and tells nothing); that of the
    mean logits is ``score(logits.mean(0))``.

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
    >>> fastood.score(torch.randn(2, 19, 64, 128), dim=1).shape
    torch.Size([2, 64, 128])
    """
    if dim is not None:
        (f, h), shape = rows_along(dim, logits=logits, feats=feats)
        options: Any = {"norm": norm, "temperature": temperature, "bias": bias, "log": log, "oriented": oriented}
        return score(f, h, method, **options, backend=backend, head=head, **params).reshape(shape)
    compiling = is_compiling()
    if compiling and head is None and not params:  # of `score` itself
        options = {"norm": norm, "temperature": temperature, "bias": bias, "log": log, "oriented": oriented}
        found = short_way(logits, feats, method, **options, backend=backend)
        if found is not None:
            return found  # type: ignore[return-value]
    key = key_of(method, feats is not None, norm, backend, temperature, bias, log, oriented, params)
    plan = None if compiling else kept(key)
    if plan is None or plan.scores[0][0] is not SCORES.get(method):  # type: ignore[arg-type]
        if (fitted := successor_of(method, head, temperature, params)) is not None:
            refuse_factors(fitted.method, norm, bias, log)
            return fitted.score(logits, feats, oriented=oriented, backend=backend)
        entry = _entry(method)
        order = _order(entry, norm, feats is not None)
        plan = keep(key, Plan([(entry, order)], (-1,), temperature, bias, log, oriented, params))
    return plan.run(logits, feats, backend)


def scores(
    logits: ArrayT | None,
    feats: ArrayT | None = None,
    methods: Iterable[Method | HeadMethod | Fitted] | None = None,
    *,
    norm: Order = "auto",
    temperature: float = 1.0,
    bias: bool = False,
    log: bool = False,
    oriented: bool = True,
    backend: str = "auto",
    dim: int | None = None,
    head: Head | None = None,
    **params: Any,
) -> dict[str, ArrayT]:
    """Many scores from one read of logits and feats: name -> [N]. Higher = more in-distribution.

    The arguments are those of ``fastood.score``, and each value is what it gives for that name, on a CPU to the
    bit (see ``fastood.sweep``): `norm` multiplies the V terms among the methods, left out those alone that take
    one by default. Keys are plain names, whatever the norm: "energy" is U * V where a norm multiplies it.

    Parameters
    ----------
    methods : iterable of str or Fitted, optional
        As in ``fastood.score``; a Fitted goes by its method's name. `norm` is for those in ``fastood.SCORES`` alone.
        Left out: every one of ``fastood.SCORES`` that the given inputs (and ``log=True``) allow.

    Examples
    --------
    >>> import torch, fastood
    >>> fastood.scores(torch.tensor([[4.0, 0.0]]), methods=["msp", "tv"])
    {'msp': tensor([0.9820]), 'tv': tensor([0.4820])}
    """
    if dim is not None:
        (f, h), shape = rows_along(dim, logits=logits, feats=feats)
        options: Any = {"norm": norm, "temperature": temperature, "bias": bias, "log": log, "oriented": oriented}
        found: dict[str, Any] = scores(f, h, methods, **options, backend=backend, head=head, **params)
        return {name: x.reshape(shape) for name, x in found.items()}
    if methods is not None:
        methods = _names("methods", methods)
    asked = "scores", methods, logits is not None
    key = key_of(asked, feats is not None, norm, backend, temperature, bias, log, oriented, params)
    plan = known_plan(key, (*SCORES,) if methods is None else methods)
    if plan is None:
        if methods is None:
            named = [*SCORES.values()]
            given = {name for name, x in (("logits", logits), ("feats", feats)) if x is not None}
            entries = [e for e in named if given.issuperset(e.needs) and (e.positive or not log)]
            if norm is None:
                entries = [e for e in entries if e.stats]
        elif any(isinstance(m, Fitted) or (isinstance(m, str) and m in SUCCESSORS) for m in methods):
            of_all: Any = {"temperature": temperature, "log": log, "oriented": oriented, "backend": backend}
            return _scores_of_both_kinds(logits, feats, methods, {"norm": norm, "bias": bias}, of_all, head, params)
        else:
            named = entries = _entries("methods", methods)
        columns = [(e, _order(e, "auto" if e.gradient else norm, feats is not None)) for e in entries]
        plan = keep(key, Plan(columns, (len(columns), -1), temperature, bias, log, oriented, params), named)
    if not plan.scores:
        logits_and_feats(logits, feats)
        return {}
    rows = _rows(plan.run(logits, feats, backend))
    return {e.name: x for (e, _), x in zip(plan.scores, rows, strict=True)}


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

    Higher = more in-distribution. ``out[:, i, j]`` is ``score(logits, feats, v[i], norm=norms[j])``, on a CPU
    to the bit; on a GPU each is rounded by itself, within the numeric contract of CONTRIBUTING.md, so a
    threshold is best taken from the call that it will serve. Every norm multiplies every V, a negative one too
    (see ``fastood.score``, whose other arguments these are, but for `dim`).

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
    v = _names("v", v)
    compiling = is_compiling()
    if not compiling and norms is PAPER_NORMS:  # the second is beyond a compiler
        with_types = TYPED_NORMS
    else:
        norms = _names("norms", norms)
        with_types = typed(norms)
    asked = "sweep", v, with_types
    key = key_of(asked, feats is not None, None, backend, temperature, bias, log, oriented, params)
    plan = None if compiling else kept(key, v)
    if plan is None:
        entries = _entries("v", v)
        for entry in entries:
            if entry.gradient or not entry.stats:
                raise ValueError(f"v must name V terms, which take any norm, got {entry.name!r}")
        orders = [None if r is None else order_of("norms", r) for r in norms]
        for argument, given in (("v", entries), ("norms", orders)):
            if not given:
                raise ValueError(f"{argument} must not be empty")
        columns = [(e, r) for e in entries for r in orders]
        shape = (-1, len(entries), len(orders))
        plan = keep(key, Plan(columns, shape, temperature, bias, log, oriented, params), entries)
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
    if feats is None:
        raise TypeError("feats must be a torch tensor or a numpy array, got None")
    orders = _names("orders", orders)
    key = key_of(("norms",), True, typed(orders), backend, 1.0, bias, log)
    plan = known_plan(key)
    if plan is None:
        if not orders:
            raise ValueError("orders must not be empty")
        columns = [(NORM, order_of("orders", r)) for r in orders]
        plan = keep(key, Plan(columns, (-1, len(columns)), 1.0, bias, log, oriented=False, params={}))
    return plan.run(None, feats, backend)


def row_stats(
    logits: ArrayT, stats: Iterable[Stat] | None = None, *, temperature: float = 1.0, backend: str = "auto"
) -> dict[Stat, ArrayT]:
    """The row statistics under every score, for scores of one's own: each under what it was asked for by -> [N].

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
    >>> fastood.row_stats(torch.zeros(1, 4), [("power_sum", 3)])["power_sum", 3]
    tensor([0.0625])
    """
    wanted = _names("stats", FORMULAS if stats is None else stats)
    asked = "row_stats", wanted, *(typed(s) for s in wanted if isinstance(s, tuple))
    key = key_of(asked, False, None, backend, temperature)
    plan = known_plan(key)
    if plan is None:
        columns = [(Score(str(s), str(s), "", "in", (s,)), None) for s in wanted]
        shape = (len(columns), -1)
        plan = keep(key, Plan(columns, shape, temperature, bias=False, log=False, oriented=True, params={}))
    if not wanted:
        logits_and_feats(logits, None)
        return {}
    rows = _rows(plan.run(logits, None, backend))
    return {e.stats[0]: x for (e, _), x in zip(plan.scores, rows, strict=True)}  # type: ignore[index]


def warm_up(
    C: int,
    D: int | None = None,
    dtype: torch.dtype = torch.float32,
    methods: Iterable[str] = ("energy",),
    *,
    device: str | torch.device = "cuda",
    backend: str = "auto",
    norm: Order = "auto",
    **options: Any,
) -> None:
    """Compile and load ahead what ``score(logits [N, C], feats [N, D], method)`` needs of a GPU, for any N.

    The first call of a kind compiles for some seconds. Compiled kernels stay in Triton's cache directory
    (``TRITON_CACHE_DIR``), which can be shipped with a container that was warmed up on a GPU of the same kind: at the
    same path, for Triton keeps absolute ones in it and elsewhere compiles anew, as for another Triton or fastood.

    Parameters
    ----------
    C, D : int
        Classes and features; None for scores without features.
    dtype : torch.dtype
        Of logits and features.
    methods : iterable of str
        Names in ``fastood.SCORES``, each scored by itself.
    device, backend
        Where the tensors will be, and who will score them.
    norm, **options
        As ``fastood.score`` will be given them. Another temperature compiles nothing new.

    Notes
    -----
    For ``scores``, ``sweep``, ``norms`` and ``BatchGrad`` one call on a row of zeros does the same: nothing that is
    compiled depends on the number of rows.

    Examples
    --------
    >>> import fastood, torch
    >>> fastood.warm_up(1000, 2048, torch.bfloat16, ["energy", "gradnorm"], device="cpu")
    """
    one_thread_if_forked()
    for what, size in (("C", C), ("D", D)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise TypeError(f"{what} must be a whole number, got {size!r}")
        if size is not None and size < 0:
            raise ValueError(f"{what} must be a number of columns, got {size}")
    logits = torch.zeros(1, C, dtype=dtype, device=device)
    feats = None if D is None else torch.zeros(1, D, dtype=dtype, device=device)
    for name in _names("methods", methods):
        of_norm: Order = "auto" if _entry(name, "methods").gradient else norm
        score(logits, feats, name, norm=of_norm, backend=backend, **options)


def _scores_of_both_kinds(
    logits: Any, feats: Any, methods: Sequence[Any], factors: Any, of_all: Any, head: Any, params: dict[str, Any]
) -> dict[str, Any]:
    """``scores`` where some of the methods are successors: those one by one, the others from one read."""
    paper = [m for m in methods if not isinstance(m, Fitted) and m not in SUCCESSORS]
    own = {m: {k: x for k, x in params.items() if k in SUCCESSORS[m].params} for m in methods if m in SUCCESSORS}
    rest = {k: x for k, x in params.items() if not any(k in given for given in own.values())}
    found = scores(logits, feats, paper, **factors, **of_all, **rest) if paper or rest else {}
    for m in methods:
        if isinstance(m, Fitted):
            found[m.method] = score(logits, feats, m, **of_all)
        elif m in own:
            found[m] = score(logits, feats, m, **of_all, head=head, **own[m])
    return {name: found[name] for name in (m.method if isinstance(m, Fitted) else m for m in methods)}


def refuse_factors(name: str, norm: Order, bias: bool, log: bool) -> None:
    if norm not in (None, "auto"):
        raise ValueError(f"norm: {name} takes none, got norm={norm!r}")
    for argument, given in (("bias", flag("bias", bias)), ("log", flag("log", log))):
        if given:
            raise ValueError(f"{argument}: {name} takes none, it is not U * V")


def _entry(method: Any, argument: str = "method") -> Score:
    entry = SCORES.get(method) if isinstance(method, str) else None
    if entry is None:
        name = choice(argument, method, (*SCORES, *SUCCESSORS))
        if name not in SCORES:
            raise ValueError(f"{argument} must be one of fastood.SCORES here, got {name!r}, one of fastood.SUCCESSORS")
        entry = SCORES[name]
    return entry


def _entries(argument: str, methods: Any) -> list[Score]:
    names = _names(argument, methods)
    found: list[Score | None]
    try:  # which torch 2.8 can trace, and a context manager not
        found = [*map(SCORES.get, names)]
    except TypeError:  # no hash: let it be refused
        found = [None]
    if None not in found:
        return found  # type: ignore[return-value]
    return [_entry(name, argument) for name in names]


def _names(argument: str, names: Any) -> tuple[Any, ...]:
    if not isinstance(names, (tuple, list)) and (isinstance(names, str) or not isinstance(names, Iterable)):
        raise TypeError(f"{argument} must be a list, got {names!r}")
    return tuple(names)


def _rows(out: Any) -> Any:
    return out.unbind() if isinstance(out, Tensor) else out  # to iterate over a tensor takes longer


def _order(entry: Score, norm: Order, with_feats: bool) -> float | None:
    """The order of U: fixed for a gradient score, the caller's or the default for any other."""
    by_default = isinstance(norm, str) and norm == "auto"
    if entry.gradient:
        if not by_default:
            raise ValueError(f"norm: {entry.name} = {entry.formula} has a norm of its own, got norm={norm!r}")
        return float(entry.gradient["order"])
    if by_default:
        return BEST_NORM if (with_feats and entry.multiplied) or not entry.stats else None
    if norm is None and not entry.stats:
        raise ValueError(f"norm must be an order r >= 0 for {entry.name!r}, got None")
    if isinstance(norm, str):
        raise TypeError(f"norm must be a number, None or 'auto', got {norm!r}")
    return None if norm is None else order_of("norm", norm)

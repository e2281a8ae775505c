"""score_linear: scores from features and the last layer. The logits are only ever tiles of a product.

A tile is some rows times all classes. It is formed by torch's product, in float32 or wider whatever the inputs are, and
scored by the kernels that score any logits while it is still in a cache. So whatever fastood.score knows works, on
every backend. On a GPU what one sweep of an online softmax gives (device/linear.py) needs no tile in memory at all. TV
does not go that way: it would take the whole product a second time, where a tile of logits costs a write and a read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Generic, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from fastood._inputs import ArrayT, Order, flag, give, result_dtype, take
from fastood._plan import Plan, keep, key_of, known_plan, typed
from fastood.api import _entry, _order
from fastood.kernels import linear, select
from fastood.kernels.seam import traced
from fastood.registry import SCORES, Method, Score

# A tile has as many rows as make up so many logits, but never fewer rows than a product needs to be fast.
TILE = 1 << 23
LEAST_ROWS = {"cpu": 64, "cuda": 512}
WIDENED = 1 << 21  # elements of a half weight that are float32 at a time


class Predicted(NamedTuple, Generic[ArrayT]):
    """What ``score_linear(..., predict=True)`` gives: [N] each."""

    score: ArrayT
    classes: ArrayT
    probability: ArrayT


@overload
def score_linear(
    feats: ArrayT, weight: ArrayT, bias: ArrayT | None = ..., method: Method = ..., *,
    norm: Order = ..., temperature: float = ..., log: bool = ..., oriented: bool = ...,
    backend: str = ..., predict: Literal[False] = ..., **params: Any,
) -> ArrayT: ...  # fmt: skip


@overload
def score_linear(
    feats: ArrayT, weight: ArrayT, bias: ArrayT | None = ..., method: Method = ..., *,
    norm: Order = ..., temperature: float = ..., log: bool = ..., oriented: bool = ...,
    backend: str = ..., predict: Literal[True], **params: Any,
) -> Predicted[ArrayT]: ...  # fmt: skip


def score_linear(
    feats: ArrayT,
    weight: ArrayT,
    bias: ArrayT | None = None,
    method: Method = "energy",
    *,
    norm: Order = "auto",
    temperature: float = 1.0,
    log: bool = False,
    oriented: bool = True,
    backend: str = "auto",
    predict: bool = False,
    **params: Any,
) -> ArrayT | Predicted[ArrayT]:
    """``score(feats @ weight.T + bias, feats, method)``, the logits never in memory. Higher = more in-distribution.

    For heads of many classes: the logits [N, C] of a vocabulary of 128,256 are far larger than features and weight.

    Parameters
    ----------
    feats : Tensor or ndarray [N, D]
        Penultimate features h; float16, bfloat16, float32, float64 or FP8.
    weight : Tensor or ndarray [C, D]
        Of the last layer, ``torch.nn.Linear.weight``.
    bias : Tensor or ndarray [C], optional
        Of the last layer. A bias of -inf masks its class.
    method, norm, temperature, log, oriented, backend, **params
        As of ``fastood.score`` with logits and feats: every name in ``fastood.SCORES``, a norm too by default.
    predict : bool
        Also the most probable class of each row and its probability.

    Returns
    -------
    Tensor or ndarray [N]
        As ``fastood.score``. With ``predict``: a named tuple of ``score``, ``classes`` (int64, the first of equal ones;
        of no meaning where the probability is NaN) and ``probability``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was wanted.
    RuntimeError
        Where a backend asked for by name cannot run here.

    Notes
    -----
    Memory: a tile of 2^23 logits, or of 64 rows (on a GPU 512) where those have more. On a GPU energy, MSP, VarSum and
    max_logit of halves take none: a few numbers for each row and 512 classes.

    Precision: the logits are those of float32 arithmetic (float64 where an input is float64), never rounded to a half
    type. With eps = 2^-24 (2^-53) they are off by no more than  E = (D + 1) eps max_k (sum_d |h_d w_kd| + |b_k|),
    twice that on tensor cores, which truncate; much less in the mean. Energy and max_logit are then off by up to E more
    than ``fastood.score`` of exact logits is, log p_k by 2 E / T. Where no product or sum rounds there is nothing to
    add. TF32 is not used, unless for float32 on a GPU ``torch.set_float32_matmul_precision`` says otherwise.

    A row's bits are those of torch's product, which may depend on how many rows are multiplied (BLAS takes another way
    for a few); not where a GPU forms no logits.

    Gradients: where one is asked for (a weight that is a parameter asks, outside of ``torch.no_grad()``), and in
    ``torch.compile`` and export, all logits are formed at once by plain PyTorch.

    For the norm of [h; 1], ``fastood.score``'s ``bias=True``, give the features a column of ones and the bias as the
    weight's last column.

    Examples
    --------
    >>> import torch, fastood
    >>> layer, feats = torch.nn.Linear(512, 1000), torch.randn(4, 512)
    >>> with torch.no_grad():
    ...     s = fastood.score_linear(feats, layer.weight, layer.bias, "msp", norm=None, predict=True)
    >>> torch.equal(s.score, s.probability)
    True
    """
    asked = "linear", method, *typed((predict,))
    key = key_of(asked, True, norm, backend, temperature, log=log, oriented=oriented, params=params)
    plan = known_plan(key, (method,))
    if plan is None:
        entry = _entry(method)
        columns: list[tuple[Score, float | None]] = [(entry, _order(entry, norm, True))]
        if flag("predict", predict):
            columns.append((PROBABILITY, None))
        plan = keep(key, Plan(columns, (len(columns), -1), temperature, False, log, oriented, params), [entry])
    h, w, b, as_numpy = _layer(feats, weight, bias)
    if w.shape[0] == 0:
        raise ValueError(f"weight must have at least one class, got shape {list(w.shape)}")
    out, classes = _scored(plan, h, w, b, backend, predict)
    score = give(out[0], as_numpy)
    if classes is None:
        return score
    return Predicted(score, give(classes, as_numpy), give(out[1].exp() if log else out[1], as_numpy))


PROBABILITY = SCORES["msp"]


def _layer(feats: Any, weight: Any, bias: Any) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    for name, x in (("feats", feats), ("weight", weight)):
        if x is None:
            raise TypeError(f"{name} must be a torch tensor or a numpy array, got None")
    row = bias
    if isinstance(bias, (Tensor, np.ndarray)):
        if bias.ndim != 1:
            raise ValueError(f"bias must be [C], one number per class, got shape {list(bias.shape)}")
        row = bias[None]
    (h, w, b), as_numpy = take(feats=feats, weight=weight, bias=row)
    assert h is not None
    assert w is not None
    if w.shape[1] != h.shape[1]:
        raise ValueError(f"weight must be [C, {h.shape[1]}] for feats {list(h.shape)}, got shape {list(w.shape)}")
    if b is not None and b.shape[1] != w.shape[0]:
        raise ValueError(f"bias must be [{w.shape[0]}], one number per class, got shape {list(bias.shape)}")
    for name, y in (("weight", w), ("bias", b)):
        if y is not None and y.device != h.device:
            raise ValueError(f"{name} must be on the device of feats, {h.device}, got {y.device}")
    return h, w, None if b is None else b[0], as_numpy


def _scored(
    plan: Plan, h: Tensor, w: Tensor, b: Tensor | None, backend: str, predict: bool
) -> tuple[Tensor, Tensor | None]:
    """The scores of the plan, [columns, N], and the classes."""
    if traced(h, w, b):
        f = _product(h, w, b)
        return plan.run(f, h, backend), f.argmax(-1) if predict else None
    h, w, b = h.detach(), w.detach(), None if b is None else b.detach()
    chosen = select(backend, h.device, result_dtype(h, w, b))
    found = linear(chosen, plan.request, h, w, b, predict)
    if found is not None:
        values, classes = found
        return plan.made_of(values, len(w), torch.float32), classes
    out = h.new_empty(len(plan.scores), len(h), dtype=result_dtype(h, w, b))
    classes = torch.empty(len(h), dtype=torch.int64, device=h.device) if predict else None
    for rows, f in _tiles(h, w, b):
        out[:, rows] = plan.run(f, h[rows], backend)
        if classes is not None:
            classes[rows] = f.argmax(-1)
    return out, classes


def _tiles(h: Tensor, w: Tensor, b: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and their logits, which the next ones overwrite."""
    dtype, (C, D) = result_dtype(h, w, b), w.shape
    b = None if b is None else b.to(dtype)
    n = max(LEAST_ROWS["cuda" if h.is_cuda else "cpu"], TILE // C)
    tile = h.new_empty(min(n, len(h)), C, dtype=dtype)
    # Some classes at a time where the weight has to be widened, which as a whole could take more than the logits.
    c = C if w.dtype == dtype else min(C, max(1, WIDENED // max(1, D)))
    of_halves = h.is_cuda and not torch.version.hip and h.dtype == w.dtype != dtype == torch.float32
    widened = None if w.dtype == dtype or of_halves else w.new_empty(c, D, dtype=dtype)
    for first in range(0, len(h), n):
        rows = slice(first, min(first + n, len(h)))
        f = tile[: rows.stop - first]
        if of_halves:  # tensor cores multiply them as they are, and sum in float32
            torch.ops.aten.mm.dtype_out(h[rows], w.T, dtype, out=f)
            if b is not None:
                f += b
        else:
            x = h[rows].to(dtype)
            for k in range(0, C, c):
                some = w[k : k + c] if widened is None else widened[: min(c, C - k)].copy_(w[k : k + c])
                if b is None:
                    torch.mm(x, some.T, out=f[:, k : k + c])
                else:
                    torch.addmm(b[k : k + c], x, some.T, out=f[:, k : k + c])
        yield rows, f


def _product(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    dtype = result_dtype(h, w, b)
    on = h.device.type
    with torch.autocast(on, enabled=False) if torch.is_autocast_enabled(on) else nullcontext():
        return torch.nn.functional.linear(h.to(dtype), w.to(dtype), None if b is None else b.to(dtype))

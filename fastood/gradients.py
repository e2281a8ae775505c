"""Gradient norms: of the last layer in closed form, of all parameters through torch.func, BatchGrad.

The gradient of log p_y by the last layer's weight W is (1/T) (e_y - p) h^T, an outer product, so its
entrywise norm of order r is (1/T) ||h||_r ||e_y - p||_r (Appendix B of the paper).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastood._inputs import (
    ArrayT,
    choice,
    give,
    logits_and_feats,
    number,
    result_dtype,
    same_rows,
    take,
    temperature_of,
)
from fastood.kernels import reference

Labels = Literal["uniform", "predicted", "log_predicted"]
Expectation = Literal["inside", "outside"]

_TILE = 1 << 22  # elements of the largest temporary of batchgrad


def gradient_norm(
    logits: ArrayT,
    feats: ArrayT,
    labels: Labels | ArrayT = "uniform",
    order: float = 1,
    power: float = 1,
    expectation: Expectation = "inside",
    *,
    temperature: float = 1.0,
    bias: bool = False,
) -> ArrayT:
    """Norm of the last layer's gradient of log p_Y, in closed form: [N], the raw quantity, not oriented.

    "inside" is ``|| E_q[grad log p_Y] ||_order ** power``, "outside" ``E_q[ || grad log p_Y ||_order ** power ]``
    (the rows of Table 1). The defaults are GradNorm, Eq. 2; "predicted" with "outside" is ExGrad, Eq. 3.

    Parameters
    ----------
    logits : Tensor or ndarray [N, C]
    feats : Tensor or ndarray [N, D]
    labels : str or Tensor or ndarray [N, C]
        The distribution q of the label Y: "uniform", "predicted" (p itself), or one row of probabilities
        per sample (a row that is not a distribution gives NaN). "log_predicted", with "outside" only,
        weighs each class by log p_y: Table 1's E_p[ (log p_Y / p_Y) ... ].
    order : float
        r > 0 or ``math.inf`` of the entrywise norm.
    power : float
        > 0.
    expectation : {"inside", "outside"}
        Where the expectation stands.
    temperature, bias
        As in ``fastood.score``.

    Notes
    -----
    Uniform inside (GradNorm) is larger for in-distribution inputs, as is uniform outside; predicted
    outside (ExGrad) is larger for OOD inputs. Code published for GradNorm takes the sum over classes
    in place of the mean: C times this value, so its thresholds do not carry over.

    Examples
    --------
    >>> import torch, fastood
    >>> logits, feats = torch.tensor([[4.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    >>> fastood.gradient_norm(logits, feats)  # 2 ||h||_1 TV
    tensor([6.7482])
    >>> fastood.gradient_norm(logits, feats, "predicted", expectation="outside")  # ExGrad
    tensor([0.4946])
    """
    f, h, as_numpy = logits_and_feats(logits, feats)
    f, h = _given("logits", f), _given("feats", h)
    T, order, power = _gradient_arguments(labels, order, power, expectation, temperature)
    rows = reference.Softmax(f, T)
    q = labels if isinstance(labels, str) else _distribution(labels, f, as_numpy)
    v = (rows.gradient_inside if expectation == "inside" else rows.gradient_outside)(q, order, power)
    u = reference.norms_of(h, (order,), bias=bool(bias))[:, 0]
    return give((reference.Powers(u / T)(power) * v).to(result_dtype(f, h)), as_numpy)


def anchor_gradient(
    logits: ArrayT, feats: ArrayT, labels: ArrayT, *, temperature: float = 1.0, bias: bool = False
) -> ArrayT:
    """G of BatchGrad: the last layer's gradient summed over in-distribution anchors, [C, D] ([C, D + 1] with bias).

    G = sum_i (1/T) (e_{y_i} - p(x_i)) h_i^T (Eq. 6 of the paper): a constant of the model, computed once.

    Parameters
    ----------
    logits : Tensor or ndarray [A, C]
    feats : Tensor or ndarray [A, D]
        Of A anchors, one or more of each class.
    labels : Tensor or ndarray [A]
        Their true classes, integers in 0..C-1.
    temperature, bias
        As in ``fastood.score``.

    Examples
    --------
    >>> import torch, fastood
    >>> G = fastood.anchor_gradient(torch.eye(3), torch.ones(3, 2), torch.arange(3))
    >>> G.shape
    torch.Size([3, 2])
    """
    f, h, as_numpy = logits_and_feats(logits, feats)
    f, h = _given("logits", f), _given("feats", h)
    T = temperature_of(temperature)
    if not isinstance(labels, Tensor | np.ndarray):
        raise TypeError(f"labels must be a torch tensor or a numpy array of integers, got {type(labels).__name__}")
    y = torch.as_tensor(labels)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {y.dtype}")
    if y.shape != (f.shape[0],):
        raise ValueError(f"labels must be [{f.shape[0]}], one class per anchor, got shape {list(y.shape)}")
    if y.device != f.device:
        raise ValueError(f"labels must be on the device of logits, {f.device}, got {y.device}")
    if y.numel() and (int(y.min()) < 0 or int(y.max()) >= f.shape[1]):
        raise ValueError(f"labels must be classes 0..{f.shape[1] - 1}, got {int(y.min())}..{int(y.max())}")
    dtype = result_dtype(f, h)
    p, not_p = (x.to(dtype) for x in reference.Softmax(f, T).probabilities())
    y = y.long()[:, None]
    off = (-p).scatter(-1, y, not_p.gather(-1, y))  # e_y - p
    with torch.autocast(f.device.type, enabled=False):
        G = off.T @ _extended(h.to(dtype), bias) / T
    return give(G.to(dtype), as_numpy)


def batchgrad(
    logits: ArrayT,
    feats: ArrayT,
    G: ArrayT,
    *,
    temperature: float = 1.0,
    bias: bool = False,
    oriented: bool = True,
) -> ArrayT:
    """BatchGrad of the last layer (Eq. 6): [N], higher = more in-distribution (the raw value is larger for OOD).

    E_p || (1/T) (e_Y - p) h^T + G ||_1
    = sum_c [ (1 - p_c) sum_d |G_cd - p_c h_d / T| + p_c sum_d |G_cd + (1 - p_c) h_d / T| ],
    in tiles: [N, C, D] is never built.

    Parameters
    ----------
    logits : Tensor or ndarray [N, C]
    feats : Tensor or ndarray [N, D]
    G : Tensor or ndarray [C, D] ([C, D + 1] with bias)
        ``fastood.anchor_gradient`` of in-distribution examples, with the same temperature and bias.
    temperature, bias, oriented
        As in ``fastood.score``.

    Examples
    --------
    >>> import torch, fastood
    >>> G = fastood.anchor_gradient(torch.eye(3), torch.ones(3, 2), torch.arange(3))
    >>> fastood.batchgrad(torch.zeros(1, 3), torch.ones(1, 2), G)
    tensor([-2.6667])
    """
    f, h, as_numpy = logits_and_feats(logits, feats)
    f, h = _given("logits", f), _given("feats", h)
    (g,), g_numpy = take(G=G)
    g = _given("G", g)
    T = temperature_of(temperature)
    wanted = [f.shape[1], h.shape[1] + bool(bias)]
    if list(g.shape) != wanted:
        raise ValueError(f"G must be {wanted}, got shape {list(g.shape)}")
    if g.device != f.device or g_numpy != as_numpy:
        raise ValueError(f"G must be of the kind and on the device of logits, got {type(G).__name__} on {g.device}")
    dtype = result_dtype(f, h, g)
    p, not_p = (x.to(dtype) for x in reference.Softmax(f, T).probabilities())
    g, x = g.to(dtype), _extended(h.to(dtype), bias)
    # Tiles [n, c, D]; c does not depend on N, so that a row's sum does not depend on its batch.
    c = max(1, min(g.shape[0], _TILE // max(1, g.shape[1])))
    n = max(1, _TILE // max(1, c * g.shape[1]))
    raw = [p.new_zeros(0, dtype=torch.float64)]
    for p_n, not_p_n, x_n in zip(p.split(n), not_p.split(n), x.split(n), strict=True):
        tiles = zip(p_n.split(c, -1), not_p_n.split(c, -1), g.split(c), strict=True)
        nothing = x_n.new_zeros(len(x_n), dtype=torch.float64)
        raw.append(sum((_expected_l1(*tile, x_n, T).double() for tile in tiles), start=nothing))
    return give(((-1 if oriented else 1) * torch.cat(raw)).to(dtype), as_numpy)


def _expected_l1(p: Tensor, not_p: Tensor, g: Tensor, x: Tensor, T: float) -> Tensor:
    """Two rank-one updates of each row of G, weighed: p, not_p [n, c], g [c, D], x [n, D] -> [n]."""
    # Divided by T last: h / T alone may overflow where p h / T is small.
    away = (g - p[..., None] * x[:, None] / T).abs().sum(-1)
    towards = (g + not_p[..., None] * x[:, None] / T).abs().sum(-1)
    return reference.row_sum(_weighed(not_p, away) + _weighed(p, towards))


def _weighed(p: Tensor, x: Tensor) -> Tensor:
    """p x, where what has no probability does not count even if it is infinite."""
    return torch.where(p == 0, 0.0, p * x)


def deep_gradient_norm(
    model: nn.Module,
    inputs: Tensor,
    labels: Labels | Tensor = "uniform",
    order: float = 1,
    power: float = 1,
    expectation: Expectation = "inside",
    *,
    temperature: float = 1.0,
    max_bytes: int = 1 << 30,
) -> Tensor:
    """Norm of the gradient of log p_Y by *all* parameters, through autograd: the Deep rows of Table 1. [N], raw.

    The arguments and the quantity are those of ``fastood.gradient_norm``, so that
    ``deep_gradient_norm(model, inputs, **fastood.SCORES["exgrad"].gradient)`` is the deep ExGrad.
    "inside" costs one backward pass per input, "outside" one per input and class.

    Parameters
    ----------
    model : nn.Module
        In eval mode; maps inputs [N, ...] to logits [N, C]. Parameters that need no gradient do not count.
    inputs : Tensor [N, ...]
        On the model's device.
    labels : str or Tensor [N, C]
    max_bytes : int
        About how much memory the per-sample gradients may take at a time; at least one gradient is held.

    Examples
    --------
    >>> import torch, fastood
    >>> model = torch.nn.Linear(4, 3, bias=False).eval()
    >>> x = torch.randn(5, 4)
    >>> with torch.no_grad():
    ...     shallow = fastood.gradient_norm(model(x), x)
    >>> torch.allclose(fastood.deep_gradient_norm(model, x), shallow, rtol=1e-4)
    True
    """
    T, order, power = _gradient_arguments(labels, order, power, expectation, temperature)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a torch tensor, got {type(inputs).__name__}")
    if model.training:
        raise ValueError(
            "model must be in eval mode: call model.eval(), or its scores depend on the batch and on dropout"
        )
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model must have a parameter that requires a gradient")
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    fixed.update(model.named_buffers())
    max_bytes = int(number("max_bytes", max_bytes, above=0))

    def norm_of_gradient(gradients: dict[str, Tensor]) -> Tensor:
        flat = [g.abs().to(torch.promote_types(g.dtype, torch.float32)) for g in gradients.values()]
        if order == math.inf:
            return torch.stack([g.max() for g in flat]).max().double() ** power
        return torch.stack([(g**order).sum() for g in flat]).double().sum() ** (power / order)

    def of_one(x: Tensor, q: Tensor | None, at_a_time: int) -> Tensor:
        def forward(params: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(model, (params, fixed), (x[None],))
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                raise ValueError("model must map inputs [N, ...] to one tensor of logits [N, C]")
            return logits[0]

        logits, pull = torch.func.vjp(forward, params)[:2]
        log_p = (logits.double() / T).log_softmax(-1)  # float64: e_y - p must keep 1 - p_max
        p, eye = log_p.exp(), torch.eye(logits.shape[0], dtype=torch.float64, device=x.device)
        weights = {"uniform": torch.full_like(p, 1 / len(eye)), "predicted": p, "log_predicted": log_p}
        w = q if q is not None else weights[str(labels)]

        def size(cotangent: Tensor) -> Tensor:
            return norm_of_gradient(pull((cotangent / T).to(logits.dtype))[0])

        if expectation == "inside":
            return size(w - p)
        return (w * torch.func.vmap(lambda e: size(e - p), chunk_size=at_a_time)(eye)).sum()

    # Each gradient at work is held about four times: itself, its absolute value, its power, autograd's share.
    held = 4 * sum(p.numel() * max(4, p.element_size()) for p in params.values())
    budget = max(1, max_bytes // held)
    if expectation == "inside":
        per_input = 1
    else:
        with torch.no_grad():
            per_input = model(inputs[:1]).shape[-1] if len(inputs) else 1
    n, at_a_time = max(1, budget // per_input), min(per_input, budget)
    q = None
    if not isinstance(labels, str):
        with torch.no_grad():
            q = _distribution(labels, model(inputs[:1]).expand(len(inputs), -1), as_numpy=False).double()
    batched = torch.func.vmap(lambda x, q: of_one(x, q, at_a_time), in_dims=(0, None if q is None else 0))
    chunks = [slice(i, i + n) for i in range(0, len(inputs), n)]
    norms = [batched(inputs[c], None if q is None else q[c]) for c in chunks]
    dtype = result_dtype(*params.values())
    return torch.cat(norms).to(dtype) if norms else inputs.new_zeros(0, dtype=dtype)


def _gradient_arguments(
    labels: Any, order: Any, power: Any, expectation: Any, temperature: Any
) -> tuple[float, float, float]:
    """temperature, order and power, all arguments of a gradient norm checked."""
    choice("expectation", expectation, ("inside", "outside"))
    if isinstance(labels, str):
        choice("labels", labels, ("uniform", "predicted", "log_predicted"))
        if labels == "log_predicted" and expectation == "inside":
            raise ValueError("labels='log_predicted' weighs the norms of gradients: it needs expectation='outside'")
    return (
        temperature_of(temperature),
        number("order", order, above=0, infinite=True),
        number("power", power, above=0),
    )


def _distribution(labels: Any, logits: Tensor, as_numpy: bool) -> Tensor:
    """Label probabilities [N, C] beside logits; NaN in place of a row that is not a distribution."""
    if not isinstance(labels, np.ndarray if as_numpy else Tensor):
        kind = "numpy array" if as_numpy else "torch tensor"
        got = type(labels).__name__
        raise TypeError(f"labels must be 'uniform', 'predicted', 'log_predicted' or a {kind}, got {got}")
    (q,), _ = take(labels=labels)
    q = _given("labels", q)
    if q.shape != logits.shape:
        wanted = f"{list(logits.shape)}, a distribution per row (one-hot for classes)"
        raise ValueError(f"labels must be {wanted}, got {list(q.shape)}")
    same_rows("labels", q, logits)
    q = q.to(torch.promote_types(logits.dtype, torch.float32))
    # Probabilities in a half type do not sum to 1 exactly.
    good = (q >= 0).all(-1) & ((q.sum(-1) - 1).abs() < 1e-2)
    return torch.where(good[:, None], q, math.nan)


def _given(name: str, x: Tensor | None) -> Tensor:
    if x is None:
        raise TypeError(f"{name} must be a torch tensor or a numpy array, got None")
    return x


def _extended(h: Tensor, bias: bool) -> Tensor:
    return torch.cat([h, h.new_ones(h.shape[0], 1)], -1) if bias else h

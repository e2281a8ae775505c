"""Gradient norms by all parameters of a model, through torch.func."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastood._batchgrad import anchor_classes
from fastood._fork import one_thread_if_forked
from fastood._inputs import FP8, label_probabilities, number, result_dtype, temperature_of
from fastood.gradients import Expectation, Labels, arguments, label_minus_p
from fastood.kernels import reference
from fastood.kernels.statistics import UNSCALED


@torch.inference_mode(False)  # in which torch 2.8 gets gradients wrong
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
    """Norm of the gradient of log p_Y by *all* parameters, through autograd (Table 1, Deep): [N]. Raw, not oriented.

    The arguments, the quantity and which way it points are those of ``fastood.gradient_norm``, so that
    ``deep_gradient_norm(model, inputs, **fastood.SCORES["exgrad"].gradient)`` is the deep ExGrad.
    "inside" costs one backward pass per input, "outside" one per input and class.

    Parameters
    ----------
    model : nn.Module
        In eval mode; maps inputs [N, ...] to logits [N, C]. Parameters that need no gradient do not count.
    inputs : Tensor [N, ...]
        On the model's device. Of FP8 the model is given the same numbers in its parameters' type.
    labels : str or Tensor [N, C]
    max_bytes : int
        About how much memory the per-sample gradients may take at a time; at least one gradient is held.

    Notes
    -----
    Of a model that is one linear layer this is ``fastood.gradient_norm``, however sure the model is. Entries of a
    gradient that are beyond the parameters' own type (below 1e-45 in float32) count as 0; an order below 0.3 can
    tell, and ``model.double()`` keeps them. Where the gradient of any class holds NaN or infinity, so does the result:
    a class counts in that even if its probability is 0.

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
    T, order, power = arguments(labels, order, power, expectation, temperature)
    params, fixed = _parameters(model, inputs)
    return _deep_norms(model, params, fixed, _taken(inputs, params), labels, order, power, expectation, T, max_bytes)


@torch.inference_mode(False)  # in which torch 2.8 gets gradients wrong
def deep_batchgrad(
    model: nn.Module,
    inputs: Tensor,
    anchors: Tensor,
    anchor_labels: Tensor,
    *,
    temperature: float = 1.0,
    max_bytes: int = 1 << 30,
    oriented: bool = True,
) -> Tensor:
    """BatchGrad by *all* parameters, through autograd (Table 3, Deep): [N]. Oriented: higher = more in-distribution.

    E_p || grad log p_Y(x) + sum_i grad log p_{y_i}(x_i) ||_1 (Eq. 6): one backward pass per input and class.

    Parameters
    ----------
    model, inputs, max_bytes
        As in ``fastood.deep_gradient_norm``.
    anchors : Tensor [A, ...]
        In-distribution inputs, one or more of each class.
    anchor_labels : Tensor or ndarray [A]
        Their true classes, integers of any type in 0..C-1. A UserWarning says where classes have no anchor.
    temperature, oriented
        As in ``fastood.score``.

    Notes
    -----
    NaN or infinite where the gradient of any class is, even of a class whose probability is 0; NaN for every input
    where an anchor is NaN or infinite.

    Examples
    --------
    >>> import torch, fastood
    >>> model = torch.nn.Linear(4, 3, bias=False).eval()
    >>> x, anchors, labels = torch.randn(5, 4), torch.randn(3, 4), torch.arange(3)
    >>> with torch.no_grad():
    ...     shallow = fastood.BatchGrad.from_anchors(model(anchors), anchors, labels).score(model(x), x)
    >>> torch.allclose(fastood.deep_batchgrad(model, x, anchors, labels), shallow, rtol=1e-4)
    True
    """
    T = temperature_of(temperature)
    params, fixed = _parameters(model, inputs)
    if not isinstance(anchors, Tensor):
        raise TypeError(f"anchors must be a torch tensor, got {type(anchors).__name__}")
    anchors = _taken(anchors, params)
    first = _logits(model, params, fixed, anchors[:1])
    labels = anchor_classes("anchor_labels", anchor_labels, len(anchors), first.shape[1], first.device)
    constant = {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in params.items()}
    for i in range(0, len(anchors), 32):
        x, y = anchors[i : i + 32], labels[i : i + 32]
        logits, pull = torch.func.vjp(lambda params, x=x: _logits(model, params, fixed, x), params)[:2]
        off, size = _unit(label_minus_p(reference.Softmax(logits.double(), T), y))
        for name, g in pull(off.to(logits.dtype))[0].items():
            constant[name] += (g.double() * (size / T)).to(_wide(g))
    inputs = _taken(inputs, params)
    raw = _deep_norms(model, params, fixed, inputs, "predicted", 1.0, 1.0, "outside", T, max_bytes, constant)
    return -raw if oriented else raw


def _parameters(model: Any, inputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that gradients are taken by, and all else that the model holds."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            where = f"model.{name}" if name else "model"
            hint = f"{where}.module {'in its place' if name else 'is the model to pass'}"
            raise TypeError(f"{where} must not be a {type(module).__name__}, which splits what it is given: {hint}")
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a torch tensor, got {type(inputs).__name__}")
    one_thread_if_forked()
    if model.training:
        raise ValueError(
            "model must be in eval mode: call model.eval(), or its scores depend on the batch and on dropout"
        )
    params = {name: _normal(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model must have a parameter that requires a gradient")
    for name, p in params.items():
        if p.dtype in FP8:
            raise TypeError(f"model.{name} must be float16 or wider, got {p.dtype}, in which autograd does not compute")
    fixed = {name: _normal(p.detach()) for name, p in model.named_parameters() if not p.requires_grad}
    fixed.update({name: _normal(x) for name, x in model.named_buffers()})
    return params, fixed


def _normal(x: Tensor) -> Tensor:
    """`x`, also of inference mode, as a tensor that autograd can keep."""
    return x.clone() if x.is_inference() else x


def _taken(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Inputs of a model as `_normal` gives them; of FP8, which no layer takes, as the same numbers in its type."""
    return _normal(x.to(next(iter(params.values())).dtype) if x.dtype in FP8 else x)


def _logits(model: nn.Module, params: dict[str, Tensor], fixed: dict[str, Tensor], inputs: Tensor) -> Tensor:
    logits = torch.func.functional_call(model, (params, fixed), (inputs,))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError("model must map inputs [N, ...] to one tensor of logits [N, C]")
    return logits


def _deep_norms(
    model: nn.Module,
    params: dict[str, Tensor],
    fixed: dict[str, Tensor],
    inputs: Tensor,
    labels: Labels | Tensor,
    order: float,
    power: float,
    expectation: Expectation,
    T: float,
    max_bytes: int,
    constant: dict[str, Tensor] | None = None,
) -> Tensor:
    """Norms of gradients by all parameters, `constant` added to each gradient first, in bounded memory: [N]."""
    max_bytes = int(number("max_bytes", max_bytes, above=0))
    kind = labels if isinstance(labels, str) else "given"

    def of_one(x: Tensor, q: Tensor | None, at_a_time: int) -> Tensor:
        def forward(params: dict[str, Tensor]) -> Tensor:
            return _logits(model, params, fixed, x[None])[0]

        logits, pull = torch.func.vjp(forward, params)[:2]
        # What is pulled back is e_y - p by its own size, in float64 until then: autograd through a softmax would
        # subtract a p_y that has rounded to 1, and the parameters' type may not hold what is left.
        rows = reference.Softmax(logits.double()[None], T)
        p = rows.probabilities()[0][0]
        argmax, log_one_minus_p = rows.argmax, rows.log_r1[0] + rows.log_msp[0]
        others = (-rows.e[0] / rows.rest.clamp(min=1)).scatter(-1, argmax, 1.0)  # (e_top - p) / (1 - p_top)

        def size(direction: Tensor, log_length: Tensor) -> Tensor:
            gradients = pull(direction.to(logits.dtype))[0]
            if constant is None:
                return (power * (_norm_of(gradients, order).log() + log_length - math.log(T))).exp()
            length = log_length.exp() / T
            added = {name: g * length.to(_wide(g)) + constant[name] for name, g in gradients.items()}
            return _norm_of(added, order)

        w = torch.full_like(p, 1 / len(p)) if q is None else q
        if expectation == "inside":
            difference = (w - p).scatter(-1, argmax, w.gather(-1, argmax) - 1 + rows.one_minus_msp)
            direction, length = _unit(0 * p if kind == "predicted" else difference)  # E_p[e_Y - p] = 0, exactly
            return size(direction, length.log())

        def size_of_class(y: Tensor) -> Tensor:
            at_top = y == argmax[0]
            off = torch.where(at_top, others, label_minus_p(rows, y[None])[0])
            return size(off, torch.where(at_top, log_one_minus_p, 0.0))

        if kind == "predicted":
            w = p
        elif kind == "log_predicted":
            w = (rows.z[0] + rows.gap + rows.log_msp).scatter(-1, argmax, rows.log_msp)
        classes = torch.arange(len(p), device=x.device)
        return (w * torch.func.vmap(size_of_class, chunk_size=at_a_time)(classes)).sum()

    # Each gradient at work is held about four times: itself, its absolute value, its power, autograd's share.
    held = 4 * sum(p.numel() * max(4, p.element_size()) for p in params.values())
    budget = max(1, max_bytes // held)
    if expectation == "inside":
        per_input = 1
    else:
        per_input = _logits(model, params, fixed, inputs[:1]).shape[-1] if len(inputs) else 1
    n, at_a_time = max(1, budget // per_input), min(per_input, budget)
    q = None
    if kind == "given":
        with torch.no_grad():
            logits = _logits(model, params, fixed, inputs[:1]).expand(len(inputs), -1)
            q = reference.distribution(label_probabilities(labels, logits, as_numpy=False)).double()
    batched = torch.func.vmap(lambda x, q: of_one(x, q, at_a_time), in_dims=(0, None if q is None else 0))
    chunks = [slice(i, i + n) for i in range(0, len(inputs), n)]
    norms = [batched(inputs[c], None if q is None else q[c]) for c in chunks]
    dtype = result_dtype(*params.values())
    return torch.cat(norms).to(dtype) if norms else inputs.new_zeros(0, dtype=dtype)


def _norm_of(gradients: dict[str, Tensor], order: float) -> Tensor:
    """The entrywise norm of all of them together, float64."""
    flat = [g.to(_wide(g)) for g in gradients.values() if g.numel()]
    if order == 1:
        return torch.stack([g.abs().sum().double() for g in flat]).sum()
    largest = torch.stack([g.abs().amax().double() for g in flat]).amax()
    if order == math.inf:
        return largest
    # As in norms_of.
    scale = torch.where((largest > 0) & largest.isfinite() & (order > UNSCALED), largest, 1.0)
    powers = [((g / scale.to(g.dtype)).abs() ** order).sum().double() for g in flat]
    return scale * torch.stack(powers).sum() ** (1 / order)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` over its largest absolute value, and that: what is small all over keeps its precision in a shorter type."""
    largest = x.abs().amax()
    return x / torch.where(largest > 0, largest, 1.0), largest


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

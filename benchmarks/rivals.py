"""What users would run instead: plain PyTorch, autograd as published, pytorch-ood. Functions of logits f [N, C] and
features h [N, D], each giving [N, ...]; all of them are also run in float64, as the truth that candidates must meet."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

# ---- formulas, as one would write them


def msp(f: Tensor) -> Tensor:
    return torch.softmax(f, -1).amax(-1)


def tv(f: Tensor) -> Tensor:
    return (torch.softmax(f, -1) - 1 / f.shape[1]).abs().sum(-1) / 2


def energy(f: Tensor) -> Tensor:
    return torch.logsumexp(f, -1)


def neg_entropy(f: Tensor) -> Tensor:
    log_p = torch.log_softmax(f, -1)
    return (log_p.exp() * log_p).sum(-1)


def gen(f: Tensor) -> Tensor:
    p = torch.softmax(f, -1).topk(min(100, f.shape[1]), -1).values
    return -(p.pow(0.1) * (1 - p).pow(0.1)).sum(-1)


def norm(h: Tensor) -> Tensor:
    return h.abs().pow(0.3).sum(-1).pow(1 / 0.3)


def energy_norm(f: Tensor, h: Tensor) -> Tensor:
    return energy(f) * norm(h)


def scale(f: Tensor, h: Tensor, bias: Tensor, percentile: float = 0.85) -> Tensor:
    """SCALE."""
    k = h.shape[1] - round(h.shape[1] * percentile)
    r = (h.sum(-1) / h.topk(k, -1).values.sum(-1)).exp()[:, None]
    bias = bias.to(f.dtype)
    return energy((f - bias) * r + bias)


def v_terms(f: Tensor) -> Tensor:
    """Energy, TV, MSP and S_2, [N, 4]."""
    p = torch.softmax(f, -1)
    return torch.stack([energy(f), (p - 1 / p.shape[1]).abs().sum(-1) / 2, p.amax(-1), p.square().sum(-1)], -1)


def every_v(f: Tensor) -> Tensor:
    """The same, and sum p log p, sum log p and max f, [N, 7]."""
    log_p = torch.log_softmax(f, -1)
    more = torch.stack([(log_p.exp() * log_p).sum(-1), log_p.sum(-1), f.amax(-1)], -1)
    return torch.cat([v_terms(f), more], -1)


def norms(h: Tensor, orders: Sequence[float] = (0, 0.1, 0.3, 0.5, 0.8, 1, 2, 3, 4, 5, 6, math.inf)) -> Tensor:
    """[N, P]"""
    a = h.abs()
    simple = {0: lambda: (a != 0).sum(-1), math.inf: lambda: a.amax(-1)}
    return torch.stack([simple[r]() if r in simple else a.pow(r).sum(-1).pow(1 / r) for r in orders], -1)


def sweep(f: Tensor, h: Tensor) -> Tensor:
    """Each norm and each V once, then the products."""
    return v_terms(f)[:, :, None] * norms(h)[:, None]


def gradnorm(f: Tensor, h: Tensor) -> Tensor:
    return (torch.softmax(f, -1) - 1 / f.shape[1]).abs().sum(-1) * h.abs().sum(-1)


def exgrad(f: Tensor, h: Tensor) -> Tensor:
    return 2 * (1 - torch.softmax(f, -1).square().sum(-1)) * h.abs().sum(-1)


def expected_norm(f: Tensor, q: Tensor | None = None, order: float = 2) -> Tensor:
    """E_q of || e_Y - p ||; q is p where it is not given."""
    p = torch.softmax(f, -1)
    norms = ((1 - p).pow(order) + p.pow(order).sum(-1, keepdim=True) - p.pow(order)).pow(1 / order)
    return ((p if q is None else q) * norms).sum(-1)


def expected_l2(f: Tensor, h: Tensor, q: Tensor | None = None) -> Tensor:
    """E_q of the gradient's L2 norm."""
    return expected_norm(f, q) * h.norm(dim=-1)


def anchor_gradient(f: Tensor, h: Tensor, labels: Tensor) -> Tensor:
    return (functional.one_hot(labels, f.shape[1]) - torch.softmax(f, -1)).T @ h


def batchgrad(f: Tensor, h: Tensor, G: Tensor) -> Tensor:
    p, h, G = torch.softmax(f, -1)[:, :, None], h[:, None], G.to(f.dtype)
    away, towards = (G - p * h).abs().sum(-1), (G + (1 - p) * h).abs().sum(-1)
    return ((1 - p[..., 0]) * away + p[..., 0] * towards).sum(-1)


def row_by_row(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same in a loop: temporaries of one row stay in the cache."""
    return lambda *tensors: torch.cat([formula(*row) for row in zip(*(x.split(1) for x in tensors), strict=True)])


def in_float(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`call` of halves: sums in a half type would be wrong; the cast is part of what its users pay."""
    return lambda *tensors: call(*(x.float() for x in tensors))


# ---- autograd: a batch of one, a backward pass each, then the norm of the last layer's weight gradient


def autograd_gradnorm(f: Tensor, h: Tensor) -> Tensor:
    """As published: cross entropy with the uniform distribution. (Summed over classes there; the mean here.)"""
    return _backward_passes(f, h, lambda log_p, gradient_of: gradient_of(-log_p.mean()).abs().sum())


def autograd_exgrad(f: Tensor, h: Tensor) -> Tensor:
    return _backward_passes(f, h, lambda log_p, gradient_of: _expected(log_p, lambda y: gradient_of(y).abs().sum()))


def autograd_batchgrad(f: Tensor, h: Tensor, G: Tensor) -> Tensor:
    G = G.to(f.dtype)
    return _backward_passes(
        f, h, lambda log_p, gradient_of: _expected(log_p, lambda y: (gradient_of(y) + G).abs().sum())
    )


def _expected(log_p: Tensor, of_class: Callable[[Tensor], Tensor]) -> Tensor:
    return log_p.detach().exp() @ torch.stack([of_class(y) for y in log_p])


def _backward_passes(f: Tensor, h: Tensor, of_row: Callable[..., Tensor]) -> Tensor:
    # The logits are given here, so they come in as the layer's bias and its weight is zero: the gradient, and the
    # time it takes, are those of the layer that the logits came from.
    weight = f.new_zeros(f.shape[1], h.shape[1], requires_grad=True)

    def gradient_of(y: Tensor) -> Tensor:
        return torch.autograd.grad(y, weight, retain_graph=True)[0]

    with torch.enable_grad():
        layer = (functional.linear(x, weight, b) for x, b in zip(h, f, strict=True))
        return torch.stack([of_row(torch.log_softmax(logits, -1), gradient_of) for logits in layer])


# ---- torch.func: the same gradients by vmap, as many samples at a time as fit

_AT_A_TIME = 128 << 20  # bytes of gradients


def vmap_gradnorm(f: Tensor, h: Tensor) -> Tensor:
    return _vmapped(f, h, 1, lambda log_p, gradient_of: gradient_of(torch.full_like(log_p, 1 / len(log_p))).abs().sum())


def vmap_exgrad(f: Tensor, h: Tensor) -> Tensor:
    return _vmapped(f, h, f.shape[1], lambda log_p, gradient_of: log_p.exp() @ _of_classes(log_p, gradient_of, 0))


def vmap_batchgrad(f: Tensor, h: Tensor, G: Tensor) -> Tensor:
    G = G.to(f.dtype)
    return _vmapped(f, h, f.shape[1], lambda log_p, gradient_of: log_p.exp() @ _of_classes(log_p, gradient_of, G))


def _of_classes(log_p: Tensor, gradient_of: Callable[[Tensor], Tensor], G: Tensor | int) -> Tensor:
    one_hot = torch.eye(len(log_p), dtype=log_p.dtype, device=log_p.device)
    return torch.func.vmap(lambda e: (gradient_of(e) + G).abs().sum())(one_hot)


def _vmapped(f: Tensor, h: Tensor, gradients: int, of_row: Callable[..., Tensor]) -> Tensor:
    weight = f.new_zeros(f.shape[1], h.shape[1])  # as in _backward_passes

    def one(b: Tensor, x: Tensor) -> Tensor:
        log_p, pull = torch.func.vjp(lambda w: torch.log_softmax(functional.linear(x, w, b), -1), weight)
        return of_row(log_p, lambda cotangent: pull(cotangent)[0])

    at_a_time = max(1, _AT_A_TIME // (gradients * weight.nbytes))
    return torch.func.vmap(one, chunk_size=at_a_time)(f, h)


# ---- pytorch-ood


def pytorch_ood(method: str) -> Callable[[Tensor], Tensor] | str:
    """pytorch-ood's own score, turned so that it means the same, or why it is not there."""
    try:
        score = getattr(_detector(_PEERS[method][0]), _PEERS[method][1]).score
    except ImportError as missing:
        return f"{missing}; pip install --no-deps pytorch-ood==0.4.0"
    if method == "gen":  # a mean over the M largest there, the paper's sum here
        return lambda f: score(f, gamma=0.1, M=100) * -min(100, f.shape[1])
    return lambda f: -score(f)


_PEERS = {
    "msp": ("softmax", "MaxSoftmax"),
    "energy": ("energy", "EnergyBased"),
    "neg_entropy": ("entropy", "Entropy"),
    "gen": ("gen", "GEN"),
}


def _detector(module: str) -> ModuleType:
    """One module of pytorch-ood, without its packages' __init__: they import torchvision, which many builds of torch
    have no match for, and which none of these scores needs."""
    for package in ("pytorch_ood", "pytorch_ood.detector"):
        if package not in sys.modules:
            spec = find_spec(package)
            if spec is None:
                raise ImportError("not installed")
            bare = ModuleType(package)
            bare.__path__ = list(spec.submodule_search_locations or ())
            sys.modules[package] = bare
    return import_module(f"pytorch_ood.detector.{module}")

"""Gradient norms by their definition: explicit autograd, class by class, in float64."""

import math

import torch


def head(seed, n=3, C=5, D=7, scale=1.0):
    """Features, last-layer weights and their logits, float64."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, D, generator=g, dtype=torch.float64)
    W = torch.randn(C, D, generator=g, dtype=torch.float64) * scale
    return h, W, h @ W.T


def per_class_gradients(h, W, T, b=None):
    """grad_W log p_y (with b, of [W b]) for every row and class by autograd: [N, C, C, D]."""
    out = []
    for row in h:
        grads = []
        for y in range(len(W)):
            params = [W.clone().requires_grad_()] + ([b.clone().requires_grad_()] if b is not None else [])
            f = params[0] @ row + (params[1] if b is not None else 0)
            g = torch.autograd.grad(torch.log_softmax(f / T, -1)[y], params)
            grads.append(torch.cat([g[0], g[1][:, None]], 1) if b is not None else g[0])
        out.append(torch.stack(grads))
    return torch.stack(out)


def entrywise(g, order):
    """The entrywise norm over the last two axes."""
    g = g.abs().flatten(-2)
    return g.amax(-1) if order == math.inf else (g**order).sum(-1) ** (1 / order)


def expected_norm(g, q, order, power, expectation):
    if expectation == "inside":
        return entrywise((q[:, :, None, None] * g).sum(1), order) ** power
    return (q * entrywise(g, order) ** power).sum(1)


def weights(labels, f, T):
    log_p = torch.log_softmax(f / T, -1)
    return {"uniform": torch.full_like(f, 1 / f.shape[1]), "predicted": log_p.exp(), "log_predicted": log_p}[labels]


ROWS = {
    "gradnorm": ("uniform", 1, 1, "inside"),
    "exgrad": ("predicted", 1, 1, "outside"),
    "eg_u_l1": ("uniform", 1, 1, "outside"),
    "eg_u_l2sq": ("uniform", 2, 2, "outside"),
    "eg_p_l2sq": ("predicted", 2, 2, "outside"),
    "eg_p_logp_l2sq": ("log_predicted", 2, 2, "outside"),
    "norm_eg_p_l2sq": ("predicted", 2, 2, "inside"),
}

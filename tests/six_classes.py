"""Rows of six classes, the head that made their logits, and successors fitted on them."""

import numpy as np

from fastood import SUCCESSORS, Fitted

N, C, D = 240, 6, 24


def rows(seed=0, n=N):
    """Logits, feats, labels and the head (weight, bias) that made the logits, as numpy float64."""
    g = np.random.default_rng(seed)
    head = np.random.default_rng(99)
    weight, bias = head.normal(size=(C, D)), head.normal(size=C)
    labels = g.integers(0, C, n)
    feats = np.maximum(1.5 * weight[labels] + g.normal(size=(n, D)), 0) + 0.1 * g.random((n, D))
    return feats @ weight.T + bias, feats, labels, (weight, bias)


def fitted(name, train=None, head=None, **params):
    z, h, y, own = rows() if train is None else train
    made = Fitted(name, head=(own if head is None else head) if SUCCESSORS[name].head else None, **params)
    return made.fit(z, h, y) if SUCCESSORS[name].fitted_on else made

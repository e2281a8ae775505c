"""The nearest rows of a bank, by tiles."""

import numpy as np
import torch
from six_classes import D

from fastood import Fitted
from fastood.successors import nearest


def test_neighbours_by_tiles_are_those_of_a_whole_product(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, bank = torch.randn(30, 8, generator=g), torch.randn(1000, 8, generator=g)
    whole = (x @ bank.T).topk(7, 1).indices
    for tile in (1, 210, 3333, 1 << 22):
        monkeypatch.setattr(nearest, "TILE", tile)
        assert torch.equal(nearest.nearest(x, bank, 7), whole)


def test_near_neighbours_are_told_apart_in_float32():
    g = torch.Generator().manual_seed(0)
    bank, x = (1 + 1e-3 * torch.randn(n, D, generator=g) for n in (500, 40))
    got = Fitted("knn", k=10).fit(None, bank).score(None, x)
    a, b = (y.double() / y.double().norm(dim=1, keepdim=True) for y in (x, bank))
    expected = (a[:, None] - b).norm(dim=2).sort(1).values[:, 9]
    np.testing.assert_allclose(-got, expected, rtol=3e-4)

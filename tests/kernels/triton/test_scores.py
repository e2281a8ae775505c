"""Statistics, norms and their products in one launch (device/scores.py)."""

import math

import pytest
import torch
from branches import with_types

import fastood
from fastood.kernels.statistics import FORMULAS

STATS = list(FORMULAS)
ORDERS = [0, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 6, math.inf]


@pytest.mark.parametrize(("C", "dtype"), with_types([10, 100], long=[1000, 3000, 24584]), ids=str)
def test_a_sweep_is_made_of_its_scores(triton_device, C, dtype):
    torch.manual_seed(0)
    D = 33 if C == 100 else 64
    N = 9 if C < 1000 else 3
    f, h = (3 * torch.randn(N, C)).to(dtype).to(triton_device), torch.randn(N, D).to(dtype).to(triton_device)
    v, norms = ("energy", "tv", "msp", "varsum", "neg_entropy"), (0, 0.1, 0.3, 0.5, 0.8, 1, 2, 3, 4, 5, 6, math.inf)
    grid = fastood.sweep(f, h, v, norms, backend="triton")
    expected = fastood.sweep(f.double(), h.double(), v, norms, backend="reference")
    torch.testing.assert_close(grid.double(), expected, rtol=2e-5, atol=0)
    for i, j in ((0, 2), (1, 0), (3, 7), (4, 11)):
        one = fastood.score(f, h, v[i], norm=norms[j], backend="triton")
        torch.testing.assert_close(one, grid[:, i, j], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("C", "dtype"), with_types([7, 10, 261, 262]), ids=str)
def test_a_row_alone_in_other_memory_has_the_same_bits(triton_device, C, dtype):
    """Of odd length they begin between 16-byte boundaries, alone or in a batch. test_stream.py has long ones."""
    torch.manual_seed(0)
    D = {7: 5, 10: 33, 261: 257, 262: 66}[C]
    f, h = (3 * torch.randn(9, C)).to(dtype), torch.randn(9, D).to(dtype)
    f[8, 1] = 130  # the rest is summed again
    f[6, C // 2], f[7, 0] = -math.inf, -math.inf  # so is an entropy, wherever the masked class is
    f, h = f.to(triton_device), h.to(triton_device)
    stats = fastood.row_stats(f, STATS, backend="triton")
    norms = fastood.norms(h, ORDERS, backend="triton")
    scores = fastood.score(f, h, backend="triton")
    for i in (1, 3, 6, 8):
        alone, alone_h = f[i : i + 1].clone(), h[i : i + 1].clone()
        for name, one in fastood.row_stats(alone, STATS, backend="triton").items():
            assert torch.equal(one, stats[name][i : i + 1]), name
        assert torch.equal(fastood.norms(alone_h, ORDERS, backend="triton"), norms[i : i + 1])
        assert torch.equal(fastood.score(alone, alone_h, backend="triton"), scores[i : i + 1])

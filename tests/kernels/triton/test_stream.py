"""Rows that are read tile by tile (device/stream.py)."""

import math

import numpy as np
import pytest
import torch
import truth

import fastood
from fastood.kernels.statistics import FORMULAS
from fastood.kernels.triton import shapes

STATS = list(FORMULAS)


@pytest.fixture
def short_rows_as_long_ones(monkeypatch, new_programs):
    """Rows of more than 16 classes are read tile by tile, by few warps, in groups of few tiles."""
    monkeypatch.setattr(shapes, "ROWS", {16: shapes.ROWS[16]})
    monkeypatch.setattr(shapes, "STREAM", {2: (4, 2, 3), 4: (4, 2, 3)})


# One group of tiles, two, and many; full and partial tiles; 16-byte loads or, in 1001 and 802, an element each.
@pytest.mark.parametrize(
    ("C", "dtype"),
    [
        (1032, torch.bfloat16),
        (1032, torch.float32),
        (4096, torch.float16),
        (3000, torch.float32),
        (1001, torch.float32),
        (802, torch.float16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("short_rows_as_long_ones")
def test_a_row_read_tile_by_tile(triton_device, C, dtype):
    """Maxima that come first, last, everywhere, and one after another; masked classes; certain rows and far ones."""
    rng = np.random.default_rng(C)
    x = 3 * rng.standard_normal((11, C))
    x[0].sort()
    x[1] = np.sort(x[1])[::-1]
    x[2] = 0
    x[3, -1] += 60
    x[4, 0] += 150
    x[5, : C // 2] = -math.inf
    x[6, C // 3 :] = -math.inf
    x[7, rng.random(C) < 0.5] = -math.inf
    x[8] += 3e4
    x[9] = np.linspace(-100, 100, C)
    x[10] -= 2e4
    f = torch.from_numpy(x).to(dtype)
    for names, rows in ((["energy", "tv", "msp", "s2", "sumlogp"], f[::2]), (["plogp"], f[5:8]), (STATS, f)):
        got = fastood.row_stats(rows.to(triton_device), names, backend="triton")
        for name in names:
            expected = truth.stat(name, rows)
            allowed = truth.tolerance(name, expected, rows, 1.0, truth.EPS["float32"])
            truth.assert_close(got[name].cpu(), expected, allowed, name)
    memory = torch.empty(C + 8, dtype=dtype, device=triton_device)
    alone = memory[8:] if C % 8 == 0 else memory[3 : C + 3]
    alone.copy_(f[7])
    for name, one in fastood.row_stats(alone[None], STATS, backend="triton").items():
        assert torch.equal(one, got[name][7:8]), name


@pytest.mark.usefixtures("short_rows_as_long_ones")
def test_kl_of_a_long_row_beyond_float32(triton_device):
    """It is finite times a small norm, and its logarithm is."""
    f, h = torch.full((2, 801), -3e38), torch.full((2, 2), 1e-30)
    f[0, 3] = f[1, 1:] = 3e38
    expected, u = truth.stat("kl_uniform", f, 0.1), truth.norm(h, 1)
    options = {"method": "kl_uniform", "temperature": 0.1, "backend": "triton"}
    got = fastood.score(f.to(triton_device), h.to(triton_device), norm=1, **options)
    truth.assert_close(got.cpu(), expected * u, 1e-5 * expected * u)
    truth.assert_close(fastood.score(f.to(triton_device), log=True, **options).cpu(), np.log(expected), 1e-5)


@pytest.mark.usefixtures("short_rows_as_long_ones")
def test_a_score_of_a_long_row_alone_has_the_same_bits(triton_device):
    torch.manual_seed(0)
    f, h = (3 * torch.randn(5, 801)).bfloat16().to(triton_device), torch.randn(5, 3).bfloat16().to(triton_device)
    whole = fastood.score(f, h, backend="triton")
    for i in range(1, 5):
        row = slice(i, i + 1)
        assert torch.equal(fastood.score(f[row].clone(), h[row].clone(), backend="triton"), whole[row])

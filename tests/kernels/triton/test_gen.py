"""GEN (device/gen.py): every branch of a launch against truth, and bits."""

import math

import numpy as np
import pytest
import torch
import truth
from branches import DTYPES, with_types

import fastood
from fastood.kernels.triton import shapes


def gen_allowed(f, gamma, T, expected):
    return (32 + 4 * np.minimum(max(1.0, gamma) * truth.span(f) / T, 745)) * truth.EPS["float32"] * expected


# A row in a thread, in several, in a warp and in several warps; as many classes as are wanted, more, and fewer.
@pytest.mark.parametrize(("C", "dtype"), with_types([1, 2, 10, 17, 100], long=[1001, 3000]), ids=str)
def test_gen_on_every_branch(triton_device, C, dtype):
    """Of rows near 0 and far from it, equal classes, ties at the threshold, a certain class, masked ones, log p."""
    rng = np.random.default_rng(C)
    x = rng.standard_normal((10, C)) * [[1], [4], [0], [9], [3], [60], [1e4], [2], [2], [2]]
    x[3, C // 2] += 60
    x[4, rng.random(C) < 0.5] = -math.inf
    x[4, -1] = 1.0
    x[5] = np.round(x[5] / 60)
    x[7] -= 300
    x[8, :-1] = -math.inf  # fewer than are wanted are left
    x[9] -= np.log(np.exp(x[9]).sum())
    f = torch.from_numpy(x.clip(-6e4, 6e4) + np.where(np.isinf(x), x, 0)).to(dtype)
    for gamma, M in ((0.1, 100), (2.0, 3), (1.0, max(1, C - 1)), (0.5, 1)):
        got = fastood.row_stats(f.to(triton_device), [("gen", gamma, M)], temperature=0.5, backend="triton")
        expected = truth.gen(f, gamma, M, 0.5)
        truth.assert_close(got["gen", gamma, M].cpu(), expected, gen_allowed(f, gamma, 0.5, expected), (gamma, M))


@pytest.mark.parametrize("T", [2.0**-100, 1e-3, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gen_at_any_temperature_and_magnitude(triton_device, T, dtype):
    """The largest differences, whose halves float32 holds, thresholds many steps away, and 0 with both signs."""
    limit = torch.finfo(dtype).max
    x = np.array([[limit, -limit, 0.0, -limit / 2], [1e-7, 2e-7, -0.0, 0.0], [1.0, 1.0, -limit, -math.inf]])
    x = np.concatenate([x, np.random.default_rng(0).standard_normal((2, 4)) * [[T], [3 * T]]]).clip(-limit, limit)
    x[2, 3] = -math.inf
    f = torch.from_numpy(x).to(dtype)
    for gamma, M in ((0.1, 2), (1e-5, 3), (1.0, 4)):
        got = fastood.score(f.to(triton_device), method="gen", gamma=gamma, M=M, temperature=T, backend="triton")
        expected = truth.gen(f, gamma, M, T)
        truth.assert_close(got.cpu(), -expected, gen_allowed(f, gamma, T, expected), (gamma, M))


@pytest.mark.parametrize(("C", "dtype"), with_types([10, 100, 264, 261]), ids=str)
def test_gen_has_the_same_bits_in_other_memory(triton_device, C, dtype):
    """Alone or beside a row whose search takes more steps; where rows begin at 16-byte boundaries or anywhere."""
    torch.manual_seed(0)
    wide = (3 * torch.randn(5, C + 1)).to(dtype)
    wide[2] = torch.linspace(-1e-4, 1e4, C + 1) ** 3 * 1e-8  # which takes all of them
    wide[3, : C // 2] = -math.inf
    f = wide.to(triton_device)[:, 1:]
    for M in (5, C):
        (whole,) = fastood.row_stats(f, [("gen", 0.1, M)], backend="triton").values()
        (other,) = fastood.row_stats(f.contiguous(), [("gen", 0.1, M)], backend="triton").values()
        assert torch.equal(other, whole)
        for i in (0, 2, 3):
            (one,) = fastood.row_stats(f[i : i + 1].clone(), [("gen", 0.1, M)], backend="triton").values()
            assert torch.equal(one, whole[i : i + 1])


def test_gen_and_power_sums_of_bad_rows_are_nan_alone(triton_device):
    f = torch.randn(5, 40, device=triton_device)
    f[0, 3], f[1, 3], f[2], f[3, 1:] = math.nan, math.inf, -math.inf, -math.inf
    for stat, sure in ((("gen", 0.1, 10), 0), (("gen", 0.1, 100), 0), (("power_sum", 2.5), 1)):
        (got,) = fastood.row_stats(f, [stat], backend="triton").values()
        assert got.isnan().tolist() == [True, True, True, False, False]
        assert got[3] == sure


def test_gen_of_rows_that_are_not_held(triton_device, monkeypatch, new_programs):
    monkeypatch.setattr(shapes, "HELD_CLASSES", 16)
    f = torch.randn(3, 17, device=triton_device)
    got, expected = (fastood.score(f, method="gen", M=5, backend=b) for b in ("triton", "reference"))
    assert torch.equal(got, expected)

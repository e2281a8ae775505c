"""Statistics of rows that a program holds (device/softmax.py): every branch of a launch against truth, and bits."""

import math

import numpy as np
import pytest
import torch
import truth
from branches import with_types

import fastood
from fastood.kernels.statistics import FORMULAS

STATS = list(FORMULAS)


# Both sides of the ends of lines in shapes.ROWS: a thread a row (1, 10, 16), a few threads (17, 101), many (129 on)
# of shifted rows (129), of words in pairs (130) and whole ones (1000); a program a row, of one warp (3000), shifted
# (4097), in registers to the last (24576), and read tile by tile, an element (24577) or 16 bytes a thread.
CLASSES = with_types([1, 10, 16, 17, 101, 129, 130, 1000], long=[3000, 4097, 24576, 24577, 24584])


@pytest.mark.parametrize(("C", "dtype"), CLASSES, ids=str)
def test_statistics_on_every_branch(triton_device, C, dtype):
    rng = np.random.default_rng(C)
    x = rng.standard_normal((5, C)) * [[1.0], [4.0], [0.0], [9.0], [3.0]]
    x[3, C // 2] += 60 + 40 * (dtype != torch.float16)  # so far above the rest that float32 holds no trace of it
    x[4, rng.random(C) < 0.5] = -math.inf
    x[4, -1] = 1.0
    f = torch.from_numpy(x).to(dtype)
    x = f.to(triton_device)
    # A few are compiled one by one, many are looked up in a table: test_statistics_far_from_zero.
    got = {k: v for names in (STATS[:6], STATS[6:]) for k, v in fastood.row_stats(x, names, backend="triton").items()}
    for name in STATS:
        expected = truth.stat(name, f)
        allowed = truth.tolerance(name, expected, f, 1.0, truth.EPS["float32"])
        truth.assert_close(got[name].cpu(), expected, allowed, name)


@pytest.mark.parametrize(
    ("C", "dtype", "temperature"),
    [(*case, T) for case in with_types([1, 101, 129]) for T in (1e-3, 1.0, 1e30)],
    ids=str,
)
def test_statistics_far_from_zero(triton_device, C, dtype, temperature):
    """Maxima of which the step is coarse beside the temperature, where float32 cannot hold m / T; equal ones, masked
    ones; beside rows near 0, whose bits that leaves alone. test_stream.py has such long rows.
    """
    rng = np.random.default_rng(C)
    x = rng.standard_normal((8, C)) * temperature
    x[1] += 3e4 * temperature
    x[2] -= 3e4 * temperature
    x[3] = 60000
    x[3, : C // 3] -= 64
    x[4] = x[3]
    x[4, C // 2] += 32
    x[5] = np.where(rng.random(C) < 0.5, -math.inf, x[1])
    x[5, 0] = 3e4 * temperature
    x[6] = -60000 - 500 * temperature * (np.arange(C) != C // 2)
    x[7] += 5e3 * temperature
    limit = torch.finfo(dtype).max
    f = torch.from_numpy(np.where(np.isinf(x), x, np.clip(x, -limit, limit))).to(dtype)
    expected = {name: truth.stat(name, f, temperature) for name in STATS}
    for names in (["msp", "s2", "tv", "energy"], STATS):  # other sums for the four alone
        got = fastood.row_stats(f.to(triton_device), names, temperature=temperature, backend="triton")
        for name in names:
            allowed = truth.tolerance(name, expected[name], f, temperature, truth.EPS["float32"])
            truth.assert_close(got[name].cpu(), expected[name], allowed, name)
    near = fastood.row_stats(f[:1].to(triton_device), STATS, temperature=temperature, backend="triton")
    for name in STATS:
        assert torch.equal(near[name], got[name][:1]), name


# Logits that are divided by T after the maximum is subtracted, a thread a row or several, and before (129).
@pytest.mark.parametrize(("C", "dtype"), [(5, torch.bfloat16), (101, torch.float32), (129, torch.float32)], ids=str)
def test_statistics_at_the_ends_of_float32(triton_device, C, dtype):
    """Logits that leave float32 when they are divided by T; subnormal ones; mean z and KL(u || p) beyond it, of a row
    that is flat to TV too."""
    limit = torch.finfo(dtype).max
    f = torch.full((9, C), -limit, dtype=dtype)
    f[1, 0], f[2], f[3] = -math.inf, limit, -1e30
    f[3, 1:], f[4, 0], f[5, 1] = -2e30, limit, 0
    f[6], f[7, 1:], f[7, 0] = 1e-40, -math.inf, 1e-40
    f[8, 1:] = 0
    h = torch.full((9, 2), 1e-30, dtype=dtype)
    for T in (1.0, 1e-10):
        got = fastood.row_stats(f.to(triton_device), STATS[1:] if T == 1 else STATS, temperature=T, backend="triton")
        for name in got:
            expected = truth.stat(name, f, T)
            allowed = truth.tolerance(name, expected, f, T, truth.EPS["float32"])
            truth.assert_close(got[name].cpu(), expected, allowed, (name, T))
    kl, log = (
        fastood.score(f.to(triton_device), *x, temperature=T, log=log, backend="triton").cpu()
        for x, log in (((h.to(triton_device), "kl_uniform"), False), ((None, "kl_uniform"), True))
    )
    expected, u = truth.stat("kl_uniform", f, T), truth.norm(h, 0.3)
    truth.assert_close(kl, expected * u, 1e-4 * expected * u)
    with np.errstate(divide="ignore"):
        truth.assert_close(log, np.log(expected), 1e-4)
        both = fastood.scores(
            f.to(triton_device), None, ["tv", "kl_uniform"], norm=None, temperature=T, log=True, backend="triton"
        )
        truth.assert_close(both["kl_uniform"].cpu(), np.log(expected), 1e-4)


@pytest.mark.parametrize("C", [100, 261, 264, 24584])
def test_bad_rows_on_every_branch(triton_device, C):
    f = torch.zeros(4, C)
    f[0, C // 2], f[1, 3], f[2] = math.inf, math.nan, -math.inf
    got = fastood.row_stats(f.to(triton_device), STATS, backend="triton")
    for name in STATS:
        expected = [math.inf, math.nan, -math.inf] if FORMULAS[name].infinite else [math.nan] * 3
        assert got[name][:3].cpu().tolist() == pytest.approx(expected, nan_ok=True), name
    assert got["plogp"][3].item() == pytest.approx(-math.log(C))


def test_a_thread_of_masked_classes_is_no_bad_row(triton_device):
    f = torch.full((2, 40_000), -math.inf)
    f[0, 3], f[0, 39_999] = 2.0, 1.0
    got = fastood.row_stats(f.to(triton_device), ["msp", "energy", "tv", "sumlogp"], backend="triton")
    truth.assert_close(got["msp"].cpu()[:1], truth.stat("msp", f[:1]), 1e-6)
    assert got["sumlogp"][0] == -math.inf
    assert got["energy"][1] == -math.inf
    assert got["tv"].isnan().tolist() == [False, True]


# A few threads a row; many, whose loads of aligned rows are of 16 bytes, of 8, and of one word.
@pytest.mark.parametrize(("C", "dtype"), with_types([100, 264, 260, 261]), ids=str)
def test_a_row_has_the_same_bits_wherever_it_begins(triton_device, C, dtype):
    """Read 128 bits at a time, or of a slice of a wider matrix word by word."""
    torch.manual_seed(0)
    f = (3 * torch.randn(3, C)).to(dtype).to(triton_device)
    stats = fastood.row_stats(f, STATS, backend="triton")
    for before, after in ((1, 0), (2, 2), (3, 1), (8, 1)):
        view = torch.nn.functional.pad(f, (before, after), value=100.0)[:, before : before + C]
        for name, other in fastood.row_stats(view, STATS, backend="triton").items():
            assert torch.equal(other, stats[name]), (name, before)


@pytest.mark.parametrize("C", [1, 2, 100, 261])
def test_power_sums(triton_device, C):
    """Also of orders that multiply what a sum is off by."""
    rng = np.random.default_rng(C)
    x = rng.standard_normal((5, C)) * [[0.0], [1e-3], [1.0], [10.0], [100.0]]
    x[3, rng.random(C) < 0.5], x[3, -1] = -math.inf, 20.0
    f = torch.from_numpy(x).float()
    for r in (0.01, 0.5, 1, 3, 30):
        (got,) = fastood.row_stats(f.to(triton_device), [("power_sum", r)], temperature=0.5, backend="triton").values()
        p = [truth.softmax_row(row, 0.5)[0] for row in truth.widen(f)]
        expected = np.array([np.sum(x[x > 0] ** truth.LD(r)) for x in p])
        allowed = (32 + 8 * r + 4 * r * np.minimum(truth.span(f) / 0.5, 104)) * truth.EPS["float32"] * expected
        truth.assert_close(got.cpu(), expected, allowed, r)

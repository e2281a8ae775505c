"""The Triton kernels: every launch branch against truth, what the launch table promises, and that all of it compiles.

With a GPU all of this runs there. Without one, `test_in_the_interpreter` runs it in Triton's interpreter, in processes
of their own: with TRITON_INTERPRET=1 a process interprets everything and can compile nothing.
"""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st

import fastood
from fastood.kernels import Want, triton
from fastood.kernels.triton import shapes

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
only_compiled = pytest.mark.skipif(INTERPRETED, reason="needs a process that does not interpret")

STATS = ["fmax", "lse", "energy", "msp", "one_minus_msp", "log_msp", "s2", "one_minus_s2", "tv", "plogp", "sumlogp"]
ORDERS = [0, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 6, math.inf]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@needs_triton
@only_compiled
def test_in_the_interpreter(interpreter):
    """The parity suite, and the tests below, where no GPU is needed."""
    for process, log in interpreter:
        assert process.wait() == 0, log.read_text()[-20_000:]


@pytest.fixture(scope="module")
def triton_device():
    """Where the kernels run in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    status = fastood.backends(device)["triton"]
    if not status.usable:
        pytest.skip(f"needs a GPU; without one test_in_the_interpreter runs it ({status.why})")
    return device


# ---- every branch of a launch

# Both sides of the ends of lines in shapes.ROWS: a thread a row (1, 10, 16), a few threads (17, 101), words in pairs or
# not, whole and shifted rows (1000, 1001, 1002), a program a row (from 3000 on), and rows in segments (from 24577 on).
CLASSES = [1, 10, 16, 17, 101, 129, 1000, 1001, 1002, 3000, 10001, 24576, 24577, 30008]


def of_every_type(sizes, most=2500):
    """Each size with each type; with one of them from `most` on, where the interpreter takes seconds."""
    return [(n, t) for i, n in enumerate(sizes) for t in DTYPES if n < most or t == DTYPES[i % 3]]


@pytest.mark.parametrize(("C", "dtype"), of_every_type(CLASSES), ids=str)
def test_statistics_on_every_branch(triton_device, C, dtype):
    rng = np.random.default_rng(C)
    x = rng.standard_normal((5, C)) * [[1.0], [4.0], [0.0], [9.0], [3.0]]
    x[3, C // 2] += 60 + 40 * (dtype != torch.float16)  # so far above the rest that float32 holds no trace of it
    x[4, rng.random(C) < 0.5] = -math.inf
    x[4, -1] = 1.0
    f = torch.from_numpy(x).to(dtype)
    got = fastood.row_stats(f.to(triton_device), STATS, backend="triton")
    for name in STATS:
        expected = truth.stat(name, f)
        allowed = truth.tolerance(name, expected, f, 1.0, truth.EPS["float32"])
        truth.assert_close(got[name].cpu(), expected, allowed, name)


@pytest.mark.parametrize(
    ("C", "dtype", "temperature"),
    [(*case, T) for case in of_every_type([1, 101, 1001], 500) for T in (1e-3, 1.0, 1e30)]
    + [(24577, torch.float16, 1.0)],
    ids=str,
)
def test_statistics_far_from_zero(triton_device, C, dtype, temperature):
    """Maxima of which the step is coarse beside the temperature, where float32 cannot hold m / T; equal ones, masked
    ones; beside rows near 0, whose bits that leaves alone.
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


@pytest.mark.parametrize(("D", "dtype"), of_every_type([1, 7, 64, 2049, 5000, 17001], 1000), ids=str)
def test_norms_on_every_branch(triton_device, D, dtype):
    rng = np.random.default_rng(D)
    bias = D % 2 == 0
    x = np.maximum(rng.standard_normal((5, D)), 0) * [[1.0], [1e3], [1e-4], [1.0], [1.0]]
    x[3] = 0
    x[4, 0] = 6e4  # its sixth power is beyond float32
    if dtype != torch.float16:
        x[2] *= 1e-38  # subnormals
    h = torch.from_numpy(x).to(dtype)
    for log in (False, True):
        got = fastood.norms(h.to(triton_device), ORDERS, bias=bias, log=log, backend="triton").cpu()
        for j, r in enumerate(ORDERS):
            expected, relative = truth.norm(h, r, bias), truth.norm_tolerance(h, r, truth.EPS["float32"], bias)
            if log:
                with np.errstate(all="ignore"):
                    expected = np.log(expected)
                    relative = relative + 2 * truth.EPS["float32"] * np.where(
                        np.isfinite(expected), np.abs(expected), 0
                    )
            else:
                relative = relative * expected
            truth.assert_close(got[:, j], expected, relative, f"||h||_{r}, log={log}")


@pytest.mark.parametrize(("C", "dtype"), of_every_type([10, 100, 1000, 3000, 30008], 1000), ids=str)
def test_a_sweep_is_made_of_its_scores(triton_device, C, dtype):
    torch.manual_seed(0)
    D = 33 if C == 100 else 64
    f, h = (3 * torch.randn(9, C)).to(dtype).to(triton_device), torch.randn(9, D).to(dtype).to(triton_device)
    v, norms = ("energy", "tv", "msp", "varsum", "neg_entropy"), (0, 0.1, 0.3, 0.5, 0.8, 1, 2, 3, 4, 5, 6, math.inf)
    grid = fastood.sweep(f, h, v, norms, backend="triton")
    expected = fastood.sweep(f.double(), h.double(), v, norms, backend="reference")
    torch.testing.assert_close(grid.double(), expected, rtol=2e-5, atol=0)
    for i, j in ((0, 2), (1, 0), (3, 7), (4, 11)):
        one = fastood.score(f, h, v[i], norm=norms[j], backend="triton")
        torch.testing.assert_close(one, grid[:, i, j], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("C", "dtype"), [(30_008, torch.float32), (33_001, torch.bfloat16)], ids=str)
def test_a_row_shared_by_a_cluster(triton_device, monkeypatch, C, dtype):
    """The interpreter knows no clusters, but runs what their launch makes of a row."""
    from fastood.kernels.triton import launch

    if triton_device == "cuda" and not launch._clusters(torch.device("cuda", 0)):
        pytest.skip("needs compute capability 9.0 and Triton 3.9")
    monkeypatch.setattr(launch, "_clusters", lambda device: True)
    monkeypatch.setattr(launch, "_segments", None)  # which is not called
    rng = np.random.default_rng(C)
    x = rng.standard_normal((3, C)) * [[1.0], [4.0], [3.0]]
    x[1, C // 2] += 100
    x[2, rng.random(C) < 0.5] = -math.inf
    f, h = torch.from_numpy(x).to(dtype), torch.from_numpy(rng.standard_normal((3, 100))).to(dtype)
    got = fastood.row_stats(f.to(triton_device), STATS, backend="triton")
    for name in STATS:
        expected = truth.stat(name, f)
        allowed = truth.tolerance(name, expected, f, 1.0, truth.EPS["float32"])
        truth.assert_close(got[name].cpu(), expected, allowed, name)
    score = fastood.score(f.to(triton_device), h.to(triton_device), backend="triton").cpu()
    expected = truth.stat("energy", f) * truth.norm(h, 0.3)
    truth.assert_close(score, expected, 64 * truth.EPS["float32"] * np.abs(expected), "energy x ||h||_0.3")


@pytest.mark.parametrize("C", [100, 1000, 1001, 30_008])
def test_bad_rows_on_every_branch(triton_device, C):
    f = torch.zeros(4, C)
    f[0, C // 2], f[1, 3], f[2] = math.inf, math.nan, -math.inf
    got = fastood.row_stats(f.to(triton_device), STATS, backend="triton")
    for name in STATS:
        expected = [math.inf, math.nan, -math.inf] if name in ("energy", "lse") else [math.nan] * 3
        assert got[name][:3].cpu().tolist() == pytest.approx(expected, nan_ok=True), name
    assert got["plogp"][3].item() == pytest.approx(-math.log(C))


def test_a_masked_segment_is_no_bad_row(triton_device):
    f = torch.full((2, 40_000), -math.inf)
    f[0, 3], f[0, 39_999] = 2.0, 1.0
    got = fastood.row_stats(f.to(triton_device), ["msp", "energy", "tv", "sumlogp"], backend="triton")
    truth.assert_close(got["msp"].cpu()[:1], truth.stat("msp", f[:1]), 1e-6)
    assert got["sumlogp"][0] == -math.inf
    assert got["energy"][1] == -math.inf
    assert got["tv"].isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("C", "D"), [(7, 5), (10, 33), (1001, 257), (1002, 66), (26_001, 3)])
def test_a_row_alone_in_other_memory_has_the_same_bits(triton_device, C, D, dtype):
    """Rows of odd length begin anywhere between 16-byte boundaries, alone or in a batch."""
    torch.manual_seed(0)
    f, h = (3 * torch.randn(9, C)).to(dtype), torch.randn(9, D).to(dtype)
    f[8, 1] = 130  # the rest is summed again
    f[6, C // 2], f[7, 0] = -math.inf, -math.inf  # so is an entropy, wherever the masked class is
    f, h = f.to(triton_device), h.to(triton_device)
    stats = fastood.row_stats(f, STATS, backend="triton")
    norms = fastood.norms(h, ORDERS, backend="triton")
    scores = fastood.score(f, h, backend="triton")
    for i in (1, 2, 3, 6, 7, 8):
        alone, alone_h = f[i : i + 1].clone(), h[i : i + 1].clone()
        for name, one in fastood.row_stats(alone, STATS, backend="triton").items():
            assert torch.equal(one, stats[name][i : i + 1]), name
        assert torch.equal(fastood.norms(alone_h, ORDERS, backend="triton"), norms[i : i + 1])
        assert torch.equal(fastood.score(alone, alone_h, backend="triton"), scores[i : i + 1])


# A row in a thread, in several, in a warp, and in several; and swept, in one turn of four tiles or two.
@pytest.mark.parametrize(
    ("C", "held"),
    [(1, True), (2, True), (7, True), (300, True), (1030, True), (8200, True), (300, False), (4100, False)],
)
@pytest.mark.parametrize("labels", ["uniform", "predicted", "log_predicted", "soft", "one-hot"])
def test_gradients_on_every_branch(triton_device, monkeypatch, C, held, labels):
    if not held:
        monkeypatch.setattr(shapes, "HELD_CLASSES", 0)
        monkeypatch.setattr(shapes, "HELD_PAIRS", 0)
    g = torch.Generator().manual_seed(C)
    lead = torch.tensor([[0.0], [5.0], [20.0]])  # twice that in z: float32 still holds 1 - p
    f = torch.randn(3, C, generator=g) * torch.tensor([[0.0], [3.0], [6.0]])
    top = f.argmax(-1, keepdim=True)
    f.scatter_add_(1, top, lead)
    f[1, torch.rand(C, generator=g) < 0.3] = -math.inf
    f[1, top[1]] = 9.0
    f = f.to(DTYPES[C % 3])
    if labels == "soft":
        labels = torch.softmax(torch.randn(3, C, generator=g) * 3, -1)
    elif labels == "one-hot":
        labels = torch.zeros(3, C + 2, dtype=torch.bfloat16)[:, 1:-1].scatter_(1, top, 1.0)
    orders, powers = ([0.5, 1, 2, 3, math.inf], [0.5, 1, 2, 3]) if C < 100 else ([0.5, 2, math.inf], [1])
    there = labels if isinstance(labels, str) else labels.to(triton_device)
    sides = ("inside", "outside") if C < 4000 else ("inside",)  # truth takes C^2 powers outside
    for order, power, expectation in itertools.product(orders, powers, sides):
        if expectation == "outside" or labels not in ("predicted", "log_predicted"):
            stat = "gradient", labels if isinstance(labels, str) else "given", order, power, expectation
            want = Want((stat,), temperature=0.5)
            q = None if isinstance(labels, str) else there
            got = triton.row_stats(f.to(triton_device), None, want, q)[0][stat]
            expected, allowed = truth.gradient(f, labels, order, power, expectation, 0.5, truth.EPS["float32"])
            truth.assert_close(got.cpu(), expected, allowed + 1e-37, stat)


@pytest.mark.parametrize(
    ("order", "power"),
    [(0.02, 1), (0.02, 2), (60, 1), (60, 30), (0.5, 50), (1, 100), (1.5, 100), (2, 4), (2, 100), (3, 100)],
)
@pytest.mark.parametrize("labels", ["uniform", "predicted", "log_predicted", "soft"])
@pytest.mark.parametrize("T", [0.02, 1.0, 50.0])
def test_gradients_of_far_orders_and_powers(triton_device, labels, order, power, T):
    """Norms from 1e-100 to 1e200, of rows with a certain class, a masked one, two that are equal, and no other."""
    f = torch.tensor([[4.0, 1.0, 3.5, -2.0], [0.0, -math.inf, 2.0, 2.0], [-math.inf, 1.0, -math.inf, -math.inf]])
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.5, 0.0]]) if labels == "soft" else None
    for expectation in ("inside", "outside"):
        if expectation == "outside" or labels in ("uniform", "soft"):
            stat = "gradient", labels if q is None else "given", order, power, expectation
            here = None if q is None else q.to(triton_device)
            got = triton.row_stats(f.to(triton_device), None, Want((stat,), temperature=T), here)[0][stat]
            expected, allowed = truth.gradient(f, labels if q is None else q, *stat[2:], T, truth.EPS["float32"])
            truth.assert_close(got.cpu(), expected, allowed + 1e-300, stat)


@pytest.mark.parametrize("order", [0.02, 0.5, 2])
def test_probabilities_below_float32_count_in_small_orders(triton_device, order):
    """Of one-hot labels, for the maximum and for another class; also where 1 - p of the maximum is below float32."""
    f = torch.tensor([[0.0, 1.0, 2.0, 100.0], [0.0, 1.0, 2.0, 100.0], [0.0, 60.0, 90.0, 100.0]])
    q = torch.zeros(3, 4)
    q[0, 3] = q[1, 0] = q[2, 3] = 1
    stat = "gradient", "given", order, 1, "inside"
    want = Want((stat,), temperature=0.5)
    got = triton.row_stats(f.to(triton_device), None, want, q.to(triton_device))[0][stat]
    expected, allowed = truth.gradient(f, q, *stat[2:], 0.5, truth.EPS["float32"])
    truth.assert_close(got.cpu(), expected, allowed + 1e-37, stat)


def test_which_gradient_norms_the_kernel_takes():
    def taken(labels, order, power, expectation):
        return shapes.takes_gradient(("gradient", labels, order, power, expectation))

    assert taken("uniform", 1, 100, "outside")
    assert not taken("uniform", 1, 101, "outside")
    assert taken("given", 0.02, 2, "outside")
    assert not taken("given", 0.02, 3, "outside")  # whose terms are up to 2^150 apart
    assert taken("given", 0.02, 3, "inside")
    assert taken("predicted", math.inf, 1, "outside")
    assert not taken("predicted", 2, 1, "inside")
    assert not shapes.takes_gradient(("power_sum", 3))


@pytest.mark.parametrize("labels", ["uniform", "predicted"])
def test_a_power_beyond_float32(triton_device, labels):
    want = Want((("gradient", labels, 1, 200, "outside"),))  # (2 (1 - p))^200, p = 1/2
    (got,) = triton.row_stats(torch.zeros(1, 2, device=triton_device), None, want)[0].values()
    assert got.item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("C", "dtype"),
    [(7, torch.bfloat16), (100, torch.float32), (1000, torch.float16), (1000, torch.float32), (12_300, torch.bfloat16)],
)
def test_a_gradient_has_the_same_bits_in_other_memory(triton_device, C, dtype):
    """Alone or in a batch, in rows that begin at 16-byte boundaries or anywhere, of logits and of labels."""
    torch.manual_seed(0)
    wide, q = (3 * torch.randn(5, C + 1)).to(dtype).to(triton_device), torch.rand(5, C).to(triton_device)
    q /= q.sum(-1, keepdim=True)
    f = wide[:, 1:]
    for labels, order, expectation in (("given", 2, "outside"), ("given", 3, "inside"), ("uniform", 3, "outside")):
        want = Want((("gradient", labels, order, 1.5, expectation),))
        given = q if labels == "given" else None
        (whole,) = triton.row_stats(f, None, want, given)[0].values()
        (other,) = triton.row_stats(f.contiguous(), None, want, given)[0].values()
        assert torch.equal(other, whole)
        apart = None if given is None else torch.nn.functional.pad(q, (1, 2))[:, 1:-2]
        for i in (1, 4):
            row = slice(i, i + 1)
            (one,) = triton.row_stats(f[row].clone(), None, want, None if apart is None else apart[row])[0].values()
            assert torch.equal(one, whole[row])


@pytest.mark.parametrize("order", [1, 2, 3, math.inf])
@pytest.mark.parametrize("expectation", ["inside", "outside"])
def test_gradients_of_bad_rows_are_nan_alone(triton_device, order, expectation):
    f, q = torch.randn(8, 5), torch.full((8, 5), 0.2, dtype=torch.float64)
    q[1, 0], q[2, 0], q[3, 0] = -0.1, 0.9, math.nan
    q[1, 1] = 0.5  # sums to 1 all the same
    f[4, 0], f[5], f[6, 1], f[7, 2] = math.nan, -math.inf, math.inf, -math.inf
    f, q = f.to(triton_device), q.to(triton_device)
    stat = "gradient", "given", order, 0.5, expectation
    got = triton.row_stats(f, None, Want((stat,)), q)[0][stat]
    assert got.isnan().tolist() == [False] + 6 * [True] + [False]
    one = triton.row_stats(f[7:].clone(), None, Want((stat,)), q[7:].clone())[0][stat]
    assert torch.equal(one, got[7:])
    turned = triton.row_stats(f.T.contiguous().T, None, Want((stat,)), q.T.contiguous().T)[0][stat]
    torch.testing.assert_close(turned, got, rtol=0, atol=0, equal_nan=True)


def batchgrad(device, f, h, G, **options):
    f, h, G = (x.to(device) for x in (f, h, G))
    return fastood.BatchGrad(G, **options).score(f, h, oriented=False, backend="triton").cpu()


# Whole and partial blocks of 8 classes, 256 features, and 128 rows; steps of 8 features.
@pytest.mark.parametrize(
    ("N", "C", "D", "T", "bias", "dtype"),
    [
        (1, 1, 1, 1.0, False, torch.float32),
        (3, 8, 7, 0.2, True, torch.float16),
        (129, 2, 31, 1.0, True, torch.bfloat16),
        (5, 17, 40, 30.0, False, torch.float16),
        (2, 3, 256, 5.0, False, torch.bfloat16),
        (2, 9, 256, 1.0, True, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", ["no negative", "all rows", "some rows", "some features"])
def test_batchgrad_on_every_branch(triton_device, N, C, D, T, bias, dtype, sign):
    g = torch.Generator().manual_seed(N + D)
    f, h = torch.randn(N, C, generator=g) * 10 ** torch.randn(N, 1, generator=g), torch.randn(N, D, generator=g)
    f[0, : C // 2] = -math.inf  # masked classes
    f[-1, 0] += 100  # 1 - p is far below float32's step at 1
    signed = {
        "no negative": torch.zeros(N, D),
        "all rows": torch.ones(N, D),
        "some rows": (torch.arange(N) % 2)[:, None].expand(N, D),
        "some features": (torch.arange(D) > 250).expand(N, D),
    }[sign]
    h = torch.where(signed.bool(), h, h.relu())
    f, h, G = f.to(dtype), h.to(dtype), torch.randn(C, D + bias, generator=g) * 10 ** torch.randn(C, 1, generator=g)
    expected, allowed = truth.batchgrad(f, h, G, T, bias, truth.EPS["float32"])
    got = batchgrad(triton_device, f, h, G, temperature=T, bias=bias)
    truth.assert_close(got, expected, allowed, "BatchGrad")


@given(
    seed=st.integers(0, 2**32 - 1),
    N=st.integers(1, 5),
    C=st.integers(1, 10),
    D=st.integers(1, 10),
    scale=st.sampled_from([0.1, 1.0, 10.0, 1e4]),
    unit=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    T=st.sampled_from([1e-10, 0.2, 1.0, 30.0, 1e10]),
    signed=st.booleans(),
)
def test_batchgrad_at_any_scale(triton_device, seed, N, C, D, scale, unit, T, signed):
    g = torch.Generator().manual_seed(seed)
    f, h, G = (torch.randn(n, generator=g) for n in ((N, C), (N, D), (C, D)))
    f, h, G = f * scale, (h if signed else h.abs()) * unit, G * unit
    got = batchgrad(triton_device, f, h, G, temperature=T)
    expected, allowed = truth.batchgrad(f, h, G, T, False, truth.EPS["float32"])
    truth.assert_close(got, expected, allowed, "BatchGrad")
    assert (got >= G.double().abs().sum() * (1 - 1e-5)).all()  # by Jensen's inequality, since E_p[e_Y - p] = 0


def test_batchgrad_of_a_certain_row_is_its_rest(triton_device):
    """Where G is 0, sum_c 2 p_c (1 - p_c) ||h||_1, to relative precision: one class holds all but 1e-13."""
    f, h = torch.tensor([[30.0, 0.0, -math.inf, 0.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    expected, _ = truth.batchgrad(f, h, torch.zeros(4, 3), 1.0, False, 1)
    for sign in (1, -1):
        got = batchgrad(triton_device, f, sign * h, torch.zeros(4, 3))
        truth.assert_close(got, expected, 200 * truth.EPS["float32"] * expected, "BatchGrad")


def test_batchgrad_reads_any_strides(triton_device):
    torch.manual_seed(0)
    f, h, G = torch.randn(20, 30), torch.randn(20, 40), torch.randn(10, 20)
    f, h, rows = f[3:17:2, 5:15], h[3:17:2, 11:31], 7
    whole = batchgrad(triton_device, f.contiguous(), h.contiguous(), G)
    expected, allowed = truth.batchgrad(f, h, G, 1.0, False, truth.EPS["float32"])
    truth.assert_close(whole, expected, allowed, "BatchGrad")
    turned = batchgrad(triton_device, f.T.contiguous().T, h.T.contiguous().T, G.T.contiguous().T)
    assert torch.equal(turned, whole)
    assert torch.equal(batchgrad(triton_device, f, h, G), whole)
    one = batchgrad(triton_device, f[:1].expand(rows, -1), h[:1].expand(rows, -1), G)
    assert torch.equal(one, whole[:1].expand(rows))


def test_batchgrad_bits_do_not_depend_on_the_batch(triton_device, monkeypatch):
    """Neither on neighbours of another sign, which run both branches, nor on the rows of a program or of a launch."""
    torch.manual_seed(0)
    f, h, G = torch.randn(130, 9), torch.randn(130, 6), torch.randn(9, 6)
    h[::3] = h[::3].abs()
    whole = batchgrad(triton_device, f, h, G)
    assert torch.equal(batchgrad(triton_device, f[::3], h[::3], G), whole[::3])
    assert torch.equal(batchgrad(triton_device, f[1:2], h[1:2], G), whole[1:2])
    monkeypatch.setattr(shapes, "TEMPORARY", 1)
    monkeypatch.setattr(shapes, "BATCHGRAD_ROWS", {math.inf: 32})
    assert shapes.batchgrad_rows(9, 6) == 32
    assert torch.equal(batchgrad(triton_device, f, h, G), whole)


@pytest.mark.parametrize("signed", [False, True])
def test_batchgrad_of_rows_that_are_not_finite(triton_device, signed):
    torch.manual_seed(0)
    f, h, G = torch.randn(9, 11), torch.rand(9, 20) - 0.5 * signed, torch.randn(11, 20)
    f[0, 3], f[1, 3], f[2], f[3, 3] = math.nan, math.inf, -math.inf, -math.inf
    h[4, 5], h[5, 5], h[6, 5:7], f[6, 3] = math.nan, math.inf, torch.tensor([math.inf, -math.inf]), -math.inf
    h[7], f[7, 3] = 3e38, -math.inf  # its sum is beyond float32, and so is the score
    got = batchgrad(triton_device, f, h, G)
    assert got.isnan().nonzero()[:, 0].tolist() == [0, 1, 2, 4]
    assert got.isinf().nonzero()[:, 0].tolist() == [5, 6, 7]
    expected, allowed = truth.batchgrad(f[3:4], h[3:4], G, 1.0, False, truth.EPS["float32"])
    truth.assert_close(got[3:4], expected, allowed, "a masked class")
    # One class is certain, so h counts for nothing, though h / T is beyond float32.
    sure = torch.tensor([[1e3, 0.0]])
    huge = torch.full((1, 2), 1e30) * (1 - 2 * signed)
    assert batchgrad(triton_device, sure, huge, torch.ones(2, 2), temperature=1e-10).item() == 4


def test_what_it_leaves_to_the_reference(triton_device):
    f, h = torch.randn(3, 10, device=triton_device), torch.randn(3, 4, device=triton_device)
    anchors = fastood.BatchGrad(torch.randn(10, 4, device=triton_device), temperature=1e-40)
    no_feats = fastood.BatchGrad(torch.randn(10, 0, device=triton_device))
    for call in (
        lambda b: fastood.score(f, method="gen", backend=b),
        lambda b: fastood.score(f, h, "exgrad", log=True, backend=b),
        lambda b: fastood.row_stats(f, [("power_sum", 3)], backend=b)["power_sum", 3],
        lambda b: fastood.score(f, temperature=1e-40, backend=b),
        lambda b: fastood.score(f.clone().requires_grad_(), h, backend=b).detach(),
        lambda b: anchors.score(f, h, backend=b),
        lambda b: no_feats.score(f, h[:, :0], backend=b),
    ):
        torch.testing.assert_close(call("triton"), call("reference"))
    with pytest.raises(RuntimeError, match="float64"):
        fastood.score(f.double(), backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_a_cuda_graph():
    f, h = torch.randn(64, 1000, device="cuda"), torch.randn(64, 512, device="cuda")
    detector = fastood.BatchGrad(torch.randn(1000, 512, device="cuda"))
    for call in (fastood.score, detector.score):
        call(f, h)  # compiles, and brings to the GPU what stays there
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(f, h)
        f.normal_()
        h[:32].abs_()  # BatchGrad has another branch for these
        graph.replay()
        assert torch.equal(out, call(f, h))
    assert fastood.backends("cuda")["triton"].usable


def test_says_why_it_does_not_serve():
    for device, dtype, why in (("cuda", torch.float64, "float64"), ("meta", torch.float32, "CUDA tensors")):
        assert not fastood.backends(device, dtype)["triton"].usable
        assert why in fastood.backends(device, dtype)["triton"].why
    with pytest.raises(RuntimeError, match="triton"):
        fastood.score(torch.ones(2, 3, dtype=torch.float64), backend="triton")


def test_import_does_not_load_triton():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import fastood; fastood.backends(); fastood.score(torch.ones(2, 3))\n"
        "assert not {m for m in set(sys.modules) - before if m.split('.')[0] == 'triton'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "0"})


# ---- the launch table


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles(itemsize):
    for columns in [*range(1, 140), 1000, 1001, 1002, 1004, 21841, 24577, 50257, 131072, 262144]:
        for stride in (columns, columns + 1, 0):
            shifted = shapes.is_shifted(columns, stride, 0, itemsize)
            rows, warps, _ = shape = shapes.launch_shape(columns, 0, shifted, itemsize == 2, clusters=True)
            if shapes.segments_of(columns, 1, shifted, True)[0] > 1:
                continue
            lanes = shape.lanes
            assert rows * lanes in (32 * warps * shape.ctas, rows)
            tile = shapes.tile_of(columns, stride, 0, itemsize, lanes)
            assert tile.vec * itemsize <= 16
            assert tile.vec % tile.p == 0
            assert tile.w & (tile.w - 1) == 0
            assert tile.shifted or (columns % tile.vec == 0 and stride % tile.vec == 0)
            assert lanes == 1 or tile.vec * itemsize >= (
                8 if columns <= 128 else 16
            )  # 128-bit loads, whatever the stride
            elements = -(-columns // tile.w // tile.p) if lanes > 1 else columns
            assert elements * tile.w * tile.p // max(lanes, 1) <= 128  # of a thread, in registers


@pytest.mark.parametrize("labels", ["uniform", "log_predicted", "given"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_gradients(itemsize, labels):
    for C, order in itertools.product([*range(1, 140), 1000, 1001, 1024, 8200, 12288, 16384, 16385, 128256], (2, 2.5)):
        of = [shapes.gradient_constants(labels, order, 1, "outside", C, s, itemsize) for s in ((C, C), (C, C + 1))]
        (tiles, shape), (apart, _) = of
        assert apart | {"V": 0} == tiles | {"V": 0}  # the same sums, wherever rows begin
        assert tiles["V"] * itemsize <= 16
        assert C % tiles["V"] == 0
        assert tiles["W"] & (tiles["W"] - 1) == 0
        most = 12288 if labels == "given" else 16384
        assert tiles["HELD"] == (most >= C)
        if tiles["HELD"]:
            assert shape.rows * shape.lanes == 32 * shape.warps
            assert (tiles["TILES"] - 1) * tiles["W"] < C <= tiles["TILES"] * tiles["W"]
            of_thread = tiles["TILES"] * tiles["W"] / shape.lanes
            pairs = labels == "given" or (labels, order) == ("log_predicted", 2.5)
            assert of_thread <= (32 if pairs and C > 16 else 64)  # in registers


def test_only_a_cluster_shares_a_row():
    for C in (1, 1000, 24576, 262145):
        assert shapes.launch_shape(C, 0, False, False, True) == shapes.launch_shape(C, 0, False, False, False)
        assert shapes.launch_shape(C, 0, False, False, True).options.keys() == {"num_warps"}
    assert shapes.launch_shape(24577, 4096, False, False, True).options == {"num_warps": 4, "num_ctas": 2}
    assert shapes.launch_shape(24577, 4096, False, False, False).options == {"num_warps": 4}
    assert shapes.launch_shape(262144, 0, False, False, True).options == {"num_warps": 8, "num_ctas": 8}
    assert [shapes.segments_of(C, 8, False, True)[0] for C in (24577, 262144, 262152)] == [1, 1, 17]


def test_which_processors_have_clusters():
    assert [shapes.clusters(c, "3.9.0") for c in ((8, 0), (8, 9), (9, 0), (10, 0))] == [False, False, True, True]
    assert [shapes.clusters((9, 0), t) for t in ("3.7.1", "3.8.0", "3.9.0", "3.10.1+git", "4.0")] == [False] * 2 + [
        True
    ] * 3


@needs_triton
def test_a_processor_of_amd_has_no_clusters(monkeypatch):
    from fastood.kernels.triton import launch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    launch._clusters.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not launch._clusters(torch.device("cuda"))
    launch._clusters.cache_clear()
    assert not launch._clusters(torch.device("cpu"))


def test_segments_cover_a_row():
    for C in (24577, 50257, 128256, 1_000_003):
        for vec in (1, 4, 8):
            count, length = shapes.segments_of(C, vec, False, False)
            assert length % vec == 0
            assert 0 < C - (count - 1) * length <= length <= shapes.LONGEST_SEGMENT + vec
    assert shapes.segments_of(24576, 8, False, False) == (1, 24576)


def test_every_order_finds_its_sum():
    norms = shapes.norms_of((0.3, 0.1, 2.0, 0.5, 0.8, 1.5, 0.0, math.inf), 100, False)
    integers, bases, of_base, multiples, (count, largest, _) = norms.powers
    assert (integers, bases, of_base, multiples, count, largest) == (
        (2,),
        (0.1, 1.5),
        (0, 0, 0, 0, 1),
        (1, 3, 5, 8, 1),
        True,
        True,
    )
    assert norms.slots == (2, 1, 0, 3, 4, 5, 6, 7)


# ---- compilation


@needs_triton
@only_compiled
@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_compiles_ahead_of_time(architecture):
    """What benchmarks/gpu_static.py does not compile: rare statistics, orders and types; and for AMD, all kinds."""
    run = subprocess.run([sys.executable, "-c", AHEAD_OF_TIME, architecture], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-20_000:]


@needs_triton
@only_compiled
def test_clusters_compile_ahead_of_time():
    import triton

    if not shapes.clusters((9, 0), triton.__version__):
        pytest.skip("needs Triton 3.9")
    run = subprocess.run([sys.executable, "-c", CLUSTERS], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-20_000:]


CLUSTERS = """
from benchmarks.gpu_static import *
every = (*EVERY_V, "lse", "one_minus_msp", "log_msp", "one_minus_s2")
for architecture in (90, 100):
    for t, C, D, orders in ((FLOAT, 24577, 64, (0.1, 2.0)), (HALF, 50257, 0, ()), (BFLOAT, 262144, 0, ())):
        case = Case("", t, C, D, every, orders, 0, 0, "cluster")
        compiled = compile_case(case, GPUTarget("cuda", architecture, 32))
        assert not any(x.base in ("LDL", "STL") for x in disassemble(compiled.cubin)[0]), case
"""


AHEAD_OF_TIME = """
import sys, torch
amd = sys.argv[1] == "gfx942"
if amd:
    torch.version.hip = "any"
from benchmarks.gpu_static import *
target = GPUTarget("hip", "gfx942", 64) if amd else GPUTarget("cuda", 90, 32)
every = (*EVERY_V, "lse", "one_minus_msp", "log_msp", "one_minus_s2")
cases = [Case("", t, C, D, every, (0.1, 0.25, 1.5, 100.0), 0, 0) for t, C, D in (
    (BFLOAT, 1001, 257), (HALF, 10, 64), (HALF, 3001, 64), (FLOAT, 100, 17), (FLOAT, 7, 3), (FLOAT, 128256, 4096))]
cases += [Case("", t, 30001, 0, every, (), 0, 0, kernel) for t in (BFLOAT, FLOAT) for kernel in ("first", "second")]
cases += [Case("", FLOAT, 100, 0, (stat,), (), 0, 0) for stat in every]
cases += [Case("", BFLOAT, 1000, 2048, V, GRID, 0, 0), Case("", HALF, 0, 2048, (), GRID, 0, 0)]
for i, case in enumerate(cases):
    compile_case(case, target, bias=i % 2 == 0, log=i % 3 == 0)
for dtype in (BFLOAT, HALF, FLOAT):
    compile_batchgrad("partial_sums", dtype, target)
    for bias in (False, True):
        compile_batchgrad("turned", dtype, target, bias)
compile_batchgrad("merged", FLOAT, target)
for i, (q, r) in enumerate((q, r) for q in ("uniform", "log_predicted", "given") for r in (1.0, 2.0, math.inf, 0.5)):
    for side in ("inside", "outside") if q != "log_predicted" else ("outside",):
        stat, C, t = ("gradient", q, r, 1.5, side), (10, 1001, 128256)[i % 3], (BFLOAT, HALF, FLOAT)[i % 3]
        case = Case("", t, C, 0, (stat,), (), 0, 0)
        compile_gradient(case, (FLOAT, BFLOAT)[i % 2], target)
"""

"""The Triton kernels: every launch branch against truth, what the launch table promises, and that all of it compiles.

With a GPU all of this runs there. Without one, `test_in_the_interpreter` runs it in Triton's interpreter, in processes
of their own: with TRITON_INTERPRET=1 a process interprets everything and can compile nothing.
"""

import concurrent.futures
import ctypes
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
from fastood import kernels
from fastood.kernels import Request, triton
from fastood.kernels.statistics import FORMULAS
from fastood.kernels.triton import shapes

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
only_compiled = pytest.mark.skipif(INTERPRETED, reason="needs a process that does not interpret")

STATS = list(FORMULAS)


def statistic(stat, f, labels=None, T=1.0):
    """One row statistic that has no name of its own in fastood.row_stats, [N]."""
    run = kernels.prepared(triton, Request((stat,), (), (), (1, -1), T), f.shape[1], 0)
    return run(f, None, labels)[0]


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
# not, whole and shifted rows (1000, 1001, 1002), a program a row (from 3000 on), read tile by tile (from 24577 on).
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
    x = f.to(triton_device)
    # A few are compiled one by one, many are looked up in a table: test_statistics_far_from_zero.
    got = {k: v for names in (STATS[:6], STATS[6:]) for k, v in fastood.row_stats(x, names, backend="triton").items()}
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


def approximation(exact, worst):
    """What a GPU makes of `exact`: subnormals are 0, and the error is as bad as it may be, always in one direction."""

    def flushed(x):
        return np.where(np.abs(x) < 2.0**-126, np.float32(0), np.float32(x))

    def approximate(handle):
        x = handle.data
        if x.dtype != np.float32:
            return exact(x)
        x = flushed(x).astype(np.float64)
        return flushed(worst(x, exact(x)))

    return lambda self, handle: type(handle)(approximate(handle), handle.dtype.scalar)


@pytest.fixture
def approximations(request, monkeypatch):
    """Of the logarithm and of roots, by PTX's documentation; None for what the processor at hand does."""
    if request.param is None:
        return
    if not INTERPRETED:
        pytest.skip("needs Triton's interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    log, power = request.param
    near, far = log * 2.0**-22.6, 1 + log * 2.0**-22.6
    worst = lambda x, y: np.where((x > 0.5) & (x < 2), y + near, y * far)  # noqa: E731
    monkeypatch.setattr(InterpreterBuilder, "create_log2", approximation(np.log2, worst))
    worst_power, worst_root = (lambda x, y, e=e: y * (1 + power * e) for e in (2.0**-22, 2.0**-23))
    monkeypatch.setattr(InterpreterBuilder, "create_exp2", approximation(np.exp2, worst_power))
    monkeypatch.setattr(InterpreterBuilder, "create_sqrt", approximation(np.sqrt, worst_root))


@pytest.mark.parametrize(("D", "dtype"), of_every_type([5, 37, 132, 139]), ids=str)
def test_norms_are_the_same_wherever_rows_begin(triton_device, D, dtype):
    torch.manual_seed(0)
    x = torch.randn(6, D).to(dtype).to(triton_device)
    orders = (0, 0.1, 0.3, 1, 2, math.inf)
    expected = fastood.norms(x, orders, backend="triton")
    for offset, stride in ((0, D + 1), (1, D + 3), (2, D + 6), (4, D + 4)):
        h = x.new_empty(8 * stride).as_strided((6, D), (stride, 1), offset)
        h.copy_(x)
        assert torch.equal(fastood.norms(h, orders, backend="triton"), expected)


ERRORS = [(1, 1), (1, -1), (-1, 1), (-1, -1)]


@pytest.mark.parametrize(
    ("approximations", "dtype"),
    [(None, t) for t in DTYPES] + [(error, DTYPES[i % 3]) for i, error in enumerate(ERRORS, 1)],
    indirect=["approximations"],
    ids=str,
)
def test_norms_of_every_order_and_size(triton_device, approximations, dtype):
    """The largest orders of ordinary features, and all orders of the largest and smallest: also of equal ones, whose
    errors add up.
    """
    orders = (0, 0.05, 0.1, 0.3, 0.45, 0.5, 0.8, 0.9, 1, 1.3, 2, 6, 7.5, 16, 17, 130.5, 1000, 1e9, math.inf)
    rng = np.random.default_rng(0)
    limits = torch.finfo(dtype)
    top = limits.max / 1.01
    sizes = [x for x in (limits.tiny / 16, 1e-20, 1e-6, 1e-3, 0.1, 1, 7, 60, 1e3, 6e4, 1e10, 1e30, top) if x <= top]
    for D in (2, 37):
        x = [size * rng.random((2, D)) ** [[1], [0]] * [[1], [rng.random()]] for size in sizes]
        x.append(10 ** rng.uniform(-4, 4, (2, D)))
        x.append(np.array([[3.9, 0.7]]) * np.ones((D, 1)) if D == 2 else np.ones((1, D)))
        h = torch.from_numpy(np.concatenate(x)).to(dtype)
        for bias, log in ((False, False), (True, False), (False, True)):
            got = fastood.norms(h.to(triton_device), orders, bias=bias, log=log, backend="triton").cpu()
            for j, r in enumerate(orders):
                expected, allowed = truth.norm(h, r, bias), truth.norm_tolerance(h, r, truth.EPS["float32"], bias)
                if log:
                    with np.errstate(all="ignore"):
                        expected = np.log(expected)
                    allowed = allowed + 2 * truth.EPS["float32"] * np.abs(expected)
                else:
                    allowed = allowed * expected
                truth.assert_close(got[:, j], expected, allowed, f"||h||_{r}, D={D} bias={bias} log={log}")


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


@pytest.fixture
def short_rows_as_long_ones(monkeypatch, new_programs):
    """Rows of more than 16 classes are read tile by tile, by few warps, in groups of few tiles."""
    monkeypatch.setattr(shapes, "ROWS", {16: shapes.ROWS[16]})
    monkeypatch.setattr(shapes, "STREAM", {2: (4, 2, 3), 4: (4, 2, 3)})


# One group of tiles, two, and many; full and partial tiles; 16-byte loads or, in 1001 and 802, an element each.
@pytest.mark.parametrize(
    ("C", "dtype"),
    [
        (1032, torch.float16),
        (1032, torch.float32),
        (3000, torch.bfloat16),
        (4096, torch.float16),
        (3000, torch.float32),
        (1001, torch.float16),
        (1001, torch.float32),
        (802, torch.bfloat16),
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
    for names, rows in ((["energy", "tv", "msp", "s2", "sumlogp"], f), (["plogp"], f[5:8]), (STATS, f)):
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


@pytest.mark.parametrize("C", [1000, 50_257])
@needs_triton
def test_rows_take_one_launch_of_any_number(C):
    from fastood.kernels.triton import launch

    f, h = (launch.Layout(torch.bfloat16, n, n, 0) for n in (C, 20))
    plan = shapes.plan_of(Request(("energy", "tv"), (1.0, 2.0), (), (4, -1)))
    (program,) = launch.scores(torch.device("cpu"), f, h, None, plan, bias=False, log=False, by_row=True)
    assert (len(program.launches), program.buffers, program.group) == (1, (), 0)


@pytest.mark.parametrize("C", [100, 1000, 1001, 30_008])
def test_bad_rows_on_every_branch(triton_device, C):
    f = torch.zeros(4, C)
    f[0, C // 2], f[1, 3], f[2] = math.inf, math.nan, -math.inf
    got = fastood.row_stats(f.to(triton_device), STATS, backend="triton")
    for name in STATS:
        expected = [math.inf, math.nan, -math.inf] if name in ("energy", "lse") else [math.nan] * 3
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
    for i in (1, 3, 6, 8) if INTERPRETED else (1, 2, 3, 6, 7, 8):
        alone, alone_h = f[i : i + 1].clone(), h[i : i + 1].clone()
        for name, one in fastood.row_stats(alone, STATS, backend="triton").items():
            assert torch.equal(one, stats[name][i : i + 1]), name
        assert torch.equal(fastood.norms(alone_h, ORDERS, backend="triton"), norms[i : i + 1])
        assert torch.equal(fastood.score(alone, alone_h, backend="triton"), scores[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [100, 1000, 1001, 1004])
def test_a_row_has_the_same_bits_wherever_it_begins(triton_device, C, dtype):
    """Read 128 bits at a time, or of a slice of a wider matrix word by word."""
    torch.manual_seed(0)
    f = (3 * torch.randn(3, C)).to(dtype).to(triton_device)
    stats = fastood.row_stats(f, STATS, backend="triton")
    for before, after in ((1, 0), (2, 2), (3, 1), (8, 1)):
        view = torch.nn.functional.pad(f, (before, after), value=100.0)[:, before : before + C]
        for name, other in fastood.row_stats(view, STATS, backend="triton").items():
            assert torch.equal(other, stats[name]), (name, before)


# A row in a thread, in several, in a warp, and in several; and swept, in one turn of four tiles or two.
@pytest.mark.parametrize(
    ("C", "held"),
    [(1, True), (2, True), (7, True), (300, True), (1030, True), (8200, True), (300, False), (4100, False)],
)
@pytest.mark.parametrize("labels", ["uniform", "predicted", "log_predicted", "soft", "one-hot"])
def test_gradients_on_every_branch(triton_device, monkeypatch, new_programs, C, held, labels):
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
            q = None if isinstance(labels, str) else there
            got = statistic(stat, f.to(triton_device), q, T=0.5)
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
            got = statistic(stat, f.to(triton_device), here, T)
            expected, allowed = truth.gradient(f, labels if q is None else q, *stat[2:], T, truth.EPS["float32"])
            truth.assert_close(got.cpu(), expected, allowed + 1e-300, stat)


@pytest.mark.parametrize("order", [1e4, 1e8, 1e9, 1e12, 1e18])
@pytest.mark.parametrize("labels", ["uniform", "predicted", "one-hot"])
def test_gradients_of_orders_next_to_infinity(triton_device, labels, order):
    """Nothing is left of any power but the largest's, and what its logarithm is off by is multiplied by the order."""
    far, near = [[1e30, 0.0, -1e29, 3.0]], [[3.0, 2.99999, 0.0, 0.0], [2.0, 0.0, 0.0, -1.0], [1.0, 1.0, 1.0, 1.0]]
    f = torch.tensor(far + near)
    q = torch.tensor([[1.0, 0, 0, 0]]).repeat(4, 1) if labels == "one-hot" else None
    for expectation in ("inside", "outside"):
        if expectation == "outside" or labels != "predicted":
            stat = "gradient", labels if q is None else "given", order, 1, expectation
            here = None if q is None else q.to(triton_device)
            got = statistic(stat, f.to(triton_device), here)
            expected, allowed = truth.gradient(f, labels if q is None else q, *stat[2:], 1.0, truth.EPS["float32"])
            truth.assert_close(got.cpu(), expected, allowed, stat)


@pytest.mark.parametrize("order", [0.02, 0.5, 2])
def test_probabilities_below_float32_count_in_small_orders(triton_device, order):
    """Of one-hot labels, for the maximum and for another class; also where 1 - p of the maximum is below float32."""
    f = torch.tensor([[0.0, 1.0, 2.0, 100.0], [0.0, 1.0, 2.0, 100.0], [0.0, 60.0, 90.0, 100.0]])
    q = torch.zeros(3, 4)
    q[0, 3] = q[1, 0] = q[2, 3] = 1
    stat = "gradient", "given", order, 1, "inside"
    got = statistic(stat, f.to(triton_device), q.to(triton_device), T=0.5)
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
    stat = "gradient", labels, 1, 200, "outside"  # (2 (1 - p))^200, p = 1/2
    got = statistic(stat, torch.zeros(1, 2, device=triton_device))
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
        stat = "gradient", labels, order, 1.5, expectation
        given = q if labels == "given" else None
        whole = statistic(stat, f, given)
        assert torch.equal(statistic(stat, f.contiguous(), given), whole)
        apart = None if given is None else torch.nn.functional.pad(q, (1, 2))[:, 1:-2]
        for i in (1, 4):
            row = slice(i, i + 1)
            one = statistic(stat, f[row].clone(), None if apart is None else apart[row])
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
    got = statistic(stat, f, q)
    assert got.isnan().tolist() == [False] + 6 * [True] + [False]
    one = statistic(stat, f[7:].clone(), q[7:].clone())
    assert torch.equal(one, got[7:])
    turned = statistic(stat, f.T.contiguous().T, q.T.contiguous().T)
    torch.testing.assert_close(turned, got, rtol=0, atol=0, equal_nan=True)


def gen_allowed(f, gamma, T, expected):
    return (32 + 4 * np.minimum(max(1.0, gamma) * truth.span(f) / T, 745)) * truth.EPS["float32"] * expected


# A row in a thread, in several, in a warp and in several warps; as many classes as are wanted, more, and fewer.
@pytest.mark.parametrize(("C", "dtype"), of_every_type([1, 2, 10, 17, 100, 1001, 3000], 1000), ids=str)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [10, 100, 1000, 1001])
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
        for i in range(5):
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


@pytest.mark.parametrize("C", [1, 2, 100, 1001])
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


def batchgrad(device, f, h, G, **options):
    f, h, G = (x.to(device) for x in (f, h, G))
    return fastood.BatchGrad(G, **options).score(f, h, oriented=False, backend="triton").cpu()


# Whole and partial blocks of 16 classes, 256 features, and 128 rows; steps of 8 features.
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
    monkeypatch.setattr(shapes, "BATCHGRAD_ROWS", {0: 32})
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


@given(
    seed=st.integers(0, 2**32 - 1),
    C=st.sampled_from([1, 2, 9]),
    D=st.sampled_from([1, 3, 257]),
    kind=st.sampled_from(["any", "certain", "one class is not masked", "flat"]),
    T=st.sampled_from([1e-10, 1.0, 1e10, 1e-40]),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    signed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_batchgrad_is_infinite_where_a_feature_is(triton_device, seed, C, D, kind, T, bad, signed, dtype):
    g = torch.Generator().manual_seed(seed)
    f, h, G = torch.randn(4, C, generator=g), torch.randn(4, D, generator=g), torch.randn(C, D, generator=g)
    if kind == "certain":
        f[:, 0] += 1e3
    elif kind == "one class is not masked":
        f[:, 1:] = -math.inf
    elif kind == "flat":
        f.zero_()
    f, h = f.to(dtype), (h if signed else h.abs()).to(dtype)
    good = batchgrad(triton_device, f, h, G, temperature=T)
    assert not good.isnan().any()
    h[1, seed % D], h[2, seed % D] = bad, bad
    h[2, -1], f[3, seed % C] = math.nan, math.nan
    got = batchgrad(triton_device, f, h, G, temperature=T)
    assert torch.equal(got[0], good[0])
    assert got[1].isnan() if math.isnan(bad) else got[1] == math.inf
    assert got[2:].isnan().all()


def test_what_it_leaves_to_the_reference(triton_device):
    f, h = torch.randn(3, 10, device=triton_device), torch.randn(3, 4, device=triton_device)
    anchors = fastood.BatchGrad(torch.randn(10, 4, device=triton_device), temperature=1e-40)
    no_feats = fastood.BatchGrad(torch.randn(10, 0, device=triton_device))
    for call in (
        lambda b: fastood.score(f, method="gen", gamma=5, backend=b),
        lambda b: fastood.row_stats(f, [("power_sum", 4)], temperature=2.0**-99, backend=b)["power_sum", 4],
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


@pytest.mark.parametrize(("version", "found"), [("3.5.1", "3.5.1"), ("3.10.0+git1", None), ("4.0", None)])
def test_an_old_triton_is_refused(monkeypatch, tmp_path, version, found):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(f"# not imported\n__version__ = '{version}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(triton, "_unusable_device", lambda device: None)
    triton.missing.cache_clear()
    cuda, why = torch.device("cuda"), f"it needs Triton 3.6 or newer, found {found}"
    try:
        if found is None:
            assert kernels.select("auto", cuda, torch.float32) is triton
            return
        kernels._warn_once.cache_clear()
        with pytest.warns(UserWarning, match=f"Triton kernels cannot be used .{why}.: plain PyTorch does"):
            assert kernels.select("auto", cuda, torch.float32) is kernels.reference
        assert kernels.select("auto", cuda, torch.float32) is kernels.reference  # and says so once
        with pytest.raises(RuntimeError, match=f"backend 'triton' cannot serve torch.float32 on cuda: {why}"):
            kernels.select("triton", cuda, torch.float32)
    finally:
        triton.missing.cache_clear()


def test_import_does_not_load_triton():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import fastood; fastood.backends(); fastood.score(torch.ones(2, 3))\n"
        "assert not {m for m in set(sys.modules) - before if m.split('.')[0] == 'triton'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "0"})


# ---- launches by the C++ part


class Driver:
    """Stands in for CUDA's: what launcher.cpp packs is unpacked and run by the interpreter, on the CPU."""

    def __init__(self, launch):
        self.compiled, self.streams, self.grids = [], [], []
        kernel_type = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_void_p,
            *[ctypes.c_uint] * 7,
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_void_p,
        )
        context_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
        self.functions = [kernel_type(self.launch), *[context_type(lambda _: 0) for _ in range(3)]]
        self.addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in self.functions]
        self.Argument = launch.Argument

    def compile(self, launch, examples):
        """As launch.compiled_kernel; the "function" is a place in a list, from 1 on."""
        from fastood.kernels.triton.launch import Compiled

        def size(x):
            return 4 if isinstance(x, float) or (isinstance(x, self.Argument) and x.base == 0) else 8

        self.compiled.append((launch, [e for e, x in zip(examples, launch.arguments, strict=True) if x is not None]))
        sizes = tuple(size(x) for x in launch.arguments if x is not None)
        return Compiled(len(self.compiled), 32 * launch.shape.warps, 64, (*sizes, 8, 8), None)

    def launch(self, function, x, y, z, threads, one, two, shared, stream, arguments, extra):
        launch, examples = self.compiled[function - 1]
        assert (z, threads, one, two, shared, extra) == (1, 32 * launch.shape.warps, 1, 1, 64, None)
        values = []
        for place, example in zip(arguments, examples, strict=False):
            if isinstance(example, int):
                values.append(ctypes.c_int32.from_address(place).value)
            elif isinstance(example, float):
                values.append(ctypes.c_float.from_address(place).value)
            else:  # memory from an address on, of which nobody says how much
                address, dtype = ctypes.c_int64.from_address(place).value, getattr(example, "dtype", example)
                values.append(torch.frombuffer((ctypes.c_char * (1 << 40)).from_address(address), dtype=dtype))
        assert [ctypes.c_int64.from_address(arguments[len(examples) + i]).value for i in (0, 1)] == [0, 0]
        values = iter(values)
        given = [None if x is None else next(values) for x in launch.arguments]
        launch.kernel[(x, y)](*given, **launch.constants, **launch.shape.options)
        self.grids.append((x, y))
        self.streams.append(stream)
        return 0


@pytest.fixture
def new_programs():
    """Nothing that was worked out before, or in this test, outlives it."""
    from fastood import _plan
    from fastood.kernels.triton import launch

    caches = [kernels._prepared.cache_clear, _plan._PLANS.clear]
    caches += [launch.scores.cache_clear, launch.gradient.cache_clear, launch.gen.cache_clear]
    for clear in caches:
        clear()
    yield
    for clear in caches:
        clear()


@pytest.fixture
def driver(monkeypatch, new_programs):
    from fastood.kernels.cpu import _native
    from fastood.kernels.triton import launch

    if not INTERPRETED or _native is None:
        pytest.skip("needs the C++ part, and the interpreter: test_in_the_interpreter runs it")
    stands_in = Driver(launch)
    monkeypatch.setattr(launch, "has_driver", lambda on: True)
    monkeypatch.setattr(launch, "compiled_kernel", stands_in.compile)
    _native.use_driver(*stands_in.addresses)
    yield stands_in
    _native.use_driver(0, 0, 0, 0)


def calls_of(C, D):
    q = torch.softmax(torch.randn(300, C), -1)
    anchors = fastood.BatchGrad(torch.randn(C, D))
    return {
        "score": lambda f, h, b: fastood.score(f, h, backend=b),
        "msp beside feats": lambda f, h, b: fastood.score(f, h, "msp", norm=None, backend=b),
        "sweep": lambda f, h, b: fastood.sweep(f, h, ["tv", "energy"], [0, 0.3, 2], backend=b),
        "scores": lambda f, h, b: torch.stack([*fastood.scores(f, h, ["varsum", "gradnorm"], backend=b).values()]),
        "norms": lambda f, h, b: fastood.norms(h, [0.5, math.inf], backend=b),
        "statistics": lambda f, h, b: torch.stack([*fastood.row_stats(f, ["tv", "plogp"], backend=b).values()]),
        "GEN": lambda f, h, b: fastood.score(f, method="gen", M=3, backend=b),
        "log ExGrad": lambda f, h, b: fastood.score(f, h, "exgrad", log=True, backend=b),
        "power sum": lambda f, h, b: fastood.row_stats(f, [("power_sum", 3)], backend=b)["power_sum", 3],
        "gradient": lambda f, h, b: fastood.gradient_norm(f, h, q[: len(f)], 3, expectation="outside", backend=b),
        "BatchGrad": lambda f, h, b: anchors.score(f, h, backend=b),
        "raw BatchGrad": lambda f, h, b: anchors.score(f, h, oriented=False, backend=b),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", calls_of(3, 3))
def test_launches_of_the_native_part(driver, name, dtype):
    """Of any number of rows, in memory of several layouts: what was laid out once holds for all later calls."""
    torch.manual_seed(0)
    C, D = 10, 33
    call = calls_of(C, D)[name]
    wide_f, wide_h = torch.randn(140, C + 3).to(dtype), torch.randn(140, D + 1).to(dtype)
    for f, h in (
        (wide_f[:, :C].clone(), wide_h[:, :D].clone()),
        (wide_f[:, 3:], wide_h[:, 1:]),
        (wide_f[:1, 2 : C + 2], wide_h[:1, :D]),
        (wide_f[3:9, :C].clone().T.clone().T, wide_h[3:9, 1:]),  # columns beside each other
        (wide_f[:0, 3:], wide_h[:0, 1:]),
    ):
        before = len(driver.compiled), len(driver.grids)
        for rows in (len(f), len(f) // 2, len(f)):
            expected = call(f[:rows].float(), h[:rows].float(), "reference")
            torch.testing.assert_close(call(f[:rows], h[:rows], "triton"), expected, rtol=1e-4, atol=1e-5)
        launches = len(driver.compiled) - before[0]
        assert launches <= (8 if "BatchGrad" in name else 2), "a number of rows made a new program"
        assert len(driver.grids) > before[1] or not len(f)


def test_warmed_up(driver):
    """No later call of the same kind compiles anything, of any number of rows or at another temperature."""
    fastood.warm_up(10, 4, torch.bfloat16, ["energy", "gradnorm"], device="cpu", backend="triton", norm=2)
    compiled = len(driver.compiled)
    assert compiled == 2
    f, h = torch.randn(70, 10).bfloat16(), torch.randn(70, 4).bfloat16()
    for rows in (1, 70):
        fastood.score(f[:rows], h[:rows], norm=2, backend="triton")
        fastood.score(f[:rows], h[:rows], "gradnorm", backend="triton")
    assert len(driver.compiled) == compiled
    with pytest.raises(ValueError, match="methods"):
        fastood.warm_up(10, methods=["enrgy"], device="cpu")


def test_batchgrad_in_groups_of_rows(driver, monkeypatch):
    monkeypatch.setattr(shapes, "TEMPORARY", 1)
    torch.manual_seed(0)
    f, h = torch.randn(300, 7), torch.randn(300, 5)
    anchors = fastood.BatchGrad(torch.randn(7, 5))
    expected = anchors.score(f, h, backend="reference")
    torch.testing.assert_close(anchors.score(f, h, backend="triton"), expected, rtol=1e-5, atol=0)
    assert len(driver.grids) == 3 * 4


@pytest.mark.parametrize(
    "bad",
    [
        lambda f, h: (f, h[:3]),
        lambda f, h: (f, h.int()),
        lambda f, h: (f[0], h),
        lambda f, h: (f.double(), h),
        lambda f, h: (f.to("meta"), h),
        lambda f, h: (f.numpy(), h),
    ],
)
def test_a_warm_call_still_refuses_what_is_wrong(driver, bad):
    f, h = torch.randn(5, 10), torch.randn(5, 4)
    fastood.score(f, h, backend="triton")
    launched = len(driver.grids)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"feats|logits|float64|mixed"):
        fastood.score(*bad(f, h), backend="triton")
    assert len(driver.grids) == launched


def test_a_warm_call_leaves_autograd_and_transforms_to_torch(driver):
    f, h = torch.randn(5, 10), torch.randn(5, 4)
    fastood.score(f, h, backend="triton")
    launched = len(driver.grids)
    x = f.clone().requires_grad_()
    fastood.score(x, h, backend="triton").sum().backward()
    assert x.grad.abs().sum() > 0
    torch.func.vmap(lambda row: fastood.score(row[None], method="msp", backend="triton"))(f)
    assert len(driver.grids) == launched


def test_an_error_of_the_driver_is_raised(driver):
    f = torch.randn(5, 10)
    fastood.score(f, backend="triton")
    from fastood.kernels.cpu import _native

    failing = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 400)
    _native.use_driver(ctypes.cast(failing, ctypes.c_void_p).value, *driver.addresses[1:])
    with pytest.raises(RuntimeError, match="error 400"):
        fastood.score(f, backend="triton")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_in_a_cuda_graph_without_a_call_before(new_programs):
    """Kernels are compiled and loaded, and constants copied, beside the capture."""
    f, h = torch.randn(64, 1000, device="cuda"), torch.randn(64, 512, device="cuda")
    detector = fastood.BatchGrad(torch.randn(1000, 512, device="cuda"))
    for call in (fastood.score, fastood.sweep, detector.score):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(f, h)
        f.normal_()
        graph.replay()
        assert torch.equal(out, call(f, h))


@needs_gpu
def test_on_streams_and_threads():
    """Work is queued where torch queues it, from any thread, also one that never saw the device."""
    f, h = torch.randn(4096, 1000, device="cuda"), torch.randn(4096, 512, device="cuda")
    expected = fastood.score(f, h)
    torch.cuda.synchronize()

    def work(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)  # what is queued elsewhere would be done before this stream's tensors are
            x, y = f + 0, h + 0
            out = [fastood.score(x, y) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(o, expected) for o in out)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device_than_the_current_one():
    f, h = torch.randn(64, 1000), torch.randn(64, 512)
    scores = [fastood.score(f.to(d), h.to(d)) for d in ("cuda:1", "cuda:0", "cuda:1")]
    assert [x.device.index for x in scores] == [1, 0, 1]
    assert torch.cuda.current_device() == 0
    assert torch.equal(scores[0].cpu(), scores[1].cpu())


# ---- the launch table


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles(itemsize):
    for columns in [*range(1, 140), 1000, 1001, 1002, 1004, 21841, 24576]:
        for stride in (columns, columns + 1, 0):
            rows, warps, _ = shape = shapes.launch_shape(columns, 0, itemsize, 0)
            lanes = shape.lanes
            assert rows * lanes in (32 * warps, rows)
            tile, _ = shapes.logits_tile(columns, stride, 0, itemsize, lanes)
            assert tile.vec * itemsize <= 16
            assert tile.vec % tile.p == 0
            assert tile.w & (tile.w - 1) == 0
            assert tile.shifted == (stride % tile.p > 0 and lanes > 1)
            assert tile.shifted or stride % tile.vec == 0
            assert columns % tile.vec == 0 or tile.vec == tile.p  # groups of words are whole
            assert tile.w == shapes.logits_tile(columns, 0, 0, itemsize, lanes)[0].w  # the same sums anywhere
            elements = -(-columns // tile.w // tile.p) if lanes > 1 else columns
            assert elements * tile.w * tile.p // max(lanes, 1) <= 128  # of a thread, in registers


@pytest.mark.parametrize("labels", ["uniform", "log_predicted", "given"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_gradients(itemsize, labels):
    for C, order in itertools.product([*range(1, 140), 1000, 1001, 1024, 8200, 12288, 16384, 16385, 128256], (2, 2.5)):
        of = [shapes.gradient_constants(labels, order, 1, "outside", C, s, itemsize) for s in ((C, C), (C, C + 1))]
        (constants, shape), (apart, _) = of
        sweep = constants["S"]
        assert apart == constants | {"S": sweep._replace(vec=apart["S"].vec)}  # the same sums, wherever rows begin
        assert sweep.vec * itemsize <= 16
        assert C % sweep.vec == 0
        assert sweep.w & (sweep.w - 1) == 0
        most = 12288 if labels == "given" else 16384
        assert sweep.held == (most >= C)
        if sweep.held:
            assert shape.rows * shape.lanes == 32 * shape.warps
            assert (sweep.tiles - 1) * sweep.w < C <= sweep.tiles * sweep.w
            of_thread = sweep.tiles * sweep.w / shape.lanes
            pairs = labels == "given" or (labels, order) == ("log_predicted", 2.5)
            assert of_thread <= (32 if pairs and C > 16 else 64)  # in registers


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_long_rows(itemsize):
    assert [shapes.is_streamed(C) for C in (0, 1000, 24576, 24577)] == [False, False, False, True]
    for C in (24577, 24584, 50257, 128256, 262144, 1_000_003):
        for stride in (C, C + 1):
            shifted = shapes.is_shifted(C, stride, 0, itemsize)
            shape = shapes.launch_shape(C, 0, itemsize, 0)
            assert shape.rows == 1
            tile, count = shapes.logits_tile(C, stride, 0, itemsize, shape.lanes)
            assert not tile.shifted
            assert tile.w == shape.lanes * tile.vec // tile.p
            assert tile.vec * itemsize == (itemsize if shifted else 16)
            assert C % tile.vec == stride % tile.vec == 0
            assert 2 <= count <= shapes.STREAM[itemsize][2 if shifted else 1]


def test_every_order_finds_its_sum():
    """The sums that are laid out are of |h|^r, with at most one power of an order by logarithm, and that below 0.5."""
    h = np.array([0.3, 1.0, 2.5])
    some = (0.3, 0.1, 2.0, 0.5, 0.8, 1.5, 0.0, math.inf)
    for orders in (some, (0.7, 1.2, 7.0, 15.9, 16.0), (1e-3, 16.5, 1e9), (0.0,)):
        plan, norms = shapes.plan_norms(orders, 100, False)
        with np.errstate(over="ignore"):  # 2.5 ** 1e9: infinite on both sides
            powers, by_log = [h**r for r in norms.roots], [r not in (1, 0.5) for r in norms.roots]
            wanted = [h**r for r in orders]
        for i, j in norms.products:
            powers.append(powers[i] * powers[j])
            by_log.append(by_log[i] + by_log[j])
        assert max(norms.roots) <= 1 or max(orders) > shapes.MOST_MULTIPLIED
        assert len(plan.ranges) == len(norms.factors) + norms.nonzero + norms.largest
        for r, slot, power in zip(orders, plan.slots, wanted, strict=True):
            if r in (0, math.inf):
                assert slot == len(norms.factors) + (norms.nonzero if r else 0)
                continue
            factors = norms.factors[slot]
            np.testing.assert_allclose(math.prod(powers[i] for i in factors), power, rtol=1e-14)
            assert sum(by_log[i] for i in factors) <= 1


# ---- compilation


@needs_triton
@only_compiled
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_compiles_ahead_of_time(architecture):
    """What benchmarks/gpu_static.py does not compile: rare statistics, orders and types; and for AMD, scores."""
    run = subprocess.run([sys.executable, "-c", AHEAD_OF_TIME, architecture], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-20_000:]


@needs_triton
@only_compiled
def test_no_helper_needs_its_tuples_told_apart():
    """Triton 3.6 names what it compiles by the tensors and constants in the arguments, whatever tuples they are in:
    called with ((x, y),) and with ((x,), (y,)) a helper has one body, and the second call's sums are wrong.
    """
    environment = {**os.environ, "TRITON_ALWAYS_COMPILE": "1"}
    run = subprocess.run([sys.executable, "-c", TUPLES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-20_000:]


TUPLES = """
import contextlib
from triton.compiler.code_generator import CodeGenerator
from benchmarks.gpu_static import *
from fastood.kernels.statistics import FORMULAS

call, seen = CodeGenerator.call_JitFunction, {}

def is_tuple(x):
    return isinstance(x, (tuple, triton.language.tuple))

def leaves(x, path=()):
    if is_tuple(x):
        return [leaf for i, item in enumerate(x) for leaf in leaves(item, (*path, i))]
    return [str(x.type) if isinstance(x, triton.language.tensor) else (path, repr(x))]

def shape(x):
    return [shape(item) for item in x] if is_tuple(x) else None

def recorded(self, fn, args, kwargs, *more):
    given = (*args, *kwargs.values())
    first = seen.setdefault((self.module, fn, tuple(leaves(given))), shape(given))
    assert shape(given) == first, f"{fn.__name__} is called with {first} and {shape(given)}"
    return call(self, fn, args, kwargs, *more)

class Made(Exception):
    "What comes after the front end need not be done."

def only_made(*args, make_ir=ASTSource.make_ir, **options):
    make_ir(*args, **options)
    raise Made

CodeGenerator.call_JitFunction, ASTSource.make_ir = recorded, only_made
target = GPUTarget("cuda", 90, 32)
every = tuple(FORMULAS)
more = [Case("", t, C, D, stats, GRID, 0, 0) for t in (BFLOAT, FLOAT) for C, D in ((1000, 64), (1001, 65))
        for stats in (("tv",), ("tv", "s2"), every)]
for case in (*more, *CASES):
    with contextlib.suppress(Made):
        compile_case(case, target)
assert len(seen) > 1000  # the hook was called
"""


@needs_triton
@only_compiled
def test_reductions_have_one_layout_wherever_rows_begin():
    """The order of a sum is that of the layout which the compiler gives a tile, and it hangs on the width of loads."""
    run = subprocess.run([sys.executable, "-c", LAYOUTS], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-20_000:]


LAYOUTS = """
import re
from benchmarks.gpu_static import *

def reduced(dtype, C, stride, offset):
    made, compile = [], triton.compile
    triton.compile = lambda *args, **options: made.append(compile(*args, **options)) or made[0]
    try:
        compile_case(Case("", dtype, C, 0, ("msp",), (), 0, 0), GPUTarget("cuda", 90, 32), rows=(stride, offset))
    finally:
        triton.compile = compile
    text = made[0].asm["ttgir"]
    layouts = dict(re.findall(r"^(#\\w+) = (.*)$", text, re.M))
    tiles = re.findall(r'"tt.reduce".*?\\}\\) : \\((tensor<.*?>)', text, re.S)
    return [re.sub(r"#\\w+", lambda name: layouts[name[0]], tile) for tile in tiles]

for C, dtype in ((100, FLOAT), (1000, BFLOAT), (1004, FLOAT)):
    aligned = reduced(dtype, C, C, 0)
    assert len(aligned) == 2, aligned
    for stride, offset in ((C + 1, 1), (C + 4, 2)):
        assert reduced(dtype, C, stride, offset) == aligned
"""


AHEAD_OF_TIME = """
import sys, torch
amd = sys.argv[1] == "gfx942"
if amd:
    torch.version.hip = "any"
from benchmarks.gpu_static import *
from fastood.kernels.statistics import FORMULAS
target = GPUTarget("hip", "gfx942", 64) if amd else GPUTarget("cuda", 90, 32)
every = tuple(FORMULAS)
cases = [Case("", t, C, D, every, (0.1, 0.25, 1.5, 100.0), 0, 0) for t, C, D in (
    (BFLOAT, 1001, 257), (HALF, 10, 64), (HALF, 3001, 64), (FLOAT, 100, 17), (FLOAT, 7, 3), (FLOAT, 128256, 4096))]
cases += [Case("", BFLOAT, 30001, 0, every, (), 0, 0), Case("", HALF, 30008, 64, every, (2.0,), 0, 0)]
cases += [Case("", FLOAT, 100, 0, (stat,), (), 0, 0) for stat in every]
cases += [Case("", BFLOAT, 1000, 2048, V, GRID, 0, 0), Case("", HALF, 0, 2048, (), GRID, 0, 0)]
if amd:  # scores with few columns; more of them fail in Triton's AMD backend, and nobody has run any there
    cases = [Case("", t, C, D, ("energy",), (0.1, 0.25, 1.5, 100.0), 0, 0) for t, C, D in (
        (BFLOAT, 1001, 257), (HALF, 10, 64), (FLOAT, 100, 17), (FLOAT, 128256, 4096))]
for i, case in enumerate(cases):
    compile_case(case, target, bias=amd or i % 2 == 0, log=i % 3 == 0)
if amd:
    sys.exit()
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
for C, M, t in ((10, 100, HALF), (1001, 100, BFLOAT), (16384, 5, FLOAT)):
    compile_gen(Case("", t, C, 0, (("gen", 0.1, M),), (), 0, 0), target)
"""

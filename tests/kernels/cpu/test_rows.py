"""Every way a row is split, and rows at the ends of the floats, on each instruction set."""

import math

import numpy as np
import pytest
import torch
import truth
from samples import DTYPES, eps_of

import fastood
from fastood.kernels.statistics import FORMULAS


# The chunk is 8192 columns, a block of it 512: around both, and a row of several chunks.
@pytest.mark.parametrize("columns", [511, 512, 513, 8191, 8192, 8193, 16_390])
@pytest.mark.parametrize("masked", [False, True])
def test_chunk_edges(isa, columns, masked):
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((2, columns)) * 4
    if masked:  # a first chunk with nothing in it, the maximum in the last
        x[:, : columns - 3] = -np.inf
        x[0, -1] = 90
    f = torch.from_numpy(x).float()
    h = torch.from_numpy(rng.standard_normal((2, columns)) * 10.0 ** rng.uniform(-9, 9, (2, columns))).float()
    for name in FORMULAS:
        expected = truth.stat(name, f)
        got = fastood.row_stats(f, [name], backend="cpu")[name]
        truth.assert_close(got, expected, truth.tolerance(name, expected, f, 1.0, 2**-24), name)
    for r in (0, 0.1, 0.3, 0.8, 1, 1.5, 2, 6, 100, math.inf):
        expected = truth.norm(h, r)
        got = fastood.norms(h, [r], backend="cpu")[:, 0]
        truth.assert_close(got, expected, truth.norm_tolerance(h, r, 2**-24) * expected, f"r={r}")


@pytest.mark.parametrize("columns", [511, 513, 8192, 8193, 16_390])
@pytest.mark.parametrize(("order", "power"), [(1, 1), (2, 1), (2, 2 + 1e-9), (1.5, 0.5), (math.inf, 2)])
def test_gradients_at_chunk_edges(isa, columns, order, power):
    """Against the definition in long double; one row's maximum is in its last chunk."""
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((2, columns)) * 4
    x[0, -1] = 30
    f = torch.from_numpy(x).float()
    q = torch.from_numpy(rng.dirichlet(np.ones(columns), 2)).float()
    q[0] = 0
    q[0, -1] = 1
    for i, (row, w) in enumerate(zip(truth.widen(f), truth.widen(q), strict=True)):
        p, not_p, _ = truth.softmax_row(row, 1.0)
        top, r = int(row.argmax()), truth.LD(order)
        away = np.abs(w - p)
        away[top] = abs((w[top] - 1) + not_p[top])
        if order == math.inf:
            inside, outside = away.max(), not_p
        else:
            inside = (away**r).sum() ** (1 / r)
            others = (p**r).sum() - p**r
            others[top] = (np.delete(p, top) ** r).sum()
            outside = (not_p**r + others) ** (1 / r)
        for expectation, expected in (("inside", inside**power), ("outside", (w * outside**power).sum())):
            got = fastood.gradient_norm(f, torch.ones(2, 1), q, order, power, expectation, backend="cpu")[i]
            assert abs(got.item() - expected) <= 400 * 2**-24 * expected


@pytest.mark.parametrize("gap", [1.0, 1e8, 1e16, 1e19, 1e30])
@pytest.mark.parametrize("order", [0.3, 1.5, 3, 1e5, 1e9, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_far_rows_and_orders(isa, gap, order, dtype):
    """Logarithms of about gap times order, whose difference is at most log C; nearly equal rows, where it is near 0."""
    near = torch.tensor([[3.0, 2.99999, 0, 0], [2.0, 0, 0, -1], [1.0, 1, 1, 1]])
    f = torch.cat([gap * torch.tensor([[1.0, 0, -0.3, 0.1], [0, 1, 1, 0.5]]), near]).to(dtype)
    h, q = torch.ones(5, 1, dtype=dtype), torch.tensor([[1.0, 0, 0, 0]], dtype=dtype).expand(5, 4)
    for labels, expectation in (("uniform", "outside"), ("predicted", "outside"), (q, "outside"), (q, "inside")):
        for power in (1, 0.01):
            got = fastood.gradient_norm(f, h, labels, order, power, expectation, backend="cpu")
            expected, allowed = truth.gradient(f, labels, order, power, expectation, 1.0, eps_of(f))
            truth.assert_close(got, expected, allowed, (labels, expectation, power))


@pytest.mark.parametrize("gap", [80.0, 600.0, 700.0, 709.0, 712.0])
def test_the_rest_of_a_row_next_to_the_end_of_the_doubles(isa, gap):
    h = torch.full((1, 1), 2.0**40, dtype=torch.float64)  # out of which it lifts the result
    for n in (0, 100):  # in a lane, and over several vectors
        x = torch.tensor([[0.0, -gap, -gap - 1, *[-gap] * n]])
        got = fastood.score(x, h, "exgrad", oriented=False, backend="cpu")
        expected = 2.0**41 * truth.stat("one_minus_s2", x)
        truth.assert_close(got, expected, (32 + 4 * 104 + 16) * 2**-24 * expected)
        for order in (1, 2, 3):
            got = fastood.gradient_norm(x, h, "predicted", order, 1, "outside", backend="cpu")
            expected, allowed = (2.0**40 * y for y in truth.gradient(x, "predicted", order, 1, "outside", 1.0, 2**-24))
            truth.assert_close(got, expected, allowed, order)


def test_many_orders_and_power_sums_at_once(isa):
    g = torch.Generator().manual_seed(0)
    h, f = torch.rand(3, 100, generator=g) + 0.1, torch.randn(3, 40, generator=g)
    orders = [0.05 * k for k in range(1, 100)]
    got = fastood.norms(h, orders, backend="cpu")
    for j, r in enumerate(orders):
        expected = truth.norm(h, r)
        truth.assert_close(got[:, j], expected, truth.norm_tolerance(h, r, 2**-24) * expected, f"r={r}")
    stats = [("power_sum", 0.5 + 0.1 * k) for k in range(20)] + [("gen", 0.1, k) for k in range(1, 34)]
    alone = [fastood.row_stats(f, [s], backend="cpu")[s] for s in stats]
    assert all(
        torch.equal(a, b) for a, b in zip(fastood.row_stats(f, stats, backend="cpu").values(), alone, strict=True)
    )


# A tile's norms come from one pass where its values allow that; each of these makes it take care instead.
@pytest.mark.parametrize("odd", [math.inf, math.nan, 1e-40, 3e38, 1e-30])
@pytest.mark.parametrize("where", [0, 2047, 2048, 4999])
def test_tiles_that_need_care(isa, odd, where):
    h = torch.rand(2, 5000, generator=torch.Generator().manual_seed(0)) + 0.1
    h[0, where] = odd
    orders = [0, 0.1, 0.3, 0.5, 0.8, 1, 2, 3, 6, math.inf]
    for some in (orders, orders[1:5], orders[5:7]):
        got = fastood.norms(h, some, backend="cpu")
        for j, r in enumerate(some):
            expected = truth.norm(h, r)
            truth.assert_close(got[:, j], expected, truth.norm_tolerance(h, r, 2**-24) * expected, f"r={r}")


@pytest.mark.parametrize("columns", [511, 8192, 16_390])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_one_value(isa, columns, dtype):
    """Rounding errors of equal terms do not average out."""
    h = torch.tensor([0.1, 1 / 3, 0.7, 1.1, 5.3], dtype=dtype)[:, None].expand(5, columns).contiguous()
    orders = [0, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 4, 5, 6, math.inf]
    together = fastood.norms(h, orders, backend="cpu")
    for j, r in enumerate(orders):
        expected = truth.norm(h, r)
        for got in (together[:, j], fastood.norms(h, [r], backend="cpu")[:, 0]):
            truth.assert_close(got, expected, truth.norm_tolerance(h, r, eps_of(h)) * expected, f"r={r}")
    f = torch.tensor([1e-3, 0.5, 3.0], dtype=dtype)[:, None] * (torch.arange(columns) == 7)  # all but one are equal
    for name in FORMULAS:
        expected = truth.stat(name, f)
        got = fastood.row_stats(f, [name], backend="cpu")[name]
        truth.assert_close(got, expected, truth.tolerance(name, expected, f, 1.0, eps_of(f)), name)


def test_equal_terms_of_very_many_chunks(isa):
    x = np.array([1e-3, 3.0])
    f = torch.from_numpy(x)[:, None] * (torch.arange(1_000_003) == 7)
    got = fastood.row_stats(f, ["s2"], backend="cpu")["s2"]
    e = np.exp(x.astype(np.longdouble))
    expected = (1_000_002 + e * e) / (1_000_002 + e) ** 2
    truth.assert_close(got, expected, 32 * 2**-53 * expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_terms_of_nearly_flat_rows_of_few_classes(isa, dtype):
    """Half the bound, for one after the other 47 equal terms took up all of it."""
    x = -(10.0 ** np.random.default_rng(0).uniform(-4, 0, 200))
    f = torch.from_numpy(x).to(dtype)[:, None] * (torch.arange(48) == 24)
    got = fastood.row_stats(f, ["kl_uniform"], backend="cpu")["kl_uniform"]
    expected = truth.stat("kl_uniform", f)
    truth.assert_close(got, expected, truth.tolerance("kl_uniform", expected, f, 1.0, eps_of(f)) / 2)


# Around the 16 rows that are finished together, and the 48 classes up to which a row lies in a lane.
@pytest.mark.parametrize("N", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("C", [1, 2, 10, 48, 49])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_classes(isa, N, C, dtype):
    rng = np.random.default_rng(C)
    f = torch.from_numpy(rng.standard_normal((N, C)) * 10.0 ** rng.uniform(-2, 2, (N, 1))).to(dtype)
    f[0, C // 2] = math.inf
    f[-1] = -math.inf
    if N > 2:
        f[1, 0] = math.nan
        f[2, 1:] = f[2, :1] - 95  # all but one vanish in float32
    got = fastood.row_stats(f, [*FORMULAS, ("power_sum", 0.5)], backend="cpu")
    for name in FORMULAS:
        expected = truth.stat(name, f)
        truth.assert_close(got[name], expected, truth.tolerance(name, expected, f, 1.0, eps_of(f)), name)
    alone = torch.cat([fastood.row_stats(row[None], ["tv"], backend="cpu")["tv"] for row in f])
    assert torch.equal(alone.nan_to_num(7), got["tv"].nan_to_num(7))

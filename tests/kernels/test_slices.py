"""Statistics of whole rows from those of slices of their classes, against truth in long double: kernels/slices.py.

In one process; what travels between processes is test_distributed.py's.
"""

import math

import numpy as np
import pytest
import torch
import truth
from hypothesis import assume, given
from hypothesis import strategies as st

from fastood.kernels import BACKENDS, Request
from fastood.kernels.slices import PARTS, Whole, above_level, parts_for, parts_of
from fastood.kernels.statistics import FORMULAS, QUANTITIES

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def merged(f, sizes, stats, T=1.0, backend="reference"):
    """What fastood.distributed does, without its collectives."""
    chosen, request, parts = BACKENDS[backend], Request(tuple(stats), (), (), (len(stats), -1), T), parts_for(stats)
    slices = f.split(list(sizes), 1)
    M = max((s[2] for s in stats if s[0] == "gen"), default=0)
    numbers, largest = [], []
    for x in slices:
        nothing = torch.zeros(len(parts), len(f), dtype=torch.float64)
        nothing[0] = -math.inf
        numbers.append(parts_of(x, parts, request, chosen) if x.numel() else nothing)
        largest.append(x.topk(min(M, x.shape[1]), -1).values.double())
    every = torch.stack(numbers).permute(1, 2, 0)
    whole = Whole(dict(zip(parts, every, strict=True)), sizes, T, torch.cat(largest, -1))
    if "tv" in stats:
        whole.above = sum(above_level(x, T, whole.f_max, whole.level) for x in slices if x.numel())
    return {stat: whole.stat(stat) for stat in stats}


def assert_right(f, sizes, T=1.0, backend="reference", stats=FORMULAS):
    eps = truth.EPS[str(f.dtype).removeprefix("torch.")]
    result = torch.float64 if f.dtype == torch.float64 else torch.float32
    for name, got in merged(f, sizes, list(stats), T, backend).items():
        expected = truth.stat(name, f, T)
        truth.assert_close(got.to(result), expected, truth.tolerance(name, expected, f, T, eps), name)


def test_every_quantity_is_known_of_slices():
    assert set(PARTS) == set(QUANTITIES)
    assert all(x.is_log == ("log(" in x.formula) for x in FORMULAS.values())


@pytest.fixture(scope="module", params=["reference", "cpu"])
def on(request):
    if reason := BACKENDS[request.param].unusable(torch.device("cpu"), torch.float32):
        pytest.skip(f"needs the {request.param} backend: {reason}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(5, 5), (3, 0, 4, 3), (1, 1), (1,), (40, 1, 60)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 10, 1e4])
def test_random(on, sizes, scale, dtype):
    torch.manual_seed(0)
    f = torch.randn(6, sum(sizes), dtype=torch.float64) * scale
    f[1] += 7 * scale
    f[2, 0] += 50 * scale  # sure of a class of the first slice
    f[3, -1] += 50 * scale  # and of the last
    f = f.clamp(-6e4, 6e4).to(dtype)
    for T in (1.0, 0.3 * scale, 1000.0):
        assert_right(f, sizes, T, on)


@given(st.data())
def test_any(on, data):
    """Sizes, scales, temperatures, masks, equal and extreme logits."""
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    assume(sum(sizes) > 0)
    dtype = data.draw(st.sampled_from(DTYPES))
    limit = 1e4 if dtype == torch.float16 else 1e30
    kinds = st.sampled_from(["normal", "equal", "sure", "any", "near"])
    rows = []
    for kind in data.draw(st.lists(kinds, min_size=1, max_size=4)):
        random = np.random.default_rng(data.draw(st.integers(0, 99)))
        row = random.standard_normal(sum(sizes)) * 10 ** data.draw(st.integers(-6, 3))
        if kind == "equal":
            row[:] = row[0]
        elif kind == "sure":
            row[data.draw(st.integers(0, len(row) - 1))] += data.draw(st.floats(0, 300))
        elif kind == "any":
            number = st.floats(-limit, limit) | st.floats(-10, 10)
            row[:] = data.draw(st.lists(number, min_size=len(row), max_size=len(row)))
        elif kind == "near":
            row = 1 + row * 1e-6
        row[random.random(len(row)) < data.draw(st.sampled_from([0, 0, 0.3]))] = -math.inf
        rows.append(row)
    f = torch.tensor(np.array(rows)).to(dtype)
    T = data.draw(st.sampled_from([1.0, 1.0, 0.01, 30.0, 1e-10, 1e10, 1e37]))
    assert_right(f, sizes, T, on)


def test_rows_without_a_softmax(on):
    """Are NaN alone, but for energy; a slice that is masked is no such row."""
    f = torch.randn(6, 9)
    f[0] = -math.inf
    f[1, 2], f[2, 7], f[2, 1], f[3, 8] = math.nan, math.inf, -math.inf, math.nan
    f[4, :4] = -math.inf
    for sizes in [(4, 5), (4, 0, 5), (1, 3, 5), (9,)]:
        assert_right(f, sizes, backend=on)
        got = merged(f, sizes, ["energy", "msp"], backend=on)
        assert got["energy"][[0, 2]].tolist() == [-math.inf, math.inf]
        assert got["msp"].isnan().tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_rest_that_underflows(on, dtype):
    """Its logarithm is finite: of a slice's own rest, and of other slices."""
    f = torch.tensor([[0.0, 3000, 1000, 0], [3000, 0, 1000, 0], [0, 1000, 0, 3000], [0, -200, 0, 150]], dtype=dtype)
    for sizes in [(2, 2), (1, 3), (1, 1, 1, 1), (3, 0, 1)]:
        assert_right(f, sizes, backend=on)
        assert merged(f, sizes, ["log_one_minus_s2"], backend=on)["log_one_minus_s2"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("T", [1e3, 1e6, 1e10])
def test_nearly_flat(on, dtype, T):
    """To relative precision, though log C and 1 / C would round it all away; slices at one level, and apart."""
    torch.manual_seed(0)
    f = torch.randn(5, 64, dtype=dtype)
    f[1, :20] += 3
    f[2] = 1000 + f[2] / 100
    f[3] = torch.arange(64)
    f[4, :] = 5.25
    f = torch.cat([f, f])
    f[5:, 30] = -math.inf
    for sizes in [(20, 44), (20, 0, 4, 40), (1, 63)]:
        assert_right(f, sizes, T, on, ["tv", "kl_uniform"])


def test_a_flat_row_but_for_a_masked_class(on):
    """Whose TV is 1 / C, which the level must be far more exact than."""
    f = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)) * 1e-7
    f[:, 1500] = -math.inf
    for sizes in [(1000, 2000), (1500, 1, 1499)]:
        assert_right(f, sizes, 1.0, on, ["tv", "kl_uniform"])


def test_power_sums(on):
    f = torch.randn(5, 30) * 3
    f[1, 3] = 200
    for r in (0.01, 0.5, 2, 3.7):
        got = merged(f, (12, 0, 18), [("power_sum", r)], backend=on)["power_sum", r]
        expected = np.array([(truth.softmax_row(row, 1.0)[0] ** truth.LD(r)).sum() for row in truth.widen(f)])
        truth.assert_close(got.float(), expected, 1e-5 * expected)


@pytest.mark.parametrize("M", [1, 5, 25, 1000])
def test_gen(on, M):
    f = torch.randn(5, 30) * 3
    f[1, 3] = 200
    f[2, :20] = -math.inf
    f[3] = 1
    expected = truth.gen(f, 0.1, M)
    for sizes in [(12, 0, 18), (2, 28), (30,)]:
        got = merged(f, sizes, [("gen", 0.1, M)], backend=on)["gen", 0.1, M]
        truth.assert_close(got.float(), expected, 1e-5 * expected)
    assert merged(torch.randn(5, 1), (1,), [("gen", 0.1, M)], backend=on)["gen", 0.1, M].tolist() == [0] * 5


def test_what_is_not_known_of_slices():
    with pytest.raises(ValueError, match="gradient is not known of rows whose classes are split"):
        parts_for([("gradient", "uniform", 2.0, 1.0, "inside")])

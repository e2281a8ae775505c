"""The launch table (shapes.py)."""

import itertools
import math

import numpy as np
import pytest

from fastood.kernels.triton import shapes


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles(itemsize):
    for columns in [*range(1, 140), 1000, 1001, 1002, 1004, 21841, 24576]:
        for stride in (columns, columns + 1, 0):
            rows, warps, _ = shape = shapes.launch_shape(columns, 0, itemsize, 0, 0)
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
            shape = shapes.launch_shape(C, 0, itemsize, 0, 0)
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

"""Norms of gradients (device/gradient.py): every branch of a launch, order and power against truth, and bits."""

import itertools
import math

import pytest
import torch
import truth
from branches import DTYPES

from fastood import kernels
from fastood.kernels import Request, triton
from fastood.kernels.triton import shapes


def statistic(stat, f, labels=None, T=1.0):
    """One row statistic that has no name of its own in fastood.row_stats, [N]."""
    run = kernels.prepared(triton, Request((stat,), (), (), (1, -1), T), f.shape[1], 0)
    return run(f, None, labels)[0]


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

"""Norms (device/norms.py): every branch of a launch, order and size against truth, and bits."""

import math

import numpy as np
import pytest
import torch
import truth
from branches import DTYPES, with_types
from interpreter import INTERPRETED

import fastood
from fastood.kernels.triton import shapes

ORDERS = [0, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 6, math.inf]


# The lines of shapes.ROWS_OF_FEATS, the last of them for shorter rows than there, of which they make fewer turns.
@pytest.mark.parametrize(
    ("D", "dtype", "shape"),
    [(*case, None) for case in with_types([1, 7, 64, 139], long=[2052])]
    + [(260, torch.float16, (1, 1)), (520, torch.bfloat16, (1, 2)), (1031, torch.float32, shapes.LONG_ROWS)],
    ids=str,
)
def test_norms_on_every_branch(triton_device, monkeypatch, new_programs, D, dtype, shape):
    if shape is not None:
        monkeypatch.setattr(shapes, "ROWS_OF_FEATS", {D: shape})
    rng = np.random.default_rng(D)
    bias = D % 2 == 0
    x = np.maximum(rng.standard_normal((6, D)), 0) * [[1.0], [1e3], [1e-4], [1.0], [1.0], [1e-4]]
    x[3] = 0
    x[4, 0] = 6e4  # its sixth power is beyond float32
    if dtype != torch.float16:
        x[[2, 5]] *= 1e-38  # subnormals
    x[5, -1] = np.inf
    h = torch.from_numpy(x).to(dtype)
    for log in (False, True):
        got = fastood.norms(h.to(triton_device), ORDERS, bias=bias, log=log, backend="triton").cpu()
        for j, r in enumerate(ORDERS):
            expected, allowed = truth.norm_and_error(h, r, truth.EPS["float32"], bias, log)
            truth.assert_close(got[:, j], expected, allowed, f"||h||_{r}, log={log}")


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


@pytest.mark.parametrize(("D", "dtype"), with_types([5, 37, 132, 139]), ids=str)
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
        for bias, log in ((False, False), (True, True)):
            got = fastood.norms(h.to(triton_device), orders, bias=bias, log=log, backend="triton").cpu()
            for j, r in enumerate(orders):
                expected, allowed = truth.norm_and_error(h, r, truth.EPS["float32"], bias, log)
                truth.assert_close(got[:, j], expected, allowed, f"||h||_{r}, D={D} bias={bias} log={log}")

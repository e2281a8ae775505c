"""2^x, log2 x and what is made of them, number by number: the bounds that elementary.h states."""

import math

import numpy as np
import pytest
import torch
import truth

import fastood
from fastood.kernels.cpu import _native
from fastood.kernels.statistics import UNSCALED


def of_vector(function, x):
    out = np.empty_like(x)
    function(x.ctypes.data, out.ctypes.data, len(x))
    return out


def test_exp2_error_bound(isa):
    """2^x within 2 units of 2^-24, over the normal exponents; 0 below."""
    x = np.concatenate([np.linspace(-126, 127, 400_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    expected = np.exp2(x.astype(np.longdouble))
    error = np.abs(of_vector(_native.exp2f, x) - expected) / expected
    assert error.max() < 2 * 2**-24
    special = np.array([0, 1, -1, 10, -126, 127, -127, -1e30, -np.inf], np.float32)
    wanted = [1, 2, 0.5, 1024, 2.0**-126, 2.0**127, 0, 0, 0]
    assert of_vector(_native.exp2f, special).tolist() == wanted


def test_log2_error_bound(isa):
    """log2 x within 2^-23.3 absolute beyond the rounding of the sum, subnormals included; exact at powers of two."""
    mantissas = np.linspace(0.5, 2, 200_001)
    x = np.concatenate([mantissas, mantissas * 1e30, mantissas * 1e-30, mantissas * 1e-41]).astype(np.float32)
    expected = np.log2(x.astype(np.longdouble))
    error = np.abs(of_vector(_native.log2f, x) - expected) - np.abs(expected) * 2**-24
    assert error.max() < 2**-23.3
    powers = 2.0 ** np.arange(-149, 128)
    assert of_vector(_native.log2f, powers.astype(np.float32)).tolist() == list(range(-149, 128))


def test_exponential_error_bound(isa):
    """exp(z) within 4 + 2 |z| units of 2^-24, from 1 - p_max of two classes."""
    z = np.linspace(0, 100, 100_001)
    f = torch.from_numpy(np.stack([np.zeros_like(z), -z], 1)).float()
    e = np.exp(truth.widen(f)[:, 1])
    expected = e / (1 + e)
    wide = torch.nn.functional.pad(f, (0, 100), value=-math.inf)  # a row over several vectors rather than in a lane
    for x in (f, wide):
        got = fastood.row_stats(x, ["one_minus_msp"], backend="cpu")["one_minus_msp"]
        truth.assert_close(got, expected, (4 + 2 * z) * 2**-24 * expected)


@pytest.mark.parametrize("r", [0.05, 0.1, 0.3, 0.5, UNSCALED])
def test_power_error_bound(isa, r):
    """|h|^r within 8 units of 2^-24 over the normal floats, of single features: nothing averages out."""
    rng = np.random.default_rng(0)
    h = np.concatenate(
        [rng.uniform(1, 2, 50_000) * 2.0 ** rng.integers(-126, 127, 50_000), 2.0 ** np.arange(-126, 128)]
    )
    h = torch.from_numpy(h).float()[:, None]
    got = fastood.norms(h, [r], log=True, backend="cpu")[:, 0].double().numpy()
    expected = np.log(truth.widen(h)[:, 0])
    # log ||h||_r = (log |h|^r) / r comes as float32
    assert (np.abs(got - expected) * r <= 8 * 2**-24 + r * np.abs(expected) * 2**-24).all()


def test_products_of_powers_error_bound(isa):
    """Orders that are sums of others: 0.8 = 0.3 + 0.5, 0.4 = 0.1 + 0.3."""
    rng = np.random.default_rng(1)
    h = torch.from_numpy(rng.uniform(1, 2, 20_000) * 2.0 ** rng.integers(-100, 100, 20_000)).float()[:, None]
    orders = [0.8, 0.5, 0.1, 0.4, 0.3]
    got = fastood.norms(h, orders, backend="cpu")
    for j, r in enumerate(orders):
        expected = truth.norm(h, r)
        truth.assert_close(got[:, j], expected, truth.norm_tolerance(h, r, 2**-24) * expected, f"r={r}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_is_read_right(isa, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = bits[:, None]
    got = fastood.row_stats(x, ["energy", "fmax"], backend="cpu")
    number = x.float()[:, 0]  # the energy of its class alone; a row of it has no softmax where it is infinite
    for name, expected in (("energy", number), ("fmax", torch.where(number.isinf(), math.nan, number))):
        torch.testing.assert_close(got[name], expected, rtol=0, atol=0, equal_nan=True)
    got = fastood.norms(x, [math.inf], backend="cpu")[:, 0]
    torch.testing.assert_close(got, number.abs(), rtol=0, atol=0, equal_nan=True)

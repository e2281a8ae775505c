"""BatchGrad (device/batchgrad.py): every branch of a launch against truth, and bits."""

import math

import pytest
import torch
import truth
from branches import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from samples import KINDS, rows_of

import fastood
from fastood.kernels.triton import shapes


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
    monkeypatch.setattr(shapes, "BATCHGRAD_BLOCKS", {0: shapes.BATCHGRAD_OF_FEW})
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
    # The sum of G is beyond float32, and so is the score, though one class counts it 0 times.
    h = torch.tensor([[1.0], [-1], [0], [math.nan]]).expand(4, 40)
    for g in (3e38, -3e38):
        got = batchgrad(triton_device, sure.expand(4, 2), h, torch.full((2, 40), g))
        assert got[:3].isinf().all()
        assert got[3].isnan()


@given(
    seed=st.integers(0, 2**32 - 1),
    C=st.sampled_from([1, 2, 9]),
    D=st.sampled_from([1, 3, 257]),
    kind=st.sampled_from(KINDS),
    T=st.sampled_from([1e-10, 1.0, 1e10, 1e-40]),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    signed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_batchgrad_is_infinite_where_a_feature_is(triton_device, seed, C, D, kind, T, bad, signed, dtype):
    g = torch.Generator().manual_seed(seed)
    f, h, G = rows_of(kind, g, 4, C), torch.randn(4, D, generator=g), torch.randn(C, D, generator=g)
    f, h = f.to(dtype), (h if signed else h.abs()).to(dtype)
    good = batchgrad(triton_device, f, h, G, temperature=T)
    assert not good.isnan().any()
    h[1, seed % D], h[2, seed % D] = bad, bad
    h[2, -1], f[3, seed % C] = math.nan, math.nan
    got = batchgrad(triton_device, f, h, G, temperature=T)
    assert torch.equal(got[0], good[0])
    assert got[1].isnan() if math.isnan(bad) else got[1] == math.inf
    assert got[2:].isnan().all()

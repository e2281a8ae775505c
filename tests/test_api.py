"""What callers see: kinds and devices of results, defaults, orientation, errors, the seam with PyTorch."""

import enum
import inspect
import io
import itertools
import math
import os
import shutil
import subprocess
import sys
import types
import typing
import warnings

import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st

import fastood
from fastood import _plan, kernels
from fastood.kernels import Run

F = torch.tensor([[4.0, 0.0, 1.0], [0.2, 0.1, 0.0]])
H = torch.tensor([[3.0, -4.0], [1.0, 0.0]])
V_TERMS = ["msp", "energy", "varsum", "tv", "max_logit", "neg_entropy", "kl_uniform", "gen"]


# ---- one score, many scores, the sweep


def test_default_is_energy_alone_or_times_norm_03():
    energy = truth.stat("energy", F)
    truth.assert_close(fastood.score(F), energy, 1e-6)
    truth.assert_close(fastood.score(F, H), energy * truth.norm(H, 0.3), 1e-4)
    truth.assert_close(fastood.score(F, H, norm=None), energy, 1e-6)
    truth.assert_close(fastood.score(None, H, "norm"), truth.norm(H, 0.3), 1e-4)
    truth.assert_close(fastood.score(None, H, "norm", norm=math.inf), truth.norm(H, math.inf), 0)


def test_a_v_that_is_never_above_0_is_multiplied_only_where_asked():
    for name in ("neg_entropy", "gen"):
        alone = fastood.score(F, method=name)
        assert torch.equal(fastood.score(F, H, name), alone)
        assert torch.equal(fastood.scores(F, H)[name], alone)
        assert torch.equal(fastood.scores(F, H, [name, "msp"], norm=2)[name], fastood.score(F, H, name, norm=2))
        truth.assert_close(fastood.score(F, H, name, norm=2), truth.widen(alone) * truth.norm(H, 2), 1e-5)
    assert [e.name for e in fastood.SCORES.values() if e.multiplied] == [
        *(name for name in V_TERMS if name not in ("neg_entropy", "gen")), "norm"
    ]  # fmt: skip


@pytest.mark.parametrize("higher", ["in", "out"])
@pytest.mark.parametrize("positive", [True, False])
def test_a_larger_norm_never_lowers_a_score_of_ones_own_by_default(higher, positive):
    """V = +-MSP: the same features twice as large do not make a row less in-distribution."""
    factor = 1.0 if positive else -1.0
    own = fastood.Score("own", "+-max p", "mine", higher, stats=("msp",), v=(factor,), positive=positive)
    try:
        fastood.register(own)
        once, twice = fastood.score(F, H, "own"), fastood.score(F, 2 * H, "own")
        assert (twice >= once).all()
        assert (twice > once).all() == own.multiplied == (positive == (higher == "in"))
    finally:
        fastood.SCORES.pop("own", None)


def test_every_documented_method_is_registered():
    assert set(fastood.SCORES) == {
        *V_TERMS, "norm", "gradnorm", "exgrad", "eg_u_l1", "eg_u_l2sq", "eg_p_l2sq", "eg_p_logp_l2sq", "norm_eg_p_l2sq"
    }  # fmt: skip


def test_higher_means_in_distribution():
    """A confident row with large features against a flat one with small features: every score agrees on who is in.

    (But for a score that cannot tell: the zero row. For E_p rows the norms are equal, or U would decide.)
    """
    f = torch.tensor([[9.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    same_norm = torch.ones(2, 4)
    for name in fastood.SCORES:
        feats = torch.tensor([[2.0] * 4, [1.0] * 4]) if name in ("norm", "eg_u_l1") else same_norm
        inside, outside = fastood.score(f, feats, name)
        if name == "norm_eg_p_l2sq":
            assert inside == outside == 0
        else:
            assert inside > outside, name
        raw_in, raw_out = fastood.score(f, feats, name, oriented=False)
        if fastood.SCORES[name].higher == "out":
            assert (raw_in, raw_out) == (-inside, -outside)
            assert raw_in < raw_out
        else:
            assert (raw_in, raw_out) == (inside, outside)


@given(
    seed=st.integers(0, 2**32 - 1),
    C=st.sampled_from([2, 3, 10, 100, 101, 1000]),
    D=st.sampled_from([1, 2, 64, 512]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
    lowest=st.sampled_from([0.0, 1.0, 30.0]),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_a_larger_margin_and_larger_features_are_in_distribution_by_default(seed, C, D, spread, lowest, size):
    """Every score, by its default arguments, has an AUROC above 1/2. What is assumed of the data:

    An in-distribution row is an OOD one whose largest logit was raised and whose features were scaled up. If each is
    scored above the row that it was made of, no two of them lose to each other's origins, so the AUROC is above 1/2.
    - The largest logit of the OOD row is not negative, and so neither is energy: else a larger norm lowers it.
    - The raise is log C + 2 or more, so that max p passes 0.88: GEN counts the M largest p alone, of which a small
      raise in a flat row makes more.
    - The features are up to 1.5 times as large: E_p's gradients, turned, fall with the norm, and 1 - S_2 must outweigh
      it, which the raise makes at least 4 times smaller.
    """
    g = torch.Generator().manual_seed(seed)
    n = 16
    f_out = torch.randn(n, C, generator=g) * spread
    f_out = f_out - f_out.amax(1, keepdim=True) + lowest + torch.rand(n, 1, generator=g)
    h_out = torch.randn(n, D, generator=g) * size
    top = f_out.argmax(1, keepdim=True)
    f_in = f_out.scatter_add(1, top, math.log(C) + 2 + torch.rand(n, 1, generator=g))
    h_in = h_out * (1.1 + 0.4 * torch.rand(n, 1, generator=g))
    for feats_in, feats_out in ((h_in, h_out), (None, None)):
        all_in, all_out = fastood.scores(f_in, feats_in), fastood.scores(f_out, feats_out)
        for name in all_in:
            one_in, one_out = fastood.score(f_in, feats_in, name), fastood.score(f_out, feats_out, name)
            for inside, outside in ((all_in[name], all_out[name]), (one_in, one_out)):
                won, tied = inside[:, None] > outside, inside[:, None] == outside
                auroc = (won.sum() + tied.sum() / 2).item() / n**2
                if name == "norm_eg_p_l2sq":  # the zero row, which tells nothing from nothing
                    assert auroc == 0.5
                else:
                    assert auroc > 0.5, name


def test_scores_are_score_by_name():
    for options in (
        {},
        {"norm": 2},
        {"norm": None},
        {"temperature": 0.5, "bias": True, "oriented": False},
        {"gamma": 1.0},
    ):
        got = fastood.scores(F, H, list(fastood.SCORES) if options.get("norm", 1) is not None else V_TERMS, **options)
        for name, value in got.items():
            own = {k: v for k, v in options.items() if k in ("temperature", "bias", "oriented")}
            if name == "gen":
                own |= {k: v for k, v in options.items() if k == "gamma"}
            if fastood.SCORES[name].gradient is None:
                own |= {k: v for k, v in options.items() if k == "norm"}
            assert torch.equal(value, fastood.score(F, H, name, **own)), name


def test_scores_without_names_are_all_that_the_inputs_allow():
    assert list(fastood.scores(F)) == V_TERMS
    assert list(fastood.scores(F, H)) == list(fastood.SCORES)
    assert list(fastood.scores(None, H)) == ["norm"]
    positive = [name for name in fastood.SCORES if name not in ("neg_entropy", "gen", "eg_p_logp_l2sq")]
    assert list(fastood.scores(F, H, log=True)) == positive


def test_sweep_is_score_by_cell():
    v, norms = ["msp", "gen", "energy"], [None, 0, 0.3, 1, math.inf]
    grid = fastood.sweep(F, H, v, norms, temperature=2.0, bias=True, M=2)
    assert grid.shape == (2, 3, 5)
    for i, name in enumerate(v):
        for j, r in enumerate(norms):
            params = {"M": 2} if name == "gen" else {}
            cell = fastood.score(F, H, name, norm=r, temperature=2.0, bias=True, **params)
            assert torch.equal(grid[:, i, j], cell)
    logs = fastood.sweep(F, H, log=True)
    torch.testing.assert_close(logs, fastood.sweep(F, H).log(), rtol=1e-5, atol=1e-6)


def test_log_of_a_gradient_score():
    for name in ("gradnorm", "exgrad", "eg_u_l2sq", "eg_p_l2sq"):
        raw = fastood.score(F, H, name, temperature=0.7, oriented=False)
        got = fastood.score(F, H, name, temperature=0.7, oriented=False, log=True)
        torch.testing.assert_close(got, raw.log())
        sign = -1 if fastood.SCORES[name].higher == "out" else 1
        assert torch.equal(fastood.score(F, H, name, temperature=0.7, log=True), sign * got)


def test_logs_where_the_score_itself_underflows():
    sure, ones = torch.tensor([[800.0, 0.0, -10.0]]), torch.ones(1, 1)
    expected = math.log(4) - 800 + math.log1p(math.exp(-10))
    for backend in (name for name, status in fastood.backends().items() if status.usable):
        got = fastood.score(sure, ones, "exgrad", log=True, oriented=False, backend=backend)
        assert got.item() == pytest.approx(expected, rel=1e-6)
        got = fastood.score(sure / 100, ones, "eg_p_l2sq", temperature=0.01, log=True, backend=backend)
        assert got.item() == pytest.approx(-(expected - math.log(2) - 2 * math.log(0.01)), rel=1e-6)


def test_names_may_be_members_of_an_enum():
    class Name(str, enum.Enum):  # noqa: UP042 - whose str() is not its value
        TV = "tv"

    expected = fastood.score(F, method="tv")
    assert torch.equal(fastood.score(F, method=Name.TV), expected)
    assert torch.equal(fastood.scores(F, methods=[Name.TV])["tv"], expected)
    truth.assert_close(fastood.row_stats(F, [Name.TV])["tv"], truth.stat("tv", F), 1e-6)


# ---- kinds, types, devices


def test_numpy_in_numpy_out():
    f, h = F.numpy(), H.numpy()
    for got, same in [
        (fastood.score(f, h), fastood.score(F, H)),
        (fastood.sweep(f, h), fastood.sweep(F, H)),
        (fastood.norms(h, [1]), fastood.norms(H, [1])),
        (fastood.scores(f, methods=["tv"])["tv"], fastood.score(F, method="tv")),
        (fastood.row_stats(f)["lse"], fastood.row_stats(F)["lse"]),
        (fastood.row_stats(f)["log_one_minus_s2"], fastood.row_stats(F)["log_one_minus_s2"]),
        (fastood.gradient_norm(f, h), fastood.gradient_norm(F, H)),
    ]:
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.float32
        assert np.array_equal(got, same.numpy())
    assert fastood.score(f.astype(np.float64)).dtype == np.float64
    assert fastood.score(f.astype(np.float16)).dtype == np.float32


def test_numpy_arrays_of_every_layout(tmp_path):
    expected = fastood.score(F).numpy()
    np.save(tmp_path / "f.npy", F.numpy())
    read_only = np.load(tmp_path / "f.npy", mmap_mode="r")
    swapped = F.numpy().astype(">f4")
    odd = np.zeros((2, 3), dtype=[("x", "i1"), ("f", "<f4")])
    odd["f"] = F.numpy()
    for array in (
        read_only,
        swapped,
        F.numpy()[::-1][::-1],
        np.asfortranarray(F.numpy()),
        odd["f"],
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_allclose(fastood.score(array), expected, rtol=1e-6)
    assert (read_only == F.numpy()).all()


@pytest.mark.parametrize("fields", [[("x", "i1"), ("f", "<f4")], [("x", "i1"), ("f", "<f4"), ("y", "i1", 3)]])
def test_numpy_arrays_of_one_row_or_one_column(fields):
    """A stride along an axis of length 1 means nothing, and may be anything; nor need memory be aligned."""
    records = np.zeros((3, 4), dtype=fields)
    records["f"] = np.arange(12).reshape(3, 4)
    for array in (records["f"], np.arange(12, dtype=np.float32).reshape(3, 4)):
        for rows in (slice(1), slice(0, None, 2), slice(None)):
            for columns in (slice(1), slice(None)):
                part = array[rows, columns]
                for view in (part, part[::-1], part[:, ::-1], part[::-1, ::-1]):
                    expected = fastood.score(torch.from_numpy(view.copy()))
                    assert np.array_equal(fastood.score(view), expected.numpy())


def test_inputs_are_left_as_they_were():
    f, h = torch.randn(5, 7), torch.randn(5, 3)
    before = f.clone(), h.clone()
    fastood.scores(f, h)
    fastood.sweep(f, h)
    fastood.gradient_norm(f, h, "predicted", expectation="outside")
    assert torch.equal(f, before[0])
    assert torch.equal(h, before[1])


def test_half_types_give_float32_of_the_upcast_input():
    for dtype in (torch.float16, torch.bfloat16):
        f, h = F.to(dtype), H.to(dtype)
        assert torch.equal(fastood.score(f, h), fastood.score(f.float(), h.float()))
        assert fastood.score(f, h.double()).dtype == torch.float64


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", FP8)
def test_every_number_of_fp8_is_read_as_it_is(dtype):
    """All 256 of them, by what their sign, exponent and mantissa say."""
    byte = np.arange(256)
    bits = 2 if "e5m2" in str(dtype) else 3
    no_zero = "uz" in str(dtype)
    exponent, mantissa = (byte & 127) >> bits, byte % 2**bits / 2**bits
    bias = 2 ** (6 - bits) - 1 + no_zero
    x = np.ldexp((exponent > 0) + mantissa, np.maximum(exponent, 1) - bias)
    if dtype is torch.float8_e4m3fn:
        x[byte & 127 == 127] = math.nan
    elif not no_zero:
        x[exponent == 31] = np.where(mantissa[exponent == 31] == 0, math.inf, math.nan)
    x[byte > 127] *= -1
    x[128] = math.nan if no_zero else 0
    got = fastood.row_stats(torch.arange(256, dtype=torch.uint8).view(dtype)[:, None], ["energy"])["energy"]
    np.testing.assert_array_equal(got, x.astype(np.float32))


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_gives_float32_of_the_same_numbers(dtype):
    f, h, q = (F * 3).to(dtype), H.to(dtype), torch.eye(*F.shape).to(dtype)
    wide, classes = [x.float() for x in (f, h, q)], torch.arange(len(F)) % F.shape[1]
    calls = {
        "score": lambda f, h, q: fastood.score(f, h, "exgrad"),
        "scores": lambda f, h, q: torch.stack([*fastood.scores(f, h).values()]),
        "scores of a wider type": lambda f, h, q: fastood.score(f, h.double()),
        "sweep": lambda f, h, q: fastood.sweep(f, h),
        "norms": lambda f, h, q: fastood.norms(h, [0.3, 2, math.inf]),
        "row_stats": lambda f, h, q: fastood.row_stats(f, ["tv"])["tv"],
        "gradient_norm": lambda f, h, q: fastood.gradient_norm(f, h, q, 2),
        "anchor_gradient": lambda f, h, q: fastood.anchor_gradient(f, h, classes),
        "BatchGrad": lambda f, h, q: fastood.BatchGrad(torch.ones(f.shape[1], h.shape[1])).score(f, h),
        "G": lambda f, h, q: fastood.batchgrad(f, h, torch.ones(f.shape[1], h.shape[1]).to(h.dtype)),
        "reference": lambda f, h, q: fastood.score(f, h, "gradnorm", backend="reference"),
        "strides": lambda f, h, q: fastood.score(f[::2, 1:], h[::2, ::2]),
        "columns": lambda f, h, q: fastood.score(f.T),
        "none": lambda f, h, q: fastood.score(f[:0], h[:0]),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*classes have no anchor")
        for name, call in calls.items():
            got, expected = call(f, h, q), call(*wide)
            assert got.dtype == expected.dtype, name
            assert torch.equal(got, expected), name
    for detector in (
        fastood.Detector(per_class=True, tpr=0.5),
        fastood.Detector("norm", norm=2, per_class=True, tpr=0.5),
    ):
        rows = f.view(torch.uint8).repeat(9, 1).view(dtype), h.view(torch.uint8).repeat(9, 1).view(dtype)
        labels = rows[0].float().argmax(1)
        assert torch.equal(detector.fit(*rows, labels).accept(f, h), detector.accept(*wide[:2]))


def test_fp8_grows_and_compiles():
    f, h = F.to(torch.float8_e5m2).requires_grad_(), H.to(torch.float8_e5m2)
    wide = f.detach().float().requires_grad_()
    for x in (f, wide):
        fastood.score(x, h).sum().backward()
    torch.testing.assert_close(f.grad.float(), wide.grad, rtol=2**-3, atol=2**-17)  # rounded to the type of f
    torch._dynamo.reset()
    compiled = torch.compile(fastood.score, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(f.detach(), h), fastood.score(f.detach(), h))


@given(
    shape=st.sampled_from([(0, 3), (1, 1), (1, 3), (3, 1), (2, 3)]),
    steps=st.tuples(st.sampled_from([1, -1, 2, -2]), st.sampled_from([1, -1, 2, -2])),
    dtype=st.sampled_from(["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"]),
    padding=st.integers(0, 3),
    order=st.sampled_from("CF"),
    read_only=st.booleans(),
)
def test_numpy_strides_of_every_kind(shape, steps, dtype, padding, order, read_only):
    """Steps of either sign, of an axis of any length, in records of any width: what numpy holds is what is scored."""
    whole = tuple(2 * n for n in shape)
    fields = [("before", f"V{padding}"), ("f", dtype)] if padding else [("f", dtype)]
    records = np.zeros(whole, dtype=fields, order=order)
    records["f"] = np.random.default_rng(0).standard_normal(whole)
    f = records["f"][:: steps[0], :: steps[1]][: shape[0], : shape[1]]
    f.flags.writeable = not read_only
    plain = np.array(f, dtype=f.dtype.newbyteorder("="), order="C", copy=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(fastood.score(f), fastood.score(plain))
        assert np.array_equal(fastood.norms(f, [2]), fastood.norms(plain, [2]))


def test_modes():
    expected = fastood.score(F, H)
    with torch.no_grad():
        assert torch.equal(fastood.score(F, H), expected)
    with torch.inference_mode():
        assert torch.equal(fastood.score(F, H), expected)
        assert torch.equal(fastood.score(F.clone(), H.clone()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fastood.score(F, H), expected)
        anchors = F[[0, 1, 1]], H[[0, 1, 1]], torch.arange(3)
        G = fastood.anchor_gradient(*anchors)
    assert torch.equal(G, fastood.anchor_gradient(*anchors))


# ---- autograd and tracing


@pytest.mark.parametrize("name", list(fastood.SCORES))
def test_gradients_are_right(name):
    torch.manual_seed(0)
    f = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    h = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for r in (0.3, 0.5, 1, 1.5, 2, 3, 7.5, math.inf):
        if fastood.SCORES[name].gradient is None:
            torch.autograd.gradcheck(lambda f, h, r=r: fastood.score(f, h, name, norm=r, temperature=0.7), (f, h))
    if fastood.SCORES[name].gradient:
        torch.autograd.gradcheck(lambda f, h: fastood.score(f, h, name, bias=True), (f, h))


def test_gradients_at_masked_logits_and_zero_features():
    f = torch.tensor([[1.0, -math.inf, 0.5]], dtype=torch.float64, requires_grad=True)
    h = torch.tensor([[0.0, 2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    for name in ("msp", "energy", "varsum", "tv", "neg_entropy", "gen"):
        for r in (0.3, 0.5, 1, 2, 3):
            g = torch.autograd.grad(fastood.score(f, h, name, norm=r).sum(), (f, h))
            assert all(x.isfinite().all() for x in g), (name, r)
            assert g[0][0, 1] == 0
    zeros = torch.zeros(1, 3, requires_grad=True)
    for r in (0.3, 1, 2, 3):
        assert torch.autograd.grad(fastood.norms(zeros, [r]).sum(), zeros)[0].eq(0).all()


@pytest.mark.parametrize("f", [[[3.0, -math.inf, -math.inf]], [[3.0]], [[3.0, 3.0, -math.inf]]])
def test_a_row_of_one_class_has_finite_gradients(f):
    """GEN and the E_p rows, and the logarithms of these: of a row of one class, which is 0 whatever its logit is, 0."""
    torch._dynamo.reset()  # which counts compilations of one function
    h = torch.ones(1, 2)
    alone = sum(x > -math.inf for x in f[0]) == 1
    for dtype in (torch.float32, torch.float64):
        for name, log in [("gen", False), *itertools.product(("exgrad", "eg_p_l2sq"), (False, True))]:
            logits = torch.tensor(f, dtype=dtype, requires_grad=True)
            got = fastood.score(logits, h, name, log=log)
            assert torch.equal(got, fastood.score(logits.detach(), h, name, log=log)) or not alone
            (slope,) = torch.autograd.grad(got.sum(), logits)
            assert slope.isfinite().all(), (name, log)
            assert not alone or slope.eq(0).all(), (name, log)
            if log:
                compiled = torch.compile(fastood.score, fullgraph=True, backend="eager")
                assert got.item() == compiled(logits.detach(), h, name, log=True).item()


@pytest.mark.parametrize("name", list(fastood.SCORES))
def test_every_score_compiles_whole_for_any_shape(name):
    torch._dynamo.reset()  # which counts compilations of one function
    compiled = torch.compile(lambda f, h: fastood.score(f, h, name), fullgraph=True, dynamic=True, backend="eager")
    for n, C, D in ((4, 7, 5), (3, 9, 2)):
        f, h = torch.randn(n, C), torch.randn(n, D)
        torch.testing.assert_close(compiled(f, h), fastood.score(f, h, name), rtol=1e-5, atol=1e-6)


def test_numbers_may_be_inputs_of_a_graph():
    def grid(norm, temperature, gamma, M):
        return fastood.sweep(F, H, ["gen", "msp"], [None, norm], temperature=temperature, gamma=gamma, M=M)

    torch._dynamo.reset()
    compiled = torch.compile(grid, fullgraph=True, dynamic=True, backend="eager")
    for numbers in ((2, 1.0, 0.1, 100), (0.3, 0.7, 0.5, 2)):
        torch.testing.assert_close(compiled(*numbers), grid(*numbers), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    torch.__version__ < "2.9", reason="needs torch 2.9: the format that 2.8 exports to has no infinite constants"
)
@pytest.mark.parametrize("options", [{}, {"norm": None}, {"norm": 2, "log": True}, {"method": "exgrad"}])
def test_exported_program_needs_no_fastood(options):
    class Served(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(6, 4)

        def forward(self, h):
            return fastood.score(self.head(h), h, **options)

    torch.manual_seed(0)
    model, h = Served().eval(), torch.randn(5, 6)
    batch = {"h": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (h,), dynamic_shapes=batch)
    for n in (2, 5, 9):
        rows = torch.randn(n, 6)
        torch.testing.assert_close(program.module()(rows), model(rows), rtol=1e-5, atol=1e-5)
    file = io.BytesIO()
    torch.export.save(program, file)
    load = "import io, sys, torch; torch.export.load(io.BytesIO(sys.stdin.buffer.read()))"
    alone = f"{load}; assert 'fastood' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", alone], input=file.getvalue(), check=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in its compiler
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_aot_compiled_package_needs_no_fastood(tmp_path):
    """What runs in a process without Python (AOTInductor): no operator of ours may be in it."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++, which AOTInductor compiles with")
    served = torch.nn.Module()
    served.forward = lambda f, h: fastood.score(f, h)
    f, h = torch.randn(5, 4), torch.randn(5, 6)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(served, (f, h), dynamic_shapes={"f": batch, "h": batch})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "score.pt2"))
    rows = torch.randn(9, 4), torch.randn(9, 6)
    torch.save((*rows, fastood.score(*rows)), tmp_path / "rows.pt")
    code = """
import sys, torch
f, h, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(f, h), expected, rtol=1e-5, atol=1e-5)
assert "fastood" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, package, tmp_path / "rows.pt"], check=True)


# ---- errors


class Frame:
    """A data frame, as far as errors go."""

    def to_numpy(self):
        return F.numpy()


class Table:
    """An Arrow table."""

    def __array__(self, dtype=None, copy=None):
        return F.numpy()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"logits": [[1.0, 2.0]]}, TypeError, "logits must be a torch tensor or a numpy array, got list"),
        ({"logits": None}, ValueError, "logits must be given: energy = T log"),
        ({"logits": F[0]}, ValueError, r"logits must be 2-D.*got shape \[3\]; a single row is logits\[None\]"),
        ({"logits": F[None]}, ValueError, r"logits must be 2-D.*got shape \[1, 2, 3\]"),
        ({"logits": F.long()}, TypeError, "logits must be float16.*got torch.int64"),
        ({"logits": F.to(torch.complex64)}, TypeError, "logits must be float16.*got torch.complex64"),
        ({"logits": F.abs().to(torch.float8_e8m0fnu)}, TypeError, "float64 or FP8 .*got torch.float8_e8m0fnu"),
        ({"logits": F.numpy().astype(int)}, TypeError, "logits must be float16.*got torch.int64"),
        ({"logits": F.numpy().astype(np.longdouble)}, TypeError, "logits must hold float16.*got numpy .*128"),
        ({"logits": F.numpy().astype(str)}, TypeError, "logits must hold float16.*got numpy <U"),
        ({"logits": F.to_sparse()}, TypeError, r"logits must be a dense tensor, got torch\.sparse_coo"),
        ({"logits": F[:, :0]}, ValueError, r"logits must have at least one class, got shape \[2, 0\]"),
        ({"feats": H[:1]}, ValueError, r"feats must have the 2 rows of logits, got shape \[1, 2\]"),
        ({"feats": H.numpy()}, TypeError, "logits is a torch tensor, feats is a numpy array"),
        ({"feats": H.to("meta")}, ValueError, "feats must be on the device of logits, cpu, got meta"),
        ({"feats": H.int()}, TypeError, "feats must be float16.*got torch.int32"),
        ({"feats": None, "norm": 1}, ValueError, "feats must be given for norm=1"),
        ({"feats": None, "method": "gradnorm"}, ValueError, "feats must be given: gradnorm = "),
        ({"logits": F[None, None]}, ValueError, r"logits.movedim\(1, -1\).flatten\(0, -2\)"),
        (
            {"logits": F.numpy()[None, None]},
            ValueError,
            r"np.moveaxis\(logits, 1, -1\).reshape\(-1, logits.shape\[1\]\)",
        ),
        ({"logits": Frame()}, TypeError, r"got Frame; logits.to_numpy\(\) is one"),
        ({"logits": Table()}, TypeError, r"got Table; np.asarray\(logits\) is one"),
        ({"feats": np.ma.masked_array(H.numpy())}, TypeError, r"feats must not be a masked array: .*filled\(\)"),
        ({"method": "enrgy"}, ValueError, "method must be one of 'msp', .*got 'enrgy': did you mean 'energy'?"),
        ({"method": "MSP"}, ValueError, "got 'MSP': did you mean 'msp'?"),
        ({"method": "nearest"}, ValueError, "got 'nearest'$"),
        ({"temprature": 2}, TypeError, "nor a parameter of energy: did you mean 'temperature'?"),
        ({"method": "gradnorm", "norm": 2}, ValueError, "norm: gradnorm = .* has a norm of its own, got norm=2"),
        ({"method": "norm", "norm": None}, ValueError, "norm must be an order r >= 0 for 'norm', got None"),
        ({"norm": -1}, ValueError, "norm must be a number >= 0, got -1.0"),
        ({"norm": math.nan}, ValueError, "norm must be a number >= 0, got nan"),
        ({"norm": "0.3"}, TypeError, "norm must be a number, None or 'auto', got '0.3'"),
        ({"norm": True}, TypeError, "norm must be a number, got bool"),
        ({"temperature": 0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": -2.0}, ValueError, "temperature must be a finite number > 0, got -2.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite number > 0, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be a finite number > 0, got inf"),
        ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
        ({"method": "neg_entropy", "log": True}, ValueError, "log: neg_entropy is never above 0"),
        ({"backend": "cuda"}, ValueError, r"backend \(or FASTOOD_BACKEND\) must be 'auto' or one of .*, got 'cuda'"),
        ({"gama": 0.1}, TypeError, "gama: no such argument, nor a parameter of energy$"),
        ({"gama": 0.1, "method": "gen"}, TypeError, "nor a parameter of gen: did you mean 'gamma'?"),
        ({"method": "gen", "gamma": 0}, ValueError, "gamma must be a finite number > 0, got 0.0"),
        ({"method": "gen", "M": 2.5}, ValueError, "M must be a whole number of classes, got 2.5"),
        ({"method": "gen", "M": 0}, ValueError, "M must be a finite number >= 1, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        fastood.score(**{"logits": F, "feats": H, **arguments})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fastood.sweep(F, H, v="energy"), TypeError, "v must be a list, got 'energy'"),
        (lambda: fastood.sweep(F, H, v=["gradnorm"]), ValueError, "v must name V terms"),
        (lambda: fastood.sweep(F, H, v=[]), ValueError, "v must not be empty"),
        (lambda: fastood.sweep(F, H, norms=[]), ValueError, "norms must not be empty"),
        (lambda: fastood.sweep(F, None), ValueError, "feats must be given for norm=0"),
        (lambda: fastood.scores(F, methods="msp"), TypeError, "methods must be a list, got 'msp'"),
        (lambda: fastood.scores(F, methods=5), TypeError, "methods must be a list, got 5"),
        (lambda: fastood.scores(F, methods=["x"]), ValueError, "methods must be one of 'msp'"),
        (lambda: fastood.scores(None, None), TypeError, "logits must be a torch tensor or a numpy array, got None"),
        (lambda: fastood.sweep(F, H, norms=0.3), TypeError, "norms must be a list, got 0.3"),
        (lambda: fastood.norms(H, 2), TypeError, "orders must be a list, got 2"),
        (lambda: fastood.row_stats(F, "msp"), TypeError, "stats must be a list, got 'msp'"),
        (lambda: fastood.row_stats(F, [5]), ValueError, "stats must be one of 'fmax'.*got 5"),
        (lambda: fastood.score(F, method=np.array(["msp"])), ValueError, "method must be one of 'msp'"),
        (
            lambda: fastood.gradient_norm(F, H, torch.tensor([1, 2])),
            ValueError,
            r"labels must be \[2, 3\], a distribution per row, got \[2\]; .*torch.*one_hot\(labels, 3\).float\(\)",
        ),
        (
            lambda: fastood.gradient_norm(F.numpy(), H.numpy(), np.array([1, 2])),
            ValueError,
            r"got \[2\]; of classes one-hot: np.eye\(3\)\[labels\]",
        ),
        (lambda: fastood.register("x"), TypeError, "score must be a fastood.Score, got str"),
        (lambda: fastood.score(np.ma.masked_array(F.numpy())), TypeError, "logits must not be a masked array"),
        (
            lambda: fastood.score(torch.nested.nested_tensor([F[0], F[1]], layout=torch.jagged)),
            TypeError,
            "logits must be a dense tensor, got",
        ),
        (lambda: fastood.norms(H, []), ValueError, "orders must not be empty"),
        (lambda: fastood.norms(H, [1, -2]), ValueError, "orders must be a number >= 0, got -2.0"),
        (lambda: fastood.norms(None, [1]), TypeError, "feats must be a torch tensor"),
        (lambda: fastood.row_stats(None), TypeError, "logits must be a torch tensor"),
        (lambda: fastood.row_stats(F, ["entropy"]), ValueError, "stats must be one of 'fmax', .*got 'entropy'"),
        (lambda: fastood.row_stats(F, ["power_sum"]), ValueError, r"asked for as \('power_sum', r\)"),
        (lambda: fastood.row_stats(F, [("power_sum", 0)]), ValueError, "r of power_sum must be a finite number > 0"),
        (lambda: fastood.row_stats(F, [("gen", 0.1)]), ValueError, r"asked for as \('gen', gamma, M\)"),
    ],
)
def test_bad_arguments_elsewhere(call, error, words):
    with pytest.raises(error, match=words):
        call()


OF_SCORE = ("temperature", "norm", "bias", "log", "oriented")


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (lambda **x: fastood.score(F, H, **x), OF_SCORE),
        (lambda **x: fastood.score(F, method="gen", **x), ("gamma", "M")),
        (lambda **x: fastood.scores(F, H, ["energy"], **x), OF_SCORE),
        (lambda **x: fastood.scores(F, methods=["gen"], **x), ("gamma", "M")),
        (lambda **x: fastood.sweep(F, H, **x), ("temperature", "bias", "log", "oriented")),
        (lambda norms: fastood.sweep(F, H, norms=[norms]), ("norms",)),
        (lambda **x: fastood.norms(H, [1], **x), ("bias", "log")),
        (lambda orders: fastood.norms(H, [orders]), ("orders",)),
        (lambda **x: fastood.gradient_norm(F, H, **x), ("temperature", "order", "power", "bias")),
    ],
)
def test_what_equals_a_good_argument_is_refused_after_it(call, arguments):
    """True == 1, and a call that was seen before is looked up by its arguments."""
    for name in arguments:
        pairs = [(True, 1), (False, 0.0)] if name in ("bias", "log", "oriented") else [(1, True), (1.0, True)]
        for good, bad in pairs:
            call(**{name: good})
            with pytest.raises(TypeError, match=f"{name} must be"):
                call(**{name: bad})


def test_what_errors_advise_works():
    y, maps = torch.tensor([1, 2]), torch.randn(2, 3, 4, 5)
    rows = maps.movedim(1, -1).flatten(0, -2)
    scored = fastood.score(rows).reshape(2, 4, 5)
    assert torch.equal(scored[:, 3, 2], fastood.score(maps[:, :, 3, 2].contiguous()))
    assert np.array_equal(np.moveaxis(maps.numpy(), 1, -1).reshape(-1, maps.shape[1]), rows)
    one_hot = torch.nn.functional.one_hot(y, 3).float()
    of_numpy = fastood.gradient_norm(F.numpy(), H.numpy(), np.eye(3)[y.numpy()])
    np.testing.assert_allclose(fastood.gradient_norm(F, H, one_hot), of_numpy, rtol=1e-6)


# ---- backends


def test_backends_say_whether_they_can_serve():
    status = fastood.backends()
    assert status["reference"].usable
    assert all(s.why for s in status.values())
    assert list(status)[-1] == "reference"  # "auto" falls back on it


def fake(reason, result=42.0):
    def scores(logits, feats, labels=None):
        return torch.full((len(logits),), result)

    backend = types.ModuleType("fake", "A fake.")
    backend.unusable = lambda device, dtype: reason
    backend.supports = lambda request, C, D: True
    backend.compile = lambda request: Run(scores)
    return backend


def test_one_place_picks_the_backend(monkeypatch):
    monkeypatch.setattr(_plan, "_PLANS", {})  # made for the backends there were
    monkeypatch.setattr(kernels, "DEFAULT", "auto")
    monkeypatch.setattr(kernels, "BACKENDS", {"fast": fake(None), "lame": fake("it has no legs"), **kernels.BACKENDS})
    assert fastood.score(F).tolist() == [42, 42]
    assert fastood.score(F, backend="fast").tolist() == [42, 42]
    energy = fastood.score(F, backend="reference")
    truth.assert_close(energy, truth.stat("energy", F), 1e-6)
    with pytest.raises(RuntimeError, match=r"backend 'lame' cannot serve torch.float32 on cpu: it has no legs"):
        fastood.score(F, backend="lame")
    assert fastood.backends()["lame"] == (False, "it has no legs")

    monkeypatch.setattr(kernels, "DEFAULT", "reference")  # FASTOOD_BACKEND, read at import
    assert torch.equal(fastood.score(F), energy)
    assert fastood.score(F, backend="fast").tolist() == [42, 42]  # an argument outranks the environment
    monkeypatch.setattr(kernels, "DEFAULT", "lame")
    with pytest.raises(RuntimeError, match="it has no legs"):
        fastood.score(F)


def test_the_environment_names_the_default():
    code = "import fastood, torch; fastood.score(torch.ones(1, 2))"
    env = {**os.environ, "FASTOOD_BACKEND": "nonsense"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "FASTOOD_BACKEND) must be 'auto' or one of" in out.stderr


def test_auto_skips_a_backend_that_cannot_serve(monkeypatch):
    monkeypatch.setattr(kernels, "BACKENDS", {"lame": fake("it has no legs"), **kernels.BACKENDS})
    truth.assert_close(fastood.score(F), truth.stat("energy", F), 1e-6)


# ---- the registry


def test_a_score_of_ones_own():
    own = fastood.Score(
        "margin", formula="T lse - max f", source="mine", higher="out",
        stats=("energy", "fmax"), v=lambda s: s["energy"] - s["fmax"],
    )  # fmt: skip
    try:
        fastood.register(own)
        expected = truth.stat("energy", F) - truth.stat("fmax", F)
        truth.assert_close(fastood.score(F, method="margin"), -expected, 1e-6)
        truth.assert_close(fastood.score(F, method="margin", oriented=False), expected, 1e-6)
        truth.assert_close(fastood.score(F, H, "margin", norm=2), -expected * truth.norm(H, 2), 1e-5)
        assert "margin" in fastood.scores(F)
        with pytest.raises(ValueError, match="name: a score called 'margin' is registered already"):
            fastood.register(own)
    finally:
        fastood.SCORES.pop("margin", None)


FIELDS = {"name": "x", "formula": "", "source": "", "higher": "in", "stats": ("msp",), "v": lambda s: s["msp"]}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"higher": "ood"}, ValueError, "higher must be 'in' or 'out', got 'ood'"),
        ({"stats": ("entropy",)}, ValueError, "stats must be one of 'fmax', .*got 'entropy'"),
        ({"stats": ("msp", "eneryg")}, ValueError, "got 'eneryg': did you mean 'energy'?"),
        ({"stats": lambda r: (("power_sums", r),), "params": {"r": 2}}, ValueError, "did you mean 'power_sum'?"),
        ({"log_stats": ("log_mps",), "log_v": lambda s: s["log_mps"]}, ValueError, "did you mean 'log_msp'?"),
        ({"stats": "msp"}, TypeError, "stats must be a tuple of names, got 'msp'"),
    ],
)
def test_a_bad_score_cannot_be_made(change, error, words):
    with pytest.raises(error, match=words):
        fastood.Score(**{**FIELDS, **change})


def test_a_bad_score_is_refused():
    with pytest.raises(ValueError, match="gradient: power must be 1 or 2, got 3"):
        fastood.register(fastood.Score(**FIELDS, gradient={"order": 1, "power": 3}))
    assert "x" not in fastood.SCORES


def test_every_entry_says_what_it_is():
    for name, entry in fastood.SCORES.items():
        assert entry.name == name
        assert entry.formula
        assert entry.source
        assert entry.higher in ("in", "out")
        assert set(entry.needs) <= {"logits", "feats"}
    assert fastood.SCORES["norm"].needs == ("feats",)
    assert fastood.SCORES["msp"].needs == ("logits",)
    assert fastood.SCORES["gradnorm"].needs == ("logits", "feats")


# ---- import


def test_parts_that_load_when_used_are_listed():
    code = """
import sys, fastood
assert {*fastood.__all__, "evaluation", "metrics"} <= {*dir(fastood)}
assert "sklearn" not in sys.modules
assert fastood.evaluation is __import__("fastood.evaluation").evaluation
assert fastood.metrics.auroc([1.0], [0.0]) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_light():
    """Plots, the command line, scikit-learn and Triton load when used."""
    heavy = ["sklearn", "scipy", "matplotlib", "typer", "rich", "jinja2", "safetensors", "pyarrow", "triton"]
    new = "{*sys.modules} - before"
    code = f"import sys, torch; before = {{*sys.modules}}; import fastood; print(({new}) & {{*{heavy}}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_every_method_completes():
    names, _ = typing.get_args(fastood.registry.Method)
    assert typing.get_args(names) == tuple(fastood.SCORES)


def test_help_says_what_norm_is_left_out():
    for function in (fastood.score, fastood.scores, fastood.Detector, fastood.score_linear):
        assert inspect.signature(function).parameters["norm"].default == "auto"
    logits, feats = torch.randn(3, 5), torch.randn(3, 4)
    assert torch.equal(fastood.score(logits, feats, norm="auto"), fastood.score(logits, feats, norm=0.3))
    with pytest.raises(TypeError, match="norm must be a number"):
        fastood.score(logits, feats, norm="2")

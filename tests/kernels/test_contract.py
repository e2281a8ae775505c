"""The numeric contract of every backend, against truth written independently (truth.py)."""

import itertools
import math

import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st
from interpreter import skip_where_interpreted
from samples import DTYPES, GRADIENTS, KINDS, V_TERMS, eps_of, feats, logits, rows_of, temperatures

import fastood
from fastood.kernels import STATISTICS, reference
from fastood.kernels.statistics import FORMULAS

pytestmark = pytest.mark.every_backend

STATS = list(FORMULAS)
ORDERS = [0, 0.05, 0.1, 0.3, 0.5, 0.8, 0.9, 1, 1.5, 2, 3, 4, 5, 6, 7.3, 20, 100, math.inf]


def result_type(*tensors):
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# ---- softmax statistics and V terms


@given(f=logits(), T=temperatures)
def test_row_statistics(backend, f, T):
    got = fastood.row_stats(f, STATS, temperature=T, backend=backend)
    for name in STATS:
        assert got[name].dtype == result_type(f)
        expected = truth.stat(name, f, T)
        truth.assert_close(got[name], expected, truth.tolerance(name, expected, f, T, eps_of(f)), name)


@given(f=logits(), T=temperatures)
def test_v_terms(backend, f, T):
    eps = eps_of(f)
    got = fastood.scores(f, temperature=T, backend=backend)
    for name in V_TERMS:
        if name != "gen":  # see test_gen
            of = truth.V_TERMS[name]
            expected = truth.stat(of, f, T)
            truth.assert_close(got[name], expected, truth.tolerance(of, expected, f, T, eps), name)


@given(
    seed=st.integers(0, 2**32 - 1),
    C=st.sampled_from([1, 2, 3, 10, 17, 47, 100, 130, 300]),
    exponent=st.integers(-30, 4),
    offset=st.sampled_from([0.0, 1.0, 100.0, -7e3]),
    kind=st.sampled_from(["normal", "steps", "one above", "one below", "a few above", "masked"]),
    T=st.sampled_from([1.0, 1.0, 0.3, 1e3, 1e7, 1e15, 2.0**-40]),
    dtype=st.sampled_from(DTYPES),
)
def test_nearly_flat_rows(backend, seed, C, exponent, offset, kind, T, dtype):
    """KL(u || p), TV and GradNorm are differences to the uniform distribution, and have no digits to lose."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, C))
    if kind == "steps":
        x = np.sign(x)
    elif kind == "one above":
        x = np.where(np.arange(C) == C // 2, 1 + rng.random(), 0 * x)
    elif kind == "one below":
        x = x / 8 - np.where(np.arange(C) == C // 2, 3.0, 0)
    elif kind == "a few above":
        x = x / 1000 + (rng.random((3, C)) < 4 / C)
    elif kind == "masked":
        x[:, C // 2] = -np.inf if C > 1 else 0
    f = torch.from_numpy(x * min(T, 1e30 if dtype != torch.float16 else 1e3) * 2.0**exponent + offset).to(dtype)
    h = torch.randn(3, 5).to(dtype)
    got = fastood.row_stats(f, ["kl_uniform", "tv"], temperature=T, backend=backend)
    eps = eps_of(f)
    for name, value in got.items():
        expected = truth.stat(name, f, T)
        truth.assert_close(value, expected, truth.tolerance(name, expected, f, T, eps), name)
    tv, u = truth.stat("tv", f, T), 2 * truth.norm(h, 1) / truth.LD(T)
    got = fastood.score(f, h, "gradnorm", temperature=T, backend=backend)
    truth.assert_close(got, u * tv, u * (truth.tolerance("tv", tv, f, T, eps) + 16 * eps * tv), "gradnorm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("C", [2, 31, 100])
def test_flat_rows_of_logits_next_to_0(backend, dtype, C):
    """Which are apart by far less than log C is off by."""
    g = torch.Generator().manual_seed(C)
    scales = torch.tensor([[1e-20], [1e-30], [1e-36 if dtype == torch.float32 else 1e-100]], dtype=dtype)
    f = torch.randn(3, C, generator=g, dtype=dtype) * scales
    for T in (1.0, 0.3):
        got = fastood.row_stats(f, ["tv"], temperature=T, backend=backend)["tv"]
        expected = truth.stat("tv", f, T)
        truth.assert_close(got, expected, truth.tolerance("tv", expected, f, T, eps_of(f)), f"T = {T}")


def test_a_temperature_keeps_the_order_of_rows(backend):
    """At T far above the logits KL(u || p) is half their variance over T^2, and TV half their mean deviation over T."""
    f = torch.randn(10, 300, generator=torch.Generator().manual_seed(0)) * 3
    wide = f.double()
    deviation = (wide - wide.mean(1, keepdim=True)).abs().mean(1) / 2
    for T in (1e4, 1e12):
        got = fastood.scores(f, methods=["kl_uniform", "tv"], temperature=T, backend=backend)
        torch.testing.assert_close(got["kl_uniform"] * T**2, wide.var(1, correction=0).float() / 2, rtol=1e-3, atol=0)
        torch.testing.assert_close(got["tv"] * T, deviation.float(), rtol=1e-3, atol=0)
        for name, exact in (("kl_uniform", wide.var(1)), ("tv", deviation)):
            if T > 1e4:
                assert torch.equal(got[name].argsort(), exact.argsort()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("C", [2, 30, 1000])
def test_sums_of_huge_logits(backend, dtype, C):
    """mean z is finite where one z, or their sum, is not."""
    most = torch.finfo(dtype).max
    f = torch.full((3, C), most, dtype=dtype)
    f[:, 1:] = torch.tensor([[-most], [-most / 4], [most / 2]], dtype=dtype)
    f[:, C // 2] = most
    for T in (1.0, 0.75 * most, most / 1e3, 1e3):
        got = fastood.row_stats(f, ["kl_uniform"], temperature=T, backend=backend)["kl_uniform"]
        expected = truth.stat("kl_uniform", f, T)
        truth.assert_close(got, expected, truth.tolerance("kl_uniform", expected, f, T, eps_of(f)), f"T = {T}")
    # The log-weighted row, of features that are as small as its sum is large: beyond float32, or next to float64's end.
    T = 8.0 if dtype != torch.float64 else 8.0 * C
    h = torch.full((3, 2), 2.0 ** (-40 if dtype != torch.float64 else -300), dtype=dtype)
    got = fastood.score(f, h, "eg_p_logp_l2sq", temperature=T, oriented=False, backend=backend)
    s = {name: truth.stat(name, f, T) for name in ("s2", "sumlogp", "plogp")}
    expected = (truth.norm(h, 2) / truth.LD(T)) ** 2 * ((1 + s["s2"]) * s["sumlogp"] - 2 * s["plogp"])
    truth.assert_close(got, expected, 64 * eps_of(f) * np.abs(expected), "log-weighted")


@given(
    seed=st.integers(0, 2**32 - 1),
    C=st.sampled_from([1, 2, 3, 16, 17, 100, 130, 300]),
    exponent=st.integers(-100, 100),
    spread=st.sampled_from(["of T", "of each", "of a row", "largest"]),
    tie=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_statistics_at_any_temperature_and_magnitude(backend, seed, C, exponent, spread, tie, masked, dtype):
    """Differences of logits, their quotients by T and their sums may all be beyond float32."""
    rng = np.random.default_rng(seed)
    T, limit, x = 2.0**exponent, torch.finfo(dtype).max, rng.standard_normal((4, C))
    x *= {
        "of T": T * 10 ** rng.uniform(-2, 3),
        "of each": 10.0 ** rng.uniform(-38, 38, (4, C)),
        "of a row": 10.0 ** rng.uniform(-38, 38),
        "largest": math.inf,
    }[spread]
    x = x.clip(-limit, limit)
    if tie:
        x[:, 0] = x.max(1)
    if masked:
        x[:, :-1] = np.where(rng.random((4, C - 1)) < 0.3, -math.inf, x[:, :-1])
    f = torch.from_numpy(x).to(dtype)
    eps = eps_of(f)
    # Differences of float64 may be beyond what any backend takes logarithms in.
    names = [s.name for s in FORMULAS.values() if not (s.is_log and f.dtype == torch.float64)]
    got = fastood.row_stats(f, names, temperature=T, backend=backend)
    expected = {name: truth.stat(name, f, T) for name in names}
    # U = ||h|| / T = 1
    h = torch.full((4, 1), T)
    got["log-weighted"] = fastood.score(f, h, "eg_p_logp_l2sq", temperature=T, oriented=False, backend=backend)
    with np.errstate(all="ignore"):
        expected["log-weighted"] = (1 + expected["s2"]) * expected["sumlogp"] - 2 * expected["plogp"]
    for name, value in expected.items():
        of_sum = name in ("sumlogp", "log-weighted")
        allowed = 64 * eps * np.abs(value) if of_sum else truth.tolerance(name, value, f, T, eps)
        truth.assert_close(got[name], value, allowed, name)


def test_the_entropy_of_logits_whose_difference_overflows_is_0(backend):
    f = torch.tensor([[1e308, -1e308]], dtype=torch.float64)
    assert fastood.row_stats(f, ["plogp"], backend=backend)["plogp"].item() == 0


def test_the_log_weighted_row_is_minus_infinite_where_its_sum_is(backend):
    f, h = torch.tensor([[1e30, -1e30, 5.0]]), torch.ones(1, 2)
    got = fastood.scores(f, h, ["eg_p_logp_l2sq", "neg_entropy"], temperature=1e-10, oriented=False, backend=backend)
    assert [x.item() for x in got.values()] == [-math.inf, 0]


@given(
    f=logits(), T=temperatures, gamma=st.sampled_from([0.1, 0.5, 1.0, 2.0]), M=st.sampled_from([1, 2, 10, 100, 5000])
)
def test_gen(backend, f, T, gamma, M):
    got = fastood.score(f, method="gen", gamma=gamma, M=M, temperature=T, backend=backend)
    expected = truth.gen(f, gamma, M, T)
    # p^gamma does not underflow where p does: its error grows with gamma |log p| all the way
    relative = (32 + 4 * np.minimum(max(1.0, gamma) * truth.span(f) / T, 745)) * eps_of(f)
    truth.assert_close(got, -expected, relative * expected, "gen")


@given(f=logits(), T=temperatures, r=st.sampled_from([0.5, 1, 1.5, 2, 3, 6]))
def test_power_sums(backend, f, T, r):
    got = fastood.row_stats(f, [("power_sum", r)], temperature=T, backend=backend)["power_sum", r]
    with np.errstate(all="ignore"):
        p = [truth.softmax_row(row, T)[0] for row in truth.widen(f)]
        expected = np.array([np.sum(x[x > 0] ** truth.LD(r)) for x in p])
    # p^r is r times as far off as p may be: the rounding errors of a sum of equal terms do not average out.
    relative = (32 * max(1, r) + 4 * r * np.minimum(truth.span(f) / T, 104)) * eps_of(f)
    truth.assert_close(got, expected, relative * expected, f"S_{r}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_orders_of_probabilities_that_vanish(backend, dtype):
    f = torch.tensor([[3000.0, 0.0, -100.0]], dtype=dtype)
    (got,) = fastood.row_stats(f, [("power_sum", 1e-3)], backend=backend).values()
    assert got.item() == pytest.approx(1 + math.exp(-3) + math.exp(-3.1), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1.0, 17.0, 69.1, 87.0, 95.0, 103.0, 300.0])
def test_complements_keep_relative_precision(backend, dtype, gap):
    f = torch.tensor([[gap, 0.0, -1.0], [0.0, gap, 0.0]], dtype=dtype)
    h = torch.full((2, 4), 1e30, dtype=dtype)
    eps = eps_of(f)
    got = fastood.row_stats(f, ["one_minus_s2", "one_minus_msp", "log_msp"], backend=backend)
    for name, value in got.items():
        expected = truth.stat(name, f)
        truth.assert_close(value, expected, truth.tolerance(name, expected, f, 1.0, eps), name)
    # Large features lift even 1e-45 back into the normal numbers.
    expected = 2 * truth.norm(h, 1) * truth.stat("one_minus_s2", f)
    relative = (32 + 4 * np.minimum(truth.span(f), 104) + 16) * eps
    got = fastood.score(f, h, "exgrad", oriented=False, backend=backend)
    if gap <= 104:
        truth.assert_close(got, expected, relative * expected, "exgrad")


@pytest.mark.parametrize("C", [21841, 128256, 1_000_003])
def test_very_many_classes(backend, C):
    if C > 200_000:
        skip_where_interpreted(backend)
    rng = np.random.default_rng(C)
    scales = [[1.0], [4.0]] if C < 1e6 else [[4.0]]
    f = torch.from_numpy(rng.standard_normal((len(scales), C)) * scales).float()
    got = fastood.row_stats(f, STATS, backend=backend)
    for name in STATS:
        expected = truth.stat(name, f)
        truth.assert_close(got[name], expected, truth.tolerance(name, expected, f, 1.0, eps_of(f)), name)


# ---- norms


@given(h=feats(), bias=st.booleans(), log=st.booleans(), data=st.data())
def test_norms(backend, h, bias, log, data):
    orders = data.draw(st.lists(st.sampled_from(ORDERS), min_size=1, max_size=4))
    got = fastood.norms(h, orders, bias=bias, log=log, backend=backend)
    assert got.shape == (len(h), len(orders))
    assert got.dtype == result_type(h)
    for j, r in enumerate(orders):
        truth.assert_close(got[:, j], *truth.norm_and_error(h, r, eps_of(h), bias, log), f"||h||_{r}, log={log}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_special_features(backend, dtype):
    """h = 0 contributes nothing, a subnormal counts, infinity and NaN stay in their row."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    h = torch.tensor(
        [[0.0, -0.0, 0.0], [tiny, 0.0, -tiny], [math.inf, 1.0, 0.0], [-math.inf, 0.0, 0.0], [math.nan, math.inf, 0.0]],
        dtype=dtype,
    )
    got = fastood.norms(h, ORDERS, backend=backend)
    assert (got[0] == 0).all()
    for j, r in enumerate(ORDERS):
        expected = truth.norm(h[1:2], r)
        truth.assert_close(got[1:2, j], expected, truth.norm_tolerance(h[1:2], r, eps_of(h)) * expected, f"r={r}")
    assert got[2, 0] == 2
    assert got[3, 0] == 1
    assert (got[2:4, 1:] == math.inf).all()
    assert got[4].isnan().all()


def test_r_below_1_overflows_to_inf_and_its_logarithm_does_not(backend):
    h = torch.ones(1, 8192)
    assert fastood.norms(h, [0.1], backend=backend).item() == math.inf
    assert fastood.norms(h, [0.1], log=True, backend=backend).item() == pytest.approx(10 * math.log(8192), rel=1e-6)
    f = torch.zeros(1, 10)
    log_score = fastood.score(f, h, "tv", norm=0.1, log=True, backend=backend)
    assert log_score.item() == -math.inf  # TV = 0
    log_score = fastood.score(f, h, "energy", norm=0.1, log=True, backend=backend)
    assert log_score.item() == pytest.approx(10 * math.log(8192) + math.log(math.log(10)), rel=1e-6)


@pytest.mark.parametrize("r", [0.9, 0.99])
def test_orders_just_below_1_at_the_edge_of_float32(backend, r):
    h = torch.full((1, 4096), 3e38)
    expected = math.log(3e38) + math.log(4096) / r
    assert fastood.norms(h, [r], log=True, backend=backend).item() == pytest.approx(expected, rel=1e-6)


def test_no_features(backend):
    assert fastood.norms(torch.ones(3, 0), ORDERS, backend=backend).eq(0).all()
    assert fastood.norms(torch.ones(3, 0), ORDERS, bias=True, backend=backend).eq(1).all()
    assert fastood.score(torch.ones(3, 5), torch.ones(3, 0), "gradnorm", backend=backend).eq(0).all()


# ---- products


@given(data=st.data(), T=st.sampled_from([1.0, 0.5, 20.0]), bias=st.booleans())
def test_products(backend, data, T, bias):
    f = data.draw(logits())
    h = data.draw(feats(rows=len(f)))
    eps = max(eps_of(f), eps_of(h))
    r = data.draw(st.sampled_from(ORDERS))
    u, u_relative = truth.norm(h, r, bias), truth.norm_tolerance(h, r, eps, bias)
    for name, of in truth.V_TERMS.items():
        got = fastood.score(f, h, name, norm=r, temperature=T, bias=bias, backend=backend)
        assert got.dtype == result_type(f, h)
        v = truth.stat(of, f, T)
        with np.errstate(all="ignore"):
            allowed = u * truth.tolerance(of, v, f, T, eps) + u_relative * np.abs(u * v)
            truth.assert_close(got, u * v, allowed, f"{name} * ||h||_{r}")


@given(data=st.data(), T=st.sampled_from([1.0, 0.5, 20.0]), bias=st.booleans(), log=st.booleans())
def test_bits_do_not_depend_on_what_is_asked_for_beside(backend, data, T, bias, log):
    """A threshold from a sweep is used on a score."""
    if backend == "triton":
        pytest.skip("a GPU's scores are held to the contract, not to each other's bits")
    f = data.draw(logits())
    h = data.draw(feats(rows=len(f)))
    with_log = [name for name, entry in fastood.SCORES.items() if name != "norm" and (entry.positive or not log)]
    options = {"temperature": T, "bias": bias, "log": log, "backend": backend}
    v_terms = [x for x in with_log if not fastood.SCORES[x].gradient]
    v = data.draw(st.lists(st.sampled_from(v_terms), min_size=1, max_size=4))
    orders = data.draw(st.lists(st.sampled_from([None, 0.2, 0.35, 0.6, 0.7, *ORDERS]), min_size=1, max_size=14))
    grid = fastood.sweep(f, h, v, orders, **options)
    for i, name in enumerate(v):
        j = data.draw(st.integers(0, len(orders) - 1))
        cell = fastood.score(f, h, name, norm=orders[j], **options)
        assert torch.equal(cell.nan_to_num(7), grid[:, i, j].nan_to_num(7)), (name, orders[j])
    names = data.draw(st.lists(st.sampled_from(with_log), min_size=1, max_size=6, unique=True))
    for name, got in fastood.scores(f, h, names, norm=orders[0], **options).items():
        own = {} if fastood.SCORES[name].gradient else {"norm": orders[0]}
        alone = fastood.score(f, h, name, **own, **options)
        assert torch.equal(alone.nan_to_num(7), got.nan_to_num(7)), name


@given(data=st.data(), T=st.sampled_from([1.0, 0.5, 20.0, 1e-3]), bias=st.booleans())
def test_gradient_scores(backend, data, T, bias):
    f = data.draw(logits())
    h = data.draw(feats(rows=len(f)))
    eps, C, LD = max(eps_of(f), eps_of(h)), f.shape[1], truth.LD
    got = fastood.scores(f, h, GRADIENTS, temperature=T, bias=bias, oriented=False, backend=backend)
    s = {name: truth.stat(name, f, T) for name in ("tv", "s2", "one_minus_s2", "sumlogp", "plogp")}
    u1, u2 = truth.norm(h, 1, bias) / LD(T), (truth.norm(h, 2, bias) / LD(T)) ** 2
    tail = (32 + 4 * np.minimum(truth.span(f) / T, 104)) * eps
    underflow = 2.0**-1070  # of 1 - S_2 itself
    with np.errstate(all="ignore"):
        v = (1 + s["s2"]) * s["sumlogp"] - 2 * s["plogp"]
        expected = {
            "gradnorm": (2 * u1 * s["tv"], 2 * u1 * (truth.tolerance("tv", s["tv"], f, T, eps) + 16 * eps * s["tv"])),
            "exgrad": (2 * u1 * s["one_minus_s2"], 2 * u1 * s["one_minus_s2"] * (tail + 16 * eps) + u1 * underflow),
            "eg_u_l1": (2 * u1 * LD(C - 1) / C, 2 * u1 * 16 * eps),
            "eg_u_l2sq": (u2 * (1 - LD(2) / C + s["s2"]), u2 * (1 - LD(2) / C + s["s2"]) * 64 * eps),
            "eg_p_l2sq": (u2 * s["one_minus_s2"], u2 * s["one_minus_s2"] * (tail + 32 * eps) + u2 * underflow),
            "eg_p_logp_l2sq": (u2 * v, u2 * np.abs(v) * 64 * eps),
            "norm_eg_p_l2sq": (0 * u2, 0 * u2),
        }
    for name in GRADIENTS:
        truth.assert_close(got[name], *expected[name], name)


@given(data=st.data())
def test_log_scores(backend, data):
    f, T = data.draw(logits(dtypes=[torch.float32, torch.float64])), 1.0
    h = data.draw(feats(rows=len(f), dtypes=[torch.float32, torch.float64]))
    r = data.draw(st.sampled_from([0.1, 0.3, 1, 2, math.inf]))
    eps = max(eps_of(f), eps_of(h))
    with np.errstate(all="ignore"):
        log_u = np.log(truth.norm(h, r))
        log_v = {
            "msp": truth.stat("log_msp", f),
            "varsum": np.where(
                truth.stat("s2", f) > 0.5, np.log1p(-truth.stat("one_minus_s2", f)), np.log(truth.stat("s2", f))
            ),
            "energy": np.log(truth.stat("energy", f)),
        }
    for name, expected in log_v.items():
        got = fastood.score(f, h, name, norm=r, log=True, backend=backend)
        with np.errstate(all="ignore"):
            v = truth.stat("energy", f)
            of_energy = truth.tolerance("energy", v, f, T, eps) / np.abs(v) if name == "energy" else 0
            of_v = (32 + 4 * np.minimum(truth.span(f), 104)) * eps * np.abs(expected) + 4 * of_energy
            total = log_u + expected
            allowed = of_v + truth.norm_tolerance(h, r, eps) + 4 * eps * (np.abs(log_u) + np.abs(expected))
        truth.assert_close(got, total, allowed, f"log {name}")


@pytest.mark.parametrize("f", [[[3.0, -math.inf, -math.inf], [-2e30, -math.inf, -math.inf]], [[3.0], [-2.0]]])
@pytest.mark.parametrize("T", [1.0, 1e-10, 1e30])
def test_the_log_of_a_gradient_that_is_0(backend, f, T):
    """Without a second class p is 1 and ExGrad 0: its logarithm is -inf, whose turned sign says in-distribution."""
    f, h = torch.tensor(f), torch.ones(2, 3)
    for name in ("exgrad", "eg_p_l2sq"):
        for oriented, expected in ((False, -math.inf), (True, math.inf)):
            got = fastood.score(f, h, name, temperature=T, log=True, oriented=oriented, backend=backend)
            assert got.tolist() == [expected, expected], name


# ---- rows that have no softmax, and batches


def keeps_bits(backend, name):
    """GEN is torch's on a GPU, where the order of a row's sum may depend on the batch."""
    return not (backend == "triton" and name == "gen" and torch.cuda.is_available())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_rows_are_nan_alone(backend, dtype):
    inf, nan = math.inf, math.nan
    good = [3.0, -inf, 0.5, 0.25]
    f = torch.tensor(
        [good, [nan, 0, 0, 0], [0, nan, inf, -inf], [inf, 0, 0, 0], [inf, inf, 0, -inf], [-inf] * 4, good], dtype=dtype
    )
    h = torch.ones(7, 3, dtype=dtype)
    names = [n for n in fastood.SCORES if n != "norm"]
    alone = fastood.scores(f[:1], h[:1], names, norm=None, backend=backend)
    for name, got in fastood.scores(f, h, names, norm=None, backend=backend).items():
        exact = {"rtol": 0, "atol": 0} if keeps_bits(backend, name) else {}
        torch.testing.assert_close(got[[0, 6]], alone[name].expand(2), **exact)
        if name == "energy":
            assert got[1:3].isnan().all()
            assert got[3:6].tolist() == [inf, inf, -inf]
        else:
            assert got[1:6].isnan().all(), name
    h[1, 0] = nan
    f = torch.tensor([good] * 7, dtype=dtype)
    for norm, without_feats in ((0.3, ()), ("auto", ("neg_entropy", "gen"))):
        for name, got in fastood.scores(f, h, norm=norm, backend=backend).items():
            assert got.isnan().tolist() == [False, name not in without_feats] + [False] * 5, name


@given(
    seed=st.integers(0, 2**32 - 1),
    C=st.sampled_from([1, 2, 5, 20, 130]),
    D=st.sampled_from([1, 3, 40, 1025]),
    kind=st.sampled_from(KINDS),
    T=st.sampled_from([1e-10, 0.1, 1.0, 1e10]),
    norm=st.sampled_from([0.3, 0.5, 1, 2, 3, math.inf]),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from(DTYPES),
)
def test_no_weight_of_0_hides_a_feature(backend, seed, C, D, kind, T, norm, bad, dtype):
    """A V of 0 makes no number of a norm that is NaN or infinite."""
    g = torch.Generator().manual_seed(seed)
    f, h = rows_of(kind, g, 3, C), torch.randn(3, D, generator=g)
    f, h = f.to(dtype), h.to(dtype)
    names = list(fastood.SCORES)
    good = fastood.scores(f, h, names, norm=norm, temperature=T, backend=backend)
    h[1, seed % D] = bad
    as_defined = fastood.scores(f, h, names, norm=norm, temperature=T, backend="reference")
    for name, got in fastood.scores(f, h, names, norm=norm, temperature=T, backend=backend).items():
        assert torch.equal(got[::2].nan_to_num(7), good[name][::2].nan_to_num(7)), name
        assert got[1].isnan() if math.isnan(bad) else not got[1].isfinite(), name
        assert got[1].tolist() == pytest.approx(as_defined[name][1].tolist(), nan_ok=True), name
    f[1, seed % C] = math.nan
    for name, got in fastood.scores(f, h, names, norm=norm, temperature=T, backend=backend).items():
        assert got[1].isnan() or name == "norm", name


@pytest.mark.parametrize("norm", [0.3, 1, 2, math.inf])
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_feature_makes_v_times_infinity(backend, norm, bad):
    inf, nan = math.inf, math.nan
    f = torch.tensor([[2.0, 0, -1], [0, 0, 0], [-9, -9, -9.5], [30, -inf, -inf]])
    h = torch.ones(4, 5)
    h[:, 2] = bad
    expected = {
        "msp": [inf, inf, inf, inf],
        "energy": [inf, inf, -inf, inf],
        "tv": [inf, nan, inf, inf],
        "neg_entropy": [-inf, -inf, -inf, nan],
        "norm": [inf, inf, inf, inf],
        "gradnorm": [inf, nan, inf, inf],
        "exgrad": [inf, inf, inf, nan],
        "eg_p_logp_l2sq": [-inf] * 4,
        "norm_eg_p_l2sq": [nan] * 4,
    }
    for names in (expected, ["gradnorm"], ["energy", "tv"]):
        got = fastood.scores(f, h, names, norm=norm, oriented=False, backend=backend)
        for name in names:
            assert got[name].tolist() == pytest.approx(expected[name], nan_ok=True), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("T", [1.0, 1e-25, 1e-300])
def test_0_times_an_overflow_is_0(backend, dtype, T):
    """Of finite features, whose square or quotient by T is beyond the doubles."""
    f = torch.tensor([[0.0, -math.inf, -math.inf]] * 6, dtype=dtype)  # 1 - S_2 = 0
    h = torch.full((6, 9), torch.finfo(dtype).max / 4, dtype=dtype)
    h[1] = 0
    h[2:5, 3] = torch.tensor([math.inf, -math.inf, math.nan])
    zeros = ["norm_eg_p_l2sq", "eg_p_l2sq", "exgrad"]
    for methods in (zeros, [*zeros, "eg_u_l1", "eg_u_l2sq"]):  # products, and scores that are put together in Python
        got = fastood.scores(f, h, methods, temperature=T, oriented=False, backend=backend)
        for name in zeros:
            assert got[name][[0, 1, 5]].tolist() == [0, 0, 0], name
            assert got[name][2:5].isnan().all(), name
            alone = fastood.score(f, h, name, temperature=T, oriented=False, backend=backend)
            assert torch.equal(alone.nan_to_num(7), got[name].nan_to_num(7)), name


def test_0_times_what_is_next_to_the_end_of_the_doubles_is_0(backend):
    if backend == "triton":
        pytest.skip("triton leaves float64 to the reference")
    f, h = (torch.tensor(x, dtype=torch.float64) for x in ([[1e300, -1e300]] * 2, [[0.0], [1e-305]]))
    for name in ("energy", "max_logit", "kl_uniform"):
        got = fastood.score(f, h, name, norm=1, backend=backend)
        assert got.tolist() == pytest.approx([0, 1e-5]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [1.0, math.inf, math.nan])
def test_0_times_a_norm_beyond_the_doubles_is_0(backend, dtype, bad):
    f, h = torch.tensor([[3.0]], dtype=dtype), torch.full((1, 900), 2.0, dtype=dtype)  # TV = 0, MSP = 1
    h[:, 7] = bad
    zero = 0.0 if bad == 1 else math.nan
    infinite = math.nan if math.isnan(bad) else math.inf
    got = [
        *fastood.sweep(f, h, ["tv", "msp"], [0.005], backend=backend).flatten(),
        *fastood.scores(f, h, ["tv", "kl_uniform", "msp"], norm=0.005, backend=backend).values(),
        fastood.norms(h, [0.005], backend=backend),
    ]
    expected = torch.tensor([zero, infinite, zero, zero, infinite, infinite], dtype=dtype)
    torch.testing.assert_close(torch.stack([x.reshape(()) for x in got]), expected, equal_nan=True)


def test_a_statistic_of_ones_own(backend, monkeypatch):
    """What a backend does not know it leaves to the reference."""
    monkeypatch.setitem(STATISTICS, "margin", "max_k f_k - the next largest")
    monkeypatch.setitem(STATISTICS, "share", "('share', r): max_k p_k^r")
    monkeypatch.setattr(reference.Softmax, "margin", property(lambda s: (s.f_max - s.pivot).double()), raising=False)
    monkeypatch.setattr(reference.Softmax, "share", lambda s, r: s.msp**r, raising=False)
    one = fastood.Score("margin", "f_(1) - f_(2)", "", "in", stats=("margin",))
    two = fastood.Score(
        "both", "", "", "out", stats=(("share", 2.0), "energy"), v=lambda s: s["share", 2.0] - s["energy"]
    )
    f, h = torch.tensor([[3.0, 1, 0], [0, 0, -1], [math.nan, 0, 1]]), torch.ones(3, 4)
    margin, msp, energy = torch.tensor([2.0, 0, math.nan]), f.softmax(-1).amax(-1), f.logsumexp(-1)
    close = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
    for entry in (one, two):
        monkeypatch.setitem(fastood.SCORES, entry.name, entry)
    for name, v in (("margin", margin), ("both", energy - msp**2)):
        torch.testing.assert_close(fastood.score(f, method=name, backend=backend), v, **close)
        torch.testing.assert_close(fastood.score(f, h, name, norm=1, backend=backend), 4 * v, **close)
        torch.testing.assert_close(fastood.scores(f, backend=backend)[name], v, **close)
        grid = fastood.sweep(f, h, [name, "energy"], [None, 2], backend=backend)
        torch.testing.assert_close(grid, torch.stack([v, 2 * v, energy, 2 * energy], -1).reshape(3, 2, 2), **close)
    stats = fastood.row_stats(f, ["margin", "energy", ("power_sum", 3)], backend=backend)
    torch.testing.assert_close(stats["margin"], margin, **close)
    torch.testing.assert_close(stats["energy"], energy, **close)


def test_one_class(backend):
    f = torch.tensor([[3.0], [-1e4]])
    got = fastood.row_stats(f, STATS, backend=backend)
    expected = {
        "fmax": [3, -1e4],
        "lse": [3, -1e4],
        "energy": [3, -1e4],
        "msp": [1, 1],
        "one_minus_msp": [0, 0],
        "log_msp": [0, 0],
        "s2": [1, 1],
        "one_minus_s2": [0, 0],
        "log_one_minus_s2": [-math.inf, -math.inf],
        "tv": [0, 0],
        "plogp": [0, 0],
        "sumlogp": [0, 0],
        "s2_sumlogp": [0, 0],
        "kl_uniform": [0, 0],
        "one": [1, 1],
        "uniform": [1, 1],
    }
    assert {name: stat.tolist() for name, stat in got.items()} == expected


def test_empty_batch(backend):
    f, h = torch.ones(0, 10), torch.ones(0, 7)
    for name, got in fastood.scores(f, h, backend=backend).items():
        assert got.shape == (0,), name
        assert got.dtype == torch.float32
    assert fastood.sweep(f, h, backend=backend).shape == (0, 4, 12)
    assert fastood.norms(h, [1, 0.3], backend=backend).shape == (0, 2)


@pytest.mark.parametrize("T", [1e-10, 1e-40, 1e-300, 1e30, 1e300])
def test_extreme_temperatures(backend, T):
    f = torch.tensor([[5.0, 4.0, -math.inf], [5.0, 5.0, 0.0]])
    got = fastood.row_stats(f, STATS, temperature=T, backend=backend)
    for name, value in got.items():
        expected = truth.stat(name, f, T)
        truth.assert_close(value, expected, 64 * truth.EPS["float32"] * (np.abs(expected) + 1), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("C", "D"), [(3, 5), (10, 512), (1000, 257), (40_000, 33_001), (927, 70_000), (957, 70_000), (1000, 70_000)]
)
def test_bits_do_not_depend_on_the_batch(backend, dtype, C, D):
    """C and D above 32768: where torch would split the sum of a lone row over threads. D = 70000: where C++ splits
    few rows over threads, and many not."""
    if D > 1000:
        skip_where_interpreted(backend)
    N = 7 if C > 1000 else 9 if D > 1000 or backend == "triton" else 61
    torch.manual_seed(0)
    f, h = (torch.randn(N, C) * 3).to(dtype), torch.randn(N, D).to(dtype)
    methods = [name for name in fastood.SCORES if name != "norm" and keeps_bits(backend, name)]
    orders = [0.1, 0.3, 0.8, 1, 1.5, 2, 3, 6, math.inf]

    def everything(rows):
        v = fastood.scores(f[rows], methods=[m for m in methods if not fastood.SCORES[m].gradient], backend=backend)
        g = fastood.scores(f[rows], h[rows], [m for m in methods if fastood.SCORES[m].gradient], backend=backend)
        u = fastood.norms(h[rows], orders, backend=backend)
        return torch.cat([torch.stack([*v.values(), *g.values()], -1), u], -1)

    whole = everything(slice(None))
    for rows in (slice(0, 1), slice(3, 4), slice(N - 1, N), slice(2, 7), slice(1, None, 2)):
        assert torch.equal(everything(rows), whole[rows])


def test_offsets_beyond_32_bits(backend):
    """A view whose last row starts past 2^31 elements, of memory of which most is never touched."""
    base = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.float16))
    base[-32:] = torch.arange(32, dtype=torch.float16)
    f = base.as_strided((2, 32), (2**31 + 32, 1))
    got = fastood.score(f, method="msp", backend=backend)
    expected = truth.stat("msp", f)
    truth.assert_close(got, expected, 32 * truth.EPS["float32"] * expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [1e8, 2.6e8, 1e9])
def test_high_orders_do_not_take_the_largest_for_nothing(backend, r, dtype):
    """The logarithm of the largest over itself is a rounding error, of which they are a multiple."""
    h = torch.randn(96, 49, generator=torch.Generator().manual_seed(0)).to(dtype)
    for log in (False, True):
        got = fastood.norms(h, [r], log=log, backend=backend)[:, 0]
        truth.assert_close(got, *truth.norm_and_error(h, r, 2**-24, log=log), f"log={log}")


@pytest.mark.parametrize("r", [4e9, 1e20, 1e39, 1e300])
def test_orders_that_are_as_good_as_infinite(backend, r):
    for h in (torch.tensor([[2.2, 1.1, -0.5]]), torch.randn(2, 100)):
        most = h.abs().amax(-1)
        torch.testing.assert_close(fastood.norms(h, [r], backend=backend)[:, 0], most)


def test_temperatures_whose_sums_leave_float32(backend):
    for f, T in (([[2e-38, 1e-38]], 1e-38), ([[2e30, 1e30, -3e30]], 1e30)):
        f = torch.tensor(f)
        p = torch.softmax(f.double() / T, -1)
        got = fastood.row_stats(f, ["msp", "plogp"], temperature=T, backend=backend)
        torch.testing.assert_close(got["msp"], p.amax(-1).float())
        torch.testing.assert_close(got["plogp"], (p * p.log()).sum(-1).float())


def test_orders_given_twice(backend):
    h = torch.randn(3, 77)
    for orders in itertools.product([0.1, 0.3, 0.5, 0.8, 1.5, 2, math.inf], repeat=2):
        alone = torch.cat([fastood.norms(h, [r], backend=backend) for r in orders], -1)
        torch.testing.assert_close(
            fastood.norms(h, [*orders, *orders], backend=backend), alone.repeat(1, 2), rtol=4e-6, atol=0
        )


# ---- SCALE and its kin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "D"), [(3, 1), (10, 7), (60, 129), (1000, 600)])
@pytest.mark.parametrize("method", ["scale", "lts"])
def test_energy_scaled_by_the_largest_features(backend, dtype, C, D, method):
    """Against the definition in long double: features of both signs, some clipped at 0, all 0, equal, or odd."""
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("triton leaves float64 to the reference")
    g = torch.Generator().manual_seed(C + D)
    f, h = 3 * torch.randn(12, C, generator=g), torch.randn(12, D, generator=g)
    h[4:8], h[6], h[7] = h[4:8].relu(), 0, 1
    h[8, 0], h[9, 0], f[10, 0], f[11, 0] = math.nan, math.inf, math.nan, -math.inf
    f, h, b = f.to(dtype), h.to(dtype), torch.randn(C, generator=g)
    for share in (0.05, 0.5, 1.0):
        k = max(1, D - round(D * (1 - share)))
        if method == "scale":
            got = fastood.score(
                f, h, "scale", temperature=2.0, head=(torch.zeros(C, D), b), percentile=1 - share, backend=backend
            )
        else:
            got = fastood.score(f, h, "lts", temperature=2.0, p=share, backend=backend)
        expected, allowed = [], []
        for row, x in zip(truth.widen(f), truth.widen(h), strict=True):
            if not (np.isfinite(x).all() and np.isfinite(row.max())):
                expected.append(np.nan)
                allowed.append(0.0)
                continue
            x, bias = (x, truth.widen(b)) if method == "scale" else (np.maximum(x, 0), np.zeros_like(row))
            total, largest = x.sum(), np.sort(x)[::-1][:k].sum()
            t = truth.LD(1) if total == 0 and largest == 0 else total / largest
            r = np.exp(t) if method == "scale" else t**2
            z = np.where(row == -np.inf, row, r * (row - bias) + bias)[None]
            expected.append(truth.stat("energy", z, 2.0)[0])
            # t is as good as the sums, of which features of both signs may leave little.
            condition = np.abs(x).sum() / max(abs(total), 1e-300) + np.abs(x).sum() / max(abs(largest), 1e-300)
            finite = np.where(np.isfinite(z), np.abs(z), 0).max()
            allowed.append(64 * truth.EPS[str(dtype)[6:]] * (finite * (1 + abs(t)) * (1 + condition) + 10))
        truth.assert_close(got, np.array(expected), np.array(allowed), f"{method} {share}")


def test_no_product_vanishes_on_the_way(backend):
    """A score of 1e-300, of features of 1e-134 and a temperature of 1e-27: divided last, it would be 0 by then."""
    if backend == "triton":
        pytest.skip("triton leaves float64 to the reference")
    T = 2.0**-90
    f, h = torch.tensor([[0.0, -200 * T]], dtype=torch.float64), torch.tensor([[2.6e-134]], dtype=torch.float64)
    one_minus_s2 = truth.stat("one_minus_s2", f, T)
    u = truth.norm(h, 2) / truth.LD(T)
    got = fastood.score(f, h, "eg_p_l2sq", temperature=T, oriented=False, backend=backend)
    assert got.item() > 0
    truth.assert_close(got, one_minus_s2 * u * u, 1000 * 2.0**-53 * one_minus_s2 * u * u)


@pytest.mark.parametrize("method", ["scale", "lts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_by_features_at_the_ends_of_float32(backend, dtype, method):
    """Whose sums are beyond it, by a few of them or by all, of one sign or of both; subnormal ones; equal ones."""
    h, tiny = torch.full((9, 64), 3e38), 1e-40
    h[0, 1], h[1, 2] = 1e38, math.inf
    h[2, 5:], h[3, 3:], h[4, ::2] = 1.0, tiny, -2.9e38
    h[5], h[6], h[7] = tiny * torch.arange(64), tiny, -1e38
    h[8, 10:], h[8, :10] = -3e38, torch.arange(10) * 1e-3
    f, head = torch.linspace(-0.1, 0.1, 10).repeat(9, 1), (torch.zeros(10, 64), torch.zeros(10))
    f, h = f.to(dtype), h.to(dtype)
    got = fastood.score(f, h, method, **({"head": head} if method == "scale" else {"p": 0.15}), backend=backend)
    assert got[1].isnan()
    for i in [0, *range(2, 9)]:
        x = truth.widen(h[i]) if method == "scale" else np.maximum(truth.widen(h[i]), 0)
        total, largest = x.sum(), np.sort(x)[::-1][:10].sum()
        t = total / largest if largest else truth.LD(1)
        r = np.exp(t) if method == "scale" else t**2
        expected = truth.stat("energy", r * truth.widen(f[i])[None])
        truth.assert_close(got[i : i + 1], expected, 1e-5 * np.abs(expected), f"row {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_by_a_sum_whose_parts_overflow(backend, dtype):
    """That of the largest, while in the sum of all every lane's features cancel."""
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("triton leaves float64 to the reference")
    most = torch.finfo(dtype).max / 2
    h = most * (1 - torch.arange(2048) // 64 % 2 * 2).to(dtype).repeat(2, 1)
    h[1, :8] = most / 64
    f = torch.linspace(-0.5, 0.5, 10, dtype=dtype).repeat(2, 1)
    head = torch.zeros(10, 2048, dtype=dtype), torch.zeros(10, dtype=dtype)
    got = fastood.score(f, h, "scale", head=head, percentile=0.5, backend=backend)
    for i, x in enumerate(truth.widen(h)):
        r = np.exp(x.sum() / np.sort(x)[::-1][:1024].sum())
        expected = truth.stat("energy", r * truth.widen(f[i])[None])
        truth.assert_close(got[i : i + 1], expected, 1e-5 * np.abs(expected), f"row {i}")

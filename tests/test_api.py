"""What callers see of score, scores and sweep: defaults, orientation, names, modes."""

import enum
import inspect
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st
from samples import V_TERMS

import fastood
from fastood import _plan

F = torch.tensor([[4.0, 0.0, 1.0], [0.2, 0.1, 0.0]])
H = torch.tensor([[3.0, -4.0], [1.0, 0.0]])


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
    assert list(fastood.scores(F, H, norm=None)) == [name for name in fastood.SCORES if name != "norm"]
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
        got = fastood.score(sure / 10, method="varsum", log=True, backend=backend)  # log S_2, next to 0
        assert got.item() == pytest.approx(-2 * math.exp(-80) * (1 + math.exp(-1)), rel=1e-5, abs=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_a_call_was_given_before_changes_no_later_one(backend):
    """A plan is kept for the same arguments: lists may change between two calls, and True equals 1."""
    b = {"backend": backend}
    v, orders, methods = ["tv", "msp"], [1, 2], ["energy", "msp"]
    for _ in range(2):
        fastood.sweep(F, H, v, orders, **b), fastood.norms(H, orders, **b), fastood.scores(F, H, methods, **b)
    v[0], orders[1], methods[0] = "energy", math.inf, "tv"
    assert torch.equal(fastood.sweep(F, H, v, orders, **b), fastood.sweep(F, H, ("energy", "msp"), (1, math.inf), **b))
    assert torch.equal(fastood.norms(H, orders, **b), fastood.norms(H, (1.0, math.inf), **b))
    assert list(fastood.scores(F, H, methods, **b)) == ["tv", "msp"]
    for one in (1, 1.0, np.float32(1), Fraction(1), np.int8(1)):
        norms = truth.norm(H, 1)
        truth.assert_close(fastood.norms(H, [one], **b)[:, 0], norms, 1e-6)
        truth.assert_close(fastood.sweep(F, H, ["msp"], [one], **b)[:, 0, 0], truth.stat("msp", F) * norms, 1e-6)
        fastood.sweep(F, H, temperature=one, **b)
        fastood.scores(F, H, ["msp"], norm=one, **b)
        fastood.gradient_norm(F, H, "uniform", one, one, **b)
    for wrong in (True, np.True_, Decimal(1), 1 + 0j):
        for call in (
            lambda x: fastood.norms(H, [x], **b),
            lambda x: fastood.sweep(F, H, ["msp"], [x], **b),
            lambda x: fastood.sweep(F, H, temperature=x, **b),
            lambda x: fastood.scores(F, H, ["msp"], norm=x, **b),
            lambda x: fastood.gradient_norm(F, H, "uniform", x, 1, **b),
            lambda x: fastood.gradient_norm(F, H, "uniform", 1, x, **b),
        ):
            with pytest.raises(TypeError, match="must be a number, got"):
                call(wrong)
    detector = fastood.BatchGrad(torch.ones(F.shape[1], H.shape[1]))
    for call in (fastood.score, fastood.scores, fastood.sweep, detector.score):
        for one in (True, np.True_):
            call(F, H, oriented=one, **b)
        for wrong in (1, 1.0, [True]):
            with pytest.raises(TypeError, match="oriented must be True or False"):
                call(F, H, oriented=wrong, **b)
    for wrong in ("e", b"e", 3):  # no names beside each other
        with pytest.raises((TypeError, ValueError), match="v must be"):
            fastood.sweep(F, H, wrong, **b)
    for wrong in ([["msp"]], [np.array([1])], [None]):
        for call in (lambda x: fastood.sweep(F, H, x, **b), lambda x: fastood.scores(F, H, x, **b)):
            with pytest.raises(ValueError, match="must be one of"):
                call(wrong)
    once = (name for name in ("msp", "tv"))
    assert list(fastood.scores(F, methods=once, **b)) == ["msp", "tv"]


def test_plans_that_are_kept_are_few():
    """However many kinds of calls a process makes."""
    for i in range(300):
        fastood.score(F, temperature=1 + i / 300)
    assert len(_plan._PLANS) <= 256


def test_names_may_be_members_of_an_enum():
    class Name(str, enum.Enum):  # noqa: UP042 - whose str() is not its value
        TV = "tv"

    expected = fastood.score(F, method="tv")
    assert torch.equal(fastood.score(F, method=Name.TV), expected)
    assert torch.equal(fastood.scores(F, methods=[Name.TV])["tv"], expected)
    truth.assert_close(fastood.row_stats(F, [Name.TV])["tv"], truth.stat("tv", F), 1e-6)


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


def test_help_says_what_norm_is_left_out():
    for function in (fastood.score, fastood.scores, fastood.Detector, fastood.score_linear):
        assert inspect.signature(function).parameters["norm"].default == "auto"
    logits, feats = torch.randn(3, 5), torch.randn(3, 4)
    assert torch.equal(fastood.score(logits, feats, norm="auto"), fastood.score(logits, feats, norm=0.3))
    with pytest.raises(TypeError, match="norm must be a number"):
        fastood.score(logits, feats, norm="2")


@pytest.mark.parametrize(
    ("C", "D", "error", "message"),
    [
        (10, -1, ValueError, "D must be a number of columns, got -1"),
        (-1, None, ValueError, "C must be a number of columns, got -1"),
        (10.5, 4, TypeError, r"C must be a whole number, got 10\.5"),
        (10, True, TypeError, "D must be a whole number, got True"),
    ],
)
def test_warm_up_names_what_is_no_number_of_columns(C, D, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        fastood.warm_up(C, D, device="cpu")

"""The registry of scores: what it holds, and scores of one's own."""

import math
import typing

import pytest
import torch
import truth

import fastood
from fastood.successors.declaration import HeadMethod

F = torch.tensor([[4.0, 0.0, 1.0], [0.2, 0.1, 0.0]])
H = torch.tensor([[3.0, -4.0], [1.0, 0.0]])


V_TERMS = ["msp", "energy", "varsum", "tv", "max_logit", "neg_entropy", "kl_uniform", "gen"]


def test_every_documented_method_is_registered():
    assert set(fastood.SCORES) == {
        *V_TERMS, "norm", "gradnorm", "exgrad", "eg_u_l1", "eg_u_l2sq", "eg_p_l2sq", "eg_p_logp_l2sq", "norm_eg_p_l2sq"
    }  # fmt: skip


def test_every_method_completes():
    names, _ = typing.get_args(fastood.registry.Method)
    assert typing.get_args(names) == tuple(fastood.SCORES)
    of_a_head = tuple(name for name, entry in fastood.SUCCESSORS.items() if not entry.fitted_on)
    assert typing.get_args(HeadMethod) == of_a_head


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


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_score_registered_anew_is_seen_by_every_call(backend):
    def margin(coefficient):
        v = (coefficient, -coefficient)
        return fastood.Score("margin", "c (T lse - max f)", "mine", "in", stats=("energy", "fmax"), v=v)

    weight = torch.eye(3)
    calls = (
        lambda: fastood.score(F, method="margin", backend=backend),
        lambda: fastood.scores(F, methods=["margin"], backend=backend)["margin"],
        lambda: fastood.scores(F, backend=backend)["margin"],
        lambda: fastood.sweep(F, H, ["margin"], [None], backend=backend)[:, 0, 0],
        lambda: fastood.score_linear(F, weight, method="margin", norm=None, backend=backend),
    )
    expected = truth.stat("energy", F) - truth.stat("fmax", F)
    try:
        for coefficient in (1, 2, 3):
            fastood.register(margin(coefficient))
            for call in calls:
                for _ in range(2):
                    truth.assert_close(call(), coefficient * expected, 1e-6)
            del fastood.SCORES["margin"]
            for call in calls[:2]:
                with pytest.raises(ValueError, match=r"must be one of .*got 'margin'"):
                    call()
            assert "margin" not in fastood.scores(F, backend=backend)
    finally:
        fastood.SCORES.pop("margin", None)


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
        beyond = torch.ones(2, 2000).double()  # what float64 holds, where r is 0.01
        assert (fastood.score(F.double(), beyond, "margin", norm=0.01) == -math.inf).all()
        assert "margin" in fastood.scores(F)
        with pytest.raises(ValueError, match="name: a score called 'margin' is registered already"):
            fastood.register(own)
    finally:
        fastood.SCORES.pop("margin", None)


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


FIELDS = {"name": "x", "formula": "", "source": "", "higher": "in", "stats": ("msp",), "v": lambda s: s["msp"]}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"higher": "ood"}, ValueError, "higher must be 'in' or 'out', got 'ood'"),
        ({"stats": ("entropy",)}, ValueError, "stats must be one of 'fmax', .*got 'entropy'"),
        ({"stats": ("msp", "eneryg")}, ValueError, "got 'eneryg': did you mean 'energy'?"),
        ({"stats": lambda r: (("power_sums", r),), "params": {"r": 2}}, ValueError, "did you mean 'power_sum'?"),
        ({"stats": ("power_sum",)}, ValueError, r"power_sum is asked for as \('power_sum', r\), got 'power_sum'"),
        ({"stats": (("power_sum", -1),)}, ValueError, "r of power_sum must be a finite number > 0, got -1.0"),
        ({"stats": (("gen", 0.1, 2.5),)}, ValueError, "M must be a whole number of classes, got 2.5"),
        ({"stats": (("msp", 2),)}, ValueError, r"msp takes no parameters, got \('msp', 2\)"),
        ({"log_stats": ("log_mps",), "log_v": lambda s: s["log_mps"]}, ValueError, "did you mean 'log_msp'?"),
        ({"stats": "msp"}, TypeError, "stats must be a tuple of names, got 'msp'"),
        ({"stats": ("msp", "s2"), "v": (1,)}, ValueError, r"v must have 2 coefficients, .* got \(1,\)"),
    ],
)
def test_a_bad_score_cannot_be_made(change, error, words):
    with pytest.raises(error, match=words):
        fastood.Score(**{**FIELDS, **change})


def test_a_bad_score_is_refused():
    with pytest.raises(ValueError, match="gradient: power must be 1 or 2, got 3"):
        fastood.register(fastood.Score(**FIELDS, gradient={"order": 1, "power": 3}))
    assert "x" not in fastood.SCORES

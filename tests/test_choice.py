"""Detector.choose: AUROC and its error against scikit-learn and the bootstrap, and figures that owe nothing to luck."""

import math
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import fastood
from fastood import Detector, _choice, _delong


def rows(n=300, C=5, D=6, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, C, generator=g), scale * torch.randn(n, D, generator=g).relu() + 0.1


def test_auroc_is_scikit_learns_and_its_error_the_bootstraps():
    rng = np.random.default_rng(0)
    x, ys = rng.normal(1, 1, 150).round(1), [rng.normal(0, 1, 120).round(1), rng.normal(0.5, 1, 90).round(1)]
    other = x + rng.normal(0, 0.5, 150)
    others = [y + rng.normal(0, 0.5, len(y)) for y in ys]

    def placed(x, ys):
        return _choice._Placements(*_delong.placements(x, ys))

    def auroc(x, ys):
        return np.mean([((x[:, None] > y) + (x[:, None] == y) / 2).mean() for y in ys])

    by_sklearn = [roc_auc_score(np.repeat([1, 0], [150, len(y)]), np.concatenate([x, y])) for y in ys]
    assert placed(x, ys).auroc == pytest.approx(np.mean(by_sklearn), abs=1e-12)
    one, two = [], []
    for _ in range(500):
        i, js = rng.integers(len(x), size=len(x)), [rng.integers(len(y), size=len(y)) for y in ys]
        a = auroc(x[i], [y[j] for y, j in zip(ys, js, strict=True)])
        b = auroc(other[i], [y[j] for y, j in zip(others, js, strict=True)])
        one.append(a)
        two.append(a - b)
    assert placed(x, ys).stderr == pytest.approx(np.std(one), rel=0.15)
    assert (placed(x, ys) - placed(other, others)).stderr == pytest.approx(np.std(two), rel=0.15)


def test_it_takes_the_best_and_says_so():
    inside, outside = rows(400, scale=4.0), {"far": rows(200, seed=1), "farther": rows(200, scale=0.3, seed=2)}
    candidates = ["max_logit", {"method": "energy", "norm": 1, "temperature": 2}, {"method": "norm", "norm": 0}]
    detector = Detector.choose(inside, outside, candidates, tpr=0.9)
    choice = detector.choice
    assert [x["method"] for x in choice.table][-1] == "norm"
    assert [x["auroc"] for x in choice.table] == sorted((x["auroc"] for x in choice.table), reverse=True)
    assert choice.table[0]["behind"] == choice.table[0]["stderr"] == 0
    assert detector.method == choice.table[0]["method"]
    assert (detector.rows, detector.tpr) == (200, 0.9)
    assert choice.auroc.keys() == choice.stderr.keys() == choice.accepted.keys() == outside.keys()
    # The figures are of the rows that did not choose, the threshold is of those of id among them.
    i = torch.randperm(400, generator=torch.Generator().manual_seed(0))[200:]
    kept = inside[0][i], inside[1][i]
    assert (
        detector.threshold
        == Detector(detector.method, norm=detector.norm, temperature=detector.temperature, tpr=0.9).fit(*kept).threshold
    )
    for name, (f, h) in outside.items():
        j = torch.randperm(200, generator=torch.Generator().manual_seed(0))[100:]
        s, o = detector.score(*kept), detector.score(f[j], h[j])
        assert choice.auroc[name] == pytest.approx(roc_auc_score([1] * 200 + [0] * 100, torch.cat([s, o])), abs=1e-12)
        assert choice.accepted[name] == (o >= detector.threshold).double().mean().item()
    text = str(choice)
    assert "the best of 3 candidates" in text
    assert "on rows that did not choose, far: AUROC" in text
    assert "synthetic" not in text
    again = Detector.choose([x.numpy() for x in inside], outside, candidates, tpr=0.9)
    assert again.threshold == detector.threshold
    assert again.choice == choice
    assert Detector.choose(inside, outside, candidates, tpr=0.9, seed=1).threshold != detector.threshold


def test_where_there_is_nothing_to_find_the_figures_do_not_pretend():
    chosen, judged, errors, rivals = [], [], [], []
    for seed in range(25):
        detector = Detector.choose(rows(120, seed=seed), {"same": rows(120, seed=1000 + seed)}, seed=seed)
        choice = detector.choice
        chosen.append(choice.table[0]["auroc"])
        judged.append(choice.auroc["same"])
        errors.append(choice.stderr["same"])
        rivals.append(choice.rivals / (len(choice.table) - 1))
    assert np.mean(chosen) > 0.55  # the luck of the best of many
    assert abs(np.mean(judged) - 0.5) < 4 * np.mean(errors) / math.sqrt(25)
    assert np.std(judged) == pytest.approx(np.mean(errors), rel=0.5)
    assert np.mean(rivals) > 0.5


def test_rivals_are_those_that_a_95_percent_interval_holds(monkeypatch):
    def placed(detector, inside, outside):
        behind = {"energy": 0.0, "msp": 1.95, "tv": 1.97, "max_logit": 0.0}[detector.method]  # in standard errors
        x = np.tile([0.4, 0.6], 50) + (0 if behind else 0.1)
        noise = np.tile([-1.0, 1.0], 50) * (0.01 if behind else 0)
        return _choice._Placements(x + noise + 0.1 - behind * 0.01 / math.sqrt(99) if behind else x, [np.zeros(100)])

    monkeypatch.setattr(_choice, "_placements", placed)
    choice = Detector.choose(rows(100), {"o": rows(100, seed=1)}, ["energy", "msp", "tv", "max_logit"], tpr=0.9).choice
    ratios = {x["method"]: x["behind"] / x["stderr"] for x in choice.table if x["stderr"]}
    assert ratios == pytest.approx({"msp": 1.95, "tv": 1.97}, abs=1e-6)
    assert choice.rivals == 2  # msp, and max_logit, which is the same
    assert "2 of the others are not set apart from it by a 95% interval" in str(choice)


def test_the_promise_holds_for_what_was_chosen():
    shares = []
    for seed in range(60):
        detector = Detector.choose(
            rows(80, seed=seed), {"o": rows(40, seed=500 + seed)}, ["msp", "tv", "energy"], tpr=0.9
        )
        shares.append(detector.accept(*rows(100, seed=2000 + seed)).double().mean().item())
    assert np.mean(shares) > 0.9 - 4 * np.std(shares) / math.sqrt(60)


@pytest.mark.parametrize("with_feats", [True, False])
def test_without_outliers_it_makes_some(with_feats):
    f, h = rows(300, scale=4.0)
    detector = Detector.choose((f, h if with_feats else None), per_class=True, tpr=0.8)
    assert detector.choice.auroc.keys() == {"mixtures", "shuffled"}
    assert detector.choice.synthetic
    assert "mixtures (convex combinations of two rows of different predicted classes" in str(detector.choice)
    assert detector.per_class
    names = {x["method"] for x in detector.choice.table}
    assert ("gradnorm" in names) == with_feats
    assert len(detector.choice.table) == (75 if with_feats else 22)


def test_mixtures_are_what_the_last_layer_makes_of_them():
    g = torch.Generator().manual_seed(0)
    h, weight, bias = torch.randn(200, 8, generator=g), torch.randn(8, 4, generator=g), torch.randn(4, generator=g)
    f = h @ weight + bias
    mixed_f, mixed_h = _choice._synthetic("mixtures", (f, h), g)
    assert mixed_f.shape == (200, 4)
    torch.testing.assert_close(mixed_h @ weight + bias, mixed_f)
    # Farther from every row than rows are from themselves, and inside their hull.
    assert torch.cdist(mixed_h, h).amin(1).min() > 1e-3
    assert mixed_h.norm(dim=1).mean() < h.norm(dim=1).mean()


def test_shuffled_rows_keep_every_column():
    f, h = rows(100)
    g = torch.Generator().manual_seed(0)
    shuffled_f, shuffled_h = _choice._synthetic("shuffled", (f, h), g)
    for x, y in ((f, shuffled_f), (h, shuffled_h)):
        assert y.shape == x.shape
        assert all(torch.isin(y[:, k], x[:, k]).all() for k in range(x.shape[1]))
    assert not (shuffled_f[:, None] == f).all(-1).any()


def test_masked_classes_stay_masked():
    f, _ = rows(200, scale=3.0)
    f[:, 2] = -math.inf
    mixed, _ = _choice._synthetic("mixtures", (f, None), torch.Generator().manual_seed(0))
    assert (mixed[:, 2] == -math.inf).all()
    assert mixed[:, [0, 1, 3, 4]].isfinite().all()
    choice = Detector.choose((f, None)).choice
    assert math.isnan(choice.table[-1]["auroc"])  # kl_uniform, infinite where a class is masked: passed over
    assert choice.table[-1]["method"] == "kl_uniform"


def test_outliers_without_a_finite_score_count_as_refused():
    f, _ = rows(100)
    outside = f.clone()
    outside[:, 0] = math.inf
    choice = Detector.choose((f, None), {"broken": (outside, None)}, ["energy", "msp"]).choice
    assert choice.auroc == {"broken": 1.0}
    assert choice.accepted == {"broken": 0.0}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"id": rows()[0]}, TypeError, "id must be (logits, feats), of which feats may be None, got Tensor"),
        ({"id": (None, rows()[1])}, TypeError, "id: logits must be a torch tensor or a numpy array, got None"),
        ({"id": (rows()[0], rows(4)[1])}, ValueError, "id: feats must have the 300 rows of logits"),
        ({"id": rows(37)}, ValueError, "id must have at least 38 rows for tpr=0.95, half of them to choose"),
        ({"ood": rows()}, TypeError, "ood must be None or a dict of name -> (logits, feats)"),
        ({"ood": {}}, TypeError, "ood must be None or a dict"),
        ({"ood": {"a": rows(3)}}, ValueError, "ood['a'] must have at least 4 rows, got 3"),
        ({"ood": {"a": (rows()[0], None)}}, ValueError, "6 of feats, got 5 of logits and none of feats"),
        ({"ood": {"a": rows(C=4)}}, ValueError, "5 of logits and 6 of feats, got 4 of logits and 6 of feats"),
        ({"candidates": []}, ValueError, "candidates must not be empty"),
        ({"candidates": "msp"}, TypeError, "candidates must be a list of settings of a Detector, or of names"),
        ({"candidates": [3]}, TypeError, "candidates must be dicts of settings of a Detector, or names, got 3"),
        ({"candidates": ["enrgy"]}, ValueError, "method must be one of"),
        ({"candidates": [{"norm": -1}]}, ValueError, "norm must be a number >= 0"),
        ({"id": (torch.ones(100, 3), None)}, ValueError, "id must have rows of several predicted classes"),
        ({"id": (rows()[0].log(), rows()[1])}, ValueError, "rows hold NaN, infinite features, or logits without a"),
        ({"id": (rows()[0], rows()[1] / 0)}, ValueError, "the first of them row"),
        ({"candidates": [{"method": "norm", "norm": 0.001}]}, ValueError, "candidates: none has a finite"),
        ({"candidates": [{"tpr": 0.5}]}, ValueError, "candidates must leave tpr to choose itself, got {'tpr': 0.5}"),
        ({"seed": "a"}, TypeError, "seed must be an integer, got str"),
        ({"seed": 2**64}, ValueError, "seed must be an integer of 64 bits, got 18446744073709551616"),
        ({"ood": [rows()]}, TypeError, "ood must be None or a dict of name -> (logits, feats), got list"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Detector.choose(**{"id": rows(), **arguments})


def test_rows_without_a_score_are_refused_whichever_half_they_fall_in():
    f, h = rows()
    h[[3, 200]] = math.nan
    for seed in range(4):
        with pytest.raises(ValueError, match=r"id: 2 of 300 rows hold NaN, .* the first of them row 3: leave"):
            Detector.choose((f, h), seed=seed)


def test_a_corrupted_copy_of_a_row_stays_in_the_rows_half(monkeypatch):
    """Or the half that judges would have been seen by the one that chooses."""
    seen = []
    placements = _choice._placements
    monkeypatch.setattr(
        _choice,
        "_placements",
        lambda d, inside, outside: seen.append((inside, outside)) or placements(d, inside, outside),
    )
    f, h = rows()
    Detector.choose((f, h), {"blurred": (f / 2, h)}, ["msp"])
    assert len(seen) == 2
    for (inside, _), [(blurred, _)] in seen:
        assert torch.equal(inside / 2, blurred)


def test_under_another_default_device():
    f, h = rows()
    with torch.device("meta"):
        chosen = Detector.choose((f, h), candidates=["msp"])
    assert chosen.threshold == Detector.choose((f, h), candidates=["msp"]).threshold


def test_a_detector_that_was_not_chosen_has_no_choice():
    assert fastood.Detector().choice is None

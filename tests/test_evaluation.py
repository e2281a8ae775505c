"""Scores of whole sets and their table of metrics, against numpy and scikit-learn called directly."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch
from formulas import lse, norm, softmax
from sklearn.metrics import average_precision_score, roc_auc_score

import fastood
from fastood.evaluation import evaluate, score_rows, sweep_auroc


def two_sets(n=400, C=10, D=32, dtype=torch.float32):
    """Logits of a confident network and of a less confident one; ReLU features."""
    g = torch.Generator().manual_seed(3)
    sets = []
    for scale in (12.0, 7.0):
        logits = scale * torch.randn(n, C, generator=g)
        feats = (scale * torch.randn(n, D, generator=g)).relu()
        sets.append((logits.to(dtype), feats.to(dtype)))
    return sets


def chunked(logits, feats, n=150):
    return list(zip(logits.split(n), feats.split(n), strict=True))


TRUTH = {
    "msp": lambda f, h: softmax(f).max(1),
    "energy": lambda f, h: lse(f),
    "varsum": lambda f, h: (softmax(f) ** 2).sum(1),
    "tv": lambda f, h: np.abs(softmax(f) - 1 / f.shape[1]).sum(1) / 2,
    "energy*||h||_0.3": lambda f, h: lse(f) * norm(h, 0.3),
    "gradnorm": lambda f, h: norm(h, 1) * np.abs(softmax(f) - 1 / f.shape[1]).sum(1),
    "exgrad": lambda f, h: -2 * norm(h, 1) * (softmax(f) * (1 - softmax(f))).sum(1),
    "||h||_0.3": lambda f, h: norm(h, 0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_auroc_is_that_of_float64_truth(dtype):
    # In float32 (as in float16) the MSP of many of these rows is exactly 1, and the ties move the AUROC.
    inside, outside = two_sets(dtype=dtype)
    assert (fastood.score(inside[0], method="msp") == 1).sum() > 10
    evaluation = evaluate(score_rows(chunked(*inside)), {"b": score_rows(chunked(*outside))})
    got = {row["score"]: row["auroc"] for row in evaluation.table()}
    is_id = np.repeat([1, 0], len(inside[0]))
    for label, truth in TRUTH.items():
        expected = roc_auc_score(is_id, np.concatenate([truth(*inside), truth(*outside)]))
        assert got[label] == pytest.approx(expected, abs=1e-6), label


def test_every_score_once_per_norm_and_chunks_do_not_matter():
    (logits, feats), _ = two_sets(n=40)
    whole = score_rows([(logits, feats)], norms=(None, 0.3, math.inf))
    v = [e.name for e in fastood.SCORES.values() if e.stats and not e.gradient]
    gradients = [e.name for e in fastood.SCORES.values() if e.gradient]
    expected = {f"{name}{u}" for name in v for u in ("", "*||h||_0.3", "*||h||_inf")}
    assert whole.keys() == expected | {"||h||_0.3", "||h||_inf"} | set(gradients)
    f, h = logits.double(), feats.double()
    for name in v:
        np.testing.assert_array_equal(whole[name], fastood.score(f, h, name, norm=None))
        np.testing.assert_array_equal(whole[f"{name}*||h||_inf"], fastood.score(f, h, name, norm=math.inf))
    for name in gradients:
        np.testing.assert_array_equal(whole[name], fastood.score(f, h, name))
    in_chunks = score_rows(chunked(logits, feats, n=7), norms=(None, 0.3, math.inf))
    assert list(in_chunks) == list(whole)
    for label, s in in_chunks.items():
        assert s.dtype == np.float64
        np.testing.assert_array_equal(s, whole[label])


def test_a_v_that_is_never_above_0_is_multiplied_only_where_asked():
    (logits, feats), _ = two_sets(n=40)
    chunks = [(logits, feats)]
    v = [e.name for e in fastood.SCORES.values() if e.stats and not e.gradient]
    assert list(score_rows(chunks, methods=v)) == [
        label for name in v for label in ((name,) if name in ("neg_entropy", "gen") else (name, f"{name}*||h||_0.3"))
    ]
    assert list(score_rows(chunks, methods=["gen"], norms=(None, 2))) == ["gen", "gen*||h||_2"]
    # Of rows with one V, the one with larger features is never lower by default.
    twice = score_rows([(logits, 2 * feats)])
    for label, s in score_rows(chunks, methods=[name for name in v if name not in ("energy", "max_logit")]).items():
        assert (twice[label] >= s).all(), label


def test_temperature_and_bias_reach_the_scores():
    (logits, feats), _ = two_sets(n=20)
    got = score_rows([(logits, feats)], methods=["tv", "exgrad", "norm"], norms=(2,), temperature=5.0, bias=True)
    f, h = logits.double(), feats.double()
    assert list(got) == ["tv*||h||_2", "exgrad", "||h||_2"]
    np.testing.assert_array_equal(got["tv*||h||_2"], fastood.score(f, h, "tv", norm=2, temperature=5.0, bias=True))
    np.testing.assert_array_equal(got["exgrad"], fastood.score(f, h, "exgrad", temperature=5.0, bias=True))
    np.testing.assert_allclose(got["||h||_2"], np.sqrt((h.numpy() ** 2).sum(1) + 1), rtol=1e-14)


def test_what_one_input_alone_allows():
    (logits, feats), _ = two_sets(n=5)
    v = {e.name for e in fastood.SCORES.values() if e.stats and not e.gradient}
    assert score_rows([(logits, None)]).keys() == v
    assert list(score_rows([(None, feats)], norms=(None, 1, 0))) == ["||h||_1", "||h||_0"]
    for methods, missing in ((["msp", "gradnorm"], "feats must be given: gradnorm"), (["norm"], "feats.*: norm")):
        with pytest.raises(ValueError, match=missing):
            score_rows([(logits, None)], methods=methods)
    with pytest.raises(ValueError, match="logits must be given: tv"):
        score_rows([(None, feats)], methods=["tv"])
    with pytest.raises(ValueError, match=re.escape("feats must be given for norm=0.3")):
        score_rows([(logits, None)], norms=(0.3,))
    with pytest.raises(ValueError, match=r"methods? must be one of .* got 'enrgy'"):
        score_rows([(logits, None)], methods=["enrgy"])
    with pytest.raises(ValueError, match="norms must be a number >= 0, got -1"):
        score_rows([(logits, feats)], norms=(-1,))
    with pytest.raises(ValueError, match="nothing to score"):
        score_rows([])
    with pytest.raises(ValueError, match="in all of them or in none"):
        score_rows([(logits, feats), (logits, None)])


def test_no_rows_keep_their_labels():
    got = score_rows([(torch.empty(0, 10), torch.empty(0, 4))], methods=["msp"])
    assert {label: s.shape for label, s in got.items()} == {"msp": (0,), "msp*||h||_0.3": (0,)}


def test_every_metric_is_scikit_learns():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 300).round(1), rng.normal(0, 1, 200).round(1)  # with ties
    (row,) = evaluate({"s": inside}, {"o": {"s": outside}}).table()
    is_id, s = np.repeat([1, 0], [300, 200]), np.concatenate([inside, outside])

    def fpr95(positive, s):
        rates = [((s[positive == 1] >= t).mean(), (s[positive == 0] >= t).mean()) for t in np.unique(s)]
        return min(fpr for tpr, fpr in rates if tpr >= 0.95)

    assert len(np.unique(s)) < 100
    assert row == {
        "ood": "o",
        "score": "s",
        "auroc": pytest.approx(roc_auc_score(is_id, s), abs=1e-12),
        "fpr95_in": pytest.approx(fpr95(is_id, s), abs=1e-12),
        "fpr95_out": pytest.approx(fpr95(1 - is_id, -s), abs=1e-12),
        "aupr_in": pytest.approx(average_precision_score(is_id, s), abs=1e-12),
        "aupr_out": pytest.approx(average_precision_score(1 - is_id, -s), abs=1e-12),
    }


@pytest.fixture
def small():
    inside = {"msp": [0.9, 0.8, 0.7, math.inf], "energy*||h||_0.3": [4.0, 3.0, 2.0, 1.0]}
    far = {"msp": [0.1, 0.2], "energy*||h||_0.3": [0.0, -math.inf]}
    near = {"msp": torch.tensor([0.8, 0.85, 0.1], dtype=torch.float64), "energy*||h||_0.3": [5.0, 6.0, 7.0]}
    return evaluate(inside, {"far": far, "near, odd": near})


def test_the_mean_comes_first_and_then_the_sets_as_given(small):
    table = small.table()
    names = ("msp", "energy*||h||_0.3")
    assert [(r["ood"], r["score"]) for r in table] == [
        (ood, score) for ood in ("average", "far", "near, odd") for score in names
    ]
    # near: 0.9 and inf beat all three; 0.8 beats one and ties one; 0.7 beats one
    near = (3 + 3 + 1.5 + 1) / 12
    assert [r["auroc"] for r in table] == pytest.approx([(1 + near) / 2, 0.5, 1, 1, near, 0])
    for metric in ("fpr95_in", "fpr95_out", "aupr_in", "aupr_out"):
        mean, far, near = (table[i][metric] for i in (0, 2, 4))
        assert mean == pytest.approx((far + near) / 2)
    assert small.best(1) == ["msp"]
    assert small.best(2, "far") == list(names)


def test_scores_come_by_their_auroc_within_each_set():
    inside = {"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [1.0, 2.0]}
    outside = {"one": {"a": [3.0], "b": [0.0], "c": [0.0]}, "two": {"a": [0.0], "b": [1.0], "c": [1.5]}}
    evaluation = evaluate(inside, outside)
    order = {"average": "bca", "one": "bca", "two": "abc"}  # b and c tie on "one"
    rows = evaluation.table()
    assert {ood: "".join(r["score"] for r in rows if r["ood"] == ood) for ood in order} == order
    assert evaluation.best(3, "one") == ["b", "c", "a"]
    assert evaluation.best(1) == ["b"]


def test_one_ood_set_has_no_mean():
    assert [r["ood"] for r in evaluate({"s": [1.0]}, {"average": {"s": [0.0]}}).table()] == ["average"]


def test_json_says_what_it_holds(small, tmp_path):
    small.to_json(tmp_path / "t.json")
    found = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert found["fastood"] == fastood.__version__
    assert found["counts"] == {"id": 4, "ood": {"far": 2, "near, odd": 3}}
    assert found["results"] == small.table()
    assert found["convention"].keys() == {"scores", "auroc", "fpr95_in", "fpr95_out", "aupr_in", "aupr_out"}
    assert "in-distribution" in found["convention"]["scores"]
    assert "ID is positive" in found["convention"]["fpr95_in"]
    assert found["recommendation"]["score"] == "msp"
    assert found["recommendation"]["threshold"] == 0.7
    assert found["recommendation"]["accepted"] == {"far": 0, "near, odd": 2}
    assert found["recommendation"]["auroc"]["far"] == {"value": 1, "interval": None}
    assert "seed 0" in found["recommendation"]["method"]


def test_json_has_no_infinite_numbers(tmp_path):
    evaluate({"s": [-math.inf, 1.0]}, {"o": {"s": [0.0]}}).to_json(tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert float(found["recommendation"]["threshold"]) == -math.inf


def test_csv_reads_back(small, tmp_path):
    small.to_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [{k: x if k in ("ood", "score") else float(x) for k, x in r.items()} for r in rows] == small.table()
    assert list(rows[0]) == ["ood", "score", "auroc", "fpr95_in", "fpr95_out", "aupr_in", "aupr_out"]


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        ({"s": [1, math.nan]}, {"o": {"s": [0]}}, "the ID set: score 's' must not hold NaN, got 1 of 2"),
        ({"s": [1, 2]}, {"o": {"s": [0, math.nan]}}, "OOD set 'o': score 's' must not hold NaN, got 1 of 2"),
        ({"s": [1]}, {"o": {"t": [0]}}, "OOD set 'o' must have the scores of the ID set; only one of them has 's'"),
        ({"s": [1], "t": [1, 2]}, {"o": {"s": [0], "t": [0]}}, "the ID set: all scores must be of the same inputs"),
        ({"s": []}, {"o": {"s": [0]}}, "the ID set: score 's' must be a non-empty vector, got shape [0]"),
        ({"s": [[1]]}, {"o": {"s": [0]}}, "the ID set: score 's' must be a non-empty vector, got shape [1, 1]"),
        ({"s": [1]}, {}, "ood_scores at least one set"),
        ({"s": [1]}, {"average": {"s": [0]}, "o": {"s": [0]}}, "'average' is the name of the mean"),
    ],
)
def test_errors_name_score_and_set(inside, outside, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(inside, outside)


def test_sweep_is_the_mean_of_the_tables():
    inside, outside = two_sets()
    third = (outside[0] / 3, outside[1] * 2)
    v, norms = ("energy", "gen"), (None, 0.1, 2, math.inf)
    grid = sweep_auroc(chunked(*inside), {"b": chunked(*outside), "c": [third]}, v, norms)
    a, b, c = (score_rows([x], methods=v, norms=norms) for x in (inside, outside, third))
    table = evaluate(a, {"b": b, "c": c}).table()
    of_label = {row["score"]: row["auroc"] for row in table if row["ood"] == "average"}
    means = [of_label[label] for label in a]  # V by V, within each norm by norm
    np.testing.assert_allclose(grid, np.reshape(means, (2, 4)), rtol=1e-12)
    with pytest.raises(ValueError, match="logits and feats must both be given"):
        sweep_auroc([(inside[0], None)], {"b": [outside]})
    with pytest.raises(ValueError, match="chunks must not be empty"):
        sweep_auroc([], {"b": [outside]})

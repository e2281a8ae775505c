"""The recommendation: its numbers against definitions, its claims about chance by simulation."""

import math
import re
from statistics import fmean

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from fastood import Detector, metrics, recommendation
from fastood.evaluation import evaluate
from fastood.plots import histograms
from fastood.recommendation import Estimate, recommend, threshold


def auroc(inside, outside):
    return roc_auc_score(np.repeat([1, 0], [len(inside), len(outside)]), np.concatenate([inside, outside]))


def normal(rng, n, **means):
    return {label: rng.normal(mean, 1, n) for label, mean in means.items()}


@pytest.fixture
def three():
    """A good score, one that it shares its noise with, a useless one; rounded, so that there are ties."""
    rng = np.random.default_rng(0)
    sets = []
    for n, good in ((300, 2.0), (200, 0.0), (150, 0.5)):
        s = normal(rng, n, good=good, useless=0)
        sets.append({label: x.round(1) for label, x in (s | {"near": s["good"] + rng.normal(0, 0.2, n)}).items()})
    return sets[0], {"far": sets[1], "near": sets[2]}


# ---- the numbers


def test_it_is_chosen_on_one_half_and_judged_on_the_other(three):
    inside, outside = three
    found = recommend(inside, outside)
    halves = [np.random.default_rng(0).permutation(n) for n in (300, 200, 150)]  # as METHOD says
    first, second = ([h[: len(h) // 2] for h in halves], [h[len(h) // 2 :] for h in halves])

    def mean_auroc(label, half):
        parts = [auroc(inside[label][half[0]], s[label][half[i]]) for i, s in enumerate(outside.values(), 1)]
        return [*parts, fmean(parts)]

    assert found.score == max(inside, key=lambda label: mean_auroc(label, first)[-1])
    assert found.held_out
    of_second = mean_auroc(found.score, second)
    assert list(found.auroc) == ["far", "near", "average"]
    assert [e.value for e in found.auroc.values()] == pytest.approx(of_second, abs=1e-12)
    for label, difference in found.differences.items():
        assert difference.value == pytest.approx(mean_auroc(label, second)[-1] - of_second[-1], abs=1e-12)
    x = inside[found.score][second[0]]
    t = threshold(x)
    for i, (name, columns) in enumerate(outside.items(), 1):
        assert found.fpr95_in[name].value == pytest.approx((columns[found.score][second[i]] >= t).mean())
    assert found.fpr95_in["average"].value == pytest.approx(fmean(found.fpr95_in[name].value for name in outside))


def test_the_interval_is_that_of_a_plain_bootstrap(three):
    inside, outside = ({k: x["good"] for k, x in s.items()} for s in ({"id": three[0]}, three[1]))
    (x,), sets = inside.values(), list(outside.values())
    found = recommendation._estimates("s", {"s": x}, {k: {"s": y} for k, y in outside.items()}, 1000)
    rng = np.random.default_rng(1)
    means, rates = [], []
    for _ in range(1000):
        a, *b = (rng.choice(s, len(s)) for s in (x, *sets))
        means.append(fmean(((a[:, None] > y).mean() + (a[:, None] >= y).mean()) / 2 for y in b))
        rates.append([(y >= threshold(a)).mean() for y in b])
    # Two draws of 1000 resamples each: their ends differ by some tenth of the width.
    for estimate, plain in ((found[0]["average"], means), (found[1]["far"], np.array(rates)[:, 0])):
        low, high = np.percentile(plain, [2.5, 97.5])
        np.testing.assert_allclose(estimate.interval, (low, high), atol=0.15 * (high - low))


def test_delongs_variance_is_that_of_a_plain_bootstrap_of_differences(three):
    inside, outside = three
    found = recommend(inside, outside)
    label = "near" if found.score == "good" else "good"
    rng = np.random.default_rng(2)
    halves = [np.random.default_rng(0).permutation(n) for n in (300, 200, 150)]
    sets = [
        {k: x[h[len(h) // 2 :]] for k, x in s.items()} for s, h in zip([inside, *outside.values()], halves, strict=True)
    ]
    differences = []
    for _ in range(1000):
        rows = [rng.integers(len(s["good"]), size=len(s["good"])) for s in sets]
        a, *b = ({k: x[i] for k, x in s.items()} for s, i in zip(sets, rows, strict=True))
        means = {k: fmean(((a[k][:, None] > y[k]).mean() + (a[k][:, None] >= y[k]).mean()) / 2 for y in b) for k in a}
        differences.append(means[label] - means[found.score])
    low, high = found.differences[label].interval
    assert (high - low) / 2 / 1.96 == pytest.approx(np.std(differences), rel=0.15)
    assert found.tied == [label]
    assert found.differences["useless"].interval[1] < 0


def test_the_threshold_is_that_of_the_table(three):
    evaluation = evaluate(*three)
    found = evaluation.recommendation
    n = evaluation.counts()["ood"]
    rows = {row["ood"]: row["fpr95_in"] for row in evaluation.table() if row["score"] == found.score}
    for name, accepted in found.accepted.items():
        assert accepted == pytest.approx(rows[name] * n[name], abs=1e-9)
    inside = evaluation.id_scores[found.score]
    assert found.kept.value == (inside >= found.threshold).mean() >= 0.95
    assert found.counts == evaluation.counts()


@pytest.mark.parametrize("n", [1, 2, 19, 20, 21, 40, 59, 60, 61, 100, 140, 999, 1000])
def test_the_threshold_keeps_the_fewest_that_are_95_percent(n):
    x = np.random.default_rng(n).permutation(n).astype(float)
    t = threshold(x)
    assert (x >= t).mean() >= 0.95
    assert (x > t).mean() < 0.95


@pytest.mark.parametrize("n", [19, 20, 21, 38, 39, 40, 79, 100, 999, 1000])
def test_thresholds_of_tables_curves_and_detectors(n):
    rng = np.random.default_rng(n)
    for x in (rng.permutation(n).astype(float), rng.normal(size=n).round(1)):  # the second with ties
        y = rng.normal(x.mean(), x.std(), 50).round(1)
        fpr, tpr, thresholds = roc_curve(np.repeat([1, 0], [n, 50]), np.concatenate([x, y]), drop_intermediate=False)
        first = np.flatnonzero(tpr >= 0.95)[0]
        t = threshold(x)
        assert (y >= t).mean() == metrics.fpr95_in(x, y) == fpr[first]
        # The curve's is the largest score of either side that has them above it, ID rows' or OOD rows'.
        assert t == x[x >= thresholds[first]].min()
        # A detector's is of n + 1 rows, the new one among them: the same where 20 divides that, else the next one down.
        ranked, place = np.sort(x), n - math.ceil(95 * n / 100)
        assert t == ranked[place]
        fitted = Detector("max_logit", norm=None).fit(torch.from_numpy(x)[:, None])
        assert fitted.threshold == ranked[place - ((n + 1) % 20 > 0)]


def test_an_infinite_threshold():
    assert threshold([-math.inf, 1.0]) == -math.inf
    assert threshold([math.inf] * 39 + [1.0]) == math.inf


# ---- chance


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    runs, shift = 300, 1.8
    rate = 1 - norm.cdf(norm.ppf(0.05) + shift)
    held = np.zeros(3)
    for _ in range(runs):
        inside, outside = normal(rng, 200, s=shift), normal(rng, 200, s=0)
        found = recommend(inside, {"o": outside})
        truths = norm.cdf(shift / math.sqrt(2)), rate, 1 - norm.cdf(found.threshold - shift)
        estimates = found.auroc["o"], found.fpr95_in["o"], found.kept
        held += [e.interval[0] <= truth <= e.interval[1] for e, truth in zip(estimates, truths, strict=True)]
    # 95%, give or take four standard errors of 300 runs, and what a bootstrap of 100 rows lacks.
    assert ((held / runs > 0.89) & (held / runs <= 1)).all(), held / runs
    assert held[0] < runs  # nor so wide that it says nothing


def test_the_best_of_41_useless_scores_is_not_flattered():
    rng = np.random.default_rng(0)
    labels = {f"score {i}": 0 for i in range(41)}
    flattered, honest, doubted, tied = [], [], 0, []
    for _ in range(20):
        inside, outside = normal(rng, 200, **labels), {"o": normal(rng, 200, **labels)}
        flattered.append(max(auroc(inside[label], outside["o"][label]) for label in labels))
        found = recommend(inside, outside)
        honest.append(found.auroc["o"].value)
        doubted += found.doubt == "No score is shown to be better than chance."
        tied.append(len(found.tied))
    assert fmean(flattered) > 0.55
    assert fmean(honest) == pytest.approx(0.5, abs=0.03)
    assert doubted >= 18  # of 20: the interval is above 0.5 in one of 40
    assert fmean(tied) > 37  # of 40


def test_a_score_as_good_is_rarely_called_worse():
    rng = np.random.default_rng(0)
    runs, worse = 200, 0
    for _ in range(runs):
        found = recommend(normal(rng, 200, a=1, b=1), {"o": normal(rng, 200, a=0, b=0)})
        worse += not found.tied
    assert worse / runs < 0.025 + 3 * math.sqrt(0.025 * 0.975 / runs)


# ---- odd data


def test_too_few_rows_have_no_interval():
    rng = np.random.default_rng(0)
    found = recommend(normal(rng, 500, a=2, b=1), {"o": normal(rng, 99, a=0, b=0)})
    assert not found.held_out
    assert found.auroc["o"].interval is None
    assert found.fpr95_in["o"].interval is None
    assert found.differences["b"].interval is None
    assert found.tied == []
    assert "flatters" in found.doubt
    assert "100 rows in every set, and the smallest here has 99" in str(found)
    assert "Every other score" not in str(found)
    assert found.kept.interval  # the ID set has rows enough for that
    assert recommend(normal(rng, 100, a=2), {"o": normal(rng, 100, a=0)}).held_out
    one = recommend({"s": np.array([1.0])}, {"o": {"s": np.array([1.0])}})
    assert (one.score, one.threshold, one.accepted, one.auroc["o"]) == ("s", 1.0, {"o": 1}, Estimate(0.5))


def test_scores_without_a_mistake_have_no_interval_of_no_width():
    inside, outside = np.arange(200.0), np.arange(200.0) - 500
    found = recommend({"s": inside}, {"o": {"s": outside}})
    assert found.auroc["o"] == Estimate(1.0)
    assert found.fpr95_in["o"] == Estimate(0.0)
    assert found.doubt == ""


def test_constant_scores_are_chance():
    found = recommend({"zero": np.zeros(200)}, {"o": {"zero": np.zeros(150)}})
    assert found.auroc["o"] == Estimate(0.5)
    assert found.fpr95_in["o"] == Estimate(1.0)
    assert (found.threshold, found.kept.value, found.accepted) == (0, 1, {"o": 150})
    assert found.doubt == "No score is shown to be better than chance."
    rng = np.random.default_rng(0)
    inside, outside = (normal(rng, 200, good=mean) | {"zero": np.zeros(200)} for mean in (1, 0))
    found = recommend(inside, {"o": outside})
    assert found.score == "good"
    assert found.tied == []
    assert found.differences["zero"].value == pytest.approx(0.5 - found.auroc["o"].value)


@pytest.mark.parametrize("clip", [lambda x: np.where(x > 1, np.inf, x), lambda x: np.where(x < 0, -np.inf, x)])
def test_infinite_scores_count_by_their_rank(clip):
    rng = np.random.default_rng(0)
    inside, outside = (clip(normal(rng, 200, s=mean)["s"]) for mean in (1, 0))
    found = recommend({"s": inside}, {"o": {"s": outside}})
    ranks = np.unique(np.concatenate([inside, outside]), return_inverse=True)[1].astype(float)
    of_ranks = recommend({"s": ranks[:200]}, {"o": {"s": ranks[200:]}})
    for name in ("auroc", "fpr95_in", "accepted", "kept", "doubt"):
        assert getattr(found, name) == getattr(of_ranks, name)


def test_scores_of_the_same_order_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    inside, outside = (normal(rng, 200, a=mean) for mean in (2, 0))
    found = recommend(inside | {"b": np.exp(inside["a"])}, {"o": outside | {"b": np.exp(outside["a"])}})
    assert found.score == "a"  # the first of equals
    assert found.differences["b"] == Estimate(0.0, (0.0, 0.0))
    assert found.tied == ["b"]


def test_a_set_may_have_any_name():
    rng = np.random.default_rng(0)
    found = recommend(normal(rng, 100, s=1), {"ID": normal(rng, 120, s=0), "id": normal(rng, 130, s=0)})
    assert found.counts == {"id": 100, "ood": {"ID": 120, "id": 130}}
    assert "of 120 ID" in str(found)


def test_the_same_data_give_the_same_recommendation(three):
    assert recommend(*three) == recommend(*three)


def test_a_copy_of_a_row_stays_in_its_half():
    rows = np.arange(200.0)
    (a, b), (c, d) = recommendation._halves({"s": rows}, {"o": {"s": rows + 1000}})
    for inside, outside in ((a, b), (c, d)):
        np.testing.assert_array_equal(inside["s"] + 1000, outside["o"]["s"])
    assert sorted([*a["s"], *c["s"]]) == list(rows)


# ---- in words


def test_in_words():
    rng = np.random.default_rng(0)
    means = {f"v{i}": 2 for i in range(9)}
    shared, noise = rng.normal(size=(2, 400)), rng.normal(0, 0.05, (2, 9, 400))
    sets = [{k: m * on + shared[on] + noise[on, i] for i, (k, m) in enumerate(means.items())} for on in (1, 0)]
    for on, s in zip((1, 0), sets, strict=True):
        s["energy"] = rng.normal(on, 1, 400)
    found = recommend(sets[0], {"o": sets[1]})
    text = str(found)
    assert text.startswith(f"Recommended: {found.score}, with AUROC {found.auroc['o']} and FPR95 ")
    assert "chosen on one half of the rows, judged on the other" in text
    assert f"Accept where {found.score} >= {found.threshold!r}: keeps 380 of the 400 ID rows" in text
    assert f"accepts {found.accepted['o']} of 400 o." in text
    listed = next(line for line in text.splitlines() if line.startswith("Not shown"))
    assert listed.count(",") == 5
    assert listed.endswith(f" and {len(found.tied) - 6} more.")
    assert text.splitlines()[-1].startswith("The default of fastood.score, energy, differs by -0.")


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (np.ma.masked_array([1.0, 2.0, 3.0], [1, 0, 0]), TypeError, "id_scores must not be a masked array"),
        ([1.0, math.nan], ValueError, "id_scores must not hold NaN, got 1 of 2"),
        ([], ValueError, "id_scores must be a non-empty vector, got shape [0]"),
    ],
)
def test_scores_without_an_order_have_no_threshold(scores, error, message):
    with pytest.raises(error, match=re.escape(message)):
        threshold(scores)
    with pytest.raises(error, match=re.escape(message)):
        histograms(scores, {}, "a")
    with pytest.raises(error, match=re.escape(message.replace("id_scores", "ood_scores['noise']"))):
        histograms([1.0], {"noise": scores}, "a")

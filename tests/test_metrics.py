"""Metrics against their definitions, counted by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastood import evaluation, metrics

# Few distinct values: ties are the hard part.
scores = st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, 2.0, math.inf]), min_size=1, max_size=30)


def pairs_won(i, o):
    return np.mean([[1.0 if a > b else 0.5 if a == b else 0.0 for b in o] for a in i])


def fpr95(positive, negative):
    """The highest threshold that keeps 95% of the positives, and the negatives that it lets through."""
    for threshold in sorted(set(positive) | set(negative), reverse=True):
        if np.mean(np.array(positive) >= threshold) >= 0.95:
            return np.mean(np.array(negative) >= threshold)


def average_precision(positive, negative):
    """sum over thresholds of (recall gained) x precision."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(positive) | set(negative), reverse=True):
        tp, fp = np.sum(np.array(positive) >= threshold), np.sum(np.array(negative) >= threshold)
        recall = tp / len(positive)
        total, before = total + (recall - before) * tp / (tp + fp), recall
    return total


@given(i=scores, o=scores)
def test_against_the_definitions(i, o):
    minus_i, minus_o = [-x for x in i], [-x for x in o]
    expected = {
        "auroc": pairs_won(i, o),
        "fpr95_in": fpr95(i, o),
        "fpr95_out": fpr95(minus_o, minus_i),
        "aupr_in": average_precision(i, o),
        "aupr_out": average_precision(minus_o, minus_i),
    }
    assert metrics.evaluate(i, o) == pytest.approx(expected, abs=1e-12)


def test_kinds_of_input():
    i, o = [3.0, 2.0, 2.5], [1.0, 2.2]
    expected = metrics.evaluate(i, o)
    assert metrics.evaluate(np.array(i, np.float32), np.array(o, np.float32)) == expected
    assert metrics.evaluate(torch.tensor(i, requires_grad=True), torch.tensor(o).bfloat16()) == expected


@pytest.mark.parametrize("metric", metrics.METRICS.values())
def test_bad_scores(metric):
    with pytest.raises(ValueError, match="id_scores must not hold NaN, got 1 of 2"):
        metric([1.0, math.nan], [0.0])
    with pytest.raises(ValueError, match="ood_scores must not hold NaN, got 2 of 2"):
        metric([1.0], torch.tensor([math.nan, math.nan]))
    with pytest.raises(ValueError, match=r"ood_scores must be a non-empty vector, got shape \[0\]"):
        metric([1.0], [])
    with pytest.raises(ValueError, match=r"id_scores must be a non-empty vector, got shape \[1, 2\]"):
        metric([[1.0, 2.0]], [0.0])
    text, time = ["1", "2"], np.array(["2024"], "M8[Y]")
    for odd in (text, time, np.array([1 + 2j]), torch.tensor([1 + 2j]), np.array([1, None])):
        with pytest.raises(TypeError, match="ood_scores must hold real numbers, got "):
            metric([1.0], odd)
    with pytest.raises(ValueError, match="id_scores must be a non-empty vector, got a ragged one"):
        metric([[1.0], [2.0, 3.0]], [0.0])
    hidden = np.ma.masked_array([1.0, 9.0], [False, True])
    for scores_of_sets, name in (((hidden, [0.0]), "id_scores"), (([1.0], hidden), "ood_scores")):
        with pytest.raises(TypeError, match=f"{name} must not be a masked array: leave masked rows out"):
            metric(*scores_of_sets)
    assert metric(hidden.compressed(), [0.0]) == metric([1.0], [0.0])


def test_a_masked_array_is_refused_by_an_evaluation():
    hidden = np.ma.masked_array([1.0, 9.0], [False, True])
    with pytest.raises(TypeError, match=r"^the ID set: score 's' must not be a masked array"):
        evaluation.evaluate({"s": hidden}, {"o": {"s": [0.0]}})
    with pytest.raises(TypeError, match=r"^OOD set 'o': score 's' must not be a masked array"):
        evaluation.evaluate({"s": [0.0]}, {"o": {"s": hidden}})

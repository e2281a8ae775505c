"""The scikit-learn estimator: scikit-learn's own checks, and the same decisions as fastood.Detector."""

import math
import pickle
import re
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import fastood
from fastood.sklearn import OODDetector

SKIPPED = {"check_array_api_input", "check_classifier_data_not_an_array"}  # without SCIPY_ARRAY_API; without pandas


def data(n=200, C=5, D=8, seed=0):
    rng = np.random.default_rng(seed)
    return 4 * rng.normal(size=(n, C)), rng.gamma(1.0, size=(n, D))


@pytest.mark.parametrize("options", [{}, {"n_classes": 1}, {"method": "msp", "tpr": 0.9}], ids=str)
def test_scikit_learns_own_checks(options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "tpr=", UserWarning)  # of some checks' few rows
        warnings.filterwarnings("ignore", "a threshold of", UserWarning)  # of checks whose numbers are below 0
        results = check_estimator(OODDetector(**options), on_skip=None)
    assert {x["check_name"] for x in results if x["status"] != "passed"} <= SKIPPED


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_classes": 5},
        {"method": "msp", "norm": None, "n_classes": 5, "temperature": 2.0, "tpr": 0.8},
        {"method": "gradnorm", "bias": True, "n_classes": 5},
        {"method": "norm", "norm": math.inf, "n_classes": 5},
        {"method": "tv", "n_classes": 13},
    ],
    ids=str,
)
def test_scores_and_decisions_are_the_detectors(options, dtype):
    X, new = (np.hstack(data(seed=seed)).astype(dtype) for seed in (0, 1))
    C = options.get("n_classes", 13)
    plain = {k: x for k, x in options.items() if k != "n_classes"}
    detector = fastood.Detector(**plain).fit(X[:, :C], X[:, C:] if C < 13 else None)
    rows = new[:, :C], new[:, C:] if C < 13 else None
    estimator = OODDetector(**options).fit(X)
    assert estimator.offset_ == detector.threshold
    scores = estimator.score_samples(new)
    assert scores.dtype == dtype
    np.testing.assert_array_equal(scores, detector.score(*rows))
    np.testing.assert_array_equal(estimator.predict(new), np.where(detector.accept(*rows), 1, -1))
    np.testing.assert_array_equal(estimator.predict(X) == 1, estimator.decision_function(X) >= 0)
    assert (estimator.predict(X) == 1).mean() >= estimator.tpr
    np.testing.assert_array_equal(estimator.fit_predict(X), estimator.predict(X))
    for other in (clone(estimator).fit(X), pickle.loads(pickle.dumps(estimator))):
        np.testing.assert_array_equal(other.decision_function(new), estimator.decision_function(new))
    assert not hasattr(clone(estimator), "offset_")


def test_in_a_pipeline_and_a_grid_search():
    X = np.hstack(data())
    weight = np.random.default_rng(2).normal(size=(13, 4))
    pipeline = make_pipeline(StandardScaler(), FunctionTransformer(lambda x: x @ weight), OODDetector("max_logit"))
    assert (pipeline.fit(X).predict(X) == 1).sum() == 191
    outliers = np.hstack(data(seed=1)) * 0.01
    both, y = np.vstack([X, outliers]), np.repeat([1, -1], 200)

    def balanced(estimator, X, y):
        return (estimator.predict(X) == y).mean()

    search = GridSearchCV(
        OODDetector(n_classes=5), {"method": ["energy", "norm"], "norm": [1, 2]}, scoring=balanced, cv=2
    )
    assert search.fit(both, y).best_params_["method"] in ("energy", "norm")


def test_few_rows_are_a_warning_and_the_lowest_score_is_the_threshold():
    X = data(10)[0]
    with pytest.warns(
        UserWarning, match=r"tpr=0\.95 takes at least 19 rows, got 10: the threshold is the lowest score"
    ):
        estimator = OODDetector().fit(X)
    assert estimator.offset_ == estimator.score_samples(X).min()
    assert (estimator.predict(X) == 1).all()


def test_a_score_that_overflows_is_not_accepted():
    estimator = OODDetector("max_logit", norm=1, n_classes=5).fit(np.hstack(data()))
    far = np.full((1, 13), 1e300)
    assert estimator.score_samples(far) == np.inf
    assert estimator.decision_function(far) == -np.inf
    assert estimator.predict(far) == -1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "enrgy"}, ValueError, "method must be one of"),
        ({"norm": "two"}, TypeError, "norm must be a number, None or 'auto', got 'two'"),
        ({"tpr": 2}, ValueError, "tpr must be a number between 0 and 1, got 2"),
        ({"n_classes": 0}, ValueError, "n_classes must be from 1 to the 5 columns of X, got 0"),
        ({"n_classes": 6}, ValueError, "n_classes must be from 1 to the 5 columns of X, got 6"),
        ({"n_classes": 2.5}, TypeError, "n_classes must be a whole number or None, got 2.5"),
        ({"method": "gradnorm"}, ValueError, "feats must be given: gradnorm"),
    ],
)
def test_bad_parameters(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        OODDetector(**options).fit(data()[0])

"""Thresholds and p-values against their definition in exact fractions, their promise by simulation."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from calibration import data
from hypothesis import given
from hypothesis import strategies as st

import fastood
from fastood import Detector


def column(scores, dtype=torch.float32):
    """Logits [N, 1] whose largest logit is the score."""
    return torch.as_tensor(np.array(scores), dtype=dtype).reshape(-1, 1)


def of_max_logit(scores, **options):
    return Detector("max_logit", **options).fit(column(scores, torch.float64))


def p_by_definition(calibration, s):
    return Fraction(1 + sum(x <= s for x in calibration), len(calibration) + 1)


tied = st.lists(st.integers(-4, 4).map(lambda x: x / 2), min_size=1, max_size=60)


@given(tied, tied, st.floats(0.01, 0.99) | st.sampled_from([0.5, 0.9, 0.95, 0.8, 0.75]))
def test_p_values_and_decisions_are_those_of_the_definition(calibration, new, tpr):
    n = len(calibration)
    if Fraction(1, n + 1) > Fraction(1 - tpr) and 1 / (n + 1) > 1 - tpr:
        with pytest.raises(ValueError, match=rf"tpr={tpr:g} takes at least \d+ in-distribution rows, got {n}"):
            of_max_logit(calibration, tpr=tpr)
        return
    fitted = of_max_logit(calibration, tpr=tpr)
    expected = [float(p_by_definition(calibration, s)) for s in new]
    p = fitted.p_value(column(new))
    assert p.dtype == torch.float64
    assert p.tolist() == expected
    accepted = fitted.accept(column(new))
    assert accepted.dtype == torch.bool
    assert accepted.tolist() == [x > 1 - tpr for x in expected] == (p > 1 - tpr).tolist()
    assert accepted.tolist() == [s >= fitted.threshold for s in new]
    in_numpy = fitted.accept(column(new).numpy())
    assert isinstance(in_numpy, np.ndarray)
    assert in_numpy.dtype == bool
    assert in_numpy.tolist() == accepted.tolist()
    assert fitted.p_value(column(new).numpy()).tolist() == expected


@given(st.lists(st.floats(-1e300, 1e300), min_size=19, max_size=40), st.data())
def test_float32_rows_meet_a_float64_threshold_exactly(calibration, data):
    fitted = of_max_logit(calibration)
    near = np.float32(np.clip(fitted.threshold, -3e38, 3e38))
    steps = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    new = np.array([*steps, data.draw(st.floats(width=32, allow_nan=False, allow_infinity=False))], np.float32)[:, None]
    assert new.dtype == np.float32
    accepted = fitted.accept(new)
    assert accepted.tolist() == (fitted.p_value(new) > 1 - fitted.tpr).tolist()
    assert accepted.tolist() == [float(s) >= fitted.threshold and abs(s) < np.inf for s in new[:, 0]]
    assert fitted.accept(torch.from_numpy(new)).tolist() == accepted.tolist()


@pytest.mark.parametrize(
    ("tpr", "least"), [(0.5, 1), (0.95, 19), (0.99, 99), (0.999, 999), (0.75, 3), (1e-9, 1), (0.9, 10)]
)
def test_too_few_rows_are_an_error_that_says_how_many_it_takes(tpr, least):
    rows = torch.arange(float(least))[:, None]
    assert Detector("max_logit", tpr=tpr).fit(rows).threshold == 0
    if least > 1:
        with pytest.raises(
            ValueError, match=f"tpr={tpr:g} takes at least {least} in-distribution rows, got {least - 1}$"
        ):
            Detector("max_logit", tpr=tpr).fit(rows[1:])
        short = Detector("max_logit", tpr=tpr).partial_fit(rows[1:])
        assert f"takes at least {least} " in repr(short)
        for use in (short.accept, short.p_value):
            with pytest.raises(ValueError, match=f"takes at least {least} "):
                use(rows)
        assert short.partial_fit(rows[:1]).accept(rows).all()


def test_the_least_tpr_there_is():
    rows = torch.arange(30.0)[:, None]
    assert Detector("max_logit", tpr=2**-53).fit(rows).threshold == 29
    with pytest.raises(ValueError, match="tpr must be a number between 0 and 1, got 1e-17"):  # 1 - tpr is 1
        Detector("max_logit", tpr=1e-17)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "tpr"), [(19, 0.95), (60, 0.9), (500, 0.5)])
def test_the_share_of_accepted_rows_is_as_promised(n, tpr, ties):
    rng = np.random.default_rng(5)
    shares = []
    for _ in range(1000):
        s = rng.gumbel(size=(n + 50, 1))
        s = s.round(1) if ties else s
        shares.append(Detector("max_logit", tpr=tpr).fit(s[:n]).accept(s[n:]).mean())
    error = np.std(shares) / math.sqrt(len(shares))
    assert np.mean(shares) > tpr - 4 * error
    if not ties:  # no more than it takes, either
        assert np.mean(shares) < tpr + 1 / (n + 1) + 4 * error


def test_p_values_of_rows_alike_are_at_least_uniform():
    rng = np.random.default_rng(6)
    p = []
    for _ in range(2000):
        s = rng.normal(size=(41, 1)).round(1)
        p.append(Detector("max_logit", tpr=0.5).fit(s[:40]).p_value(s[40:])[0])
    for a in (0.05, 0.1, 0.3, 0.5, 0.9):
        assert np.mean(np.array(p) <= a) <= a + 4 * math.sqrt(a * (1 - a) / len(p))


def test_each_predicted_class_keeps_its_promise():
    rng = np.random.default_rng(7)
    scale = np.array([1.0, 5.0, 20.0])

    def rows(n):
        y = rng.integers(0, 3, n)
        logits = rng.normal(size=(n, 3))
        logits[np.arange(n), y] += scale[y]
        return logits

    accepted, seen = np.zeros(3), np.zeros(3)
    for _ in range(300):
        fitted = Detector("max_logit", tpr=0.9, per_class=True).fit(rows(150))
        new = rows(200)
        c = new.argmax(1)
        accepted += np.bincount(c[fitted.accept(new)], minlength=3)
        seen += np.bincount(c, minlength=3)
    share = accepted / seen
    assert (share > 0.9 - 0.005).all()
    assert (share < 0.9 + 0.03).all()


@pytest.mark.parametrize("method", fastood.SCORES)
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_a_finite_score_are_never_accepted(method, per_class, dtype):
    logits, feats = (x.to(dtype) for x in data())
    fitted = Detector(method, tpr=0.9, per_class=per_class).fit(logits, feats)
    bad_f, bad_h = logits[:6].clone(), feats[:6].clone()
    bad_f[0, 1], bad_f[1, 1], bad_f[2] = math.nan, math.inf, -math.inf
    bad_h[3, 1], bad_h[4, 1] = math.nan, math.inf
    s, p, accepted = fitted.score(bad_f, bad_h), fitted.p_value(bad_f, bad_h), fitted.accept(bad_f, bad_h)
    assert not accepted[~s.isfinite()].any()
    if per_class or fitted.classes is not None:
        assert not accepted[:3].any()
    if fitted.dim is not None:
        assert not accepted[3:5].any()
    assert accepted.tolist() == (p > 1 - fitted.tpr).tolist()
    assert p[~s.isfinite()].isnan().all()
    assert fitted.accept(bad_f.numpy(), bad_h.numpy()).tolist() == accepted.tolist()


def test_calibration_rows_without_a_finite_score_are_counted_and_refused():
    logits, _ = data(50)
    logits[3, 2], logits[9, 1] = math.nan, math.inf
    fitted = Detector("energy")
    with pytest.raises(ValueError, match="the scores of 2 of 50 rows are not finite, the first of them nan in row 3"):
        fitted.fit(logits)
    fitted.partial_fit(logits[10:])
    with pytest.raises(ValueError, match="the scores of 1 of 5 rows are not finite, the first of them inf in row 4"):
        fitted.partial_fit(logits[5:10])
    assert fitted.rows == 40  # a batch that was refused has left nothing


def test_per_class_thresholds_are_those_of_the_rows_of_each_class():
    logits, feats = data(400)
    logits = torch.cat([logits, torch.full((400, 1), -50.0)], 1)
    logits[7, 5] = 60.0  # one row of class 5
    c, s = logits.argmax(1), fastood.score(logits, feats)
    fitted = Detector(tpr=0.9, per_class=True).fit(logits, feats)
    assert fitted.threshold.dtype == torch.float64
    for k in range(6):
        sample = s if k == 5 else s[c == k]  # too few rows: all of them
        rank = math.floor(Fraction(1, 10) * (len(sample) + 1))
        assert fitted.threshold[k].item() == sample.sort().values[rank - 1].item()
    new_f, new_h = data(100, seed=1)
    new_f = torch.cat([new_f, torch.full((100, 1), -50.0)], 1)
    new_f[::9, 5] = 60.0
    new_s, new_c = fastood.score(new_f, new_h), new_f.argmax(1)
    p = fitted.p_value(new_f, new_h)
    for i in range(100):
        sample = s if new_c[i] == 5 else s[c == new_c[i]]
        assert p[i].item() == float(p_by_definition(sample.tolist(), new_s[i].item()))
    accepted = fitted.accept(new_f, new_h)
    assert 0 < accepted.sum() < 100
    assert accepted.tolist() == (p > 1 - 0.9).tolist() == fitted.accept(new_f.numpy(), new_h.numpy()).tolist()
    assert "400 rows, 5 of 6 classes with a threshold of their own" in repr(fitted)


@pytest.mark.parametrize("per_class", [False, True])
def test_labels_leave_out_what_the_classifier_gets_wrong(per_class):
    logits, feats = data(400)
    y = logits.argmax(1)
    y[::3] = (y[::3] + 1) % 5
    right = torch.arange(400) % 3 != 0
    options = {"tpr": 0.8, "per_class": per_class}
    expected = Detector(**options).fit(logits[right], feats[right])
    for fitted in (
        Detector(**options).fit(logits, feats, y),
        Detector(**options).fit(logits.numpy(), feats.numpy(), y.numpy().astype(np.uint8)),
        Detector(**options)
        .partial_fit(logits[:150], feats[:150], y[:150])
        .partial_fit(logits[150:], feats[150:], y[150:]),
    ):
        assert fitted.rows == right.sum()
        np.testing.assert_array_equal(fitted.threshold, expected.threshold)
    with pytest.raises(ValueError, match="in-distribution rows, got 0 whose labels are the predicted classes"):
        Detector(**options).fit(logits, feats, (logits.argmax(1) + 1) % 5)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(3), TypeError, "labels must be integers, got torch.float32"),
        (torch.zeros(3, dtype=torch.bool), TypeError, "labels must be integers, got torch.bool"),
        ([0, 1, 2], TypeError, "labels must be a torch tensor or a numpy array of integers, got list"),
        (np.ma.masked_array([0, 1, 2], [0, 0, 1]), TypeError, "labels must not be a masked array: leave those rows"),
        (torch.tensor([0, 1]), ValueError, "labels must be [3], one class per row, got shape [2]"),
        (torch.tensor([0, 1, 5]), ValueError, "labels must be classes 0..4, got 0..5"),
        (torch.tensor([0, -1, 4]), ValueError, "labels must be classes 0..4, got -1..4"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Detector("msp").partial_fit(data(3)[0], labels=labels)


@pytest.mark.parametrize("per_class", [False, True])
def test_a_norm_that_turns_the_score_round_is_said(per_class):
    logits, feats = data()
    with pytest.warns(UserWarning, match=r"a threshold of energy\*\|\|h\|\|_0.3 is -.*: below 0 .* norm=None") as seen:
        fitted = Detector(per_class=per_class).fit(logits - 30, feats)
    assert seen[0].filename == __file__
    assert fitted.accept(logits - 30, feats * 1e-3).all()  # what it warns of
    Detector(norm=None, per_class=per_class).fit(logits - 30, feats)
    Detector("exgrad", per_class=per_class).fit(logits - 30, feats)
    # A few negative rows are below a threshold that is not, and refused as they should be.
    few = logits.clone()
    few[:3] -= 30
    fitted = Detector().fit(few, feats)
    assert not fitted.accept(logits - 30, feats * 1e-3).any()

"""Decisions: thresholds and p-values against their definition in exact fractions, their promise by simulation."""

import copy
import json
import math
import pickle
import random
import re
import struct
import sys
from fractions import Fraction
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastood
from fastood import Detector, detector
from fastood.files import FileError

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors")


def column(scores, dtype=torch.float32):
    """Logits [N, 1] whose largest logit is the score."""
    return torch.as_tensor(np.array(scores), dtype=dtype).reshape(-1, 1)


def of_max_logit(scores, **options):
    return Detector("max_logit", **options).fit(column(scores, torch.float64))


def p_by_definition(calibration, s):
    return Fraction(1 + sum(x <= s for x in calibration), len(calibration) + 1)


def data(n=300, C=5, D=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, C, generator=g), torch.randn(n, D, generator=g).relu() + 0.1


# ---- the rule

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


# ---- the promise


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


# ---- rows without a score


@pytest.mark.parametrize("method", ["energy", "msp", "norm", "max_logit", "exgrad"])
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
    if per_class or method != "norm":
        assert not accepted[:3].any()
    if method in ("norm", "exgrad"):
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


# ---- classes and labels


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


# ---- batches and shards


def same(a, b):
    new = data(40, seed=9)
    np.testing.assert_array_equal(a.threshold, b.threshold)
    assert a.rows == b.rows
    assert repr(a) == repr(b)
    np.testing.assert_array_equal(a.p_value(*new), b.p_value(*new))
    np.testing.assert_array_equal(a.accept(*new), b.accept(*new))
    return True


@given(st.lists(st.integers(0, 300), max_size=90), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_batches_and_shards_make_the_detector_of_all_rows(cuts, per_class, random):
    logits, feats = data()
    whole = Detector(per_class=per_class).fit(logits, feats)
    edges = [0, *sorted(cuts), 300]
    batches = [(logits[a:b], feats[a:b]) for a, b in pairwise(edges)]
    random.shuffle(batches)
    batched = Detector(per_class=per_class)
    for batch in batches:
        batched.partial_fit(*batch)
    assert same(batched, whole)
    shards = [Detector(per_class=per_class).partial_fit(*batch) for batch in batches if len(batch[0])]
    assert same(reduce(Detector.merge, shards), whole)
    for shard in shards[1:]:  # unchanged
        assert shard.rows < 300


def test_fit_forgets_and_partial_fit_does_not():
    logits, feats = data()
    fitted = Detector().fit(logits, feats)
    assert fitted.fit(logits[:100]).rows == 100
    assert fitted.dim is None
    assert "norm=None" in repr(fitted)
    assert fitted.partial_fit(logits[100:]).rows == 300
    assert fitted.threshold == Detector().fit(logits).threshold


def test_merge_says_what_differs():
    logits, feats = data()
    fitted = Detector().fit(logits, feats)
    others = {
        "method='energy', got method='msp'": Detector("msp").fit(logits, feats),
        "norm=0.3, got norm=None": Detector(norm=None).fit(logits, feats),
        "temperature=1.0, got temperature=2.0": Detector(temperature=2).fit(logits, feats),
        "tpr=0.95, got tpr=0.9": Detector(tpr=0.9).fit(logits, feats),
        "classes=5, got classes=4": Detector().fit(logits[:, :4], feats),
        "dim=7, got dim=6": Detector().fit(logits, feats[:, :6]),
        "per_class=False, got per_class=True": Detector(per_class=True).fit(logits, feats),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            fitted.merge(other)
    with pytest.raises(ValueError, match="other must be another detector"):
        fitted.merge(fitted)
    with pytest.raises(TypeError, match=r"other must be a fastood\.Detector, got str"):
        fitted.merge("x")
    with pytest.raises(RuntimeError, match="not fitted"):
        fitted.merge(Detector())
    assert fitted.rows == 300


# ---- scores


SETTINGS = [
    {},
    {"method": "msp", "norm": None},
    {"method": "msp", "norm": math.inf, "temperature": 2.5},
    {"method": "norm", "norm": 2, "bias": True},
    {"method": "norm", "per_class": True, "tpr": 0.8},
    {"method": "exgrad", "per_class": True, "tpr": 0.9},
    {"method": "gen", "norm": None, "gamma": 0.2, "M": np.int64(3)},
    {"method": "eg_p_l2sq", "temperature": 3},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64", "numpy"])
def test_scores_are_fastoods_and_survive_a_file(options, kind, tmp_path):
    rows = [x.numpy() if kind == "numpy" else x.to(getattr(torch, kind)) for x in data()]
    fitted = Detector(**options).fit(*rows)
    plain = {k: x for k, x in options.items() if k not in ("tpr", "per_class")}
    np.testing.assert_array_equal(fitted.score(*rows), fastood.score(*rows, **plain))
    np.testing.assert_array_equal(
        fitted.score(*rows, backend="reference"), fastood.score(*rows, **plain, backend="reference")
    )
    assert type(fitted.accept(*rows)) is type(fitted.score(*rows)) is type(rows[0])
    assert type(fitted.p_value(*rows)) is type(rows[0])
    share = fitted.accept(*rows).sum() / 300
    assert fitted.tpr <= share <= fitted.tpr + 0.03
    fitted.save(tmp_path / "d.safetensors")
    loaded = Detector.load(tmp_path / "d.safetensors")
    assert repr(loaded) == repr(fitted)
    np.testing.assert_array_equal(loaded.threshold, fitted.threshold)
    np.testing.assert_array_equal(loaded.accept(*rows), fitted.accept(*rows))
    np.testing.assert_array_equal(loaded.p_value(*rows), fitted.p_value(*rows))
    np.testing.assert_array_equal(
        loaded.merge(fitted).threshold, Detector(**options).fit(*rows).partial_fit(*rows).threshold
    )


def test_columns_are_those_it_was_fitted_on():
    logits, feats = data()
    fitted = Detector().fit(logits, feats)
    assert (fitted.classes, fitted.dim) == (5, 7)
    for use in (fitted.score, fitted.accept, fitted.p_value, fitted.partial_fit):
        with pytest.raises(ValueError, match=r"logits must have the 5 classes .* fitted on, got shape \[300, 4\]"):
            use(logits[:, :4], feats)
        with pytest.raises(ValueError, match=r"feats must have the 7 features .* fitted on, got shape \[300, 6\]"):
            use(logits, feats[:, :6])
        with pytest.raises(ValueError, match=r"feats must be given for norm=0\.3"):
            use(logits)
        with pytest.raises(TypeError, match="logits must be a torch tensor or a numpy array, got list"):
            use([1.0], feats)
    without = Detector("msp").fit(logits)
    assert (without.classes, without.dim) == (5, None)
    assert without.accept(logits, feats).tolist() == without.accept(logits).tolist()  # V alone, as it was fitted
    alone = Detector("norm", tpr=0.5).fit(None, feats)
    assert (alone.classes, alone.dim) == (None, 7)
    assert alone.accept(logits, feats).tolist() == alone.accept(None, feats).tolist()
    with pytest.raises(ValueError, match="logits must be given: per_class"):
        Detector("norm", per_class=True).fit(None, feats)
    with pytest.raises(ValueError, match="logits must be given with labels"):
        Detector("norm").fit(None, feats, torch.zeros(300, dtype=torch.int64))


def test_no_rows():
    logits, feats = data()
    fitted = Detector(per_class=True, tpr=0.8).partial_fit(logits[:0], feats[:0]).partial_fit(logits, feats)
    assert fitted.accept(logits[:0], feats[:0]).shape == fitted.p_value(logits[:0], feats[:0]).shape == (0,)
    with pytest.raises(ValueError, match="takes at least 19 in-distribution rows, got 0"):
        Detector().fit(logits[:0])
    assert Detector().partial_fit(logits[:0]).partial_fit(logits, feats).dim == 7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "enrgy"}, ValueError, "method must be one of"),
        ({"norm": -1}, ValueError, "norm must be a number >= 0, got -1"),
        ({"method": "exgrad", "norm": 2}, ValueError, "norm: exgrad"),
        ({"temperature": 0}, ValueError, "temperature must be a finite number > 0"),
        ({"bias": 1}, TypeError, "bias must be True or False, got 1"),
        ({"per_class": "yes"}, TypeError, "per_class must be True or False"),
        ({"tpr": 1}, ValueError, "tpr must be a number between 0 and 1, got 1"),
        ({"tpr": 95}, ValueError, "tpr must be a number between 0 and 1, got 95"),
        ({"tpr": 0}, ValueError, "tpr must be a finite number > 0, got 0"),
        ({"tpr": math.nan}, ValueError, "tpr must be a finite number > 0, got nan"),
        ({"gamma": 0.1}, TypeError, "gamma: no such argument, nor a parameter of energy"),
        ({"method": "gen", "norm": None, "gamma": -1}, ValueError, "gamma must be a finite number > 0"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Detector(**options)


def test_no_argument_is_advised_in_its_own_place():
    with pytest.raises(TypeError, match=r"log: no such argument, nor a parameter of energy$"):
        Detector(log=True)


def test_it_is_saved_under_a_name_that_says_what_it_is(tmp_path):
    fitted = Detector("msp").fit(data()[0])
    for name in ("x.pt", "x"):
        with pytest.raises(FileError, match=r"x.*: the file's name must end with \.safetensors"):
            fitted.save(tmp_path / name)


def test_before_it_is_fitted():
    fitted = Detector("msp", tpr=0.9)
    assert repr(fitted) == "Detector('msp', tpr=0.9; not fitted)"
    logits, _ = data()
    np.testing.assert_array_equal(fitted.score(logits), fastood.score(logits, method="msp"))
    for use in (fitted.accept, fitted.p_value, lambda x: fitted.save("x"), lambda x: fitted.threshold):
        with pytest.raises(RuntimeError, match="not fitted: call fit, partial_fit or load first"):
            use(logits)


def test_says_what_it_is():
    logits, feats = data()
    text = repr(Detector("tv", norm=math.inf, temperature=2, bias=True).fit(logits, feats))
    assert re.fullmatch(
        r"Detector\('tv', norm=inf, temperature=2.0, bias=True, tpr=0.95; fitted on 300 rows, threshold=[\d.]+\)", text
    )


def test_under_autograd_it_fits_and_decides_as_without():
    logits, feats = data()
    fitted = Detector().fit(logits.requires_grad_(), feats)
    assert fitted.threshold == Detector().fit(logits.detach(), feats).threshold
    assert fitted.accept(logits, feats).dtype == torch.bool
    assert fitted.p_value(logits, feats).shape == (300,)


@pytest.mark.parametrize("per_class", [False, True])
def test_compiled_and_exported(per_class):
    logits, feats = data()
    fitted = Detector(tpr=0.8, per_class=per_class).fit(logits, feats)
    logits, feats = data(seed=1)  # none of them on a threshold, where the last bit of a score decides
    expected = fitted.accept(logits, feats)
    compiled = torch.compile(fitted.accept, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(logits, feats), expected)

    class Head(torch.nn.Module):
        def forward(self, logits, feats):
            return fitted.accept(logits, feats)

    n = torch.export.Dim("n")
    exported = torch.export.export(Head(), (logits, feats), dynamic_shapes=({0: n}, {0: n})).module()
    assert torch.equal(exported(logits[:9], feats[:9]), expected[:9])


def test_pickle_and_copy():
    logits, feats = data()
    fitted = Detector(per_class=True, tpr=0.8).fit(logits, feats)
    assert same(pickle.loads(pickle.dumps(fitted)), fitted)
    copied = copy.deepcopy(fitted)
    copied.partial_fit(logits, feats)
    assert (copied.rows, fitted.rows) == (600, 300)


# ---- files


def parts(path):
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["fastood"]), safetensors_numpy.load(raw)


def rewritten(path, header, tensors):
    path.write_bytes(safetensors_numpy.save(tensors, metadata={"fastood": json.dumps(header)}))
    return path


@pytest.fixture
def saved(tmp_path):
    fitted = Detector(per_class=True, tpr=0.8).fit(*data())
    fitted.save(tmp_path / "d.safetensors")
    return tmp_path / "d.safetensors"


def test_the_file_is_plain_and_the_same_every_time(saved, tmp_path):
    header, tensors = parts(saved)
    assert header == {
        "kind": "Detector", "version": 1, "fastood": fastood.__version__, "rows": 300, "method": "energy", "norm": 0.3,
        "temperature": 1.0, "bias": False, "params": {}, "tpr": 0.8, "per_class": True, "classes": 5, "dim": 7,
    }  # fmt: skip
    scores = fastood.score(*data()).double().sort().values
    np.testing.assert_array_equal(tensors["scores"][:300], scores)
    assert tensors["counts"].tolist() == [300, *data()[0].argmax(1).bincount().tolist()]
    before = saved.read_bytes()
    Detector.load(saved).save(saved)
    assert saved.read_bytes() == before
    assert list(tmp_path.iterdir()) == [saved]


def changed(**changes):
    return lambda header, tensors: header.update(changes)


def without(name):
    return lambda header, tensors: (header if name in header else tensors).pop(name)


def put(name, i, x):
    def change(header, tensors):
        tensors[name][i] = x

    return change


def cast(name, dtype):
    def change(header, tensors):
        tensors[name] = tensors[name].astype(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(version=2, fastood="9.0"), "version 2, written by fastood 9.0; this is fastood .* reads version 1"),
        (changed(version="1"), "format version '1'"),
        (changed(kind="BatchGrad"), "not a file that Detector.save wrote"),
        *((without(x), f"it lacks '{x}'") for x in ("rows", "method", "norm", "params", "dim", "scores", "counts")),
        (changed(method="enrgy"), "method must be one of"),
        (changed(norm=-1), "norm must be a number >= 0"),
        (changed(norm="two"), "norm must be a number"),
        (changed(norm=None), "dim must be null for this score, got 7"),
        (changed(method="exgrad"), "norm of exgrad must be 1, got 0.3"),
        (changed(temperature=math.nan), "temperature must be a finite number"),
        (changed(tpr=1.5), "tpr must be a number between 0 and 1"),
        (changed(bias="no"), "bias must be True or False"),
        (changed(params={"gamma": 1}), "gamma: no such argument"),
        (changed(params={"tpr": 0.1}), "multiple values"),
        (changed(params=[1]), "params must be an object"),
        (changed(classes=4), "'counts' must be 5 numbers that add up to the 600 scores"),
        (changed(classes=10**15), "'counts' must be"),
        (changed(classes=True), "classes must be a number of columns or null, got True"),
        (changed(classes=None), "classes must not be null"),
        (changed(dim=-1), "dim must be a number of columns"),
        (changed(rows=299), "it must hold 299 rows, found 300"),
        (put("scores", 3, math.nan), "'scores' must be finite"),
        (put("scores", 299, math.inf), "'scores' must be finite"),
        (put("scores", 3, 1e9), "'scores' must not fall within a sample"),
        (put("counts", 1, -1), "'counts' must be"),
        (put("counts", 0, 2**62), "'counts' must be"),
        (put("counts", 1, 10**6), "'counts' must be"),
        (cast("scores", np.float32), "'scores' must not be .* float32"),
        (cast("counts", np.int32), "'counts' must not be .* int32"),
        (lambda h, t: t.update(scores=t["scores"][:, None]), "'scores' must not be"),
        (lambda h, t: t.update(scores=t["scores"][:-1].copy()), "'counts' must be"),
        (lambda h, t: t.update(counts=np.array([299, 301, 0, 0, 0, 0])), "'scores' must not fall|must hold|together"),
        (lambda h, t: t.update(more=np.zeros(3)), "'more' must not be there"),
        (lambda h, t: t.update(weights=np.zeros(600, np.int64)), "'weights' must be a number >= 1"),
        (lambda h, t: t.update(weights=np.full(600, 2**61)), "'weights' must be"),
        (lambda h, t: t.update(weights=np.full(600, 2)), "it must hold 300 rows, found 600"),
    ],
)  # fmt: skip
def test_a_file_that_was_tampered_with(saved, change, message):
    header, tensors = parts(saved)
    tensors = {name: x.copy() for name, x in tensors.items()}
    change(header, tensors)
    with pytest.raises(FileError, match=f"^{re.escape(str(saved))}: cannot be read as a detector: .*{message}"):
        Detector.load(rewritten(saved, header, tensors))


def test_bytes_changed_at_random_give_a_detector_or_a_clear_error(saved):
    good = saved.read_bytes()
    r = random.Random(1)
    refused = 0
    for _ in range(300):
        raw = bytearray(good)
        for _ in range(r.choice([1, 1, 3])):
            raw[r.randrange(r.choice([8, 500, 700, len(raw)]))] = r.randrange(256)
        saved.write_bytes(raw[: r.randrange(len(raw))] if r.random() < 0.1 else raw)
        try:
            assert math.isfinite(Detector.load(saved).threshold.sum())
        except FileError:
            refused += 1
    assert refused > 150


def test_other_files(tmp_path):
    with pytest.raises(FileError, match="nowhere: no such file"):
        Detector.load(tmp_path / "nowhere")
    pickled = tmp_path / "p.safetensors"
    pickled.write_bytes(pickle.dumps({"scores": [1.0]}))
    with pytest.raises(FileError, match="cannot be read as a detector"):
        Detector.load(pickled)
    deep = tmp_path / "deep.safetensors"
    deep.write_bytes(safetensors_numpy.save({"scores": np.zeros(3)}, {"fastood": '{"a":' * 100_000}))
    with pytest.raises(FileError, match=r"deep\.safetensors: cannot be read as a detector"):
        Detector.load(deep)
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(safetensors_numpy.save({"logits": np.zeros((3, 2))}))
    with pytest.raises(FileError, match=r"not a file that Detector\.save wrote"):
        Detector.load(plain)
    with pytest.raises(FileError, match="there is no folder"):
        Detector("msp").fit(data()[0]).save(tmp_path / "no" / "d.safetensors")


# ---- many rows


@pytest.fixture
def sketching(monkeypatch):
    pytest.importorskip("datasketches", reason="needs datasketches")
    monkeypatch.setattr(detector, "EXACT_ROWS", 10_000)


def test_the_stated_error_is_the_librarys():
    kll = pytest.importorskip("datasketches", reason="needs datasketches").kll_doubles_sketch
    assert kll.get_normalized_rank_error(detector.SKETCH_K, False) <= detector.SKETCH_ERROR


@pytest.mark.parametrize("per_class", [False, True])
def test_a_sketch_is_right_within_its_error_on_the_safe_side(sketching, per_class, tmp_path):
    N = 600_000
    rng = np.random.default_rng(2)
    logits = rng.gumbel(size=(N, 2 if per_class else 1)).astype(np.float32)
    s, c = logits.max(1), logits.argmax(1)
    shards = [Detector("max_logit", per_class=per_class) for _ in range(3)]
    for i, batch in enumerate(np.array_split(logits, 12)):
        shards[i % 3].partial_fit(batch)
    merged = reduce(Detector.merge, shards)
    assert merged.rows == N
    assert merged._all.slack == 60
    assert len(merged._all.ranked()[0]) < 200_000
    for k in range(2 if per_class else 1):
        mine = s[c == k]
        t = float(np.atleast_1d(merged.threshold)[k])
        # The library draws at random, and errs by more than is stated once in a hundred: three times that here.
        share = (mine >= t).mean()
        assert 0.95 - 2e-4 <= share <= 0.95 + 4.1e-4
    new = logits[:2000]
    p, accepted = merged.p_value(new), merged.accept(new)
    assert accepted.tolist() == (p > 1 - 0.95).tolist()
    for i in range(0, 2000, 50):
        mine = s[c == c[i]]
        exact = (1 + (mine <= s[i]).sum()) / (len(mine) + 1)
        assert exact - 2e-4 <= p[i] <= min(1, exact + 4.1e-4)
    # What was saved needs no library, neither to decide nor to merge with another such file.
    merged.save(tmp_path / "d.safetensors")
    same_rows = pickle.loads(pickle.dumps(merged))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasketches", None)
        a, b = (Detector.load(tmp_path / "d.safetensors") for _ in range(2))
        assert a.merge(b).rows == 2 * N
        for k, t in enumerate(np.atleast_1d(a.threshold)):
            assert 0.95 - 2e-4 <= (s[c == k] >= t).mean() <= 0.95 + 4.1e-4
    for other in (same_rows, Detector.load(tmp_path / "d.safetensors")):
        assert other.p_value(new).tolist() == p.tolist()
        other.partial_fit(logits[:9])
        assert other.rows == N + 9


def test_what_a_sketch_cannot_know(sketching):
    scores = np.random.default_rng(0).normal(size=(20_000, 1))
    with pytest.raises(ValueError, match=r"tpr=0\.9999 is out of reach: a sketch of 20000 rows .* at most 10000 rows"):
        Detector("max_logit", tpr=0.9999).fit(scores)
    assert Detector("max_logit", tpr=0.999).fit(scores).accept(scores).mean() >= 0.999


def test_without_the_library_the_error_says_so_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(detector, "EXACT_ROWS", 100)
    monkeypatch.setitem(sys.modules, "datasketches", None)
    fitted = Detector("max_logit").fit(np.arange(100.0)[:, None])
    with pytest.raises(RuntimeError, match="datasketches is needed for more than 100 calibration rows: pip install"):
        fitted.partial_fit(np.arange(5.0)[:, None])
    assert fitted.rows == 100
    assert fitted.threshold == 4

"""What a detector is made of and from: its settings, rows in batches and shards, copies, graphs."""

import copy
import math
import pickle
import re
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from calibration import data
from hypothesis import given, settings
from hypothesis import strategies as st

import fastood
from fastood import Detector
from fastood.files import FileError


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


def test_a_fit_that_fails_adds_no_row():
    logits, feats = data()
    bad = logits.clone()
    bad[7] = math.nan
    fitted = Detector(tpr=0.9)
    for use in (fitted.partial_fit, fitted.fit):
        with pytest.raises(ValueError, match="1 of 300 rows are not finite"):
            use(bad)
        assert repr(fitted) == "Detector('energy', tpr=0.9; not fitted)"
        assert torch.equal(fitted.score(logits, feats), fastood.score(logits, feats))  # nor is the norm decided
    fitted.fit(logits, feats)
    before = repr(fitted)
    for rows in ((bad, feats), (logits[:, :2], feats), (logits, feats, torch.full((300,), 5))):
        with pytest.raises(ValueError, match=r"^(logits|labels)"):
            fitted.partial_fit(*rows)
        assert repr(fitted) == before


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


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.filterwarnings("ignore")  # torch's own, in its compiler
def test_a_compiled_p_value_is_the_eager_one_to_the_bit(per_class):
    """Which is what lets p > 1 - tpr say which rows are accepted."""
    torch._dynamo.reset()
    logits, feats = data()
    fitted = Detector(tpr=0.95, per_class=per_class).fit(logits, feats)
    p = torch.compile(fitted.p_value, backend="eager")(logits, feats)
    assert torch.equal(p, fitted.p_value(logits, feats))
    if not per_class:
        assert torch.equal(p > 1 - 0.95, fitted.accept(logits, feats))
        assert len(set((p * 301).tolist())) > 200  # of 300 rows


def test_pickle_and_copy():
    logits, feats = data()
    fitted = Detector(per_class=True, tpr=0.8).fit(logits, feats)
    assert same(pickle.loads(pickle.dumps(fitted)), fitted)
    copied = copy.deepcopy(fitted)
    copied.partial_fit(logits, feats)
    assert (copied.rows, fitted.rows) == (600, 300)

"""More calibration rows than are kept: a sketch, on the safe side of its error."""

import pickle
import sys
from functools import reduce

import numpy as np
import pytest

from fastood import Detector, _sample


@pytest.fixture
def sketching(monkeypatch):
    pytest.importorskip("datasketches", reason="needs datasketches")
    monkeypatch.setattr(_sample, "EXACT_ROWS", 10_000)


def test_the_stated_error_is_the_librarys():
    kll = pytest.importorskip("datasketches", reason="needs datasketches").kll_doubles_sketch
    assert kll.get_normalized_rank_error(_sample.SKETCH_K, False) <= _sample.SKETCH_ERROR


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
    monkeypatch.setattr(_sample, "EXACT_ROWS", 100)
    monkeypatch.setitem(sys.modules, "datasketches", None)
    fitted = Detector("max_logit").fit(np.arange(100.0)[:, None])
    with pytest.raises(RuntimeError, match="datasketches is needed for more than 100 calibration rows: pip install"):
        fitted.partial_fit(np.arange(5.0)[:, None])
    shard = Detector("max_logit").fit(np.full((40, 1), 7.0)).partial_fit(np.full((40, 1), 8.0))
    small = Detector("max_logit").fit(np.arange(50.0)[:, None])
    with pytest.raises(RuntimeError, match="datasketches is needed"):
        small.merge(shard)  # of whose two parts one would fit
    assert (small.rows, small.threshold) == (50, 1)
    assert fitted.rows == 100
    assert fitted.threshold == 4

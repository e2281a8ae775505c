"""The successors: each against its formula in float64, written here anew; fits that merge, in any order; files."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import oas

import fastood
from fastood import SUCCESSORS, Detector, Fitted
from fastood.files import FileError
from fastood.successors import nearest

N, C, D = 240, 6, 24


def rows(seed=0, n=N):
    """Logits, feats, labels and the head (weight, bias) that made the logits, as numpy float64."""
    g = np.random.default_rng(seed)
    head = np.random.default_rng(99)
    weight, bias = head.normal(size=(C, D)), head.normal(size=C)
    labels = g.integers(0, C, n)
    feats = np.maximum(1.5 * weight[labels] + g.normal(size=(n, D)), 0) + 0.1 * g.random((n, D))
    return feats @ weight.T + bias, feats, labels, (weight, bias)


def lse(x):
    top = x.max(1, keepdims=True)
    return top[:, 0] + np.log(np.exp(x - top).sum(1))


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def largest(h, k):
    return np.sort(h, 1)[:, ::-1][:, :k]


def topped(h, k):
    kept = np.argsort(-h, 1)[:, :k]
    out = np.zeros_like(h)
    np.put_along_axis(out, kept, np.take_along_axis(h, kept, 1), 1)
    return out


def shrunk(x, shrinkage):
    """The inverse of the shrunk covariance of rows about 0."""
    covariance = x.T @ x / len(x)
    if shrinkage is None:
        shrinkage = oas(x, assume_centered=True)[1]
    return np.linalg.inv((1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / D * np.eye(D))


def squared_distances(h, means, inverse):
    return np.stack([np.einsum("nd,de,ne->n", h - m, inverse, h - m) for m in means], 1)


def class_means(x, y):
    return np.stack([x[y == k].mean(0) for k in range(C)])


def distances(h, train, shrinkage=None):
    _, x, y, _ = train
    means = class_means(x, y)
    return squared_distances(h, means, shrunk(x - means[y], shrinkage)).min(1)


def relative(h, train):
    x = train[1] - train[1].mean(0)
    return distances(h, train) - squared_distances(h, [train[1].mean(0)], shrunk(x, None))[:, 0]


def vim(z, h, train, head, dim=D // 2):
    weight, bias = head
    origin = -np.linalg.pinv(weight) @ bias
    about = train[1] - origin
    _, vectors = np.linalg.eigh(about.T @ about)
    residual = vectors[:, : D - dim]
    alpha = train[0].max(1).mean() / np.linalg.norm(about @ residual, axis=1).mean()
    return lse(z) - alpha * np.linalg.norm((h - origin) @ residual, axis=1)


def boundaries(z, h, train, weight):
    total = []
    for zi, hi in zip(z, h, strict=True):
        y = zi.argmax()
        others = [(zi[y] - zi[k]) / np.linalg.norm(weight[y] - weight[k]) for k in range(C) if k != y]
        total.append(np.mean(others) / np.linalg.norm(hi - train[1].mean(0)))
    return np.array(total)


def nci(z, h, train, weight, alpha=1e-4):
    off = h - train[1].mean(0)
    return np.einsum("nd,nd->n", weight[z.argmax(1)], off) / np.linalg.norm(off, axis=1) + alpha * np.abs(h).sum(1)


def kl(z, train):
    p, q = softmax(z), softmax(train[0])
    d = np.stack([q[train[0].argmax(1) == k].mean(0) for k in range(C)])
    return (p[:, None] * (np.log(p)[:, None] - np.log(d))).sum(2).min(1)


def patterns(z, h, train):
    z0, x, y, _ = train
    right = z0.argmax(1) == y
    return np.einsum("nd,nd->n", h, class_means(x[right], y[right])[z.argmax(1)])


def kth_distance(h, train, k=50):
    return np.sort(np.linalg.norm(unit(h)[:, None] - unit(train[1]), axis=2), 1)[:, k - 1]


def guided(z, h, train, k=10):
    return largest(unit(h) @ unit(train[1]).T * lse(train[0]), k).mean(1) * lse(z)


def scaled(z, h, bias, percentile=0.85):
    k = D - round(D * percentile)
    r = np.exp(h.sum(1) / largest(h, k).sum(1))[:, None]
    return lse(r * (z - bias) + bias)


def lts(z, h, p=0.05):
    h = np.maximum(h, 0)
    return lse(z * ((h.sum(1) / largest(h, max(1, D - round(D * (1 - p)))).sum(1)) ** 2)[:, None])


def ash(h, weight, bias, kind, percentile):
    k = D - round(D * percentile)
    shaped = topped(h, k)
    if kind == "b":
        shaped = (shaped > 0) * (h.sum(1) / k)[:, None]
    if kind == "s":
        shaped = shaped * np.exp(h.sum(1) / shaped.sum(1))[:, None]
    return lse(shaped @ weight.T + bias)


def clip(train):
    return np.percentile(train[1], 90)


def cosines(h, weight):
    return unit(h) @ unit(weight).T


# Raw, from the tested rows' logits z and features h, the rows fitted on, and the head.
TRUTH = {
    "scale": lambda z, h, t, w, b: scaled(z, h, b),
    "lts": lambda z, h, t, w, b: lts(z, h),
    "dml": lambda z, h, t, w, b: cosines(h, w).max(1) + np.linalg.norm(h, axis=1),
    "ash_p": lambda z, h, t, w, b: ash(h, w, b, "p", 0.6),
    "ash_b": lambda z, h, t, w, b: ash(h, w, b, "b", 0.65),
    "ash_s": lambda z, h, t, w, b: ash(h, w, b, "s", 0.9),
    "react": lambda z, h, t, w, b: lse(np.minimum(h, clip(t)) @ w.T + b),
    "rg": lambda z, h, t, w, b: np.abs(np.minimum(h, clip(t))).sum(1) * lse(z),
    "nci": lambda z, h, t, w, b: nci(z, h, t, w),
    "fdbd": lambda z, h, t, w, b: boundaries(z, h, t, w),
    "she": lambda z, h, t, w, b: patterns(z, h, t),
    "kl_matching": lambda z, h, t, w, b: kl(z, t),
    "class_cosine": lambda z, h, t, w, b: (unit(h) @ unit(class_means(t[1], t[2])).T).max(1),
    "mahalanobis": lambda z, h, t, w, b: distances(h, t),
    "relative_mahalanobis": lambda z, h, t, w, b: relative(h, t),
    "vim": lambda z, h, t, w, b: vim(z, h, t, (w, b)),
    "knn": lambda z, h, t, w, b: kth_distance(h, t),
    "nnguide": lambda z, h, t, w, b: guided(z, h, t),
}
KEPT = {"ash_p": 0.6, "ash_b": 0.65, "ash_s": 0.9}
CLIPPED = {"react", "rg"}  # by a quantile that is known to 2^-11 of itself


def fitted(name, train=None, head=None, **params):
    z, h, y, own = rows() if train is None else train
    made = Fitted(name, head=(own if head is None else head) if SUCCESSORS[name].head else None, **params)
    return made.fit(z, h, y) if SUCCESSORS[name].fitted_on else made


def bound(name, dtype):
    """Relative, and absolute in units of the largest score."""
    return max({torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2), 1e-3 if name in CLIPPED else 0)


def test_each_has_its_truth_here():
    assert TRUTH.keys() == SUCCESSORS.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SUCCESSORS)
def test_as_its_formula_in_float64(name, dtype):
    train = rows()
    z, h, _, (w, b) = rows(1)
    f, g = (torch.from_numpy(x).to(dtype) for x in (z, h))
    made = fitted(name, train)
    if dtype in (torch.float16, torch.bfloat16):  # against truth of what the halves hold
        z, h = f.double().numpy(), g.double().numpy()
    expected = TRUTH[name](z, h, train, w, b)
    sign = -1 if SUCCESSORS[name].higher == "out" else 1
    if name in KEPT:  # in the halves there are ties for the last place, which any may win
        k = D - round(D * KEPT[name])
        ranked = largest(h, k + 1)
        clear = ranked[:, k - 1] > ranked[:, k]
        assert clear.sum() > N / 2
        f, g, expected = f[clear], g[clear], expected[clear]
    got = fastood.score(f, g, made)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = bound(name, dtype)
    np.testing.assert_allclose(got.double().numpy(), sign * expected, rtol=rtol, atol=rtol * np.abs(expected).max())
    raw = made.score(f, g, oriented=False)
    torch.testing.assert_close(raw, sign * got, rtol=0, atol=0)
    if dtype not in (torch.bfloat16,):
        in_numpy = fastood.score(f.numpy(), g.numpy(), made)
        assert isinstance(in_numpy, np.ndarray)
        np.testing.assert_array_equal(in_numpy, got.numpy(), strict=True)


@pytest.mark.parametrize("name", SUCCESSORS)
def test_it_tells_outliers_apart(name):
    """Which is what `higher` is for: features halfway between two classes score lower."""
    train, (z, h, _, (w, b)) = rows(), rows(1)
    g = np.random.default_rng(2)
    a = g.integers(0, C, N)
    out = np.maximum(0.75 * (w[a] + w[(a + g.integers(1, C, N)) % C]) + g.normal(size=h.shape), 0)
    made = fitted(name, train, **({"k": 10} if name == "knn" else {}))  # fewer than a class has rows
    auroc = fastood.metrics.auroc(made.score(z, h), made.score(out @ w.T + b, out))
    assert auroc > 0.6, name


@pytest.mark.parametrize("name", [name for name, x in SUCCESSORS.items() if x.fitted_on])
@given(data=st.data())
@settings(max_examples=5)
def test_however_rows_are_split_and_ordered(name, data):
    z, h, y, head = rows()
    whole = fitted(name)
    order = np.array(data.draw(st.permutations(range(N))))
    cuts = sorted(data.draw(st.lists(st.integers(0, N), max_size=4)))
    shards = []
    for part in np.split(order, cuts):
        shard = Fitted(name, head=head if SUCCESSORS[name].head else None)
        for some in np.array_split(part, 2):
            shard.partial_fit(z[some], h[some], y[some])
        shards.append(shard)
    merged = shards.pop(data.draw(st.integers(0, len(shards) - 1)))
    for shard in shards:
        merged.merge(shard)
    assert merged.rows == N
    new = rows(1)
    np.testing.assert_allclose(merged.score(*new[:2]), whole.score(*new[:2]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SUCCESSORS)
def test_saved_and_loaded(name, tmp_path):
    made, new = fitted(name), rows(1)
    made.save(tmp_path / "x.safetensors")
    loaded = Fitted.load(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(loaded.score(*new[:2]), made.score(*new[:2]))
    assert repr(loaded) == repr(made)
    assert loaded.digest() == made.digest()
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        np.testing.assert_array_equal(again.score(*new[:2]), made.score(*new[:2]))
    if SUCCESSORS[name].fitted_on:
        assert loaded.merge(made).rows == 2 * N  # a file can be fitted on


def test_files_that_are_none(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(FileError, match="no such file"):
        Fitted.load(path)
    Detector("msp", tpr=0.5).fit(rows()[0]).save(path)
    with pytest.raises(FileError, match="not a file that Fitted"):
        Fitted.load(path)
    fitted("nci").save(path)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fastood"])

    def refused(match, changed=None, without=(), **more):
        held = {k: x for k, x in {**tensors, **more}.items() if k not in without}
        save_file(held, path, {"fastood": json.dumps({**header, **(changed or {})})})
        with pytest.raises(FileError, match=match):
            Fitted.load(path)

    refused("format version 9", {"version": 9})
    refused("method must be one of", {"method": "os.system"})
    refused("alpha must be a finite number >= 0", {"params": {"alpha": -1}})
    refused("no such parameter of nci", {"params": {"beta": 1}})
    refused("params must be an object", {"params": 3})
    refused("temperature", {"temperature": 0})
    refused("rows must be a whole number", {"rows": -3})
    refused("classes must be the head's 6", {"classes": 7})
    refused("its head must have weight, bias, got bias", without=["head.weight"])
    refused("the head's bias must not be torch.int64", **{"head.bias": torch.arange(C)})
    refused("as many classes", **{"head.bias": torch.zeros(C + 1)})
    refused("it must hold sum, n, got n", without=["sums.sum"])
    refused(r"'sum' must be \[24\], got \[23\]", **{"sums.sum": torch.zeros(23)})
    refused("'sum' must be finite", **{"sums.sum": torch.full((D,), math.nan)})
    refused("'pickle' must not be there", pickle=torch.zeros(1))


def test_a_detector_decides_by_one(tmp_path):
    train, calibration, new = rows(), rows(3), rows(1)
    for name in SUCCESSORS:
        made = fitted(name, train)
        detector = Detector(made, tpr=0.9)
        for part in np.array_split(np.arange(N), 3):
            detector.partial_fit(calibration[0][part], calibration[1][part])
        assert detector.rows == N
        np.testing.assert_array_equal(detector.score(*new[:2]), made.score(*new[:2]))
        share = detector.accept(*new[:2]).mean()
        assert 0.75 < share <= 1, name
        detector.save(tmp_path / "d.safetensors")
        loaded = Detector.load(tmp_path / "d.safetensors")
        np.testing.assert_array_equal(loaded.accept(*new[:2]), detector.accept(*new[:2]))
        np.testing.assert_array_equal(loaded.p_value(*new[:2]), detector.p_value(*new[:2]))
        assert repr(loaded) == repr(detector)
        assert (loaded.classes, loaded.dim) == (detector.classes, detector.dim)
        shard = Detector(fitted(name, train), tpr=0.9).partial_fit(*calibration[:2])
        assert shard.merge(loaded).rows == 2 * N


def test_a_detector_fits_its_own_on_every_other_row():
    z, h, y, _ = rows()
    by_name = Detector("mahalanobis", tpr=0.9).fit(z, h, y)
    fit = Fitted("mahalanobis").fit(z[::2], h[::2], y[::2])
    by_hand = Detector(fit, tpr=0.9).fit(z[1::2], h[1::2], y[1::2])
    assert by_name.threshold == by_hand.threshold
    assert by_name.successor.rows == N // 2
    assert by_name.fit(z[:100], h[:100]).successor.rows == 50  # anew
    with pytest.raises(RuntimeError, match="knn is not fitted"):
        Detector("knn").partial_fit(z, h)
    with pytest.raises(ValueError, match=r"labels must be \[240\]"):
        Detector("she").fit(z, h, y[:-1])
    other = Detector(Fitted("mahalanobis").fit(z, h, y), tpr=0.9).partial_fit(z, h)
    with pytest.raises(ValueError, match="by the same fitted mahalanobis"):
        other.merge(Detector(fit, tpr=0.9).partial_fit(z, h))
    pixels = Detector("knn", k=3, tpr=0.9).fit(
        z.reshape(4, 6, 10, C).transpose(0, 3, 1, 2), h.reshape(4, 6, 10, D).transpose(0, 3, 1, 2), dim=1
    )
    assert pixels.successor.rows == pixels.rows == N // 2


def test_each_class_has_its_threshold():
    z, h, _, _ = rows()
    detector = Detector(fitted("mahalanobis"), tpr=0.8, per_class=True).fit(*rows(3)[:2])
    assert detector.threshold.shape == (C,)
    odd = z.copy()
    odd[3] = np.nan
    assert not detector.accept(odd, h)[3]


def test_detectors_choose_among_them_and_stand_in_scikit_learn():
    from fastood.sklearn import OODDetector

    calibration, (z, h, _, head) = rows(3, n=400), rows(1)
    made = fitted("class_cosine")
    candidates = [{"method": made}, {"method": "scale", "head": head}, "msp"]
    detector = Detector.choose(calibration[:2], {"small": (0.1 * z, np.abs(h - h.mean()))}, candidates, tpr=0.9)
    assert {row["method"] for row in detector.choice.table} == {"class_cosine", "scale", "msp"}
    estimator = OODDetector(made, n_classes=C, tpr=0.9).fit(np.hstack(calibration[:2]))
    np.testing.assert_array_equal(estimator.score_samples(np.hstack([z, h])), made.score(z, h))


def test_scores_of_both_kinds_from_one_call():
    z, h, _, head = rows()
    made = fitted("knn", k=7)
    found = fastood.scores(z, h, ["scale", "energy", made, "gen"], norm=None, head=head, percentile=0.5, M=3)
    assert list(found) == ["scale", "energy", "knn", "gen"]
    np.testing.assert_array_equal(found["scale"], fastood.score(z, h, "scale", head=head, percentile=0.5))
    np.testing.assert_array_equal(found["knn"], made.score(z, h))
    np.testing.assert_array_equal(found["gen"], fastood.score(z, h, "gen", M=3))
    with pytest.raises(TypeError, match="percentil: no such"):
        fastood.scores(z, h, ["scale"], head=head, percentil=0.5)
    volume = z.reshape(4, 60, C), h.reshape(4, 60, D)
    stacked = fastood.scores(*volume, ["scale", "msp"], head=head, dim=-1)
    assert {name: x.shape for name, x in stacked.items()} == {"scale": (4, 60), "msp": (4, 60)}


@pytest.mark.parametrize("name", SUCCESSORS)
def test_a_bad_row_is_nan_and_no_other(name):
    z, h, _, _ = rows(1)
    made = fitted(name)
    clean = made.score(z, h)
    bad_z, bad_h = z.copy(), h.copy()
    needs = SUCCESSORS[name].needs
    odd = set()
    if "logits" in needs:
        bad_z[3, 2], bad_z[7], bad_z[11, 0] = np.nan, -np.inf, np.inf
        odd |= {3, 7, 11}
    if "feats" in needs:
        bad_h[20, 5], bad_h[21, 0], bad_h[22, 1] = np.nan, np.inf, -np.inf
        odd |= {20, 21, 22}
    got = made.score(bad_z, bad_h)
    assert set(np.flatnonzero(np.isnan(got))) == odd
    np.testing.assert_array_equal(np.delete(got, sorted(odd)), np.delete(clean, sorted(odd)))
    assert made.score(z[:0], h[:0]).shape == (0,)


@pytest.mark.parametrize("name", ["scale", "lts", "dml", "nci", "fdbd", "she", "kl_matching", "vim", "nnguide", "rg"])
def test_a_masked_class_counts_for_nothing(name):
    z, h, _, (w, b) = rows(1)
    k = 2
    keep = z.argmax(1) != k
    z, h = z[keep], h[keep]
    masked = z.copy()
    masked[:, k] = -np.inf
    got = fitted(name).score(masked, h)
    assert np.isfinite(got).all()
    if name == "scale":
        others = np.arange(C) != k
        np.testing.assert_allclose(got, scaled(z[:, others], h, b[others]), rtol=1e-10)
        both = b.copy()
        both[k] = -np.inf  # as a head that masks it has it
        np.testing.assert_array_equal(fastood.score(masked, h, "scale", head=(w, both)), got)


def test_rows_of_zeros_and_of_one_class():
    z, h, y, (w, b) = rows(1)
    zero = np.zeros((2, D))
    at_zero = fastood.score(zero @ w.T + b, zero, "scale", head=(w, b))
    np.testing.assert_allclose(at_zero, lse(b[None])[0], rtol=1e-12)
    np.testing.assert_allclose(fastood.score(zero @ w.T + b, zero, "lts"), lse(b[None])[0], rtol=1e-12)
    one = fitted("fdbd", (z[:, :1], h, 0 * y, (w[:1], b[:1])))
    assert (one.score(z[:, :1], h) == 0).all()
    twins = np.concatenate([w, w[:1]])  # equal rows of a head have no boundary
    head = twins, np.append(b, b[0])
    logits = h @ twins.T + head[1]
    got = Fitted("fdbd", head=head).fit(logits, h).score(logits, h)
    assert np.isfinite(got).all()


def test_ash_s_is_scale_where_the_rest_is_zero():
    h = np.zeros((5, D))
    h[:, :4] = np.abs(np.random.default_rng(0).normal(size=(5, 4)))
    w, b = rows()[3]
    z = h @ w.T + b
    args = {"head": (w, b), "percentile": 0.5}
    np.testing.assert_allclose(
        fastood.score(None, h, "ash_s", **args), fastood.score(z, h, "scale", **args), rtol=1e-12
    )


# ---- the covariance


def test_a_singular_covariance_does_not_break_it():
    z, h, y, _ = rows()
    h = h.copy()
    h[:, -1] = 0  # a dead feature
    h[:, -2] = h[:, 0]  # and a double
    few = slice(0, 20)  # fewer rows than features
    for some in (slice(None), few):
        for name in ("mahalanobis", "relative_mahalanobis"):
            made = Fitted(name).fit(z[some], h[some], y[some])
            assert np.isfinite(made.score(None, rows(1)[1])).all()
        with pytest.raises(ValueError, match="singular covariance, which shrinkage=0 does not mend"):
            Fitted("mahalanobis", shrinkage=0).fit(z[some], h[some], y[some])
    with pytest.raises(ValueError, match="must vary within classes"):
        Fitted("mahalanobis").fit(None, np.ones((10, 3)), np.zeros(10, int))


@pytest.mark.parametrize("shrinkage", [0, 0.3, 1.0])
def test_shrinkage_by_hand(shrinkage):
    h = rows(1)[1]
    got = fitted("mahalanobis", shrinkage=shrinkage).score(None, h)
    np.testing.assert_allclose(got, -distances(h, rows(), shrinkage), rtol=1e-8)


def test_features_far_from_zero():
    z, h, y, _ = rows()
    far = h + 1000.0
    got = Fitted("mahalanobis").fit(z, far, y).score(None, rows(1)[1] + 1000.0)
    np.testing.assert_allclose(got, fitted("mahalanobis").score(None, rows(1)[1]), rtol=1e-6)


def test_classes_without_rows_are_left_out():
    z, h, y, _ = rows()
    some = y != 2
    by_label = Fitted("mahalanobis").fit(z[some], h[some], y[some])
    renamed = np.array([0, 1, -1, 2, 3, 4])[y[some]]
    same = Fitted("mahalanobis").fit(None, h[some], renamed)
    np.testing.assert_allclose(by_label.score(None, h), same.score(None, h), rtol=1e-9)
    she = Fitted("she").fit(z[some], h[some], y[some])
    np.testing.assert_array_equal(np.isnan(she.score(z, h)), z.argmax(1) == 2)


def test_labels_without_logits_name_their_classes_as_they_come():
    _, h, y, _ = rows()
    order = np.argsort(y)
    streamed = Fitted("class_cosine")
    for part in np.array_split(order, 7):  # later batches have more classes
        streamed.partial_fit(None, h[part], y[part])
    np.testing.assert_allclose(streamed.score(None, h), fitted("class_cosine").score(None, h), rtol=1e-12)
    with pytest.raises(ValueError, match="logits must be given to fit mahalanobis where there are no labels"):
        Fitted("mahalanobis").fit(None, h)


# ---- the quantile of ReAct


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
)
def test_the_clip_is_the_percentile(values, percentile):
    x = np.array(values, np.float32)[:, None]
    made = Fitted("react", head=(np.ones((2, 1)), np.zeros(2)), percentile=percentile).fit(None, x)
    low, high = (np.percentile(x.astype(float), 100 * percentile, method=m) for m in ("lower", "higher"))
    clip = float(made.state["clip"])
    assert low - abs(low) * 2**-11 - 1e-37 <= clip <= high + abs(high) * 2**-11 + 1e-37


# ---- neighbours


def test_neighbours_by_tiles_are_those_of_a_whole_product(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, bank = torch.randn(30, 8, generator=g), torch.randn(1000, 8, generator=g)
    whole = (x @ bank.T).topk(7, 1).indices
    for tile in (1, 210, 3333, 1 << 22):
        monkeypatch.setattr(nearest, "TILE", tile)
        assert torch.equal(nearest.nearest(x, bank, 7), whole)


def test_near_neighbours_are_told_apart_in_float32():
    g = torch.Generator().manual_seed(0)
    bank, x = (1 + 1e-3 * torch.randn(n, D, generator=g) for n in (500, 40))
    got = Fitted("knn", k=10).fit(None, bank).score(None, x)
    np.testing.assert_allclose(-got, kth_distance(x.double().numpy(), (None, bank.double().numpy()), 10), rtol=3e-4)


def test_a_neighbour_that_is_the_row_itself():
    h = rows()[1]
    got = fitted("knn", k=1).score(None, h)
    assert np.abs(got).max() < 1e-6
    with pytest.raises(ValueError, match="k=300 takes at least as many in-distribution rows, got 240"):
        fitted("knn", k=300)


# ---- what is refused


def test_what_is_refused():
    z, h, _, head = rows()
    linear = torch.nn.Linear(D, C)

    def refused(match, *args, error=ValueError, **options):
        with pytest.raises(error, match=match):
            fastood.score(*args, **options)

    refused("head must be given: scale = energy of r", z, h, "scale")
    refused("feats must be given: scale", z, None, "scale", head=head)
    refused("logits must be given: scale", None, h, "scale", head=head)
    refused("mahalanobis is not fitted", z, h, "mahalanobis", error=RuntimeError)
    refused("did you mean 'scale'", z, h, "scal")
    refused("norm: scale takes none", z, h, "scale", head=head, norm=2)
    refused("log: scale takes none", z, h, "scale", head=head, log=True)
    refused("bias: scale takes none", z, h, "scale", head=head, bias=True)
    refused("oriented must be True or False", z, h, "scale", head=head, oriented=3, error=TypeError)
    refused("percentile must be a number from 0 to 1, got 1.5", z, h, "scale", head=head, percentile=1.5)
    refused("gamma: no such parameter of scale", z, h, "scale", head=head, gamma=1, error=TypeError)
    refused("logits must have the 6 classes of scale", z[:, :5], h, "scale", head=head)
    refused("feats must have the 24 features of dml", z, h[:, :5], "dml", head=head)
    refused("at least one feature", z, h[:, :0], "scale", head=head)
    refused("head must be a Linear", z, h, "scale", head=torch.nn.Conv2d(D, C, 3), error=TypeError)
    refused("head must be a Linear", z, h, "scale", head="fc", error=TypeError)
    refused(r"head: bias must be \[6\]", z, h, "scale", head=(head[0], head[1][:3]))
    refused("must not be given with a fastood.Fitted", z, h, fitted("scale"), head=head)
    refused("temperature must be that of method, 1, got 2", z, h, fitted("scale"), temperature=2.0)
    with pytest.raises(ValueError, match="SCORES here, got 'scale'"):
        fastood.sweep(z, h, ["scale"])
    for bad, error, match in (
        ({"k": 0}, ValueError, "k must be a finite number >= 1"),
        ({"k": 5.0}, TypeError, "k must be a whole number"),
    ):
        with pytest.raises(error, match=match):
            Fitted("knn", **bad)
    with pytest.raises(ValueError, match="dim must be below the 24 features, got 24"):
        fitted("vim", dim=24)
    with pytest.raises(ValueError, match="shrinkage must be 'oas' or a number from 0 to 1"):
        Fitted("mahalanobis", shrinkage="lw")
    with pytest.raises(ValueError, match="scale needs no fit"):
        Fitted("scale", head=linear).fit(z, h)
    with pytest.raises(ValueError, match="feats must be given to fit nci"):
        Fitted("nci", head=linear).fit(z)
    spoiled = h.copy()
    spoiled[5, 3] = np.nan
    with pytest.raises(ValueError, match=r"1 of 240 rows hold NaN, infinite features, or logits .* row 5"):
        Fitted("knn").fit(z, spoiled)
    a = Fitted("knn").fit(z, h)
    for other, match in (
        (Fitted("knn", k=3).fit(z, h), "params"),
        (Fitted("knn").fit(z[:, :3], h[:, :5]), "dim=24|classes=6"),
    ):
        with pytest.raises(ValueError, match=match):
            a.merge(other)
    with pytest.raises(ValueError, match="the same head, its weight differs"):
        fitted("nci").merge(fitted("nci", head=linear))
    with pytest.raises(ValueError, match="got the same one"):
        a.merge(a)
    with pytest.raises(TypeError, match="other must be a fastood"):
        a.merge(3)


def test_heads_of_every_kind():
    z, h, _, (w, b) = rows()
    z, h = (torch.from_numpy(x).float() for x in (z, h))
    linear = torch.nn.Linear(D, C)
    linear.weight.data, linear.bias.data = torch.from_numpy(w).float(), torch.from_numpy(b).float()
    conv = torch.nn.Conv2d(D, C, 1)
    conv.weight.data, conv.bias.data = linear.weight.data[:, :, None, None], linear.bias.data
    expected = fastood.score(z, h, "dml", head=linear)
    assert not expected.requires_grad
    for head in (conv, (linear.weight, linear.bias), [linear.weight.detach().numpy(), linear.bias.detach().numpy()]):
        assert torch.equal(fastood.score(z, h, "dml", head=head), expected)
    bare = torch.nn.Linear(D, C, bias=False)
    bare.weight.data = linear.weight.data
    torch.testing.assert_close(
        fastood.score(z - linear.bias.detach(), h, "scale", head=bare),
        fastood.score(z - linear.bias.detach(), h, "scale", head=(linear.weight, torch.zeros(C))),
    )


def test_temperature_is_that_of_the_energy():
    z, h, _, (w, b) = rows(1)
    k = D - round(D * 0.85)
    r = np.exp(h.sum(1) / largest(h, k).sum(1))[:, None]
    expected = 3 * lse((r * (z - b) + b) / 3)
    np.testing.assert_allclose(fastood.score(z, h, "scale", head=(w, b), temperature=3.0), expected, rtol=1e-10)
    cold = fitted("kl_matching", temperature=0.5)
    p, q = softmax(2 * z), softmax(2 * rows()[0])
    d = np.stack([q[rows()[0].argmax(1) == k].mean(0) for k in range(C)])
    np.testing.assert_allclose(
        -cold.score(z), (p[:, None] * (np.log(p)[:, None] - np.log(d))).sum(2).min(1), rtol=1e-9, atol=1e-12
    )


def test_tiles_change_nothing(monkeypatch):
    from fastood.successors import fitted as module

    new = rows(1)
    expected = {name: fitted(name).score(*new[:2]) for name in SUCCESSORS}
    monkeypatch.setattr(module, "TILE", 50 * D)
    for name, whole in expected.items():
        np.testing.assert_allclose(fitted(name).score(*new[:2]), whole, rtol=1e-9, atol=1e-12)


def test_an_attached_model_decides_by_one():
    model = torch.nn.Sequential(torch.nn.Linear(8, D), torch.nn.ReLU(), torch.nn.Linear(D, C)).eval()
    attached = fastood.attach(model, example=torch.randn(2, 8))
    x = torch.randn(300, 8)
    made = Fitted("vim", head=attached.head).fit_loader(attached, x.split(64), progress=False)
    detector = Detector(made, tpr=0.9).fit_loader(attached, torch.randn(300, 8).split(64), progress=False)
    with torch.inference_mode():
        logits, feats, s, accept = fastood.attach(model, detector=detector, example=x[:2])(x)
    torch.testing.assert_close(s, made.score(logits, feats), rtol=0, atol=0)
    assert 0.8 < accept.double().mean() <= 1


def test_no_rows_and_none_that_is_right():
    z, h, y, _ = rows()
    made = Fitted("mahalanobis").partial_fit(z[:0], h[:0], y[:0])
    assert made.needs_fit
    assert made.partial_fit(z, h, y).merge(Fitted("mahalanobis")).rows == N
    np.testing.assert_array_equal(made.score(None, h), fitted("mahalanobis").score(None, h))
    wrong = (z.argmax(1) + 1) % C
    assert np.isnan(Fitted("she").fit(z, h, wrong).score(z, h)).all()


@pytest.mark.parametrize("name", ["scale", "mahalanobis", "knn"])
def test_a_head_that_decides_is_exported_for_any_number_of_rows(name):
    z, h, _, (w, b) = rows(1)
    linear = torch.nn.Linear(D, C).eval()
    linear.weight.data, linear.bias.data = torch.from_numpy(w).float(), torch.from_numpy(b).float()
    f, g = torch.from_numpy(z).float(), torch.from_numpy(h).float()
    served = fastood.OODHead(linear, Detector(fitted(name), tpr=0.9).fit(f, g))
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(served, (g[:7],), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for some in (g[:7], g):
            expected, got = served(some), exported(some)
            torch.testing.assert_close(got["score"], expected["score"], rtol=1e-5, atol=1e-5)


def test_compiled():
    z, h = (torch.from_numpy(x).float() for x in rows(1)[:2])
    made = fitted("scale")
    torch.testing.assert_close(
        torch.compile(made.score, fullgraph=True, backend="aot_eager")(z, h), made.score(z, h), rtol=1e-5, atol=1e-5
    )

"""Each successor against its formula in float64, and where rows, classes or covariances are odd."""

import numpy as np
import pytest
import torch
from formulas import lse, softmax
from hypothesis import given
from hypothesis import strategies as st
from six_classes import C, D, N, fitted, rows
from sklearn.covariance import oas

import fastood
from fastood import SUCCESSORS, Fitted


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


@pytest.mark.parametrize("name", [name for name, x in SUCCESSORS.items() if "logits" in x.needs])
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
    if name in ("scale", "dml"):
        both = b.copy()
        both[k] = -np.inf  # as a head that masks it has it
        np.testing.assert_array_equal(fastood.score(masked, h, name, head=(w, both)), got)


def test_a_class_that_was_masked_in_the_fit():
    """Its weight of 0 counts for nothing where a row gives it none, and is far from a row that does."""
    z = rows()[0].copy()
    z[:, 2] = -np.inf
    made = Fitted("kl_matching").fit(z)
    others = np.arange(C) != 2
    np.testing.assert_allclose(made.score(z), Fitted("kl_matching").fit(z[:, others]).score(z[:, others]), rtol=1e-9)
    assert (made.score(np.zeros((3, C))) < -1e30).all()


def test_rows_of_zeros_and_of_one_class():
    z, h, y, (w, b) = rows(1)
    zero = np.zeros((2, D))
    at_zero = fastood.score(zero @ w.T + b, zero, "scale", head=(w, b))
    np.testing.assert_allclose(at_zero, lse(b[None])[0], rtol=1e-12)
    np.testing.assert_allclose(fastood.score(zero @ w.T + b, zero, "lts"), lse(b[None])[0], rtol=1e-12)
    assert (fastood.score(zero @ w.T + b, zero, "dml", head=(w, b)) == 0).all()
    one = fitted("fdbd", (z[:, :1], h, 0 * y, (w[:1], b[:1])))
    assert (one.score(z[:, :1], h) == 0).all()
    twins = np.concatenate([w, w[:1]])  # equal rows of a head have no boundary
    head = twins, np.append(b, b[0])
    logits = h @ twins.T + head[1]
    got = Fitted("fdbd", head=head).fit(logits, h).score(logits, h)
    assert np.isfinite(got).all()


def test_a_class_without_weights_and_a_row_at_the_mean():
    _, h, _, (w, b) = rows()
    none = w.copy()
    none[2] = 0
    got = fastood.score(h @ none.T + b, h, "dml", head=(none, b))
    np.testing.assert_allclose(got, np.maximum(cosines(h, np.delete(w, 2, 0)).max(1), 0) + np.linalg.norm(h, axis=1))
    same = np.full((4, D), 0.5)
    made = Fitted("nci", head=(w, b)).fit(same @ w.T + b, same)
    np.testing.assert_allclose(made.score(same @ w.T + b, same), 1e-4 * same.sum(1))


def test_vim_refuses_what_leaves_no_residual():
    z, h, _, (w, b) = rows()
    few, dead = h[: D // 2], h * (np.arange(D) < D // 2)
    for x, bias in ((few, b), (dead, None)):
        for dtype in (np.float32, np.float64):
            with pytest.raises(ValueError, match=rf"dim={D // 2} directions leave nothing of {len(x)} rows"):
                Fitted("vim", head=(w, bias)).fit((x @ w.T).astype(dtype), x.astype(dtype))
    with pytest.raises(ValueError, match="head: bias must be finite"):
        Fitted("vim", head=(w, np.where(np.arange(C) == 1, -np.inf, b))).fit(z, h)


def test_ash_s_is_scale_where_the_rest_is_zero():
    h = np.zeros((5, D))
    h[:, :4] = np.abs(np.random.default_rng(0).normal(size=(5, 4)))
    w, b = rows()[3]
    z = h @ w.T + b
    args = {"head": (w, b), "percentile": 0.5}
    np.testing.assert_allclose(
        fastood.score(None, h, "ash_s", **args), fastood.score(z, h, "scale", **args), rtol=1e-12
    )


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


def test_the_clip_lies_between_two_activations():
    """As numpy.percentile of them has it."""
    x = np.array([[1.0], [2.0], [4.0]])
    for percentile in (0.25, 0.6):
        made = Fitted("react", head=(np.ones((2, 1)), np.zeros(2)), percentile=percentile).fit(None, x)
        assert made.state["clip"].item() == pytest.approx(np.percentile(x, 100 * percentile), rel=2**-10)


def test_a_neighbour_that_is_the_row_itself():
    h = rows()[1]
    got = fitted("knn", k=1).score(None, h)
    assert np.abs(got).max() < 1e-6
    with pytest.raises(ValueError, match="k=300 takes at least as many in-distribution rows, got 240"):
        fitted("knn", k=300)


def test_neighbours_that_are_nearly_the_same():
    """Nearer to each other than float32 has their lengths."""
    g = np.random.default_rng(0)
    bank, x = (g.normal(size=D) + 1e-5 * g.normal(size=(n, D)) for n in (200, 5))
    bank = (bank - bank.mean(0) + x.mean(0)).astype(np.float32)
    made = Fitted("knn", k=50).fit(None, bank)
    apart = np.linalg.norm(unit(x)[:, None] - made.state["bank"].double().numpy(), axis=2)
    np.testing.assert_allclose(-made.score(None, x), np.sort(apart, 1)[:, 49], rtol=1e-9)


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


def test_compiled():
    z, h = (torch.from_numpy(x).float() for x in rows(1)[:2])
    made = fitted("scale")
    torch.testing.assert_close(
        torch.compile(made.score, fullgraph=True, backend="aot_eager")(z, h), made.score(z, h), rtol=1e-5, atol=1e-5
    )

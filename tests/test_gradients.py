"""Closed forms of gradient norms against explicit autograd, class by class, in float64."""

import copy
import functools
import itertools
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import truth
from hypothesis import assume, given
from hypothesis import strategies as st

import fastood


def head(seed, n=3, C=5, D=7, scale=1.0):
    """Features, last-layer weights and their logits, float64."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, D, generator=g, dtype=torch.float64)
    W = torch.randn(C, D, generator=g, dtype=torch.float64) * scale
    return h, W, h @ W.T


def per_class_gradients(h, W, T, b=None):
    """grad_W log p_y (with b, of [W b]) for every row and class by autograd: [N, C, C, D]."""
    out = []
    for row in h:
        grads = []
        for y in range(len(W)):
            params = [W.clone().requires_grad_()] + ([b.clone().requires_grad_()] if b is not None else [])
            f = params[0] @ row + (params[1] if b is not None else 0)
            g = torch.autograd.grad(torch.log_softmax(f / T, -1)[y], params)
            grads.append(torch.cat([g[0], g[1][:, None]], 1) if b is not None else g[0])
        out.append(torch.stack(grads))
    return torch.stack(out)


def entrywise(g, order):
    """The entrywise norm over the last two axes."""
    g = g.abs().flatten(-2)
    return g.amax(-1) if order == math.inf else (g**order).sum(-1) ** (1 / order)


def expected_norm(g, q, order, power, expectation):
    if expectation == "inside":
        return entrywise((q[:, :, None, None] * g).sum(1), order) ** power
    return (q * entrywise(g, order) ** power).sum(1)


ROWS = {
    "gradnorm": ("uniform", 1, 1, "inside"),
    "exgrad": ("predicted", 1, 1, "outside"),
    "eg_u_l1": ("uniform", 1, 1, "outside"),
    "eg_u_l2sq": ("uniform", 2, 2, "outside"),
    "eg_p_l2sq": ("predicted", 2, 2, "outside"),
    "eg_p_logp_l2sq": ("log_predicted", 2, 2, "outside"),
    "norm_eg_p_l2sq": ("predicted", 2, 2, "inside"),
}


def weights(labels, f, T):
    log_p = torch.log_softmax(f / T, -1)
    return {"uniform": torch.full_like(f, 1 / f.shape[1]), "predicted": log_p.exp(), "log_predicted": log_p}[labels]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("T", "bias", "scale"), [(1.0, False, 1.0), (0.4, True, 0.1), (3.0, True, 3.0)])
def test_table_1_shallow_rows_are_what_autograd_gives(backend, name, T, bias, scale):
    h, W, f = head(0, scale=scale)
    b = torch.linspace(-1, 1, len(W), dtype=torch.float64) if bias else None
    f = f + (b if bias else 0)
    labels, order, power, expectation = ROWS[name]
    expected = expected_norm(per_class_gradients(h, W, T, b), weights(labels, f, T), order, power, expectation)
    got = fastood.score(f, h, name, temperature=T, bias=bias, oriented=False, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    sign = -1 if name in ("exgrad", "eg_p_l2sq", "eg_p_logp_l2sq") else 1
    assert torch.equal(fastood.score(f, h, name, temperature=T, bias=bias, backend=backend), sign * got)
    general = fastood.gradient_norm(f, h, labels, order, power, expectation, temperature=T, bias=bias, backend=backend)
    torch.testing.assert_close(general, expected, rtol=1e-11, atol=1e-11)


def test_registry_names_the_same_rows():
    recorded = {name: tuple(e.gradient.values()) for name, e in fastood.SCORES.items() if e.gradient}
    assert recorded == ROWS


@functools.lru_cache
def gradients_of_head(C, T):
    h, W, f = head(1, C=C)
    return h, f, per_class_gradients(h, W, T)


@pytest.mark.parametrize("C", [5, 60])  # a row a lane in C++, and a lane an element
@pytest.mark.parametrize("order", [0.5, 1, 1.5, 2, 3, math.inf])
@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_gradient_norm_in_general(backend, C, order, power):
    T = 0.7
    h, f, g = gradients_of_head(C, T)
    q = torch.softmax(torch.randn(f.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64), -1)
    one_hot = torch.nn.functional.one_hot(f.argmax(-1), C).double()
    kinds = ["uniform", "predicted", "log_predicted", q, one_hot]
    for labels, expectation in itertools.product(kinds, ["inside", "outside"]):
        if isinstance(labels, str) and (labels, expectation) == ("log_predicted", "inside"):
            continue
        w = weights(labels, f, T) if isinstance(labels, str) else labels
        expected = expected_norm(g, w, order, power, expectation)
        got = fastood.gradient_norm(f, h, labels, order, power, expectation, temperature=T, backend=backend)
        if isinstance(labels, str) and (labels, expectation) == ("predicted", "inside"):
            assert (got == 0).all()  # exactly; autograd leaves rounding noise
        else:
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("f", "T", "labels", "order", "power", "expected"),
    [
        # (1 - p_y) (1 + sum (p_k / (1 - p_y))^r)^(1/r), by hand
        ([0.0, 0.0], 1.0, "uniform", 200, 1, 0.5 * 2 ** (1 / 200)),
        ([0.0] * 10, 1.0, "predicted", 1000, 1, 0.9),
        ([75.0, 0.0, 0.0], 1.0, "predicted", 20, 1, 2 * math.exp(-75) * ((1 + 2**-19) ** 0.05 + 2**0.05)),
        ([800.0, 0.0], 1.0, "predicted", 2, 0.5, math.exp(-400) * 2**0.25),
    ],
)
def test_orders_and_powers_whose_terms_underflow(backend, f, T, labels, order, power, expected):
    f, options = torch.tensor([f], dtype=torch.float64), {"temperature": T, "backend": backend}
    got = fastood.gradient_norm(f, torch.ones(1, 1).double(), labels, order, power, "outside", **options)
    assert got.item() == pytest.approx(expected, rel=1e-9)
    if f.max() < 100:
        got = fastood.gradient_norm(f.float(), torch.ones(1, 1), labels, order, power, "outside", **options)
        assert got.item() == pytest.approx(expected, rel=1e-5)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@given(
    seed=st.integers(0, 2**31),
    C=st.sampled_from([1, 2, 5, 16, 17, 48, 49, 130, 700]),
    T=st.sampled_from([0.25, 1.0, 40.0]),
    spread=st.sampled_from([0.0, 0.1, 3.0, 10.0]),
    lead=st.sampled_from([0.0, 5.0, 25.0, 60.0]),
    masked=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    label_dtype=st.sampled_from(DTYPES),
    labels=st.sampled_from(["uniform", "predicted", "log_predicted", "soft", "one-hot", "columns of a wider tensor"]),
    order=st.sampled_from([0.5, 1, 1.5, 2, 3, 12, math.inf]),
    power=st.sampled_from([0.5, 1, 2, 3]),
    expectation=st.sampled_from(["inside", "outside"]),
)
def test_gradient_norm_in_every_type(
    backend, seed, C, T, spread, lead, masked, dtype, label_dtype, labels, order, power, expectation
):
    assume(labels != "log_predicted" or expectation == "outside")
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(3, C, generator=g, dtype=torch.float64) * spread
    top = torch.randint(C, (3,), generator=g)
    z[torch.arange(3), top] = z.amax(-1) + lead
    if masked:
        z[:, ::3] = torch.where(z[:, ::3] == z.amax(-1, keepdim=True), z[:, ::3], -math.inf)
    f = (z * T).to(dtype)
    if labels == "one-hot":
        labels = torch.nn.functional.one_hot(top, C).to(label_dtype)
    elif labels not in ("uniform", "predicted", "log_predicted"):
        q = torch.zeros(3, C + 2, dtype=label_dtype)[:, 1:-1] if labels != "soft" else torch.zeros(3, C).to(label_dtype)
        labels = q.copy_(torch.softmax(torch.randn(3, C, generator=g) * 3, -1))
    h = torch.ones(3, 1, dtype=dtype)
    got = fastood.gradient_norm(f, h, labels, order, power, expectation, temperature=T, backend=backend)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = truth.EPS[str(dtype).removeprefix("torch.")]
    with np.errstate(all="ignore"):
        value, allowed = (x / T**power for x in truth.gradient(f, labels, order, power, expectation, T, eps))
    if isinstance(labels, str) and (labels, expectation) == ("predicted", "inside"):
        value = 0 * value
    truth.assert_close(got, value, allowed, f"{expectation} {order} {power}")
    alone = fastood.gradient_norm(
        f[1:2], h[:1], labels if isinstance(labels, str) else labels[1:2], order, power, expectation, temperature=T,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(alone, got[1:2])


def test_exgrad_keeps_its_precision_when_the_network_is_sure():
    f = torch.tensor([[69.0, 0.0, -3.0]])
    h = torch.ones(1, 2)
    got = fastood.gradient_norm(f, h, "predicted", expectation="outside")
    expected = 2 * 2 * truth.stat("one_minus_s2", f)
    truth.assert_close(got, expected, 2**-24 * 400 * expected)


@given(seed=st.integers(0, 2**31), C=st.integers(1, 90), D=st.integers(1, 30), T=st.sampled_from([0.1, 1.0, 5.0]))
def test_identities(backend, seed, C, D, T):
    g = torch.Generator().manual_seed(seed)
    f, h = torch.randn(2, C, generator=g) * 10, torch.randn(2, D, generator=g)
    l1 = fastood.norms(h, [1], backend=backend)[:, 0]
    # The same identities from distributions that are given, which no closed form knows of.
    p, uniform = torch.softmax(f.double() / T, -1), torch.full_like(f, 1 / C)
    nothing = fastood.gradient_norm(f, h, p, temperature=T, backend=backend)
    assert (nothing <= 2 / T * l1 * (32 + 4 * 104) * 2**-24).all()
    constant = fastood.gradient_norm(f, h, uniform, expectation="outside", temperature=T, backend=backend)
    torch.testing.assert_close(constant, 2 / T * (C - 1) / C * l1)
    assert (fastood.gradient_norm(f, h, "predicted", temperature=T, backend=backend) == 0).all()
    assert (fastood.score(f, h, "norm_eg_p_l2sq", temperature=T, backend=backend) == 0).all()
    constant = fastood.score(f, h, "eg_u_l1", temperature=T, backend=backend)
    torch.testing.assert_close(constant, 2 / T * (C - 1) / C * l1)
    torch.testing.assert_close(
        fastood.gradient_norm(f, h, temperature=T), fastood.score(f, h, "gradnorm", temperature=T)
    )


@pytest.mark.parametrize("C", [5, 60])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_row_that_is_no_distribution_is_nan_alone(backend, C, order):
    h, _, f = head(3, n=7, C=C)
    q = torch.full_like(f, 1 / f.shape[1])
    q[1, 0], q[2, 0], q[3] = -0.1, 0.9, math.nan
    q[1, 1] += 0.1 + 1 / C  # sums to 1 all the same
    f[4, 0], f[5], f[6, 1] = math.nan, -math.inf, math.inf
    for expectation in ("inside", "outside"):
        got = fastood.gradient_norm(f, h, q, order, expectation=expectation, backend=backend)
        assert got.isnan().tolist() == [False] + 6 * [True]
    got = fastood.gradient_norm(f, h, "predicted", order, 0.5, "outside", backend=backend)
    assert got.isnan().tolist() == 4 * [False] + 3 * [True]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"labels": "unifrom"}, ValueError, r"labels must be one of 'uniform'.*got 'unifrom'"),
        ({"labels": torch.ones(3, 2)}, ValueError, r"labels must be \[3, 5\].*\[3, 2\]"),
        ({"labels": np.ones((3, 5))}, TypeError, r"labels must be 'uniform', .* or a torch tensor, got ndarray"),
        ({"labels": "log_predicted"}, ValueError, r"log_predicted.*outside"),
        ({"order": 0}, ValueError, "order must be a number > 0"),
        ({"power": -1}, ValueError, "power must be a finite number > 0"),
        ({"expectation": "middle"}, ValueError, "expectation must be one of"),
        ({"feats": None}, TypeError, "feats must be a torch tensor"),
    ],
)
def test_bad_arguments(change, error, words):
    h, _, f = head(4)
    with pytest.raises(error, match=words):
        fastood.gradient_norm(**{"logits": f, "feats": h, **change})


# ---- BatchGrad


@pytest.mark.parametrize(("T", "bias"), [(1.0, False), (2.5, True)])
def test_batchgrad_is_equation_6(T, bias):
    """E_Y || grad_W ( log p_Y(x) + sum_i log p_{y_i}(x_i) ) ||_1, all by autograd."""
    h, W, f = head(5)
    anchors, _, _ = head(6, n=8)
    anchor_labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    b = torch.linspace(-1, 1, len(W), dtype=torch.float64)

    expected = []
    for row, p in zip(h, torch.softmax((f + b * bias) / T, -1), strict=True):
        total = 0.0
        for y in range(len(W)):
            Wb = torch.cat([W, b[:, None]], 1).requires_grad_() if bias else W.clone().requires_grad_()
            one = torch.ones(1, dtype=torch.float64)

            def log_p(x, label, Wb=Wb, one=one):
                return torch.log_softmax(Wb @ (torch.cat([x, one]) if bias else x) / T, -1)[label]

            loss = log_p(row, y) + sum(log_p(a, label) for a, label in zip(anchors, anchor_labels, strict=True))
            (g,) = torch.autograd.grad(loss, Wb)
            total += p[y] * g.abs().sum()
        expected.append(total)

    G = fastood.anchor_gradient(anchors @ W.T + b * bias, anchors, anchor_labels, temperature=T, bias=bias)
    got = fastood.batchgrad(f + b * bias, h, G, temperature=T, bias=bias, oriented=False)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-11, atol=0)
    assert torch.equal(fastood.batchgrad(f + b * bias, h, G, temperature=T, bias=bias), -got)


def test_batchgrad_in_tiles(monkeypatch):
    """Every branch of the tiling, and rows that do not depend on their batch."""
    g = torch.Generator().manual_seed(0)
    f, h, G = torch.randn(6, 11, generator=g), torch.randn(6, 9, generator=g), torch.randn(11, 9, generator=g)
    whole = fastood.batchgrad(f, h, G)
    for tile in (1, 9, 20, 99, 250):
        monkeypatch.setattr("fastood.kernels.reference._TILE", tile)
        got = fastood.batchgrad(f, h, G)
        torch.testing.assert_close(got, whole)
        assert torch.equal(fastood.batchgrad(f[2:3], h[2:3], G), got[2:3])


def test_batchgrad_where_features_over_T_overflow():
    f, h = torch.tensor([[1e3, 0.0]]), torch.full((1, 2), 1e30)
    assert fastood.batchgrad(f, h, torch.ones(2, 2), temperature=1e-10, oriented=False).item() == 4


def test_batchgrad_arguments():
    f, h, y = torch.randn(4, 3), torch.randn(4, 2), torch.arange(4) % 3
    G = fastood.anchor_gradient(f, h, y)
    assert fastood.batchgrad(f[:0], h[:0], G).shape == (0,)
    assert isinstance(fastood.batchgrad(f.numpy(), h.numpy(), G.numpy()), np.ndarray)
    assert np.array_equal(fastood.anchor_gradient(f.numpy(), h.numpy(), y.numpy()), G.numpy())
    with pytest.raises(ValueError, match=r"feats must have 1 columns, for G is \[3, 2\], got \[4, 2\]"):
        fastood.batchgrad(f, h, G, bias=True)
    with pytest.raises(ValueError, match="G must be on the device of logits, cpu, got meta"):
        fastood.BatchGrad(G.to("meta")).score(f, h)
    with pytest.raises(ValueError, match=r"labels must be classes 0..2, got 0..3"):
        fastood.anchor_gradient(f, h, torch.arange(4))
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float32"):
        fastood.anchor_gradient(f, h, y.float())
    with pytest.raises(TypeError, match="labels must be a torch tensor or a numpy array of integers, got NoneType"):
        fastood.anchor_gradient(f, h, None)
    with pytest.raises(ValueError, match=r"labels must be \[4\], one class per row, got shape \[3\]"):
        fastood.anchor_gradient(f, h, y[:3])
    for bad in (math.nan, math.inf, -math.inf):
        G[1, 1] = bad
        with pytest.raises(ValueError, match="G must be finite, got 1 of 6 numbers NaN or infinite; anchors"):
            fastood.BatchGrad(G)
    for shape, bias in (((0, 2), False), ((3, 0), True)):
        with pytest.raises(ValueError, match=r"G must be \[C, D.*\].*, of at least one class, got shape \[[03], "):
            fastood.BatchGrad(torch.zeros(shape), bias=bias)


LABELS = np.array([0, 2, 1, 1])
SAME_LABELS = {
    **{name: LABELS.astype(name) for name in ("uint8", "int8", "uint16", "uint32", "uint64", ">i4", "<u2", ">u8")},
    "reversed": LABELS[::-1].copy()[::-1],
    "every second one": LABELS.repeat(2)[::2],
    "field of a structured array": np.array([(0.5, y) for y in LABELS], "f4, i2")["f1"],
    "read-only": np.frombuffer(LABELS.tobytes(), LABELS.dtype),
    **{str(x): torch.from_numpy(LABELS).to(x) for x in (torch.int32, torch.uint8, torch.uint16, torch.uint64)},
}


@pytest.mark.parametrize("kind", SAME_LABELS)
@pytest.mark.parametrize("default_device", ["cpu", "meta"])
def test_labels_of_anchors_are_integers_of_any_kind(kind, default_device):
    h, _, f = head(7, n=4, C=3)
    model = torch.nn.Linear(7, 3, bias=False).double().eval()
    labels, y = SAME_LABELS[kind], torch.from_numpy(LABELS)
    G = fastood.anchor_gradient(f, h, y)
    torch.set_default_device(default_device)
    try:
        assert torch.equal(fastood.anchor_gradient(f, h, labels), G)
        assert np.array_equal(fastood.anchor_gradient(f.numpy(), h.numpy(), labels), G.numpy())
        detector = fastood.BatchGrad.from_anchors(f.numpy(), h.numpy(), labels)
        assert np.array_equal(detector.score(f.numpy(), h.numpy()), fastood.batchgrad(f, h, G).numpy())
        deep = fastood.deep_batchgrad(model, h, h, labels)
        assert torch.equal(deep, fastood.deep_batchgrad(model, h, h, y))
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (np.ma.masked_array(LABELS, [0, 0, 0, 1]), TypeError, "labels must not be a masked array: leave those rows"),
        (LABELS.astype(float), TypeError, "labels must be integers, got numpy float64"),
        (LABELS > 0, TypeError, "labels must be integers, got numpy bool"),
        (torch.from_numpy(LABELS > 0), TypeError, r"labels must be integers, got torch\.bool"),
        (LABELS.astype(object), TypeError, "labels must be integers, got numpy object"),
        (LABELS.astype("uint64") - 1, ValueError, r"labels must be classes 0\.\.2, got -1\.\.1"),
        (LABELS[:, None], ValueError, r"labels must be \[4\], one class per row, got shape \[4, 1\]"),
        (LABELS.tolist(), TypeError, "labels must be a torch tensor or a numpy array of integers, got list"),
    ],
)
def test_bad_labels_of_anchors(labels, error, words):
    h, _, f = head(7, n=4, C=3)
    with pytest.raises(error, match=words):
        fastood.anchor_gradient(f, h, labels)
    with pytest.raises(error, match=words.replace("labels", "anchor_labels")):
        fastood.deep_batchgrad(torch.nn.Linear(7, 3).double().eval(), h, h, labels)


def test_classes_without_an_anchor_are_said():
    h, _, f = head(7, n=4, C=5)
    for y in (torch.tensor([0, 0, 3, 3]), np.array([0, 0, 3, 3])):
        with pytest.warns(UserWarning, match="^labels: 3 of 5 classes have no anchor; .* one or more") as said:
            fastood.anchor_gradient(f, h, y)
        assert said[0].filename == __file__
        with pytest.warns(UserWarning, match=r"^anchor_labels: 3 of 5 classes have no anchor"):
            fastood.deep_batchgrad(torch.nn.Linear(7, 5).double().eval(), h, h, y)
    with pytest.warns(UserWarning, match="labels: 5 of 5 classes"):
        assert (fastood.anchor_gradient(f[:0], h[:0], y[:0]) == 0).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    N=st.sampled_from([1, 3, 40]),
    C=st.sampled_from([1, 2, 5, 16, 17, 130]),
    D=st.sampled_from([0, 1, 15, 16, 17, 100, 1030]),
    scale=st.sampled_from([0.1, 1.0, 10.0, 100.0]),
    T=st.sampled_from([1.0, 0.2, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    relu=st.booleans(),
    bias=st.booleans(),
)
def test_batchgrad_on_every_backend(backend, seed, N, C, D, scale, T, dtype, relu, bias):
    g = torch.Generator().manual_seed(seed)
    f, h = torch.randn(N, C, generator=g) * scale, torch.randn(N, D, generator=g)
    f, h = f.to(dtype), (h.relu() if relu else h).to(dtype)
    G = torch.randn(C, D + bias, generator=g) * 10 ** torch.randn(C, 1, generator=g)
    detector = fastood.BatchGrad(G, temperature=T, bias=bias)
    got = detector.score(f, h, oriented=False, backend=backend)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, allowed = truth.batchgrad(f, h, G, T, bias, truth.EPS[str(dtype).removeprefix("torch.")])
    truth.assert_close(got, expected, allowed, "BatchGrad")
    assert torch.equal(detector.score(f[-1:], h[-1:], oriented=False, backend=backend), got[-1:])


def test_batchgrad_of_rows_that_are_not_finite(backend):
    f, h, G = torch.randn(6, 20), torch.randn(6, 33), torch.randn(20, 33)
    f[0, 3], f[1, 3], f[2] = math.nan, math.inf, -math.inf
    f[3, 3], h[4, 5], f[5, 3], h[5, 5] = -math.inf, math.nan, -math.inf, math.inf
    got = fastood.BatchGrad(G).score(f, h, oriented=False, backend=backend)
    assert got[[0, 1, 2, 4]].isnan().all()
    assert got[3].isfinite()  # a masked class
    assert got[5] == math.inf
    confident = torch.tensor([[1e4, 0.0]])
    assert fastood.BatchGrad(torch.ones(2, 1)).score(confident, torch.tensor([[5.0]]), backend=backend).item() == -2


def rows_of(kind, g, N, C):
    """Logits of which p is anything, 0 and 1 in float32, 0 and 1 for all but masked classes, or 1/C."""
    f = torch.randn(N, C, generator=g)
    if kind == "certain":
        f[:, 0] += 1e3
    elif kind == "one class is not masked":
        f[:, 1:] = -math.inf
    return f * 0 if kind == "flat" else f


KINDS = ["any", "certain", "one class is not masked", "flat"]


@given(
    seed=st.integers(0, 2**32 - 1),
    C=st.sampled_from([1, 2, 5, 17, 130]),
    D=st.sampled_from([1, 3, 40, 1030]),
    kind=st.sampled_from(KINDS),
    T=st.sampled_from([1e-10, 0.1, 1.0, 1e10, 1e-40]),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_batchgrad_is_infinite_where_a_feature_is(backend, seed, C, D, kind, T, bad, bias, dtype):
    g = torch.Generator().manual_seed(seed)
    f, h = rows_of(kind, g, 4, C).to(dtype), torch.randn(4, D, generator=g).to(dtype)
    detector = fastood.BatchGrad(torch.randn(C, D + bias, generator=g), temperature=T, bias=bias)
    good = detector.score(f, h, oriented=False, backend=backend)
    assert not good.isnan().any()
    h[1, seed % D], h[2, seed % D] = bad, bad
    h[2, -1], f[3, seed % C] = math.nan, math.nan
    got = detector.score(f, h, oriented=False, backend=backend)
    assert torch.equal(got[0], good[0])
    assert got[1].isnan() if math.isnan(bad) else got[1] == math.inf
    assert got[2:].isnan().all()
    h[1:] = bad
    assert detector.score(f, h, oriented=False, backend=backend)[1:].isnan().tolist() == [math.isnan(bad)] * 2 + [True]


@given(
    seed=st.integers(0, 2**32 - 1),
    C=st.sampled_from([1, 2, 5, 60]),
    kind=st.sampled_from(KINDS),
    T=st.sampled_from([0.1, 1.0, 1e10]),
    labels=st.sampled_from(["uniform", "predicted", "log_predicted", "given", "one-hot"]),
    order=st.sampled_from([0.5, 1, 2, 3, math.inf]),
    power=st.sampled_from([0.5, 1, 2]),
    expectation=st.sampled_from(["inside", "outside"]),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from(DTYPES),
)
def test_no_weight_of_0_hides_an_input(backend, seed, C, kind, T, labels, order, power, expectation, bad, dtype):
    assume(labels != "log_predicted" or expectation == "outside")
    g = torch.Generator().manual_seed(seed)
    f, h = rows_of(kind, g, 3, C).to(dtype), torch.randn(3, 4, generator=g).to(dtype)
    if labels == "given":
        labels = torch.softmax(torch.randn(3, C, generator=g), -1)
    elif labels == "one-hot":
        labels = torch.nn.functional.one_hot(f.argmax(-1), C).to(dtype)
    h[1, seed % 4] = bad
    options = {"temperature": T, "backend": backend}
    got = fastood.gradient_norm(f, h, labels, order, power, expectation, **options)
    assert got[1].isnan() if math.isnan(bad) else not got[1].isfinite()
    f[0, seed % C] = math.nan
    got = fastood.gradient_norm(f, h, labels, order, power, expectation, **options)
    assert got[:2].isfinite().tolist() == [False, False]
    assert got[0].isnan()
    if isinstance(labels, torch.Tensor):
        labels[2, seed % C] = bad
        assert fastood.gradient_norm(f, h, labels, order, power, expectation, **options)[2].isnan()


@pytest.mark.parametrize("C", [1, 2, 3, 10, 130])
@pytest.mark.parametrize("order", [0.5, 1, 2, 3, math.inf])
@pytest.mark.parametrize("T", [1.0, 0.3])
def test_the_gradnorm_of_a_flat_row_is_0(backend, C, order, T):
    """p is the uniform distribution, however little 1/C is a float; and 0 times infinity is NaN."""
    f, h = torch.full((2, C), 7.5), torch.ones(2, 4)
    h[1, 2] = math.inf
    for power in (0.5, 1, 2):
        got = fastood.gradient_norm(f, h, "uniform", order, power, temperature=T, backend=backend)
        assert got[0] == 0
        assert got[1].isnan()


def test_batchgrad_copies_and_pickles_after_use():
    f, h = torch.randn(2, 3), torch.randn(2, 4)
    detector = fastood.BatchGrad(torch.randn(3, 4))
    score = detector.score(f, h)
    for copied in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert torch.equal(copied.score(f, h), score)


def test_small_orders_outside_are_beyond_float32(backend):
    f, h = torch.zeros(2, 300), torch.full((2, 1), 1e-20)
    f[1, ::2] = -math.inf
    norms, _ = truth.gradient(f, "predicted", 0.1, 3, "outside", 1.0, truth.EPS["float32"])
    got = fastood.gradient_norm(f, h, "predicted", 0.1, 3, "outside", backend=backend)
    np.testing.assert_allclose(got.numpy(), (norms * 1e-60).astype(float), rtol=1e-4)


def test_batchgrad_is_never_below_the_norm_of_its_constant(backend):
    """E_p[e_Y - p] = 0, so by Jensen's inequality; and equal to it where the sample adds nothing."""
    f, h, G = torch.randn(20, 30) * 3, torch.randn(20, 50), torch.randn(30, 50)
    detector = fastood.BatchGrad(G)
    least = G.double().abs().sum()
    assert (detector.score(f.double(), h, oriented=False, backend=backend) >= least * (1 - 1e-12)).all()
    nothing = detector.score(f.double(), torch.zeros_like(h), oriented=False, backend=backend)
    torch.testing.assert_close(nothing, least.expand(20))


def test_batchgrad_bits_do_not_depend_on_threads():
    before = torch.get_num_threads()
    f, h, detector = torch.randn(3, 1000), torch.randn(3, 300), fastood.BatchGrad(torch.randn(1000, 300))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(detector.score(f, h))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_batchgrad_keeps_a_constant_of_its_own():
    f, h, G = torch.randn(3, 4), torch.randn(3, 5), torch.randn(4, 5)
    detector = fastood.BatchGrad(G)
    before = detector.score(f, h)
    G.zero_()
    assert torch.equal(detector.score(f, h), before)
    torch.testing.assert_close(detector.score(f, h, backend="reference"), before)


def test_batchgrad_is_saved_and_loaded(tmp_path):
    f, h, y = torch.randn(8, 4), torch.randn(8, 3), torch.arange(8) % 4
    made = fastood.BatchGrad.from_anchors(f, h, y, temperature=0.1, bias=True)
    path = tmp_path / "anchors.safetensors"
    made.save(path)
    (tmp_path / "any file").touch()
    assert path.stat().st_mode == (tmp_path / "any file").stat().st_mode
    loaded = fastood.BatchGrad.load(path)
    assert repr(loaded) == repr(made)
    assert torch.equal(loaded.score(f, h), made.score(f, h))
    for name in ("anchors.pt", "anchors", "anchors.safetensors.gz"):
        with pytest.raises(ValueError, match=rf"path must end in .safetensors, .*, got '.*{name}'"):
            made.save(tmp_path / name)
    with pytest.raises(ValueError, match=r"new.anchors.safetensors: there is no folder .*new$"):
        made.save(tmp_path / "new" / "anchors.safetensors")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["anchors.safetensors", "any file"]
    with pytest.raises(FileNotFoundError, match="missing"):
        fastood.BatchGrad.load(tmp_path / "missing")
    for device in ["gpu", *([] if torch.cuda.is_available() else ["cuda", torch.device("cuda", 3)])]:
        with pytest.raises(ValueError, match=rf"^device must be one that torch can use here, got '{device}': "):
            fastood.BatchGrad.load(path, device=device)


GOOD = {"fastood": "BatchGrad", "temperature": "2.0", "bias": "0"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"G": torch.ones(2, 2)}, None, "its metadata lack bias, fastood, temperature"),
        ({"G": torch.ones(2, 2)}, {"fastood": "BatchGrad", "bias": "0"}, "its metadata lack temperature"),
        ({"G": torch.ones(2, 2)}, {**GOOD, "fastood": "Other"}, "its metadata are .*Other"),
        ({"G": torch.ones(2, 2)}, {**GOOD, "bias": "True"}, "its metadata are .*'bias': 'True'"),
        ({"G": torch.ones(2, 2)}, {**GOOD, "temperature": "nan"}, "temperature must be a finite number > 0, got nan"),
        ({"G": torch.ones(2, 2)}, {**GOOD, "temperature": "hot"}, "could not convert"),
        ({"H": torch.ones(2, 2)}, GOOD, "G"),
        ({"G": torch.ones(2)}, GOOD, "G must be 2-D"),
        ({"G": torch.ones(2, 0)}, {**GOOD, "bias": "1"}, r"G must be \[C, D \+ 1\] with bias"),
        ({"G": torch.ones(2, 2).int()}, GOOD, "G must be float16, .*got torch.int32"),
        ({"G": torch.full((2, 2), math.nan)}, GOOD, "G must be finite, got 4 of 4 numbers"),
    ],
)
def test_only_what_was_saved_is_loaded(tmp_path, tensors, metadata, words):
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "other.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"path must be a file that BatchGrad.save wrote, got '.*other.*': .*{words}"):
        fastood.BatchGrad.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("content", [b"", b"no tensors, but more than eight bytes"])
def test_what_holds_no_tensors_is_not_loaded(tmp_path, content):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=r"path must be a file that BatchGrad.save wrote, got '.*text'"):
        fastood.BatchGrad.load(tmp_path / "text")


def test_batchgrad_answers_in_the_kind_that_it_is_asked_in(backend, tmp_path):
    f, h, y = torch.randn(8, 4), torch.randn(8, 3), torch.arange(8) % 4
    from_tensors = fastood.BatchGrad.from_anchors(f, h, y)
    from_arrays = fastood.BatchGrad.from_anchors(f.numpy(), h.numpy(), y.numpy())
    expected = from_tensors.score(f, h, backend=backend)
    from_arrays.save(tmp_path / "G.safetensors")
    for detector in (from_tensors, from_arrays, fastood.BatchGrad.load(tmp_path / "G.safetensors")):
        for _ in range(2):  # the long way and the short one
            assert torch.equal(detector.score(f, h, backend=backend), expected)
            of_arrays = detector.score(f.numpy(), h.numpy(), backend=backend)
            assert isinstance(of_arrays, np.ndarray)
            assert np.array_equal(of_arrays, expected.numpy())
    assert torch.equal(fastood.batchgrad(f, h, from_arrays.anchors.G.numpy()), from_tensors.score(f, h))


def test_batchgrad_in_another_type_and_place():
    f, h, G = torch.randn(8, 4), torch.randn(8, 3), torch.randn(4, 4)
    detector = fastood.BatchGrad(G, temperature=0.5, bias=True)
    wanted = "BatchGrad(classes=4, features=3, temperature=0.5, bias=True, dtype=torch.float32, device='cpu')"
    assert repr(detector) == wanted
    double = detector.to(torch.float64)
    assert repr(double) == wanted.replace("float32", "float64")
    assert double.score(f, h).dtype == torch.float64
    torch.testing.assert_close(double.score(f, h).float(), detector.score(f, h))
    assert detector.to("meta").anchors.G.device.type == "meta"
    with pytest.raises(ValueError, match=r"G must be on the device of logits, cpu, got meta: BatchGrad\.to moves it"):
        detector.to("meta").score(f, h)
    with pytest.raises(TypeError, match=r"G must be float16, .*, got torch\.int32"):
        detector.to(torch.int32)


# ---- all parameters


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x))


def network():
    torch.manual_seed(0)
    net = Net().double().eval()
    net.body[1].running_mean.normal_()
    return net


@pytest.mark.parametrize("name", ROWS)
def test_deep_rows_are_a_loop_of_autograd(name):
    net, x, T = network(), torch.randn(5, 6, dtype=torch.float64), 1.5
    labels, order, power, expectation = ROWS[name]
    expected = []
    for row in x:
        f = net(row[None])[0] / T
        q = weights(labels, f[None] * T, T)[0].detach()
        grads = []
        for y in range(4):
            g = torch.autograd.grad(torch.log_softmax(f, -1)[y], list(net.parameters()), retain_graph=True)
            grads.append(torch.cat([p.flatten() for p in g]))
        g = torch.stack(grads)[None, :, :, None]
        expected.append(expected_norm(g, q[None], order, power, expectation)[0])
    for max_bytes in (1, 1 << 14, 1 << 30):  # one gradient at a time, some, all
        got = fastood.deep_gradient_norm(net, x, temperature=T, max_bytes=max_bytes, **fastood.SCORES[name].gradient)
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=1e-20)


LAST_LAYERS = {
    "C": st.sampled_from([1, 2, 3, 100]),
    "lead": st.sampled_from([0.0, 3.0, 45.0, 300.0, 1e4]),  # of one logit over the rest
    "T": st.sampled_from([0.05, 1.0, 30.0]),
    "scale": st.sampled_from([1e-20, 1.0, 1e20]),  # of features
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "bias": st.booleans(),
}


def last_layer(seed, C, lead, T, scale, dtype, bias, n=3, D=4):
    """A linear layer as a model, its inputs and its logits: one of T lead over the rest, which are random."""
    g = torch.Generator().manual_seed(seed)
    x, model = torch.randn(n, D, generator=g).relu() + 0.1, torch.nn.Linear(D, C, bias=bias)
    with torch.no_grad():
        model.weight.copy_(torch.randn(C, D, generator=g) * T / scale)
        model.weight[seed % C] += lead * T / x.sum(-1, keepdim=True).mean() / scale
        if bias:
            model.bias.copy_(torch.randn(C, generator=g) * T)
        model, x = model.to(dtype).eval(), (x * scale).to(dtype)
        return model, x, model(x)


@given(
    seed=st.integers(0, 2**31),
    **LAST_LAYERS,
    labels=st.sampled_from(["uniform", "predicted", "log_predicted", "soft", "one-hot"]),
    order=st.sampled_from([0.3, 0.5, 1, 1.5, 2, 3, 40, math.inf]),
    power=st.sampled_from([0.5, 1, 2]),
    expectation=st.sampled_from(["inside", "outside"]),
)
def test_deep_gradient_norm_of_a_last_layer_is_the_shallow_one(
    seed, C, lead, T, scale, dtype, bias, labels, order, power, expectation
):
    assume(labels != "log_predicted" or expectation == "outside")
    model, x, f = last_layer(seed, C, lead, T, scale, dtype, bias)
    if labels == "one-hot":
        labels = torch.nn.functional.one_hot(f.argmax(-1), C).to(dtype)
    elif labels == "soft":
        labels = torch.softmax(torch.randn(f.shape, generator=torch.Generator().manual_seed(seed)), -1).to(dtype)
    options = {"labels": labels, "order": order, "power": power, "expectation": expectation, "temperature": T}
    deep = fastood.deep_gradient_norm(model, x, **options)
    # In float64, of which the logits' own type is no part.
    q = labels if isinstance(labels, str) else labels.double()
    shallow = fastood.gradient_norm(f.double(), x.double(), **{**options, "labels": q}, bias=bias)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(deep, shallow.to(dtype), rtol=tolerance, atol=1e-44)


@given(seed=st.integers(0, 2**31), **LAST_LAYERS)
def test_deep_batchgrad_of_a_last_layer_is_the_shallow_one(seed, C, lead, T, scale, dtype, bias):
    model, x, f = last_layer(seed, C, lead, T, scale, dtype, bias, n=C + 40)
    y = torch.arange(C + 40) % C  # of which two batches are made
    deep = fastood.deep_batchgrad(model, x[:3], x, y, temperature=T)
    shallow = fastood.BatchGrad.from_anchors(f, x, y, temperature=T, bias=bias).score(f[:3], x[:3])
    torch.testing.assert_close(deep, shallow, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-40)
    if C > 1:
        assert (deep < 0).all()  # oriented, both of them


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_deep_scores_of_fp8_inputs(dtype):
    model = torch.nn.Linear(7, 3).eval()
    for kind in (torch.float32, torch.bfloat16):  # which hold each of its numbers
        model, x = model.to(kind), torch.randn(6, 7).to(dtype)
        got = fastood.deep_gradient_norm(model, x)
        assert torch.equal(got, fastood.deep_gradient_norm(model, x.to(kind)))
        got = fastood.deep_batchgrad(model, x, x[:3], torch.arange(3))
        assert torch.equal(got, fastood.deep_batchgrad(model, x.to(kind), x[:3].to(kind), torch.arange(3)))
    with pytest.raises(TypeError, match=f"model.weight must be float16 or wider, got {dtype}"):
        fastood.deep_gradient_norm(model.to(dtype), x)


def test_deep_norms_where_one_logit_is_45_above_the_rest():
    """By hand, with a = exp(-45): p is (1 - 2a, a, a), and e_y - p is (2a, -a, -a) for the first class."""
    model = torch.nn.Linear(3, 3, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
    x, a = torch.tensor([[45.0, 0.0, 0.0]]), math.exp(-45)
    exgrad = fastood.deep_gradient_norm(model, x, "predicted", expectation="outside")
    assert exgrad.item() == pytest.approx(45 * 8 * a, rel=1e-5)
    one_hot = torch.tensor([[1.0, 0.0, 0.0]])
    for expectation in ("inside", "outside"):
        for order, of_class in ((1, 4 * a), (2, math.sqrt(6) * a), (math.inf, 2 * a)):
            got = fastood.deep_gradient_norm(model, x, one_hot, order, expectation=expectation)
            assert got.item() == pytest.approx(45 * of_class, rel=1e-5)


def test_deep_batchgrad_is_a_loop_of_autograd():
    net, x, T = network(), torch.randn(4, 6, dtype=torch.float64), 1.5
    anchors, labels = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 4

    def gradient(row, y):
        g = torch.autograd.grad(torch.log_softmax(net(row[None])[0] / T, -1)[y], list(net.parameters()))
        return torch.cat([p.flatten() for p in g])

    constant = sum(gradient(a, y) for a, y in zip(anchors, labels, strict=True))
    expected = []
    for row in x:
        p = torch.softmax(net(row[None])[0] / T, -1).detach()
        expected.append(sum(p[y] * (gradient(row, y) + constant).abs().sum() for y in range(4)))
    for max_bytes in (1, 1 << 14, 1 << 30):
        got = fastood.deep_batchgrad(net, x, anchors, labels, temperature=T, max_bytes=max_bytes, oriented=False)
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=0)
    assert all(p.grad is None for p in net.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(fastood.deep_batchgrad(net, x, anchors, labels, temperature=T, oriented=False), got)
    net.unused = torch.nn.Linear(2, 2).double()
    torch.testing.assert_close(fastood.deep_batchgrad(net, x, anchors, labels, temperature=T, oriented=False), got)

    class Two(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    for deep in (
        lambda m: fastood.deep_batchgrad(m, x, anchors, labels),
        lambda m: fastood.deep_gradient_norm(m, x, "predicted", expectation="outside"),
    ):
        with pytest.raises(ValueError, match="model must map inputs"):
            deep(Two(6, 4).double().eval())
    with pytest.raises(ValueError, match=r"anchor_labels must be \[40\], one class per row, got shape \[39\]"):
        fastood.deep_batchgrad(net, x, anchors, labels[1:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_deep_scores_of_an_input_that_is_not_finite_are_not_finite(bad):
    """Though one class be certain, and its weight and the gradients of the others 0."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).eval()
    with torch.no_grad():
        net[2].bias[0] = 1e4
    x, y = torch.randn(5, 4), torch.arange(3)
    anchors = torch.randn(3, 4)
    x[2, 1] = bad
    for name in ROWS:
        got = fastood.deep_gradient_norm(net, x, **fastood.SCORES[name].gradient)
        assert got.isfinite().tolist() == [True, True, False, True, True], name
    got = fastood.deep_batchgrad(net, x, anchors, y)
    assert got.isfinite().tolist() == [True, True, False, True, True]
    assert fastood.deep_batchgrad(net, anchors, x[:3], y).isnan().all()  # of an anchor


def test_deep_gradient_norm_with_labels_and_frozen_parameters():
    net, x = network(), torch.randn(3, 6, dtype=torch.float64)
    for p in net.body.parameters():
        p.requires_grad_(False)
    q = torch.softmax(torch.randn(3, 4, dtype=torch.float64), -1)
    with torch.no_grad():
        h = net.body(x)
    for labels, expectation in itertools.product(["uniform", q], ["inside", "outside"]):
        got = fastood.deep_gradient_norm(net, x, labels, expectation=expectation)
        last_layer = fastood.gradient_norm(net.head(h).detach(), h, labels, expectation=expectation, bias=True)
        torch.testing.assert_close(got, last_layer)


def test_deep_gradient_norm_arguments():
    net, x = network(), torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        assert fastood.deep_gradient_norm(net, x).shape == (3,)
    assert fastood.deep_gradient_norm(net, x[:0]).shape == (0,)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        fastood.deep_gradient_norm(net.train(), x)
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
        fastood.deep_gradient_norm(net.eval().requires_grad_(False), x)
    inside = torch.nn.Sequential(torch.nn.DataParallel(net.body), net.head)
    for model, hint in (
        (torch.nn.DataParallel(network()).eval(), r"model\.module is the model to pass"),
        (inside.eval(), r"model\.0\.module in its place"),
    ):
        with pytest.raises(TypeError, match=rf"must not be a DataParallel, .*: {hint}"):
            fastood.deep_gradient_norm(model, x)
        with pytest.raises(TypeError, match=rf"must not be a DataParallel, .*: {hint}"):
            fastood.deep_batchgrad(model, x, x, torch.arange(3))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        fastood.deep_gradient_norm(lambda x: x, x)
    with pytest.raises(TypeError, match="inputs must be a torch tensor, got ndarray"):
        fastood.deep_gradient_norm(network(), x.numpy())
    with pytest.raises(ValueError, match="model must map inputs"):
        fastood.deep_gradient_norm(torch.nn.Linear(6, 2).double().eval(), x[:, None])


def test_deep_rows_take_bounded_memory():
    """All gradients of 1024 inputs at once would take 830 MiB, and 52 MiB of 64; each call may take about 16."""
    code = """
import resource, torch, fastood
from torch import nn
torch.set_num_threads(1)
body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten())
net = nn.Sequential(body, nn.Linear(144, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
x, limit = torch.randn(1024, 3, 16, 16), {"max_bytes": 16 << 20}
def rows(n):
    fastood.deep_gradient_norm(net, x[:n], **limit)
    fastood.deep_gradient_norm(net, x[:n], "predicted", expectation="outside", **limit)
    fastood.deep_batchgrad(net, x[:n], x[:40], torch.arange(40) % 10, **limit)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(rows(1), rows(64), rows(1024))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    one, some, many = (int(kib) / 1024 for kib in out.split())
    assert some - one < 2 * 16
    assert many - some < 16

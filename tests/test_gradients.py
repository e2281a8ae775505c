"""Closed forms of gradient norms against explicit autograd, class by class, in float64."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import truth
from by_autograd import ROWS, expected_norm, head, per_class_gradients, weights
from hypothesis import assume, given
from hypothesis import strategies as st
from samples import DTYPES, KINDS, rows_of

import fastood


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
    assert got.item() == pytest.approx(expected, rel=1e-9, abs=0)
    if f.max() < 100:
        got = fastood.gradient_norm(f.float(), torch.ones(1, 1), labels, order, power, "outside", **options)
        assert got.item() == pytest.approx(expected, rel=1e-5, abs=0)


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
        ({"labels": None}, TypeError, "labels must be a torch tensor or a numpy array, got None"),
    ],
)
def test_bad_arguments(change, error, words):
    h, _, f = head(4)
    with pytest.raises(error, match=words):
        fastood.gradient_norm(**{"logits": f, "feats": h, **change})


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


@pytest.mark.parametrize("C", [5, 60])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.every_backend
def test_weights_of_logits_whose_differences_leave_float32(backend, C, order):
    """And weights that do; where the features are tiny, the score does not. A masked class has an infinite one."""
    f = torch.full((1, C), -3e38)
    f[0, 1], f[0, 2] = 3e38, 0
    for T, h in ((1e3, torch.ones(1, 2)), (1e-10, torch.full((1, 2), 1e-30))):
        got = fastood.gradient_norm(f, h, "log_predicted", order, 1.5, "outside", temperature=T, backend=backend)
        expected, _ = truth.gradient(f, "log_predicted", order, 1.5, "outside", T, truth.EPS["float32"])
        expected = expected * (truth.norm(h, order) / T) ** 1.5
        truth.assert_close(got, expected, 1e-5 * np.abs(expected))
    f[0, 0] = -math.inf
    got = fastood.gradient_norm(f, h, "log_predicted", order, 1.5, "outside", temperature=T, backend=backend)
    assert got.item() == -math.inf


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.every_backend
def test_probabilities_beyond_float32_count_in_orders_near_0(backend, label):
    f, q = torch.full((1, 100), -105.0), torch.zeros(1, 100)
    f[0, 0], q[0, label] = 0, 1
    got = fastood.gradient_norm(f, torch.ones(1, 1), q, 0.1, backend=backend)
    expected, _ = truth.gradient(f, q, 0.1, 1.0, "inside", 1.0, truth.EPS["float32"])
    truth.assert_close(got, expected, 1e-5 * np.abs(expected))


def test_small_orders_outside_are_beyond_float32(backend):
    f, h = torch.zeros(2, 300), torch.full((2, 1), 1e-20)
    f[1, ::2] = -math.inf
    norms, _ = truth.gradient(f, "predicted", 0.1, 3, "outside", 1.0, truth.EPS["float32"])
    got = fastood.gradient_norm(f, h, "predicted", 0.1, 3, "outside", backend=backend)
    np.testing.assert_allclose(got.numpy(), (norms * 1e-60).astype(float), rtol=1e-4)


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_a_norm_beyond_float64_makes_it_infinite(backend, power):
    """However small a power of the largest double would be."""
    f, h = torch.tensor([[1.0, 0.0]]).double(), torch.ones(1, 2000).double()
    assert fastood.gradient_norm(f, h, "uniform", 0.01, power, backend=backend).item() == math.inf


def test_0_times_a_power_that_overflows_is_0(backend):
    f, h = torch.randn(1, 3).double(), torch.full((1, 2), 1e200, dtype=torch.float64)
    assert fastood.gradient_norm(f, h, "predicted", 2, 3, backend=backend).item() == 0


def test_a_label_without_probability_counts_for_nothing(backend):
    """Nor where the norm that it would weigh is beyond float64."""
    f, h, q = torch.zeros(1, 2000), torch.ones(1, 1), torch.zeros(1, 2000)
    q[0, 7] = 1
    assert fastood.gradient_norm(f, h, q, 0.01, 1, "outside", backend=backend).item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_label_of_a_sure_row_leaves_what_p_lacks(backend, dtype):
    f, h, q = torch.tensor([[60.0, 0.0]], dtype=dtype), torch.ones(1, 1, dtype=dtype), torch.tensor([[1.0, 0.0]])
    for order, expected in ((1, 2 * math.exp(-60)), (math.inf, math.exp(-60))):
        got = fastood.gradient_norm(f, h, q.to(dtype), order, backend=backend)
        assert got.item() == pytest.approx(expected, rel=1e-5, abs=0)

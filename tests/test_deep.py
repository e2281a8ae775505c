"""Gradients of all parameters: against a loop of autograd, and of a last layer against the closed forms."""

import itertools
import math

import program
import pytest
import torch
from by_autograd import ROWS, expected_norm, weights
from hypothesis import assume, given
from hypothesis import strategies as st

import fastood


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
    assert exgrad.item() == pytest.approx(45 * 8 * a, rel=1e-5, abs=0)
    one_hot = torch.tensor([[1.0, 0.0, 0.0]])
    for expectation in ("inside", "outside"):
        for order, of_class in ((1, 4 * a), (2, math.sqrt(6) * a), (math.inf, 2 * a)):
            got = fastood.deep_gradient_norm(model, x, one_hot, order, expectation=expectation)
            assert got.item() == pytest.approx(45 * of_class, rel=1e-5, abs=0)


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
    """All gradients of 128 inputs at once would take 104 MiB, and 52 MiB of 64; each call may take about 16."""
    one, some, many = (int(kib) / 1024 for kib in program.run("memory_of_deep").split())
    assert some - one < 2 * 16
    assert many - some < 16

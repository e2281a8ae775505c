"""fastood.score_linear: against float64 of the product, at the borders of tiles, and in no more memory than a tile."""

import math
from pathlib import Path

import numpy as np
import program
import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st
from interpreter import INTERPRETED

import fastood
import fastood.linear
from fastood.registry import SCORES

pytestmark = pytest.mark.every_backend

HALVES = [torch.bfloat16, torch.float16]
# What a V term is called in truth.py, and by how much errors of up to E / T in each logit change it.
V = {
    "energy": ("energy", lambda value, E, T: E),
    "max_logit": ("fmax", lambda value, E, T: E),
    "msp": ("msp", lambda value, E, T: value * np.expm1(2 * E / T)),
    "varsum": ("s2", lambda value, E, T: value * np.expm1(4 * E / T)),
    "tv": ("tv", lambda value, E, T: np.expm1(2 * E / T)),
    "kl_uniform": ("kl_uniform", lambda value, E, T: 2 * E / T),
    "neg_entropy": ("plogp", lambda value, E, T: (1 + np.abs(value)) * np.expm1(2 * E / T) + 2 * E / T),
}
FUSED = ("energy", "max_logit", "msp", "varsum")  # by one sweep in the Triton kernel, of halves


@pytest.fixture(scope="module", params=["reference", "cpu", "triton"])
def backend(request):
    status = fastood.backends(device_of(request.param))[request.param]
    if not status.usable:
        pytest.skip(f"needs the {request.param} backend: {status.why}")
    return request.param


def device_of(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of a few rows, and of a few classes of the kernel's, so that small inputs have several of both."""
    with_tiny_tiles(monkeypatch.setattr)


def with_tiny_tiles(set_attribute, rows=11 if INTERPRETED else 3):
    set_attribute(fastood.linear, "TILE", 1)
    set_attribute(fastood.linear, "LEAST_ROWS", {"cpu": rows, "cuda": rows})
    set_attribute(fastood.linear, "WIDENED", 300)
    if INTERPRETED or torch.cuda.is_available():
        from fastood.kernels.triton import fused_linear

        tiling = fused_linear.Tiling(16, 16, 16, 2, 4, 2, 2)
        set_attribute(fused_linear, "tiling_on", lambda device: tiling)


def score_linear(backend, *tensors, **options):
    """On the backend's device; the result on the CPU."""
    there = (x if x is None else x.to(device_of(backend)) for x in tensors)
    out = fastood.score_linear(*there, backend=backend, **options)
    return out.cpu() if isinstance(out, torch.Tensor) else type(out)(*(x.cpu() for x in out))


def methods(backend, dtype):
    """All V terms; in the interpreter, which is slow, those that the kernel does, and of others one."""
    if backend != "triton" or torch.cuda.is_available():
        return V
    return ("max_logit",) if dtype == torch.float32 else (*FUSED, "tv")


def random_layer(N, D, C, dtype, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h, w = torch.randn(N, D, generator=generator), torch.randn(C, D, generator=generator) * 3 / D**0.5
    b = torch.randn(C, generator=generator) if bias else None
    return h.to(dtype), w.to(dtype), b if b is None else b.to(dtype)


def exact_layer(N, D, C, dtype, bias=True):
    """Small whole numbers and quarters: no product or sum of them rounds, in no order."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randint(-3, 4, (N, D), generator=generator).to(dtype)
    w = (torch.randint(-3, 4, (C, D), generator=generator) / 4).to(dtype)
    b = torch.randint(-9, 10, (C,), generator=generator) / 4 if bias else None
    return h, w, b if b is None else b.to(dtype)


def logits_of(h, w, b):
    """In long double, and by how much float32 (float64) arithmetic may be off in each row."""
    with np.errstate(all="ignore"):
        f, size = truth.widen(h) @ truth.widen(w).T, np.abs(truth.widen(h)) @ np.abs(truth.widen(w)).T
        if b is not None:
            f, size = f + truth.widen(b), size + np.abs(truth.widen(b))
    eps = 2.0**-53 if torch.float64 in (h.dtype, w.dtype) else 2.0**-24
    twice = 2 if torch.cuda.is_available() else 1  # tensor cores truncate
    return f, twice * (h.shape[1] + 1) * eps * np.where(np.isfinite(size), size, 0).max(1, initial=0), eps


def assert_right(got, method, f, E, eps, T=1.0):
    name, spread = V[method]
    expected = truth.stat(name, f, T)
    allowed = truth.tolerance(name, expected, f, T, eps) + spread(expected, E, T)
    truth.assert_close(got, expected, allowed, method)


# ---- against the truth

SHAPES = [(5, 32, 40), (17, 16, 33), (1, 48, 1), (4, 33, 7), (3, 1, 2), (2, 64, 130)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(backend, tiny_tiles, shape, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 is left to the reference backend")
    h, w, b = random_layer(*shape, dtype, bias=shape[0] != 17)
    f, E, eps = logits_of(h, w, b)
    for method in methods(backend, dtype):
        got = score_linear(backend, h, w, b, method=method, norm=None)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_right(got, method, f, E, eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1e10])
def test_the_contract_holds_as_it_is_where_no_product_rounds(backend, tiny_tiles, dtype, temperature):
    """Of many classes, masked ones, a row far from 0, one of equal logits."""
    h, w, b = exact_layer(20, 16, 101, dtype)
    b[::7] = -math.inf
    h[3] *= 1024
    h[4] = 0
    f, _, eps = logits_of(h, w, b)
    for method in methods(backend, dtype):
        got = score_linear(backend, h, w, b, method=method, norm=None, temperature=temperature)
        assert_right(got, method, f, 0, eps, temperature)


def test_sums_of_many_classes(backend):
    """As large as their rounding is that of the sum of all; and growing maxima, each the reference of a while."""
    C = 5000
    h = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).repeat(1, 8).bfloat16()
    w = torch.zeros(C, 16)
    w[:, 0] = torch.arange(C) % 97 / 32
    w[:, 1] = torch.arange(C) * (64 / C)
    h, w, b = h, w.bfloat16(), torch.full([C], 0.3)
    f, E, eps = logits_of(h, w, b)
    for method in ("energy", "varsum"):
        assert_right(score_linear(backend, h, w, b, method=method, norm=None), method, f, E, eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_every_score_is_that_of_the_logits(backend, tiny_tiles, dtype):
    """With norms, logarithms and signs: what fastood.score gives, which tests of its own compare with truth."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 is left to the reference backend")
    h, w, b = exact_layer(7, 16, 50, dtype)
    f = h.double() @ w.double().T + b.double()
    f = f if dtype == torch.float64 else f.float()
    cases = [(name, {}) for name in SCORES]
    cases += [
        ("msp", {"norm": 2, "log": True}),
        ("energy", {"norm": None, "temperature": 7.0}),
        ("varsum", {"norm": 0}),
    ]
    cases += [("exgrad", {"oriented": False}), ("gen", {"gamma": 0.3, "M": 5}), ("gradnorm", {"log": True})]
    for method, options in cases:
        expected = fastood.score(f, h, method, backend="reference", **options)
        torch.testing.assert_close(
            score_linear(backend, h, w, b, method=method, **options), expected, rtol=1e-5, atol=1e-6, msg=method
        )


@given(st.data())
def test_any_tile_and_layout(backend, data):
    N, D, C = (data.draw(st.integers(low, most)) for low, most in ((0, 9), (1, 40), (1, 40)))
    dtypes = [torch.float32, *HALVES] + ([] if backend == "triton" else [torch.float64])
    of_feats, of_weight = (data.draw(st.sampled_from(dtypes)) for _ in range(2))
    h, w, b = exact_layer(N, D, C, torch.float32, data.draw(st.booleans()))
    f = h.double() @ w.double().T + (0 if b is None else b.double())
    h, w = strided(h.to(of_feats), data), strided(w.to(of_weight), data)
    b = None if b is None else strided(b[None].half(), data)[0]
    wide = torch.float64 in (of_feats, of_weight)
    with pytest.MonkeyPatch.context() as patch:
        with_tiny_tiles(patch.setattr, data.draw(st.integers(1, 4)))
        method = data.draw(st.sampled_from(["energy", "msp", "tv", "exgrad"]))
        got = score_linear(backend, h, w, b, method=method, predict=True)
    expected = fastood.score(f if wide else f.float(), h, method, backend="reference")
    torch.testing.assert_close(got.score, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.classes, f.argmax(-1))
    torch.testing.assert_close(got.probability.double(), f.softmax(-1).amax(-1), rtol=1e-6, atol=0)


def strided(x, data):
    """The same numbers, laid out in memory otherwise."""
    how = data.draw(st.sampled_from(["as it is", "turned", "some columns", "every other"]))
    if how == "turned":
        return x.T.contiguous().T
    if how == "some columns":
        return torch.nn.functional.pad(x, (1, 2))[:, 1:-2]
    return x.repeat_interleave(2, 1)[:, ::2] if how == "every other" else x


# ---- rows that are not numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_rows_are_bad_alone(backend, tiny_tiles, dtype):
    h, w, b = exact_layer(9, 16, 40, dtype)
    w = w.abs() + 1
    bad = h.clone()
    bad[2, 3], bad[4, 5], bad[7] = math.nan, math.inf, math.nan
    for method in (*methods(backend, dtype), "gradnorm"):
        good, got = (score_linear(backend, x, w, b, method=method) for x in (h, bad))
        assert got[[2, 7]].isnan().all()
        assert got[4] == math.inf if method == "energy" else got[4].isnan(), method
        others = torch.tensor([0, 1, 3, 5, 6, 8])
        assert torch.equal(good[others], got[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_classes_masked(backend, tiny_tiles, dtype):
    h, w, b = exact_layer(5, 16, 40, dtype)
    nothing = torch.full_like(b, -math.inf)
    assert (score_linear(backend, h, w, nothing, norm=None) == -math.inf).all()
    got = {
        m: score_linear(backend, h, w, nothing, method=m, norm=None) for m in methods(backend, dtype) if m != "energy"
    }
    assert all(x.isnan().all() for x in got.values())
    b[:] = -math.inf
    b[17] = 0  # all but one
    got = score_linear(backend, h, w, b, method="msp", norm=None, predict=True)
    assert (got.score == 1).all()
    assert (got.classes == 17).all()


def test_a_class_is_one_of_them_whatever_the_row(backend, tiny_tiles):
    h, w, _ = exact_layer(5, 16, 40, torch.bfloat16)
    h[1], h[3] = math.nan, math.inf
    got = score_linear(backend, h, w, torch.full([40], -math.inf), predict=True)
    assert ((got.classes >= 0) & (got.classes < 40)).all()


def test_of_equal_logits_the_first_is_the_class(backend, tiny_tiles):
    h = torch.ones(3, 16, dtype=torch.bfloat16)
    w = torch.zeros(90, 16, dtype=torch.bfloat16)
    w[41:] = 1
    got = score_linear(backend, h, w, None, method="max_logit", norm=None, predict=True)
    assert torch.equal(got.classes, torch.full([3], 41))
    assert torch.equal(got.score, torch.full([3], 16.0))
    torch.testing.assert_close(got.probability, torch.full([3], 1 / 49), rtol=1e-5, atol=0)


def test_no_rows_and_no_features(backend):
    w, b = torch.ones(4, 16), torch.tensor([0.0, 1.0, 2.0, 3.0])
    for dtype in (torch.float32, torch.bfloat16):
        got = score_linear(backend, torch.ones(0, 16, dtype=dtype), w.to(dtype), b, predict=True)
        assert [x.shape for x in got] == [(0,)] * 3
        got = score_linear(backend, torch.ones(2, 0, dtype=dtype), w[:, :0].to(dtype), b, norm=None)
        torch.testing.assert_close(got, b.logsumexp(0).expand(2))


# ---- arguments


def test_numpy_in_numpy_out():
    h, w, b = random_layer(5, 8, 11, torch.float32)
    expected = fastood.score_linear(h, w, b, predict=True)
    got = fastood.score_linear(h.numpy(), w.numpy(), b.numpy(), predict=True)
    assert all(isinstance(x, np.ndarray) for x in got)
    assert all(np.array_equal(x, y.numpy()) for x, y in zip(got, expected, strict=True))
    assert isinstance(fastood.score_linear(h.numpy(), w.numpy()), np.ndarray)


def test_predict_says_what_softmax_says():
    h, w, b = random_layer(50, 8, 11, torch.float32)
    p = torch.softmax((h.double() @ w.double().T + b) / 2, -1)
    for method, options in (("energy", {}), ("exgrad", {}), ("msp", {"log": True}), ("tv", {"oriented": False})):
        got = fastood.score_linear(h, w, b, method, temperature=2, predict=True, **options)
        torch.testing.assert_close(got.probability.double(), p.amax(-1), rtol=1e-5, atol=0)
        assert torch.equal(got.classes, p.argmax(-1))
        assert torch.equal(got.score, fastood.score_linear(h, w, b, method, temperature=2, **options))


def test_a_score_of_ones_own(monkeypatch):
    margin = fastood.Score(
        "margin", "T lse - max f", "mine", "out", ("energy", "fmax"), v=lambda s: s["energy"] - s["fmax"]
    )
    monkeypatch.setitem(SCORES, "margin", margin)
    h, w, b = exact_layer(5, 8, 11, torch.float32)
    assert torch.equal(fastood.score_linear(h, w, b, "margin"), fastood.score(h @ w.T + b, h, "margin"))


def test_the_probability_outlives_its_score():
    kept = dict(SCORES)
    try:
        del SCORES["msp"]
        assert fastood.score_linear(*random_layer(5, 8, 11, torch.float32), predict=True).probability.shape == (5,)
    finally:
        SCORES.clear()  # in their order
        SCORES.update(kept)


h, w, b = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, w), {}, TypeError, "feats must be a torch tensor or a numpy array, got None"),
        ((h, None), {}, TypeError, "weight must be a torch tensor or a numpy array, got None"),
        ((h, [[1.0]]), {}, TypeError, "weight must be a torch tensor or a numpy array, got list"),
        ((h, w, 1.0), {}, TypeError, "bias must be a torch tensor or a numpy array, got float"),
        ((h, w.numpy()), {}, TypeError, "mixed inputs: feats is a torch tensor, weight is a numpy array"),
        ((h, w, b.numpy()), {}, TypeError, "mixed inputs: .* bias is a numpy array"),
        ((h, w.long()), {}, TypeError, "weight must be float16, .*got torch.int64"),
        ((h[0], w), {}, ValueError, "feats must be 2-D"),
        ((h, w[0]), {}, ValueError, "weight must be 2-D"),
        ((h, w.T), {}, ValueError, r"weight must be \[C, 4\] for feats \[3, 4\], got shape \[4, 5\]"),
        ((h, w[:0]), {}, ValueError, "weight must have at least one class"),
        ((h, w, b[None]), {}, ValueError, r"bias must be \[C\], one number per class, got shape \[1, 5\]"),
        ((h, w, b[:4]), {}, ValueError, r"bias must be \[5\], one number per class, got shape \[4\]"),
        ((h, w, b, "enrgy"), {}, ValueError, "method must be one of .* did you mean 'energy'"),
        ((h, w, b, "gradnorm"), {"norm": 2}, ValueError, "gradnorm = .* has a norm of its own"),
        ((h, w, b), {"norm": -1}, ValueError, "norm"),
        ((h, w, b), {"temperature": 0}, ValueError, "temperature must be a finite number > 0"),
        ((h, w, b), {"predict": 1}, TypeError, "predict must be True or False"),
        ((h, w, b), {"log": 1}, TypeError, "log must be True or False"),
        ((h, w, b, "neg_entropy"), {"log": True}, ValueError, "neg_entropy is never above 0"),
        ((h, w, b), {"gamma": 1.0}, TypeError, "gamma: no such argument"),
        ((h, w, b), {"backend": "gpu"}, ValueError, "backend"),
        ((h[:0], w, b), {"backend": "gpu"}, ValueError, "backend"),
        ((h.to("meta"), w, b), {}, ValueError, "weight must be on the device of feats, meta, got cpu"),
    ],
)
def test_arguments_are_checked(arguments, options, error, message):
    fastood.score_linear(h, w, b)  # the plan of good arguments is kept, and not taken for theirs
    with pytest.raises(error, match=message):
        fastood.score_linear(*arguments, **options)


# ---- plain PyTorch where it is asked for


def test_gradients():
    h, w, b = (x.double().requires_grad_() for x in random_layer(4, 6, 9, torch.float32))
    assert torch.autograd.gradcheck(lambda *x: fastood.score_linear(*x, norm=None), (h, w, b))
    got = torch.autograd.grad(fastood.score_linear(h, w, b, norm=2, predict=True).score.sum(), (h, w, b))
    u_v = (torch.logsumexp(h @ w.T + b, -1) * h.norm(dim=-1)).sum()
    for x, y in zip(got, torch.autograd.grad(u_v, (h, w, b)), strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        assert not fastood.score_linear(h, w, b).requires_grad


def test_export_holds_plain_operations():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 11)

        def forward(self, h):
            return fastood.score_linear(h, self.head.weight, self.head.bias, "msp", norm=2, predict=True)

    model, h = Model(), torch.randn(3, 8)
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(model, (h,), dynamic_shapes=({0: rows},))
    names = {str(x.target) for x in exported.graph.nodes if x.op == "call_function"}
    assert all(x.startswith(("aten.", "<built-in")) for x in names), names
    h = torch.randn(5, 8)
    for x, y in zip(exported.module()(h), model(h), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_rounds_no_logits(grad):
    h, w, b = random_layer(5, 64, 40, torch.float32)
    w.requires_grad_(grad)
    expected = fastood.score_linear(h, w, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastood.score_linear(h, w, b), expected)


# ---- memory


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("dtype", "method"), [("float32", "energy"), ("float32", "tv"), ("bfloat16", "energy")])
def test_no_more_memory_than_a_tile(dtype, method):
    """Of 131072 classes: 64 rows, 32 MiB, where the logits of all rows are 256 MiB."""
    tile = fastood.linear.LEAST_ROWS["cpu"] * 131072 * 4
    assert int(program.run("peak", dtype, method)) < 2.5 * tile

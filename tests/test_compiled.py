"""Scores under torch.compile; the operators that it puts into a graph are tests/kernels/test_operator.py's."""

import math

import pytest
import torch

import fastood

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, in its compiler


def batch(n):
    return torch.randn(n, 12), torch.randn(n, 9)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()  # which counts compilations of one function


@pytest.mark.parametrize("name", list(fastood.SCORES))
def test_every_score_compiles_whole_for_any_shape(name):
    compiled = torch.compile(lambda f, h: fastood.score(f, h, name), fullgraph=True, dynamic=True, backend="eager")
    for n, C, D in ((4, 7, 5), (3, 9, 2)):
        f, h = torch.randn(n, C), torch.randn(n, D)
        torch.testing.assert_close(compiled(f, h), fastood.score(f, h, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_numbers_may_be_inputs_of_a_graph(backend):
    f, h = batch(2)

    def grid(norm, temperature, gamma, M):
        of_v = {"temperature": temperature, "gamma": gamma, "M": M, "backend": backend}
        return fastood.sweep(f, h, ["gen", "msp"], [None, norm], **of_v)

    compiled = torch.compile(grid, fullgraph=True, dynamic=True, backend="eager")
    for numbers in ((2, 1.0, 0.1, 100), (0.3, 0.7, 0.5, 2)):
        torch.testing.assert_close(compiled(*numbers), grid(*numbers), rtol=1e-5, atol=1e-6)


def test_compiled_with_a_dynamic_batch():
    score = torch.compile(lambda f, h: fastood.score(f, h), fullgraph=True, dynamic=True)
    for n in (3, 8, 17):
        f, h = batch(n)
        torch.testing.assert_close(score(f, h), fastood.score(f, h), rtol=1e-5, atol=1e-6)


def test_gradient_norms_and_norms_are_traced_whole():
    f, h = batch(4)
    q = torch.randn(4, 12).softmax(-1)
    for call in (
        lambda f, h, q: fastood.gradient_norm(f, h),
        lambda f, h, q: fastood.gradient_norm(f, h, "predicted", 2, 3.5, "outside"),
        lambda f, h, q: fastood.gradient_norm(f, h, q, 2, 1, "outside"),
        lambda f, h, q: fastood.norms(h, [0.3, 2]),
    ):
        traced = torch.compile(call, fullgraph=True, backend="eager")  # no compiler: what is asked is whether it traces
        torch.testing.assert_close(traced(f, h, q), call(f, h, q), rtol=1e-5, atol=1e-6)


def test_arguments_of_the_compiled_function():
    """Which torch holds for symbols once they have changed, and which are refused as the eager call refuses them."""
    f, h = batch(5)

    def call(f, h, norm, temperature):
        return fastood.score(f, h, "gradnorm" if norm is None else "msp", norm=norm or "auto", temperature=temperature)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for norm, T in ((1.0, 1.0), (0.3, 1.1), (2, 3), (math.inf, 0.1), (None, 1.5)):
        assert torch.equal(compiled(f, h, norm, T), call(f, h, norm, T))
    compiled = torch.compile(fastood.score, backend="eager")
    for wrong in ({"norm": True}, {"norm": "2"}, {"temperature": True}, {"temperature": "1.0"}, {"bias": 1}):
        with pytest.raises(TypeError, match=f"^{next(iter(wrong))} must be"):
            compiled(f, h, **wrong)
    for method, feats, named in (("msp", h[:3], "feats"), ("gradnorm", None, "feats"), ("mps", h, "method")):
        with pytest.raises(ValueError, match=f"^{named} must be|^{named} must have"):
            compiled(f, feats, method)
    for name, x in (("temperature", 10**400), ("norm", -(10**400)), ("backend", "gpu")):
        with pytest.raises(ValueError, match=rf"^{name} .*must be"):
            compiled(f, h, **{name: x})
    torch._dynamo.reset()
    assert torch.equal(compiled(f, h, norm=10**400), fastood.score(f, h, norm=math.inf))
    with pytest.raises(RuntimeError, match=r"^backend 'triton' cannot serve torch\.float64"):
        compiled(f.double(), h, backend="triton")


@pytest.mark.skipif(torch.__version__ < "2.13", reason="needs torch 2.13: 2.8 leaves the words out")
@pytest.mark.parametrize(
    "wrong",
    [{"method": "mps"}, {"backend": "gpu"}, {"temperature": 10**400}, {"normm": 2}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_wrong_is_said_of_a_whole_graph_too(wrong):
    """In an error of the compiler's own, but with the words of the eager call."""
    with pytest.raises((ValueError, TypeError)) as eager:
        fastood.score(*batch(5), **wrong)
    whole = torch.compile(lambda f, h: fastood.score(f, h, **wrong), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="Observed exception") as compiled:
        whole(*batch(5))
    assert str(eager.value) in str(compiled.value)


def test_a_score_registered_anew_is_seen():
    f, h = batch(5)
    compiled = torch.compile(lambda f, h: fastood.score(f, h, "a:new"), backend="eager", fullgraph=True)
    for factor in (2.0, 3.0):
        fastood.register(fastood.Score("a:new", "factor T lse", "mine", "in", stats=("energy",), v=(factor,)))
        try:
            torch.testing.assert_close(compiled(f, h), factor * fastood.score(f, h))
        finally:
            del fastood.SCORES["a:new"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_score_sees_forward_mode(backend):
    f, h = batch(5)
    compiled = torch.compile(lambda f, h: fastood.score(f, h), backend=backend)  # torch 2.14 refuses the whole there
    compiled(f, h)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(f, torch.ones_like(f))
        got, expected = (torch.autograd.forward_ad.unpack_dual(c(dual, h)).tangent for c in (compiled, fastood.score))
    torch.testing.assert_close(got, expected)


def test_a_torch_that_traces_no_other_function_in_the_place_of_score(monkeypatch):
    monkeypatch.delattr(fastood.score, "_torchdynamo_inline", raising=False)
    f, h = batch(5)
    for compiled in (torch.compile(lambda f, h: fastood.score(f, h), fullgraph=True), torch.compile(fastood.score)):
        torch.testing.assert_close(compiled(f, h), fastood.score(f, h))


@pytest.mark.skipif(not fastood.backends("cpu")["cpu"].usable, reason="needs the C++ part")
def test_little_is_checked_before_a_compiled_score_is_called():
    """Each check of torch's compiler takes some 0.1 us: a dozen say that the functions are the same."""
    f, h = batch(5)
    checks = {}
    for name, call in (("score", lambda f, h: fastood.score(f, h)), ("none", lambda f, h: f[:, 0] * h[:, 0])):
        with torch.no_grad():
            torch.compile(call, backend="eager", fullgraph=True)(f, h)
        (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(call.__code__)
        checks[name] = str(entry.guard_manager).count("+- ") - str(entry.guard_manager).count("+- GuardManager")
    most = 20 if hasattr(fastood.score, "_torchdynamo_inline") else 50
    assert 0 < checks["score"] - checks["none"] < most, checks

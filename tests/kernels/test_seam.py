"""The seam with PyTorch: its autograd, its transforms and its tracers look into operations, and into no kernel."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from samples import V_TERMS

import fastood
from fastood.kernels import seam


def test_where_a_gradient_is_asked_for_the_reference_gives_it():
    if not fastood.backends()["cpu"].usable:
        pytest.skip("needs the C++ part")
    f, h = torch.randn(3, 5, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    for backend in ("cpu", "reference"):
        (g_f, g_h) = torch.autograd.grad(fastood.score(f, h, backend=backend).sum(), (f, h))
        assert g_f.abs().sum() > 0
        assert g_h.abs().sum() > 0
    with torch.no_grad():
        assert not fastood.score(f, h, backend="cpu").requires_grad


@pytest.mark.parametrize("name", list(fastood.SCORES))
def test_gradients_are_right(name):
    torch.manual_seed(0)
    f = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    h = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for r in (0.3, 0.5, 1, 1.5, 2, 3, 7.5, math.inf):
        if fastood.SCORES[name].gradient is None:
            torch.autograd.gradcheck(lambda f, h, r=r: fastood.score(f, h, name, norm=r, temperature=0.7), (f, h))
    if fastood.SCORES[name].gradient:
        torch.autograd.gradcheck(lambda f, h: fastood.score(f, h, name, bias=True), (f, h))


def test_gradients_at_masked_logits_and_zero_features():
    f = torch.tensor([[1.0, -math.inf, 0.5]], dtype=torch.float64, requires_grad=True)
    h = torch.tensor([[0.0, 2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    for name in V_TERMS:
        if name == "kl_uniform":
            continue  # infinite there
        for r in (0.3, 0.5, 1, 2, 3):
            g = torch.autograd.grad(fastood.score(f, h, name, norm=r).sum(), (f, h))
            assert all(x.isfinite().all() for x in g), (name, r)
            assert g[0][0, 1] == 0
    zeros = torch.zeros(1, 3, requires_grad=True)
    for r in (0.3, 1, 2, 3):
        assert torch.autograd.grad(fastood.norms(zeros, [r]).sum(), zeros)[0].eq(0).all()


@pytest.mark.parametrize("f", [[[3.0, -math.inf, -math.inf]], [[3.0]], [[3.0, 3.0, -math.inf]]])
def test_a_row_of_one_class_has_finite_gradients(f):
    """GEN and the E_p rows, and the logarithms of these: of a row of one class, which is 0 whatever its logit is, 0."""
    torch._dynamo.reset()  # which counts compilations of one function
    h = torch.ones(1, 2)
    alone = sum(x > -math.inf for x in f[0]) == 1
    for dtype in (torch.float32, torch.float64):
        for name, log in [("gen", False), *itertools.product(("exgrad", "eg_p_l2sq"), (False, True))]:
            logits = torch.tensor(f, dtype=dtype, requires_grad=True)
            got = fastood.score(logits, h, name, log=log)
            assert torch.equal(got, fastood.score(logits.detach(), h, name, log=log)) or not alone
            (slope,) = torch.autograd.grad(got.sum(), logits)
            assert slope.isfinite().all(), (name, log)
            assert not alone or slope.eq(0).all(), (name, log)
            if log:
                compiled = torch.compile(fastood.score, fullgraph=True, backend="eager")
                assert got.item() == compiled(logits.detach(), h, name, log=True).item()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_dispatch_modes():
    """What records or fakes torch's operations must see them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    f, other = torch.randn(3, 10), torch.randn(3, 10)
    fastood.score(f)
    for call in (lambda x: fastood.score(x), lambda x: fastood.norms(x, [1.0])):
        torch.testing.assert_close(make_fx(call)(f)(other), call(other))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fastood.score(f).shape == (3,)
    zeros = torch._efficientzerotensor((2, 5))  # a tensor without memory
    torch.testing.assert_close(fastood.score(zeros), torch.full((2,), math.log(5)))
    torch.testing.assert_close(fastood.norms(zeros, [1.0]), torch.zeros(2, 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in forward-mode derivatives
def test_under_function_transforms_and_traces():
    f, h = torch.randn(4, 3, 10), torch.randn(4, 3, 5)
    each = torch.stack([fastood.score(x, y) for x, y in zip(f, h, strict=True)])
    torch.testing.assert_close(torch.func.vmap(fastood.score)(f, h), each)
    x, direction = f[0].double(), torch.randn(3, 10, dtype=torch.float64)
    slope = (fastood.score(x + 1e-6 * direction) - fastood.score(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(torch.func.jvp(fastood.score, (x,), (direction,))[1], slope)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(fastood.score(dual)).tangent, slope)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_under_jit_trace():
    f = torch.randn(3, 10)
    traced = torch.jit.trace(lambda f: fastood.score(f), (f,))
    other = torch.randn(3, 10)
    torch.testing.assert_close(traced(other), fastood.score(other))


def test_a_torch_that_has_dropped_a_private_name(starts):
    """Each that fastood looks up, in a process of its own."""
    looked_up = re.findall(r'_of_torch\("([\w.]*\b_\w+)"', Path(seam.__file__).read_text(encoding="utf-8"))
    assert len(looked_up) > 3
    assert starts["lacking"].keys() >= {*looked_up}
    for name, off in starts["lacking"].items():
        assert "failed" not in off, name
        assert max(off) < 1e-6, name

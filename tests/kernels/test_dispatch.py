"""Which backend serves a call: kernels/__init__.py."""

import shutil
import types

import pytest
import torch
import truth

import fastood
from fastood import _plan, kernels
from fastood.kernels import Run

F = torch.tensor([[4.0, 0.0, 1.0], [0.2, 0.1, 0.0]])


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_the_extension_was_built():
    """Installation without a compiler succeeds quietly; where the tests run, it must not have come to that."""
    assert fastood.backends()["cpu"].usable


def test_backends_say_whether_they_can_serve():
    status = fastood.backends()
    assert status["reference"].usable
    assert all(s.why for s in status.values())
    assert list(status)[-1] == "reference"  # "auto" falls back on it


def fake(reason, result=42.0):
    def scores(logits, feats, labels=None):
        return torch.full((len(logits),), result)

    backend = types.ModuleType("fake", "A fake.")
    backend.unusable = lambda device, dtype: reason
    backend.supports = lambda request, C, D: True
    backend.compile = lambda request: Run(scores)
    return backend


def test_one_place_picks_the_backend(monkeypatch):
    monkeypatch.setattr(_plan, "_PLANS", {})  # made for the backends there were
    monkeypatch.setattr(kernels, "DEFAULT", "auto")
    monkeypatch.setattr(kernels, "BACKENDS", {"fast": fake(None), "lame": fake("it has no legs"), **kernels.BACKENDS})
    assert fastood.score(F).tolist() == [42, 42]
    assert fastood.score(F, backend="fast").tolist() == [42, 42]
    energy = fastood.score(F, backend="reference")
    truth.assert_close(energy, truth.stat("energy", F), 1e-6)
    with pytest.raises(RuntimeError, match=r"backend 'lame' cannot serve torch.float32 on cpu: it has no legs"):
        fastood.score(F, backend="lame")
    assert fastood.backends()["lame"] == (False, "it has no legs")

    monkeypatch.setattr(kernels, "DEFAULT", "reference")  # FASTOOD_BACKEND, read at import
    assert torch.equal(fastood.score(F), energy)
    assert fastood.score(F, backend="fast").tolist() == [42, 42]  # an argument outranks the environment
    monkeypatch.setattr(kernels, "DEFAULT", "lame")
    with pytest.raises(RuntimeError, match="it has no legs"):
        fastood.score(F)


def test_what_a_backend_does_not_support_is_the_references(monkeypatch):
    """Requests, BatchGrad and SCALE alike: it is not asked for them, nor for what it need not have."""
    refusing = fake(None)
    refusing.supports = lambda work, C, D: False
    refusing.compile = None
    monkeypatch.setitem(kernels.BACKENDS, "refusing", refusing)
    G, head, h = torch.randn(3, 4), (torch.randn(3, 4), torch.randn(3)), torch.rand(2, 4)
    for call in (
        lambda backend: fastood.score(F, h, backend=backend),
        lambda backend: fastood.BatchGrad(G).score(F, h, backend=backend),
        lambda backend: fastood.Fitted("scale", head=head).score(F, h, backend=backend),
        lambda backend: fastood.score_linear(h, *head, backend=backend),
    ):
        torch.testing.assert_close(call("refusing"), call("reference"))


def test_the_environment_names_the_default(starts):
    assert "FASTOOD_BACKEND) must be 'auto' or one of" in starts["no such backend"]


def test_auto_skips_a_backend_that_cannot_serve(monkeypatch):
    monkeypatch.setattr(kernels, "BACKENDS", {"lame": fake("it has no legs"), **kernels.BACKENDS})
    truth.assert_close(fastood.score(F), truth.stat("energy", F), 1e-6)

"""fastood on the CPU against what users would write instead, and against merely reading the tensors."""

import math

import pytest
import torch

import fastood

SHAPES = [(16384, 1000, 2048), (65536, 10, 512), (256, 128256, 4096), (1, 1000, 2048)]
DTYPES = [torch.float32, torch.bfloat16]
THREADS = sorted({1, torch.get_num_threads()})
V, NORMS = ("energy", "tv", "msp", "varsum"), (0, 0.1, 0.3, 0.5, 0.8, 1, 2, 3, 4, 5, 6, math.inf)


def label(N, C, D, dtype):
    return f"N={N} C={C} D={D} {str(dtype).removeprefix('torch.')}"


def data(N, C, D, dtype):
    torch.manual_seed(0)
    return (torch.randn(N, C) * 2).to(dtype), torch.randn(N, D).relu().add(1e-3).to(dtype)


# ---- what users write


def eager_energy_norm(f, h):
    return torch.logsumexp(f.float(), -1) * h.float().abs().pow(0.3).sum(-1).pow(1 / 0.3)


def eager_sweep(f, h):
    p = torch.softmax(f.float(), -1)
    v = [torch.logsumexp(f.float(), -1), (p - 1 / p.shape[1]).abs().sum(-1) / 2, p.amax(-1), p.square().sum(-1)]
    a = h.float().abs()
    u = [(a != 0).sum(-1).float()]
    u += [a.pow(r).sum(-1).pow(1 / r) for r in NORMS[1:-1]]
    u += [a.amax(-1)]
    return torch.stack(v, -1)[:, :, None] * torch.stack(u, -1)[:, None]


def eager_gradnorm(f, h):
    p = torch.softmax(f.float(), -1)
    return (p - 1 / p.shape[1]).abs().sum(-1) * h.float().abs().sum(-1)


def peer(name):
    """pytorch-ood's own function, where it can be imported (it needs torchvision)."""
    try:
        if name == "msp":
            from pytorch_ood.detector import MaxSoftmax

            return lambda f: -MaxSoftmax.score(f.float())
        from pytorch_ood.detector import EnergyBased

        return lambda f: -EnergyBased.score(f.float())
    except Exception:
        return None


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "C", "D"), SHAPES)
def test_energy_times_norm(compare, N, C, D, dtype, threads):
    f, h = data(N, C, D, dtype)
    compiled = torch.compile(eager_energy_norm)
    candidates = {
        "fastood": lambda: fastood.score(f, h),
        "eager": lambda: eager_energy_norm(f, h),
        "torch.compile": lambda: compiled(f, h),
        "sum of both": lambda: (f.sum(), h.sum()),
    }
    expected = fastood.score(f.double(), h.double(), backend="reference")
    compare("energy x ||h||_0.3", label(N, C, D, dtype), threads).run(candidates, expected)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "C", "D"), [(1024, 1000, 2048), (16384, 1000, 2048), (1, 1000, 2048)])
def test_sweep(compare, N, C, D, dtype, threads):
    f, h = data(N, C, D, dtype)
    candidates = {"fastood": lambda: fastood.sweep(f, h), "fastood, one score": lambda: fastood.score(f, h)}
    if N <= 1024:  # eager takes seconds above
        candidates["eager"] = lambda: eager_sweep(f, h)
    compare("sweep 4 V x 12 norms", label(N, C, D, dtype), threads).run(candidates)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "C"), [(1024, 1000), (65536, 10), (256, 128256), (64, 1000), (1, 1000), (1, 10)])
@pytest.mark.parametrize("method", ["msp", "energy"])
def test_v_alone(compare, method, N, C, dtype, threads):
    f, _ = data(N, C, 1, dtype)
    eager = {
        "msp": lambda: torch.softmax(f.float(), -1).amax(-1),
        "energy": lambda: torch.logsumexp(f.float(), -1),
    }[method]
    candidates = {"fastood": lambda: fastood.score(f, method=method), "eager": eager}
    if of_peer := peer(method):
        candidates["pytorch-ood"] = lambda: of_peer(f)
    candidates["sum of both"] = f.sum
    expected = fastood.score(f.double(), method=method, backend="reference")
    compare(f"{method} alone", label(N, C, 0, dtype), threads).run(candidates, expected)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "C", "D"), [(1024, 1000, 2048), (1, 1000, 2048)])
def test_gradnorm(compare, N, C, D, dtype, threads):
    f, h = data(N, C, D, dtype)
    candidates = {
        "fastood": lambda: fastood.score(f, h, "gradnorm"),
        "eager": lambda: eager_gradnorm(f, h),
        "sum of both": lambda: (f.sum(), h.sum()),
    }
    expected = fastood.score(f.double(), h.double(), "gradnorm", backend="reference")
    compare("GradNorm", label(N, C, D, dtype), threads).run(candidates, expected)

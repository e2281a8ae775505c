"""fastood on a GPU against what users would run instead, and against a copy on the device that moves as many bytes.

A call counts from Python to the end of the work, launches included; in a CUDA graph launches count little.
"""

from functools import partial

import pytest
import rivals
import torch
from harness import OURS, backends, captured

import fastood

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def logits_of(N, C, dtype):
    torch.manual_seed(0)
    return (torch.randn(N, C, device="cuda") * 2).to(getattr(torch, dtype))


def feats_of(N, D, dtype):
    torch.manual_seed(1)
    return torch.randn(N, D, device="cuda").relu().add(1e-3).to(getattr(torch, dtype))


def on_gpu(call, *tensors):
    """Every backend, and the first one replayed from a CUDA graph of these tensors."""
    graph, out = captured(partial(call, *tensors))

    def replay(*_):
        graph.replay()
        return out

    return {**backends(call, "cuda"), f"{OURS}, CUDA graph": replay}


@every_dtype
@pytest.mark.parametrize(
    "shape", [(1, 1000, 2048), (16384, 1000, 2048), (65536, 10, 512), (1024, 128256, 4096)], ids=str
)
def test_energy_times_norm(compare, shape, dtype):
    N, C, D = shape
    f, h = logits_of(N, C, dtype), feats_of(N, D, dtype)
    compare("energy x ||h||_0.3", 1, on_gpu(fastood.score, f, h), rivals.energy_norm, logits=f, feats=h)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1000, 2048), (1024, 1000, 2048), (16384, 1000, 2048)], ids=str)
def test_sweep(compare, shape, dtype):
    N, C, D = shape
    f, h = logits_of(N, C, dtype), feats_of(N, D, dtype)
    compare("sweep, 4 V x 12 norms", 1, on_gpu(fastood.sweep, f, h), rivals.sweep, logits=f, feats=h)


@every_dtype
# Rows of 1001 do not start where 16 bytes can be loaded at once.
@pytest.mark.parametrize("shape", [(16384, 1000), (16384, 1001), (65536, 10), (1024, 128256)], ids=str)
@pytest.mark.parametrize("method", ["msp", "energy", "tv"])
def test_v_alone(compare, method, shape, dtype):
    f = logits_of(*shape, dtype)
    peers = {} if method == "tv" else {"pytorch-ood": rivals.pytorch_ood(method)}
    ours = on_gpu(partial(fastood.score, method=method), f)
    compare(f"{method} alone", 1, ours, getattr(rivals, method), peers, logits=f)


@every_dtype
@pytest.mark.parametrize("shape", [(64, 1000, 2048), (1024, 1000, 2048)], ids=str)
def test_gradnorm(compare, shape, dtype):
    N, C, D = shape
    f, h = logits_of(N, C, dtype), feats_of(N, D, dtype)
    autograd = rivals.autograd_gradnorm if N <= 64 else f"{N:,} backward passes a call"
    ours = on_gpu(partial(fastood.score, method="gradnorm"), f, h)
    compare("gradnorm", 1, ours, rivals.gradnorm, {"autograd": autograd}, logits=f, feats=h)


@every_dtype
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
@pytest.mark.parametrize("shape", [(1, 1000, 2048), (256, 1000, 2048)], ids=str)
def test_batchgrad(compare, shape, relu, dtype):
    N, C, D = shape
    f, h = logits_of(N, C, dtype), feats_of(N, D, dtype)
    if not relu:
        h = h - h.mean()
    G = rivals.anchor_gradient(logits_of(C, C, "float32"), feats_of(C, D, "float32"), torch.arange(C, device="cuda"))
    ours = on_gpu(partial(fastood.BatchGrad(G).score, oriented=False), f, h)
    formula = partial(rivals.batchgrad, G=G)
    compare("BatchGrad", 1, ours, formula, {"eager, row by row": rivals.row_by_row(formula)}, logits=f, feats=h)

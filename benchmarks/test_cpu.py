"""fastood on the CPU against what users would run instead, and against merely reading the tensors.

The first shape of each test is the one that --quick runs.
"""

from functools import partial

import pytest
import rivals
import torch
from harness import backends

import fastood

THREADS = sorted({1, torch.get_num_threads()})
DTYPES = ["float32", "bfloat16"]
V_SHAPES = [(1, 1000), (1024, 1000), (65536, 10), (256, 128256)]
V_CASES = [(method, shape) for method in ("msp", "energy") for shape in V_SHAPES]
# pytorch-ood clips small probabilities: where there are 128,256 of them its entropy and GEN are other numbers.
V_CASES += [(method, shape) for method in ("neg_entropy", "gen") for shape in ((1, 1000), (1024, 1000))]

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_thread_count = pytest.mark.parametrize("threads", THREADS)


def logits_of(N, C, dtype):
    torch.manual_seed(0)
    return (torch.randn(N, C) * 2).to(getattr(torch, dtype))


def feats_of(N, D, dtype):
    torch.manual_seed(1)
    return torch.randn(N, D).relu().add(1e-3).to(getattr(torch, dtype))


@every_thread_count
@every_dtype
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1000, 2048),  # an online service scores one row, or a few
        (8, 1000, 2048),
        (64, 1000, 2048),
        (16384, 1000, 2048),
        (65536, 10, 512),  # rows so short that each one's fixed cost shows
        (256, 128256, 4096),  # a language model's head: rows larger than a core's cache
    ],
    ids=str,
)
def test_energy_times_norm(compare, shape, dtype, threads):
    N, C, D = shape
    compare(
        "energy x ||h||_0.3",
        threads,
        backends(fastood.score),
        rivals.energy_norm,
        logits=logits_of(N, C, dtype),
        feats=feats_of(N, D, dtype),
    )


@every_thread_count
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1000, 2048), (64, 1000, 2048), (1024, 1000, 2048), (16384, 1000, 2048)], ids=str)
def test_sweep(compare, shape, dtype, threads):
    N, C, D = shape
    compare(
        "sweep, 4 V x 12 norms",
        threads,
        backends(fastood.sweep),
        rivals.sweep,
        logits=logits_of(N, C, dtype),
        feats=feats_of(N, D, dtype),
    )


@every_thread_count
@every_dtype
@pytest.mark.parametrize(("method", "shape"), V_CASES, ids=str)
def test_v_alone(compare, method, shape, dtype, threads):
    compare(
        f"{method} alone",
        threads,
        backends(partial(fastood.score, method=method)),
        getattr(rivals, method),
        {"pytorch-ood": rivals.pytorch_ood(method)},
        logits=logits_of(*shape, dtype),
    )


@every_thread_count
@every_dtype
@pytest.mark.parametrize("shape", [(64, 1000, 2048), (16384, 1000, 2048), (65536, 10, 512)], ids=str)
def test_scale(compare, shape, dtype, threads):
    """It reads what energy x ||h||_0.3 reads, in whose groups above are the same shapes."""
    N, C, D = shape
    bias = torch.linspace(-1, 1, C)
    compare(
        "SCALE",
        threads,
        backends(fastood.Fitted("scale", head=(torch.zeros(C, D), bias)).score),
        partial(rivals.scale, bias=bias),
        logits=logits_of(N, C, dtype),
        feats=feats_of(N, D, dtype),
    )


def by_gradients(method, passes, **constant):
    """The rivals that form gradients, where they are not too many."""
    if passes > 1000:
        return dict.fromkeys(("torch.func vmap", "autograd"), f"{passes:,} gradients a call")
    ways = {"torch.func vmap": f"vmap_{method}", "autograd": f"autograd_{method}"}
    return {name: partial(getattr(rivals, way), **constant) for name, way in ways.items()}


@every_thread_count
@every_dtype
@pytest.mark.parametrize("shape", [(64, 10, 512), (64, 1000, 2048), (1024, 1000, 2048)], ids=str)
@pytest.mark.parametrize("method", ["gradnorm", "exgrad"])
def test_gradient_score(compare, method, shape, dtype, threads):
    N, C, D = shape
    passes = N * (C if method == "exgrad" else 1)
    compare(
        method,
        threads,
        backends(partial(fastood.score, method=method, oriented=False)),
        getattr(rivals, method),
        by_gradients(method, passes),
        logits=logits_of(N, C, dtype),
        feats=feats_of(N, D, dtype),
    )


@every_thread_count
@every_dtype
@pytest.mark.parametrize("shape", [(64, 10, 512), (256, 1000, 2048)], ids=str)
@pytest.mark.parametrize("labels", ["p", "q"])
def test_gradient_norm_in_general(compare, labels, shape, dtype, threads):
    """What no closed form of Table 1 gives: each class's norm has a root. As p, or as a q that is read beside it."""
    N, C, D = shape
    q = torch.softmax(logits_of(N, C, "float32").flip(0), -1) if labels == "q" else None
    compare(
        f"E_{labels} of L2",
        threads,
        backends(
            partial(
                fastood.gradient_norm, labels="predicted" if q is None else q, order=2, power=1, expectation="outside"
            )
        ),
        partial(rivals.expected_l2, q=q),
        logits=logits_of(N, C, dtype),
        feats=feats_of(N, D, dtype),
    )


@every_thread_count
@every_dtype
@pytest.mark.parametrize("shape", [(64, 10, 512), (16, 1000, 2048)], ids=str)
def test_batchgrad(compare, shape, dtype, threads):
    N, C, D = shape
    G = rivals.anchor_gradient(logits_of(C, C, "float32"), feats_of(C, D, "float32"), torch.arange(C))
    formula = partial(rivals.batchgrad, G=G)
    compare(
        "BatchGrad",
        threads,
        backends(partial(fastood.BatchGrad(G).score, oriented=False)),
        formula,
        {"eager, row by row": rivals.row_by_row(formula), **by_gradients("batchgrad", N * C, G=G)},
        logits=logits_of(N, C, dtype),
        feats=feats_of(N, D, dtype),
    )


GROWTH = {"N": (64, 256, 1024, 4096, 16384), "C": (10, 100, 1000, 10000, 100000), "D": (64, 256, 1024, 4096, 16384)}


@pytest.mark.parametrize("grows", GROWTH)
def test_growth(compare, grows):
    """With N the default score, with C its V alone, with D its norm alone: nothing constant hides the growth."""
    for size in GROWTH[grows][: 3 if compare.quick else None]:
        N, C, D = (size if name == grows else usual for name, usual in (("N", 1024), ("C", 1000), ("D", 2048)))
        f, h = logits_of(N, C, "float32"), feats_of(N, D, "float32")
        what, ours, formula, given = {
            "N": ("energy x ||h||_0.3", fastood.score, rivals.energy_norm, {"logits": f, "feats": h}),
            "C": ("energy alone", fastood.score, rivals.energy, {"logits": f}),
            "D": ("||h||_0.3 alone", partial(fastood.score, None, method="norm"), rivals.norm, {"feats": h}),
        }[grows]
        compare(what, 1, backends(ours), formula, **given, grows=grows)

"""What a score adds to a compiled model: through its operator, as plain operations, and called after it.

A group's line says it in microseconds, of the middle half of the rounds. On a CPU they are the thread's own, so that
others on the machine are no part of them but by the caches. Each candidate is a compiled model of its own, called
several times in a row, as a server calls one: a model that others are called between is slower, score or none. The
eager call that it is compared with comes after such a model too, and finds in the caches what the operator finds there.
"""

import time
from functools import partial
from types import FunctionType, MethodType

import numpy as np
import pytest
import torch
from harness import OURS, in_turn, stopwatches, weighed
from torch import nn

import fastood

ALONE, REFERENCE, AFTER = "without a score", f"{OURS}, reference", "the eager score after it"
BARE = "its operator alone"  # put into the graph by hand: what torch asks for whatever an operator does
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def cnn():
    layers = []
    for channels, wider in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(128, 10), (3, 32, 32)


def wide_head():
    return nn.Identity(), nn.Linear(2048, 1000), (2048,)


class Served(nn.Module):
    """Each with code of its own: of what shares one, a call looks through the graphs of all of them for its own."""

    def __init__(self, body, head, score=None):
        super().__init__()
        self.body, self.head, self.score = body, head, score
        code = Served._forward.__code__.replace()
        self.forward = MethodType(FunctionType(code, globals()), self)

    def _forward(self, x):
        feats = self.body(x)
        logits = self.head(feats)
        return (logits, feats) if self.score is None else (logits, self.score(logits, feats))


def operator_of(score, x):
    """What a graph of `score` calls in its place, as a function of the logits and the features."""
    graphs = []
    torch.compile(score, backend=lambda graph, _: graphs.append(graph) or graph.forward)(*x)
    (node,) = [node for node in graphs[0].graph.nodes if node.op == "call_function" and "fastood" in str(node.target)]
    target, *rest = node.target, *node.args[2:]
    return lambda logits, feats: target(logits, feats, *rest)


def own_seconds(call, repeats):
    call()  # after which the caches are as this one leaves them
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


def microseconds_more(times, than):
    """The mean of the middle half of the rounds, in each of which both were measured."""
    differences = np.sort(np.subtract(times, than))
    quarter = len(differences) // 4
    return float(np.mean(differences[quarter : len(differences) - quarter]) * 1e6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("N", [256, 16, 1], ids="N={}".format)
@pytest.mark.parametrize("made", [cnn, wide_head], ids=lambda f: f.__name__)
def test_what_a_score_adds(compare, made, N, device):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # what differences of times are taken of must be steady
    body, head, sizes = made()
    body, head = body.to(device).eval(), head.to(device).eval()
    x = torch.randn(N, *sizes, device=device)
    torch.compiler.reset()
    with torch.no_grad():
        logits, feats = Served(body, head)(x)
        scores = {
            ALONE: None,
            OURS: lambda logits, feats: fastood.score(logits, feats),
            BARE: operator_of(fastood.score, (logits, feats)),
            REFERENCE: lambda logits, feats: fastood.score(logits, feats, backend="reference"),
            AFTER: None,
        }
        models = {name: torch.compile(Served(body, head, score), fullgraph=True) for name, score in scores.items()}
        calls = {name: partial(model, x) for name, model in models.items()}
        calls[AFTER] = lambda: fastood.score(*models[AFTER](x))
        truth = fastood.score(logits.double(), feats.double())
        for name in (OURS, BARE, REFERENCE):
            off = 1e-3 if device == "cpu" else 5e-3  # by TF32 of convolutions there
            torch.testing.assert_close(calls[name]()[1].double(), truth, rtol=off, atol=off)
        if compare.disabled:
            return
        timers, rounds = stopwatches(calls, x.device, *((0, 3) if compare.quick else (30, 100)))
        if device == "cpu":
            timers = {name: partial(own_seconds, call, max(4, 32 // N)) for name, call in calls.items()}
        times = in_turn(timers, rounds)
    added = {name: microseconds_more(times[name], times[ALONE]) for name in (OURS, AFTER, BARE, REFERENCE)}
    ours, after, bare, plain = (f"{x:.0f}" for x in added.values())
    on = "1 thread" if device == "cpu" else "GPU"
    adds = f"adds {ours} us, the eager score {after}, the operator alone {bare}, plain operations {plain}"
    compare.record(f"{made.__name__} · N={N} · {on} · {adds}", times, weighed(times), added=added, N=N)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1024, 1000), (1, 1000), (16, 50000)], ids=str)
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("method", ["max_logit", "msp", "energy"])
def test_a_score_beside_what_makes_its_logits(compare, method, capped, shape, device):
    """The operator, and plain operations, which a compiler may fuse with what the logits are made by."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    logits = torch.randn(*shape, device=device)

    def call(x, backend):
        return fastood.score(30 * torch.tanh(x / 30) if capped else x, method=method, backend=backend)

    kernels = next(name for name, status in fastood.backends(device).items() if status.usable)
    torch.compiler.reset()
    calls = {
        label: partial(torch.compile(call, fullgraph=True), logits, backend)
        for label, backend in ((OURS, kernels), (REFERENCE, "reference"))
    }
    torch.testing.assert_close(calls[OURS](), calls[REFERENCE](), rtol=1e-4, atol=1e-4)
    if compare.disabled:
        return
    timers, rounds = stopwatches(calls, logits.device, *((0, 3) if compare.quick else (1, 10)))
    times = in_turn(timers, rounds)
    made = "capped" if capped else "given"
    group = f"{method} of logits {made} · N={shape[0]} C={shape[1]} · {'1 thread' if device == 'cpu' else 'GPU'}"
    compare.record(group, times, weighed(times), N=shape[0], C=shape[1])

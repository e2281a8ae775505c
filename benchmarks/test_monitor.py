"""What Monitor costs a service: a microsecond a row is the target, of batches from some hundred rows on."""

from functools import partial

import numpy as np
import pytest
import torch
from harness import OURS, in_turn, stopwatches, weighed

import fastood


@pytest.mark.parametrize("n", [1, 256, 10_000])
def test_monitor(compare, n):
    torch.manual_seed(0)
    detector = fastood.Detector("energy", norm=None).fit(5 * torch.randn(1000, 10))
    scores = detector.score(5 * torch.randn(n, 10))
    edges = np.sort(np.random.default_rng(0).standard_normal(64))
    calls = {
        OURS: partial(fastood.Monitor(detector).update, scores),
        "numpy's histogram alone": partial(np.histogram, scores.numpy(), edges),
    }
    if compare.disabled:
        return
    timers, rounds = stopwatches(calls, scores.device, *((0, 3) if compare.quick else (1, 20)))
    times = in_turn(timers, rounds)
    a_row = min(times[OURS]) / n * 1e6
    compare.record(f"Monitor.update of {n} scores · {a_row:.2f} us a row", times, weighed(times), N=n)

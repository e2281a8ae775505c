"""Compares the statistics that test_adding_a_statistic adds with float64: `new_statistics.py built`, or `not yet`."""

import sys

import numpy as np
import torch

import fastood
from fastood.kernels import cpu

names = ["purity", "odds", "log_odds"]
known = cpu._native is not None and set(names) <= set(cpu._native.statistics())
assert known == (sys.argv[1] == "built"), "what the C++ part knows"
rng = np.random.default_rng(0)
for dtype in (torch.float32, torch.float64):
    for C in (3, 100, 1001, 30_000):
        x = rng.standard_normal((6, C)) * [[1], [4], [1], [1], [1], [0]]
        x[2:5, 1] += [20, 95, 800]
        f, h = torch.from_numpy(x).to(dtype), torch.ones(6, 4, dtype=dtype)
        x = f.double().numpy()
        z = np.sort(x - x.max(1, keepdims=True), 1)[:, :-1]  # of the rest
        pivot = z.max(1)
        log_odds = pivot + np.log(np.exp(z - pivot[:, None]).sum(1))
        odds = np.exp(log_odds)
        truth = {"purity": (1 + np.exp(2 * z).sum(1)) / (1 + odds), "odds": odds, "log_odds": log_odds}
        eps = 2.0**-24 if dtype == torch.float32 else 2.0**-53
        relative = (32 + 4 * np.minimum(np.ptp(x, 1), 104)) * eps
        for backend in ("reference", "cpu", "triton"):
            if backend == "triton" and dtype == torch.float64:
                continue
            got = {name: y.double().numpy() for name, y in fastood.row_stats(f, names, backend=backend).items()}
            assert list(got) == names
            assert set(names) < set(fastood.row_stats(f, backend=backend))
            for name, y in got.items():
                allowed = relative * (1 if name == "log_odds" else abs(truth[name])) + 8 * eps * abs(truth[name])
                assert (abs(y - truth[name]) <= allowed + 2.0**-149).all(), (backend, C, name, y, truth[name])
            fastood.SCORES.pop("odds", None)
            fastood.register(fastood.Score("odds", "1 / msp - 1", "", "out", stats=("odds",)))
            y = fastood.score(f, h, "odds", norm=1, oriented=False, backend=backend).double().numpy()
            assert (abs(y - 4 * odds) <= (relative + 16 * eps) * 4 * odds + 2.0**-149).all(), (backend, C, y)

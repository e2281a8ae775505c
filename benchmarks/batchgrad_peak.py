"""BatchGrad's speed beside that of its arithmetic on registers alone: `python benchmarks/batchgrad_peak.py`.

One thread, N=256 C=1000 D=2048, float32; an element is one (n, c, d), four vector operations.
"""

import time

import torch

import fastood
from fastood.kernels import cpu


def seconds(call, rounds=9):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    N, C, D, steps = 256, 1000, 2048, 10_000_000
    logits, feats = torch.randn(N, C) * 2, torch.randn(N, D).relu()
    detector = fastood.BatchGrad(torch.randn(C, D) / 10)
    detector.score(logits, feats)
    speed = N * C * D / seconds(lambda: detector.score(logits, feats))
    lanes = cpu._native.batchgrad_peak(steps)
    peak = steps * lanes / seconds(lambda: cpu._native.batchgrad_peak(steps))
    print(f"BatchGrad {speed / 1e9:.1f}, registers alone {peak / 1e9:.1f} G elements/s: {speed / peak:.2f}")

    weight = torch.zeros(C, D, requires_grad=True)

    def one_pass():
        torch.autograd.grad(torch.log_softmax(weight @ feats[0] + logits[0], -1)[0], weight)[0].abs().sum()

    passes = seconds(one_pass) * N * C
    times = passes * speed / (N * C * D)
    print(f"autograd, {N * C:,} backward passes at the time of one: {passes:.0f} s, {times:,.0f} x")

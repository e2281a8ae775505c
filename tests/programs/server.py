"""A server's day: requests in threads, by `server.py threads`, or before and in forked workers, by `server.py forks`.

Prints how many calls were served right.
"""

import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import fastood

SECONDS = 30

# What a server loads before it forks.
g = torch.Generator().manual_seed(0)
C, D = 100, 64
model = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ReLU(), torch.nn.Linear(D, C)).eval()
attached = fastood.attach(model)
batches = []
with torch.inference_mode():
    for n in (1, 1, 3, 50, 700, 3000):
        x = torch.randn(n, D, generator=g)
        batches.append((x, *(y.clone() for y in attached(x)[:2])))
calibration = batches[-1][1:]
plain = fastood.Detector("energy", tpr=0.9).fit(*calibration)
per_class = fastood.Detector("gradnorm", tpr=0.5, per_class=True).fit(*calibration)


def calls():
    batchgrad = fastood.BatchGrad(torch.randn(C, D, generator=torch.Generator().manual_seed(1)))
    return {
        "energy": lambda x, f, h: fastood.score(f, h),
        "bfloat16": lambda x, f, h: fastood.score(f.bfloat16(), h.half(), "exgrad"),
        "log": lambda x, f, h: fastood.score(f, h, "msp", norm=2, log=True),
        "numpy": lambda x, f, h: fastood.score(f.numpy(), h.numpy(), "tv", norm=1),
        "scores": lambda x, f, h: torch.stack([*fastood.scores(f, h).values()]),
        "sweep": lambda x, f, h: fastood.sweep(f, h),
        "norms": lambda x, f, h: fastood.norms(h, [0.3, 2.5]),
        "statistics": lambda x, f, h: fastood.row_stats(f, ["kl_uniform", ("power_sum", 3)])["kl_uniform"],
        "gradient_norm": lambda x, f, h: fastood.gradient_norm(f, h, "predicted", 1.5, expectation="outside"),
        "given": lambda x, f, h: fastood.gradient_norm(f, h, f.softmax(-1) * 0 + 1 / C, 2),
        "batchgrad": lambda x, f, h: batchgrad.score(f, h),
        "accept": lambda x, f, h: plain.accept(f, h),
        "per class": lambda x, f, h: per_class.accept(f, h),
        "p-value": lambda x, f, h: plain.p_value(f, h),
        "reference": lambda x, f, h: fastood.score(f, h, "varsum", backend="reference"),
        "model": lambda x, f, h: torch.cat(attached(x)[:2], 1),
    }


def same(name, a, b):
    a, b = np.asarray(a), np.asarray(b)
    if name == "model":  # whose matrix products are torch's
        return np.allclose(a, b, 1e-4, 1e-4)
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)


torch.set_num_threads(1)
served = calls()
with torch.inference_mode():
    expected = {(name, i): call(*batch) for name, call in served.items() for i, batch in enumerate(batches)}
served = calls()  # with nothing prepared, which several threads then do at once


def request(seed, numbers_of_threads, names):
    choose = random.Random(seed)
    with choose.choice([torch.inference_mode, torch.no_grad])():
        for name, i in choose.choices([key for key in expected if key[0] in names], k=20):
            torch.set_num_threads(choose.choice(numbers_of_threads))
            got = served[name](*batches[i])
            assert same(name, got, expected[name, i]), (name, len(batches[i][0]))
    return 20


def serve(seconds, seed, numbers_of_threads, names=tuple(served)):
    end, done = time.monotonic() + seconds, 0
    with ThreadPoolExecutor(4) as pool:
        while time.monotonic() < end:
            seeds = range(seed, seed := seed + 16)
            done += sum(pool.map(lambda s: request(s, numbers_of_threads, names), seeds))
    return done


def worker(seed):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # which ends one that hangs
        code = 1
        try:
            code = 0 if serve(2, seed, [1]) else 2
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def forks(seconds):
    # A parent serves before its workers, and beside them: all but the model. Where threads of a parent ran matrix
    # products, those of a child may hang in torch's own library.
    names = [name for name in served if name != "model"]
    end, rounds, done = time.monotonic() + seconds, 0, 0
    while rounds < 2 or time.monotonic() < end:
        rounds += 1
        done += serve(1, rounds * 10**6, [1, 2, 3, 5], names)
        children = [worker(rounds * 10**7 + k * 10**6) for k in range(2)]
        done += serve(1, rounds * 10**8, [1, 2, 3, 5], names)
        for child in children:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code == 0, f"round {rounds}: a worker ended with {code}"
    return done


print(forks(SECONDS) if sys.argv[1] == "forks" else serve(SECONDS, 0, [1, 2, 3, 5]))

"""What a change costs: python benchmarks/before_after.py BEFORE AFTER

Two checkouts with the C++ part built in them (`python setup.py build_ext --inplace`). Each call is timed on one thread
in processes of its own, which take turns, and the least of all times counts, for what disturbs a machine only adds.
Prints a table in Markdown, microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    import fastood

    torch.manual_seed(0)
    torch.set_num_threads(1)
    for N in (1, 1024):
        f, h, size = torch.randn(N, 1000), torch.randn(N, 2048).relu(), f"{N} x (1000, 2048)"
        for method in ("msp", "energy", "tv", "gen", "kl_uniform", "neg_entropy"):
            yield f"{method}, {N} x 1000", partial(fastood.score, f, method=method)
        for method in ("energy", "exgrad", "gradnorm", "eg_u_l1", "eg_u_l2sq", "eg_p_logp_l2sq"):
            yield f"{method}, {size}", partial(fastood.score, f, h, method)
        yield f"energy of halves, {size}", partial(fastood.score, f.bfloat16(), h.bfloat16())
        yield f"all scores, {size}", partial(fastood.scores, f, h)
        yield f"sweep, {size}", partial(fastood.sweep, f, h)
        yield f"norms of 1 and 2, {N} x 2048", partial(fastood.norms, h, [1, 2])
    G = fastood.BatchGrad(torch.randn(1000, 2048))
    yield "BatchGrad, 1 x (1000, 2048)", partial(G.score, f[:1], h[:1])
    third = partial(fastood.gradient_norm, f[:256], h[:256], "predicted", 3, 1, "outside")
    yield "E_p of L3, 256 x (1000, 2048)", third
    few, many = torch.randn(16384, 10), torch.randn(16, 50257)
    for method in ("msp", "energy", "tv"):
        yield f"{method}, 16384 x 10", partial(fastood.score, few, method=method)
        yield f"{method}, 16 x 50257", partial(fastood.score, many, method=method)


def least(call: Callable[[], Any]) -> float:
    call()
    timer = timeit.Timer(call)
    number = max(1, int(0.002 / timer.timeit(1)))
    return min(timer.repeat(15, number)) / number * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", metavar="TREE")
    given = parser.parse_args()
    if not given.trees:
        json.dump({name: least(call) for name, call in calls()}, sys.stdout)
        return
    before, after = given.trees
    times: dict[str, list[dict[str, float]]] = {before: [], after: []}
    for _ in range(3):
        for tree in times:
            environment = os.environ | {"PYTHONPATH": tree, "PYTHONSAFEPATH": "1"}
            command = [sys.executable, "-W", "ignore", __file__]
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            times[tree].append(json.loads(run.stdout))
    print("| call | before | after | ratio |\n|---|---|---|---|")
    for name in times[after][0]:
        old, new = (min(turn[name] for turn in times[tree]) for tree in (before, after))
        print(f"| {name} | {old:.1f} | {new:.1f} | {new / old:.2f} |")


if __name__ == "__main__":
    main()

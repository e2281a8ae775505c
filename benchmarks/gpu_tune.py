"""Launch shapes beside those of shapes.py, timed on a GPU: python -m benchmarks.gpu_tune OUT

Each candidate replaces numbers of fastood/kernels/triton/shapes.py for one kernel of gpu_day.py: rows a program, warps,
most registers a thread; tiles in flight. They are compiled in parallel, and as each is, checked against float64 and
timed. OUT/tune.txt has a line each: its share of the read ceiling, or why there is none.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_day
from benchmarks.harness import OURS, gpu_seconds
from fastood import _plan, kernels
from fastood.kernels.triton import launch, shapes

NAMES = ("ROWS", "ROWS_WITH_FEATS", "ROWS_OF_FEATS", "STREAM", "TILES", "HELD_A_THREAD")
AS_THEY_ARE = {name: getattr(shapes, name) for name in NAMES}
# Of a kernel, C and D: what a table has for one of its keys, which is rows, warps and most registers, or warps and
# tiles in flight of long rows. First those that were chosen from machine code, for they were never timed.
TABLES: list[tuple[str, int, int, str, str, int, list[tuple[int, ...]]]] = [
    ("4 V", 100, 0, "bfloat16", "ROWS", 128, [(16, 1), (16, 2), (8, 1), (32, 2)]),
    ("4 V", 100, 0, "float32", "ROWS", 128, [(16, 1), (16, 2)]),
    ("4 V", 20, 0, "bfloat16", "ROWS", 128, [(16, 1), (16, 2), (32, 2)]),
    ("4 V", 200, 0, "bfloat16", "ROWS", 256, [(8, 1), (4, 1), (2, 1)]),
    ("norm 0.3", 0, 512, "bfloat16", "ROWS_OF_FEATS", 1024, [(8, 1), (4, 1), (2, 1)]),
    ("energy × norm 0.3", 100, 512, "bfloat16", "ROWS_WITH_FEATS", 128, [(8, 1), (16, 1), (4, 1)]),
    ("sweep, 4 V × 12 norms", 100, 512, "bfloat16", "ROWS_WITH_FEATS", 128, [(8, 1), (1, 1), (4, 2), (8, 4)]),
    ("4 V", 10, 0, "bfloat16", "ROWS", 16, [(256, 4), (128, 4), (128, 2), (512, 4)]),
    ("4 V", 50257, 0, "float32", "STREAM", 4, [(16, 8, 24), (16, 8, 12), (8, 8, 24)]),
    ("4 V", 128256, 0, "bfloat16", "STREAM", 2, [(8, 8, 32), (16, 8, 32), (16, 4, 32), (8, 4, 32)]),
    ("12 norms", 0, 2048, "bfloat16", "ROWS_OF_FEATS", 2048, [(4, 1), (8, 1), (2, 1), (8, 2), (4, 1, 128)]),
    ("sweep, 4 V × 12 norms", 1000, 2048, "bfloat16", "ROWS_WITH_FEATS", 1024, [(2, 1), (1, 1), (2, 1, 128)]),
    ("4 V", 1000, 0, "bfloat16", "ROWS", 1024, [(2, 1), (4, 1)]),
    ("7 statistics", 1000, 0, "bfloat16", "ROWS", 1024, [(2, 1), (1, 1), (4, 1), (2, 2), (4, 2), (8, 2)]),
    ("7 statistics", 1000, 0, "bfloat16", "ROWS", 1024, [(2, 1, 80), (2, 1, 96), (2, 1, 128)]),
    ("7 statistics", 1000, 0, "bfloat16", "ROWS", 1024, [(1, 1, 64), (1, 1, 80), (4, 1, 128), (4, 1, 168)]),
    ("7 statistics", 1001, 0, "bfloat16", "ROWS", 1024, [(2, 1), (1, 1), (4, 1)]),
]


def candidates() -> Iterator[tuple[gpu_day.Work, str, dict[str, Any]]]:
    works = {work.what: work for work in gpu_day.works()}

    def at(what: str, C: int, D: int) -> gpu_day.Work:
        return works[what]._replace(N=(1 << 28) // (C + D), C=C, D=D)

    for what, C, D, dtype, name, key, entries in TABLES:
        for entry in entries:
            yield at(what, C, D), dtype, {name: {**AS_THEY_ARE[name], key: entry}}
    for tiles in (2, 4):
        yield at("12 norms", 0, 2048), "bfloat16", {"TILES": tiles}
    for elements in (32, 64, 128):
        yield at("E_p of L3", 1000, 0), "bfloat16", {"HELD_A_THREAD": elements}


def put(changes: dict[str, Any]) -> None:
    """These numbers into shapes.py, and whatever was worked out with others out of all caches."""
    for name, value in (AS_THEY_ARE | changes).items():
        setattr(shapes, name, value)
    for known in (kernels._prepared, launch.scores, launch.gradient, launch.gen, shapes.plan_of):
        known.cache_clear()
    _plan._PLANS.clear()


def label(work: gpu_day.Work, dtype: str, changes: dict[str, Any]) -> str:
    ((name, value),) = changes.items()
    if isinstance(value, dict):
        new = {k: x for k, x in value.items() if x != AS_THEY_ARE[name][k]}
        value = new or "as it is"
    elif value == AS_THEY_ARE[name]:
        value = f"{value}, as it is"
    return f"{work.what}, C={work.C} D={work.D} {dtype}, {name} {value}"


def compile_some(part: slice) -> None:
    for work, dtype, changes in list(candidates())[part]:
        put(changes)
        with contextlib.suppress(Exception):  # time_all says which
            work.ours(*gpu_day.tensors(work._replace(N=3), dtype).values())
        print("compiled", flush=True)


def time_all(out: Path, compilers: list[subprocess.Popen[str]]) -> None:
    x = torch.ones(1 << 28, device="cuda")
    ceiling = x.nbytes / gpu_seconds(x.sum)
    del x
    with (out / "tune.txt").open("w") as file:
        for i, (work, dtype, changes) in enumerate(candidates()):
            of_this = compilers[i % len(compilers)].stdout
            assert of_this is not None
            of_this.readline()  # which comes when it is compiled, or that process has ended
            put(changes)
            given = gpu_day.tensors(work, dtype)
            call = functools.partial(work.ours, *given.values())
            try:
                gpu_day.checked(OURS, call, work, given)
                t = gpu_seconds(call)
                found = f"{sum(x.nbytes for x in given.values()) / t / ceiling:6.1%} {t * 1e6:7.0f} µs"
            except Exception as failed:  # one of the others may do
                found = f"{type(failed).__name__}: {' '.join(str(failed).split())[:100]}"
            print(f"{found}  {label(work, dtype, changes)}", file=file, flush=True)


def main() -> None:
    out = Path(sys.argv[1])
    if len(sys.argv) == 4:  # a process that this one started
        return compile_some(slice(int(sys.argv[2]), None, int(sys.argv[3])))
    out.mkdir(parents=True, exist_ok=True)
    n = max(1, (os.cpu_count() or 2) // 2)
    command = [sys.executable, "-m", "benchmarks.gpu_tune", str(out)]
    time_all(out, [subprocess.Popen([*command, str(i), str(n)], stdout=subprocess.PIPE, text=True) for i in range(n)])
    print((out / "tune.txt").read_text())
    return None


if __name__ == "__main__":
    main()

"""How candidates are checked, timed turn by turn and weighed: the measuring, without pytest."""

from __future__ import annotations

import ctypes
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastood

Row = dict[str, Any]  # one candidate in one group: a line of the table, an `extra_info` of the JSON

LIMIT = "read limit"
OURS = "fastood"
_SHORTEST = 2e-4  # seconds timed at a time: well above the clock's and the loop's own cost


def backends(call: Callable[..., Tensor], device: str = "cpu") -> dict[str, Callable[..., Tensor]]:
    """fastood as users call it, on the backend it picks; then, by name, every other one that is usable."""
    _, *others = (name for name, status in fastood.backends(device).items() if status.usable)
    return {OURS: call, **{f"{OURS}, {name}": partial(call, backend=name) for name in others}}


def check(calls: Mapping[str, Callable[[], Tensor]], truth: Tensor, rows: Tensor) -> None:
    """The gate before any timing: every candidate's `rows` agree with a float64 truth, or the group is not timed.

    The tolerance lets the different roundings of float32 pass, and nothing that computes something else; fastood's
    own bounds, far tighter, are the business of tests/.
    """
    for name, call in calls.items():
        torch.testing.assert_close(
            call()[rows].double(), truth, rtol=2e-4, atol=1e-6, msg=lambda m, name=name: f"{name} is wrong: {m}"
        )


def in_turn(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round.

    A round runs them all, so that what disturbs the machine disturbs all; each in a new order, so that nobody always
    finds the tensors in the cache where the one before left them.
    """
    order, shuffle = list(timers), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(timers[name]())
    return times


def stopwatches(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, budget: float, least: int
) -> tuple[dict[str, Callable[[], float]], int]:
    """A timer of each call, and how many rounds of all of them fit into `budget` seconds, at least `least`."""
    if device.type == "cuda":
        calls = {name: partial(_finished, call) for name, call in calls.items()}
    once = {name: clock(call, 1) for name, call in calls.items()}
    repeats = {name: max(1, math.ceil(_SHORTEST / max(t, 1e-7))) for name, t in once.items()}
    timers = {name: partial(clock, call, repeats[name]) for name, call in calls.items()}
    one_round = sum(repeats[name] * once[name] for name in calls)
    return timers, max(least, min(100, int(budget / one_round)))


def _finished(call: Callable[[], Any]) -> None:
    call()
    torch.cuda.synchronize()


def clock(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call on the host, the mean of `repeats` after each other."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of one call, and what every replay writes to."""
    with torch.cuda.stream(torch.cuda.Stream()):
        call()  # compiles, which capture cannot
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def gpu_seconds(call: Callable[[], Any], budget: float = 0.12) -> float:
    """Time on the GPU alone: replays of a CUDA graph between two events, the median of what fits into `budget`."""
    graph, _held = captured(call)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    replay()
    once = replay()
    return float(np.median([replay() for _ in range(max(5, min(60, int(budget / once))))]))


def weighed(times: Mapping[str, Sequence[float]], read: int | None = None) -> dict[str, Row]:
    """Figures of each candidate: medians, and the medians of what is compared round by round.

    `read` is how many bytes the inputs hold.
    """
    rows = {}
    for name, mine in times.items():
        low, ratio, high = np.percentile(np.divide(mine, times[OURS]), [20, 50, 80])
        seconds = float(np.median(mine))
        rows[name] = row = {"seconds": seconds, "ratio": ratio, "ratio_low": low, "ratio_high": high}
        if read is not None:
            row["gb_per_s"] = read / seconds / 1e9
            row["of_limit"] = float(np.median(np.divide(times[LIMIT], mine)))
    return rows


def read_limit(tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """What no candidate can beat: to read every input once and do next to nothing with it."""
    if tensors[0].is_cuda:
        # A copy reads and writes: half of each tensor moves as many bytes as reading all of it.
        halves = [x[: math.ceil(len(x) / 2)] for x in tensors]
        return lambda: [x.clone() for x in halves]
    return lambda: [x.sum() for x in tensors]


def settle_malloc() -> None:
    """Brings glibc's malloc to where a process that has run for a while has it: what it frees, it keeps.

    Its threshold for asking the kernel, and then paying for each new page, follows the largest block freed so far, up
    to 32 MiB. Left alone, an eager candidate takes five times as long in the first groups as in the later ones.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that one call held beyond what was there before, its result included; None if nobody can tell.

    On a CPU this is the process's resident memory, so it sees what torch's profiler does not: memory that C++ took
    for itself. Linux only.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # or memory that is free but kept by malloc hides what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    held = call()
    peak = _status("VmHWM")
    del held
    return max(0, peak - before)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def slopes(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Growing size -> candidate -> slope of log time against log size over the three largest: 1 is linear."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row.get("grows"):
            points.setdefault(row["grows"], {}).setdefault(row["candidate"], []).append(
                (row[row["grows"]], row["seconds"])
            )
    return {
        size: {name: float(np.polyfit(*np.log(sorted(line)[-3:]).T, 1)[0]) for name, line in lines.items()}
        for size, lines in points.items()
    }

"""Interleaved rounds of the candidates of one comparison, and a table of ratios at the end."""

import os
import platform
import statistics
import time

import numpy as np
import pytest
import torch

ROWS = []
LIMITS = ("sum of both", "device copy")  # candidates that compute no score


class Comparison:
    """Times candidates turn by turn, so that what disturbs the machine disturbs all of them."""

    def __init__(self, what: str, shape: str, threads: int, quick: bool) -> None:
        self.what, self.shape, self.threads = what, shape, threads
        self.seconds = 0.05 if quick else 0.6  # for each candidate
        self.least_rounds = 3 if quick else 9

    def run(self, candidates, checked=None, rtol=1e-3, read=0) -> None:
        """`candidates`: name -> function without arguments, the first one ours; all must agree with `checked`.

        `read`: bytes of the inputs, for GB/s beside the times.
        """
        torch.set_num_threads(self.threads)
        for name, call in candidates.items():
            out = call()
            if checked is not None and name not in LIMITS:
                torch.testing.assert_close(
                    out.double(), checked.double(), rtol=rtol, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
        slowest = 0.0
        for call in candidates.values():
            start = time.perf_counter()
            call()
            slowest = max(slowest, time.perf_counter() - start)
        rounds = max(self.least_rounds, min(200, int(self.seconds / max(slowest, 1e-6))))
        inner = {name: max(1, int(2e-4 / max(_once(call), 1e-7))) for name, call in candidates.items()}
        times = {name: [] for name in candidates}
        for _ in range(rounds):
            for name, call in candidates.items():
                start = time.perf_counter()
                for _ in range(inner[name]):
                    call()
                times[name].append((time.perf_counter() - start) / inner[name])
        ours = next(iter(candidates))
        for name in candidates:
            ratios = [t / o for t, o in zip(times[name], times[ours], strict=True)]
            low, middle, high = np.percentile(ratios, [20, 50, 80])
            ROWS.append(
                (
                    self.what,
                    self.shape,
                    self.threads,
                    name,
                    statistics.median(times[name]),
                    middle,
                    f"{low:.2f}-{high:.2f}",
                    f"{read / statistics.median(times[name]) / 1e9:8.1f} GB/s" if read else "",
                )
            )


def _once(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="A few short rounds, to see that it runs; not to measure.")


@pytest.fixture
def compare(request):
    before = torch.get_num_threads()

    def make(what, shape, threads):
        return Comparison(what, shape, threads, request.config.getoption("--quick"))

    yield make
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    write("x = time relative to fastood in the same round: median (20th-80th percentile); above 1, fastood is faster")
    before = None
    for what, shape, threads, name, seconds, ratio, spread, rate in ROWS:
        if (what, shape, threads) != before:
            write(f"\n{what}   {shape}   {threads} thread{'s' if threads > 1 else ''}")
            before = (what, shape, threads)
        write(f"  {name:34s} {seconds * 1e3:11.4f} ms   x {ratio:8.2f}  ({spread}) {rate}")

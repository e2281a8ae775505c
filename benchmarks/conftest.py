"""`pytest benchmarks`: comparisons in pytest-benchmark's groups, timed turn by turn, and one table at the end.

pytest-benchmark times one candidate after the other, each in its own minute of the machine; on a noisy one the ratio
of two such figures says little. So candidates are timed here, in interleaved rounds, and the times handed over to
pytest-benchmark: its groups, its JSON (`--benchmark-json=FILE`, which benchmarks/plots.py reads), its way of comparing
runs (`--benchmark-autosave`, `--benchmark-compare`) and its switches (`--benchmark-disable`: the gates alone).
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pytest
import torch
from harness import LIMIT, check, in_turn, peak_extra_bytes, read_limit, settle_malloc, slopes, stopwatches, weighed
from plots import machine_line
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rivals import in_float
from torch import Tensor

import fastood

ROWS = pytest.StashKey[list]()


class Compare:
    """Call it once or more per test; each call is one group."""

    def __init__(self, benchmark, config: pytest.Config) -> None:
        self.quick, self.disabled = config.getoption("quick"), benchmark.disabled
        benchmark._mode = "interleaved"  # or it warns that nobody used it
        self._benchmark, self._test, self._rows = benchmark, benchmark.fullname, config.stash[ROWS]

    def __call__(
        self,
        what: str,
        threads: int,
        ours: Mapping[str, Callable[..., Tensor]],
        formula: Callable[..., Tensor],
        others: Mapping[str, Callable[..., Tensor] | str] | None = None,
        *,
        logits: Tensor | None = None,
        feats: Tensor | None = None,
        grows: str | None = None,
    ) -> None:
        """fastood, the formula in eager PyTorch and compiled, other candidates, and the limit. All take the tensors
        that are given; a string in place of a function says why a candidate is absent. `grows` names the size that
        other groups of this comparison vary."""
        torch.set_num_threads(threads)
        tensors = [x for x in (logits, feats) if x is not None]
        n, device, dtype = len(tensors[0]), tensors[0].device, tensors[0].dtype
        cast = (lambda call: call) if dtype == torch.float32 else in_float
        torch.compiler.reset()  # or the second shape compiles to a slower kernel for any shape
        candidates = {**ours, "eager": cast(formula), "torch.compile": torch.compile(cast(formula))}
        candidates |= {name: x if isinstance(x, str) else cast(x) for name, x in (others or {}).items()}
        absent = {name: why for name, why in candidates.items() if isinstance(why, str)}
        calls = {name: partial(call, *tensors) for name, call in candidates.items() if name not in absent}
        try:
            calls["torch.compile"]()
        except Exception as failed:  # it needs a C++ compiler of its own, and more; not ours to ask for
            absent["torch.compile"] = type(failed).__name__
            del calls["torch.compile"]

        rows = torch.linspace(0, n - 1, min(n, 256), device=device).long()  # first and last among them
        check(calls, formula(*(x[rows].double() for x in tensors)), rows)
        if self.disabled:
            return
        calls[LIMIT] = read_limit(tensors)
        timers, rounds = stopwatches(calls, device, *((0, 3) if self.quick else (1.5, 5)))
        times = in_turn(timers, rounds)
        sizes = {"N": n} | {size: x.shape[1] for size, x in (("C", logits), ("D", feats)) if x is not None}
        shape = " ".join(f"{size}={value}" for size, value in sizes.items())
        kind = str(dtype).removeprefix("torch.")
        on = "GPU" if device.type == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
        self.record(
            f"{what} · {shape} · {kind} · {on}",
            times,
            weighed(times, sum(x.nbytes for x in tensors)),
            {name: peak_extra_bytes(call, device) for name, call in calls.items()},
            absent,
            what=what,
            dtype=kind,
            on=on,
            grows=grows,
            **sizes,
        )

    def record(self, group, times, figures, extra_bytes=None, absent=None, **info) -> None:
        """Hands measured times to pytest-benchmark, and figures to its JSON and to the table."""
        for name, seconds in times.items():
            row = (
                info | figures[name] | {"group": group, "candidate": name, "extra_bytes": (extra_bytes or {}).get(name)}
            )
            self._benchmark.group, self._benchmark.name, self._benchmark.extra_info = group, name, row
            self._benchmark.fullname = f"{self._test} {group} {name}"
            stats = self._benchmark._make_stats(iterations=1)
            for t in seconds:
                stats.update(t)
            self._rows.append(row)
        self._rows += [{"group": group, "candidate": name, "absent": why} for name, why in (absent or {}).items()]


@pytest.fixture
def compare(benchmark, request):
    before = torch.get_num_threads()
    yield Compare(benchmark, request.config)
    torch.set_num_threads(before)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="Small and short, to see that it runs; not to measure.")


def pytest_configure(config):
    config.stash[ROWS] = []
    settle_malloc()
    config.option.benchmark_quiet = True  # one table, ours


def pytest_collection_modifyitems(config, items):
    if not config.getoption("quick"):
        return
    first = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        kind = tuple(v for name, v in params.items() if name not in ("shape", "threads"))
        first.setdefault((item.path, item.originalname, kind), item)
    items[:] = first.values()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastood"] = {
        "version": fastood.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "backends": {name: status.why for name, status in fastood.backends().items() if status.usable},
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what asks the processor for its name
        machine = config._benchmarksession.get_machine_info()
    console = Console(width=150, color_system=None)
    with console.capture() as text:
        console.print(_table(rows))
    write = terminalreporter.write_line
    write("")
    write(machine_line(machine))
    write("x: time over fastood's in the same round, median (20th to 80th percentile); above 1 fastood is faster.")
    write(f"Of the limit: the time of the {LIMIT} (summing every input; on a GPU, copying half) over this one.")
    write(text.get())
    for size, lines in slopes(rows).items():
        write(f"growth with {size}, slope of log time: " + ", ".join(f"{name} {s:.2f}" for name, s in lines.items()))


def _table(rows):
    headings = ("ms", "x", "(spread)", "GB/s", "of the limit", "extra MiB")
    table = Table(Column(no_wrap=True), *headings, title="Every group, losses too")
    for column in table.columns[1:]:
        column.justify = "right"
    before = None
    for row in rows:
        if row["group"] != before:
            table.add_section()
            table.add_row(escape(row["group"]))
            before = row["group"]
        name = f"  {row['candidate']}"
        if "absent" in row:
            table.add_row(escape(f"{name}: absent, {row['absent']}"))
            continue
        table.add_row(
            name,
            f"{row['seconds'] * 1e3:.4f}",
            f"{row['ratio']:.2f}",
            f"({row['ratio_low']:.2f}-{row['ratio_high']:.2f})",
            f"{row['gb_per_s']:.2f}" if "gb_per_s" in row else "",
            f"{row['of_limit']:.0%}" if "of_limit" in row else "",
            f"{row['extra_bytes'] / 2**20:.2f}" if row["extra_bytes"] is not None else "",
        )
    return table

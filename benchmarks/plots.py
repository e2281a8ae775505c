"""What the README shows of a run: `pytest benchmarks --benchmark-json=run.json`, then
`python benchmarks/plots.py run.json docs` writes docs/speed.png, docs/growth.png and docs/speed.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import LIMIT, OURS, Row, slopes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's colours, told apart with any colour vision. A candidate looks the same in every figure.
STYLES = {
    OURS: ("#0072B2", "o"),
    "eager": ("#D55E00", "s"),
    "torch.compile": ("#009E73", "D"),
    "pytorch-ood": ("#CC79A7", "^"),
    "torch.func vmap": ("#56B4E9", "P"),
    "autograd": ("#E69F00", "v"),
    LIMIT: ("#555555", "|"),
}


def machine_line(machine: Mapping[str, Any]) -> str:
    """pytest-benchmark's machine_info, as one line."""
    used, cpu = machine["fastood"], machine["cpu"]
    processor = f"{cpu.get('brand_raw') or machine['machine']} ({cpu['count']} cores, {used['instructions']})"
    versions = f"fastood {used['version']}, torch {used['torch']}, Python {machine['python_version']}"
    return ", ".join(filter(None, (used["gpu"], processor, versions)))


def load(path: Path) -> tuple[str, list[Row]]:
    """What the run ran on, and a row per candidate and group."""
    run = json.loads(path.read_text())
    return machine_line(run["machine_info"]), [benchmark["extra_info"] for benchmark in run["benchmarks"]]


def _of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Without dtype and number of threads, which the figures give by themselves."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(" · ".join(row["group"].split(" · ")[:2]), []).append(row)
    return groups


def speed(rows: Sequence[Row], where: str, on: str) -> Figure:
    """Every group `on` one thread or the GPU, losses too: time over fastood's, with its spread over the rounds."""
    shown = [row for row in _of(rows, on=on, grows=None) if row["candidate"] in STYLES]
    dtypes = list(dict.fromkeys(row["dtype"] for row in shown))
    names = list(_groups(shown))[::-1]
    figure = Figure(figsize=(5 + 3.5 * len(dtypes), 1.6 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(dtypes), sharex=True, sharey=True, squeeze=False)[0]
    for ax, dtype in zip(axes, dtypes, strict=True):
        for group, candidates in _groups(_of(shown, dtype=dtype)).items():
            for row in candidates:
                colour, marker = STYLES[row["candidate"]]
                low, high = row["ratio"] - row["ratio_low"], row["ratio_high"] - row["ratio"]
                ax.errorbar(
                    row["ratio"], names.index(group), xerr=[[low], [high]], color=colour, marker=marker, ms=5, lw=1
                )
        ax.axvline(1, color=STYLES[OURS][0], lw=1, zorder=0)
        ax.set_xscale("log")
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_ylim(-0.7, len(names) - 0.3)
        ax.set_title(dtype, fontsize=10)
        ax.set_xlabel("time / fastood's: right of 1, fastood is faster")
        ax.grid(axis="x", color="0.9", zorder=-1)
    seen = [name for name in STYLES if _of(shown, candidate=name)]
    handles = [Line2D([], [], color=STYLES[name][0], marker=STYLES[name][1], ls="", label=name) for name in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(f"{on}, {where}", fontsize=9)
    return figure


def growth(rows: Sequence[Row], where: str) -> Figure:
    """Time against N, C and D, log-log; the slope of the three largest sizes beside each name, 1 is linear."""
    slope = slopes(rows)
    figure = Figure(figsize=(1 + 3.6 * len(slope), 4), layout="constrained")
    for ax, (size, lines) in zip(figure.subplots(1, len(slope), squeeze=False)[0], slope.items(), strict=True):
        grown = _of(rows, grows=size)
        for name in (name for name in STYLES if name in lines):
            colour, marker = STYLES[name]
            line = sorted((row[size], row["seconds"] * 1e3) for row in _of(grown, candidate=name))
            ax.plot(*zip(*line, strict=True), color=colour, marker=marker, ms=4, label=f"{name}, {lines[name]:.2f}")
        fixed = " ".join(f"{other}={grown[0][other]}" for other in "NCD" if other != size and other in grown[0])
        ax.set(xscale="log", yscale="log", xlabel=size)
        ax.set_title(f"{grown[0]['what']}, {fixed}", fontsize=9)
        ax.legend(fontsize=7)
        ax.grid(color="0.9")
    figure.axes[0].set_ylabel("ms")
    figure.suptitle(f"1 thread, float32, {where}", fontsize=9)
    return figure


def report(rows: Sequence[Row], where: str) -> str:
    """Everything but the growth, as Markdown."""
    compared = [row for row in rows if not row.get("grows")]
    kinds = dict.fromkeys((row.get("dtype"), row.get("on")) for row in compared)
    lines = [
        "# Measured",
        f"By `pytest benchmarks` on {where}.",
        "A ratio is the time over fastood's in the same round, median over the rounds: above 1 fastood is faster; in "
        f"bold, where it loses. The {LIMIT} is to sum every input (on a GPU, to copy half). MiB is what one call held "
        "at its peak beyond its inputs.",
    ]
    for dtype, on in kinds:
        if on is None:  # whole processes
            lines += ["## What a process pays first", _table(_of(compared, on=None))]
        else:
            lines += [f"## {dtype}, {on}"]
            lines += [_table(_of(compared, dtype=dtype, on=on))]
    return "\n\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(row["candidate"] for row in rows)
    rivals = [name for name in names if name not in (OURS, LIMIT)] + [LIMIT] * (LIMIT in names)
    weighed = any(row["extra_bytes"] is not None for row in rows)
    headings = ["", OURS, *rivals] + ["MiB, fastood", "MiB, eager"] * weighed
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for group, candidates in _groups(rows).items():
        of = {row["candidate"]: row for row in candidates}
        cells = [group.replace("||h||", "‖h‖"), _ms(of[OURS]["seconds"])]
        cells += [_ratio(of[name]) if name in of else "" for name in rivals]
        if weighed:
            cells += [f"{of[name]['extra_bytes'] / 2**20:.2f}" for name in (OURS, "eager")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:#.3g} ms"


def _ratio(row: Row) -> str:
    ratio = row["ratio"]
    text = "< 0.01 ×" if ratio < 0.01 else f"{ratio:#.2g} ×" if ratio < 9.95 else f"{ratio:,.0f} ×"
    return f"**{text}**" if ratio < 1 and row["candidate"] != LIMIT else text


def main(run: str, folder: str) -> None:
    where, rows = load(Path(run))
    figures = {"speed": speed(rows, where, "1 thread"), "growth": growth(rows, where)}
    if _of(rows, on="GPU"):
        figures["speed_gpu"] = speed(rows, where, "GPU")
    for name, figure in figures.items():
        figure.savefig(Path(folder) / f"{name}.png", dpi=140)
    (Path(folder) / "speed.md").write_text(report(rows, where))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What gpu_day.py measured, as JSON and as the README's tables."""

from __future__ import annotations

import datetime
import importlib
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastood

VERSIONS = ("driver", "CUDA", "torch", "Triton", "fastood", "commit")


def machine(commit: str | None, rehearsal: bool) -> dict[str, Any]:
    """What it ran on."""
    commit = commit or os.environ.get("FASTOOD_COMMIT") or _says("git", "describe", "--always", "--dirty", "--abbrev=7")
    known = {"card": "no GPU", "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    known |= {"torch": torch.__version__, "Triton": version("triton"), "fastood": fastood.__version__}
    known |= {"commit": commit or "unknown"}
    if rehearsal:
        return known
    smi = _says("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader,nounits", "-i", "0")
    driver, _, mhz = smi.partition(", ")
    known |= {"driver": driver, "CUDA": torch.version.cuda, "clock": float(mhz or "nan") * 1e6}
    known |= {"multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count}
    return known | {"card": torch.cuda.get_device_name(0)}


def _says(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def version(package: str) -> str:
    """Of the one that is imported, which may be another than the one installed."""
    try:
        return importlib.import_module(package).__version__
    except ImportError:
        return "none"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(out: Path, known: dict[str, Any], phases: dict[str, float], rehearsal: bool) -> dict[str, Any]:
    """Everything so far."""
    figures: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*.jsonl")):
        figures.setdefault(path.stem.split("-")[0], []).extend(read_lines(path))
    whole = {"rehearsal": rehearsal, "machine": known, "phases": phases, "figures": figures}
    (out / "gpu_day.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False))
    (out / "gpu_day.md").write_text(markdown(whole))
    return whole


def wrong(whole: dict[str, Any]) -> list[str]:
    """What failed, a line each."""
    rows = [(phase, row) for phase, rows in whole["figures"].items() for row in rows]
    failed = [f"{phase}: {row['key']}: {row['error']}" for phase, row in rows if "error" in row]
    return failed + [test for row in whole["figures"].get("tests", []) for test in row["failed"]]


def markdown(whole: dict[str, Any]) -> str:
    known, figures, rehearsal = whole["machine"], whole["figures"], whole["rehearsal"]
    rows = {(row["what"], row["dtype"]): row for row in figures.get("kernels", []) if "what" in row}
    rivals = {(row["what"], row["dtype"], row["candidate"]): row for row in figures.get("rivals", []) if "what" in row}
    ceilings = next((row for row in figures.get("kernels", []) if "read" in row), {})

    def kernel(what: str, dtype: str) -> str:
        row = rows.get((what, dtype), {})
        if rehearsal or "seconds" not in row:
            return "rehearsed" if rehearsal else "failed" if row else ""
        t = row["seconds"]
        text = f"{row['bytes'] / t / ceilings.get('read', math.nan):.0%}"
        if row["operations"]:
            rate = row["operations"] / t
            peak = 128 * known["multiprocessors"] * known["clock"]  # FP32 instructions of all lanes
            text = f"{rate / 1e12:.1f} T op/s" + (f", {rate / peak:.0%}" if "BatchGrad" in what else "")
        others = [rivals.get((what, dtype, name), {}).get("seconds") for name in ("eager", "torch.compile")]
        ratios = ["–" if x is None else f"{x / t:.0f}" if x / t > 9.95 else f"{x / t:#.2g}" for x in others]
        return f"{text} ({' / '.join(ratios)})" if any(others) else text

    def call(seconds: float | None) -> str:
        return "rehearsed" if rehearsal else "failed" if seconds is None else f"{seconds * 1e6:.1f}"

    versions = [f"{name} {known[name]}" for name in VERSIONS if name in known]
    used = {row["triton"] for row in rivals.values()} - {known["Triton"]}
    versions += [f"rivals with Triton {' '.join(sorted(used))}"] * bool(used)
    lines = ["# A rehearsal without a GPU: nothing here is measured", ""] if rehearsal else []
    lines += [f"By `python -m benchmarks.gpu_day` on {known['card']}, {known['date']}: {', '.join(versions)}."]
    if "read" in ceilings and not rehearsal:
        read, copied = (f"{ceilings[name] / 1e9:,.0f} GB/s" for name in ("read", "copied"))
        lines += [f"Read ceiling: {read}, torch.sum of 1 GiB; a copy: {copied}."]
    lines += [
        "A percentage is the share of the read ceiling, of BatchGrad of the FP32 peak; in brackets the time of eager",
        "PyTorch / torch.compile of the same formula over fastood's.",
        "",
        f"| GPU time, {known['card']} | bfloat16 | float32 |",
        "|---|---|---|",
    ]
    for what in dict.fromkeys(what for what, _ in rows):
        lines.append(f"| {what} | {kernel(what, 'bfloat16')} | {kernel(what, 'float32')} |")
    lines += [
        "",
        f"| A call of one row, C=1000 D=2048 float32, {known['card']} | µs on the host | µs of a graph's replay |",
        "|---|---|---|",
    ]
    for row in figures.get("calls", []):
        lines.append(f"| {row['key']} | {call(row.get('seconds'))} | {call(row.get('graph_seconds'))} |")
    lines += ["", *(f"{row['key']}: {row['summary']}" for row in figures.get("tests", []))]
    return "\n".join([*lines, *(f"- {line}" for line in wrong(whole))]) + "\n"

"""The command for a day with a GPU, rehearsed without one; and what it makes of a GPU's figures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_report
import pytest

ROOT = Path(__file__).parent.parent
PHASES = {"compile", "compile_rivals", "kernels", "calls", "rivals", "tests"}


def test_rehearsal(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.gpu_day", str(tmp_path), "--rehearse", "--all", "--commit", "abc1234"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "FASTOOD"))}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]

    whole = json.loads((tmp_path / "gpu_day.json").read_text())
    figures = whole["figures"]
    assert figures.keys() == PHASES
    assert whole["rehearsal"]
    assert whole["machine"]["card"] == "no GPU"
    assert whole["machine"]["commit"] == "abc1234"
    whats = {row["what"] for row in figures["kernels"] if "what" in row}
    assert len(whats) == len(figures["kernels"]) - 1 >= 25  # and the ceilings
    assert {(row["what"], row["candidate"]) for row in figures["rivals"]} == {
        (what, candidate) for what in whats for candidate in ("eager", "torch.compile")
    }
    (tests,) = figures["tests"]
    passed, skipped = (int(re.search(rf"(\d+) {what}", tests["summary"])[1]) for what in ("passed", "skipped"))
    assert passed > 3
    assert skipped > 40  # those of graphs, which need a GPU
    # Nothing in it can be taken for a GPU's.
    assert not any(name in row for rows in figures.values() for row in rows for name in ("seconds", "read"))
    assert (tmp_path / "linear.txt").read_text().strip().endswith("all is right")
    table = (tmp_path / "gpu_day.md").read_text()
    assert table.startswith("# A rehearsal without a GPU: nothing here is measured")
    assert f"| {max(whats)} | rehearsed | rehearsed |" in table
    assert not re.search(r"\d%|\d T op/s|GB/s|\| [\d.]+ \|", table)


def test_each_launch_shape_to_try_is_another(monkeypatch):
    """Or gpu_tune.py would time the same kernel twice."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import gpu_day, gpu_tune
    from fastood import kernels
    from fastood.kernels import triton
    from fastood.kernels.triton import launch

    programs = []
    monkeypatch.setattr(gpu_day, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "DEFAULT", "triton")
    monkeypatch.setattr(triton, "unusable", lambda device, dtype: None)
    monkeypatch.setattr(launch, "_launched_by_triton", lambda program, tensors, out: programs.append(program))

    def launched(work, dtype, changes):
        gpu_tune.put(changes)
        programs.clear()
        work.ours(*gpu_day.tensors(work._replace(N=1), dtype).values())
        return [(x.constants, x.shape) for program in programs for x in program.launches]

    try:
        found = [(x, launched(*x)) for x in gpu_tune.candidates()]
    finally:
        gpu_tune.put({})
    others = {}
    for (work, dtype, changes), of in found:
        here = others.setdefault((work.what, work.C, work.D, dtype, *changes), [])
        assert of
        assert of not in here, gpu_tune.label(work, dtype, changes)
        here.append(of)


def test_table_of_a_gpu():
    def kernel(what, seconds, operations=0):
        return {
            "key": what,
            "what": what,
            "dtype": "float32",
            "seconds": seconds,
            "bytes": 8e9,
            "operations": operations,
        }

    def rival(what, candidate, seconds):
        more = {"what": what, "dtype": "float32", "candidate": candidate, "triton": "3.6.0"}
        return {"key": f"{what} {candidate}", **more, **({"seconds": seconds} if seconds else {"error": "no memory"})}

    known = {"card": "A Card", "date": "2026-01-01", "driver": "1", "CUDA": "13", "torch": "2.13", "Triton": "3.7.1"}
    figures = {
        "kernels": [
            {"key": "ceilings", "read": 4e12, "copied": 3.9e12},
            kernel("energy", 2.5e-3),
            kernel("BatchGrad", 1e-3, 16.5e9),
            kernel("TV of a layer", 1e-3, 500e9),
            {"key": "MSP", "what": "MSP", "dtype": "float32", "error": "MSP is wrong"},
        ],
        "rivals": [
            rival("energy", "eager", 25e-3),
            rival("energy", "torch.compile", 4e-3),
            rival("BatchGrad", "eager", None),
            rival("BatchGrad", "torch.compile", 0.9e-3),
        ],
        "calls": [{"key": "MSP", "seconds": 11.9e-6, "graph_seconds": 2e-6}],
        "tests": [{"key": "tests-0.log", "summary": "1 failed, 9 passed in 3s", "failed": ["FAILED tests/a.py::b"]}],
    }
    machine = known | {"fastood": "0.1", "commit": "abc1234", "multiprocessors": 129, "clock": 2e9}
    table = gpu_report.markdown({"rehearsal": False, "machine": machine, "phases": {}, "figures": figures})
    for line in (
        "By `python -m benchmarks.gpu_day` on A Card, 2026-01-01: driver 1, CUDA 13, torch 2.13, Triton 3.7.1, "
        "fastood 0.1, commit abc1234, rivals with Triton 3.6.0.",
        "Read ceiling: 4,000 GB/s, torch.sum of 1 GiB; a copy: 3,900 GB/s.",
        "| energy |  | 80% (10 / 1.6) |",
        "| BatchGrad |  | 16.5 T op/s, 50% (– / 0.90) |",
        "| TV of a layer |  | 500.0 T op/s |",
        "| MSP |  | failed |",
        "| MSP | 11.9 | 2.0 |",
        "- kernels: MSP: MSP is wrong",
        "- rivals: BatchGrad eager: no memory",
        "- FAILED tests/a.py::b",
    ):
        assert line in table.splitlines(), table

"""The measuring itself."""

import json

import plots
import pytest
import torch
from harness import LIMIT, OURS, check, in_turn, peak_extra_bytes, slopes, weighed


def test_a_wrong_candidate_is_refused_by_name():
    x, rows = torch.rand(4, 3), torch.tensor([0, 3])
    truth = x[rows].double().sum(-1)
    right = {"eager": lambda: x.sum(-1)}
    check(right, truth, rows)
    with pytest.raises(AssertionError, match="off by a little is wrong"):
        check(right | {"off by a little": lambda: x.sum(-1) * 1.001}, truth, rows)
    with pytest.raises(AssertionError, match="late NaN is wrong"):
        check({"late NaN": lambda: torch.where(torch.arange(4) == 3, torch.nan, x.sum(-1))}, truth, rows)


def test_every_round_runs_every_candidate():
    ran = []
    times = in_turn({name: lambda name=name: ran.append(name) or float(len(ran)) for name in "abc"}, rounds=20)
    assert all(len(t) == 20 for t in times.values())
    turns = [tuple(ran[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 1


def test_ratios_are_of_the_same_round():
    """The machine slows down fivefold half way: the ratio does not see it."""
    figures = weighed({OURS: [1.0, 1, 5, 5], "eager": [2.0, 2, 10, 10], LIMIT: [0.5, 0.5, 2.5, 2.5]}, read=6 * 10**9)
    assert figures["eager"]["ratio"] == figures["eager"]["ratio_low"] == figures["eager"]["ratio_high"] == 2
    assert figures["eager"]["of_limit"] == 0.25
    assert figures["eager"]["gb_per_s"] == 1


def test_memory_is_what_a_call_held():
    held = peak_extra_bytes(lambda: torch.ones(8 << 20, dtype=torch.uint8), torch.device("cpu"))
    if held is None:
        pytest.skip("needs Linux's /proc")
    assert abs(held - (8 << 20)) < 1 << 20


def _run():
    common = {"what": "energy", "dtype": "float32", "on": "1 thread", "N": 8}
    grown = [
        common
        | {"group": f"energy · N=8 C={C} · float32 · 1 thread", "C": C, "grows": "C", "candidate": OURS}
        | {"seconds": C**2 * 1e-6, "ratio": 1, "ratio_low": 1, "ratio_high": 1}
        for C in (10, 100, 1000)
    ]
    compared = [
        common
        | {
            "group": "||h||_2 · N=8 C=10 · float32 · 1 thread",
            "C": 10,
            "grows": None,
            "candidate": candidate,
            "extra_bytes": 2**19,
        }
        | {"seconds": 2e-3 * ratio, "ratio": ratio, "ratio_low": ratio * 0.9, "ratio_high": ratio * 1.1}
        for candidate, ratio in ((OURS, 1.0), ("eager", 0.5), ("torch.compile", 12.3), (LIMIT, 0.25))
    ]
    return grown + compared


def test_slope():
    assert slopes(_run()) == {"C": {OURS: pytest.approx(2)}}


def test_figures_come_from_a_run_by_one_command(tmp_path):
    used = {"gpu": None, "instructions": "AVX2", "torch": "2", "version": "0"}
    machine = {"machine": "x86_64", "python_version": "3", "cpu": {"brand_raw": "A Processor", "count": 2}}
    run = {"machine_info": machine | {"fastood": used}, "benchmarks": [{"extra_info": row} for row in _run()]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    plots.main(str(tmp_path / "run.json"), str(tmp_path))
    assert (tmp_path / "speed.png").stat().st_size > 5000
    assert (tmp_path / "growth.png").stat().st_size > 5000
    report = (tmp_path / "speed.md").read_text()
    assert "A Processor (2 cores, AVX2)" in report
    assert "| ‖h‖_2 · N=8 C=10 | 2.00 ms | **0.50 ×** | 12 × | 0.25 × | 0.50 | 0.50 |" in report

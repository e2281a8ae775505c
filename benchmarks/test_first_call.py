"""What a process pays before its first score, each candidate in processes of its own, in interleaved rounds."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from harness import OURS, in_turn, weighed

CHILD = Path(__file__).with_name("first_call.py")


def _child(*args: str, **environment: str) -> float:
    # With compiled modules, as pip leaves all packages, even where Python is told not to keep its own.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""} | environment
    done = subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.fixture
def rounds(compare):
    if compare.disabled:
        pytest.skip("needs timing, which --benchmark-disable turned off")
    return 1 if compare.quick else 3


def test_first_score(compare, rounds, tmp_path):
    def compiled_anew() -> float:
        cache = tmp_path / str(len(list(tmp_path.iterdir())))
        return _child(str(CHILD), "torch.compile", TORCHINDUCTOR_CACHE_DIR=str(cache))

    _child(str(CHILD), "fastood")
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kept")}
    _child(str(CHILD), "torch.compile", **kept)
    timers = {
        OURS: partial(_child, str(CHILD), "fastood"),
        "eager": partial(_child, str(CHILD), "eager"),
        "torch.compile": compiled_anew,
        "torch.compile, cached on disk": partial(_child, str(CHILD), "torch.compile", **kept),
    }
    if compare.quick:
        del timers["torch.compile"]  # which has compiled it once already
    times = in_turn(timers, rounds)
    compare.record("first score of a process · N=64 C=1000 D=2048 · float32", times, weighed(times))


def test_import(compare, rounds):
    clock = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"
    timers = {OURS: partial(_child, str(CHILD), "import"), "torch": partial(_child, "-c", clock)}
    timers[OURS]()
    times = in_turn(timers, rounds)
    compare.record("import, fastood's after torch's", times, weighed(times))

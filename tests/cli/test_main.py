"""fastood as a process: what it loads, a terminal, signals."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import C, D

from fastood.__main__ import main

PROGRAM = Path(__file__).parents[1] / "programs" / "command_line.py"


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    if os.name != "posix":
        pytest.skip("needs POSIX processes")
    folder = tmp_path_factory.mktemp("folder")
    done = subprocess.run([sys.executable, str(PROGRAM)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_loads_neither_plots_nor_metrics(answer):
    assert "fastood demo" in answer["help"]
    assert not {"sklearn", "matplotlib", "pyarrow", "jinja2"} & set(answer["loads"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_killed_run_leaves_nothing(answer, name):
    assert answer[name] == {"began": True, "exit": 128 + getattr(signal, name), "left": []}


def test_without_its_packages_it_says_what_to_install(monkeypatch):
    for name in ("typer", "fastood.cli"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 'The command line needs more packages: pip install "fastood[cli]"'


@pytest.fixture
def handlers():
    """Afterwards the signals' own, which `main` puts others in place of."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_it_runs_where_standard_error_is_closed(data, handlers, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastood", "score", "val.npz", "out.npy"])
    monkeypatch.setattr(sys, "stderr", None)  # so Python has it
    with pytest.raises(SystemExit) as end:
        main()
    sys.stderr.close()
    assert end.value.code == 0
    assert os.path.exists("out.npy")


def test_a_bar_on_a_terminal_ends_before_the_complaint(data, handlers, monkeypatch):
    pty = pytest.importorskip("pty", reason="needs a POSIX terminal")
    terminal, stderr = pty.openpty()
    np.savez("long.npz", logits=np.zeros((9, C)), feats=np.full((9, D), np.nan))
    monkeypatch.setattr(sys, "argv", ["fastood", "score", "long.npz", "out.npy", "--method", "all"])
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(stderr, "w") as written:
        with contextlib.redirect_stderr(written), pytest.raises(SystemExit) as end:
            main()
        text = b""
        while select.select([terminal], [], [], 0.5)[0]:
            text += os.read(terminal, 100_000)
    os.close(terminal)
    text = text.decode()
    assert end.value.code == 2
    assert "0/9" in text
    shown_again = text.index("\x1b[?25h")  # the cursor, which the bar hides
    assert "error: a .npy file holds one score" in text[shown_again:]

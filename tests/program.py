"""Programs that tests run in a process of their own: those of tests/programs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(name, *arguments, **environment):
    """What it prints; it has to end well. By hand, from the root: PYTHONPATH=. python tests/programs/NAME.py ..."""
    command = [sys.executable, ROOT / "tests" / "programs" / f"{name}.py", *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-20_000:]
    return ended.stdout

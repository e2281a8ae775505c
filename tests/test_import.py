"""What `import fastood` loads, and what loads when it is used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastood


@pytest.fixture(scope="module")
def answer():
    command = [sys.executable, str(Path(__file__).parent / "programs" / "imports.py")]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_import_is_light(answer):
    """Plots, the command line, scikit-learn and Triton load when used."""
    heavy = {"sklearn", "scipy", "matplotlib", "typer", "rich", "jinja2", "safetensors", "pyarrow", "triton"}
    assert not heavy & {*answer["loads"]}


def test_parts_that_load_when_used_are_listed(answer):
    assert {*fastood.__all__, "evaluation", "metrics"} <= {*answer["lists"]}


@pytest.mark.parametrize("part", ["evaluation", "metrics", "monitor", "peers", "sklearn"])
def test_parts_load_when_used(answer, part):
    assert f"fastood.{part}" not in answer["loads"]
    assert answer["used"][part]

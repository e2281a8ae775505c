"""What `pip install .` installs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import fastood

ROOT = Path(__file__).parents[1]


def test_a_wheel_holds_every_module_and_no_sources_of_cpp(tmp_path):
    """Built without a compiler, which setup.py allows for."""
    kept = shutil.ignore_patterns(".*", "build", "*.so", "__pycache__", "*.egg-info", "tests", "benchmarks", "docs")
    shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=kept)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "tree"]
    subprocess.run(command, env=os.environ | {"CC": "no compiler", "CXX": "no compiler"}, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    package = Path(fastood.__file__).parent
    data = {"py.typed", "report.html", "reproduce/paper.csv"}
    modules = {str(path.relative_to(package)) for path in package.glob("**/*.py")}
    modules |= {f"kernels/{path.relative_to(package / 'kernels')}" for path in (package / "kernels").glob("**/*.py")}
    installed = tmp_path / "installed" / "fastood"
    assert {str(path.relative_to(installed)) for path in installed.glob("**/*.*")} == modules | data
    code = "import fastood, fastood.cli, fastood.reproduce, torch\n"
    code += "print(fastood.__file__, fastood.score(torch.ones(1, 2)))"
    environment = os.environ | {"PYTHONPATH": str(installed.parent), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"{installed / '__init__.py'} tensor([1.6931])")

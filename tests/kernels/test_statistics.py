"""The table of statistics: what is made of it, and CONTRIBUTING's walk-through of adding one."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastood
from fastood.kernels import cpu
from fastood.kernels.generate import WRITTEN
from fastood.kernels.statistics import FORMULAS, QUANTITIES, TABLE, Statistic, Sums, rendered

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_what_is_written_from_the_table_is_fresh(path):
    assert path.read_text() == WRITTEN[path](), "run `python -m fastood.kernels.generate`"


@pytest.mark.skipif(bool(cpu.MISSING), reason="needs the C++ part")
def test_the_cpp_part_has_the_same_numbers():
    assert cpu._native.statistics() == [s.name for s in TABLE] == list(fastood.STATISTICS)


@pytest.mark.parametrize("name", FORMULAS)
def test_what_vanishes_with_the_rest_is_linear_in_it(name):
    """A backend may then have the rest in units of any weight."""
    text = rendered(FORMULAS[name].formula.removeprefix("log"), str, str)
    of_rest = {x for x in QUANTITIES if x.startswith("rest")}
    quantities = {x: random.Random(x).uniform(1, 2) for x in QUANTITIES}
    value = eval(text, dict(quantities))
    doubled = eval(text, {x: y * (2 if x in of_rest else 1) for x, y in quantities.items()})
    vanishes = FORMULAS[name].vanishes or FORMULAS[name].is_log
    assert doubled == pytest.approx(value * (2 if vanishes else 1), rel=1e-12)


def test_a_formula_says_which_sums_it_takes():
    assert Statistic("", "", "fmax / T").sums == Sums(0)
    assert Statistic("", "", "(1 + r2) * p_max").sums == Sums.EXP | Sums.SQUARES
    assert Statistic("", "", "log(rest)").sums == Sums.EXP | Sums.REST


@pytest.mark.parametrize(
    "formula", ["r1 ** 2", "r3", "exp(rest)", "r1 if T else r2", "log(rest, 2)", "'r1' + r1", "log(T)", "log(-rest_z)"]
)
def test_what_is_no_formula_is_refused(formula):
    with pytest.raises(ValueError, match=r"a formula is made of"):
        rendered(formula, str, str)


# ---- CONTRIBUTING's "A statistic"

NEW = """\
    Statistic("purity", "S_2 / max_k p_k", "(1 + r2) * p_max"),
    Statistic("odds", "1 / max_k p_k - 1, to relative precision", "rest"),
    Statistic("log_odds", "log (1 / max_k p_k - 1), finite where that underflows", "log(rest)"),
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(cpu.MISSING), reason="needs a C++ compiler")
@pytest.mark.skipif(not (ROOT / "fastood" / "kernels").is_symlink(), reason="needs a clone, or its link to kernels/")
def test_adding_a_statistic(tmp_path):
    """One entry in the table, and every backend has it; the C++ part once it is built, and the reference until then."""
    pytest.importorskip("triton")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("kernels", "fastood"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    table = tmp_path / "kernels" / "statistics.py"
    before, after = table.read_text().split('    Statistic("power_sum"')
    table.write_text(f'{before}{NEW}    Statistic("power_sum"{after}')

    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def python(*arguments):
        run = subprocess.run(
            [sys.executable, "-W", "ignore", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-20_000:]

    python("-m", "fastood.kernels.generate")
    python(ROOT / "tests/programs/new_statistics.py", "not yet")
    python("setup.py", "build_ext", "--inplace", "-q")
    python(ROOT / "tests/programs/new_statistics.py", "built")

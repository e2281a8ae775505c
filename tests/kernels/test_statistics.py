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

AGREE = """
import sys
import numpy as np, torch, fastood
from fastood.kernels import cpu

names = ["purity", "odds", "log_odds"]
known = cpu._native is not None and set(names) <= set(cpu._native.statistics())
assert known == (sys.argv[1] == "built"), "what the C++ part knows"
rng = np.random.default_rng(0)
for dtype in (torch.float32, torch.float64):
    for C in (3, 100, 1001, 30_000):
        x = rng.standard_normal((6, C)) * [[1], [4], [1], [1], [1], [0]]
        x[2:5, 1] += [20, 95, 800]
        f, h = torch.from_numpy(x).to(dtype), torch.ones(6, 4, dtype=dtype)
        x = f.double().numpy()
        z = np.sort(x - x.max(1, keepdims=True), 1)[:, :-1]  # of the rest
        pivot = z.max(1)
        log_odds = pivot + np.log(np.exp(z - pivot[:, None]).sum(1))
        odds = np.exp(log_odds)
        truth = {"purity": (1 + np.exp(2 * z).sum(1)) / (1 + odds), "odds": odds, "log_odds": log_odds}
        eps = 2.0**-24 if dtype == torch.float32 else 2.0**-53
        relative = (32 + 4 * np.minimum(np.ptp(x, 1), 104)) * eps
        for backend in ("reference", "cpu", "triton"):
            if backend == "triton" and dtype == torch.float64:
                continue
            got = {name: y.double().numpy() for name, y in fastood.row_stats(f, names, backend=backend).items()}
            assert list(got) == names
            assert set(names) < set(fastood.row_stats(f, backend=backend))
            for name, y in got.items():
                allowed = relative * (1 if name == "log_odds" else abs(truth[name])) + 8 * eps * abs(truth[name])
                assert (abs(y - truth[name]) <= allowed + 2.0**-149).all(), (backend, C, name, y, truth[name])
            fastood.SCORES.pop("odds", None)
            fastood.register(fastood.Score("odds", "1 / msp - 1", "", "out", stats=("odds",)))
            y = fastood.score(f, h, "odds", norm=1, oriented=False, backend=backend).double().numpy()
            assert (abs(y - 4 * odds) <= (relative + 16 * eps) * 4 * odds + 2.0**-149).all(), (backend, C, y)
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(cpu.MISSING), reason="needs a C++ compiler")
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
    python("-c", AGREE, "not yet")
    python("setup.py", "build_ext", "--inplace", "-q")
    python("-c", AGREE, "built")

"""The command line, as typed: what it writes, what it prints, how it ends."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import fastood
from fastood.cli import app

N, C, D = 40, 6, 9
RNG = np.random.default_rng(1)


def save(path, scale, seed, n=N, **more):
    rng = np.random.default_rng(seed)
    arrays = {"logits": rng.normal(size=(n, C)) * scale, "feats": rng.normal(size=(n, D)) * scale}
    np.savez(path, **arrays, **more)
    return arrays["logits"], arrays["feats"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of files, and one of them as arrays."""
    monkeypatch.chdir(tmp_path)
    save("near.npz", 2, 1)
    save("far.npz", 1, 2, n=25)
    return save("val.npz", 5, 0)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def complaint(*arguments):
    """The one line on stderr with which a mistake ends."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def logsumexp(f):
    top = f.max(-1, keepdims=True)
    return top[:, 0] + np.log(np.exp(f - top).sum(-1))


def norm(h, r):
    return (np.abs(h) ** r).sum(-1) ** (1 / r)


# ---- score


def test_score_is_energy_times_the_norm(data):
    f, h = data
    result = run("score", "val.npz", "out.npz")
    assert result.stdout == f"out.npz: {N} rows of energy\n"
    assert result.stderr == ""
    with np.load("out.npz") as out:
        assert list(out) == ["energy"]
        np.testing.assert_allclose(out["energy"], logsumexp(f) * norm(h, 0.3), rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, N, 1000])
def test_options_reach_the_scores_whatever_the_chunks(data, rows):
    f, h = data
    options = ["--method", "energy", "--method", "msp", "--norm", "2", "--temperature", "3", "--bias", "--log"]
    run("score", "val.npz", "out.npz", *options, "--chunk-rows", rows, "--backend", "reference")
    log_u = np.log(norm(np.hstack([h, np.ones((N, 1))]), 2))
    lse = logsumexp(f / 3)
    with np.load("out.npz") as out, np.errstate(invalid="ignore"):
        np.testing.assert_allclose(out["energy"], np.log(3 * lse) + log_u, rtol=1e-10)
        np.testing.assert_allclose(out["msp"], f.max(-1) / 3 - lse + log_u, rtol=1e-10)


def test_norm_none_and_inf_and_raw(data):
    f, h = data
    run("score", "val.npz", "a.npy", "--norm", "none")
    np.testing.assert_allclose(np.load("a.npy"), logsumexp(f), rtol=1e-12)
    run("score", "val.npz", "b.npy", "--norm", "inf")
    np.testing.assert_allclose(np.load("b.npy"), logsumexp(f) * np.abs(h).max(-1), rtol=1e-12)
    run("score", "val.npz", "c.npy", "--method", "exgrad", "--raw")
    p = np.exp(f - logsumexp(f)[:, None])
    np.testing.assert_allclose(np.load("c.npy"), 2 * norm(h, 1) * (p * (1 - p)).sum(-1), rtol=1e-9)


def test_all_is_what_the_file_allows(data):
    f, h = data
    run("score", "val.npz", "out.parquet", "--method", "all")
    assert pq.read_table("out.parquet").column_names == list(fastood.SCORES)
    np.save("logits.npy", f)
    run("score", "logits.npy", "out.csv", "--method", "all")
    with open("out.csv", newline="") as file:
        header = next(csv.reader(file))
    assert header == [name for name, entry in fastood.SCORES.items() if "feats" not in entry.needs]
    np.savez("feats.npz", feats=h)
    run("score", "feats.npz", "out.npz", "--method", "all")
    with np.load("out.npz") as out:
        assert list(out) == ["norm"]
        np.testing.assert_allclose(out["norm"], norm(h, 0.3), rtol=1e-10)


def test_keys_of_ones_own(data):
    f, h = data
    np.savez("own.npz", f=f, h=h)
    run("score", "own.npz", "out.npy", "--logits-key", "f", "--feats-key", "h", "--norm", "1")
    np.testing.assert_allclose(np.load("out.npy"), logsumexp(f) * norm(h, 1), rtol=1e-12)


def test_nan_is_counted_and_explained(data):
    f, _ = data
    f[3:5] = np.nan
    f[6] = -np.inf
    np.save("holes.npy", f)
    result = run("score", "holes.npy", "out.npz", "--method", "msp", "--method", "energy", "--chunk-rows", "4")
    assert "NaN: msp in 3 rows, energy in 2 rows\n" in result.stdout
    assert "all -inf" in result.stdout
    np.save("negative.npy", np.full((5, 2), -9.0))
    assert "no logarithm" in run("score", "negative.npy", "out.npz", "--log").stdout


def test_no_rows(data):
    np.save("none.npy", np.zeros((0, 4)))
    assert run("score", "none.npy", "out.csv", "--method", "msp").stdout == "out.csv: 0 rows of msp\n"
    with open("out.csv") as file:
        assert file.read().split() == ["msp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.npz", "out.npz"], "nope.npz: no such file"),
        (["val.npz", "val.npz"], "val.npz: is an input"),
        (["val.npz", "nowhere/out.npz"], "nowhere"),
        (["val.npz", "out.xls"], "out.xls: unknown extension '.xls'"),
        (["val.npz", "out.npz", "--logits-key", "y"], "val.npz: must hold 'y', found 'logits', 'feats'"),
        (["val", "out.npz"], "val: no such file"),
        (["val.npz", "out.npz", "--method", "enregy"], "--method must be one of 'all', 'msp', 'energy'"),
        (["val.npz", "out.npz", "--norm", "two"], "--norm must be a number >= 0, 'inf' or 'none', got 'two'"),
        (["val.npz", "out.npz", "--norm", "-1"], "--norm must be a number >= 0, 'inf' or 'none', got '-1'"),
        (["val.npz", "out.npz", "--method", "exgrad", "--norm", "2"], "--norm: exgrad has a norm of its own"),
        (["val.npz", "out.npz", "--temperature", "0"], "--temperature must be a finite number > 0, got 0.0"),
        (["val.npz", "out.npz", "--backend", "abacus"], "must be 'auto' or one of ['"),
        (["val.npz", "out.npz", "--device", "abacus"], "--device must be a torch device"),
        (["val.npz", "out.npz", "--log", "--method", "gen"], "log: gen is never above 0"),
        (["val.npz", "out.npy", "--method", "all"], "a .npy file holds one score"),
        (["far.npz", "out.npz", "--logits-key", "feats", "--feats-key", "x"], "must hold 'x'"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(data, arguments, message):
    before = sorted(os.listdir())
    assert message in complaint("score", *arguments)
    assert sorted(os.listdir()) == before


def test_a_gpu_that_is_not_there(data, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device: torch finds no GPU here for 'cuda'" in complaint("score", "val.npz", "o.npz", "--device", "cuda")


def test_an_input_that_breaks_off_leaves_the_old_output(data):
    np.savez("long.npz", logits=RNG.normal(size=(5000, 4)))
    with open("long.npz", "r+b") as file:
        file.seek(100_000)
        file.write(b"not what the checksum says")
    with open("out.npz", "w") as file:
        file.write("what was there")
    before = sorted(os.listdir())
    assert "long.npz: cannot be read as .npz" in complaint("score", "long.npz", "out.npz", "--chunk-rows", "100")
    with open("out.npz") as file:
        assert file.read() == "what was there"
    assert sorted(os.listdir()) == before


def test_a_missing_argument_is_a_usage_error(data):
    result = run("score", "val.npz", code=2)
    assert "Missing argument 'OUT'" in result.stderr


def test_a_bar_on_a_terminal_ends_before_the_complaint(data):
    pty = pytest.importorskip("pty", reason="needs a POSIX terminal")
    terminal, stderr = pty.openpty()
    np.savez("long.npz", logits=np.zeros((9, C)), feats=np.full((9, D), np.nan))
    command = [sys.executable, "-m", "fastood", "score", "long.npz", "out.npy", "--method", "all"]
    result = subprocess.run(command, stderr=stderr, stdout=subprocess.PIPE, env={**os.environ, "TERM": "xterm"})
    text = os.read(terminal, 100_000).decode()
    os.close(terminal)
    os.close(stderr)
    assert result.returncode == 2
    assert "0/9" in text
    shown_again = text.index("\x1b[?25h")  # the cursor, which the bar hides
    assert "error: a .npy file holds one score" in text[shown_again:]


# ---- eval


def auroc(inside, outside):
    """From the definition: the share of pairs in the right order."""
    return (inside[:, None] > outside).mean() + (inside[:, None] == outside).mean() / 2


def test_eval_writes_the_table_it_prints(data):
    f, h = data
    ood = {"near": save("near.npz", 2, 1), "far": save("far.npz", 1, 2)}
    sets = ["--id", "val.npz", "--ood", "near.npz", "--ood", "far=far.npz"]
    outputs = ["--json", "t.json", "--csv", "t.csv", "--html", "t.html"]
    result = run("eval", *sets, "--method", "energy", "--norm", "none", "--norm", "2", *outputs)
    with open("t.csv", newline="") as file:
        rows = {(row["ood"], row["score"]): row for row in csv.DictReader(file)}
    with open("t.json", encoding="utf-8") as file:
        assert len(json.load(file)["results"]) == len(rows) == 6
    html = Path("t.html").read_text(encoding="utf-8")
    assert "<html" in html
    assert "Figure 2 of the paper" in html
    for label, score_of in {
        "energy": lambda f, h: logsumexp(f),
        "energy*||h||_2": lambda f, h: logsumexp(f) * norm(h, 2),
    }.items():
        truth = {name: auroc(score_of(f, h), score_of(*x)) for name, x in ood.items()}
        truth["average"] = np.mean(list(truth.values()))
        for name, value in truth.items():
            assert float(rows[name, label]["auroc"]) == pytest.approx(value, abs=1e-12)
            assert f"{value:.6f}" in result.stdout
            assert name in result.stdout
    for word in ("AUROC", "FPR95", "AUPR-in", "AUPR-out", "higher for in-distribution"):
        assert word in result.stdout


def test_eval_of_one_set_has_no_average_and_defaults_to_everything(data):
    result = run("eval", "--id", "val.npz", "--ood", "a[b]=near.npz", "--csv", "t.csv")
    with open("t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["ood"] for row in rows} == {"a[b]"}
    assert {"msp", "msp*||h||_0.3", "||h||_0.3", "exgrad"} <= {row["score"] for row in rows}
    assert "a[b]" in result.stdout
    assert "average" not in result.stdout


def test_eval_takes_a_file_whose_name_holds_an_equals_sign(data):
    os.rename("near.npz", "lr=0.1.npz")
    assert "lr=0.1" in run("eval", "--id", "val.npz", "--ood", "lr=0.1.npz", "--method", "msp").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ood", "near.npz", "--ood", "near=far.npz"], "--ood: 'near' names two sets"),
        (["--ood", "x=nope.npz"], "nope.npz: no such file"),
        (["--ood", "near.npz", "--json", "nowhere/t.json"], "nowhere"),
        (["--ood", "near.npz", "--csv", "val.npz"], "val.npz: is an input"),
        (["--ood", "near.npz", "--html", "near.npz"], "near.npz: is an input"),
        (["--ood", "near.npz", "--json", "x.html", "--html", "./x.html"], "--html: --json writes x.html already"),
        (["--ood", "near="], "--ood: 'near=' lacks the FILE of NAME=FILE"),
        (["--ood", "=near.npz"], "--ood: '=near.npz' lacks the NAME of NAME=FILE"),
        (["--ood", "near.npz", "--norm", "x"], "--norm must be a number >= 0, 'inf' or 'none', got 'x'"),
        (["--ood", "near.npz", "--method", "nope"], "--method must be one of 'all', 'msp'"),
        (["--ood", "near.npz", "--temperature", "nan"], "--temperature must be a finite number > 0, got nan"),
        (
            ["--ood", "near.npz", "--method", "gradnorm", "--method", "exgrad", "--norm", "2"],
            "--norm: gradnorm, exgrad has a norm of its own",
        ),
    ],
)
def test_eval_mistakes(data, arguments, message):
    before = sorted(os.listdir())
    assert message in complaint("eval", "--id", "val.npz", *arguments)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(("name", "key"), [("logits", "logits"), ("feats", "feats"), ("feats", "h")])
def test_eval_of_sets_of_different_widths(data, name, key):
    f, h = data
    keys = {"logits": "logits", "feats": "feats", name: key}
    np.savez("val.npz", **{keys["logits"]: f, keys["feats"]: h})
    arrays = {"logits": f, "feats": h}
    np.savez("odd.npz", **{keys[x]: a[:, :3] if x == name else a for x, a in arrays.items()})
    # Above NaN, which scoring would find.
    np.savez("nan.npz", **{keys[x]: a * np.nan for x, a in arrays.items()})
    files = ["--id", "val.npz", "--ood", "nan.npz", "--ood", "odd.npz", f"--{name}-key", key]
    text = complaint("eval", *files)
    assert text == f"error: odd.npz: {key!r} must have {arrays[name].shape[1]} columns as in val.npz, got 3\n"


def test_eval_of_sets_that_hold_different_things(data):
    f, h = data
    np.savez("logits.npz", logits=f)
    np.savez("feats.npz", feats=h)
    without = "must hold {!r} as {} does, or --method and --norm do without"
    for inside, outside, lacking, having, key in (
        ("val", "logits", "logits", "val", "feats"),
        ("logits", "val", "logits", "val", "feats"),
        ("val", "feats", "feats", "val", "logits"),
    ):
        text = complaint("eval", "--id", f"{inside}.npz", "--ood", f"{outside}.npz")
        assert text == f"error: {lacking}.npz: {without.format(key, f'{having}.npz')}\n"
    sets = ["--id", "val.npz", "--ood", "logits.npz"]
    assert "logits.npz: must hold 'feats'" in complaint("eval", *sets, "--method", "msp")
    assert "logits.npz: must hold 'feats'" in complaint("eval", *sets, "--method", "exgrad")
    # What no score takes may be there or not.
    assert "msp" in run("eval", *sets, "--method", "msp", "--norm", "none").stdout
    assert "||h||_0.3" in run("eval", "--id", "val.npz", "--ood", "feats.npz", "--method", "norm").stdout


def test_eval_marks_the_best_of_each_set(data):
    levels = {"val": 5, "low": 1, "high": 9}
    for name, level in levels.items():
        logits = np.zeros((9, 3))
        logits[:, 0] = level + np.arange(9) / 9
        np.savez(name, logits=logits, feats=np.ones((9, 2)))
    sets = ["--id", "val.npz", "--ood", "low.npz", "--ood", "high.npz"]
    text = run("eval", *sets, "--method", "msp", "--method", "gen", "--method", "norm", "--norm", "1").stdout
    marked = [line.split("│")[2].strip() for line in text.splitlines() if "*│" in line.replace(" ", "")]
    # the mean: all are 0.5; low: msp and gen are right throughout; high: wrong throughout, where the norm ties
    assert marked == ["msp*||h||_1", "gen*||h||_1", "||h||_1", "msp*||h||_1", "gen*||h||_1", "||h||_1"]
    assert "* marks the best AUROC" in text


def test_eval_ends_with_what_to_do(data):
    import torch

    from fastood.evaluation import evaluate, score_rows

    f, h = RNG.normal(size=(2, 150, C)), RNG.normal(size=(2, 150, D))
    f[0, :, 0] += 4
    for name, *x in zip(("in", "out"), f, h, strict=True):
        np.savez(name, logits=x[0], feats=x[1])
    result = run("eval", "--id", "in.npz", "--ood", "out.npz", "--method", "msp", "--json", "t.json")
    scores = [score_rows([tuple(map(torch.from_numpy, x))], methods=["msp"]) for x in zip(f, h, strict=True)]
    found = evaluate(scores[0], {"out": scores[1]}).recommendation
    assert result.stdout.endswith(f"\n\n{found}\n")
    with open("t.json", encoding="utf-8") as file:
        assert json.load(file)["recommendation"]["threshold"] == found.threshold
    assert f"Accept where {found.score} >= {found.threshold!r}: keeps 143 of the 150 ID rows" in result.stdout


def test_eval_shows_a_bar_for_every_reading(data, monkeypatch):
    from rich.progress import Progress

    bars = []
    add_task = Progress.add_task

    def counted(self, name, total):
        bars.append((name, total))
        return add_task(self, name, total=total)

    monkeypatch.setattr(Progress, "add_task", counted)
    run("eval", "--id", "val.npz", "--ood", "near.npz", "--ood", "far.npz", "--html", "t.html")
    assert bars == 2 * [("val.npz", N), ("near.npz", N), ("far.npz", 25)]


def test_eval_of_nan_names_the_set_and_the_score(data):
    logits = np.zeros((3, C))
    logits[1] = np.nan
    np.save("holes.npy", logits)
    text = complaint("eval", "--id", "val.npz", "--ood", "holes.npy", "--method", "msp", "--norm", "none")
    assert "'holes'" in text
    assert "'msp'" in text


# ---- demo, info, version, help


def test_demo_prints_the_table_and_the_files(data, monkeypatch):
    from fastood import demo
    from fastood.evaluation import evaluate

    def quick(out, seed, progress):
        progress("working")
        out.mkdir()
        (out / "picture.png").touch()
        assert seed == 3
        inside = {"msp": [0.9, 0.8], "energy": [3.0, 1.0], "energy*||h||_0.3": [1.0, 2.0]}
        noise = {"msp": [0.7], "energy": [4.0], "energy*||h||_0.3": [0.5]}
        blur = {"msp": [0.7], "energy": [2.0], "energy*||h||_0.3": [1.5]}
        return evaluate(inside, {"noise": noise, "blur": blur})

    monkeypatch.setattr(demo, "run", quick)
    result = run("demo", "--out", "here", "--seed", "3")
    assert "noise" in result.stdout
    assert "0.500000" in result.stdout
    assert os.path.join("here", "picture.png") in result.stdout
    assert result.stdout.endswith(
        "AUROC, mean over the OOD sets: energy alone 0.250000; "
        "energy*||h||_0.3, the default of fastood.score, 0.750000.\n"
    )
    assert result.stderr == "working\n"


def test_demo_wants_a_folder(data):
    assert complaint("demo", "--out", "val.npz") == "error: val.npz: is a file; a folder is wanted to write to\n"


def test_info_and_version():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["fastood"] == fastood.__version__
    assert facts["numpy"] == np.__version__
    assert facts["threads"] >= 1
    assert facts["backends"]["cpu"]["reference"]["usable"] is True
    text = run("info").stdout
    for name in facts:
        assert name.removesuffix("s").replace("_", " ") in text
    if not facts["cuda"]:
        assert "cuda: none" in text
    native = importlib.import_module("fastood.kernels.cpu")._native
    assert facts.get("C++_kernels") == (native and native.level())
    assert f"instruction set: {facts['instruction_set']}\n" in text
    assert run("--version").stdout == f"fastood {fastood.__version__}\n"


@pytest.mark.parametrize("command", ["score", "eval", "demo", "info"])
def test_help_shows_examples(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run(command, "--help").stdout
    assert f"fastood {command}" in text
    assert "[bold]" not in text


HELP = """
import sys
sys.argv = ["fastood", "--help"]
from fastood.__main__ import main
try:
    main()
finally:
    print(sorted({"sklearn", "matplotlib", "pyarrow", "jinja2"} & set(sys.modules)))
"""


def test_help_as_a_process_loads_neither_plots_nor_metrics():
    out = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True).stdout
    assert "fastood demo" in out
    assert out.endswith("[]\n")


def test_without_its_packages_it_says_what_to_install():
    script = "import sys; sys.modules['typer'] = None\nfrom fastood.__main__ import main\nmain()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == 'The command line needs more packages: pip install "fastood[cli]"\n'


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_killed_run_leaves_nothing(data):
    np.save("big.npy", np.zeros((500_000, 2), np.float32))
    before = sorted(os.listdir())
    with subprocess.Popen(
        [sys.executable, "-m", "fastood", "score", "big.npy", "out.csv", "--chunk-rows", "1"]
    ) as process:
        deadline = time.monotonic() + 60
        while sorted(os.listdir()) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(os.listdir()) != before
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode == 128 + signal.SIGTERM
    assert sorted(os.listdir()) == before

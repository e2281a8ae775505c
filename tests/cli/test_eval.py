"""fastood eval: the table, the recommendation, and how a mistake ends."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import C, D, N, complaint, run, save
from formulas import lse, norm


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
        "energy": lambda f, h: lse(f),
        "energy*||h||_2": lambda f, h: lse(f) * norm(h, 2),
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
        (["--ood", "average=near.npz", "--ood", "far.npz"], "--ood: 'average' is the mean over the sets"),
        (["--ood", "x=nope.npz"], "nope.npz: no such file"),
        (["--ood", "near.npz", "--json", "nowhere/t.json"], "nowhere"),
        (["--ood", "near.npz", "--csv", "val.csv"], "val.csv: is an input"),
        (["--ood", "near.npz", "--html", "near.html"], "near.html: is an input"),
        (["--ood", "near.npz", "--html", "e.pdf"], "e.pdf: the file's name must end with .html or .htm"),
        (["--ood", "near.npz", "--csv", "e.json"], "e.json: the file's name must end with .csv"),
        (["--ood", "near.npz", "--json", "e"], "e: the file's name must end with .json"),
        (["--ood", "near="], "--ood: 'near=' lacks the FILE of NAME=FILE"),
        (["--ood", "=near.npz"], "--ood: '=near.npz' lacks the NAME of NAME=FILE"),
        (["--ood", "near.npz", "--norm", "x"], "--norm must be a number >= 0, 'inf' or 'none', got 'x'"),
        (["--ood", "near.npz", "--method", "nope"], "--method must be one of 'all', 'msp'"),
        (["--ood", "near.npz", "--device", "abacus"], "--device must be a torch device"),
        (["--ood", "near.npz", "--backend", "abacus"], "must be 'auto' or one of ['"),
        (["--ood", "near.npz", "--nan", "omit"], "--nan must be one of 'keep', 'drop', 'fail', got 'omit'"),
        (["--ood", "near.npz", "--temperature", "nan"], "--temperature must be a finite number > 0, got nan"),
        (
            ["--ood", "near.npz", "--method", "gradnorm", "--method", "exgrad", "--norm", "2"],
            "--norm: gradnorm, exgrad has a norm of its own",
        ),
    ],
)
def test_eval_mistakes(data, arguments, message):
    os.symlink("val.npz", "val.csv")
    os.symlink("near.npz", "near.html")
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

    from fastood.evaluation import evaluate, score_rows

    random = np.random.default_rng(1)
    f, h = random.normal(size=(2, 150, C)), random.normal(size=(2, 150, D))
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


def test_eval_shows_a_bar_for_every_reading(data, monkeypatch, undrawn):
    from rich.progress import Progress

    bars = []
    add_task = Progress.add_task

    def counted(self, name, total):
        bars.append((name, total))
        return add_task(self, name, total=total)

    monkeypatch.setattr(Progress, "add_task", counted)
    run("eval", "--id", "val.npz", "--ood", "near.npz", "--ood", "far.npz", "--html", "t.html")
    assert bars == 2 * [("val.npz", N), ("near.npz", N), ("far.npz", 25)]


def auroc_in(path):
    with open(path, newline="") as file:
        return {row["score"]: float(row["auroc"]) for row in csv.DictReader(file)}


def test_eval_drops_nan_rows_keeps_them_as_the_lowest_or_fails(data, monkeypatch, undrawn):
    from fastood import plots

    grids = []
    heatmap = plots.heatmap
    monkeypatch.setattr(plots, "heatmap", lambda grid, *more: grids.append(grid) or heatmap(grid, *more))
    f, h = data
    g, k = save("near.npz", 2, 1)
    f[:3] = np.nan
    np.savez("val.npz", logits=f, feats=h)
    k[7] = np.nan
    np.savez("near.npz", logits=g, feats=k)
    command = ["eval", "--id", "val.npz", "--ood", "near.npz", "--method", "energy", "--csv", "t.csv"]
    e, d = lse(f), lse(g)
    whole = np.arange(N) != 7
    result = run(*command)
    assert f"val.npz: 3 of {N} rows have a NaN score (energy, energy*||h||_0.3) and are left out" in result.stdout
    assert f"near.npz: 1 of {N} rows have a NaN score (energy*||h||_0.3) and are left out" in result.stdout
    # The row without a norm is out of the energies, too: all scores are of the same rows.
    assert auroc_in("t.csv")["energy"] == pytest.approx(auroc(e[3:], d[whole]), abs=1e-12)
    run(*command, "--html", "t.html")
    result = run(*command, "--nan", "keep", "--html", "t.html")
    assert "are counted as the lowest score" in result.stdout
    low = np.where(np.isnan(e), -np.inf, e)
    assert auroc_in("t.csv")["energy"] == pytest.approx(auroc(low, d), abs=1e-12)
    u, v = (np.where(np.isnan(x), -np.inf, x) for x in (e * norm(h, 0.3), d * norm(k, 0.3)))
    assert auroc_in("t.csv")["energy*||h||_0.3"] == pytest.approx(auroc(u, v), abs=1e-12)
    dropped, kept = (grid[0, plots.FIGURE_2_NORMS.index(0.3)] for grid in grids)
    assert kept == pytest.approx(auroc(u, v), abs=1e-12)
    assert dropped == pytest.approx(auroc(u[3:], v[whole]), abs=1e-12)
    text = complaint(*command, "--nan", "fail")
    assert "val.npz: row 0, counted from 0, has a NaN score; see --nan" in text
    np.savez("near.npz", logits=np.full((4, C), np.nan), feats=k[:4])
    assert complaint(*command) == "error: near.npz: every row has a NaN score\n"


def test_eval_says_what_it_read_and_computes_where_it_is_told(data, monkeypatch):
    asked = []
    import fastood.evaluation as evaluation

    scores = evaluation.scores

    def noted(*args, **options):
        asked.append((args[0].device.type, options["backend"]))
        return scores(*args, **options)

    monkeypatch.setattr(evaluation, "scores", noted)
    command = ["eval", "--id", "val.npz", "--ood", "near.npz", "--method", "msp", "--norm", "none"]
    result = run(*command, "--device", "cpu", "--backend", "reference")
    assert result.stdout.startswith(
        f"val.npz: logits [{N}, {C}], feats [{N}, {D}] (not used)\n"
        f"near.npz: logits [{N}, {C}], feats [{N}, {D}] (not used)\n"
    )
    assert asked == 2 * [("cpu", "reference")]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device: torch finds no GPU here for 'cuda'" in complaint(*command, "--device", "cuda")

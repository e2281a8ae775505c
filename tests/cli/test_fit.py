"""fastood fit and fastood inspect."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from command_line import C, D, N, complaint, run, save, warnings
from formulas import lse

import fastood


def test_fit_is_the_detector_of_all_rows(data, det):
    limit = det[1]
    loaded = fastood.Detector.load("det.safetensors")
    assert (loaded.method, loaded.norm, loaded.temperature, loaded.bias, loaded.tpr) == ("energy", 2, 2, False, 0.9)
    assert (loaded.rows, loaded.classes, loaded.dim) == (N, C, D)
    assert loaded.threshold == pytest.approx(limit, rel=1e-12)
    before = Path("det.safetensors").read_bytes()
    command = ["fit", "val.npz", "--out", "det.safetensors", "--norm", "2", "--tpr", "0.9", "--temperature", "2"]
    result = run(*command, "--chunk-rows", "7", "--backend", "reference")
    assert fastood.Detector.load("det.safetensors").threshold == pytest.approx(limit, rel=1e-12)
    share = 4 / 41  # which is refused, Beta(4, 37)
    assert result.stdout == (
        f"det.safetensors: energy*||h||_2, fitted on {N} rows\n"
        f"accepts scores >= {loaded.threshold:.6g}: at least 90% of rows drawn like those that it was fitted on, on "
        f"the average over sets of {N}; the share of one set has a standard deviation of "
        f"{100 * (share * (1 - share) / 42) ** 0.5:.2g}%\n"
        f"val.npz: logits [{N}, {C}], feats [{N}, {D}]\n"
    )
    run(*command)
    assert Path("det.safetensors").read_bytes() == before
    # What --norm stands for follows from the file.
    run("fit", "val.npz", "--out", "det.safetensors")
    assert fastood.Detector.load("det.safetensors").norm == 0.3
    result = run("fit", "val.npz", "--out", "det.safetensors", "--method", "gen")
    assert f"feats [{N}, {D}] (not used)" in result.stdout
    assert fastood.Detector.load("det.safetensors").norm is None
    run("fit", "val.npz", "--out", "det.safetensors", "--method", "exgrad", "--bias")
    assert fastood.Detector.load("det.safetensors").bias


def test_fit_by_class_on_rows_that_are_right(data):
    f, h = data
    y = f.argmax(-1)
    y[:5] = (y[:5] + 1) % C
    y[5:] = np.where(y[5:] == 2, 3, y[5:])  # nothing of class 2 is right
    np.savez("val.npz", z=f, h=h, y=y)
    keys = ["--logits-key", "z", "--feats-key", "h", "--labels-key", "y", "--chunk-rows", "9"]
    result = run("fit", "val.npz", "--out", "det.safetensors", *keys, "--method", "tv", "--per-class", "--tpr", "0.5")
    right = y == f.argmax(-1)
    assert f"fitted on {right.sum()} of {N} rows, those that the classifier gets right\n" in result.stdout
    assert "feats 'h' [40, 9], labels 'y'\n" in result.stdout
    own = sum((y[right] == k).any() for k in range(C))
    assert own < C
    assert f"in each of the {own} of {C} classes with a threshold of their own; {C - own} have too few" in result.stdout
    fitted = fastood.Detector("tv", norm=0.3, per_class=True, tpr=0.5).fit(f, h, y)
    facts = json.loads(run("inspect", "det.safetensors", "--json").stdout)
    np.testing.assert_allclose(facts["threshold"], fitted.threshold.numpy(), rtol=1e-12)
    assert facts["per_class"] is True
    assert f"{C - own} have too few rows and go by the threshold of all" in run("inspect", "det.safetensors").stdout
    run("score", "val.npz", "out.npz", "--detector", "det.safetensors", *keys[:4])
    with np.load("out.npz") as out:
        np.testing.assert_array_equal(out["accept"], fitted.accept(f, h))
        np.testing.assert_array_equal(out["p_value"], fitted.p_value(f, h))


def test_fit_drops_rows_that_are_not_finite_or_fails(holes):
    holes[7, 0] = np.inf
    np.savez("holes.npz", logits=holes, y=holes.argmax(-1))
    command = ["fit", "holes.npz", "--out", "det.safetensors", "--method", "energy", "--tpr", "0.9"]
    for rows in (2, 100):
        text = complaint(*command, "--chunk-rows", rows)
        assert text == "error: holes.npz: the score of row 3, counted from 0, is not finite; see --nan\n"
    assert not Path("det.safetensors").exists()
    result = run(*command, "--nan", "drop", "--chunk-rows", "6", "--labels-key", "y")
    assert f"fitted on {N - 4} of {N} rows" in result.stdout
    assert f"holes.npz: 4 of {N} rows have a score that is not finite and are left out" in result.stdout
    s = np.sort(lse(np.delete(holes, [3, 4, 6, 7], 0)))
    assert fastood.Detector.load("det.safetensors").threshold == pytest.approx(s[int(0.1 * (N - 4 + 1)) - 1], rel=1e-12)


def test_fit_warns_of_the_data(data):
    f, h = data
    np.savez("val.npz", logits=f - 60, feats=h)
    (line,) = warnings("fit", "val.npz", "--out", "det.safetensors")
    assert f"val.npz: negative energy*||h||_0.3 in {N} of {N} rows" in line
    np.savez("val.npz", logits=f - lse(f)[:, None], feats=h)
    (line,) = warnings("fit", "val.npz", "--out", "det.safetensors", "--method", "msp")
    assert line.startswith("warning: val.npz: 'logits' looks like log-probabilities")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tpr", "0.99"], "tpr=0.99 takes at least 99 in-distribution rows, got 40"),
        (["--tpr", "1"], "--tpr must be between 0 and 1, got 1.0"),
        (["--tpr", "nan"], "--tpr must be between 0 and 1, got nan"),
        (["--method", "all"], "--method must be one of 'msp', 'energy'"),
        (["--method", "exgrad", "--norm", "2"], "--norm: exgrad has a norm of its own"),
        (["--temperature", "-1"], "--temperature must be a finite number > 0, got -1.0"),
        (["--nan", "keep"], "--nan must be one of 'drop', 'fail', got 'keep'"),
        (["--out", "det.pkl"], "det.pkl: the file's name must end with .safetensors"),
        (["--out", "nowhere/det.safetensors"], "nowhere"),
        (
            ["--out", "train.safetensors", "--train", "train.safetensors", "--method", "knn"],
            "train.safetensors: is an input",
        ),
        (["--labels-key", "y"], "val.npz: must hold 'y', found 'logits', 'feats', 'names', 'wrong'"),
        (["--labels-key", "names"], "val.npz: 'names' must hold integers, the true classes, got strings"),
        (["--labels-key", "wrong"], "labels must be classes 0..5, got 9..9"),
        (["--device", "abacus"], "--device must be a torch device"),
        (["--backend", "abacus"], "must be 'auto' or one of ['"),
    ],
)
def test_fit_mistakes(data, arguments, message):
    save("val.npz", 5, 0, names=np.array(["a"] * N), wrong=np.full(N, 9))
    os.symlink("val.npz", "train.safetensors")
    before = sorted(os.listdir())
    out = [] if "--out" in arguments else ["--out", "det.safetensors"]
    assert message in complaint("fit", "val.npz", *out, *arguments)
    assert sorted(os.listdir()) == before


def test_inspect_says_what_the_file_holds(det):
    facts = json.loads(run("inspect", "det.safetensors", "--json").stdout)
    threshold = facts.pop("threshold")
    assert threshold == pytest.approx(det[1], rel=1e-12)
    assert facts == {
        "file": "det.safetensors",
        "format": 1,
        "fastood": fastood.__version__,
        "method": "energy",
        "norm": 2,
        "temperature": 2,
        "bias": False,
        "params": {},
        "tpr": 0.9,
        "per_class": False,
        "classes": C,
        "dim": D,
        "rows": N,
    }
    text = run("inspect", "det.safetensors").stdout
    assert f"norm: 2\ntemperature: 2.0\nbias: False\ntpr: 0.9\nper class: False\nclasses: {C}\n" in text
    assert f"\naccepts scores >= {threshold:.6g}: at least 90% of rows" in text
    run("fit", "val.npz", "--out", "det.safetensors", "--norm", "inf")
    assert json.loads(run("inspect", "det.safetensors", "--json").stdout)["norm"] == "inf"
    os.rename("det.safetensors", "Infinity.safetensors")
    assert json.loads(run("inspect", "Infinity.safetensors", "--json").stdout)["file"] == "Infinity.safetensors"
    os.rename("Infinity.safetensors", "det.safetensors")
    assert "norm: inf\n" in run("inspect", "det.safetensors").stdout
    run("fit", "val.npz", "--out", "det.safetensors", "--norm", "none")
    assert "norm: none\n" in run("inspect", "det.safetensors").stdout
    assert "val.npz: cannot be read as a detector" in complaint("inspect", "val.npz")
    assert "nope.safetensors: no such file" in complaint("inspect", "nope.safetensors")

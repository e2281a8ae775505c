"""The successors on the command line: --head, --train, and the modern table of eval."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import complaint, run
from safetensors.torch import save_file

import fastood
from fastood import SUCCESSORS, Fitted

C, D = 6, 12
HEADLESS = [name for name, entry in SUCCESSORS.items() if not entry.head]
UNFITTED = [name for name, entry in SUCCESSORS.items() if not entry.fitted_on]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Files in a folder: rows of a last layer that knows six classes, and of noise; the layer; and all as arrays."""
    monkeypatch.chdir(tmp_path)
    g = np.random.default_rng(0)
    weight, bias = g.normal(size=(C, D)), g.normal(size=C)
    held = {"head": (weight, bias)}
    for name, n, scale in (("train", 200, 1.5), ("val", 100, 1.5), ("far", 80, 0.4)):
        y = g.integers(0, C, n)
        feats = np.maximum(scale * weight[y] + g.normal(size=(n, D)), 0) + 0.01 * g.random((n, D))
        held[name] = feats @ weight.T + bias, feats, y
        np.savez(f"{name}.npz", logits=held[name][0], feats=feats, labels=y)
    np.savez("head.npz", weight=weight, bias=bias)
    return held


def fitted(name, data):
    made = Fitted(name, head=data["head"] if SUCCESSORS[name].head else None)
    return made.fit(*data["train"]) if SUCCESSORS[name].fitted_on else made


def test_eval_has_the_modern_table_beside_the_papers(data):
    run("eval", "--id", "val.npz", "--ood", "far.npz", "--json", "paper.json")
    said = run(
        *("eval", "--id", "val.npz", "--ood", "far.npz", "--json", "all.json"),
        *("--head", "head.npz", "--train", "train.npz", "--train-labels-key", "labels"),
    ).stdout
    paper, both = (
        {x["score"]: x for x in json.loads(Path(f"{name}.json").read_text())["results"]} for name in ("paper", "all")
    )
    assert both.keys() - paper.keys() == SUCCESSORS.keys()
    assert {name: both[name] for name in paper} == paper
    assert "relative_mahalanobis" in said
    for name in SUCCESSORS:
        inside, outside = (fitted(name, data).score(*data[x][:2]) for x in ("val", "far"))
        assert both[name]["auroc"] == pytest.approx(fastood.metrics.auroc(inside, outside), abs=1e-12)


def test_eval_takes_what_the_files_allow(data):
    def scores(*options):
        run("eval", "--id", "val.npz", "--ood", "far.npz", "--json", "a.json", *options)
        return {x["score"] for x in json.loads(Path("a.json").read_text())["results"]} & SUCCESSORS.keys()

    assert scores("--head", "head.npz") == set(UNFITTED)
    assert scores("--train", "train.npz") == set(HEADLESS)
    assert scores("--method", "lts") == {"lts"}
    assert scores("--method", "scale", "--method", "msp", "--head", "head.npz") == {"scale"}
    logits, feats, _ = data["train"]
    np.savez("few.npz", logits=logits[:30], feats=feats[:30])
    said = run("eval", "--id", "val.npz", "--ood", "far.npz", "--train", "few.npz").stdout
    assert "few.npz: knn is left out: k=50 takes at least as many in-distribution rows, got 30" in said
    assert "few.npz: knn: k=50" in complaint(
        *("eval", "--id", "val.npz", "--ood", "far.npz", "--train", "few.npz", "--method", "knn")
    )


@pytest.mark.parametrize("form", ["npz", "safetensors", "pt", "checkpoint", "convolution"])
def test_a_head_comes_in_any_file(data, form):
    weight, bias = (torch.from_numpy(x) for x in data["head"])
    path = f"h.{'safetensors' if form == 'safetensors' else 'npz' if form == 'npz' else 'pt'}"
    if form == "npz":
        np.savez(path, weight=weight, bias=bias)
    elif form == "safetensors":
        save_file({"weight": weight, "bias": bias}, path)
    elif form == "pt":
        torch.save({"weight": weight, "bias": bias}, path)
    else:
        last = weight[:, :, None, None] if form == "convolution" else weight
        torch.save({"body.weight": torch.zeros(3, 4), "fc.weight": last, "fc.bias": bias}, path)
    run("score", "val.npz", "out.npz", "--method", "scale", "--head", path)
    with np.load("out.npz") as out:
        np.testing.assert_array_equal(out["scale"], fastood.score(*data["val"][:2], "scale", head=data["head"]))


def test_score_writes_them_beside_others(data):
    run(
        *("score", "val.npz", "out.npz", "--method", "mahalanobis", "--method", "energy", "--norm", "none", "--raw"),
        *("--train", "train.npz", "--train-labels-key", "labels", "--chunk-rows", 33),
    )
    with np.load("out.npz") as out:
        assert list(out) == ["raw energy", "raw mahalanobis"]
        expected = fitted("mahalanobis", data).score(*data["val"][:2], oriented=False)
        np.testing.assert_allclose(out["raw mahalanobis"], expected, rtol=1e-12)


@pytest.mark.parametrize("name", SUCCESSORS)
def test_fit_makes_a_detector_of_each(data, name, undrawn):
    entry = SUCCESSORS[name]
    options = [*(["--head", "head.npz"] if entry.head else [])]
    options += ["--train", "train.npz", "--train-labels-key", "labels"] if entry.fitted_on else []
    said = run("fit", "val.npz", "--out", "det.safetensors", "--method", name, "--tpr", 0.9, *options).stdout
    assert f"det.safetensors: {name}, fitted on 100 rows" in said
    detector = fastood.Detector(fitted(name, data), tpr=0.9).fit(*data["val"][:2])
    assert fastood.Detector.load("det.safetensors").threshold == detector.threshold
    run("score", "far.npz", "far.csv", "--detector", "det.safetensors")
    assert f'"method": "{name}"' in run("inspect", "det.safetensors", "--json").stdout
    if name == "vim":
        run("eval", "--id", "val.npz", "--ood", "far.npz", "--detector", "det.safetensors", "--html", "a.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "scale"], "--head must be given for scale = energy of r"),
        (["--method", "knn"], "--train must be given for knn: a file of in-distribution rows"),
        (["--method", "scal"], "did you mean 'scale'"),
        (["--method", "scale", "--head", "none.npz"], "none.npz: no such file"),
        (["--method", "scale", "--head", "."], "is a folder"),
        (["--method", "scale", "--head", "val.npz"], r"must hold the last layer's 'weight' [6, 12], found"),
        (["--method", "scale", "--head", "two.npz"], "of which only one can be it"),
        (["--method", "scale", "--head", "wrong.npz"], "feats times its weight must be the logits of val.npz"),
        (["--method", "scale", "--head", "short.npz"], "'bias' must be [6], got [5]"),
        (["--method", "knn", "--train", "narrow.npz"], "must have the columns of val.npz, 6 of logits and 12 of feats"),
        (["--method", "knn", "--train", "nan.npz"], "nan.npz: knn: logits, feats: 1 of 200 rows hold NaN"),
        (["--method", "scale", "--head", "head.npz", "--norm", "2"], "--norm: scale has a norm of its own, or none"),
    ],
)
def test_mistakes(data, arguments, message):
    weight, bias = data["head"]
    np.savez("two.npz", **{"a.weight": weight, "b.weight": weight})
    np.savez("wrong.npz", weight=weight[:, ::-1].copy(), bias=bias)
    np.savez("short.npz", weight=weight, bias=bias[:5])
    logits, feats, _ = data["train"]
    np.savez("narrow.npz", logits=logits, feats=feats[:, 1:])
    spoiled = feats.copy()
    spoiled[4, 1] = np.nan
    np.savez("nan.npz", logits=logits, feats=spoiled)
    for command in (
        ["score", "val.npz", "out.npz", *arguments],
        ["fit", "val.npz", "--out", "det.safetensors", *arguments],
        ["eval", "--id", "val.npz", "--ood", "far.npz", *arguments],
    ):
        assert message in complaint(*command)
    if arguments == ["--method", "scale"]:
        assert "--log: scale has no logarithm" in complaint(
            "score", "val.npz", "out.npz", *arguments, "--log", "--head", "head.npz"
        )
        assert "--engine ray scores lts by a --detector" in complaint(
            "score", "in", "out", "--method", "lts", "--engine", "ray"
        )

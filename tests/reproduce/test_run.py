"""A small run from end to end: its page, its cells against truth, a score that joins, a kill and a resume."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from formulas import lse, softmax
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import fastood
from fastood import reproduce
from fastood.cli import app
from fastood.reproduce import data, networks
from fastood.reproduce.tables import printed

TINY = ["--seeds", "2", "--rows", "120", "--deep-rows", "12"]


def whole(out):
    """What steps made; not what a kill left half written."""
    return [path for path in (out / "cache").rglob("*.safetensors") if not path.name.startswith(".")]


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """A run that was killed after five steps and then run again: its folder, what either run told of, what was kept."""
    out = tmp_path_factory.mktemp("reproduce")
    command = ["reproduce", "digits", "--out", str(out), *TINY]
    told = re.compile(r"\d+/(\d+) (.*)\n")  # of a step that was made: its number, how many there are, what it is
    before = []
    with subprocess.Popen(
        [sys.executable, "-m", "fastood", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as killed:
        for found in filter(None, map(told.fullmatch, killed.stderr)):
            before.append(found[2])
            if len(before) == 5:
                killed.send_signal(signal.SIGKILL)
                break
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "README.md").exists()
    kept = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in whole(out)}

    state = torch.get_rng_state()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert torch.equal(torch.get_rng_state(), state)
    return SimpleNamespace(out=out, before=before, kept=kept, after=told.findall(result.stderr))


@pytest.fixture(scope="module")
def digits(killed_and_resumed):
    return killed_and_resumed.out


def cells(out):
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def outputs(out, network, images, kind="outputs"):
    """float64 numpy, from the only folder of that name."""
    (folder,) = (out / "cache" / kind).glob(f"{network}*seed0/{images}-{'?' * 12}")
    parts = [load_file(path) for path in sorted(folder.iterdir())]
    return {name: np.concatenate([part[name].double().numpy() for part in parts]) for name in parts[0]}


def test_the_page_has_every_table_and_figure(digits):
    page = (digits / "README.md").read_text(encoding="utf-8")
    for heading in (
        "Which claims hold",
        "Traps",
        "Table 1",
        "Table 2",
        "Table 3",
        "Appendix A",
        "Figure 2 and Appendix C",
    ):
        assert f"### {heading} (digits)" in page
    assert "## Figure 1\n" in page
    assert f"fastood reproduce digits --out {digits} {' '.join(TINY)}" in page
    assert "nan" not in page
    pictures = re.findall(r"\]\((.*?\.png)\)", page)
    assert len(pictures) == 6  # Figure 1, Figure 2, and four pairs
    assert set(pictures) == {path.name for path in digits.glob("*.png")}
    table_1 = page.partition("### Table 1")[2].partition("###")[0]
    paper = [f"{x.auroc:.3f} ± {x.deviation:.3f}" for x in printed("Table 1").values()]
    assert [row.split(" | ")[3] for row in table_1.splitlines() if " ± " in row and "|" in row][1:] == paper


def test_cells_are_of_float64_truth(digits):
    """By formulas of their own, from the logits and features on the disk."""
    table = {(c["table"], c["id"], c["ood"], c["score"]): c for c in cells(digits)}
    seeds = json.loads((digits / "results.json").read_text())["suites"][0]

    formulas = {
        "energy": lambda f, h: lse(f),
        "msp*||h||_1": lambda f, h: softmax(f).max(1) * np.abs(h).sum(1),
        "gradnorm": lambda f, h: np.abs(softmax(f) - 1 / f.shape[1]).sum(1) * np.abs(h).sum(1),
        "exgrad": lambda f, h: -(softmax(f) * (1 - softmax(f))).sum(1) * np.abs(h).sum(1),
        "tv": lambda f, h: np.abs(softmax(f) - 1 / f.shape[1]).sum(1),
        "energy*||h||_inf": lambda f, h: lse(f) * np.abs(h).max(1),
    }
    for i, (inside, outside) in enumerate(seeds["pairs"]):
        x, y = (outputs(digits, inside, name) for name in (inside, outside))
        is_id = np.repeat([1, 0], [len(x["logits"]), len(y["logits"])])
        for label, of in formulas.items():
            s = np.concatenate([of(z["logits"], z["feats"]) for z in (x, y)])
            assert seeds["auroc"][label][0][i] == pytest.approx(roc_auc_score(is_id, s), abs=2e-6), (label, inside)
    for label in ("gradnorm", "exgrad"):
        grid = np.array(seeds["auroc"][label])
        cell = table["Table 1", "small", "average", label]
        assert float(cell["auroc"]) == pytest.approx(grid.mean(), abs=2e-6)
        assert float(cell["deviation"]) == pytest.approx(grid.mean(0).std(ddof=1), abs=2e-6)
        assert float(cell["difference"]) == pytest.approx(
            grid.mean() - printed("Table 1")["small", "average", label].auroc, abs=2e-6
        )
        assert float(cell["low"]) < float(cell["auroc"]) < float(cell["high"])
    # A successor that is fitted: the cosine of the nearest class mean of the training images.
    images = data.load(["digits-0-4"], None)["digits-0-4"]
    h = outputs(digits, "digits-0-4", "digits-0-4-learned")["feats"]
    means = np.stack([h[images.train_labels.numpy() == c].mean(0) for c in range(5)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    x, y = (outputs(digits, "digits-0-4", name)["feats"] for name in ("digits-0-4", "photo-patches"))
    cosine = [((z / np.linalg.norm(z, axis=1, keepdims=True)) @ means.T).max(1) for z in (x, y)]
    truth = roc_auc_score(np.repeat([1, 0], [len(x), len(y)]), np.concatenate(cosine))
    assert seeds["auroc"]["class_cosine"][0][1] == pytest.approx(truth, abs=2e-6)
    zero = table["Table 1", "small", "average", "norm_eg_p_l2sq"]
    assert (zero["auroc"], zero["paper"]) == ("0.500000", "0.741000")
    # other sets than the paper's: no cell of a pair is beside one of its
    assert all(not c["paper"] for c in cells(digits) if c["ood"] != "average")


def test_deep_cells_are_of_plain_autograd(digits):
    (path,) = (digits / "cache" / "networks").glob("digits-0-4-*seed0.safetensors")
    images = data.load(["digits-0-4"], None)["digits-0-4"].first(120)
    model = networks.untrained(images)
    model.load_state_dict(load_file(path))
    model.double()  # in float32, autograd subtracts a p_y that has rounded to 1
    found = outputs(digits, "digits-0-4", "digits-0-4", "deep")
    assert len(found["exgrad"]) == 12
    for i in range(3):
        log_p = model(networks.pixels(images.test[i : i + 1], images.train).double())[0].log_softmax(-1)
        norms, uniform = [], log_p.mean()
        for k in range(5):
            grads = torch.autograd.grad(log_p[k], list(model.parameters()), retain_graph=True)
            norms.append(sum(g.double().abs().sum() for g in grads))
        grads = torch.autograd.grad(uniform, list(model.parameters()))
        exgrad = sum(p * n for p, n in zip(log_p.detach().double().exp(), norms, strict=True))
        assert found["exgrad"][i] == pytest.approx(float(exgrad), rel=1e-3)
        assert found["gradnorm"][i] == pytest.approx(float(sum(g.double().abs().sum() for g in grads)), rel=1e-3)


def test_the_networks_learned_and_differ_by_seed(digits):
    page = (digits / "README.md").read_text(encoding="utf-8")
    right = re.findall(r"\| ([\d.]+)% / ([\d.]+)% \|", page)
    assert len(right) == 2
    assert min(float(x) for row in right for x in row) > 90
    first, second = sorted((digits / "cache" / "networks").glob("digits-0-4-*.safetensors"))
    assert not torch.equal(load_file(first)["0.weight"], load_file(second)["0.weight"])


def test_a_score_that_is_registered_joins(digits, tmp_path, undrawn):
    """And nothing is computed anew for it."""
    fastood.register(
        fastood.Score(
            "margin", "T lse - max f", "a test", "out", ("energy", "fmax"), v=lambda s: s["energy"] - s["fmax"]
        )
    )
    made = []
    try:
        reproduce.run(
            tmp_path,
            ["digits"],
            cache=digits / "cache",
            seeds=2,
            rows=120,
            deep_rows=12,
            progress=lambda what, new, done, of: made.append(new),
        )
    finally:
        del fastood.SCORES["margin"]
    assert made
    assert not any(made)
    every = (tmp_path / "README.md").read_text(encoding="utf-8").partition("### Every registered score")[2]
    for name in ("margin", *fastood.SCORES, *fastood.SUCCESSORS):
        assert f"| `{'‖h‖_0.3' if name == 'norm' else name}` |" in every
    before = {tuple(c.items()) for c in cells(digits)}
    after = {tuple(c.items()) for c in cells(tmp_path)}
    assert before < after


def test_a_run_goes_on_where_it_was_killed(killed_and_resumed):
    out, before, kept, after = vars(killed_and_resumed).values()
    assert len(kept) >= 5
    # A step that ended before the kill may not have been told of.
    assert {int(steps) for steps, _ in after} == {len(kept) + len(after)}
    assert not set(before) & {what for _, what in after}
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept} == kept
    assert len(whole(out)) == len(kept) + len(after)


def test_a_command_says_what_is_wrong_in_a_line(tmp_path):
    for arguments, said in {
        ("imagenet",): "model must be given for the suite 'imagenet': timm:NAME or torchvision:NAME",
        ("imagenet", "--model", "timm:x", "--data", str(tmp_path)): "ImageNet is not in",
        ("digit",): "SUITE must be one of",
        ("digits", "--seeds", "0"): "seeds must be 1 or more, got 0",
        ("digits", "--out", __file__): "is a file; a folder is wanted",
    }.items():
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        result = CliRunner().invoke(app, ["reproduce", *arguments, *out])
        assert result.exit_code == 2
        assert said in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_pages_of_the_documentation_have_their_pictures():
    folder = Path(__file__).parents[2] / "docs" / "reproduce"
    pictures = re.findall(r"\]\((.*?\.png)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert set(pictures) == {path.name for path in folder.glob("*.png")}

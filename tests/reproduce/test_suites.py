"""The paper's own sets and models, stood in for: the road from files to cells beside the paper's."""

import csv
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastood import reproduce
from fastood.cli import app
from fastood.reproduce import networks, tables
from fastood.reproduce.tables import printed

RANDOM = np.random.default_rng(0)


def cells(out):
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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


def test_the_imagenet_benchmark_from_folders(tmp_path, monkeypatch, undrawn):
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


def test_the_papers_small_sets_through_torchvision(tmp_path, monkeypatch, undrawn):
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

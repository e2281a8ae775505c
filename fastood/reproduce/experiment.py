"""What is computed once and kept on the disk: networks, logits and features, gradients by all parameters.

A *step* makes one file of a cache. The file appears whole or not at all, under a name that says which network and
which images it is of, so what is there is never made again, by whatever run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastood._attach import Attached, attach
from fastood._batchgrad import anchor_gradient, batchgrad
from fastood._collect import collect
from fastood._data import label_of
from fastood.api import PAPER_NORMS, PAPER_V
from fastood.deep import deep_batchgrad, deep_gradient_norm
from fastood.evaluation import Scores, score_rows
from fastood.files import atomic
from fastood.registry import NORM, SCORES, TABLE_1
from fastood.reproduce import networks
from fastood.reproduce.data import Images, Suite, digest
from fastood.reproduce.tables import NAIVE, Pairs, deep, same_rows
from fastood.successors import SUCCESSORS, Fitted

_BATCH = 64
_ROWS = 512  # images whose logits and features are one file
_DEEP_ROWS = 50  # and whose gradients are
FITTED_ON = 5000  # training images that scores are fitted on which need any


class Step(NamedTuple):
    """One file to make: where, what to say of it, and how."""

    path: Path
    what: str
    make: Callable[[], dict[str, Tensor]]


def carry_out(steps: Iterable[Step], progress: Callable[[str, bool], object]) -> None:
    """Make the files that are not there yet, in order.

    `progress` is called after each step with what it is, and whether it was made now.
    """
    from safetensors.torch import save

    for step in steps:
        new = not step.path.exists()
        if new:
            step.path.parent.mkdir(parents=True, exist_ok=True)
            data = save({name: x.contiguous() for name, x in step.make().items()})
            with atomic(step.path) as temporary:
                temporary.write_bytes(data)
        progress(step.what, new)


def stored(paths: Iterable[Path]) -> dict[str, Tensor]:
    """The files of one thing, row after row."""
    from safetensors.torch import load_file

    parts = [load_file(path) for path in paths]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Settings:
    """How much is computed, and where."""

    cache: Path
    seeds: int
    rows: int | None
    deep_rows: int
    device: torch.device


class Network:
    """A classifier of one ID set, and the files that hold what is known of it."""

    def __init__(self, images: Images, seed: int, settings: Settings, spec: str | None) -> None:
        self.images, self.seed, self.settings, self.spec = images, seed, settings, spec

    @cached_property
    def pretrained(self) -> networks.Pretrained:
        assert self.spec
        return networks.pretrained(self.spec)

    @cached_property
    def key(self) -> str:
        if self.spec:
            return self.pretrained.key
        recipe = networks.RECIPES[self.images.name]
        return f"{self.images.train_key}-{digest(recipe, str(networks.untrained(self.images)))}-seed{self.seed}"

    @property
    def weights(self) -> Path:
        return self.settings.cache / "networks" / f"{self.key}.safetensors"

    @cached_property
    def model(self) -> nn.Module:
        if self.spec:
            return self.pretrained.model.to(self.settings.device)
        from safetensors.torch import load_file

        model = networks.untrained(self.images)
        model.load_state_dict(load_file(self.weights))
        return model.to(self.settings.device)

    @cached_property
    def attached(self) -> Attached:
        return attach(self.model)

    def inputs(self, images: Any) -> Tensor:
        if self.spec:
            return networks.inputs(images, self.pretrained.transform)
        assert self.images.train is not None
        return networks.pixels(images, self.images.train)

    @cached_property
    def anchors(self) -> tuple[Tensor, Tensor]:
        """A training image of each class, and the classes."""
        assert self.images.train is not None
        assert self.images.train_labels is not None
        y = self.images.train_labels
        first = torch.stack(
            [(y == c).nonzero()[self.seed % int((y == c).sum()), 0] for c in range(self.images.classes)]
        )
        return self.inputs(self.images.train[first]).to(self.settings.device), y[first].to(self.settings.device)

    @cached_property
    def learned(self) -> Images:
        """The first training images as a set of their own, for what is fitted on them; they are in random order."""
        x, y = self.images.train, self.images.train_labels
        assert x is not None
        assert y is not None
        return Images(f"{self.images.name}-learned", x[:FITTED_ON], "", y[:FITTED_ON])

    @cached_property
    def successors(self) -> dict[str, Fitted]:
        """Those that can be had: fitted where there are training images, which have to leave ``vim`` a residual."""
        head, found = self.attached.head, {}
        for name, entry in SUCCESSORS.items():
            if entry.fitted_on and self.spec:
                continue
            fitted = Fitted(name, head=head) if entry.head else Fitted(name)
            if entry.fitted_on:
                rows = stored(self.outputs_of(self.learned))
                try:
                    fitted.fit(rows["logits"].double(), rows["feats"].double(), self.learned.test_labels)
                except ValueError:
                    continue
            found[name] = fitted
        return found

    def files(self, kind: str, images: Images, rows: int, each: int) -> dict[Path, slice]:
        """Path -> which images it is of."""
        folder = self.settings.cache / kind / self.key
        bounds = [slice(i, min(i + each, rows)) for i in range(0, rows, each)]
        return {folder / images.key / f"{s.start:06}-{s.stop:06}.safetensors": s for s in bounds}

    def outputs_of(self, images: Images) -> dict[Path, slice]:
        return self.files("outputs", images, len(images.test), _ROWS)

    def deep_of(self, images: Images) -> dict[Path, slice]:
        return self.files("deep", images, min(len(images.test), self.settings.deep_rows), _DEEP_ROWS)

    def training(self) -> Iterator[Step]:
        def make() -> dict[str, Tensor]:
            model = networks.trained(self.images, self.seed, self.settings.device)
            return {name: x.cpu() for name, x in model.state_dict().items()}

        if not self.spec:
            yield Step(self.weights, f"{self.images.name}, seed {self.seed}: training", make)

    def collecting(self, images: Images) -> Iterator[Step]:
        def make(rows: slice) -> dict[str, Tensor]:
            whole = range(len(images.test))[rows]
            parts = (slice(i, min(i + _BATCH, whole.stop)) for i in range(whole.start, whole.stop, _BATCH))
            logits, feats, _ = collect(self.attached, (self.inputs(images.test[p]) for p in parts), progress=False)
            return {"logits": logits, "feats": feats}

        for path, rows in self.outputs_of(images).items():
            what = f"{self._name}: logits and features of {images.name} {rows.start}-{rows.stop}"
            yield Step(path, what, partial(make, rows))

    def deepening(self, images: Images) -> Iterator[Step]:
        def make(rows: slice) -> dict[str, Tensor]:
            x = self.inputs(images.test[rows]).to(self.settings.device)
            found = {e.name: deep_gradient_norm(self.model, x, **e.gradient) for e in TABLE_1 if e.gradient}
            found["batchgrad"] = deep_batchgrad(self.model, x, *self.anchors, oriented=False)
            return {name: raw.cpu() for name, raw in found.items()}

        for path, rows in self.deep_of(images).items():
            what = f"{self._name}: gradients by all parameters of {images.name} {rows.start}-{rows.stop}"
            yield Step(path, what, partial(make, rows))

    @property
    def _name(self) -> str:
        return self.spec or f"{self.images.name}, seed {self.seed}"

    def accuracy(self) -> float | None:
        """On its own test images; None where they have no labels."""
        if self.images.test_labels is None:
            return None
        logits = stored(self.outputs_of(self.images))["logits"]
        return float((logits.argmax(1) == self.images.test_labels).double().mean())

    def scores(self, images: Images) -> dict[str, Scores]:
        """Label -> [N] of one set: all that the tables have, and every registered score; shorter where deep."""
        outputs = stored(self.outputs_of(images))
        f, h = outputs["logits"], outputs["feats"]
        norms = (None, *PAPER_NORMS)
        columns = score_rows([(f, h)]) | score_rows([(f, h)], methods=PAPER_V, norms=norms)
        columns[label_of(NORM, 1)] = score_rows([(f, h)], methods=["norm"], norms=[1])[label_of(NORM, 1)]
        columns[NAIVE] = rounding_noise(f, h)
        for name, fitted in self.successors.items():
            columns[name] = fitted.score(f.double(), h.double()).numpy()
        if self.spec:
            return columns
        x, y = self.anchors
        anchor_logits, anchor_feats, _ = collect(self.attached, [x], progress=False)
        G = anchor_gradient(anchor_logits.double(), anchor_feats.double(), y.cpu())
        columns["batchgrad"] = batchgrad(f.double(), h.double(), G).numpy()
        for name, raw in stored(self.deep_of(images)).items():
            turned = -1 if name == "batchgrad" else SCORES[name].sign(oriented=True)
            columns[deep(name)] = turned * raw.double().numpy()
            columns[same_rows(name)] = columns[name][: len(raw)]
        return columns


def rounding_noise(logits: Tensor, feats: Tensor) -> Scores:
    """|| E_p[grad log p] ||_2^2, which is 0, as autograd has it in float32: the rounding of sums that cancel. [N].

    Not oriented: what it would be larger for nobody can say.
    """
    f = logits.float().clone().requires_grad_()
    log_p = f.log_softmax(-1)
    (off,) = torch.autograd.grad((log_p.exp().detach() * log_p).sum(), f)
    noise: Scores = (off.double().square().sum(-1) * feats.double().square().sum(-1)).numpy()
    return noise


class Experiment:
    """A suite with its data: the steps that it takes, and what comes of them."""

    def __init__(self, suite: Suite, images: dict[str, Images], settings: Settings, model: str | None) -> None:
        self.suite, self.settings = suite, settings
        self.images = {name: images[name].first(settings.rows or suite.rows) for name in suite.sets}
        self.spec = None if suite.scale == "small" else model
        seeds = range(1 if self.spec else settings.seeds)
        self.networks = {
            (name, seed): Network(self.images[name], seed, settings, self.spec) for name in suite.ids for seed in seeds
        }

    def steps(self) -> Iterator[Step]:
        for (name, _), network in self.networks.items():
            sets = [name, *(b for a, b in self.suite.pairs if a == name)]
            yield from network.training()
            if not self.spec:
                yield from network.collecting(network.learned)
            for other in sets:
                yield from network.collecting(self.images[other])
            for other in sets if not self.spec else ():
                yield from network.deepening(self.images[other])

    def pairs(self) -> Pairs:
        scores = {
            (name, seed): {
                other: network.scores(self.images[other])
                for other in (name, *(b for a, b in self.suite.pairs if a == name))
            }
            for (name, seed), network in self.networks.items()
        }
        groups = {name: np.asarray(x.groups) for name, x in self.images.items() if x.groups is not None}
        return Pairs(self.suite.pairs, scores, groups)

"""The paper's tables and figures on real data that needs no download: scikit-learn's handwritten digits.

A small network learns the digits 0 to 6. Its ID test set are images of those that it never saw; its
OOD sets are the digits 7 to 9, and 8 x 8 patches of the photographs that scikit-learn ships.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fastood import plots
from fastood._attach import attach
from fastood._batchgrad import anchor_gradient, batchgrad
from fastood._collect import collect
from fastood._fork import one_thread_if_forked
from fastood.api import BEST_NORM, PAPER_V
from fastood.deep import deep_gradient_norm
from fastood.detector import Detector
from fastood.evaluation import Evaluation, Scores, evaluate, score_rows, sweep_auroc
from fastood.files import FileError, atomic
from fastood.registry import SCORES
from fastood.report import write_html

_KNOWN = 7  # the digits 0 to 6
_PHOTO_PATCHES = 300


class Demo(NamedTuple):
    """What ``run`` found, and the files that it wrote."""

    evaluation: Evaluation
    written: list[Path]
    detector: Detector
    accepted: dict[str, tuple[int, int]]
    """Set -> how many rows the detector accepted, of how many. "ID" are those that it was not fitted on."""


def run(out: str | os.PathLike[str], seed: int = 0, progress: Callable[[str], object] = print) -> Demo:
    """Train, score and evaluate; takes about ten seconds. The same seed gives the same numbers.

    Every score of ``fastood.SCORES`` is there, the V terms alone and (those that take a norm by default) times
    ||h||_0.3 and ||h||_1; the gradient scores also "deep", by all of the network's parameters; and BatchGrad. A
    detector of the energy is fitted on half of the ID test images, and decides on the others and the OOD sets.

    Parameters
    ----------
    out : path
        A folder, made where it is missing. Into it go the table (scores.csv, scores.json), report.html,
        figure1_simplex.png, figure2_heatmap.png, histograms.png, and to go on with the detector (detector.safetensors)
        and the network's logits and feats, one file per set (id.npz, ood_digits_7-9.npz, ood_photos.npz).
    seed : int
        Of the split, the network and the patches. torch's global generator is left as it was.
    progress : callable
        Called with a line of text at each step.

    Examples
    --------
    >>> from fastood import demo
    >>> found = demo.run("fastood-demo")  # doctest: +SKIP
    >>> found.accepted  # doctest: +SKIP
    """
    one_thread_if_forked()
    out = Path(out)
    if out.is_file():
        raise FileError(f"{out}: is a file; a folder is wanted to write to")
    out.mkdir(parents=True, exist_ok=True)
    train, train_labels, test, test_labels, ood = _images(seed)
    progress(f"training on {len(train)} images of the digits 0 to {_KNOWN - 1}")
    model = _trained(train, train_labels, seed)
    sets = {"id": test, **{f"ood_{name}": x for name, x in ood.items()}}
    attached = attach(model, example=test[:1])
    outputs = {name: collect(attached, [x], progress=False)[:2] for name, x in sets.items()}
    accuracy = (outputs["id"][0].argmax(-1) == test_labels).double().mean()
    progress(f"{accuracy:.1%} of {len(test)} test images right; scoring them and the OOD sets")

    anchors = torch.stack([(train_labels == c).nonzero()[0, 0] for c in range(_KNOWN)])
    anchor_logits, anchor_feats, _ = collect(attached, [train[anchors]], progress=False)
    G = anchor_gradient(anchor_logits.double(), anchor_feats.double(), train_labels[anchors])
    multiplied = [entry.name for entry in SCORES.values() if entry.multiplied]
    scores: dict[str, dict[str, Scores]] = {}
    for name, (logits, feats) in outputs.items():
        scores[name] = score_rows([(logits, feats)])
        scores[name] |= score_rows([(logits, feats)], methods=multiplied, norms=(1,))
        scores[name]["batchgrad"] = batchgrad(logits.double(), feats.double(), G).numpy()
        progress(f"gradients by all parameters: {name}")
        scores[name] |= _deep_scores(model, sets[name])
    evaluation = evaluate(scores["id"], {name: scores[f"ood_{name}"] for name in ood})

    validation, others = test[::2], {"ID": test[1::2], **ood}  # in the random order of the split
    detector = Detector("energy", norm=None).fit_loader(attached, [validation], progress=False)
    accepted = {name: _accepted(attach(model, detector=detector), x) for name, x in others.items()}
    flagged = ", ".join(f"{1 - n / rows:.1%} of {name}" for name, (n, rows) in accepted.items())
    progress(f"a detector of the energy, fitted on {len(validation)} of the test images, flags {flagged}")

    written: list[Path] = []

    def new(name: str) -> Path:
        written.append(out / name)
        return written[-1]

    progress(f"writing tables, figures and the report to {out}")
    for name, (logits, feats) in outputs.items():
        with atomic(new(f"{name}.npz")) as temporary:
            np.savez(temporary, logits=logits.numpy(), feats=feats.numpy())
    detector.save(new("detector.safetensors"))
    evaluation.to_csv(new("scores.csv"))
    evaluation.to_json(new("scores.json"))
    norms = plots.FIGURE_2_NORMS
    grid = sweep_auroc([outputs["id"]], {name: [outputs[f"ood_{name}"]] for name in ood}, norms=norms)
    simplex, heatmap = plots.simplex(), plots.heatmap(grid, PAPER_V, norms)
    best = evaluation.recommendation.score
    ood_scores = {name: columns[best] for name, columns in evaluation.ood_scores.items()}
    _save(simplex, new("figure1_simplex.png"))
    _save(heatmap, new("figure2_heatmap.png"))
    _save(plots.histograms(evaluation.id_scores[best], ood_scores, best), new("histograms.png"))
    figures = {
        plots.FIGURE_2: heatmap,
        "What the V terms look like (Figure 1 of the paper)": simplex,
    }
    title, decisions = "fastood on handwritten digits", (detector, accepted)
    write_html(new("report.html"), evaluation, title=title, figures=figures, decisions=decisions)
    return Demo(evaluation, sorted(written), detector, accepted)


def conclusion(evaluation: Evaluation) -> str:
    """A line on what energy reaches on ``run``'s images without and with the norm.

    Examples
    --------
    >>> print(demo.conclusion(demo.run("fastood-demo").evaluation))  # doctest: +SKIP
    """
    mean = {row["score"]: row["auroc"] for row in evaluation.table() if row["ood"] == "average"}
    default = f"energy*||h||_{BEST_NORM:g}"
    return (
        f"AUROC, mean over the OOD sets: energy alone {mean['energy']:.6f}; {default}, the default of fastood.score, "
        f"{mean[default]:.6f}."
    )


def _images(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Training and test images [N, 64] in 0..1 with their labels, and the OOD sets."""
    digits = load_digits()
    known = digits.target < _KNOWN
    split = train_test_split(
        digits.data[known], digits.target[known], test_size=0.4, stratify=digits.target[known], random_state=seed
    )
    train, test, train_labels, test_labels = split
    greys = [photo.mean(-1) for photo in load_sample_images().images]  # 0..255
    patches = [
        extract_patches_2d(g, (8, 8), max_patches=_PHOTO_PATCHES // len(greys), random_state=seed) for g in greys
    ]
    ood = {"digits_7-9": digits.data[~known] / 16, "photos": np.concatenate(patches).reshape(-1, 64) / 255}

    def images(x: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(x).float()

    labels = (torch.from_numpy(y).long() for y in (train_labels, test_labels))
    return images(train / 16), next(labels), images(test / 16), next(labels), {k: images(x) for k, x in ood.items()}


def _trained(images: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, _KNOWN))
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(40):
            for batch in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    return model.eval()


@torch.no_grad()
def _accepted(served: nn.Module, images: Tensor) -> tuple[int, int]:
    _, _, _, accept = served(images)
    return int(accept.sum()), len(images)


def _deep_scores(model: nn.Sequential, images: Tensor) -> dict[str, Scores]:
    """The Deep rows of Table 1, turned the way their shallow kin are."""
    columns = {}
    for name, entry in SCORES.items():
        if entry.gradient:
            raw = deep_gradient_norm(model, images, **entry.gradient).double().numpy()
            columns[f"deep {name}"] = raw if entry.higher == "in" else -raw
    return columns


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)

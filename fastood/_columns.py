"""The columns that scoring adds to rows, and how they were made: of scores, and of a detector's decisions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastood._data import label_of
from fastood._inputs import Order
from fastood._version import __version__
from fastood.api import _order as order_or_default
from fastood.api import scores
from fastood.detector import Detector
from fastood.registry import SCORES, Score
from fastood.successors import Fitted

Columns = dict[str, NDArray[Any]]


class Work(NamedTuple):
    """`columns(logits, feats)` gives columns, label -> [n]; `labels` are those of them that are scores.

    `used` are those of "logits" and "feats" that it reads, `metadata` says how the columns were made.
    """

    labels: list[str]
    used: set[str]
    metadata: dict[str, Any]
    columns: Callable[[Tensor | None, Tensor | None], Columns]


def of_scores(
    classes: int | None,
    dim: int | None,
    methods: list[str] | None,
    order: Order,
    successors: Sequence[Fitted] = (),
    *,
    backend: str,
    **options: Any,
) -> Work:
    """Scores of logits of so many columns and feats of so many, None where there are none; then the successors."""
    # The scores of no rows: which there will be, and what is refused is refused before any row is read.
    no_rows = [None if width is None else torch.empty(0, width) for width in (classes, dim)]
    none = scores(no_rows[0], no_rows[1], methods, norm=order, **options, backend="reference")
    entries = [SCORES[name] for name in none]
    orders = [order_or_default(e, "auto" if e.gradient else order, dim is not None) for e in entries]
    log, oriented = options["log"], options["oriented"]
    paper = {e.name: label_of(e, r, log=log, oriented=oriented) for e, r in zip(entries, orders, strict=True)}
    labels = paper | {fitted.method: "raw " * (not oriented) + fitted.method for fitted in successors}

    def columns(logits: Tensor | None, feats: Tensor | None) -> Columns:
        found: dict[str, Any] = scores(logits, feats, list(paper), norm=order, **options, backend=backend)
        found |= {x.method: x.score(logits, feats, oriented=oriented, backend=backend) for x in successors}
        return {labels[name]: x.cpu().numpy() for name, x in found.items()}

    used = used_by(zip(entries, orders, strict=True)).union(*(fitted.entry.needs for fitted in successors))
    metadata = {"fastood": __version__, "method": list(labels), "norm": orders + [None] * len(successors), **options}
    return Work([*labels.values()], used, metadata, columns)


def of_detector(detector: Detector, backend: str) -> Work:
    """Its score, whether it accepts, and the p-value."""
    named = detector._label()

    def columns(logits: Any, feats: Any) -> Columns:
        logits, feats = _as_fitted(logits, detector.classes), _as_fitted(feats, detector.dim)
        s, c = detector._scored(logits, feats, backend)
        p = detector._p_values(s, c)
        return {k: x.cpu().numpy() for k, x in {named: s, "accept": p > 1 - detector.tpr, "p_value": p}.items()}

    settings = facts(detector)
    metadata = {
        "fastood": __version__,
        "method": [settings["method"]],
        "norm": [settings["norm"]],
        "temperature": settings["temperature"],
        "bias": settings["bias"],
        "log": False,
        "oriented": True,
        "detector": {**settings, "threshold": thresholds(detector)},
    }
    return Work([named], read_by(detector), metadata, columns)


def _as_fitted(x: Tensor | None, width: int | None) -> Tensor | None:
    """`x`; of no rows, whose lists in a table have no length, in the width that the detector was fitted on."""
    return x if x is None or len(x) or width is None else x.new_empty(0, width)


def used_by(columns: Iterable[tuple[Score, Order]]) -> set[str]:
    """What scores times norms of these orders are computed from."""
    return {name for entry, r in columns for name in (*entry.needs, *(() if r is None else ("feats",)))}


def read_by(detector: Detector) -> set[str]:
    return {name for name, width in (("logits", detector.classes), ("feats", detector.dim)) if width is not None}


def facts(detector: Detector) -> dict[str, Any]:
    """The settings, and what it was fitted on. A norm is the one that was decided, not what it was decided by."""
    return {**detector._settings(), "rows": detector.rows}


def thresholds(detector: Detector) -> float | list[float]:
    limit = detector.threshold
    return limit if isinstance(limit, float) else limit.tolist()


def as_json(facts: Mapping[str, Any]) -> dict[str, str]:
    """For the metadata of a file."""
    return {name: json.dumps(finite(fact)) for name, fact in facts.items()}


def finite(fact: Any) -> Any:
    """For JSON, which has no infinity: "inf", as a norm's order may be."""
    if isinstance(fact, dict):
        return {name: finite(x) for name, x in fact.items()}
    if isinstance(fact, list):
        return [finite(x) for x in fact]
    return "inf" if fact == math.inf else fact

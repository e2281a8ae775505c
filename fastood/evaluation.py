"""From logits and features to a table of metrics: scores of whole sets in float64, then fastood.metrics."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isfinite
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastood import metrics
from fastood._data import label_of
from fastood._fork import one_thread_if_forked
from fastood._inputs import choice, order_of, vector
from fastood._version import __version__
from fastood.api import BEST_NORM, PAPER_NORMS, PAPER_V, scores, sweep
from fastood.api import norms as norms_of
from fastood.files import atomic
from fastood.recommendation import METHOD, Recommendation, recommend
from fastood.registry import SCORES
from fastood.successors import Fitted

Scores = NDArray[np.float64]
Chunks = Iterable[tuple[Tensor | None, Tensor | None]]

CONVENTION = {
    "scores": "Higher = more in-distribution (ID), for every score; those of the paper that rise for OOD are negated.",
    "auroc": "Chance that an ID input scores above an OOD one, ties counted half. 1 is perfect, 0.5 is chance.",
    "fpr95_in": "Share of OOD inputs accepted where at least 95% of ID inputs are: ID is positive. Lower is better.",
    "fpr95_out": "Share of ID inputs rejected where at least 95% of OOD inputs are: OOD is positive. Lower is better.",
    "aupr_in": "Average precision with ID as the positive class. Higher is better; chance is the share of ID.",
    "aupr_out": "Average precision with OOD as the positive class. Higher is better; chance is the share of OOD.",
}


def score_rows(
    chunks: Chunks,
    *,
    methods: Sequence[str] | None = None,
    norms: Sequence[float | None] | Literal["auto"] = "auto",
    temperature: float = 1.0,
    bias: bool = False,
    backend: str = "auto",
    successors: Sequence[Fitted] = (),
) -> dict[str, Scores]:
    """Scores of a whole set that comes in chunks: label -> float64 [N]. Higher = more in-distribution.

    Everything is computed in float64, whatever the chunks are stored in: in float32 the MSP of a
    confident network is 1 for many rows, and those ties change a metric.

    Parameters
    ----------
    chunks : iterable of (logits [n, C], feats [n, D])
        Tensors; None for the one that is not at hand, in every chunk alike.
    methods : sequence of str, optional
        Names in ``fastood.SCORES``. Left out: every score that the inputs allow.
    norms : sequence of float or None, optional
        The orders r of U = ||h||_r; None is U = 1. Each V term comes once per entry, as "energy" or
        "energy*||h||_0.3"; "norm" once per order, as "||h||_0.3"; a gradient score once, under its name.
        Without feats only None applies, and the orders beside it are left out. Left out: None and 0.3,
        and None alone for a V that is never above 0, which a larger norm would lower.
    temperature, bias, backend
        As in ``fastood.score``.
    successors : sequence of Fitted
        Scored beside the methods, each under its method's name.

    Raises
    ------
    ValueError
        Where a score asked for by name lacks its inputs, or there is nothing to score.

    Examples
    --------
    >>> import torch
    >>> from fastood.evaluation import score_rows
    >>> chunk = torch.tensor([[4.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    >>> score_rows([chunk, chunk], methods=["tv"], norms=(None, 2))
    {'tv': array([0.48201379, 0.48201379]), 'tv*||h||_2': array([2.41006895, 2.41006895])}
    """
    one_thread_if_forked()
    by_default = isinstance(norms, str)
    asked = (None, BEST_NORM) if isinstance(norms, str) else norms
    orders = [None if r is None else order_of("norms", r) for r in asked]
    parts: dict[str, list[Scores]] = {}
    for logits, feats in chunks:
        f, h = (None if x is None else x.detach().double() for x in (logits, feats))
        found = _score_chunk(f, h, methods, orders, by_default, temperature, bias, backend)
        found |= {fitted.method: fitted.score(f, h, backend=backend) for fitted in successors}
        for name, s in found.items():
            parts.setdefault(name, []).append(s.cpu().numpy())
    if not parts:
        raise ValueError("nothing to score: there is no chunk, or no score that these inputs and norms allow")
    columns = {name: np.concatenate(part) for name, part in parts.items()}
    _same_length("chunks: logits and feats must be given in all of them or in none", columns)
    return columns


def _score_chunk(
    f: Tensor | None,
    h: Tensor | None,
    methods: Sequence[str] | None,
    orders: Sequence[float | None],
    by_default: bool,
    temperature: float,
    bias: bool,
    backend: str,
) -> dict[str, Tensor]:
    given = {name for name, x in (("logits", f), ("feats", h)) if x is not None}
    if methods is None:
        methods = [name for name, entry in SCORES.items() if given.issuperset(entry.needs)]
    elif h is None and "norm" in methods:
        raise ValueError("feats must be given: norm = ||h||_r")
    if h is None and orders and None not in orders:
        raise ValueError(f"feats must be given for norm={orders[0]:g}; without them U is 1, norm None")
    # One read of the logits and one of the features give every V and every U; U * V is their product.
    options: Any = {"bias": bias, "backend": backend}
    with_v = [name for name in methods if name != "norm"]
    v = scores(f, h, with_v, norm=None, temperature=temperature, **options) if with_v else {}
    given_orders = [r for r in orders if r is not None]
    u = norms_of(h, given_orders, **options).unbind(-1) if h is not None and given_orders else ()
    us = dict(zip(given_orders, u, strict=h is not None))
    columns: dict[str, Tensor] = {}
    for name in methods:
        entry = SCORES[name]
        alone = entry.gradient or None in orders
        if entry.stats and alone:
            columns[label_of(entry, None)] = v[name]
        if entry.multiplied or not (entry.gradient or by_default):
            columns |= {label_of(entry, r): v[name] * x if entry.stats else x for r, x in us.items()}
    return columns


def settle_nan(columns: Mapping[str, Scores], nan: str) -> dict[str, Scores]:
    """The scores of one set, label -> [N], with its NaN dealt with by one rule.

    Parameters
    ----------
    columns : mapping
        What ``score_rows`` gives.
    nan : {"drop", "keep", "fail"}
        "drop" leaves a row out of all columns where one of them is NaN, so that all scores are of the same rows.
        "keep" counts NaN as -inf, the lowest score: ``score >= threshold`` is False for NaN too. "fail" changes
        nothing, and ``evaluate`` refuses NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from fastood.evaluation import settle_nan
    >>> settle_nan({"msp": np.array([0.9, np.nan])}, "drop")
    {'msp': array([0.9])}
    """
    choice("nan", nan, ("drop", "keep", "fail"))
    if nan == "keep":
        return {name: np.where(np.isnan(x), -np.inf, x) for name, x in columns.items()}
    if nan == "drop":
        whole = ~np.any([np.isnan(x) for x in columns.values()], axis=0)
        return {name: x[whole] for name, x in columns.items()}
    return dict(columns)


@dataclass(frozen=True)
class Evaluation:
    """Scores of an ID set and of OOD sets, with how well each score tells them apart. ``evaluate`` makes one.

    Parameters
    ----------
    id_scores : dict
        Label -> float64 [N].
    ood_scores : dict
        Name of the OOD set -> label -> float64 [M].
    rows : list of dict
        What ``table`` returns.
    """

    id_scores: dict[str, Scores]
    ood_scores: dict[str, dict[str, Scores]]
    rows: list[dict[str, Any]]

    def table(self) -> list[dict[str, Any]]:
        """One row per OOD set and score, with keys "ood", "score" and the metrics: "auroc", "fpr95_in",
        "fpr95_out", "aupr_in", "aupr_out" (``fastood.metrics`` says what they are).

        Sets come in the order given, the scores of each by their AUROC on it, the highest first. Where there
        are several OOD sets, rows with "ood" == "average" lead: the plain mean over them.
        """
        return [dict(row) for row in self.rows]

    @cached_property
    def recommendation(self) -> Recommendation:
        """Which score to use, how sure that is, and the threshold for 95% of the ID rows: see ``Recommendation``.

        Chosen on one half of the rows and judged on the other. Takes less time than ``evaluate`` did, and is kept.

        Examples
        --------
        >>> from fastood.evaluation import evaluate
        >>> recommendation = evaluate({"msp": [0.9, 0.8]}, {"noise": {"msp": [0.85]}}).recommendation
        >>> recommendation.score, recommendation.threshold, recommendation.accepted
        ('msp', 0.8, {'noise': 1})
        """
        return recommend(self.id_scores, self.ood_scores)

    def best(self, n: int, ood: str | None = None) -> list[str]:
        """The `n` scores of highest AUROC on one OOD set, or on the mean over them; ties in the order given."""
        of_label: dict[str, list[float]] = {label: [] for label in self.id_scores}
        for row in self.rows:
            if row["ood"] == ood or (ood is None and row["ood"] in self.ood_scores):
                of_label[row["score"]].append(row["auroc"])
        return sorted(of_label, key=lambda label: -fmean(of_label[label]))[:n]

    def counts(self) -> dict[str, Any]:
        """{"id": N, "ood": {name: M}}: how many inputs each set has."""
        return {"id": _rows_of(self.id_scores), "ood": {name: _rows_of(s) for name, s in self.ood_scores.items()}}

    def to_json(self, path: str | os.PathLike[str], **more: Any) -> None:
        """The recommendation and the table with version, counts and conventions, and what `more` names, as JSON.

        A threshold that is infinite is a string, "inf" or "-inf": JSON has no such number.
        """
        found = self.recommendation
        fields = asdict(found)
        counts, t = fields.pop("counts"), fields.pop("threshold")
        document = {
            "fastood": __version__,
            "convention": CONVENTION,
            "counts": counts,
            "recommendation": {
                **fields,
                "threshold": t if isfinite(t) else str(t),
                "tied": found.tied,
                "doubt": found.doubt,
                "method": METHOD,
            },
            "results": self.rows,
            **more,
        }
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """The table as CSV, its keys as the header."""
        with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ("ood", "score", *metrics.METRICS), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def evaluate(id_scores: Mapping[str, ArrayLike], ood_scores: Mapping[str, Mapping[str, ArrayLike]]) -> Evaluation:
    """Every metric of every score, ID against each OOD set.

    Parameters
    ----------
    id_scores : mapping
        Label -> scores [N], higher = more in-distribution: what ``score_rows`` gives.
    ood_scores : mapping
        Name of an OOD set -> the same labels -> scores [M].

    Raises
    ------
    ValueError
        Naming score and set, where scores hold NaN, are missing, or differ in length within a set.
    TypeError
        Where scores are a masked array: whether masked rows count is not for a metric to decide.

    Examples
    --------
    >>> from fastood.evaluation import evaluate
    >>> evaluate({"msp": [0.9, 0.8]}, {"noise": {"msp": [0.85]}}).table()[0]["auroc"]
    0.5
    """
    if not id_scores or not ood_scores:
        raise ValueError("id_scores must hold at least one score, and ood_scores at least one set")
    if len(ood_scores) > 1 and "average" in ood_scores:
        raise ValueError("ood_scores: 'average' is the name of the mean over sets; call the set something else")
    inside = _vectors("the ID set", id_scores)
    outside = {name: _vectors(f"OOD set {name!r}", s) for name, s in ood_scores.items()}
    for name, columns in outside.items():
        if odd := sorted(inside.keys() ^ columns.keys()):
            raise ValueError(f"OOD set {name!r} must have the scores of the ID set; only one of them has {odd[0]!r}")
    sections: dict[str, dict[str, dict[str, float]]] = {
        name: {
            label: {m: metric(s, columns[label]) for m, metric in metrics.METRICS.items()}
            for label, s in inside.items()
        }
        for name, columns in outside.items()
    }
    if len(outside) > 1:
        means = {
            label: {m: fmean(section[label][m] for section in sections.values()) for m in metrics.METRICS}
            for label in inside
        }
        sections = {"average": means, **sections}
    rows = [
        {"ood": name, "score": label, **found}
        for name, section in sections.items()
        for label, found in sorted(section.items(), key=lambda item: -item[1]["auroc"])
    ]
    return Evaluation(inside, outside, rows)


def sweep_auroc(
    id_chunks: Chunks,
    ood_chunks: Mapping[str, Chunks],
    v: Sequence[str] = PAPER_V,
    norms: Sequence[float | None] = PAPER_NORMS,
    *,
    temperature: float = 1.0,
    bias: bool = False,
    nan: str = "fail",
    backend: str = "auto",
) -> NDArray[np.float64]:
    """AUROC of every V times every ||h||_r, averaged over the OOD sets: [V, P], the picture of Figure 2.

    Parameters
    ----------
    id_chunks : iterable of (logits [n, C], feats [n, D])
    ood_chunks : mapping
        Name of an OOD set -> its chunks.
    v, norms, temperature, bias, backend
        As in ``fastood.sweep``; computed in float64.
    nan : {"fail", "drop", "keep"}
        What becomes of rows whose score is NaN, as in ``settle_nan``.

    Examples
    --------
    >>> import torch
    >>> from fastood.evaluation import sweep_auroc
    >>> sure, unsure = (5 * torch.eye(3), torch.eye(3)), (torch.eye(3), torch.eye(3))
    >>> sweep_auroc([sure], {"unsure": [unsure]}, v=["msp"], norms=[None, 1])
    array([[1., 1.]])
    """

    one_thread_if_forked()

    def grid(chunks: Chunks) -> dict[str, Scores]:
        parts = []
        for f, h in chunks:
            if f is None or h is None:
                raise ValueError("logits and feats must both be given for a sweep over norms")
            cells = sweep(f.double(), h.double(), v, norms, temperature=temperature, bias=bias, backend=backend)
            parts.append(cells.flatten(1).cpu().numpy())
        if not parts:
            raise ValueError("chunks must not be empty")
        labels = [f"{name}, norm={r}" for name in v for r in norms]
        return settle_nan(dict(zip(labels, np.concatenate(parts).T, strict=True)), nan)

    inside = _vectors("the ID set", grid(id_chunks))
    outside = [_vectors(f"OOD set {name!r}", grid(chunks)) for name, chunks in ood_chunks.items()]
    cells = [fmean(metrics.auroc(s, columns[label]) for columns in outside) for label, s in inside.items()]
    return np.array(cells).reshape(len(v), len(norms))


def _vectors(where: str, columns: Mapping[str, ArrayLike]) -> dict[str, Scores]:
    """The scores of one set, checked here because here both the score and the set have names."""
    arrays = {}
    for label, x in columns.items():
        arrays[label] = vector(f"{where}: score {label!r}", x)
    _same_length(f"{where}: all scores must be of the same inputs", arrays)
    return arrays


def _same_length(rule: str, columns: Mapping[str, Scores]) -> None:
    lengths = {label: len(a) for label, a in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{rule}, got lengths {lengths}")


def _rows_of(columns: Mapping[str, Scores]) -> int:
    return len(next(iter(columns.values())))

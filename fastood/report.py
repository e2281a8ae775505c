"""An evaluation as one HTML file that needs nothing else: no network, no files beside it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from datetime import datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from fastood._version import __version__
from fastood.detector import Detector
from fastood.evaluation import CONVENTION, Evaluation
from fastood.files import atomic
from fastood.metrics import METRICS
from fastood.plots import histograms
from fastood.recommendation import METHOD

_TIED = 8  # scores not shown to be worse than the recommended one, named before the long tables
_LOWER_IS_BETTER = ("fpr95_in", "fpr95_out")


def write_html(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    *,
    title: str = "fastood report",
    figures: Mapping[str, Figure] | None = None,
    decisions: tuple[Detector, Mapping[str, tuple[int, int]]] | None = None,
) -> None:
    """Write the report: which score to use and how sure that is, histograms, tables of all metrics, what it all means.

    Parameters
    ----------
    path : path
        The .html file. Images, style and script are inside it, so it opens offline.
    evaluation : Evaluation
        What ``fastood.evaluation.evaluate`` gives.
    title : str
        The heading.
    figures : mapping, optional
        Caption -> a further figure, ``fastood.plots.heatmap`` for one.
    decisions : (Detector, mapping), optional
        A detector, and what it did: set -> (rows that it accepted, rows that there were).

    Examples
    --------
    >>> from fastood.evaluation import evaluate
    >>> from fastood.report import write_html
    >>> evaluation = evaluate({"msp": [0.9, 0.8]}, {"noise": {"msp": [0.3]}})
    >>> write_html("report.html", evaluation)  # doctest: +SKIP
    """
    found = evaluation.recommendation
    by_ood: dict[str, list[dict[str, Any]]] = {}
    for row in evaluation.table():
        by_ood.setdefault(row["ood"], []).append(row)
    sections = [
        {
            "ood": ood,
            "labels": [row["score"] for row in rows],
            "columns": [_column(metric, rows, metric) for metric in METRICS],
            "histograms": {
                label: _inline(histograms(evaluation.id_scores[label], {ood: evaluation.ood_scores[ood][label]}, label))
                # A reader's own, what it is compared with, what would be best here; once each.
                for label in dict.fromkeys((found.score, *filter(None, [found.default]), *evaluation.best(1, ood)))
                if ood in evaluation.ood_scores
            },
        }
        for ood, rows in by_ood.items()
    ]
    overview = [_column(ood, rows, "auroc") for ood, rows in by_ood.items()]
    roles = {found.score: "recommended", **dict.fromkeys(found.tied[:_TIED], "may be as good")}
    for label in filter(None, [found.default]):
        roles[label] = f"{roles[label]}; default" if label in roles else "default of fastood.score"
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = template.from_string(files("fastood").joinpath("report.html").read_text(encoding="utf-8")).render(
        title=title,
        version=__version__,
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        counts=evaluation.counts(),
        found=found,
        roles=roles,
        listed=_TIED,
        scores=len(evaluation.id_scores),
        overview=overview,
        sections=sections,
        convention=CONVENTION,
        method=METHOD,
        figures={caption: _inline(figure) for caption, figure in (figures or {}).items()},
        decided=_decided(*decisions) if decisions else None,
    )
    with atomic(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _decided(detector: Detector, accepted: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    limit = "the threshold of their predicted class" if detector.per_class else f"{detector.threshold:.6g}"
    shares = {name: f"{1 - n / rows:.1%}" if rows else "-" for name, (n, rows) in accepted.items()}
    label = detector._label()
    return {"label": label, "detector": detector, "limit": limit, "shares": shares, "accepted": accepted}


def _column(heading: str, rows: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Compared as they are shown: of two numbers that look the same, both are the best."""
    shown = {row["score"]: f"{row[metric]:.3f}" for row in rows}
    best = min if metric in _LOWER_IS_BETTER else max
    return {"heading": heading, "shown": shown, "best": best(shown.values(), key=float)}


def _inline(figure: Figure) -> str:
    """The figure as a data: address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

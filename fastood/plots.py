"""The paper's pictures, and histograms of scores: each function gives a matplotlib Figure.

Figures are made without pyplot, so that nothing is shown, kept or configured globally; ``figure.savefig``
writes one to a file, and a notebook shows one that a cell ends with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike, NDArray

from fastood._inputs import vector
from fastood.api import PAPER_NORMS, row_stats
from fastood.recommendation import threshold

# Okabe and Ito's colours, told apart with any colour vision; black and yellow, hard to see on some grounds, left out.
_ID_COLOUR = "#0072B2"
_OOD_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STROKES = ("-", "--", "-.", ":")  # for print without colours; of another period than the colours, for many sets
_BINS = 50
FIGURE_2 = "V terms times norms of the features: AUROC, mean over the OOD sets (Figure 2 of the paper)"
FIGURE_2_NORMS = (None, *PAPER_NORMS)  # V alone beside V times each norm


def heatmap(auroc: ArrayLike, v: Sequence[str], norms: Sequence[float | None]) -> Figure:
    """Figure 2 of the paper: AUROC of every V times every ||h||_r, each cell annotated. Higher is better.

    Parameters
    ----------
    auroc : array [V, P]
        As ``fastood.evaluation.sweep_auroc`` gives it.
    v : sequence of str
        Names of the V terms, the rows.
    norms : sequence of float or None
        Orders r, the columns; None is U = 1.

    Examples
    --------
    >>> from fastood import plots
    >>> figure = plots.heatmap([[0.91, 0.93]], ["energy"], [None, 0.3])
    """
    cells = np.asarray(auroc, dtype=np.float64)
    if cells.shape != (len(v), len(norms)):
        raise ValueError(f"auroc must be [{len(v)}, {len(norms)}], a row per v, got shape {list(cells.shape)}")
    figure = Figure(figsize=(2.6 + 0.62 * len(norms), 1.5 + 0.5 * len(v)), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(cells, cmap="cividis", aspect="auto")
    ax.set_xticks(range(len(norms)), ["U = 1" if r is None else "∞" if r == np.inf else f"{r:g}" for r in norms])
    ax.set_yticks(range(len(v)), v)
    ax.set_xlabel(r"order r of U = $\|h\|_r$")
    ax.set_ylabel("V")
    ax.set_title("AUROC of U · V, higher is better")
    ax.tick_params(length=0)
    shades = np.asarray(image.norm(cells))
    for (i, j), cell in np.ndenumerate(cells):
        dark = shades[i, j] < 0.5
        ax.text(j, i, f"{cell:.3f}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
    figure.colorbar(image, ax=ax, pad=0.02)
    return figure


def histograms(id_scores: ArrayLike, ood_scores: Mapping[str, ArrayLike], label: str) -> Figure:
    """How one score spreads over the ID set and over each OOD set, as shares of each set.

    A line marks the threshold that keeps 95% of the ID set, ``fastood.recommendation.threshold``; what lies
    on its right is accepted. The axis spans all but the outermost half percent of every set's finite
    scores at either end; what lies beyond it, infinite scores included, counts in the outermost bin of
    its side.

    Parameters
    ----------
    id_scores : array [N]
        Higher = more in-distribution.
    ood_scores : mapping
        Name of an OOD set -> scores [M].
    label : str
        What the score is called.

    Raises
    ------
    TypeError, ValueError
        Where scores are a masked array, hold NaN, or are none.

    Examples
    --------
    >>> from fastood import plots
    >>> figure = plots.histograms([0.9, 0.8], {"noise": [0.3, 0.4]}, "msp")
    """
    sets = {name: vector(f"ood_scores[{name!r}]", x) for name, x in ood_scores.items()}
    inside = vector("id_scores", id_scores)
    edges = _bin_edges([inside, *sets.values()])
    columns = 2 if max(map(len, sets), default=0) < 12 else 1
    figure = Figure(figsize=(4.4, 2.7 + 0.22 * -(-(1 + len(sets)) // columns)), layout="constrained")
    ax = figure.subplots()
    # A pale area for ID, strong lines for OOD: told apart without colours, too.
    ax.stairs(_shares(inside, edges), edges, fill=True, color=_ID_COLOUR, alpha=0.4, label="ID")
    for (name, x), colour, stroke in zip(sets.items(), cycle(_OOD_COLOURS), cycle(_STROKES), strict=False):
        # A name that starts with an underscore would have no legend entry without the word before it.
        ax.stairs(_shares(x, edges), edges, color=colour, linewidth=1.6, linestyle=stroke, label=_plain(f"OOD: {name}"))
    t = threshold(inside)
    at = np.clip(t, edges[0], edges[-1])  # an infinite one stands at its end of the axis
    ax.axvline(at, color="black", linewidth=1.2)
    left = at < edges[[0, -1]].mean()
    ax.set_ylim(0, 1.12 * ax.get_ylim()[1])  # room for the label above the bars
    ax.annotate(
        f"95% of ID ≥ {t:.4g}",
        (at, 1),
        (4 if left else -4, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="left" if left else "right",
        va="top",
    )
    ax.set_title(_plain(label))
    ax.set_xlabel("score, higher = more in-distribution")
    ax.set_ylabel("share of the set")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.spines[["top", "right"]].set_visible(False)
    # Below the axes, where it covers no bar, however many and long the names are.
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def simplex() -> Figure:
    """Figure 1 of the paper: the V terms of ExGrad, MSP and GradNorm on the 3-class probability simplex.

    At each vertex one class has probability 1; lighter to darker is lower to higher. ExGrad's
    sum_k p_k (1 - p_k) is highest where the prediction is least certain, the other two where it is most.

    Examples
    --------
    >>> from fastood import plots
    >>> figure = plots.simplex()
    """
    n = 120
    steps = np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)])
    with np.errstate(divide="ignore"):  # log 0 = -inf, a class that cannot be
        logits = np.log(steps / n)
    stats = row_stats(logits, ["one_minus_s2", "msp", "tv"])
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
    x, y = (steps / n @ corners).T
    panels = {
        "ExGrad: Σ p (1 − p)": stats["one_minus_s2"],
        "MSP: max p": stats["msp"],
        "GradNorm: TV(uniform, p)": stats["tv"],
    }
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for ax, (title, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        mesh = ax.tripcolor(x, y, values, shading="gouraud", cmap="Blues")
        ax.plot(*corners[[0, 1, 2, 0]].T, color="black", linewidth=1)
        for (cx, cy), name, va in zip(corners, ("p₁ = 1", "p₂ = 1", "p₃ = 1"), ("top", "top", "bottom"), strict=True):
            ax.annotate(
                name, (cx, cy), (0, 4 if va == "bottom" else -4), textcoords="offset points", ha="center", va=va
            )
        ax.set_title(title, pad=18)
        ax.set_aspect("equal")
        ax.margins(0.06)
        ax.axis("off")
        figure.colorbar(mesh, ax=ax, shrink=0.8)
    figure.suptitle("V terms over three classes: lighter to darker = lower to higher")
    return figure


def _bin_edges(sets: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Of every set's own percentiles, so that a large set does not squeeze a small one into a bin."""
    # Within what an axis can span: from -1.7e308 to 1.7e308 is further than float64 counts.
    finite = [x[np.isfinite(x)].clip(-1e300, 1e300) for x in sets]
    spans = [np.percentile(x, [0.5, 99.5]) for x in finite if len(x)]
    low, high = (min(a for a, _ in spans), max(b for _, b in spans)) if spans else (0.0, 0.0)
    size = max(abs(low), abs(high))
    # Scores that are all but equal, for which float64 has no room for bins, go to the middle of a wider axis.
    if not high - low > 1e-9 * size:
        low, high = low - max(0.5, 0.5 * size), high + max(0.5, 0.5 * size)
    return np.linspace(low, high, _BINS + 1)


def _shares(scores: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    counts, _ = np.histogram(scores.clip(edges[0], edges[-1]), edges)
    return counts / scores.size


def _plain(text: str) -> str:
    """`text` without matplotlib's mathematics between dollar signs."""
    return text.replace("$", r"\$")

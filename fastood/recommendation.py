"""Which score, which threshold, how sure: what an evaluation comes to.

The best of many scores looks better than it is on the rows that it was chosen by: of 41 useless ones, one
reaches an AUROC near 0.6 on 200 rows. So every set is halved. The first halves choose; how good the choice is, and
which other scores may be as good, is read off the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta  # type: ignore[import-untyped]

from fastood._delong import TWO_SIDED_95, placements
from fastood._inputs import vector
from fastood.api import BEST_NORM

Array = NDArray[np.float64]
Scores = Mapping[str, Array]

ROWS_NEEDED = 100  # in every set, for halves of 50: with fewer, a 5% quantile and its resamples are two rows' affair
DEFAULTS = (f"energy*||h||_{BEST_NORM:g}", "energy")  # of fastood.score: with features, without
_SEED = 0
_RESAMPLES = 1000
_BLOCK = 2**15  # resampled rows at a time, few enough for a processor's cache

METHOD = (
    f"Every set is halved at random (seed {_SEED}). The score of highest AUROC on the first halves, mean over the OOD "
    "sets, is recommended; its AUROC and FPR95 are those on the second halves, with 95% percentile intervals of "
    f"{_RESAMPLES} bootstrap resamples of the rows within each set; none where resampling changes nothing, as it does "
    "without a mistake. Another score is shown to be worse where the 95% interval of its AUROC minus the recommended "
    "one's (DeLong's variance, second halves) lies below 0; every comparison is a chance of error by itself. Rows "
    "count as independent: frames of one video are not, and make intervals too narrow. The threshold, what it keeps "
    "and what it accepts are of all rows; the share that it keeps of new ID rows has the 95% interval of an order "
    "statistic."
)


@dataclass(frozen=True)
class Estimate:
    """A number, and the 95% interval that it is known by; None where the rows do not tell.

    Examples
    --------
    >>> f"{Estimate(0.9, (0.85, 0.94))}, {Estimate(1.0)}, {Estimate(0.1, (-0.05, 0.25)):+}"
    '0.900 (0.850 to 0.940), 1.000, +0.100 (-0.050 to +0.250)'
    """

    value: float
    interval: tuple[float, float] | None = None

    def __format__(self, sign: str) -> str:
        """With three digits; `sign` "+" for a difference."""
        numbers = [f"{x:{sign}.3f}" for x in (self.value, *(self.interval or ()))]
        return numbers[0] + (f" ({numbers[1]} to {numbers[2]})" if self.interval else "")


@dataclass(frozen=True)
class Recommendation:
    """The score to use, how good it is, its threshold. ``Evaluation.recommendation`` is one; ``str`` is for people.

    Parameters
    ----------
    score : str
        The label of highest mean AUROC over the OOD sets, on half of the rows where ``held_out``.
    held_out : bool
        Whether the estimates are of the other half. Else a set has fewer than 100 rows, they are of the
        rows that chose the score, which flatters, and have no intervals.
    auroc, fpr95_in : dict
        Name of the OOD set -> Estimate, and "average", the mean, where there are several. An interval is
        None, too, where (nearly) all resamples give one number, as they do where a score makes no mistake.
        Where the AUROC is near 1 and a half has some 50 rows, the interval holds the truth in 9 of 10
        cases rather than 19 of 20, as bootstraps do.
    differences : dict
        Every other label, the highest first -> Estimate of its mean AUROC minus that of ``score``.
    threshold : float
        Accept an input as in-distribution where its score is >= this: keeps at least 95% of all ID rows, as FPR95
        has it. A ``Detector`` fitted on them mostly takes the next lower score: see ``threshold``.
    kept : Estimate
        The share that it keeps of the ID rows it was made of; the interval is for new ones.
    accepted : dict
        Name of the OOD set -> how many of all its rows the threshold accepts.
    counts : dict
        {"id": N, "ood": {name: M}}: how many rows there are in all.
    """

    score: str
    held_out: bool
    auroc: dict[str, Estimate]
    fpr95_in: dict[str, Estimate]
    differences: dict[str, Estimate]
    threshold: float
    kept: Estimate
    accepted: dict[str, int]
    counts: dict[str, Any]

    @property
    def tied(self) -> list[str]:
        """The other scores that the held-out half does not show to be worse; none where nothing is held out."""
        return [label for label, d in self.differences.items() if d.interval and d.interval[1] >= 0]

    @property
    def doubt(self) -> str:
        """What speaks against relying on it, as a sentence; "" where nothing does."""
        auroc = self.overall(self.auroc)
        if not self.held_out:
            fewest = min(self.counts["id"], *self.counts["ood"].values())
            return (
                "These are the rows that it was chosen by, which flatters: a held-out half and intervals take "
                f"{ROWS_NEEDED} rows in every set, and the smallest here has {fewest:,}."
            )
        if (auroc.interval[0] if auroc.interval else auroc.value) <= 0.5:
            return "No score is shown to be better than chance."
        return ""

    def overall(self, estimates: Mapping[str, Estimate]) -> Estimate:
        """The average, or that of the only OOD set, of ``auroc`` or ``fpr95_in``."""
        return estimates["average"] if len(estimates) > 1 else next(iter(estimates.values()))

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, named: int = 6) -> Iterator[str]:
        """The recommendation in a few lines, with the names of at most `named` scores that may be as good."""
        auroc, fpr95_in = self.overall(self.auroc), self.overall(self.fpr95_in)
        mean = ", mean over the OOD sets" if len(self.auroc) > 1 else ""
        half = "; chosen on one half of the rows, judged on the other, with 95% intervals" if self.held_out else ""
        yield f"Recommended: {self.score}, with AUROC {auroc} and FPR95 {fpr95_in}{mean}{half}."
        if self.doubt:
            yield self.doubt
        accepted = ", ".join(f"{n:,} of {self.counts['ood'][name]:,} {name}" for name, n in self.accepted.items())
        yield f"Accept where {self.score} >= {self.threshold!r}: {self.keeps}; accepts {accepted}."
        if self.tied:
            more = f" and {len(self.tied) - named} more" if len(self.tied) > named else ""
            yield f"Not shown to be worse: {', '.join(self.tied[:named])}{more}."
        elif self.held_out and self.differences:
            yield "Every other score is shown to be worse."
        if difference := self.differences.get(self.default):
            yield f"The default of fastood.score, {self.default}, differs by {difference:+} in AUROC."

    @property
    def default(self) -> str:
        """Which label is what ``fastood.score`` computes by default; "" where it was not evaluated."""
        return next((label for label in DEFAULTS if label in self.differences or label == self.score), "")

    @property
    def keeps(self) -> str:
        """What the threshold does to ID rows, in words."""
        n = self.counts["id"]
        text = f"keeps {round(self.kept.value * n):,} of the {n:,} ID rows that it is made of"
        return text + (" ({:.1%} to {:.1%} of new ones)".format(*self.kept.interval) if self.kept.interval else "")


def threshold(id_scores: ArrayLike) -> float:
    """The highest score t such that at least 95% of the ID scores are >= t: that of FPR95.

    Parameters
    ----------
    id_scores : array [N]
        Higher = more in-distribution. With fewer than 20 of them, t is the lowest. NaN and an empty vector raise
        ValueError, a masked array TypeError.

    Notes
    -----
    It describes these N rows. A ``Detector`` promises its 95% of new rows and counts the new one too, 95% of N + 1: its
    threshold is the next lower of the scores, or where 20 divides N + 1 the same.

    Examples
    --------
    >>> threshold(range(100))
    5.0
    """
    x = np.sort(vector("id_scores", id_scores))
    return float(x[len(x) - _kept(len(x))])


def recommend(id_scores: Scores, ood_scores: Mapping[str, Scores]) -> Recommendation:
    """See ``Recommendation``. The vectors are those of an ``Evaluation``: checked, the same labels in every set.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> inside = {"good": rng.normal(2, 1, 400), "useless": rng.normal(0, 1, 400)}
    >>> outside = {"noise": {"good": rng.normal(0, 1, 400), "useless": rng.normal(0, 1, 400)}}
    >>> found = recommend(inside, outside)
    >>> found.score, found.tied
    ('good', [])
    >>> f"{found.auroc['noise']}"
    '0.942 (0.920 to 0.962)'
    """
    counts: dict[str, Any] = {
        "id": _rows(id_scores),
        "ood": {name: _rows(columns) for name, columns in ood_scores.items()},
    }
    held_out = min(_rows(id_scores), *counts["ood"].values()) >= ROWS_NEEDED
    every = id_scores, ood_scores
    first, second = _halves(*every) if held_out else (every, every)
    mean_auroc = {label: _placements(label, *first)[0].mean() for label in id_scores}
    score = max(mean_auroc, key=lambda label: mean_auroc[label])

    # DeLong, DeLong & Clarke-Pearson (1988): an AUROC is a mean over the ID rows and over the OOD rows of their
    # placements, so its variance, or that of a difference, is the sum of the variances of these means.
    chosen = _placements(score, *second)
    differences = {}
    for label in id_scores:
        if label != score:
            deltas = [a - b for a, b in zip(_placements(label, *second), chosen, strict=True)]
            value, interval = float(deltas[0].mean()), None
            if held_out:
                error = TWO_SIDED_95 * float(np.sqrt(sum(d.var(ddof=1) / len(d) for d in deltas)))
                interval = value - error, value + error
            differences[label] = Estimate(value, interval)

    auroc, fpr95_in = _estimates(score, *second, resamples=_RESAMPLES if held_out else 0)
    inside = id_scores[score]
    t = threshold(inside)
    n, kept = len(inside), int((inside >= t).sum())
    new = None
    if n >= ROWS_NEEDED:
        # The share of new rows above the kept-th highest of n is Beta(kept, n + 1 - kept), whatever the distribution.
        new = float(beta.ppf(0.025, kept, n + 1 - kept)), float(beta.ppf(0.975, kept, n + 1 - kept))
    return Recommendation(
        score,
        held_out,
        auroc,
        fpr95_in,
        dict(sorted(differences.items(), key=lambda item: -item[1].value)),
        t,
        Estimate(kept / n, new),
        {name: int((columns[score] >= t).sum()) for name, columns in ood_scores.items()},
        counts,
    )


def _rows(columns: Scores) -> int:
    return len(next(iter(columns.values())))


def _kept(n: int) -> int:
    """The fewest of n rows that are at least 95% of them."""
    return -(-95 * n // 100)


def _halves(inside: Scores, outside: Mapping[str, Scores]) -> list[tuple[Scores, dict[str, Scores]]]:
    """Sets of the same length are split alike, so that a corrupted copy of a row stays in the row's half."""

    def split(columns: Scores) -> list[Scores]:
        n = _rows(columns)
        order = np.random.default_rng(_SEED).permutation(n)
        return [{label: x[half] for label, x in columns.items()} for half in (order[: n // 2], order[n // 2 :])]

    sets = {name: split(columns) for name, columns in outside.items()}
    return [(half, {name: halves[i] for name, halves in sets.items()}) for i, half in enumerate(split(inside))]


def _placements(label: str, inside: Scores, outside: Mapping[str, Scores]) -> list[Array]:
    """DeLong's components of the AUROC, mean over the OOD sets: of the ID rows, then of each set's rows.

    The first's mean is the AUROC.
    """
    of_id, of_ood = placements(inside[label], [columns[label] for columns in outside.values()])
    return [of_id, *(x / len(of_ood) for x in of_ood)]


def _estimates(
    label: str, inside: Scores, outside: Mapping[str, Scores], resamples: int
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """AUROC and FPR95 per OOD set and on average, with the intervals of a bootstrap.

    A resample is a count per row. Over sorted rows, cumulative counts give both metrics without sorting again.
    """
    x = np.sort(inside[label])
    sets = [np.sort(columns[label]) for columns in outside.values()]
    bounds = [(np.searchsorted(y, x, "left"), np.searchsorted(y, x, "right")) for y in sets]
    n, kept = len(x), _kept(len(x))

    def metrics(of_id: NDArray[np.intp], of_ood: list[NDArray[np.intp]]) -> NDArray[np.float64]:
        """From counts [b, rows]: [b, 2, sets]."""
        # The row that the threshold falls on: the highest with `kept` at or above it.
        at = n - 1 - (of_id[:, ::-1].cumsum(1) >= kept).argmax(1)
        found = []
        for (low, high), c in zip(bounds, of_ood, strict=True):
            m = c.shape[1]
            below = np.zeros((len(c), m + 1), dtype=np.intp)
            c.cumsum(1, out=below[:, 1:])
            wins = (of_id * (below[:, low] + below[:, high])).sum(1) / 2
            found.append((wins / (n * m), (m - below[np.arange(len(c)), low[at]]) / m))
        return np.array(found).transpose(2, 1, 0)

    def ones(rows: int) -> NDArray[np.intp]:
        return np.ones((1, rows), dtype=np.intp)

    (values,) = metrics(ones(n), [ones(len(y)) for y in sets])
    rng = np.random.default_rng(_SEED)
    size = max(1, _BLOCK // max(n, *(len(y) for y in sets))) if resamples else 1
    blocks = [min(size, resamples - done) for done in range(0, resamples, size)]
    drawn = [metrics(_counts(rng, b, n), [_counts(rng, b, len(y)) for y in sets]) for b in blocks]
    replicates = np.concatenate(drawn) if drawn else None

    def estimates(metric: int) -> dict[str, Estimate]:
        which = {name: [i] for i, name in enumerate(outside)}
        if len(sets) > 1:
            which["average"] = list(range(len(sets)))
        return {
            name: Estimate(
                float(values[metric, i].mean()), None if replicates is None else _percentiles(replicates[:, metric, i])
            )
            for name, i in which.items()
        }

    return estimates(0), estimates(1)


def _counts(rng: np.random.Generator, b: int, n: int) -> NDArray[np.intp]:
    """How often each of n rows is drawn in n draws, b times: [b, n]."""
    drawn = rng.integers(n, size=(b, n)) + n * np.arange(b)[:, None]
    return np.bincount(drawn.ravel(), minlength=b * n).reshape(b, n)


def _percentiles(replicates: Array) -> tuple[float, float] | None:
    """The 95% interval of the mean over the last axis; None where it has no width: no mistake, nothing to resample."""
    low, high = np.percentile(replicates.mean(-1), [2.5, 97.5])
    return (float(low), float(high)) if low < high else None

"""From scores to the numbers of the tables: AUROC of every pair, mean and deviation over pairs, intervals, claims.

A *label* names a score as in ``fastood.evaluation``: "energy", "energy*||h||_1", "exgrad". Before it, "deep" says that
gradients are by all parameters, and "same rows" that a last-layer score is on the rows which the deep ones are on.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastood._delong import below
from fastood._inputs import vector
from fastood.recommendation import Estimate
from fastood.registry import TABLE_1

Floats = NDArray[np.float64]
Columns = Mapping[str, Floats]  # label -> scores [N], higher = more in-distribution

RESAMPLES = 1000
_BLOCK = 100  # at a time, in memory


class Printed(NamedTuple):
    """A number of the paper, and its deviation over pairs where that is printed."""

    auroc: float
    deviation: float | None


@cache
def printed(table: str) -> dict[tuple[str, str, str], Printed]:
    """What a table of the paper says: (ID, OOD, label) -> number. "average" for OOD is the mean over pairs.

    `table` is "Table 1", "Table 2", "Table 3", "Appendix A" or "Section 4.3"; the mean's ID is "small" or "ImageNet".

    Examples
    --------
    >>> from fastood.reproduce.tables import printed
    >>> printed("Table 1")["small", "average", "exgrad"]
    Printed(auroc=0.925, deviation=0.047)
    """
    lines = files("fastood.reproduce").joinpath("paper.csv").read_text(encoding="utf-8").splitlines()
    return {
        (row["id"], row["ood"], row["score"]): Printed(
            float(row["auroc"]), float(row["deviation"]) if row["deviation"] else None
        )
        for row in csv.DictReader(lines)
        if row["table"] == table
    }


def printed_mean(scale: str, label: str) -> float | None:
    """The paper's mean over the pairs of an experiment, whichever table has it."""
    label = {"tv*||h||_1": "gradnorm"}.get(label, label).removeprefix("same rows ")
    for table in ("Table 1", "Table 2", "Table 3", "Section 4.3"):
        if found := printed(table).get((scale, "average", label)):
            return found.auroc
    return None


class Pairs:
    """AUROC of every label on every pair for every seed, and what it comes to.

    Parameters
    ----------
    pairs : sequence of (str, str)
        ID and OOD.
    scores : mapping
        (ID, seed) -> name of a set -> label -> scores [N], of the network trained on that ID set with that seed.
        All seeds of all ID sets, 0..S-1, with the same labels.
    groups : mapping
        Name of a set -> int64 [N]; rows of one number are drawn together. A set without is of independent rows.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        scores: Mapping[tuple[str, int], Mapping[str, Columns]],
        groups: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> None:
        self.pairs, self.scores, self.groups = list(pairs), scores, groups or {}
        self.seeds = 1 + max(seed for _, seed in scores)
        first = next(iter(next(iter(scores.values())).values()))
        self.labels = list(first)
        self._auroc: dict[str, Floats] = {}
        self._resampled: dict[str, Floats] = {}
        self._draws: dict[tuple[str, int], NDArray[np.float32]] = {}

    def auroc(self, label: str) -> Floats:
        """[seeds, pairs]."""
        if label not in self._auroc:
            self._auroc[label] = np.array(
                [[below(*self._of(label, pair, seed)).mean() for pair in self.pairs] for seed in range(self.seeds)]
            )
        return self._auroc[label]

    def of_pairs(self, label: str) -> Floats:
        """The mean over seeds: [pairs]."""
        return self.auroc(label).mean(0)

    def mean(self, label: str) -> float:
        return float(self.of_pairs(label).mean())

    def deviation(self, label: str) -> float:
        """Over pairs: the sample's standard deviation, as the paper's (its Appendix A gives its Table 1 so)."""
        return float(self.of_pairs(label).std(ddof=1))

    def by_seed(self, label: str) -> Floats:
        """The mean over pairs: [seeds]."""
        return self.auroc(label).mean(1)

    def estimate(self, label: str) -> Estimate:
        """The mean over pairs and seeds, with its 95% interval."""
        return Estimate(self.mean(label), _percentiles(self.resampled(label)))

    def difference(self, label: str, other: str) -> Estimate:
        """The mean of `label` minus that of `other`, with its 95% interval: both on the same resamples."""
        return Estimate(
            self.mean(label) - self.mean(other), _percentiles(self.resampled(label) - self.resampled(other))
        )

    def resampled(self, label: str) -> Floats:
        """The mean over pairs and seeds of bootstrap resamples: [RESAMPLES].

        In each, the rows of every test set are drawn anew, the same for all pairs, seeds and labels that the set
        has a part in, and so are the seeds. Pairs stay: they are the benchmark.
        """
        if label not in self._resampled:
            of_seeds = np.zeros((self.seeds, RESAMPLES))
            for seed in range(self.seeds):
                for inside, outside in self.pairs:
                    x, y = self._of(label, (inside, outside), seed)
                    w, v = self._drawn(inside, len(x)), self._drawn(outside, len(y))
                    for i in range(0, RESAMPLES, _BLOCK):
                        some = slice(i, i + _BLOCK)
                        of_seeds[seed, some] += weighted_auroc(x, y, w[:, some], v[:, some])
            seeds = np.random.default_rng(0).integers(self.seeds, size=(self.seeds, RESAMPLES))
            self._resampled[label] = np.take_along_axis(of_seeds, seeds, 0).mean(0) / len(self.pairs)
        return self._resampled[label]

    def _of(self, label: str, pair: tuple[str, str], seed: int) -> tuple[Floats, Floats]:
        of_network = self.scores[pair[0], seed]
        inside, outside = (vector(f"{label} of {name}", of_network[name][label]) for name in pair)
        return inside, outside

    def _drawn(self, name: str, rows: int) -> NDArray[np.float32]:
        if (name, rows) not in self._draws:
            groups = self.groups.get(name)
            groups = np.arange(rows) if groups is None else groups[:rows]
            number = int(groups.max()) + 1
            random = np.random.default_rng([rows, *name.encode()])
            drawn = [np.bincount(random.integers(number, size=number), minlength=number) for _ in range(RESAMPLES)]
            self._draws[name, rows] = np.array(drawn, np.float32).T[groups]
        return self._draws[name, rows]


def weighted_auroc(inside: Floats, outside: Floats, inside_counts: Any, outside_counts: Any) -> Floats:
    """AUROC where each row counts so many times: [B].

    Parameters
    ----------
    inside, outside : array [N], [M]
        Scores, higher = more in-distribution.
    inside_counts, outside_counts : array [N, B], [M, B]
        How often each row was drawn in each of B resamples; in none of them never all zeros.

    Examples
    --------
    >>> import numpy as np
    >>> from fastood.reproduce.tables import weighted_auroc
    >>> weighted_auroc(np.array([3.0, 1.0]), np.array([2.0]), np.array([[1, 2], [1, 0]]), np.array([[1, 1]]))
    array([0.5, 1. ])
    """
    order = np.argsort(outside)
    sorted_outside, counts = outside[order], np.asarray(outside_counts, np.float32)[order]
    total = np.cumsum(counts, 0, dtype=np.float32)
    total = np.concatenate([np.zeros_like(total[:1]), total])  # whole numbers far below 2^24: exact
    below = total[np.searchsorted(sorted_outside, inside, "left")]
    below += total[np.searchsorted(sorted_outside, inside, "right")]
    weights = np.asarray(inside_counts, np.float32)
    won = np.einsum("nb,nb->b", weights, below, dtype=np.float64, casting="safe")
    return won / (2.0 * weights.sum(0, dtype=np.float64) * total[-1])


def _percentiles(resampled: Floats) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


# ---- what stands in the paper's tables

SHALLOW = tuple(entry.name for entry in TABLE_1)
V_TERMS = ("msp", "energy", "varsum", "tv")
TABLE_2 = (
    *V_TERMS,
    *(f"{v}*||h||_1" for v in V_TERMS if v != "tv"),  # times TV it is GradNorm
    "gradnorm",
    "exgrad",
)
NAIVE = "naive norm_eg_p_l2sq"


def deep(label: str) -> str:
    return f"deep {label}"


def same_rows(label: str) -> str:
    return f"same rows {label}"


class Comparison(NamedTuple):
    """That the mean of one label is above another's. `scale` says in which of the paper's experiments it is so."""

    higher: str
    lower: str
    scale: str

    @property
    def paper(self) -> float | None:
        """The difference of the paper's means."""
        a, b = printed_mean(self.scale, self.higher), printed_mean(self.scale, self.lower)
        return None if a is None or b is None else a - b


class Claim(NamedTuple):
    """What the paper says, as comparisons; `everywhere` where other experiments are worth a look, too."""

    text: str
    comparisons: tuple[Comparison, ...]
    everywhere: bool = False


CLAIMS = (
    Claim(
        "With few classes a V term alone is better than times ‖h‖₁",
        tuple(Comparison(v, "gradnorm" if v == "tv" else f"{v}*||h||_1", "small") for v in V_TERMS),
    ),
    Claim(
        "With many classes a V term times ‖h‖₁ is better than alone, VarSum excepted",
        (
            *(Comparison("gradnorm" if v == "tv" else f"{v}*||h||_1", v, "ImageNet") for v in ("msp", "energy", "tv")),
            Comparison("varsum", "varsum*||h||_1", "ImageNet"),
        ),
    ),
    Claim(
        "With few classes the V term inside a gradient score is better than the score",
        (Comparison("tv", "gradnorm", "small"), Comparison("varsum", "exgrad", "small")),
    ),
    Claim("With few classes ExGrad is better than GradNorm", (Comparison("exgrad", "gradnorm", "small"),)),
    Claim("With many classes GradNorm is better than ExGrad", (Comparison("gradnorm", "exgrad", "ImageNet"),)),
    Claim(
        "Energy times ‖h‖₁, which takes no gradient, is better than GradNorm",
        (Comparison("energy*||h||_1", "gradnorm", "ImageNet"),),
        everywhere=True,
    ),
    Claim(
        "Energy times ‖h‖₀.₃ is better than times ‖h‖₁, and than alone",
        (
            Comparison("energy*||h||_0.3", "energy*||h||_1", "ImageNet"),
            Comparison("energy*||h||_0.3", "energy", "ImageNet"),
        ),
        everywhere=True,
    ),
    Claim(
        "Gradients by the last layer alone tell as much as by all parameters, or more",
        tuple(
            Comparison(same_rows(name), deep(name), "small")
            for name in (*SHALLOW, "batchgrad")
            if name != "norm_eg_p_l2sq"
        ),
    ),
)


def verdict(difference: Estimate) -> str:
    """What a difference, and its interval, says of a claim that it is above 0."""
    assert difference.interval
    low, high = difference.interval
    return "holds" if low > 0 else "the opposite" if high < 0 else "not decided"

"""The scores that a detector was calibrated on: ranks, the threshold and p-values that come of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXACT_ROWS = 2_000_000
"""So many calibration scores are kept as they are (16 MB in a file); of more, a sketch."""

SKETCH_K = 32768
SKETCH_ERROR = 1e-4
"""The share of rows by which a rank in a sketch of that k may be off, at 99% confidence (datasketches says 9.35e-5)."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Sample:
    """Finite calibration scores: all of them up to EXACT_ROWS, of more a sketch."""

    def __init__(self) -> None:
        self.n = 0
        self._exact: list[Floats] = []
        self._sketch: Any = None
        # What sketches of other processes kept, each score for several rows. No sketch is ever made of bytes from a
        # file: the library trusts them, and forged ones crash it.
        self._kept: list[tuple[Floats, Ints]] = []
        self._ranked: tuple[Floats, Ints] | None = None

    @property
    def sketched(self) -> bool:
        return self._sketch is not None or bool(self._kept)

    @property
    def slack(self) -> int:
        """By how many rows a rank may be off."""
        return math.ceil(SKETCH_ERROR * self.n) if self.sketched else 0

    def add(self, scores: Floats) -> None:
        exact = [*self._exact, scores]
        if sum(map(len, exact)) > EXACT_ROWS:
            self._sketch = self._sketch or _new_sketch()
            for part in exact:
                self._sketch.update(part)
            exact = []
        elif len(exact) > 64:  # their headers would outweigh many small ones
            exact = [np.concatenate(exact)]
        self._exact, self._ranked = exact, None
        self.n += len(scores)

    def merge(self, other: Sample) -> None:
        exact = np.concatenate([np.empty(0), *other._exact])
        self.add(exact)  # at once and before the rest: where it takes a library that is not there, nothing is merged
        if other._sketch is not None:
            sketch = self._sketch or _new_sketch()
            sketch.merge(other._sketch)
            self._sketch = sketch
        self._kept = [*self._kept, *other._kept]
        self.n += other.n - len(exact)
        self._ranked = None

    def ranked(self) -> tuple[Floats, Ints]:
        """The scores in order, and how many rows there are up to each."""
        if self._ranked is None:
            kept = [*self._kept, *((x, np.ones(len(x), np.int64)) for x in [np.empty(0), *self._exact])]
            if self._sketch is not None:
                # Not with the weights of its iterator, which are wrong after some merges (datasketches 5.2).
                x = np.unique([x for x, _ in self._sketch])
                upto = np.rint(np.array(self._sketch.get_cdf(x, True))[:-1] * self._sketch.n).astype(np.int64)
                kept.append((x, np.diff(upto, prepend=0)))
            values, weights = (np.concatenate(x) for x in zip(*kept, strict=True))
            order = np.argsort(values)
            self._ranked = values[order], weights[order].cumsum()
            if not self.sketched:
                self._exact = [self._ranked[0]]  # held once
        return self._ranked

    def kth(self, tpr: float) -> float | None:
        """The threshold: the k-th smallest score, k / (n + 1) <= 1 - tpr; None where there are too few rows."""
        k = rank(self.n, tpr) - self.slack
        if k < 1:
            return None
        values, upto = self.ranked()
        return float(values[np.searchsorted(upto, k)])

    def p_value(self, scores: Floats) -> Floats:
        values, upto = self.ranked()
        count = last = values.searchsorted(scores, side="right")
        if self.sketched:  # else a row for each score
            count = np.minimum(np.where(last > 0, upto[last - 1], 0) + self.slack, self.n)
        # As float64 first: torch.compile, which makes torch's operations of numpy's, divides integers in float32.
        return (1 + count).astype(np.float64) / (self.n + 1)

    def too_few(self, tpr: float) -> str:
        if self.sketched:
            known = f"a sketch of {self.n} rows knows ranks to {SKETCH_ERROR:g} of them"
            return f"tpr={tpr:g} is out of reach: {known}; fit on at most {EXACT_ROWS} rows"
        return f"tpr={tpr:g} takes at least {rows_needed(tpr)} in-distribution rows, got {self.n}"

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy, which the library's sketch refuses."""
        state = {**self.__dict__, "_ranked": None}
        if self.sketched:
            values, upto = self.ranked()
            state |= {"_exact": [], "_sketch": None, "_kept": [(values, np.diff(upto, prepend=0))]}
        return state

    @classmethod
    def all_of(cls, tensors: Mapping[str, NDArray[Any]], wanted: int) -> list[Sample]:
        """The `wanted` samples of a file, checked."""
        wanted_dtypes = {"scores": np.float64, "counts": np.int64, "weights": np.int64}
        for name, x in tensors.items():
            if name not in wanted_dtypes or x.dtype != wanted_dtypes[name] or x.ndim != 1:
                raise ValueError(f"{name!r} must not be there, or not be {x.dtype}{list(x.shape)}")
        scores, counts = tensors["scores"], tensors["counts"]
        weights = tensors.get("weights", np.ones(len(scores), np.int64))
        if len(counts) != wanted or (counts < 0).any() or (counts > len(scores)).any() or counts.sum() != len(scores):
            raise ValueError(f"'counts' must be {wanted} numbers that add up to the {len(scores)} scores")
        if not np.isfinite(scores).all():
            raise ValueError("'scores' must be finite")
        if weights.shape != scores.shape or (weights < 1).any() or weights.sum(dtype=np.float64) > 2**62:
            raise ValueError("'weights' must be a number >= 1 for every score")
        samples = []
        for x, w in zip(*(np.split(x, counts.cumsum()[:-1]) for x in (scores, weights)), strict=True):
            if (x[1:] < x[:-1]).any():
                raise ValueError("'scores' must not fall within a sample")
            sample = cls()
            sample.n = int(w.sum())
            if sample.n > len(x):
                sample._kept = [(x, w)]
            else:
                sample._exact = [x]
            samples.append(sample)
        return samples


def rank(n: int, tpr: float) -> int:
    """The largest k with k / (n + 1) <= 1 - tpr, as float64 has it, so that p-values compare alike."""
    k = int((1 - tpr) * (n + 1))
    while (k + 1) / (n + 1) <= 1 - tpr:
        k += 1
    while k / (n + 1) > 1 - tpr:
        k -= 1
    return k


def rows_needed(tpr: float) -> int:
    """The fewest calibration rows of which a threshold can promise `tpr`.

    Examples
    --------
    >>> from fastood.detector import rows_needed
    >>> rows_needed(0.95)
    19
    """
    n = max(math.ceil(1 / (1 - tpr)) - 2, 1)  # or the next, or the one after it, in float64
    while rank(n, tpr) < 1:
        n += 1
    return n


def _new_sketch() -> Any:
    try:
        return import_module("datasketches").kll_doubles_sketch(SKETCH_K)
    except ImportError:
        what = f"datasketches is needed for more than {EXACT_ROWS} calibration rows"
        raise RuntimeError(f"{what}: pip install datasketches") from None

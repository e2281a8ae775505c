"""AUROC as a mean over rows, by which its error is known: DeLong, DeLong & Clarke-Pearson (1988)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TWO_SIDED_95 = 1.959964  # standard errors, to either side: a normal distribution's 97.5% quantile


def below(x: Floats, y: Floats) -> Floats:
    """The share of y below each x, ties counted half.

    Examples
    --------
    >>> below(np.array([2.0, 1.0]), np.array([0.0, 2.0]))
    array([0.75, 0.5 ])
    """
    order, y = np.argsort(x), np.sort(y)
    x, share = x[order], np.empty(len(x))  # a search for sorted numbers is several times as fast
    share[order] = (np.searchsorted(y, x, "left") + np.searchsorted(y, x, "right")) / (2 * len(y))
    return share


def placements(inside: Floats, outside: Sequence[Floats]) -> tuple[Floats, list[Floats]]:
    """The share of the other side that each row is on the right side of: of ID rows, mean over the OOD sets, and of
    each set's rows. The first's mean is the mean AUROC; its variance is the sum of those of the means of all."""
    of_id = sum((below(inside, y) for y in outside), np.zeros(len(inside))) / len(outside)
    return of_id, [1 - below(y, inside) for y in outside]

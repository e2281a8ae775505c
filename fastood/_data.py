"""What the tools say of data: what a column of scores is called, and what looks wrong with the rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastood._inputs import result_dtype
from fastood.registry import Score

_TIMES = "*||h||_"  # in the label of a V term times a norm
_LOOKED_AT = 1000, 1 << 22  # rows, logits
_AFFINE_UP_TO = 512  # columns: least squares on so many take some 0.1 s


def label_of(entry: Score, order: float | None, *, log: bool = False, oriented: bool = True) -> str:
    """What a score is called where its norm matters: "energy", "energy*||h||_0.3", "||h||_2", "raw log exgrad".

    Parameters
    ----------
    entry : Score
    order : float or None
        Of the U that multiplies a V term; None for none. A gradient score has its own, which its name implies.
    log, oriented : bool
        As in ``fastood.score``: "log" and, for the paper's signs, "raw" come before the name.

    Examples
    --------
    >>> from fastood import SCORES
    >>> label_of(SCORES["energy"], 0.3), label_of(SCORES["norm"], 2), label_of(SCORES["exgrad"], 1, oriented=False)
    ('energy*||h||_0.3', '||h||_2', 'raw exgrad')
    """
    name = entry.name
    if order is not None and not entry.gradient:
        digits = f"{order:g}" if float(f"{order:g}") == order else repr(order)
        name = f"{name}{_TIMES}{digits}" if entry.stats else f"||h||_{digits}"
    return ("" if oriented else "raw ") + ("log " if log else "") + name


def negative(columns: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """In how many rows each V term times a norm, label -> [N], is negative; the infinite ones aside."""
    return {name: int(((x < 0) & np.isfinite(x)).sum()) for name, x in columns.items() if _TIMES in name}


def inverted(negative_rows: Mapping[str, int], rows: int) -> str | None:
    """What to say of V terms times a norm, by how many of the rows each is negative in; None where none is.

    Where V is negative a larger norm lowers the score: features that speak for a row count against it.
    """
    found = {name: n for name, n in negative_rows.items() if n}
    if not found:
        return None
    return (
        f"negative {some(found)} in {max(found.values()):,} of {rows:,} rows, where a larger norm makes a row "
        "look less in-distribution; --norm none (of 'fastood fit', for a detector) leaves the norm out"
    )


def some(names: Collection[str]) -> str:
    """The first three names, and how many there are beside them."""
    first = ", ".join(islice(names, 3))
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


def oddity(logits: Tensor | None, feats: Tensor | None, logits_key: str | None, feats_key: str | None) -> str | None:
    """A line on what makes one doubt that rows are logits [n, C] and feats [n, D], by the first of them; or None.

    Probabilities and log-probabilities are told by their sums. Swapped names are told by logits without a
    negative entry and with exact zeros, as ReLU leaves features, beside feats with negative ones; or, where
    logits are wider than feats, by logits that are no affine function of feats, as a last layer's are.
    """
    if logits is None or logits.shape[1] < 2:
        return None
    n = min(_LOOKED_AT[0], max(_LOOKED_AT[1] // logits.shape[1], 1))
    f = logits[:n].double()
    usable = ~(f.isnan() | (f == torch.inf)).any(-1) & (f > -torch.inf).any(-1)
    f = f[usable]
    if not len(f):
        return None
    tolerance = 1e-3 if result_dtype(logits) == logits.dtype else 2e-2  # what rounding to a half type leaves
    if ((f >= 0) & (f <= 1)).all() and ((f.sum(-1) - 1).abs() <= tolerance).all():
        return f"{logits_key!r} looks like probabilities, every row sums to 1; logits are what goes into the softmax"
    if (f.logsumexp(-1).abs() <= tolerance).all():
        return (
            f"{logits_key!r} looks like log-probabilities, the lse of every row is 0: so is the energy, "
            "and only scores of the softmax alone mean what they should"
        )
    if feats is not None and _swapped(f, feats[:n].double()[usable]):
        return (
            f"{logits_key!r} [N, {logits.shape[1]}] looks like the features of {feats_key!r} [N, {feats.shape[1]}]; "
            "if the names are swapped, --logits-key and --feats-key say which is which"
        )
    return None


def _swapped(f: Tensor, h: Tensor) -> bool:
    if (f >= 0).all() and (f == 0).any() and (h < 0).any():
        return True
    width, finite = h.shape[1], f.isfinite().all(-1) & h.isfinite().all(-1)
    f, h = f[finite], h[finite]
    # Of so few rows anything is an affine function.
    if not f.shape[1] > width > 0 or width > _AFFINE_UP_TO or len(f) < width + 10:
        return False
    f = f[: 2 * width + 10, :: -(-f.shape[1] // 16)]
    h = torch.cat([h[: len(f)], h.new_ones(len(f), 1)], -1)
    # gelsy: ReLU features often have columns that are 0 throughout.
    left = f - h @ torch.linalg.lstsq(h, f, driver="gelsy").solution
    return bool(left.norm() > 0.05 * (f - f.mean(0)).norm() + 1e-6 * f.norm())

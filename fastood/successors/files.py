"""Successors for the command line: a head out of a file, and fits on the rows of another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastood._inputs import choice
from fastood.files import FileError, Rows, arrays_of, labels_of, listed, open_rows
from fastood.registry import SCORES
from fastood.successors.declaration import SUCCESSORS
from fastood.successors.fitted import Fitted

Head = tuple[Tensor, Tensor | None]


def read_head(path: Path, classes: int, dim: int) -> Head:
    """The last layer in a file: weight [classes, dim], of a 1x1 convolution too, and bias [classes] or None.

    They are called "weight" and "bias", or as in a checkpoint of the whole model, of which one weight alone may have
    that shape: "fc.weight" and "fc.bias".

    Examples
    --------
    >>> read_head(Path("resnet50.pth"), 1000, 2048)  # doctest: +SKIP
    """
    with arrays_of(path) as arrays:
        fits = {
            name: array
            for name in arrays
            if name.rpartition(".")[2] == "weight"
            and (array := arrays[name]()).shape[:2] == (classes, dim)
            and math.prod(array.shape[2:]) == 1
        }
        if "weight" in fits:
            fits = {"weight": fits["weight"]}
        if len(fits) != 1:
            several = (
                f"found {listed(list(fits))}, of which only one can be it" if fits else f"found {listed(list(arrays))}"
            )
            raise FileError(f"{path}: must hold the last layer's 'weight' [{classes}, {dim}], {several}")
        (name,) = fits
        weight, bias = fits[name].whole(), None
        of_bias = name.removesuffix("weight") + "bias"
        if of_bias in arrays:
            bias = arrays[of_bias]().whole()
            if bias.shape != (classes,):
                raise FileError(f"{path}: {of_bias!r} must be [{classes}], got {list(bias.shape)}")
    return weight.flatten(1), bias


def names_of(given: Sequence[str], *, head: bool, train: bool) -> tuple[list[str] | None, list[str]]:
    """What --method stands for: names in SCORES, None for all of them, and names in SUCCESSORS.

    "all" has those successors among it that a head and rows to fit on allow, where there is either.

    Examples
    --------
    >>> names_of(["energy", "lts"], head=False, train=False)
    (['energy'], ['lts'])
    >>> names_of(["all"], head=True, train=False)
    (None, ['scale', 'lts', 'dml', 'ash_p', 'ash_b', 'ash_s'])
    """
    for name in given:
        choice("--method", name, ("all", *SCORES, *SUCCESSORS))
    every = "all" in given
    later = [name for name in given if name in SUCCESSORS]
    for name in later:
        entry = SUCCESSORS[name]
        if entry.head and not head:
            raise ValueError(f"--head must be given for {name} = {entry.formula}")
        if entry.fitted_on and not train:
            raise ValueError(f"--train must be given for {name}: a file of in-distribution rows to fit it on")
    if every and (head or train):
        later = [name for name, e in SUCCESSORS.items() if (head or not e.head) and (train or not e.fitted_on)]
    return None if every else [name for name in given if name in SCORES], later


def from_files(
    names: Sequence[str],
    rows: Rows,
    *,
    head: Path | None,
    train: Path | None,
    labels_key: str | None,
    temperature: float,
    chunks_of: Callable[[Rows], Iterator[tuple[Any, Any]]],
    whatever: bool,
) -> tuple[list[Fitted], list[str]]:
    """Successors for rows like `rows`: by the head in one file, fitted on the rows of another.

    Parameters
    ----------
    chunks_of : callable
        Of rows, gives their chunks.
    whatever : bool
        Leave out what cannot be fitted, rather than fail.

    Returns
    -------
    list of Fitted, list of str
        And why any was left out.
    """
    layer = None
    if head and any(SUCCESSORS[name].head for name in names):
        if rows.classes is None or rows.dim is None:
            raise FileError(f"{rows.path}: must hold logits and feats for --head")
        layer = read_head(head, rows.classes, rows.dim)
        _check_head(head, layer, rows)
    made = [Fitted(name, head=layer if SUCCESSORS[name].head else None, temperature=temperature) for name in names]
    learning = [fitted for fitted in made if fitted.needs_fit]
    left_out: dict[str, str] = {}

    def each(step: Callable[[Fitted], object]) -> None:
        """Of all that are still in. What is wrong with rows is an error about their file, or why one is left out."""
        for fitted in learning:
            if fitted.method in left_out:
                continue
            try:
                step(fitted)
            except ValueError as error:
                if not whatever:
                    raise ValueError(f"{train}: {fitted.method}: {error}") from error
                left_out[fitted.method] = f"{fitted.method} is left out: {error}"

    if learning and train:
        with open_rows(train, rows.logits_key, rows.feats_key, labels_key) as known:
            if (known.classes, known.dim) != (rows.classes, rows.dim):
                raise FileError(
                    f"{train}: must have the columns of {rows.path}, {rows.classes} of logits and {rows.dim} of feats, "
                    f"got {known.classes} and {known.dim}"
                )
            for (logits, feats), labels in zip(chunks_of(known), labels_of(known), strict=True):
                each(partial(Fitted.partial_fit, logits=logits, feats=feats, labels=labels))
        each(Fitted._state)  # or what is lacking
    return [fitted for fitted in made if fitted.method not in left_out], [*left_out.values()]


def _check_head(path: Path, head: Head, rows: Rows) -> None:
    """FileError where the first rows' logits are not what the head makes of their feats."""
    logits, feats = next(rows.chunks(8))
    assert logits is not None
    assert feats is not None
    made = feats.double() @ head[0].double().T + (0 if head[1] is None else head[1].double())
    usable = logits.isfinite() & made.isfinite()
    off = (made - logits).abs().masked_fill(~usable, 0)
    scale = logits.double().abs().masked_fill(~usable, 0).amax() if logits.numel() else 0
    if off.numel() and off.amax() > 0.02 * scale:
        raise FileError(
            f"{path}: feats times its weight must be the logits of {rows.path}, they are off by {float(off.amax()):.3g}"
        )

"""Checks of arguments and the bridge from numpy: every public function enters through here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Array = Tensor | np.ndarray
ArrayT = TypeVar("ArrayT", Tensor, np.ndarray)


class _Writable:
    # torch warns about read-only numpy memory (a memory-mapped file, say); nothing here writes to it.
    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _from_numpy(name: str, x: np.ndarray) -> Tensor:
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    if not x.flags.aligned or any(step < 0 or step % x.itemsize for step in x.strides):
        x = x.copy()  # which ascontiguousarray does not where an axis is of length 1, whatever its stride
    try:
        return torch.from_numpy(x if x.flags.writeable else np.asarray(_Writable(x)))
    except TypeError:
        raise TypeError(f"{name} must hold float16, float32 or float64 numbers, got numpy {x.dtype}") from None


def take(**named: Any) -> tuple[list[Tensor | None], bool]:
    """Matrices [N, *] as tensors, and whether they came as numpy arrays. None stays None."""
    tensors: list[Tensor | None] = []
    kinds: dict[str, str] = {}
    for name, x in named.items():
        if x is None:
            tensors.append(None)
            continue
        if isinstance(x, Tensor):
            kinds[name] = "torch tensor"
        elif isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name} must not be a masked array: a masked class is a logit of -inf")
        elif isinstance(x, np.ndarray):
            kinds[name] = "numpy array"
            x = _from_numpy(name, x)
        else:
            raise TypeError(f"{name} must be a torch tensor or a numpy array, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
        if x.ndim != 2:
            hint = f"; a single row is {name}[None]" if x.ndim == 1 else ""
            raise ValueError(f"{name} must be 2-D, one row per sample, got shape {list(x.shape)}{hint}")
        tensors.append(x)
    if len(kinds) > 1 and len(set(kinds.values())) > 1:
        raise TypeError("mixed inputs: " + ", ".join(f"{name} is a {kind}" for name, kind in kinds.items()))
    return tensors, "numpy array" in kinds.values()


def logits_and_feats(logits: Any, feats: Any) -> tuple[Tensor | None, Tensor | None, bool]:
    """Checked logits [N, C] and feats [N, D], one of which may be None."""
    if logits is None and feats is None:
        raise TypeError("logits must be a torch tensor or a numpy array, got None")
    (f, h), as_numpy = take(logits=logits, feats=feats)
    if f is not None:
        if f.shape[1] == 0:
            raise ValueError(f"logits must have at least one class, got shape {list(f.shape)}")
        if h is not None:
            same_rows("feats", h, f)
    return f, h, as_numpy


def same_rows(name: str, x: Tensor, logits: Tensor) -> None:
    if x.shape[0] != logits.shape[0]:
        raise ValueError(f"{name} must have the {logits.shape[0]} rows of logits, got shape {list(x.shape)}")
    if x.device != logits.device:
        raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {x.device}")


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where an input is float64, else float32: never a half type."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def give(x: Tensor, as_numpy: bool) -> Any:
    """A result in the kind of the inputs."""
    return x.numpy() if as_numpy else x


def number(
    name: str, x: Any, *, above: float = -math.inf, at_least: float = -math.inf, infinite: bool = False
) -> float:
    """A real number > `above` and >= `at_least`, as float; NaN never, infinity only where `infinite`."""
    if isinstance(x, bool | np.bool_) or not isinstance(x, Real):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    try:
        x = float(x)
    except OverflowError:  # an integer beyond the floats
        x = math.inf if x > 0 else -math.inf
    if not (x > above and x >= at_least) or (abs(x) == math.inf and not infinite):
        bound = f" > {above:g}" if above > -math.inf else f" >= {at_least:g}" if at_least > -math.inf else ""
        raise ValueError(f"{name} must be a{'' if infinite else ' finite'} number{bound}, got {x!r}")
    return x


def temperature_of(x: Any) -> float:
    return number("temperature", x, above=0)


def order_of(name: str, x: Any, above: float = -math.inf) -> float:
    r = number(name, x, at_least=0, above=above, infinite=True)
    return r if r <= 1e18 else math.inf  # between which no float64 can tell


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {x!r}")
    return bool(x)


def choice(name: str, x: Any, known: Sequence[str]) -> str:
    if not isinstance(x, str) or x not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {x!r}")
    return str(x)


def label_probabilities(labels: Any, logits: Tensor, as_numpy: bool) -> Tensor:
    """`labels` [N, C], of the kind and on the device of logits; whether each row is a distribution is not asked."""
    if not isinstance(labels, np.ndarray if as_numpy else Tensor):
        kind = "numpy array" if as_numpy else "torch tensor"
        got = type(labels).__name__
        raise TypeError(f"labels must be 'uniform', 'predicted', 'log_predicted' or a {kind}, got {got}")
    (q,), _ = take(labels=labels)
    assert q is not None
    if q.shape != logits.shape:
        wanted = f"{list(logits.shape)}, a distribution per row (one-hot for classes)"
        raise ValueError(f"labels must be {wanted}, got {list(q.shape)}")
    same_rows("labels", q, logits)
    return q

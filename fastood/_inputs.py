"""Checks of arguments and the bridge from numpy: every public function enters through here."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fractions import Fraction
from numbers import Real
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastood._fork import one_thread_if_forked
from fastood.kernels.contract import result_dtype as result_dtype
from fastood.kernels.seam import constant

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Every number of these is one of float16 too; and what safetensors calls them.
FP8_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
FP8 = tuple(FP8_NAMES)  # an older torch.compile cannot look a type up in a dict

LARGEST = sys.float_info.max  # of Python's floats

Array = Tensor | np.ndarray
ArrayT = TypeVar("ArrayT", bound=Array)
Order = float | Literal["auto"] | None  # an order; the default of the score; none


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


def widened(x: Any) -> Any:
    """`x`; a tensor of FP8, which few operations of torch know, as the same numbers in float16."""
    return x.to(torch.float16) if isinstance(x, Tensor) and x.dtype in FP8 else x


def take(**named: Any) -> tuple[list[Tensor | None], bool]:
    """Matrices [N, *] as tensors, and whether they came as numpy arrays. None stays None."""
    one_thread_if_forked()
    tensors: list[Tensor | None] = []
    kinds: dict[str, str] = {}
    for name, x in named.items():
        if x is None:
            tensors.append(None)
            continue
        if isinstance(x, Tensor):
            kinds[name] = "torch tensor"
        elif isinstance(x, np.ma.MaskedArray):
            remedy = (
                "a masked class is a logit of -inf" if name == "logits" else "say what stands there by its filled()"
            )
            raise TypeError(f"{name} must not be a masked array: {remedy}")
        elif isinstance(x, np.ndarray):
            kinds[name] = "numpy array"
            x = _from_numpy(name, x)
        else:
            hint = f"; {name}.to_numpy() is one" if hasattr(x, "to_numpy") else ""  # a data frame
            if not hint and hasattr(x, "__array__"):  # an Arrow table, another library's array
                hint = f"; np.asarray({name}) is one"
            raise TypeError(f"{name} must be a torch tensor or a numpy array, got {type(x).__name__}{hint}")
        if x.dtype not in FLOATS and x.dtype not in FP8:
            fp8 = "FP8 (float8_e4m3fn, float8_e5m2, their fnuz kinds)"
            raise TypeError(f"{name} must be float16, bfloat16, float32, float64 or {fp8}, got {x.dtype}")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
        if x.ndim != 2:
            hint = f"; a single row is {name}[None]" if x.ndim == 1 else ""
            if x.ndim > 2:
                flat = f"{name}.movedim(1, -1).flatten(0, -2)"
                if kinds[name] == "numpy array":
                    flat = f"np.moveaxis({name}, 1, -1).reshape(-1, {name}.shape[1])"
                hint = f"; a row per position of [N, columns, ...] is {flat}"
            raise ValueError(f"{name} must be 2-D, one row per sample, got shape {list(x.shape)}{hint}")
        tensors.append(widened(x))
    if len(kinds) > 1 and len(set(kinds.values())) > 1:
        raise TypeError("mixed inputs: " + ", ".join(f"{name} is a {kind}" for name, kind in kinds.items()))
    return tensors, "numpy array" in list(kinds.values())


def rows_along(dim: int, **named: Any) -> tuple[list[Any], tuple[int, ...]]:
    """Tensors with columns along `dim` as [positions, columns], views where strides allow; the positions' shape.

    Examples
    --------
    >>> import torch
    >>> from fastood._inputs import rows_along
    >>> (f, h), shape = rows_along(1, logits=torch.zeros(2, 19, 4, 5), feats=None)
    >>> f.shape, h, shape
    (torch.Size([40, 19]), None, (2, 4, 5))
    """
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be a whole number, got {dim!r}")
    rows: list[Any] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for name, x in named.items():
        if x is None:
            rows.append(None)
            continue
        if not isinstance(x, (Tensor, np.ndarray)):
            take(**{name: x})  # which says what is wrong
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"dim must be a dimension of {name}, got dim={dim} for shape {list(x.shape)}")
        moved: Any = x.movedim(dim, -1) if isinstance(x, Tensor) else np.moveaxis(x, dim, -1)
        shapes[name] = tuple(moved.shape[:-1])
        rows.append(moved.reshape(math.prod(shapes[name]), moved.shape[-1]))
    of_each = list(shapes.values())
    if any(shape != of_each[0] for shape in of_each[1:]):  # a set would make numbers of a compiler's symbols
        (first, wanted), *_, (name, got) = shapes.items()
        raise ValueError(f"{name} must have the positions of {first}, {list(wanted)}, got {list(got)}")
    return rows, (*shapes.values(), ())[0]


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


def give(x: Tensor, as_numpy: bool) -> Any:
    """A result in the kind of the inputs."""
    return x.numpy() if as_numpy else x


def as_array(x: Any) -> Any:
    """A tensor as an array, of floats in float64: numpy has not all of torch's. Anything else stays."""
    if not isinstance(x, Tensor):
        return x
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy()


def vector(name: str, x: Any) -> NDArray[np.float64]:
    """Scores [N], of any kind, as numbers that have an order."""
    one_thread_if_forked()
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array: leave masked rows out, knowingly, by its compressed()")
    try:
        a = np.asarray(as_array(x))
    except ValueError:  # rows of several lengths
        raise ValueError(f"{name} must be a non-empty vector, got a ragged one") from None
    if a.size and a.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got {a.dtype}")
    a = a.astype(np.float64, copy=False)
    if a.ndim != 1 or a.size == 0:
        raise ValueError(f"{name} must be a non-empty vector, got shape {list(a.shape)}")
    if bad := int(np.isnan(a).sum()):
        raise ValueError(f"{name} must not hold NaN, got {bad} of {a.size}: leave those rows out, knowingly")
    return a


def number(
    name: str, x: Any, *, above: float = -math.inf, at_least: float = -math.inf, infinite: bool = False
) -> float:
    """A real number > `above` and >= `at_least`, as float; NaN never, infinity only where `infinite`."""
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, Real):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    exact: Any = x if isinstance(x, (int, Fraction)) else 0
    if abs(exact) > LARGEST:  # for which float raises what a compiler does not catch
        x = math.inf if exact > 0 else -math.inf
    x = float(x)
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
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {x!r}")
    return bool(x)


def choice(name: str, x: Any, known: Sequence[str]) -> str:
    if not isinstance(x, str) or x not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {x!r}{did_you_mean(x, known)}")
    return known[known.index(x)]  # a plain str: the str of an enum's member is its name


def class_labels(name: str, labels: Any, n: int, C: int) -> Tensor:
    """`labels`, integers of any type, order and strides, as n of C classes: int64, on the device they are on."""
    if isinstance(labels, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a masked array: leave those rows out")
    if isinstance(labels, np.ndarray):
        if labels.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers, got numpy {labels.dtype}")
        y = torch.from_numpy(labels.astype(np.int64))
    elif not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch tensor or a numpy array of integers, got {type(labels).__name__}")
    else:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {labels.dtype}")
        y = labels.long()
    if y.shape != (n,):
        raise ValueError(f"{name} must be [{n}], one class per row, got shape {list(y.shape)}")
    if n and (int(y.min()) < 0 or int(y.max()) >= C):
        raise ValueError(f"{name} must be classes 0..{C - 1}, got {int(y.min())}..{int(y.max())}")
    return y


def did_you_mean(x: Any, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known."""
    close = _closest(x, tuple(known)) if isinstance(x, str) else None
    return f": did you mean {close!r}?" if close else ""


@constant
def _closest(x: str, known: tuple[str, ...]) -> str | None:
    return next(iter(get_close_matches(x.lower(), [name for name in known if name != x], n=1)), None)


def label_probabilities(labels: Any, logits: Tensor, as_numpy: bool) -> Tensor:
    """`labels` [N, C], of the kind and on the device of logits; whether each row is a distribution is not asked."""
    if not isinstance(labels, np.ndarray if as_numpy else Tensor):
        kind = "numpy array" if as_numpy else "torch tensor"
        got = type(labels).__name__
        raise TypeError(f"labels must be 'uniform', 'predicted', 'log_predicted' or a {kind}, got {got}")
    wanted = f"{list(logits.shape)}, a distribution per row"
    if labels.ndim == 1:
        C = logits.shape[1]
        one_hot = f"np.eye({C})[labels]" if as_numpy else f"torch.nn.functional.one_hot(labels, {C}).float()"
        raise ValueError(f"labels must be {wanted}, got {list(labels.shape)}; of classes one-hot: {one_hot}")
    (q,), _ = take(labels=labels)
    assert q is not None
    if q.shape != logits.shape:
        raise ValueError(f"labels must be {wanted}, got {list(q.shape)}")
    same_rows("labels", q, logits)
    return q

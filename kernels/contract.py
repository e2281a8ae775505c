"""The contract between scores and backends: a request, and what a backend makes of it.

A score is a formula over a few numbers per row: statistics of logits and norms of features. A request names these, and
the finished columns that are made of them: U * V with V a linear combination of statistics and U a power of a norm.
What is no such product is composed in Python, of a request without columns. A backend is a module with the functions of
``Backend``, and may have that of ``FromLayer``; what it does not support goes to the reference, which is decided in one
place (kernels/__init__.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# A statistic is named by a string, or by a tuple of a string and its parameters.
Stat = str | tuple[str, float] | tuple[str, float, int] | tuple[str, str, float, float, str]

ONE = -1  # the place of the 1 that stands for a statistic in a column of a norm alone
NO_NORM = -1


class Column(NamedTuple):
    """A finished score: the sum of coefficient * stats[place] over `terms`, times (norms[order] / divisor)^power."""

    terms: tuple[tuple[int, float], ...]  # (place, coefficient); place ONE for the number 1
    order: int = NO_NORM  # its place in the request's orders
    power: int = 1  # or 2
    divisor: float = 1.0


class Request(NamedTuple):
    """What one call asks for; work is proportional to it. Hashable: it is worked out once for many calls.

    The result has `shape`, in which -1, the first or the last of it, stands for the rows. With columns it holds them,
    float32, or float64 where an input is float64. Without, the statistics and then the norms as they are, float64.
    """

    stats: tuple[Stat, ...]
    orders: tuple[float, ...]
    columns: tuple[Column, ...]
    shape: tuple[int, ...]
    temperature: float = 1.0
    bias: bool = False  # norms of [h; 1] instead of h
    log: bool = False  # log ||h||_r instead of ||h||_r; there are no columns then

    @property
    def by_row(self) -> bool:
        """Whether a row's scores are beside each other, [N, columns], or each score's rows, [columns, N]."""
        return self.shape[0] < 0

    def sized(self, rows: int) -> list[int]:
        return [rows if n < 0 else n for n in self.shape]

    def of(self, stats: tuple[Stat, ...], orders: tuple[float, ...] = ()) -> Request:
        """These statistics and norms as they are, in all else as here."""
        return self._replace(stats=stats, orders=orders, columns=(), shape=(len(stats) + len(orders), -1))

    def only(self, columns: Sequence[Column]) -> Request:
        """These of its columns, [columns, N]."""
        stats = [*dict.fromkeys(i for c in columns for i, _ in c.terms if i != ONE)]
        orders = [*dict.fromkeys(c.order for c in columns if c.order != NO_NORM)]
        place_of = {ONE: ONE, **{old: i for i, old in enumerate(stats)}}
        moved = tuple(
            c._replace(
                terms=tuple((place_of[i], x) for i, x in c.terms),
                order=NO_NORM if c.order == NO_NORM else orders.index(c.order),
            )
            for c in columns
        )
        these = tuple(self.stats[i] for i in stats), tuple(self.orders[j] for j in orders)
        return self.of(*these)._replace(columns=moved, shape=(len(moved), -1))


class Anchors(NamedTuple):
    """The constant of BatchGrad: G = sum_i (1/T) (e_{y_i} - p(x_i)) h_i^T of its anchors."""

    G: Tensor
    temperature: float
    bias: bool
    sign: int = 1


class Scaling(NamedTuple):
    """SCALE and its kin: the energy of r (f - b) + b, r = e^t, t being sum h over the sum of its k largest.

    t is 1 of a row of zeros. A row of features that are not all finite, or of logits without a softmax, gives NaN.
    """

    percentile: float  # of the features, which are not among the k largest
    bias: Tensor | None  # [C], of the last layer; None for 0
    relu: bool = False  # max(h, 0) for h
    square: bool = False  # r = t^2
    temperature: float = 1.0

    def k(self, D: int) -> int:
        return max(1, D - round(D * self.percentile))


Work = Request | Anchors | Scaling

Call = Callable[[Tensor | None, Tensor | None, Tensor | None], Tensor]


class Run:
    """A request, or BatchGrad, as a backend carries it out.

    Called with checked logits, feats and labels it gives the result. One that the request does not read, or None for
    it, only decides on the result's type. Norms of finite features are finite, the largest double where they are
    beyond it. `labels` is the q of a gradient whose q is "given", [N, C] of any float type: a row that is no
    distribution gives NaN.

    ``quick(logits, feats, labels)`` is the short way, of anything: the result, of arrays an array, or None where the
    long way must be gone, which can tell what is wrong with the arguments.
    """

    def __init__(self, call: Call, quick: Callable[[Any, Any, Any], Any] | None = None) -> None:
        self.call, self.quick = call, quick

    def __call__(self, logits: Tensor | None, feats: Tensor | None, labels: Tensor | None = None) -> Tensor:
        return self.call(logits, feats, labels)


class Backend(Protocol):
    def __hash__(self) -> int: ...

    def unusable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot serve tensors of that device and dtype here, or None where it can."""
        ...

    def supports(self, work: Work, C: int, D: int) -> bool:
        """Whether it carries this out for rows of C logits and D features, 0 of what is not read."""
        ...

    def compile(self, request: Request) -> Run: ...

    def batchgrad(self, anchors: Anchors) -> Run:
        """No product of row statistics: [N], raw times ``anchors.sign``."""
        ...

    def scaled(self, scaling: Scaling) -> Run:
        """Nor this: [N]. The bias lies where logits will."""
        ...


class FromLayer(Protocol):
    def linear(
        self, request: Request, feats: Tensor, weight: Tensor, bias: Tensor | None, predict: bool
    ) -> tuple[list[Tensor], Tensor | None] | None:
        """The request's statistics and norms, [N] each, of the logits feats weight^T + bias, which it does not store,
        and where `predict` their classes; None for what is better done of logits."""
        ...


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where an input is float64, else float32: never a half type."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32

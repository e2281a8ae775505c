"""The operators that a compiled graph holds in place of a kernel: torch.ops.fastood.products and row_stats.

A compiler cannot look into a kernel of ours, and plain operations in its place take several times as long. So under
``torch.compile`` ``select`` gives ``Operator(name)``, a backend whose functions are one operator each; it calls the
backend of that name when the graph runs. Everything else about a call is in the operator's arguments, so that a graph
can be kept on disk and run in another process that has imported fastood. Gradients are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastood.kernels import reference

if TYPE_CHECKING:
    from fastood.kernels import Anchors, Job, Stat, Want

DEVICES = "cpu", "cuda"


class Operator(NamedTuple):
    """A backend (see kernels/__init__.py) that puts the one called `name` into the graph."""

    name: str

    def row_stats(
        self, logits: Tensor | None, feats: Tensor | None, want: Want, labels: Tensor | None = None
    ) -> tuple[dict[Stat, Tensor], Tensor | None]:
        f, h = _needed(logits, feats, want)
        stats, norms = torch.ops.fastood.row_stats(f, h, labels, *_written(want), want.log, self.name)
        return dict(zip(want.stats, stats.unbind(), strict=True)), norms if want.orders else None

    def products(
        self,
        logits: Tensor | None,
        feats: Tensor | None,
        job: Job,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        by_row: bool,
        labels: Tensor | None = None,
    ) -> Tensor:
        f, h = _needed(logits, feats, job.want)
        products = [float(x) for product in job.products for x in product]
        fixed = [-1, *shape[1:]] if by_row else [*shape[:-1], -1]
        return torch.ops.fastood.products(f, h, labels, *_written(job.want), products, fixed, dtype, self.name)

    def batchgrad(self, logits: Tensor, feats: Tensor, anchors: Anchors) -> Tensor:
        return reference.batchgrad(logits, feats, anchors)

    def plain(self, work: Job | Anchors, shape: tuple[int, ...]) -> None:
        return None

    def unusable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None


def _needed(logits: Tensor | None, feats: Tensor | None, want: Want) -> tuple[Tensor | None, Tensor | None]:
    """A tensor that is not read need not be there when the graph runs."""
    return logits if want.stats else None, feats if want.orders else None


# ---- what is wanted, as arguments that a schema has


def _written(want: Want) -> tuple[str, list[float], list[float], float, bool]:
    """The names of the statistics, their numbers, the orders, the temperature and the bias of `want`."""
    names, numbers = [], []
    for stat in want.stats:
        parts = (stat,) if isinstance(stat, str) else stat
        names.append(" ".join([x for x in parts if isinstance(x, str)]))
        numbers += [float(x) for x in parts if not isinstance(x, str)]
    return ",".join(names), numbers, [float(r) for r in want.orders], float(want.temperature), want.bias


def _read(stats: str, numbers: Sequence[float], orders: Sequence[float], *options: Any) -> Want:
    from fastood.kernels import Want

    left = iter(numbers)
    found: list[Stat] = []
    for name in filter(None, stats.split(",")):
        if name == "gen":
            found.append((name, next(left), int(next(left))))
        elif name == "power_sum":
            found.append((name, next(left)))
        elif name.startswith("gradient"):
            _, q, expectation = name.split()
            found.append(("gradient", q, next(left), next(left), expectation))
        else:
            found.append(name)
    return Want(tuple(found), tuple(orders), *options)


@lru_cache(maxsize=1024)
def _work(
    stats: str,
    numbers: tuple[float, ...],
    orders: tuple[float, ...],
    temperature: float,
    bias: bool,
    products: tuple[float, ...],
) -> Job:
    from fastood.kernels import Job, Product

    rows = [products[i : i + 5] for i in range(0, len(products), 5)]
    made = tuple(Product(int(s), int(r), factor, int(power), divisor) for s, r, factor, power, divisor in rows)
    return Job(_read(stats, numbers, orders, temperature, bias), made)


def _backend(name: str) -> Any:
    from fastood.kernels import BACKENDS

    return BACKENDS[name]


def _rows(*tensors: Tensor | None) -> Any:
    return next(x.shape[0] for x in tensors if x is not None)


def _beside(*tensors: Tensor | None) -> Tensor:
    return next(x for x in tensors if x is not None)


# ---- finished scores


class _Call:
    """The products operator with all of its arguments but the tensors, worked out once."""

    def __init__(self, job: Job, shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
        self.job, self.shape, self.dtype, self.backend = job, shape, dtype, _backend(backend)
        self.short: Callable[..., Any] | None = None

    def __call__(self, logits: Tensor | None, feats: Tensor | None, labels: Tensor | None) -> Tensor:
        if self.short is not None and (out := self.short(logits, feats, labels)) is not None:
            return out
        n = _rows(logits, feats)
        options: Any = tuple(n if k < 0 else k for k in self.shape), self.dtype, self.shape[0] < 0
        out = self.backend.products(logits, feats, self.job, *options, labels)
        if out is None:
            found = self.backend.row_stats(logits, feats, self.job.want, labels)
            return reference.multiplied(found, self.job, *options)
        if self.dtype == torch.float32:
            self.short = self.backend.plain(self.job, self.shape)
        return out


@lru_cache(maxsize=1024)
def _call(
    stats: str,
    numbers: tuple[float, ...],
    orders: tuple[float, ...],
    temperature: float,
    bias: bool,
    products: tuple[float, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
) -> _Call:
    return _Call(_work(stats, numbers, orders, temperature, bias, products), shape, dtype, backend)


def _products(
    logits: Tensor | None,
    feats: Tensor | None,
    labels: Tensor | None,
    stats: str,
    numbers: list[float],
    orders: list[float],
    temperature: float,
    bias: bool,
    products: list[float],
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    options = temperature, bias, tuple(products), tuple(shape), dtype, backend
    return _call(stats, tuple(numbers), tuple(orders), *options)(logits, feats, labels)


def _products_by_reference(tensors: Sequence[Tensor | None], arguments: Sequence[Any]) -> tuple[Tensor]:
    logits, feats, labels = tensors
    stats, numbers, orders, temperature, bias, products, shape, dtype, _ = arguments
    job = _work(stats, tuple(numbers), tuple(orders), temperature, bias, tuple(products))
    n = _rows(logits, feats)
    full = tuple(n if k < 0 else k for k in shape)
    return (reference.products(logits, feats, job, full, dtype, shape[0] < 0, labels),)


def _products_fake(logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, *arguments: Any) -> Tensor:
    shape, dtype, _ = arguments[-3:]
    n = _rows(logits, feats)
    return _beside(logits, feats).new_empty([n if k < 0 else k for k in shape], dtype=dtype)


# ---- row statistics


def _row_stats(
    logits: Tensor | None,
    feats: Tensor | None,
    labels: Tensor | None,
    stats: str,
    numbers: list[float],
    orders: list[float],
    temperature: float,
    bias: bool,
    log: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    want = _read(stats, numbers, orders, temperature, bias, log)
    return _stacked(_backend(backend).row_stats(logits, feats, want, labels), want, _beside(logits, feats))


def _stacked(found: tuple[dict[Stat, Tensor], Tensor | None], want: Want, beside: Tensor) -> tuple[Tensor, Tensor]:
    stats, norms = found
    n = beside.shape[0]
    columns = [stats[s].double() for s in want.stats]
    return (
        torch.stack(columns) if columns else beside.new_empty((0, n), dtype=torch.float64),
        beside.new_empty((n, 0), dtype=torch.float64) if norms is None else norms.double().contiguous(),
    )


def _row_stats_by_reference(tensors: Sequence[Tensor | None], arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
    logits, feats, labels = tensors
    want = _read(*arguments[:-1])
    return _stacked(reference.row_stats(logits, feats, want, labels), want, _beside(logits, feats))


def _row_stats_fake(
    logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    stats, _, orders, *_ = arguments
    x, n = _beside(logits, feats), _rows(logits, feats)
    many = len(stats.split(",")) if stats else 0
    return x.new_empty((many, n), dtype=torch.float64), x.new_empty((n, len(orders)), dtype=torch.float64)


# ---- what torch is told of them


def _backward(by_reference: Callable[..., tuple[Tensor, ...]], tensors: int) -> tuple[Callable[..., Any], ...]:
    """The autograd formula of an operator whose first arguments are so many tensors, and what it keeps for it."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.arguments = inputs[tensors:]

    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()
        needed = ctx.needs_input_grad[:tensors]
        with torch.enable_grad():
            # Views: logits and feats may be the same tensor.
            inputs = [x if x is None else x.view_as(x) for x in ctx.saved_tensors]
            outs = by_reference(inputs, ctx.arguments)
        some = [(out, g) for out, g in zip(outs, slopes, strict=True) if g is not None and out.requires_grad]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found: Iterator[Tensor | None] = iter([None] * len(wanted))
        if some:
            of, g = zip(*some, strict=True)
            found = iter(torch.autograd.grad(of, wanted, g, create_graph=twice, allow_unused=True))  # type: ignore[arg-type]
        return (*(next(found) if need else None for need in needed), *[None] * len(ctx.arguments))

    return backward, keep


def _over_rows(operator: Any, tensors: int, rows_of: Callable[..., tuple[int, ...]]) -> Callable[..., Any]:
    """The vmap rule: rows do not know of each other, so a batch of matrices is one of B * N rows.

    ``rows_of(arguments)`` says which axis of each result the rows are.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        B = info.batch_size

        def flat(x: Tensor | None, at: int | None) -> Tensor | None:
            if x is None:
                return None
            x = x.movedim(at, 0) if at is not None else x.expand(B, *x.shape)
            return x.flatten(0, 1)

        matrices = [flat(x, at) for x, at in zip(inputs[:tensors], in_dims, strict=False)]
        out = operator(*matrices, *inputs[tensors:])
        axes = rows_of(inputs[tensors:])
        outs = out if isinstance(out, tuple) else (out,)
        batched = tuple(x.unflatten(at, (B, x.shape[at] // B if B else 0)) for x, at in zip(outs, axes, strict=True))
        return (batched, axes) if isinstance(out, tuple) else (batched[0], axes[0])

    return rule


def _define(
    name: str,
    schema: str,
    call: Callable[..., Any],
    fake: Callable[..., Any],
    by_reference: Callable[..., tuple[Tensor, ...]],
    rows_of: Callable[..., tuple[int, ...]],
) -> None:
    full = f"fastood::{name}"
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        _library.impl(name, call, device.upper())
    torch.library.register_fake(full, fake, lib=_library)
    backward, keep = _backward(by_reference, 3)
    torch.library.register_autograd(full, backward, setup_context=keep, lib=_library)
    torch.library.register_vmap(full, _over_rows(getattr(torch.ops.fastood, name), 3, rows_of), lib=_library)


_library = torch.library.Library("fastood", "DEF")
_TENSORS = "Tensor? logits, Tensor? feats, Tensor? labels"
_WANT = "str stats, float[] numbers, float[] orders, float temperature, bool bias"
_define(
    "products",
    f"({_TENSORS}, {_WANT}, float[] products, int[] shape, ScalarType dtype, str backend) -> Tensor",
    _products,
    _products_fake,
    _products_by_reference,
    lambda arguments: (0 if arguments[-3][0] < 0 else len(arguments[-3]) - 1,),
)
_define(
    "row_stats",
    f"({_TENSORS}, {_WANT}, bool log, str backend) -> (Tensor, Tensor)",
    _row_stats,
    _row_stats_fake,
    _row_stats_by_reference,
    lambda arguments: (1, 0),
)

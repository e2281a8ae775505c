"""The operators that a compiled graph holds in place of a kernel: torch.ops.fastood.products, row_stats and batchgrad.

A compiler cannot look into a kernel of ours, and plain operations in its place take several times as long. So under
``torch.compile`` ``select`` gives ``Operator(name)``, a backend whose functions are one operator each; it calls the
backend of that name when the graph runs. Everything else about a call is in the operator's arguments, so that a graph
can be kept on disk and run in another process that has imported fastood. Gradients are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastood.kernels import reference
from fastood.kernels.seam import exporting

if TYPE_CHECKING:
    from fastood.kernels import Anchors, Job, Stat, Want

DEVICES = "cpu", "cuda"


class Operator(NamedTuple):
    """A backend (see kernels/__init__.py) that puts the one called `name` into the graph."""

    name: str
    always: bool  # even where the compiler does better

    def row_stats(
        self, logits: Tensor | None, feats: Tensor | None, want: Want, labels: Tensor | None = None
    ) -> tuple[dict[Stat, Tensor], Tensor | None]:
        if self._is_light(want):
            return reference.row_stats(logits, feats, want, labels)
        work = f"{self.name};{int(want.bias)};{len(want.orders)};{int(want.log)};{_names(want)};{_numbers(want)}"
        tensors = logits if want.stats else None, feats if want.orders else None, labels
        stats, norms = put(torch.ops.fastood.row_stats, tensors, work)
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
        if self._is_light(job.want):
            return reference.products(logits, feats, job, shape, dtype, by_row, labels)
        fixed = shape[1:] if by_row else shape[:-1]
        tensors = logits if job.want.stats else None, feats if job.want.orders else None, labels
        return put(torch.ops.fastood.products, tensors, work_of(self.name, job, fixed, dtype, by_row))

    def _is_light(self, want: Want) -> bool:
        return not self.always and is_light(want)

    def batchgrad(self, logits: Tensor, feats: Tensor, anchors: Anchors) -> Tensor:
        if self.name != "cpu":  # a CUDA graph would keep addresses of what was made of a G that is its own copy
            return reference.batchgrad(logits, feats, anchors)
        tensors = logits, feats, anchors.G
        work = f"{self.name};{int(anchors.bias)};{anchors.sign};{text(anchors.temperature)}"
        return put(torch.ops.fastood.batchgrad, tensors, work)

    def plain(self, work: Job | Anchors, shape: tuple[int, ...]) -> None:
        return None

    def unusable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None


def is_light(want: Want) -> bool:
    """A maximum alone is best taken where the compiler makes the logits: docs/compile.md has the measurement."""
    return want.stats == ("fmax",) and not want.orders


def put(operator: Any, tensors: tuple[Tensor | None, ...], work: str) -> Any:
    """The operator, without its autograd formula, which takes longer than a small batch, where none is asked for."""
    if exporting() or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        return operator.default(*tensors, work)
    return operator.no_grad(*tensors, work)


# ---- what is wanted, as one argument of a schema: a torch operator takes a microsecond for each that it has


def work_of(backend: str, job: Job, fixed: tuple[int, ...], dtype: torch.dtype, by_row: bool) -> str:
    """Finished scores; `fixed` is the result's shape without its rows."""
    want, wide = job.want, int(dtype == torch.float64)
    sizes = ",".join([f"{n}" for n in fixed])
    head = f"{backend};{int(want.bias)};{len(want.orders)};{wide};{int(by_row)};{sizes};{_names(want)};"
    return head + _numbers(want, *[x for product in job.products for x in product])


def _names(want: Want) -> str:
    """The statistics but for their numbers."""
    parts = [(stat,) if isinstance(stat, str) else stat for stat in want.stats]
    return ",".join([" ".join([x for x in some if isinstance(x, str)]) for some in parts])


def _numbers(want: Want, *others: float) -> str:
    of_stats = [x for stat in want.stats if not isinstance(stat, str) for x in stat if not isinstance(x, str)]
    return ",".join([text(x) for x in (want.temperature, *want.orders, *of_stats, *others)])


def text(x: float) -> str:
    """To the bit, as float.fromhex reads it. Where x is an argument of the compiled function, and so a symbol, this is
    the one way to write it that torch 2.8, 2.13 and 2.14 all trace."""
    return float(x).hex()


def _read(numbers: str) -> Iterator[float]:
    return map(float.fromhex, numbers.split(","))


def _want(names: str, numbers: Iterator[float], orders: int, bias: bool, log: bool) -> Want:
    from fastood.kernels import Want

    T, r = next(numbers), tuple(islice(numbers, orders))
    stats: list[Any] = []
    for name, *words in map(str.split, filter(None, names.split(","))):
        if name == "gradient":
            q, expectation = words
            stats.append((name, q, *islice(numbers, 2), expectation))
        elif name == "gen":
            gamma, M = islice(numbers, 2)
            stats.append((name, gamma, int(M)))
        else:
            stats.append((name, *islice(numbers, 1)) if name == "power_sum" else name)
    return Want(tuple(stats), r, T, bias, log)


def _first(*tensors: Tensor | None) -> Tensor:
    return next(x for x in tensors if x is not None)


def _backend(name: str) -> Any:
    from fastood.kernels import BACKENDS

    return BACKENDS[name]


# ---- finished scores


class _Products:
    """The operator with all that is no tensor, worked out once."""

    def __init__(self, work: str) -> None:
        from fastood.kernels import Job, Product

        backend, bias, orders, _, _, _, names, numbers = work.split(";")
        left = _read(numbers)
        want = _want(names, left, int(orders), bias == "1", log=False)
        rows = zip(*[left] * 5, strict=True)
        products = tuple(Product(int(stat), int(r), factor, int(k), divisor) for stat, r, factor, k, divisor in rows)
        self.job, self.backend, (self.shape, self.dtype) = Job(want, products), _backend(backend), _result(work)
        self.short: Callable[..., Any] | None = None

    def __call__(self, logits: Tensor | None, feats: Tensor | None, labels: Tensor | None) -> Tensor:
        if self.short is not None and (out := self.short(logits, feats, labels)) is not None:
            return out
        options: Any = self.options(logits, feats)
        out = self.backend.products(logits, feats, self.job, *options, labels)
        if out is None:
            return reference.multiplied(
                self.backend.row_stats(logits, feats, self.job.want, labels), self.job, *options
            )
        if self.dtype == torch.float32:
            self.short = self.backend.plain(self.job, self.shape)
        return out

    def options(self, logits: Tensor | None, feats: Tensor | None) -> tuple[tuple[int, ...], torch.dtype, bool]:
        n = _first(logits, feats).shape[0]
        return tuple(n if k < 0 else k for k in self.shape), self.dtype, self.shape[0] < 0


_known_products = lru_cache(maxsize=1024)(_Products)


@lru_cache(maxsize=1024)
def _result(work: str) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape, in which -1 stands for the rows, and the type."""
    *_, wide, by_row, fixed, _, _ = work.split(";")
    sizes = [int(n) for n in filter(None, fixed.split(","))]
    shape = (-1, *sizes) if by_row == "1" else (*sizes, -1)
    return shape, torch.float64 if wide == "1" else torch.float32


def _products(logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, work: str) -> Tensor:
    return _known_products(work)(logits, feats, labels)


def _products_by_reference(
    logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, work: str
) -> tuple[Tensor]:
    call = _Products(work)
    shape, dtype, by_row = call.options(logits, feats)
    return (reference.products(logits, feats, call.job, shape, dtype, by_row, labels),)


def _products_fake(logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, work: str) -> Tensor:
    x, (shape, dtype) = _first(logits, feats), _result(work)
    return x.new_empty([x.shape[0] if n < 0 else n for n in shape], dtype=dtype)


def _rows_of_products(work: str) -> tuple[int]:
    shape, _ = _result(work)
    return (0 if shape[0] < 0 else len(shape) - 1,)


# ---- row statistics


def _asked(work: str) -> tuple[Any, Want]:
    backend, bias, orders, log, names, numbers = work.split(";")
    return _backend(backend), _want(names, _read(numbers), int(orders), bias == "1", log == "1")


def _row_stats(logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, work: str) -> tuple[Tensor, Tensor]:
    backend, want = _asked(work)
    return _stacked(backend.row_stats(logits, feats, want, labels), want, _first(logits, feats))


def _row_stats_by_reference(
    logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, work: str
) -> tuple[Tensor, Tensor]:
    _, want = _asked(work)
    return _stacked(reference.row_stats(logits, feats, want, labels), want, _first(logits, feats))


def _stacked(found: tuple[dict[Stat, Tensor], Tensor | None], want: Want, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics, one after the other, [S, N], and norms [N, P], both float64, of none where none are wanted."""
    stats, norms = found
    columns = [stats[s].double() for s in want.stats]
    return (
        torch.stack(columns) if columns else beside.new_empty((0, len(beside)), dtype=torch.float64),
        beside.new_empty((len(beside), 0), dtype=torch.float64) if norms is None else norms.double().contiguous(),
    )


def _row_stats_fake(
    logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, work: str
) -> tuple[Tensor, Tensor]:
    _, _, orders, _, names, _ = work.split(";")
    x = _first(logits, feats)
    stats = x.new_empty((len(names.split(",")) if names else 0, x.shape[0]), dtype=torch.float64)
    return stats, x.new_empty((x.shape[0], int(orders)), dtype=torch.float64)


# ---- BatchGrad


_anchors: MutableMapping[Tensor, tuple[Any, Anchors]] = WeakTensorKeyDictionary()


def _batchgrad(logits: Tensor, feats: Tensor, G: Tensor, work: str) -> Tensor:
    of = work, 0 if G.is_inference() else G._version
    known = _anchors.get(G)
    if known is None or known[0] != of:
        known = _anchors[G] = of, _anchors_of(G.detach(), work)  # which is not G, or G would live for ever
    return _backend(work.split(";")[0]).batchgrad(logits, feats, known[1]).to(_wide(logits, feats, G))


def _anchors_of(G: Tensor, work: str) -> Anchors:
    from fastood.kernels import Anchors

    _, bias, sign, T = work.split(";")
    return Anchors(G, float.fromhex(T), bias == "1", int(sign))


def _batchgrad_by_reference(logits: Tensor, feats: Tensor, G: Tensor, work: str) -> tuple[Tensor]:
    out = reference.batchgrad(logits, feats, _anchors_of(G, work))
    return (out.to(_wide(logits, feats, G)),)


def _batchgrad_fake(logits: Tensor, feats: Tensor, G: Tensor, work: str) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=_wide(logits, feats, G))


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _batchgrad_of_each(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    """The vmap rule: G may be another one each time."""
    each = [
        x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)
        for x, at in zip(inputs[:3], in_dims, strict=False)
    ]
    out = [torch.ops.fastood.batchgrad.default(*some, *inputs[3:]) for some in zip(*each, strict=True)]
    return torch.stack(out), 0


# ---- what torch is told of them


def _backward(by_reference: Callable[..., tuple[Tensor, ...]]) -> tuple[Callable[..., Any], Callable[..., None]]:
    """The autograd formula of an operator, and what keeps the inputs for it."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.arguments = inputs[3:]

    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views: logits and feats may be the same tensor.
            inputs = [x if x is None else x.view_as(x) for x in ctx.saved_tensors]
            outs = by_reference(*inputs, *ctx.arguments)
        needed = ctx.needs_input_grad[:3]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need and x is not None]
        some = [(out, g) for out, g in zip(outs, slopes, strict=True) if g is not None and out.requires_grad]
        found: Iterator[Tensor | None] = iter([None] * len(wanted))
        if some:
            of, g = zip(*some, strict=True)
            found = iter(torch.autograd.grad(of, wanted, g, create_graph=twice, allow_unused=True))
        return (*(next(found) if need else None for need in needed), None)

    return backward, keep


def _over_rows(name: str, rows_of: Callable[[str], tuple[int, ...]]) -> Callable[..., Any]:
    """The vmap rule: rows do not know of each other, so B matrices of N rows are one of B N.

    ``rows_of(work)`` says which axis of each result the rows are.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        B = info.batch_size

        def flat(x: Tensor | None, at: int | None) -> Tensor | None:
            if x is None:
                return None
            return (x.expand(B, *x.shape) if at is None else x.movedim(at, 0)).flatten(0, 1)

        matrices = [flat(x, at) for x, at in zip(inputs[:3], in_dims, strict=False)]
        operator = getattr(torch.ops.fastood, name).default
        out, axes = operator(*matrices, *inputs[3:]), rows_of(inputs[3])
        sizes = B, len(_first(*matrices)) // max(B, 1)
        if isinstance(out, tuple):
            return tuple(x.unflatten(at, sizes) for x, at in zip(out, axes, strict=True)), axes
        return out.unflatten(axes[0], sizes), axes[0]

    return rule


def _define(
    name: str,
    tensors: str,
    results: str,
    call: Callable[..., Any],
    fake: Callable[..., Any],
    by_reference: Callable[..., tuple[Tensor, ...]],
    vmap_rule: Callable[..., Any],
) -> None:
    for overload in (name, f"{name}.no_grad"):
        schema = f"({tensors}, str work) -> {results}"
        _library.define(overload + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in DEVICES:
            _library.impl(overload, call, device.upper())
        torch.library.register_fake(f"fastood::{overload}", fake, lib=_library)
    operator = getattr(torch.ops.fastood, name).default
    backward, keep = _backward(by_reference)
    torch.library.register_autograd(operator, backward, setup_context=keep, lib=_library)
    torch.library.register_vmap(operator, vmap_rule, lib=_library)


_library = torch.library.Library("fastood", "DEF")
_matrices = "Tensor? logits, Tensor? feats, Tensor? labels"
_define(
    "products",
    _matrices,
    "Tensor",
    _products,
    _products_fake,
    _products_by_reference,
    _over_rows("products", _rows_of_products),
)
_define(
    "row_stats",
    _matrices,
    "(Tensor, Tensor)",
    _row_stats,
    _row_stats_fake,
    _row_stats_by_reference,
    _over_rows("row_stats", lambda work: (1, 0)),
)
_define(
    "batchgrad",
    "Tensor logits, Tensor feats, Tensor G",
    "Tensor",
    _batchgrad,
    _batchgrad_fake,
    _batchgrad_by_reference,
    _batchgrad_of_each,
)

"""The operators that a compiled graph holds in place of a kernel: torch.ops.fastood.scores, batchgrad and scaled.

A compiler cannot look into a kernel of ours, and plain operations in its place take several times as long. So under
``torch.compile`` ``select`` gives ``Operator(name)``, a backend whose functions are one operator each; it calls the
backend of that name when the graph runs. Everything else about a call is in the operator's arguments, so that a graph
can be kept on disk and run in another process that has imported fastood. Gradients are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastood._fork import one_thread_if_forked
from fastood.kernels import reference
from fastood.kernels.contract import Anchors, Backend, Column, Request, Run, Scaling, Work, result_dtype
from fastood.kernels.seam import exporting, forward_mode

DEVICES = "cpu", "cuda"


class Operator(NamedTuple):
    """A backend (see contract.py) that puts the one called `name` into the graph."""

    name: str
    always: bool  # even where the compiler does better

    def unusable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def supports(self, work: Work, C: int, D: int) -> bool:
        return True

    def compile(self, request: Request) -> Run:
        if not self.always and is_light(request):
            return reference.compile(request)
        return Run(partial(self._scores, request))

    def _scores(self, request: Request, logits: Tensor | None, feats: Tensor | None, labels: Tensor | None) -> Tensor:
        dtype = result_dtype(logits, feats) if request.columns else torch.float64
        tensors = logits if request.stats else None, feats if request.orders else None, labels
        return put(torch.ops.fastood.scores, tensors, work_of(self.name, request, dtype))

    def batchgrad(self, anchors: Anchors) -> Run:
        return Run(partial(self._batchgrad, anchors))

    def _batchgrad(
        self, anchors: Anchors, logits: Tensor | None, feats: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        work = f"{self.name};{int(anchors.bias)};{anchors.sign};{text(anchors.temperature)}"
        return put(torch.ops.fastood.batchgrad, (logits, feats, anchors.G), work)

    def scaled(self, scaling: Scaling) -> Run:
        return Run(partial(self._scaled, scaling))

    def _scaled(self, scaling: Scaling, logits: Tensor | None, feats: Tensor | None, labels: Tensor | None) -> Tensor:
        numbers = f"{text(scaling.percentile)};{text(scaling.temperature)}"
        work = f"{self.name};{int(scaling.relu)};{int(scaling.square)};{numbers}"
        return put(torch.ops.fastood.scaled, (logits, feats, scaling.bias), work)


def is_light(request: Request) -> bool:
    """A maximum alone is best taken where the compiler makes the logits: docs/compile.md has the measurement."""
    return request.stats == ("fmax",) and not request.orders


def put(operator: Any, tensors: tuple[Tensor | None, ...], work: str) -> Any:
    """The operator, without its autograd formula, which takes longer than a small batch, where none is asked for."""
    if exporting() or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        return operator.default(*tensors, work)
    return operator.no_grad(*tensors, work)


# ---- a request as one argument of a schema: a torch operator takes a microsecond for each that it has


def work_of(backend: str, request: Request, dtype: torch.dtype) -> str:
    """The request to be carried out by `backend`, with a result of `dtype`."""
    names, numbers = [], [request.temperature, *request.orders]
    for stat in request.stats:
        words = (stat,) if isinstance(stat, str) else stat
        names.append(" ".join([x for x in words if isinstance(x, str)]))
        numbers += [x for x in words if not isinstance(x, str)]
    for column in request.columns:
        for place, coefficient in column.terms:
            numbers += [place, coefficient]
        numbers += [column.order, column.power, column.divisor]
    flags = f"{int(dtype == torch.float64)};{int(request.bias)};{int(request.log)};{len(request.orders)}"
    terms = ",".join([f"{len(c.terms)}" for c in request.columns])
    shape = ",".join([f"{n}" for n in request.shape])
    return f"{backend};{flags};{terms};{shape};{','.join(names)};" + ",".join([text(x) for x in numbers])


def text(x: float) -> str:
    """To the bit, as float.fromhex reads it. Where x is an argument of the compiled function, and so a symbol, this is
    the one way to write it that torch 2.8, 2.13 and 2.14 all trace."""
    return float(x).hex()


class _Asked:
    """A request read again, with all that is no tensor worked out once."""

    def __init__(self, work: str) -> None:
        self.backend, wide, bias, log, orders, terms, shape, names, numbers = work.split(";")
        left = map(float.fromhex, numbers.split(","))
        T, r = next(left), tuple(islice(left, int(orders)))
        stats: list[Any] = []
        for name, *words in map(str.split, filter(None, names.split(","))):
            if name == "gradient":
                q, expectation = words
                stats.append((name, q, *islice(left, 2), expectation))
            elif name == "gen":
                gamma, M = islice(left, 2)
                stats.append((name, gamma, int(M)))
            else:
                stats.append((name, *islice(left, 1)) if name == "power_sum" else name)
        columns = []
        for n in map(int, filter(None, terms.split(","))):
            of_v = tuple((int(next(left)), next(left)) for _ in range(n))
            order, power, divisor = islice(left, 3)
            columns.append(Column(of_v, int(order), int(power), divisor))
        sizes = tuple(map(int, shape.split(",")))
        self.request = Request(tuple(stats), r, tuple(columns), sizes, T, bias == "1", log == "1")
        self.dtype = torch.float64 if wide == "1" else torch.float32
        self.quick: Callable[..., Any] | None = None

    def __call__(self, logits: Tensor | None, feats: Tensor | None, labels: Tensor | None) -> Tensor:
        from fastood.kernels import prepared

        one_thread_if_forked()
        C, D = (0 if x is None else x.shape[1] for x in (logits, feats))
        backend = _serving(self.backend, result_dtype(logits, feats), logits, feats, labels)
        run = prepared(backend, self.request, C, D)
        out = run(logits, feats, labels).to(self.dtype)
        if not self.request.columns or self.dtype == torch.float32:  # what it gives, whatever it is not given
            self.quick = run.quick
        return out


_asked = lru_cache(maxsize=1024)(_Asked)


def _serving(name: str, dtype: torch.dtype, *tensors: Tensor | None) -> Backend:
    """The backend that a graph names, which may be of another machine, or have been moved to another device."""
    from fastood.kernels import BACKENDS, _name_of

    devices = list(dict.fromkeys(x.device for x in tensors if x is not None))
    if len(devices) > 1:
        raise ValueError(f"logits and what goes with them must be on one device, got {', '.join(map(str, devices))}")
    return BACKENDS[_name_of(name, devices[0], dtype)]


def _first(*tensors: Tensor | None) -> Tensor:
    return next(x for x in tensors if x is not None)


def _scores(logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, work: str) -> Tensor:
    if forward_mode():
        return _scores_by_reference(logits, feats, labels, work)[0]
    return _asked(work)(logits, feats, labels)


def _past_the_dispatcher(dispatched: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The short way of eager calls, which sees for itself whether anything looks into these tensors.

    For where nothing does, torch's dispatcher takes as long as a few rows of a score.
    """

    def call(logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, work: str) -> Tensor:
        quick = _asked(work).quick
        out = None if quick is None else quick(logits, feats, labels)
        return dispatched(logits, feats, labels, work) if out is None else out

    return call


def _scores_by_reference(
    logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, work: str
) -> tuple[Tensor]:
    asked = _Asked(work)
    return (reference.scores(asked.request, logits, feats, labels).to(asked.dtype),)


def _scores_fake(logits: Tensor | None, feats: Tensor | None, labels: Tensor | None, work: str) -> Tensor:
    x, asked = _first(logits, feats), _asked(work)
    return x.new_empty(asked.request.sized(x.shape[0]), dtype=asked.dtype)


# ---- BatchGrad and SCALE, of a constant: G, or the bias of the last layer


_runs: MutableMapping[Tensor, dict[Any, tuple[int, Run]]] = WeakTensorKeyDictionary()
_NO_BIAS = torch.empty(0)


def _run_of(
    kind: str,
    read: Callable[[Any, str], Any],
    logits: Tensor,
    feats: Tensor,
    constant: Tensor | None,
    work: str,
    dtype: torch.dtype,
) -> Run:
    """What a backend's function `kind` makes of a constant, until that changes or goes; `read` reads `work`."""
    one_thread_if_forked()
    C, D = logits.shape[1], feats.shape[1]
    tensors = logits, feats, constant
    of = work, C, D, *((x.dtype, x.device) for x in tensors if x is not None)
    key = _NO_BIAS if constant is None else constant
    runs = _runs.setdefault(key, {})
    version = 0 if key.is_inference() else key._version
    known = runs.get(of)
    if known is None or known[0] != version:
        from fastood.kernels import supporting

        backend = _serving(work.split(";")[0], dtype, *tensors)
        asked = read(None if constant is None else constant.detach(), work)  # not itself, or it would live for ever
        known = runs[of] = version, getattr(supporting(backend, asked, C, D), kind)(asked)
    return known[1]


def _batchgrad(logits: Tensor, feats: Tensor, G: Tensor, work: str) -> Tensor:
    dtype = result_dtype(logits, feats, G)
    return _run_of("batchgrad", _anchors_of, logits, feats, G, work, dtype)(logits, feats)


def _anchors_of(G: Tensor, work: str) -> Anchors:
    _, bias, sign, T = work.split(";")
    return Anchors(G, float.fromhex(T), bias == "1", int(sign))


def _batchgrad_by_reference(logits: Tensor, feats: Tensor, G: Tensor, work: str) -> tuple[Tensor]:
    return (reference.expected_l1(_anchors_of(G, work), logits, feats),)


def _batchgrad_fake(logits: Tensor, feats: Tensor, G: Tensor, work: str) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=result_dtype(logits, feats, G))


def _scaled(logits: Tensor, feats: Tensor, bias: Tensor | None, work: str) -> Tensor:
    dtype = result_dtype(logits, feats)
    return _run_of("scaled", _scaling_of, logits, feats, bias, work, dtype)(logits, feats).to(dtype)


def _scaling_of(bias: Tensor | None, work: str) -> Scaling:
    _, relu, square, percentile, T = work.split(";")
    return Scaling(float.fromhex(percentile), bias, relu == "1", square == "1", float.fromhex(T))


def _scaled_by_reference(logits: Tensor, feats: Tensor, bias: Tensor | None, work: str) -> tuple[Tensor]:
    return (reference.scaled(_scaling_of(bias, work))(logits, feats),)


def _scaled_fake(logits: Tensor, feats: Tensor, bias: Tensor | None, work: str) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=result_dtype(logits, feats))


def _one_by_one(operator: str, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    """The vmap rule: the constant may be another one each time."""
    each = [
        [None] * info.batch_size
        if x is None
        else x.expand(info.batch_size, *x.shape)
        if at is None
        else x.movedim(at, 0)
        for x, at in zip(inputs[:3], in_dims, strict=False)
    ]
    call = getattr(torch.ops.fastood, operator).default
    return torch.stack([call(*some, *inputs[3:]) for some in zip(*each, strict=True)]), 0


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


def _over_rows(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    """The vmap rule: rows do not know of each other, so B matrices of N rows are one of B N."""
    B = info.batch_size

    def flat(x: Tensor | None, at: int | None) -> Tensor | None:
        if x is None:
            return None
        return (x.expand(B, *x.shape) if at is None else x.movedim(at, 0)).flatten(0, 1)

    matrices = [flat(x, at) for x, at in zip(inputs[:3], in_dims, strict=False)]
    out = torch.ops.fastood.scores.default(*matrices, *inputs[3:])
    axis = _asked(inputs[3]).request.shape.index(-1)
    return out.unflatten(axis, (B, len(_first(*matrices)) // max(B, 1))), axis


def _define(
    name: str,
    tensors: str,
    call: Callable[..., Any],
    fake: Callable[..., Any],
    by_reference: Callable[..., tuple[Tensor, ...]],
    vmap_rule: Callable[..., Any],
    *tags: torch.Tag,
) -> None:
    for overload in (name, f"{name}.no_grad"):
        schema = f"({tensors}, str work) -> Tensor"
        _library.define(overload + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        for device in DEVICES:
            _library.impl(overload, call, device.upper())
        # Which serves fake tensors too; register_fake looks its caller's source up, for a millisecond of each import.
        _library.impl(overload, fake, "Meta")
    operator = getattr(torch.ops.fastood, name).default
    backward, keep = _backward(by_reference)
    torch.library.register_autograd(operator, backward, setup_context=keep, lib=_library)
    torch.library.register_vmap(operator, vmap_rule, lib=_library)


_library = torch.library.Library("fastood", "DEF")
_matrices = "Tensor? logits, Tensor? feats, Tensor? labels"
_define("scores", _matrices, _scores, _scores_fake, _scores_by_reference, _over_rows)
_no_grad = torch.ops.fastood.scores.no_grad
if hasattr(_no_grad, "_op"):  # what calling it calls: torch 2.14 itself may put another function there
    _no_grad._op = _past_the_dispatcher(_no_grad._op)
# Called between two CUDA graphs: both keep what they make of a constant, and to a graph the compiler gives copies.
_define(
    "batchgrad",
    "Tensor logits, Tensor feats, Tensor G",
    _batchgrad,
    _batchgrad_fake,
    _batchgrad_by_reference,
    partial(_one_by_one, "batchgrad"),
    torch.Tag.cudagraph_unsafe,
)
_define(
    "scaled",
    "Tensor logits, Tensor feats, Tensor? bias",
    _scaled,
    _scaled_fake,
    _scaled_by_reference,
    partial(_one_by_one, "scaled"),
    torch.Tag.cudagraph_unsafe,
)

"""fastood.score and its kin where the classes are split over processes: vocabulary-parallel heads, sharded DTensors.

Each rank holds a slice of the classes of all rows, and the same features. What travels is a few float64 per row, never
a logit (but for gen, whose largest ones do): one all_gather of 512 bytes by which the ranks see that they agree, sent
while each reads its slice; one of what the slices come to (kernels/slices.py); and for TV one of a number per row.
Every rank merges the same numbers in the same order, so the result is the same on all of them, to the bit.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Literal, NamedTuple, overload
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastood._inputs import ArrayT, Order, flag, give, result_dtype, rows_along, same_rows, take, temperature_of
from fastood._plan import Plan
from fastood.api import _entries, _entry, _names, _order
from fastood.kernels import Request, Stat, prepared, select
from fastood.kernels.seam import traced
from fastood.kernels.slices import Whole, above_level, parts_for, parts_of
from fastood.kernels.statistics import FORMULAS
from fastood.linear import PROBABILITY, Predicted, _layer, _tiles
from fastood.registry import SCORES, Method, Score, stat_of


def score(
    logits: ArrayT,
    feats: ArrayT | None = None,
    method: Method = "energy",
    *,
    group: Any = None,
    norm: Order = "auto",
    temperature: float = 1.0,
    bias: bool = False,
    log: bool = False,
    oriented: bool = True,
    backend: str = "auto",
    dim: int | None = None,
    **params: Any,
) -> ArrayT:
    """``fastood.score`` of rows whose classes are split over the ranks of a group. Higher = more in-distribution.

    Every rank of the group calls it, with the same arguments but for its slice of the logits.

    Parameters
    ----------
    logits : Tensor or ndarray [N, C_i], or DTensor [N, C]
        This rank's slice of the classes: slices may differ in size, and one may have no class. Of a DTensor the
        classes are ``Shard`` over one dimension of its mesh; over others rows may be, each of which is then a group.
    feats : Tensor, ndarray or DTensor [N, D], optional
        Penultimate features, whole and the same on every rank of the group.
    group : ProcessGroup or DeviceMesh, optional
        The ranks that hold the classes; of a mesh of several dimensions the one that splits them, ``mesh["tp"]``.
        Left out: that of the DTensor, else all ranks.
    method, norm, temperature, bias, log, oriented, backend, dim, **params
        As of ``fastood.score``: every name in ``fastood.SCORES``, and scores of your own.

    Returns
    -------
    Tensor, ndarray or DTensor [N]
        What ``fastood.score`` gives of all logits, within the same numeric contract; the same bits on every rank. For a
        DTensor one whose rows lie as those of logits do.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was wanted. On all ranks, where one of them was given bad arguments, or
        not those of the others: no rank is left waiting.
    RuntimeError
        Where torch.distributed has not been initialised; where a gradient is asked for, or a compiler or a transform of
        functions is at work, which see none of this.

    Notes
    -----
    Two collectives, and one more for TV and GradNorm; see docs/distributed.md for how many bytes. A rank that does not
    call leaves the others waiting until the group's timeout, as in any collective.

    Examples
    --------
    Four classes of one process, for want of others:

    >>> import fastood, torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> fastood.distributed.score(torch.tensor([[4.0, 0.0, 1.0, 2.0]]), method="msp")
    tensor([0.8310])
    >>> dist.destroy_process_group()
    """
    given: Any = logits, feats
    ranks = _Ranks.of("logits", logits, 1 if dim is None else dim, group)
    with ranks.told():
        entry = _entry(method)
        plan = Plan(
            [(entry, _order(entry, norm, feats is not None))], (1, -1), temperature, bias, log, oriented, params
        )
        rows = _Rows.of_logits(ranks, plan.request, logits, feats, dim, backend, f"score({_described(plan)})")
        plan._check_given(*given)
    return rows.scores(plan)[0]


def scores(
    logits: ArrayT,
    feats: ArrayT | None = None,
    methods: Iterable[Method] | None = None,
    *,
    group: Any = None,
    norm: Order = "auto",
    temperature: float = 1.0,
    bias: bool = False,
    log: bool = False,
    oriented: bool = True,
    backend: str = "auto",
    dim: int | None = None,
    **params: Any,
) -> dict[str, ArrayT]:
    """``fastood.scores`` of rows whose classes are split: name -> [N], from as many collectives as one score takes.

    The arguments are those of ``fastood.distributed.score``, and so are its errors; `methods` left out are all that
    logits, and feats where they are given, allow.

    Examples
    --------
    >>> import fastood, torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> fastood.distributed.scores(torch.tensor([[4.0, 0.0]]), methods=["msp", "tv"])
    {'msp': tensor([0.9820]), 'tv': tensor([0.4820])}
    >>> dist.destroy_process_group()
    """
    given: Any = logits, feats
    ranks = _Ranks.of("logits", logits, 1 if dim is None else dim, group)
    with ranks.told():
        if methods is None:
            entries = [e for e in SCORES.values() if feats is not None or "feats" not in e.needs]
            entries = [e for e in entries if (e.positive or not log) and (e.stats or norm is not None)]
        else:
            entries = _entries("methods", methods)
        columns = [(e, _order(e, "auto" if e.gradient else norm, feats is not None)) for e in entries]
        plan = Plan(columns, (len(columns), -1), temperature, bias, log, oriented, params)
        rows = _Rows.of_logits(ranks, plan.request, logits, feats, dim, backend, f"scores({_described(plan)})")
        plan._check_given(*given)
    return dict(zip([e.name for e in entries], rows.scores(plan), strict=True))


def row_stats(
    logits: ArrayT,
    stats: Iterable[Stat] | None = None,
    *,
    group: Any = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> dict[Stat, ArrayT]:
    """``fastood.row_stats`` of rows whose classes are split: name -> [N].

    Logits, group and errors are as in ``fastood.distributed.score``, the rest as in ``fastood.row_stats``.

    Examples
    --------
    >>> import fastood, torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> fastood.distributed.row_stats(torch.tensor([[80.0, 0.0]]), ["msp", "one_minus_msp"])
    {'msp': tensor([1.]), 'one_minus_msp': tensor([1.8049e-35])}
    >>> dist.destroy_process_group()
    """
    ranks = _Ranks.of("logits", logits, 1, group)
    with ranks.told():
        wanted = tuple(stat_of(s) for s in _names("stats", FORMULAS if stats is None else stats))
        request = Request(wanted, (), (), (len(wanted), -1), temperature_of(temperature))
        rows = _Rows.of_logits(ranks, request, logits, None, None, backend, f"row_stats({wanted}, {temperature})")
    found, _, dtype = rows.merged()
    return {s: rows.give(found[s].to(dtype)) for s in wanted}


@overload
def score_linear(
    feats: ArrayT, weight: ArrayT, bias: ArrayT | None = ..., method: Method = ..., *, group: Any = ...,
    norm: Order = ..., temperature: float = ..., log: bool = ..., oriented: bool = ...,
    backend: str = ..., predict: Literal[False] = ..., **params: Any,
) -> ArrayT: ...  # fmt: skip


@overload
def score_linear(
    feats: ArrayT, weight: ArrayT, bias: ArrayT | None = ..., method: Method = ..., *, group: Any = ...,
    norm: Order = ..., temperature: float = ..., log: bool = ..., oriented: bool = ...,
    backend: str = ..., predict: Literal[True], **params: Any,
) -> Predicted[ArrayT]: ...  # fmt: skip


def score_linear(
    feats: ArrayT,
    weight: ArrayT,
    bias: ArrayT | None = None,
    method: Method = "energy",
    *,
    group: Any = None,
    norm: Order = "auto",
    temperature: float = 1.0,
    log: bool = False,
    oriented: bool = True,
    backend: str = "auto",
    predict: bool = False,
    **params: Any,
) -> ArrayT | Predicted[ArrayT]:
    """``fastood.score_linear`` of a last layer whose classes are split. Higher = more in-distribution.

    The logits are nowhere: on each rank a tile of those of its own classes.

    Parameters
    ----------
    feats : Tensor, ndarray or DTensor [N, D]
        Penultimate features, whole and the same on every rank of the group.
    weight : Tensor or ndarray [C_i, D], or DTensor [C, D]
        This rank's slice of the last layer, ``Shard(0)`` of a DTensor, as ``ColwiseParallel`` leaves it.
    bias : Tensor, ndarray or DTensor [C_i], optional
        Of the same classes.
    method, predict
        As of ``fastood.score_linear``; a class is one of all C, in the order of the ranks.
    group, norm, temperature, log, oriented, backend, **params
        As of ``fastood.distributed.score``.

    Returns
    -------
    Tensor, ndarray or DTensor [N]
        As ``fastood.score_linear``, whose Notes on precision hold; the same bits on every rank.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As ``fastood.distributed.score``.

    Notes
    -----
    A weight that is a parameter asks for a gradient: call it under ``torch.no_grad()``. TV and GradNorm multiply twice.
    Under FSDP every rank has rows of its own, but class parallelism needs the same ones: docs/distributed.md says how.

    Examples
    --------
    >>> import fastood, torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> feats, weight = torch.ones(1, 2), torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    >>> fastood.distributed.score_linear(feats, weight, method="msp", norm=None)
    tensor([0.9820])
    >>> dist.destroy_process_group()
    """
    ranks = _Ranks.of("weight", weight, 0, group)
    with ranks.told():
        entry = _entry(method)
        columns: list[tuple[Score, float | None]] = [(entry, _order(entry, norm, True))]
        if flag("predict", predict):
            columns.append((PROBABILITY, None))
        plan = Plan(columns, (len(columns), -1), temperature, False, log, oriented, params)
        asked = f"score_linear({_described(plan)}, {predict=}) with {'no' if bias is None else 'a'} bias"
        rows = _Rows.of_layer(ranks, plan.request, feats, weight, bias, backend, predict, asked)
    out = rows.scores(plan)
    if rows.classes is None:
        return out[0]
    return Predicted(out[0], rows.give(rows.classes), out[1].exp() if log else out[1])


def _described(plan: Plan) -> str:
    """What has to be the same on every rank."""
    names = [e.name if r is None else f"{e.name} norm={r:g}" for e, r in plan.scores]
    T, bias, log = plan.request.temperature, plan.request.bias, plan.request.log
    return f"{', '.join(names)}, temperature={T!r}, {bias=}, {log=}, oriented={plan.oriented}, {plan.params}"


class _Ranks(NamedTuple):
    """The processes that share the classes."""

    group: dist.ProcessGroup  # the classes lie in the order of its ranks

    @classmethod
    def of(cls, name: str, x: Any, dim: int, group: Any) -> _Ranks:
        """The group of an argument that is split along `dim`."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed is not initialised: torch.distributed.init_process_group() does it")
        if _is_dtensor(x):
            if group is not None:
                raise ValueError(f"group must be left out where {name} is a DTensor, whose mesh says which it is")
            return cls(x.device_mesh.get_group(_split_along(name, x, dim)))
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                example = (group.mesh_dim_names or ("tp",))[-1]
                raise ValueError(f"group must be one dimension of the mesh, as mesh[{example!r}] is, got {group}")
            return cls(group.get_group())
        if group is None:
            group = dist.group.WORLD
        if group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gives ranks that are not in it
            raise ValueError("group must have this rank in it, got one that has not")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed process group or a DeviceMesh, got {group!r}")
        return cls(group)

    @contextmanager
    def told(self) -> Iterator[None]:
        """An error in here is one on all ranks, which would otherwise wait for this one."""
        try:
            yield
        except Exception as error:
            self.greeted(_Greeting.of(False, 0, 0, False, f"{type(error).__name__}: {error}"))()
            raise

    @property
    def devices(self) -> list[str]:
        """The types of device that the group's backends serve."""
        return [x.split(":")[0] for x in dist.get_backend_config(self.group).split(",")]  # cpu:gloo,cuda:nccl

    def greeted(self, greeting: _Greeting) -> Callable[[], list[_Greeting]]:
        """Sends it; what is returned waits for those of all ranks."""
        # From host to host where that can be, for it is the host that reads them.
        device = "cpu" if "cpu" in self.devices else self.devices[0]
        sent = torch.frombuffer(bytearray(greeting.packed()), dtype=torch.uint8).to(device)
        received = sent.new_empty(dist.get_world_size(self.group), len(sent))
        on_its_way = dist.all_gather(list(received), sent, group=self.group, async_op=True)

        def wait() -> list[_Greeting]:
            on_its_way.wait()
            return [_Greeting.unpacked(bytes(x)) for x in received.cpu().numpy()]

        return wait

    def gathered(self, x: Tensor) -> Tensor:
        """x of every rank: [ranks, *x.shape]."""
        received = x.new_empty(dist.get_world_size(self.group), *x.shape)
        if x.numel():
            dist.all_gather(list(received), x.contiguous(), group=self.group)
        return received


_GREETING = struct.Struct("<4qI476s")  # 512 bytes


class _Greeting(NamedTuple):
    """What ranks tell each other before anything in which one could wait for another for ever."""

    good: bool
    rows: int
    classes: int
    wide: bool  # whether an input is float64
    check: int  # of the whole text, which is sent as far as there is room
    text: str  # how it was called, or what is wrong with that

    @classmethod
    def of(cls, good: bool, rows: int, classes: int, wide: bool, text: str) -> _Greeting:
        return cls(good, rows, classes, wide, crc32(text.encode()), text)

    def packed(self) -> bytes:
        return _GREETING.pack(*self[:-1], self.text.encode())

    @classmethod
    def unpacked(cls, sent: bytes) -> _Greeting:
        good, rows, classes, wide, check, text = _GREETING.unpack(sent)
        return cls(bool(good), rows, classes, bool(wide), check, text.rstrip(b"\0").decode(errors="ignore"))


def _agreed(greetings: list[_Greeting]) -> None:
    first = greetings[0]
    for rank, one in enumerate(greetings):
        if not one.good:
            raise ValueError(f"rank {rank} of the group: {one.text}")
        if one.check != first.check:
            raise ValueError(
                f"every rank must be asked for the same, got\n{first.text} on rank 0\n{one.text} on {rank}"
            )
    if any(x.rows != first.rows for x in greetings):
        raise ValueError(f"every rank must have the same rows, got {[x.rows for x in greetings]} of them")
    if not any(x.classes for x in greetings):
        raise ValueError("the slices of all ranks must have at least one class, got none")


class _Rows:
    """Some rows and this rank's slice of their classes, and what is wanted of them. Arguments are checked by then."""

    def __init__(
        self,
        ranks: _Ranks,
        request: Request,
        shape: tuple[int, int],
        tensors: tuple[Tensor | None, ...],
        tiles: Callable[[], Iterable[tuple[slice, Tensor]]],
        feats: Tensor | None,
        backend: str,
        asked: str,
        give: Callable[[Tensor], Any],
        predict: bool = False,
    ) -> None:
        if traced(*tensors):
            raise RuntimeError(
                "fastood.distributed has no gradient, and no compiler or transform sees into it: call it outside of "
                "them, on plain tensors, under torch.no_grad()"
            )
        device = next(x.device for x in tensors if x is not None)
        if device.type not in ranks.devices:
            raise ValueError(f"group must serve tensors on {device}, got {dist.get_backend_config(ranks.group)}")
        self.ranks, self.request, self.shape, self.tiles, self.feats = ranks, request, shape, tiles, feats
        self.dtype, self.device, self.give, self.predict = result_dtype(*tensors), device, give, predict
        self.backend = select(backend, device, self.dtype)
        self.parts = parts_for(request.stats)
        # The logits that gen looks at.
        self.most = max((int(s[2]) for s in request.stats if len(s) == 3 and s[0] == "gen"), default=0)
        features = "no" if feats is None else feats.shape[1]
        self.asked = f"{asked}, {features} feats"
        self.classes: Tensor | None = None

    @classmethod
    def of_logits(
        cls, ranks: _Ranks, request: Request, logits: Any, feats: Any, dim: int | None, backend: str, asked: str
    ) -> _Rows:
        _check_feats(ranks, feats, 1 if dim is None else dim)
        f, h = _local(logits), _local(feats)
        shape = None
        if dim is not None:
            (f, h), shape = rows_along(dim, logits=f, feats=h)
        (f, h), as_numpy = take(logits=f, feats=h)
        if f is None:
            raise TypeError("logits must be a torch tensor or a numpy array, got None")
        if h is not None:
            same_rows("feats", h, f)
        give = _giver(logits, 1 if dim is None else dim, as_numpy, shape)
        tiles = [(slice(None), f)] if f.numel() else []
        return cls(ranks, request, (f.shape[0], f.shape[1]), (f, h), lambda: tiles, h, backend, asked, give)

    @classmethod
    def of_layer(
        cls,
        ranks: _Ranks,
        request: Request,
        feats: Any,
        weight: Any,
        bias: Any,
        backend: str,
        predict: bool,
        asked: str,
    ) -> _Rows:
        _check_feats(ranks, feats, 1)
        if _is_dtensor(bias) and _is_dtensor(weight) and bias.placements != weight.placements:
            raise ValueError(f"bias must be split as weight is, {weight.placements}, got {bias.placements}")
        h, w, b, as_numpy = _layer(*map(_local, (feats, weight, bias)))
        tensors = h, w, b
        h, w, b = h.detach(), w.detach(), None if b is None else b.detach()
        shape = len(h), len(w)

        def tiles() -> Iterable[tuple[slice, Tensor]]:
            return _tiles(h, w, b) if all(shape) else ()

        give = _giver(feats, 1, as_numpy, None)
        return cls(ranks, request, shape, tensors, tiles, h, backend, asked, give, predict)

    def scores(self, plan: Plan) -> list[Any]:
        norms: Iterable[Tensor] = ()
        if self.request.orders:
            assert self.feats is not None
            request = self.request.of((), self.request.orders)
            norms = prepared(self.backend, request, 0, self.feats.shape[1])(None, self.feats)
        found, C, dtype = self.merged()
        if not plan.scores:
            return []
        return [self.give(x) for x in plan.made_of([*found.values(), *norms], C, dtype)]

    def merged(self) -> tuple[dict[Stat, Tensor], int, torch.dtype]:
        """The statistics of whole rows, float64 [N]; the number of classes; the type of results."""
        N, mine = self.shape
        wide = self.dtype == torch.float64
        wait = self.ranks.greeted(_Greeting.of(True, N, mine, wide, self.asked))
        sent = self._read() if self.request.stats else None
        greetings = wait()
        _agreed(greetings)
        C, dtype = sum(x.classes for x in greetings), torch.float64 if any(x.wide for x in greetings) else torch.float32
        if sent is None:
            return {}, C, dtype
        classes = [x.classes for x in greetings]
        more = min(self.most, max(classes)) - min(self.most, mine)
        sent = torch.cat([sent, sent.new_full((more, N), -math.inf)])
        every = self.ranks.gathered(sent).permute(1, 2, 0)  # [numbers, N, slices]
        parts = dict(zip(self.parts, every, strict=False))
        others = every[len(self.parts) :]
        whole = Whole(parts, classes, self.request.temperature, others[self.predict :].movedim(0, -1).flatten(1))
        if "tv" in self.request.stats:
            above = torch.zeros_like(whole.level)
            for rows, f in self.tiles():
                above[rows] = above_level(f, self.request.temperature, whole.f_max[rows], whole.level[rows])
            whole.above = self.ranks.gathered(above).sum(0)
        if self.predict:
            before = torch.tensor([0, *accumulate(classes)], device=self.device)[whole.argmax]
            within = others[0].gather(-1, whole.argmax[:, None])[:, 0].long()
            self.classes = (before + within).clamp(max=C - 1)  # where all are masked, any
        return {stat: whole.stat(stat) for stat in self.request.stats}, C, dtype

    def _read(self) -> Tensor:
        """What this slice comes to, float64 [numbers, N]: its parts, its most probable class, its largest logits."""
        (N, C), parts = self.shape, len(self.parts)
        most = min(self.most, C)
        out = torch.zeros(parts + self.predict + most, N, dtype=torch.float64, device=self.device)
        out[0] = -math.inf  # of no class
        for rows, f in self.tiles():
            out[:parts, rows] = parts_of(f, self.parts, self.request, self.backend)
            if self.predict:
                out[parts, rows] = f.argmax(-1).double()
            if most:
                out[parts + self.predict :, rows] = f.topk(most, -1).values.T.double()
        return out


# ---- DTensors


def _is_dtensor(x: Any) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")  # a second to import, and nobody has a DTensor without it
    return tensor is not None and isinstance(x, tensor.DTensor)


def _local(x: Any) -> Any:
    x = x.to_local() if _is_dtensor(x) else x
    return x.wait() if isinstance(x, Tensor) and hasattr(x, "wait") else x  # what a collective has not finished


def _split_along(name: str, x: Any, dim: Any) -> int:
    """The dimension of the mesh over which a DTensor's classes are split."""
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be a dimension of {name}, got dim={dim!r} for shape {list(x.shape)}")
    along = [i for i, p in enumerate(x.placements) if p.is_shard(dim % x.ndim)]
    plain = all(p.is_replicate() or type(p).__name__ == "Shard" for p in x.placements)
    if len(along) != 1 or not plain:
        raise ValueError(
            f"{name} must have its classes, dimension {dim % x.ndim}, as Shard over one dimension of the mesh and no "
            f"Partial, got {x.placements}; redistribute() can arrange that, and fastood.score is for whole rows"
        )
    return along[0]


def _check_feats(ranks: _Ranks, feats: Any, dim: int) -> None:
    if not _is_dtensor(feats):
        return
    sharing = set(dist.get_process_group_ranks(ranks.group))
    for i, p in enumerate(feats.placements):
        others = sharing.intersection(dist.get_process_group_ranks(feats.device_mesh.get_group(i)))
        whole = p.is_replicate() or (type(p).__name__ == "Shard" and p.dim != dim % feats.ndim and len(others) == 1)
        if not whole:
            raise ValueError(
                f"feats must be whole on every rank that shares their rows' classes, got {feats.placements}"
            )


def _giver(x: Any, dim: int, as_numpy: bool, shape: tuple[int, ...] | None) -> Callable[[Tensor], Any]:
    """What makes of a result, a number per row, what x is: with its shape but for `dim`, along which it is split."""

    def given(out: Tensor) -> Any:
        out = out if shape is None else out.reshape(shape)
        if not _is_dtensor(x):
            return give(out, as_numpy)
        from torch.distributed.tensor import DTensor, Replicate, Shard

        d = dim % x.ndim
        placements = [Shard(p.dim - (p.dim > d)) if p.is_shard() and p.dim != d else Replicate() for p in x.placements]
        whole = torch.empty(x.shape[:d] + x.shape[d + 1 :], device="meta")
        return DTensor.from_local(
            out, x.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    return given

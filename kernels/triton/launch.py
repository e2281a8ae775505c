"""Launches of the kernels in device/. Imports Triton: only __init__.py imports this, and late."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastood.kernels import Anchors, Want
from fastood.kernels.triton import device, shapes
from fastood.kernels.triton.shapes import Plan, Tile


class Matrix(NamedTuple):
    """A matrix from a 16-byte boundary on; the stride and the offset of its rows in elements."""

    data: Tensor | None
    columns: int
    stride: int
    offset: int

    @property
    def shifted(self) -> bool:
        return self.data is not None and shapes.is_shifted(*self[1:], self.data.element_size())

    @property
    def halves(self) -> bool:
        return self.data is not None and self.data.element_size() == 2

    def tile(self, lanes: int) -> Tile:
        if self.data is None:
            return shapes.NOTHING
        return shapes.tile_of(*self[1:], self.data.element_size(), lanes)

    def arguments(self, tile: Tile) -> tuple[Tensor | None, int, int]:
        """Of a kernel, which counts in groups of vec, or where they are shifted in elements."""
        unit = 1 if tile.shifted else tile.vec
        return self.data, self.stride // unit, self.offset // unit


def run(f: Tensor | None, h: Tensor | None, plan: Plan, bias: bool, log: bool, out: Tensor) -> None:
    """Fills `out`, [N, columns] of any strides, from the tensors that the plan needs; None for the others."""
    N = len(out)
    if N == 0:
        return
    C, D = f.shape[1] if f is not None else 0, h.shape[1] if h is not None else 0
    table = _table(plan.table, out.device)
    with _on(out.device):
        x, y, clusters = _matrix(f), _matrix(h), _clusters(out.device)
        shape = shapes.launch_shape(C, D, x.shifted, x.halves, clusters)
        x_tile, y_tile = x.tile(shape.lanes), y.tile(shape.lanes)
        segments = shapes.segments_of(C, x_tile.vec, x.shifted, clusters)
        logits = x.arguments(x_tile)
        if f is not None and segments[0] > 1:
            logits = _segments(f, x, plan, segments, table), 0, 0
        half = h is not None and h.dtype == torch.float16
        constants = shapes.constants(plan, C, x_tile, segments, D, y_tile, half, bias, log, shape.rows)
        grid = (math.ceil(N / shape.rows),)
        arguments = (*logits, *y.arguments(y_tile), table, out, *out.stride(), N)
        device.scores.scores[grid](*arguments, **constants, **shape.options)


def _segments(f: Tensor, x: Matrix, plan: Plan, segments: tuple[int, int], table: Tensor) -> Tensor:
    """The records of all segments of rows too long for one program."""
    N, C = f.shape
    shape = shapes.segment_shape(x.shifted)
    tile = x.tile(shape.lanes)
    data, stride, offset = x.arguments(tile)
    records = torch.empty(N, segments[0], device.scores.RECORD.value, dtype=torch.float32, device=f.device)
    group = max(1, shapes.L2_BYTES // (C * f.element_size()))
    for first in range(0, N, group):
        some = records[first : first + group]
        for second in (False, True) if plan.sums & shapes.TV else (False,):
            constants = shapes.segment_constants(plan, C, tile, segments, second)
            grid = (len(some) * segments[0],)
            device.scores.segments[grid](
                data, stride, offset + first * stride, some, table, **constants, **shape.options
            )
    return records


def batchgrad(f: Tensor, h: Tensor, anchors: Anchors) -> Tensor | None:
    """[N] float64, or None for temperatures that the kernels do not do."""
    plan = shapes.plan_of(Want(("fmax", "msp", "one_minus_msp"), temperature=anchors.temperature), None)
    if plan is None:
        return None
    (N, C), D = f.shape, anchors.G.shape[1]
    f, h = _inner(f), _inner(h)
    out = torch.empty(N, dtype=torch.float64, device=f.device)
    group = shapes.batchgrad_rows(C, D)
    with _on(out.device):
        g, g_sums = _prepared(anchors)
        for first in range(0, N, group):
            some = slice(first, first + group)
            _batchgrad(f[some], h[some], g, g_sums, plan, anchors, out[some])
    return out


def _batchgrad(f: Tensor, h: Tensor, g: Tensor, g_sums: Tensor, plan: Plan, anchors: Anchors, out: Tensor) -> None:
    (N, C), D, T = f.shape, anchors.G.shape[1], anchors.temperature
    rows, feats = shapes.rows_of_batchgrad(N), shapes.BATCHGRAD["FEATS"]
    class_blocks, feat_blocks = shapes.blocks_of(C, D)
    row_blocks = math.ceil(N / rows)
    stats = out.new_empty(plan.columns, N, dtype=torch.float32)
    run(f, None, plan, False, False, stats.T)
    x = out.new_empty(row_blocks, feat_blocks * feats, rows, dtype=torch.float32)
    sums = out.new_empty(feat_blocks, row_blocks * rows, dtype=torch.float32)
    parts = out.new_empty(feat_blocks * class_blocks, row_blocks * rows, dtype=torch.float32)
    device.batchgrad.turned[(row_blocks * rows // shapes.TURNED_ROWS, feat_blocks)](
        h, h.stride(0), x, sums, N, h.shape[1], feat_blocks,
        BIAS=anchors.bias, ROWS=rows, FEATS=feats, SOME=shapes.TURNED_ROWS,
    )  # fmt: skip
    steps = math.ceil(D / shapes.BATCHGRAD["STEP"])
    device.batchgrad.partial_sums[(row_blocks * feat_blocks * class_blocks,)](
        f, f.stride(0), stats, math.log2(math.e) / T, 1 / T, x, sums, g, g_sums, parts, N, C, steps, row_blocks,
        class_blocks, feat_blocks, ROWS=rows, **shapes.BATCHGRAD, **_batchgrad_options(),
    )  # fmt: skip
    grid = (math.ceil(N / shapes.MERGED["SOME"]),)
    device.batchgrad.merged[grid](parts, out, N, parts.shape[1], len(parts), **shapes.MERGED)


def _batchgrad_options() -> dict[str, int]:
    registers = {} if torch.version.hip else {"maxnreg": shapes.BATCHGRAD_REGISTERS}  # which only NVIDIA's knows
    return {"num_warps": shapes.BATCHGRAD["WARPS"], **registers}


def _prepared(anchors: Anchors) -> tuple[Tensor, Tensor]:
    """G and the sums of its blocks as the kernel reads them, worked out once."""
    if "triton" not in anchors.prepared:
        classes, feats = shapes.BATCHGRAD["CLASSES"], shapes.BATCHGRAD["FEATS"]
        C, D = anchors.G.shape
        G = torch.nn.functional.pad(anchors.G.float(), (0, -D % feats, 0, -C % classes))
        G = G.unflatten(1, (-1, feats)).unflatten(0, (-1, classes)).transpose(1, 2)  # by class block and feature block
        above, below = (x.clamp(min=0).sum(-1, dtype=torch.float64) for x in (G, -G))
        anchors.prepared["triton"] = G.transpose(2, 3).contiguous(), torch.stack([above, below], -1).float()
    return anchors.prepared["triton"]


def gradient(f: Tensor, q: Tensor | None, stat: tuple[str, str, float, float, str], temperature: float) -> Tensor:
    """A gradient norm, [N] float64; q for the labels "given"."""
    _, labels, order, power, expectation = stat
    N, C = f.shape
    out = torch.empty(N, dtype=torch.float64, device=f.device)
    if N == 0:
        return out
    x = [_inner(f), *([] if q is None else [_inner(q)])]
    strides = tuple(y.stride(0) for y in x)
    itemsize = max(y.element_size() for y in x)
    constants, shape = shapes.gradient_constants(labels, order, power, expectation, C, strides, itemsize)
    table = _table(shapes.gradient_table(order, power, temperature), f.device)
    data = (x[0], strides[0] // constants["V"], *((None, 0) if q is None else (x[1], strides[1] // constants["V"])))
    with _on(f.device):
        grid = (math.ceil(N / shape.rows),)
        device.gradient.gradient[grid](*data, table, out, N, **constants, **shape.options)
    return out


def _inner(x: Tensor) -> Tensor:
    """`x` with the elements of a row beside each other."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _matrix(x: Tensor | None) -> Matrix:
    if x is None:
        return Matrix(None, 0, 0, 0)
    x = _inner(x)
    if x.data_ptr() % 16 and (x.data_ptr() - x.storage_offset() * x.element_size()) % 16:
        x = x.clone(memory_format=torch.contiguous_format)  # memory of someone else's, which begins anywhere
    offset = x.data_ptr() % 16 // x.element_size()
    data = x.as_strided((1,), (1,), x.storage_offset() - offset) if offset else x
    return Matrix(data, x.shape[1], x.stride(0), offset)


@lru_cache
def _clusters(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return False
    return shapes.clusters(torch.cuda.get_device_capability(device), triton.__version__)


@lru_cache(maxsize=256)
def _table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float64, device=device)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

"""Launches of the kernels in device.py. Imports Triton: only __init__.py imports this, and late."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastood.kernels.triton import device, shapes
from fastood.kernels.triton.shapes import Plan, Tile


class Matrix(NamedTuple):
    """A matrix from a 16-byte boundary on; stride and offset of its rows in groups of vec (elements, if shifted)."""

    data: Tensor | None
    stride: int
    offset: int
    tile: Tile


def run(f: Tensor | None, h: Tensor | None, plan: Plan, bias: bool, log: bool, out: Tensor) -> None:
    """Fills `out`, [N, columns] of any strides, from the tensors that the plan needs; None for the others."""
    N = len(out)
    if N == 0:
        return
    C, D = f.shape[1] if f is not None else 0, h.shape[1] if h is not None else 0
    clusters = _clusters(out.device)
    shape = shapes.launch_shape(C, D, clusters)
    table = _table(plan.table, out.device)
    with _on(out.device):
        segments = (1, C)
        x = _matrix(f, shape.lanes)
        if f is not None and shapes.segments_of(C, 1, clusters)[0] > 1:
            x = _matrix(f, 32 * shapes.SEGMENT_WARPS)
            segments = shapes.segments_of(C, x.tile.vec, clusters)
            x = x._replace(data=_segments(f, x, plan, segments, table))
        y = _matrix(h, shape.lanes)
        half = h is not None and h.dtype == torch.float16
        constants = shapes.constants(plan, C, x.tile, segments, D, y.tile, half, bias, log, shape.rows)
        matrices = (x.data, x.stride, x.offset, y.data, y.stride, y.offset)
        grid = (math.ceil(N / shape.rows),)
        device.scores[grid](*matrices, table, out, *out.stride(), N, **constants, **shape.options)


def _segments(f: Tensor, x: Matrix, plan: Plan, segments: tuple[int, int], table: Tensor) -> Tensor:
    """The records of all segments of rows too long for one program."""
    N, C = f.shape
    records = torch.empty(N, segments[0], device.RECORD.value, dtype=torch.float32, device=f.device)
    group = max(1, shapes.L2_BYTES // (C * f.element_size()))
    for first in range(0, N, group):
        some = records[first : first + group]
        for second in (False, True) if plan.sums & shapes.TV else (False,):
            constants: dict[str, Any] = shapes.segment_constants(plan, C, x.tile, segments, second)
            at = x.offset + first * x.stride
            grid = (len(some) * segments[0],)
            device.segments[grid](x.data, x.stride, at, some, table, **constants, num_warps=shapes.SEGMENT_WARPS)
    return records


def _matrix(x: Tensor | None, lanes: int) -> Matrix:
    if x is None:
        return Matrix(None, 0, 0, shapes.NOTHING)
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    if x.data_ptr() % 16 and (x.data_ptr() - x.storage_offset() * x.element_size()) % 16:
        x = x.clone(memory_format=torch.contiguous_format)  # memory of someone else's, which begins anywhere
    offset = x.data_ptr() % 16 // x.element_size()
    tile = shapes.tile_of(x.shape[1], x.stride(0), offset, x.element_size(), x.dtype == torch.bfloat16, lanes)
    unit = 1 if tile.shifted else tile.vec
    data = x.as_strided((1,), (1,), x.storage_offset() - offset) if offset else x
    return Matrix(data, x.stride(0) // unit, offset // unit, tile)


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

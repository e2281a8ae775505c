"""From features and the last layer to an online softmax of the logits, which are only ever in registers.

Each program goes through some of the classes for some of the rows; `merged` puts the programs of a row together. What
one sweep over the classes gives to the numeric contract is here: not what is a difference to the uniform distribution,
nor what is left beside the maximum.
"""

import triton
import triton.language as tl

from fastood.kernels.triton.device.formulas import SQUARES, formula
from fastood.kernels.triton.device.words import INF, INTERPRETED, LARGEST_FLOAT, exp2_double, in_full, log

STEP_UP = tl.constexpr(4.0)  # how far the maximum may be above the pivot, in powers of two, before that follows


@triton.jit(do_not_specialize=["N", "C"])
def partial_sums(
    h_ptr, h_stride, w_ptr, w_stride, bias_ptr, part_ptr, class_ptr, N, C, D, scale,
    SUMS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of ROWS rows and TILES tiles of CLASSES classes to part [parts, 4, N], with f the logits:

    pivot, max f, sum 2^t and sum 2^2t of t = (f - pivot) scale; to class_ptr, where it is given, the first
    class with max f, -1 where there is none.

    The pivot is a logit that the maximum is at most STEP_UP powers of two above. So it seldom moves, and what rounds as
    it does has then lost its weight: a pivot that followed each maximum would round each time.
    """
    block, part = share_of(N, ROWS, GROUP)
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < N
    row = tl.minimum(row, N - 1).to(tl.int64)
    k = tl.arange(0, STEP)
    h = h_ptr + row[:, None] * h_stride + k[None, :]
    pivot = tl.full([ROWS], -LARGEST_FLOAT, tl.float32)
    top = tl.full([ROWS], -INF, tl.float32)
    sum1 = tl.zeros([ROWS], tl.float64)  # equal terms would round in one direction
    sum2 = sum1
    best = tl.full([ROWS], -1, tl.int32)
    tiles = tl.minimum(TILES, tl.cdiv(C, CLASSES) - part * TILES)
    for tile in range(tiles):
        c = (part * TILES + tile) * CLASSES + tl.arange(0, CLASSES)
        w = w_ptr + tl.minimum(c, C - 1).to(tl.int64)[:, None] * w_stride + k[None, :]
        f = tl.zeros([ROWS, CLASSES], tl.float32)
        for first in tl.range(0, D, STEP, num_stages=STAGES):
            if EVEN:
                f = product(tl.load(h + first), tl.load(w + first), f)
            else:
                more = k[None, :] < D - first
                f = product(tl.load(h + first, mask=more, other=0.0), tl.load(w + first, mask=more, other=0.0), f)
        if bias_ptr is not None:
            f += in_full(tl.load(bias_ptr + c, mask=c < C, other=0.0))[None, :]
        if tile == tiles - 1:  # the only one that may reach beyond the classes
            f = tl.where(c[None, :] < C, f, -INF)
        high = tl.max(f, 1)
        if class_ptr is not None:
            first_high = tl.min(tl.where(f == high[:, None], c[None, :], 0x7FFFFFFF), 1)
            best = tl.where(high > top, first_high, best)
        top = tl.maximum(top, high)
        new = tl.where((high - pivot) * scale > STEP_UP, tl.minimum(high, LARGEST_FLOAT), pivot)
        down = tl.exp2((pivot - new) * scale).to(tl.float64)
        pivot = new
        e = tl.exp2((f - new[:, None]) * scale)
        sum1 = sum1 * down + tl.sum(e, 1).to(tl.float64)
        if SQUARES & SUMS:
            sum2 = sum2 * (down * down) + tl.sum(e * e, 1).to(tl.float64)
    out = part_ptr + part.to(tl.int64) * 4 * N + row
    tl.store(out, pivot, mask=inside)
    tl.store(out + N, top, mask=inside)
    tl.store(out + 2 * N, sum1.to(tl.float32), mask=inside)
    if SQUARES & SUMS:
        tl.store(out + 3 * N, sum2.to(tl.float32), mask=inside)
    if class_ptr is not None:
        tl.store(class_ptr + part.to(tl.int64) * N + row, best, mask=inside)


@triton.jit
def share_of(N, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Block of rows and part of the classes of this program: GROUP blocks of rows share their parts of the weight while
    these are in the cache."""
    blocks = tl.cdiv(N, ROWS)
    parts = tl.num_programs(0) // blocks
    first = tl.program_id(0) // (GROUP * parts) * GROUP
    size = tl.minimum(GROUP, blocks - first)
    within = tl.program_id(0) % (GROUP * parts)
    return first + within % size, within // size


@triton.jit
def product(a, b, sum):
    """sum + a b^T of halves, of which float32 holds each product."""
    if INTERPRETED:  # it would multiply the bits of bfloat16
        return sum + tl.dot(in_full(a), tl.trans(in_full(b)), input_precision="ieee")
    else:
        return tl.dot(a, tl.trans(b), sum)


@triton.jit(do_not_specialize=["N", "C", "parts"])
def merged(part_ptr, class_ptr, out_ptr, best_ptr, N, C, parts, scale, temperature,
           STATS: tl.constexpr, SUMS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """The parts of ROWS rows to statistics, out [len(STATS), N] in float64, and the class of the maximum. STATS: their
    numbers in formulas.py."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    row = tl.minimum(row, N - 1)[None, :]
    pivot = tl.full([ROWS], -LARGEST_FLOAT, tl.float32)
    f_max = tl.full([ROWS], -INF, tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        here = part_ptr + part.to(tl.int64) * 4 * N + row
        pivot = tl.maximum(pivot, tl.max(tl.load(here, mask=part < parts, other=-LARGEST_FLOAT), 0))
        f_max = tl.maximum(f_max, tl.max(tl.load(here + N, mask=part < parts, other=-INF), 0))
    sum1 = tl.zeros([ROWS], tl.float64)
    sum2 = sum1
    best = tl.full([ROWS], 0x7FFFFFFF, tl.int32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        here = part_ptr + part.to(tl.int64) * 4 * N + row
        below = tl.load(here, mask=part < parts, other=-LARGEST_FLOAT) - pivot[None, :]
        down = exp2_double(below.to(tl.float64) * scale)
        sum1 += tl.sum(tl.load(here + 2 * N, mask=part < parts, other=0.0).to(tl.float64) * down, 0)
        if SQUARES & SUMS:
            sum2 += tl.sum(tl.load(here + 3 * N, mask=part < parts, other=0.0).to(tl.float64) * (down * down), 0)
        if best_ptr is not None:
            high = tl.load(here + N, mask=part < parts, other=-INF)
            which = tl.load(class_ptr + part.to(tl.int64) * N + row, mask=part < parts, other=-1)
            which = tl.where((high == f_max[None, :]) & (which >= 0), which, 0x7FFFFFFF)
            best = tl.minimum(best, tl.min(which, 0))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    per_e_max = tl.exp2((pivot - f_max) * scale).to(tl.float64)
    f_max = tl.where(sum1 == sum1, f_max, float("nan")).to(tl.float64)
    total = tl.where(tl.abs(f_max) < INF, tl.maximum(sum1 * per_e_max, 1.0), float("nan"))
    for i in tl.static_range(len(STATS)):
        x = formula(
            STATS[i],
            fmax=f_max,
            T=temperature,
            C=C.to(tl.float64),
            r1=total - 1.0,
            p_max=1.0 / total,
            log_sum=log(total.to(tl.float32)),
            r2=sum2 * (per_e_max * per_e_max) - 1.0,
        )
        tl.store(out_ptr + i * N.to(tl.int64) + row, x, mask=inside)
    if best_ptr is not None:
        tl.store(best_ptr + row, tl.where(best < C, best, 0).to(tl.int64), mask=inside)

"""Rows that are gone over element by element, as for gradient norms, GEN and SCALE. S, a constant, says how: see Sweep
in shapes.py.

Element k of a row is summed in slot k mod W. Which thread holds a slot depends on the alignment of rows, so slots are
summed in float64, where the order disappears in the rounding to float32.
"""

import triton
import triton.language as tl

from fastood.kernels.triton.device.words import INTERPRETED, in_full, larger, row_max


@triton.jit
def rows_of_program(N, ROWS: tl.constexpr):
    """[ROWS, 1]: their places in the result, and what is read, beyond the end the last row: its result is the same."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    return place, tl.minimum(place, N - 1).to(tl.int64)


@triton.jit
def load_elements(ptr, k, FILL: tl.constexpr, WHOLE: tl.constexpr, S: tl.constexpr):
    x = tl.load(ptr + k) if WHOLE else tl.load(ptr + k, mask=k // S.vec < S.columns // S.vec, other=FILL)
    return in_full(x)


@triton.jit
def masked(x, k, WHOLE: tl.constexpr, S: tl.constexpr):
    """0 from the row's end on."""
    return x if WHOLE else tl.where(k < S.columns, x, 0.0)


@triton.jit
def no_sum(ROWS: tl.constexpr, S: tl.constexpr):
    """Of slots, for `collected`: the sum of all, and of the last up to 16."""
    W: tl.constexpr = S.w
    zero = tl.full([ROWS, W], -0.0, tl.float32)  # to which a compiler adds without an instruction
    return zero if S.held else zero.to(tl.float64), zero


@triton.jit
def collected(total, slot, i: tl.constexpr, TILES: tl.constexpr):
    """Sums of at most 16 elements, which join the sum of those after the 16th and after the last."""
    if i % 16 == 15 or i == TILES - 1:
        return total + slot, tl.full(slot.shape, -0.0, tl.float32)
    else:
        return total, slot


@triton.jit
def row_total(x, EACH: tl.constexpr):
    """Of slots [ROWS, W], each row's sum [ROWS, 1] in float64; EACH neighbours, which a thread may hold, in float32."""
    if EACH == 1:
        return tl.sum(x.to(tl.float64), 1, keep_dims=True)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        return row_total(even + odd, EACH // 2)


@triton.jit
def two_largest(high, low):
    """Of each row, from the two largest of its slots; NaN where there is one."""
    if INTERPRETED:  # its reductions with a function of one's own run element by element
        f_max = row_max(high)[:, None]
        at_max = high == f_max
        second = tl.max(tl.where(at_max, low, high), 1, keep_dims=True)
        return f_max, tl.where(tl.sum(at_max.to(tl.int32), 1, keep_dims=True) > 1, f_max, second)
    else:
        return tl.reduce((high, low), 1, merged, keep_dims=True)


@triton.jit
def merged(high, low, other_high, other_low):
    return larger(high, other_high), tl.maximum(tl.maximum(low, other_low), tl.minimum(high, other_high))

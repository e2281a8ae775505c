"""Rows of logits too long for a program's registers, to the sums of softmax.py: in one sweep, and for TV another back.

A program reads its row in groups of tiles. Each thread is a slot, with a shift of its own, which follows the largest
logit of the slot in whole steps: so no thread waits for another before the row ends, a change of the shift rounds
nothing, and t = fma(logit, scale, -shift) is rounded once. The slots are merged in float64.

The second sweep goes from the end of the row to its beginning: what was read last is still in the caches, and nobody
needs it again.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastood.kernels.triton.device.formulas import EXP, KL, PLOGP, REST, SQUARES, SUMLOGP, TV
from fastood.kernels.triton.device.softmax import (
    LEAST_REST,
    MOST_SHIFT,
    RowSums,
    deviations_again,
    exp_sums,
    flat_again,
    has_flat_tv,
    kl_uniform,
    largest_first,
    sums_again,
)
from fastood.kernels.triton.device.words import (
    INF,
    LN2,
    above,
    any_row,
    filler,
    fused,
    in_full,
    larger,
    larger_words,
    row_max,
    row_sums,
    unpack,
    words,
)

LEAST_SHIFT = tl.constexpr(-(2.0**20))  # a row whose maximum is that far from 0 is read again


class Slots(NamedTuple):
    """Of each slot, so far."""

    top: Any  # the word of its largest logits
    shift: Any
    sums: Any  # relative to the shift: see add_element


@triton.jit
def streamed_sums(rows, scale, X: tl.constexpr, K: tl.constexpr, SUMS: tl.constexpr):
    """The RowSums of one row, K tiles in flight.

    X.vec divides X.columns, and where it is not 1 a thread's four words of a tile are one load. A row has two tiles or
    more, so that no slot is empty, and K is 2 or more where there are several groups.
    """
    TYPE: tl.constexpr = rows.ptr.dtype.element_ty
    C: tl.constexpr = X.columns
    LANES: tl.constexpr = X.w // X.words
    own = tl.arange(0, LANES)[None, :] < C // X.vec - (X.tiles - 1) * LANES  # of the last tile
    slots, last = first_sweep(rows, scale, own, X, K, SUMS)
    shift, sums = slots.shift, slots.sums
    tops = unpack(slots.top, X.p, TYPE)
    high = tops[0] if X.p == 1 else larger(tops[0], tops[1])
    f_max = row_max(high)
    rest = tl.zeros_like(f_max)
    rest_squares = rest
    rest_t = rest
    mean_z = rest.to(tl.float64)
    deviation = rest
    kl = mean_z
    pivot = f_max
    any_again = False
    if EXP & SUMS:
        row_shift = tl.maximum(tl.ceil(f_max * scale), LEAST_SHIFT)
        t_max = fused(f_max, scale, -row_shift)
        e_max = tl.exp2(t_max).to(tl.float64)
        left_out = tl.zeros_like(shift)
        if REST & SUMS:
            # The largest of a slot comes last, or is left out where it is the row's: the rest is not drowned in it.
            at_max = high == f_max[:, None]
            left_out = tl.where(at_max, 1.0, 0.0)
            for j in tl.static_range(len(tops)):
                x = high if j == 0 else tl.minimum(tops[0], tops[1])
                t = fused(x, scale, -shift)
                e = tl.exp2(t)
                if j == 0:
                    e = tl.where(at_max, 0.0, e)
                sums = add_element(sums, e, t, SUMS)
        n = (X.tiles - 1 + own.to(tl.int32)) * X.vec
        by_row = row_sums((left_out.to(tl.float64),) + merged(sums, shift - row_shift[:, None], n, SUMS))
        others = by_row[0] - 1.0  # one maximum does not belong to the rest, whether it was left out or not
        totals = exp_sums(by_row[1:], SUMS)
        wide_rest = totals.e / e_max + others
        again = (tl.abs(f_max * scale) > MOST_SHIFT) & (tl.abs(f_max) < INF)
        rest = tl.where(tl.abs(f_max) < INF, wide_rest, float("nan")).to(tl.float32)  # inf - inf was left out of it
        if SQUARES & SUMS:
            rest_squares = (totals.squares / (e_max * e_max) + others).to(tl.float32)
        if PLOGP & SUMS:
            rest_t = ((totals.te - t_max * totals.e) / e_max).to(tl.float32)
        if SUMLOGP & SUMS:
            mean_z = (totals.t / C - t_max) * LN2
        if TV & SUMS:
            mean = ((wide_rest + 1.0) * e_max / C).to(tl.float32)[:, None]
            slot = second_sweep(rows, last, scale, row_shift, mean, X, K)
            deviation = (tl.sum(slot.to(tl.float64), 1) * 2.0 / e_max).to(tl.float32)
        if REST & SUMS:
            again |= wide_rest < LEAST_REST
        if SUMLOGP & SUMS:
            again |= mean_z == -INF  # of a sum beyond float32, or a masked class
        doubtful = again
        if TV & SUMS:
            doubtful |= has_flat_tv(deviation, rest)
        if KL & SUMS:
            kl, flat = kl_uniform(rest, mean_z, C)
            doubtful |= flat
        any_again = any_row(doubtful)
        if any_again:
            so_far = RowSums(f_max, pivot, rest, rest_squares, rest_t, mean_z, deviation, kl, any_again)
            mended = mend_streamed(rows, so_far, again, scale, LANES, X, SUMS)
            pivot, rest, rest_squares, rest_t = mended.pivot, mended.rest, mended.rest_squares, mended.rest_t
            mean_z, deviation, kl = mended.mean_z, mended.deviation, mended.kl
    return RowSums(f_max, pivot, rest, rest_squares, rest_t, mean_z, deviation, kl, any_again)


@triton.jit
def first_sweep(rows, scale, own, X: tl.constexpr, K: tl.constexpr, SUMS: tl.constexpr):
    """The Slots of a row, and the words of its last group of tiles, of whose last tile `own` are the row's."""
    TYPE: tl.constexpr = rows.ptr.dtype.element_ty
    LANES: tl.constexpr = X.w // X.words
    GROUPS: tl.constexpr = (X.tiles + K - 1) // K
    LAST: tl.constexpr = X.tiles - (GROUPS - 1) * K  # tiles of the last group
    EACH: tl.constexpr = K * X.vec  # elements of a slot in each other group
    shift = tl.full([1, LANES], LEAST_SHIFT, tl.float32)
    zero = tl.zeros_like(shift)
    top = tl.full([1, LANES], filler(X.p, TYPE), tl.uint32 if X.p == 2 else tl.float32)
    slots = Slots(top, shift, no_exp(zero, SUMS))
    for group in range(GROUPS - 1):
        us = read_tiles(rows, group * (X.w * K), X, K, False, "")
        slots = add_words(slots, us, scale, group * EACH, zero == 0.0, X, TYPE, SUMS)
    last = read_tiles(rows, (GROUPS - 1) * X.w * K, X, LAST, True, "")
    return add_words(slots, last, scale, (GROUPS - 1) * EACH, own, X, TYPE, SUMS), last


@triton.jit
def second_sweep(rows, last, scale, shift, mean, X: tl.constexpr, K: tl.constexpr):
    """sum max(2^t - mean, 0) of each slot, from the last group's words, which are there, to the first."""
    TYPE: tl.constexpr = rows.ptr.dtype.element_ty
    GROUPS: tl.constexpr = (X.tiles + K - 1) // K
    slot = words_above(last, scale, shift, mean, X, TYPE)
    for group in range(GROUPS - 1):
        us = read_tiles(rows, (GROUPS - 2 - group) * (X.w * K), X, K, False, "evict_first")
        slot += words_above(us, scale, shift, mean, X, TYPE)
    return slot


@triton.jit
def mend_streamed(rows, sums, again, scale, W: tl.constexpr, X: tl.constexpr, SUMS: tl.constexpr):
    """The sums with what reading rows `again`, and the flat among them, gives: by tiles of W words, one a thread, so
    that this is not what takes the most registers."""
    f_max, pivot, rest, rest_squares, rest_t = sums.f_max, sums.pivot, sums.rest, sums.rest_squares, sums.rest_t
    mean_z, deviation, kl = sums.mean_z, sums.deviation, sums.kl
    if any_row(again):
        more = sums_again(rows, f_max, scale, W, X)
        rest = tl.where(again, more.rest, rest)
        rest_squares = tl.where(again, more.rest_squares, rest_squares)
        if REST & SUMS:
            pivot = tl.where(again, more.pivot, f_max)
        else:  # relative to the maximum, what is relative to another pivot has vanished
            vanished = again & (more.pivot != f_max)
            rest, rest_squares = tl.where(vanished, 0.0, rest), tl.where(vanished, 0.0, rest_squares)
        rest_t = tl.where(again, more.rest_t, rest_t)
        mean_z = tl.where(again, more.mean_z, mean_z)
        if TV & SUMS:
            u = tl.fma(rest, tl.exp2((pivot - f_max) * scale), 1.0) / X.columns
            deviation = tl.where(again, deviations_again(rows, f_max, scale, u, W, X), deviation)
    if (TV | KL) & SUMS:
        so_far = RowSums(f_max, pivot, rest, rest_squares, rest_t, mean_z, deviation, kl, sums.any_again)
        kl, deviation = flat_again(rows, so_far, scale, W, X, SUMS)
    return RowSums(f_max, pivot, rest, rest_squares, rest_t, mean_z, deviation, kl, sums.any_again)


@triton.jit
def no_exp(zero, SUMS: tl.constexpr):
    sums = (zero,)
    for kind in tl.static_range(3):
        if (SQUARES, PLOGP, SUMLOGP)[kind] & SUMS:
            sums = sums + (zero,)
    return sums


@triton.jit
def read_tiles(rows, first, X: tl.constexpr, K: tl.constexpr, LAST: tl.constexpr, POLICY: tl.constexpr):
    """K tiles from the row's word `first` on, as tiles of a word a thread; where they are the LAST, -inf beyond it."""
    FILL: tl.constexpr = filler(X.p, rows.ptr.dtype.element_ty)
    w = tl.arange(0, X.w)[None, :]
    here = words(rows.ptr, X.p) + (rows.base + first) + w
    raw = ()
    for i in tl.static_range(K):
        if LAST and i == K - 1:
            inside = w // X.words < (X.columns // X.p - first - i * X.w) // X.words
            raw = raw + (tl.load(here + i * X.w, mask=inside, other=FILL),)
        else:
            raw = raw + (tl.load(here + i * X.w, eviction_policy=POLICY),)
    us = ()
    for i in tl.static_range(K):
        us = us + of_threads(raw[i] if X.p == 2 else in_full(raw[i]), X.words)
    return us


@triton.jit
def of_threads(u, VW: tl.constexpr):
    """The words of a tile, of which each thread has VW, as tiles of a word a thread."""
    if VW == 1:
        return (u,)
    else:
        even, odd = tl.split(tl.reshape(u, [1, u.shape[1] // 4, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def add_words(slots, us, scale, before, own, X: tl.constexpr, TYPE: tl.constexpr, SUMS: tl.constexpr):
    """Adds words to the sums of their slots, which have `before` elements; `own`: the last of each thread, X.words of a
    tile, are the row's."""
    LEN: tl.constexpr = len(us)
    top, shift, sums = slots.top, slots.shift, slots.sums
    if REST & SUMS:
        us = largest_first((top,) + us, X.p, TYPE)  # the largest stays out of the sums
        top = us[0]
        us = us[1:]
        before = tl.maximum(before - X.p, 0)
    else:
        for i in tl.static_range(LEN):
            top = larger_words(top, us[i], X.p, TYPE)
    if EXP & SUMS:
        tops = unpack(top, X.p, TYPE)
        high = tops[0] if X.p == 1 else larger(tops[0], tops[1])
        new = tl.maximum(shift, tl.ceil(high * scale))
        down = shift - new
        shift = new
        added = no_exp(tl.zeros_like(shift), SUMS)
        for i in tl.static_range(LEN):
            xs = unpack(us[i], X.p, TYPE)
            for j in tl.static_range(len(xs)):
                t = fused(xs[j], scale, -shift)
                e = tl.exp2(t)
                if SUMLOGP & SUMS:
                    if REST & SUMS and i == 0:
                        t = tl.where(before > 0, t, 0.0)  # the largest of no element yet: -inf, no class
                    if i >= LEN - X.words:
                        t = tl.where(own, t, 0.0)
                added = add_element(added, e, t, SUMS)
        sums = rescaled(sums, added, down, tl.exp2(down), before, SUMS)
    return Slots(top, shift, sums)


@triton.jit
def add_element(sums, e, t, SUMS: tl.constexpr):
    """Adds what e = 2^t contributes to sum e and, as wanted, sum e^2, sum t e (0 of masked classes) and sum t."""
    out = (sums[0] + e,)
    if SQUARES & SUMS:
        out = out + (tl.fma(e, e, sums[len(out)]),)
    if PLOGP & SUMS:
        out = out + (tl.fma(e, tl.maximum(t, LEAST_SHIFT), sums[len(out)]),)
    if SUMLOGP & SUMS:
        out = out + (sums[len(out)] + t,)
    return out


@triton.jit
def rescaled(sums, added, down, weight, before, SUMS: tl.constexpr):
    """Sums of `before` elements a slot after a step of the shift, weight = 2^down, and what was added since."""
    out = (tl.fma(sums[0], weight, added[0]),)
    if SQUARES & SUMS:
        out = out + (tl.fma(sums[len(out)], weight * weight, added[len(out)]),)
    if PLOGP & SUMS:
        out = out + (tl.fma(tl.fma(down, sums[0], sums[len(out)]), weight, added[len(out)]),)
    if SUMLOGP & SUMS:
        out = out + (tl.fma(down, tl.zeros_like(down) + before, sums[len(out)]) + added[len(out)],)
    return out


@triton.jit
def merged(sums, down, n, SUMS: tl.constexpr):
    """The sums of slots of n elements in float64, after the step from their shift to the row's."""
    wide, none = (), ()
    for i in tl.static_range(len(sums)):
        wide = wide + (sums[i].to(tl.float64),)
        none = none + (tl.zeros_like(wide[i]),)
    return rescaled(wide, none, down.to(tl.float64), tl.exp2(down).to(tl.float64), n, SUMS)


@triton.jit
def words_above(us, scale, shift, mean, X: tl.constexpr, TYPE: tl.constexpr):
    """sum max(2^t - mean, 0) of the words of each slot; 0 beyond the row's end."""
    slot = tl.zeros(us[0].shape, tl.float32)
    for i in tl.static_range(len(us)):
        xs = unpack(us[i], X.p, TYPE)
        for j in tl.static_range(len(xs)):
            slot += above(tl.exp2(fused(xs[j], scale, -shift[:, None])), mean)
    return slot

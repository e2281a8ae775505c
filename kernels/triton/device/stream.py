"""Rows of logits too long for a program's registers, to the sums of softmax.py: in one sweep, and for TV another back.

A program reads its row in groups of tiles. Each thread is a slot, whose sums are relative to 2^ref: `ref` follows the
largest logit of the slot in whole steps, so that no thread waits for another before the row ends, a change of `ref`
rounds nothing, and t = fma(logit, scale, -ref) is rounded once. The slots are merged in float64.

The second sweep goes from the end of the row to its beginning: what was read last is still in the caches, and nobody
needs it again.
"""

import triton
import triton.language as tl

from fastood.kernels.triton.device.formulas import EXP, KL, PLOGP, REST, SQUARES, SUMLOGP, TV
from fastood.kernels.triton.device.softmax import (
    DEEP,
    FAR,
    deviations_again,
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
    larger,
    larger_words,
    row_max,
    row_sums,
    unpack,
    words,
)

LOWEST = tl.constexpr(-(2.0**20))  # of ref; a row whose maximum is that far from 0 is summed again


@triton.jit
def streamed_sums(ptr, base, C: tl.constexpr, scale, VEC: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
                  K: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    """What softmax_sums returns, of one row of C logits from the word `base` on, K tiles of W words in flight.

    VEC divides C, and where it is not 1 a thread's four words of a tile are one load. A row has two tiles or more, so
    that no slot is empty, and K is 2 or more where there are several groups.
    """
    TYPE: tl.constexpr = ptr.dtype.element_ty
    VW: tl.constexpr = VEC // P
    LANES: tl.constexpr = W // VW
    GROUPS: tl.constexpr = (C // P + W * K - 1) // (W * K)
    TILES: tl.constexpr = (C // P - (GROUPS - 1) * W * K + W - 1) // W  # tiles of the last group
    EACH: tl.constexpr = K * VW * P  # elements of a slot in each other group
    lane = tl.arange(0, LANES)[None, :]
    ref = tl.full([1, LANES], LOWEST, tl.float32)
    zero = tl.zeros_like(ref)
    top = tl.full([1, LANES], filler(-INF, P, TYPE), tl.uint32 if P == 2 else tl.float32)
    sums = no_exp(zero, SUMS)
    for group in range(GROUPS - 1):
        us = read_tiles(ptr, base, group * (W * K), C, VEC, P, W, K, False, "")
        top, ref, sums = add_words(top, ref, sums, us, scale, group * EACH, zero == 0.0, VW, P, TYPE, SUMS)
    last = read_tiles(ptr, base, (GROUPS - 1) * W * K, C, VEC, P, W, TILES, True, "")
    own = lane < C // VEC - ((GROUPS - 1) * K + TILES - 1) * LANES  # of the last tile
    top, ref, sums = add_words(top, ref, sums, last, scale, (GROUPS - 1) * EACH, own, VW, P, TYPE, SUMS)

    tops = unpack(top, P, TYPE)
    high = tops[0] if P == 1 else larger(tops[0], tops[1])
    m = row_max(high)
    rest = tl.zeros_like(m)
    squares = rest
    exp_t = rest
    mean_z = rest
    deviation = rest
    kl = rest
    pivot = m
    rare = False
    if EXP & SUMS:
        highest = tl.maximum(tl.ceil(m * scale), LOWEST)  # ref of the row
        excess = fused(m, scale, -highest)
        unit = tl.exp2(excess).to(tl.float64)  # 2^t of the maximum, as the sums have it
        hots = zero
        if REST & SUMS:
            # The largest of a slot comes last, or is kept out: if it is the row's, the rest is not drowned.
            hot = high == m[:, None]
            hots = tl.where(hot, 1.0, 0.0)
            for j in tl.static_range(P):
                x = high if j == 0 else tl.minimum(tops[0], tops[1])
                t = fused(x, scale, -ref)
                e = tl.exp2(t)
                if j == 0:
                    e = tl.where(hot, 0.0, e)
                sums = add_element(sums, e, t, SUMS)
        n = ((GROUPS - 1) * K + TILES - 1 + own.to(tl.int32)) * (VW * P)
        totals = row_sums((hots.to(tl.float64),) + merged(sums, ref - highest[:, None], n, SUMS))
        # A maximum that was kept out counts 1; one that was not is taken away as it was added.
        others = totals[0] - 1.0
        totals = totals[1:]
        of_all = totals[0]
        wide = of_all / unit + others
        far = (tl.abs(m * scale) > FAR) & (tl.abs(m) < INF)
        rest = tl.where(tl.abs(m) < INF, wide, float("nan")).to(tl.float32)  # inf - inf was kept out of it
        if SQUARES & SUMS:
            squares = (totals[1] / (unit * unit) + others).to(tl.float32)
        if PLOGP & SUMS:
            exp_t = ((totals[2 if SQUARES & SUMS else 1] - excess * of_all) / unit).to(tl.float32)
        if SUMLOGP & SUMS:
            mean_z = ((totals[len(totals) - 1] / C - excess) * LN2).to(tl.float32)
        if TV & SUMS:
            mean = ((wide + 1.0) * unit / C).to(tl.float32)[:, None]
            slot = words_above(last, scale, highest, mean, P, TYPE)
            for group in range(GROUPS - 1):
                first = (GROUPS - 2 - group) * (W * K)
                us = read_tiles(ptr, base, first, C, VEC, P, W, K, False, "evict_first")
                slot += words_above(us, scale, highest, mean, P, TYPE)
            deviation = (tl.sum(slot.to(tl.float64), 1) * 2.0 / unit).to(tl.float32)
        again = far
        if REST & SUMS:
            again |= wide < DEEP
        if SUMLOGP & SUMS:
            again |= mean_z == -INF  # of a sum beyond float32, or a masked class
        seen = again
        if TV & SUMS:
            seen |= has_flat_tv(deviation, rest)
        if KL & SUMS:
            kl, flat = kl_uniform(rest, mean_z, C)
            seen |= flat
        rare = any_row(seen)
        if rare:
            # In tiles of a word a thread, so that this is not what takes the most registers.
            w = tl.arange(0, LANES)[None, :]
            head = tl.zeros_like(m).to(tl.int32)[:, None]
            if any_row(again):
                other, sum1, sum2, sum3, sum4 = sums_again(ptr, base, head, w, C, m, scale, C, VEC, P, False, LANES)
                if REST & SUMS:
                    pivot = tl.where(again, other, m)
                else:
                    sum1, sum2 = tl.where(other == m, sum1, 0.0), tl.where(other == m, sum2, 0.0)
                rest = tl.where(again, sum1, rest)
                squares = tl.where(again, sum2, squares)
                exp_t = tl.where(again, sum3, exp_t)
                mean_z = tl.where(again, sum4, mean_z)
                if TV & SUMS:
                    u = tl.fma(rest, tl.exp2((pivot - m) * scale), 1.0) / C
                    other = deviations_again(ptr, base, head, w, C, m, scale, u, C, VEC, P, False, LANES)
                    deviation = tl.where(again, other, deviation)
            if (TV | KL) & SUMS:
                of_max = tl.where(pivot == m, rest, 0.0)
                kl, deviation = flat_again(
                    ptr, base, head, w, C, m, of_max, mean_z, deviation, scale, C, VEC, P, False, LANES, SUMS
                )
    return m, pivot, rest, squares, exp_t, mean_z, deviation, kl, rare


@triton.jit
def no_exp(zero, SUMS: tl.constexpr):
    sums = (zero,)
    for kind in tl.static_range(3):
        if (SQUARES, PLOGP, SUMLOGP)[kind] & SUMS:
            sums = sums + (zero,)
    return sums


@triton.jit
def read_tiles(ptr, base, first, C: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
               K: tl.constexpr, LAST: tl.constexpr, POLICY: tl.constexpr):  # fmt: skip
    """K tiles from the row's word `first` on, as tiles of a word a thread; where they are the LAST, -inf beyond it."""
    VW: tl.constexpr = VEC // P
    FILL: tl.constexpr = filler(-INF, P, ptr.dtype.element_ty)
    w = tl.arange(0, W)[None, :]
    here = words(ptr, P) + (base + first) + w
    raw = ()
    for i in tl.static_range(K):
        if LAST and i == K - 1:
            inside = w // VW < (C // P - first - i * W) // VW
            raw = raw + (tl.load(here + i * W, mask=inside, other=FILL),)
        else:
            raw = raw + (tl.load(here + i * W, eviction_policy=POLICY),)
    us = ()
    for i in tl.static_range(K):
        us = us + of_threads(raw[i] if P == 2 else raw[i].to(tl.float32), VW)
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
def add_words(top, ref, sums, us, scale, before, own, VW: tl.constexpr, P: tl.constexpr,
              TYPE: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    """Adds words to the sums of their slots, which have `before` elements; `own`: the last VW words are the row's."""
    LEN: tl.constexpr = len(us)
    if REST & SUMS:
        us = largest_first((top,) + us, P, TYPE)  # the largest stays out of the sums
        top = us[0]
        us = us[1:]
        before = tl.maximum(before - P, 0)
    else:
        for i in tl.static_range(LEN):
            top = larger_words(top, us[i], P, TYPE)
    if EXP & SUMS:
        tops = unpack(top, P, TYPE)
        high = tops[0] if P == 1 else larger(tops[0], tops[1])
        new = tl.maximum(ref, tl.ceil(high * scale))
        down = ref - new
        ref = new
        added = no_exp(tl.zeros_like(ref), SUMS)
        for i in tl.static_range(LEN):
            xs = unpack(us[i], P, TYPE)
            for j in tl.static_range(P):
                t = fused(xs[j], scale, -ref)
                e = tl.exp2(t)
                if SUMLOGP & SUMS:
                    if REST & SUMS and i == 0:
                        t = tl.where(before > 0, t, 0.0)  # -inf, which was the largest of no element
                    if i >= LEN - VW:
                        t = tl.where(own, t, 0.0)
                added = add_element(added, e, t, SUMS)
        sums = rescaled(sums, added, down, tl.exp2(down), before, SUMS)
    return top, ref, sums


@triton.jit
def add_element(sums, e, t, SUMS: tl.constexpr):
    """Adds what e = 2^t contributes to sum e and, as wanted, sum e^2, sum t e (0 of masked classes) and sum t."""
    out = (sums[0] + e,)
    if SQUARES & SUMS:
        out = out + (tl.fma(e, e, sums[len(out)]),)
    if PLOGP & SUMS:
        out = out + (tl.fma(e, tl.maximum(t, LOWEST), sums[len(out)]),)
    if SUMLOGP & SUMS:
        out = out + (sums[len(out)] + t,)
    return out


@triton.jit
def rescaled(sums, added, down, unit, before, SUMS: tl.constexpr):
    """Sums of `before` elements a slot after a step of ref, unit = 2^down, and what was added since."""
    out = (tl.fma(sums[0], unit, added[0]),)
    if SQUARES & SUMS:
        out = out + (tl.fma(sums[len(out)], unit * unit, added[len(out)]),)
    if PLOGP & SUMS:
        out = out + (tl.fma(tl.fma(down, sums[0], sums[len(out)]), unit, added[len(out)]),)
    if SUMLOGP & SUMS:
        out = out + (tl.fma(down, tl.zeros_like(down) + before, sums[len(out)]) + added[len(out)],)
    return out


@triton.jit
def merged(sums, gap, n, SUMS: tl.constexpr):
    """The sums of slots of n elements in float64, relative to the ref of the row, which is -`gap` above theirs."""
    wide, none = (), ()
    for i in tl.static_range(len(sums)):
        wide = wide + (sums[i].to(tl.float64),)
        none = none + (tl.zeros_like(wide[i]),)
    return rescaled(wide, none, gap.to(tl.float64), tl.exp2(gap).to(tl.float64), n, SUMS)


@triton.jit
def words_above(us, scale, highest, mean, P: tl.constexpr, TYPE: tl.constexpr):
    """sum max(2^t - mean, 0) of the words of each slot; 0 beyond the row's end."""
    slot = tl.zeros(us[0].shape, tl.float32)
    for i in tl.static_range(len(us)):
        xs = unpack(us[i], P, TYPE)
        for j in tl.static_range(P):
            slot += above(tl.exp2(fused(xs[j], scale, -highest[:, None])), mean)
    return slot

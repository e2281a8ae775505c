"""Rows of logits to their maximum and the sums that statistics are made of."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastood.kernels.triton.device.formulas import EXP, KL, PLOGP, REST, SQUARES, SUMLOGP, TV
from fastood.kernels.triton.device.level import has_flat_tv, kl_uniform, mean_z_again, of_flat_rows
from fastood.kernels.triton.device.words import (
    INF,
    LN2,
    above,
    any_row,
    elements,
    fused,
    in_float32,
    inverse_power,
    larger,
    larger_words,
    load_row,
    log2,
    only_own,
    row_max,
    row_sums,
    smaller_words,
    unpack,
    within,
)

LEAST_REST = tl.constexpr(2.0**-80)  # rows with less are read again, for sums relative to a pivot of their own
MOST_SHIFT = tl.constexpr(16384.0)  # rows with more are read again: it rounds too much
SHORT = tl.constexpr(128)  # rows in which reading them again for that would cost more than it saves


class RowSums(NamedTuple):
    """What a row of logits is reduced to, for t = (f - f_max) log2(e) / T. The rest's sums are relative to the pivot;
    without REST they are what remains when 1 is taken from the sums of the whole row.
    """

    f_max: Any
    pivot: Any  # f_max, or in rows that are read again, where the sums would vanish, the largest logit below
    rest: Any  # sum 2^t
    rest_squares: Any  # sum 2^2t
    rest_t: Any  # sum t 2^t
    mean_z: Any  # in float64, as KL(u || p): a score may be finite that multiplies what is beyond float32
    deviation: Any  # sum over all of |2^t - u|, u = (sum 2^t) / C
    kl: Any  # KL(u || p)
    any_again: Any  # whether the program has read any of its rows again: otherwise no pivot is below the maximum


class ExpSums(NamedTuple):
    """Sums of e = 2^t and of t, of each row."""

    e: Any
    squares: Any  # of e^2; this and the next two stand for nothing where they are not among SUMS
    te: Any  # of t e
    t: Any


class SumsAgain(NamedTuple):
    """Of RowSums what is summed of rows that are read again."""

    pivot: Any
    rest: Any
    rest_squares: Any
    rest_t: Any
    mean_z: Any


@triton.jit
def softmax_sums(rows, scale, X: tl.constexpr, SUMS: tl.constexpr):
    """The RowSums of rows that are held in registers, 0 what is not among SUMS."""
    TYPE: tl.constexpr = rows.ptr.dtype.element_ty
    C: tl.constexpr = X.columns
    w = tl.arange(0, X.w)[None, :]
    us = load_row(rows, w, X)
    if REST & SUMS:
        us = largest_first(us, X.p, TYPE)
        top = us[0]
    else:
        top = us[0]
        for i in tl.static_range(1, len(us)):
            top = larger_words(top, us[i], X.p, TYPE)
    tops = unpack(top, X.p, TYPE)
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
        xs = ()
        for i in tl.static_range(len(us)):
            xs = xs + unpack(us[i], X.p, TYPE)
        if REST & SUMS and X.p == 2:
            xs = (high, tl.minimum(xs[0], xs[1])) + xs[2:]
        ONCE: tl.constexpr = REST & SUMS and C > SHORT
        shift, t_max, again = shift_of(f_max, scale, ONCE)
        e_max = tl.exp2(t_max)
        per_e_max = inverse_power(t_max)
        A: tl.constexpr = (len(xs) + 31) // 32  # accumulators: in a longer chain roundings add up
        sums = ((),) * A
        es, ts = (), ()
        for i in tl.static_range(len(xs)):
            t = exponent(xs[i], scale, shift, ONCE)
            e = tl.exp2(t)
            if (PLOGP | SUMLOGP) & SUMS:  # 0 beyond the row's end, as 2^t is
                t = only_own(t, 0.0, i // X.p, i % X.p, w, X)
            es, ts = es + (e,), ts + (t,)
            if i > 0 or not REST & SUMS:
                sums = sums[: i % A] + (add_exp(sums[i % A], e, t, SUMS),) + sums[i % A + 1 :]
        if REST & SUMS:
            # The largest of a slot comes last, or is left out where it is the row's: the rest is not drowned in it.
            at_max = high == f_max[:, None]
            sums = (add_exp(sums[0], tl.where(at_max, 0.0, es[0]), ts[0], SUMS),) + sums[1:]
            by_row = row_sums(added(sums, len(sums)) + (tl.where(at_max, 1.0, 0.0),))
            others, of_max = by_row[len(by_row) - 1] - 1.0, 0.0  # all that were left out but one belong to the rest
        else:
            by_row = row_sums(added(sums, len(sums)))
            others, of_max = tl.zeros_like(f_max), 1.0  # none was left out, and one does not belong
        totals = exp_sums(by_row, SUMS)
        summed = (totals.e - of_max) * per_e_max
        rest = tl.fma(totals.e - of_max, per_e_max, others)
        if REST & SUMS:
            rest = tl.where(tl.abs(f_max) < INF, rest, float("nan"))  # inf - inf was left out of it
        if SQUARES & SUMS:
            rest_squares = tl.fma((totals.squares - of_max) * per_e_max, per_e_max, others)
        if PLOGP & SUMS:
            rest_t = tl.fma(totals.te, per_e_max, -(t_max * summed))
        if SUMLOGP & SUMS:
            mean_z = tl.fma(totals.t, LN2 / C, t_max * -LN2).to(tl.float64)
        if TV & SUMS:
            u = (rest + 1.0) * e_max / C
            deviation = deviations(es, u) * per_e_max
        if REST & SUMS:
            again |= rest < LEAST_REST
        if SUMLOGP & SUMS:
            again |= mean_z == -INF  # of a sum beyond float32, or a masked class
        doubtful = again
        if PLOGP & SUMS:
            doubtful |= rest_t != rest_t
        if TV & SUMS:
            doubtful |= has_flat_tv(deviation, rest)
        if KL & SUMS:
            kl, flat = kl_uniform(rest, mean_z, C)
            doubtful |= flat
        if (REST | SUMLOGP | TV) & SUMS:
            any_again = any_row(doubtful)
            if any_again:
                so_far = RowSums(f_max, pivot, rest, rest_squares, rest_t, mean_z, deviation, kl, any_again)
                mended = mend(rows, so_far, again, es, e_max, t_max, per_e_max, scale, X, SUMS)
                pivot, rest, rest_squares, rest_t = mended.pivot, mended.rest, mended.rest_squares, mended.rest_t
                mean_z, deviation, kl = mended.mean_z, mended.deviation, mended.kl
    return RowSums(f_max, pivot, rest, rest_squares, rest_t, mean_z, deviation, kl, any_again)


@triton.jit
def mend(rows, sums, again, es, e_max, t_max, per_e_max, scale, X: tl.constexpr, SUMS: tl.constexpr):
    """The sums with what reading rows `again`, and the flat among them, gives; of masked classes from the es held."""
    f_max, pivot, rest, rest_squares, rest_t = sums.f_max, sums.pivot, sums.rest, sums.rest_squares, sums.rest_t
    mean_z, deviation, kl = sums.mean_z, sums.deviation, sums.kl
    if PLOGP & SUMS:
        if any_row(rest_t != rest_t):
            rest_t = tl.where(rest_t != rest_t, masked_rest_t(es, e_max, t_max) * per_e_max, rest_t)
    # In tiles of a word or a few a thread, so that this is not what takes the most registers.
    if REST & SUMS:
        if any_row(again):
            SOME: tl.constexpr = X.w // X.p if X.columns % 8 == 0 and X.w >= X.p else X.w
            more = sums_again(rows, f_max, scale, SOME, X)
            pivot = tl.where(again, more.pivot, f_max)
            rest = tl.where(again, more.rest, rest)
            rest_squares = tl.where(again, more.rest_squares, rest_squares)
            rest_t = tl.where(again, more.rest_t, rest_t)
            mean_z = tl.where(again, more.mean_z, mean_z)
            if TV & SUMS:
                u = tl.fma(rest, tl.exp2((pivot - f_max) * scale), 1.0) / X.columns
                deviation = tl.where(again, deviations_again(rows, f_max, scale, u, SOME, X), deviation)
    FEW: tl.constexpr = X.w // 4 if X.w >= 4 and X.columns % 4 == 0 else X.w
    if SUMLOGP & SUMS and not REST & SUMS:
        if any_row(again):
            mean_z = tl.where(again, mean_z_again(rows, f_max, scale, FEW, X), mean_z)
    if (TV | KL) & SUMS:
        so_far = RowSums(f_max, pivot, rest, rest_squares, rest_t, mean_z, deviation, kl, sums.any_again)
        kl, deviation = flat_again(rows, so_far, scale, FEW, X, SUMS)
    return RowSums(f_max, pivot, rest, rest_squares, rest_t, mean_z, deviation, kl, sums.any_again)


@triton.jit
def flat_again(rows, sums, scale, W: tl.constexpr, X: tl.constexpr, SUMS: tl.constexpr):
    """KL(u || p) and the deviation; of nearly flat rows from reading them again, by tiles of W words."""
    rest = tl.where(sums.pivot == sums.f_max, sums.rest, 0.0)
    kl, deviation, flat_kl = sums.kl, sums.deviation, sums.f_max != sums.f_max
    flat_tv = flat_kl
    if KL & SUMS:
        kl, flat_kl = kl_uniform(rest, sums.mean_z, X.columns)
    if TV & SUMS:
        flat_tv = has_flat_tv(deviation, rest)
    if any_row(flat_kl | flat_tv):
        other, tv = of_flat_rows(rows, sums.f_max, scale, W, X, KL & SUMS > 0, TV & SUMS > 0)
        kl = tl.where(flat_kl, other, kl)
        deviation = tl.where(flat_tv, (tv + tv) * (1.0 + rest), deviation)
    return kl, deviation


@triton.jit
def add_exp(sums, e, t, SUMS: tl.constexpr):
    """Adds what e = 2^t contributes to sum e and, as wanted, sum e^2, sum t e and sum t; () is no sums yet."""
    FIRST: tl.constexpr = len(sums) == 0
    out = (e if FIRST else sums[0] + e,)
    if SQUARES & SUMS:
        out = out + (e * e if FIRST else tl.fma(e, e, sums[len(out)]),)
    if PLOGP & SUMS:
        out = out + (e * t if FIRST else tl.fma(e, t, sums[len(out)]),)  # NaN where a class is masked: summed again
    if SUMLOGP & SUMS:
        out = out + (t if FIRST else sums[len(out)] + t,)
    return out


@triton.jit
def exp_sums(totals, SUMS: tl.constexpr):
    """By name, what add_exp has put in a tuple."""
    squares: tl.constexpr = 1 if SQUARES & SUMS else 0
    te: tl.constexpr = squares + 1 if PLOGP & SUMS else squares
    t: tl.constexpr = te + 1 if SUMLOGP & SUMS else te
    return ExpSums(totals[0], totals[squares], totals[te], totals[t])


@triton.jit
def added(sums, A: tl.constexpr):
    """A tuples of sums, each added to the others."""
    out = sums[0]
    for a in tl.static_range(1, A):
        more = ()
        for k in tl.static_range(len(out)):
            more = more + (out[k] + sums[a][k],)
        out = more
    return out


@triton.jit
def largest_first(us, P: tl.constexpr, TYPE: tl.constexpr):
    """The words of each slot, their largest elements in front; what is -inf beyond a row's end stays in place."""
    top = us[0]
    others = ()
    for i in tl.static_range(1, len(us)):
        others = others + (smaller_words(top, us[i], P, TYPE),)
        top = larger_words(top, us[i], P, TYPE)
    return (top,) + others


@triton.jit
def shift_of(f_max, scale, ONCE: tl.constexpr):
    """The shift of t = f scale - shift, and t_max, by which t is above (f - f_max) scale: how the shift was rounded.

    Last: which rows have so large a shift that t_max is not next to 0, and are read again. Not ONCE, in short rows and
    where none are read again otherwise, f_max is subtracted before all is scaled, and the shift is f_max / 2: see
    exponent.
    """
    if ONCE:
        shift = f_max * scale
        shift = tl.fma(tl.abs(shift), 2.0**-23, shift)  # so that no t is above 0
        near = tl.abs(shift) <= MOST_SHIFT  # not of NaN either, which comes of what is beyond float32
        return shift[:, None], fused(f_max, scale, -shift), (tl.abs(f_max) < INF) & ~near
    else:
        return 0.5 * f_max[:, None], tl.zeros_like(f_max), f_max < f_max


@triton.jit
def exponent(x, scale, shift, ONCE: tl.constexpr):
    """t of logits; see shift_of. Not ONCE, x and f_max are halved, so that their difference does not leave float32."""
    return fused(x, scale, -shift) if ONCE else tl.fma(x, 0.5, -shift) * (2.0 * scale)


@triton.jit
def masked_rest_t(es, e_max, t_max):
    """sum t 2^t of rows with masked classes, t from 2^t: log2's error shows near 1 alone, where entropies are large."""
    slot = tl.zeros_like(es[0])
    for i in tl.static_range(len(es)):
        t = tl.where(es[i] < e_max[:, None], log2(es[i]) - t_max[:, None], 0.0)
        slot = tl.fma(es[i], tl.where(es[i] < 2.0**-126, 0.0, t), slot)
    return tl.sum(slot, 1)


@triton.jit
def deviations(es, u):
    """sum |e - u| of each row of which u is the mean: twice what is above it. Nothing is beyond a row's end."""
    more = ()
    for i in tl.static_range(len(es)):
        more = more + (above(es[i], u[:, None]),)
    return tl.sum(tree_sum(more), 1) * 2.0


@triton.jit
def tree_sum(xs):
    """The sum of tiles, by pairs, and pairs of pairs: no addition waits for the one before. (As sums of 2^t are made it
    would take more registers.)
    """
    if len(xs) == 1:
        return xs[0]
    else:
        return tree_sum(xs[: len(xs) // 2]) + tree_sum(xs[len(xs) // 2 :])


@triton.jit
def sums_again(rows, f_max, scale, W: tl.constexpr, X: tl.constexpr):
    """The rest's sums and mean z of rows that are read again, by tiles of W words: rows whose rest is next to nothing
    beside the maximum, and rows whose logits are far from 0.

    Where the largest logit below the maximum is far below it, that is the pivot.
    """
    TILES: tl.constexpr = (X.columns + W * X.p - 1) // (W * X.p)
    w = tl.arange(0, W)[None, :]
    second = tl.full([f_max.shape[0], W], -INF, tl.float32)
    zero = tl.zeros_like(second).to(tl.float64)  # in which the order of elements is lost
    ties = zero
    for i in range(TILES):
        xs = elements(rows, w + i * W, X)
        for j in tl.static_range(len(xs)):
            own = within(w + i * W, j, X)
            ties += tl.where(own & (xs[j] == f_max[:, None]), 1.0, 0.0)
            second = tl.maximum(second, tl.where(own & (xs[j] < f_max[:, None]), xs[j], -INF))
    others = tl.sum(ties, 1) - 1.0
    second = tl.max(second, 1)
    # No lower pivot where it would be near, for `statistic` takes the rest for log(1 + rest) where a weight is below 1;
    # nor where there is no other class.
    pivot = tl.where((others > 0.0) | (second == -INF) | ((second - f_max) * scale > -60.0), f_max, second)
    rest, rest_squares, rest_t, sum_t = zero, zero, zero, zero
    for i in range(TILES):
        xs = elements(rows, w + i * W, X)
        for j in tl.static_range(len(xs)):
            own = within(w + i * W, j, X)
            t = tl.where(own & (xs[j] < f_max[:, None]), (xs[j] - pivot[:, None]) * scale, -INF)
            e = tl.exp2(t).to(tl.float64)
            rest += e
            rest_squares = tl.fma(e, e, rest_squares)
            rest_t = tl.fma(e, tl.maximum(t, -1e30).to(tl.float64), rest_t)
            sum_t += tl.where(own, (xs[j].to(tl.float64) - f_max[:, None].to(tl.float64)) * scale, 0.0)
    rest, rest_squares = tl.sum(rest, 1) + others, tl.sum(rest_squares, 1) + others
    narrow = in_float32((rest, rest_squares, tl.sum(rest_t, 1)))
    return SumsAgain(pivot, narrow[0], narrow[1], narrow[2], tl.sum(sum_t, 1) * (LN2 / X.columns))


@triton.jit
def deviations_again(rows, f_max, scale, u, W: tl.constexpr, X: tl.constexpr):
    """sum |2^t - u| of rows that are read again, by tiles of W words."""
    TILES: tl.constexpr = (X.columns + W * X.p - 1) // (W * X.p)
    w = tl.arange(0, W)[None, :]
    slot = tl.zeros([f_max.shape[0], W], tl.float64)
    for i in range(TILES):
        xs = elements(rows, w + i * W, X)
        for j in tl.static_range(len(xs)):
            more = tl.maximum(tl.exp2((xs[j] - f_max[:, None]) * scale) - u[:, None], 0.0)
            slot += tl.where(within(w + i * W, j, X), more, 0.0)
    return tl.sum(slot, 1).to(tl.float32) * 2.0

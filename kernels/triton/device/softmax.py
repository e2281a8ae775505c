"""Rows of logits to their maximum and the sums that statistics are made of."""

import triton
import triton.language as tl

from fastood.kernels.triton.device.formulas import EXP, KL, PLOGP, REST, SQUARES, SUMLOGP, TV
from fastood.kernels.triton.device.level import has_flat_tv, kl_uniform, mean_z_again, of_flat_rows
from fastood.kernels.triton.device.words import (
    INF,
    LN2,
    above,
    any_row,
    fused,
    in_float32,
    inverse_power,
    larger,
    larger_words,
    load_row,
    load_tile,
    log2,
    only_own,
    row_max,
    row_sums,
    smaller_words,
    unpack,
    within,
)

DEEP = tl.constexpr(2.0**-80)  # a rest below this is summed again from a pivot of its own
FAR = tl.constexpr(16384.0)  # rows with a maximum beyond this times T / log2(e) are summed again
SHORT = tl.constexpr(128)  # rows in which that would cost more than it saves


@triton.jit
def softmax_sums(ptr, base, head, w, n, scale, N: tl.constexpr, LEAST: tl.constexpr, VEC: tl.constexpr,
                 P: tl.constexpr, SHIFTED: tl.constexpr, W: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    """Of t = (f - max) log2(e) / T over rows of LEAST <= n <= N logits, `rest` meaning all elements but one maximum:

    max, pivot, rest sum 2^t, rest sum 2^2t, rest sum t 2^t, mean z, sum |2^t - u| with u = (sum 2^t) / n, KL(u || p).

    The three sums over the rest are relative to the pivot: the maximum, or where they would vanish the next
    largest logit; last comes whether any row may have such a pivot. Without REST the rest is what remains of the sum
    after 1 is taken away.
    """
    TYPE: tl.constexpr = ptr.dtype.element_ty
    us = load_row(ptr, base, head, w, n, N, LEAST, VEC, P, SHIFTED, W)
    if REST & SUMS:
        us = largest_first(us, P, TYPE)
        top = us[0]
    else:
        top = us[0]
        for i in tl.static_range(1, len(us)):
            top = larger_words(top, us[i], P, TYPE)
    tops = unpack(top, P, TYPE)
    top = tops[0] if P == 1 else larger(tops[0], tops[1])
    m = row_max(top)
    rest = tl.zeros_like(m)
    squares = rest
    exp_t = rest
    mean_z = rest
    deviation = rest
    kl = rest
    pivot = m
    rare = False
    if EXP & SUMS:
        xs = ()
        for i in tl.static_range(len(us)):
            xs = xs + unpack(us[i], P, TYPE)
        if REST & SUMS and P == 2:
            xs = (top, tl.minimum(xs[0], xs[1])) + xs[2:]
        ONCE: tl.constexpr = REST & SUMS and N > SHORT
        c, excess, far = centre(m, scale, ONCE)
        unit = tl.exp2(excess)  # 2^t of the maximum, as the sums have it
        back = inverse_power(excess)
        A: tl.constexpr = (len(xs) + 31) // 32  # accumulators: in a longer chain roundings add up
        sums = ((),) * A
        es, ts = (), ()
        for i in tl.static_range(len(xs)):
            t = scaled(xs[i], scale, c, ONCE)
            e = tl.exp2(t)
            if (PLOGP | SUMLOGP) & SUMS:  # 0 beyond the row's end, as 2^t is
                t = only_own(t, 0.0, i // P, i % P, w, n, LEAST, VEC, P, W)
            es, ts = es + (e,), ts + (t,)
            if i > 0 or not REST & SUMS:
                sums = sums[: i % A] + (add_exp(sums[i % A], e, t, SUMS),) + sums[i % A + 1 :]
        if REST & SUMS:
            # The largest of a slot comes last, or is kept out: if it is the row's, the rest is not drowned.
            hot = top == m[:, None]
            sums = (add_exp(sums[0], tl.where(hot, 0.0, es[0]), ts[0], SUMS),) + sums[1:]
            totals = row_sums(added(sums, len(sums)) + (tl.where(hot, 1.0, 0.0),))
        else:
            totals = row_sums(added(sums, len(sums)))
        # A maximum that was kept out counts 1; one that was not is taken away as it was added.
        others = totals[len(totals) - 1] - 1.0 if REST & SUMS else tl.zeros_like(m)
        kept = 0.0 if REST & SUMS else 1.0
        part = (totals[0] - kept) * back
        rest = tl.fma(totals[0] - kept, back, others)
        totals = totals[1:]
        if REST & SUMS:
            rest = tl.where(tl.abs(m) < INF, rest, float("nan"))  # inf - inf was kept out of it
        if SQUARES & SUMS:
            squares = tl.fma((totals[0] - kept) * back, back, others)
            totals = totals[1:]
        if PLOGP & SUMS:
            exp_t = tl.fma(totals[0], back, -(excess * part))
            totals = totals[1:]
        if SUMLOGP & SUMS:
            mean_z = tl.fma(totals[0], LN2 / n, excess * -LN2)
        if TV & SUMS:
            u = (rest + 1.0) * unit / N
            deviation = deviations(es, u) * back
        again = far
        if REST & SUMS:
            again |= rest < DEEP
        if SUMLOGP & SUMS:
            again |= mean_z == -INF  # of a sum beyond float32, or a masked class
        seen = again
        if PLOGP & SUMS:
            seen |= exp_t != exp_t
        if TV & SUMS:
            seen |= has_flat_tv(deviation, rest)
        if KL & SUMS:
            kl, flat = kl_uniform(rest, mean_z, n)
            seen |= flat
        if (REST | SUMLOGP | TV) & SUMS:
            rare = any_row(seen)
            if rare:
                if PLOGP & SUMS:
                    if any_row(exp_t != exp_t):
                        exp_t = tl.where(exp_t != exp_t, masked_exp_t(es, unit, excess) * back, exp_t)
                # In tiles of a word or a few a thread, so that what is rare is not what takes the most registers.
                if REST & SUMS:
                    if any_row(again):
                        SOME: tl.constexpr = W // P if N % 8 == 0 and W >= P else W
                        some = tl.arange(0, SOME)[None, :]
                        other, sum1, sum2, sum3, sum4 = sums_again(
                            ptr, base, head, some, n, m, scale, N, VEC, P, SHIFTED, SOME
                        )
                        pivot = tl.where(again, other, m)
                        rest = tl.where(again, sum1, rest)
                        squares = tl.where(again, sum2, squares)
                        exp_t = tl.where(again, sum3, exp_t)
                        mean_z = tl.where(again, sum4, mean_z)
                        if TV & SUMS:
                            u = tl.fma(rest, tl.exp2((pivot - m) * scale), 1.0) / N
                            other = deviations_again(ptr, base, head, some, n, m, scale, u, N, VEC, P, SHIFTED, SOME)
                            deviation = tl.where(again, other, deviation)
                LESS: tl.constexpr = W // 4 if W >= 4 and N % 4 == 0 else W
                less = tl.arange(0, LESS)[None, :]
                if SUMLOGP & SUMS and not REST & SUMS:
                    if any_row(again):
                        other = mean_z_again(ptr, base, head, less, n, m, scale, N, VEC, P, SHIFTED, LESS)
                        mean_z = tl.where(again, other, mean_z)
                if (TV | KL) & SUMS:
                    of_max = tl.where(pivot == m, rest, 0.0)
                    kl, deviation = flat_again(
                        ptr, base, head, less, n, m, of_max, mean_z, deviation, scale, N, VEC, P, SHIFTED, LESS, SUMS
                    )
    return m, pivot, rest, squares, exp_t, mean_z, deviation, kl, rare


@triton.jit
def flat_again(ptr, base, head, w, n, m, rest, mean_z, deviation, scale, N: tl.constexpr, VEC: tl.constexpr,
               P: tl.constexpr, SHIFTED: tl.constexpr, W: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    """KL(u || p) and sum |2^t - u|, of nearly flat rows from reading them again."""
    kl, flat = rest, m != m
    if KL & SUMS:
        kl, flat = kl_uniform(rest, mean_z, n)
    if TV & SUMS:
        flat |= has_flat_tv(deviation, rest)
    if any_row(flat):
        IS_KL: tl.constexpr = KL & SUMS > 0
        IS_TV: tl.constexpr = TV & SUMS > 0
        other, tv = of_flat_rows(ptr, base, head, w, n, m, scale, N, VEC, P, SHIFTED, W, IS_KL, IS_TV)
        kl = tl.where(flat, other, kl)
        deviation = tl.where(flat, (tv + tv) * (1.0 + rest), deviation)
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
def centre(m, scale, ONCE: tl.constexpr):
    """c, and by how much t = fma(logit, scale, c) exceeds (logit - m) scale in each row, the rounding error of c.

    Last: which rows have so large a maximum that this is not next to 0, and are summed again. Not ONCE, in short rows
    and where none are summed again otherwise, m is subtracted first: c is half of -m, see scaled.
    """
    if ONCE:
        c = -(m * scale)
        c = tl.fma(tl.abs(c), -(2.0**-23), c)  # so that no t is above 0
        return c[:, None], fused(m, scale, c), (tl.abs(c) > FAR) & (tl.abs(m) < INF)
    else:
        return -0.5 * m[:, None], tl.zeros_like(m), m < m


@triton.jit
def scaled(x, scale, c, ONCE: tl.constexpr):
    """t of logits; see centre. The difference of two may be beyond float32, that of their halves is not."""
    return fused(x, scale, c) if ONCE else tl.fma(x, 0.5, c) * (2.0 * scale)


@triton.jit
def masked_exp_t(es, unit, excess):
    """sum t 2^t of rows with masked classes, t from 2^t: log2's error shows near 1 alone, where entropies are large."""
    slot = tl.zeros_like(es[0])
    for i in tl.static_range(len(es)):
        t = tl.where(es[i] < unit[:, None], log2(es[i]) - excess[:, None], 0.0)
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
    """The sum of tiles, halves first: no addition waits for the one before. (As sums of 2^t are made it would take
    more registers.)
    """
    if len(xs) == 1:
        return xs[0]
    else:
        return tree_sum(xs[: len(xs) // 2]) + tree_sum(xs[len(xs) // 2 :])


@triton.jit
def sums_again(ptr, base, head, w, n, m, scale, N: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr,
               SHIFTED: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """The three sums over the rest, and mean z, of rows read again: few are this certain, or this far from 0.

    They are relative to the pivot, in front: where it is far below the maximum, the largest of the other logits.
    """
    TILES: tl.constexpr = (N + W * P - 1) // (W * P)
    top = m[:, None]
    second = tl.full([m.shape[0], W], -INF, tl.float32)
    zero = tl.zeros_like(second).to(tl.float64)  # in which the order of elements is lost
    ties = zero
    for i in range(TILES):
        halves = unpack(load_tile(ptr, base, head, w + i * W, n, False, VEC, P, SHIFTED), P, ptr.dtype.element_ty)
        for j in tl.static_range(P):
            own = within(w + i * W, j, n, VEC, P)
            ties += tl.where(own & (halves[j] == top), 1.0, 0.0)
            second = tl.maximum(second, tl.where(own & (halves[j] < top), halves[j], -INF))
    ties = tl.sum(ties, 1) - 1.0
    second = tl.max(second, 1)
    # Where it is near, `statistic` does not take the logarithm of 1 + rest for the rest; no other class: any does.
    pivot = tl.where((ties > 0.0) | (second == -INF) | ((second - m) * scale > -60.0), m, second)
    sum1, sum2, sum3, sum4 = zero, zero, zero, zero
    for i in range(TILES):
        halves = unpack(load_tile(ptr, base, head, w + i * W, n, False, VEC, P, SHIFTED), P, ptr.dtype.element_ty)
        for j in tl.static_range(P):
            own = within(w + i * W, j, n, VEC, P)
            t = tl.where(own & (halves[j] < top), (halves[j] - pivot[:, None]) * scale, -INF)
            e = tl.exp2(t).to(tl.float64)
            sum1 += e
            sum2 = tl.fma(e, e, sum2)
            sum3 = tl.fma(e, tl.maximum(t, -1e30).to(tl.float64), sum3)
            sum4 += tl.where(own, (halves[j].to(tl.float64) - top.to(tl.float64)) * scale, 0.0)
    sum1, sum2 = tl.sum(sum1, 1) + ties, tl.sum(sum2, 1) + ties
    return (pivot,) + in_float32((sum1, sum2, tl.sum(sum3, 1), tl.sum(sum4, 1) * (LN2 / n)))


@triton.jit
def deviations_again(ptr, base, head, w, n, m, scale, u, N: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr,
                     SHIFTED: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """sum |2^t - u| of rows read again."""
    TILES: tl.constexpr = (N + W * P - 1) // (W * P)
    slot = tl.zeros([m.shape[0], W], tl.float64)
    for i in range(TILES):
        halves = unpack(load_tile(ptr, base, head, w + i * W, n, False, VEC, P, SHIFTED), P, ptr.dtype.element_ty)
        for j in tl.static_range(P):
            more = tl.maximum(tl.exp2((halves[j] - m[:, None]) * scale) - u[:, None], 0.0)
            slot += tl.where(within(w + i * W, j, n, VEC, P), more, 0.0)
    return tl.sum(slot, 1).to(tl.float32) * 2.0

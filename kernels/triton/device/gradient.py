"""The gradient norms that no row statistic gives: || E_q[e_Y - p] ||_r^power and E_q[ || e_Y - p ||_r^power ].

A program goes over its rows three or four times: for the maximum and the next largest logit, the pivot; for sums of
exponentials relative to the pivot; for the terms. Rows are HELD in registers meanwhile, so that each byte is read once;
long ones are read again, from the cache. The maximum's term is worked out once a row, with float32's precision in the
range of float64, since 1 - p keeps its relative precision there. All other classes have p <= 1/2, and nothing cancels.

Their sums must leave the maximum out. Inside, with given labels, its logit is masked. Else its logit is replaced by the
pivot's: then it adds to a sum what the pivot itself adds, no more than half of the sum, and that is subtracted once a
row. A given label of the maximum's is set aside, with 0 in its place.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastood.kernels.triton.device.sweep import (
    collected,
    load_elements,
    masked,
    no_sum,
    row_total,
    rows_of_program,
    two_largest,
)
from fastood.kernels.triton.device.words import INF, LN2, any_row, exp2_double, larger, load_table, log1p, log2

# Label distributions, and orders other than whole ones up to 6, as shapes.py numbers them.
UNIFORM, PREDICTED, LOG_PREDICTED, GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
INFINITE, GENERAL = tl.constexpr(0), tl.constexpr(-1)


class Table(NamedTuple):
    """What the table holds, in float64."""

    scale: Any  # log2(e) / T
    order: Any
    inverse: Any  # 1 / order
    power: Any
    factor: Any  # a pointer to what the sum over the classes below the maximum is to be multiplied by


class Pivot(NamedTuple):
    """Of each row, and the scale of all."""

    f_max: Any
    second: Any  # the largest logit but one maximum
    logit: Any  # the same, but a finite one
    minus_half: Any  # of that: logits are halved before they are subtracted, so that no difference leaves float32
    twice_scale: Any


class Classes(NamedTuple):
    """Rows, to be gone over."""

    f: Any  # where their logits are
    q: Any  # and their given labels
    pivot: Any
    held: Any  # what `relative` gives of each tile, where it is held


class Rest(NamedTuple):
    """Of each row; the rest is all of it but one maximum."""

    rest: Any  # sum of e, which is relative to the pivot
    powers: Any  # of each slot: sum of e^r, where norms of classes take it
    gap: Any  # in float64, as weight and r1
    weight: Any
    r1: Any
    log_total: Any  # log2 of 1 + r1
    p_max: Any
    p_pivot: Any
    q_max: Any


class ClassNorm(NamedTuple):
    """What || e_y - p ||^power of all classes below the maximum have in common."""

    p_pivot: Any
    power_sum: Any  # over all classes: of whole orders sum p_k^r, of others sum (p_k / p_max)^r
    weight_r: Any  # of other orders (p_pivot / p_max)^r
    log_total: Any  # log2 of 1 + r1
    r: Any
    power: Any
    exponent: Any  # power / r, or of orders 1 and infinity the power
    shift: Any


@triton.jit
def read(f, q, k, WHOLE: tl.constexpr, S: tl.constexpr, NORM: tl.constexpr):
    """Logits k of rows and their given labels. Where a tile is not WHOLE, masked and without labels from the end on."""
    v = load_elements(f, k, -INF, WHOLE, S)
    return v, (load_elements(q, k, 0.0, WHOLE, S) if NORM.labels == GIVEN else v)


@triton.jit
def relative(v, q, pivot, NORM: tl.constexpr):
    """Of classes k: log2 (p_k / p_pivot), that ratio, and the label, in two parts: below the maximum, and at it."""
    q_at_max = tl.where(v > pivot.second, q, 0.0)
    if NORM.labels == GIVEN and not NORM.outside:
        v = tl.where(v > pivot.second, -INF, v)
    else:
        v = tl.minimum(v, pivot.logit)
    z = tl.fma(v, 0.5, pivot.minus_half) * pivot.twice_scale
    return z, tl.exp2(z), q - q_at_max, q_at_max


@triton.jit
def terms(classes, k, i: tl.constexpr, S: tl.constexpr, NORM: tl.constexpr):
    """What `relative` gives of classes k, the i-th tile of those at hand."""
    if S.held:
        return classes.held[i]
    else:
        v, q = read(classes.f, classes.q, k, False, S, NORM)
        return relative(v, q, classes.pivot, NORM)


@triton.jit
def log2_double(x):
    """Of float64 x >= 0, to float32's precision."""
    bits = x.to(tl.int64, bitcast=True)
    mantissa = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    exponent = (bits >> 52).to(tl.int32) - 1023
    return tl.where(x == 0.0, -INF, exponent.to(tl.float64) + log2(mantissa.to(tl.float32)).to(tl.float64))


@triton.jit
def whole_power(x, N: tl.constexpr):
    """x^N, N >= 1."""
    if N == 1:
        return x
    elif N % 2 == 0:
        return whole_power(x * x, N // 2)
    else:
        return whole_power(x * x, N // 2) * x


@triton.jit
def size(z, e, of, NORM: tl.constexpr):
    """|| e_y - p ||^power / 2^shift of classes y below the maximum, e = 2^z being p_y / p_pivot. `of`: their ClassNorm.

    Of order 1 it is that of || e_y - p || / 2.
    """
    ORDER: tl.constexpr = NORM.order
    if ORDER == 2:
        x = tl.fma(e, -2.0 * of.p_pivot, 1.0 + of.power_sum)
    elif ORDER > 2:
        x = tl.fma(-whole_power(e * of.p_pivot, ORDER - 1), e * of.p_pivot, of.power_sum)
        one_minus_p = tl.fma(e, -of.p_pivot, 1.0)
        x = tl.fma(whole_power(one_minus_p, ORDER - 1), one_minus_p, x)
    else:
        x = tl.fma(e, -of.p_pivot, 1.0)
    if ORDER == GENERAL:
        log_one_minus_p = log2(x)
        x = tl.fma(-of.weight_r, tl.exp2(of.r * z), of.power_sum)
        x = tl.fma(x, tl.exp2(-of.r * (of.log_total + log_one_minus_p)), 1.0)
        return tl.exp2(tl.fma(log2(x), of.exponent, tl.fma(log_one_minus_p, of.power, -of.shift)))
    elif NORM.exponent == 0:
        return tl.exp2(tl.fma(log2(x), of.exponent, -of.shift))
    elif NORM.exponent == 0.5:
        return tl.sqrt(x)
    elif NORM.exponent == 1:
        return x
    else:
        return x * x


@triton.jit
def away(e, q, k, p_pivot, WHOLE: tl.constexpr, S: tl.constexpr, NORM: tl.constexpr):
    """|q - p_k| of classes below the maximum."""
    if NORM.labels == UNIFORM:
        q = masked(tl.zeros_like(e) + 1.0 / S.columns, k, WHOLE, S)
    return tl.abs(tl.fma(e, -p_pivot, q))


@triton.jit
def add_power(sum, d, ORDER: tl.constexpr):
    """sum + d^ORDER, a whole one."""
    return sum + d if ORDER == 1 else tl.fma(whole_power(d, ORDER - 1), d, sum)


@triton.jit
def pivot_of(f, q, tiles, scale, S: tl.constexpr, NORM: tl.constexpr):
    """The Pivot of rows, and which of them are `valid`: have a softmax, and labels that are probabilities."""
    C: tl.constexpr = S.columns
    W: tl.constexpr = S.w
    TILES: tl.constexpr = S.tiles
    lane = tl.arange(0, W)[None, :]
    labels, slot = no_sum(f.shape[0], S)
    high = slot - INF  # the two largest of each slot
    low = high
    least = slot
    for first in range(0, C, TILES * W):
        for i in tl.static_range(TILES):
            v, label = tiles[i] if S.held else read(f, q, first + i * W + lane, False, S, NORM)
            low = tl.maximum(low, tl.minimum(high, v))
            high = larger(high, v)
            if NORM.labels == GIVEN:
                labels, slot = collected(labels, slot + label, i, TILES)
                least = tl.minimum(least, label)
    f_max, second = two_largest(high, low)
    valid = tl.abs(f_max) < INF
    if NORM.labels == GIVEN:  # which in a half type do not sum to 1 exactly
        valid &= (tl.abs(row_total(labels, S.each) - 1.0) < 1e-2) & (tl.min(least, 1, keep_dims=True) == 0.0)
    finite = tl.where(second == -INF, f_max, second)  # no other class: any finite pivot does
    return Pivot(f_max, second, finite, finite * -0.5, (scale * 2.0).to(tl.float32)), valid


@triton.jit
def rest_of(classes, table, S: tl.constexpr, NORM: tl.constexpr):
    """The Rest of rows."""
    C: tl.constexpr = S.columns
    W: tl.constexpr = S.w
    TILES: tl.constexpr = S.tiles
    ORDER: tl.constexpr = NORM.order
    RATIOS: tl.constexpr = NORM.outside and (ORDER > 1 or ORDER == GENERAL)
    lane = tl.arange(0, W)[None, :]
    r = table.order.to(tl.float32)
    exps, slot = no_sum(classes.f.shape[0], S)
    powers, slot_r = exps, slot
    q_max = slot
    for first in range(0, C, TILES * W):
        for i in tl.static_range(TILES):
            z, e, _, q_at_max = terms(classes, first + i * W + lane, i, S, NORM)
            if NORM.labels == GIVEN:
                q_max += q_at_max
            exps, slot = collected(exps, slot + e, i, TILES)
            if RATIOS:
                slot_r = slot_r + tl.exp2(r * z) if ORDER == GENERAL else tl.fma(whole_power(e, ORDER - 1), e, slot_r)
                powers, slot_r = collected(powers, slot_r, i, TILES)
    pivot = classes.pivot
    # Of all classes but one maximum, relative to the pivot: 0, or at least 1.
    one = tl.where(pivot.second == pivot.f_max, 1.0, 0.0) if NORM.labels == GIVEN and not NORM.outside else 1.0
    rest = (row_total(exps, S.each) - one).to(tl.float32)
    gap = (pivot.logit.to(tl.float64) - pivot.f_max.to(tl.float64)) * table.scale
    weight = exp2_double(gap)
    r1_double = weight * rest.to(tl.float64)
    r1 = r1_double.to(tl.float32)
    p_max = 1.0 / (1.0 + r1)
    # p at the pivot; without another class one whose term, to be subtracted, is finite, and inside 0.
    p_pivot = tl.where(rest > 0.0, weight.to(tl.float32) * p_max, 0.0 if NORM.outside else 1.0 / C)
    log_total = log2(1.0 + r1)
    if NORM.labels == GIVEN:
        q_max = tl.sum(q_max, 1, keep_dims=True)  # of one class
    return Rest(rest, powers, gap, weight, r1_double, log_total, p_max, p_pivot, q_max)


@triton.jit
def class_norm(row, table, S: tl.constexpr, NORM: tl.constexpr):
    """The ClassNorm, log2 of the norm of the maximum, and what the sum of all others is to be multiplied by.

    ||e_y - p||^power = (1 - p_y)^power (1 + sum over the others of (p_k / (1 - p_y))^r)^(power / r), in which no
    high order underflows. That takes ratios of p: the power sum is of (p_k / p_max)^r then. Of whole orders,
    which are small, it is of p_k^r.
    """
    ORDER: tl.constexpr = NORM.order
    nothing = tl.zeros_like(row.rest)
    r, power = table.order.to(tl.float32), table.power.to(tl.float32)
    log_norm = row.gap + (log2(row.rest) - row.log_total).to(tl.float64)
    power_sum, weight_r, shift, exponent = nothing, nothing, nothing, power
    factor = nothing.to(tl.float64) + load_table(table.factor)
    if ORDER > 1 or ORDER == GENERAL:
        rest_r = (row_total(row.powers, S.each) - 1.0).to(tl.float32)
        exponent = (table.power * table.inverse).to(tl.float32)
        if ORDER == GENERAL:
            weight_r = tl.exp2((table.order * row.gap).to(tl.float32))
            power_sum = tl.fma(weight_r, rest_r, 1.0)
            ratios = tl.exp2(tl.fma(-r, log2(row.rest), log2(rest_r)))
            # That of a class of no probability, the largest of all: no high power overflows, whatever its weight;
            # the least is above 2^-MOST_POWER of it.
            shift = exponent * log2(tl.fma(power_sum, tl.exp2(-r * row.log_total), 1.0))
            factor = exp2_double(shift.to(tl.float64))
        else:
            ratio_sum = tl.fma(whole_power(row.weight.to(tl.float32), ORDER), rest_r, 1.0)
            power_sum = ratio_sum * whole_power(row.p_max, ORDER)
            ratios = rest_r * whole_power(1.0 / row.rest, ORDER)
            shift = exponent
        log_norm = tl.fma(log2(1.0 + tl.where(row.rest > 0.0, ratios, 0.0)).to(tl.float64), table.inverse, log_norm)
    if ORDER == 1:
        log_norm += 1.0
    return ClassNorm(row.p_pivot, power_sum, weight_r, row.log_total, r, power, exponent, shift), log_norm, factor


@triton.jit
def sum_of_logs(classes, row, of, scale, S: tl.constexpr, NORM: tl.constexpr):
    """sum of log2 p_y || e_y - p ||^power over the classes below the maximum, in float64, from the rows read again."""
    W: tl.constexpr = S.w
    pivot = classes.pivot
    log_p_pivot = row.gap - row.log_total.to(tl.float64)
    nothing = tl.zeros_like(row.rest)
    total = tl.zeros([nothing.shape[0], W], tl.float64)
    for first in range(0, S.columns, W):
        k = first + tl.arange(0, W)[None, :]
        v, _ = read(classes.f, classes.q, k, False, S, NORM)
        below = tl.fma(tl.minimum(v, pivot.logit), 0.5, pivot.minus_half)
        z = below * pivot.twice_scale
        log_p = below.to(tl.float64) * (scale * 2.0) + log_p_pivot
        total += tl.where(k < S.columns, log_p * size(z, tl.exp2(z), of, NORM).to(tl.float64), 0.0)
    of_pivot = log_p_pivot * size(nothing, nothing + 1.0, of, NORM).to(tl.float64)
    return tl.sum(total, 1, keep_dims=True) - of_pivot


@triton.jit
def expected_norm(classes, row, table, S: tl.constexpr, NORM: tl.constexpr):
    """E_q[ || e_Y - p ||_r^power ] of rows, of which `row` is the Rest."""
    C: tl.constexpr = S.columns
    W: tl.constexpr = S.w
    TILES: tl.constexpr = S.tiles
    LABELS: tl.constexpr = NORM.labels
    lane = tl.arange(0, W)[None, :]
    of, log_norm, factor = class_norm(row, table, S, NORM)
    log_p_pivot = (row.gap - row.log_total.to(tl.float64)).to(tl.float32)
    sum_below, slot = no_sum(classes.f.shape[0], S)
    for first in range(0, C, TILES * W):
        for i in tl.static_range(TILES):
            k = first + i * W + lane
            z, e, q, _ = terms(classes, k, i, S, NORM)
            x = size(z, e, of, NORM)
            if LABELS == GIVEN:
                slot = tl.fma(q, x, slot)
            elif LABELS == PREDICTED:
                slot = tl.fma(e, x, slot)
            elif LABELS == LOG_PREDICTED:
                slot = tl.fma(masked(z + log_p_pivot, k, S.held and (i + 1) * W <= C, S), x, slot)
            else:
                slot += masked(x, k, S.held and (i + 1) * W <= C, S)
            sum_below, slot = collected(sum_below, slot, i, TILES)
    sum_below = row_total(sum_below, S.each)
    if LABELS != GIVEN:
        nothing = tl.zeros_like(row.rest)
        x = size(nothing, nothing + 1.0, of, NORM)
        if LABELS == LOG_PREDICTED:
            left = sum_below == -INF  # float32, unless a class is masked
            sum_below -= (x * log_p_pivot).to(tl.float64)
            if any_row(tl.max(left.to(tl.int32), 1)):
                sum_below = tl.where(left, sum_of_logs(classes, row, of, table.scale, S, NORM), sum_below)
        else:
            sum_below -= x.to(tl.float64)
    of_max = exp2_double(table.power * log_norm)  # what the maximum adds
    if LABELS == GIVEN:
        of_max *= row.q_max.to(tl.float64)
    elif LABELS == PREDICTED:
        of_max *= row.p_max.to(tl.float64)
        factor *= row.weight * row.p_max.to(tl.float64)
    elif LABELS == LOG_PREDICTED:
        r1 = row.r1.to(tl.float32)
        of_max *= -tl.where(r1 < 2.0**-60, row.r1, log1p(r1).to(tl.float64))
        factor *= LN2
    else:
        of_max *= 1.0 / C
        factor *= 1.0 / C
    return of_max + tl.where(sum_below == 0.0, 0.0, sum_below * factor)  # the factor may be infinite


@triton.jit
def norm_of_expected(classes, row, table, S: tl.constexpr, NORM: tl.constexpr):
    """|| E_q[e_Y - p] ||_r^power of rows, of which `row` is the Rest."""
    C: tl.constexpr = S.columns
    W: tl.constexpr = S.w
    TILES: tl.constexpr = S.tiles
    LABELS: tl.constexpr = NORM.labels
    ORDER: tl.constexpr = NORM.order
    lane = tl.arange(0, W)[None, :]
    label = 1.0 / C
    nothing = tl.zeros_like(row.rest)
    r, r1 = table.order.to(tl.float32), row.r1.to(tl.float32)
    sure = r1 < 1.0  # of one class: q - p = (q - 1) + (1 - p) there keeps 1 - p when q = 1
    q_rest = (row.q_max if LABELS == GIVEN else label) - tl.where(sure, 1.0, 0.0)
    d_max = tl.abs(tl.fma(tl.where(sure, r1, -1.0), row.p_max, q_rest))
    if LABELS == GIVEN:
        d_max = tl.where(classes.pivot.second == classes.pivot.f_max, 0.0, d_max)
    sums, slot = no_sum(classes.f.shape[0], S)
    unit = nothing + 1.0
    if ORDER != 1:
        largest = slot
        for first in range(0, C, TILES * W):
            for i in tl.static_range(TILES):
                k = first + i * W + lane
                _, e, q, _ = terms(classes, k, i, S, NORM)
                largest = tl.maximum(largest, away(e, q, k, row.p_pivot, S.held and (i + 1) * W <= C, S, NORM))
        unit = tl.maximum(tl.max(largest, 1, keep_dims=True), d_max)
    if ORDER != INFINITE:
        unit = tl.maximum(unit, 2.0**-126)
    log_norm = log2_double(unit.to(tl.float64))
    if ORDER != INFINITE:
        per_unit = 1.0 / unit
        log_p_per_unit = (row.gap - row.log_total.to(tl.float64) - log_norm).to(tl.float32)  # log2 of p_pivot / unit
        for first in range(0, C, TILES * W):
            for i in tl.static_range(TILES):
                k = first + i * W + lane
                z, e, q, _ = terms(classes, k, i, S, NORM)
                d = away(e, q, k, row.p_pivot, S.held and (i + 1) * W <= C, S, NORM)
                if ORDER == GENERAL:
                    log_d = log2(d * per_unit)
                    if LABELS == GIVEN:  # p below float32 counts in orders near 0
                        log_d = tl.where(q == 0.0, z + log_p_per_unit, log_d)
                    slot += tl.exp2(r * log_d)
                else:
                    slot = add_power(slot, d * per_unit, ORDER)
                sums, slot = collected(sums, slot, i, TILES)
        if ORDER == GENERAL:
            log_d = row.gap + (log2(row.rest) - row.log_total).to(tl.float64)  # of 1 - p
            log_d = tl.where(sure & (q_rest == 0.0), log_d, log2_double(d_max.to(tl.float64)))
            of_max = tl.exp2((table.order * (log_d - log_norm)).to(tl.float32))
            of_pivot = tl.exp2(r * log2(tl.abs(label - row.p_pivot) * per_unit))
        else:
            of_max = add_power(nothing, d_max * per_unit, ORDER)
            of_pivot = add_power(nothing, tl.abs(label - row.p_pivot) * per_unit, ORDER)
        total = row_total(sums, S.each) + of_max.to(tl.float64)
        if LABELS != GIVEN:
            total -= of_pivot.to(tl.float64)
        log_norm = tl.fma(log2_double(total), table.inverse, log_norm)
    return exp2_double(table.power * log_norm)


@triton.jit(do_not_specialize=["f_stride", "q_stride", "N"])
def gradient(
    f_ptr, f_stride, q_ptr, q_stride, table_ptr, out_ptr, N, S: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr
):
    """[N] float64. Strides count groups of S.vec elements; table: see Table. S and NORM: Sweep and GradientNorm of
    shapes.py.
    """
    W: tl.constexpr = S.w
    TILES: tl.constexpr = S.tiles
    place, row = rows_of_program(N, ROWS)
    lane = tl.arange(0, W)[None, :]
    f = f_ptr + row * f_stride * S.vec
    q = q_ptr + row * q_stride * S.vec if NORM.labels == GIVEN else f
    table = Table(
        load_table(table_ptr),
        load_table(table_ptr + 1),
        load_table(table_ptr + 2),
        load_table(table_ptr + 3),
        table_ptr + 4,
    )
    tiles = ()
    if S.held:
        for i in tl.static_range(TILES):
            tiles = tiles + (read(f, q, i * W + lane, (i + 1) * W <= S.columns, S, NORM),)
    pivot, valid = pivot_of(f, q, tiles, table.scale, S, NORM)
    held = ()
    if S.held:
        for i in tl.static_range(TILES):
            v, label = tiles[i]
            held = held + (relative(v, label, pivot, NORM),)
    classes = Classes(f, q, pivot, held)
    sums = rest_of(classes, table, S, NORM)
    if NORM.outside:
        value = expected_norm(classes, sums, table, S, NORM)
    else:
        value = norm_of_expected(classes, sums, table, S, NORM)
    tl.store(out_ptr + place, tl.where(valid, value, float("nan")), mask=place < N)

"""The kernels of scores: sums to statistics, norms and their products."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastood.kernels.triton.device.formulas import REST, VANISHING, formula
from fastood.kernels.triton.device.norms import norm_sums
from fastood.kernels.triton.device.softmax import softmax_sums
from fastood.kernels.triton.device.stream import streamed_sums
from fastood.kernels.triton.device.words import (
    INF,
    LN2,
    exp2_double,
    larger,
    load_table,
    log,
    log1p,
    log2,
    reciprocal,
    rows_at,
    split,
)

LARGEST = tl.constexpr(1.7976931348623157e308)  # double


@triton.jit
def root(sum, inverse, unit, GENERAL: tl.constexpr, LOG: tl.constexpr):
    """sum^inverse unit in float64, or its logarithm. GENERAL: there are orders beside 1 and 2, which are exact."""
    regular = (sum > 0.0) & (sum < INF)
    if LOG:
        x = tl.fma(log(sum), inverse, log(unit))
        return tl.where(regular, x, tl.where(sum == 0.0, -INF, sum).to(tl.float64))
    u = tl.where(inverse == 0.5, tl.sqrt_rn(sum), sum).to(tl.float64)
    if GENERAL:
        mantissa, exponent = split(sum)
        x = (exponent.to(tl.float64) + log2(mantissa).to(tl.float64)) * inverse
        u = tl.where((inverse != 1.0) & (inverse != 0.5) & regular, exp2_double(x), u)
        # The norm of finite features is finite, so that 0 times it is 0.
        return tl.where(regular, tl.minimum(u * unit, LARGEST), u * unit)
    else:
        return u * unit


# ---- statistics and scores


class Row(NamedTuple):
    """What statistics are made of. Of the rest all is in units of its weight, 2^gap, but r2."""

    f_max: Any
    gap: Any  # of the pivot and the maximum, times log2(e) / T
    weight: Any
    any_again: Any  # whether the weight may be below 1 in any row of the program
    rest: Any
    ratio: Any  # rest_squares / rest, which is in no unit; without REST nothing asks for it
    r2: Any
    rest_t: Any
    mean_z: Any
    deviation: Any
    kl: Any
    T: Any


@triton.jit
def row_of(sums, scale, T, APART: tl.constexpr):
    """Of RowSums; APART: with REST."""
    if APART:
        weight = tl.full(sums.f_max.shape, 1.0, tl.float64)
        gap = tl.zeros_like(weight)
        ratio = tl.where(sums.rest > 0.0, sums.rest_squares / sums.rest, 0.0)
        r2, rest_t = sums.rest_squares, sums.rest_t
        if sums.any_again:
            below = sums.pivot < sums.f_max
            gap = tl.where(below, (sums.pivot.to(tl.float64) - sums.f_max.to(tl.float64)) * scale, 0.0)
            least = tl.maximum(gap, -16384.0)  # 2^-16384 is 0, and 0 times what may be infinite would be NaN
            weight = exp2_double(least)
            narrow = weight.to(tl.float32)
            r2 *= narrow * narrow
            ratio *= narrow
            rest_t = tl.where(sums.rest > 0.0, tl.fma(least.to(tl.float32), sums.rest, rest_t), 0.0)
        return Row(
            sums.f_max, gap, weight, sums.any_again, sums.rest, ratio, r2, rest_t, sums.mean_z, sums.deviation,
            sums.kl, T,
        )  # fmt: skip
    else:
        return Row(
            sums.f_max, 0.0, 1.0, False, sums.rest, sums.rest_squares, sums.rest_squares, sums.rest_t, sums.mean_z,
            sums.deviation, sums.kl, T,
        )  # fmt: skip


@triton.jit
def statistic(CODE: tl.constexpr, row, C: tl.constexpr, APART: tl.constexpr):
    """One statistic of kernels/statistics.py; those that vanish with the rest in units of its weight."""
    if APART:
        weight = row.weight.to(tl.float32)
        r1 = row.rest * weight
        log_sum = log1p(r1)
        rest_log = tl.where(weight < 1.0, row.rest, log_sum)
    else:
        r1 = row.rest
        log_sum = log2(1.0 + r1) * LN2
        rest_log = log_sum
    p_max = reciprocal(1.0 + r1)
    return formula(
        CODE,
        row.gap,
        fmax=row.f_max,
        T=row.T,
        C=tl.full(row.f_max.shape, C, tl.float64),  # times which a mean may be beyond float32
        r1=r1,
        p_max=p_max,
        log_sum=log_sum,
        r2=row.r2,
        mean_z=row.mean_z,
        tv=row.deviation * p_max * 0.5,
        kl_uniform=row.kl,
        rest=row.rest,
        rest_squares=row.rest * row.ratio,
        rest_log=rest_log,
        rest_z=row.rest_t * LN2,
    )


@triton.jit
def v_term(i: tl.constexpr, V: tl.constexpr, table_ptr, row, C: tl.constexpr, APART: tl.constexpr):
    """The i-th V term: a statistic, in units of the rest's weight where it vanishes with that; or the sum of several,
    times what the table holds from V.first[i] on."""
    if len(V.codes[i]) == 1:
        return statistic(V.codes[i][0], row, C, APART)
    else:
        v = tl.zeros(row.f_max.shape, tl.float64)
        for j in tl.static_range(len(V.codes[i])):
            one = statistic(V.codes[i][j], row, C, APART).to(tl.float64)
            if APART and VANISHING >> V.codes[i][j] & 1:
                one *= row.weight
            v += load_table(table_ptr + V.first[i] + j) * one
        return v


@triton.jit
def with_bias(powers, i: tl.constexpr, NORMS: tl.constexpr, BIAS: tl.constexpr):
    """The sum of the i-th order, of [h; 1] if BIAS."""
    ORDER: tl.constexpr = NORMS.orders[i]
    sum = powers.sums[NORMS.slots[i]]
    if ORDER == 0.0:
        sum = sum + 1.0 if BIAS else sum
        return tl.where(powers.largest == powers.largest, sum, float("nan"))
    elif not BIAS:
        return sum
    elif ORDER == INF:
        return larger(sum, 1.0)
    else:
        return sum + tl.where(powers.unit == 1.0, 1.0, tl.exp2(log2(powers.unit) * (-ORDER)))


@triton.jit
def norm(powers, i: tl.constexpr, NORMS: tl.constexpr, BIAS: tl.constexpr, LOG: tl.constexpr):
    """The norm of the i-th order, or its logarithm."""
    ORDER: tl.constexpr = NORMS.orders[i]
    REGULAR: tl.constexpr = ORDER > 0.0 and ORDER < INF
    sum = with_bias(powers, i, NORMS, BIAS)
    inverse = tl.full(sum.shape, 1.0 / ORDER if REGULAR else 1.0, tl.float64)
    unit = powers.unit if REGULAR else tl.full(powers.unit.shape, 1.0, tl.float32)
    return root(sum, inverse, unit, REGULAR and ORDER != 1.0 and ORDER != 2.0, LOG)


@triton.jit(do_not_specialize=["x_stride", "x_offset", "h_stride", "h_offset", "out_row", "out_column", "N"])
def scores(
    x_ptr, x_stride, x_offset, h_ptr, h_stride, h_offset, table_ptr, out_ptr, out_row, out_column, N,
    X: tl.constexpr, X_TILES: tl.constexpr, SUMS: tl.constexpr, V: tl.constexpr,
    H: tl.constexpr, H_TILES: tl.constexpr, NORMS: tl.constexpr, POWERS: tl.constexpr, BIAS: tl.constexpr,
    LOG: tl.constexpr, ALL_V: tl.constexpr, ALL_U: tl.constexpr, SQUARE: tl.constexpr, FEW: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of logits (or one, read X_TILES tiles at a time where that is not 0) and of features to COLUMNS scores:

    factor * V * norm^power, as table_ptr says: log2(e) / T and T, then for each column the number of its V term,
    factor, number of its order, 1 / order, whether it vanishes with the rest, in whose weight its V term then comes,
    whether the order's sum comes in powers of the unit, and power; then the coefficients of V terms that are sums.
    """
    APART: tl.constexpr = REST & SUMS
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = place < N
    place = tl.minimum(place, N - 1)  # whose score is the same
    if len(V.codes) > 0:
        scale = load_table(table_ptr)
        T = load_table(table_ptr + 1).to(tl.float32)
        rows = rows_at(x_ptr, place, x_stride, x_offset, X)
        if X_TILES > 0:
            sums = streamed_sums(rows, scale.to(tl.float32), X, X_TILES, SUMS)
        else:
            sums = softmax_sums(rows, scale.to(tl.float32), X, SUMS)
        row = row_of(sums, scale, T, APART)
    if len(NORMS.orders) > 0:
        powers = norm_sums(rows_at(h_ptr, place, h_stride, h_offset, H), H, H_TILES, NORMS, POWERS, BIAS)

    if FEW is not None:
        out_ptr += place.to(tl.int64) * out_row
        for k in tl.static_range(COLUMNS):
            score = FEW.factor[k] * 1.0 if FEW.factor[k] != 0 else load_table(table_ptr + 2 + COLUMNS + k)
            if FEW.v[k] >= 0:
                score *= v_term(FEW.v[k], V, table_ptr, row, X.columns, APART)
                if APART and len(V.codes[FEW.v[k]]) == 1 and VANISHING >> V.codes[FEW.v[k]][0] & 1:
                    score = score.to(tl.float64)
                    if row.any_again:
                        score *= row.weight
            if FEW.order[k] >= 0:
                u = norm(powers, FEW.order[k], NORMS, BIAS, LOG)
                score *= u
                if FEW.power[k] == 2 and not LOG:
                    score *= u  # one by one: a score of 0 stays it where u * u overflows
            tl.store(out_ptr + out_column.to(tl.int64) * k, score.to(out_ptr.dtype.element_ty), mask=ok)
    else:
        for first in tl.static_range(0, COLUMNS, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            field = table_ptr + 2 + column
            within = column < COLUMNS
            score = load_table(field + COLUMNS, within, 0.0)
            if len(V.codes) > 0:
                which = load_table(field, within, -1.0).to(tl.int32)
                v = v_term(0, V, table_ptr, row, X.columns, APART)[:, None]
                if not ALL_V:
                    v = tl.where(which == 0, v, 1.0)
                for i in tl.static_range(1, len(V.codes)):
                    v = tl.where(which == i, v_term(i, V, table_ptr, row, X.columns, APART)[:, None], v)
                score = score * v
                if APART:
                    if row.any_again:
                        vanishes = load_table(field + 4 * COLUMNS, within, 0.0) == 1.0
                        score = tl.where(vanishes, score * row.weight[:, None], score)
            if len(NORMS.orders) > 0:
                which = load_table(field + 2 * COLUMNS, within, -1.0).to(tl.int32)
                sum = with_bias(powers, 0, NORMS, BIAS)[:, None]
                if not ALL_U:
                    sum = tl.where(which == 0, sum, 1.0)
                for i in tl.static_range(1, len(NORMS.orders)):
                    sum = tl.where(which == i, with_bias(powers, i, NORMS, BIAS)[:, None], sum)
                inverse = load_table(field + 3 * COLUMNS, within, 1.0)
                scaled = load_table(field + 5 * COLUMNS, within, 0.0)
                u = root(sum, inverse, tl.where(scaled == 1.0, powers.unit[:, None], 1.0), NORMS.general, LOG)
                if LOG and not ALL_U:
                    u = tl.where(which >= 0, u, 1.0)
                score = score * u
                if SQUARE and not LOG:
                    score = tl.where(load_table(field + 6 * COLUMNS, within, 1.0) == 2.0, score * u, score)
            out = out_ptr + place.to(tl.int64)[:, None] * out_row + column.to(tl.int64) * out_column
            tl.store(out, score.to(out_ptr.dtype.element_ty), mask=ok[:, None] & within)

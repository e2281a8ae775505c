"""The kernels of scores: sums to statistics, norms and their products."""

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
    log,
    log1p,
    log2,
    place,
    reciprocal,
    small,
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


@triton.jit
def parts_of(sums, scale, PEEL_: tl.constexpr):
    """What `statistic` needs of the sums of rows."""
    m, pivot, rest, squares, exp_t, mean_z, deviation, kl, rare = sums
    if PEEL_:
        weight = tl.full(m.shape, 1.0, tl.float64)
        far = tl.zeros_like(weight)
        ratio = tl.where(rest > 0.0, squares / rest, 0.0)
        if rare:
            far = tl.where(pivot < m, (pivot.to(tl.float64) - m.to(tl.float64)) * scale, 0.0)
            gap = tl.maximum(far, -16384.0)  # 2^-16384 is 0, and 0 times what may be infinite would be NaN
            weight = exp2_double(gap)
            near = weight.to(tl.float32)
            squares *= near * near
            ratio *= near
            exp_t = tl.where(rest > 0.0, tl.fma(gap.to(tl.float32), rest, exp_t), 0.0)
        return m, weight, rest, squares, ratio, exp_t, mean_z, deviation, rare, far, kl
    else:
        return m, 1.0, rest, squares, squares, exp_t, mean_z, deviation, False, 0.0, kl


@triton.jit
def statistic(CODE: tl.constexpr, parts, temperature, C: tl.constexpr, PEEL_: tl.constexpr):
    """One statistic of kernels/statistics.py; those that vanish with the rest in units of its weight."""
    m, weight, rest, squares, ratio, exp_t, mean_z, deviation, _, gap, kl = parts
    if PEEL_:
        near = weight.to(tl.float32)
        r1 = rest * near
        log_sum = log1p(r1)
        rest_log = tl.where(near < 1.0, rest, log_sum)
    else:
        r1 = rest
        log_sum = log2(1.0 + r1) * LN2
        rest_log = log_sum
    p_max = reciprocal(1.0 + r1)
    return formula(
        CODE,
        gap,
        fmax=m,
        T=temperature,
        C=tl.full(m.shape, C, tl.float64),  # times which a mean may be beyond float32
        r1=r1,
        p_max=p_max,
        log_sum=log_sum,
        r2=squares,
        mean_z=mean_z,
        tv=deviation * p_max * 0.5,
        kl_uniform=kl,
        rest=rest,
        rest_squares=rest * ratio,
        rest_log=rest_log,
        rest_z=exp_t * LN2,
    )


@triton.jit
def v_term(V_TERMS: tl.constexpr, i: tl.constexpr, FIRST: tl.constexpr, table_ptr, parts, temperature,
           C: tl.constexpr, PEEL_: tl.constexpr):  # fmt: skip
    """The i-th: a statistic, in units of the rest's weight where it vanishes with that; or the sum of several, times
    what the table holds from FIRST on."""
    if len(V_TERMS[i]) == 1:
        return statistic(V_TERMS[i][0], parts, temperature, C, PEEL_)
    else:
        total = tl.zeros(parts[0].shape, tl.float64)
        for j in tl.static_range(len(V_TERMS[i])):
            one = statistic(V_TERMS[i][j], parts, temperature, C, PEEL_).to(tl.float64)
            if PEEL_ and VANISHING >> V_TERMS[i][j] & 1:
                one *= parts[1]
            total += small(table_ptr + FIRST + j) * one
        return total


@triton.jit
def with_bias(powers, unit, SLOT: tl.constexpr, ORDER: tl.constexpr, SUMS: tl.constexpr, BIAS: tl.constexpr):
    """The sum of one order, of [h; 1] if BIAS."""
    sum = powers[SLOT]
    if ORDER == 0.0:
        sum = sum + 1.0 if BIAS else sum
        return tl.where(powers[SUMS - 1] == powers[SUMS - 1], sum, float("nan"))
    elif not BIAS:
        return sum
    elif ORDER == INF:
        return larger(sum, 1.0)
    else:
        return sum + tl.where(unit == 1.0, 1.0, tl.exp2(log2(unit) * (-ORDER)))


@triton.jit
def norm(powers, unit, SLOT: tl.constexpr, ORDER: tl.constexpr, SUMS: tl.constexpr, BIAS: tl.constexpr,
         LOG: tl.constexpr):  # fmt: skip
    """The norm of one order, or its logarithm."""
    REGULAR: tl.constexpr = ORDER > 0.0 and ORDER < INF
    sum = with_bias(powers, unit, SLOT, ORDER, SUMS, BIAS)
    inverse = tl.full(sum.shape, 1.0 / ORDER if REGULAR else 1.0, tl.float64)
    scaled = unit if REGULAR else tl.full(unit.shape, 1.0, tl.float32)
    return root(sum, inverse, scaled, REGULAR and ORDER != 1.0 and ORDER != 2.0, LOG)


@triton.jit(do_not_specialize=["x_stride", "x_offset", "h_stride", "h_offset", "out_row", "out_column", "N"])
def scores(
    x_ptr, x_stride, x_offset, h_ptr, h_stride, h_offset, table_ptr, out_ptr, out_row, out_column, N,
    C: tl.constexpr, X_VEC: tl.constexpr, X_P: tl.constexpr, X_SHIFTED: tl.constexpr, X_W: tl.constexpr,
    SUMS: tl.constexpr, V_TERMS: tl.constexpr, V_FIRST: tl.constexpr, X_TILES: tl.constexpr,
    D: tl.constexpr, H_VEC: tl.constexpr, H_P: tl.constexpr, H_W: tl.constexpr, H_TILES: tl.constexpr,
    POWERS: tl.constexpr, RANGES: tl.constexpr, ORDERS: tl.constexpr, SLOTS: tl.constexpr,
    BIAS: tl.constexpr, GENERAL: tl.constexpr, LOG: tl.constexpr, ALL_V: tl.constexpr, ALL_U: tl.constexpr,
    SQUARE: tl.constexpr, FEW: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of logits (or one, read X_TILES tiles at a time where that is not 0) and of features to COLUMNS scores:

    factor * V * norm^power, as table_ptr says: log2(e) / T and T, then for each column the number of its V term,
    factor, number of its order, 1 / order, whether the V term comes in units of the rest's weight, whether the order's
    sum comes scaled, and power; then the coefficients of V terms that are sums.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < N
    row = tl.minimum(row, N - 1)  # whose score is the same
    if len(V_TERMS) > 0:
        scale = small(table_ptr)
        temperature = small(table_ptr + 1).to(tl.float32)
        base, head = place(row, x_stride, x_offset, X_VEC, X_P, X_SHIFTED)
        near = scale.to(tl.float32)
        if X_TILES > 0:
            sums = streamed_sums(x_ptr, base, C, near, X_VEC, X_P, X_W, X_TILES, SUMS)
        else:
            w = tl.arange(0, X_W)[None, :]
            sums = softmax_sums(x_ptr, base, head, w, C, near, C, C, X_VEC, X_P, X_SHIFTED, X_W, SUMS)
        parts = parts_of(sums, scale, REST & SUMS)
    if len(ORDERS) > 0:
        base, _ = place(row, h_stride, h_offset, H_VEC, min(H_P, H_VEC), False)
        powers, unit = norm_sums(h_ptr, base, D, H_VEC, H_P, H_W, H_TILES, ROWS, POWERS, RANGES, BIAS)

    if len(FEW) > 0:
        out_ptr += row.to(tl.int64) * out_row
        for k in tl.static_range(COLUMNS):
            score = FEW[k][3] * 1.0 if FEW[k][3] != 0 else small(table_ptr + 2 + COLUMNS + k)
            if FEW[k][0] >= 0:
                score *= v_term(V_TERMS, FEW[k][0], V_FIRST[FEW[k][0]], table_ptr, parts, temperature, C, REST & SUMS)
                if REST & SUMS and len(V_TERMS[FEW[k][0]]) == 1 and VANISHING >> V_TERMS[FEW[k][0]][0] & 1:
                    score = score.to(tl.float64)
                    if parts[8]:
                        score *= parts[1]
            if FEW[k][1] >= 0:
                u = norm(powers, unit, SLOTS[FEW[k][1]], ORDERS[FEW[k][1]], len(RANGES), BIAS, LOG)
                score *= u
                if FEW[k][2] == 2 and not LOG:
                    score *= u  # one by one: a score of 0 stays it where u * u overflows
            tl.store(out_ptr + out_column.to(tl.int64) * k, score.to(out_ptr.dtype.element_ty), mask=ok)
    else:
        for first in tl.static_range(0, COLUMNS, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            field = table_ptr + 2 + column
            within = column < COLUMNS
            score = small(field + COLUMNS, within, 0.0)
            if len(V_TERMS) > 0:
                which = small(field, within, -1.0).to(tl.int32)
                v = v_term(V_TERMS, 0, V_FIRST[0], table_ptr, parts, temperature, C, REST & SUMS)[:, None]
                if not ALL_V:
                    v = tl.where(which == 0, v, 1.0)
                for i in tl.static_range(1, len(V_TERMS)):
                    one = v_term(V_TERMS, i, V_FIRST[i], table_ptr, parts, temperature, C, REST & SUMS)[:, None]
                    v = tl.where(which == i, one, v)
                score = score * v
                if REST & SUMS:
                    if parts[8]:
                        light = small(field + 4 * COLUMNS, within, 0.0) == 1.0
                        score = tl.where(light, score * parts[1][:, None], score)
            if len(ORDERS) > 0:
                which = small(field + 2 * COLUMNS, within, -1.0).to(tl.int32)
                sum = with_bias(powers, unit, SLOTS[0], ORDERS[0], len(RANGES), BIAS)[:, None]
                if not ALL_U:
                    sum = tl.where(which == 0, sum, 1.0)
                for i in tl.static_range(1, len(ORDERS)):
                    sum = tl.where(
                        which == i, with_bias(powers, unit, SLOTS[i], ORDERS[i], len(RANGES), BIAS)[:, None], sum
                    )
                inverse = small(field + 3 * COLUMNS, within, 1.0)
                scaled = small(field + 5 * COLUMNS, within, 0.0)
                u = root(sum, inverse, tl.where(scaled == 1.0, unit[:, None], 1.0), GENERAL, LOG)
                if LOG and not ALL_U:
                    u = tl.where(which >= 0, u, 1.0)
                score = score * u
                if SQUARE and not LOG:
                    score = tl.where(small(field + 6 * COLUMNS, within, 1.0) == 2.0, score * u, score)
            out = out_ptr + row.to(tl.int64)[:, None] * out_row + column.to(tl.int64) * out_column
            tl.store(out, score.to(out_ptr.dtype.element_ty), mask=ok[:, None] & within)

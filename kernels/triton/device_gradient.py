"""The gradient norms that no row statistic gives: || E_q[e_Y - p] ||_r^power and E_q[ || e_Y - p ||_r^power ].

A program sweeps its rows three or four times, first from memory and then from the cache: for the maximum and the next
largest logit, the pivot; for sums of exponentials relative to the pivot; for the terms, formed from the logits where
they are used. A maximum that no other class shares is left out of the sums, and what it adds is worked out in
float64 once a row: there 1 - p must keep its relative precision, below it p <= 1/2 and nothing cancels.

Element k of a row is summed in slot k mod W. Which thread holds a slot depends on the alignment of rows, so slots are
summed in float64, where the order disappears in the rounding to float32.
"""

import triton
import triton.language as tl

from fastood.kernels.triton.device import INF, LN2, larger, log2, row_max, small

# Label distributions and orders, as shapes.py numbers them.
UNIFORM, PREDICTED, LOG_PREDICTED, GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
ONE, TWO, INFINITE, GENERAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def load(ptr, k, rows, V: tl.constexpr, FILL: tl.constexpr):
    """Elements k of rows: (whether they are there, their length in groups of V). FILL beyond their ends."""
    return tl.load(ptr + k, mask=rows[0] & (k // V < rows[1]), other=FILL).to(tl.float32)


@triton.jit
def row_total(slots):
    return tl.sum(slots.to(tl.float64), 1)


@triton.jit
def log1p(r):
    """Of float64 r >= 0, to relative precision."""
    u = 1.0 + r
    return tl.log(u) + (r - (u - 1.0)) / u


@triton.jit
def column(x):
    return x.to(tl.float32)[:, None]


@triton.jit
def log_p_over(v, pivot):
    """log2 of p_k over p at the pivot; -inf for a maximum above it. `pivot`: its logit, a finite one, log2(e) / T."""
    return tl.where(v > pivot[0], -INF, (v - pivot[1]) * pivot[2])


@triton.jit
def difference(v, q, pivot, p_pivot, top):
    """|q - p|, at a maximum above the pivot |(q - top[0]) - top[1]|."""
    return tl.abs(tl.where(v > pivot[0], (q - top[0]) - top[1], q - tl.exp2(log_p_over(v, pivot)) * p_pivot))


@triton.jit(do_not_specialize=["f_stride", "q_stride", "N", "groups"])
def gradient(
    f_ptr, f_stride, q_ptr, q_stride, table_ptr, out_ptr, N, groups, LABELS: tl.constexpr, OUTSIDE: tl.constexpr,
    ORDER: tl.constexpr, PLAIN: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """[N] float64. Rows and strides count groups of V elements; table: log2(e) / T, order, power.

    PLAIN: the power of orders 1 and infinity is 1, that of order 2 is 2.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, W)[None, :]
    rows = ((row < N)[:, None], groups)
    C = groups * V
    f = f_ptr + row.to(tl.int64)[:, None] * f_stride * V
    if LABELS == GIVEN:
        given = q_ptr + row.to(tl.int64)[:, None] * q_stride * V
    scale = small(table_ptr)
    order = small(table_ptr + 1)
    power = small(table_ptr + 2)
    r = order.to(tl.float32)
    zero = tl.zeros([ROWS, W], tl.float32)
    none = tl.zeros([ROWS], tl.float64)

    high = zero - INF  # the two largest of each slot
    low = high
    labels = none
    for first in range(0, C, BLOCKS * W):
        slot = zero
        for i in tl.static_range(BLOCKS):
            v = load(f, first + i * W + lane, rows, V, -INF)
            low = tl.maximum(low, tl.minimum(high, v))
            high = larger(high, v)
            if LABELS == GIVEN:
                q = load(given, first + i * W + lane, rows, V, 0.0)
                slot += tl.where(q >= 0.0, q, float("nan"))
        if LABELS == GIVEN:
            labels += row_total(slot)
    m = row_max(high)
    hot = high == m[:, None]
    second = tl.where(tl.sum(hot.to(tl.int32), 1) > 1, m, tl.max(tl.where(hot, low, high), 1))
    finite = tl.where(second == -INF, m, second)  # no other class: any finite pivot does
    pivot = (second[:, None], finite[:, None], scale.to(tl.float32))

    exps = none
    powers = none
    RATIOS: tl.constexpr = OUTSIDE and (ORDER % 2 == 1)  # 2 and general
    for first in range(0, C, BLOCKS * W):
        slot = zero
        slot_r = zero
        for i in tl.static_range(BLOCKS):
            z = log_p_over(load(f, first + i * W + lane, rows, V, -INF), pivot)
            e = tl.exp2(z)
            slot += e
            if RATIOS:
                slot_r = tl.fma(e, e, slot_r) if ORDER == TWO else slot_r + tl.exp2(r * z)
        exps += row_total(slot)
        if RATIOS:
            powers += row_total(slot_r)
    # Of all classes but one maximum, relative to the pivot.
    tie = tl.where(second == m, 1.0, 0.0)
    rest = exps - tie
    gap = (finite.to(tl.float64) - m.to(tl.float64)) * scale
    r1 = tl.exp2(gap) * rest
    p_pivot = tl.exp2(gap) / (1.0 + r1)
    p = column(p_pivot)
    log_total = log1p(r1) / LN2

    if OUTSIDE:
        # ||e_y - p||^power = (1 - p_y)^power (1 + sum over the others of (p_k / (1 - p_y))^r)^(power / r), in which no
        # high order underflows; all_r is that sum over all classes, of their ratios to the maximum.
        log_norm = gap + tl.log2(rest) - log_total  # of the maximum
        exponent = power
        shift = none  # of exponents, so that no high power overflows where its weight is small
        if RATIOS:
            rest_r = powers - tie
            near_r = tl.exp2(order * gap)
            all_r = tl.fma(near_r, rest_r, 1.0)
            others = tl.where(rest > 0.0, tl.exp2(tl.log2(rest_r) - order * tl.log2(rest)), 0.0)
            log_norm += tl.log2(1.0 + others) / order
            exponent = power / order
            if not PLAIN:
                shift = exponent * tl.log2(1.0 + all_r * tl.exp2(order * tl.minimum(1.0 - log_total, 0.0)))
            s2 = column(all_r * tl.exp2(-2.0 * log_total))
        # What the maximum adds, and what the sum over the others is to be multiplied by.
        of_top = tl.exp2(power * log_norm)
        weight = tl.exp2(shift)
        if LABELS == PREDICTED:
            of_top *= (1.0 - tie) / (1.0 + r1)
            weight *= p_pivot
        elif LABELS == LOG_PREDICTED:
            of_top *= (1.0 - tie) * -log1p(r1)
            weight *= LN2
        elif LABELS == UNIFORM:
            of_top *= (1.0 - tie) / C.to(tl.float64)
            weight /= C.to(tl.float64)
        below = none
        top = zero
        for first in range(0, C, BLOCKS * W):
            slot = zero
            for i in tl.static_range(BLOCKS):
                k = first + i * W + lane
                v = load(f, k, rows, V, -INF)
                z = log_p_over(v, pivot)
                e = tl.exp2(z)
                not_p = tl.fma(-e, p, 1.0)
                log_x = -column(shift)
                if ORDER == TWO:
                    x = tl.fma(-e, p, not_p) + s2
                elif ORDER == GENERAL:
                    log_not_p = log2(not_p)
                    x = tl.fma(-column(near_r), tl.exp2(r * z), column(all_r))
                    x = tl.fma(x, tl.exp2(-r * (column(log_total) + log_not_p)), 1.0)
                    log_x = tl.fma(log_not_p, power.to(tl.float32), log_x)
                else:
                    x = not_p
                if not PLAIN:
                    x = tl.exp2(tl.fma(log2(x), exponent.to(tl.float32), log_x))
                if LABELS == GIVEN:
                    w = load(given, k, rows, V, 0.0)
                    top += tl.where(v > pivot[0], w, 0.0)
                elif LABELS == PREDICTED:
                    w = e
                elif LABELS == LOG_PREDICTED:
                    w = tl.where(k < C, tl.fma(v - m[:, None], pivot[2], -column(log_total)), 0.0)
                else:
                    w = tl.where(k < C, 1.0, 0.0)
                slot = tl.where(v > pivot[0], slot, tl.fma(w, x, slot))
            below += row_total(slot)
        if LABELS == GIVEN:
            of_top *= row_total(top)
        value = of_top + tl.where(below == 0.0, 0.0, below * weight)  # the weight may be infinite
        if ORDER == ONE:
            value *= tl.exp2(power)
    else:
        sure = r1 < 1.0  # of one class: q - p = (q - 1) + (1 - p) there keeps 1 - p when q = 1
        top = (column(tl.where(sure, 1.0, 0.0)), column(tl.where(sure, -r1, 1.0) / (1.0 + r1)))
        uniform = (1.0 / C.to(tl.float64)).to(tl.float32)
        largest = none.to(tl.float32) + 1.0
        if ORDER != ONE:
            slot = zero
            for first in range(0, C, BLOCKS * W):
                for i in tl.static_range(BLOCKS):
                    k = first + i * W + lane
                    q = load(given, k, rows, V, 0.0) if LABELS == GIVEN else tl.where(k < C, uniform, 0.0)
                    slot = tl.maximum(slot, difference(load(f, k, rows, V, -INF), q, pivot, p, top))
            largest = tl.max(slot, 1)
        if ORDER == INFINITE:
            log_norm = tl.log2(largest.to(tl.float64))
        else:
            unit = tl.maximum(largest, 2.0**-126)
            sums = none
            for first in range(0, C, BLOCKS * W):
                slot = zero
                for i in tl.static_range(BLOCKS):
                    k = first + i * W + lane
                    q = load(given, k, rows, V, 0.0) if LABELS == GIVEN else tl.where(k < C, uniform, 0.0)
                    d = difference(load(f, k, rows, V, -INF), q, pivot, p, top) * (1.0 / unit)[:, None]
                    if ORDER == ONE:
                        slot += d
                    elif ORDER == TWO:
                        slot = tl.fma(d, d, slot)
                    else:
                        slot += tl.exp2(r * log2(d))
                sums += row_total(slot)
            log_norm = tl.log2(unit.to(tl.float64)) + tl.log2(sums) / order
        value = tl.exp2(power * log_norm)

    if LABELS == GIVEN:
        # Probabilities in a half type do not sum to 1 exactly.
        value = tl.where(tl.abs(labels - 1.0) < 1e-2, value, float("nan"))
    tl.store(out_ptr + row, tl.where(tl.abs(m) < INF, value, float("nan")), mask=row < N)

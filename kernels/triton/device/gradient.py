"""The gradient norms that no row statistic gives: || E_q[e_Y - p] ||_r^power and E_q[ || e_Y - p ||_r^power ].

A program goes over its rows three or four times: for the maximum and the next largest logit, the pivot; for sums of
exponentials relative to the pivot; for the terms. Rows are HELD in registers meanwhile, so that each byte is read once;
long ones are read again, from the cache. The maximum's term is worked out once a row, with float32's precision in the
range of float64, since 1 - p keeps its relative precision there. All other classes have p <= 1/2, and nothing cancels.

The maximum is kept out of their sums in one of two ways. Given labels, of which it may have any part, are taken from it
and its logit masked. Otherwise it stands in as if it were the pivot, and what that adds, at most half of a sum, is
subtracted once a row.

Element k of a row is summed in slot k mod W. Which thread holds a slot depends on the alignment of rows, so slots are
summed in float64, where the order disappears in the rounding to float32.
"""

import triton
import triton.language as tl

from fastood.kernels.triton.device.words import INF, INTERPRETED, LN2, exp2_double, larger, log1p, log2, row_max, small

# Label distributions, and orders other than whole ones up to 6, as shapes.py numbers them.
UNIFORM, PREDICTED, LOG_PREDICTED, GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
INFINITE, GENERAL = tl.constexpr(0), tl.constexpr(-1)


@triton.jit
def read(f, q, k, C: tl.constexpr, V: tl.constexpr, LABELS: tl.constexpr, WHOLE: tl.constexpr):
    """Logits k of rows and their given labels. Where a tile is not WHOLE, masked and without labels from C on."""
    v = load(f, k, C, V, -INF, WHOLE)
    return v, (load(q, k, C, V, 0.0, WHOLE) if LABELS == GIVEN else v)


@triton.jit
def load(ptr, k, C: tl.constexpr, V: tl.constexpr, FILL: tl.constexpr, WHOLE: tl.constexpr):
    x = tl.load(ptr + k) if WHOLE else tl.load(ptr + k, mask=k // V < C // V, other=FILL)
    return x.to(tl.float32)


@triton.jit
def relative(v, q, pivot, LABELS: tl.constexpr, OUTSIDE: tl.constexpr):
    """log2 of p_k over p at the pivot, that ratio, the label, and what is the maximum's of it. `pivot`: its logit, a
    finite one, log2(e) / T."""
    q_top = tl.where(v > pivot[0], q, 0.0)
    v = tl.where(v > pivot[0], -INF, v) if LABELS == GIVEN and not OUTSIDE else tl.minimum(v, pivot[1])
    z = (v - pivot[1]) * pivot[2]
    return z, tl.exp2(z), q - q_top, q_top


@triton.jit
def swept(f, q, k, pivot, C: tl.constexpr, V: tl.constexpr, LABELS: tl.constexpr, OUTSIDE: tl.constexpr):
    v, q = read(f, q, k, C, V, LABELS, False)
    return relative(v, q, pivot, LABELS, OUTSIDE)


@triton.jit
def within(x, k, C: tl.constexpr, WHOLE: tl.constexpr):
    """0 from the row's end on."""
    return x if WHOLE else tl.where(k < C, x, 0.0)


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
        m = row_max(high)[:, None]
        hot = high == m
        second = tl.max(tl.where(hot, low, high), 1, keep_dims=True)
        return m, tl.where(tl.sum(hot.to(tl.int32), 1, keep_dims=True) > 1, m, second)
    else:
        return tl.reduce((high, low), 1, merged, keep_dims=True)


@triton.jit
def merged(high, low, other_high, other_low):
    return larger(high, other_high), tl.maximum(tl.maximum(low, other_low), tl.minimum(high, other_high))


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
def size(z, e, row, ORDER: tl.constexpr, EXPONENT: tl.constexpr):
    """|| e_y - p ||^power of classes y below the maximum, e = 2^z being their p over p at the pivot; over 2^shift.

    That of order 1 is || e_y - p || / 2. `row`: what `gradient` keeps of each row.
    """
    p, s_r, near_r, all_r, log_total, r, power, exponent, shift = row
    if ORDER == 2:
        x = tl.fma(e, -2.0 * p, 1.0 + s_r)
    elif ORDER > 2:
        x = tl.fma(-whole_power(e * p, ORDER - 1), e * p, s_r)
        not_p = tl.fma(e, -p, 1.0)
        x = tl.fma(whole_power(not_p, ORDER - 1), not_p, x)
    else:
        x = tl.fma(e, -p, 1.0)
    if ORDER == GENERAL:
        log_not_p = log2(x)
        x = tl.fma(-near_r, tl.exp2(r * z), all_r)
        x = tl.fma(x, tl.exp2(-r * (log_total + log_not_p)), 1.0)
        return tl.exp2(tl.fma(log2(x), exponent, tl.fma(log_not_p, power, -shift)))
    elif EXPONENT == 0:
        return tl.exp2(tl.fma(log2(x), exponent, -shift))
    elif EXPONENT == 0.5:
        return tl.sqrt(x)
    elif EXPONENT == 1:
        return x
    else:
        return x * x


@triton.jit
def away(e, q, k, p, C: tl.constexpr, LABELS: tl.constexpr, WHOLE: tl.constexpr):
    """|q - p_k| of classes below the maximum."""
    if LABELS == UNIFORM:
        q = within(tl.zeros_like(e) + 1.0 / C, k, C, WHOLE)
    return tl.abs(tl.fma(e, -p, q))


@triton.jit
def add_power(sum, d, ORDER: tl.constexpr):
    """sum + d^ORDER, a whole one."""
    return sum + d if ORDER == 1 else tl.fma(whole_power(d, ORDER - 1), d, sum)


@triton.jit(do_not_specialize=["f_stride", "q_stride", "N"])
def gradient(
    f_ptr, f_stride, q_ptr, q_stride, table_ptr, out_ptr, N, C: tl.constexpr, LABELS: tl.constexpr,
    OUTSIDE: tl.constexpr, ORDER: tl.constexpr, EXPONENT: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
    W: tl.constexpr, EACH: tl.constexpr, TILES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """[N] float64. Strides count groups of V elements; table: log2(e) / T, order, 1 / order, power, and the unit that
    terms below the maximum are summed in.

    TILES of W elements are in registers at a time: a row, if HELD; EACH neighbours of a tile are a thread's where rows
    are read by 16 bytes. EXPONENT: 1, 2 or 1/2 where that makes norms of what `size` forms for whole orders, else 0.
    """
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row = tl.minimum(place, N - 1).to(tl.int64)  # whose norm is the same
    lane = tl.arange(0, W)[None, :]
    f = f_ptr + row * f_stride * V
    given = q_ptr + row * q_stride * V if LABELS == GIVEN else f
    scale = small(table_ptr)
    order = small(table_ptr + 1)
    inverse = small(table_ptr + 2)
    power = small(table_ptr + 3)
    r = order.to(tl.float32)
    zero = tl.full([ROWS, W], -0.0, tl.float32)  # to which a compiler adds without an instruction
    none = zero if HELD else zero.to(tl.float64)
    nothing = tl.zeros([ROWS, 1], tl.float32)

    held = ()
    if HELD:
        for i in tl.static_range(TILES):
            held = held + (read(f, given, i * W + lane, C, V, LABELS, (i + 1) * W <= C),)

    high = zero - INF  # the two largest of each slot
    low = high
    labels, slot = none, zero
    least = zero
    for first in range(0, C, TILES * W):
        for i in tl.static_range(TILES):
            v, q = held[i] if HELD else read(f, given, first + i * W + lane, C, V, LABELS, False)
            low = tl.maximum(low, tl.minimum(high, v))
            high = larger(high, v)
            if LABELS == GIVEN:
                labels, slot = collected(labels, slot + q, i, TILES)
                least = tl.minimum(least, q)
    m, second = two_largest(high, low)
    valid = tl.abs(m) < INF
    if LABELS == GIVEN:  # probabilities, which in a half type do not sum to 1 exactly
        valid &= (tl.abs(row_total(labels, EACH) - 1.0) < 1e-2) & (tl.min(least, 1, keep_dims=True) == 0.0)
    finite = tl.where(second == -INF, m, second)  # no other class: any finite pivot does
    pivot = (second, finite, scale.to(tl.float32))

    RATIOS: tl.constexpr = OUTSIDE and (ORDER > 1 or ORDER == GENERAL)
    others = ()
    if HELD:
        for i in tl.static_range(TILES):
            v, q = held[i]
            others = others + (relative(v, q, pivot, LABELS, OUTSIDE),)
    exps, slot = none, zero
    powers, slot_r = none, zero
    top = zero
    for first in range(0, C, TILES * W):
        for i in tl.static_range(TILES):
            k = first + i * W + lane
            z, e, q, q_top = others[i] if HELD else swept(f, given, k, pivot, C, V, LABELS, OUTSIDE)
            if LABELS == GIVEN:
                top += q_top
            exps, slot = collected(exps, slot + e, i, TILES)
            if RATIOS:
                slot_r = slot_r + tl.exp2(r * z) if ORDER == GENERAL else tl.fma(whole_power(e, ORDER - 1), e, slot_r)
                powers, slot_r = collected(powers, slot_r, i, TILES)
    # Of all classes but one maximum, relative to the pivot: 0, or at least 1.
    one = tl.where(second == m, 1.0, 0.0) if LABELS == GIVEN and not OUTSIDE else 1.0
    rest = (row_total(exps, EACH) - one).to(tl.float32)
    gap = (finite.to(tl.float64) - m.to(tl.float64)) * scale
    near = exp2_double(gap)
    r1_double = near * rest.to(tl.float64)
    r1 = r1_double.to(tl.float32)
    p_top = 1.0 / (1.0 + r1)
    label = 1.0 / C
    # p at the pivot; without another class one whose term, to be subtracted, is finite, and inside 0.
    p = tl.where(rest > 0.0, near.to(tl.float32) * p_top, 0.0 if OUTSIDE else label)
    log_total = log2(1.0 + r1)
    if LABELS == GIVEN:
        top = tl.sum(top, 1, keep_dims=True)  # of one class

    if OUTSIDE:
        # ||e_y - p||^power = (1 - p_y)^power (1 + sum over the others of (p_k / (1 - p_y))^r)^(power / r), in which no
        # high order underflows; all_r is that sum over all classes, of their ratios to the maximum. The sums s_r of
        # p_k^r of whole orders are large enough as they are.
        log_norm = gap + (log2(rest) - log_total).to(tl.float64)  # of the maximum
        s_r, near_r, all_r, shift, exponent = nothing, nothing, nothing, nothing, power.to(tl.float32)
        weight = nothing.to(tl.float64) + small(table_ptr + 4)  # what the sum over the others is to be multiplied by
        if RATIOS:
            rest_r = (row_total(powers, EACH) - one).to(tl.float32)
            exponent = (power * inverse).to(tl.float32)
            if ORDER == GENERAL:
                near_r = tl.exp2((order * gap).to(tl.float32))
                all_r = tl.fma(near_r, rest_r, 1.0)
                ratios = tl.exp2(tl.fma(-r, log2(rest), log2(rest_r)))
                # That of a class of no probability, the largest of all: no high power overflows, whatever its weight;
                # the least is above 2^-MOST_POWER of it.
                shift = exponent * log2(tl.fma(all_r, tl.exp2(-r * log_total), 1.0))
                weight = exp2_double(shift.to(tl.float64))
            else:
                all_r = tl.fma(whole_power(near.to(tl.float32), ORDER), rest_r, 1.0)
                s_r = all_r * whole_power(p_top, ORDER)
                ratios = rest_r * whole_power(1.0 / rest, ORDER)
                shift = exponent
            log_norm = tl.fma(log2(1.0 + tl.where(rest > 0.0, ratios, 0.0)).to(tl.float64), inverse, log_norm)
        kept = (p, s_r, near_r, all_r, log_total, r, power.to(tl.float32), exponent, shift)
        below, slot = none, zero
        log_top = (gap - log_total.to(tl.float64)).to(tl.float32)  # log2 p at the pivot
        for first in range(0, C, TILES * W):
            for i in tl.static_range(TILES):
                k = first + i * W + lane
                z, e, q, q_top = others[i] if HELD else swept(f, given, k, pivot, C, V, LABELS, OUTSIDE)
                x = size(z, e, kept, ORDER, EXPONENT)
                if LABELS == GIVEN:
                    slot = tl.fma(q, x, slot)
                elif LABELS == PREDICTED:
                    slot = tl.fma(e, x, slot)
                elif LABELS == LOG_PREDICTED:
                    slot = tl.fma(within(z + log_top, k, C, HELD and (i + 1) * W <= C), x, slot)
                else:
                    slot += within(x, k, C, HELD and (i + 1) * W <= C)
                below, slot = collected(below, slot, i, TILES)
        below = row_total(below, EACH)
        if LABELS != GIVEN:
            x = size(nothing, nothing + 1.0, kept, ORDER, EXPONENT)
            below -= (x * log_top if LABELS == LOG_PREDICTED else x).to(tl.float64)
        if ORDER == 1:
            log_norm += 1.0
        of_top = exp2_double(power * log_norm)  # what the maximum adds
        if LABELS == GIVEN:
            of_top *= top.to(tl.float64)
        elif LABELS == PREDICTED:
            of_top *= p_top.to(tl.float64)
            weight *= near * p_top.to(tl.float64)
        elif LABELS == LOG_PREDICTED:
            of_top *= -tl.where(r1 < 2.0**-60, r1_double, log1p(r1).to(tl.float64))
            weight *= LN2
        else:
            of_top *= label
            weight *= label
        value = of_top + tl.where(below == 0.0, 0.0, below * weight)  # the weight may be infinite
    else:
        sure = r1 < 1.0  # of one class: q - p = (q - 1) + (1 - p) there keeps 1 - p when q = 1
        q_rest = (top if LABELS == GIVEN else label) - tl.where(sure, 1.0, 0.0)
        d_top = tl.abs(tl.fma(tl.where(sure, r1, -1.0), p_top, q_rest))
        if LABELS == GIVEN:
            d_top = tl.where(second == m, 0.0, d_top)
        unit = nothing + 1.0
        if ORDER != 1:
            largest = zero
            for first in range(0, C, TILES * W):
                for i in tl.static_range(TILES):
                    k = first + i * W + lane
                    z, e, q, q_top = others[i] if HELD else swept(f, given, k, pivot, C, V, LABELS, OUTSIDE)
                    largest = tl.maximum(largest, away(e, q, k, p, C, LABELS, HELD and (i + 1) * W <= C))
            unit = tl.maximum(tl.max(largest, 1, keep_dims=True), d_top)
        if ORDER != INFINITE:
            unit = tl.maximum(unit, 2.0**-126)
        log_norm = log2_double(unit.to(tl.float64))
        if ORDER != INFINITE:
            per_unit = 1.0 / unit
            log_pivot = (gap - log_total.to(tl.float64) - log_norm).to(tl.float32)  # log2 of p there per unit
            sums, slot = none, zero
            for first in range(0, C, TILES * W):
                for i in tl.static_range(TILES):
                    k = first + i * W + lane
                    z, e, q, q_top = others[i] if HELD else swept(f, given, k, pivot, C, V, LABELS, OUTSIDE)
                    d = away(e, q, k, p, C, LABELS, HELD and (i + 1) * W <= C)
                    if ORDER == GENERAL:
                        log_d = log2(d * per_unit)
                        if LABELS == GIVEN:  # p below float32 counts in orders near 0
                            log_d = tl.where(q == 0.0, z + log_pivot, log_d)
                        slot += tl.exp2(r * log_d)
                    else:
                        slot = add_power(slot, d * per_unit, ORDER)
                    sums, slot = collected(sums, slot, i, TILES)
            if ORDER == GENERAL:
                log_d = gap + (log2(rest) - log_total).to(tl.float64)  # of 1 - p
                log_d = tl.where(sure & (q_rest == 0.0), log_d, log2_double(d_top.to(tl.float64)))
                of_top = tl.exp2((order * (log_d - log_norm)).to(tl.float32))
                of_pivot = tl.exp2(r * log2(tl.abs(label - p) * per_unit))
            else:
                of_top = add_power(nothing, d_top * per_unit, ORDER)
                of_pivot = add_power(nothing, tl.abs(label - p) * per_unit, ORDER)
            sums = row_total(sums, EACH) + of_top.to(tl.float64)
            if LABELS != GIVEN:
                sums -= of_pivot.to(tl.float64)
            log_norm = tl.fma(log2_double(sums), inverse, log_norm)
        value = exp2_double(power * log_norm)

    tl.store(out_ptr + place, tl.where(valid, value, float("nan")), mask=place < N)

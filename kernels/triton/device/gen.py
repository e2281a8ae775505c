"""GEN: the sum over the M largest p of p^gamma (1 - p)^gamma.

Rows are held in registers, and nothing is sorted: the M-th largest logit is found by bisection, each step of which
counts the logits from a threshold on. Thresholds are numbers of the logits' own type, and the steps halve what is
between two of them in their order. It ends where as many are counted as are wanted, or where two neighbours are left:
then the lower one is the M-th largest, and some of what is equal to it belongs.

The maximum's term is worked out once a row, in float64, from what all other classes have. Terms below it are relative
to the pivot, the next largest logit.
"""

import triton
import triton.language as tl

from fastood.kernels.triton.device.sweep import collected, load_elements, row_total, rows_of_program, two_largest
from fastood.kernels.triton.device.words import INF, LN2, exp2_double, larger, load_table, log, log2

MINUS_INF = tl.constexpr(-0x7F800001)  # in the order of float32
STRAIGHT = tl.constexpr(12)  # steps that also try the middle of two values


@triton.jit
def place_of(x, SHIFT: tl.constexpr):
    """The place of float32 x in the order of all numbers of a type that has SHIFT bits less."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def float_at(place, SHIFT: tl.constexpr):
    bits = place << SHIFT
    return (bits ^ ((bits >> 31) & (0x7FFFFFFF >> SHIFT << SHIFT))).to(tl.float32, bitcast=True)


@triton.jit
def number_from(vs, threshold):
    """How many logits of each row are `threshold` or larger."""
    slots = tl.zeros(vs[0].shape, tl.int32)
    for i in tl.static_range(len(vs)):
        slots = tl.where(vs[i] >= threshold, slots + 1, slots)
    return tl.sum(slots, 1, keep_dims=True)


@triton.jit
def selected(vs, f_max, valid, M, SHIFT: tl.constexpr):
    """A threshold that M of a row's logits reach, or fewer where several are equal to the M-th largest; how many reach
    it; and the next number below it, which is the M-th largest where they are fewer. M < C.
    """
    low = tl.full(f_max.shape, MINUS_INF >> SHIFT, tl.int32)  # more than M from here on
    high = place_of(tl.where(valid, f_max, 0.0), SHIFT) + 1  # M or less
    low = tl.where(valid, low, high - 1)
    number = tl.zeros_like(high)
    step = 0
    while tl.max(((high > low + 1) & (number < M)).to(tl.int32)) > 0:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        if step < STRAIGHT:  # whichever is nearer to the maximum, where few logits are
            straight = place_of(float_at(low, SHIFT) * 0.5 + float_at(high, SHIFT) * 0.5, SHIFT)
            middle = tl.minimum(tl.maximum(middle, straight), high - 1)
        here = number_from(vs, float_at(middle, SHIFT))
        more = here > M
        low = tl.where(more, middle, low)
        high = tl.where(more, high, middle)
        number = tl.where(more, number, here)
        step += 1
    return float_at(high, SHIFT), number, float_at(low, SHIFT)


@triton.jit
def term(z, e, p_pivot, gamma):
    """(p_k / p_pivot (1 - p_k))^gamma of classes below the maximum: e = 2^z = p_k / p_pivot."""
    return tl.exp2(gamma * (z + log2(tl.fma(e, -p_pivot, 1.0))))


@triton.jit(do_not_specialize=["f_stride", "N"])
def gen(
    f_ptr, f_stride, table_ptr, out_ptr, N, S: tl.constexpr, SELECT: tl.constexpr, SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """[N] float64. f_stride counts groups of S.vec elements; table: log2(e) / T, gamma, M. S: a Sweep of shapes.py.
    SELECT: M is less than the number of classes.
    """
    W: tl.constexpr = S.w
    EACH: tl.constexpr = S.each
    TILES: tl.constexpr = S.tiles
    place, row = rows_of_program(N, ROWS)
    lane = tl.arange(0, W)[None, :]
    f = f_ptr + row * f_stride * S.vec
    scale, gamma = load_table(table_ptr), load_table(table_ptr + 1)
    gamma_32 = gamma.to(tl.float32)
    zero = tl.full([ROWS, W], -0.0, tl.float32)  # to which a compiler adds without an instruction

    vs = ()
    for i in tl.static_range(TILES):
        vs = vs + (load_elements(f, i * W + lane, -INF, (i + 1) * W <= S.columns, S),)
    high = zero - INF  # the two largest of each slot
    low = high
    for i in tl.static_range(TILES):
        low = tl.maximum(low, tl.minimum(high, vs[i]))
        high = larger(high, vs[i])
    f_max, second = two_largest(high, low)
    valid = tl.abs(f_max) < INF
    pivot = tl.where(second == -INF, f_max, second)  # no other class: any finite pivot does

    # Logits are halved before they are subtracted: no difference leaves float32 then.
    twice_scale = (scale * 2.0).to(tl.float32)
    minus_half = pivot * -0.5
    es = ()
    exps, slot = zero, zero
    for i in tl.static_range(TILES):
        es = es + (tl.exp2(tl.fma(tl.minimum(vs[i], pivot), 0.5, minus_half) * twice_scale),)
        exps, slot = collected(exps, slot + es[i], i, TILES)
    rest = (row_total(exps, EACH) - 1.0).to(tl.float32)  # where the maximum stood in as the pivot: 0, or at least 1
    gap = (pivot.to(tl.float64) - f_max.to(tl.float64)) * scale
    weight = exp2_double(gap).to(tl.float32)
    total = tl.fma(weight, rest, 1.0)
    p_pivot = tl.where(rest > 0.0, weight / total, 0.0)
    to_log2 = tl.full(gap.shape, 1.0 / LN2, tl.float64)
    log_total = log(total) * to_log2
    # Of the maximum, rest 2^gap / total^2; below it they are in units of p_pivot^gamma.
    log_of_max = tl.fma(log(tl.where(rest > 0.0, rest, 1.0)), to_log2, gap) - 2.0 * log_total
    of_max = tl.where(rest > 0.0, exp2_double(gamma * log_of_max), 0.0)
    unit = exp2_double(gamma * (gap - log_total))

    if SELECT:
        M = load_table(table_ptr + 2).to(tl.int32)
        threshold, number, next = selected(vs, f_max, valid, M, SHIFT)
    sum_below, slot = zero, zero
    for i in tl.static_range(TILES):
        wanted = vs[i] < f_max
        if SELECT:
            wanted &= vs[i] >= threshold
        slot += tl.where(wanted, term(tl.fma(vs[i], 0.5, minus_half) * twice_scale, es[i], p_pivot, gamma_32), 0.0)
        sum_below, slot = collected(sum_below, slot, i, TILES)
    sum_below = row_total(sum_below, EACH)
    maxima = number_from(vs, f_max)
    if SELECT:
        z = tl.fma(next, 0.5, minus_half) * twice_scale
        equal = tl.where(next < f_max, (M - number).to(tl.float32) * term(z, tl.exp2(z), p_pivot, gamma_32), 0.0)
        sum_below += equal.to(tl.float64)
        maxima = tl.minimum(maxima, M)
    value = tl.fma(maxima.to(tl.float64), of_max, sum_below * unit)
    tl.store(out_ptr + place, tl.where(valid, value, float("nan")), mask=place < N)

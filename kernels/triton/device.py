"""The kernels. Imported only where a CUDA tensor (or the interpreter) asks for them: see __init__.py.

A row is read as *words*: halves in pairs, which unpack with one instruction each, float32 one by one. A
program holds ROWS rows as tiles [ROWS, W] of words, `xs` being the tuple of the tiles that make up a row; a place
in such a tile is a *slot*, with sums of its own until the row is reduced. Every multiplication that feeds an
addition is an explicit fma, so that results do not hang on the compiler's contraction.

A row that begins anywhere is read from the 16-byte group that holds its first element (SHIFTED): `head` elements
of the first group are not its own. The slots then hold the same elements in the same order as for any other head,
in other places; summing them in float64 makes the order of places disappear in the rounding to float32.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NVIDIA = tl.constexpr(torch.version.hip is None)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))

# What a call needs of the logits beside their maximum: shapes.py adds these up.
EXP = tl.constexpr(1)
SQUARES = tl.constexpr(2)
PLOGP = tl.constexpr(4)
SUMLOGP = tl.constexpr(8)
TV = tl.constexpr(16)
PEEL = tl.constexpr(32)  # the rest beside one maximum, to relative precision

# The statistics, as shapes.py numbers them.
FMAX, LSE, ENERGY, MSP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
S2, TOTAL_VARIATION, SUMLOGP_STAT = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
ONE_MINUS_MSP, LOG_MSP, ONE_MINUS_S2, PLOGP_STAT = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)

DEEP = tl.constexpr(2.0**-80)  # a rest below this is summed again from a pivot of its own
FAR = tl.constexpr(16384.0)  # rows with a maximum beyond this times T / log2(e) are summed again
SHORT = tl.constexpr(128)  # rows in which that would cost more than it saves
RECORD = tl.constexpr(8)  # numbers that one segment of a row is reduced to


# ---- arithmetic


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_max(x):
    """Maximum of each row, NaN where there is one."""
    if INTERPRETED:  # its reductions with a function of one's own run element by element
        return tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), tl.max(x, 1))
    else:
        return tl.reduce(x, 1, larger)


@triton.jit
def in_one(sums, SHIFTED: tl.constexpr):
    """Each sum's tile, of the tuples of one or two accumulators."""
    out = ()
    for i in tl.static_range(len(sums[0])):
        tile = sums[0][i].to(tl.float64) if SHIFTED else sums[0][i]
        if len(sums) == 2:
            tile += sums[1][i]
        out = out + (tile,)
    return out


@triton.jit
def row_sums(tiles):
    """The sums of each row of several tiles: together, they wait once where other warps or programs share the row."""
    if INTERPRETED:
        out = ()
        for i in tl.static_range(len(tiles)):
            out = out + (tl.sum(tiles[i], 1),)
        return out
    elif len(tiles) >= 4:
        return tl.reduce(tiles[:4], 1, add_4) + row_sums(tiles[4:])
    elif len(tiles) >= 2:
        return tl.reduce(tiles[:2], 1, add_2) + row_sums(tiles[2:])
    elif len(tiles) == 1:
        return (tl.sum(tiles[0], 1),)
    else:
        return ()


@triton.jit
def in_float32(totals):
    out = ()
    for i in tl.static_range(len(totals)):
        out = out + (totals[i].to(tl.float32),)
    return out


@triton.jit
def add_2(a, b, x, y):
    return a + x, b + y


@triton.jit
def add_4(a, b, c, d, x, y, z, u):
    return a + x, b + y, c + z, d + u


@triton.jit
def any_row(flag):
    return tl.max(flag.to(tl.int32), 0) > 0


@triton.jit
def fused(x, y, z):
    """x y + z, rounded once, which the interpreter's own fma is not."""
    if INTERPRETED:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def log2(x):
    """One instruction where the processor has one; absolute error 2^-22.6 near 1, else relative. Flushes subnormals."""
    if INTERPRETED or not NVIDIA:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)  # tl.log2 would be a polynomial


@triton.jit
def above(e, u):
    """max(e - u, 0) of 0 <= u and e <= 1, in one instruction."""
    if INTERPRETED or not NVIDIA:
        return tl.maximum(e - u, 0.0)
    else:
        return tl.inline_asm_elementwise("sub.sat.f32 $0, $1, $2;", "=r,r,r", [e, u], tl.float32, True, 1)


@triton.jit
def inverse_power(x):
    """2^-x of x so near 0 that three terms of the series do."""
    return tl.fma(tl.fma(x, LN2 * LN2 / 2, -LN2), x, 1.0)


@triton.jit
def log1p(r):
    """To relative precision, r >= 0. Where log2 would lose it, the series of 2 artanh(r / (2 + r))."""
    s = r / (2.0 + r)
    q = s * s
    series = tl.fma(tl.fma(tl.fma(q, 1.0 / 7, 1.0 / 5), q, 1.0 / 3), q, 1.0) * (s + s)
    return tl.where(r < 0.4, series, log2(1.0 + r) * LN2)


@triton.jit
def exp2_double(x):
    """2^x of float64 x to float32's precision, over float64's range."""
    n = tl.floor(tl.minimum(tl.maximum(x, -1022.0), 1024.0))
    return tl.where(x < -1022.0, 0.0, tl.exp2((x - n).to(tl.float32)).to(tl.float64) * power_of_2(n))


@triton.jit
def power_of_2(n):
    """2^n in float64 of whole numbers -1022 <= n <= 1024, the last of which is infinity."""
    return ((n.to(tl.int32) + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


# ---- reading


@triton.jit
def small(ptr, mask=None, other=None):
    """A load of what many programs read, worth keeping in the cache."""
    return tl.load(ptr, mask=mask, other=other, eviction_policy="evict_last")


@triton.jit
def place(row, stride, offset, VEC: tl.constexpr, P: tl.constexpr, SHIFTED: tl.constexpr):
    """Word at which each row begins [ROWS, 1], and its head. `stride` counts groups of VEC, but elements if SHIFTED."""
    if SHIFTED:
        start = row.to(tl.int64) * stride + offset
        base = start // VEC * (VEC // P)
        return base[:, None], (start % VEC).to(tl.int32)[:, None]
    else:
        base = (row.to(tl.int64) * stride + offset) * (VEC // P)
        return base[:, None], tl.zeros_like(row)[:, None]


@triton.jit
def words(ptr, P: tl.constexpr):
    if P == 2:
        return ptr.to(tl.pointer_type(tl.uint32))
    else:
        return ptr


@triton.jit
def load(ptr, base, head, word, n, FILL: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr, SHIFTED: tl.constexpr):
    """The words of rows of n elements. Masked by whole groups of VEC, so that they stay one load each."""
    VW: tl.constexpr = VEC // P
    groups = (head + (n + VEC - 1)) // VEC if SHIFTED else n // VEC
    inside = (word // VW) < groups
    return tl.load(words(ptr, P) + base + word, mask=inside, other=filler(FILL, P, ptr.dtype.element_ty))


@triton.constexpr_function
def filler(FILL, P, TYPE):
    """A word of 0 or -inf."""
    if P == 1:
        return FILL
    minus_inf = 0xFC00FC00 if tl.float16 == TYPE else 0xFF80FF80
    return 0 if FILL == 0 else minus_inf


@triton.jit
def unpack(u, P: tl.constexpr, TYPE: tl.constexpr):
    """The elements of words as float32: a tuple of P tiles."""
    if P == 1:
        return (u.to(tl.float32),)
    elif tl.float16 == TYPE:
        low, high = (u & 0xFFFF).to(tl.uint16), (u >> 16).to(tl.uint16)
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = (u << 16).to(tl.float32, bitcast=True)
        return (low, (u & 0xFFFF0000).to(tl.float32, bitcast=True))


@triton.jit
def pack(low, high, TYPE: tl.constexpr):
    """The pairs of which these are the elements."""
    low, high = low.to(TYPE).to(tl.uint16, bitcast=True), high.to(TYPE).to(tl.uint16, bitcast=True)
    return low.to(tl.uint32) | (high.to(tl.uint32) << 16)


@triton.jit
def larger_words(a, b, P: tl.constexpr, TYPE: tl.constexpr):
    """The larger of each two elements, NaN where there is one: of pairs in one instruction."""
    if P == 1:
        return larger(a, b)
    elif INTERPRETED or not NVIDIA:
        x, y = unpack(a, P, TYPE), unpack(b, P, TYPE)
        return pack(larger(x[0], y[0]), larger(x[1], y[1]), TYPE)
    else:
        PTX: tl.constexpr = "max.NaN.f16x2 $0, $1, $2;" if tl.float16 == TYPE else "max.NaN.bf16x2 $0, $1, $2;"
        return tl.inline_asm_elementwise(PTX, "=r,r,r", [a, b], tl.uint32, True, 1)


@triton.jit
def smaller_words(a, b, P: tl.constexpr, TYPE: tl.constexpr):
    """The smaller of each two elements; the other of a NaN."""
    if P == 1:
        return tl.minimum(a, b)
    elif INTERPRETED or not NVIDIA:
        x, y = unpack(a, P, TYPE), unpack(b, P, TYPE)
        return pack(tl.minimum(x[0], y[0]), tl.minimum(x[1], y[1]), TYPE)
    else:
        PTX: tl.constexpr = "min.f16x2 $0, $1, $2;" if tl.float16 == TYPE else "min.bf16x2 $0, $1, $2;"
        return tl.inline_asm_elementwise(PTX, "=r,r,r", [a, b], tl.uint32, True, 1)


@triton.jit
def is_own(word, j: tl.constexpr, head, n, VEC: tl.constexpr, P: tl.constexpr, SHIFTED: tl.constexpr):
    """Which elements, the j-th of their word, are the row's own: where it is not SHIFTED, a group is or is not."""
    if SHIFTED:
        return (word * P + j - head).to(tl.uint32) < n
    else:
        return word // (VEC // P) < n // VEC


@triton.jit
def only_own(x, other, i: tl.constexpr, j: tl.constexpr, w, head, n, LEAST: tl.constexpr, VEC: tl.constexpr,
             P: tl.constexpr, SHIFTED: tl.constexpr, W: tl.constexpr, SORTED: tl.constexpr):  # fmt: skip
    """x, of the j-th elements of the words of tile i, but `other` where they are not the row's own.

    SORTED by largest_first, what precedes a row is in the second tile.
    """
    if SORTED and SHIFTED and i < 2:
        own = is_own(w, j, head, n, VEC, P, SHIFTED)
        if 2 * W * P > LEAST:
            next = is_own(w + W, j, head, n, VEC, P, SHIFTED)
            own = own | next if i == 0 else own & next
        elif i == 0:
            own = True
    elif (SHIFTED and i == 0) or (i + 1) * W * P > LEAST:
        own = is_own(w + i * W, j, head, n, VEC, P, SHIFTED)
    else:
        own = True
    return tl.where(own, x, other)


@triton.jit
def load_row(ptr, base, head, w, n, N: tl.constexpr, LEAST: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr,
             SHIFTED: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """All words of rows of LEAST <= n <= N logits as a tuple of tiles [ROWS, W], -inf beyond their ends."""
    TILES: tl.constexpr = (N + (VEC - 1 if SHIFTED else 0) + W * P - 1) // (W * P)
    raw = ()
    for i in tl.static_range(TILES):
        if SHIFTED or (i + 1) * W * P > LEAST:
            raw = raw + (load(ptr, base, head, w + i * W, n, -INF, VEC, P, SHIFTED),)
        else:
            raw = raw + (tl.load(words(ptr, P) + base + (w + i * W)),)
    FILL: tl.constexpr = filler(-INF, P, ptr.dtype.element_ty)
    us = ()
    for i in tl.static_range(TILES):
        u = raw[i] if P == 2 else raw[i].to(tl.float32)
        if SHIFTED and P == 2:
            u = only_own(u, (u & 0xFFFF0000) | (FILL & 0xFFFF), i, 0, w, head, n, LEAST, VEC, P, SHIFTED, W, False)
            u = only_own(u, (u & 0xFFFF) | (FILL & 0xFFFF0000), i, 1, w, head, n, LEAST, VEC, P, SHIFTED, W, False)
        elif SHIFTED:
            u = only_own(u, FILL, i, 0, w, head, n, LEAST, VEC, P, SHIFTED, W, False)
        us = us + (u,)
    return us


# ---- logits


@triton.jit
def softmax_sums(ptr, base, head, w, n, scale, N: tl.constexpr, LEAST: tl.constexpr, VEC: tl.constexpr,
                 P: tl.constexpr, SHIFTED: tl.constexpr, W: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    """Of t = (f - max) log2(e) / T over rows of LEAST <= n <= N logits, `rest` meaning all elements but one maximum:

    max, pivot, rest sum 2^t, rest sum 2^2t, rest sum t 2^t, sum t, sum |2^t - u| with u = (sum 2^t) / n.

    The three sums over the rest are relative to the pivot: the maximum, or where they would vanish the next
    largest logit; last comes whether any row may have such a pivot. Without PEEL the rest is what remains of the sum
    after 1 is taken away.
    """
    A: tl.constexpr = P if SHIFTED else 1  # accumulators: two where an element's place in its word varies
    TYPE: tl.constexpr = ptr.dtype.element_ty
    us = load_row(ptr, base, head, w, n, N, LEAST, VEC, P, SHIFTED, W)
    if PEEL & SUMS:
        us = largest_first(us, P, TYPE)
        top = us[0]
    else:
        top = us[0]
        for i in tl.static_range(1, len(us)):
            top = larger_words(top, us[i], P, TYPE)
    tops = unpack(top, P, TYPE)
    if P > A:
        tops = (larger(tops[0], tops[1]),)
    m = row_max(tops[0] if A == 1 else larger(tops[0], tops[1]))
    rest = tl.zeros_like(m)
    squares = rest
    exp_t = rest
    sum_t = rest
    deviation = rest
    pivot = m
    rare = False
    if EXP & SUMS:
        xs = ()
        for i in tl.static_range(len(us)):
            xs = xs + unpack(us[i], P, TYPE)
        if PEEL & SUMS and P > A:
            xs = (tops[0], tl.minimum(xs[0], xs[1])) + xs[2:]
        ONCE: tl.constexpr = PEEL & SUMS and N > SHORT
        c, excess, far = centre(m, scale, ONCE)
        unit = tl.exp2(excess)  # 2^t of the maximum, as the sums have it
        back = inverse_power(excess)
        hots = tl.zeros_like(tops[0])
        sums = no_exp(hots, SUMS)
        sums = (sums, sums) if A == 2 else (sums,)
        es, ts = (), ()
        for i in tl.static_range(len(xs)):
            t = scaled(xs[i], scale, c, ONCE)
            e = tl.exp2(t)
            if (PLOGP | SUMLOGP) & SUMS:  # 0 beyond the row's end, as 2^t is
                t = only_own(t, 0.0, i // P, i % P, w, head, n, LEAST, VEC, P, SHIFTED, W, PEEL & SUMS)
            es, ts = es + (e,), ts + (t,)
            if i >= A or not PEEL & SUMS:
                sums = sums[: i % A] + (add_exp(sums[i % A], e, t, SUMS),) + sums[i % A + 1 :]
        if PEEL & SUMS:
            # The largest of a slot comes last, or is kept out: if it is the row's, the rest is not drowned.
            for a in tl.static_range(A):
                hot = tops[a] == m[:, None]
                hots += tl.where(hot, 1.0, 0.0)
                slots = add_exp(sums[a], tl.where(hot, 0.0, es[a]), ts[a], SUMS)
                sums = sums[:a] + (slots,) + sums[a + 1 :]
            totals = in_float32(row_sums(in_one(sums, SHIFTED) + (hots,)))
        else:
            totals = in_float32(row_sums(in_one(sums, SHIFTED)))
        # A maximum that was kept out counts 1; one that was not is taken away as it was added.
        others = totals[len(totals) - 1] - 1.0 if PEEL & SUMS else tl.zeros_like(m)
        kept = 0.0 if PEEL & SUMS else 1.0
        part = (totals[0] - kept) * back
        rest = tl.fma(totals[0] - kept, back, others)
        totals = totals[1:]
        if PEEL & SUMS:
            rest = tl.where(tl.abs(m) < INF, rest, float("nan"))  # inf - inf was kept out of it
        if SQUARES & SUMS:
            squares = tl.fma((totals[0] - kept) * back, back, others)
            totals = totals[1:]
        if PLOGP & SUMS:
            exp_t = tl.fma(totals[0], back, -(excess * part))
            totals = totals[1:]
        if SUMLOGP & SUMS:
            sum_t = tl.fma(excess, -1.0 * n, totals[0])
        if TV & SUMS:
            u = (rest + 1.0) * unit / N
            deviation = deviations(es, u, SHIFTED, P) * back
        if PEEL & SUMS:
            again = far | (rest < DEEP)
            rare = any_row(again | (exp_t != exp_t))
            if rare:
                if PLOGP & SUMS:
                    if any_row(exp_t != exp_t):
                        exp_t = tl.where(exp_t != exp_t, masked_exp_t(es, unit, excess, P, SHIFTED) * back, exp_t)
                if any_row(again):
                    other, sum1, sum2, sum3, sum4 = sums_again(ptr, base, head, w, n, m, scale, N, VEC, P, SHIFTED, W)
                    pivot = tl.where(again, other, m)
                    rest = tl.where(again, sum1, rest)
                    squares = tl.where(again, sum2, squares)
                    exp_t = tl.where(again, sum3, exp_t)
                    sum_t = tl.where(again, sum4, sum_t)
                    if TV & SUMS:
                        u = tl.fma(rest, tl.exp2((pivot - m) * scale), 1.0) / N
                        other = deviations_again(ptr, base, head, w, n, m, scale, u, N, VEC, P, SHIFTED, W)
                        deviation = tl.where(again, other, deviation)
    return m, pivot, rest, squares, exp_t, sum_t, deviation, rare


@triton.jit
def no_exp(zero, SUMS: tl.constexpr):
    sums = (zero,)
    for kind in tl.static_range(3):
        if (SQUARES, PLOGP, SUMLOGP)[kind] & SUMS:
            sums = sums + (zero,)
    return sums


@triton.jit
def add_exp(sums, e, t, SUMS: tl.constexpr):
    """Adds what e = 2^t contributes to sum e and, as wanted, sum e^2, sum t e and sum t."""
    out = (sums[0] + e,)
    if SQUARES & SUMS:
        out = out + (tl.fma(e, e, sums[len(out)]),)
    if PLOGP & SUMS:
        out = out + (tl.fma(e, t, sums[len(out)]),)  # NaN where a class is masked: summed again
    if SUMLOGP & SUMS:
        out = out + (sums[len(out)] + t,)
    return out


@triton.jit
def largest_first(us, P: tl.constexpr, TYPE: tl.constexpr):
    """The words of each slot, their largest elements in front: what is -inf before a row comes second then, what is
    -inf after it stays in place.
    """
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
    and where none are summed again otherwise, m is subtracted first.
    """
    if ONCE:
        c = -(m * scale)
        c = tl.fma(tl.abs(c), -(2.0**-23), c)  # so that no t is above 0
        return c[:, None], fused(m, scale, c), (tl.abs(c) > FAR) & (tl.abs(m) < INF)
    else:
        return -m[:, None], tl.zeros_like(m), m < m


@triton.jit
def scaled(x, scale, c, ONCE: tl.constexpr):
    """t of logits; see centre."""
    return fused(x, scale, c) if ONCE else (x + c) * scale


@triton.jit
def masked_exp_t(es, unit, excess, P: tl.constexpr, SHIFTED: tl.constexpr):
    """sum t 2^t of rows with masked classes, t from 2^t: log2's error shows near 1 alone, where entropies are large."""
    A: tl.constexpr = P if SHIFTED else 1
    slots = ()
    for a in tl.static_range(A):
        slot = tl.zeros_like(es[0])
        for i in tl.static_range(a, len(es), A):
            t = tl.where(es[i] < unit[:, None], log2(es[i]) - excess[:, None], 0.0)
            slot = tl.fma(es[i], tl.where(es[i] < 2.0**-126, 0.0, t), slot)
        slots = slots + ((slot,),)
    return row_sums(in_one(slots, SHIFTED))[0].to(tl.float32)


@triton.jit
def deviations(es, u, SHIFTED: tl.constexpr, P: tl.constexpr):
    """sum |e - u| of each row of which u is the mean: twice what is above it. Nothing is beyond a row's end."""
    slots = ()
    for j in tl.static_range(P):
        slot = tl.zeros_like(es[0])
        for i in tl.static_range(j, len(es), P):
            slot += above(es[i], u[:, None])
        slots = slots + ((slot,),)
    return row_sums(in_one(slots, SHIFTED))[0].to(tl.float32) * 2.0


@triton.jit
def sums_again(ptr, base, head, w, n, m, scale, N: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr,
               SHIFTED: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """The three sums over the rest, and sum t, of rows read again: few are this certain, or this far from 0.

    They are relative to the pivot, in front: where it is far below the maximum, the largest of the other logits.
    """
    TILES: tl.constexpr = (N + (VEC - 1 if SHIFTED else 0) + W * P - 1) // (W * P)
    top = m[:, None]
    second = tl.full([m.shape[0], W], -INF, tl.float32)
    zero = tl.zeros_like(second).to(tl.float64)  # in which the order of elements is lost
    ties = zero
    for i in range(TILES):
        halves = unpack(load(ptr, base, head, w + i * W, n, -INF, VEC, P, SHIFTED), P, ptr.dtype.element_ty)
        for j in tl.static_range(P):
            own = is_own(w + i * W, j, head, n, VEC, P, SHIFTED)
            ties += tl.where(own & (halves[j] == top), 1.0, 0.0)
            second = tl.maximum(second, tl.where(own & (halves[j] < top), halves[j], -INF))
    ties = tl.sum(ties, 1) - 1.0
    second = tl.max(second, 1)
    # Where it is near, `statistic` does not take the logarithm of 1 + rest for the rest; no other class: any does.
    pivot = tl.where((ties > 0.0) | (second == -INF) | ((second - m) * scale > -60.0), m, second)
    sum1, sum2, sum3, sum4 = zero, zero, zero, zero
    for i in range(TILES):
        halves = unpack(load(ptr, base, head, w + i * W, n, -INF, VEC, P, SHIFTED), P, ptr.dtype.element_ty)
        for j in tl.static_range(P):
            own = is_own(w + i * W, j, head, n, VEC, P, SHIFTED)
            t = tl.where(own & (halves[j] < top), (halves[j] - pivot[:, None]) * scale, -INF)
            e = tl.exp2(t).to(tl.float64)
            sum1 += e
            sum2 = tl.fma(e, e, sum2)
            sum3 = tl.fma(e, tl.maximum(t, -1e30).to(tl.float64), sum3)
            sum4 += tl.where(own, (halves[j] - top) * scale, 0.0)
    sum1, sum2 = tl.sum(sum1, 1) + ties, tl.sum(sum2, 1) + ties
    return (pivot,) + in_float32((sum1, sum2, tl.sum(sum3, 1), tl.sum(sum4, 1)))


@triton.jit
def deviations_again(ptr, base, head, w, n, m, scale, u, N: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr,
                     SHIFTED: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """sum |2^t - u| of rows read again."""
    TILES: tl.constexpr = (N + (VEC - 1 if SHIFTED else 0) + W * P - 1) // (W * P)
    slot = tl.zeros([m.shape[0], W], tl.float64)
    for i in range(TILES):
        halves = unpack(load(ptr, base, head, w + i * W, n, -INF, VEC, P, SHIFTED), P, ptr.dtype.element_ty)
        for j in tl.static_range(P):
            more = tl.maximum(tl.exp2((halves[j] - m[:, None]) * scale) - u[:, None], 0.0)
            slot += tl.where(is_own(w + i * W, j, head, n, VEC, P, SHIFTED), more, 0.0)
    return tl.sum(slot, 1).to(tl.float32) * 2.0


# ---- norms. POWERS says which sums are kept, as shapes.py lays them out:
# (integers, bases, index of the base of each further sum, its multiple of it, (count, largest, subnormals)).


@triton.jit
def add_powers(sums, a, scaled, SAFE: tl.constexpr, POWERS: tl.constexpr):
    """Adds what elements |h| contribute to each sum: h^k, |h|^(base multiple), how many are not 0, the maximum.

    `scaled` = |h| / 2^shift is what integer and large orders are taken of. A base costs one log2 and one exp2
    for all its multiples. SAFE: subnormals have a logarithm too.
    """
    FIRST: tl.constexpr = (0, 0, 1, 1, 2, 2, 3, 3, 3)  # y^k = y^FIRST[k] y^(k - FIRST[k])
    out = ()
    ys = (scaled, scaled)
    for k in tl.static_range(2, 7):
        ys = ys + (ys[FIRST[k]] * ys[k - FIRST[k]],)
    for i in tl.static_range(len(POWERS[0])):
        out = out + (add_power(sums[len(out)], ys, POWERS[0][i]),)
    for b in tl.static_range(len(POWERS[1])):
        if POWERS[1][b] > 0.84:
            log = log2(scaled)
        elif SAFE:
            log = tl.where(a < 2.0**-126, log2(a * 2.0**24) - 24.0, log2(a))
        else:
            log = log2(a)
        y = tl.exp2(log * POWERS[1][b])
        ys = (y, y)
        for k in tl.static_range(2, 9):
            ys = ys + (ys[FIRST[k]] * ys[k - FIRST[k]],)
        for i in tl.static_range(len(POWERS[2])):
            if POWERS[2][i] == b:
                out = out + (add_power(sums[len(out)], ys, POWERS[3][i]),)
    if POWERS[4][0]:
        out = out + (sums[len(out)] + tl.minimum(a.to(tl.int32, bitcast=True), 1),)
    if POWERS[4][1]:
        out = out + (larger(sums[len(out)], a),)
    if POWERS[4][2]:
        # The bits of the smallest |h|, but one less, which makes 0 the largest.
        out = out + (tl.minimum(sums[len(out)], a.to(tl.uint32, bitcast=True) - 1),)
    return out


@triton.jit
def add_power(sum, ys, K: tl.constexpr):
    FIRST: tl.constexpr = (0, 0, 1, 1, 2, 2, 3, 3, 3)
    if K == 1:
        return sum + ys[1]
    else:
        return tl.fma(ys[FIRST[K]], ys[K - FIRST[K]], sum)


@triton.jit
def no_powers(zero, SUMS: tl.constexpr, POWERS: tl.constexpr):
    COUNT: tl.constexpr = SUMS - 2 if POWERS[4][0] else -1  # its sum, before the largest, is one of integers
    sums = ()
    for i in tl.static_range(SUMS):
        sums = sums + (zero.to(tl.int32) if i == COUNT else zero,)
    if POWERS[4][2]:
        sums = sums + (zero.to(tl.uint32) - 1,)
    return sums


@triton.jit
def read_powers(sums, ptr, base, head, w, shift, SAFE: tl.constexpr, D: tl.constexpr, VEC: tl.constexpr,
                P: tl.constexpr, SHIFTED: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
                POWERS: tl.constexpr):  # fmt: skip
    """Adds up whole rows, K tiles in flight; `sums` has one tuple for each half of a word if SHIFTED, else one."""
    SPAN: tl.constexpr = (D + (VEC - 1 if SHIFTED else 0) + P - 1) // P
    if SAFE:
        # 2^-shift in two halves, neither of which leaves float32
        down = shift // 2
        first, second = exp2_of(-down)[:, None], exp2_of(down - shift)[:, None]
    for c in range(0, SPAN, W * K):
        raw = ()
        for k in tl.static_range(K):
            if SPAN % (W * K) == 0 and not SHIFTED:
                raw = raw + (tl.load(words(ptr, P) + base + (c + k * W + w)),)
            else:
                raw = raw + (load(ptr, base, head, c + k * W + w, D, 0.0, VEC, P, SHIFTED),)
        for k in tl.static_range(K):
            halves = unpack(raw[k], P, ptr.dtype.element_ty)
            for j in tl.static_range(P):
                a = tl.abs(halves[j])
                if SHIFTED:
                    a = tl.where(is_own(c + k * W + w, j, head, D, VEC, P, SHIFTED), a, 0.0)
                scaled = a * first * second if SAFE else a
                if SHIFTED and P == 2:
                    if j == 0:
                        sums = (add_powers(sums[0], a, scaled, SAFE, POWERS), sums[1])
                    else:
                        sums = (sums[0], add_powers(sums[1], a, scaled, SAFE, POWERS))
                else:
                    sums = (add_powers(sums[0], a, scaled, SAFE, POWERS),)
    return sums


@triton.jit
def exp2_of(n):
    """2^n of whole numbers n within float32's normal range."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_powers(sums, SUMS: tl.constexpr, SHIFTED: tl.constexpr, POWERS: tl.constexpr):
    """The sums of slots reduced to rows."""
    LARGEST: tl.constexpr = SUMS - 1 if POWERS[4][1] else SUMS
    tiles = (sums[0][:LARGEST],) if len(sums) == 1 else (sums[0][:LARGEST], sums[1][:LARGEST])
    out = in_float32(row_sums(in_one(tiles, SHIFTED)))
    if POWERS[4][1]:
        most = sums[0][LARGEST] if len(sums) == 1 else larger(sums[0][LARGEST], sums[1][LARGEST])
        out = out + (row_max(most),)
    return out


@triton.jit
def norm_sums(ptr, base, head, w, D: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr, SHIFTED: tl.constexpr,
              W: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, POWERS: tl.constexpr, RANGES: tl.constexpr,
              BIAS: tl.constexpr):  # fmt: skip
    """The sums of POWERS, and the shift of each row: large orders are of |h| / 2^shift.

    First all is summed as it stands. A row of which a sum is outside its RANGES may have overflowed, or lost what
    counts, and is read again: few rows have features so far from 1.
    """
    SUMS: tl.constexpr = len(RANGES)
    zero = tl.zeros([ROWS, W], tl.float32)
    shift = tl.zeros([ROWS], tl.int32)
    start = no_powers(zero, SUMS, POWERS)
    start = (start, start) if SHIFTED and P == 2 else (start,)
    tiles = read_powers(start, ptr, base, head, w, shift, False, D, VEC, P, SHIFTED, W, K, POWERS)
    sums = row_powers(tiles, SUMS, SHIFTED, POWERS)
    doubtful = shift != 0
    for i in tl.static_range(SUMS):
        if RANGES[i][1] < INF:
            doubtful |= (sums[i] < RANGES[i][0]) | (sums[i] > RANGES[i][1])
    if POWERS[4][2]:
        for i in tl.static_range(len(tiles)):
            least = tl.min(tiles[i][SUMS], 1)
            doubtful |= least < 0x007FFFFF
    if any_row(doubtful):
        MOST: tl.constexpr = ((), (), (), (), (False, True, False))
        most = (no_powers(zero, 1, MOST),)
        most = most + most if SHIFTED and P == 2 else most
        most = read_powers(most, ptr, base, head, w, shift, False, D, VEC, P, SHIFTED, W, K, MOST)
        most = row_powers(most, 1, SHIFTED, MOST)[0]
        if BIAS:
            most = larger(most, 1.0)
        small = most < 2.0**-100
        exponent = (tl.where(small, most * 2.0**100, most).to(tl.int32, bitcast=True) >> 23) - 127
        exponent = tl.where(small, exponent - 100, exponent)
        shift = tl.where(doubtful & (most > 0.0) & (most < INF), exponent, 0)
        again = read_powers(start, ptr, base, head, w, shift, True, D, VEC, P, SHIFTED, W, 1, POWERS)
        again = row_powers(again, SUMS, SHIFTED, POWERS)
        picked = ()
        for i in tl.static_range(SUMS):
            picked = picked + (tl.where(doubtful, again[i], sums[i]),)
        sums = picked
    return sums, shift


@triton.jit
def root(sum, inverse, shift, GENERAL: tl.constexpr, LOG: tl.constexpr):
    """sum^inverse 2^shift in float64, or its logarithm. GENERAL: there are orders beside 1 and 2, which are exact."""
    regular = (sum > 0.0) & (sum < INF)
    u = tl.where(inverse == 0.5, tl.sqrt_rn(sum), sum)
    n = shift
    if GENERAL or LOG:
        tiny = sum < 2.0**-100  # the largest of subnormals
        bits = tl.where(tiny, sum * 2.0**100, sum).to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - tl.where(tiny, 227, 127)
        mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        x = tl.fma(exponent.to(tl.float64) + log2(mantissa).to(tl.float64), inverse, shift)
        if LOG:
            return tl.where(regular, x * LN2, tl.where(sum == 0.0, -INF, sum).to(tl.float64))
        general = (inverse != 1.0) & (inverse != 0.5) & regular
        n = tl.where(general, tl.minimum(tl.floor(x), 1024.0), n)
        u = tl.where(general, tl.exp2((x - n).to(tl.float32)), u)
    return u.to(tl.float64) * power_of_2(n)


# ---- statistics and scores


@triton.jit
def one_segment(sums, scale, PEEL_: tl.constexpr):
    """What `statistic` needs of a row that is one segment."""
    m, pivot, rest, squares, exp_t, sum_t, deviation, rare = sums
    if PEEL_:
        weight = tl.full(m.shape, 1.0, tl.float64)
        ratio = tl.where(rest > 0.0, squares / rest, 0.0)
        if rare:
            gap = (pivot.to(tl.float64) - m.to(tl.float64)) * scale
            weight = tl.where(pivot < m, exp2_double(gap), 1.0)
            near = weight.to(tl.float32)
            squares *= near * near
            ratio *= near
            exp_t = tl.where(rest > 0.0, tl.fma(gap.to(tl.float32), rest, exp_t), 0.0)
        return m, weight, rest, squares, ratio, exp_t, sum_t, deviation, rare
    else:
        return m, 1.0, rest, squares, squares, exp_t, sum_t, deviation, False


@triton.jit
def merged_total(ptr, row, scale, SEGMENTS: tl.constexpr):
    """Maximum and sum of exponentials of a row in several segments, as far as the second sweep needs them."""
    s = tl.arange(0, triton.next_power_of_2(SEGMENTS))[None, :]
    given = s < SEGMENTS
    ptr += (row.to(tl.int64) * SEGMENTS)[:, None] * RECORD + s * RECORD
    tops = small(ptr, given, -INF)
    rests = small(ptr + 2, given, 0.0) * tl.exp2((small(ptr + 1, given, -INF) - tops) * scale)
    m = row_max(tops)
    total = tl.sum(tl.where(tops == -INF, 0.0, tl.exp2((tops - m[:, None]) * scale) * (1.0 + rests)), 1)
    # Of scalars, which have no layout that logits would be brought into.
    return tl.full([1], tl.sum(m, 0), tl.float32), tl.full([1], tl.sum(total, 0), tl.float32)


@triton.jit
def merged_segments(ptr, row, scale, C: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr,
                    PEEL_: tl.constexpr):  # fmt: skip
    """The same of a row in several segments: their records merged in float64, in their order."""
    LANES: tl.constexpr = triton.next_power_of_2(SEGMENTS)
    s = tl.arange(0, LANES)[None, :]
    ptr += (row.to(tl.int64) * SEGMENTS)[:, None] * RECORD + s * RECORD
    given = s < SEGMENTS
    tops = small(ptr, given, -INF)
    pivots = small(ptr + 1, given, -INF).to(tl.float64)
    m = row_max(tops)
    top = m.to(tl.float64)[:, None]
    above = (tops.to(tl.float64) - top) * scale
    gap = (pivots - top) * scale
    a = tl.where(tops == -INF, 0.0, exp2_double(above))
    b = tl.where(pivots == -INF, 0.0, exp2_double(gap))
    hot = tops == m[:, None]
    ties = tl.sum(tl.where(hot, 1.0, 0.0), 1).to(tl.float64) - 1.0
    rests = small(ptr + 2, given, 0.0).to(tl.float64)
    rest = tl.sum(tl.fma(b, rests, tl.where(hot, 0.0, a)), 1) + ties
    squares = small(ptr + 3, given, 0.0).to(tl.float64)
    squares = tl.sum(tl.fma(b * b, squares, tl.where(hot, 0.0, a * a)), 1) + ties
    exp_t = small(ptr + 4, given, 0.0).to(tl.float64)
    exp_t = tl.where(b == 0.0, 0.0, b * tl.fma(gap, rests, exp_t)) + tl.where(hot | (a == 0.0), 0.0, a * above)
    sum_t = small(ptr + 5, given, 0.0).to(tl.float64)
    n = tl.minimum(C - s * SEGMENT, SEGMENT).to(tl.float64)
    sum_t = tl.sum(tl.where(given, tl.fma(n, above, sum_t), 0.0), 1)
    deviation = tl.sum(small(ptr + 6, given, 0.0).to(tl.float64), 1)

    rest = tl.where(tl.abs(m) < INF, rest, float("nan"))
    weight = tl.where((rest < DEEP) & (rest > 0.0), rest, 1.0) if PEEL_ else tl.full(m.shape, 1.0, tl.float64)
    ratio = tl.where(rest > 0.0, squares / rest, 0.0)
    cross = tl.sum(exp_t, 1) / weight
    return (m, weight, (rest / weight).to(tl.float32), squares.to(tl.float32), ratio.to(tl.float32),
            cross.to(tl.float32), sum_t.to(tl.float32), deviation.to(tl.float32), True)  # fmt: skip


@triton.jit
def statistic(CODE: tl.constexpr, parts, temperature, C: tl.constexpr, PEEL_: tl.constexpr):
    """One statistic of kernels/__init__.py; those that vanish with the rest in units of its weight."""
    m, weight, rest, squares, ratio, cross, sum_t, deviation, _ = parts
    if PEEL_:
        near = weight.to(tl.float32)
        r = rest * near
        total_log = log1p(r)
        small_log = tl.where(near < 1.0, rest, total_log)
    else:
        r = rest
        total_log = log2(1.0 + r) * LN2
        small_log = total_log
    inverse = 1.0 / (1.0 + r)
    if CODE == FMAX:
        return tl.where(tl.abs(m) < INF, m, float("nan"))
    elif CODE == ENERGY:
        return tl.where(tl.abs(m) < INF, tl.fma(temperature, total_log, m), m)
    elif CODE == LSE:
        return tl.where(tl.abs(m) < INF, m / temperature + total_log, m)
    elif CODE == MSP:
        return inverse
    elif CODE == S2:
        return (1.0 + squares) * inverse * inverse
    elif CODE == TOTAL_VARIATION:
        return deviation * inverse * 0.5
    elif CODE == SUMLOGP_STAT:
        return tl.fma(sum_t, LN2, -(total_log * C))
    elif CODE == ONE_MINUS_MSP:
        return rest * inverse
    elif CODE == LOG_MSP:
        return 0.0 - small_log
    elif CODE == ONE_MINUS_S2:
        return rest * (2.0 + (r - ratio)) * inverse * inverse
    else:
        return tl.fma(cross * LN2, inverse, 0.0 - small_log)


@triton.jit
def with_bias(powers, shift, SLOT: tl.constexpr, ORDER: tl.constexpr, SUMS: tl.constexpr, BIAS: tl.constexpr):
    """The sum of one order, of [h; 1] if BIAS."""
    sum = powers[SLOT]
    if ORDER == 0.0:
        sum = sum + 1.0 if BIAS else sum
        return tl.where(powers[SUMS - 1] == powers[SUMS - 1], sum, float("nan"))
    elif not BIAS:
        return sum
    elif ORDER == INF:
        return larger(sum, 1.0)
    elif ORDER > 0.84:
        return sum + tl.exp2(shift.to(tl.float32) * (-ORDER))
    else:
        return sum + 1.0


@triton.jit(do_not_specialize=["x_stride", "x_offset", "h_stride", "h_offset", "out_row", "out_column", "N"])
def scores(
    x_ptr, x_stride, x_offset, h_ptr, h_stride, h_offset, table_ptr, out_ptr, out_row, out_column, N,
    C: tl.constexpr, X_VEC: tl.constexpr, X_P: tl.constexpr, X_SHIFTED: tl.constexpr, X_W: tl.constexpr,
    SUMS: tl.constexpr, STATS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr,
    D: tl.constexpr, H_VEC: tl.constexpr, H_P: tl.constexpr, H_SHIFTED: tl.constexpr, H_W: tl.constexpr,
    H_TILES: tl.constexpr, POWERS: tl.constexpr, RANGES: tl.constexpr, ORDERS: tl.constexpr, SLOTS: tl.constexpr,
    BIAS: tl.constexpr, GENERAL: tl.constexpr, LOG: tl.constexpr, ALL_V: tl.constexpr, ALL_U: tl.constexpr,
    SQUARE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of logits (or, where SEGMENTS > 1, the records of their segments) and of features to COLUMNS scores:

    factor * statistic * norm^power, as table_ptr says: log2(e) / T and T, then for each column the number of its
    statistic, factor, number of its order, 1 / order, whether the statistic comes in units of the rest's weight,
    whether the order's sum comes scaled, and power.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = (row < N)[:, None]
    row = tl.minimum(row, N - 1)  # whose score is the same
    if len(STATS) > 0:
        scale = small(table_ptr)
        temperature = small(table_ptr + 1).to(tl.float32)
        if SEGMENTS > 1:
            parts = merged_segments(x_ptr, row, scale, C, SEGMENTS, SEGMENT, PEEL & SUMS)
        else:
            base, head = place(row, x_stride, x_offset, X_VEC, X_P, X_SHIFTED)
            w = tl.arange(0, X_W)[None, :]
            sums = softmax_sums(x_ptr, base, head, w, C, scale.to(tl.float32), C, C, X_VEC, X_P, X_SHIFTED, X_W, SUMS)
            parts = one_segment(sums, scale, PEEL & SUMS)
    if len(ORDERS) > 0:
        base, head = place(row, h_stride, h_offset, H_VEC, H_P, H_SHIFTED)
        w = tl.arange(0, H_W)[None, :]
        powers, shift = norm_sums(
            h_ptr, base, head, w, D, H_VEC, H_P, H_SHIFTED, H_W, H_TILES, ROWS, POWERS, RANGES, BIAS
        )

    for first in tl.static_range(0, COLUMNS, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        field = table_ptr + 2 + column
        within = column < COLUMNS
        score = small(field + COLUMNS, within, 0.0)
        if len(STATS) > 0:
            which = small(field, within, -1.0).to(tl.int32)
            v = statistic(STATS[0], parts, temperature, C, PEEL & SUMS)[:, None]
            if not ALL_V:
                v = tl.where(which == 0, v, 1.0)
            for i in tl.static_range(1, len(STATS)):
                v = tl.where(which == i, statistic(STATS[i], parts, temperature, C, PEEL & SUMS)[:, None], v)
            score = score * v
            if PEEL & SUMS:
                if parts[8]:
                    light = small(field + 4 * COLUMNS, within, 0.0) == 1.0
                    score = tl.where(light, score * parts[1][:, None], score)
        if len(ORDERS) > 0:
            which = small(field + 2 * COLUMNS, within, -1.0).to(tl.int32)
            sum = with_bias(powers, shift, SLOTS[0], ORDERS[0], len(RANGES), BIAS)[:, None]
            if not ALL_U:
                sum = tl.where(which == 0, sum, 1.0)
            for i in tl.static_range(1, len(ORDERS)):
                sum = tl.where(
                    which == i, with_bias(powers, shift, SLOTS[i], ORDERS[i], len(RANGES), BIAS)[:, None], sum
                )
            inverse = small(field + 3 * COLUMNS, within, 1.0)
            scaled = small(field + 5 * COLUMNS, within, 0.0)
            u = root(sum, inverse, shift.to(tl.float64)[:, None] * scaled, GENERAL, LOG)
            if LOG and not ALL_U:
                u = tl.where(which >= 0, u, 1.0)
            if SQUARE and not LOG:
                u = tl.where(small(field + 6 * COLUMNS, within, 1.0) == 2.0, u * u, u)
            score = score * u
        out = out_ptr + row.to(tl.int64)[:, None] * out_row + column.to(tl.int64) * out_column
        tl.store(out, score.to(out_ptr.dtype.element_ty), mask=ok & within)


@triton.jit(do_not_specialize=["x_stride", "x_offset"])
def segments(
    x_ptr, x_stride, x_offset, record_ptr, table_ptr, C: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr,
    SHIFTED: tl.constexpr, W: tl.constexpr, SUMS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    """One segment of one row to its record; SECOND: to the deviations from the uniform distribution in it, once the
    other sums of all segments are there.
    """
    row = tl.program_id(0) // SEGMENTS + tl.arange(0, 1)
    segment = tl.program_id(0) % SEGMENTS
    start = segment * SEGMENT
    n = tl.minimum(C - start, SEGMENT)
    first = x_offset.to(tl.int64) + (start if SHIFTED else start // VEC)
    base, head = place(row, x_stride, first, VEC, P, SHIFTED)
    w = tl.arange(0, W)[None, :]
    scale = small(table_ptr).to(tl.float32)
    record = record_ptr + tl.program_id(0).to(tl.int64) * RECORD + tl.arange(0, 1)
    LEAST: tl.constexpr = C - (SEGMENTS - 1) * SEGMENT
    if SECOND:
        m, total = merged_total(record_ptr, row, scale, SEGMENTS)
        us = load_row(x_ptr, base, head, w, n, SEGMENT, LEAST, VEC, P, SHIFTED, W)
        es = ()
        for i in tl.static_range(len(us)):
            xs = unpack(us[i], P, x_ptr.dtype.element_ty)
            for j in tl.static_range(P):
                es = es + (tl.exp2((xs[j] - m[:, None]) * scale),)
        tl.store(record + 6, deviations(es, total / C, SHIFTED, P))
    else:
        m, pivot, rest, squares, exp_t, sum_t, deviation, _ = softmax_sums(
            x_ptr, base, head, w, n, scale, SEGMENT, LEAST, VEC, P, SHIFTED, W, SUMS
        )
        masked = m == -INF  # all of this segment, which is nothing to be NaN about
        tl.store(record, m)
        tl.store(record + 1, pivot)
        tl.store(record + 2, tl.where(masked, 0.0, rest))
        tl.store(record + 3, tl.where(masked, 0.0, squares))
        tl.store(record + 4, tl.where(masked, 0.0, exp_t))
        tl.store(record + 5, tl.where(masked, -INF, sum_t))
        tl.store(record + 6, deviation)

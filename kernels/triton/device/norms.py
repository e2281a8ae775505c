"""Rows of features to sums of powers.

POWERS says how, as shapes.py lays it out: (roots, left, right, first, second, (count, largest, subnormals)). The roots
are powers of |h| by their order: 1, 0.5, or any other, which costs an exp2 and shares one log2. To these are added the
products of each left and right one. A sum adds up a first power, or its product with a second, -1 being none.
"""

import triton
import triton.language as tl

from fastood.kernels.triton.device.words import (
    INF,
    any_row,
    in_float32,
    in_one,
    is_own,
    larger,
    larger_words,
    load,
    log2,
    row_max,
    row_sums,
    smaller_words,
    unpack,
    words,
)


@triton.jit
def powers_of(a, largest, SAFE: tl.constexpr, POWERS: tl.constexpr):
    """All powers of |h|; SAFE: of |h| / largest, however far the two are apart."""
    x = tl.div_rn(a, largest + tl.zeros_like(a)) if SAFE else a
    log = x
    for i in tl.static_range(len(POWERS[0])):
        if POWERS[0][i] != 1.0 and POWERS[0][i] != 0.5:
            log = log2_ratio(a, largest) if SAFE else log2(a)
    out = ()
    for i in tl.static_range(len(POWERS[0])):
        if POWERS[0][i] == 1.0:
            out = out + (x,)
        elif POWERS[0][i] == 0.5:
            out = out + (tl.sqrt(x),)
        else:
            out = out + (tl.exp2(log * POWERS[0][i]),)
    for i in tl.static_range(len(POWERS[1])):
        out = out + (out[POWERS[1][i]] * out[POWERS[2][i]],)
    return out


@triton.jit
def log2_ratio(a, b):
    """log2(a / b) of 0 <= a <= b: exactly 0 of equal ones, and never wrong by more than log2 is between 1 and 2."""
    m, e = split(a)
    n, f = split(b)
    ratio = (e - f).to(tl.float32) + (log2(m) - log2(n))
    return tl.where(a > 0.0, tl.minimum(ratio, 0.0), -INF)


@triton.jit
def split(x):
    """Mantissa in [1, 2) and exponent of x > 0, subnormal ones too."""
    tiny = x < 2.0**-126
    bits = tl.where(tiny, x * 2.0**24, x).to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return mantissa, (bits >> 23) - tl.where(tiny, 151, 127)


@triton.jit
def add_powers(sums, ys, POWERS: tl.constexpr):
    """Adds what the powers ys of elements contribute to each sum; none are there yet of the first elements."""
    out = ()
    for i in tl.static_range(len(POWERS[3])):
        y = ys[POWERS[3][i]]
        if POWERS[4][i] >= 0:
            z = ys[POWERS[4][i]]
            out = out + (tl.fma(y, z, sums[i]) if len(sums) > 0 else y * z,)
        else:
            out = out + (sums[i] + y if len(sums) > 0 else y,)
    return out


@triton.jit
def add_each(a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def read_powers(ptr, base, head, w, largest, ROWS: tl.constexpr, SAFE: tl.constexpr, D: tl.constexpr,
                VEC: tl.constexpr, P: tl.constexpr, SHIFTED: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
                POWERS: tl.constexpr):  # fmt: skip
    """Whole rows to the sums, how many elements are not 0, the maximum, and the least bits of |h|, but one less.

    K tiles are in flight, and summed by themselves first: a long sum of equal terms would round in one direction.
    The sums have a tuple for each half of a word if SHIFTED.
    """
    SPAN: tl.constexpr = (D + (VEC - 1 if SHIFTED else 0) + P - 1) // P
    TYPE: tl.constexpr = ptr.dtype.element_ty
    FOLD: tl.constexpr = 1 if SHIFTED else VEC // P
    zero = tl.zeros([ROWS, W // FOLD], tl.float32)
    totals = ()
    for _ in tl.static_range(len(POWERS[3])):
        totals = totals + (zero,)
    totals = (totals, totals) if SHIFTED and P == 2 else (totals,)
    count = zero.to(tl.int32)
    most = zero.to(tl.uint32) if P == 2 else zero
    least = zero.to(tl.uint32) - 1  # which makes 0 the largest
    PIPE: tl.constexpr = POWERS[5][3]
    raw = load_tiles(ptr, base, head, 0, w, D, VEC, P, SHIFTED, W, K, SPAN, False)
    for c in range(0, SPAN, W * K):
        if PIPE:
            following = load_tiles(ptr, base, head, c + W * K, w, D, VEC, P, SHIFTED, W, K, SPAN, True)
        else:
            raw = load_tiles(ptr, base, head, c, w, D, VEC, P, SHIFTED, W, K, SPAN, False)
        us = ()
        for k in tl.static_range(K):
            u = magnitudes(raw[k], P)
            if SHIFTED:
                u = own_words(u, c + k * W + w, head, D, VEC, P)
            us = us + apart(u, FOLD)
        parts = totals if SHIFTED else ((),)
        counts = zero.to(tl.uint32)
        for i in tl.static_range(len(us)):
            if POWERS[5][0]:
                counts += not_zero(us[i], P, TYPE)
            if POWERS[5][1]:
                most = larger_words(most, us[i], P, TYPE)
            halves = unpack(us[i], P, TYPE)
            for j in tl.static_range(P):
                if POWERS[5][2]:
                    least = tl.minimum(least, halves[j].to(tl.uint32, bitcast=True) - 1)
                ys = powers_of(halves[j], largest, SAFE, POWERS)
                if len(parts) == 2 and j == 1:
                    parts = (parts[0], add_powers(parts[1], ys, POWERS))
                elif len(parts) == 2:
                    parts = (add_powers(parts[0], ys, POWERS), parts[1])
                else:
                    parts = (add_powers(parts[0], ys, POWERS),)
        totals = parts if SHIFTED else (add_each(totals[0], parts[0]),)
        if POWERS[5][0]:
            count += ((counts & 0xFFFF) + (counts >> 16)).to(tl.int32) if P == 2 else counts.to(tl.int32)
        if PIPE:
            raw = following
    return totals, count, most, least


@triton.jit
def load_tiles(ptr, base, head, c, w, D: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr, SHIFTED: tl.constexpr,
               W: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, MAYBE: tl.constexpr):  # fmt: skip
    raw = ()
    for k in tl.static_range(K):
        if SPAN % (W * K) == 0 and not SHIFTED:
            if MAYBE:
                raw = raw + (tl.load(words(ptr, P) + base + (c + k * W + w), mask=c < SPAN, other=0.0),)
            else:
                raw = raw + (tl.load(words(ptr, P) + base + (c + k * W + w)),)
        else:
            raw = raw + (load(ptr, base, head, c + k * W + w, D, 0.0, VEC, P, SHIFTED),)
    return raw


@triton.jit
def apart(u, N: tl.constexpr):
    """The N words beside each other that a thread has loaded: tiles of every N-th."""
    if N == 1:
        return (u,)
    else:
        left, right = tl.split(tl.reshape(u, [u.shape[0], u.shape[1] // 2, 2]))
        return apart(left, N // 2) + apart(right, N // 2)


@triton.jit
def magnitudes(u, P: tl.constexpr):
    return u & 0x7FFF7FFF if P == 2 else tl.abs(u.to(tl.float32))


@triton.jit
def own_words(u, word, head, n, VEC: tl.constexpr, P: tl.constexpr):
    """Words of shifted rows with 0 for what is not the row's own."""
    if P == 2:
        u = tl.where(is_own(word, 0, head, n, VEC, P, True), u, u & 0xFFFF0000)
        return tl.where(is_own(word, 1, head, n, VEC, P, True), u, u & 0xFFFF)
    else:
        return tl.where(is_own(word, 0, head, n, VEC, P, True), u, 0.0)


@triton.jit
def not_zero(u, P: tl.constexpr, TYPE: tl.constexpr):
    """1 for each element that is not 0, of pairs in the two halves."""
    if P == 2:
        return smaller_words(u, tl.full(u.shape, 0x00010001, tl.uint32), P, TYPE)
    else:
        return tl.minimum(u.to(tl.uint32, bitcast=True), 1)


@triton.jit
def row_powers(totals, count, most, P: tl.constexpr, SHIFTED: tl.constexpr, POWERS: tl.constexpr,
               TYPE: tl.constexpr):  # fmt: skip
    """The sums of slots reduced to rows."""
    out = row_sums(in_one(totals, len(totals), SHIFTED)) if len(POWERS[3]) > 0 else ()
    out = in_float32(out)
    if POWERS[5][0]:
        out = out + (tl.sum(count, 1).to(tl.float32),)
    if POWERS[5][1]:
        pair = unpack(most, P, TYPE)
        out = out + (row_max(larger(pair[0], pair[1]) if P == 2 else pair[0]),)
    return out


@triton.jit
def norm_sums(ptr, base, head, w, D: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr, SHIFTED: tl.constexpr,
              W: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, POWERS: tl.constexpr, RANGES: tl.constexpr,
              BIAS: tl.constexpr):  # fmt: skip
    """The sums of POWERS, how many elements are not 0, the maximum; and the unit of each row: powers are of |h| / unit.

    First all is summed as it stands. A row of which a sum is outside its RANGES may have overflowed, or lost what
    counts, and is read again, with its largest element as unit: few rows have features so far from 1.
    """
    TYPE: tl.constexpr = ptr.dtype.element_ty
    SUMS: tl.constexpr = len(RANGES)
    one = tl.full([ROWS, 1], 1.0, tl.float32)
    totals, count, most, least = read_powers(ptr, base, head, w, one, ROWS, False, D, VEC, P, SHIFTED, W, K, POWERS)
    sums = row_powers(totals, count, most, P, SHIFTED, POWERS, TYPE)
    unit = tl.full([ROWS], 1.0, tl.float32)
    doubtful = unit != 1.0
    for i in tl.static_range(SUMS):
        if RANGES[i][0] > -INF:
            doubtful |= (sums[i] < RANGES[i][0]) | (sums[i] > RANGES[i][1])
    if POWERS[5][2]:
        doubtful |= tl.min(least, 1) < 0x007FFFFF
    if any_row(doubtful):
        if POWERS[5][1]:
            largest = sums[SUMS - 1]
        else:
            MOST: tl.constexpr = ((), (), (), (), (), (False, True, False, False))
            _, none, most, _ = read_powers(ptr, base, head, w, one, ROWS, False, D, VEC, P, SHIFTED, W, K, MOST)
            largest = row_powers(((),), none, most, P, SHIFTED, MOST, TYPE)[0]
        # Sums that hold infinity or nothing are right as they are.
        doubtful = doubtful & (largest > 0.0) & (largest < INF)
        if BIAS:
            largest = larger(largest, 1.0)
        unit = tl.where(doubtful, largest, 1.0)
        totals, count, most, least = read_powers(
            ptr, base, head, w, unit[:, None], ROWS, True, D, VEC, P, SHIFTED, W, 1, POWERS
        )
        again = row_powers(totals, count, most, P, SHIFTED, POWERS, TYPE)
        picked = ()
        for i in tl.static_range(SUMS):
            picked = picked + (tl.where(doubtful, again[i], sums[i]),)
        sums = picked
    return sums, unit

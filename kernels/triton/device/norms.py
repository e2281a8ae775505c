"""Rows of features to sums of powers.

POWERS says how, as shapes.py lays it out: (roots, left, right, first, second, (count, largest, subnormals)). The roots
are powers of |h| by their order: 1, 0.5, or any other, which costs an exp2 and shares one log2. To these are added the
products of each left and right one. A sum adds up a first power, or its product with a second, -1 being none.
"""

import triton
import triton.language as tl

from fastood.kernels.triton.device.words import (
    INF,
    NVIDIA,
    any_row,
    larger,
    larger_words,
    log2,
    row_max,
    row_sums,
    smaller_words,
    split,
    unpack,
    words,
)

FOLD = tl.constexpr(4)  # words of a load


@triton.jit
def powers_of(a, largest, SAFE: tl.constexpr, POWERS: tl.constexpr):
    """All powers of |h|; SAFE: of |h| / largest, however far the two are apart."""
    x = quotient(a, largest) if SAFE else a
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
def quotient(a, b):
    """a / b, rounded once: 1 of equal ones."""
    if NVIDIA:
        return tl.div_rn(a, b + tl.zeros_like(a))
    else:
        return a / b


@triton.jit
def log2_ratio(a, b):
    """log2(a / b) of 0 <= a <= b: exactly 0 of equal ones, and never wrong by more than log2 is between 1 and 2."""
    m, e = split(a)
    n, f = split(b)
    ratio = (e - f).to(tl.float32) + (log2(m) - log2(n))
    return tl.where(a > 0.0, tl.minimum(ratio, 0.0), -INF)


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
def read_powers(ptr, base, largest, ROWS: tl.constexpr, SAFE: tl.constexpr, D: tl.constexpr, VEC: tl.constexpr,
                P: tl.constexpr, W: tl.constexpr, K: tl.constexpr, POWERS: tl.constexpr):  # fmt: skip
    """Whole rows to the sums, how many elements are not 0, the maximum, and all bits of min(|h|, least normal number).

    K tiles are in flight and summed by themselves, MANY times K too: a long sum of equal terms rounds in one direction.
    """
    SPAN: tl.constexpr = (D + P - 1) // P
    MANY: tl.constexpr = 16 if SPAN > 32 * W * K else 32
    TYPE: tl.constexpr = ptr.dtype.element_ty
    zero = tl.zeros([ROWS, W // FOLD], tl.float32)
    none = ()
    for _ in tl.static_range(len(POWERS[3])):
        none = none + (zero,)
    totals = none
    count = zero.to(tl.int32)
    most = zero.to(tl.uint32) if P == 2 else zero
    seen = zero.to(tl.uint32)
    # Once subnormals are known to be there, or not to matter, an element that is not 0 counts by one bit.
    SHIFT: tl.constexpr = (7 if P == 2 else 23) if POWERS[5][2] and not SAFE else 0
    for first in range(0, SPAN, MANY * W * K):
        sums = none
        for c in range(first, tl.minimum(first + MANY * W * K, SPAN), W * K):
            us = ()
            for k in tl.static_range(K):
                us = us + load_words(ptr, base, c + k * W, D, VEC, P, W, SPAN % (W * K) == 0 and D % P == 0)
            parts = ()
            counts = zero.to(tl.uint32)
            for i in tl.static_range(K * FOLD):
                u = us[i] & 0x7FFF7FFF if P == 2 else tl.abs(us[i])
                if POWERS[5][0] or SHIFT > 0:
                    least = at_most(u, 1 << SHIFT, P, TYPE)
                    counts += least
                    seen |= least
                if POWERS[5][1]:
                    most = larger_words(most, u, P, TYPE)
                halves = unpack(u, P, TYPE)
                for j in tl.static_range(P):
                    parts = add_powers(parts, powers_of(halves[j], largest, SAFE, POWERS), POWERS)
            sums = add_each(sums, parts)
            if POWERS[5][0]:
                counts = (counts & 0xFFFF) + (counts >> 16) if P == 2 else counts
                count += (counts >> SHIFT).to(tl.int32)
        totals = add_each(totals, sums)
    return totals, count, most, seen


@triton.jit
def load_words(ptr, base, first, D: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
               WHOLE: tl.constexpr):  # fmt: skip
    """A tile as FOLD words of each thread, which are the same wherever rows begin; WHOLE: all of them are the row's."""
    out = ()
    if VEC < P:
        lane = tl.arange(0, W // FOLD)[None, :]
        for i in tl.static_range(FOLD):
            place = (first + lane * FOLD + i) * P
            low = tl.load(ptr + base + place, mask=place < D, other=0.0).to(tl.uint16, bitcast=True)
            high = tl.load(ptr + base + place + 1, mask=place + 1 < D, other=0.0).to(tl.uint16, bitcast=True)
            out = out + (low.to(tl.uint32) | (high.to(tl.uint32) << 16),)
    else:
        WIDE: tl.constexpr = VEC // P
        w = tl.arange(0, W // FOLD * WIDE)[None, :]
        for i in tl.static_range(0, FOLD, WIDE):
            word = first + w // WIDE * FOLD + (w % WIDE + i)
            if WHOLE:
                u = tl.load(words(ptr, P) + base + word)
            else:
                u = tl.load(words(ptr, P) + base + word, mask=word // WIDE < D // VEC, other=0)
            out = out + apart(u, WIDE)
    return out


@triton.jit
def apart(u, N: tl.constexpr):
    """The N words beside each other that a thread has loaded: tiles of every N-th."""
    if N == 1:
        return (u,)
    else:
        left, right = tl.split(tl.reshape(u, [u.shape[0], u.shape[1] // 2, 2]))
        if N == 2:
            return left, right
        else:
            even, odd = apart(left, 2), apart(right, 2)
            return even[0], odd[0], even[1], odd[1]


@triton.jit
def at_most(u, BITS: tl.constexpr, P: tl.constexpr, TYPE: tl.constexpr):
    """The bits of each magnitude, but at most these."""
    if P == 2:
        return smaller_words(u, tl.full(u.shape, BITS * 0x00010001, tl.uint32), P, TYPE)
    else:
        return tl.minimum(u.to(tl.uint32, bitcast=True), BITS)


@triton.jit
def row_powers(totals, count, most, P: tl.constexpr, POWERS: tl.constexpr, TYPE: tl.constexpr):
    """The sums of slots reduced to rows."""
    out = row_sums(totals)
    if POWERS[5][0]:
        out = out + (tl.sum(count, 1).to(tl.float32),)
    if POWERS[5][1]:
        pair = unpack(most, P, TYPE)
        out = out + (row_max(larger(pair[0], pair[1]) if P == 2 else pair[0]),)
    return out


@triton.jit
def norm_sums(ptr, base, D: tl.constexpr, VEC: tl.constexpr, P: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
              ROWS: tl.constexpr, POWERS: tl.constexpr, RANGES: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """The sums of POWERS, how many elements are not 0, the maximum; and the unit of each row: powers are of |h| / unit.

    First all is summed as it stands. A row of which a sum is outside its RANGES may have overflowed, or lost what
    counts, and is read again, with its largest element as unit: few rows have features so far from 1.
    """
    TYPE: tl.constexpr = ptr.dtype.element_ty
    SUMS: tl.constexpr = len(RANGES)
    one = tl.full([ROWS, 1], 1.0, tl.float32)
    totals, count, most, seen = read_powers(ptr, base, one, ROWS, False, D, VEC, P, W, K, POWERS)
    sums = row_powers(totals, count, most, P, POWERS, TYPE)
    unit = tl.full([ROWS], 1.0, tl.float32)
    doubtful = unit != 1.0
    for i in tl.static_range(SUMS):
        if RANGES[i][0] > -INF:
            doubtful |= (sums[i] < RANGES[i][0]) | (sums[i] > RANGES[i][1])
    if POWERS[5][2]:
        subnormal = seen & (0x007F007F if P == 2 else 0x007FFFFF)
        doubtful |= tl.max((subnormal > 0).to(tl.int32), 1) > 0
    if any_row(doubtful):
        if POWERS[5][1]:
            largest = sums[SUMS - 1]
        else:
            MOST: tl.constexpr = ((), (), (), (), (), (False, True, False))
            _, _, most, _ = read_powers(ptr, base, one, ROWS, False, D, VEC, P, W, K, MOST)
            largest = row_powers((), count, most, P, MOST, TYPE)[0]
        # Sums that hold infinity or nothing are right as they are.
        doubtful = doubtful & (largest > 0.0) & (largest < INF)
        if BIAS:
            largest = larger(largest, 1.0)
        unit = tl.where(doubtful, largest, 1.0)
        totals, count, most, _ = read_powers(ptr, base, unit[:, None], ROWS, True, D, VEC, P, W, 1, POWERS)
        again = row_powers(totals, count, most, P, POWERS, TYPE)
        picked = ()
        for i in tl.static_range(SUMS):
            picked = picked + (tl.where(doubtful, again[i], sums[i]),)
        sums = picked
    return sums, unit

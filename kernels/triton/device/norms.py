"""Rows of features to sums of powers.

POWERS says which sums are kept, as shapes.py lays them out:
(integers, bases, index of the base of each further sum, its multiple of it, (count, largest, subnormals)).
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
    load,
    log2,
    row_max,
    row_sums,
    unpack,
    words,
)


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
    out = in_float32(row_sums(in_one(tiles, len(tiles), SHIFTED)))
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

"""Rows of features to sums of powers.

POWERS says how, see Powers in shapes.py: from its roots, powers of |h| by their order, and the products of some of
these to sums of a power or of the product of two. Roots are 1, 0.5, or any other, which costs an exp2 and shares one
log2.
"""

from typing import Any, NamedTuple

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
from fastood.kernels.triton.shapes import Powers

FOLD = tl.constexpr(4)  # words of a load


class SlotSums(NamedTuple):
    """Of the elements of each slot."""

    totals: Any  # the sums of powers, a tuple
    nonzero: Any  # how many are
    most: Any  # the largest |h|, as words
    bits: Any  # all bits of min(|h|, least normal number)


class PowerSums(NamedTuple):
    """Of each row."""

    sums: Any  # of powers of |h| / unit, then as wanted how many elements are not 0, and the largest |h|
    unit: Any
    largest: Any  # the largest |h|, where that is wanted


@triton.jit
def powers_of(a, unit, SAFE: tl.constexpr, POWERS: tl.constexpr):
    """All powers of |h|; SAFE: of |h| / unit, however far the two are apart."""
    x = quotient(a, unit) if SAFE else a
    log = x
    if POWERS.by_log:
        log = log2_ratio(a, unit) if SAFE else log2(a)
    out = ()
    for i in tl.static_range(len(POWERS.roots)):
        if POWERS.roots[i] == 1.0:
            out = out + (x,)
        elif POWERS.roots[i] == 0.5:
            out = out + (tl.sqrt(x),)
        else:
            out = out + (tl.exp2(log * POWERS.roots[i]),)
    for i in tl.static_range(len(POWERS.products)):
        out = out + (out[POWERS.products[i][0]] * out[POWERS.products[i][1]],)
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
    """Adds what the powers ys of elements contribute to each sum; `sums` is () before the first."""
    out = ()
    for i in tl.static_range(len(POWERS.factors)):
        y = ys[POWERS.factors[i][0]]
        if len(POWERS.factors[i]) == 2:
            z = ys[POWERS.factors[i][1]]
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
def read_powers(rows, unit, SAFE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, POWERS: tl.constexpr):
    """The SlotSums of whole rows.

    K tiles are in flight and summed by themselves, MANY times K too: a long sum of equal terms rounds in one direction.
    """
    SPAN: tl.constexpr = (H.columns + H.p - 1) // H.p
    MANY: tl.constexpr = 16 if K * H.w * 32 < SPAN else 32
    WHOLE: tl.constexpr = SPAN % (H.w * K) == 0 and H.columns % H.p == 0
    TYPE: tl.constexpr = rows.ptr.dtype.element_ty
    zero = tl.zeros([unit.shape[0], H.w // FOLD], tl.float32)
    none = ()
    for _ in tl.static_range(len(POWERS.factors)):
        none = none + (zero,)
    totals = none
    nonzero = zero.to(tl.int32)
    most = zero.to(tl.uint32) if H.p == 2 else zero
    bits = zero.to(tl.uint32)
    # Elements are counted by adding min(bits, 1 << SHIFT) of each, which is 0 of 0. Where subnormals are looked for,
    # 1 << SHIFT are the bits of the least normal number: those of a subnormal stay as they are, and so show in `bits`.
    # It counts for less, but then its row is read again. Else SHIFT is 0.
    SHIFT: tl.constexpr = (7 if H.p == 2 else 23) if POWERS.subnormals and not SAFE else 0
    for first in range(0, SPAN, MANY * H.w * K):
        sums = none
        for c in range(first, tl.minimum(first + MANY * H.w * K, SPAN), H.w * K):
            us = ()
            for k in tl.static_range(K):
                us = us + load_apart(rows, c + k * H.w, WHOLE, H)
            parts = ()
            counts = zero.to(tl.uint32)
            for i in tl.static_range(K * FOLD):
                u = us[i] & 0x7FFF7FFF if H.p == 2 else tl.abs(us[i])
                if POWERS.nonzero or SHIFT > 0:
                    least = at_most(u, 1 << SHIFT, H.p, TYPE)
                    counts += least
                    bits |= least
                if POWERS.largest:
                    most = larger_words(most, u, H.p, TYPE)
                xs = unpack(u, H.p, TYPE)
                for j in tl.static_range(len(xs)):
                    parts = add_powers(parts, powers_of(xs[j], unit, SAFE, POWERS), POWERS)
            sums = add_each(sums, parts)
            if POWERS.nonzero:
                counts = (counts & 0xFFFF) + (counts >> 16) if H.p == 2 else counts
                nonzero += (counts >> SHIFT).to(tl.int32)
        totals = add_each(totals, sums)
    return SlotSums(totals, nonzero, most, bits)


@triton.jit
def load_apart(rows, first, WHOLE: tl.constexpr, H: tl.constexpr):
    """A tile as FOLD words of each thread, which are the same wherever rows begin; WHOLE: all of them are the row's."""
    out = ()
    if H.vec < H.p:
        here = rows.ptr + rows.base
        lane = tl.arange(0, H.w // FOLD)[None, :]
        for i in tl.static_range(FOLD):
            place = (first + lane * FOLD + i) * H.p
            low = tl.load(here + place, mask=place < H.columns, other=0.0).to(tl.uint16, bitcast=True)
            high = tl.load(here + place + 1, mask=place + 1 < H.columns, other=0.0).to(tl.uint16, bitcast=True)
            out = out + (low.to(tl.uint32) | (high.to(tl.uint32) << 16),)
    else:
        WIDE: tl.constexpr = H.words
        here = words(rows.ptr, H.p) + rows.base
        w = tl.arange(0, H.w // FOLD * WIDE)[None, :]
        for i in tl.static_range(0, FOLD, WIDE):
            word = first + w // WIDE * FOLD + (w % WIDE + i)
            if WHOLE:
                u = tl.load(here + word)
            else:
                u = tl.load(here + word, mask=word // WIDE < H.columns // H.vec, other=0)
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
def row_powers(slots, H: tl.constexpr, POWERS: tl.constexpr, TYPE: tl.constexpr):
    """SlotSums reduced to the sums of rows."""
    out = row_sums(slots.totals)
    if POWERS.nonzero:
        out = out + (tl.sum(slots.nonzero, 1).to(tl.float32),)
    if POWERS.largest:
        pair = unpack(slots.most, H.p, TYPE)
        out = out + (row_max(larger(pair[0], pair[1]) if H.p == 2 else pair[0]),)
    return out


@triton.jit
def norm_sums(rows, H: tl.constexpr, K: tl.constexpr, NORMS: tl.constexpr, POWERS: tl.constexpr, BIAS: tl.constexpr):
    """The PowerSums of rows.

    First all is summed as it stands. A row of which a sum is outside its range may have overflowed, or lost what
    counts, and is read again, with its largest element as unit: few rows have features so far from 1.
    """
    TYPE: tl.constexpr = rows.ptr.dtype.element_ty
    ROWS: tl.constexpr = rows.base.shape[0]
    one = tl.full([ROWS, 1], 1.0, tl.float32)
    slots = read_powers(rows, one, False, H, K, POWERS)
    sums = row_powers(slots, H, POWERS, TYPE)
    unit = tl.full([ROWS], 1.0, tl.float32)
    again = unit != 1.0
    for i in tl.static_range(len(NORMS.ranges)):
        if NORMS.ranges[i][0] > -INF:
            again |= (sums[i] < NORMS.ranges[i][0]) | (sums[i] > NORMS.ranges[i][1])
    if POWERS.subnormals:
        subnormal = slots.bits & (0x007F007F if H.p == 2 else 0x007FFFFF)
        again |= tl.max((subnormal > 0).to(tl.int32), 1) > 0
    if any_row(again):
        if POWERS.largest:
            largest = sums[len(sums) - 1]
        else:
            MOST: tl.constexpr = Powers((), False, (), (), False, True, False)
            largest = row_powers(read_powers(rows, one, False, H, K, MOST), H, MOST, TYPE)[0]
        # Sums that hold infinity or nothing are right as they are, but for the number of what is not 0.
        counted = again
        again = again & (largest > 0.0) & (largest < INF)
        if BIAS:
            largest = larger(largest, 1.0)
        unit = tl.where(again, largest, 1.0)
        slots = read_powers(rows, unit[:, None], True, H, 1, POWERS)
        more = row_powers(slots, H, POWERS, TYPE)
        picked = ()
        for i in tl.static_range(len(NORMS.ranges)):
            if POWERS.nonzero and i == len(POWERS.factors):
                picked = picked + (tl.where(counted, more[i], sums[i]),)
            else:
                picked = picked + (tl.where(again, more[i], sums[i]),)
        sums = picked
    return PowerSums(sums, unit, sums[len(sums) - 1])

"""Reading rows, and the arithmetic that all kernels share.

A row is read as *words*: halves in pairs, which unpack with one instruction each, float32 one by one. A program holds
rows as tiles [rows, w] of words, `us` being the tuple of the tiles that make up a row, and `xs` one of their elements;
a place in such a tile is a *slot*, with sums of its own until the row is reduced. X and H, constants, say how rows of
logits and of features are read: see Tile in shapes.py. Every multiplication that feeds an addition is an explicit fma,
so that results do not hang on the compiler's contraction. Triton reads the fields of a constant NamedTuple as plain
numbers: where it wants a constant of its own, in shapes and for static_range, they are named once more.

Rows of logits that begin between words are moved into place as they are read: load_tile.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NVIDIA = tl.constexpr(torch.version.hip is None)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
LARGEST_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)

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
def reciprocal(x):
    """1 / x of normal numbers, in one instruction."""
    if INTERPRETED or not NVIDIA:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)


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
    s = r * reciprocal(2.0 + r)
    q = s * s
    series = tl.fma(tl.fma(tl.fma(q, 1.0 / 7, 1.0 / 5), q, 1.0 / 3), q, 1.0) * (s + s)
    return tl.where(r < 0.4, series, log2(1.0 + r) * LN2)


@triton.jit
def split(x):
    """Mantissa in [1, 2) and exponent of x > 0, subnormal ones too."""
    tiny = x < 2.0**-126
    bits = tl.where(tiny, x * 2.0**24, x).to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return mantissa, (bits >> 23) - tl.where(tiny, 151, 127)


@triton.jit
def log(x):
    """ln x in float64 of x > 0, to float32's relative precision, which log2 has not near 1."""
    mantissa, exponent = split(x)
    above = mantissa > 1.4142135
    mantissa = tl.where(above, mantissa * 0.5, mantissa)
    s = (mantissa - 1.0) / (mantissa + 1.0)  # the series of 2 artanh s
    q = s * s
    series = tl.fma(tl.fma(tl.fma(tl.fma(q, 1.0 / 9, 1.0 / 7), q, 1.0 / 5), q, 1.0 / 3), q, 1.0) * (s + s)
    exponent = tl.where(above, exponent + 1, exponent).to(tl.float64)
    return tl.fma(exponent, tl.full(exponent.shape, LN2, tl.float64), series.to(tl.float64))


@triton.jit
def log_scaled(x, gap):
    """ln (x 2^gap) in float64 of x >= 0, finite where 2^gap is 0."""
    y = tl.fma(gap, tl.full(gap.shape, LN2, tl.float64), log(x))
    return tl.where(x > 0.0, y, tl.where(x == 0.0, -INF, x).to(tl.float64))


@triton.jit
def exp2_double(x):
    """2^x of float64 x to float32's precision, over float64's range; by bits, since conversions are slow."""
    fixed = tl.minimum(tl.maximum(x, -1022.0), 1024.0) + 1.5 * 2.0**29  # its last 23 bits are below 1
    fixed = fixed.to(tl.int64, bitcast=True)
    part = ((fixed & 0x7FFFFF) | 0x3F800000).to(tl.int32).to(tl.float32, bitcast=True) - 1.0
    whole = (((fixed >> 23) & 0xFFF) ^ 0x800) - 0x800  # 12 bits with their sign
    bits = tl.exp2(part).to(tl.int32, bitcast=True).to(tl.int64) << 29  # of float64, but for the bias of the exponent
    return tl.where(x < -1022.0, 0.0, (bits + ((whole + 1023 - 127) << 52)).to(tl.float64, bitcast=True))


@triton.jit
def load_table(ptr, mask=None, other=None):
    """A load of what all programs read, and is to stay in the cache."""
    return tl.load(ptr, mask=mask, other=other, eviction_policy="evict_last")


class Rows(NamedTuple):
    """Rows of a matrix in memory: the word at which each begins [rows, 1], and the elements of that before the row."""

    ptr: Any
    base: Any
    head: Any


@triton.jit
def rows_at(ptr, row, stride, offset, X: tl.constexpr):
    """`stride` and `offset` count groups of X.vec elements, but elements where rows are shifted."""
    if X.shifted:
        start = row.to(tl.int64) * stride + offset
        base = start // X.vec * X.words
        return Rows(ptr, base[:, None], (start % X.vec).to(tl.int32)[:, None])
    else:
        base = (row.to(tl.int64) * stride + offset) * X.words
        return Rows(ptr, base[:, None], tl.zeros_like(row)[:, None])


@triton.jit
def words(ptr, P: tl.constexpr):
    if P == 2:
        return ptr.to(tl.pointer_type(tl.uint32))
    else:
        return ptr


@triton.jit
def load_words(rows, word, X: tl.constexpr):
    """These words of rows, -inf beyond the end: by whole groups of X.vec elements, so that they stay one load each."""
    if X.shifted:
        groups = (rows.head + (X.columns + X.vec - 1)) // X.vec
    else:
        groups = (X.columns + X.vec - 1) // X.vec
    inside = (word // X.words) < groups
    here = words(rows.ptr, X.p) + rows.base + word
    return tl.load(here, mask=inside, other=filler(X.p, rows.ptr.dtype.element_ty))


@triton.constexpr_function
def filler(P, TYPE):
    """A word of -inf."""
    if P == 1:
        return -float("inf")
    return 0xFC00FC00 if tl.float16 == TYPE else 0xFF80FF80


@triton.jit
def in_full(x):
    """float32 of any type; of bfloat16 by its bits where the interpreter's conversion would make subnormals 0."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def unpack(u, P: tl.constexpr, TYPE: tl.constexpr):
    """The elements of words as float32: a tuple of P tiles."""
    if P == 1:
        return (in_full(u),)
    elif tl.float16 == TYPE:
        low, high = (u & 0xFFFF).to(tl.uint16), (u >> 16).to(tl.uint16)
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = (u << 16).to(tl.float32, bitcast=True)
        return (low, (u & 0xFFFF0000).to(tl.float32, bitcast=True))


@triton.jit
def pack(low, high, TYPE: tl.constexpr):
    """The pairs of which these are the elements."""
    if tl.float16 == TYPE:
        low, high = low.to(TYPE).to(tl.uint16, bitcast=True), high.to(TYPE).to(tl.uint16, bitcast=True)
        return low.to(tl.uint32) | (high.to(tl.uint32) << 16)
    else:  # see in_full
        return (low.to(tl.uint32, bitcast=True) >> 16) | (high.to(tl.uint32, bitcast=True) & 0xFFFF0000)


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
def within(word, j: tl.constexpr, X: tl.constexpr):
    """Which elements, the j-th of their word, belong to a row."""
    if X.vec > X.p:
        return word // X.words < X.columns // X.vec
    else:
        return word < (X.columns + (X.p - 1 - j)) // X.p


@triton.jit
def only_own(x, other, i: tl.constexpr, j: tl.constexpr, w, X: tl.constexpr):
    """x, of the j-th elements of the words of tile i, but `other` beyond the row's end."""
    if (i + 1) * X.w * X.p > X.columns:
        return tl.where(within(w + i * X.w, j, X), x, other)
    else:
        return x


@triton.jit
def load_tile(rows, word, INSIDE: tl.constexpr, X: tl.constexpr):
    """These words of rows of logits. Those beyond the end are -inf, but for halves in the last word that is read;
    INSIDE: the end is further on.

    Rows of halves that may begin in the middle of a word (shifted) are read twice, one word apart, and moved into
    place: a slot then holds the same logits wherever the row begins.
    """
    here = words(rows.ptr, X.p) + rows.base
    u = tl.load(here + word) if INSIDE else load_words(rows, word, X)
    if X.shifted and X.p == 2:
        word += 1
        next = tl.load(here + word) if INSIDE else load_words(rows, word, X)
        u = (((next.to(tl.uint64) << 32) | u.to(tl.uint64)) >> (rows.head * 16).to(tl.uint64)).to(tl.uint32)
    return u


@triton.jit
def load_slots(rows, first, INSIDE: tl.constexpr, X: tl.constexpr):
    """The tile from word `first` on, of which each thread has as many neighbours however few a load takes, so that
    sums are the same wherever rows begin.
    """
    W: tl.constexpr = X.w
    FOLD: tl.constexpr = X.fold
    if X.vec // X.p >= FOLD:
        return load_tile(rows, first + tl.arange(0, W)[None, :], INSIDE, X)
    else:
        lane = first + tl.arange(0, W // FOLD)[None, :] * FOLD
        us = ()
        for k in tl.static_range(FOLD):
            us = us + (load_tile(rows, lane + k, INSIDE, X),)
        if FOLD == 2:
            u = tl.join(us[0], us[1])
        else:
            u = tl.join(tl.join(us[0], us[2]), tl.join(us[1], us[3]))
        return tl.reshape(u, [u.shape[0], W])


@triton.jit
def load_row(rows, w, X: tl.constexpr):
    """All words of rows of logits as a tuple of tiles, -inf beyond their ends."""
    TILES: tl.constexpr = X.tiles
    us = ()
    for i in tl.static_range(TILES):
        LEFT = X.columns - (i + 1) * X.w * X.p
        INSIDE = LEFT > 0 or (LEFT == 0 and not X.shifted)
        u = load_slots(rows, i * X.w, INSIDE, X)
        if X.p == 1:
            u = in_full(u)
        else:
            FILL = filler(X.p, rows.ptr.dtype.element_ty)
            if X.shifted:
                u = only_own(u, (u & 0xFFFF0000) | (FILL & 0xFFFF), i, 0, w, X)
            if X.shifted or X.columns % X.p > 0:
                u = only_own(u, (u & 0xFFFF) | (FILL & 0xFFFF0000), i, 1, w, X)
        us = us + (u,)
    return us


@triton.jit
def elements(rows, word, X: tl.constexpr):
    """The elements of these words of rows of logits, as float32: a tuple of X.p tiles."""
    return unpack(load_tile(rows, word, False, X), X.p, rows.ptr.dtype.element_ty)

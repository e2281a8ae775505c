"""Nearly flat rows read again, for what is a difference to the uniform distribution: TV and KL(u || p).

Of x_k = (f_k - level) / T - shift, where the level is that of p = 1/C, and shift what float32 rounds away of it,
p_k - 1/C = expm1(x_k) / C and KL(u || p) = mean(e^x_k - 1 - x_k), in which nothing cancels.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastood.kernels.triton.device.formulas import FLAT_KL, FLAT_KL_SHARE, FLAT_TV
from fastood.kernels.triton.device.words import LN2, elements, log, log2, within


class LevelSums(NamedTuple):
    """Of each row, with x = (f - level) / T - shift; what is not wanted stands for nothing."""

    expm1: Any  # mean of e^x - 1
    tail: Any  # mean of e^x - 1 - x
    above: Any  # mean of max(e^x - 1, 0)


@triton.jit
def kl_uniform(rest, mean_z, C):
    """log mean e^z - mean z, and which rows are so flat that this loses too much."""
    kl = log(1.0 + rest) - log(tl.zeros_like(rest) + C) - mean_z
    return kl, (kl < FLAT_KL) | (kl < mean_z * -FLAT_KL_SHARE)


@triton.jit
def has_flat_tv(deviation, rest):
    """Which rows are so flat that TV = deviation / (2 + 2 rest) loses too much."""
    return deviation < tl.fma(rest, 2 * FLAT_TV, 2 * FLAT_TV)


@triton.jit
def of_flat_rows(rows, f_max, scale, W: tl.constexpr, X: tl.constexpr, KL: tl.constexpr, TV: tl.constexpr):
    """KL(u || p) and TV, as wanted, by tiles of W words."""
    per_T = scale * LN2
    level, shift = f_max, tl.zeros_like(f_max)
    tail, above = shift, shift
    # Once from the maximum to the level, once to mend what was rounded on the way, and once for the sums at that level.
    for _ in range(3):
        sums = level_sums(rows, level, shift, per_T, W, X, KL, TV)
        tail, above = sums.tail, sums.above
        off = log1p_near(sums.expm1)
        before = level
        level += off / per_T
        shift = tl.fma(before - level, per_T, shift + off)
    return tail, above


@triton.jit
def level_sums(rows, level, shift, per_T, W: tl.constexpr, X: tl.constexpr, KL: tl.constexpr, TV: tl.constexpr):
    """The LevelSums, the last two as KL and TV say."""
    TILES: tl.constexpr = (X.columns + W * X.p - 1) // (W * X.p)
    w = tl.arange(0, W)[None, :]
    zero = tl.zeros([level.shape[0], W], tl.float64)
    expm1, tail, above = zero, zero, zero
    for i in range(TILES):
        xs = elements(rows, w + i * W, X)
        for j in tl.static_range(len(xs)):
            own = within(w + i * W, j, X)
            x = tl.fma(xs[j] - level[:, None], per_T, -shift[:, None])
            e = tl.exp2(x * (1 / LN2)) - 1.0
            near = tl.abs(x) < 1.0
            beyond = tl.where(near, exp_tail(x), e - x)
            rise = tl.where(own, tl.where(near, x + beyond, e), 0.0)
            expm1 += rise.to(tl.float64)
            if KL:
                tail += tl.where(own, beyond, 0.0).to(tl.float64)
            if TV:
                above += tl.maximum(rise, 0.0).to(tl.float64)
    expm1 = tl.sum(expm1, 1).to(tl.float32) / X.columns
    tail = tl.sum(tail, 1).to(tl.float32) / X.columns if KL else expm1
    above = tl.sum(above, 1).to(tl.float32) / X.columns if TV else expm1
    return LevelSums(expm1, tail, above)


@triton.jit
def exp_tail(x):
    """e^x - 1 - x for |x| <= 1; relative error of the polynomial 2^-25.7."""
    p = tl.fma(x, 2.806280235745362e-06, 2.535851308493875e-05)
    p = tl.fma(p, x, 0.00019838102161884308)
    p = tl.fma(p, x, 0.001388539676554501)
    p = tl.fma(p, x, 0.008333339355885983)
    p = tl.fma(p, x, 0.04166673496365547)
    p = tl.fma(p, x, 0.1666666716337204)
    return tl.fma(p, x, 0.5) * x * x


@triton.jit
def log1p_near(x):
    """log(1 + x), to relative precision near 0: the series of 2 artanh(x / (2 + x))."""
    s = x / (2.0 + x)
    q = s * s
    series = (s + s) * tl.fma(tl.fma(tl.fma(q, 1.0 / 7, 1.0 / 5), q, 1.0 / 3), q, 1.0)
    return tl.where(tl.abs(x) < 0.25, series, log2(1.0 + x) * LN2)


@triton.jit
def mean_z_again(rows, f_max, scale, W: tl.constexpr, X: tl.constexpr):
    """mean z, summed in float64, of rows in which the sum, or one of its terms, is beyond float32."""
    TILES: tl.constexpr = (X.columns + W * X.p - 1) // (W * X.p)
    w = tl.arange(0, W)[None, :]
    slot = tl.zeros([f_max.shape[0], W], tl.float64)
    wide_max, wide_scale = f_max[:, None].to(tl.float64), tl.zeros([1, 1], tl.float64) + scale
    for i in range(TILES):
        xs = elements(rows, w + i * W, X)
        for j in tl.static_range(len(xs)):
            own = within(w + i * W, j, X)
            slot += tl.where(own, (xs[j].to(tl.float64) - wide_max) * wide_scale, 0.0)
    return tl.sum(slot, 1) * (LN2 / X.columns)

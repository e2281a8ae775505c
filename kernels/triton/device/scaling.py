"""SCALE and its kin: a factor from how much of a row of features its largest make up, the energy of logits times it.

Two launches: the factors, then the energies. Rows are held in registers, as gen.py holds them, whose search finds the
k-th largest feature.
"""

import triton
import triton.language as tl

from fastood.kernels.triton.device.formulas import formula
from fastood.kernels.triton.device.gen import selected
from fastood.kernels.triton.device.sweep import collected, load_elements, masked, row_total, rows_of_program
from fastood.kernels.triton.device.words import INF, LN2, exp2_double, larger, load_table, log, row_max
from fastood.kernels.triton.shapes import STATS

ENERGY = tl.constexpr(STATS["energy"])
HUGE = tl.constexpr(2.0**64)  # rows of features from here on are divided by it


@triton.jit(do_not_specialize=["h_stride", "N", "K"])
def factors(
    h_ptr, h_stride, out_ptr, N, K, RELU: tl.constexpr, SQUARE: tl.constexpr, S: tl.constexpr, SELECT: tl.constexpr,
    SHIFT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[N] float64: e^t or t^2, t = sum h / sum of the K largest h, 1 where both are 0; NaN where one is not finite.
    h_stride counts groups of S.vec elements. S: a Sweep of shapes.py. SELECT: K is less than the number of features.
    """
    W: tl.constexpr = S.w
    TILES: tl.constexpr = S.tiles
    place, row = rows_of_program(N, ROWS)
    lane = tl.arange(0, W)[None, :]
    h = h_ptr + row * h_stride * S.vec
    zero = tl.full([ROWS, W], -0.0, tl.float32)  # to which a compiler adds without an instruction
    vs = ()
    high, most = zero - INF, zero  # the largest h, and |h| of what is in the row
    for i in tl.static_range(TILES):
        v = load_elements(h, i * W + lane, -INF, (i + 1) * W <= S.columns, S)
        there = masked(v, i * W + lane, (i + 1) * W <= S.columns, S)
        most = larger(most, tl.abs(there))
        v = tl.maximum(v, 0.0) if RELU else v
        high = tl.maximum(high, v)
        vs = vs + (v,)
    h_max, most = row_max(high)[:, None], row_max(most)[:, None]
    valid = most < INF
    unit = tl.where((h_max if RELU else most) < HUGE, 1.0, 1.0 / HUGE)  # in which no sum leaves float32
    scaled = ()
    sums, slot = zero, zero
    for i in tl.static_range(TILES):
        scaled = scaled + (vs[i] * unit,)
        slot += masked(scaled[i], i * W + lane, (i + 1) * W <= S.columns, S)
        sums, slot = collected(sums, slot, i, TILES)
    total = row_total(sums, S.each)
    largest = total
    if SELECT:
        threshold, number, next = selected(scaled, h_max * unit, valid, K, SHIFT)
        sums, slot = zero, zero
        for i in tl.static_range(TILES):
            slot += tl.where(scaled[i] >= threshold, scaled[i], 0.0)
            sums, slot = collected(sums, slot, i, TILES)
        largest = row_total(sums, S.each)
        largest += tl.where(number < K, (K - number).to(tl.float64) * next.to(tl.float64), 0.0)
    t = tl.where((total == 0.0) & (largest == 0.0), 1.0, total / largest)
    r = t * t if SQUARE else exp2_double(t * tl.full(t.shape, 1.0 / LN2, tl.float64))
    tl.store(out_ptr + place, tl.where(valid, r, float("nan")), mask=place < N)


@triton.jit(do_not_specialize=["f_stride", "N"])
def energies(
    f_ptr, f_stride, bias_ptr, factor_ptr, table_ptr, out_ptr, N, S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[N] float32: the energy of r (f - bias) + bias; NaN where r is or f has no softmax. f_stride counts groups
    of S.vec elements; bias: [C] float32, or None for 0; table: log2(e) / T, T."""
    W: tl.constexpr = S.w
    TILES: tl.constexpr = S.tiles
    place, row = rows_of_program(N, ROWS)
    lane = tl.arange(0, W)[None, :]
    f = f_ptr + row * f_stride * S.vec
    r = tl.load(factor_ptr + row).to(tl.float32)
    zero = tl.full([ROWS, W], -0.0, tl.float32)
    vs = ()
    high, most = zero - INF, zero - INF  # of what is scaled, and of logits
    for i in tl.static_range(TILES):
        k = i * W + lane
        v = load_elements(f, k, -INF, (i + 1) * W <= S.columns, S)
        x = v * r
        if bias_ptr is not None:
            b = load_table(bias_ptr + k, k < S.columns, 0.0)
            x = tl.fma(v - b, r, b)
        x = tl.where(v == -INF, v, x)
        high = larger(high, x)
        most = tl.maximum(most, v)
        vs = vs + (x,)
    largest, f_max = row_max(high)[:, None], row_max(most)[:, None]
    good = (tl.abs(f_max) < INF) & (r == r)
    pivot = tl.where(tl.abs(largest) < INF, largest, 0.0)
    narrow = load_table(table_ptr).to(tl.float32)
    sums, slot = zero, zero
    for i in tl.static_range(TILES):
        # Half of each, so that differences stay in float32.
        slot += tl.exp2(tl.fma(vs[i], 0.5, pivot * -0.5) * (narrow * 2.0))
        sums, slot = collected(sums, slot, i, TILES)
    log_sum = log(row_total(sums, S.each).to(tl.float32))
    energy = formula(ENERGY, fmax=largest.to(tl.float64), T=load_table(table_ptr + 1), log_sum=log_sum)
    tl.store(out_ptr + place, tl.where(good, energy, float("nan")).to(tl.float32), mask=place < N)

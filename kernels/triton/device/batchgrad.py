"""The kernels of BatchGrad (Eq. 6), which arithmetic bounds, not memory.

A class of probability p adds for each feature h, with turn = p - 1/2 and pull = p (1 - p) / T,

    (1 - p) |G - p h / T| + p |G + (1 - p) h / T| = max(|G|, |2 turn G + 2 pull h|):

a multiplication, a fused multiply-add, a maximum and an addition. Where h >= 0, as after a ReLU, the second is never
below -|G|, and max(a, b) = (a + b) / 2 + |a - b| / 2 leaves |turn G + pull h - |G| / 2|, two fused multiply-adds and
an addition, beside what is linear in G and h and so summed ahead. Rows, FEATS features at a time, choose between the
two by their own signs: a row's bits do not depend on its neighbours, only a program's time does.

A thread holds rows, and an element of G is one number for all of them. A program sums CLASSES classes over FEATS
features of ROWS rows; classes are fastest in the grid, so that its neighbours find the features in the cache. p is
formed from the logits where it is used: it costs a few instructions for FEATS features, and [N, C] is never built.
Classes that hardly matter are not skipped, as on a CPU: they would have to be so for every row of a program, on which
a row's bits would then depend.
"""

import triton
import triton.language as tl

from fastood.kernels.triton.device.words import INF

STEP = tl.constexpr(8)  # features of a turn of the loop
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit(do_not_specialize=["h_ptr", "h_stride", "N", "D", "feat_blocks"])
def turned(h_ptr, h_stride, x_ptr, sum_ptr, N, D, feat_blocks, BIAS: tl.constexpr, ROWS: tl.constexpr,
           FEATS: tl.constexpr, SOME: tl.constexpr):  # fmt: skip
    """SOME rows of FEATS features of [h; 1] (h without BIAS) to x [row blocks, features, ROWS], 0 beyond both ends.

    sum [feature blocks, rows]: NaN or infinity where a feature is, else -1 where one is negative, else their sum.
    """
    n = tl.program_id(0) * SOME + tl.arange(0, SOME)
    block = tl.program_id(1)
    d = block * FEATS + tl.arange(0, FEATS)[None, :]
    row = n.to(tl.int64)[:, None]
    h = tl.load(h_ptr + row * h_stride + d, mask=(n < N)[:, None] & (d < D), other=0.0).to(tl.float32)
    if BIAS:
        h = tl.where(d == D, 1.0, h)
    tl.store(x_ptr + ((row // ROWS) * feat_blocks * FEATS + d) * ROWS + row % ROWS, h)
    total = tl.sum(tl.abs(h).to(tl.float64), 1)
    signed = (tl.min(h, 1) < 0.0) & (total < INF) | (total > LARGEST) & (total < INF)
    rows = tl.num_programs(0) * SOME
    tl.store(sum_ptr + block.to(tl.int64) * rows + n, tl.where(signed, -1.0, total.to(tl.float32)))


@triton.jit
def halves(u):
    """The two numbers of a 64-bit load."""
    low = (u & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    return low, (u >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def summed(x_ptr, g_ptr, steps, turns, pulls, SIGNED: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr):
    """For each class and row: sum |turn G + pull h - |G| / 2|, or if SIGNED of max(|G|, |turn G + pull h|)."""
    sums = ()
    for _ in tl.static_range(CLASSES):
        sums = sums + (tl.zeros([ROWS], tl.float32),)
    for step in range(steps):  # pointers that are carried along would take a move for each load
        x = x_ptr + step * (STEP * ROWS)
        pairs = g_ptr + step * (STEP * CLASSES // 2)
        hs = ()
        for i in tl.static_range(STEP):
            hs = hs + (tl.load(x + i * ROWS),)
        for i in tl.static_range(0, STEP, 4):
            terms = ()
            for j in tl.static_range(4):
                row = ()
                for k in tl.static_range(CLASSES // 2):
                    pair = halves(tl.load(pairs + ((i + j) * CLASSES // 2 + k)))
                    for l in tl.static_range(2):  # noqa: E741
                        g = pair[l]
                        if SIGNED:
                            y = tl.fma(pulls[2 * k + l], hs[i + j], turns[2 * k + l] * g)
                            row = row + (tl.maximum(tl.abs(y), tl.abs(g)),)
                        else:
                            y = tl.fma(turns[2 * k + l], g, -0.5 * tl.abs(g))
                            row = row + (tl.abs(tl.fma(pulls[2 * k + l], hs[i + j], y)),)
                terms = terms + (row,)
            more = ()
            for k in tl.static_range(CLASSES):  # four at a time: the long sum then has few terms
                more = more + (sums[k] + ((terms[0][k] + terms[1][k]) + (terms[2][k] + terms[3][k])),)
            sums = more
    total = sums[0]
    for k in tl.static_range(1, CLASSES):
        total += sums[k]
    return total


@triton.jit(do_not_specialize=["f_ptr", "f_stride", "N", "C", "steps", "row_blocks", "class_blocks", "feat_blocks"])
def partial_sums(
    f_ptr, f_stride, stats_ptr, scale, inverse, x_ptr, sum_ptr, g_ptr, g_sums_ptr, part_ptr, N, C, steps, row_blocks,
    class_blocks, feat_blocks, ROWS: tl.constexpr, CLASSES: tl.constexpr, FEATS: tl.constexpr,
):  # fmt: skip
    """What CLASSES classes and FEATS features add to BatchGrad, to part [feature blocks, class blocks, rows].

    stats [3, N]: max f, max p, 1 - max p; scale, inverse: log2(e) / T, 1 / T; g [class blocks, features, CLASSES];
    g_sums [class blocks, feature blocks, CLASSES, 2]: sums of max(G, 0) and of max(-G, 0).
    """
    class_block = tl.program_id(0) % class_blocks
    outer = tl.program_id(0) // class_blocks
    feat_block = outer % feat_blocks
    row_block = outer // feat_blocks
    lane = tl.arange(0, ROWS)
    n = row_block * ROWS + lane
    given = n < N
    m = tl.load(stats_ptr + n, mask=given, other=0.0).to(tl.float32)
    p_max = tl.load(stats_ptr + N + n, mask=given, other=0.0).to(tl.float32)
    not_p_max = tl.load(stats_ptr + 2 * N + n, mask=given, other=0.0).to(tl.float32)
    sum = tl.load(sum_ptr + (feat_block * row_blocks + row_block).to(tl.int64) * ROWS + lane)
    f_ptr += n.to(tl.int64) * f_stride + class_block * CLASSES
    block = class_block.to(tl.int64) * feat_blocks + feat_block
    g_sums_ptr += block * (2 * CLASSES)
    turns, pulls = (), ()
    linear = tl.zeros([ROWS], tl.float32)
    for k in tl.static_range(CLASSES):
        f = tl.load(f_ptr + k, mask=given & (class_block * CLASSES + k < C), other=-INF).to(tl.float32)
        e = tl.exp2((f - m) * scale)
        p = e * p_max
        not_p = tl.where(e == 1.0, not_p_max, tl.fma(-e, p_max, 1.0))
        turns = turns + (tl.fma(e, p_max, -0.5),)
        pulls = pulls + (p * not_p * inverse,)
        linear += tl.fma(pulls[k], sum, tl.fma(p, tl.load(g_sums_ptr + 2 * k), not_p * tl.load(g_sums_ptr + 2 * k + 1)))

    x_ptr += (row_block.to(tl.int64) * feat_blocks + feat_block) * (FEATS * ROWS) + lane
    g_ptr = (g_ptr + block * (FEATS * CLASSES)).to(tl.pointer_type(tl.uint64))
    steps = tl.minimum(steps - feat_block * (FEATS // STEP), FEATS // STEP)
    # Of a row that is not good p is NaN, which a maximum would lose and the sums of the others hand on.
    good = m == m
    signed = good & (sum < 0.0)
    infinite = good & (sum == INF)  # though a class may add 0 times it
    plain = ~(signed | infinite)
    total = tl.where(infinite, INF, tl.where(plain, linear, 0.0))
    if tl.max((given & plain).to(tl.int32), 0) > 0:
        total += tl.where(plain, summed(x_ptr, g_ptr, steps, turns, pulls, False, ROWS, CLASSES), 0.0)
    if tl.max((given & signed).to(tl.int32), 0) > 0:
        twice, pulls2 = (), ()
        for k in tl.static_range(CLASSES):
            twice = twice + (2.0 * turns[k],)
            pulls2 = pulls2 + (2.0 * pulls[k],)
        total += tl.where(signed, summed(x_ptr, g_ptr, steps, twice, pulls2, True, ROWS, CLASSES), 0.0)
    part = (feat_block * class_blocks + class_block).to(tl.int64) * row_blocks + row_block
    tl.store(part_ptr + part * ROWS + lane, total)


@triton.jit(do_not_specialize=["N", "rows", "parts"])
def merged(part_ptr, out_ptr, N, rows, parts, sign, SOME: tl.constexpr, PARTS: tl.constexpr):
    """`sign` times the sums over `parts` of part [parts, rows], in float64 and always in the same order."""
    n = tl.program_id(0) * SOME + tl.arange(0, SOME)[None, :]
    total = tl.zeros([PARTS, SOME], tl.float64)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        total += tl.load(part_ptr + part.to(tl.int64) * rows + n, mask=(part < parts) & (n < N), other=0.0)
    n = tl.program_id(0) * SOME + tl.arange(0, SOME)
    tl.store(out_ptr + n, sign * tl.sum(total, 0), mask=n < N)

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
def in_pairs(terms):
    """The sum of a tuple of tiles, each half of it ahead."""
    N: tl.constexpr = len(terms)
    if N == 1:
        return terms[0]
    else:
        return in_pairs(terms[: N // 2]) + in_pairs(terms[N // 2 :])


@triton.jit
def any_row(flags):
    found = flags[0].to(tl.int32)
    for i in tl.static_range(1, len(flags)):
        found |= flags[i].to(tl.int32)
    return tl.max(tl.max(found, 1), 0) > 0


@triton.jit
def loaded(x, pairs, STEP: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr, ORDER: tl.constexpr):
    hs, gs = (), ()
    for i in tl.static_range(STEP):
        for group in tl.static_range(GROUPS):
            hs = hs + (tl.load(x + (i * GROUPS + group) * 128),)
    for i in tl.static_range(STEP):
        for k in tl.static_range(CLASSES // 2):
            gs = gs + (tl.load(pairs + (i * ORDER + k)),)
    return hs, gs


@triton.jit
def of_step(
    hs, gs, turns, pulls, SIGNED: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr
):
    out = ()
    for _ in tl.static_range(GROUPS):
        out = out + ((),)
    for i in tl.static_range(STEP):
        g, c = (), ()
        for k in tl.static_range(CLASSES // 2):
            pair = halves(gs[i * (CLASSES // 2) + k])
            g = g + (pair[0][:, None], pair[1][:, None])
            if SIGNED:
                c = c + (tl.abs(pair[0])[:, None], tl.abs(pair[1])[:, None])
            else:
                c = c + ((-0.5 * tl.abs(pair[0]))[:, None], (-0.5 * tl.abs(pair[1]))[:, None])
        more = ()
        for group in tl.static_range(GROUPS):
            h = hs[i * GROUPS + group]
            terms = ()
            for k in tl.static_range(CLASSES):
                turn = turns[group * CLASSES + k]
                pull = pulls[group * CLASSES + k]
                gk, ck, _ = tl.broadcast(g[k], h)[0], tl.broadcast(c[k], h)[0], 0
                if SIGNED:
                    terms = terms + (tl.maximum(tl.abs(tl.fma(pull, h, turn * gk)), ck),)
                else:
                    terms = terms + (tl.abs(tl.fma(pull, h, tl.fma(turn, gk, ck))),)
            more = more + (out[group] + (in_pairs(terms),),)
        out = more
    totals = ()
    for _ in tl.static_range(GROUPS):
        totals = totals + (in_pairs(out[group]),)
    return totals


@triton.jit
def added(a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def summed(x_ptr, g_ptr, steps, turns, pulls, SIGNED: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr,
           ORDER: tl.constexpr, STEP: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """For each row, over classes and features: sum |turn G + pull h - |G| / 2|; SIGNED max(|G|, |turn G + pull h|)."""
    totals = ()
    for _ in tl.static_range(GROUPS):
        totals = totals + (tl.zeros_like(turns[0]),)
    if AHEAD:
        hs, gs = loaded(x_ptr, g_ptr, STEP, GROUPS, CLASSES, ORDER)
        for step in range(1, steps + 1):
            at = tl.minimum(step, steps - 1)
            next_hs, next_gs = loaded(
                x_ptr + at * (STEP * GROUPS * 128), g_ptr + at * (STEP * ORDER), STEP, GROUPS, CLASSES, ORDER
            )
            totals = added(totals, of_step(hs, gs, turns, pulls, SIGNED, STEP, GROUPS, CLASSES))
            hs, gs = next_hs, next_gs
    else:
        for step in range(steps):  # pointers that are carried along would take a move for each load
            hs, gs = loaded(
                x_ptr + step * (STEP * GROUPS * 128), g_ptr + step * (STEP * ORDER), STEP, GROUPS, CLASSES, ORDER
            )
            totals = added(totals, of_step(hs, gs, turns, pulls, SIGNED, STEP, GROUPS, CLASSES))
    return totals


@triton.jit(do_not_specialize=["f_ptr", "f_stride", "N", "C", "steps", "row_blocks", "class_blocks", "feat_blocks"])
def partial_sums(
    f_ptr, f_stride, stats_ptr, scale, inverse, x_ptr, sum_ptr, g_ptr, g_sums_ptr, part_ptr, N, C, steps, row_blocks,
    class_blocks, feat_blocks, ROWS: tl.constexpr, CLASSES: tl.constexpr, FEATS: tl.constexpr,
    STEP: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What CLASSES classes and FEATS features add to BatchGrad, to part [feature blocks, class blocks, rows].

    stats [3, N]: max f, max p, 1 - max p; scale, inverse: log2(e) / T, 1 / T; g [class blocks, features, CLASSES];
    g_sums [class blocks, feature blocks, CLASSES, 2]: sums of max(G, 0) and of max(-G, 0).
    """
    GROUPS: tl.constexpr = ROWS // 128
    OWN: tl.constexpr = CLASSES // WARPS
    class_block = tl.program_id(0) % class_blocks
    outer = tl.program_id(0) // class_blocks
    feat_block = outer % feat_blocks
    row_block = outer // feat_blocks
    thread = tl.arange(0, 32 * WARPS)
    first = thread // 32 * OWN  # of a warp's classes
    lane = (thread % 32 * 4)[:, None] + tl.arange(0, 4)[None, :]
    block = class_block.to(tl.int64) * feat_blocks + feat_block
    g_sums_ptr += block * (2 * CLASSES)
    turns, pulls, plains, signeds, totals = (), (), (), (), ()
    for group in tl.static_range(GROUPS):
        n = row_block * ROWS + group * 128 + lane
        given = n < N
        m = tl.load(stats_ptr + n, mask=given, other=0.0).to(tl.float32)
        p_max = tl.load(stats_ptr + N + n, mask=given, other=0.0).to(tl.float32)
        not_p_max = tl.load(stats_ptr + 2 * N + n, mask=given, other=0.0).to(tl.float32)
        sum = tl.load(sum_ptr + (feat_block * row_blocks + row_block).to(tl.int64) * ROWS + (group * 128 + lane))
        logits = f_ptr + n.to(tl.int64) * f_stride + (class_block * CLASSES + first)[:, None]
        linear = tl.zeros_like(m)
        for k in tl.static_range(OWN):
            inside = class_block * CLASSES + first + k < C
            f = tl.load(logits + k, mask=given & inside[:, None], other=-INF).to(tl.float32)
            e = tl.exp2((f - m) * scale)
            p = e * p_max
            not_p = tl.where(e == 1.0, not_p_max, tl.fma(-e, p_max, 1.0))
            pull = p * not_p * inverse
            turns = turns + (tl.fma(e, p_max, -0.5),)
            pulls = pulls + (pull,)
            above = tl.load(g_sums_ptr + 2 * (first + k))[:, None]
            below = tl.load(g_sums_ptr + 2 * (first + k) + 1)[:, None]
            linear += pull * sum + (p * above + not_p * below)
        # Of a row that is not good p is NaN, which a maximum would lose and the sums of the others hand on.
        good = m == m
        signed = good & (sum < 0.0)
        infinite = good & (sum == INF)  # though a class may add 0 times it
        plain = ~(signed | infinite)
        totals = totals + (tl.where(infinite, INF, tl.where(plain, linear, 0.0)),)
        plains = plains + (plain,)
        signeds = signeds + (signed & given,)

    x_ptr += (row_block.to(tl.int64) * feat_blocks + feat_block) * (FEATS * ROWS) + lane
    g_ptr = (g_ptr + block * (FEATS * CLASSES)).to(tl.pointer_type(tl.uint64)) + first // 2
    steps = tl.minimum(steps - feat_block * (FEATS // STEP), FEATS // STEP)
    if any_row(plains):
        more = summed(x_ptr, g_ptr, steps, turns, pulls, False, GROUPS, OWN, CLASSES // 2, STEP, AHEAD)
        new = ()
        for group in tl.static_range(GROUPS):
            new = new + (totals[group] + tl.where(plains[group], more[group], 0.0),)
        totals = new
    if any_row(signeds):
        twice, pulls2 = (), ()
        for k in tl.static_range(GROUPS * OWN):
            twice = twice + (2.0 * turns[k],)
            pulls2 = pulls2 + (2.0 * pulls[k],)
        more = summed(x_ptr, g_ptr, steps, twice, pulls2, True, GROUPS, OWN, CLASSES // 2, STEP, AHEAD)
        new = ()
        for group in tl.static_range(GROUPS):
            new = new + (totals[group] + tl.where(signeds[group], more[group], 0.0),)
        totals = new
    part = (feat_block * class_blocks + class_block).to(tl.int64) * row_blocks + row_block
    for group in tl.static_range(GROUPS):
        if WARPS == 1:
            tl.store(part_ptr + part * ROWS + (group * 128 + lane), totals[group])
        else:
            total = tl.sum(tl.reshape(totals[group], [WARPS, 128]), 0)
            tl.store(part_ptr + part * ROWS + group * 128 + tl.arange(0, 128), total)


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

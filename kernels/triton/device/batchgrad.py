"""The kernels of BatchGrad (Eq. 6), which arithmetic bounds, not memory.

A class of probability p adds for each feature h, with turn = 2p - 1 and pull = 2p (1 - p) / T,

    (1 - p) |G - p h / T| + p |G + (1 - p) h / T| = max(|G|, |turn G + pull h|):

a multiplication, a fused multiply-add, a maximum and an addition. Where h >= 0, as after a ReLU, turn G + pull h is
never below -|G|, and max(a, b) = (a + b) / 2 + |a - b| / 2 leaves |turn G + pull h - |G|| / 2, two fused multiply-adds
and an addition with turn / 2 and pull / 2, beside what is linear in G and h and so summed ahead. Rows, FEATS features
at a time, choose between the two by their own signs: a row's bits do not depend on its neighbours, only a program's
time does.

A thread holds rows, and an element of G is one number for all of them. A program sums what B says: see Blocks in
shapes.py. Its warps share the rows and divide the classes, so that one of them brings the features that the others
find in the cache; classes are fastest in the grid for the same reason. Terms of all classes of a warp meet in one sum a
row, which leaves registers for enough warps to wait for memory in turn. p is formed from the logits where it is used:
it costs a few instructions for B.feats features, and [N, C] is never built.
Classes that hardly matter are not skipped, as on a CPU: they would have to be so for every row of a program, on which
a row's bits would then depend.
"""

import triton
import triton.language as tl

from fastood.kernels.triton.device.words import INF, LARGEST_FLOAT, in_full


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
    h = in_full(tl.load(h_ptr + row * h_stride + d, mask=(n < N)[:, None] & (d < D), other=0.0))
    if BIAS:
        h = tl.where(d == D, 1.0, h)
    tl.store(x_ptr + ((row // ROWS) * feat_blocks * FEATS + d) * ROWS + row % ROWS, h)
    size = tl.abs(h).to(tl.float64)
    total = tl.sum(tl.where(h < 0.0, size + 2.0**200, size), 1)  # beyond float32, as a sum that is too large
    signed = (total > LARGEST_FLOAT) & (total < INF)
    rows = tl.num_programs(0) * SOME
    tl.store(sum_ptr + block.to(tl.int64) * rows + n, tl.where(signed, -1.0, total.to(tl.float32)))


@triton.jit
def pair_of(u):
    """The two float32 of a 64-bit load."""
    low = (u & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
    return low, (u >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def in_pairs(terms):
    """The sum of a tuple of tiles, by pairs, and pairs of pairs."""
    N: tl.constexpr = len(terms)
    if N == 1:
        return terms[0]
    else:
        return in_pairs(terms[: N // 2]) + in_pairs(terms[N // 2 :])


@triton.jit
def any_of(flags):
    found = flags[0]
    for i in tl.static_range(1, len(flags)):
        found |= flags[i]
    return tl.max(tl.max(found.to(tl.int32), 1), 0) > 0


@triton.jit
def add_where(flags, a, b):
    """Of tuples of tiles, a + b where the flag is set, else a."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] + tl.where(flags[i], b[i], 0.0),)
    return out


@triton.jit
def summed(x_ptr, g_ptr, steps, turns, pulls, SIGNED: tl.constexpr, B: tl.constexpr):
    """For each tile of rows: sum |turn G + pull h - |G| / 2|, turn and pull being halved ones; or if SIGNED, where they
    are whole, sum max(|G|, |turn G + pull h|)."""
    TILE: tl.constexpr = 32 * B.each
    TILES: tl.constexpr = B.tiles
    OWN: tl.constexpr = B.own
    STEP: tl.constexpr = B.step
    totals = ()
    for _ in tl.static_range(TILES):
        totals = totals + (tl.zeros_like(turns[0]),)
    for step in range(steps):  # pointers that are carried along would take a move for each load
        x = x_ptr + step * (STEP * TILES * TILE)
        pairs = g_ptr + step * (STEP * B.classes // 2)
        hs, gs = (), ()
        for i in tl.static_range(STEP * TILES):
            hs = hs + (tl.load(x + i * TILE),)
        for i in tl.static_range(STEP):
            for k in tl.static_range(OWN // 2):
                pair = pair_of(tl.load(pairs + (i * B.classes // 2 + k)))
                gs = gs + (pair[0][:, None], pair[1][:, None])
        more = ()
        for t in tl.static_range(TILES):
            of_feats = ()
            for i in tl.static_range(STEP):
                terms = ()
                for k in tl.static_range(OWN):
                    h, g, turn, pull = hs[i * TILES + t], gs[i * OWN + k], turns[t * OWN + k], pulls[t * OWN + k]
                    if SIGNED:
                        terms = terms + (tl.maximum(tl.abs(tl.fma(pull, h, turn * g)), tl.abs(g)),)
                    else:
                        less = tl.broadcast_to(-0.5 * tl.abs(g), h.shape)
                        y = tl.fma(turn, tl.broadcast_to(g, h.shape), less)
                        terms = terms + (tl.abs(tl.fma(pull, h, y)),)
                of_feats = of_feats + (in_pairs(terms),)
            more = more + (totals[t] + in_pairs(of_feats),)  # the long sum has few terms
        totals = more
    return totals


@triton.jit(do_not_specialize=["f_ptr", "f_stride", "N", "C", "steps", "row_blocks", "class_blocks", "feat_blocks"])
def partial_sums(
    f_ptr, f_stride, stats_ptr, scale, inverse, x_ptr, sum_ptr, g_ptr, g_sums_ptr, part_ptr, N, C, steps, row_blocks,
    class_blocks, feat_blocks, B: tl.constexpr,
):  # fmt: skip
    """What a block of classes and one of features add to BatchGrad, to part [feature blocks, class blocks, rows].

    stats [3, N]: max f, max p, 1 - max p; scale, inverse: log2(e) / T, 1 / T; g [class blocks, features, B.classes];
    g_sums [class blocks, feature blocks, B.classes, 2]: sums of max(G, 0) and of max(-G, 0).
    """
    EACH: tl.constexpr = B.each
    TILE: tl.constexpr = 32 * EACH
    TILES: tl.constexpr = B.tiles
    OWN: tl.constexpr = B.own
    WARPS: tl.constexpr = B.warps
    class_block = tl.program_id(0) % class_blocks
    outer = tl.program_id(0) // class_blocks
    feat_block = outer % feat_blocks
    row_block = outer // feat_blocks
    thread = tl.arange(0, 32 * WARPS)
    own = thread // 32 * OWN
    lane = (thread % 32 * EACH)[:, None] + tl.arange(0, EACH)[None, :]
    block = class_block.to(tl.int64) * feat_blocks + feat_block
    g_sums_ptr += block * (2 * B.classes) + 2 * own
    sum_ptr += (feat_block * row_blocks + row_block).to(tl.int64) * B.rows
    half_turns, half_pulls, plains, signeds, totals = (), (), (), (), ()
    for t in tl.static_range(TILES):
        n = row_block * B.rows + t * TILE + lane
        given = n < N
        f_max = tl.load(stats_ptr + n, mask=given, other=0.0).to(tl.float32)
        p_max = tl.load(stats_ptr + N + n, mask=given, other=0.0).to(tl.float32)
        one_minus_p_max = tl.load(stats_ptr + 2 * N + n, mask=given, other=0.0).to(tl.float32)
        sum = tl.load(sum_ptr + (t * TILE + lane))
        logits = f_ptr + n.to(tl.int64) * f_stride + (class_block * B.classes + own)[:, None]
        linear = tl.zeros_like(f_max)
        for k in tl.static_range(OWN):
            inside = (class_block * B.classes + own + k < C)[:, None]
            f = in_full(tl.load(logits + k, mask=given & inside, other=-INF))
            e = tl.exp2((f - f_max) * scale)
            p = e * p_max
            one_minus_p = tl.where(e == 1.0, one_minus_p_max, tl.fma(-e, p_max, 1.0))
            half_pull = p * one_minus_p * inverse
            positive, negative = tl.load(g_sums_ptr + 2 * k)[:, None], tl.load(g_sums_ptr + 2 * k + 1)[:, None]
            of_g = tl.fma(p, tl.broadcast_to(positive, p.shape), one_minus_p * negative)
            linear += tl.fma(half_pull, sum, of_g)
            half_turns, half_pulls = half_turns + (tl.fma(e, p_max, -0.5),), half_pulls + (half_pull,)
        # A row that is not good has p = NaN, which a maximum of two would lose: it is summed as if it were plain.
        good = f_max == f_max
        signed = good & (sum < 0.0)
        # Of features, or of the sums of G that are beyond float32: though a class may add 0 times those.
        infinite = good & ((sum == INF) | ((linear != linear) & (sum == sum)))
        plain = ~(signed | infinite)
        totals = totals + (tl.where(infinite, INF, tl.where(plain, linear, 0.0)),)
        plains, signeds = plains + (given & plain,), signeds + (given & signed,)

    x_ptr += (row_block.to(tl.int64) * feat_blocks + feat_block) * (B.feats * B.rows) + lane
    g_ptr = (g_ptr + block * (B.feats * B.classes)).to(tl.pointer_type(tl.uint64)) + own // 2
    steps = tl.minimum(steps - feat_block * (B.feats // B.step), B.feats // B.step)
    if any_of(plains):
        more = summed(x_ptr, g_ptr, steps, half_turns, half_pulls, False, B)
        totals = add_where(plains, totals, more)
    if any_of(signeds):
        turns, pulls = (), ()
        for k in tl.static_range(TILES * OWN):
            turns, pulls = turns + (2.0 * half_turns[k],), pulls + (2.0 * half_pulls[k],)
        more = summed(x_ptr, g_ptr, steps, turns, pulls, True, B)
        totals = add_where(signeds, totals, more)
    part = (feat_block * class_blocks + class_block).to(tl.int64) * row_blocks + row_block
    part_ptr += part * B.rows + tl.arange(0, TILE)
    for t in tl.static_range(TILES):
        tl.store(part_ptr + t * TILE, tl.sum(tl.reshape(totals[t], [WARPS, TILE]), 0))


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

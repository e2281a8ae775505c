"""How a call becomes launches: which sums it needs, and the shapes of programs. Plain Python, no Triton.

Nothing here looks at the number of rows, but for BatchGrad of few, whose sums are the same: a row is summed in the same
order whatever batch it is in, and a varying batch compiles nothing else. One variant of a kernel is compiled for each
set of: types, C, D, whether rows begin at 16-byte boundaries, sums, orders, number of scores, and type of the result.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fastood.kernels.contract import NO_NORM, ONE, Column, Request
from fastood.kernels.statistics import FORMULAS, KL, PLOGP, SUMLOGP, TABLE

# ---- launch shapes

# Most classes -> rows a program, warps. Rows share a warp's shuffles, and what finishes a row counts less the more
# logits a thread has: up to 64 stay in registers, so that more warps have a place, and 128 of longer rows.
ROWS = {
    16: (256, 4),
    128: (16, 1),
    256: (8, 1),
    512: (4, 1),
    1024: (2, 1),
    2048: (2, 1),
    4096: (1, 1),
    8192: (1, 2),
    16384: (1, 4),
    24576: (1, 8),
}
ROWS_WITH_FEATS = {**ROWS, 16: (8, 1), 128: (8, 1)}
ROWS_OF_FEATS = {1024: (8, 1), 2048: (4, 1), 4096: (2, 1), 8192: (1, 1), 16384: (1, 2)}  # features alone
LONG_ROWS = (1, 4)  # of features, beyond that table
# Of logits beyond ROWS, by their bytes: warps of the program that reads a row in tiles of 16 bytes a thread, or where
# rows begin anywhere of an element a thread; and how many of either are in flight.
STREAM = {2: (8, 8, 32), 4: (16, 8, 24)}
REGISTERS = 1 << 16  # of a multiprocessor: said, or else the compiler spills some of a long row for a second program
SHARED_ROW = 1 << 18  # bytes of a row of which two a multiprocessor leave the caches something for the second sweep
TILES = 4  # of features in flight, 16 bytes a thread
FEW = 8  # columns, each of which is compiled by itself; more are looked up in a table
BLOCK = 64  # columns that are looked up at a time
NORMS_OF_WARP = 128  # that are finished at a time: four a thread, more would take most registers


# Kernels have these as constants: NamedTuples of numbers, of tuples of those, or of tuples of such tuples. From a
# constant that is a plain tuple Triton 3.7 takes no element that has tuples in it; of a NamedTuple Triton 3.9 keeps the
# fields, but neither properties nor methods.


class Tile(NamedTuple):
    """How a matrix of so many columns is read. The kernels have it as X or H."""

    columns: int
    vec: int  # elements of a load
    p: int  # elements of a word
    shifted: bool  # whether rows begin anywhere, off groups of vec
    w: int  # words of a tile
    words: int  # of a load
    tiles: int  # of a row
    fold: int  # words beside each other that a thread has of a tile: of one load where rows are aligned

    @classmethod
    def of(cls, columns: int, vec: int, p: int, shifted: bool, w: int) -> Tile:
        tiles = math.ceil(columns / (w * p))
        fold = min(max(1, math.gcd(columns, 4 * p) // p), w)
        return cls(columns, vec, p, shifted, w, max(1, vec // p), tiles, fold)


class Shape(NamedTuple):
    """Rows a program, its warps, and the most registers that a thread may have, where the compiler takes too many
    or too few."""

    rows: int
    warps: int
    registers: int = 0

    @property
    def lanes(self) -> int:
        """Threads a row."""
        return max(1, 32 * self.warps // self.rows)

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told."""
        limit = self.registers and torch.version.hip is None  # which knows no such option
        return {"num_warps": self.warps} | ({"maxnreg": self.registers} if limit else {})


def launch_shape(C: int, D: int, itemsize: int, sums: int, block: int) -> Shape:
    """Of a call with C classes and D features, 0 for what it does not read. `itemsize`: of a logit; `sums`: of rows;
    `block`: columns that are looked up at a time, 0 of few."""
    if is_streamed(C):
        warps = STREAM[itemsize][0]
        two = itemsize * C <= SHARED_ROW and not D and not sums & (PLOGP | SUMLOGP | KL)  # with those it would spill
        return Shape(1, warps, REGISTERS // (32 * warps * (1 + two)) if itemsize == 4 else 0)
    table = ROWS_OF_FEATS if not C else ROWS_WITH_FEATS if D else ROWS
    shape = Shape(*next((shape for most, shape in table.items() if most >= (C or D)), LONG_ROWS))
    return shape._replace(rows=min(shape.rows, NORMS_OF_WARP * shape.warps // block)) if D and block else shape


def is_streamed(C: int) -> bool:
    """Whether a row of so many logits is read tile by tile, since no program's registers hold it."""
    return max(ROWS) < C


def streamed(C: int, tile: Tile, itemsize: int, lanes: int) -> tuple[Tile, int]:
    """How a long row is read that other kernels would read as `tile` says: its tiles, and how many are in flight.

    Where rows begin anywhere, element by element: then a thread has the same ones wherever that is.
    """
    _, tiles, elements = STREAM[itemsize]
    most = elements if tile.shifted else tiles
    if tile.shifted:
        tile = Tile.of(C, 1, 1, False, lanes)
    return tile, math.ceil(tile.tiles / math.ceil(tile.tiles / most))


def tile_of(columns: int, stride: int, offset: int, itemsize: int, lanes: int) -> Tile:
    """`offset`: elements from a 16-byte boundary to the first row; `lanes`: threads of a row."""
    most = 16 // itemsize
    p = 4 // itemsize
    if lanes == 1:  # a thread a row, which its neighbours' loads bring into the cache
        p = math.gcd(columns, stride, offset, p)
        return Tile.of(columns, p, p, False, 1)
    shifted = is_shifted(columns, stride, offset, itemsize)
    vec = most if shifted else math.gcd(columns, stride, offset, most)
    words = vec // p
    span = math.ceil((columns + (vec - 1 if shifted else 0)) / vec)
    return Tile.of(columns, vec, p, shifted, words * min(lanes, _power_of_2(span)))


def feats_tile(columns: int, stride: int, offset: int, itemsize: int, lanes: int) -> Tile:
    """The same of features, never shifted: what a thread has, and so how sums round, hangs on `columns` alone."""
    p = 4 // itemsize
    span = math.ceil(columns * itemsize / 16)
    return Tile.of(columns, math.gcd(columns, stride, offset, 4 * p), p, False, 4 * min(lanes, _power_of_2(span)))


def logits_tile(columns: int, stride: int, offset: int, itemsize: int, lanes: int) -> tuple[Tile, int]:
    """The same of logits, and of rows that are read tile by tile how many tiles are in flight, else 0.

    `w` hangs on `columns` and the lanes alone: wherever rows begin, sums are the same; of long rows and of halves of at
    most 16 classes in the same layout. Rows of odd length are read word by word, with whole lines a warp, and shifted
    are those of halves that may begin in the middle of a word.
    """
    if is_streamed(columns):
        return streamed(columns, tile_of(columns, stride, offset, itemsize, lanes), itemsize, lanes)
    if lanes == 1:
        return tile_of(columns, stride, offset, itemsize, lanes), 0
    most, p = 16 // itemsize, 4 // itemsize
    words = max(1, math.gcd(columns, most) // p)
    vec = max(p, math.gcd(columns, stride, offset, most))
    shifted = math.gcd(stride, offset, p) < p
    w = words * min(lanes, _power_of_2(math.ceil(columns / (words * p))))
    return Tile.of(columns, vec, p, shifted, w), 0


def is_shifted(columns: int, stride: int, offset: int, itemsize: int) -> bool:
    """Whether loads would be too narrow from where the rows begin; short rows waste nothing by narrower ones."""
    vec = math.gcd(columns, stride, offset, 16 // itemsize)
    return vec * itemsize < (8 if columns <= 128 else 16)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tiles_in_flight(tile: Tile) -> int:
    return max(1, min(TILES, tile.columns // (tile.w * tile.p)))


NOTHING = Tile.of(0, 1, 1, False, 1)


class Blocks(NamedTuple):
    """What a program of BatchGrad sums: so many features of so many classes and rows. The kernel has it as B."""

    rows: int
    classes: int
    feats: int
    step: int  # features that are loaded at a time
    warps: int  # all of the same rows
    own: int  # classes of a warp
    each: int  # rows of a tile that a thread has, beside each other
    tiles: int  # of rows

    @classmethod
    def of(cls, rows: int, classes: int, feats: int, step: int, warps: int) -> Blocks:
        each = min(4, rows // 32)
        return cls(rows, classes, feats, step, warps, classes // warps, each, rows // (32 * each))


# 168 registers a thread let six of them run on a multiprocessor at a time. Fewer rows where all fit one: the same sums.
BATCHGRAD, BATCHGRAD_OF_FEW = Blocks.of(128, 16, 256, 8, 2), Blocks.of(32, 16, 256, 8, 2)
BATCHGRAD_BLOCKS = {128: BATCHGRAD_OF_FEW, 0: BATCHGRAD}  # by the most rows of a call, 0 for any
BATCHGRAD_REGISTERS = 168
TURNED_ROWS = 32  # whose features a program turns
MERGED = {"SOME": 8, "PARTS": 128}  # rows and partial sums
TEMPORARY = 1 << 26  # numbers that BatchGrad keeps between its launches


def blocks_of(C: int, D: int) -> tuple[int, int]:
    """Blocks of classes and of features that BatchGrad is split into."""
    return math.ceil(C / BATCHGRAD.classes), math.ceil(D / BATCHGRAD.feats)


def batchgrad_rows(C: int, D: int) -> int:
    """Rows that share BatchGrad's launches: their turned features, and a partial sum for each pair of blocks."""
    classes, feats = blocks_of(C, D)
    rows = max(blocks.rows for blocks in BATCHGRAD_BLOCKS.values())
    return max(1, TEMPORARY // (feats * (BATCHGRAD.feats + classes)) // rows) * rows


# The label distributions of gradient norms, and of their orders all but whole ones up to 6, as device/gradient.py
# numbers them.
LABELS = {"uniform": 0, "predicted": 1, "log_predicted": 2, "given": 3}
GRADIENT_ORDERS = {**{float(r): r for r in range(1, 7)}, math.inf: 0}
# Beyond this C^(1 / r) is next to 1, and what a float32 logarithm is off by near 0, times the order, leaves float32.
MOST_GRADIENT_ORDER = 2.0**27
# Most classes of a row that stays in registers, and of one with its given labels, where 16 warps have 128 a thread.
HELD_CLASSES, HELD_PAIRS = 16384, 12288
HELD_A_THREAD = 64  # classes; half of them where two or three numbers of each are held
# || e_y - p ||_r^power is within a factor of 2^(power max(1, 1 / r)) for all y but the maximum, and has to stay in
# float32 with any weight.
MOST_POWER = 100.0
CLOSED = 0.5, 1, 2  # exponents that need neither logarithm nor power of two


def takes_gradient(stat: Any) -> bool:
    """Whether the kernel computes this gradient norm. E_p[e_Y - p] = 0 needs none."""
    if stat[0] != "gradient":
        return False
    _, labels, order, power, expectation = stat
    return power * max(1.0, 1.0 / order) <= MOST_POWER if expectation == "outside" else labels != "predicted"


def gradient_exponent(order: float, power: float) -> float:
    """Of sums of order-th powers; of norms themselves in orders 1 and infinity."""
    return power / order if 1 < order < math.inf else power


def gradient_table(order: float, power: float, temperature: float) -> tuple[float, ...]:
    """What device.gradient.gradient reads: see there."""
    exponent = gradient_exponent(order, power)
    unit = 0.0 if order == math.inf or (order != 1 and exponent in CLOSED) else min(exponent, 1000.0)
    return math.log2(math.e) / temperature, order, 1 / order, power, 2.0**unit


class Sweep(NamedTuple):
    """How the kernels of gradient norms and of GEN go over a row, element by element. They have it as S."""

    columns: int
    vec: int  # elements of a load
    w: int  # elements of a tile
    each: int  # neighbours in a tile that a thread has, where rows are read by 16 bytes
    tiles: int  # in registers at a time: the row, if that is
    held: bool  # in registers, and read once


class GradientNorm(NamedTuple):
    """Which norm. The kernel has it as NORM."""

    labels: int  # of LABELS
    outside: bool  # the norm in the expectation, not of it
    order: int  # of GRADIENT_ORDERS, else -1
    exponent: float  # 1, 2 or 1/2 where that makes norms of what is summed for whole orders, else 0


def gradient_constants(
    labels: str, order: float, power: float, expectation: str, C: int, strides: tuple[int, ...], itemsize: int
) -> tuple[dict[str, Any], Shape]:
    """The compile-time arguments of device.gradient.gradient. `strides`: of all that is read; `itemsize`: the most."""
    code, given = GRADIENT_ORDERS.get(order, -1), labels == "given"
    general = code == -1 and expectation == "outside"  # which keeps p^r too
    longest = HELD_PAIRS if given else HELD_CLASSES
    held = longest >= C
    a_thread = HELD_A_THREAD // 2 if given or (general and labels == "log_predicted") else HELD_A_THREAD
    lanes = 1 if C <= 16 else max(2, _power_of_2(math.ceil(C / a_thread)))
    shape = Shape(max(1, 32 // lanes), max(1, lanes // 32)) if held else Shape(*LONG_ROWS)
    vec = math.gcd(C, 16 // itemsize)
    W = 1024 if not held else lanes * vec if lanes > 1 else 1
    exponent = gradient_exponent(order, power)
    each, tiles = vec if held and lanes > 1 else 1, math.ceil(C / W) if held else 4
    exponent = exponent if expectation == "outside" and code != -1 and exponent in CLOSED else 0
    sweep = Sweep(C, math.gcd(vec, *strides), W, each, tiles, held)
    norm = GradientNorm(LABELS[labels], expectation == "outside", code, exponent)
    return {"S": sweep, "NORM": norm, "ROWS": shape.rows}, shape


# ---- GEN

# Exponents that the error of log2 (1 - p) stays small under, and that no logarithm of p_k / p is 0 times infinity with.
LEAST_GAMMA, MOST_GAMMA = 2.0**-20, 4.0


def takes_gen(stat: Any, C: int) -> bool:
    """Whether the kernel computes it: a row has to stay in registers, where it is counted again and again."""
    return stat[0] == "gen" and LEAST_GAMMA <= stat[1] <= MOST_GAMMA and 1 <= C <= HELD_CLASSES


def gen_constants(M: int, C: int, stride: int, itemsize: int, shift: int) -> tuple[dict[str, Any], Shape]:
    """The compile-time arguments of device.gen.gen; `shift`: the bits that float32 has more than the logits' type."""
    lanes = 1 if C <= 16 else max(2, _power_of_2(math.ceil(C / (HELD_A_THREAD // 2))))
    shape = Shape(max(1, 32 // lanes), max(1, lanes // 32))
    vec = math.gcd(C, 16 // itemsize)
    W = lanes * vec if lanes > 1 else 1
    sweep = Sweep(C, math.gcd(vec, stride), W, vec if lanes > 1 else 1, math.ceil(C / W), True)
    return {"S": sweep, "SELECT": M < C, "SHIFT": shift, "ROWS": shape.rows}, shape


# ---- statistics. The numbers that device/formulas.py gives them.

STATS = {s.name: i for i, s in enumerate(TABLE) if s.formula}

# ---- norms

MOST_MULTIPLIED = 16  # orders up to here are products; powers of |h| beyond hardly ever stay in float32
LARGEST_FLOAT = 3.4028234663852886e38


class Powers(NamedTuple):
    """Which powers of |h| are added up. The kernels have it as POWERS; see device/norms.py.

    A power is one of the roots, or a product of two that come before it. A sum is of one power, or of the product of
    two. After those come, where they are wanted, the number of elements that are not 0, and the largest.
    """

    roots: tuple[float, ...]  # orders
    by_log: bool  # whether one takes the logarithm of |h|
    products: tuple[tuple[int, ...], ...]
    factors: tuple[tuple[int, ...], ...]  # of each sum, one or two powers
    nonzero: bool  # whether elements that are not 0 are counted
    largest: bool
    subnormals: bool  # whether it is told which rows have any


class NormsPlan(NamedTuple):
    """How the orders of norms are made of sums. The kernels have it as NORMS."""

    orders: tuple[float, ...]
    general: bool  # whether there are orders whose root is neither the sum itself nor a square root
    slots: tuple[int, ...]  # the sum of each order
    ranges: tuple[tuple[float, float], ...]  # of each sum: a row beyond it is read again


class Factors(NamedTuple):
    """|h|^r as |h|^whole, times its square root if `half`, times |h|^rest, 0 <= rest < 0.5, by logarithm.

    What the hardware's log2 and exp2 are off by, 1 / r multiplies: so no order is made of more than one such power,
    and those above 0.5 of one that is small beside the others.
    """

    whole: int
    half: bool
    rest: float


def factors_of(r: float) -> Factors:
    if r > MOST_MULTIPLIED:
        return Factors(0, False, r)
    whole, half = int(r), r % 1 >= 0.5
    rest = r - whole - half / 2
    # The least orders only count, and must not vanish in float32.
    return Factors(whole, half, max(rest, 2.0**-100) if rest > 1e-15 * r else 0.0)


def farthest(r: float, rest: float) -> float:
    """How many powers of two |h| may be off 1 before the error of log2 |h|, which grows with it, shows in ||h||_r.

    In units of 2^-24, exp2 is off by 4 / r, the root by 2 / r, sums by some 5 / r; 16 max(1, 1 / r) are allowed, and
    |ln |h|| more if r < 1. The logarithm, its product with a rounded exponent: 4.6 |ln |h||, times its share of r.
    """
    growth = 4.6 * rest / r - (r < 1)
    left = 16 * max(1.0, 1 / r) - 11 / r - 1
    return left / growth / math.log(2) if growth > 0 else math.inf


@lru_cache
def plan_norms(orders: tuple[float, ...], D: int, half: bool) -> tuple[NormsPlan, Powers]:
    """`half`: of float16, which is never subnormal in float32."""
    kept = sorted(r for r in set(orders) if 0 < r < math.inf)
    parts = [factors_of(r) for r in kept]
    rests: list[float] = []
    for i, r in enumerate(kept):
        same = [x for x in rests if abs(x - parts[i].rest) <= 1e-15 * r]
        parts[i] = parts[i]._replace(rest=same[0] if same else parts[i].rest)
        rests += [parts[i].rest] if parts[i].rest and not same else []
    roots = [1.0, *([0.5] if any(x.half for x in parts) else []), *rests]

    products: list[tuple[int, ...]] = []

    def two(x: Factors) -> tuple[int, ...]:
        """One or two of the powers at hand, whose product x is."""
        if x.rest:
            other = x._replace(rest=0.0)
            return (*((one(other),) if any(other) else ()), roots.index(x.rest, 1))
        if x.half:
            return (*((one(x._replace(half=False)),) if x.whole else ()), 1)
        if x.whole == 1:
            return (0,)
        return one(Factors(x.whole // 2, False, 0.0)), one(Factors(x.whole - x.whole // 2, False, 0.0))

    def one(x: Factors) -> int:
        """The index of a power, made if it is not there."""
        found = two(x)
        if len(found) == 1:
            return found[0]
        if found not in products:
            products.append(found)
        return len(roots) + products.index(found)

    sums = [two(x) for x in parts]
    subnormals = not half and 0 < min(kept, default=1.0) < 0.25
    ranges = []
    off = 100.0
    for r, x in zip(kept, parts, strict=True):
        if r > MOST_MULTIPLIED:
            ranges.append((math.inf, 0.0))  # read again whatever it is
            continue
        least = 2.0**-60
        if r < 1 and not half and not subnormals:  # which count as 0 at first: below this sum they could be seen
            least = max(least, D * 2.0 ** (22 - 126 * r))
        if x.rest:
            off = min(off, farthest(r, x.rest))
            if r < 1:  # hardly anything but zeros, or much that is small beside the largest
                least = max(least, D * 2.0**-6)
        ranges.append((least, LARGEST_FLOAT))
    nonzero = 0 in orders
    largest = nonzero or math.inf in orders or off < 100
    if nonzero:
        kept.append(0.0)
        ranges.append((-math.inf, math.inf))
    if largest:
        kept.append(math.inf)
        ranges.append((2.0**-off, 2.0**off) if off < 100 else (-math.inf, math.inf))
    slots = tuple(kept.index(r) for r in orders)
    general = any(r not in (0, 1, 2, math.inf) for r in orders)
    by_log = any(r not in (1.0, 0.5) for r in roots)
    powers = Powers(tuple(roots), by_log, tuple(products), tuple(sums), nonzero, largest, subnormals)
    return NormsPlan(orders, general, slots, tuple(ranges)), powers


# ---- what to compute


class VTerms(NamedTuple):
    """Of each V term, its statistics, and where their coefficients begin in the table, 0 of a statistic alone."""

    codes: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]


class Few(NamedTuple):
    """Of each column, where there are few: its V term, its order, the power of the norm, and its factor if 1 or -1."""

    v: tuple[int, ...]
    order: tuple[int, ...]
    power: tuple[int, ...]
    factor: tuple[int, ...]


class Plan(NamedTuple):
    """See device.scores."""

    sums: int
    v: VTerms
    orders: tuple[float, ...]
    table: tuple[float, ...]
    columns: int
    all_v: bool  # every column has a V term
    all_u: bool  # and a norm
    square: bool  # some column squares its norm
    few: Few | None  # None of more columns
    block: int  # of more columns, how many are looked up at a time, else 0


@lru_cache
def plan_of(request: Request) -> Plan | None:
    """None for what the kernel of scores does not do."""
    # Beyond this float32 cannot hold what a temperature does to a logit.
    if not all(s in STATS for s in request.stats) or not 2.0**-100 <= request.temperature <= 2.0**100:
        return None
    if len(request.orders) > 32:
        return None
    # Beyond this no sum of float32 powers can tell an order from infinity.
    all_orders = tuple(r if r <= 1e9 else math.inf for r in request.orders)
    columns = request.columns or (
        *(Column(((i, 1.0),)) for i in range(len(request.stats))),
        *(Column(((ONE, 1.0),), j) for j in range(len(all_orders))),
    )
    # Of each column: its V term, and the factor that is left; columns of one statistic share it.
    parted = [(((c.terms[0][0], 1.0),), c.terms[0][1]) if len(c.terms) == 1 else (c.terms, 1.0) for c in columns]
    v_terms = [*dict.fromkeys(terms for terms, _ in parted if terms[0][0] != ONE)]
    place = [-1 if terms[0][0] == ONE else v_terms.index(terms) for terms, _ in parted]
    names = [tuple(str(request.stats[i]) for i, _ in terms) for terms in v_terms]
    factors = [factor / c.divisor**c.power for (_, factor), c in zip(parted, columns, strict=True)]
    orders = [math.inf if c.order == NO_NORM else all_orders[c.order] for c in columns]
    table = [
        math.log2(math.e) / request.temperature,
        request.temperature,
        *(float(i) for i in place),
        *factors,
        *(float(c.order) for c in columns),
        *(1.0 / r if 0 < r < math.inf else 1.0 for r in orders),
        *(float(i >= 0 and len(names[i]) == 1 and FORMULAS[names[i][0]].vanishes) for i in place),
        *(float(0 < r < math.inf) for r in orders),
        *(float(c.power) for c in columns),
    ]
    v_first = []
    for terms, some in zip(v_terms, names, strict=True):
        v_first.append(len(table) if len(some) > 1 else 0)
        table += [x for _, x in terms] if len(some) > 1 else []
    sums = 0
    for s in request.stats:
        sums |= int(FORMULAS[str(s)].sums)
    few = Few(
        tuple(place),
        tuple(c.order for c in columns),
        tuple(c.power for c in columns),
        tuple(int(f) if abs(f) == 1 else 0 for f in factors),
    )
    return Plan(
        sums,
        VTerms(tuple(tuple(STATS[name] for name in some) for some in names), tuple(v_first)),
        all_orders,
        tuple(table),
        len(columns),
        all(i >= 0 for i in place),
        all(c.order != NO_NORM for c in columns),
        any(c.power == 2 for c in columns),
        few if len(columns) <= FEW else None,
        min(BLOCK, _power_of_2(len(columns))) if len(columns) > FEW else 0,
    )


def constants(
    plan: Plan, x: Tile, x_tiles: int, h: Tile, half: bool, bias: bool, log: bool, rows: int
) -> dict[str, Any]:
    """The compile-time arguments of device.scores."""
    norms, powers = plan_norms(plan.orders, h.columns, half)
    return {
        "X": x,
        "X_TILES": x_tiles,
        "SUMS": plan.sums,
        "V": plan.v,
        "H": h,
        "H_TILES": tiles_in_flight(h),
        "NORMS": norms,
        "POWERS": powers,
        "BIAS": bias,
        "LOG": log,
        "ALL_V": plan.all_v,
        "ALL_U": plan.all_u,
        "SQUARE": plan.square,
        "FEW": plan.few,
        "COLUMNS": plan.columns,
        "BLOCK": plan.block,
        "ROWS": rows,
    }

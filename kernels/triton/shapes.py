"""How a call becomes launches: which sums it needs, and the shapes of programs. Plain Python, no Triton.

Nothing here looks at the number of rows, so a row is summed in the same order whatever batch it is in, and a varying
batch never compiles anything. One variant of a kernel is compiled for each set of: types, C, D, whether rows begin
at 16-byte boundaries, sums, orders, number of scores, and type of the result.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fastood.kernels import Product, Want

# ---- launch shapes

# Most classes -> rows a program, warps. Rows share a warp's shuffles; up to 128 logits a thread stay in registers,
# 64 of shifted rows of halves up to 16384, each in the half of a word that its row's alignment says: twice the sums.
ROWS = {
    16: (128, 4),
    128: (16, 1),
    1024: (4, 1),
    2048: (2, 1),
    4096: (1, 1),
    8192: (1, 2),
    16384: (1, 4),
    24576: (1, 8),
}
ROWS_WITH_FEATS = {**ROWS, 16: (16, 4), 128: (16, 4)}
ROWS_OF_FEATS = {4096: (16, 2), 16384: (4, 4)}  # features alone
LONG_ROWS = (1, 4)  # beyond either table
# Beyond ROWS, most classes -> programs of a cluster that share a row, warps of each.
CLUSTERS = {32768: (2, 4), 65536: (4, 4), 131072: (8, 4), 262144: (8, 8)}
LONGEST_SEGMENT = 16384  # of more classes than the tables hold
SEGMENT_WARPS = 4
L2_BYTES = 32 << 20  # what is read a second time is read in groups of rows that the L2 cache still holds
TILES = 4  # of features in flight


class Tile(NamedTuple):
    """How a matrix is read: VEC elements a load, P of them a word, rows SHIFTED off 16-byte groups, W words a tile."""

    vec: int
    p: int
    shifted: bool
    w: int


class Shape(NamedTuple):
    """Rows a program, warps, and how many programs share the row in a cluster."""

    rows: int
    warps: int
    ctas: int = 1

    @property
    def lanes(self) -> int:
        """Threads a row."""
        return max(1, 32 * self.warps * self.ctas // self.rows)

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told; of clusters only where there is one, since no other processor knows them."""
        return {"num_warps": self.warps} | ({"num_ctas": self.ctas} if self.ctas > 1 else {})


def clusters(capability: tuple[int, int], triton: str) -> bool:
    """Whether programs can share a row: on Hopper and newer, by a Triton that can.

    Triton 3.7 lowers neither a reduction across a cluster nor the change of layout that could stand in for it; 3.8
    plans the reduction over more programs than there are.
    """
    return capability >= (9, 0) and tuple(int(n) for n in triton.split(".")[:2]) >= (3, 9)


def launch_shape(C: int, D: int, shifted: bool, halves: bool, clusters: bool) -> Shape:
    """Of a call with C classes and D features, 0 for what it does not read. `shifted`, `halves`: logits."""
    if segments_of(C, 1, shifted, clusters)[0] == 1 and max(ROWS) < C:
        ctas, warps = next(shape for most, shape in CLUSTERS.items() if most >= C)
        return Shape(1, warps * 2 if shifted else warps, ctas)
    table = ROWS_OF_FEATS if not C else ROWS_WITH_FEATS if D else ROWS
    rows, warps = next((shape for most, shape in table.items() if most >= (C or D)), LONG_ROWS)
    if shifted and halves and 128 < C <= 16384:
        return Shape(rows // 2, warps) if rows > 1 else Shape(rows, warps * 2)
    return Shape(rows, warps)


def segment_shape(shifted: bool) -> Shape:
    return Shape(1, SEGMENT_WARPS * 2 if shifted else SEGMENT_WARPS)


def segments_of(C: int, vec: int, shifted: bool, clusters: bool) -> tuple[int, int]:
    """How many segments a row has, and their length, a multiple of `vec` (the last may be shorter)."""
    longest = max(CLUSTERS) // (2 if shifted else 1) if clusters else max(ROWS)
    if longest >= C:
        return 1, C
    count = math.ceil(C / LONGEST_SEGMENT)
    length = math.ceil(C / count / vec) * vec
    return math.ceil(C / length), length


def tile_of(columns: int, stride: int, offset: int, itemsize: int, lanes: int) -> Tile:
    """`offset`: elements from a 16-byte boundary to the first row; `lanes`: threads of a row."""
    most = 16 // itemsize
    p = 4 // itemsize
    if lanes == 1:  # a thread a row, which its neighbours' loads bring into the cache
        p = math.gcd(columns, stride, offset, p)
        return Tile(p, p, False, 1)
    shifted = is_shifted(columns, stride, offset, itemsize)
    vec = most if shifted else math.gcd(columns, stride, offset, most)
    words = vec // p
    span = math.ceil((columns + (vec - 1 if shifted else 0)) / vec)
    return Tile(vec, p, shifted, words * min(lanes, _power_of_2(span)))


def is_shifted(columns: int, stride: int, offset: int, itemsize: int) -> bool:
    """Whether loads would be too narrow from where the rows begin; short rows waste nothing by narrower ones."""
    vec = math.gcd(columns, stride, offset, 16 // itemsize)
    return vec * itemsize < (8 if columns <= 128 else 16)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tiles_in_flight(columns: int, tile: Tile) -> int:
    return max(1, min(TILES, columns // (tile.w * tile.p)))


NOTHING = Tile(1, 1, False, 1)

# A program of BatchGrad is four warps of the same 256 rows, eight a thread, and of four classes each. 128 registers a
# thread let 16 warps run at a time. A few rows are not worth that: the time is that of the rows there could be.
BATCHGRAD = {"CLASSES": 16, "FEATS": 256, "STEP": 4, "WARPS": 4, "AHEAD": 1, "STAGES": 1, "FAR": 1}
BATCHGRAD_ROWS = {128: 32, math.inf: 256}  # most rows of a call -> rows of a program: the same sums
BATCHGRAD_REGISTERS = 128
TURNED_ROWS = 32  # whose features a program turns
MERGED = {"SOME": 8, "PARTS": 128}  # rows and partial sums
TEMPORARY = 1 << 26  # numbers that BatchGrad keeps between its launches


def blocks_of(C: int, D: int) -> tuple[int, int]:
    """Blocks of classes and of features that BatchGrad is split into."""
    return math.ceil(C / BATCHGRAD["CLASSES"]), math.ceil(D / BATCHGRAD["FEATS"])


def rows_of_batchgrad(N: int) -> int:
    """Rows of a program, for a call of N."""
    return next(rows for most, rows in BATCHGRAD_ROWS.items() if most >= N)


def batchgrad_rows(C: int, D: int) -> int:
    """Rows that share BatchGrad's launches: their turned features, and a partial sum for each pair of blocks."""
    classes, feats = blocks_of(C, D)
    rows = max(BATCHGRAD_ROWS.values())
    return max(1, TEMPORARY // (feats * (BATCHGRAD["FEATS"] + classes)) // rows) * rows


# The label distributions of gradient norms, and of their orders all but whole ones up to 6, as device/gradient.py
# numbers them.
LABELS = {"uniform": 0, "predicted": 1, "log_predicted": 2, "given": 3}
GRADIENT_ORDERS = {**{float(r): r for r in range(1, 7)}, math.inf: 0}
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
    return {
        "C": C,
        "LABELS": LABELS[labels],
        "OUTSIDE": expectation == "outside",
        "ORDER": code,
        "EXPONENT": exponent if expectation == "outside" and code != -1 and exponent in CLOSED else 0,
        "V": math.gcd(vec, *strides),
        "ROWS": shape.rows,
        "W": W,
        "EACH": vec if held and lanes > 1 else 1,
        "TILES": math.ceil(C / W) if held else 4,  # in flight, of a row that is swept
        "HELD": held,
    }, shape


# ---- statistics. The numbers that device/scores.py gives them, and the sums they are made of.

EXP, SQUARES, PLOGP, SUMLOGP, TV, PEEL = 1, 2, 4, 8, 16, 32

STATS = {
    "fmax": (0, 0),
    "lse": (1, EXP),
    "energy": (2, EXP),
    "msp": (3, EXP),
    "s2": (4, EXP | SQUARES),
    "tv": (5, EXP | TV),
    "sumlogp": (6, EXP | SUMLOGP),
    "one_minus_msp": (7, EXP | PEEL),
    "log_msp": (8, EXP | PEEL),
    "one_minus_s2": (9, EXP | PEEL | SQUARES),
    "plogp": (10, EXP | PEEL | PLOGP),
}

LIGHT = 7  # from this number on a statistic vanishes with the rest of the row

# ---- norms

SMALL_ORDER = 0.84  # up to here powers are of |h| itself; see reference.norms_of
LARGEST_FLOAT = 3.4028234663852886e38


class Norms(NamedTuple):
    """See device.norm_sums."""

    powers: tuple[Any, ...]
    ranges: tuple[tuple[float, float], ...]
    slots: tuple[int, ...]


@lru_cache
def norms_of(orders: tuple[float, ...], D: int, half: bool) -> Norms:
    """Which sums the orders need, and in which slot each order finds its own. `half`: float16, never subnormal."""
    integers = tuple(sorted({int(r) for r in orders if 1 <= r <= 6 and r == int(r)}))
    rest = sorted(r for r in set(orders) if 0 < r < math.inf and r not in integers)
    least = min(rest, default=1.0)
    count = 0 in orders
    largest = count or math.inf in orders
    subnormals = least < 0.25 and not half

    kept = [float(k) for k in integers]  # the order in each slot
    ranges = [(2.0**-60, LARGEST_FLOAT) for _ in integers]
    bases: list[float] = []
    of_base, multiples = [], []
    for r in rest:
        multiple = round(r / least)
        if not (r <= SMALL_ORDER and multiple <= 8 and abs(multiple * least - r) <= 1e-15 * r):
            multiple = 1
        if multiple == 1:
            bases.append(r)
        of_base.append(0 if multiple > 1 else len(bases) - 1)
        multiples.append(multiple)
        kept.append(r)
        if r > SMALL_ORDER:
            # A mean beyond 2^6: the rounding of log2 |h| shows.
            ranges.append((max(2.0 ** (-6 * r), 2.0**-60), min(D * 2.0 ** min(6 * r, 127), LARGEST_FLOAT)))
        else:
            # Subnormals count as 0 at first: below this sum they could be seen.
            ranges.append((0.0 if half or subnormals else D * 2.0 ** (22 - 126 * r), LARGEST_FLOAT))
    for order, wanted in ((0.0, count), (math.inf, largest)):
        if wanted:
            kept.append(order)
            ranges.append((-math.inf, math.inf))
    slots = tuple(kept.index(r) for r in orders)
    powers = (integers, tuple(bases), tuple(of_base), tuple(multiples), (count, largest, subnormals))
    return Norms(powers, tuple(ranges), slots)


# ---- what to compute


class Plan(NamedTuple):
    sums: int
    stats: tuple[int, ...]
    orders: tuple[float, ...]
    table: tuple[float, ...]  # see device.scores
    columns: int
    all_v: bool  # every column has a statistic
    all_u: bool  # and a norm
    square: bool  # some column squares its norm


@lru_cache
def plan_of(want: Want, products: tuple[Product, ...] | None) -> Plan | None:
    """`products`, or all statistics and then all norms where that is None; None for what the kernels do not do."""
    # Beyond this float32 cannot hold what a temperature does to a logit.
    if not all(s in STATS for s in want.stats) or not 2.0**-100 <= want.temperature <= 2.0**100:
        return None
    if len(want.orders) > 32:
        return None
    # Beyond this no sum of float32 powers can tell an order from infinity.
    want = want._replace(orders=tuple(r if r <= 1e9 else math.inf for r in want.orders))
    if products is None:
        columns = [(i, 1.0, -1, 1) for i in range(len(want.stats))]
        columns += [(-1, 1.0, j, 1) for j in range(len(want.orders))]
    else:
        columns = [(p.stat, p.factor / p.divisor**p.power, p.order, p.power) for p in products]
    stats = [STATS[want.stats[i]][0] if i >= 0 else -1 for i, *_ in columns]  # type: ignore[index]
    orders = [want.orders[j] if j >= 0 else math.inf for _, _, j, _ in columns]
    table = (
        math.log2(math.e) / want.temperature,
        want.temperature,
        *(float(i) for i, *_ in columns),
        *(factor for _, factor, _, _ in columns),
        *(float(j) for _, _, j, _ in columns),
        *(1.0 / r if 0 < r < math.inf else 1.0 for r in orders),
        *(float(code >= LIGHT) for code in stats),
        *(float(SMALL_ORDER < r < math.inf) for r in orders),
        *(float(power) for *_, power in columns),
    )
    sums = 0
    for s in want.stats:
        sums |= STATS[s][1]  # type: ignore[index]
    return Plan(
        sums,
        tuple(STATS[s][0] for s in want.stats),  # type: ignore[index]
        want.orders,
        table,
        len(columns),
        all(i >= 0 for i, *_ in columns),
        all(j >= 0 for _, _, j, _ in columns),
        any(power == 2 for *_, power in columns),
    )


def constants(
    plan: Plan,
    C: int,
    x: Tile,
    segments: tuple[int, int],
    D: int,
    h: Tile,
    half: bool,
    bias: bool,
    log: bool,
    rows: int,
) -> dict[str, Any]:
    """The compile-time arguments of device.scores."""
    norms = norms_of(plan.orders, D, half)
    return {
        "C": C,
        "X_VEC": x.vec,
        "X_P": x.p,
        "X_SHIFTED": x.shifted,
        "X_W": x.w,
        "SUMS": plan.sums,
        "STATS": plan.stats,
        "SEGMENTS": segments[0],
        "SEGMENT": segments[1],
        "D": D,
        "H_VEC": h.vec,
        "H_P": h.p,
        "H_SHIFTED": h.shifted,
        "H_W": h.w,
        "H_TILES": tiles_in_flight(D, h),
        "POWERS": norms.powers,
        "RANGES": norms.ranges,
        "ORDERS": plan.orders,
        "SLOTS": norms.slots,
        "BIAS": bias,
        "GENERAL": any(r not in (0, 1, 2, math.inf) for r in plan.orders),
        "LOG": log,
        "ALL_V": plan.all_v,
        "ALL_U": plan.all_u,
        "SQUARE": plan.square,
        "COLUMNS": plan.columns,
        "BLOCK": min(64, _power_of_2(plan.columns)),
        "ROWS": rows,
    }


def segment_constants(plan: Plan, C: int, x: Tile, segments: tuple[int, int], second: bool) -> dict[str, Any]:
    """The compile-time arguments of device.segments."""
    return {
        "C": C,
        "VEC": x.vec,
        "P": x.p,
        "SHIFTED": x.shifted,
        "W": x.w,
        "SUMS": plan.sums & ~TV,
        "SEGMENTS": segments[0],
        "SEGMENT": segments[1],
        "SECOND": second,
    }

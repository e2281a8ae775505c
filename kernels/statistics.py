"""The statistics of a row of logits: what there is, what each one means, and its formula, once for all backends.

A backend works out the quantities below in its own arithmetic; what is made of them is written here. The reference
reads it when it is imported. What C++ and Triton read, kernels/cpu/statistics.h and kernels/triton/device/formulas.py,
`python -m fastood.kernels.generate` writes.

Throughout, z = (f - max f) / T, and the rest of a row is all of it but one maximum.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from functools import cached_property


class Sums(IntFlag):
    """What is added up over a row beside finding its maximum; the work is what is asked for."""

    EXP = 1  # of the rest: e^z
    SQUARES = 2  # of the rest: e^2z
    PLOGP = 4  # of the rest: z e^z
    SUMLOGP = 8  # z
    TV = 16  # |p - 1/C|, once p is known
    REST = 32  # the rest to relative precision; C++ and the reference have no other
    KL = 64  # for KL(u || p) of nearly flat rows


EXP, SQUARES, PLOGP, SUMLOGP, TV, REST, KL = Sums

# What formulas are made of, and the sums that each takes. Those called rest may come in units of a weight that all of
# them vanish with, and that may be 0 itself: a formula is linear in them, or the log of one that is.
QUANTITIES: dict[str, Sums] = {
    "fmax": Sums(0),  # max f
    "T": Sums(0),
    "C": Sums(0),
    "r1": EXP,  # sum of the rest's e^z, to the precision of 1 + r1
    "p_max": EXP,  # 1 / (1 + r1)
    "log_sum": EXP,  # log (1 + r1)
    "r2": EXP | SQUARES,  # sum of the rest's e^2z, to the precision of 1 + r2
    "mean_z": EXP | SUMLOGP,
    # These are formulas too, sum |p - 1/C| / 2 and log (1 + r1) - log C - mean z, but each backend has them by hand: by
    # what they give, in the arithmetic of its sums, it tells which rows are flat, and looks at those again.
    "tv": EXP | TV,
    "kl_uniform": EXP | SUMLOGP | KL,
    "rest": EXP | REST,  # r1 to relative precision
    "rest_squares": EXP | REST | SQUARES,  # r2 to relative precision
    "rest_log": EXP | REST,  # log (1 + r1) to relative precision
    "rest_z": EXP | REST | PLOGP,  # sum of the rest's z e^z
}


def _names(node: ast.AST) -> set[str]:
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}


@dataclass(frozen=True)
class Statistic:
    """A row of the table."""

    name: str
    meaning: str
    formula: str = ""  # + - * / of QUANTITIES and numbers, or a log; "": a backend has a function of its own for it
    infinite: bool = False  # the row's maximum, instead of NaN, where that is infinite

    @cached_property
    def quantities(self) -> set[str]:
        return _names(ast.parse(self.formula)) - {"log"}

    @property
    def sums(self) -> Sums:
        sums = Sums(0) if self.formula else EXP  # none but the maximum, which tells whether a row has a softmax
        for name in self.quantities:
            sums |= QUANTITIES[name]
        return sums

    @property
    def is_log(self) -> bool:
        return self.formula.startswith("log(")

    @property
    def vanishes(self) -> bool:
        """Whether it comes in units of the rest's weight."""
        return not self.is_log and any(name.startswith("rest") for name in self.quantities)


_ONE_MINUS_S2 = "(rest * (2 + r1) - rest_squares) * p_max * p_max"  # 2 r1 >= 2 r2 and r1^2 >= r2: nothing cancels

# A statistic's number, in C++ and in Triton, is its place here.
TABLE = (
    Statistic("fmax", "max_k f_k", "fmax"),
    Statistic("lse", "log sum_k exp z_k, with z = f / T", "fmax / T + log_sum", infinite=True),
    Statistic("energy", "T * lse, finite even where lse overflows", "fmax + T * log_sum", infinite=True),
    Statistic("msp", "max_k p_k", "p_max"),
    Statistic("one_minus_msp", "1 - max_k p_k, to relative precision", "rest * p_max"),
    Statistic("log_msp", "log max_k p_k, to relative precision", "-rest_log"),
    Statistic("s2", "S_2 = sum_k p_k^2", "(1 + r2) * p_max * p_max"),
    Statistic("one_minus_s2", "1 - S_2 = sum_k p_k (1 - p_k), to relative precision", _ONE_MINUS_S2),
    Statistic("log_one_minus_s2", "log (1 - S_2), finite where 1 - S_2 underflows", f"log({_ONE_MINUS_S2})"),
    Statistic("tv", "1/2 sum_k |1/C - p_k|, to relative precision", "tv"),
    Statistic("plogp", "sum_k p_k log p_k", "rest_z * p_max - rest_log"),
    Statistic("sumlogp", "sum_k log p_k", "C * (mean_z - log_sum)"),
    Statistic("s2_sumlogp", "(1 + S_2) sum_k log p_k", "(1 + (1 + r2) * p_max * p_max) * (C * (mean_z - log_sum))"),
    Statistic("kl_uniform", "KL(u || p) = -log C - 1/C sum_k log p_k, to relative precision", "kl_uniform"),
    Statistic("one", "1, of a row that has a softmax", "1"),
    Statistic("uniform", "1/C, of a row that has a softmax", "1 / C"),
    Statistic("power_sum", "('power_sum', r): S_r = sum_k p_k^r, r > 0"),
    Statistic("gen", "('gen', gamma, M): sum over the M largest p of p^gamma (1 - p)^gamma"),
    Statistic(
        "gradient",
        "('gradient', q, r, power, expectation): || E_q[e_Y - p] ||_r^power ('inside') or E_q[ || e_Y - p ||_r^power ] "
        "('outside'), q 'uniform', 'predicted', 'log_predicted' (weights log p_y, 'outside' only) or 'given'",
    ),
)

# Below these what the sums give of a nearly flat row loses too much: TV; KL(u || p) itself, and its share of -mean z.
FLAT_TV, FLAT_KL, FLAT_KL_SHARE = 1 / 8, 1.0, 1 / 8

# Of norms, the largest order of which the powers of |h| itself are summed: what underflows in h / max |h| is a visible
# part of sum |h|^0.1. Up to here the power of every float32, subnormal or not, is a normal number, and sums of 2^20
# stay finite. Beyond, powers are of |h| / max |h|, which neither overflow nor vanish.
UNSCALED = 0.84

# Those that take no parameters.
FORMULAS = {s.name: s for s in TABLE if s.formula}


_SYNTAX = ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub, ast.Load


class _Rendered(ast.NodeTransformer):
    def __init__(self, name: Callable[[str], str], log: Callable[[str], str]) -> None:
        self.name, self.log = name, log

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, _SYNTAX):
            raise ValueError(f"a formula is made of + - * /, numbers, log(rest ...) and {', '.join(QUANTITIES)}")
        return super().generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        match node.value:
            case int() | float() as number:
                return ast.Constant(float(number))  # 1 / 2 is 0 in C++
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.name(node.id)) if node.id in QUANTITIES else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        match node:
            # Of a row whose rest is next to 0, C++ and the reference find the logarithm of `rest` alone.
            case ast.Call(ast.Name("log"), [x], []) if "rest" in _names(x) and not _names(x) & {"rest_log", "rest_z"}:
                return ast.Name(self.log(ast.unparse(x)))
        return self.generic_visit(node)


def rendered(formula: str, name: Callable[[str], str], log: Callable[[str], str]) -> str:
    """The formula as Python and C++ read it alike: `name` of each quantity, `log` of what log() is taken of."""
    return ast.unparse(_Rendered(name, log).visit(ast.parse(formula, mode="eval").body))

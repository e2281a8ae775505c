"""Fails where a helper of the kernels is called with the same tensors and constants in tuples of another shape.

tuples.py WHICH: "all" the cases, or "some", at least one of each kind.
"""

import contextlib
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.code_generator import CodeGenerator

from benchmarks.gpu_static import BFLOAT, CASES, FLOAT, GRID, Case, compile_case
from fastood.kernels.statistics import FORMULAS

call, make_ir, seen = CodeGenerator.call_JitFunction, ASTSource.make_ir, {}


def is_tuple(x):
    return isinstance(x, (tuple, triton.language.tuple))


def leaves(x, path=()):
    if is_tuple(x):
        return [leaf for i, item in enumerate(x) for leaf in leaves(item, (*path, i))]
    return [str(x.type) if isinstance(x, triton.language.tensor) else (path, repr(x))]


def shape(x):
    return [shape(item) for item in x] if is_tuple(x) else None


def recorded(self, fn, args, kwargs, *more):
    given = (*args, *kwargs.values())
    first = seen.setdefault((self.module, fn, tuple(leaves(given))), shape(given))
    assert shape(given) == first, f"{fn.__name__} is called with {first} and {shape(given)}"
    return call(self, fn, args, kwargs, *more)


class Made(Exception):
    """What comes after the front end need not be done."""


def only_made(*args, **options):
    make_ir(*args, **options)
    raise Made


CodeGenerator.call_JitFunction, ASTSource.make_ir = recorded, only_made
every = tuple(FORMULAS)
more = [
    Case("", dtype, C, D, stats, GRID, 0, 0)
    for dtype in (BFLOAT, FLOAT)
    for C, D in ((1000, 64), (1001, 65))
    for stats in (("tv",), ("tv", "s2"), every)
]
every_kind = [more[-1], *{case.what: case for case in CASES}.values()]
for case in every_kind if sys.argv[1] == "some" else (*more, *CASES):
    with contextlib.suppress(Made):
        compile_case(case, GPUTarget("cuda", 90, 32))
assert len(seen) > 500  # the hook was called

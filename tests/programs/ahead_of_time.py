"""Compiles for "sm_90" or "gfx942" (AMD) what benchmarks/gpu_static.py does not: rare statistics, orders and types."""

import math
import sys

import torch

amd = sys.argv[1] == "gfx942"
if amd:
    torch.version.hip = "any"  # fastood reads it when imported

from triton.backends.compiler import GPUTarget  # noqa: E402

from benchmarks.gpu_static import (  # noqa: E402
    BFLOAT,
    FLOAT,
    GRID,
    HALF,
    Case,
    V,
    compile_batchgrad,
    compile_case,
    compile_gen,
    compile_gradient,
)
from fastood.kernels.statistics import FORMULAS  # noqa: E402

target = GPUTarget("hip", "gfx942", 64) if amd else GPUTarget("cuda", 90, 32)
every = tuple(FORMULAS)
orders = 0.1, 0.25, 1.5, 100.0
if amd:  # scores with few columns; more of them fail in Triton's AMD backend, and nobody has run any there
    shapes = (BFLOAT, 1001, 257), (HALF, 10, 64), (FLOAT, 100, 17), (FLOAT, 128256, 4096)
    cases = [Case("", dtype, C, D, ("energy",), orders, 0, 0) for dtype, C, D in shapes]
else:
    shapes = (
        (BFLOAT, 1001, 257),
        (HALF, 10, 64),
        (HALF, 3001, 64),
        (FLOAT, 100, 17),
        (FLOAT, 7, 3),
        (FLOAT, 128256, 4096),
    )
    cases = [Case("", dtype, C, D, every, orders, 0, 0) for dtype, C, D in shapes]
    cases += [Case("", BFLOAT, 30001, 0, every, (), 0, 0), Case("", HALF, 30008, 64, every, (2.0,), 0, 0)]
    cases += [Case("", FLOAT, 100, 0, (stat,), (), 0, 0) for stat in every]
    cases += [Case("", BFLOAT, 1000, 2048, V, GRID, 0, 0), Case("", HALF, 0, 2048, (), GRID, 0, 0)]
for i, case in enumerate(cases):
    compile_case(case, target, bias=amd or i % 2 == 0, log=i % 3 == 0)
if amd:
    sys.exit()

for dtype in (BFLOAT, HALF, FLOAT):
    compile_batchgrad("partial_sums", dtype, target)
    for bias in (False, True):
        compile_batchgrad("turned", dtype, target, bias)
compile_batchgrad("merged", FLOAT, target)
for i, (q, r) in enumerate((q, r) for q in ("uniform", "log_predicted", "given") for r in (1.0, 2.0, math.inf, 0.5)):
    for side in ("inside", "outside") if q != "log_predicted" else ("outside",):
        stat, C, dtype = ("gradient", q, r, 1.5, side), (10, 1001, 128256)[i % 3], (BFLOAT, HALF, FLOAT)[i % 3]
        compile_gradient(Case("", dtype, C, 0, (stat,), (), 0, 0), (FLOAT, BFLOAT)[i % 2], target)
for C, M, dtype in ((10, 100, HALF), (1001, 100, BFLOAT), (16384, 5, FLOAT)):
    compile_gen(Case("", dtype, C, 0, (("gen", 0.1, M),), (), 0, 0), target)

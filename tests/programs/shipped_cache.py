"""Compiles a score for "sm_90", where Triton's cache directory does not have it yet, and prints which it was."""

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.gpu_static import FLOAT, Case, compile_case

found = []
triton.knobs.compilation.listener = lambda cache_hit, **_: found.append(cache_hit)
compile_case(Case("", FLOAT, 10, 4, ("energy",), (2.0,), 0, 0), GPUTarget("cuda", 90, 32))
print("found" if all(found) and found else "compiled")

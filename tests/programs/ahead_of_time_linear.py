"""Fails where the kernels of score_linear spill, are no tensor cores' instructions, or copy other than 16 bytes.

ahead_of_time_linear.py 90: the compute capability, 80, 90 or 100.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu_static import BFLOAT, HALF, POINTERS, usage
from fastood.kernels.triton import device
from fastood.kernels.triton.fused_linear import HOPPER, MERGED, OTHERS, STATS

architecture = int(sys.argv[1])
types = {"part_ptr": "*fp32", "class_ptr": "*i32", "out_ptr": "*fp64", "best_ptr": "*i64", "scale": "fp32"}
types |= {"temperature": "fp32", "bias_ptr": "*fp32"}


def spills(kernel, types, constants, warps, by_16=()):
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    given = [x for x in kernel.params if x.name not in constants and (x.name.endswith("_ptr") or x.name in by_16)]
    attributes = {(x.num,): [["tt.divisibility", 16]] for x in given}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    return usage(compiled.asm["cubin"])["STACK"], compiled


tiling = HOPPER if architecture == 90 else OTHERS
strides = ("h_stride", "w_stride", "D")
for dtype in (BFLOAT, HALF):
    for D, squares, classes in ((2048, False, False), (2048, True, True), (48, True, True)):
        if D == 48 and (dtype == HALF or architecture != 90):
            continue
        constants = tiling.constants(D, squares) | ({} if classes else {"class_ptr": None, "bias_ptr": None})
        of_type = types | dict.fromkeys(("h_ptr", "w_ptr"), POINTERS[dtype])
        stack, compiled = spills(device.linear.partial_sums, of_type, constants, tiling.warps, strides)
        case = dtype, D, squares, classes
        assert stack == 0, case
        assert architecture != 90 or "wgmma.mma_async" in compiled.asm["ptx"], case
        assert "cp.async.cg" in compiled.asm["ptx"], case
constants = {"STATS": tuple(STATS.values()), "SUMS": 3, **MERGED}
assert spills(device.linear.merged, types, constants, 4)[0] == 0

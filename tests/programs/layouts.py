"""Fails where a sum over a row of logits has another layout in a row that begins elsewhere in memory."""

import re

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.gpu_static import BFLOAT, FLOAT, Case, compile_case


def reduced(dtype, C, stride, offset):
    """The types, with their layouts, of the tiles that are reduced."""
    made, compile = [], triton.compile
    triton.compile = lambda *args, **options: made.append(compile(*args, **options)) or made[0]
    try:
        compile_case(Case("", dtype, C, 0, ("msp",), (), 0, 0), GPUTarget("cuda", 90, 32), rows=(stride, offset))
    finally:
        triton.compile = compile
    text = made[0].asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
    tiles = re.findall(r'"tt.reduce".*?\}\) : \((tensor<.*?>)', text, re.S)
    return [re.sub(r"#\w+", lambda name: layouts[name[0]], tile) for tile in tiles]


for C, dtype in ((100, FLOAT), (1000, BFLOAT), (1004, FLOAT)):
    aligned = reduced(dtype, C, C, 0)
    assert len(aligned) == 2, aligned
    for stride, offset in ((C + 1, 1), (C + 4, 2)):
        assert reduced(dtype, C, stride, offset) == aligned

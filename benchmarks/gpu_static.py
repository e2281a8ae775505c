"""What the Triton kernels cost on a GPU, read from their machine code; no GPU needed: python -m benchmarks.gpu_static

Every kernel is compiled at representative shapes and types, and the disassembler that comes with Triton shows what
sm_90 would run. Printed per kernel: registers, shared memory, how many warps a multiprocessor then holds and how many
kilobytes they have loaded before they use any; the width of the loads of logits and features; special-function, FP32
and total instructions for each element read; and the share of the read ceiling that gpu_model.py predicts from all
that, for an H200, fitted to what other kernels measured there. A prediction is no measurement; there is none for
kernels that are made of several launches or programs. "bound" is the share that is left where nothing waits, and the
busiest of memory, issue and special functions works all the time.

Branches are counted as not taken. They serve few rows (device/ says which): those that float32 cannot sum at first,
which are read again, and for entropies rows with masked classes. "again" is what the code behind branches would add,
its loops over rows left out; "total" always reads every element, which is asserted, and of what a gradient norm holds
in registers reads none twice.

BatchGrad, which reads little and computes much, is counted for each of N C D elements, with rows of one kind: its loop
over features, and all that is outside of loops once. Memory has no part in its figures.

The exit status is 1 where a kernel does not compile, spills (there, or for sm_80 or sm_100 more than SPILLS allows),
loads rows in less than 128 bits at a time (64 for rows of 100 halves, and for G, two numbers that a whole warp shares;
32 for rows of ten classes, a thread each, and for rows of odd length; an element for long rows that begin anywhere),
takes more instructions than its budget, or is predicted a smaller share.

--quick                   a fifth of the time, for CI: of long rows, which take longest to compile, those of 128,256
                          numbers of float32, and for sm_80 and sm_100 every fourth kernel
--fit                     fits the model's constants anew, and prints measured shares beside predicted ones
--measured GPU_DAY_JSON   does so for what gpu_day.py measured of these kernels, and keeps that in gpu_measured.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import gpu_model
from fastood.kernels import Column, Request, Stat
from fastood.kernels.statistics import TV
from fastood.kernels.triton import device, shapes
from fastood.kernels.triton.launch import UNUSED_BITS

V = ("energy", "tv", "msp", "s2")
EVERY_V = (*V, "plogp", "sumlogp", "fmax")
GRID = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, math.inf)
GEN_STEPS = 10  # in which the 100th of 1000 normal logits around 0 is found on average, by simulation
BFLOAT, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """A kernel, and the most instructions and special functions it may take for each element on sm_90."""

    what: str
    dtype: torch.dtype
    C: int
    D: int
    stats: tuple[Stat, ...]
    orders: tuple[float, ...]
    total: float
    special: float
    # or BatchGrad of features: "plain", "signed"; or "gradient"; or "gen"
    kernel: str = "scores"
    least_bits: int = 128


# ---- compiling


class Compiled(NamedTuple):
    cubin: bytes
    warps: int
    shared: int
    elements: int  # that one program reads, or in BatchGrad computes
    itemsize: int  # bytes of each
    written: int = 0  # bytes that one program writes
    sweeps: tuple[int, int] = (0, 0)  # loops over the logits of a long row, and how often each turns
    held: int = 0  # bytes of the tiles of rows that are read once and held, those beyond the rows' ends among them


POINTERS = {BFLOAT: "*bf16", HALF: "*fp16", FLOAT: "*fp32"}


def compile_case(
    case: Case, target: GPUTarget, bias: bool = False, log: bool = False, rows: tuple[int, int] | None = None
) -> Compiled:
    """`rows`: stride and offset of those of logits, else C and 0."""
    if case.kernel in ("plain", "signed"):
        return compile_batchgrad("partial_sums", case.dtype, target)
    if case.kernel == "gradient":
        return compile_gradient(case, FLOAT, target)
    if case.kernel == "gen":
        return compile_gen(case, target)
    C, D, size = case.C, case.D, case.dtype.itemsize
    columns = [Column(((i, 1.0),), j) for i in _or_none(case.stats) for j in _or_none(case.orders)]
    plan = shapes.plan_of(Request(case.stats, case.orders, tuple(columns), (len(columns), -1)))
    assert plan is not None
    shape = shapes.launch_shape(C, D, size, plan.sums, plan.block)
    x, x_tiles = shapes.logits_tile(C, *(rows or (C, 0)), size, shape.lanes) if C else (shapes.NOTHING, 0)
    sweeps = (1 + bool(plan.sums & TV), math.ceil(C / (x.w * x.p * x_tiles)) - 1) if x_tiles else (0, 0)
    h = shapes.feats_tile(D, D, 0, size, shape.lanes) if D else shapes.NOTHING
    types = {"table_ptr": "*fp64", "out_ptr": "*fp32", "x_ptr": POINTERS[case.dtype], "h_ptr": POINTERS[case.dtype]}
    constants = shapes.constants(plan, x, x_tiles, h, case.dtype == HALF, bias, log, shape.rows)
    constants |= {name: None for name, n in (("x_ptr", C), ("h_ptr", D)) if not n}
    compiled = _compile(device.scores.scores, types, constants, target, shape, shape.rows * (C + D), size)
    return compiled._replace(sweeps=sweeps, written=4 * shape.rows * plan.columns)


def compile_batchgrad(name: str, dtype: torch.dtype, target: GPUTarget, bias: bool = False) -> Compiled:
    """A kernel of device.batchgrad.py."""
    types = {"f_ptr": POINTERS[dtype], "h_ptr": POINTERS[dtype], "scale": "fp32", "inverse": "fp32", "sign": "fp32"}
    types |= dict.fromkeys(("stats_ptr", "out_ptr", "x_ptr", "sum_ptr", "g_ptr", "g_sums_ptr", "part_ptr"), "*fp32")
    blocks = shapes.BATCHGRAD
    constants: dict[str, Any] = {"B": blocks}
    shape = shapes.Shape(blocks.rows, blocks.warps, shapes.BATCHGRAD_REGISTERS)
    if name == "turned":
        constants = {"BIAS": bias, "ROWS": blocks.rows, "FEATS": blocks.feats, "SOME": shapes.TURNED_ROWS}
        shape = shapes.Shape(blocks.rows, 4)
    elif name == "merged":
        constants, shape = shapes.MERGED, shapes.Shape(shapes.MERGED["SOME"], 4)
    kernel = getattr(device.batchgrad, name)
    elements = blocks.rows * blocks.classes * blocks.feats
    return _compile(kernel, types, constants, target, shape, elements, dtype.itemsize)


def compile_gradient(case: Case, label_dtype: torch.dtype, target: GPUTarget) -> Compiled:
    """The kernel of device/gradient.py, for labels of `label_dtype` where they are given."""
    _, labels, order, power, expectation = case.stats[0]
    dtypes = [case.dtype, label_dtype] if labels == "given" else [case.dtype]
    size = max(x.itemsize for x in dtypes)
    strides = (case.C,) * len(dtypes)
    constants, shape = shapes.gradient_constants(labels, order, power, expectation, case.C, strides, size)
    types = {"f_ptr": POINTERS[case.dtype], "q_ptr": POINTERS[label_dtype], "table_ptr": "*fp64", "out_ptr": "*fp64"}
    if labels != "given":
        constants["q_ptr"] = None
    itemsize = sum(x.itemsize for x in dtypes)
    compiled = _compile(device.gradient.gradient, types, constants, target, shape, shape.rows * case.C, itemsize)
    return compiled._replace(held=_held(constants["S"], shape) * itemsize, written=8 * shape.rows)


def compile_gen(case: Case, target: GPUTarget) -> Compiled:
    """The kernel of device/gen.py."""
    C, size, (_, _, M) = case.C, case.dtype.itemsize, case.stats[0]
    constants, shape = shapes.gen_constants(M, C, C, size, UNUSED_BITS[case.dtype])
    types = {"f_ptr": POINTERS[case.dtype], "table_ptr": "*fp64", "out_ptr": "*fp64"}
    compiled = _compile(device.gen.gen, types, constants, target, shape, shape.rows * C, size)
    return compiled._replace(held=_held(constants["S"], shape) * size, written=8 * shape.rows)


def _held(sweep: shapes.Sweep, shape: shapes.Shape) -> int:
    """Elements that a program has in registers."""
    return shape.rows * sweep.tiles * sweep.w if sweep.held else 0


def _compile(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    target: GPUTarget,
    shape: shapes.Shape,
    elements: int,
    itemsize: int,
) -> Compiled:
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    given = [x for x in kernel.params if x.name.endswith("_ptr") and x.name not in constants]
    attributes = {(x.num,): [["tt.divisibility", 16]] for x in given if not x.do_not_specialize}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options=dict(shape.options))
    binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    return Compiled(binary, shape.warps, compiled.metadata.shared, elements, itemsize)


def _or_none(items: tuple[object, ...]) -> range:
    return range(len(items)) if items else range(-1, 0)


# ---- disassembling


class Instruction(NamedTuple):
    predicate: str
    opcode: str  # with its modifiers
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def loads_rows(self) -> bool:
        """Of logits and features; small tables, which all programs share, are loaded to stay (EL)."""
        return self.base == "LDG" and ".EL" not in self.opcode

    @property
    def bits(self) -> int:
        """How wide a load or store is."""
        return next((int(x) for x in re.findall(r"\.(?:[US])?(8|16|64|128)\b", self.opcode)), 32)


INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
REGISTER = re.compile(r"\bR(\d+)\b")
LABEL = re.compile(r"^\s*(\.L_\w+):")


def disassemble(cubin: bytes) -> tuple[list[Instruction], dict[str, int], int]:
    """The instructions, the place of each label among them, and the number of registers."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in _tool(cubin, "nvdisasm", "-c", "-ndf").splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append(Instruction((found[1] or "").strip(), found[2], found[3]))
    assert code
    return code, labels, usage(cubin)["REG"]


def usage(cubin: bytes) -> dict[str, int]:
    """Registers (REG), bytes of a thread's stack (STACK), where spills are, and more."""
    return {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", _tool(cubin, "cuobjdump", "-res-usage"))}


def _tool(cubin: bytes, name: str, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


class Flow:
    """The control flow of a kernel: blocks by their first instruction, and which blocks run how often."""

    def __init__(self, code: list[Instruction], labels: dict[str, int]) -> None:
        self.code = code
        target = {i: labels.get(m[1]) for i, x in enumerate(code) if (m := re.search(r"`\(([^)]+)\)", x.operands))}
        jumps = ("BRA", "EXIT", "RET", "CALL")
        starts = (
            {0} | {i + 1 for i, x in enumerate(code) if x.base in jumps} | {t for t in target.values() if t is not None}
        )
        ordered = sorted(i for i in starts if i < len(code))
        self.end = dict(zip(ordered, [*ordered[1:], len(code)], strict=True))
        self.next: dict[int, list[int]] = {}
        for start, end in self.end.items():
            last = code[end - 1]
            conditional = bool(last.predicate) or "P" in last.operands.split("`")[0] or ".DIV" in last.opcode
            out = []
            if last.base == "BRA" and target.get(end - 1) is not None:
                out.append(target[end - 1])
            if last.base not in ("BRA", "EXIT", "RET") or conditional:
                out.append(end)
            self.next[start] = [x for x in out if x in self.end]

    def reachable(self, start: int, without: int | None = None) -> set[int]:
        seen: set[int] = set()
        todo = [start]
        while todo:
            block = todo.pop()
            if block not in seen and block != without:
                seen.add(block)
                todo += self.next[block]
        return seen

    def instructions(self, blocks: set[int]) -> Iterator[Instruction]:
        for start in sorted(blocks):
            yield from self.code[start : self.end[start]]

    def loops(self, blocks: set[int]) -> list[set[int]]:
        """Each loop within `blocks`."""
        found = []
        for tail in sorted(blocks):
            for head in self.next[tail]:
                if head in blocks and head <= tail:  # a jump back
                    after = self.reachable(head) & blocks
                    found.append({b for b in after if tail in self.reachable(b)})
        return found

    def usual(self) -> set[int]:
        """All blocks but those that a branch may jump over."""
        everything = self.reachable(0)
        behind: set[int] = set()
        for block in everything:
            if len(self.next[block]) != 2:
                continue
            for taken, other in (self.next[block], self.next[block][::-1]):
                # What only comes after `taken`, where the way over `other` ends all the same.
                only = everything - self.reachable(0, without=taken)
                around = self.reachable(other) - only
                ends = any(self.code[self.end[b] - 1].base == "EXIT" for b in around)
                if ends:
                    behind |= only
        return everything - behind

    def loads_rows(self, blocks: set[int]) -> list[Instruction]:
        return [x for x in self.instructions(blocks) if x.loads_rows]

    def in_flight(self, blocks: set[int]) -> int:
        """The most bytes of rows that a thread has loaded and not used."""
        waiting: list[tuple[range, int]] = []  # registers, bytes
        most = 0
        for x in self.instructions(blocks):
            registers = [int(n) for n in REGISTER.findall(x.operands)]
            waiting = [(r, size) for r, size in waiting if not any(n in r for n in registers)]
            if x.loads_rows:
                waiting.append((range(registers[0], registers[0] + max(1, x.bits // 32)), x.bits // 8))
                most = max(most, sum(size for _, size in waiting))
        return most

    def takes_maxima(self, blocks: set[int]) -> bool:
        return any(x.base.startswith("FMNMX") for x in self.instructions(blocks))


# ---- counting

FP32 = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "HADD2", "HMUL2", "HFMA2"}


class Report(NamedTuple):
    registers: int
    spills: int
    shared: int
    warps: int  # that a multiprocessor holds
    in_flight: int  # bytes that they have loaded before they use any
    widths: Counter[int]  # of the loads of rows
    total: float  # instructions, for each element
    special: float
    fp32: float
    again: float  # instructions behind branches, for each element
    warp: gpu_model.Warp
    share: float  # of the read ceiling, predicted
    bound: float  # and what no order of these instructions exceeds


def analyse(compiled: Compiled, case: Case) -> Report:
    code, labels, registers = disassemble(compiled.cubin)
    flow = Flow(code, labels)
    threads = 32 * compiled.warps
    batchgrad = case.kernel in ("plain", "signed")
    usual = flow.reachable(0) if batchgrad or case.kernel == "gen" else flow.usual()
    loops = flow.loops(usual)
    if batchgrad:
        usual -= set().union(*loops)
        loops = [x for x in loops if flow.takes_maxima(x) == (case.kernel == "signed")]
        usual |= loops[0]
    steps: dict[int, float] = {}
    if case.kernel == "gen":
        steps = dict.fromkeys(set().union(*loops), GEN_STEPS)
        loops = []
    sweeps, turns = compiled.sweeps
    loops.sort(key=min)
    assert len(loops) - sweeps in (0, 1), "the model knows loops over a long row, and then one over the features"
    runs = dict.fromkeys(usual, 1.0) | steps
    for loop in loops[:sweeps]:
        runs |= dict.fromkeys(loop, turns)
    loops = loops[sweeps:]
    if loops:
        bytes_a_turn = threads * sum(x.bits // 8 for x in flow.loads_rows(loops[0]))
        bytes_in_all = compiled.elements * case.D / (case.C + case.D) * compiled.itemsize
        turns_of_batchgrad = shapes.BATCHGRAD.feats / shapes.BATCHGRAD.step
        runs |= dict.fromkeys(loops[0], turns_of_batchgrad if batchgrad else bytes_in_all / bytes_a_turn)
    rows = flow.loads_rows(loops[0] if batchgrad else usual)

    everything = flow.reachable(0)
    behind = everything - usual - set().union(*flow.loops(everything))
    read = threads * sum(times * x.bits // 8 for block, times in runs.items() for x in flow.loads_rows({block}))
    assert batchgrad or read >= compiled.elements * compiled.itemsize, "some elements are read behind a branch"
    assert not compiled.held or read == compiled.held, "some elements are read twice"

    def each(opcodes: set[str] | None) -> float:
        count = sum(
            times * sum(opcodes is None or x.base in opcodes for x in flow.instructions({block}))
            for block, times in runs.items()
        )
        return count * threads / compiled.elements

    total, special = each(None), each({"MUFU"})
    of_a_warp, warps = compiled.elements / compiled.warps, warps_held(registers, compiled)
    in_flight = 32 * flow.in_flight(usual)
    warp = gpu_model.Warp(
        of_a_warp * compiled.itemsize,
        compiled.written / compiled.warps,
        in_flight,
        total * of_a_warp / 32,
        special * of_a_warp / 32,
        warps,
    )
    known = case.kernel in ("scores", "gradient") and not sweeps
    bytes_per_clock = gpu_model.measured().bytes_per_clock
    return Report(
        registers,
        sum(x.base in ("LDL", "STL") for x in code),
        compiled.shared,
        warps,
        warps * in_flight,
        Counter(x.bits for x in rows),
        total,
        special,
        each(FP32),
        sum(1 for _ in flow.instructions(behind)) * threads / compiled.elements,
        warp,
        gpu_model.FITTED.share(warp, bytes_per_clock) if known else math.nan,
        math.nan if batchgrad else warp.bound(bytes_per_clock),
    )


def warps_held(registers: int, compiled: Compiled) -> int:
    """By a multiprocessor of sm_90: 64 K registers, given to warps by 256 and to its four parts alike, 228 KB of shared
    memory, of which each program takes one more than it asks for, 32 programs, 64 warps."""
    a_warp = math.ceil(32 * registers / 256) * 256
    warps = compiled.warps
    of_registers = 65536 // a_warp // 4 * 4 // warps
    return warps * min(of_registers, (228 << 10) // (compiled.shared + 1024), 32, 64 // warps)


# ---- the report

# Budgets stand two or three percent above what is reached. A bare softmax kernel, with a budget of 13.5 for all V terms
# (16 where rows are odd), does without the numeric contract. Of all V terms, C=1000, that adds: the smaller of two
# logits, to keep the largest of a slot out of its sum, so that the rest is exact near p_max = 1 (halves in pairs, one
# instruction for two); and some 200 instructions a thread of 63 logits to make statistics of the sums and products of
# those. Rows of odd length are read word by word, halves twice and moved into place: 0.5 and 1.4 more. Where no rest is
# summed, the maximum is subtracted before scaling, 1 more, which any temperature survives. Rows of 20 classes have two
# threads, of which a sixth of the loads is beyond the end: what is once a thread then serves 10. Rows beyond 24576
# classes are read twice for TV, 5 more and another special function, by programs of many warps, in which what is once a
# thread shows. In twelve norms it adds 3 to count what is not 0 and 1 where orders below 0.25 must see subnormals, and
# the checks of ranges. Roots and products are 200 to 400 a thread: it shows where rows are short.
CASES = [
    Case("energy", BFLOAT, 1000, 0, ("energy",), (), 7.2, 1.1),
    *(Case("4 V terms", t, 1000, 0, V, (), n, 1.1) for t, n in ((BFLOAT, 11), (HALF, 10.8), (FLOAT, 10.6))),
    *(Case("all V terms", t, 1000, 0, EVERY_V, (), n, 1.1) for t, n in ((BFLOAT, 13.9), (HALF, 14.4), (FLOAT, 13.9))),
    *(Case("4 V terms", t, 1001, 0, V, (), n, 1.1, least_bits=32) for t, n in ((BFLOAT, 12.5), (FLOAT, 11.1))),
    *(Case("all V terms", t, 1001, 0, EVERY_V, (), n, 1.12, least_bits=32) for t, n in ((BFLOAT, 15.3), (FLOAT, 14.2))),
    *(Case("4 V terms", t, 21841, 0, V, (), n, 1.1, least_bits=32) for t, n in ((BFLOAT, 12.8), (FLOAT, 12.1))),
    *(Case("4 V terms", BFLOAT, C, 0, V, (), n, 1.35, least_bits=64) for C, n in ((20, 20), (200, 12))),
    *(Case("4 V terms", t, 100, 0, V, (), 11.1, 1.1, least_bits=64) for t in (BFLOAT, HALF)),
    Case("4 V terms", FLOAT, 100, 0, V, (), 10.8, 1.1),
    Case("all V terms", BFLOAT, 100, 0, EVERY_V, (), 14.8, 1.1, least_bits=64),
    *(Case("4 V terms", t, 10, 0, V, (), 16, 1.25, least_bits=32) for t in (BFLOAT, FLOAT)),
    *(Case("KL(u || p)", t, 1000, 0, ("kl_uniform",), (), n, 1.1) for t, n in ((BFLOAT, 9.7), (FLOAT, 9.7))),
    Case("KL(u || p)", FLOAT, 128256, 0, ("kl_uniform",), (), 7.4, 1.1),
    *(Case("energy", t, 128256, 0, ("energy",), (), 5.7, 1.1) for t in (BFLOAT, FLOAT)),
    *(Case("4 V terms", t, 128256, 0, V, (), n, 2.2) for t, n in ((BFLOAT, 12.7), (HALF, 12.7), (FLOAT, 12.1))),
    *(Case("all V terms", t, 128256, 0, EVERY_V, (), n, 2.2) for t, n in ((BFLOAT, 17.9), (FLOAT, 17.4))),
    *(Case("all V terms", t, 262144, 0, EVERY_V, (), n, 2.2) for t, n in ((BFLOAT, 16.4), (FLOAT, 16.1))),
    *(
        Case("4 V terms", t, C, 0, V, (), n, 2.2, least_bits=8 * t.itemsize)
        for t, C, n in ((BFLOAT, 50257, 15.8), (FLOAT, 130001, 15.4))
    ),
    Case("energy x norm 0.3", BFLOAT, 128256, 4096, ("energy",), (0.3,), 5.6, 1.1),
    Case("4 V x 12 norms", BFLOAT, 128256, 4096, V, GRID, 13.2, 2.2),
    # 8 threads a row: as many again as registers ask for, so that more warps have a place. What finishes a row counts
    # twice then, 40 to 130 instructions a thread. Norms below 0.5 keep the maximum too, which tells far features.
    *(Case("norms 1, 2", t, 0, 2048, (), (1.0, 2.0), n, 0.1) for t, n in ((BFLOAT, 4.4), (FLOAT, 3.3))),
    *(Case("norm 0.3", t, 0, 2048, (), (0.3,), n, 2.1) for t, n in ((BFLOAT, 6.8), (FLOAT, 7.4))),
    # A logarithm, a square root, and powers of two for 0.1 and 0.3 each: no order is made of two of these.
    *(Case("12 norms", t, 0, 2048, (), GRID, n, 4.1) for t, n in ((BFLOAT, 23.7), (FLOAT, 25.1))),
    Case("4 V x norms 1, 2", BFLOAT, 1000, 2048, V, (1.0, 2.0), 6.7, 0.4),
    Case("energy x norm 0.3", BFLOAT, 1000, 2048, ("energy",), (0.3,), 7.3, 1.8),
    Case("4 V x norm 0.3", BFLOAT, 1000, 2048, V, (0.3,), 8.4, 1.8),
    Case("4 V x 12 norms", BFLOAT, 1000, 2048, V, GRID, 21.9, 3.2),
    Case("4 V x norms 1, 2", BFLOAT, 100, 512, V, (1.0, 2.0), 6.1, 0.4, least_bits=64),
    Case("4 V x 12 norms", BFLOAT, 100, 512, V, GRID, 37.3, 4, least_bits=64),
    # 3 and 4 are arithmetic. A load and a multiplication of G serve 4 rows, a load of features serves 8 classes.
    Case("BatchGrad, h >= 0", FLOAT, 1000, 2048, (), (), 3.7, 0.1, "plain", least_bits=64),
    Case("BatchGrad, h of any sign", FLOAT, 1000, 2048, (), (), 4.4, 0.1, "signed", least_bits=64),
    # Of the terms, and once a row logarithms and powers of two, on each of 16 lanes, or of 32 where labels are given:
    # 100 to 300 a thread. A special function for each p, and for each norm a root or a logarithm and a power of two. Of
    # halves beside float32 labels a thread reads four, 64 bits, so that a warp reads whole lines of labels.
    *(
        Case(what, t, C, 0, (("gradient", q, r, power, side),), (), n, k, "gradient", bits)
        for what, t, C, q, r, power, side, n, k, bits in (
            ("E_q || e_Y - p ||_2, q given", FLOAT, 1000, "given", 2.0, 1.0, "outside", 30.5, 2.4, 128),
            ("E_q || e_Y - p ||_2, q given", BFLOAT, 1000, "given", 2.0, 1.0, "outside", 32, 2.4, 64),
            ("E_q || e_Y - p ||_2, q given", BFLOAT, 12288, "given", 2.0, 1.0, "outside", 41.5, 2.4, 64),
            ("E_q || e_Y - p ||_1^2, q predicted", BFLOAT, 1000, "predicted", 1.0, 2.0, "outside", 17.7, 1.2, 128),
            ("E_q || e_Y - p ||_3, q uniform", BFLOAT, 1000, "uniform", 3.0, 1.0, "outside", 28.2, 3.3, 128),
            ("|| q - p ||_2, q given", BFLOAT, 1000, "given", 2.0, 1.0, "inside", 32.2, 1.3, 64),
        )
    ),
    # Each step of the bisection counts, 2.4 for each logit, and once a row adds that up over 32 lanes. Of 100 classes
    # all are wanted. Short rows are a thread's each, read number by number.
    *(
        Case("GEN, M=100", t, C, 0, (("gen", 0.1, 100),), (), n, 3.7, "gen", bits)
        for t, C, n, bits in (
            (BFLOAT, 1000, 92, 128),
            (FLOAT, 1000, 89, 128),
            (BFLOAT, 100, 37.2, 64),
            (FLOAT, 10, 44.3, 32),
        )
    ),
]


# The least share of the read ceiling that must be predicted, in percent, of bfloat16 and of float32, by what, C and D:
# a point or two below what is reached.
SHARES = {
    ("energy", 1000, 0): (95,),
    ("4 V terms", 1000, 0): (88, 97),
    ("all V terms", 1000, 0): (73, 95),
    ("4 V terms", 1001, 0): (84, 97),
    ("all V terms", 1001, 0): (68, 92),
    ("4 V terms", 21841, 0): (68, 95),
    ("4 V terms", 20, 0): (60,),
    ("4 V terms", 100, 0): (86, 95),
    ("4 V terms", 200, 0): (86,),
    ("all V terms", 100, 0): (73,),
    ("4 V terms", 10, 0): (52, 69),
    ("norms 1, 2", 0, 2048): (98, 98),
    ("norm 0.3", 0, 2048): (81, 97),
    ("12 norms", 0, 2048): (41, 75),
    ("4 V x norms 1, 2", 1000, 2048): (97,),
    ("energy x norm 0.3", 1000, 2048): (87,),
    ("4 V x norm 0.3", 1000, 2048): (87,),
    ("4 V x 12 norms", 1000, 2048): (49,),
    ("4 V x 12 norms", 100, 512): (34,),
    ("E_q || e_Y - p ||_2, q given", 1000, 0): (78, 91),
    ("E_q || e_Y - p ||_2, q given", 12288, 0): (64,),
    ("E_q || e_Y - p ||_1^2, q predicted", 1000, 0): (61,),
    ("E_q || e_Y - p ||_3, q uniform", 1000, 0): (37,),
    ("|| q - p ||_2, q given", 1000, 0): (87,),
}
assert SHARES.keys() <= {(case.what, case.C, case.D) for case in CASES}


def least_share(case: Case) -> int:
    of_types = dict(zip((BFLOAT, FLOAT), SHARES.get((case.what, case.C, case.D), ()), strict=False))
    return of_types.get(case.dtype, 0)


# What may spill: (architecture, what, C, type) -> bytes a thread. Triton 3.9 does for sm_80; 3.7.1 does not.
SPILLS = {(80, "all V terms", 128256, BFLOAT): 24}


def examined(job: tuple[int, Case]) -> tuple[Report | None, list[str]]:
    """What a kernel of sm_90 costs, and what is wrong with it there or elsewhere."""
    architecture, case = job
    try:
        compiled = compile_case(case, GPUTarget("cuda", architecture, 32))
        if architecture != 90:
            stack = usage(compiled.cubin)["STACK"]
            allowed = SPILLS.get((architecture, case.what, case.C, case.dtype), 0)
            return None, [f"spills, {stack} bytes a thread"] * (stack > allowed)
        report = analyse(compiled, case)
    except Exception as failed:
        return None, [f"{type(failed).__name__}: {failed}"]
    wrong = {
        f"{report.spills} spills": report.spills > 0,
        f"loads of {min(report.widths)} bits": min(report.widths) < case.least_bits,
        "more instructions than budgeted": report.total > case.total,
        "more special functions than budgeted": report.special > case.special,
        "a smaller share predicted than budgeted": report.share < least_share(case) / 100,
    }
    return report, [what for what, is_wrong in wrong.items() if is_wrong]


# The kernels that the model is fitted to, as gpu_day.py calls them. Of longer rows than ROWS has, there are more.
MEASURED: dict[str, tuple[tuple[Stat, ...], tuple[float, ...]]] = {
    "energy": (("energy",), ()),
    "MSP": (("msp",), ()),
    "TV": (("tv",), ()),
    "4 V": (V, ()),
    "7 statistics": (EVERY_V, ()),
    "norms {1, 2}": ((), (1.0, 2.0)),
    "norm 0.3": ((), (0.3,)),
    "12 norms": ((), GRID),
    "energy × norm 0.3": (("energy",), (0.3,)),
    "sweep, 4 V × 12 norms": (V, GRID),
    "GradNorm": (("tv",), (1.0,)),
    "E_q of L2, q given": ((("gradient", "given", 2.0, 1.0, "outside"),), ()),
    "E_p of L3": ((("gradient", "predicted", 3.0, 1.0, "outside"),), ()),
}


def keep_measured(day: dict[str, Any]) -> None:
    """Writes gpu_measured.json: what gpu_day.py measured, and what a warp of the kernel, as it is now, does."""
    assert not day["rehearsal"], "a rehearsal measures nothing"
    rows = day["figures"]["kernels"]
    (ceiling,) = (row["read"] for row in rows if "read" in row)
    known = day["machine"] | {"read_ceiling": ceiling}
    kernels = []
    for row in rows:
        name, _, sizes = row.get("what", "").rpartition(", ")
        C, D = (int((re.findall(rf"{size}=(\d+)", sizes) or [0])[0]) for size in "CD")
        if name not in MEASURED or "seconds" not in row or max(shapes.ROWS) < C:
            continue
        stats, orders = MEASURED[name]
        gradient = bool(stats) and stats[0][0] == "gradient"
        case = Case(name, getattr(torch, row["dtype"]), C, D, stats, orders, 0, 0, "gradient" if gradient else "scores")
        warp = analyse(compile_case(case, GPUTarget("cuda", 90, 32)), case).warp
        share = round(100 * row["bytes"] / row["seconds"] / ceiling)
        kernels.append({"what": name, "dtype": row["dtype"], "C": C, "D": D, "share": share, "warp": warp._asdict()})
    gpu_model.write(gpu_model.Measured(known, kernels))


def is_usual_long(case: Case) -> bool:
    return case.dtype == FLOAT and case.C == 128256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--measured", type=Path)
    given = parser.parse_args()
    if given.measured:
        keep_measured(json.loads(given.measured.read_text()))
    if given.fit or given.measured:
        print(gpu_model.report(gpu_model.measured()))
        return 0
    print(__doc__.split("\n\n")[0])
    print(f"Triton {triton.__version__}; figures and budgets are of sm_90")
    # Compiling takes seconds a kernel. Of the other architectures each has every other kernel, and with the newest
    # Triton those that it has not with the pinned one.
    cases = [case for case in CASES if not given.quick or not shapes.is_streamed(case.C) or is_usual_long(case)]
    jobs = [(90, case) for case in cases]
    pinned = triton.__version__ == "3.7.1"
    jobs += [((80, 100)[(i + pinned) % 2], case) for i, case in enumerate(cases[:: 2 if given.quick else 1])]
    print(" " * 57, "regs  smem warps  KB        loads special  FP32  total budget again bound  share budget")
    failed = []
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for (architecture, case), (report, wrong) in zip(jobs, pool.imap(examined, jobs), strict=True):
            name = f"{case.what}, C={case.C} D={case.D} {str(case.dtype).removeprefix('torch.')}"
            if report:
                widths = " ".join(f"{n}x{bits}" for bits, n in sorted(report.widths.items()))
                bound = " " * 5 if math.isnan(report.bound) else f"{report.bound:5.0%}"
                share = "" if math.isnan(report.share) else f"{report.share:6.0%} {least_share(case):5d}%"
                print(
                    f"{name:57s} {report.registers:4d} {report.shared:5d} {report.warps:5d} {report.in_flight >> 10:3d}"
                    f" {widths:>12s} {report.special:7.2f} {report.fp32:5.1f} {report.total:6.2f} {case.total:6.1f}"
                    f" {report.again:5.1f} {bound} {share}",
                    *wrong,
                    flush=True,
                )
            failed += [f"sm_{architecture} {name}: {x}" for x in wrong]
    print("\n".join(failed) or f"{len(jobs)} kernels compiled for sm_90, sm_80 and sm_100, all within their budgets")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

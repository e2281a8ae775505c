"""What the Triton kernels cost on a GPU, read from their machine code; no GPU needed: python -m benchmarks.gpu_static

Every kernel is compiled at representative shapes and types, and the disassembler that comes with Triton shows what
the GPU would run. Printed per kernel: registers, spills, shared memory, the width of the loads of logits and features,
special-function, FP32 and total instructions for each element read, and the time of the busiest unit of an H100 over
the time that memory needs to read each tensor once.

The model: 3.0 TB/s, 132 multiprocessors at 1.755 GHz, each of which does 16 special functions, 128 FP32 operations and
4 warp instructions per clock; 64 integer and logical ones; all of them overlap perfectly. It is a bound, not a
measurement. Branches are counted as not taken. They serve rare rows (device/ says which): those that float32 cannot
sum at first, which are read again, and for entropies rows with masked classes. "rare" is what the code behind branches
would add, its loops over rows left out; "total" always reads every element, which is asserted, and of what a gradient
norm holds in registers reads none twice.

BatchGrad, which reads little and computes much, is counted for each of N C D elements, with rows of one kind: its loop
over features, and all that is outside of loops once. Memory has no part in its figures.

The exit status is 1 where a kernel spills, loads rows in less than 128 bits at a time
(64 for rows of 100 halves, and for G, two numbers that a whole warp shares; 32 for rows of ten classes, a thread each),
or takes more instructions than its budget.
"""

from __future__ import annotations

import math
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

from fastood.kernels import Product, Stat, Want
from fastood.kernels.triton import device, shapes

V = ("energy", "tv", "msp", "s2")
EVERY_V = (*V, "plogp", "sumlogp", "fmax")
GRID = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, math.inf)
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
    # or of a row in segments: "first", "second"; shared by a "cluster"; BatchGrad of features: "plain", "signed"; or
    # "gradient"
    kernel: str = "scores"
    least_bits: int = 128


# ---- compiling


class Compiled(NamedTuple):
    cubin: bytes
    warps: int  # of all programs of a cluster
    shared: int
    elements: int  # that one program, or a cluster, reads, or in BatchGrad computes
    itemsize: int  # bytes of each
    held: int = 0  # bytes of the tiles of rows that are read once and held, those beyond the rows' ends among them


POINTERS = {BFLOAT: "*bf16", HALF: "*fp16", FLOAT: "*fp32"}


def compile_case(case: Case, target: GPUTarget, bias: bool = False, log: bool = False) -> Compiled:
    if case.kernel in ("plain", "signed"):
        return compile_batchgrad("partial_sums", case.dtype, target)
    if case.kernel == "gradient":
        return compile_gradient(case, FLOAT, target)
    C, D, size = case.C, case.D, case.dtype.itemsize
    products = [Product(i, j, 1.0, 1, 1.0) for i in _or_none(case.stats) for j in _or_none(case.orders)]
    plan = shapes.plan_of(Want(case.stats, case.orders), tuple(products))
    assert plan is not None
    clusters = case.kernel == "cluster"
    shifted = C > 0 and shapes.is_shifted(C, C, 0, size)
    shape = shapes.launch_shape(C, D, shifted, size == 2, clusters)
    if case.kernel in ("first", "second"):
        shape = shapes.segment_shape(shifted)
    x = shapes.tile_of(C, C, 0, size, shape.lanes) if C else shapes.NOTHING
    h = shapes.tile_of(D, D, 0, size, shape.lanes) if D else shapes.NOTHING
    segments = shapes.segments_of(C, x.vec, shifted, clusters) if C else (1, 0)
    pointer = POINTERS[case.dtype]
    types = {"table_ptr": "*fp64", "out_ptr": "*fp32", "record_ptr": "*fp32", "x_ptr": pointer, "h_ptr": pointer}
    if case.kernel in ("scores", "cluster"):
        kernel = device.scores.scores
        if segments[0] > 1:
            types["x_ptr"] = types["record_ptr"]  # which is what it then reads
        constants = shapes.constants(plan, C, x, segments, D, h, case.dtype == HALF, bias, log, shape.rows)
        constants |= {name: None for name, n in (("x_ptr", C), ("h_ptr", D)) if not n}
        elements = shape.rows * (C + D)
    else:
        kernel = device.scores.segments
        constants = shapes.segment_constants(plan, C, x, segments, case.kernel == "second")
        elements = segments[1]
    return _compile(kernel, types, constants, target, shape, elements, size)


def compile_batchgrad(name: str, dtype: torch.dtype, target: GPUTarget, bias: bool = False, rows: int = 256) -> Compiled:
    """A kernel of device.batchgrad.py."""
    types = {"f_ptr": POINTERS[dtype], "h_ptr": POINTERS[dtype], "scale": "fp32", "inverse": "fp32"}
    types |= {"out_ptr": "*fp64"} | dict.fromkeys(
        ("stats_ptr", "x_ptr", "sum_ptr", "g_ptr", "g_sums_ptr", "part_ptr"), "*fp32"
    )
    feats, warps, registers = shapes.BATCHGRAD["FEATS"], 4, None
    if name == "turned":
        constants = {"BIAS": bias, "ROWS": rows, "FEATS": feats, "SOME": shapes.TURNED_ROWS}
    elif name == "merged":
        constants = shapes.MERGED
    else:
        constants, warps = {"ROWS": rows, **shapes.BATCHGRAD}, shapes.BATCHGRAD["WARPS"]
        registers = shapes.BATCHGRAD_REGISTERS
    kernel = getattr(device.batchgrad, name)
    elements = rows * shapes.BATCHGRAD["CLASSES"] * feats
    return _compile(kernel, types, constants, target, shapes.Shape(1, warps), elements, dtype.itemsize, registers)


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
    tiles = shape.rows * constants["TILES"] * constants["W"]
    return compiled._replace(held=tiles * itemsize if constants["HELD"] else 0)


def _compile(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    target: GPUTarget,
    shape: shapes.Shape,
    elements: int,
    itemsize: int,
    registers: int | None = None,
) -> Compiled:
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    given = [x for x in kernel.params if x.name.endswith("_ptr") and x.name not in constants]
    attributes = {(x.num,): [["tt.divisibility", 16]] for x in given if not x.do_not_specialize}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = shape.options | ({"maxnreg": registers} if registers and target.backend == "cuda" else {})
    compiled = triton.compile(source, target=target, options=options)
    binary = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    return Compiled(binary, shape.warps * shape.ctas, compiled.metadata.shared, elements, itemsize)


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
    def bits(self) -> int:
        """How wide a load or store is."""
        return next((int(x) for x in re.findall(r"\.(?:[US])?(8|16|64|128)\b", self.opcode)), 32)


INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^\s*(\.L_\w+):")


def disassemble(cubin: bytes) -> tuple[list[Instruction], dict[str, int], int]:
    """The instructions, the place of each label among them, and the number of registers."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(*command: str) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        text = tool(str(tools / "nvdisasm"), "-c")
        usage = tool(str(tools / "cuobjdump"), "-res-usage")
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append(Instruction((found[1] or "").strip(), found[2], found[3]))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers
    assert code
    return code, labels, int(registers[1])


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
        rare: set[int] = set()
        for block in everything:
            if len(self.next[block]) != 2:
                continue
            for taken, other in (self.next[block], self.next[block][::-1]):
                # What only comes after `taken`, where the way over `other` ends all the same.
                only = everything - self.reachable(0, without=taken)
                around = self.reachable(other) - only
                ends = any(self.code[self.end[b] - 1].base == "EXIT" for b in around)
                if ends:
                    rare |= only
        return everything - rare

    def loads_rows(self, blocks: set[int]) -> list[Instruction]:
        """Loads of logits and features; small tables, which all programs share, are loaded to stay (EL)."""
        return [x for x in self.instructions(blocks) if x.base == "LDG" and ".EL" not in x.opcode]

    def takes_maxima(self, blocks: set[int]) -> bool:
        return any(x.base.startswith("FMNMX") for x in self.instructions(blocks))


# ---- counting

FP32 = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "HADD2", "HMUL2", "HFMA2"}
NOT_INTEGER = FP32 | {
    "MUFU",
    "LDG",
    "STG",
    "LDS",
    "STS",
    "LDL",
    "STL",
    "SHFL",
    "BAR",
    "BRA",
    "EXIT",
    "NOP",
    "LDC",
    "S2R",
}
CLOCK = 1.755e9
BYTES_PER_CLOCK = 3.0e12 / 132 / CLOCK  # of one multiprocessor


class Report(NamedTuple):
    registers: int
    spills: int
    shared: int
    widths: Counter[int]  # of the loads of rows
    total: float  # instructions, for each element
    special: float
    fp32: float
    rare: float  # instructions behind branches, for each element
    over_memory: float  # the time of the busiest unit over that of memory


def analyse(compiled: Compiled, case: Case) -> Report:
    code, labels, registers = disassemble(compiled.cubin)
    flow = Flow(code, labels)
    threads = 32 * compiled.warps
    batchgrad = case.kernel in ("plain", "signed")
    usual = flow.reachable(0) if batchgrad else flow.usual()
    loops = flow.loops(usual)
    if batchgrad:
        usual -= set().union(*loops)
        loops = [x for x in loops if flow.takes_maxima(x) == (case.kernel == "signed")]
        usual |= loops[0]
    assert len(loops) <= 1, "the model knows one loop, over the features"
    runs = dict.fromkeys(usual, 1.0)
    if loops:
        bytes_a_turn = threads * sum(x.bits // 8 for x in flow.loads_rows(loops[0]))
        bytes_in_all = compiled.elements * case.D / (case.C + case.D) * compiled.itemsize
        steps = shapes.BATCHGRAD["FEATS"] / shapes.BATCHGRAD["STEP"]
        runs |= dict.fromkeys(loops[0], steps if batchgrad else bytes_in_all / bytes_a_turn)
    rows = flow.loads_rows(loops[0] if batchgrad else usual)

    everything = flow.reachable(0)
    rare = everything - usual - set().union(*flow.loops(everything))
    read = threads * sum(times * x.bits // 8 for block, times in runs.items() for x in flow.loads_rows({block}))
    assert batchgrad or read >= compiled.elements * compiled.itemsize, "some elements are read behind a branch"
    assert not compiled.held or read == compiled.held, "some elements are read twice"

    def each(opcodes: set[str] | None, without: bool = False) -> float:
        count = 0.0
        for block, times in runs.items():
            chosen = (opcodes is None or (x.base in opcodes) != without for x in flow.instructions({block}))
            count += times * sum(chosen)
        return count * threads / compiled.elements

    total, special, fp32 = each(None), each({"MUFU"}), each(FP32)
    busiest = max(total / 128, special / 16, fp32 / 128, each(NOT_INTEGER, without=True) / 64)
    return Report(
        registers,
        sum(x.base in ("LDL", "STL") for x in code),
        compiled.shared,
        Counter(x.bits for x in rows),
        total,
        special,
        fp32,
        sum(1 for _ in flow.instructions(rare)) * threads / compiled.elements,
        math.nan if batchgrad else busiest / (compiled.itemsize / BYTES_PER_CLOCK),
    )


# ---- the report

# Budgets stand two or three percent above what is reached. A bare softmax kernel, with a budget of 13.5 for all V terms
# (16 where rows begin anywhere), does without the numeric contract. Of all V terms, C=1000, that adds: the smaller of
# two logits, to keep the largest of a slot out of its sum, so that the rest is exact near p_max = 1 (halves in pairs,
# one instruction for two); and some 300 instructions a thread of 125 logits to make statistics of the sums and products
# of those. Rows that begin anywhere add sums of slots in float64 to keep a row's bits; those of halves, with twice the
# slots, have 63 logits a thread, or registers would spill, and so twice what is once a thread. Where no rest is summed,
# and in the second sweep of segments, the maximum is subtracted before scaling, 1 more, which any temperature survives.
# In twelve norms it adds 3 to count what is not 0 and 1 where orders below 0.25 must see subnormals, and the checks of
# ranges. Roots and products are 200 to 400 a thread: it shows where rows are short.
CASES = [
    Case("energy", BFLOAT, 1000, 0, ("energy",), (), 6.6, 1.1),
    *(Case("4 V terms", t, 1000, 0, V, (), n, 1.1) for t, n in ((BFLOAT, 10.4), (HALF, 10.3), (FLOAT, 10.1))),
    *(Case("all V terms", t, 1000, 0, EVERY_V, (), n, 1.1) for t, n in ((BFLOAT, 13.4), (HALF, 13.9), (FLOAT, 13.5))),
    *(Case("4 V terms", t, 1001, 0, V, (), n, 1.1) for t, n in ((BFLOAT, 14), (FLOAT, 10.6))),
    *(Case("all V terms", t, 1001, 0, EVERY_V, (), n, 1.12) for t, n in ((BFLOAT, 19.8), (FLOAT, 14.1))),
    *(Case("4 V terms", t, 21841, 0, V, (), n, 1.1) for t, n in ((BFLOAT, 13.6), (FLOAT, 12.7))),
    *(Case("4 V terms", t, 100, 0, V, (), 12.2, 1.1, least_bits=64) for t in (BFLOAT, HALF)),
    Case("4 V terms", FLOAT, 100, 0, V, (), 12.3, 1.1),
    *(Case("4 V terms", t, 10, 0, V, (), 26, 1.25, least_bits=32) for t in (BFLOAT, FLOAT)),
    Case("a segment", BFLOAT, 128256, 0, V, (), 8, 1.1, "first"),
    Case("its second sweep, for TV", BFLOAT, 128256, 0, V, (), 7.4, 1.1, "second"),
    *(Case("4 V terms, a cluster", t, 128256, 0, V, (), n, 1.1, "cluster") for t, n in ((BFLOAT, 11), (FLOAT, 10.7))),
    *(Case("all V terms, a cluster", t, 128256, 0, EVERY_V, (), 14.4, 1.1, "cluster") for t in (BFLOAT, FLOAT)),
    Case("all V terms, a cluster", BFLOAT, 262144, 0, EVERY_V, (), 14.3, 1.1, "cluster"),
    # Features are 3% of what a cluster reads here: four a thread, 64 bits.
    Case("energy x norm 0.3, a cluster", BFLOAT, 128256, 4096, ("energy",), (0.3,), 7.9, 1.1, "cluster", 64),
    Case("4 V x 12 norms, a cluster", BFLOAT, 128256, 4096, V, GRID, 15.8, 1.1, "cluster", 64),
    *(Case("norms 1, 2", t, 0, 2048, (), (1.0, 2.0), n, 0.1) for t, n in ((BFLOAT, 3.8), (FLOAT, 3.3))),
    *(Case("norm 0.3", t, 0, 2048, (), (0.3,), 6.3, 2.1) for t in (BFLOAT, FLOAT)),
    *(Case("12 norms", t, 0, 2048, (), GRID, 25.8, 2.1) for t in (BFLOAT, FLOAT)),
    Case("4 V x norms 1, 2", BFLOAT, 1000, 2048, V, (1.0, 2.0), 6.2, 0.4),
    Case("energy x norm 0.3", BFLOAT, 1000, 2048, ("energy",), (0.3,), 6.5, 1.8),
    Case("4 V x norm 0.3", BFLOAT, 1000, 2048, V, (0.3,), 8, 1.8),
    Case("4 V x 12 norms", BFLOAT, 1000, 2048, V, GRID, 22.4, 1.8),
    # 3 and 4 are arithmetic. A load and a multiplication of G serve 4 rows, a load of features serves 8 classes.
    Case("BatchGrad, h >= 0", FLOAT, 1000, 2048, (), (), 3.7, 0.1, "plain", least_bits=64),
    Case("BatchGrad, h of any sign", FLOAT, 1000, 2048, (), (), 4.4, 0.1, "signed", least_bits=64),
    # Of the terms, and once a row logarithms and powers of two, on each of 16 lanes, or of 32 where labels are given:
    # 100 to 300 a thread. A special function for each power and each logarithm of a power.
    *(
        Case(what, t, C, 0, (("gradient", q, r, power, side),), (), n, k, "gradient")
        for what, t, C, q, r, power, side, n, k in (
            ("E_q || e_Y - p ||_2, q given", FLOAT, 1000, "given", 2.0, 1.0, "outside", 35.8, 3.6),
            ("E_q || e_Y - p ||_2, q given", BFLOAT, 1000, "given", 2.0, 1.0, "outside", 38.5, 3.6),
            ("E_q || e_Y - p ||_2, q given", BFLOAT, 12288, "given", 2.0, 1.0, "outside", 47.6, 3.6),
            ("E_q || e_Y - p ||_1^2, q predicted", BFLOAT, 1000, "predicted", 1.0, 2.0, "outside", 20.4, 3.3),
            ("E_q || e_Y - p ||_3, q uniform", BFLOAT, 1000, "uniform", 3.0, 1.0, "outside", 32.1, 6.6),
            ("|| q - p ||_2, q given", BFLOAT, 1000, "given", 2.0, 1.0, "inside", 33.7, 1.3),
        )
    ),
]
ARCHITECTURES = (80, 90, 100)


def main() -> int:
    print(__doc__.split("\n\n")[0])
    print(f"Triton {triton.__version__}; budgets are for sm_90")
    if not shapes.clusters((9, 0), triton.__version__):
        print("No clusters, which need a newer Triton: long rows are in segments")
    print(" " * 57, "regs  smem        loads special  FP32  total budget  rare x memory")
    failed = []
    for architecture in ARCHITECTURES:
        for case in CASES:
            if case.kernel == "cluster" and not shapes.clusters(divmod(architecture, 10), triton.__version__):
                continue
            report = analyse(compile_case(case, GPUTarget("cuda", architecture, 32)), case)
            name = f"sm_{architecture} {case.what}, C={case.C} D={case.D} {str(case.dtype).removeprefix('torch.')}"
            widths = " ".join(f"{n}x{bits}" for bits, n in sorted(report.widths.items()))
            wrong = []
            if report.spills:
                wrong.append(f"{report.spills} spills")
            if min(report.widths) < case.least_bits:
                wrong.append(f"loads of {min(report.widths)} bits")
            if architecture == 90 and report.total > case.total:
                wrong.append("more instructions than budgeted")
            if architecture == 90 and report.special > case.special:
                wrong.append("more special functions than budgeted")
            print(
                f"{name:57s} {report.registers:4d} {report.shared:5d} {widths:>12s} {report.special:7.2f}"
                f" {report.fp32:5.1f} {report.total:6.2f} {case.total:6.1f}"
                f" {report.rare:5.1f} {report.over_memory:8.2f}",
                *wrong,
            )
            failed += [f"{name}: {x}" for x in wrong]
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The prediction of gpu_static.py: that its constants come from the measured table, and what it is made from."""

import importlib
import math
from pathlib import Path

import gpu_model
import pytest


def test_the_constants_are_fitted():
    measured = gpu_model.measured()
    assert gpu_model.fit(measured) == pytest.approx(gpu_model.FITTED, rel=2e-3)
    off = gpu_model.errors(gpu_model.FITTED, measured)
    assert gpu_model.rms(off) < 0.054  # 4.7%, as its text says
    assert max(map(abs, off)) < 0.14
    # Of the pairs that measured most apart, the slower one is predicted to be.
    predicted = [min(1, k["share"] / 100) * math.exp(e) for k, e in zip(measured.kernels, off, strict=True)]
    for k, p in zip(measured.kernels, predicted, strict=True):
        for other, q in zip(measured.kernels, predicted, strict=True):
            if k["share"] < 0.65 * other["share"]:
                assert p < q, (k, other)


def test_limits_of_the_model():
    idle = gpu_model.Warp(read=8192, written=0, in_flight=8192, instructions=1, special=0, warps=64)
    share = gpu_model.FITTED.share
    assert share(idle, 16.0) == pytest.approx(1, rel=1e-3)
    assert share(idle._replace(written=8192), 16.0) == pytest.approx(0.5, rel=1e-3)
    assert share(idle._replace(instructions=8192), 16.0) == pytest.approx(0.25, rel=0.1)  # 2048 clocks where 512 read
    assert share(idle._replace(special=1024), 16.0) == pytest.approx(0.25, rel=0.1)
    few = [share(idle._replace(instructions=512, warps=n), 16.0) for n in (1, 2, 4, 8, 16, 32, 64)]
    assert few == sorted(few)
    assert few[0] == pytest.approx(1 / gpu_model.FITTED.step, rel=0.01)


def test_the_bound_is_the_busiest_units():
    warp = gpu_model.Warp(read=512, written=0, in_flight=512, instructions=128, special=8, warps=64)
    assert warp.bound(16.0) == 1
    assert warp._replace(written=512).bound(16.0) == 1 / 2
    assert warp._replace(instructions=512).bound(16.0) == 1 / 4  # 128 clocks where 32 read
    assert warp._replace(special=64).bound(16.0) == 1 / 4
    measured = gpu_model.measured()
    for k in measured.kernels:
        assert gpu_model.Warp(**k["warp"]).bound(measured.bytes_per_clock) > 0.97 * min(1, k["share"] / 100), k


@pytest.fixture
def gpu_static(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    return importlib.import_module("benchmarks.gpu_static")


@pytest.mark.parametrize(
    ("registers", "program", "shared", "warps"),
    [
        (160, 1, 0, 12),  # 160 x 32 x 12 registers, and not a 13th: each quarter has its own
        (178, 1, 0, 8),
        (32, 1, 0, 32),  # no more programs
        (32, 4, 2048, 64),
        (116, 8, 128, 16),
        (255, 4, 0, 8),
        (64, 4, 100 << 10, 8),
    ],
)
def test_warps_held(gpu_static, registers, program, shared, warps):
    assert gpu_static.warps_held(registers, gpu_static.Compiled(b"", program, shared, 1, 4, program)) == warps


def test_bytes_in_flight(gpu_static):
    def instruction(opcode, operands):
        return gpu_static.Instruction("", opcode, operands)

    code = [
        instruction("LDG.E.128", "R4, desc[UR4][R2.64]"),
        instruction("LDG.E.128", "R8, desc[UR4][R2.64+0x200]"),
        instruction("LDG.E.EL.64", "R20, desc[UR4][R30.64]"),  # a small table
        instruction("FADD", "R0, R7, R0"),  # the last word of the first
        instruction("LDG.E.64", "R4, desc[UR4][R2.64+0x400]"),
        instruction("FADD", "R0, R4, R8"),
        instruction("LDG.E", "R9, desc[UR4][R2.64+0x500]"),
        instruction("EXIT", ""),
    ]
    flow = gpu_static.Flow(code, {})
    assert flow.in_flight(flow.reachable(0)) == 32

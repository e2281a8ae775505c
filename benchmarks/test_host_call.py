"""The host's part of a GPU call: all of it but the driver's launch, which is stubbed. It needs no GPU.

Tensors of the CPU stand in for CUDA's, and a function of the C library that returns 0 for the driver's.
"""

import ctypes
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from harness import OURS, in_turn, stopwatches, weighed

import fastood
from fastood import _plan
from fastood.kernels import triton
from fastood.kernels.cpu import _native


@pytest.fixture
def stubbed_driver(monkeypatch):
    if find_spec("triton") is None or _native is None:
        pytest.skip("needs Triton and the C++ part")
    from fastood.kernels.triton import launch

    def compiled(of, examples):
        sizes = [4 if isinstance(x, int | float) else 8 for x in examples if x is not None]
        return launch.Compiled(0, 32 * of.shape.warps, 0, (*sizes, 8, 8), None)

    zero = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value  # of its first argument: a kernel's handle, 0
    _native.use_driver(zero, zero, zero, zero)
    monkeypatch.setattr(triton, "unusable", lambda device, dtype: None)
    monkeypatch.setattr(launch, "has_driver", lambda on: True)
    monkeypatch.setattr(launch, "compiled_kernel", compiled)
    yield
    _plan._PLANS.clear()
    launch._driver.cache_clear()  # which tells the native part the real ones
    _native.use_driver(0, 0, 0, 0)


def test_host_part_of_a_gpu_call(compare, stubbed_driver):
    f, h = torch.randn(1, 1000), torch.randn(1, 2048)
    detector, q = fastood.BatchGrad(torch.randn(1000, 2048)), f.softmax(-1)
    own = 0, 0.1, 0.3, 0.5, 0.8, 1, 2, 3, 4, 5, 6, 7
    calls = {
        OURS: partial(fastood.score, f, h, backend="triton"),
        "msp": partial(fastood.score, f, method="msp", backend="triton"),
        "sweep, 4 V x 12 norms": partial(fastood.sweep, f, h, backend="triton"),
        "sweep, 4 V x 12 norms of one's own": partial(fastood.sweep, f, h, norms=own, backend="triton"),
        "2 norms": partial(fastood.norms, h, [1, 2], backend="triton"),
        "BatchGrad, 4 launches": partial(detector.score, f, h, backend="triton"),
        "log MSP": partial(fastood.score, f, method="msp", log=True, backend="triton"),
        "GEN": partial(fastood.score, f, method="gen", backend="triton"),
        "E_q of L2, q given, 2 launches": partial(fastood.gradient_norm, f, h, q, 2, backend="triton"),
        "all scores, 2 launches": partial(fastood.scores, f, h, backend="triton"),
        "the allocation alone": partial(f.new_empty, (1,)),
    }
    for call in calls.values():
        call()
    if compare.disabled:
        return
    timers, rounds = stopwatches(calls, f.device, *((0, 3) if compare.quick else (1.5, 20)))
    times = in_turn(timers, rounds)
    compare.record("host's part of a GPU call, the driver stubbed · N=1 C=1000 D=2048 · float32", times, weighed(times))

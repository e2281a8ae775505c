"""Launches (launch.py): which there are, and how launcher.cpp makes them, with a driver that runs them interpreted."""

import ctypes
import itertools
import math

import pytest
import torch
from interpreter import needs_triton

import fastood
from fastood import _plan
from fastood.kernels import Request
from fastood.kernels.cpu import _native
from fastood.kernels.triton import shapes


@needs_triton
@pytest.mark.parametrize("C", [1000, 50_257])
def test_rows_take_one_launch_of_any_number(C):
    from fastood.kernels.triton import launch

    f, h = (launch.Layout(torch.bfloat16, n, n, 0) for n in (C, 20))
    plan = shapes.plan_of(Request(("energy", "tv"), (1.0, 2.0), (), (4, -1)))
    (program,) = launch.scores(torch.device("cpu"), f, h, None, plan, bias=False, log=False, by_row=True)
    assert (len(program.launches), program.buffers, program.group) == (1, (), 0)


class Driver:
    """Stands in for CUDA's: what launcher.cpp packs is unpacked and run by the interpreter, on the CPU."""

    def __init__(self, launch):
        self.compiled, self.streams, self.grids = [], [], []
        kernel_type = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_void_p,
            *[ctypes.c_uint] * 7,
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_void_p,
        )
        context_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
        self.functions = [kernel_type(self.launch), *[context_type(lambda _: 0) for _ in range(3)]]
        self.addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in self.functions]
        self.Argument = launch.Argument

    def compile(self, launch, examples):
        """As launch.compiled_kernel; the "function" is a place in a list, from 1 on."""
        from fastood.kernels.triton.launch import Compiled

        def size(x):
            return 4 if isinstance(x, float) or (isinstance(x, self.Argument) and x.base == 0) else 8

        self.compiled.append((launch, [e for e, x in zip(examples, launch.arguments, strict=True) if x is not None]))
        sizes = tuple(size(x) for x in launch.arguments if x is not None)
        return Compiled(len(self.compiled), 32 * launch.shape.warps, 64, (*sizes, 8, 8), None)

    def launch(self, function, x, y, z, threads, one, two, shared, stream, arguments, extra):
        launch, examples = self.compiled[function - 1]
        assert (z, threads, one, two, shared, extra) == (1, 32 * launch.shape.warps, 1, 1, 64, None)
        values = []
        for place, example in zip(arguments, examples, strict=False):
            if isinstance(example, int):
                values.append(ctypes.c_int32.from_address(place).value)
            elif isinstance(example, float):
                values.append(ctypes.c_float.from_address(place).value)
            else:  # memory from an address on, of which nobody says how much
                address, dtype = ctypes.c_int64.from_address(place).value, getattr(example, "dtype", example)
                values.append(torch.frombuffer((ctypes.c_char * (1 << 40)).from_address(address), dtype=dtype))
        assert [ctypes.c_int64.from_address(arguments[len(examples) + i]).value for i in (0, 1)] == [0, 0]
        values = iter(values)
        given = [None if x is None else next(values) for x in launch.arguments]
        launch.kernel[(x, y)](*given, **launch.constants, **launch.shape.options)
        self.grids.append((x, y))
        self.streams.append(stream)
        return 0


@pytest.fixture
def driver(triton_device, monkeypatch, new_programs):
    from fastood.kernels.cpu import _native
    from fastood.kernels.triton import launch

    if triton_device != "cpu" or _native is None:
        pytest.skip("needs the C++ part, and Triton's interpreter")
    stands_in = Driver(launch)
    monkeypatch.setattr(launch, "has_driver", lambda on: True)
    monkeypatch.setattr(launch, "compiled_kernel", stands_in.compile)
    _native.use_driver(*stands_in.addresses)
    yield stands_in
    _native.use_driver(0, 0, 0, 0)


@pytest.mark.skipif(_native is None, reason="needs the C++ part")
@pytest.mark.parametrize(
    ("grid", "number"),
    [((1, 1 << 30), (0, 0, 0)), ((1, 1), (5, 1 << 30, 0)), ((1, 1), (5, 0, 1 << 30))],
    ids=["grid", "a row", "a block"],
)
def test_rows_of_which_a_number_does_not_fit_are_left_to_triton(grid, number):
    """Of numbers of 32 bits: two rows make 2^31 of this grid or argument, which one row does not."""
    launched = []

    def launch_kernel(function, x, *others):
        launched.append(x)
        return 0

    no_context = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: 0)
    kernel = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)(
        launch_kernel
    )
    addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in (kernel, *[no_context] * 3)]
    _native.use_driver(*addresses)
    try:
        route, f = _native.route((-1,), False), torch.zeros(3, 4)
        launches = ((1, 32, 0, 1, grid[1], 1, ((0, 4, *number),)),)
        _native.add_program(route, ((2, 4, 4, f.data_ptr() % 16), None, None), 1, 0, 1, 0, 0, (), launches, None)
        assert _native.launch(route, f[:1], None, None).shape == (1,)
        assert launched == [grid[1]]
        assert _native.launch(route, f[:2], None, None) is None
    finally:
        _native.use_driver(0, 0, 0, 0)


@needs_triton
def test_a_thread_without_a_context_is_given_the_devices_own(monkeypatch):
    """With none a program would be kept that no thread can launch."""
    from fastood.kernels.triton import launch

    class Library:
        current, retained = None, []

        def cuCtxGetCurrent(self, out):
            out._obj.value = self.current

        def cuDevicePrimaryCtxRetain(self, out, device):
            self.retained.append(device)
            out._obj.value = 100 + device

        def cuCtxSetCurrent(self, context):
            self.current = context.value

    library = Library()
    monkeypatch.setattr(launch, "_driver", lambda: library)
    for device in (3, 5):  # the second finds the context of the first, in which its kernels were loaded
        launch._bind_context(torch.device("cuda", device))
        assert (library.current, library.retained) == (103, [3])


def calls_of(C, D):
    q = torch.softmax(torch.randn(300, C), -1)
    anchors = fastood.BatchGrad(torch.randn(C, D))
    return {
        "score": lambda f, h, b: fastood.score(f, h, backend=b),
        "msp beside feats": lambda f, h, b: fastood.score(f, h, "msp", norm=None, backend=b),
        "sweep": lambda f, h, b: fastood.sweep(f, h, ["tv", "energy"], [0, 0.3, 2], backend=b),
        "scores": lambda f, h, b: torch.stack(
            [*fastood.scores(f, h, ["varsum", "gen", "gradnorm"], M=3, backend=b).values()]
        ),
        "norms": lambda f, h, b: fastood.norms(h, [0.5, math.inf], backend=b),
        "statistics": lambda f, h, b: torch.stack([*fastood.row_stats(f, ["tv", "plogp"], backend=b).values()]),
        "GEN": lambda f, h, b: fastood.score(f, method="gen", M=3, backend=b),
        "log ExGrad": lambda f, h, b: fastood.score(f, h, "exgrad", log=True, backend=b),
        "power sum": lambda f, h, b: fastood.row_stats(f, [("power_sum", 3)], backend=b)["power_sum", 3],
        "gradient": lambda f, h, b: fastood.gradient_norm(f, h, q[: len(f)], 3, expectation="outside", backend=b),
        "BatchGrad": lambda f, h, b: anchors.score(f, h, backend=b),
        "raw BatchGrad": lambda f, h, b: anchors.score(f, h, oriented=False, backend=b),
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("score", torch.bfloat16), *zip(calls_of(3, 3), itertools.cycle([torch.float32, torch.bfloat16]))],
    ids=str,
)
def test_launches_of_the_native_part(driver, name, dtype):
    """Of any number of rows, in memory of several layouts: what was laid out once holds for all later calls."""
    torch.manual_seed(0)
    C, D = 10, 33
    call = calls_of(C, D)[name]
    wide_f, wide_h = torch.randn(140, C + 3).to(dtype), torch.randn(140, D + 1).to(dtype)
    for f, h in (
        (wide_f[:, :C].clone(), wide_h[:, :D].clone()),
        (wide_f[:, 3:], wide_h[:, 1:]),
        (wide_f[:1, 2 : C + 2], wide_h[:1, :D]),
        (wide_f[3:9, :C].clone().T.clone().T, wide_h[3:9, 1:]),  # columns beside each other
        (wide_f[:0, 3:], wide_h[:0, 1:]),
    ):
        before = len(driver.compiled), len(driver.grids)
        for rows in (len(f), len(f) // 2):
            expected = call(f[:rows].float(), h[:rows].float(), "reference")
            torch.testing.assert_close(call(f[:rows], h[:rows], "triton"), expected, rtol=1e-4, atol=1e-5)
        launches = len(driver.compiled) - before[0]
        assert launches <= (8 if "BatchGrad" in name else 2), "a number of rows made a new program"
        assert len(driver.grids) > before[1] or not len(f)


def test_warmed_up(driver):
    """No later call of the same kind compiles anything, of any number of rows or at another temperature."""
    fastood.warm_up(10, 4, torch.bfloat16, ["energy", "gradnorm"], device="cpu", backend="triton", norm=2)
    compiled = len(driver.compiled)
    assert compiled == 2
    f, h = torch.randn(70, 10).bfloat16(), torch.randn(70, 4).bfloat16()
    for rows in (1, 70):
        fastood.score(f[:rows], h[:rows], norm=2, backend="triton")
        fastood.score(f[:rows], h[:rows], "gradnorm", backend="triton")
    assert len(driver.compiled) == compiled
    with pytest.raises(ValueError, match="methods"):
        fastood.warm_up(10, methods=["enrgy"], device="cpu")


@pytest.mark.parametrize("name", ["GEN", "scores", "gradient", "log ExGrad", "statistics"])
def test_a_warm_call_of_several_parts_takes_the_short_way(driver, name, monkeypatch):
    f, h, call = torch.randn(5, 10), torch.randn(5, 4), calls_of(10, 4)[name]
    expected = call(f, h, "triton")
    launched = len(driver.grids)
    monkeypatch.delattr(_plan, "logits_and_feats")  # with which the long one begins
    assert torch.equal(call(f, h, "triton"), expected)
    assert len(driver.grids) == 2 * launched


def test_batchgrad_in_groups_of_rows(driver, monkeypatch):
    monkeypatch.setattr(shapes, "TEMPORARY", 1)
    torch.manual_seed(0)
    f, h = torch.randn(300, 7), torch.randn(300, 5)
    anchors = fastood.BatchGrad(torch.randn(7, 5))
    expected = anchors.score(f, h, backend="reference")
    torch.testing.assert_close(anchors.score(f, h, backend="triton"), expected, rtol=1e-5, atol=0)
    assert len(driver.grids) == 3 * 4


@pytest.mark.parametrize(
    "bad",
    [
        lambda f, h: (f, h[:3]),
        lambda f, h: (f, h.int()),
        lambda f, h: (f[0], h),
        lambda f, h: (f.double(), h),
        lambda f, h: (f.to("meta"), h),
        lambda f, h: (f.numpy(), h),
    ],
)
def test_a_warm_call_still_refuses_what_is_wrong(driver, bad):
    f, h = torch.randn(5, 10), torch.randn(5, 4)
    fastood.score(f, h, backend="triton")
    launched = len(driver.grids)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"feats|logits|float64|mixed"):
        fastood.score(*bad(f, h), backend="triton")
    assert len(driver.grids) == launched


def test_a_warm_call_leaves_autograd_and_transforms_to_torch(driver):
    f, h = torch.randn(5, 10), torch.randn(5, 4)
    fastood.score(f, h, backend="triton")
    launched = len(driver.grids)
    x = f.clone().requires_grad_()
    fastood.score(x, h, backend="triton").sum().backward()
    assert x.grad.abs().sum() > 0
    torch.func.vmap(lambda row: fastood.score(row[None], method="msp", backend="triton"))(f)
    assert len(driver.grids) == launched


def test_an_error_of_the_driver_is_raised(driver):
    f = torch.randn(5, 10)
    fastood.score(f, backend="triton")
    from fastood.kernels.cpu import _native

    failing = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 400)
    _native.use_driver(ctypes.cast(failing, ctypes.c_void_p).value, *driver.addresses[1:])
    with pytest.raises(RuntimeError, match="error 400"):
        fastood.score(f, backend="triton")

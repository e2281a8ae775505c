"""Fails where the arguments that launcher.cpp packs are not those of the kernel, as Triton's JIT compiles it for sm_90.

Triton and launcher.cpp are told of a driver that is not there: it runs nothing, and looks at what it is given.
"""

import ctypes
import os
import struct
from itertools import count

os.environ["FASTOOD_BACKEND"] = "triton"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fastood
from fastood.kernels import triton
from fastood.kernels.cpu import _native
from fastood.kernels.triton import launch

handles, kernels, launched = count(1), {}, []


class Utilities:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, binary, shared, device):
        return next(handles), next(handles), 0, 0, 1024


class Driver:
    utils = Utilities()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        return lambda *arguments: launched.append(metadata.name)  # as Triton launches


def compiled_kernel(of, examples, compiled_kernel=launch.compiled_kernel):
    found = compiled_kernel(of, examples)
    names = [name for name, x in found.kernel.src.signature.items() if x != "constexpr" and not isinstance(x, tuple)]
    given = [n for n, x in zip(of.kernel.arg_names, of.arguments, strict=False) if x is not None]
    assert names == given, f"{of.kernel.__name__} has {names} for {given}"
    kernels[found.function] = of, found, names
    return found


def check_launch(handle, x, y, z, threads, one, two, shared, stream, arguments, extra):
    of, found, names = kernels[handle]
    assert (z, one, two, stream, extra) == (1, 1, 1, None, None)
    assert (threads, shared) == (found.threads, found.shared)
    packed = [(ctypes.c_int32 if n == 4 else ctypes.c_int64).from_address(arguments[i]).value
              for i, n in enumerate(found.sizes)]  # fmt: skip
    assert not any(packed[len(names) :])  # Triton's own
    attributes = found.kernel.src.attrs
    for name, value in zip(names, packed, strict=False):
        place = of.kernel.arg_names.index(name)
        wanted, kind = of.arguments[place], found.kernel.src.signature[name]
        if isinstance(wanted, torch.Tensor):
            assert value == wanted.data_ptr(), name
        elif isinstance(wanted, float):
            assert (kind, struct.pack("<i", value)) == ("fp32", struct.pack("<f", wanted)), name
        elif wanted.base == launch.NUMBER:
            assert kind in ("i32", "i64"), name
            assert value == wanted.at or wanted.per_row or wanted.per_block, name
        else:
            assert kind.startswith("*"), name
        assert value % 16 == 0 or (place,) not in attributes, f"{name} is not as aligned as the kernel takes it to be"
    launched.append(of.kernel.__name__)


def failing(handle, *rest):
    try:
        check_launch(handle, *rest)
    except BaseException as failed:  # which would not leave the callback
        mistakes.append(failed)
    return 0


mistakes = []
address = ctypes.c_void_p
kernel = ctypes.CFUNCTYPE(ctypes.c_int, address, *[ctypes.c_uint] * 7, address, ctypes.POINTER(address), address)(
    failing
)
context = ctypes.CFUNCTYPE(ctypes.c_int, address)(lambda _: 0)
driver.set_active(Driver())
triton.unusable = lambda device, dtype: None
launch.has_driver = lambda on: True
launch.compiled_kernel = compiled_kernel
_native.use_driver(*(ctypes.cast(x, address).value for x in (kernel, *[context] * 3)))

for C, D, dtype in ((10, 33, torch.float32), (1, 1, torch.bfloat16)):
    wide_f, wide_h = torch.randn(5, C + 3).to(dtype), torch.randn(5, D + 1).to(dtype)
    f, h, q = wide_f[:, :C].clone(), wide_h[:, :D].clone(), torch.softmax(torch.randn(5, C), -1)
    for bias, percentile in ((None, 0.5), (torch.randn(C), 0.999)):
        fastood.Fitted("scale", head=(torch.randn(C, D), bias), percentile=percentile).score(f, h)
    fastood.score(f, h)
    if C == 1:  # of numbers that are 1 Triton makes constants, where it is not told otherwise
        continue
    fastood.score(wide_f[:, 1 : C + 1], wide_h[:, 1:], "exgrad", log=True)
    fastood.score(f, method="gen", M=3)
    fastood.gradient_norm(f, h, q, 3, expectation="outside")
    fastood.BatchGrad(torch.randn(C, D)).score(f, h)
layer = torch.randn(20, 32).bfloat16()
fastood.score_linear(layer[:3], layer, torch.randn(20), "varsum", norm=None, predict=True)
if mistakes:
    raise mistakes[0]
assert {"scores", "gen", "gradient", "turned", "partial_sums", "merged", "factors", "energies"} == set(launched)

"""The interpreter's exp2, log2, sqrt and division in float32 replaced by models of what a GPU has for them.

numpy's are nearly exact, and never flush; so the interpreter would pass what a GPU fails. PTX promises of
- ex2.approx.ftz.f32: relative error at most 2^-22; subnormal results are 0;
- lg2.approx.ftz.f32: absolute error at most 2^-22.6 for inputs in (1/2, 2), else relative; subnormal inputs are 0;
- sqrt.approx.ftz.f32: relative error at most 2^-23; subnormal inputs are 0;
- div.full.f32, and rcp.approx.ftz.f32 where device/words.py has it: at most 2 and 1 units in the last place.
The models err up to that by a hash of the operands: the same operands give the same bits. Powers of two are exact. All
else in the kernels' PTX, but a ceil, is exactly rounded and keeps subnormals: add, mul, fma, sqrt.rn, min, max.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

TINY = np.finfo(np.float32).tiny


def error_of(*operands):
    """A number in [-1, 1] for each operand, or pair of them, that looks random."""
    mixed = np.uint32(0)
    for x in operands:
        mixed = (mixed ^ np.ascontiguousarray(x).view(np.uint32)) * np.uint32(0x9E3779B1)
        mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA6B)
        mixed ^= mixed >> np.uint32(13)
    return mixed / 2.0**31 - 1


def exp2(x):
    wide = np.exp2(x.astype(np.float64))
    wide = np.where(x == np.floor(x), wide, wide * (1 + error_of(x) * (2.0**-22 - 2.0**-24)))  # and of rounding
    return np.where(wide < TINY, 0, wide).astype(np.float32)


def log2(x):
    flushed = np.where(np.abs(x) < TINY, 0, x)
    wide = np.log2(flushed.astype(np.float64))
    near = (x > 0.5) & (x < 2)
    most = np.where(near, 2.0**-22.6 - 2.0**-25, np.abs(wide) * (2.0**-22.6 - 2.0**-24))
    inexact = np.isfinite(wide) & (np.frexp(flushed)[0] != 0.5)
    return (wide + np.where(inexact, error_of(x) * most, 0)).astype(np.float32)


def sqrt(x):
    flushed = np.where(np.abs(x) < TINY, 0, x)
    wide = np.sqrt(flushed.astype(np.float64))
    inexact = np.isfinite(wide) & (np.frexp(wide)[0] != 0.5)
    return (wide * (1 + np.where(inexact, error_of(x), 0) * (2.0**-23 - 2.0**-24))).astype(np.float32)


def divide(x, y):
    exact = x / y
    of_power = (np.abs(np.frexp(y)[0]) == 0.5) | ~np.isfinite(exact) | (exact == 0)
    steps = np.rint(error_of(x, y) * 1.5)  # beside the rounding of `exact`
    return np.where(of_power, exact, exact + steps.astype(np.float32) * np.spacing(exact))


def install():
    def of_float32(model, otherwise):
        def create(builder, *operands):
            data = [np.asarray(x.data) for x in operands]
            if data[0].dtype != np.float32:
                return otherwise(builder, *operands)
            with np.errstate(all="ignore"):
                return TensorHandle(model(*np.broadcast_arrays(*data)), operands[0].dtype.scalar)

        return create

    for name, model in (("exp2", exp2), ("log2", log2), ("sqrt", sqrt), ("fdiv", divide)):
        create = f"create_{name}"
        setattr(InterpreterBuilder, create, of_float32(model, getattr(InterpreterBuilder, create)))


def hasten():
    """The interpreter without what takes it most of its time, and is for nothing in a process that compiles nothing."""
    # It puts its functions in the place of Triton's at each call of each helper.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    # It makes a table to look up what numpy calls a type, and works out anew what types of blocks have in common.
    of_scalar, words = functools.cache(interpreter._get_np_dtype), np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda of: words if isinstance(of.scalar, tl.pointer_type) else of_scalar(of.scalar)
    make, made, shapes, of_name = tl.block_type.__init__, {}, {}, {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, *(getattr(n, "value", n) for n in shape)
        if key not in made or isinstance(element_ty, tl.pointer_type):  # of which a name does not say all
            make(self, element_ty, shape)
            self.shape = shapes.setdefault(key[1:], self.shape)
            made[key] = vars(self).copy()
        vars(self).update(made[key])

    def tensor(self, handle, type):
        if type.name not in of_name:
            shape = type.shape if type.is_block() else ()
            of_name[type.name] = tl.tuple(list(map(tl.constexpr, shape))), tl.constexpr(math.prod(shape))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_name[type.name]

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    # It broadcasts operands that have one shape.
    otherwise = TritonSemantic.broadcast_impl_value

    def broadcast(self, lhs, rhs):
        x, y = lhs.type, rhs.type
        alike = x.is_block() and y.is_block() and x.shape is y.shape
        return (lhs, rhs) if alike else otherwise(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast

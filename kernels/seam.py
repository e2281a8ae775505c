"""When a call belongs to PyTorch: tracers and autograd can look into its operations, but into no kernel of ours."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])


def _of_torch(name: str, otherwise: Any) -> Any:
    """One of torch's private functions, or what stands in for it in a torch that has dropped it."""
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        return otherwise


def _always() -> bool:
    """Where nobody can tell any more, the answer that is slow and right."""
    return True


# Each tells whether something looks into torch's operations; the C++ backend asks them too.
_tracing = _of_torch("_C._is_tracing", _of_torch("jit.is_tracing", _always))  # torch.jit.trace
_functorch = _of_torch("_C._are_functorch_transforms_active", _always)  # vmap, jvp, torch.func.grad
_dispatching = _of_torch("_C._len_torch_dispatch_stack", _always)  # make_fx, FakeTensorMode and the like
MODES: tuple[Callable[[], Any], ...] = _tracing, _functorch, _dispatching
_is_functional = _of_torch("_is_functional_tensor", lambda x: True)
# Holds the level of forward-mode autograd, -1 outside of it, which torch.compile checks before each call.
forward: Any = forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)


def constant(function: F) -> F:
    """`function` as one that torch.compile calls once instead of tracing it: of constants, with a constant result.

    As torch.compiler.assume_constant_result does, which imports the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def exporting() -> bool:
    """Whether torch.export is at work. Its own question is answered by torch 2.8's compiler with True, always."""
    return torch.compiler.is_exporting()


def traced(*tensors: Tensor | None) -> bool:
    """Whether plain torch operations are asked for: by a compiler or transform, for autograd, for a subclass."""
    if torch.compiler.is_compiling() or _tracing() or _functorch() or _dispatching() or forward_mode():
        return True
    return any(map(_looked_into, tensors))


def forward_mode() -> bool:
    return forward._current_level >= 0


def differentiated() -> bool:
    """Whether a function transform or forward-mode autograd is at work, in which an operator of ours has no part.

    torch.compile can trace this, unlike the rest of MODES.
    """
    if _functorch():
        return True
    return forward_mode()


def _looked_into(x: Tensor | None) -> bool:
    if x is None:
        return False
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return True
    return (x.requires_grad and torch.is_grad_enabled()) or _is_functional(x)

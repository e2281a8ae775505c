"""When a call belongs to PyTorch: tracers and autograd can look into its operations, but into no kernel of ours."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


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
MODES: tuple[Callable[[], Any], ...] = (
    _of_torch("_C._is_tracing", _of_torch("jit.is_tracing", _always)),  # torch.jit.trace
    _of_torch("_C._are_functorch_transforms_active", _always),  # vmap, jvp, torch.func.grad
    _of_torch("_C._len_torch_dispatch_stack", _always),  # make_fx, FakeTensorMode and the like
)
_is_functional = _of_torch("_is_functional_tensor", lambda x: True)


def traced(*tensors: Tensor | None) -> bool:
    """Whether plain torch operations are asked for: by a compiler or transform, for autograd, for a subclass."""
    return torch.compiler.is_compiling() or _transformed() or any(x is not None and _grows(x) for x in tensors)


def _transformed() -> bool:
    return any(mode() for mode in MODES) or getattr(forward_ad, "_current_level", 0) >= 0


def _grows(x: Tensor) -> bool:
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return True
    return (x.requires_grad and torch.is_grad_enabled()) or _is_functional(x)

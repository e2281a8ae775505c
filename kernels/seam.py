"""When a call belongs to PyTorch: tracers and autograd can look into its operations, but into no kernel of ours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Each tells whether something looks into torch's operations; the C++ backend asks them too.
MODES = (
    torch._C._is_tracing,  # torch.jit.trace
    torch._C._are_functorch_transforms_active,  # vmap, jvp, torch.func.grad
    torch._C._len_torch_dispatch_stack,  # make_fx, FakeTensorMode and the like
)


def traced(*tensors: Tensor | None) -> bool:
    """Whether plain torch operations are asked for: by a compiler or transform, for autograd, for a subclass."""
    return torch.compiler.is_compiling() or _transformed() or any(x is not None and _grows(x) for x in tensors)


def _transformed() -> bool:
    return any(mode() for mode in MODES) or forward_ad._current_level >= 0


def _grows(x: Tensor) -> bool:
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return True
    return (x.requires_grad and torch.is_grad_enabled()) or torch._is_functional_tensor(x)

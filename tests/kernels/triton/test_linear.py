"""The kernel of features and a last layer (fused_linear.py, device/linear.py): tests/test_linear.py has its results."""

import program
import pytest
import torch
from interpreter import needs_triton, only_compiled

import fastood
from fastood.kernels import triton


def random_layer(N, D, C):
    torch.manual_seed(0)
    return torch.randn(N, D), torch.randn(C, D) * 3 / D**0.5, torch.randn(C)


def test_bits_do_not_depend_on_the_batch(triton_device):
    h, w, b = (x.bfloat16().to(triton_device) for x in random_layer(40, 64, 700))
    of_all = fastood.score_linear(h, w, b, backend="triton")
    for rows in (slice(0, 1), slice(7, 9), slice(3, 40)):
        assert torch.equal(fastood.score_linear(h[rows], w, b, backend="triton"), of_all[rows])


def test_what_the_kernel_does(triton_device, monkeypatch):
    """Halves in rows of 16 elements or more, for what one sweep gives; nothing else."""
    done = []
    monkeypatch.setattr(triton, "linear", lambda *x, linear=triton.linear: done.append(linear(*x)) or done[-1])
    h, w, b = (x.to(triton_device) for x in random_layer(3, 32, 20))
    for dtype, method, options, expected in [
        (torch.bfloat16, "energy", {}, True),
        (torch.float16, "eg_u_l2sq", {}, True),
        (torch.bfloat16, "msp", {"log": True}, False),
        (torch.bfloat16, "tv", {}, False),
        (torch.bfloat16, "energy", {"temperature": 1e-35}, False),
        (torch.float32, "energy", {}, False),
    ]:
        fastood.score_linear(h.to(dtype), w.to(dtype), b, method=method, backend="triton", **options)
        assert (done.pop() is not None) == expected, (dtype, method, options)


@needs_triton
@only_compiled
@pytest.mark.parametrize("capability", ["90", *(pytest.param(x, marks=pytest.mark.slow) for x in ("80", "100"))])
def test_compiles_ahead_of_time(capability):
    """To tensor cores' instructions, which read tiles of features and weights 16 bytes at a time, without spills."""
    program.run("ahead_of_time_linear", capability)

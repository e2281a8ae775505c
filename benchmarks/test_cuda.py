"""fastood on a GPU against what users would write instead, and against a copy on the device that moves as many bytes.

"device copy" reads and writes together what fastood reads: its x is the fraction of the limit that fastood reaches.
Calls count from Python to the end of the work, launches included; "in a CUDA graph" they count little.
"""

import pytest
import torch
from test_cpu import eager_energy_norm, eager_gradnorm, eager_sweep, label

import fastood

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [(16384, 1000, 2048), (65536, 10, 512), (1024, 128256, 4096), (1, 1000, 2048)]
DTYPES = [torch.float32, torch.bfloat16]


def data(N, C, D, dtype):
    torch.manual_seed(0)
    f = (torch.randn(N, C, device="cuda") * 2).to(dtype)
    return f, torch.randn(N, D, device="cuda").relu().add(1e-3).to(dtype)


def timed(call):
    def to_the_end():
        out = call()
        torch.cuda.synchronize()
        return out

    return to_the_end


def in_a_graph(call):
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay():
        graph.replay()
        return out

    return replay


def run(comparison, candidates, inputs, checked=None):
    read = sum(x.nbytes for x in inputs)
    buffer = torch.empty(read // 2, dtype=torch.uint8, device="cuda")
    ours = next(iter(candidates.values()))
    candidates["fastood in a CUDA graph"] = in_a_graph(ours)
    target = torch.empty_like(buffer)
    candidates["device copy"] = lambda: target.copy_(buffer)
    comparison.run({name: timed(call) for name, call in candidates.items()}, checked, read=read)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "C", "D"), SHAPES)
def test_energy_times_norm(compare, N, C, D, dtype):
    f, h = data(N, C, D, dtype)
    compiled = torch.compile(eager_energy_norm)
    candidates = {
        "fastood": lambda: fastood.score(f, h),
        "eager": lambda: eager_energy_norm(f, h),
        "torch.compile": lambda: compiled(f, h),
    }
    expected = fastood.score(f, h, backend="reference")
    run(compare("energy x ||h||_0.3, on the GPU", label(N, C, D, dtype), 1), candidates, (f, h), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["msp", "energy", "tv"])
@pytest.mark.parametrize(("N", "C"), [(16384, 1000), (16384, 1001), (65536, 10), (1024, 128256)])
def test_v_alone(compare, method, N, C, dtype):
    f, _ = data(N, C, 1, dtype)
    eager = {
        "msp": lambda f: torch.softmax(f.float(), -1).amax(-1),
        "energy": lambda f: torch.logsumexp(f.float(), -1),
        "tv": lambda f: (torch.softmax(f.float(), -1) - 1 / C).abs().sum(-1) / 2,
    }[method]
    compiled = torch.compile(eager)
    candidates = {
        "fastood": lambda: fastood.score(f, method=method),
        "eager": lambda: eager(f),
        "torch.compile": lambda: compiled(f),
    }
    expected = fastood.score(f, method=method, backend="reference")
    run(compare(f"{method} alone, on the GPU", label(N, C, 0, dtype), 1), candidates, (f,), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 1024, 16384])
def test_sweep(compare, N, dtype):
    f, h = data(N, 1000, 2048, dtype)
    compiled = torch.compile(eager_sweep)
    candidates = {
        "fastood": lambda: fastood.sweep(f, h),
        "eager": lambda: eager_sweep(f, h),
        "torch.compile": lambda: compiled(f, h),
    }
    run(compare("sweep 4 V x 12 norms, on the GPU", label(N, 1000, 2048, dtype), 1), candidates, (f, h))


@pytest.mark.parametrize("N", [64, 1024])
def test_gradnorm(compare, N):
    f, h = data(N, 1000, 2048, torch.float32)
    weight = torch.randn(1000, 2048, device="cuda") / 50
    f = h @ weight.T

    def of_a_sample(weight, h):
        return torch.log_softmax(h @ weight.T, -1).mean()

    gradients = torch.func.vmap(torch.func.grad(of_a_sample), (None, 0), chunk_size=64)
    compiled = torch.compile(eager_gradnorm)
    candidates = {
        "fastood": lambda: fastood.score(f, h, "gradnorm"),
        "eager": lambda: eager_gradnorm(f, h),
        "torch.compile": lambda: compiled(f, h),
    }
    if N <= 64:  # a gradient of 8 MB a sample
        candidates["autograd"] = lambda: gradients(weight, h).abs().sum((1, 2))
    expected = fastood.score(f, h, "gradnorm", backend="reference")
    run(compare("GradNorm, on the GPU", label(N, 1000, 2048, torch.float32), 1), candidates, (f, h), expected)

"""What is particular to the C++ backend: its exp2 and log2, every way a row is split, threads, forks, the seam."""

import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import truth

import fastood

cpu = pytest.importorskip("fastood.kernels.cpu")
if cpu._native is None:
    pytest.skip("needs the C++ part, built where there is a C++ compiler", allow_module_level=True)

LEVELS = cpu._native.levels()


@pytest.fixture(params=LEVELS)
def level(request):
    before = cpu._native.level()
    cpu._native.use_level(request.param)
    yield request.param
    cpu._native.use_level(before)


def of_vector(function, x):
    out = np.empty_like(x)
    function(x.ctypes.data, out.ctypes.data, len(x))
    return out


def test_the_extension_was_built():
    """Installation without a compiler succeeds quietly; where the tests run, it must not have come to that."""
    assert fastood.backends()["cpu"].usable


def test_exp2_error_bound(level):
    """2^x within 2 units of 2^-24, over the normal exponents; 0 below."""
    x = np.concatenate([np.linspace(-126, 127, 400_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    expected = np.exp2(x.astype(np.longdouble))
    error = np.abs(of_vector(cpu._native.exp2f, x) - expected) / expected
    assert error.max() < 2 * 2**-24
    special = np.array([0, 1, -1, 10, -126, 127, -127, -1e30, -np.inf], np.float32)
    wanted = [1, 2, 0.5, 1024, 2.0**-126, 2.0**127, 0, 0, 0]
    assert of_vector(cpu._native.exp2f, special).tolist() == wanted


def test_log2_error_bound(level):
    """log2 x within 2^-23.3 absolute beyond the rounding of the sum, subnormals included; exact at powers of two."""
    mantissas = np.linspace(0.5, 2, 200_001)
    x = np.concatenate([mantissas, mantissas * 1e30, mantissas * 1e-30, mantissas * 1e-41]).astype(np.float32)
    expected = np.log2(x.astype(np.longdouble))
    error = np.abs(of_vector(cpu._native.log2f, x) - expected) - np.abs(expected) * 2**-24
    assert error.max() < 2**-23.3
    powers = 2.0 ** np.arange(-149, 128)
    assert of_vector(cpu._native.log2f, powers.astype(np.float32)).tolist() == list(range(-149, 128))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_is_read_right(level, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = bits[:, None]
    expected = torch.where(x.float().isfinite(), x.float(), torch.where(x.isnan(), math.nan, math.nan))
    got = fastood.score(x, method="max_logit", backend="cpu")
    torch.testing.assert_close(got, expected[:, 0], rtol=0, atol=0, equal_nan=True)
    got = fastood.norms(x, [math.inf], backend="cpu")
    torch.testing.assert_close(got, x.float().abs(), rtol=0, atol=0, equal_nan=True)


# The chunk is 8192 columns, a block of it 512: around both, and a row of several chunks.
@pytest.mark.parametrize("columns", [511, 512, 513, 8191, 8192, 8193, 20_000])
@pytest.mark.parametrize("masked", [False, True])
def test_chunk_edges(level, columns, masked):
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((2, columns)) * 4
    if masked:  # a first chunk with nothing in it, the maximum in the last
        x[:, : columns - 3] = -np.inf
        x[0, -1] = 90
    f = torch.from_numpy(x).float()
    h = torch.from_numpy(rng.standard_normal((2, columns)) * 10.0 ** rng.uniform(-9, 9, (2, columns))).float()
    for name in ("energy", "msp", "one_minus_s2", "s2", "tv", "plogp", "sumlogp"):
        expected = truth.stat(name, f)
        got = fastood.row_stats(f, [name], backend="cpu")[name]
        truth.assert_close(got, expected, truth.tolerance(name, expected, f, 1.0, 2**-24), name)
    for r in (0, 0.1, 0.3, 0.8, 1, 1.5, 2, 6, 100, math.inf):
        expected = truth.norm(h, r)
        got = fastood.norms(h, [r], backend="cpu")[:, 0]
        truth.assert_close(got, expected, truth.norm_tolerance(h, r, 2**-24) * expected, f"r={r}")


def test_many_orders_and_power_sums_at_once(level):
    h, f = torch.rand(3, 100) + 0.1, torch.randn(3, 40)
    orders = [0.05 * k for k in range(1, 100)]
    got = fastood.norms(h, orders, backend="cpu")
    for j, r in enumerate(orders):
        expected = truth.norm(h, r)
        truth.assert_close(got[:, j], expected, truth.norm_tolerance(h, r, 2**-24) * expected, f"r={r}")
    stats = [("power_sum", 0.5 + 0.1 * k) for k in range(20)]
    alone = [fastood.row_stats(f, [s], backend="cpu")[s] for s in stats]
    assert all(
        torch.equal(a, b) for a, b in zip(fastood.row_stats(f, stats, backend="cpu").values(), alone, strict=True)
    )


@pytest.mark.parametrize(("N", "C", "D"), [(1, 300_000, 100_000), (3, 50_000, 7), (200, 1000, 2048), (1, 10, 16)])
def test_bits_do_not_depend_on_threads(N, C, D):
    f, h = torch.randn(N, C) * 3, torch.randn(N, D)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(torch.stack(list(fastood.scores(f, h, backend="cpu").values())))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_from_many_threads_at_once():
    f, h = torch.randn(300, 1000), torch.randn(300, 512)
    expected = fastood.score(f, h, backend="cpu")
    wrong = []

    def serve():
        for _ in range(20):
            if not torch.equal(fastood.score(f, h, backend="cpu"), expected):
                wrong.append(True)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_in_a_forked_child():
    """After the parent used its threads, a child that waited for them would hang."""
    code = """
import os, torch, fastood
f = torch.randn(5000, 1000)
before = fastood.score(f, backend="cpu")
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(fastood.score(f, backend="cpu"), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("level", LEVELS)
def test_environment_forces_a_level(level):
    code = "from fastood.kernels.cpu import _native; print(_native.level())"
    env = {**os.environ, "FASTOOD_CPU_ISA": level}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == level


def test_no_matrix_is_copied(tmp_path):
    """Beyond its inputs a call takes O(N) memory and a fixed few hundred KB per thread."""
    code = """
import resource, torch, fastood
torch.set_num_threads(2)
f, h = torch.randn(20000, 1000), torch.randn(20000, 2048)
fastood.sweep(f[:100], h[:100], backend="cpu")
grid = torch.empty(20000, 4, 12).fill_(1.0), torch.empty(20000, 4, 12, dtype=torch.float64).fill_(1.0)
del grid
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastood.score(f, h, backend="cpu")
fastood.score(f, h, "gradnorm", backend="cpu")
fastood.norms(h, [0.1, 0.3, 1, 2], backend="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 4000  # KiB; a copy of the logits alone takes 78,000


# ---- the seam with PyTorch


def test_where_a_gradient_is_asked_for_the_reference_gives_it():
    f, h = torch.randn(3, 5, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    for backend in ("cpu", "reference"):
        (g_f, g_h) = torch.autograd.grad(fastood.score(f, h, backend=backend).sum(), (f, h))
        assert g_f.abs().sum() > 0
        assert g_h.abs().sum() > 0
    with torch.no_grad():
        assert not fastood.score(f, h, backend="cpu").requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in its compiler
def test_compiled_with_a_dynamic_batch():
    score = torch.compile(lambda f, h: fastood.score(f, h), fullgraph=True, dynamic=True)
    for n in (3, 8, 17):
        f, h = torch.randn(n, 12), torch.randn(n, 9)
        torch.testing.assert_close(score(f, h), fastood.score(f, h), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in forward-mode derivatives
def test_under_function_transforms_and_traces():
    f, h = torch.randn(4, 3, 10), torch.randn(4, 3, 5)
    each = torch.stack([fastood.score(x, y) for x, y in zip(f, h, strict=True)])
    torch.testing.assert_close(torch.func.vmap(fastood.score)(f, h), each)
    x, direction = f[0].double(), torch.randn(3, 10, dtype=torch.float64)
    slope = (fastood.score(x + 1e-6 * direction) - fastood.score(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(torch.func.jvp(fastood.score, (x,), (direction,))[1], slope)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(fastood.score(dual)).tangent, slope)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_under_jit_trace():
    f = torch.randn(3, 10)
    traced = torch.jit.trace(lambda f: fastood.score(f), (f,))
    other = torch.randn(3, 10)
    torch.testing.assert_close(traced(other), fastood.score(other))

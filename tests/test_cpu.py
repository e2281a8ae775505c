"""What is particular to the C++ backend: its exp2 and log2, every way a row is split, threads, forks, the seam."""

import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import truth

import fastood
from fastood import _plan

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


@pytest.mark.parametrize("r", [0.05, 0.1, 0.3, 0.5, 0.84])
def test_power_error_bound(level, r):
    """|h|^r within 8 units of 2^-24 over the normal floats, of single features: nothing averages out."""
    rng = np.random.default_rng(0)
    h = np.concatenate(
        [rng.uniform(1, 2, 50_000) * 2.0 ** rng.integers(-126, 127, 50_000), 2.0 ** np.arange(-126, 128)]
    )
    h = torch.from_numpy(h).float()[:, None]
    got = fastood.norms(h, [r], log=True, backend="cpu")[:, 0].double().numpy()
    expected = np.log(truth.widen(h)[:, 0])
    # log ||h||_r = (log |h|^r) / r comes as float32
    assert (np.abs(got - expected) * r <= 8 * 2**-24 + r * np.abs(expected) * 2**-24).all()


def test_products_of_powers_error_bound(level):
    """Orders that are sums of others: 0.8 = 0.3 + 0.5, 0.4 = 0.1 + 0.3."""
    rng = np.random.default_rng(1)
    h = torch.from_numpy(rng.uniform(1, 2, 20_000) * 2.0 ** rng.integers(-100, 100, 20_000)).float()[:, None]
    orders = [0.8, 0.5, 0.1, 0.4, 0.3]
    got = fastood.norms(h, orders, backend="cpu")
    for j, r in enumerate(orders):
        expected = truth.norm(h, r)
        truth.assert_close(got[:, j], expected, truth.norm_tolerance(h, r, 2**-24) * expected, f"r={r}")


def test_exponential_error_bound(level):
    """exp(z) within 4 + 2 |z| units of 2^-24, from 1 - p_max of two classes."""
    z = np.linspace(0, 100, 100_001)
    f = torch.from_numpy(np.stack([np.zeros_like(z), -z], 1)).float()
    wide = torch.nn.functional.pad(f, (0, 100), value=-math.inf)  # a row over several vectors rather than in a lane
    for x in (f, wide):
        got = fastood.row_stats(x, ["one_minus_msp"], backend="cpu")["one_minus_msp"]
        expected = truth.stat("one_minus_msp", f)
        truth.assert_close(got, expected, (4 + 2 * z) * 2**-24 * expected)


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


@pytest.mark.parametrize("columns", [511, 513, 8192, 8193, 20_000])
@pytest.mark.parametrize(("order", "power"), [(1, 1), (2, 1), (2, 2 + 1e-9), (1.5, 0.5), (math.inf, 2)])
def test_gradients_at_chunk_edges(level, columns, order, power):
    """Against the definition in long double; one row's maximum is in its last chunk."""
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((2, columns)) * 4
    x[0, -1] = 30
    f = torch.from_numpy(x).float()
    q = torch.from_numpy(rng.dirichlet(np.ones(columns), 2)).float()
    q[0] = 0
    q[0, -1] = 1
    for i, (row, w) in enumerate(zip(truth.widen(f), truth.widen(q), strict=True)):
        p, not_p, _ = truth.softmax_row(row, 1.0)
        top, r = int(row.argmax()), truth.LD(order)
        away = np.abs(w - p)
        away[top] = abs((w[top] - 1) + not_p[top])
        if order == math.inf:
            inside, outside = away.max(), not_p
        else:
            inside = (away**r).sum() ** (1 / r)
            others = (p**r).sum() - p**r
            others[top] = (np.delete(p, top) ** r).sum()
            outside = (not_p**r + others) ** (1 / r)
        for expectation, expected in (("inside", inside**power), ("outside", (w * outside**power).sum())):
            got = fastood.gradient_norm(f, torch.ones(2, 1), q, order, power, expectation, backend="cpu")[i]
            assert abs(got.item() - expected) <= 400 * 2**-24 * expected


@pytest.mark.parametrize("gap", [1.0, 1e8, 1e16, 1e19, 1e30])
@pytest.mark.parametrize("order", [0.3, 1.5, 3, 1e5, 1e9, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_far_rows_and_orders(level, gap, order, dtype):
    """Logarithms of about gap times order, whose difference is at most log C; nearly equal rows, where it is near 0."""
    near = torch.tensor([[3.0, 2.99999, 0, 0], [2.0, 0, 0, -1], [1.0, 1, 1, 1]])
    f = torch.cat([gap * torch.tensor([[1.0, 0, -0.3, 0.1], [0, 1, 1, 0.5]]), near]).to(dtype)
    h, q = torch.ones(5, 1, dtype=dtype), torch.tensor([[1.0, 0, 0, 0]], dtype=dtype).expand(5, 4)
    eps = truth.EPS[str(dtype).removeprefix("torch.")]
    for labels, expectation in (("uniform", "outside"), ("predicted", "outside"), (q, "outside"), (q, "inside")):
        for power in (1, 0.01):
            got = fastood.gradient_norm(f, h, labels, order, power, expectation, backend="cpu")
            expected, allowed = truth.gradient(f, labels, order, power, expectation, 1.0, eps)
            truth.assert_close(got, expected, allowed, (labels, expectation, power))


@pytest.mark.parametrize("gap", [80.0, 600.0, 700.0, 709.0, 712.0])
def test_the_rest_of_a_row_next_to_the_end_of_the_doubles(level, gap):
    h = torch.full((1, 1), 2.0**40, dtype=torch.float64)  # out of which it lifts the result
    for n in (0, 100):  # in a lane, and over several vectors
        x = torch.tensor([[0.0, -gap, -gap - 1, *[-gap] * n]])
        got = fastood.score(x, h, "exgrad", oriented=False, backend="cpu")
        expected = 2.0**41 * truth.stat("one_minus_s2", x)
        truth.assert_close(got, expected, (32 + 4 * 104 + 16) * 2**-24 * expected)
        for order in (1, 2, 3):
            got = fastood.gradient_norm(x, h, "predicted", order, 1, "outside", backend="cpu")
            expected, allowed = (2.0**40 * y for y in truth.gradient(x, "predicted", order, 1, "outside", 1.0, 2**-24))
            truth.assert_close(got, expected, allowed, order)


def test_many_orders_and_power_sums_at_once(level):
    h, f = torch.rand(3, 100) + 0.1, torch.randn(3, 40)
    orders = [0.05 * k for k in range(1, 100)]
    got = fastood.norms(h, orders, backend="cpu")
    for j, r in enumerate(orders):
        expected = truth.norm(h, r)
        truth.assert_close(got[:, j], expected, truth.norm_tolerance(h, r, 2**-24) * expected, f"r={r}")
    stats = [("power_sum", 0.5 + 0.1 * k) for k in range(20)] + [("gen", 0.1, k) for k in range(1, 34)]
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
        gradients = [fastood.gradient_norm(f, h, "predicted", 3, 0.5, "outside"), fastood.gradient_norm(f, h, order=2)]
        results.append(torch.stack([*fastood.scores(f, h, backend="cpu").values(), *gradients]))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(fastood.gradient_norm(f.repeat(9, 1), h.repeat(9, 1), order=2)[:N], gradients[1])


def test_without_the_extension_it_says_so_once():
    """Nothing else shows at installation that there was no compiler."""
    code = """
import sys, warnings
sys.modules["fastood.kernels.cpu._native"] = None
import torch, fastood
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    a = fastood.score(torch.ones(1, 2))
    fastood.score(torch.ones(1, 2))
    fastood.score(torch.ones(1, 2), backend="reference")
print(len(caught), caught[0].message)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("1 fastood's C++ kernels were not built")


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


def test_other_threads_run_during_a_call():
    """It holds no interpreter lock: another thread never waits for anything like the whole call."""
    f, h, done = torch.randn(64, 1000), torch.randn(64, 2048), threading.Event()
    detector = fastood.BatchGrad(torch.randn(1000, 2048))
    detector.score(f[:1], h[:1])
    took = []

    def work():
        for _ in range(5):
            start = time.perf_counter()
            detector.score(f.repeat(8, 1), h.repeat(8, 1))
            took.append(time.perf_counter() - start)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    gaps, last = [], time.perf_counter()
    while not done.is_set():
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    worker.join()
    assert max(gaps) < max(took)


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
fastood.score(f, h, "exgrad", log=True, backend="cpu")
fastood.row_stats(f, backend="cpu")
for q in (torch.full((1, 1000), 0.001), torch.full((1, 1000), 0.001).half()):
    fastood.gradient_norm(f, h, q.expand(20000, 1000), backend="cpu")
    fastood.gradient_norm(f, h, q.expand(20000, 1000), 3, 1, "outside", backend="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 4000  # KiB; a copy of the logits alone takes 78,000


# A tile's norms come from one pass where its values allow that; each of these makes it take care instead.
@pytest.mark.parametrize("odd", [math.inf, math.nan, 1e-40, 3e38, 1e-30])
@pytest.mark.parametrize("where", [0, 2047, 2048, 4999])
def test_tiles_that_need_care(level, odd, where):
    h = torch.rand(2, 5000) + 0.1
    h[0, where] = odd
    orders = [0, 0.1, 0.3, 0.5, 0.8, 1, 2, 3, 6, math.inf]
    for some in (orders, orders[1:5], orders[5:7]):
        got = fastood.norms(h, some, backend="cpu")
        for j, r in enumerate(some):
            expected = truth.norm(h, r)
            truth.assert_close(got[:, j], expected, truth.norm_tolerance(h, r, 2**-24) * expected, f"r={r}")


@pytest.mark.parametrize("columns", [511, 8192, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_one_value(level, columns, dtype):
    """Rounding errors of equal terms do not average out."""
    h = torch.tensor([0.1, 1 / 3, 0.7, 1.1, 5.3], dtype=dtype)[:, None].expand(5, columns).contiguous()
    eps = truth.EPS[str(dtype).removeprefix("torch.")]
    for r in (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 6):
        expected = truth.norm(h, r)
        for orders in ([r], [0, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 3, 4, 5, 6, math.inf]):
            got = fastood.norms(h, orders, backend="cpu")[:, orders.index(r)]
            truth.assert_close(got, expected, truth.norm_tolerance(h, r, eps) * expected, f"r={r}")
    f = torch.tensor([1e-3, 0.5, 3.0], dtype=dtype)[:, None] * (torch.arange(columns) == 7)  # all but one are equal
    for name in ("s2", "msp", "one_minus_s2", "tv", "plogp", "sumlogp", "energy"):
        expected = truth.stat(name, f)
        got = fastood.row_stats(f, [name], backend="cpu")[name]
        truth.assert_close(got, expected, truth.tolerance(name, expected, f, 1.0, eps), name)


# Around the 16 rows that are finished together, and the 48 classes up to which a row lies in a lane.
@pytest.mark.parametrize("N", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("C", [1, 2, 10, 48, 49])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_few_classes(level, N, C, dtype):
    rng = np.random.default_rng(C)
    f = torch.from_numpy(rng.standard_normal((N, C)) * 10.0 ** rng.uniform(-2, 2, (N, 1))).to(dtype)
    f[0, C // 2] = math.inf
    f[-1] = -math.inf
    if N > 2:
        f[1, 0] = math.nan
        f[2, 1:] = f[2, :1] - 95  # all but one vanish in float32
    eps = truth.EPS[str(dtype).removeprefix("torch.")]
    names = ["energy", "msp", "one_minus_s2", "s2", "tv", "plogp", "sumlogp", "log_msp"]
    got = fastood.row_stats(f, [*names, ("power_sum", 0.5)], backend="cpu")
    for name in names:
        expected = truth.stat(name, f)
        truth.assert_close(got[name], expected, truth.tolerance(name, expected, f, 1.0, eps), name)
    alone = torch.cat([fastood.row_stats(row[None], ["tv"], backend="cpu")["tv"] for row in f])
    assert torch.equal(alone.nan_to_num(7), got["tv"].nan_to_num(7))


# ---- the short way of plain tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_way_gives_the_same_bits(dtype):
    f, h = torch.randn(5, 30).to(dtype), torch.randn(5, 70).to(dtype)
    q = torch.randn(5, 30).softmax(-1)
    for call in (
        lambda: fastood.score(f),
        lambda: fastood.score(f, None, "msp"),
        lambda: fastood.score(f, h),
        lambda: fastood.score(f, h, "exgrad"),
        lambda: fastood.sweep(f, h),
        lambda: fastood.sweep(f, h, ["tv"], [None, 2]),
        lambda: torch.stack(list(fastood.scores(f, h, ["msp", "tv", "exgrad"]).values())),
        lambda: fastood.norms(h, (0.3, 2)),
        lambda: fastood.gradient_norm(f, h),
        lambda: fastood.gradient_norm(f, h, "predicted", 3, 1, "outside"),
        lambda: fastood.gradient_norm(f, h, q, 2, 1, "outside"),
        lambda: fastood.gradient_norm(f, h, q.to(dtype), 0.5, 2),
    ):
        _plan._PLANS.clear()  # the first call finds out that the short way will do
        long, short = call(), call()
        assert next(iter(_plan._PLANS.values())).quick
        assert short.dtype == torch.float32
        assert torch.equal(short, long)


def test_what_is_not_plain_goes_the_long_way():
    f, h = torch.randn(5, 30), torch.randn(5, 70)
    expected, alone = fastood.score(f, h), fastood.score(f)
    fastood.score(f, h)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(fastood.score(f.T.contiguous().T, h), expected, **close)
    torch.testing.assert_close(fastood.score(torch.nn.Parameter(f), h).detach(), expected, **close)
    assert fastood.score(f, h.clone().requires_grad_()).requires_grad
    assert fastood.score(f.double(), h).dtype == torch.float64
    assert isinstance(fastood.score(f.numpy(), h.numpy()), np.ndarray)
    negated = torch.imag(torch.complex(torch.zeros(5, 30), -f).conj())  # its memory holds -f
    assert negated.is_neg()
    assert torch.equal(fastood.score(negated), alone)
    assert torch.equal(fastood.row_stats(negated, ["energy"])["energy"], alone)
    with torch.device("meta"):  # a default device is for what has no other
        assert torch.equal(fastood.score(f), alone)
        assert torch.equal(fastood.scores(f, h)["energy"], fastood.scores(f, h)["energy"])
    for wrong, words in (
        (f[:, :0], "at least one class"),
        (f[0], "2-D"),
        (f.long(), "torch.int64"),
        (f.to_sparse(), "dense"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            fastood.score(wrong)
    fastood.sweep(f, h)
    for call in (fastood.score, fastood.sweep, fastood.gradient_norm):
        with pytest.raises(ValueError, match="feats must have the 5 rows"):
            call(f, h[:4])
    q = f.softmax(-1)
    for _ in range(2):
        fastood.gradient_norm(f, h, q)
        assert fastood.gradient_norm(f, h, q.clone().requires_grad_()).requires_grad
        for wrong in (q[:4], q[:, :29]):
            with pytest.raises(ValueError, match=r"labels must be \[5, 30\], a distribution per row"):
                fastood.gradient_norm(f, h, wrong)
        for wrong in (None, 1, q.numpy()):
            with pytest.raises(TypeError, match="labels must be"):
                fastood.gradient_norm(f, h, wrong)
        with pytest.raises(ValueError, match=r"labels must be one of 'uniform'.*got 'given'"):
            fastood.gradient_norm(f, h, "given")
    assert fastood.gradient_norm(f[:0], h[:0], q[:0]).shape == (0,)
    with pytest.raises(TypeError, match="feats must be a torch tensor or a numpy array, got None"):
        fastood.norms(None, (0.3, 2))
    assert fastood.score(f[:0], h[:0]).shape == (0,)
    assert fastood.sweep(f[:0], h[:0]).shape == (0, 4, 12)
    with pytest.raises(TypeError, match="norms must be a number, got bool"):
        fastood.sweep(f, h, norms=(0, 0.1, 0.3, 0.5, 0.8, True, 2, 3, 4, 5, 6, math.inf))  # equal to the default


# ---- the seam with PyTorch


def test_where_a_gradient_is_asked_for_the_reference_gives_it():
    f, h = torch.randn(3, 5, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    for backend in ("cpu", "reference"):
        (g_f, g_h) = torch.autograd.grad(fastood.score(f, h, backend=backend).sum(), (f, h))
        assert g_f.abs().sum() > 0
        assert g_h.abs().sum() > 0
    with torch.no_grad():
        assert not fastood.score(f, h, backend="cpu").requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_dispatch_modes():
    """What records or fakes torch's operations must see them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    f, other = torch.randn(3, 10), torch.randn(3, 10)
    fastood.score(f)
    for call in (lambda x: fastood.score(x), lambda x: fastood.norms(x, [1.0])):
        torch.testing.assert_close(make_fx(call)(f)(other), call(other))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fastood.score(f).shape == (3,)
    zeros = torch._efficientzerotensor((2, 5))  # a tensor without memory
    torch.testing.assert_close(fastood.score(zeros), torch.full((2,), math.log(5)))
    torch.testing.assert_close(fastood.norms(zeros, [1.0]), torch.zeros(2, 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in its compiler
def test_compiled_with_a_dynamic_batch():
    score = torch.compile(lambda f, h: fastood.score(f, h), fullgraph=True, dynamic=True)
    for n in (3, 8, 17):
        f, h = torch.randn(n, 12), torch.randn(n, 9)
        torch.testing.assert_close(score(f, h), fastood.score(f, h), rtol=1e-5, atol=1e-6)


def test_gradient_norms_and_norms_are_traced_whole():
    f, h = torch.randn(4, 12), torch.randn(4, 9)
    q = torch.randn(4, 12).softmax(-1)
    for call in (
        lambda f, h, q: fastood.gradient_norm(f, h),
        lambda f, h, q: fastood.gradient_norm(f, h, "predicted", 2, 3.5, "outside"),
        lambda f, h, q: fastood.gradient_norm(f, h, q, 2, 1, "outside"),
        lambda f, h, q: fastood.norms(h, [0.3, 2]),
    ):
        traced = torch.compile(call, fullgraph=True, backend="eager")  # no compiler: what is asked is whether it traces
        torch.testing.assert_close(traced(f, h, q), call(f, h, q), rtol=1e-5, atol=1e-6)


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

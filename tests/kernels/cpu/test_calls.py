"""A call of the C++ backend: the short way of plain tensors, instruction sets, memory, threads and forks."""

import math
import threading
import time

import numpy as np
import program
import pytest
import torch

import fastood
from fastood import _plan
from fastood.kernels.cpu import _native

READS_TENSORS = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")  # C++ does, since torch 2.10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
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
        lambda: fastood.gradient_norm(f, h, q, 3, 3, "outside"),  # from here on PyTorch has a part
        lambda: fastood.score(f, None, "msp", log=True),
        lambda: fastood.score(f, h, "exgrad", temperature=2, log=True),
        lambda: fastood.sweep(f, h, ["varsum", "energy"], [None, 2], log=True),
        lambda: fastood.norms(h, (0.3, 2), log=True),
        lambda: torch.stack(list(fastood.row_stats(f, ["msp", "log_msp", ("gen", 0.1, 3)]).values())),
        lambda: fastood.norms(h, [r / 10 for r in range(1, 40)]),  # and more than one call
        lambda: fastood.sweep(f, h, ["tv", "msp"], [r / 10 for r in range(1, 40)]),
    ):
        _plan._PLANS.clear()  # the first call finds out that the short way will do
        long, short = call(), call()
        (quick,) = next(iter(_plan._PLANS.values())).quick
        assert any(quick(*given) is not None for given in ((f, h, None), (f, h, q))) == READS_TENSORS
        assert short.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(short, long)


def test_short_way_of_two_types():
    """An input that is not read decides on the result's type, a label's does not."""
    f, h, q = torch.randn(5, 30), torch.randn(5, 70), torch.randn(5, 30).softmax(-1)
    for call, wide in (
        (lambda: fastood.score(f.double(), h), True),
        (lambda: fastood.score(f, h.double()), True),
        (lambda: fastood.score(f.double(), h, "norm", norm=2), True),
        (lambda: fastood.score(f.double(), h, log=True), True),
        (lambda: fastood.gradient_norm(f, h, q.double()), False),
    ):
        _plan._PLANS.clear()
        long, short = call(), call()
        assert short.dtype == long.dtype == (torch.float64 if wide else torch.float32)
        assert torch.equal(short, long)


@pytest.mark.skipif(not READS_TENSORS, reason="needs torch 2.10")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_short_way_reads_plain_arrays(dtype):
    f, h = (torch.randn(5, n).numpy().astype(dtype) for n in (30, 70))
    q = torch.randn(5, 30).softmax(-1).numpy()
    _plan._PLANS.clear()
    fastood.score(f, h), fastood.gradient_norm(f, h, q)
    of_score, of_norm = (plan.quick[0] for plan in _plan._PLANS.values())
    expected = fastood.score(*map(torch.from_numpy, (f, h))).numpy()
    wide = np.zeros((5, 70), dtype)
    wide[:, :30] = f
    frozen, one, odd = f.copy(), f[1:2], np.zeros((5, 60), dtype)[:, ::2]
    frozen.flags.writeable = False
    unaligned = np.empty(f.nbytes + 1, np.uint8)[1:].view(dtype).reshape(f.shape)
    unaligned[:] = f
    for x in (f, frozen, wide[:, :30]):
        got = of_score(x, h, None)
        assert (type(got), got.dtype) == (np.ndarray, expected.dtype)
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(of_score(one, h[1:2], None), expected[1:2])
    np.testing.assert_array_equal(of_norm(f, h, q), fastood.gradient_norm(*map(torch.from_numpy, (f, h, q))).numpy())
    for x in (
        odd,
        unaligned,
        f[::-1],
        np.asfortranarray(f),
        f.astype(f.dtype.newbyteorder()),
        f.astype(np.int32),
        f[0],
        f[:4],
        f[:, :0],
        np.ma.masked_array(f),
        f.view(np.recarray),
        torch.from_numpy(f),
        f.tolist(),
    ):
        assert of_score(x, h, None) is None
    assert of_norm(f, h, torch.from_numpy(q)) is None
    assert of_score(f[:0], h[:0], None).shape == (0,)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_arrays_give_the_bits_of_tensors(dtype):
    f, h = (torch.randn(5, n).numpy().astype(dtype) for n in (30, 70))
    for call in (
        lambda f, h: fastood.score(f),
        lambda f, h: fastood.score(f, h),
        lambda f, h: fastood.sweep(f, h),
        lambda f, h: fastood.norms(h, [0.5, 2]),
        lambda f, h: fastood.gradient_norm(f, h),
    ):
        expected = call(torch.from_numpy(f), torch.from_numpy(h)).numpy()
        for x, y in ((f, h), (f, h), (f[::-1], h[::-1]), (np.asfortranarray(f), np.asfortranarray(h))):
            got = call(x, y)
            assert isinstance(got, np.ndarray)
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got[::-1] if x.strides[0] < 0 else got, expected)
    f.flags.writeable = False
    np.testing.assert_array_equal(fastood.score(f), fastood.score(torch.tensor(f)).numpy())
    with pytest.raises(ValueError, match="feats must have the 5 rows"):
        fastood.score(f, h[:4])
    with pytest.raises(TypeError, match="mixed inputs"):
        fastood.score(f, torch.from_numpy(h))


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


def test_without_the_extension_it_says_so_once(starts):
    """Nothing else shows at installation that there was no compiler."""
    (said,) = starts["not built"]
    assert said.startswith("fastood's C++ kernels were not built")


def test_environment_forces_an_isa(starts):
    assert starts["isas"] == {isa: isa for isa in _native.isas()}
    assert (
        starts["no such isa"]
        == f"FASTOOD_CPU_ISA must be one of {_native.isas()}, which this processor has, got 'AVX2'"
    )


def test_no_matrix_is_copied():
    """Beyond its inputs a call takes O(N) memory and a fixed few hundred KB per thread."""
    assert int(program.run("memory_of_calls")) < 4000  # KiB; a copy of the logits alone takes 19,500


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

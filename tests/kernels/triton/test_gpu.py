"""What only a GPU can show: graphs, streams, threads, devices."""

import concurrent.futures

import pytest
import torch

import fastood

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_in_a_cuda_graph():
    f, h = torch.randn(64, 1000, device="cuda"), torch.randn(64, 512, device="cuda")
    detector = fastood.BatchGrad(torch.randn(1000, 512, device="cuda"))
    for call in (fastood.score, detector.score):
        call(f, h)  # compiles, and brings to the GPU what stays there
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(f, h)
        f.normal_()
        h[:32].abs_()  # BatchGrad has another branch for these
        graph.replay()
        assert torch.equal(out, call(f, h))
    assert fastood.backends("cuda")["triton"].usable


@needs_gpu
def test_in_a_cuda_graph_without_a_call_before(new_programs):
    """Kernels are compiled and loaded, and constants copied, beside the capture."""
    f, h = torch.randn(64, 1000, device="cuda"), torch.randn(64, 512, device="cuda")
    detector = fastood.BatchGrad(torch.randn(1000, 512, device="cuda"))
    for call in (fastood.score, fastood.sweep, detector.score):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(f, h)
        f.normal_()
        graph.replay()
        assert torch.equal(out, call(f, h))


@needs_gpu
def test_on_streams_and_threads():
    """Work is queued where torch queues it, from any thread, also one that never saw the device."""
    f, h = torch.randn(4096, 1000, device="cuda"), torch.randn(4096, 512, device="cuda")
    expected = fastood.score(f, h)
    torch.cuda.synchronize()

    def work(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)  # what is queued elsewhere would be done before this stream's tensors are
            x, y = f + 0, h + 0
            out = [fastood.score(x, y) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(o, expected) for o in out)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))


@needs_gpu
def test_of_a_new_layout_in_a_new_thread():
    """Its kernels are loaded; all else is made where the driver has no context yet."""
    f, h = torch.randn(64, 1000, device="cuda"), torch.randn(64, 512, device="cuda")
    expected = fastood.score(f, h)
    wide = torch.zeros(64, 2000, device="cuda")
    wide[:, :1000] = f
    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(fastood.score, wide[:, :1000], h).result(), expected)
    assert torch.equal(fastood.score(wide[:, :1000], h), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device_than_the_current_one():
    f, h = torch.randn(64, 1000), torch.randn(64, 512)
    scores = [fastood.score(f.to(d), h.to(d)) for d in ("cuda:1", "cuda:0", "cuda:1")]
    assert [x.device.index for x in scores] == [1, 0, 1]
    assert torch.cuda.current_device() == 0
    assert torch.equal(scores[0].cpu(), scores[1].cpu())

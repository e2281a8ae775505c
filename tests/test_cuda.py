"""Detector, attach and what they bring along on a GPU; `pytest -k cuda` runs all that needs one.

Without one most run on the CPU, where the parts have tests of their own, so that none is run for the first time there.
"""

import io
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastood

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = "cuda" if torch.cuda.is_available() else "cpu"
C, D = 20, 48
TF32 = {"rtol": 5e-3, "atol": 5e-3}  # of convolutions, which another batch may have by another algorithm


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Conv2d(3, D, 3), nn.BatchNorm2d(D), nn.ReLU()), nn.Linear(D, C)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class Quantised(nn.Module):
    """A last layer of 8-bit weights, as libraries for GPUs have them: no nn.Linear, but with its attributes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias.to(x.dtype))


def made(n=200):
    return Net().eval().to(GPU), torch.randn(n, 3, 6, 6, device=GPU)


OPTIONS = [
    {"method": "energy", "norm": 0.3},
    {"method": "msp", "norm": None, "per_class": True},
    {"method": "norm", "norm": 2, "per_class": True},
    {"method": "gradnorm"},
]


def served(model, x, **options):
    """With a detector of other inputs: its threshold is the score of none of these, however it is rounded."""
    attached = fastood.attach(model, example=x)
    with torch.no_grad():
        logits, feats = attached(torch.randn_like(x))
    return fastood.attach(model, detector=fastood.Detector(tpr=0.6, **options).fit(logits, feats), example=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_cuda_detector(options, dtype, tmp_path):
    """The same decisions as on the CPU, on the device of the rows; the threshold itself is accepted."""
    logits, feats = 5 * torch.randn(600, C).to(dtype), torch.rand(600, D).to(dtype)
    detector = fastood.Detector(tpr=0.8, **options).fit(logits.to(GPU), feats.to(GPU))
    detector.save(tmp_path / "det.safetensors")
    for one in (detector, fastood.Detector.load(tmp_path / "det.safetensors")):
        score, accept, p = (f(logits.to(GPU), feats.to(GPU)) for f in (one.score, one.accept, one.p_value))
        assert {x.device.type for x in (score, accept, p)} == {GPU}
        assert torch.equal(accept, p > 1 - 0.8)
        assert 0.75 < accept.double().mean() < 0.9
    on_cpu = fastood.Detector(tpr=0.8, **options).fit(logits, feats)
    torch.testing.assert_close(score.cpu(), on_cpu.score(logits, feats), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(detector.threshold, on_cpu.threshold, rtol=1e-4, atol=1e-5)
    assert (accept.cpu() == on_cpu.accept(logits, feats)).double().mean() > 0.99
    logits[3], feats[3] = math.nan, math.nan
    assert not detector.accept(logits.to(GPU), feats.to(GPU))[3]


@pytest.mark.parametrize("options", OPTIONS)
def test_cuda_attached(options):
    model, x = made()
    attached = served(model, x, **options)
    with torch.inference_mode():
        logits, feats, score, accept = attached(x)
        torch.testing.assert_close(logits, model(x), rtol=0, atol=0)
    torch.testing.assert_close(score, attached.detector.score(logits, feats), rtol=0, atol=0)
    assert torch.equal(accept, attached.detector.accept(logits, feats))
    assert 0 < accept.sum() < len(x)
    on_cpu = model.cpu()
    with torch.no_grad():
        expected = fastood.attach(on_cpu, detector=attached.detector, example=x.cpu())(x.cpu())
    torch.testing.assert_close([y.cpu() for y in (logits, feats, score)], list(expected[:3]), **TF32)
    assert (accept.cpu() == expected[3]).double().mean() > 0.98


@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_cuda_compiled(mode):
    model, x = made()
    attached = served(model, x, method="energy", norm=0.3)
    with torch.no_grad():
        expected = attached(x)
        compiled = torch.compile(attached, fullgraph=True, mode=mode)
        for _ in range(3):
            got = [y.clone() for y in compiled(x)]
    torch.testing.assert_close(got[:3], list(expected[:3]), **TF32)
    assert torch.equal(got[3], got[2] >= attached.detector.threshold)
    collected = fastood.collect(compiled, DataLoader(x.cpu(), batch_size=100))  # whose memory is used again
    torch.testing.assert_close(collected.logits, expected[0].cpu(), **TF32)


@needs_gpu
@pytest.mark.parametrize("options", OPTIONS[:2])
def test_cuda_exported(options):
    model, x = made()
    attached = served(model, x, **options)
    head = fastood.OODHead(attached.head, attached.detector)
    with torch.no_grad():
        logits, feats, score, accept = attached(x)
        whole = torch.export.export(attached, (x,), dynamic_shapes=(({0: torch.export.Dim("n")},),))
        part = torch.export.export(head, (feats,), dynamic_shapes=({0: torch.export.Dim("n")},))
        loaded = []
        for program in (whole, part):
            file = io.BytesIO()
            torch.export.save(program, file)
            file.seek(0)
            loaded.append(torch.export.load(file).module())
        got, of_head = loaded[0](x[:50]), loaded[1](feats[:50])
    wanted = [y[:50] for y in (logits, feats, score)]
    torch.testing.assert_close(list(got[:3]), wanted, **TF32)
    torch.testing.assert_close(of_head["score"], score[:50], rtol=1e-4, atol=1e-5)
    assert torch.equal(of_head["accept"], accept[:50])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_autocast(dtype):
    model, x = made()
    with torch.autocast(GPU, dtype), torch.no_grad():
        attached = served(model, x, method="energy", norm=0.3)
        logits, feats, score, accept = attached(x)
        torch.testing.assert_close(logits, model(x), rtol=0, atol=0)
    assert logits.dtype == dtype
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, attached.detector.score(logits, feats), rtol=0, atol=0)
    assert 0 < accept.sum() < len(x)


@needs_gpu
def test_cuda_data_parallel():
    model, x = made()
    attached = served(model, x, method="energy", norm=0.3)
    with torch.no_grad():
        expected = attached(x)
        (replica,) = nn.parallel.replicate(attached, [0])
        for one in (nn.DataParallel(attached), replica):
            got = one(x)
            torch.testing.assert_close(list(got[:3]), list(expected[:3]), **TF32)
            assert torch.equal(got[3], expected[3])
        unchecked = fastood.attach(model, detector=attached.detector)
        torch.testing.assert_close(nn.DataParallel(unchecked)(x)[0], expected[0], **TF32)


def test_cuda_quantised_head():
    model, x = made()
    exact = model(x).detach()
    model.fc = Quantised(model.fc)
    attached = served(model, x, method="energy", norm=0.3)
    logits, feats, score, accept = attached(x)
    assert isinstance(attached.head, Quantised)
    torch.testing.assert_close(logits, model(x), rtol=0, atol=0)
    assert not torch.equal(logits, exact)
    assert torch.equal(accept, attached.detector.accept(logits, feats))
    assert 0 < accept.sum() < len(x)
    torch.testing.assert_close(score, fastood.score(logits, feats, norm=0.3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("per_class", [False, True])
def test_cuda_head_moves_with_its_threshold(per_class):
    model, x = made()
    attached = served(model, x, method="energy", norm=0.3, per_class=per_class)
    _, feats, _, accept = attached(x)
    head = fastood.OODHead(attached.head, attached.detector)
    assert head.threshold.device.type == GPU
    assert torch.equal(head(feats)["accept"], accept)
    on_cpu = fastood.OODHead(attached.head.cpu(), attached.detector)
    moved = on_cpu.to(GPU)
    assert moved.threshold.device.type == GPU
    assert torch.equal(moved(feats)["accept"], accept)
    assert moved.half().threshold.dtype == torch.float32
    moved.threshold.fill_(math.inf)
    assert not moved(feats.half())["accept"].any()


@pytest.mark.parametrize("autocast", [False, True])
def test_cuda_collect_and_fit_loader(autocast, tmp_path):
    model, x = made()
    labels = torch.arange(len(x))
    loader = DataLoader(TensorDataset(x.cpu(), labels), batch_size=64, pin_memory=GPU == "cuda")
    with torch.autocast(GPU, torch.bfloat16, enabled=autocast):
        got = fastood.collect(model, loader)
        fastood.collect(model, loader, tmp_path / "rows.safetensors")
        detector = fastood.Detector("energy").fit_loader(model, loader)
        with torch.no_grad():
            logits = model(x)
    assert {y.device.type for y in got} == {"cpu"}
    assert got.logits.dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(got.logits, logits.cpu(), rtol=2e-2, atol=2e-2)
    assert torch.equal(got.labels, labels)
    assert detector.rows == len(x)
    on_gpu = detector.score(got.logits.to(GPU), got.feats.to(GPU)).double().sort().values
    torch.testing.assert_close(on_gpu.cpu(), torch.from_numpy(detector._all.ranked()[0]), rtol=2e-2, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cuda_pixels_and_members(memory_format):
    logits = torch.randn(2, 19, 16, 24, device=GPU).contiguous(memory_format=memory_format)
    feats = torch.rand(2, 32, 16, 24, device=GPU).contiguous(memory_format=memory_format)
    got = fastood.score(logits, feats, norm=1, dim=1)
    truth = logits.double().logsumexp(1) * feats.double().sum(1)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    members = torch.randn(5, 40, C, device=GPU)
    torch.testing.assert_close(
        fastood.score(members, dim=-1).mean(0).double(), members.double().logsumexp(-1).mean(0), rtol=1e-5, atol=1e-5
    )


def test_cuda_monitor():
    logits = 5 * torch.randn(1000, C, device=GPU)
    detector = fastood.Detector("energy").fit(logits)
    monitor = fastood.Monitor(detector)
    monitor.update(detector.score(logits), detector.accept(logits))
    assert monitor.rows == 1000
    assert monitor.accepted == int(detector.accept(logits).sum())


@pytest.mark.parametrize("name", fastood.SUCCESSORS)
def test_successors_are_those_of_the_cpu(name):
    head = nn.Linear(D, C)
    y = torch.arange(400) % C
    # Far enough apart that the head finds every class, without which SHE has no mean of it.
    feats = (30 * head.weight.detach()[y] + torch.randn(400, D)).relu() + 0.1 * torch.rand(400, D)
    logits = head(feats).detach()
    entry, scored = fastood.SUCCESSORS[name], []
    for place in ("cpu", GPU):
        fitted = fastood.Fitted(name, head=head if entry.head else None)
        if entry.fitted_on:
            fitted.fit(*(x.to(place) for x in (logits, feats, y)))
        on_gpu = fitted.score(logits.to(GPU), feats.to(GPU))
        assert on_gpu.device.type == GPU
        scored += [on_gpu.cpu(), fitted.score(logits, feats)]
    assert scored[-1].isfinite().all()
    for s in scored[:-1]:
        torch.testing.assert_close(s, scored[-1], rtol=1e-4, atol=1e-4 * float(scored[-1].abs().mean()))

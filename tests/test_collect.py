"""collect and fit_loader run a classifier over a loader."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from classifiers import OPTIONS, Bert, C, D, ResNet, fitted, images, made, truth
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastood
from fastood.files import FileError, arrays_of, open_rows


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def data(n=50, form=ResNet):
    model = form().eval()
    x, y = images(n), torch.randint(C, (n,))
    return model, x, y


@pytest.mark.parametrize("n", [1, 32, 50])
def test_collect_in_memory(n):
    model, x, y = data(n)
    got = fastood.collect(model, DataLoader(TensorDataset(x, y), batch_size=16))
    logits, feats = truth(model, x)
    torch.testing.assert_close(got.logits, logits)
    torch.testing.assert_close(got.feats, feats)
    assert torch.equal(got.labels, y)
    assert not any(t.is_inference() or t.requires_grad for t in got)


def test_collect_inputs_of_every_kind():
    model, x, y = data()
    expected = truth(model, x)
    for loader in (x.split(7), DataLoader(x, batch_size=7), DataLoader(TensorDataset(x), batch_size=7), iter([x])):
        got = fastood.collect(model, loader)
        assert got.labels is None
        torch.testing.assert_close(got[:2], expected)
    got = fastood.collect(model, [(x[:7], y[:7].tolist()), (x[7:], y[7:].numpy())])
    assert torch.equal(got.labels, y)
    bert, inputs = made(Bert)
    for extra in ({}, {"labels": y[:6]}, {"label": y[:6]}):
        got = fastood.collect(bert, [{**inputs, **extra}])
        torch.testing.assert_close(got[:2], truth(bert, inputs))
        assert (got.labels is None) == (not extra)
    assert torch.equal(fastood.collect(bert, [(inputs, y[:6])]).labels, y[:6])


def test_collect_with_what_attach_made():
    model, x, _ = data(40)
    expected = truth(model, x)
    attached = fastood.attach(model, detector=fitted(model, x, method="energy"), example=x)
    for made_of_it in (attached, nn.DataParallel(attached), torch.compile(attached, backend="eager")):
        torch.testing.assert_close(fastood.collect(made_of_it, x.split(9))[:2], expected)


def test_collect_keeps_no_view_and_no_memory_that_is_used_again():
    class Reusing(nn.Module):
        """As a compiled model does with CUDA graphs."""

        def __init__(self):
            super().__init__()
            self.fc, self.tokens = nn.Linear(D, C), torch.zeros(4, 100, D)

        def forward(self, x):
            self.tokens[:, 0] = x
            return self.fc(self.tokens[:, 0])

    model, x = Reusing().eval(), torch.randn(8, D)
    got = fastood.collect(model, x.split(4))
    assert torch.equal(got.feats, x)
    assert got.feats.untyped_storage().nbytes() == 8 * D * 4
    torch.testing.assert_close(got.logits, model.fc(x))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("labelled", [True, False])
def test_collect_to_a_file(tmp_path, suffix, dtype, labelled):
    model, x, y = data()
    model, x, path = model.to(dtype), x.to(dtype), tmp_path / f"val{suffix}"
    loader = DataLoader(TensorDataset(x, y) if labelled else x, batch_size=16)
    assert fastood.collect(model, loader, path) is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    expected = fastood.collect(model, loader)
    held = np.load(path) if suffix == ".npz" else {k: v.numpy() for k, v in load_file(path).items()}
    assert set(held) == {"logits", "feats", *["labels"] * labelled}
    for name in held:
        assert np.array_equal(held[name], getattr(expected, name).numpy())
        assert held[name].dtype == getattr(expected, name).numpy().dtype
    with open_rows(path, id_key="labels" if labelled else None) as rows:
        assert (rows.rows, rows.classes, rows.dim) == (50, C, D)
        for (logits, feats), ids in zip(rows.chunks(20), rows.ids(20), strict=True):
            assert len(logits) == len(feats)
            assert not labelled or len(ids) == len(logits)


def test_bfloat16_to_a_file(tmp_path):
    model, x, y = data()
    loader = [(x.bfloat16(), y.to(torch.uint8))]
    fastood.collect(model.bfloat16(), loader, tmp_path / "a.safetensors")
    held, expected = load_file(tmp_path / "a.safetensors"), fastood.collect(model, loader)
    assert held["labels"].dtype == torch.uint8
    for name in held:
        assert torch.equal(held[name], getattr(expected, name))
    with pytest.raises(FileError, match=r"numpy has no torch\.bfloat16"):
        fastood.collect(model, loader, tmp_path / "a.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_one_column_of_any_stride_to_a_file(tmp_path):
    x = torch.arange(3.0)
    odd = x.as_strided((3, 1), (1, 0))
    model = fastood.attach(nn.Flatten(), (nn.Identity(), nn.Identity())).eval()
    fastood.collect(model, [odd], tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["logits"].tolist() == [[0], [1], [2]]


def test_labels_of_any_numbers_to_a_file(tmp_path):
    model, x, y = data()
    for kind in (torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.bool):
        for name in ("x.safetensors", "x.npz"):
            fastood.collect(model, [(x, y.to(kind))], tmp_path / name)
            with arrays_of(tmp_path / name) as arrays:
                assert arrays["labels"]().dtype.lower() == str(kind).removeprefix("torch.")
    with pytest.raises(FileError, match=r"safetensors has no torch\.complex64, as labels are"):
        fastood.collect(model, [(x, y.to(torch.complex64))], tmp_path / "y.safetensors")


@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"])
def test_fp8_to_a_file(tmp_path, kind):
    if "fnuz" in kind:
        pytest.importorskip("safetensors", "0.8", reason="needs a safetensors that reads them")
    model, x, y = data()
    labels = y.to(getattr(torch, f"float8_{kind}"))
    fastood.collect(model, [(x, labels)], tmp_path / "a.safetensors")
    held = load_file(tmp_path / "a.safetensors")["labels"]
    assert held.dtype == labels.dtype
    assert torch.equal(held.float(), labels.float())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    model, x, y = data()

    def broken():
        yield x, y
        raise OSError("disk")

    path = tmp_path / "val.npz"
    with pytest.raises(OSError, match="disk"):
        fastood.collect(model, broken(), path)
    with pytest.raises(ValueError, match=r"logits must be torch\.float32 \[n, 108\] in every batch"):
        fastood.collect(fastood.attach(nn.Flatten(), (nn.Flatten(), nn.Identity())).eval(), [x, x[..., :3]], path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileError, match=r"unknown extension '\.npy'; known are \.npz, \.safetensors"):
        fastood.collect(model, [x], tmp_path / "val.npy")


def test_what_collect_refuses():
    model, x, y = data()
    with pytest.raises(ValueError, match="model must be in eval mode: call its eval"):
        fastood.collect(ResNet(), [x])
    half = ResNet().eval()
    half.body.norm.train()
    with pytest.raises(ValueError, match=r"eval mode, but its part .*norm' is not"):
        fastood.collect(half, [x])
    with pytest.raises(ValueError, match="at least one batch, got none"):
        fastood.collect(model, [])
    with pytest.raises(TypeError, match=r"inputs or \(inputs, labels\), got a tuple of 3"):
        fastood.collect(model, [(x, y, y)])
    with pytest.raises(ValueError, match=r"labels must be \[50\], one per row, got shape \[7\]"):
        fastood.collect(model, [(x, y[:7])])
    with pytest.raises(ValueError, match="labels with every batch or with none"):
        fastood.collect(model, [(x, y), x])
    with pytest.raises(TypeError, match="labels must be numbers, one per row, got list: "):
        fastood.collect(model, [(x, ["cat"] * 50)])
    with pytest.raises(TypeError, match="progress must be True or False"):
        fastood.collect(model, [x], progress=3)


class Endless(IterableDataset):
    """It does not know its length."""

    def __iter__(self):
        return iter(images(12))


def test_progress_on_a_terminal_alone(monkeypatch, capsys):
    model, x, _ = data()
    fastood.collect(model, x.split(7))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for loader in (x.split(7), DataLoader(Endless(), batch_size=5)):
        fastood.collect(model, loader)
        out, err = capsys.readouterr()
        assert not out
        assert "batches" in err
        fastood.collect(model, loader, progress=False)
        assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("fastood._collect.find_spec", lambda name: None)
    fastood.collect(model, x.split(7))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr", None)  # where it is closed
    fastood.collect(model, x.split(7))


@pytest.mark.parametrize("options", OPTIONS)
def test_fit_loader_is_fit(options):
    model, x, y = data()
    detector = fastood.Detector(tpr=0.6, **options)
    detector.partial_fit(torch.randn(30, 3), torch.randn(30, 4))  # of before, to be forgotten
    assert detector.fit_loader(model, DataLoader(TensorDataset(x, y), batch_size=16)) is detector
    expected = fastood.Detector(tpr=0.6, **options).fit(*truth(model, x))
    assert detector.rows == 50
    torch.testing.assert_close(torch.as_tensor(detector.threshold), torch.as_tensor(expected.threshold))
    with pytest.raises(ValueError, match="takes at least 99 in-distribution rows, got 50"):
        fastood.Detector(tpr=0.99).fit_loader(model, x.split(16))

    def broken():
        yield x
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        detector.fit_loader(model, broken())
    assert "not fitted" in repr(detector)  # rather than on what had come


def test_fit_loader_holds_one_batch():
    model, _, _ = data()
    alive = SimpleNamespace(now=0, most=0)

    def batches():
        for _ in range(20):
            x = images(4)
            alive.now += 1
            alive.most = max(alive.most, alive.now)
            weakref.finalize(x, lambda: setattr(alive, "now", alive.now - 1))
            yield x
            del x

    fastood.Detector().fit_loader(model, batches())
    assert alive.most <= 2

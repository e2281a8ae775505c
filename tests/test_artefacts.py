"""What OODHead becomes as a file, by the lines of docs/serving, and run by the runtime that it is for, in a process
that has no fastood."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import program
import pytest
import torch
from torch import nn

import fastood

C, D = 7, 16

PAGE = (Path(__file__).parent.parent / "docs" / "serving" / "README.md").read_text(encoding="utf-8")

needs_2_9 = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="needs torch 2.9: the format that 2.8 exports to has no infinite constants"
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(4, D), nn.ReLU()), nn.Linear(D, C)

    def forward(self, x):
        return self.fc(self.body(x))


class BiT(nn.Module):
    """Whose head is a 1x1 convolution, with feats [N, D, 1, 1] before it."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(4, D), nn.ReLU()), nn.Conv2d(D, C, 1)

    def forward(self, x):
        return self.fc(self.body(x)[:, :, None, None]).flatten(1)


OPTIONS = {
    "energy": {"method": "energy", "norm": 0.3},
    "per class": {"method": "msp", "norm": None, "per_class": True},
    "gradnorm": {"method": "gradnorm"},
}


def made(options, form=Net):
    """A whole model that decides, inputs, and what it must give, with a threshold that is no row's score."""
    torch.manual_seed(0)
    model = form().eval()
    x = torch.randn(60, 4)
    attached = fastood.attach(model, example=x)
    with torch.no_grad():
        logits, feats = attached(x)
    detector = fastood.Detector(tpr=0.6, **options).fit(logits, feats)
    head = fastood.OODHead(attached.head, detector)
    head.threshold.mul_(1 + 1e-4)  # of no row: scores are rounded otherwise by another runtime
    served = nn.Sequential(attached.body, head).eval()
    x[7] = torch.nan
    with torch.no_grad():
        expected = served(x)
    assert 0 < expected["accept"].sum() < 59
    return served, x, expected


def block(word):
    """The lines of the page that hold a word."""
    (found,) = (x for x in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if word in x)
    return found


def exported(folder, monkeypatch, served, x, *words):
    """Run the page's lines with these words where they write their files."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = {"served": served, "inputs": x[:9], "torch": torch}
    for word in words:
        exec(compile(block(word), "docs/serving/README.md", "exec"), names)
    np.savez("in.npz", x=x, threshold=served[1].threshold)


def check(form, expected):
    """Outputs in a process of its own, by folder: as they come, and by the page's lines, which accept nothing."""
    program.run("artefact", form, *expected)
    for folder, outputs in expected.items():
        got = np.load(folder / "out.npz")
        for name in ("logits", "score"):
            np.testing.assert_allclose(got[name], outputs[name].numpy(), rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(got["accept"], outputs["accept"].numpy())
        assert not got["accept"][7]
        assert got["stricter"].shape == outputs["accept"].shape
        assert not got["stricter"].any()


@needs_2_9
def test_torch_export(tmp_path, monkeypatch):
    expected = {}
    for options, form in (("energy", Net), ("per class", BiT)):
        served, x, outputs = made(OPTIONS[options], form)
        exported(tmp_path / options, monkeypatch, served, x, "export.save")
        expected[tmp_path / options] = outputs
    check("pt2", expected)


@needs_2_9
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
@pytest.mark.slow
def test_aot_inductor(tmp_path, monkeypatch):
    served, x, outputs = made(OPTIONS["per class"])
    exported(tmp_path / "per class", monkeypatch, served, x, "export.save", "aoti_compile")
    check("aoti", {tmp_path / "per class": outputs})


@needs_2_9
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
# torch's own; and float64's largest number, with which no row here has to do, is infinite in float32.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:overflow encountered")
def test_onnx(tmp_path, monkeypatch):
    expected = {}
    for options in OPTIONS:
        served, x, outputs = made(OPTIONS[options])
        exported(tmp_path / options, monkeypatch, served, x, "onnx.export")
        expected[tmp_path / options] = outputs
    check("onnx", expected)

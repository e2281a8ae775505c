"""What OODHead becomes as a file, run by the runtime it is for, in a process that has no fastood."""

import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

import fastood

C, D = 7, 16

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
    """A whole model that decides, inputs, and what it must give, with a threshold between two scores."""
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


def run(script, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def check(path, expected):
    """The outputs in a file, as they come and with a threshold that accepts nothing."""
    got = np.load(path)
    for name in ("logits", "score"):
        np.testing.assert_allclose(got[name], expected[name].numpy(), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(got["accept"], expected["accept"].numpy())
    assert not got["accept"][7]
    assert got["stricter"].shape == expected["accept"].shape
    assert not got["stricter"].any()


def exported(served, x):
    with torch.no_grad():
        return torch.export.export(served, (x[:9],), dynamic_shapes=({0: torch.export.Dim("n")},))


EXPORTED = """
import sys
sys.modules["fastood"] = None
import numpy as np, torch
_, artefact, inputs, outputs = sys.argv
served, x = torch.export.load(artefact).module(), torch.from_numpy(np.load(inputs))
got = {name: y.detach().numpy() for name, y in served(x).items()}
state = served.state_dict()
state["1.threshold"] = torch.full_like(state["1.threshold"], float("inf"))
served.load_state_dict(state)
np.savez(outputs, **got, stricter=served(x)["accept"].numpy())
"""


@needs_2_9
@pytest.mark.parametrize(("options", "form"), [("energy", Net), ("per class", BiT)])
def test_torch_export(options, form, tmp_path):
    served, x, expected = made(OPTIONS[options], form)
    torch.export.save(exported(served, x), tmp_path / "served.pt2")
    np.save(tmp_path / "x.npy", x.numpy())
    run(EXPORTED, tmp_path / "served.pt2", tmp_path / "x.npy", tmp_path / "got.npz")
    check(tmp_path / "got.npz", expected)


INDUCTOR = """
import sys
sys.modules["fastood"] = None
import numpy as np, torch
_, artefact, inputs, outputs = sys.argv
served, x = torch._inductor.aoti_load_package(artefact), torch.from_numpy(np.load(inputs))
got = {name: y.numpy() for name, y in served(x).items()}
(name,) = (name for name in served.loader.get_constant_fqns() if name.endswith("threshold"))
served.load_constants({name: torch.full((7,), float("inf"))}, check_full_update=False)
np.savez(outputs, **got, stricter=served(x)["accept"].numpy())
"""


@needs_2_9
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
def test_aot_inductor(tmp_path):
    served, x, expected = made(OPTIONS["per class"])
    torch._inductor.aoti_compile_and_package(
        exported(served, x),
        package_path=str(tmp_path / "served.pt2"),
        inductor_configs={"always_keep_tensor_constants": True},  # or the threshold is compiled in
    )
    np.save(tmp_path / "x.npy", x.numpy())
    run(INDUCTOR, tmp_path / "served.pt2", tmp_path / "x.npy", tmp_path / "got.npz")
    check(tmp_path / "got.npz", expected)


ONNX = """
import sys
sys.modules["fastood"] = sys.modules["torch"] = None
import numpy as np, onnxruntime
_, artefact, inputs, outputs, *shape = sys.argv
x = np.load(inputs)
session = onnxruntime.InferenceSession(artefact)
names = [output.name for output in session.get_outputs()]
got = dict(zip(names, session.run(None, {"x": x})))
limit = onnxruntime.OrtValue.ortvalue_from_numpy(np.full([int(n) for n in shape], np.inf, np.float32))
options = onnxruntime.SessionOptions()
options.add_initializer("1.threshold", limit)  # not a temporary one: the session reads it later
stricter = onnxruntime.InferenceSession(artefact, options)
np.savez(outputs, **got, stricter=stricter.run(["accept"], {"x": x})[0])
"""


@needs_2_9
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
# torch's own; and float64's largest number, with which no row here has to do, is infinite in float32.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:overflow encountered")
@pytest.mark.parametrize("options", OPTIONS)
def test_onnx(options, tmp_path):
    served, x, expected = made(OPTIONS[options])
    torch.onnx.export(
        served,
        (x[:9],),
        tmp_path / "served.onnx",
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("n")},),
        input_names=["x"],
        output_names=list(expected),
        verbose=False,
    )
    np.save(tmp_path / "x.npy", x.numpy())
    run(ONNX, tmp_path / "served.onnx", tmp_path / "x.npy", tmp_path / "got.npz", *served[1].threshold.shape)
    check(tmp_path / "got.npz", expected)

"""Programs that torch.export makes of scores, and what runs them without fastood."""

import io
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastood

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, in its compiler


@pytest.mark.skipif(
    torch.__version__ < "2.9", reason="needs torch 2.9: the format that 2.8 exports to has no infinite constants"
)
@pytest.mark.parametrize("options", [{}, {"norm": None}, {"norm": 2, "log": True}, {"method": "exgrad"}])
def test_exported_program_needs_no_fastood(options):
    class Served(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(6, 4)

        def forward(self, h):
            return fastood.score(self.head(h), h, **options)

    torch.manual_seed(0)
    model, h = Served().eval(), torch.randn(5, 6)
    batch = {"h": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (h,), dynamic_shapes=batch)
    for n in (2, 5, 9):
        rows = torch.randn(n, 6)
        torch.testing.assert_close(program.module()(rows), model(rows), rtol=1e-5, atol=1e-5)
    file = io.BytesIO()
    torch.export.save(program, file)
    load = "import io, sys, torch; torch.export.load(io.BytesIO(sys.stdin.buffer.read()))"
    alone = f"{load}; assert 'fastood' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", alone], input=file.getvalue(), check=True)


def test_aot_compiled_package_needs_no_fastood(tmp_path):
    """What runs in a process without Python (AOTInductor): no operator of ours may be in it."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++, which AOTInductor compiles with")
    served = torch.nn.Module()
    served.forward = lambda f, h: fastood.score(f, h)
    f, h = torch.randn(5, 4), torch.randn(5, 6)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(served, (f, h), dynamic_shapes={"f": batch, "h": batch})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "score.pt2"))
    rows = torch.randn(9, 4), torch.randn(9, 6)
    torch.save((*rows, fastood.score(*rows)), tmp_path / "rows.pt")
    code = """
import sys, torch
f, h, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(f, h), expected, rtol=1e-5, atol=1e-5)
assert "fastood" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, package, tmp_path / "rows.pt"], check=True)


def batch(n):
    return torch.randn(n, 12), torch.randn(n, 9)


def run_alone(code, *arguments):
    """In a process that knows this one's modules by their files alone."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


class Served(torch.nn.Module):
    def __init__(self, backend="auto", **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU())
        self.head = torch.nn.Linear(32, 100)
        self.options = {"backend": backend, **options}

    def forward(self, x):
        h = self.body(x)
        logits = self.head(h)
        return logits, fastood.score(logits, h, **self.options)


@pytest.mark.parametrize("strict", [False, True])
def test_export_holds_plain_operations(strict):
    model = Served().eval()
    program = torch.export.export(model, (torch.randn(5, 16),), strict=strict)
    assert "fastood" not in str(program.graph)


def test_onnx_in_onnxruntime(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"needs {name}")

    class Scores(torch.nn.Module):
        def forward(self, f, h):
            products = fastood.scores(f, h, ["msp", "energy", "exgrad", "gen"], norm=2)
            return (*products.values(), fastood.score(f, h), fastood.score(f, h, "gradnorm", log=True))

    rows, n = batch(6), torch.export.Dim("n")
    program = torch.onnx.export(Scores(), rows, dynamo=True, dynamic_shapes={"f": {0: n}, "h": {0: n}}, verbose=False)
    program.save(tmp_path / "scores.onnx")
    f, h = batch(17)
    f[0, 3], f[1, 2], f[2, 5] = 60.0, -math.inf, math.nan  # a sure row, a masked class, and what is no number
    expected = [x.numpy() for x in Scores()(f, h)]
    np.savez(tmp_path / "rows.npz", f.numpy(), h.numpy(), *expected)
    code = """
import sys, numpy as np, onnxruntime
f, h, *expected = np.load(sys.argv[2]).values()
session = onnxruntime.InferenceSession(sys.argv[1])
for got, wanted in zip(session.run(None, {"f": f, "h": h}), expected, strict=True):
    np.testing.assert_allclose(got, wanted, rtol=2e-5)
assert not {"torch", "fastood"} & set(sys.modules)
"""
    run_alone(code, tmp_path / "scores.onnx", tmp_path / "rows.npz")

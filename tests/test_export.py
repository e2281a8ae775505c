"""Programs that torch.export makes of scores, and what runs them without fastood."""

import math
import shutil

import numpy as np
import program
import pytest
import torch

import fastood

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, in its compiler
N = torch.export.Dim("n")


class Served(torch.nn.Module):
    """A last layer, and the score of what it is given."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.options = torch.nn.Linear(9, 12), options

    def forward(self, h):
        return fastood.score(self.head(h), h, **self.options)


def batch(n):
    return torch.randn(n, 12), torch.randn(n, 9)


def export(folder, name, model):
    """Writes the program of a model, and beside it rows and what the model gives for them."""
    h = batch(9)[1]
    with torch.no_grad():
        whole = torch.export.export(model.eval(), batch(5)[1:], dynamic_shapes={"h": {0: N}})
        expected = model(h)
    torch.testing.assert_close(whole.module()(h), expected, rtol=1e-5, atol=1e-5)
    torch.save((h, expected), folder / f"{name}.rows")
    if name == "compiled.pt2":
        fast = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        torch._inductor.aoti_compile_and_package(whole, package_path=str(folder / name), inductor_configs=fast)
    else:
        torch.export.save(whole, folder / name)
    return str(whole.graph)


@pytest.mark.skipif(
    torch.__version__ < "2.9", reason="needs torch 2.9: the format that 2.8 exports to has no infinite constants"
)
def test_exported_programs_need_no_fastood(tmp_path):
    """But for one that was asked for a kernel by name."""
    for i, options in enumerate(({}, {"norm": None}, {"norm": 2, "log": True}, {"method": "exgrad"})):
        export(tmp_path, f"{i}.pt2", Served(**options))
    if fastood.backends()["cpu"].usable:
        graph = export(tmp_path, "by name.pt2", Served(backend="cpu", norm=math.inf))
        assert "fastood.scores.default" in graph
    program.run("exported", tmp_path)


def test_aot_compiled_package_needs_no_fastood(tmp_path):
    """What runs in a process without Python (AOTInductor): no operator of ours may be in it."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++, which AOTInductor compiles with")
    export(tmp_path, "compiled.pt2", Served())
    program.run("exported", tmp_path)


@pytest.mark.parametrize("strict", [False, True])
def test_export_holds_plain_operations(strict):
    program = torch.export.export(Served().eval(), batch(5)[1:], strict=strict)
    assert "fastood" not in str(program.graph)


@pytest.mark.parametrize(
    "call",
    [
        lambda f, h: fastood.gradient_norm(f, h, "predicted", 3, expectation="outside"),
        lambda f, h: fastood.gradient_norm(f, h, f.softmax(-1), 2, 2, "outside"),
        fastood.BatchGrad(torch.ones(12, 9)).score,
        lambda f, h: fastood.score(f, h, "scale", head=(torch.ones(12, 9), torch.ones(12))),
    ],
    ids=["gradient_norm", "gradient_norm given", "BatchGrad", "scale"],
)
def test_what_goes_some_rows_at_a_time_is_exported_for_any_batch(call):
    class Module(torch.nn.Module):
        def forward(self, f, h):
            return call(f, h)

    whole = torch.export.export(Module(), batch(5), dynamic_shapes={"f": {0: N}, "h": {0: N}})
    assert "fastood" not in str(whole.graph)
    for n in (1, 17):
        f, h = batch(n)
        torch.testing.assert_close(whole.module()(f, h), call(f, h), rtol=1e-5, atol=1e-5)


def test_onnx_in_onnxruntime(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"needs {name}")

    class Scores(torch.nn.Module):
        def forward(self, f, h):
            products = fastood.scores(f, h, ["msp", "energy", "exgrad", "gen"], norm=2)
            return (*products.values(), fastood.score(f, h), fastood.score(f, h, "gradnorm", log=True))

    shapes = {"f": {0: N}, "h": {0: N}}
    exported = torch.onnx.export(Scores(), batch(6), dynamo=True, dynamic_shapes=shapes, verbose=False)
    exported.save(tmp_path / "scores.onnx")
    f, h = batch(17)
    f[0, 3], f[1, 2], f[2, 5] = 60.0, -math.inf, math.nan  # a sure row, a masked class, and what is no number
    expected = [x.numpy() for x in Scores()(f, h)]
    np.savez(tmp_path / "rows.npz", f.numpy(), h.numpy(), *expected)
    program.run("onnx_rows", tmp_path / "scores.onnx", tmp_path / "rows.npz")

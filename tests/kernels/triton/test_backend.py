"""Which calls the Triton backend serves (kernels/triton/__init__.py)."""

import os
import subprocess
import sys

import pytest
import torch

import fastood
from fastood import kernels
from fastood.kernels import triton


def test_what_it_leaves_to_the_reference(triton_device):
    f, h = torch.randn(3, 10, device=triton_device), torch.randn(3, 4, device=triton_device)
    anchors = fastood.BatchGrad(torch.randn(10, 4, device=triton_device), temperature=1e-40)
    no_feats = fastood.BatchGrad(torch.randn(10, 0, device=triton_device))
    for call in (
        lambda b: fastood.score(f, method="gen", gamma=5, backend=b),
        lambda b: fastood.row_stats(f, [("power_sum", 4)], temperature=2.0**-99, backend=b)["power_sum", 4],
        lambda b: fastood.score(f, temperature=1e-40, backend=b),
        lambda b: fastood.score(f, method="gen", temperature=1e-40, backend=b),
        lambda b: fastood.gradient_norm(f, h * 1e-40, "uniform", 2.0, 1.0, "outside", temperature=1e-40, backend=b),
        lambda b: fastood.score(f.clone().requires_grad_(), h, backend=b).detach(),
        lambda b: anchors.score(f, h, backend=b),
        lambda b: no_feats.score(f, h[:, :0], backend=b),
    ):
        torch.testing.assert_close(call("triton"), call("reference"))
    with pytest.raises(RuntimeError, match="float64"):
        fastood.score(f.double(), backend="triton")


def test_says_why_it_does_not_serve():
    for device, dtype, why in (("cuda", torch.float64, "float64"), ("meta", torch.float32, "CUDA tensors")):
        assert not fastood.backends(device, dtype)["triton"].usable
        assert why in fastood.backends(device, dtype)["triton"].why
    with pytest.raises(RuntimeError, match="triton"):
        fastood.score(torch.ones(2, 3, dtype=torch.float64), backend="triton")


@pytest.mark.parametrize(("version", "found"), [("3.5.1", "3.5.1"), ("3.10.0+git1", None), ("4.0", None)])
def test_an_old_triton_is_refused(monkeypatch, tmp_path, version, found):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(f"# not imported\n__version__ = '{version}'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(triton, "_unusable_device", lambda device: None)
    triton.missing.cache_clear()
    cuda, why = torch.device("cuda"), f"it needs Triton 3.6 or newer, found {found}"
    try:
        if found is None:
            assert kernels.select("auto", cuda, torch.float32) is triton
            return
        kernels._warn_once.cache_clear()
        with pytest.warns(UserWarning, match=f"Triton kernels cannot be used .{why}.: plain PyTorch does"):
            assert kernels.select("auto", cuda, torch.float32) is kernels.reference
        assert kernels.select("auto", cuda, torch.float32) is kernels.reference  # and says so once
        with pytest.raises(RuntimeError, match=f"backend 'triton' cannot serve torch.float32 on cuda: {why}"):
            kernels.select("triton", cuda, torch.float32)
    finally:
        triton.missing.cache_clear()


def test_import_does_not_load_triton():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import fastood; fastood.backends(); fastood.score(torch.ones(2, 3))\n"
        "assert not {m for m in set(sys.modules) - before if m.split('.')[0] == 'triton'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "0"})

"""Loads the exported programs of a folder, each with its inputs and result beside it: `exported.py FOLDER`.

All but "by name.pt2", in which an operator of ours is, run without fastood.
"""

import sys
from pathlib import Path

import torch


def check(path):
    h, expected = torch.load(f"{path}.rows")
    compiled = path.stem == "compiled"
    run = torch._inductor.aoti_load_package(str(path)) if compiled else torch.export.load(path).module()
    torch.testing.assert_close(run(h), expected, rtol=1e-5, atol=1e-5)


for path in Path(sys.argv[1]).glob("*.pt2"):
    if path.stem != "by name":
        check(path)
assert "fastood" not in sys.modules
for path in Path(sys.argv[1]).glob("by name.pt2"):
    try:
        torch.export.load(path)
    except Exception:
        import fastood  # noqa: F401 - it registers the operator
    else:
        raise AssertionError("no operator is in it")
    check(path)

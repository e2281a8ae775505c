"""What docs/serving exports, run by its own runtime without fastood: `artefact.py pt2|aoti|onnx FOLDER ...`.

Each folder has the file, and in.npz: inputs and a threshold. Into its out.npz go the outputs as they come, and which
rows are accepted once the page's lines have made the threshold infinite.
"""

import math
import os
import re
import sys
from pathlib import Path

import numpy as np

PAGE = Path(__file__).parents[2] / "docs" / "serving" / "README.md"
LOADS = {"pt2": "export.load", "aoti": "aoti_load", "onnx": "add_initializer"}  # a word of the page's lines

form, *folders = sys.argv[1:]
sys.modules["fastood"] = None
if form == "onnx":
    sys.modules["torch"] = None
    import onnxruntime
else:
    import torch

    torch.set_grad_enabled(False)
(lines,) = (
    x for x in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL) if LOADS[form] in x
)
for folder in folders:
    os.chdir(folder)
    inputs, threshold = np.load("in.npz").values()
    names = {"math": math, "np": np}
    if form == "onnx":
        session = onnxruntime.InferenceSession("served.onnx")
        given = (y.name for y in session.get_outputs())
        outputs = dict(zip(given, session.run(None, {"inputs": inputs}), strict=True))
        names["onnxruntime"] = onnxruntime
    else:
        inputs, threshold = torch.from_numpy(inputs), torch.from_numpy(threshold)
        loaded = (
            torch.export.load("served.pt2").module()
            if form == "pt2"
            else torch._inductor.aoti_load_package("served_aoti.pt2")
        )
        outputs = loaded(inputs)
        names["torch"] = torch
    plain = {name: np.asarray(y) for name, y in outputs.items()}
    names |= {"inputs": inputs, "threshold": threshold}
    exec(compile(lines, str(PAGE), "exec"), names)
    stricter = names["accept"] if "accept" in names else names["outputs"]["accept"]
    np.savez("out.npz", **plain, stricter=np.asarray(stricter))

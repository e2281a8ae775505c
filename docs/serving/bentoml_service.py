"""BentoML: ARTEFACTS=folder bentoml serve bentoml_service:OOD

POST /decide {"inputs": [[...], ...]} answers a list of {"class": ..., "score": ..., "accept": ...}. Requests that
arrive together are one batch, so what are no inputs is refused before: in a batch it would fail the others with it.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import bentoml
import numpy as np
import torch
from pydantic import AfterValidator

import fastood

COLUMNS = 64  # of export.py's digits: put your model's


def checked(inputs: np.ndarray) -> np.ndarray:
    if inputs.ndim != 2 or len(inputs) == 0 or inputs.shape[1] != COLUMNS or inputs.dtype.kind not in "iuf":
        raise ValueError(f"inputs must be numbers [n, {COLUMNS}], got {inputs.dtype} {list(inputs.shape)}")
    return inputs.astype(np.float32)


@bentoml.service(traffic={"timeout": 10})
class OOD:
    def __init__(self) -> None:
        folder = Path(os.environ.get("ARTEFACTS", "."))
        self.model = torch.export.load(folder / "served.pt2").module()
        self.monitor = fastood.Monitor(fastood.Detector.load(folder / "detector.safetensors"))

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)
    def decide(self, inputs: Annotated[np.ndarray, AfterValidator(checked)]) -> list[dict[str, Any]]:
        with torch.inference_mode():
            out = self.model(torch.from_numpy(inputs))
        self.monitor.update(out["score"], out["accept"])
        columns = out["logits"].argmax(1).tolist(), out["score"].tolist(), out["accept"].tolist()
        return [dict(zip(("class", "score", "accept"), row, strict=True)) for row in zip(*columns, strict=True)]

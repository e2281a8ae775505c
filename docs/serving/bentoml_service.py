"""BentoML: ARTEFACTS=folder bentoml serve bentoml_service:OOD

POST /decide {"inputs": [[...], ...]} answers a list of {"class": ..., "score": ..., "accept": ...}. Requests that
arrive together are one batch.
"""

import os
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import torch

import fastood


@bentoml.service(traffic={"timeout": 10})
class OOD:
    def __init__(self) -> None:
        folder = Path(os.environ.get("ARTEFACTS", "."))
        self.model = torch.export.load(folder / "served.pt2").module()
        self.monitor = fastood.Monitor(fastood.Detector.load(folder / "detector.safetensors"))

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)
    def decide(self, inputs: np.ndarray) -> list[dict[str, Any]]:
        with torch.inference_mode():
            out = self.model(torch.from_numpy(inputs.astype(np.float32)))
        self.monitor.update(out["score"], out["accept"])
        columns = out["logits"].argmax(1).tolist(), out["score"].tolist(), out["accept"].tolist()
        return [dict(zip(("class", "score", "accept"), row, strict=True)) for row in zip(*columns, strict=True)]

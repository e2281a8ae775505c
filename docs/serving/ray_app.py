"""Ray Serve: ARTEFACTS=folder serve run ray_app:app

POST / {"input": [...]} answers {"class": ..., "score": ..., "accept": ...}. Requests that arrive together are one
batch.
"""

import os
from pathlib import Path
from typing import Any

import torch
from ray import serve
from starlette.requests import Request

import fastood


@serve.deployment
class OOD:
    def __init__(self, folder: str) -> None:
        self.model = torch.export.load(Path(folder) / "served.pt2").module()
        self.monitor = fastood.Monitor(fastood.Detector.load(Path(folder) / "detector.safetensors"))

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)
    async def decide(self, rows: list[list[float]]) -> list[dict[str, Any]]:
        with torch.inference_mode():
            out = self.model(torch.tensor(rows))
        self.monitor.update(out["score"], out["accept"])
        columns = out["logits"].argmax(1).tolist(), out["score"].tolist(), out["accept"].tolist()
        return [dict(zip(("class", "score", "accept"), row, strict=True)) for row in zip(*columns, strict=True)]

    async def __call__(self, request: Request) -> dict[str, Any]:
        return await self.decide((await request.json())["input"])

    def state(self) -> dict[str, Any]:
        """What this replica has counted; monitors of several merge."""
        return self.monitor.state_dict()


app = OOD.bind(os.path.abspath(os.environ.get("ARTEFACTS", ".")))

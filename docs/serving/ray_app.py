"""Ray Serve: ARTEFACTS=folder serve run ray_app:app

POST / {"input": [...]} answers {"class": ..., "score": ..., "accept": ...}. Requests that arrive together are one
batch, so what is no input is refused before: in a batch it would fail the others with it.
"""

import os
from pathlib import Path
from typing import Any

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import fastood


@serve.deployment
class OOD:
    def __init__(self, folder: str) -> None:
        program = torch.export.load(Path(folder) / "served.pt2")
        (example,), _ = program.example_inputs
        self.model, self.shape = program.module(), example.shape[1:]
        self.monitor = fastood.Monitor(fastood.Detector.load(Path(folder) / "detector.safetensors"))

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)
    async def decide(self, rows: list[torch.Tensor]) -> list[dict[str, Any]]:
        with torch.inference_mode():
            out = self.model(torch.stack(rows))
        self.monitor.update(out["score"], out["accept"])
        columns = out["logits"].argmax(1).tolist(), out["score"].tolist(), out["accept"].tolist()
        return [dict(zip(("class", "score", "accept"), row, strict=True)) for row in zip(*columns, strict=True)]

    async def __call__(self, request: Request) -> dict[str, Any] | Response:
        try:
            row = torch.tensor((await request.json())["input"], dtype=torch.float32)
            if row.shape != self.shape:
                raise ValueError(f"input must be numbers {list(self.shape)}, got {list(row.shape)}")
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            return JSONResponse({"detail": str(error)}, status_code=422)
        return await self.decide(row)

    def state(self) -> dict[str, Any]:
        """What this replica has counted; monitors of several merge."""
        return self.monitor.state_dict()


app = OOD.bind(os.path.abspath(os.environ.get("ARTEFACTS", ".")))

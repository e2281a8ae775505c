"""FastAPI: ARTEFACTS=folder uvicorn fastapi_app:app

POST /decide {"inputs": [[...], ...]} answers {"class": [...], "score": [...], "accept": [...]}, a score that is not
finite as null; GET /metrics is for Prometheus.
"""

import os
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field

import fastood

folder = Path(os.environ.get("ARTEFACTS", "."))
model = torch.export.load(folder / "served.pt2").module()
monitor = fastood.Monitor(fastood.Detector.load(folder / "detector.safetensors"))
app = FastAPI()


class Request(BaseModel):
    inputs: list[list[float]] = Field(min_length=1)


@app.post("/decide")
def decide(request: Request) -> dict[str, Any]:  # no `async`: it runs in a thread, and the event loop stays free
    try:
        with torch.inference_mode():
            out = model(torch.tensor(request.inputs))
    except (ValueError, RuntimeError, AssertionError) as error:  # rows of another length than the model takes
        raise HTTPException(422, str(error)) from error
    monitor.update(out["score"], out["accept"])
    return {
        "class": out["logits"].argmax(1).tolist(),
        "score": [x if abs(x) < float("inf") else None for x in out["score"].tolist()],
        "accept": out["accept"].tolist(),
    }


@app.get("/metrics")
def metrics() -> Response:
    return Response(monitor.prometheus(), media_type="text/plain; version=0.0.4")

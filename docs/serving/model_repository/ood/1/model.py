"""NVIDIA Triton Inference Server, python backend: tritonserver --model-repository docs/serving/model_repository

served.pt2 and detector.safetensors lie beside this file; torch and fastood are installed where the server runs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

import fastood


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(__file__).parent
        self.model = torch.export.load(folder / "served.pt2").module()
        self.monitor = fastood.Monitor(fastood.Detector.load(folder / "detector.safetensors"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """All requests as one batch."""
        inputs = [pb_utils.get_input_tensor_by_name(request, "inputs").as_numpy() for request in requests]
        with torch.inference_mode():
            out = self.model(torch.from_numpy(np.concatenate(inputs)))
        self.monitor.update(out["score"], out["accept"])
        columns = {"logits": out["logits"], "score": out["score"][:, None], "accept": out["accept"][:, None]}
        ends = np.cumsum([len(x) for x in inputs])[:-1]
        parts = {name: np.split(x.numpy(), ends) for name, x in columns.items()}
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(name, parts[name][i]) for name in parts])
            for i in range(len(requests))
        ]

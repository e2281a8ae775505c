"""Imports fastood, then uses its parts. Prints JSON: what the import loaded beside torch, and what each use gave."""

import importlib
import json
import sys

import torch  # noqa: F401

before = {*sys.modules}
import fastood  # noqa: E402

answer = {"loads": sorted({*sys.modules} - before), "lists": dir(fastood), "used": {}}
answer["used"]["evaluation"] = fastood.evaluation is importlib.import_module("fastood.evaluation")
answer["used"]["metrics"] = fastood.metrics.auroc([1.0], [0.0]) == 1
answer["used"]["monitor"] = fastood.Monitor is importlib.import_module("fastood.monitor").Monitor
answer["used"]["peers"] = callable(fastood.peers.pytorch_ood)
answer["used"]["sklearn"] = isinstance(fastood.sklearn.OODDetector, type)
print(json.dumps(answer))

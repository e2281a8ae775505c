"""Runs a model of two inputs in ONNX Runtime on rows, and compares: `onnx_rows.py MODEL ROWS`."""

import sys

import numpy as np
import onnxruntime

f, h, *expected = np.load(sys.argv[2]).values()
session = onnxruntime.InferenceSession(sys.argv[1])
for got, wanted in zip(session.run(None, {"f": f, "h": h}), expected, strict=True):
    np.testing.assert_allclose(got, wanted, rtol=2e-5)
assert not {"torch", "fastood"} & set(sys.modules)

"""Runs a file that has an operator of ours in it: `artefact_by_name.py exported|compiled FILE ROWS`."""

import sys

import torch

import fastood  # noqa: F401 - it registers the operator

form, path, rows = sys.argv[1:]
x, expected = torch.load(rows)
run = torch.export.load(path).module() if form == "exported" else torch._inductor.aoti_load_package(path)
torch.testing.assert_close(run(x)[1], expected, rtol=1e-5, atol=0)

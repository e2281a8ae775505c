"""Runs a compiled package that has an operator of ours in it: `compiled_package.py PACKAGE ROWS`."""

import sys

import torch

import fastood  # noqa: F401 - it registers the operator

x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(x)[1], expected, rtol=1e-5, atol=0)

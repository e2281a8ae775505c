"""Bytes of memory beyond its arguments that score_linear takes at its peak: peak.py DTYPE METHOD"""

import sys

import torch

import fastood
from benchmarks.harness import peak_extra_bytes

dtype, method = getattr(torch, sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
h, w, b = torch.randn(512, 32).to(dtype), torch.randn(131072, 32).to(dtype), torch.randn(131072)
fastood.score_linear(h[:1], w, b, method, predict=True)  # the threads and buffers of BLAS
print(peak_extra_bytes(lambda: fastood.score_linear(h, w, b, method, predict=True), h.device))

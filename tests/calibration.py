"""Rows to fit detectors on."""

import torch


def data(n=300, C=5, D=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, C, generator=g), torch.randn(n, D, generator=g).relu() + 0.1

"""The nearest rows of a bank, by the largest inner product, a tile of products at a time.

In float64, these take about as long as the exact search of faiss in float32 (IndexFlatL2 of its wheel for CPUs;
benchmarks/nearest.py measures both), which is why that is not used where it is installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 1 << 22  # products held at a time


def nearest(x: Tensor, bank: Tensor, k: int, less: Tensor | None = None) -> Tensor:
    """Which k rows of `bank` [M, D] have the largest inner products with each row of `x` [n, D]: [n, k], falling.

    Less a number of each row of the bank, `less` [M]: with half its squared norm they are the nearest ones. A NaN row
    of `x` finds any.

    Examples
    --------
    >>> from fastood.successors.nearest import nearest
    >>> nearest(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]), 2)
    tensor([[1, 2]])
    """
    n = x.shape[0]
    values, found = x.new_empty(n, 0), torch.empty(n, 0, dtype=torch.int64, device=x.device)
    # A graph is for any number of rows, and so has but one tile.
    step = len(bank) if torch.compiler.is_compiling() else max(k, TILE // max(1, n))
    for first in range(0, len(bank), step):
        products = x @ bank[first : first + step].to(x.dtype).T
        if less is not None:
            products -= less[first : first + step]
        here = products.topk(min(k, products.shape[1]), 1)
        values, found = torch.cat([values, here.values], 1), torch.cat([found, here.indices + first], 1)
        values, order = values.topk(min(k, values.shape[1]), 1)
        found = found.gather(1, order)
    return found

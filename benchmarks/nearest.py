"""The search of knn and nnguide beside that of faiss: python -m benchmarks.nearest (needs pip install faiss-cpu).

Exact searches for the k nearest, on as many threads each: seconds, the best of three.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import faiss
import torch
from torch import Tensor

from fastood.successors.nearest import nearest

THREADS = 2


def best(search: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        search()
        times.append(time.perf_counter() - start)
    return min(times)


def searches(x: Tensor, bank: Tensor, k: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Of both: each gives [n, k], which rows of the bank."""
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank.numpy())
    wide, less = x.double(), bank.double().square().sum(1) / 2
    return lambda: torch.from_numpy(index.search(x.numpy(), k)[1]), lambda: nearest(wide, bank, k, less)


def main() -> None:
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    g = torch.Generator().manual_seed(0)

    def units(n: int, D: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(n, D, generator=g))

    print(f"{'rows':>6} {'bank':>6} {'D':>5} {'k':>3} {'faiss, float32':>17} {'fastood, float64':>17}")
    for n, M, D, k in ((1024, 50_000, 512, 50), (1024, 50_000, 2048, 10), (16, 50_000, 512, 50)):
        theirs, ours = map(best, searches(units(n, D), units(M, D), k))
        print(f"{n:>6} {M:>6} {D:>5} {k:>3} {theirs:>15.3f} s {ours:>15.3f} s")


if __name__ == "__main__":
    main()

"""score_linear on a GPU, tile by tile of the kernel: python -m benchmarks.gpu_linear

Each way is checked against float64 on some rows, then timed by replays of a CUDA graph. Rivals are cuBLAS's product
with PyTorch's formula, with that formula compiled, and with fastood.score; the product alone bounds them from below.
They round logits to bfloat16, which shows in how far they are off. "Tiles of logits" is how score_linear does what the
kernel does not. Arithmetic counts 2 N C D operations; MiB is what a call takes beside its inputs.

--rehearse checks the kernel in Triton's interpreter at a small shape.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastood
from benchmarks import rivals
from benchmarks.harness import clock, gpu_seconds, peak_extra_bytes
from fastood.kernels.triton import fused_linear as fused
from fastood.linear import _tiles

TILINGS = {
    "128 x 128": fused.Tiling(),
    "128 x 128, 8 warps": fused.Tiling(warps=8),
    "128 x 256, 8 warps": fused.Tiling(classes=256, warps=8),
    "128 x 256, 8 warps, 4 stages": fused.Tiling(classes=256, warps=8, stages=4),
}
SHAPES = ((4096, 2048, 1000), (4096, 2048, 128256))
REHEARSED = os.environ.get("TRITON_INTERPRET") == "1"
METHODS = {"energy": rivals.energy, "msp": rivals.msp, "tv": rivals.tv}


def layer(N: int, D: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    on = "cpu" if REHEARSED else "cuda"
    h, w = torch.randn(N, D, device=on).relu().bfloat16(), (torch.randn(C, D, device=on) * 2 / D**0.5).bfloat16()
    return h, w, torch.randn(C, device=on)


def ways(method: str, h: Tensor, w: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Of one score, without a norm."""
    formula, score = rivals.in_float(METHODS[method]), partial(fastood.score, method=method)
    half = b.bfloat16()
    found: dict[str, Callable[[], Tensor]] = {
        "fastood.score_linear": lambda: fastood.score_linear(h, w, b, method, norm=None, backend="triton")
    }
    if method != "tv":
        stat = (method,)
        for name, tiling in TILINGS.items():
            if REHEARSED:
                tiling = tiling._replace(rows=16, classes=tiling.classes // 8, step=16, tiles=2)
            found[f"kernel, {name}"] = lambda tiling=tiling: fused.linear(h, w, b, stat, 1.0, False, tiling)[0][0]
    found["tiles of logits"] = lambda: torch.cat([score(f) for _, f in _tiles(h, w, b)])
    if not REHEARSED:
        compiled = torch.compile(formula)
        found["product (rounded to bf16) alone"] = lambda: torch.addmm(half, h, w.T)
        found["product + fastood.score"] = lambda: score(torch.addmm(half, h, w.T))
        found["product + torch.compile"] = lambda: compiled(torch.addmm(half, h, w.T))
        if len(w) < 100_000:
            found["product + eager"] = lambda: formula(torch.addmm(half, h, w.T))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    if parser.parse_args().rehearse and not REHEARSED:
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.gpu_linear", "--rehearse"],
                  os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    start, wrong = time.perf_counter(), 0
    print(f"{torch.cuda.get_device_name() if not REHEARSED else 'interpreter'}, torch {torch.__version__}", flush=True)
    for N, D, C in ((40, 48, 100),) if REHEARSED else SHAPES:
        h, w, b = layer(N, D, C)
        rows = torch.linspace(0, N - 1, 16).long().to(h.device)
        f = h[rows].double() @ w.double().T + b.double()
        for method, formula in METHODS.items():
            print(f"\n{method}, N={N} D={D} C={C}, bfloat16", flush=True)
            truth = formula(f)
            for name, call in ways(method, h, w, b).items():
                try:
                    once = clock(call, 1)
                    off = float("nan") if "alone" in name else float((call()[rows].double() - truth).abs().max())
                    seconds = once if REHEARSED else gpu_seconds(call, 0.05)
                except Exception as failed:
                    print(f"  {name:32} {type(failed).__name__}: {' '.join(str(failed).split())[:200]}", flush=True)
                    wrong += "product" not in name  # a rival may need another Triton than the kernel
                    continue
                wrong += "product" not in name and not off < 1e-4
                figures = ""
                if not REHEARSED:
                    taken = peak_extra_bytes(call, h.device) or 0
                    rate = 2 * N * C * D / seconds / 1e12
                    figures = f"{seconds * 1e6:9.0f} us {rate:6.0f} T op/s {taken / 2**20:6.0f} MiB"
                print(f"  {name:32} {figures} off by {off:.1e}", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s; {'something is wrong' if wrong else 'all is right'}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())

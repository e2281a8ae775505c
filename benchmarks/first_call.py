"""Seconds until the first score in a process that has imported torch: `python first_call.py HOW` prints them.

One way of scoring per process: `test_first_call.py` starts one for each candidate and round.
"""

import sys
import time

import rivals
import torch


def fastood_score(f, h):
    import fastood

    return fastood.score(f, h)


def fastood_import(f, h):
    import fastood  # noqa: F401


CALLS = {
    "import": fastood_import,
    "fastood": fastood_score,
    "eager": rivals.energy_norm,
    "torch.compile": lambda f, h: torch.compile(rivals.energy_norm)(f, h),
}

if __name__ == "__main__":
    f, h = torch.randn(64, 1000), torch.rand(64, 2048)
    start = time.perf_counter()
    out = CALLS[sys.argv[1]](f, h)
    seconds = time.perf_counter() - start
    if out is not None:
        torch.testing.assert_close(out.double(), rivals.energy_norm(f.double(), h.double()), rtol=2e-4, atol=1e-6)
    print(seconds)

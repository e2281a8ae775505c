"""What the ranks of test_distributed.py run: processes of their own, which find it by this name."""

from functools import partial

import torch
import torch.distributed as dist
from harness import OURS, check, clock, in_turn
from rivals import energy, tv

import fastood

RANKS = 2
FORMULAS = {"energy": energy, "tv": tv}


def gathered(x, method):
    slices = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(slices, x)
    return fastood.score(torch.cat(slices, 1), method=method)


def by_all_reduce(x):
    found = fastood.row_stats(x, ["fmax", "energy"])
    largest = found["fmax"].clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = (found["energy"] - largest).exp()
    dist.all_reduce(total)
    return largest + total.log()


def collectives_alone(N, numbers):
    for x in torch.zeros(512, dtype=torch.uint8), *(torch.zeros(n, N, dtype=torch.float64) for n in numbers):
        dist.all_gather([torch.empty_like(x) for _ in range(RANKS)], x)


def measure(rank, shape, method, rounds, rendezvous, answer):
    """On both ranks, which wait for each other within every candidate; the first one's times are sent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    N, C = shape
    f = 3 * torch.randn(N, C, generator=torch.Generator().manual_seed(0))
    x = f.chunk(RANKS, 1)[rank].contiguous()
    scores = {
        OURS: partial(fastood.distributed.score, x, method=method),
        "all_gather + fastood.score": partial(gathered, x, method),
    }
    if method == "energy":
        scores["by all_reduce"] = partial(by_all_reduce, x)
    check(scores, FORMULAS[method](f.double()), torch.arange(N))
    calls = scores | {"collectives alone": partial(collectives_alone, N, [2] if method == "energy" else [3, 1])}
    timers = {name: partial(clock, call, 5) for name, call in calls.items()}
    times = in_turn(timers, rounds)
    if rank == 0:
        answer.put(times)
    dist.destroy_process_group()

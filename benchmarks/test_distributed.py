"""fastood.distributed on two processes of gloo, a thread each, against gathering the logits; what its collectives cost.

"by all_reduce" merges the same local statistics by a maximum and a sum, as a vocabulary-parallel cross-entropy does: as
many collectives as fastood's, without its check that the ranks agree. "collectives alone" is what fastood sends, twice.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from harness import OURS, check, clock, in_turn, weighed
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


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("shape", [(256, 1000), (1, 1000), (4096, 1000), (1, 131072), (64, 131072)], ids=str)
def test_classes_over_two_ranks(compare, method, shape, tmp_path):
    context = torch.multiprocessing.get_context("forkserver")
    answer, rendezvous = context.SimpleQueue(), (tmp_path / "store").as_uri()
    rounds = 0 if compare.disabled else 3 if compare.quick else 20
    torch.multiprocessing.start_processes(
        measure, (shape, method, rounds, rendezvous, answer), nprocs=RANKS, start_method="forkserver"
    )
    times = answer.get()
    if not compare.disabled:
        N, C = shape
        compare.record(f"{method} of classes over {RANKS} ranks · N={N} C={C}", times, weighed(times), N=N, C=C)

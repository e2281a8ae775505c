"""fastood.distributed on two processes of gloo, a thread each, against gathering the logits; what its collectives cost.

"by all_reduce" merges the same local statistics by a maximum and a sum, as a vocabulary-parallel cross-entropy does: as
many collectives as fastood's, without its check that the ranks agree. "collectives alone" is what fastood sends, twice.
"""

import pytest
import torch
from harness import weighed
from ranks import FORMULAS, RANKS, measure


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

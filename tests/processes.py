"""Three processes of one group, gloo's, which run functions of tests: a rank each."""

import datetime
import traceback
import warnings
from contextlib import contextmanager
from importlib import import_module

import torch
import torch.distributed as dist

RANKS = 3


def _serve(rank, rendezvous, pipe):
    """Runs what comes through the pipe until None does."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    timeout = datetime.timedelta(seconds=60)  # of a hang, which is then an error
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS, timeout=timeout)
    groups = {2: dist.new_group([0, 1], timeout=timeout), RANKS: None}
    while (job := pipe.recv()) is not None:
        module, name, ranks, args = job
        try:
            function = getattr(import_module(module), name)
            pipe.send((True, function(rank, groups[ranks], *args) if rank < ranks else None))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


@contextmanager
def started(folder):
    """run(function, ranks, *args): what function(rank, group, *args) returns on each of the first ranks."""
    context = torch.multiprocessing.get_context("forkserver")  # which imports once for all of them
    context.set_forkserver_preload(["torch", "fastood.distributed", "truth"])
    rendezvous = (folder / "store").as_uri()
    pipes, processes = [], []
    for rank in range(RANKS):
        pipe, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(rank, rendezvous, theirs), daemon=True))
        processes[-1].start()
        pipes.append(pipe)

    def run(function, ranks, *args):
        module = function.__module__.removeprefix("tests.")  # pytest's name for it, which is not on the path
        for pipe in pipes:
            pipe.send((module, function.__name__, ranks, args))
        answers = [pipe.recv() if pipe.poll(100) else (False, "no answer: it hangs") for pipe in pipes]
        for rank, (good, answer) in enumerate(answers):
            assert good, f"rank {rank}: {answer}"
        return [answer for _, answer in answers[:ranks]]

    try:
        yield run
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()

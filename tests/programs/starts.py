"""How fastood starts, each time in a process that is forked off once torch is loaded: `starts.py LEVEL ...`.

Prints JSON: the instruction set that is taken where the environment asks for each; what is said where it names none or
no backend, and where there is no C++ part; and how far scores are from float64 where torch has dropped one of its
private names that fastood looks up.
"""

import json
import os
import sys
import warnings
from operator import attrgetter

import torch

NATIVE = "fastood.kernels.cpu._native"
PRIVATE = [  # of torch, and what fastood does without each of them is kernels/seam.py's, or kernels/cpu's
    "_C._is_tracing",
    "_C._are_functorch_transforms_active",
    "_C._len_torch_dispatch_stack",
    "_is_functional_tensor",
    "autograd.forward_ad._current_level",
    "Tensor.__dlpack_c_exchange_api__",
]


def forked(action, *arguments):
    """What action(*arguments) returns in a child."""
    there, here = os.pipe()
    if (child := os.fork()) == 0:
        answer = {"failed": True}
        try:
            answer = action(*arguments)
        finally:
            os.write(here, json.dumps(answer).encode())
            os._exit(0)
    os.close(here)
    with os.fdopen(there) as pipe:
        answer = json.load(pipe)
    os.waitpid(child, 0)
    return answer


def isa(name):
    os.environ["FASTOOD_CPU_ISA"] = name
    from fastood.kernels.cpu import _native

    return _native.isa()


def no_such_isa():
    try:
        return isa("AVX2")
    except ValueError as error:
        return str(error)


def no_such_backend():
    os.environ["FASTOOD_BACKEND"] = "nonsense"
    import fastood

    try:
        return fastood.score(torch.ones(1, 2)).tolist()
    except ValueError as error:
        return str(error)


def not_built():
    sys.modules[NATIVE] = None
    import fastood

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastood.score(torch.ones(1, 2))
        fastood.score(torch.ones(1, 2))
        fastood.score(torch.ones(1, 2), backend="reference")
    return [str(x.message) for x in caught]


def lacking(name):
    """Off by how much: a score, one under vmap, and the slope of one."""
    place, _, last = name.rpartition(".")
    there = attrgetter(place)(torch) if place else torch
    dropped = getattr(there, last, None)  # of 2.8 the last is not there
    if dropped is not None:
        delattr(there, last)
    assert not hasattr(there, last)
    import fastood

    setattr(there, last, dropped)  # for torch itself, which needs it; fastood has looked
    f = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    truth, x = f.double().logsumexp(-1), f[0].clone().requires_grad_()
    fastood.score(x).sum().backward()
    off = fastood.score(f[0]) - truth[0], torch.vmap(fastood.score)(f) - truth, x.grad - f[0].double().softmax(-1)
    return [float(d.abs().max()) for d in off]


answers = {
    "isas": {name: forked(isa, name) for name in sys.argv[1:]},
    "no such isa": forked(no_such_isa),
    "no such backend": forked(no_such_backend),
    "not built": forked(not_built),
    "lacking": {name: forked(lacking, name) for name in PRIVATE},
}
print(json.dumps(answers))

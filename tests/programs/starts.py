"""How fastood starts, each time in a process that is forked off once torch is loaded: `starts.py LEVEL ...`.

Prints JSON: the instruction set that is taken where the environment asks for each; and what is said where it names no
backend, and where there is no C++ part.
"""

import json
import os
import sys
import warnings

import torch

NATIVE = "fastood.kernels.cpu._native"


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


def level(name):
    os.environ["FASTOOD_CPU_ISA"] = name
    from fastood.kernels.cpu import _native

    return _native.level()


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


answers = {
    "levels": {name: forked(level, name) for name in sys.argv[1:]},
    "no such backend": forked(no_such_backend),
    "not built": forked(not_built),
}
print(json.dumps(answers))

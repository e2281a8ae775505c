"""A forked child works on one thread: it has its parent's pool of threads, but not the threads."""

from __future__ import annotations

import os
import threading

import torch

_forked = False  # a plain global, so that a call in any other process asks no more than this
_told = threading.local()


def one_thread_if_forked() -> None:
    """What runs torch operations calls this before them: in a forked child they would wait for threads for ever.

    A thread of a child is told once, at its first call, and may choose another number after that; a child that
    never calls keeps torch as it was. The C++ kernels, which are called on a shorter way too, see to themselves.
    """
    if _forked and not torch.compiler.is_compiling() and not hasattr(_told, "once"):
        _told.once = True
        torch.set_num_threads(1)


def _in_child() -> None:
    global _forked, _told
    _forked, _told = True, threading.local()


os.register_at_fork(after_in_child=_in_child)

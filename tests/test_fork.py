"""A forked child has its parent's pool of threads without the threads: all that fastood does there takes one thread."""

import os

import program
import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_everything_runs_in_a_forked_child():
    program.run("forked_calls")

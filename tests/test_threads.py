"""A server's day in a minute: requests in threads, each with a number of threads of its own, before and after forks."""

import os

import program
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["threads", "forks"])
def test_half_a_minute_of_serving(mode):
    if mode == "forks" and not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    assert int(program.run("server", mode)) > 100  # calls

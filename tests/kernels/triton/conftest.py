"""The files beside this one test those of kernels/triton and its device/; scaling.py is tested by the contract.

Without a GPU they run in Triton's interpreter: tests/interpreter.py says how.
"""

import pytest

from fastood import kernels


@pytest.fixture
def new_programs():
    """Nothing that was worked out before, or in this test, outlives it."""
    from fastood import _plan
    from fastood.kernels.triton import launch

    caches = [kernels._prepared.cache_clear, _plan._PLANS.clear]
    caches += [launch.scores.cache_clear, launch.gradient.cache_clear, launch.gen.cache_clear]
    for clear in caches:
        clear()
    yield
    for clear in caches:
        clear()

import pytest
import torch
from hypothesis import settings

import fastood

settings.register_profile("default", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("default")


CPU_LEVELS = ["base", "avx2", "avx512"]


@pytest.fixture(scope="session", params=["reference", *(f"cpu on {level}" for level in CPU_LEVELS)])
def backend(request):
    """Every backend in turn, the C++ one on every instruction set: one parity suite for all of them."""
    name, _, level = request.param.partition(" on ")
    status = fastood.backends()[name]
    if not status.usable:
        pytest.skip(f"needs the {name} backend: {status.why}")
    if not level:
        yield name
        return
    from fastood.kernels.cpu import _native

    if level not in _native.levels():
        pytest.skip(f"needs a processor with {level}")
    best = _native.level()
    _native.use_level(level)
    yield name
    _native.use_level(best)


@pytest.fixture(scope="session", autouse=True)
def _nan_in_unwritten_memory():
    """torch.empty holds NaN, so that an output element nobody wrote shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before

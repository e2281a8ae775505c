import pytest
import torch
from hypothesis import settings

import fastood

settings.register_profile("default", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("default")


@pytest.fixture(scope="session", params=list(fastood.backends()))
def backend(request):
    """Every backend in turn: one parity suite for all of them."""
    status = fastood.backends()[request.param]
    if not status.usable:
        pytest.skip(f"needs the {request.param} backend: {status.why}")
    return request.param


@pytest.fixture(scope="session", autouse=True)
def _nan_in_unwritten_memory():
    """torch.empty holds NaN, so that an output element nobody wrote shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before

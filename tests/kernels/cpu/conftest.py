import pytest

from fastood.kernels.cpu import MISSING, _native


@pytest.fixture(autouse=True)
def _built():
    if _native is None:
        pytest.skip(f"needs the C++ part: {MISSING}")


@pytest.fixture(params=_native.levels() if _native else ["base"])
def level(request):
    """Each instruction set that this machine has."""
    before = _native.level()
    _native.use_level(request.param)
    yield request.param
    _native.use_level(before)

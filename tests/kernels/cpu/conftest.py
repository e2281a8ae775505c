import pytest

from fastood.kernels.cpu import MISSING, _native


@pytest.fixture(autouse=True)
def _built():
    if _native is None:
        pytest.skip(f"needs the C++ part: {MISSING}")


@pytest.fixture(params=_native.isas() if _native else ["base"])
def isa(request):
    """Each instruction set that this machine has."""
    before = _native.isa()
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)

"""A file in every format."""

import pytest
from formats import SAVERS


@pytest.fixture(params=list(SAVERS))
def save(request, tmp_path):
    def saved(**arrays):
        path = tmp_path / request.param
        SAVERS[request.param](path, **arrays)
        return path

    return saved

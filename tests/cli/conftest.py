"""Files that commands read, in a folder that they run in."""

import numpy as np
import pytest
from command_line import N, run, save
from formulas import lse, norm


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of files, and one of them as arrays."""
    monkeypatch.chdir(tmp_path)
    save("near.npz", 2, 1)
    save("far.npz", 1, 2, n=25)
    return save("val.npz", 5, 0)


@pytest.fixture
def holes(data):
    """The logits of holes.npz: two rows of NaN (3 and 4) and one of -inf (6), whose energy is no NaN."""
    f, _ = data
    f[3:5] = np.nan
    f[6] = -np.inf
    np.savez("holes.npz", logits=f, key=np.arange(N) * 10)
    return f


@pytest.fixture
def det(data):
    """det.safetensors, fitted on val.npz with tpr 0.9: its scores and its threshold, the fourth lowest of 40."""
    f, h = data
    run("fit", "val.npz", "--out", "det.safetensors", "--norm", "2", "--tpr", "0.9", "--temperature", "2")
    s = 2 * lse(f / 2) * norm(h, 2)
    return s, np.sort(s)[3]


@pytest.fixture
def undrawn(monkeypatch):
    """Reports come without their pictures, which take longer to draw than a command takes otherwise."""
    monkeypatch.setattr("fastood.report._inline", lambda figure: "data:,")

"""Files larger than memory: how much of them is held at a time."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from formats import fixed_list, fixed_shape
from safetensors.torch import save_file

PROGRAM = Path(__file__).parents[1] / "programs" / "memory.py"


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """What the program says of 78 MiB of logits in every format."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's account of a process's memory")
    folder = tmp_path_factory.mktemp("memory")
    x = torch.zeros(40_000, 512)
    np.save(folder / "x.npy", x.numpy())
    np.savez(folder / "x.stored.npz", logits=x.numpy())
    with zipfile.ZipFile(folder / "x.deflated.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(folder / "x.npy", "logits.npy")
    save_file({"logits": x}, folder / "x.safetensors")
    torch.save({"logits": x}, folder / "x.pt")
    pq.write_table(pa.table({"logits": fixed_shape(x.numpy())}), folder / "x.parquet")
    plain = {"row_group_size": 500, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"logits": fixed_list(x.numpy())}), folder / "in.parquet", **plain)
    done = subprocess.run([sys.executable, str(PROGRAM), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["npy", "stored.npz", "deflated.npz", "safetensors", "pt", "parquet"])
def test_a_file_is_read_by_chunks(answer, name):
    found = answer[f"x.{name}"]
    assert found["rows"] == 40_000
    assert found["more"] < 40_000


def test_a_parquet_file_is_scored_by_chunks(answer):
    assert 0 < answer["arrow"] < 10e6

"""Rows, and a file of them in every format and layout that fastood reads."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from fastood.files import FileError, open_rows

N, C, D = 23, 5, 7
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(N, C)).astype(np.float32) * 4
FEATS = RNG.normal(size=(N, D)).astype(np.float32)
NAMES = [f"bild {i} ä" for i in range(N)]


def fixed_shape(x):
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(x.dtype), x.shape[1:])
    return pa.ExtensionArray.from_storage(kind, fixed_list(x.reshape(len(x), -1) if len(x) else x))


def fixed_list(x):
    return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])


def varying_list(x):
    return pa.array(list(x), pa.list_(pa.from_numpy_dtype(x.dtype)))


def large_list(x):
    return pa.array(list(x), pa.large_list(pa.from_numpy_dtype(x.dtype)))


def save_parquet(path, layout=fixed_shape, **arrays):
    # Row groups of 4 do not divide the chunks that the tests read.
    pq.write_table(pa.table({k: layout(x) if x.ndim == 2 else x for k, x in arrays.items()}), path, row_group_size=4)


def save_pt(path, **arrays):
    torch.save({**{k: torch.from_numpy(x) for k, x in arrays.items()}, "epoch": 3}, path)


SAVERS = {
    "stored.npz": np.savez,
    "deflated.npz": np.savez_compressed,
    "x.safetensors": lambda path, **arrays: save_file({k: torch.from_numpy(x) for k, x in arrays.items()}, path),
    "x.pt": save_pt,
    "x.pth": save_pt,
    "tensor.parquet": save_parquet,
    "fixed.parquet": lambda path, **arrays: save_parquet(path, fixed_list, **arrays),
    "list.parquet": lambda path, **arrays: save_parquet(path, varying_list, **arrays),
    "large.parquet": lambda path, **arrays: save_parquet(path, large_list, **arrays),
}


def read(path, rows_per_chunk=None, **keys):
    """Logits and feats of the whole file, put together from chunks."""
    with open_rows(path, **keys) as rows:
        logits, feats = zip(*rows.chunks(rows_per_chunk), strict=True)
    return tuple(None if x[0] is None else torch.cat(x) for x in (logits, feats))


def complaint(path, **keys):
    with pytest.raises(FileError) as caught, open_rows(path, **keys) as rows:
        for _ in rows.chunks(4):
            pass
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)

"""Files in and out: every format, every complaint, and how much memory they take."""

import csv
import errno
import io
import json
import os
import pickle
import random
import re
import stat
import struct
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastood
from fastood import files
from fastood.files import FileError, atomic, open_rows, save_scores, writable

N, C, D = 23, 5, 7
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(N, C)).astype(np.float32) * 4
FEATS = RNG.normal(size=(N, D)).astype(np.float32)


# ---- inputs, one function per format and layout


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


@pytest.fixture(params=list(SAVERS))
def save(request, tmp_path):
    def saved(**arrays):
        path = tmp_path / request.param
        SAVERS[request.param](path, **arrays)
        return path

    return saved


def read(path, rows_per_chunk=None, **keys):
    """Logits and feats of the whole file, put together from chunks."""
    with open_rows(path, **keys) as rows:
        logits, feats = zip(*rows.chunks(rows_per_chunk), strict=True)
    return tuple(None if x[0] is None else torch.cat(x) for x in (logits, feats))


@pytest.mark.parametrize("rows_per_chunk", [None, 1, 5, N, 100])
def test_every_format_gives_back_what_was_saved(save, rows_per_chunk):
    path = save(logits=LOGITS, feats=FEATS)
    with open_rows(path) as rows:
        assert (rows.path, rows.rows, rows.classes, rows.dim) == (path, N, C, D)
    logits, feats = read(path, rows_per_chunk)
    assert logits.dtype == feats.dtype == torch.float32
    np.testing.assert_array_equal(logits, LOGITS)
    np.testing.assert_array_equal(feats, FEATS)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_every_format_keeps_the_dtype(save, dtype):
    logits, feats = read(save(logits=LOGITS.astype(dtype)), 4)
    assert feats is None
    np.testing.assert_array_equal(logits.numpy(), LOGITS.astype(dtype), strict=True)


def test_every_format_without_logits(save):
    path = save(feats=FEATS)
    with open_rows(path) as rows:
        assert (rows.rows, rows.classes, rows.dim) == (N, None, D)
    logits, feats = read(path, 4)
    assert logits is None
    np.testing.assert_array_equal(feats, FEATS)


def test_every_format_with_keys_of_ones_own(save):
    logits, feats = read(save(f=LOGITS, h=FEATS, logits=-FEATS), logits_key="f", feats_key="h")
    np.testing.assert_array_equal(logits, LOGITS)
    np.testing.assert_array_equal(feats, FEATS)


def test_every_format_of_no_rows_still_names_its_scores(save, tmp_path):
    path = save(logits=LOGITS[:0], feats=FEATS[:0])
    out = tmp_path / "out.npz"
    with open_rows(path) as rows, save_scores(out) as writer:
        assert rows.rows == 0
        for logits, feats in rows.chunks():
            writer.write(fastood.scores(logits, feats, ["msp", "gradnorm"]))
    with np.load(out) as saved:
        assert {k: saved[k].shape for k in saved} == {"msp": (0,), "gradnorm": (0,)}


def test_npy_is_logits_in_any_order_of_memory_and_bytes(tmp_path):
    for i, x in enumerate([LOGITS, np.asfortranarray(LOGITS), LOGITS.astype(">f4"), LOGITS[:0]]):
        np.save(tmp_path / f"{i}.npy", x)
        logits, feats = read(tmp_path / f"{i}.npy", 5)
        assert feats is None
        np.testing.assert_array_equal(logits, x)


def test_npz_in_big_endian_and_with_members_that_are_no_matrices(tmp_path):
    np.savez(tmp_path / "x.npz", logits=LOGITS.astype(">f8"), names=np.array([{}], object), labels=np.arange(3))
    np.testing.assert_array_equal(read(tmp_path / "x.npz", 5)[0], LOGITS.astype(np.float64))


def test_feats_of_no_columns(tmp_path):
    np.savez(tmp_path / "x.npz", logits=LOGITS, feats=FEATS[:, :0])
    assert read(tmp_path / "x.npz", 5)[1].shape == (N, 0)


def test_a_bare_tensor_is_logits_and_a_parameter_is_read(tmp_path):
    torch.save(torch.nn.Parameter(torch.from_numpy(LOGITS)), tmp_path / "x.pt")
    logits, _ = read(tmp_path / "x.pt", 5)
    assert not logits.requires_grad
    np.testing.assert_array_equal(logits, LOGITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_halves(tmp_path, dtype):
    x = torch.from_numpy(LOGITS).to(dtype)
    save_file({"logits": x}, tmp_path / "x.safetensors")
    torch.save({"logits": x}, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        torch.testing.assert_close(read(tmp_path / name, 5)[0], x, rtol=0, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_fp8_comes_as_float16(tmp_path, dtype):
    x = torch.from_numpy(LOGITS).to(dtype)
    save_file({"logits": x, "feats": x[:, :0]}, tmp_path / "x.safetensors")
    torch.save({"logits": x}, tmp_path / "x.pt")
    torch.save({"logits": x[:0]}, tmp_path / "none.pt")
    for name, n in (("x.safetensors", N), ("x.pt", N), ("none.pt", 0)):
        got = read(tmp_path / name, 5)[0]
        assert got.dtype == torch.float16
        assert torch.equal(got.float(), x[:n].float())


# ---- IDs, columns of a number each, ways into nested files, and what was found

NAMES = [f"bild {i} ä" for i in range(N)]


@pytest.mark.parametrize("ids", [np.arange(N) + 2**40, np.arange(N, dtype=np.uint8), np.array(NAMES)])
@pytest.mark.parametrize("rows_per_chunk", [None, 1, 5, 100])
def test_ids_come_with_their_rows(tmp_path, ids, rows_per_chunk):
    np.savez(tmp_path / "x.npz", logits=LOGITS, id=ids)
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    for i, kind in enumerate(kinds if ids.dtype.kind == "U" else [None]):
        table = pa.table({"id": pa.array(ids).cast(kind) if kind else ids, "logits": fixed_list(LOGITS)})
        pq.write_table(table, tmp_path / f"{i}.parquet", row_group_size=4)
    if ids.dtype.kind == "U":
        torch.save({"logits": torch.from_numpy(LOGITS), "id": NAMES}, tmp_path / "x.pt")
    else:
        SAVERS["x.pt"](tmp_path / "x.pt", logits=LOGITS, id=ids)
        SAVERS["x.safetensors"](tmp_path / "x.safetensors", logits=LOGITS, id=ids)
        torch.save({"logits": torch.from_numpy(LOGITS), "id": ids.tolist()}, tmp_path / "list.pt")
    for path in tmp_path.iterdir():
        with open_rows(path, id_key="id") as rows:
            assert (rows.logits_key, rows.feats_key, rows.id_key) == ("logits", None, "id")
            chunks = list(zip(rows.chunks(rows_per_chunk), rows.ids(rows_per_chunk), strict=True))
        assert all(len(logits) == len(x) for (logits, _), x in chunks)
        found = np.concatenate([x for _, x in chunks])
        assert found.dtype == (object if ids.dtype.kind == "U" else np.int64 if path.name == "list.pt" else ids.dtype)
        assert found.tolist() == ids.tolist()


def test_without_a_key_there_are_no_ids_in_as_many_chunks(tmp_path):
    for x in (LOGITS, LOGITS[:0]):
        np.savez(tmp_path / "x.npz", logits=x)
        for n in (None, 1, 5, N, 100):
            with open_rows(tmp_path / "x.npz") as rows:
                assert list(rows.ids(n)) == [None for _ in rows.chunks(n)]


def test_chunks_of_every_column_are_cut_alike(tmp_path):
    """Row groups and dictionaries of Parquet end where they like."""
    image = pa.array(NAMES).dictionary_encode()
    pq.write_table(pa.table({"logits": fixed_list(LOGITS), "image": image}), tmp_path / "x.parquet", row_group_size=4)
    with open_rows(tmp_path / "x.parquet", id_key="image") as rows:
        for n in (1, 3, 5, 22, N, 100):
            sizes = [len(logits) for logits, _ in rows.chunks(n)]
            assert sizes == [len(ids) for ids in rows.ids(n)] == [n] * (N // n) + [N % n] * (N % n > 0)


def test_big_endian_ids_and_those_of_no_rows(tmp_path):
    np.savez(tmp_path / "a.npz", logits=LOGITS, id=np.arange(N, dtype=">i4"))
    with open_rows(tmp_path / "a.npz", id_key="id") as rows:
        (ids,) = rows.ids()
    np.testing.assert_array_equal(ids, np.arange(N, dtype=np.int32), strict=True)
    for none in (np.empty(0, np.int16), np.empty(0, "U3")):
        np.savez(tmp_path / "b.npz", logits=LOGITS[:0], id=none)
        with open_rows(tmp_path / "b.npz", id_key="id") as rows:
            (ids,) = rows.ids()
        assert (ids.shape, ids.dtype) == ((0,), object if none.dtype.kind == "U" else np.int16)


def test_ids_that_are_none(tmp_path):
    arrays = {"f": LOGITS[:, 0], "b": LOGITS[:, 0] > 0, "m": np.zeros((N, 1), np.int8), "few": np.arange(3)}
    np.savez(tmp_path / "x.npz", logits=LOGITS, **arrays)
    for key, message in {
        "f": "'f' must hold integers or strings as IDs, got float32",
        "b": "'b' must hold integers or strings as IDs, got bool",
        "m": f"'m' must be 1-D, one ID per row, got shape [{N}, 1]",
        "few": f"'few' must have the {N} rows of 'logits', got shape [3]",
        "none": "must hold 'none', found 'logits', 'f', 'b', 'm', 'few'",
    }.items():
        assert message in complaint(tmp_path / "x.npz", id_key=key)
    pq.write_table(pa.table({"logits": fixed_list(LOGITS), "id": [None, *NAMES[1:]]}), tmp_path / "x.parquet")
    with open_rows(tmp_path / "x.parquet", id_key="id") as rows, pytest.raises(FileError, match="'id' must hold no"):
        list(rows.ids())


def wide(dtype=np.float32, logit="logit", feat="feat", order=RNG.permutation, **more):
    """A table with a column of numbers per class and feature, in any order: 12 classes, so that 10 follows 9."""
    x = RNG.normal(size=(N, 12)).astype(dtype)
    columns = {f"{logit}_{i}": x[:, i] for i in order(12)} | {f"{feat}_{i}": -x[:, i] for i in order(3)}
    return x, pa.table(columns | more)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("names", [("logit", "feat"), ("logits", "feats")])
@pytest.mark.parametrize("rows_per_chunk", [None, 5])
def test_wide_columns_in_numeric_order(tmp_path, dtype, names, rows_per_chunk):
    x, table = wide(dtype, *names, image=NAMES, label=np.arange(N), label_2=np.arange(N))
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=4)
    with open_rows(tmp_path / "x.parquet", id_key="image") as rows:
        assert (rows.rows, rows.classes, rows.dim) == (N, 12, 3)
        assert (rows.logits_key, rows.feats_key) == (f"{names[0]}_0..11", f"{names[1]}_0..2")
        assert (rows.id_key, rows.others) == ("image", ["label", "label_2"])
    for keys in ({}, {"logits_key": names[0], "feats_key": names[1]}):
        logits, feats = read(tmp_path / "x.parquet", rows_per_chunk, **keys)
        np.testing.assert_array_equal(logits.numpy(), x, strict=True)
        np.testing.assert_array_equal(feats.numpy(), -x[:, :3], strict=True)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_few_wide_columns(tmp_path, width):
    columns = {f"logit_{i}": LOGITS[:, i] for i in range(width)}
    pq.write_table(pa.table(columns | {"y_0": FEATS[:, 0], "y_1": FEATS[:, 0]}), tmp_path / "x.parquet")
    with open_rows(tmp_path / "x.parquet") as rows:
        assert (rows.classes, rows.logits_key, rows.others) == (width, f"logit_0..{width - 1}", ["y_0", "y_1"])
    np.testing.assert_array_equal(read(tmp_path / "x.parquet")[0], LOGITS[:, :width])


def test_wide_columns_of_ones_own_name_from_pandas_nulls(tmp_path):
    table = pa.table({"a.b_1": pa.array([1.0, None]), "a.b_0": [3.0, 4.0]})
    pq.write_table(table, tmp_path / "x.parquet")
    logits, _ = read(tmp_path / "x.parquet", logits_key="a.b")
    np.testing.assert_array_equal(logits, [[3, 1], [4, np.nan]])


def test_a_column_of_the_name_comes_before_wide_ones(tmp_path):
    pq.write_table(
        pa.table({"logits": fixed_list(LOGITS), "logits_0": [0.0] * N, "logit_0": [0.0] * N}), tmp_path / "x.parquet"
    )
    np.testing.assert_array_equal(read(tmp_path / "x.parquet")[0], LOGITS)


def test_wide_columns_with_gaps_and_of_several_types(tmp_path):
    path = tmp_path / "x.parquet"
    for numbers, message in {
        (0, 1, 3): "must have no gap, got 'logit_3' as number 2",
        (1, 2, 3): "must have no gap, got 'logit_1' as number 0",
        ("0", "1", "01"): "must have no gap, got 'logit_1' as number 2",
        (0, 999_999_999): "must have no gap, got 'logit_999999999' as number 1",
    }.items():
        pq.write_table(pa.table({f"logit_{i}": [1.0] for i in numbers}), path)
        assert message in complaint(path)
    pq.write_table(pa.table({"logit_0": [1.0], "logit_1": pa.array([1.0], pa.float32())}), path)
    assert "'logit_0..1' must be columns of one type, got double and float" in complaint(path)
    pq.write_table(pa.table({"logit_0": [1], "logit_1": [2]}), path)
    assert "'logit_0..1' must hold float32" in complaint(path)
    assert "got int64" in complaint(path)
    pq.write_table(wide(logit="output")[1], path)
    assert "must hold 'logits', found 'output_0..11', 'feat_0..2'" in complaint(path, logits_key="logits")
    assert "must hold 'logits', found 'output_0..11'" in complaint(path, logits_key="logits", feats_key="feat")


def test_ways_into_nested_pt_files(tmp_path):
    logits, feats = torch.from_numpy(LOGITS), torch.from_numpy(FEATS)
    torch.save({"val": {"out": logits, "deep": [{"h": feats}]}, "epoch": 3}, tmp_path / "dict.pt")
    torch.save((logits, feats), tmp_path / "tuple.pt")
    torch.save([{"logits": logits}, {"feats": feats}], tmp_path / "list.pt")
    assert "must hold 'logits' or 'feats', found 'val.out', 'val.deep.0.h'" in complaint(tmp_path / "dict.pt")
    assert "found '0', '1'" in complaint(tmp_path / "tuple.pt")
    for name, keys in {"dict": ("val.out", "val.deep.0.h"), "tuple": "01", "list": ("0.logits", "1.feats")}.items():
        found = read(tmp_path / f"{name}.pt", 5, logits_key=keys[0], feats_key=keys[1])
        np.testing.assert_array_equal(found[0], LOGITS)
        np.testing.assert_array_equal(found[1], FEATS)
    torch.save({"epoch": 3, "nothing": []}, tmp_path / "none.pt")
    assert "found no arrays" in complaint(tmp_path / "none.pt")
    torch.save(3, tmp_path / "three.pt")
    assert "found no arrays" in complaint(tmp_path / "three.pt")


def test_a_list_that_holds_itself(tmp_path):
    held = {"logits": torch.from_numpy(LOGITS)}
    held["held"] = [held]
    torch.save(held, tmp_path / "x.pt")
    np.testing.assert_array_equal(read(tmp_path / "x.pt")[0], LOGITS)


def test_what_was_used_and_what_else_there_is(save):
    with open_rows(save(out=LOGITS, feats=FEATS, a=FEATS + 1, b=FEATS + 2), "out") as rows:
        assert (rows.logits_key, rows.feats_key, rows.id_key) == ("out", "feats", None)
        assert sorted(set(rows.others) - {"epoch"}) == ["a", "b"]
    names = {
        name: FEATS + i for i, name in enumerate(["layer_0", "layer_1", "layer_2", *map("other{}".format, range(30))])
    }
    text = complaint(save(**names))
    assert "'layer_0..2'" in text
    assert text.endswith(" and 11 more")


def test_chunks_start_over_and_stay_in_the_byte_budget(save, monkeypatch):
    path = save(logits=LOGITS, feats=FEATS)
    monkeypatch.setattr(files, "CHUNK_BYTES", 5 * 4 * (C + D) + 1)
    with open_rows(path) as rows:
        for _ in range(2):
            sizes = [len(logits) for logits, _ in rows.chunks()]
            assert max(sizes) == 5
            assert sum(sizes) == N
        with pytest.raises(ValueError, match="rows_per_chunk must be at least 1, got 0"):
            next(rows.chunks(0))


# ---- what a user can get wrong


def complaint(path, **keys):
    with pytest.raises(FileError) as caught, open_rows(path, **keys) as rows:
        for _ in rows.chunks(4):
            pass
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_no_such_file_folder_and_extension(tmp_path):
    assert "no such file" in complaint(tmp_path / "x.npz")
    (tmp_path / "folder.npz").mkdir()
    assert "is a folder" in complaint(tmp_path / "folder.npz")
    assert "no such file" in complaint(tmp_path / "x")
    (tmp_path / "x.mat").touch()
    text = complaint(tmp_path / "x.mat")
    assert "'.mat'" in text
    for known in (".npz", ".npy", ".safetensors", ".pt", ".pth", ".parquet"):
        assert known in text


def test_missing_keys_are_named_with_those_there_are(save):
    path = save(output=LOGITS, feats=FEATS)
    text = complaint(path, logits_key="logits")
    assert "must hold 'logits', found 'output', 'feats'" in text or "found 'feats', 'output'" in text
    assert "must hold 'h'" in complaint(path, feats_key="h")
    path = save(output=LOGITS)
    assert "must hold 'logits' or 'feats', found 'output'" in complaint(path)


@pytest.mark.parametrize("bad", [np.int64, np.complex64])
def test_numbers_that_are_no_floats(tmp_path, bad):
    np.savez(tmp_path / "x.npz", logits=LOGITS.astype(bad))
    torch.save({"logits": torch.from_numpy(LOGITS.astype(bad))}, tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", LOGITS.astype(bad))
    for name in ("x.npz", "x.pt", "x.npy"):
        text = complaint(tmp_path / name)
        assert f"'logits' must hold {', '.join(files._DTYPES)} numbers" in text
        assert f"got {np.dtype(bad).name}" in text


def test_integers_and_text_in_parquet_and_eight_bits_in_safetensors(tmp_path):
    pq.write_table(pa.table({"logits": fixed_list(np.arange(6).reshape(2, 3))}), tmp_path / "a.parquet")
    assert "got int64" in complaint(tmp_path / "a.parquet")
    pq.write_table(pa.table({"logits": [["a"], ["b"]]}), tmp_path / "b.parquet")
    assert "got string" in complaint(tmp_path / "b.parquet")
    save_file({"logits": torch.zeros(2, 3, dtype=torch.int8)}, tmp_path / "c.safetensors")
    assert "got int8" in complaint(tmp_path / "c.safetensors")


@pytest.mark.parametrize("shape", [(N,), (N, C, 1)])
def test_wrong_number_of_dimensions(tmp_path, shape):
    for name in ("stored.npz", "x.safetensors", "x.pt"):
        SAVERS[name](tmp_path / name, logits=LOGITS[:, 0].copy() if len(shape) == 1 else LOGITS[..., None])
        assert f"'logits' must be 2-D, one row per sample, got shape {list(shape)}" in complaint(tmp_path / name)


def test_a_column_of_numbers_and_a_tensor_of_two_dimensions_in_parquet(tmp_path):
    pq.write_table(pa.table({"logits": [1.0, 2.0]}), tmp_path / "a.parquet")
    assert "'logits' must be 2-D, one row per sample, got shape [2]" in complaint(tmp_path / "a.parquet")
    pq.write_table(pa.table({"logits": fixed_shape(np.zeros((3, 2, 2)))}), tmp_path / "b.parquet")
    assert "got shape [3, 2, 2]" in complaint(tmp_path / "b.parquet")


def test_zero_dimensions(tmp_path):
    save_file({"logits": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    np.save(tmp_path / "x.npy", np.float32(1))
    for name in ("x.safetensors", "x.npy"):
        assert "got shape []" in complaint(tmp_path / name)


@pytest.mark.parametrize("name", [name for name in SAVERS if not name.endswith(".parquet")])
def test_rows_that_differ(tmp_path, name):
    SAVERS[name](tmp_path / name, logits=LOGITS, feats=FEATS[:3])
    assert f"'feats' must have the {N} rows of 'logits', got shape [3, {D}]" in complaint(tmp_path / name)


def test_no_classes(tmp_path):
    for name in ("stored.npz", "x.safetensors", "x.pt", "list.parquet"):
        SAVERS[name](tmp_path / name, logits=LOGITS[:, :0])
        text = complaint(tmp_path / name)
        assert f"'logits' must have at least one class, got shape [{N}, 0]" in text


class Boobytrap:
    def __reduce__(self):
        return os.mkdir, ("boom",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.array([[Boobytrap()]], object)
    np.save("x.npy", objects, allow_pickle=True)
    np.savez("x.npz", logits=objects, allow_pickle=True)
    torch.save({"logits": Boobytrap()}, "x.pt")
    with open("plain.npy", "wb") as file:
        pickle.dump(Boobytrap(), file)
    assert "Python objects" in complaint("x.npy")
    assert "'logits' must hold float" in complaint("x.npz")
    assert "pickled objects are never loaded" in complaint("x.pt")
    assert "cannot be read as .npy" in complaint("plain.npy")
    assert not os.path.exists("boom")


def test_truncated_and_foreign_files(save):
    path = save(logits=LOGITS, feats=FEATS)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not at all" * 20):
        path.write_bytes(content)
        assert f"cannot be read as {path.suffix}" in complaint(path)


def broken(whole, rng):
    """Cut off, or with a few bytes changed, taken out or put in."""
    at, few = rng.randrange(len(whole)), rng.randint(1, 8)
    other = bytes(rng.choice([0, 255, rng.randrange(256)]) for _ in range(few))
    return rng.choice(
        [
            whole[:at],
            whole[:at] + other + whole[at + few :],
            whole[:at] + whole[at + few :],
            whole[:at] + other + whole[at:],
        ]
    )


def test_what_is_broken_is_refused_in_words_or_read(save):
    path = save(logits=LOGITS, feats=FEATS, id=np.arange(N))
    whole, rng, refused = path.read_bytes(), random.Random(0), []
    for _ in range(40):
        path.write_bytes(broken(whole, rng))
        try:
            with open_rows(path, id_key="id") as rows:
                found = [len(ids) for _, ids in zip(rows.chunks(5), rows.ids(5), strict=True)]
            assert sum(found) == rows.rows
        except FileError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(str(path) in text and "\n" not in text for text in refused)


def test_a_pt_that_torch_did_not_write(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"not at all" * 20)
    assert complaint(path) == f"{path}: cannot be read as .pt: no file of torch.save (1.6 or later), or cut off"
    np.savez(tmp_path / "x.npz", logits=LOGITS)
    (tmp_path / "x.npz").rename(path)
    assert "use_new_zipfile" not in complaint(path)


def test_truncated_npy(tmp_path):
    np.save(tmp_path / "x.npy", LOGITS)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-8])
    assert f"'logits' ends before its shape [{N}, {C}] does" in complaint(tmp_path / "x.npy")


def corrupt_npz(path, saver):
    """A .npz whose header is good and whose last rows are not."""
    saver(path, logits=RNG.normal(size=(20000, 4)))
    with zipfile.ZipFile(path) as archive:
        (info,) = archive.infolist()
    content = bytearray(path.read_bytes())
    at = info.header_offset + info.compress_size - 100
    content[at : at + 8] = bytes(255 - b for b in content[at : at + 8])
    path.write_bytes(content)


@pytest.mark.parametrize("saver", [np.savez, np.savez_compressed])
def test_a_flipped_bit_late_in_an_npz_is_found(tmp_path, saver):
    corrupt_npz(tmp_path / "x.npz", saver)
    with open_rows(tmp_path / "x.npz") as rows:
        chunks = rows.chunks(1000)
        for _ in range(2):
            next(chunks)
        with pytest.raises(FileError, match=r"x\.npz: cannot be read as \.npz"):
            list(chunks)


def test_an_npz_member_shorter_than_its_header_says(tmp_path):
    np.save(tmp_path / "x.npy", LOGITS)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("logits.npy", (tmp_path / "x.npy").read_bytes()[:-8])
    assert f"'logits' ends before its shape [{N}, {C}] does" in complaint(tmp_path / "x.npz")


def test_fortran_order_in_an_npz(tmp_path):
    np.savez(tmp_path / "x.npz", logits=np.asfortranarray(LOGITS))
    assert "ascontiguousarray" in complaint(tmp_path / "x.npz")


@pytest.mark.parametrize("nulls", [[[1.0, None], [2.0, 3.0]], [[1.0, 1.0], None]])
@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 2), pa.list_(pa.float32())])
def test_nulls_in_parquet(tmp_path, nulls, kind):
    pq.write_table(pa.table({"logits": pa.array(nulls, kind)}), tmp_path / "x.parquet")
    assert "'logits' must hold no nulls" in complaint(tmp_path / "x.parquet")


def test_lists_of_different_lengths_in_parquet(tmp_path):
    # The lengths average to the first one's: only looking at every row finds it.
    pq.write_table(pa.table({"logits": [[1.0, 2.0], [1.0], [1.0, 2.0, 3.0], [0.0, 0.0]]}), tmp_path / "x.parquet")
    assert "'logits' must have rows of one length, got 2 and 1" in complaint(tmp_path / "x.parquet")


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64())])
def test_a_first_row_that_is_null_or_empty(tmp_path, kind):
    for rows, message in [
        ([None, [1.0, 2.0]], "'logits' must hold no nulls"),
        ([[], None], "'logits' must hold no nulls"),
        ([[], [], [1.0, 2.0]], "'logits' must have rows of one length, got 2 and 0"),
        ([[], []], "'logits' must have at least one class, got shape [2, 0]"),
    ]:
        pq.write_table(pa.table({"logits": pa.array(rows, kind)}), tmp_path / "x.parquet")
        assert message in complaint(tmp_path / "x.parquet")


def npy(shape, content=b"", descr="<f4", fortran=False):
    """A .npy file whose header says what it likes."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return stream.getvalue() + content


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10, -4), "must have no negative length, got shape [10, -4]"),
        ((-10, -4), "must have no negative length, got shape [-10, -4]"),
        ((-1, 0), "must have no negative length, got shape [-1, 0]"),
        ((10, 2**40), "ends before its shape [10, 1099511627776] does"),
        ((2**62, 4), "ends before its shape [4611686018427387904, 4] does"),
        ((2**80, 2**80), "ends before its shape"),
    ],
)
def test_shapes_that_cannot_be_are_refused_before_anything_is_read(tmp_path, shape, message, fortran):
    content = npy(shape, bytes(4 * 40), fortran=fortran)
    (tmp_path / "x.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("logits.npy", content)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(FileError) as caught:
            open_rows(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert f"'logits' {message}" in str(caught.value)


def write_safetensors(path, **headers):
    """A .safetensors file of these headers, with as many zeros behind as they speak of."""
    header = json.dumps(headers).encode()
    size = max(x["data_offsets"][1] for x in headers.values())
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


@pytest.mark.parametrize("shape", [[10, -4], [2**40, 2**40], [10, 2**34], [10]])
def test_shapes_that_cannot_be_in_safetensors(tmp_path, shape):
    write_safetensors(tmp_path / "x.safetensors", logits={"dtype": "F32", "shape": shape, "data_offsets": [0, 160]})
    assert "cannot be read as .safetensors" in complaint(tmp_path / "x.safetensors")


def test_a_tensor_of_any_kind_beside_the_logits_in_safetensors(tmp_path):
    packed = {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]}
    logits = {"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 24]}
    write_safetensors(tmp_path / "x.safetensors", packed=packed, logits=logits)
    assert read(tmp_path / "x.safetensors")[0].shape == (2, 2)
    with open_rows(tmp_path / "x.safetensors") as rows:
        assert rows.others == ["packed"]
    assert "'packed' must hold float32" in complaint(tmp_path / "x.safetensors", logits_key="packed")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_tensors_in_a_pt_file_that_hold_less_than_their_shape(tmp_path):
    one = torch.zeros(1, 1)
    cases = {
        "must hold every number of its shape [10, 1099511627776], got an expanded tensor": one.expand(10, 2**40),
        "must be a dense tensor, got one that is sparse_coo": torch.eye(3).to_sparse(),
        "must be a dense tensor, got one that is on no device": torch.empty(10, 2**40, device="meta"),
        "must be a dense tensor, got one that is nested": torch.nested.nested_tensor([one[0], one[0]]),
    }
    for message, x in cases.items():
        torch.save({"logits": x, "feats": torch.ones(3, 2)}, tmp_path / "x.pt")
        assert f"'logits' {message}" in complaint(tmp_path / "x.pt")


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    SAVERS["x.safetensors"](tmp_path / "x.safetensors", logits=LOGITS)
    SAVERS["tensor.parquet"](tmp_path / "x.parquet", logits=LOGITS)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name in ("x.safetensors", "x.parquet"):
        with pytest.raises(FileError, match=r'pip install "fastood\[cli\]"'):
            open_rows(tmp_path / name)


# ---- outputs

SCORES = {
    "msp": RNG.random(N).astype(np.float32),
    "energy": np.append(RNG.normal(size=N - 3), [np.nan, np.inf, -1e300]),
}


def load(path):
    if path.suffix == ".npz":
        with np.load(path) as saved:
            return dict(saved)
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    if path.suffix == ".pt":
        return {k: x.numpy() for k, x in torch.load(path, weights_only=True).items()}
    if path.suffix == ".parquet":
        return {
            k: x.to_numpy() for k, x in zip(*(lambda t: (t.column_names, t.columns))(pq.read_table(path)), strict=True)
        }
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    columns = np.array(rows).reshape(-1, len(header)).T
    return {k: column.astype(SCORES[k].dtype) for k, column in zip(header, columns, strict=True)}


FORMATS = [".npz", ".safetensors", ".pt", ".parquet", ".csv"]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("step", [1, 10, 100])
def test_every_output_format_gives_back_the_scores(tmp_path, suffix, step):
    out = tmp_path / f"out{suffix}"
    with save_scores(out) as writer:
        for i in range(0, N, step):
            writer.write(
                {"msp": torch.from_numpy(SCORES["msp"][i : i + step]), "energy": SCORES["energy"][i : i + step]}
            )
    saved = load(out)
    # safetensors has an order of its own.
    assert sorted(saved) == sorted(SCORES) if suffix == ".safetensors" else list(saved) == list(SCORES)
    for name, x in SCORES.items():
        np.testing.assert_array_equal(saved[name], x, strict=True)
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("ids", [np.arange(N) - 2**40, np.array(NAMES), np.array(NAMES, object)])
def test_ids_are_the_first_column(tmp_path, suffix, ids):
    out, strings = tmp_path / f"out{suffix}", ids.dtype.kind != "i"
    if strings and suffix in (".pt", ".safetensors"):
        with (
            pytest.raises(FileError, match=r"hold no strings, as 'file' has; .csv, .parquet and .npz files do"),
            save_scores(out, id_key="file") as writer,
        ):
            writer.write(SCORES, ids)
        assert not out.exists()
        return
    with save_scores(out, id_key="file") as writer:
        for i in range(0, N, 10):
            writer.write({k: x[i : i + 10] for k, x in SCORES.items()}, ids[i : i + 10])
    if suffix == ".csv":
        with out.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["file", *SCORES]
        assert [row["file"] for row in rows] == list(map(str, ids))
        return
    saved = load(out)
    assert suffix == ".safetensors" or next(iter(saved)) == "file"
    assert saved["file"].dtype == (
        ids.dtype if not strings else object if suffix == ".parquet" else ids.astype(str).dtype
    )
    assert saved["file"].tolist() == ids.tolist()
    np.testing.assert_array_equal(saved["msp"], SCORES["msp"])


def test_no_rows_with_ids(tmp_path):
    for suffix in (".csv", ".parquet", ".npz"):
        with save_scores(tmp_path / f"x{suffix}", id_key="id") as writer:
            writer.write({"msp": np.empty(0)}, np.empty(0, object))
    assert (tmp_path / "x.csv").read_text() == "id,msp\n"
    assert pq.read_schema(tmp_path / "x.parquet").field("id").type == pa.string()
    with np.load(tmp_path / "x.npz") as saved:
        assert saved["id"].dtype.kind == "U"


def test_ids_that_do_not_fit_the_scores(tmp_path):
    out, ids = tmp_path / "x.npz", np.arange(N)
    for id_key, given, error, message in [
        (None, ids, ValueError, "ids must be given if save_scores was given id_key, got id_key=None"),
        ("id", None, ValueError, "ids must be given if save_scores was given id_key, got id_key='id'"),
        ("id", ids[:3], ValueError, "of one length, got {'id': 3, 'msp': 23, 'energy': 23}"),
        ("msp", ids, FileError, "the IDs must not be called as a score is, 'msp'"),
    ]:
        with pytest.raises(error, match=re.escape(message)), save_scores(out, id_key=id_key) as writer:
            writer.write(SCORES, given)
    with (
        pytest.raises(FileError, match="holds one score, got id, msp"),
        save_scores(tmp_path / "x.npy", id_key="id") as w,
    ):
        w.write({"msp": SCORES["msp"]}, ids)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [*FORMATS, ".npy"])
def test_metadata_where_there_is_a_place_for_it(tmp_path, suffix):
    out, metadata = tmp_path / f"x{suffix}", {"method": "energy", "norm": "0.3", "ä": "ö"}
    for given in (metadata, {}, None):
        with save_scores(out, metadata=given) as writer:
            writer.write({"msp": SCORES["msp"]})
            writer.write({"msp": SCORES["msp"]})
        if suffix == ".parquet":
            found = {k.decode(): x.decode() for k, x in (pq.read_schema(out).metadata or {}).items()}
            assert found == (given or {})
        if suffix == ".safetensors":
            with safe_open(out, "numpy") as file:
                assert (file.metadata() or {}) == (given or {})
        if suffix not in (".csv", ".npy"):
            assert len(load(out)["msp"]) == 2 * N


def test_csv_lines_end_as_everywhere_on_linux(tmp_path):
    with save_scores(tmp_path / "x.csv", id_key="id") as writer:
        writer.write({"msp": np.array([0.5, 0.25])}, np.array(["a,b", "c"], object))
    assert (tmp_path / "x.csv").read_bytes() == b'id,msp\n"a,b",0.5\nc,0.25\n'


def test_npy_holds_one_score(tmp_path):
    out = tmp_path / "out.npy"
    with save_scores(out) as writer:
        writer.write({"msp": SCORES["msp"][:10]})
        writer.write({"msp": SCORES["msp"][10:]})
    np.testing.assert_array_equal(np.load(out), SCORES["msp"], strict=True)
    with (
        pytest.raises(FileError, match=r"holds one score, got msp, energy; a \.npz file holds many"),
        save_scores(out) as writer,
    ):
        writer.write(SCORES)
    np.testing.assert_array_equal(np.load(out), SCORES["msp"])


def write_and(out, error):
    with save_scores(out) as writer:
        writer.write({"msp": SCORES["msp"]})
        raise error


@pytest.mark.parametrize("suffix", [*FORMATS, ".npy"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_output_leaves_nothing_and_changes_nothing(tmp_path, suffix, error):
    for before in (None, b"what was there"):
        out = tmp_path / f"out{suffix}"
        if before:
            out.write_bytes(before)
        with pytest.raises(error):
            write_and(out, error)
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_names_must_not_change_and_there_must_be_some(tmp_path):
    with save_scores(tmp_path / "a.npz") as writer:
        writer.write(SCORES)
        with pytest.raises(ValueError, match=r"must be \['msp', 'energy'\] in every chunk, got \['msp'\]"):
            writer.write({"msp": SCORES["msp"]})
    (tmp_path / "a.npz").unlink()
    for suffix in (*FORMATS, ".npy"):
        with pytest.raises(ValueError, match="no scores were written"), save_scores(tmp_path / f"a{suffix}"):
            pass
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be(tmp_path, monkeypatch):
    there = tmp_path / "in.npz"
    there.touch()
    (tmp_path / "link.npz").symlink_to(there)
    for path, message in [
        (tmp_path / "none" / "x.npz", "there is no folder"),
        (tmp_path, "is a folder"),
        (there, "is an input"),
        (tmp_path / "link.npz", "is an input"),
    ]:
        with pytest.raises(FileError, match=message):
            writable(path, there)
    with (
        pytest.raises(FileError, match=r"unknown extension '.txt'; known are .npz, .npy"),
        save_scores(tmp_path / "x.txt"),
    ):
        pass
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(FileError, match="cannot be written to"):
        writable(tmp_path / "x.npz")


def test_atomic_gives_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    for suffix in FORMATS:
        with save_scores(tmp_path / f"x{suffix}") as writer:
            writer.write(SCORES)
        assert (tmp_path / f"x{suffix}").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with atomic(tmp_path / "x.TXT") as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".TXT")
        assert not (tmp_path / "x.TXT").exists()
        temporary.write_text("done")
    assert (tmp_path / "x.TXT").read_text() == "done"


def test_atomic_keeps_links_and_rights(tmp_path):
    (tmp_path / "folder").mkdir()
    there, link, dangling = tmp_path / "folder" / "there.csv", tmp_path / "link.csv", tmp_path / "dangling.csv"
    there.touch()
    link.symlink_to("folder/there.csv")
    dangling.symlink_to("folder/new.csv")
    for mode in (0o600, 0o664, 0o755):
        there.chmod(mode)
        with atomic(link) as temporary:
            assert temporary.stat().st_mode & 0o077 == 0
            temporary.write_text(f"{mode}")
        assert link.is_symlink()
        assert there.read_text() == f"{mode}"
        assert stat.S_IMODE(there.stat().st_mode) == mode
    with atomic(dangling) as temporary:
        temporary.write_text("new")
    assert dangling.is_symlink()
    assert (tmp_path / "folder" / "new.csv").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 3
    assert len(list((tmp_path / "folder").iterdir())) == 2


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="needs root, who may give files away")
def test_atomic_keeps_the_owner(tmp_path):
    path = tmp_path / "x.csv"
    path.touch()
    os.chown(path, 12345, 23456)
    with atomic(path) as temporary:
        temporary.write_text("mine?")
    assert (path.stat().st_uid, path.stat().st_gid, path.read_text()) == (12345, 23456, "mine?")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_and_a_device_stay_what_they_are(tmp_path):
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        content = pool.submit(pipe.read_text)
        with save_scores(pipe) as writer:
            for _ in range(2):
                writer.write({"msp": np.array([0.5])})
        assert content.result(10) == "msp\n0.5\n0.5\n"
    assert pipe.is_fifo()
    null = os.stat(os.devnull)
    with atomic(os.devnull) as temporary:
        temporary.write_text("to nowhere")
    assert os.stat(os.devnull) == null
    assert os.listdir(tmp_path) == ["pipe.csv"]
    assert writable(os.devnull, suffixes=[".json"]) == Path(os.devnull)
    read_end, write_end = os.pipe()
    with open(read_end) as source:
        with open(write_end, "w"), atomic(f"/dev/fd/{write_end}") as temporary:
            temporary.write_text("through a shell's >( )")
        assert source.read() == "through a shell's >( )"


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="needs /dev/fd")
def test_an_open_stream_is_written_to_from_where_it_stands(tmp_path):
    with open(tmp_path / "log.txt", "w") as file:
        file.write("before\n")
        file.flush()
        with save_scores(f"/dev/fd/{file.fileno()}") as writer:  # no extension, and no rule for that of log.txt
            writer.write({"msp": np.array([0.5])})
        file.write("after\n")
    assert (tmp_path / "log.txt").read_text() == "before\nmsp\n0.5\nafter\n"
    with open(tmp_path / "log.txt") as file:
        for n in (file.fileno(), 99_999):
            with pytest.raises(FileError, match=f"^/dev/fd/{n}: cannot be written to: Bad file descriptor"):
                writable(f"/dev/fd/{n}")


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "link.csv").symlink_to(tmp_path / "gone" / "x.csv")
    for path in (tmp_path / "gone" / "x.csv", tmp_path / "link.csv"):
        with pytest.raises(FileError) as caught, atomic(path):
            pass
        assert str(caught.value) == f"{path}: there is no folder {tmp_path / 'gone'}"

    def full(self, mode, exist_ok):
        raise OSError(errno.ENOSPC, "No space left on device", self)

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(FileError) as caught, atomic(tmp_path / "x.csv"):
        pass
    assert str(caught.value) == f"{tmp_path / 'x.csv'}: no file can be made in {tmp_path}: No space left on device"


def test_a_files_name_must_say_what_is_in_it(tmp_path):
    for name in ("e.pdf", "e", "e.htm.gz", ".html"):
        with pytest.raises(FileError, match=f"{name}: the file's name must end with .html or .htm"):
            writable(tmp_path / name, suffixes=(".html", ".htm"))
    for name in ("e.html", "E.HTM"):
        assert writable(tmp_path / name, suffixes=(".html", ".htm")).name == name


# ---- memory

STREAM = """
import sys
from fastood.files import open_rows

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

for path in sys.argv[1:]:
    with open_rows(path) as rows:
        chunks = rows.chunks(2000)
        next(chunks)  # what the library itself needs
        before, most, count = anonymous(), 0, 2000
        for logits, _ in chunks:
            count += len(logits)
            most = max(most, anonymous() - before)
        assert count == 40000, (path, count)
        assert most < 40_000, f"{path}: {most} kB more"
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of a process's memory")
def test_a_file_is_never_in_memory_as_a_whole(tmp_path):
    """78 MiB of logits in each format; the pages of a mapped file are not the process's own."""
    x = torch.zeros(40000, 512)
    np.save(tmp_path / "x.npy", x.numpy())
    np.savez(tmp_path / "stored.npz", logits=x.numpy())
    with zipfile.ZipFile(tmp_path / "deflated.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(tmp_path / "x.npy", "logits.npy")
    save_file({"logits": x}, tmp_path / "x.safetensors")
    torch.save({"logits": x}, tmp_path / "x.pt")
    pq.write_table(pa.table({"logits": fixed_shape(x.numpy())}), tmp_path / "x.parquet")
    command = [sys.executable, "-c", STREAM, *map(str, sorted(tmp_path.iterdir()))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

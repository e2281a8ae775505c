"""What is called what in a file: IDs, a column per class, ways into nested files, and what else there is."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from formats import FEATS, LOGITS, NAMES, SAVERS, N, complaint, fixed_list, read

from fastood.files import FileError, open_rows


@pytest.mark.parametrize("ids", [np.arange(N) + 2**40, np.arange(N, dtype=np.uint8), np.array(NAMES)])
@pytest.mark.parametrize("rows_per_chunk", [None, 1, 5, 100])
def test_ids_come_with_their_rows(tmp_path, ids, rows_per_chunk):
    np.savez(tmp_path / "x.npz", logits=LOGITS, id=ids)
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
    if int(pa.__version__.split(".")[0]) >= 21:  # older ones make none of strings
        kinds.append(pa.string_view())
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


RNG = np.random.default_rng(0)


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

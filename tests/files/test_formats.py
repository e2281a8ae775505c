"""What comes out of a file is what went in, in every format, whatever the chunks."""

import sys

import numpy as np
import pytest
import torch
from formats import FEATS, LOGITS, SAVERS, C, D, N, read
from safetensors.torch import save_file

import fastood
from fastood import files
from fastood.files import FileError, open_rows, save_scores


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


@pytest.mark.parametrize("name", ["logits", "feats"])
def test_what_is_named_as_the_one_is_not_taken_as_the_other_too(tmp_path, name):
    path = tmp_path / "x.npz"
    np.savez(path, **{name: FEATS})
    other = {"logits": "feats", "feats": "logits"}[name]
    with open_rows(path, **{f"{other}_key": name}) as rows:
        assert (rows.logits_key, rows.feats_key) == (None, name)[:: 1 if other == "feats" else -1]
    with open_rows(path, logits_key=name, feats_key=name) as rows:  # of which one must be sure
        assert rows.classes == rows.dim == FEATS.shape[1]


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
    if "fnuz" in str(dtype):
        pytest.importorskip("safetensors", "0.8", reason="needs a safetensors that writes them")
    x = torch.from_numpy(LOGITS).to(dtype)
    save_file({"logits": x, "feats": x[:, :0]}, tmp_path / "x.safetensors")
    torch.save({"logits": x}, tmp_path / "x.pt")
    torch.save({"logits": x[:0]}, tmp_path / "none.pt")
    for name, n in (("x.safetensors", N), ("x.pt", N), ("none.pt", 0)):
        got = read(tmp_path / name, 5)[0]
        assert got.dtype == torch.float16
        assert torch.equal(got.float(), x[:n].float())


def test_chunks_of_more_rows_than_int64_counts(save):
    path = save(logits=LOGITS, feats=FEATS)
    with open_rows(path) as rows:
        assert [len(logits) for logits, _ in rows.chunks(10**20)] == [len(LOGITS)]


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


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    SAVERS["x.safetensors"](tmp_path / "x.safetensors", logits=LOGITS)
    SAVERS["tensor.parquet"](tmp_path / "x.parquet", logits=LOGITS)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name in ("x.safetensors", "x.parquet"):
        with pytest.raises(FileError, match=r'pip install "fastood\[cli\]"'):
            open_rows(tmp_path / name)

"""Files in and out: every format, every complaint, and how much memory they take."""

import csv
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
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
    pq.write_table(pa.table({k: layout(x) for k, x in arrays.items()}), path, row_group_size=4)


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
    # safetensors sorts by name.
    assert sorted(saved) == sorted(SCORES) if suffix == ".safetensors" else list(saved) == list(SCORES)
    for name, x in SCORES.items():
        np.testing.assert_array_equal(saved[name], x, strict=True)
    assert os.listdir(tmp_path) == [out.name]


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

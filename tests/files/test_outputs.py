"""Files of scores: every format, whole or not at all, with the rights of any file."""

import csv
import errno
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from formats import NAMES, N
from safetensors import safe_open

from fastood.files import FileError, atomic, save_scores, writable

RNG = np.random.default_rng(0)
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


def test_a_signal_as_the_file_is_made_leaves_nothing(tmp_path, monkeypatch):
    touch = Path.touch

    def interrupted(*arguments, **options):
        touch(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "x.csv"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [*FORMATS, ".npy"])
@pytest.mark.parametrize(("odd", "got"), [(np.ones((2, 2)), "shape [2, 2]"), ([1.0, 2.0], "list")])
def test_a_score_is_a_number_per_row(tmp_path, suffix, odd, got):
    message = re.escape(f"scores: 'msp' must be a tensor or an array [n], got {got}")
    with pytest.raises(ValueError, match=message), save_scores(tmp_path / f"x{suffix}") as writer:
        writer.write({"msp": odd})
    assert not list(tmp_path.iterdir())


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

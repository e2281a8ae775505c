"""What a user can get wrong, and files that are damaged or lie."""

import io
import json
import os
import pickle
import random
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from formats import FEATS, LOGITS, SAVERS, C, D, N, complaint, fixed_list, fixed_shape, read
from safetensors.torch import save_file

import fastood
from fastood import files
from fastood.arrow import Scorer, score_file
from fastood.files import FileError, open_rows, save_scores


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
    saver(path, logits=np.random.default_rng(0).normal(size=(20000, 4)))
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
    of_pyarrow = "Expected all lists to be of size=2"  # of 23 and older, which cannot read it
    said = complaint(tmp_path / "x.parquet")
    assert "'logits' must hold no nulls" in said or of_pyarrow in said


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
    pytest.importorskip("safetensors", "0.6", reason="needs a safetensors that knows F4")
    packed = {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]}
    logits = {"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 24]}
    write_safetensors(tmp_path / "x.safetensors", packed=packed, logits=logits)
    assert read(tmp_path / "x.safetensors")[0].shape == (2, 2)
    with open_rows(tmp_path / "x.safetensors") as rows:
        assert rows.others == ["packed"]
    assert "'packed' must hold float32" in complaint(tmp_path / "x.safetensors", logits_key="packed")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # torch 2.14
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


def flip(path, number):
    """A bit of a number that a file holds."""
    whole = bytearray(path.read_bytes())
    assert whole.count(number.tobytes()) == 1
    whole[whole.index(number.tobytes())] ^= 1
    path.write_bytes(whole)


def test_a_flipped_bit_in_parquet_that_was_written_with_checksums(tmp_path):
    """As Spark writes it; of others nothing tells."""
    path, table = tmp_path / "x.parquet", pa.table({"logits": fixed_list(LOGITS)})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    flip(path, LOGITS[7, 1])
    assert "checksum" in complaint(path)
    with pytest.raises(FileError, match="checksum"):
        score_file(path, tmp_path / "scores.parquet", Scorer("msp"))


def test_a_flipped_bit_in_scores(tmp_path):
    """Which are written with checksums."""
    requests, table = tmp_path / "x.parquet", pa.table({"logits": fixed_list(LOGITS)})
    pq.write_table(table, requests)
    scores = fastood.score(LOGITS, method="msp")
    score_file(requests, tmp_path / "of_arrow.parquet", Scorer("msp"))
    with save_scores(tmp_path / "of_arrays.parquet") as writer:
        writer.write({"msp": scores})
    for name in ("of_arrow", "of_arrays"):
        path = tmp_path / f"{name}.parquet"
        flip(path, scores[7])
        with pytest.raises(OSError, match="checksum"):
            pq.read_table(path, page_checksum_verification=True)

"""The file of a detector: plain, the same every time, and refused where it is damaged."""

import json
import math
import pickle
import random
import re
import struct

import numpy as np
import pytest
from calibration import data
from safetensors import numpy as safetensors_numpy

import fastood
from fastood import Detector
from fastood.files import FileError


def parts(path):
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["fastood"]), safetensors_numpy.load(raw)


def rewritten(path, header, tensors):
    path.write_bytes(safetensors_numpy.save(tensors, metadata={"fastood": json.dumps(header)}))
    return path


@pytest.fixture
def saved(tmp_path):
    fitted = Detector(per_class=True, tpr=0.8).fit(*data())
    fitted.save(tmp_path / "d.safetensors")
    return tmp_path / "d.safetensors"


def test_the_file_is_plain_and_the_same_every_time(saved, tmp_path):
    header, tensors = parts(saved)
    assert header == {
        "kind": "Detector", "version": 1, "fastood": fastood.__version__, "rows": 300, "method": "energy", "norm": 0.3,
        "temperature": 1.0, "bias": False, "params": {}, "tpr": 0.8, "per_class": True, "classes": 5, "dim": 7,
    }  # fmt: skip
    scores = fastood.score(*data()).double().sort().values
    np.testing.assert_array_equal(tensors["scores"][:300], scores)
    assert tensors["counts"].tolist() == [300, *data()[0].argmax(1).bincount().tolist()]
    before = saved.read_bytes()
    Detector.load(saved).save(saved)
    assert saved.read_bytes() == before
    assert list(tmp_path.iterdir()) == [saved]


def changed(**changes):
    return lambda header, tensors: header.update(changes)


def without(name):
    return lambda header, tensors: (header if name in header else tensors).pop(name)


def put(name, i, x):
    def change(header, tensors):
        tensors[name][i] = x

    return change


def cast(name, dtype):
    def change(header, tensors):
        tensors[name] = tensors[name].astype(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(version=2, fastood="9.0"), "version 2, written by fastood 9.0; this is fastood .* reads version 1"),
        (changed(version="1"), "format version '1'"),
        (changed(kind="BatchGrad"), "not a file that Detector.save wrote"),
        *((without(x), f"it lacks '{x}'") for x in ("rows", "method", "norm", "params", "dim", "scores", "counts")),
        (changed(method="enrgy"), "method must be one of"),
        (changed(norm=-1), "norm must be a number >= 0"),
        (changed(norm="two"), "norm must be a number"),
        (changed(norm=None), "dim must be null for this score, got 7"),
        (changed(method="exgrad"), "norm of exgrad must be 1, got 0.3"),
        (changed(temperature=math.nan), "temperature must be a finite number"),
        (changed(tpr=1.5), "tpr must be a number between 0 and 1"),
        (changed(bias="no"), "bias must be True or False"),
        (changed(params={"gamma": 1}), "gamma: no such argument"),
        (changed(params={"tpr": 0.1}), "multiple values"),
        (changed(params=[1]), "params must be an object"),
        (changed(classes=4), "'counts' must be 5 numbers that add up to the 600 scores"),
        (changed(classes=10**15), "'counts' must be"),
        (changed(classes=True), "classes must be a number of columns or null, got True"),
        (changed(classes=None), "classes must not be null"),
        (changed(dim=-1), "dim must be a number of columns"),
        (changed(rows=299), "it must hold 299 rows, found 300"),
        (put("scores", 3, math.nan), "'scores' must be finite"),
        (put("scores", 299, math.inf), "'scores' must be finite"),
        (put("scores", 3, 1e9), "'scores' must not fall within a sample"),
        (put("counts", 1, -1), "'counts' must be"),
        (put("counts", 0, 2**62), "'counts' must be"),
        (put("counts", 1, 10**6), "'counts' must be"),
        (cast("scores", np.float32), "'scores' must not be .* float32"),
        (cast("counts", np.int32), "'counts' must not be .* int32"),
        (lambda h, t: t.update(scores=t["scores"][:, None]), "'scores' must not be"),
        (lambda h, t: t.update(scores=t["scores"][:-1].copy()), "'counts' must be"),
        (lambda h, t: t.update(counts=np.array([299, 301, 0, 0, 0, 0])), "'scores' must not fall|must hold|together"),
        (lambda h, t: t.update(more=np.zeros(3)), "'more' must not be there"),
        (lambda h, t: t.update(weights=np.zeros(600, np.int64)), "'weights' must be a number >= 1"),
        (lambda h, t: t.update(weights=np.full(600, 2**61)), "'weights' must be"),
        (lambda h, t: t.update(weights=np.full(600, 2)), "it must hold 300 rows, found 600"),
    ],
)  # fmt: skip
def test_a_file_that_was_tampered_with(saved, change, message):
    header, tensors = parts(saved)
    tensors = {name: x.copy() for name, x in tensors.items()}
    change(header, tensors)
    with pytest.raises(FileError, match=f"^{re.escape(str(saved))}: cannot be read as a detector: .*{message}"):
        Detector.load(rewritten(saved, header, tensors))


def test_bytes_changed_at_random_give_a_detector_or_a_clear_error(saved):
    good = saved.read_bytes()
    r = random.Random(1)
    refused = 0
    for _ in range(300):
        raw = bytearray(good)
        for _ in range(r.choice([1, 1, 3])):
            raw[r.randrange(r.choice([8, 500, 700, len(raw)]))] = r.randrange(256)
        saved.write_bytes(raw[: r.randrange(len(raw))] if r.random() < 0.1 else raw)
        try:
            assert math.isfinite(Detector.load(saved).threshold.sum())
        except FileError:
            refused += 1
    assert refused > 150


def test_other_files(tmp_path):
    with pytest.raises(FileError, match="nowhere: no such file"):
        Detector.load(tmp_path / "nowhere")
    with pytest.raises(FileError, match="is a folder, not a file"):
        Detector.load(tmp_path)
    pickled = tmp_path / "p.safetensors"
    pickled.write_bytes(pickle.dumps({"scores": [1.0]}))
    with pytest.raises(FileError, match="cannot be read as a detector"):
        Detector.load(pickled)
    deep = tmp_path / "deep.safetensors"
    deep.write_bytes(safetensors_numpy.save({"scores": np.zeros(3)}, {"fastood": '{"a":' * 100_000}))
    with pytest.raises(FileError, match=r"deep\.safetensors: cannot be read as a detector"):
        Detector.load(deep)
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(safetensors_numpy.save({"logits": np.zeros((3, 2))}))
    with pytest.raises(FileError, match=r"not a file that Detector\.save wrote"):
        Detector.load(plain)
    with pytest.raises(FileError, match="there is no folder"):
        Detector("msp").fit(data()[0]).save(tmp_path / "no" / "d.safetensors")

"""A fitted successor in a file."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from six_classes import C, D, N, fitted, rows

from fastood import SUCCESSORS, Detector, Fitted
from fastood.files import FileError


@pytest.mark.parametrize("name", SUCCESSORS)
def test_saved_and_loaded(name, tmp_path):
    made, new = fitted(name), rows(1)
    made.save(tmp_path / "x.safetensors")
    loaded = Fitted.load(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(loaded.score(*new[:2]), made.score(*new[:2]))
    assert repr(loaded) == repr(made)
    assert loaded.digest() == made.digest()
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        np.testing.assert_array_equal(again.score(*new[:2]), made.score(*new[:2]))
    if SUCCESSORS[name].fitted_on:
        assert loaded.merge(made).rows == 2 * N  # a file can be fitted on


def test_files_that_are_none(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(FileError, match="no such file"):
        Fitted.load(path)
    Detector("msp", tpr=0.5).fit(rows()[0]).save(path)
    with pytest.raises(FileError, match="not a file that Fitted"):
        Fitted.load(path)
    fitted("nci").save(path)
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fastood"])

    def refused(match, changed=None, without=(), **more):
        held = {k: x for k, x in {**tensors, **more}.items() if k not in without}
        save_file(held, path, {"fastood": json.dumps({**header, **(changed or {})})})
        with pytest.raises(FileError, match=match):
            Fitted.load(path)

    refused("format version 9", {"version": 9})
    refused("method must be one of", {"method": "os.system"})
    refused("alpha must be a finite number >= 0", {"params": {"alpha": -1}})
    refused("no such parameter of nci", {"params": {"beta": 1}})
    refused("params must be an object", {"params": 3})
    refused("temperature", {"temperature": 0})
    refused("rows must be a whole number", {"rows": -3})
    refused("classes must be the head's 6", {"classes": 7})
    refused("its head must have weight, bias, got bias", without=["head.weight"])
    refused("the head's bias must not be torch.int64", **{"head.bias": torch.arange(C)})
    refused("as many classes", **{"head.bias": torch.zeros(C + 1)})
    refused("it must hold sum, n, got n", without=["sums.sum"])
    refused(r"'sum' must be \[24\], got \[23\]", **{"sums.sum": torch.zeros(23)})
    refused("'sum' must be finite", **{"sums.sum": torch.full((D,), math.nan)})
    refused("'pickle' must not be there", pickle=torch.zeros(1))

"""--detector of fastood score and fastood eval: decisions."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
from command_line import C, D, N, complaint, metadata_of, run, save, warnings
from formulas import lse, norm

import fastood


def expected_decisions(det, f, h):
    calibration, limit = det
    s = 2 * lse(f / 2) * norm(h, 2)
    return s, s >= limit, (1 + (calibration <= s[:, None]).sum(-1)) / (N + 1)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz", ".safetensors", ".pt"])
def test_score_decides_by_a_detector(det, suffix):
    f, h = save("near.npz", 4, 1, key=np.arange(N))
    f[3], h[5, 1] = np.nan, np.nan
    np.savez("near.npz", logits=f, feats=h, key=np.arange(N))
    command = ["score", "near.npz", f"out{suffix}", "--detector", "det.safetensors", "--id-key", "key"]
    result = run(*command, "--chunk-rows", "7")
    s, accept, p = expected_decisions(det, f, h)
    p[[3, 5]] = np.nan
    assert 0 < accept.sum() < N
    assert result.stdout == (
        f"out{suffix}: {N} rows of energy*||h||_2, {accept.sum()} of them accepted\n"
        f"near.npz: logits [{N}, {C}], feats [{N}, {D}], IDs 'key'\n"
        f"near.npz: 2 of {N} rows have a NaN score (energy*||h||_2) and are kept: they hold NaN, or logits that hold "
        "+inf or are all -inf\n"
    )
    out = decisions(suffix)
    assert list(out) == ["key", "energy*||h||_2", "accept", "p_value"]
    np.testing.assert_allclose(out["energy*||h||_2"], s, rtol=1e-12)
    assert out["accept"].dtype == bool
    np.testing.assert_array_equal(out["accept"], accept)
    np.testing.assert_array_equal(out["p_value"], p)
    result = run(*command, "--nan", "drop")
    assert f"out{suffix}: {N - 2} rows of energy*||h||_2, {accept.sum()} of them accepted\n" in result.stdout
    out = decisions(suffix)
    np.testing.assert_array_equal(out["p_value"], np.delete(p, [3, 5]))
    np.testing.assert_array_equal(out["key"], np.delete(np.arange(N), [3, 5]))
    assert "near.npz: row 3, counted from 0, has a NaN score" in complaint(*command, "--nan", "fail")


def decisions(suffix):
    path = f"out{suffix}"
    if suffix == ".csv":
        with open(path, newline="") as file:
            rows = [*csv.DictReader(file)]
        words = {"true": True, "false": False}
        return {k: np.array([words.get(row[k]) if k == "accept" else float(row[k]) for row in rows]) for k in rows[0]}
    if suffix == ".parquet":
        return {k: np.array(x) for k, x in pq.read_table(path).to_pydict().items()}
    if suffix == ".npz":
        with np.load(path) as out:
            return dict(out)
    if suffix == ".pt":
        return {k: x.numpy() for k, x in torch.load(path).items()}
    with safetensors.safe_open(path, "np") as file:
        names = ["key", "energy*||h||_2", "accept", "p_value"]  # which the format keeps in an order of its own
        assert sorted(file.keys()) == sorted(names)
        return {k: file.get_tensor(k) for k in names}


def test_metadata_say_which_detector_decided(det):
    run("score", "near.npz", "out.parquet", "--detector", "det.safetensors")
    made = {"fastood": fastood.__version__, "method": ["energy"], "norm": [2], "temperature": 2, "bias": False}
    of = json.loads(run("inspect", "det.safetensors", "--json").stdout)
    of = {name: x for name, x in of.items() if name not in ("file", "format", "fastood")}
    assert metadata_of("out.parquet") == made | {"log": False, "oriented": True, "detector": of}


def test_decisions_about_no_rows_and_warnings_about_some(det):
    np.savez("none.npz", logits=np.zeros((0, C)), feats=np.zeros((0, D)))
    result = run("score", "none.npz", "out.csv", "--detector", "det.safetensors")
    assert "out.csv: 0 rows of energy*||h||_2, 0 of them accepted\n" in result.stdout
    assert Path("out.csv").read_text() == "energy*||h||_2,accept,p_value\n"
    np.savez("low.npz", logits=np.full((4, C), -60.0), feats=np.ones((4, D)))
    (line,) = warnings("score", "low.npz", "out.csv", "--detector", "det.safetensors")
    assert "low.npz: negative energy*||h||_2 in 4 of 4 rows" in line


def test_a_table_of_no_rows_whose_lists_have_no_width(det):
    lists = pa.array([], pa.list_(pa.float32()))
    pq.write_table(pa.table({"logits": lists, "feats": lists}), "none.parquet")
    run("score", "none.parquet", "out.csv", "--detector", "det.safetensors")
    assert Path("out.csv").read_text() == "energy*||h||_2,accept,p_value\n"
    pq.write_table(pa.table({"logits": lists}), "none.parquet")
    text = complaint("score", "none.parquet", "out.csv", "--detector", "det.safetensors")
    assert "'feats' must have the 9 columns that the detector was fitted on, got none of them" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "energy"], "--detector has settings of its own: leave out --method"),
        (["--norm", "2", "--temperature", "1.0"], "leave out --norm, --temperature\n"),
        (["--bias", "--log", "--raw"], "leave out --bias, --log, --raw\n"),
        (["--detector", "val.npz"], "val.npz: cannot be read as a detector"),
        (["--logits-key", "feats"], "near.npz: 'feats' must have the 6 columns that the detector was fitted on, got 9"),
        (["--backend", "abacus"], "must be 'auto' or one of ['"),
        (["--id-key", "accept"], "the IDs must not be called as a score is, 'accept'"),
    ],
)
def test_score_by_detector_mistakes(det, arguments, message):
    save("near.npz", 2, 1, accept=np.arange(N))
    before = sorted(os.listdir())
    assert message in complaint("score", "near.npz", "out.csv", "--detector", "det.safetensors", *arguments)
    assert "a .npy file holds one score" in complaint("score", "near.npz", "o.npy", "--detector", "det.safetensors")
    text = complaint("score", "near.npz", "det.safetensors", "--detector", "det.safetensors")
    assert text == "error: det.safetensors: is an input; the output must be another file\n"
    assert sorted(os.listdir()) == before


def test_a_detector_that_needs_feats_says_so(det, data):
    np.save("logits.npy", data[0])
    text = complaint("score", "logits.npy", "out.csv", "--detector", "det.safetensors")
    wanted = "'feats' must have the 9 columns that the detector was fitted on, got none of them"
    assert text == f"error: logits.npy: {wanted}\n"
    sets = ["--id", "val.npz", "--ood", "logits.npy", "--method", "msp", "--norm", "none"]
    assert complaint("eval", *sets, "--detector", "det.safetensors") == text


def test_eval_says_what_a_detector_accepts(det, undrawn):
    f, h = save("near.npz", 4, 1)
    f[3] = np.nan
    np.savez("near.npz", logits=f, feats=h)
    g, k = save("far.npz", 1, 2, n=25)
    sets = ["--id", "val.npz", "--ood", "near.npz", "--ood", "b=far.npz", "--method", "msp", "--norm", "none"]
    result = run("eval", *sets, "--detector", "det.safetensors", "--json", "t.json", "--html", "t.html")
    near, far = (int(expected_decisions(det, *x)[1].sum()) for x in ((f, h), (g, k)))
    assert result.stdout.endswith(
        "\ndet.safetensors: energy*||h||_2, tpr 0.9, accepts\n"
        f"  0.925000 of the ID set: 37 of {N} rows\n"
        f"  {near / N:.6f} of near: {near} of {N} rows\n"
        f"  {far / 25:.6f} of b: {far} of 25 rows\n"
    )
    document = json.loads(Path("t.json").read_text(encoding="utf-8"))
    assert document["detector"]["accepted"] == {"id": 0.925, "ood": {"near": near / N, "b": far / 25}}
    assert document["detector"]["method"] == "energy"
    assert document["detector"]["rows"] == N
    html = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", Path("t.html").read_text(encoding="utf-8")))
    assert f"ID 7.5% 3 of {N} near {1 - near / N:.1%} {N - near} of {N}" in html
    assert document["counts"]["ood"]["near"] == N - 1  # the metrics are of rows that have a score
    run("eval", *sets, "--json", "t.json")
    assert "detector" not in json.loads(Path("t.json").read_text(encoding="utf-8"))

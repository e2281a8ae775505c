"""fastood score: what it writes and prints, and how a mistake ends."""

import csv
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import C, D, N, complaint, metadata_of, run
from formulas import lse, norm

import fastood


def test_score_is_energy_times_the_norm(data):
    f, h = data
    result = run("score", "val.npz", "out.npz")
    said = f"val.npz: logits [{N}, {C}], feats [{N}, {D}]\n"
    assert result.stdout == f"out.npz: {N} rows of energy*||h||_0.3\n" + said
    assert f"negative energy*||h||_0.3 in {(lse(f) < 0).sum()} of {N} rows" in result.stderr
    with np.load("out.npz") as out:
        assert list(out) == ["energy*||h||_0.3"]
        np.testing.assert_allclose(out["energy*||h||_0.3"], lse(f) * norm(h, 0.3), rtol=1e-12)


def test_without_features_the_name_and_the_summary_say_so(data):
    f, h = data
    np.savez("own.npz", logits=f, penultimate=h, labels=np.zeros(N, int), split=np.zeros(N, int), fold=np.zeros(N, int))
    holds = "also holds 'penultimate', 'labels', 'split', 'fold'"
    assert run("score", "own.npz", "out.npz").stdout == (
        f"out.npz: {N} rows of energy\nown.npz: logits [{N}, {C}], no feats (--feats-key names them), {holds}\n"
    )
    with np.load("out.npz") as out:
        np.testing.assert_allclose(out["energy"], lse(f), rtol=1e-12)
    stdout = run("score", "own.npz", "out.npz", "--feats-key", "penultimate").stdout
    assert f"feats 'penultimate' [{N}, {D}], also holds 'labels', 'split', 'fold'\n" in stdout
    assert f"feats [{N}, {D}] (not used)\n" in run("score", "val.npz", "out.npz", "--norm", "none").stdout
    assert f"logits [{N}, {C}] (not used)" in run("score", "val.npz", "out.npz", "--method", "norm").stdout


def columns_of(*options, suffix=".parquet"):
    run("score", "val.npz", f"out{suffix}", *options)
    return pq.read_table("out.parquet").column_names


def test_columns_say_what_they_hold(data):
    three = ["--method", "energy", "--method", "exgrad", "--method", "norm"]
    assert columns_of(*three) == ["energy*||h||_0.3", "exgrad", "||h||_0.3"]
    assert columns_of(*three, "--norm", "inf") == ["energy*||h||_inf", "exgrad", "||h||_inf"]
    assert columns_of("--norm", "0.3000000001") == ["energy*||h||_0.3000000001"]
    assert columns_of(*three, "--log") == ["log energy*||h||_0.3", "log exgrad", "log ||h||_0.3"]
    assert columns_of(*three, "--raw", "--norm", "2") == ["raw energy*||h||_2", "raw exgrad", "raw ||h||_2"]
    assert columns_of("--raw", "--log", "--norm", "none") == ["raw log energy"]
    # eval calls the same scores the same.
    run("eval", "--id", "val.npz", "--ood", "near.npz", "--norm", "inf", "--csv", "t.csv")
    with open("t.csv", newline="") as file:
        in_eval = {row["score"] for row in csv.DictReader(file)}  # by AUROC
    assert set(columns_of("--method", "all", "--norm", "inf")) == in_eval


@pytest.mark.parametrize("out", ["out.parquet", "out.safetensors"])
def test_metadata_say_how_the_scores_were_made(data, out):
    made = {"fastood": fastood.__version__, "method": ["energy"], "norm": [0.3]}
    made |= {"temperature": 1.0, "bias": False, "log": False, "oriented": True}
    run("score", "val.npz", out)
    assert metadata_of(out) == made
    methods = ["--method", "exgrad", "--method", "msp", "--method", "eg_p_l2sq"]
    run("score", "val.npz", out, *methods, "--norm", "inf", "--temperature", "2", "--bias", "--log", "--raw")
    made |= {"method": ["exgrad", "msp", "eg_p_l2sq"], "norm": [1, "inf", 2]}
    assert metadata_of(out) == made | {"temperature": 2.0, "bias": True, "log": True, "oriented": False}
    run("score", "val.npz", out, "--method", "gen")
    assert metadata_of(out)["norm"] == [None]


@pytest.mark.parametrize("rows", [1, 7, N, 1000])
def test_options_reach_the_scores_whatever_the_chunks(data, rows):
    f, h = data
    options = ["--method", "energy", "--method", "msp", "--norm", "2", "--temperature", "3", "--bias", "--log"]
    run("score", "val.npz", "out.npz", *options, "--chunk-rows", rows, "--backend", "reference")
    log_u = np.log(norm(np.hstack([h, np.ones((N, 1))]), 2))
    normaliser = lse(f / 3)
    with np.load("out.npz") as out, np.errstate(invalid="ignore"):
        np.testing.assert_allclose(out["log energy*||h||_2"], np.log(3 * normaliser) + log_u, rtol=1e-10)
        np.testing.assert_allclose(out["log msp*||h||_2"], f.max(-1) / 3 - normaliser + log_u, rtol=1e-10)


def test_norm_none_and_inf_and_raw(data):
    f, h = data
    run("score", "val.npz", "a.npy", "--norm", "none")
    np.testing.assert_allclose(np.load("a.npy"), lse(f), rtol=1e-12)
    run("score", "val.npz", "b.npy", "--norm", "inf")
    np.testing.assert_allclose(np.load("b.npy"), lse(f) * np.abs(h).max(-1), rtol=1e-12)
    run("score", "val.npz", "c.npy", "--method", "exgrad", "--raw")
    p = np.exp(f - lse(f)[:, None])
    np.testing.assert_allclose(np.load("c.npy"), 2 * norm(h, 1) * (p * (1 - p)).sum(-1), rtol=1e-9)


def test_all_is_what_the_file_allows(data):
    f, h = data
    names = columns_of("--method", "all")
    assert [{"||h||_0.3": "norm"}.get(x, x.removesuffix("*||h||_0.3")) for x in names] == list(fastood.SCORES)
    assert {"msp*||h||_0.3", "neg_entropy", "gen", "exgrad"} <= set(names)  # a V never above 0 takes no norm
    assert {"msp*||h||_2", "neg_entropy*||h||_2", "gen*||h||_2"} <= set(columns_of("--method", "all", "--norm", "2"))
    np.save("logits.npy", f)
    run("score", "logits.npy", "out.csv", "--method", "all")
    with open("out.csv", newline="") as file:
        header = next(csv.reader(file))
    assert header == [name for name, entry in fastood.SCORES.items() if "feats" not in entry.needs]
    np.savez("feats.npz", feats=h)
    run("score", "feats.npz", "out.npz", "--method", "all")
    with np.load("out.npz") as out:
        assert list(out) == ["||h||_0.3"]
        np.testing.assert_allclose(out["||h||_0.3"], norm(h, 0.3), rtol=1e-10)


def test_keys_of_ones_own(data):
    f, h = data
    np.savez("own.npz", f=f, h=h)
    run("score", "own.npz", "out.npy", "--logits-key", "f", "--feats-key", "h", "--norm", "1")
    np.testing.assert_allclose(np.load("out.npy"), lse(f) * norm(h, 1), rtol=1e-12)


def test_nan_is_counted_and_explained(holes):
    two = ["--method", "msp", "--method", "energy", "--chunk-rows", "4"]
    result = run("score", "holes.npz", "out.npz", *two)
    assert f"3 of {N} rows have a NaN score (msp, energy) and are kept: they hold NaN, or" in result.stdout
    assert "all -inf" in result.stdout
    assert result.stdout.count("\n") == 3
    with np.load("out.npz") as out:
        assert [np.isnan(out[x]).nonzero()[0].tolist() for x in ("msp", "energy")] == [[3, 4, 6], [3, 4]]
    np.save("negative.npy", np.full((5, 2), -9.0))
    assert "or U * V < 0" in run("score", "negative.npy", "out.npz", "--log").stdout


def test_nan_rows_can_be_dropped_with_their_ids_or_refused(holes):
    two = ["--method", "msp", "--method", "energy", "--chunk-rows", "4", "--id-key", "key"]
    result = run("score", "holes.npz", "out.npz", *two, "--nan", "drop")
    assert result.stdout.startswith(f"out.npz: {N - 3} rows of msp, energy\n")
    assert f"3 of {N} rows have a NaN score (msp, energy) and are left out" in result.stdout
    whole = np.delete(np.arange(N), [3, 4, 6])
    with np.load("out.npz") as out:
        assert list(out) == ["key", "msp", "energy"]
        np.testing.assert_array_equal(out["key"], whole * 10)
        np.testing.assert_allclose(out["energy"], lse(holes[whole]), rtol=1e-12)
        assert len(out["msp"]) == len(whole)
    before = sorted(os.listdir())
    text = complaint("score", "holes.npz", "new.npz", "--chunk-rows", "2", "--nan", "fail")
    assert text == "error: holes.npz: row 3, counted from 0, has a NaN score; see --nan\n"
    assert sorted(os.listdir()) == before


def test_ids_stand_beside_the_scores(data):
    f, h = data
    names = [f"image {i}" for i in range(N)]
    wide = {f"logit_{i}": f[:, i] for i in range(C)} | {f"feat_{i}": h[:, i] for i in range(D)}
    pq.write_table(pa.table({"image": names, **wide}), "val.parquet")
    keys = ["--logits-key", "logit", "--feats-key", "feat"]
    result = run("score", "val.parquet", "out.parquet", *keys, "--id-key", "image", "--chunk-rows", "7")
    said = f"logits 'logit_0..{C - 1}' [{N}, {C}], feats 'feat_0..{D - 1}' [{N}, {D}], IDs 'image'\n"
    assert result.stdout.endswith(said)
    table = pq.read_table("out.parquet").to_pydict()
    assert list(table) == ["image", "energy*||h||_0.3"]
    assert table["image"] == names
    np.testing.assert_allclose(table["energy*||h||_0.3"], lse(f) * norm(h, 0.3), rtol=1e-12)
    # eval reads such tables, too.
    wide = run("eval", "--id", "val.parquet", "--ood", "val.parquet", *keys, "--method", "energy").stdout
    assert "0.500000" in wide


def test_no_rows(data):
    np.save("none.npy", np.zeros((0, 4)))
    said = "out.csv: 0 rows of msp\nnone.npy: logits [0, 4], no feats (--feats-key names them)\n"
    assert run("score", "none.npy", "out.csv", "--method", "msp").stdout == said
    with open("out.csv") as file:
        assert file.read().split() == ["msp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.npz", "out.npz"], "nope.npz: no such file"),
        (["val.npz", "val.npz"], "val.npz: is an input"),
        (["val.npz", "nowhere/out.npz"], "nowhere"),
        (["val.npz", "out.xls"], "out.xls: unknown extension '.xls'"),
        (["val.npz", "out.npz", "--logits-key", "y"], "val.npz: must hold 'y', found 'logits', 'feats'"),
        (["val", "out.npz"], "val: no such file"),
        (["val.npz", "out.npz", "--method", "enregy"], "--method must be one of 'all', 'msp', 'energy'"),
        (["val.npz", "out.npz", "--norm", "two"], "--norm must be a number >= 0, 'inf' or 'none', got 'two'"),
        (["val.npz", "out.npz", "--norm", "-1"], "--norm must be a number >= 0, 'inf' or 'none', got '-1'"),
        (["val.npz", "out.npz", "--method", "exgrad", "--norm", "2"], "--norm: exgrad has a norm of its own"),
        (["val.npz", "out.npz", "--temperature", "0"], "--temperature must be a finite number > 0, got 0.0"),
        (["val.npz", "out.npz", "--backend", "abacus"], "must be 'auto' or one of ['"),
        (["val.npz", "out.npz", "--device", "abacus"], "--device must be a torch device"),
        (["val.npz", "out.npz", "--device", "meta"], "--device must be one that holds numbers, got 'meta'"),
        (["val.npz", "out.npz", "--nan", "omit"], "--nan must be one of 'keep', 'drop', 'fail', got 'omit'"),
        (["val.npz", "out.npz", "--id-key", "image"], "val.npz: must hold 'image', found 'logits', 'feats'"),
        (["val.npz", "out.npz", "--log", "--method", "gen"], "log: gen is never above 0"),
        (["val.npz", "out.npy", "--method", "all"], "a .npy file holds one score"),
        (["far.npz", "out.npz", "--logits-key", "feats", "--feats-key", "x"], "must hold 'x'"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(data, arguments, message):
    before = sorted(os.listdir())
    assert message in complaint("score", *arguments)
    assert sorted(os.listdir()) == before


def test_a_gpu_that_is_not_there(data, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device: torch finds no GPU here for 'cuda'" in complaint("score", "val.npz", "o.npz", "--device", "cuda")


def test_an_input_that_breaks_off_leaves_the_old_output(data):
    np.savez("long.npz", logits=np.random.default_rng(1).normal(size=(5000, 4)))
    with open("long.npz", "r+b") as file:
        file.seek(100_000)
        file.write(b"not what the checksum says")
    with open("out.npz", "w") as file:
        file.write("what was there")
    before = sorted(os.listdir())
    assert "long.npz: cannot be read as .npz" in complaint("score", "long.npz", "out.npz", "--chunk-rows", "100")
    with open("out.npz") as file:
        assert file.read() == "what was there"
    assert sorted(os.listdir()) == before


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="needs /dev/stdout")
def test_standard_output_takes_a_result_and_nothing_else(data, capfd):
    run("score", "val.npz", "out.csv", "--method", "tv")
    said = run("fit", "val.npz", "--out", "det.safetensors")
    tables = "eval", "--id", "val.npz", "--ood", "far.npz", "--method", "tv"
    run(*tables, "--csv", "table.csv")
    capfd.readouterr()
    for arguments, written in (
        (("score", "val.npz", "/dev/stdout", "--method", "tv"), "out.csv"),
        ((*tables, "--csv", "/dev/stdout"), "table.csv"),
    ):
        result = run(*arguments)
        assert capfd.readouterr().out == Path(written).read_text()
        assert result.stdout == ""
        assert "val.npz: logits [" in result.stderr
    run("score", "val.npz", "decided.csv", "--detector", "det.safetensors")
    run("score", "val.npz", "/dev/stdout", "--detector", "det.safetensors")
    assert capfd.readouterr().out == Path("decided.csv").read_text()
    told = run("fit", "val.npz", "--out", "/dev/stdout").stderr
    assert told.endswith(said.stdout.replace("det.safetensors", "/dev/stdout"))
    os.mkdir("shards")
    pq.write_table(pa.table({"logits": [[1.0, 2.0]]}), "shards/a.parquet")
    assert "/dev/null: is no folder" in complaint("score", "shards", "/dev/null", "--engine", "ray")
    for command in (("score", "shards", "x.csv"), ("fit", "shards", "--out", "x.safetensors")):
        assert "shards: is a folder, which --engine ray takes" in complaint(*command)


def test_a_missing_argument_is_a_usage_error(data):
    result = run("score", "val.npz", code=2)
    assert "Missing argument 'OUT'" in result.stderr

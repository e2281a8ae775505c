"""The command line, as typed: what it writes, what it prints, how it ends."""

import csv
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
from typer.testing import CliRunner

import fastood
from fastood._data import oddity
from fastood.cli import app

N, C, D = 40, 6, 9
RNG = np.random.default_rng(1)


def save(path, scale, seed, n=N, **more):
    rng = np.random.default_rng(seed)
    arrays = {"logits": rng.normal(size=(n, C)) * scale, "feats": rng.normal(size=(n, D)) * scale}
    np.savez(path, **arrays, **more)
    return arrays["logits"], arrays["feats"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of files, and one of them as arrays."""
    monkeypatch.chdir(tmp_path)
    save("near.npz", 2, 1)
    save("far.npz", 1, 2, n=25)
    return save("val.npz", 5, 0)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def complaint(*arguments):
    """The one line on stderr with which a mistake ends."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def logsumexp(f):
    top = f.max(-1, keepdims=True)
    return top[:, 0] + np.log(np.exp(f - top).sum(-1))


def norm(h, r):
    return (np.abs(h) ** r).sum(-1) ** (1 / r)


# ---- score


def test_score_is_energy_times_the_norm(data):
    f, h = data
    result = run("score", "val.npz", "out.npz")
    said = f"val.npz: logits [{N}, {C}], feats [{N}, {D}]\n"
    assert result.stdout == f"out.npz: {N} rows of energy*||h||_0.3\n" + said
    assert f"negative energy*||h||_0.3 in {(logsumexp(f) < 0).sum()} of {N} rows" in result.stderr
    with np.load("out.npz") as out:
        assert list(out) == ["energy*||h||_0.3"]
        np.testing.assert_allclose(out["energy*||h||_0.3"], logsumexp(f) * norm(h, 0.3), rtol=1e-12)


def test_without_features_the_name_and_the_summary_say_so(data):
    f, h = data
    np.savez("own.npz", logits=f, penultimate=h, labels=np.zeros(N, int), split=np.zeros(N, int), fold=np.zeros(N, int))
    holds = "also holds 'penultimate', 'labels', 'split', 'fold'"
    assert run("score", "own.npz", "out.npz").stdout == (
        f"out.npz: {N} rows of energy\nown.npz: logits [{N}, {C}], no feats (--feats-key names them), {holds}\n"
    )
    with np.load("out.npz") as out:
        np.testing.assert_allclose(out["energy"], logsumexp(f), rtol=1e-12)
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


def metadata_of(path):
    if path.endswith(".parquet"):
        return {k.decode(): json.loads(v) for k, v in pq.read_schema(path).metadata.items()}
    with safetensors.safe_open(path, "np") as file:
        return {k: json.loads(v) for k, v in file.metadata().items()}


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
    lse = logsumexp(f / 3)
    with np.load("out.npz") as out, np.errstate(invalid="ignore"):
        np.testing.assert_allclose(out["log energy*||h||_2"], np.log(3 * lse) + log_u, rtol=1e-10)
        np.testing.assert_allclose(out["log msp*||h||_2"], f.max(-1) / 3 - lse + log_u, rtol=1e-10)


def test_norm_none_and_inf_and_raw(data):
    f, h = data
    run("score", "val.npz", "a.npy", "--norm", "none")
    np.testing.assert_allclose(np.load("a.npy"), logsumexp(f), rtol=1e-12)
    run("score", "val.npz", "b.npy", "--norm", "inf")
    np.testing.assert_allclose(np.load("b.npy"), logsumexp(f) * np.abs(h).max(-1), rtol=1e-12)
    run("score", "val.npz", "c.npy", "--method", "exgrad", "--raw")
    p = np.exp(f - logsumexp(f)[:, None])
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
    np.testing.assert_allclose(np.load("out.npy"), logsumexp(f) * norm(h, 1), rtol=1e-12)


@pytest.fixture
def holes(data):
    """The logits of holes.npz: two rows of NaN (3 and 4) and one of -inf (6), whose energy is no NaN."""
    f, _ = data
    f[3:5] = np.nan
    f[6] = -np.inf
    np.savez("holes.npz", logits=f, key=np.arange(N) * 10)
    return f


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
        np.testing.assert_allclose(out["energy"], logsumexp(holes[whole]), rtol=1e-12)
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
    np.testing.assert_allclose(table["energy*||h||_0.3"], logsumexp(f) * norm(h, 0.3), rtol=1e-12)
    # eval reads such tables, too.
    wide = run("eval", "--id", "val.parquet", "--ood", "val.parquet", *keys, "--method", "energy").stdout
    assert "0.500000" in wide


# ---- warnings about the data


def warnings(*arguments):
    """The lines on stderr of a run that ends well."""
    lines = run(*arguments).stderr.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    return lines


def test_scores_that_a_norm_inverts_are_warned_of(data):
    f, h = data
    for name, x in (("val", f - 60), ("ood", f / 3 - 60)):
        np.savez(name, logits=x, feats=h)
    sets = ["--id", "val.npz", "--ood", "ood.npz"]
    (line,) = warnings("eval", *sets)
    assert line == (
        f"warning: val.npz: negative energy*||h||_0.3, max_logit*||h||_0.3 in {N} of {N} rows, "
        "where a larger norm makes a row look less in-distribution; --norm none (of 'fastood fit', for a detector) "
        "leaves the norm out"
    )
    assert warnings("eval", *sets, "--norm", "none") == []
    assert warnings("eval", *sets, "--method", "gen", "--method", "msp") == []
    assert len(warnings("eval", *sets, "--method", "gen", "--norm", "2")) == 1
    (line,) = warnings("score", "val.npz", "out.npz")
    assert f"val.npz: negative energy*||h||_0.3 in {N} of {N} rows" in line
    assert warnings("score", "val.npz", "out.npz", "--norm", "none") == []
    assert warnings("score", "val.npz", "out.npz", "--method", "all", "--norm", "none") == []


def test_a_few_rows_below_0_matter_to_score_and_not_to_eval(data):
    f = np.full((200, C), 5.0)
    f[:2] -= 60
    np.savez("val.npz", logits=f, feats=np.ones((200, D)))
    one = ["--method", "energy"]
    assert "in 2 of 200 rows" in warnings("score", "val.npz", "out.npz")[0]
    assert warnings("eval", "--id", "val.npz", "--ood", "near.npz", *one) == []
    f[2] -= 60
    np.savez("val.npz", logits=f, feats=np.ones((200, D)))
    assert "in 3 of 200 rows" in warnings("eval", "--id", "val.npz", "--ood", "near.npz", *one)[0]
    # What OOD rows are below is no fault.
    assert warnings("eval", "--id", "near.npz", "--ood", "val.npz", *one, "--norm", "none") == []


def test_probabilities_and_log_probabilities_are_told_from_logits(data):
    f, _ = data
    log_p = f - logsumexp(f)[:, None]
    for dtype in (np.float64, np.float32, np.float16):
        np.save("p.npy", np.exp(log_p).astype(dtype))
        np.save("log_p.npy", log_p.astype(dtype))
        np.save("f.npy", f.astype(dtype))
        (line,) = warnings("score", "p.npy", "out.npz", "--method", "tv")
        assert line.startswith("warning: p.npy: 'logits' looks like probabilities")
        (line,) = warnings("score", "log_p.npy", "out.npz", "--method", "tv")
        assert line.startswith("warning: log_p.npy: 'logits' looks like log-probabilities")
        assert warnings("score", "f.npy", "out.npz") == []
    (line,) = warnings("eval", "--id", "p.npy", "--ood", "a=p.npy", "--ood", "f.npy", "--method", "msp")
    assert line.startswith("warning: p.npy, p.npy: 'logits' looks like probabilities")


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("classes", [10, 80])
def test_swapped_names_are_told(relu, classes):
    """Features of both signs or after a ReLU, and a linear layer of them; the names right and swapped."""
    g = torch.Generator().manual_seed(5)
    h = torch.randn(120, 50, generator=g, dtype=torch.float64)
    h = h.relu() if relu else h
    f = h @ torch.randn(50, classes, generator=g, dtype=torch.float64) + 1
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        logits, feats = f.to(dtype), h.to(dtype)
        assert oddity(logits, feats, "z", "h") is None
        told = oddity(feats, logits, "z", "h")
        if classes == 80 and not relu:  # neither width nor sign tells
            assert told is None
        else:
            assert told is not None
            assert "'z' [N, 50] looks like the features of 'h'" in told


def test_a_swap_is_said_once(data):
    f, h = data
    np.savez("val.npz", logits=np.maximum(h, 0), feats=f)
    (line,) = warnings("eval", "--id", "val.npz", "--ood", "ood=val.npz", "--method", "msp", "--norm", "none")
    assert line.startswith("warning: val.npz, val.npz: 'logits' [N, 9] looks like the features of 'feats' [N, 6]")
    assert "--logits-key and --feats-key" in line


def test_an_unlike_first_chunk_is_no_reason_to_fail(data):
    for logits, feats in (
        (np.full((9, 12), np.nan), np.ones((9, 3))),
        (np.full((40, 12), -np.inf), np.ones((40, 3))),
        (np.zeros((40, 12)), np.zeros((40, 3))),
        (np.full((40, 12), 1e308), np.full((40, 3), -1e308)),
        (np.ones((40, 1)), np.full((40, 3), np.nan)),
        (np.zeros((0, 12)), np.zeros((0, 3))),
    ):
        np.savez("odd.npz", logits=logits, feats=feats)
        assert warnings("score", "odd.npz", "out.npz", "--method", "msp") == []


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
    np.savez("long.npz", logits=RNG.normal(size=(5000, 4)))
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


def test_a_missing_argument_is_a_usage_error(data):
    result = run("score", "val.npz", code=2)
    assert "Missing argument 'OUT'" in result.stderr


def test_a_bar_on_a_terminal_ends_before_the_complaint(data):
    pty = pytest.importorskip("pty", reason="needs a POSIX terminal")
    terminal, stderr = pty.openpty()
    np.savez("long.npz", logits=np.zeros((9, C)), feats=np.full((9, D), np.nan))
    command = [sys.executable, "-m", "fastood", "score", "long.npz", "out.npy", "--method", "all"]
    result = subprocess.run(command, stderr=stderr, stdout=subprocess.PIPE, env={**os.environ, "TERM": "xterm"})
    text = os.read(terminal, 100_000).decode()
    os.close(terminal)
    os.close(stderr)
    assert result.returncode == 2
    assert "0/9" in text
    shown_again = text.index("\x1b[?25h")  # the cursor, which the bar hides
    assert "error: a .npy file holds one score" in text[shown_again:]


# ---- eval


def auroc(inside, outside):
    """From the definition: the share of pairs in the right order."""
    return (inside[:, None] > outside).mean() + (inside[:, None] == outside).mean() / 2


def test_eval_writes_the_table_it_prints(data):
    f, h = data
    ood = {"near": save("near.npz", 2, 1), "far": save("far.npz", 1, 2)}
    sets = ["--id", "val.npz", "--ood", "near.npz", "--ood", "far=far.npz"]
    outputs = ["--json", "t.json", "--csv", "t.csv", "--html", "t.html"]
    result = run("eval", *sets, "--method", "energy", "--norm", "none", "--norm", "2", *outputs)
    with open("t.csv", newline="") as file:
        rows = {(row["ood"], row["score"]): row for row in csv.DictReader(file)}
    with open("t.json", encoding="utf-8") as file:
        assert len(json.load(file)["results"]) == len(rows) == 6
    html = Path("t.html").read_text(encoding="utf-8")
    assert "<html" in html
    assert "Figure 2 of the paper" in html
    for label, score_of in {
        "energy": lambda f, h: logsumexp(f),
        "energy*||h||_2": lambda f, h: logsumexp(f) * norm(h, 2),
    }.items():
        truth = {name: auroc(score_of(f, h), score_of(*x)) for name, x in ood.items()}
        truth["average"] = np.mean(list(truth.values()))
        for name, value in truth.items():
            assert float(rows[name, label]["auroc"]) == pytest.approx(value, abs=1e-12)
            assert f"{value:.6f}" in result.stdout
            assert name in result.stdout
    for word in ("AUROC", "FPR95", "AUPR-in", "AUPR-out", "higher for in-distribution"):
        assert word in result.stdout


def test_eval_of_one_set_has_no_average_and_defaults_to_everything(data):
    result = run("eval", "--id", "val.npz", "--ood", "a[b]=near.npz", "--csv", "t.csv")
    with open("t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["ood"] for row in rows} == {"a[b]"}
    assert {"msp", "msp*||h||_0.3", "||h||_0.3", "exgrad"} <= {row["score"] for row in rows}
    assert "a[b]" in result.stdout
    assert "average" not in result.stdout


def test_eval_takes_a_file_whose_name_holds_an_equals_sign(data):
    os.rename("near.npz", "lr=0.1.npz")
    assert "lr=0.1" in run("eval", "--id", "val.npz", "--ood", "lr=0.1.npz", "--method", "msp").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ood", "near.npz", "--ood", "near=far.npz"], "--ood: 'near' names two sets"),
        (["--ood", "x=nope.npz"], "nope.npz: no such file"),
        (["--ood", "near.npz", "--json", "nowhere/t.json"], "nowhere"),
        (["--ood", "near.npz", "--csv", "val.csv"], "val.csv: is an input"),
        (["--ood", "near.npz", "--html", "near.html"], "near.html: is an input"),
        (["--ood", "near.npz", "--html", "e.pdf"], "e.pdf: the file's name must end with .html or .htm"),
        (["--ood", "near.npz", "--csv", "e.json"], "e.json: the file's name must end with .csv"),
        (["--ood", "near.npz", "--json", "e"], "e: the file's name must end with .json"),
        (["--ood", "near="], "--ood: 'near=' lacks the FILE of NAME=FILE"),
        (["--ood", "=near.npz"], "--ood: '=near.npz' lacks the NAME of NAME=FILE"),
        (["--ood", "near.npz", "--norm", "x"], "--norm must be a number >= 0, 'inf' or 'none', got 'x'"),
        (["--ood", "near.npz", "--method", "nope"], "--method must be one of 'all', 'msp'"),
        (["--ood", "near.npz", "--device", "abacus"], "--device must be a torch device"),
        (["--ood", "near.npz", "--backend", "abacus"], "must be 'auto' or one of ['"),
        (["--ood", "near.npz", "--nan", "omit"], "--nan must be one of 'keep', 'drop', 'fail', got 'omit'"),
        (["--ood", "near.npz", "--temperature", "nan"], "--temperature must be a finite number > 0, got nan"),
        (
            ["--ood", "near.npz", "--method", "gradnorm", "--method", "exgrad", "--norm", "2"],
            "--norm: gradnorm, exgrad has a norm of its own",
        ),
    ],
)
def test_eval_mistakes(data, arguments, message):
    os.symlink("val.npz", "val.csv")
    os.symlink("near.npz", "near.html")
    before = sorted(os.listdir())
    assert message in complaint("eval", "--id", "val.npz", *arguments)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(("name", "key"), [("logits", "logits"), ("feats", "feats"), ("feats", "h")])
def test_eval_of_sets_of_different_widths(data, name, key):
    f, h = data
    keys = {"logits": "logits", "feats": "feats", name: key}
    np.savez("val.npz", **{keys["logits"]: f, keys["feats"]: h})
    arrays = {"logits": f, "feats": h}
    np.savez("odd.npz", **{keys[x]: a[:, :3] if x == name else a for x, a in arrays.items()})
    # Above NaN, which scoring would find.
    np.savez("nan.npz", **{keys[x]: a * np.nan for x, a in arrays.items()})
    files = ["--id", "val.npz", "--ood", "nan.npz", "--ood", "odd.npz", f"--{name}-key", key]
    text = complaint("eval", *files)
    assert text == f"error: odd.npz: {key!r} must have {arrays[name].shape[1]} columns as in val.npz, got 3\n"


def test_eval_of_sets_that_hold_different_things(data):
    f, h = data
    np.savez("logits.npz", logits=f)
    np.savez("feats.npz", feats=h)
    without = "must hold {!r} as {} does, or --method and --norm do without"
    for inside, outside, lacking, having, key in (
        ("val", "logits", "logits", "val", "feats"),
        ("logits", "val", "logits", "val", "feats"),
        ("val", "feats", "feats", "val", "logits"),
    ):
        text = complaint("eval", "--id", f"{inside}.npz", "--ood", f"{outside}.npz")
        assert text == f"error: {lacking}.npz: {without.format(key, f'{having}.npz')}\n"
    sets = ["--id", "val.npz", "--ood", "logits.npz"]
    assert "logits.npz: must hold 'feats'" in complaint("eval", *sets, "--method", "msp")
    assert "logits.npz: must hold 'feats'" in complaint("eval", *sets, "--method", "exgrad")
    # What no score takes may be there or not.
    assert "msp" in run("eval", *sets, "--method", "msp", "--norm", "none").stdout
    assert "||h||_0.3" in run("eval", "--id", "val.npz", "--ood", "feats.npz", "--method", "norm").stdout


def test_eval_marks_the_best_of_each_set(data):
    levels = {"val": 5, "low": 1, "high": 9}
    for name, level in levels.items():
        logits = np.zeros((9, 3))
        logits[:, 0] = level + np.arange(9) / 9
        np.savez(name, logits=logits, feats=np.ones((9, 2)))
    sets = ["--id", "val.npz", "--ood", "low.npz", "--ood", "high.npz"]
    text = run("eval", *sets, "--method", "msp", "--method", "gen", "--method", "norm", "--norm", "1").stdout
    marked = [line.split("│")[2].strip() for line in text.splitlines() if "*│" in line.replace(" ", "")]
    # the mean: all are 0.5; low: msp and gen are right throughout; high: wrong throughout, where the norm ties
    assert marked == ["msp*||h||_1", "gen*||h||_1", "||h||_1", "msp*||h||_1", "gen*||h||_1", "||h||_1"]
    assert "* marks the best AUROC" in text


def test_eval_ends_with_what_to_do(data):
    import torch

    from fastood.evaluation import evaluate, score_rows

    f, h = RNG.normal(size=(2, 150, C)), RNG.normal(size=(2, 150, D))
    f[0, :, 0] += 4
    for name, *x in zip(("in", "out"), f, h, strict=True):
        np.savez(name, logits=x[0], feats=x[1])
    result = run("eval", "--id", "in.npz", "--ood", "out.npz", "--method", "msp", "--json", "t.json")
    scores = [score_rows([tuple(map(torch.from_numpy, x))], methods=["msp"]) for x in zip(f, h, strict=True)]
    found = evaluate(scores[0], {"out": scores[1]}).recommendation
    assert result.stdout.endswith(f"\n\n{found}\n")
    with open("t.json", encoding="utf-8") as file:
        assert json.load(file)["recommendation"]["threshold"] == found.threshold
    assert f"Accept where {found.score} >= {found.threshold!r}: keeps 143 of the 150 ID rows" in result.stdout


def test_eval_shows_a_bar_for_every_reading(data, monkeypatch):
    from rich.progress import Progress

    bars = []
    add_task = Progress.add_task

    def counted(self, name, total):
        bars.append((name, total))
        return add_task(self, name, total=total)

    monkeypatch.setattr(Progress, "add_task", counted)
    run("eval", "--id", "val.npz", "--ood", "near.npz", "--ood", "far.npz", "--html", "t.html")
    assert bars == 2 * [("val.npz", N), ("near.npz", N), ("far.npz", 25)]


def auroc_in(path):
    with open(path, newline="") as file:
        return {row["score"]: float(row["auroc"]) for row in csv.DictReader(file)}


def test_eval_drops_nan_rows_keeps_them_as_the_lowest_or_fails(data, monkeypatch):
    from fastood import plots

    grids = []
    heatmap = plots.heatmap
    monkeypatch.setattr(plots, "heatmap", lambda grid, *more: grids.append(grid) or heatmap(grid, *more))
    f, h = data
    g, k = save("near.npz", 2, 1)
    f[:3] = np.nan
    np.savez("val.npz", logits=f, feats=h)
    k[7] = np.nan
    np.savez("near.npz", logits=g, feats=k)
    command = ["eval", "--id", "val.npz", "--ood", "near.npz", "--method", "energy", "--csv", "t.csv"]
    e, d = (logsumexp(x) for x in (f, g))
    whole = np.arange(N) != 7
    result = run(*command)
    assert f"val.npz: 3 of {N} rows have a NaN score (energy, energy*||h||_0.3) and are left out" in result.stdout
    assert f"near.npz: 1 of {N} rows have a NaN score (energy*||h||_0.3) and are left out" in result.stdout
    # The row without a norm is out of the energies, too: all scores are of the same rows.
    assert auroc_in("t.csv")["energy"] == pytest.approx(auroc(e[3:], d[whole]), abs=1e-12)
    run(*command, "--html", "t.html")
    result = run(*command, "--nan", "keep", "--html", "t.html")
    assert "are counted as the lowest score" in result.stdout
    low = np.where(np.isnan(e), -np.inf, e)
    assert auroc_in("t.csv")["energy"] == pytest.approx(auroc(low, d), abs=1e-12)
    u, v = (np.where(np.isnan(x), -np.inf, x) for x in (e * norm(h, 0.3), d * norm(k, 0.3)))
    assert auroc_in("t.csv")["energy*||h||_0.3"] == pytest.approx(auroc(u, v), abs=1e-12)
    dropped, kept = (grid[0, plots.FIGURE_2_NORMS.index(0.3)] for grid in grids)
    assert kept == pytest.approx(auroc(u, v), abs=1e-12)
    assert dropped == pytest.approx(auroc(u[3:], v[whole]), abs=1e-12)
    text = complaint(*command, "--nan", "fail")
    assert "val.npz: row 0, counted from 0, has a NaN score; see --nan" in text
    np.savez("near.npz", logits=np.full((4, C), np.nan), feats=k[:4])
    assert complaint(*command) == "error: near.npz: every row has a NaN score\n"


def test_eval_says_what_it_read_and_computes_where_it_is_told(data, monkeypatch):
    asked = []
    import fastood.evaluation as evaluation

    scores = evaluation.scores

    def noted(*args, **options):
        asked.append((args[0].device.type, options["backend"]))
        return scores(*args, **options)

    monkeypatch.setattr(evaluation, "scores", noted)
    command = ["eval", "--id", "val.npz", "--ood", "near.npz", "--method", "msp", "--norm", "none"]
    result = run(*command, "--device", "cpu", "--backend", "reference")
    assert result.stdout.startswith(
        f"val.npz: logits [{N}, {C}], feats [{N}, {D}] (not used)\n"
        f"near.npz: logits [{N}, {C}], feats [{N}, {D}] (not used)\n"
    )
    assert asked == 2 * [("cpu", "reference")]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device: torch finds no GPU here for 'cuda'" in complaint(*command, "--device", "cuda")


# ---- fit, inspect, and what a detector decides


@pytest.fixture
def det(data):
    """det.safetensors, fitted on val.npz with tpr 0.9: its scores and its threshold, the fourth lowest of 40."""
    f, h = data
    run("fit", "val.npz", "--out", "det.safetensors", "--norm", "2", "--tpr", "0.9", "--temperature", "2")
    s = 2 * logsumexp(f / 2) * norm(h, 2)
    return s, np.sort(s)[3]


def test_fit_is_the_detector_of_all_rows(data, det):
    limit = det[1]
    loaded = fastood.Detector.load("det.safetensors")
    assert (loaded.method, loaded.norm, loaded.temperature, loaded.bias, loaded.tpr) == ("energy", 2, 2, False, 0.9)
    assert (loaded.rows, loaded.classes, loaded.dim) == (N, C, D)
    assert loaded.threshold == pytest.approx(limit, rel=1e-12)
    before = Path("det.safetensors").read_bytes()
    command = ["fit", "val.npz", "--out", "det.safetensors", "--norm", "2", "--tpr", "0.9", "--temperature", "2"]
    result = run(*command, "--chunk-rows", "7", "--backend", "reference")
    assert fastood.Detector.load("det.safetensors").threshold == pytest.approx(limit, rel=1e-12)
    share = 4 / 41  # which is refused, Beta(4, 37)
    assert result.stdout == (
        f"det.safetensors: energy*||h||_2, fitted on {N} rows\n"
        f"accepts scores >= {loaded.threshold:.6g}: at least 90% of rows drawn like those that it was fitted on, on "
        f"the average over sets of {N}; the share of one set has a standard deviation of "
        f"{100 * (share * (1 - share) / 42) ** 0.5:.2g}%\n"
        f"val.npz: logits [{N}, {C}], feats [{N}, {D}]\n"
    )
    run(*command)
    assert Path("det.safetensors").read_bytes() == before
    # What --norm stands for follows from the file.
    run("fit", "val.npz", "--out", "det.safetensors")
    assert fastood.Detector.load("det.safetensors").norm == 0.3
    result = run("fit", "val.npz", "--out", "det.safetensors", "--method", "gen")
    assert f"feats [{N}, {D}] (not used)" in result.stdout
    assert fastood.Detector.load("det.safetensors").norm is None
    run("fit", "val.npz", "--out", "det.safetensors", "--method", "exgrad", "--bias")
    assert fastood.Detector.load("det.safetensors").bias


def test_fit_by_class_on_rows_that_are_right(data):
    f, h = data
    y = f.argmax(-1)
    y[:5] = (y[:5] + 1) % C
    y[5:] = np.where(y[5:] == 2, 3, y[5:])  # nothing of class 2 is right
    np.savez("val.npz", z=f, h=h, y=y)
    keys = ["--logits-key", "z", "--feats-key", "h", "--labels-key", "y", "--chunk-rows", "9"]
    result = run("fit", "val.npz", "--out", "det.safetensors", *keys, "--method", "tv", "--per-class", "--tpr", "0.5")
    right = y == f.argmax(-1)
    assert f"fitted on {right.sum()} of {N} rows, those that the classifier gets right\n" in result.stdout
    assert "feats 'h' [40, 9], labels 'y'\n" in result.stdout
    own = sum((y[right] == k).any() for k in range(C))
    assert own < C
    assert f"in each of the {own} of {C} classes with a threshold of their own; {C - own} have too few" in result.stdout
    fitted = fastood.Detector("tv", norm=0.3, per_class=True, tpr=0.5).fit(f, h, y)
    facts = json.loads(run("inspect", "det.safetensors", "--json").stdout)
    np.testing.assert_allclose(facts["threshold"], fitted.threshold.numpy(), rtol=1e-12)
    assert facts["per_class"] is True
    assert f"{C - own} have too few rows and go by the threshold of all" in run("inspect", "det.safetensors").stdout
    run("score", "val.npz", "out.npz", "--detector", "det.safetensors", *keys[:4])
    with np.load("out.npz") as out:
        np.testing.assert_array_equal(out["accept"], fitted.accept(f, h))
        np.testing.assert_array_equal(out["p_value"], fitted.p_value(f, h))


def test_fit_drops_rows_that_are_not_finite_or_fails(holes):
    holes[7, 0] = np.inf
    np.savez("holes.npz", logits=holes, y=holes.argmax(-1))
    command = ["fit", "holes.npz", "--out", "det.safetensors", "--method", "energy", "--tpr", "0.9"]
    for rows in (2, 100):
        text = complaint(*command, "--chunk-rows", rows)
        assert text == "error: holes.npz: the score of row 3, counted from 0, is not finite; see --nan\n"
    assert not Path("det.safetensors").exists()
    result = run(*command, "--nan", "drop", "--chunk-rows", "6", "--labels-key", "y")
    assert f"fitted on {N - 4} of {N} rows" in result.stdout
    assert f"holes.npz: 4 of {N} rows have a score that is not finite and are left out" in result.stdout
    s = np.sort(logsumexp(np.delete(holes, [3, 4, 6, 7], 0)))
    assert fastood.Detector.load("det.safetensors").threshold == pytest.approx(s[int(0.1 * (N - 4 + 1)) - 1], rel=1e-12)


def test_fit_warns_of_the_data(data):
    f, h = data
    np.savez("val.npz", logits=f - 60, feats=h)
    (line,) = warnings("fit", "val.npz", "--out", "det.safetensors")
    assert f"val.npz: negative energy*||h||_0.3 in {N} of {N} rows" in line
    np.savez("val.npz", logits=f - logsumexp(f)[:, None], feats=h)
    (line,) = warnings("fit", "val.npz", "--out", "det.safetensors", "--method", "msp")
    assert line.startswith("warning: val.npz: 'logits' looks like log-probabilities")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tpr", "0.99"], "tpr=0.99 takes at least 99 in-distribution rows, got 40"),
        (["--tpr", "1"], "--tpr must be between 0 and 1, got 1.0"),
        (["--tpr", "nan"], "--tpr must be between 0 and 1, got nan"),
        (["--method", "all"], "--method must be one of 'msp', 'energy'"),
        (["--method", "exgrad", "--norm", "2"], "--norm: exgrad has a norm of its own"),
        (["--temperature", "-1"], "--temperature must be a finite number > 0, got -1.0"),
        (["--nan", "keep"], "--nan must be one of 'drop', 'fail', got 'keep'"),
        (["--out", "det.pkl"], "det.pkl: the file's name must end with .safetensors"),
        (["--out", "nowhere/det.safetensors"], "nowhere"),
        (["--labels-key", "y"], "val.npz: must hold 'y', found 'logits', 'feats', 'names', 'wrong'"),
        (["--labels-key", "names"], "val.npz: 'names' must hold integers, the true classes, got strings"),
        (["--labels-key", "wrong"], "labels must be classes 0..5, got 9..9"),
        (["--device", "abacus"], "--device must be a torch device"),
        (["--backend", "abacus"], "must be 'auto' or one of ['"),
    ],
)
def test_fit_mistakes(data, arguments, message):
    save("val.npz", 5, 0, names=np.array(["a"] * N), wrong=np.full(N, 9))
    before = sorted(os.listdir())
    out = [] if "--out" in arguments else ["--out", "det.safetensors"]
    assert message in complaint("fit", "val.npz", *out, *arguments)
    assert sorted(os.listdir()) == before


def test_inspect_says_what_the_file_holds(det):
    facts = json.loads(run("inspect", "det.safetensors", "--json").stdout)
    threshold = facts.pop("threshold")
    assert threshold == pytest.approx(det[1], rel=1e-12)
    assert facts == {
        "file": "det.safetensors",
        "format": 1,
        "fastood": fastood.__version__,
        "method": "energy",
        "norm": 2,
        "temperature": 2,
        "bias": False,
        "params": {},
        "tpr": 0.9,
        "per_class": False,
        "classes": C,
        "dim": D,
        "rows": N,
    }
    text = run("inspect", "det.safetensors").stdout
    assert f"norm: 2\ntemperature: 2.0\nbias: False\ntpr: 0.9\nper class: False\nclasses: {C}\n" in text
    assert f"\naccepts scores >= {threshold:.6g}: at least 90% of rows" in text
    run("fit", "val.npz", "--out", "det.safetensors", "--norm", "inf")
    assert json.loads(run("inspect", "det.safetensors", "--json").stdout)["norm"] == "inf"
    os.rename("det.safetensors", "Infinity.safetensors")
    assert json.loads(run("inspect", "Infinity.safetensors", "--json").stdout)["file"] == "Infinity.safetensors"
    os.rename("Infinity.safetensors", "det.safetensors")
    assert "norm: inf\n" in run("inspect", "det.safetensors").stdout
    run("fit", "val.npz", "--out", "det.safetensors", "--norm", "none")
    assert "norm: none\n" in run("inspect", "det.safetensors").stdout
    assert "val.npz: cannot be read as a detector" in complaint("inspect", "val.npz")
    assert "nope.safetensors: no such file" in complaint("inspect", "nope.safetensors")


def expected_decisions(det, f, h):
    calibration, limit = det
    s = 2 * logsumexp(f / 2) * norm(h, 2)
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
    assert sorted(os.listdir()) == before


def test_a_detector_that_needs_feats_says_so(det, data):
    np.save("logits.npy", data[0])
    text = complaint("score", "logits.npy", "out.csv", "--detector", "det.safetensors")
    wanted = "'feats' must have the 9 columns that the detector was fitted on, got none of them"
    assert text == f"error: logits.npy: {wanted}\n"
    sets = ["--id", "val.npz", "--ood", "logits.npy", "--method", "msp", "--norm", "none"]
    assert complaint("eval", *sets, "--detector", "det.safetensors") == text


def test_eval_says_what_a_detector_accepts(det):
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


# ---- demo, info, version, help


def test_demo_prints_the_table_and_the_files(data, monkeypatch):
    from fastood import demo
    from fastood.evaluation import evaluate

    def quick(out, seed, progress):
        progress("working")
        assert seed == 3
        inside = {"msp": [0.9, 0.8], "energy": [3.0, 1.0], "energy*||h||_0.3": [1.0, 2.0]}
        noise = {"msp": [0.7], "energy": [4.0], "energy*||h||_0.3": [0.5]}
        blur = {"msp": [0.7], "energy": [2.0], "energy*||h||_0.3": [1.5]}
        decided = fastood.Detector("energy"), {"ID": (19, 20), "noise": (1, 1), "blur": (0, 1)}
        return demo.Demo(evaluate(inside, {"noise": noise, "blur": blur}), [out / "picture.png"], *decided)

    monkeypatch.setattr(demo, "run", quick)
    result = run("demo", "--out", "here", "--seed", "3")
    assert "noise" in result.stdout
    assert "0.500000" in result.stdout
    assert os.path.join("here", "picture.png") in result.stdout
    assert result.stdout.endswith(
        "AUROC, mean over the OOD sets: energy alone 0.250000; "
        "energy*||h||_0.3, the default of fastood.score, 0.750000.\n"
    )
    assert result.stderr == "working\n"


def test_demo_wants_a_folder(data):
    assert complaint("demo", "--out", "val.npz") == "error: val.npz: is a file; a folder is wanted to write to\n"


def test_info_and_version():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["fastood"] == fastood.__version__
    assert facts["numpy"] == np.__version__
    assert facts["threads"] >= 1
    assert facts["backends"]["cpu"]["reference"]["usable"] is True
    text = run("info").stdout
    for name in facts:
        assert name.removesuffix("s").replace("_", " ") in text
    if not facts["cuda"]:
        assert "cuda: none" in text
    native = importlib.import_module("fastood.kernels.cpu")._native
    assert facts.get("C++_kernels") == (native and native.level())
    assert f"instruction set: {facts['instruction_set']}\n" in text
    assert run("--version").stdout == f"fastood {fastood.__version__}\n"


@pytest.mark.parametrize("command", ["score", "fit", "inspect", "eval", "demo", "info"])
def test_help_shows_examples(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run(command, "--help").stdout
    assert f"fastood {command}" in text
    assert "[bold]" not in text


HELP = """
import sys
sys.argv = ["fastood", "--help"]
from fastood.__main__ import main
try:
    main()
finally:
    print(sorted({"sklearn", "matplotlib", "pyarrow", "jinja2"} & set(sys.modules)))
"""


def test_help_as_a_process_loads_neither_plots_nor_metrics():
    out = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True).stdout
    assert "fastood demo" in out
    assert out.endswith("[]\n")


def test_without_its_packages_it_says_what_to_install():
    script = "import sys; sys.modules['typer'] = None\nfrom fastood.__main__ import main\nmain()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == 'The command line needs more packages: pip install "fastood[cli]"\n'


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_killed_run_leaves_nothing(data, name):
    number = getattr(signal, name)
    np.save("big.npy", np.zeros((500_000, 2), np.float32))
    before = sorted(os.listdir())
    with subprocess.Popen(
        [sys.executable, "-m", "fastood", "score", "big.npy", "out.csv", "--chunk-rows", "1"],
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # which may be ignored here, under nohup for one
    ) as process:
        deadline = time.monotonic() + 60
        while sorted(os.listdir()) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(os.listdir()) != before
        process.send_signal(number)
        process.wait(60)
    assert process.returncode == 128 + number
    assert sorted(os.listdir()) == before

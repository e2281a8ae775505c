"""A folder of Parquet files on a Ray cluster of real processes: workers, the driver and nodes that are killed."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'fastood[ray]'")

ROOT = Path(__file__).parent.parent
FILES, ROWS, C, D = 8, 50, 5, 7

MODELS = """
import os, signal, sys, time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def logits_as_they_are(before):
    def model():
        def run(x):
            before(x)
            return x, None

        return run

    return model


def kill_once(x):
    if 3 in x[:, 0] and not (HERE / "killed").exists():
        (HERE / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def kill_always(x):
    if 3 in x[:, 0]:
        (HERE / "killed").open("a").write("x")
        os.kill(os.getpid(), signal.SIGKILL)


killed_once = logits_as_they_are(kill_once)
killed_always = logits_as_they_are(kill_always)
slow = logits_as_they_are(lambda x: time.sleep(0.1))
"""


@pytest.fixture
def shards(tmp_path):
    """Files in two partitions, whose IDs count through; the first logit of a file's last row is its number."""
    rng = np.random.default_rng(0)
    for i in range(FILES):
        logits = rng.normal(size=(ROWS, C)).astype(np.float32) * 4
        logits[-1, 0] = i
        ids = np.arange(i * ROWS, (i + 1) * ROWS)
        held = pa.table({"id": ids, "name": [f"{k}.png" for k in ids], "logits": tensors(logits)})
        path = tmp_path / "in" / f"part={i % 2}" / f"{i}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(held, path, row_group_size=20)
    (tmp_path / "models.py").write_text(MODELS)
    yield tmp_path
    try:
        wait_for(lambda: not processes(tmp_path), 30)
    finally:
        for process in processes(tmp_path):
            os.kill(process, signal.SIGKILL)


def tensors(x):
    storage = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [x.shape[1]]), storage)


def lse(x):
    top = x.max(-1, keepdims=True)
    return top[:, 0] + np.log(np.exp(x - top).sum(-1))


def environment(folder):
    return {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "TEST_FOLDER": str(folder)}


def processes(folder):
    """All that were started for this test, by what their environment says."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"TEST_FOLDER={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def command(*arguments):
    return [sys.executable, "-m", "fastood", "score", "in", "out", "--engine", "ray", "--workers", "2", *arguments]


def score(folder, *arguments, code=0):
    done = subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def check(folder, without=()):
    """Every row of every file is there once, with its score, its name and its partition, and nothing else is."""
    found = 0
    for i in range(FILES):
        name = Path(f"part={i % 2}", f"{i}.parquet")
        if i in without:
            assert not (folder / "out" / name).exists()
            continue
        source = pq.ParquetFile(folder / "in" / name).read()
        scored = pq.ParquetFile(folder / "out" / name).read()
        assert scored.column_names == ["id", "name", "energy"]
        assert scored.drop_columns(["energy"]).equals(source.drop_columns(["logits"]))
        logits = source["logits"].combine_chunks().to_numpy_ndarray().astype(float)
        np.testing.assert_allclose(scored["energy"].to_numpy(), lse(logits), rtol=1e-6)
        found += scored.num_rows
    files = sorted(str(x.relative_to(folder / "out")) for x in (folder / "out").rglob("*") if x.is_file())
    good = [i for i in range(FILES) if i not in without]
    assert files == sorted(["_manifest.json", *(f"part={i % 2}/{i}.parquet" for i in good)])
    manifest = json.loads((folder / "out" / "_manifest.json").read_text())
    assert manifest["complete"] == (not without)
    assert sum(x["rows"] for x in manifest["files"].values()) == found == ROWS * len(good)
    return manifest


def model(name):
    return "--model", f"models:{name}", "--inputs-key", "logits", "--norm", "none", "--chunk-rows", "20"


def test_a_worker_that_is_killed_is_replaced(shards):
    """In the middle of a file, a chunk of which it has written."""
    done = score(shards, *model("killed_once"))
    assert (shards / "killed").exists()
    check(shards)
    assert done.stdout.endswith("out: 400 rows\nin: 8 files\n")  # before it Ray speaks of the dead


@pytest.mark.slow
def test_a_driver_that_is_killed_is_followed_by_one_that_goes_on(shards):
    """What the first has scored the second leaves alone; what was half written is not there."""
    out, log = shards / "out", shards / "log"
    with log.open("w") as output:
        driver = subprocess.Popen(
            command(*model("slow")), cwd=shards, env=environment(shards), stdout=output, stderr=output
        )
        wait_for(lambda: len([*out.glob("part=*/*.parquet")]) >= 3 or driver.poll() is not None, 120)
        driver.kill()
        driver.wait()
    wait_for(lambda: not processes(shards), 60)
    before = {x: x.stat().st_mtime_ns for x in out.glob("part=*/*.parquet")}
    assert 3 <= len(before) < FILES, log.read_text()
    done = score(shards, *model("slow"))
    assert done.stdout == f"out: 400 rows\nin: 8 files, {len(before)} of which had been scored before\n"
    assert {x: x.stat().st_mtime_ns for x in before} == before
    check(shards)


@pytest.mark.slow
def test_a_file_that_kills_every_worker_is_a_bad_one(shards):
    done = score(shards, *model("killed_always"), "--bad-files", "skip")
    assert (shards / "killed").read_text() == "xxx"
    assert "part=1/3.parquet: 3 workers that took it died" in done.stderr
    manifest = check(shards, without=[3])
    assert "3 workers" in manifest["bad"]["part=1/3.parquet"]


@pytest.mark.slow
def test_bad_files_fail_or_are_skipped_and_bad_rows_are_counted(shards):
    bad, holes = shards / "in" / "part=0" / "2.parquet", shards / "in" / "part=1" / "5.parquet"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-50])
    held = pq.ParquetFile(holes).read()
    logits = held["logits"].combine_chunks().to_numpy_ndarray().copy()
    logits[[0, 7]] = np.nan
    pq.write_table(held.set_column(2, "logits", tensors(logits)), holes)
    done = score(shards, code=2)
    assert "2.parquet: " in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    done = score(shards, "--bad-files", "skip")
    assert "warning: 1 of 8 files are bad and left out: " in done.stderr
    assert "in: 2 of 350 rows have a NaN score and are kept\n" in done.stdout
    assert check(shards, without=[2])["files"]["part=1/5.parquet"] == {"rows": 50, "nan": 2}
    bad.write_bytes(whole)
    done = score(shards)
    assert "in: 8 files, 7 of which had been scored before" in done.stdout
    check(shards)
    # The folder belongs to these settings.
    done = score(shards, "--method", "msp", code=2)
    assert "holds scores made with other settings" in done.stderr


PIPELINE = """
import ray, fastood.ray

ray.init(num_cpus=2, include_dashboard=False)
(
    ray.data.read_parquet("in")
    .map_batches(
        fastood.ray.Scorer,
        fn_constructor_kwargs={"methods": ["energy", "msp"], "norm": None},
        batch_format="pyarrow",
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    .write_parquet("out")
)
"""


@pytest.mark.slow
def test_rows_of_a_pipeline_of_ones_own(shards):
    subprocess.run([sys.executable, "-c", PIPELINE], cwd=shards, env=environment(shards), check=True, timeout=300)
    scored = pa.concat_tables(pq.ParquetFile(x).read() for x in (shards / "out").glob("*.parquet")).sort_by("id")
    assert scored["id"].to_pylist() == [*range(FILES * ROWS)]
    for i in range(FILES):
        source = pq.ParquetFile(shards / "in" / f"part={i % 2}" / f"{i}.parquet").read()
        logits = source["logits"].combine_chunks().to_numpy_ndarray().astype(float)
        part = scored.slice(i * ROWS, ROWS)
        np.testing.assert_allclose(part["energy"].to_numpy(), lse(logits), rtol=1e-6)
        np.testing.assert_allclose(part["msp"].to_numpy(), np.exp(logits.max(-1) - lse(logits)), rtol=1e-6)

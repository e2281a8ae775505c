"""A folder of Parquet files on a Ray cluster of real processes: workers, the driver and nodes that are killed."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formulas import lse
from typer.testing import CliRunner

import fastood
from fastood.cli import app
from fastood.files import FileError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'fastood[ray]'")

ROOT = Path(__file__).parent.parent
FILES, ROWS, C, D = 8, 50, 5, 7

PROGRAMS = ROOT / "tests" / "programs"


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
    shutil.copy(PROGRAMS / "ray_models.py", tmp_path)
    yield tmp_path
    try:
        wait_for(lambda: not processes(tmp_path), 30)
    finally:
        for process in processes(tmp_path):
            os.kill(process, signal.SIGKILL)


def tensors(x):
    storage = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [x.shape[1]]), storage)


def environment(folder):
    more = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    more["TEST_FOLDER"] = str(folder)
    # Through a proxy nodes would not find each other.
    return {name: x for name, x in os.environ.items() if not name.lower().endswith("_proxy")} | more


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


def run(folder, command, code=0):
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def score(folder, *arguments, code=0):
    return run(folder, command(*arguments), code)


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
    return "--model", f"ray_models:{name}", "--inputs-key", "logits", "--norm", "none", "--chunk-rows", "20"


# ---- all but Ray itself


@pytest.fixture
def here(shards, monkeypatch):
    """The command line on the shards, with a loop in this process for Ray's actors."""

    def one_by_one(work, files, workers, *, gpu, progress):
        yield from (fastood.ray._record(work, file) for file in files)

    monkeypatch.setattr(fastood.ray, "_on_actors", one_by_one)
    monkeypatch.chdir(shards)

    def score(*arguments, code=0, command="score"):
        words = ["in", "out"] if command == "score" else ["in"]
        result = CliRunner().invoke(app, [command, *words, "--engine", "ray", *arguments])
        assert result.exit_code == code, result.output
        return result

    return score


def test_a_folder_is_scored_once(here, shards):
    assert here().stdout == "out: 400 rows\nin: 8 files\n"
    check(shards)
    before = {x: x.stat().st_mtime_ns for x in (shards / "out").rglob("*.parquet")}
    assert here().stdout == "out: 400 rows\nin: 8 files, 8 of which had been scored before\n"
    assert {x: x.stat().st_mtime_ns for x in (shards / "out").rglob("*.parquet")} == before
    (shards / "out" / "part=0" / "4.parquet").unlink()
    assert "7 of which had been scored before" in here().stdout
    check(shards)
    assert (
        "holds scores made with other settings (methods ['energy'], not ['msp'])"
        in here("--method", "msp", code=2).stderr
    )


def test_a_bad_file_fails_or_is_skipped_and_is_made_good(here, shards):
    bad = shards / "in" / "part=0" / "2.parquet"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-50])
    assert "part=0/2.parquet: " in here(code=2).stderr
    done = here("--bad-files", "skip")
    assert "warning: 1 of 8 files are bad and left out: " in done.stderr
    assert "2.parquet" in check(shards, without=[2])["bad"]["part=0/2.parquet"]
    bad.write_bytes(whole)
    assert "in: 8 files, 7 of which had been scored before" in here().stdout
    check(shards)


def test_what_killed_workers_left_is_swept_away_and_counted(here, shards):
    (shards / "out" / "part=1").mkdir(parents=True)
    left = [shards / "out" / "part=1" / f".{x}.fastood-tmp" for x in ("3.parquet.0", "3.parquet.1", "3.parquet.abcdef")]
    for x in left:
        x.touch()
    here()
    check(shards)
    # Three that are still there are of workers that died in this run.
    target = str(shards / "out" / "part=1" / "3.parquet")
    for i in range(3):
        (shards / "out" / "part=1" / f".3.parquet.{i}.fastood-tmp").touch()
    with (
        pytest.raises(FileError, match="3 workers that took it died"),
        fastood.ray._surviving("in/3.parquet", target),
    ):
        pass


def test_a_folder_is_fitted_on(here, shards):
    here("--out", "det.safetensors", "--norm", "none", command="fit")
    parts = [pq.ParquetFile(x).read()["logits"] for x in (shards / "in").rglob("*.parquet")]
    whole = fastood.Detector("energy").fit(np.concatenate([x.combine_chunks().to_numpy_ndarray() for x in parts]))
    assert fastood.Detector.load("det.safetensors").threshold == whole.threshold
    assert "400 rows, 3" in here("--detector", "det.safetensors").stdout


def test_files_that_hold_other_columns_than_most_are_named(here, shards):
    """A file with feats among files without: by default its score is another, and a detector cannot be of both."""
    path = shards / "in" / "part=1" / "3.parquet"
    held = pq.ParquetFile(path).read()
    pq.write_table(held.append_column("feats", tensors(np.ones((ROWS, D), np.float32))), path)
    warning = "3.parquet: has scores called energy*||h||_0.3, most files energy\n"
    assert warning in here().stderr
    assert warning in here().stderr  # of what was scored before, too
    said = here("--out", "det.safetensors", command="fit", code=2).stderr
    assert re.search(r"/in/part=\d/\d\.parquet: is unlike the files before it: other must have norm=", said)
    here("--out", "det.safetensors", "--norm", "none", command="fit")


def test_other_columns_are_named_however_many_go_before():
    names = ["a", "b", "c", "d"]
    tally = fastood.ray._Tally([{"name": x, "path": f"{x}.parquet"} for x in "123"])
    for file, scores in zip("123", (names, [*names[:3], "e"], names), strict=True):
        tally.reports[file] = fastood.arrow.Report(1, 0, None, {}, None, scores, True)
    assert tally.summary().odd == {"has scores called e, most files d": ["2.parquet"]}


def test_without_a_gpu_nobody_waits_for_one(shards, monkeypatch):
    ray = SimpleNamespace(is_initialized=lambda: True, cluster_resources=lambda: {"CPU": 2.0})
    monkeypatch.setattr(fastood.ray, "library", lambda name: ray)
    with pytest.raises(ValueError, match=r"device: the Ray cluster has no GPU; .* workers says how many"):
        next(fastood.ray._on_actors(None, [{"path": "a"}], None, gpu=True, progress=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "in", "out", "--engine", "spark"], "--engine must be one of 'ray', got 'spark'"),
        (["score", "in", "out", "--engine", "ray", "--id-key", "id"], "carries every column through"),
        (["score", "in", "in/out", "--engine", "ray"], "must not be the folder that is scored, nor in it"),
        (["score", "none", "out", "--engine", "ray"], "none: no such file or folder"),
        (["score", "in", "out", "--engine", "ray", "--bad-files", "keep"], "--bad-files must be one of"),
        (["score", "in", "out", "--engine", "ray", "--model", "ray_models"], "--model must be MODULE:FUNCTION"),
        (["score", "in", "out", "--engine", "ray", "--model", "ray_models:none"], "ray_models:none cannot be imported"),
        (["score", "in/part=0/0.parquet", "a.csv", "--workers", "2"], "--workers: only with --engine ray"),
        (
            ["fit", "in", "--out", "a.safetensors", "--engine", "ray", "--method", "nnguide", "--train", "in"],
            "fit_files",
        ),
        (["fit", "in", "--out", "a.safetensors", "--engine", "ray", "--backend", "cpu"], "--backend"),
        (["score", "in", "out", "--engine", "ray"], 'ray is needed for this: pip install "fastood\\[ray\\]"'),
    ],
)
def test_mistakes(shards, monkeypatch, arguments, message):
    monkeypatch.chdir(shards)
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert re.search(message, result.stderr)


# ---- on Ray


@needs_ray
def test_a_worker_that_is_killed_is_replaced(shards):
    """In the middle of a file, a chunk of which it has written."""
    done = score(shards, *model("killed_once"))
    assert (shards / "killed").exists()
    check(shards)
    assert done.stdout.endswith("out: 400 rows\nin: 8 files\n")  # before it Ray speaks of the dead


@pytest.mark.slow
@needs_ray
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
    wait_for(lambda: not processes(shards), 90)  # agents of Ray's sometimes look for their head for a minute
    before = {x: x.stat().st_mtime_ns for x in out.glob("part=*/*.parquet")}
    assert 3 <= len(before) < FILES, log.read_text()
    done = score(shards, *model("slow"))
    assert done.stdout == f"out: 400 rows\nin: 8 files, {len(before)} of which had been scored before\n"
    assert {x: x.stat().st_mtime_ns for x in before} == before
    check(shards)


@pytest.mark.slow
@needs_ray
def test_a_file_that_kills_every_worker_is_a_bad_one(shards):
    done = score(shards, *model("killed_always"), "--bad-files", "skip")
    assert (shards / "killed").read_text() == "xxx"
    assert "part=1/3.parquet: 3 workers that took it died" in done.stderr
    manifest = check(shards, without=[3])
    assert "3 workers" in manifest["bad"]["part=1/3.parquet"]


@pytest.mark.slow
@needs_ray
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


@pytest.mark.slow
@needs_ray
def test_rows_of_a_pipeline_of_ones_own(shards):
    run(shards, [sys.executable, str(PROGRAMS / "ray_pipeline.py")])
    scored = pa.concat_tables(pq.ParquetFile(x).read() for x in (shards / "out").glob("*.parquet")).sort_by("id")
    assert scored["id"].to_pylist() == [*range(FILES * ROWS)]
    for i in range(FILES):
        source = pq.ParquetFile(shards / "in" / f"part={i % 2}" / f"{i}.parquet").read()
        logits = source["logits"].combine_chunks().to_numpy_ndarray().astype(float)
        part = scored.slice(i * ROWS, ROWS)
        np.testing.assert_allclose(part["energy"].to_numpy(), lse(logits), rtol=1e-6)
        np.testing.assert_allclose(part["msp"].to_numpy(), np.exp(logits.max(-1) - lse(logits)), rtol=1e-6)


@pytest.mark.slow
@needs_ray
def test_a_detector_of_a_folder_is_that_of_its_rows(shards):
    (shards / "in" / "part=0" / "bad.parquet").write_bytes(b"no")
    fit = [sys.executable, "-m", "fastood", "fit", "in", "--out", "det.safetensors", "--norm", "none", "--engine"]
    for options, code in (["ray"], 2), (["ray", "--bad-files", "skip"], 0):
        done = run(shards, [*fit, *options], code)
        assert "bad.parquet: " in done.stderr
    assert done.stdout.startswith("det.safetensors: energy, fitted on 400 rows of 8 files\n")
    parts = [pq.ParquetFile(x).read()["logits"] for x in (shards / "in").glob("part=*/[0-9].parquet")]
    logits = np.concatenate([x.combine_chunks().to_numpy_ndarray() for x in parts])
    whole = fastood.Detector("energy").fit(logits)
    assert fastood.Detector.load(shards / "det.safetensors").threshold == whole.threshold
    # And by it the folder is decided.
    (shards / "in" / "part=0" / "bad.parquet").unlink()
    done = score(shards, "--detector", "det.safetensors")
    assert done.stdout.startswith(f"out: 400 rows, {int(whole.accept(logits).sum())} of them accepted\n")


@pytest.fixture
def two_nodes(shards):
    """A Ray cluster of two nodes with a CPU each, in network namespaces of their own: their names, and its address."""
    names = [f"fastood-{os.getpid()}-{x}" for x in "ab"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    may = shutil.which("ip") and subprocess.run(["ip", "netns", "add", names[0]], check=False).returncode == 0
    if not may:
        pytest.skip("needs the right to make network namespaces")
    short = tempfile.mkdtemp(prefix="ray-")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "name", "ve0", "netns", names[0], "type", "veth", "peer", "name", "ve1", "netns", names[1])
        for name, link, address in zip(names, ("ve0", "ve1"), ("10.77.0.1", "10.77.0.2"), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            for device in (link, "lo"):
                ip("-n", name, "link", "set", device, "up")
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1"]
        # A folder of its own, with a name short enough for sockets: the usual one says where drivers find a cluster.
        head = ["--node-ip-address=10.77.0.1", "--head", "--port=6379", "--include-dashboard=false"]
        head += [f"--temp-dir={short}"]
        run(shards, ["ip", "netns", "exec", names[0], *start, *head])
        other = ["--node-ip-address=10.77.0.2", "--address=10.77.0.1:6379"]
        run(shards, ["ip", "netns", "exec", names[1], *start, *other])
        yield names, "10.77.0.1:6379"
    finally:
        for name in names:
            kill_all_in(name)
            ip("netns", "delete", name)
        shutil.rmtree(short)


def kill_all_in(name):
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout.split()
    for process in pids:
        with contextlib.suppress(OSError):
            os.kill(int(process), signal.SIGKILL)


@pytest.mark.slow
@needs_ray
def test_a_node_that_is_lost_is_made_up_for_by_the_other(shards, two_nodes):
    (a, b), address = two_nodes

    def places():
        return set((shards / "where").read_text().split()) if (shards / "where").exists() else set()

    with (shards / "log").open("w") as log:
        driver = subprocess.Popen(
            ["ip", "netns", "exec", a, *command(*model("where"))],
            cwd=shards,
            env={**environment(shards), "RAY_ADDRESS": address},
            stdout=log,
            stderr=log,
        )
        # Until the second node, too, has scored some.
        wait_for(lambda: len(places()) == 2 or driver.poll() is not None, 120)
        assert driver.poll() is None, (shards / "log").read_text()
        kill_all_in(b)
        driver.wait(240)
    assert driver.returncode == 0, (shards / "log").read_text()
    check(shards)

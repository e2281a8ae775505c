"""What Ray costs beside a plain loop, and from it a model of a billion rows: `python -m benchmarks.scale > FILE`.

Needs ray, 2 GB of disk under --folder, and some minutes. Constants are minima of repeats on one machine, files come
from its page cache; what the model assumes beside them are arguments.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import fastood
from fastood.arrow import Scorer, score_file

C, D = 1000, 2048
ROWS = 8192  # of a file: 100 MB
SETTINGS = {"norm": 0.3}
MANY = 24  # files of a run
BATCHES = 64, 512, 4096


def write(path, rows, seed, dtype=np.float32, group=2048):
    rng = np.random.default_rng(seed)
    held = {"id": np.arange(rows)}
    for name, columns in (("logits", C), ("feats", D)):
        x = rng.standard_normal((rows, columns), np.float32).astype(dtype)
        storage = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), columns)
        kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(x.dtype), [columns])
        held[name] = pa.ExtensionArray.from_storage(kind, storage)
    path.parent.mkdir(exist_ok=True)
    # Random numbers do not compress, nor do features much.
    pq.write_table(pa.table(held), path, row_group_size=group, compression="none", use_dictionary=False)


def least(repeats, call, clock=time.process_time):
    """Seconds of the fastest call: of the processor, which others on the machine take least away from."""
    seconds = []
    for _ in range(repeats):
        start = clock()
        call()
        seconds.append(clock() - start)
    return min(seconds)


def in_memory(repeats):
    """Seconds a row of the kernel, one thread."""
    f, h = torch.randn(ROWS, C), torch.randn(ROWS, D)
    return least(repeats * 3, lambda: fastood.score(f, h, norm=0.3)) / ROWS


def reading(folder, repeats):
    def read():
        with pq.ParquetFile(folder / "big" / "0.parquet") as file:
            for _ in file.iter_batches(batch_size=ROWS // 2):
                pass

    return least(repeats, read) / ROWS


def plain_loop(folder, name, repeats, clock=time.process_time):
    scorer = Scorer(**SETTINGS)

    def loop():
        shutil.rmtree(folder / "out", ignore_errors=True)
        for path in sorted((folder / name).iterdir()):
            score_file(path, folder / "out" / path.name, scorer)

    return least(repeats, loop, clock)


def on_ray(folder, name, workers, repeats):
    from fastood.ray import score_files

    def run():
        shutil.rmtree(folder / "out", ignore_errors=True)
        score_files(folder / name, folder / "out", workers=workers, progress=False, **SETTINGS)

    return least(repeats, run, time.perf_counter)


def plain_batches(folder, size, repeats):
    """Seconds a row of a loop over record batches, reading, scoring and collecting."""
    scorer = Scorer(**SETTINGS)

    def loop():
        for path in sorted((folder / "big").iterdir()):
            with pq.ParquetFile(path) as file:
                pa.Table.from_batches([scorer(batch) for batch in file.iter_batches(batch_size=size)])

    return least(repeats, loop)


def pipeline(folder, size, repeats):
    """Seconds of Ray Data's own reading, one actor and collecting of columns."""
    import ray

    def run():
        rows = ray.data.read_parquet(str(folder / "big")).map_batches(
            Scorer,
            fn_constructor_kwargs=SETTINGS,
            batch_format="pyarrow",
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        assert sum(batch.num_rows for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow")) > 0

    return least(repeats, run, time.perf_counter)


def peak(path):
    """MB of memory, at the most, of a process that scores a file."""
    code = f"""
from fastood.arrow import Scorer, score_file
score_file({str(path)!r}, {str(path) + ".out"!r}, Scorer(norm=0.3))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    os.unlink(f"{path}.out")
    return int(done.stdout) / 1024


def table(lines):
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest)) + "\n"


def measure(folder, repeats):
    import ray

    for i in range(4):
        write(folder / "big" / f"{i}.parquet", ROWS, i)
        write(folder / "halves" / f"{i}.parquet", 2 * ROWS, i, np.float16)
    for name in ("big", "halves"):  # the same files under many names: a longer run, from no more memory
        (folder / f"many_{name}").mkdir()
        for i in range(MANY):
            os.link(folder / name / f"{i % 4}.parquet", folder / f"many_{name}" / f"{i}.parquet")
    write(folder / "large" / "0.parquet", 4 * ROWS, 0)
    write(folder / "large" / "1.parquet", 4 * ROWS, 0, group=4 * ROWS)
    for i in range(100):
        write(folder / "tiny" / f"{i}.parquet", 4, i)
    write(folder / "one" / "0.parquet", 4, 0)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    measured = ("one", 0), ("big", 0), ("large", 0), ("large", 1)
    found = {
        "kernel": in_memory(repeats),
        "read": reading(folder, repeats),
        "loop": plain_loop(folder, "big", repeats) / (4 * ROWS),
        "loop_half": plain_loop(folder, "halves", repeats) / (4 * 2 * ROWS),
        "loop_file": plain_loop(folder, "tiny", repeats) / 100,
        "peak": [peak(folder / name / f"{i}.parquet") for name, i in measured],
        "batches": {size: plain_batches(folder, size, repeats) for size in BATCHES},
    }
    start = time.perf_counter()
    ray.init(include_dashboard=False, logging_level="error", log_to_driver=False, object_store_memory=1 << 30)
    found["init"] = time.perf_counter() - start
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        found["fixed"] = on_ray(folder, "one", 1, repeats)
        found["tiny"] = on_ray(folder, "tiny", 1, repeats)
        found["plain"] = plain_loop(folder, "many_big", repeats, time.perf_counter)
        found["ray"] = {n: on_ray(folder, "many_big", n, repeats) for n in (1, 2)}
        found["ray_halves"] = on_ray(folder, "many_halves", 2, repeats)
        found["pipeline"] = {size: pipeline(folder, size, repeats) for size in BATCHES}
    finally:
        ray.shutdown()
    return found


def rate(seconds):
    return f"{1 / seconds:,.0f}"


def report(found, args):
    rows, row = MANY * ROWS, 4 * (C + D)
    versions = f"{os.cpu_count()} CPUs ({platform.machine()}), torch {torch.__version__}, ray {version('ray')}"
    print("# A billion rows: what was measured, and what follows\n")
    print(f"By `python -m benchmarks.scale`, {time.strftime('%Y-%m-%d')}: {versions}{args.note and ', ' + args.note}.")
    print(f"Energy times ||h||_0.3, C={C}, D={D}, random numbers; uncompressed files of {ROWS} rows, in the")
    print(f"page cache. Minima of {args.repeats}.\n")
    lines = [["one thread, float32", "rows per second of the processor", "GB/s"]]
    for name, key, size in [
        ("the kernel, tensors in memory", "kernel", row),
        ("reading Parquet", "read", row),
        ("`score_file`: read, score, write", "loop", row),
        ("the same, float16", "loop_half", row / 2),
    ]:
        lines.append([name, rate(found[key]), f"{size / found[key] / 1e9:.2f}"])
    print(table(lines))

    per_file = max((found["tiny"] - found["fixed"]) / 99, 0)
    lines = [["Ray", "seconds"]]
    lines.append(["starting it on one machine", f"{found['init']:.1f}"])
    lines.append(["`score_files` of one file of 4 rows: plan, actor, imports", f"{found['fixed']:.1f}"])
    lines.append(["each further file of 4 rows, one actor", f"{per_file:.4f}"])
    lines.append(["the same in a plain loop", f"{found['loop_file']:.4f}"])
    print(table(lines))

    lines = [[f"{MANY} files, {rows:,} rows", "seconds", "rows/s"]]
    lines.append(["plain loop, one thread", f"{found['plain']:.1f}", rate(found["plain"] / rows)])
    for n, seconds in found["ray"].items():
        lines.append([f"`score_files`, actors: {n}", f"{seconds:.1f}", rate(seconds / rows)])
    print(table(lines))

    lines = [
        [f"{4 * ROWS:,} rows, rows a batch", "`map_batches`, one actor, seconds", "plain loop, processor's seconds"]
    ]
    for size, seconds in found["pipeline"].items():
        lines.append([str(size), f"{seconds:.1f}", f"{found['batches'][size]:.1f}"])
    print(table(lines))
    first, *_, last = BATCHES
    beyond = [found["pipeline"][size] - found["batches"][size] for size in (first, last)]
    more = 4 * ROWS // first - 4 * ROWS // last
    print(f"So Ray adds {1e3 * (beyond[0] - beyond[1]) / more:.1f} ms a batch, by the first and the last of these.\n")
    sizes = ["4 rows", f"{ROWS * row / 1e6:.0f} MB", f"{4 * ROWS * row / 1e6:.0f} MB", "the same in one row group"]
    lines = [["a file of", "most memory of the process that scores it, MB"]]
    print(table([*lines, *([size, f"{x:.0f}"] for size, x in zip(sizes, found["peak"], strict=True))]))

    def model(n_rows, n_files, seconds_a_row, cores, bytes_a_row=0, gigabytes=1):
        parts = {
            "processors": (n_rows * seconds_a_row + n_files * found["loop_file"]) / cores,
            "wires": n_rows * bytes_a_row / (gigabytes * 1e9),
            "driver": n_files * max(per_file - found["loop_file"], 0),
        }
        return found["fixed"] + max(parts.values()), parts

    print("## The model\n")
    print(
        "seconds = fixed + max(processors, wires, driver), with processors = (rows × seconds a row + files × seconds a"
    )
    print("file in a plain loop) / cores, wires = bytes / bandwidth, driver = files × what Ray adds to each.\n")
    guess, _ = model(MANY * 2 * ROWS, MANY, found["loop_half"], 2)
    print(f"Checked on this machine with a run that no constant came from, {MANY} files of {2 * ROWS} rows in")
    print(f"float16 on two actors: predicted {guess:.1f} s, took {found['ray_halves']:.1f} s.\n")
    print(f"10⁹ rows, nodes of {args.cores} cores with {args.gbit:g} Gbit/s each, files of {args.file_mb:g} MB,")
    print(f"{args.price:g} $ per core and hour; these four are assumptions:\n")
    lines = [["", "TB", "files", "nodes", "processors, h", "wires, h", "driver, h", "in all, h", "$", "bottleneck"]]
    for name, key, size in [("float32", "loop", row), ("float16", "loop_half", row / 2)]:
        n_files = math.ceil(1e9 * size / (args.file_mb * 1e6))
        for nodes in (1, 4, 16):
            cores = nodes * args.cores
            total, parts = model(1e9, n_files, found[key], cores, size, nodes * args.gbit / 8)
            hours = [f"{x / 3600:.2f}" for x in (*parts.values(), total)]
            cost = f"{total / 3600 * cores * args.price:.1f}"
            slowest = max(parts, key=parts.__getitem__)
            lines.append([name, f"{size / 1e3:.1f}", f"{n_files:,}", str(nodes), *hours, cost, slowest])
    print(table(lines))
    print(f"Written are {(8 + 4):d} GB: an int64 ID and a float32 score a row.")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to put 2 GB of files; left out, a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="what else is to be known of the machine")
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--gbit", type=float, default=10)
    parser.add_argument("--file-mb", type=float, default=500)
    parser.add_argument("--price", type=float, default=0.05)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), args.repeats)
    report(found, args)


if __name__ == "__main__":
    main()

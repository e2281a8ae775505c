"""Everything that a GPU is asked, in one command of at most 6 minutes, or 9: python -m benchmarks.gpu_day OUT [--all]

It fills the compile cache in parallel, times kernels (GPU time, by replays of a CUDA graph) and calls of one row (the
clock, with no waiting between calls), then plain PyTorch and torch.compile of the same formulas, and runs the GPU tests
in parallel in what time is left. A result that disagrees with float64 is a line that says so, and is not timed.
OUT/gpu_day.json holds all figures, OUT/gpu_day.md the README's tables. A phase is one process or several with a limit
of their own, which write a line for each figure: a run that is cut leaves what it has measured.

--all               then gpu_linear.py and gpu_tune.py too, to OUT/linear.txt and OUT/tune.txt: 9 minutes in all
--only PHASES       some of them, separated by commas: compile, kernels, calls, rivals, tests, linear, tune
--commit HASH       where there is no .git to ask; or the environment variable FASTOOD_COMMIT
--rivals-path PATH  PYTHONPATH of the processes that run rivals, or tests of compiled models: torch.compile needs the
                    Triton that torch came with, which another one, in front of it on PYTHONPATH, hides
--rehearse          without a GPU: tiny shapes in Triton's interpreter, eager in place of torch.compile, a few tests.
                    That measures nothing, and its tables hold no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastood
from benchmarks import gpu_report, rivals
from benchmarks.harness import OURS, check, clock, gpu_seconds
from fastood.api import PAPER_NORMS, PAPER_V
from fastood.kernels import Request, Stat, prepared, select

# Seconds of each phase, and of all: what one leaves those after it have, up to their own.
LIMITS = {"compile": 70, "kernels": 60, "calls": 45, "rivals": 90, "tests": 200, "linear": 60, "tune": 120}
USUAL, MORE = ("compile", "kernels", "calls", "rivals", "tests"), ("linear", "tune")
IN_ALL, WITH_MORE = 350, 540
REHEARSAL = {"TRITON_INTERPRET": "1", "FASTOOD_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
REHEARSED = "--rehearse" in sys.argv or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if REHEARSED else "cuda"
ONE_THREAD = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # of each process that compiles: pools of their own are too many
PROCESSES = 2 if REHEARSED else max(2, (os.cpu_count() or 2) - 2)
ROOT = Path(__file__).parent.parent
START = float(os.environ.setdefault("GPU_DAY_START", str(time.time())))
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


# ---- what is timed


class Work(NamedTuple):
    """fastood's call and the formula in PyTorch, at a shape."""

    what: str
    N: int
    C: int
    D: int
    ours: Callable[..., Any]
    formula: Callable[..., Tensor]
    # Beside logits and features: "q", labels; "G" of BatchGrad, or "G, any sign" of the features; "layer", in place of
    # logits the weight and bias that features are multiplied by.
    third: str = ""
    operations: int = 0  # of BatchGrad FP32 instructions of its arithmetic for each of N C D; of a layer operations
    rival_rows: int = 1 << 30  # as many as the formula has memory for


def of_statistics(*names: Stat) -> Callable[..., Any]:
    request = Request(names, (), (), (len(names), -1))
    return lambda f, q=None: list(prepared(select("auto", f.device, f.dtype), request, f.shape[1], 0)(f, None, q))


@cache
def detector(G: Tensor) -> fastood.BatchGrad:
    return fastood.BatchGrad(G)


def batchgrad(f: Tensor, h: Tensor, G: Tensor) -> Tensor:
    return detector(G).score(f, h, oriented=False)


@cache
def scaled(C: int, D: int) -> fastood.Fitted:
    return fastood.Fitted("scale", head=(torch.zeros(C, D), None))


def scale(f: Tensor, h: Tensor) -> Tensor:
    return scaled(f.shape[1], h.shape[1]).score(f, h)


def of_layer(formula: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The formula of the product, which has float32 logits as fastood.score_linear has, and by tensor cores."""

    def call(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if h.is_cuda and h.dtype == torch.bfloat16:
            return formula(torch.mm(h, w.T, out_dtype=torch.float32) + b)
        return formula(torch.nn.functional.linear(*(x.to(torch.promote_types(h.dtype, b.dtype)) for x in (h, w, b))))

    return call


def works() -> Iterator[Work]:
    four = partial(fastood.scores, methods=PAPER_V, norm=None)
    for what, method, formula in (
        ("energy", "energy", rivals.energy),
        ("MSP", "msp", rivals.msp),
        ("TV", "tv", rivals.tv),
    ):
        yield Work(what, 262144, 1000, 0, partial(fastood.score, method=method), formula)
    yield Work("4 V", 262144, 1000, 0, four, rivals.v_terms)
    seven = of_statistics("energy", "tv", "msp", "s2", "plogp", "sumlogp", "fmax")
    for C in (1000, 1001):
        yield Work("7 statistics", 262144, C, 0, seven, rivals.every_v)
    short = (1 << 24, 10), (1 << 21, 100), (1 << 20, 200)
    long = (12288, 21841), (4096, 50257), (2048, 128256), (1024, 262144)
    for N, C in short + long:
        yield Work("energy", N, C, 0, fastood.score, rivals.energy)
        yield Work("4 V", N, C, 0, four, rivals.v_terms)
    for what, orders in (("norms {1, 2}", (1, 2)), ("norm 0.3", (0.3,)), ("12 norms", PAPER_NORMS)):
        yield Work(what, 131072, 0, 2048, partial(fastood.norms, orders=orders), partial(rivals.norms, orders=orders))
    yield Work("energy × norm 0.3", 65536, 1000, 2048, fastood.score, rivals.energy_norm)
    yield Work("energy × norm 0.3", 524288, 10, 512, fastood.score, rivals.energy_norm)
    yield Work("sweep, 4 V × 12 norms", 65536, 1000, 2048, fastood.sweep, rivals.sweep)
    yield Work("GradNorm", 65536, 1000, 2048, partial(fastood.score, method="gradnorm"), rivals.gradnorm)
    l2, l3 = (("gradient", q, r, 1.0, "outside") for q, r in (("given", 2.0), ("predicted", 3.0)))
    yield Work("E_q of L2, q given", 131072, 1000, 0, of_statistics(l2), rivals.expected_norm, "q")
    yield Work("E_p of L3", 131072, 1000, 0, of_statistics(l3), partial(rivals.expected_norm, order=3))
    yield Work("SCALE", 65536, 1000, 2048, scale, lambda f, h: rivals.scale(f, h, f.new_zeros(f.shape[1])))
    yield Work("GEN", 65536, 1000, 0, partial(fastood.score, method="gen"), rivals.gen)
    for what, method, formula in (("energy", "energy", rivals.energy), ("TV", "tv", rivals.tv)):
        for C in (1000, 128256):
            ours = partial(fastood.score_linear, method=method, norm=None)
            yield Work(f"{what} of a layer", 4096, C, 2048, ours, of_layer(formula), "layer", 2)
    yield Work("BatchGrad, h ≥ 0", 4096, 1000, 2048, batchgrad, rivals.batchgrad, "G", 3, 64)
    yield Work("BatchGrad, any sign", 4096, 1000, 2048, batchgrad, rivals.batchgrad, "G, any sign", 4, 64)


def every_work(part: slice) -> Iterator[tuple[str, Work, str]]:
    """With a name that says what and where, and each type; in a rehearsal they take turns."""
    pairs = [(work, dtype) for work in works() for dtype in DTYPES]
    if REHEARSED:
        pairs = [pair for i, pair in enumerate(pairs) if i % 4 in (0, 3)]
    for work, dtype in pairs[part]:
        sizes = " ".join(f"{name}={size}" for name, size in zip("NCD", work[1:4], strict=True) if size)
        here = work._replace(N=3, C=min(work.C, 9), D=min(work.D, 20)) if REHEARSED else work
        yield f"{work.what}, {sizes}", here, dtype


def tensors(work: Work, dtype: str) -> dict[str, Tensor]:
    """What the call takes, in its order."""
    torch.manual_seed(0)
    N, C, D = work[1:4]
    random, given = partial(torch.randn, device=DEVICE), {}
    if C and work.third != "layer":
        given["logits"] = (random(N, C) * 2).to(DTYPES[dtype])
    if D:
        h = random(N, D)
        given["feats"] = (h if "sign" in work.third else h.relu() + 1e-3).to(DTYPES[dtype])
    if work.third == "q":
        given["q"] = torch.softmax(random(N, C), -1)
    elif work.third == "layer":
        given |= {"weight": (random(C, D) * 2 / D**0.5).to(DTYPES[dtype]), "bias": random(C)}
    elif work.third:
        given["G"] = rivals.anchor_gradient(random(C, C), random(C, D).relu(), torch.arange(C, device=DEVICE))
    return given


CONSTANT = ("G", "weight", "bias")  # that all rows share


def checked(name: str, call: Callable[[], Any], work: Work, given: dict[str, Tensor]) -> None:
    """Some rows against float64."""
    N = len(next(iter(given.values())))
    rows = torch.linspace(0, N - 1, min(N, 16), device=DEVICE).long()
    truth = work.formula(*(x.double() if kind in CONSTANT else x[rows].double() for kind, x in given.items()))
    out = call()
    out = list(out.values()) if isinstance(out, dict) else out
    out = torch.stack(out, -1) if isinstance(out, list) else out
    check({name: lambda: out.reshape(N, *truth.shape[1:])}, truth, rows)


# ---- phases, each in processes of its own


class Lines:
    """The file of a phase. What has a line already, from a process that a fault ended, is not done again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = {row["key"] for row in gpu_report.read_lines(path)}

    def __call__(self, key: str, measure: Callable[[], dict[str, Any]], **info: Any) -> None:
        if key in self.done:
            return
        try:
            row = measure()
        except Exception as failed:
            row = {"error": f"{type(failed).__name__}: {' '.join(str(failed).split())[:300]}"}
        if REHEARSED:
            row = {name if name == "error" else f"rehearsed {name}": x for name, x in row.items()}
        say(f"{key}: " + ", ".join(f"{n} {x:.4g}" if isinstance(x, float) else f"{n} {x}" for n, x in row.items()))
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, **info, **row}) + "\n")
        gc.collect()
        if not REHEARSED:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                sys.exit(3)  # a fault on the GPU, after which this process can do nothing there


def say(what: str) -> None:
    print(f"{time.time() - START:5.1f} s  {what}", flush=True)


def seconds(call: Callable[[], Any]) -> float:
    return clock(call, 1) if REHEARSED else gpu_seconds(call)


def fill_cache(lines: Lines, part: slice, of_rivals: bool = False) -> None:
    """Each kernel once; a small batch compiles what a large one runs, but for torch.compile, which looks at sizes."""

    def first_call(work: Work, dtype: str) -> dict[str, Any]:
        call, given = work.ours, tensors(work._replace(N=3), dtype)
        if of_rivals:
            call, given = rival("torch.compile", work, dtype), of_rival(work, dtype)
        return {"seconds": clock(partial(call, *given.values()), 1)}

    for what, work, dtype in every_work(part):
        lines(f"{what} {dtype}", partial(first_call, work, dtype))


def of_rival(work: Work, dtype: str) -> dict[str, Tensor]:
    return tensors(work._replace(N=min(work.N, work.rival_rows)), dtype)


def rival(candidate: str, work: Work, dtype: str) -> Callable[..., Tensor]:
    formula = work.formula if dtype == "float32" or work.third == "layer" else rivals.in_float(work.formula)
    torch.compiler.reset()  # or the second shape compiles to a slower kernel for any shape
    return formula if candidate == "eager" or REHEARSED else torch.compile(formula)


def time_rivals(lines: Lines, part: slice) -> None:
    def measure(candidate: str, work: Work, dtype: str) -> dict[str, Any]:
        given = of_rival(work, dtype)
        call = partial(rival(candidate, work, dtype), *given.values())
        checked(candidate, call, work, given)
        return {"seconds": seconds(call) * work.N / len(next(iter(given.values())))}

    for what, work, dtype in every_work(part):
        for candidate in ("eager", "torch.compile"):
            info = {"what": what, "dtype": dtype, "candidate": candidate, "triton": gpu_report.version("triton")}
            lines(f"{what} {dtype} {candidate}", partial(measure, candidate, work, dtype), **info)


def time_kernels(lines: Lines, part: slice) -> None:
    def ceilings() -> dict[str, Any]:
        x = torch.ones(1 << (10 if REHEARSED else 28), device=DEVICE)
        y = torch.empty_like(x)
        return {"read": x.nbytes / seconds(x.sum), "copied": 2 * x.nbytes / seconds(partial(y.copy_, x))}

    def measure(work: Work, dtype: str) -> dict[str, Any]:
        given = tensors(work, dtype)
        call = partial(work.ours, *given.values())
        checked(OURS, call, work, given)
        read = sum(x.nbytes for kind, x in given.items() if kind not in CONSTANT)
        return {"seconds": seconds(call), "bytes": read, "operations": work.operations * math.prod(work[1:4])}

    lines("ceilings, bytes/s", ceilings)
    for what, work, dtype in every_work(part):
        lines(f"{what} {dtype}", partial(measure, work, dtype), what=what, dtype=dtype)


def time_calls(lines: Lines, part: slice) -> None:
    one = Work("", 1, *((9, 20) if REHEARSED else (1000, 2048)), batchgrad, rivals.batchgrad, "G")
    f, h, G = tensors(one, "float32").values()
    of = {
        "energy × norm 0.3": partial(fastood.score, f, h),
        "MSP": partial(fastood.score, f, method="msp"),
        "sweep, 4 V × 12 norms": partial(fastood.sweep, f, h),
        "12 norms": partial(fastood.norms, h, PAPER_NORMS),
        "BatchGrad": partial(batchgrad, f, h, G),
        "eager softmax": partial(torch.softmax, f, -1),
        "eager MSP": partial(rivals.msp, f),
        "eager energy × norm 0.3": partial(rivals.energy_norm, f, h),
        "eager sweep": partial(rivals.sweep, f, h),
        "eager 12 norms": partial(rivals.norms, h),
    }

    def measure(call: Callable[[], Any]) -> dict[str, Any]:
        turns = []
        for _ in range(1 if REHEARSED else 7):
            call()
            if not REHEARSED:
                torch.cuda.synchronize()
            turns.append(clock(call, 1 if REHEARSED else 200))
        return {"seconds": statistics.median(turns), "graph_seconds": seconds(call)}

    for what, call in of.items():
        lines(what, partial(measure, call))


def run_tests(out: Path, limit: float, rivals_path: str | None) -> None:
    """Interrupted at the limit, so that pytest still prints what failed."""
    kernels = ["tests/kernels/triton", "tests/kernels/test_contract.py", "tests/test_linear.py"]
    graphs = ["tests/kernels/test_operator.py", "tests/test_cuda.py"]  # for which torch compiles too
    if importlib.util.find_spec("pytest_benchmark") is not None:
        graphs += ["benchmarks/test_compiled.py", "--benchmark-disable"]  # whether they are right: nothing is timed
    xdist = importlib.util.find_spec("xdist") is not None
    chosen = "triton and not compiles"  # for GPUs that are not there
    third = max(1, PROCESSES // 3)
    of_kernels = [["-n", str(PROCESSES - third), *kernels]] if xdist else [[file] for file in kernels]
    runs = [(None, ["-k", chosen, *some]) for some in of_kernels]
    runs += [(rivals_path, ["-k", "cuda or kernels_of_triton", *(["-n", str(third)] if xdist else []), *graphs])]
    if REHEARSED:  # in which those of graphs are skipped, and one process reads torch once
        some = "triton and (one_class or equal_logits or (norms_on_every_branch and 64)) or (cuda and not test_cuda)"
        runs = [(rivals_path, ["-k", some, *kernels, *graphs])]
    command = [sys.executable, "-m", "pytest", "-W", "ignore", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--hypothesis-profile=interpreter"]  # few examples: each may compile kernels
    logs, processes = [], []
    for path, some in runs:
        logs.append(out / f"tests-{len(logs)}.log")
        environment = os.environ | ONE_THREAD | ({} if path is None else {"PYTHONPATH": path})
        with logs[-1].open("w") as file:
            processes.append(
                subprocess.Popen([*command, *some], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
    finish(processes, limit, signal.SIGINT)
    for log in logs:
        text = [line.strip("= ") for line in log.read_text().splitlines()] or ["no output"]
        failed = [line[:300] for line in text if line.startswith(("FAILED", "ERROR"))]
        Lines(out / "tests.jsonl")(log.name, dict, summary=text[-1], failed=failed)
        say(text[-1])


def run_command(phase: str, out: Path, limit: float) -> None:
    """gpu_linear.py or gpu_tune.py: what it prints to a file of its own, and that it failed among the figures."""
    command = [sys.executable, "-m", f"benchmarks.gpu_{phase}", *([str(out)] if phase == "tune" else [])]
    log = out / f"{phase}.log" if phase == "tune" else out / f"{phase}.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(limit)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # with those that it started
        process.wait()
    if process.returncode:
        error = f"exit status {process.returncode}, limit {limit:.0f} s: see {log.name}"
        Lines(out / f"{phase}.jsonl")(f"gpu_{phase}", dict, error=error)


def finish(processes: list[subprocess.Popen[Any]], limit: float, how: signal.Signals) -> None:
    """Waits for all of them; `how` tells those that run on at the limit."""
    end = time.time() + limit
    for grace, tell in ((0, how), (20, signal.SIGKILL)):
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end + grace - time.time()))
        for process in processes:
            if process.poll() is None:
                process.send_signal(tell)


def run_phases(phases: list[str], out: Path, limit: float, rivals_path: str | None) -> None:
    """One, or in a rehearsal all that measure: in one process, which takes longer to begin than for a phase."""
    if phases == ["tests"]:
        return run_tests(out, limit, rivals_path)
    if phases[0] in MORE:
        return run_command(phases[0], out, limit)
    end, todo = time.time() + limit, [part for phase in phases for part in parts_of(phase)]
    if REHEARSED:
        todo = [",".join(todo)]
    while todo and time.time() < end:
        started = []
        for part in todo:
            environment = os.environ | ONE_THREAD
            if rivals_path is not None and "rivals" in part:
                environment["PYTHONPATH"] = rivals_path
            command = [sys.executable, "-m", "benchmarks.gpu_day", str(out), "--part", part]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment))
        finish(started, end - time.time(), signal.SIGTERM)
        ended = [(part, process.returncode) for part, process in zip(todo, started, strict=True)]
        todo = [part for part, status in ended if status == 3]
        for part, status in ended:
            if status not in (0, 3):
                error = f"exit status {status}, limit {limit:.0f} s"
                Lines(file_of(out, part.split(",")[-1]))("the rest", dict, error=error)
    return None


def parts_of(phase: str) -> list[str]:
    """PHASE/i/n: the i-th of n processes."""
    if phase != "compile":
        return [f"{phase}/0/1"]
    half = max(1, PROCESSES // 2)
    return [f"{name}/{i}/{half}" for name in ("compile", "compile_rivals") for i in range(half)]


def file_of(out: Path, part: str) -> Path:
    phase, i, _ = part.split("/")
    return out / f"{phase}-{i}.jsonl"


PHASES: dict[str, Callable[[Lines, slice], None]] = {
    "compile": fill_cache,
    "compile_rivals": partial(fill_cache, of_rivals=True),
    "kernels": time_kernels,
    "calls": time_calls,
    "rivals": time_rivals,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default=",".join(USUAL))
    parser.add_argument("--commit")
    parser.add_argument("--rivals-path")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a process that this one starts does
    given = parser.parse_args()
    out = given.out.resolve()
    if given.part:
        gc.freeze()  # or every collection goes through all of torch
        if REHEARSED:
            from tests.approximate import hasten  # which loads Triton

            hasten()
        for part in given.part.split(","):
            phase, i, n = part.split("/")
            PHASES[phase](Lines(file_of(out, part)), slice(int(i), None, int(n)))
        return 0
    groups = [[phase] for phase in (*given.only.split(","), *(MORE if given.all else ()))]
    for (phase,) in groups:
        if phase not in LIMITS:
            parser.error(f"--only must name some of {', '.join(LIMITS)}, got {phase!r}")
    if REHEARSED:
        os.environ.update(REHEARSAL)  # of the processes that measure; this one only starts them
    if not REHEARSED and not torch.cuda.is_available():
        parser.error("it needs a GPU; --rehearse runs without")
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.jsonl"), *out.glob("tests-*.log"), *out.glob("*.txt")):
        old.unlink()
    known, phases = gpu_report.machine(given.commit, REHEARSED), {}
    say(", ".join(f"{name} {value}" for name, value in known.items()))
    whole = gpu_report.write(out, known, phases, REHEARSED)
    whole_time = WITH_MORE if any(phase in MORE for (phase,) in groups) else IN_ALL
    if REHEARSED:
        measured = [phase for (phase,) in groups if phase in PHASES]  # tune does nothing else than measure
        groups = [
            group for group in (measured, *([phase] for phase in ("tests", "linear") if [phase] in groups)) if group
        ]
    for group in groups:
        before, name = time.time(), ", ".join(group)
        limit = 600 if REHEARSED else min(sum(LIMITS[phase] for phase in group), whole_time - (before - START))
        run_phases(group, out, limit, given.rivals_path)
        phases[name] = time.time() - before
        whole = gpu_report.write(out, known, phases, REHEARSED)
        say(f"{name} took {phases[name]:.0f} s")
    print((out / "gpu_day.md").read_text())
    return 1 if gpu_report.wrong(whole) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Parquet files by the thousand, scored on a Ray cluster: ``pip install "fastood[ray]"``."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from fastood._collect import shown
from fastood._columns import finite
from fastood._data import some
from fastood._inputs import choice, flag
from fastood._version import __version__
from fastood.arrow import (
    NAN,
    TEMPORARY,
    Path,
    Report,
    Scorer,
    atomically,
    filesystem,
    fit_file,
    score_batch,
    score_file,
)
from fastood.detector import Detector
from fastood.files import FileError, library
from fastood.successors import Fitted

__all__ = ["Fit", "Scorer", "Summary", "fit_files", "score_batch", "score_files"]

BAD_FILES = ("fail", "skip")

MANIFEST = "_manifest.json"
"""In the folder of scores; engines take names that begin with _ for no data."""

TRIES = 3
"""How often a file may take its worker down with it before it is counted as a bad one."""


class Summary(NamedTuple):
    """What ``score_files`` did.

    Attributes
    ----------
    files : int
        How many there are, the bad ones among them.
    new : int
        How many of them were scored by this call; the others were before, or are bad.
    rows, nan : int
        Rows, and how many of them have a NaN score, in all files but the bad ones.
    accepted : int or None
        How many of the rows a detector accepts.
    bad : dict
        File -> what is wrong with it.
    negative, odd
        What ``fastood score`` warns of: label -> rows below 0; a doubt -> the files that raise it.
    """

    files: int
    new: int
    rows: int
    nan: int
    accepted: int | None
    bad: dict[str, str]
    negative: dict[str, int]
    odd: dict[str, list[str]]


def score_files(
    source: Path,
    out: Path,
    *,
    workers: int | None = None,
    bad_files: str = "fail",
    nan: str = "keep",
    chunk_rows: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Summary:
    """Score every Parquet file under a folder into one of the same name under another, on a pool of Ray actors.

    An actor takes a file at a time, reads it in chunks, and writes what ``Scorer`` makes of them, so that rows never
    pass through Ray's object store, and memory is bounded by a chunk per actor. Every file appears whole, and says in
    its footer what it was made of. A run that failed, or was killed, or lost workers or nodes is finished by calling it
    again: what is there is not scored twice. `out` also holds ``_manifest.json``: settings, files, rows.

    Ray is started on this machine, unless it is running or ``RAY_ADDRESS`` names a cluster. Every node must reach
    `source` and `out`, and have fastood.

    Parameters
    ----------
    source : path
        A folder, with any partitions below it, or a file; local, shared, or "s3://bucket/folder" and the like.
    out : path
        A folder, made if need be.
    workers : int, optional
        Actors. Left out: one per CPU of the cluster, or with ``device="cuda"`` per GPU.
    bad_files : {"fail", "skip"}
        A file that cannot be read, or holds something else: an error that names it, or go on without it.
    nan, chunk_rows
        As in ``fastood.arrow.score_file``.
    progress : bool
        A bar on standard error where that is a terminal and rich is installed.
    **settings
        Of the ``Scorer``: methods, norm, detector, model, device, ...

    Returns
    -------
    Summary

    Raises
    ------
    FileError
        A ValueError: for a bad file, where there are no files, or where `out` holds scores of other settings.

    Examples
    --------
    >>> import fastood.ray
    >>> fastood.ray.score_files("logits/", "scores/", detector="detector.safetensors")  # doctest: +SKIP
    """
    choice("bad_files", bad_files, BAD_FILES)
    choice("nan", nan, NAN)
    flag("progress", progress)
    scorer = Scorer(**settings)
    source, out = _from_anywhere(source), _from_anywhere(out)
    files = _files(source, out)
    asked = finite({**scorer.settings, "nan": nan})
    _refuse_others(out, asked)
    found = _Tally(files)
    _write_manifest(out, asked, found)
    try:
        _sweep(out)
        work = _Score(scorer, out, nan, chunk_rows)
        for record in _on_actors(work, files, workers, gpu=scorer.device.type == "cuda", progress=progress):
            found.add(record)
            if found.bad and bad_files == "fail":
                break
        else:
            _sweep(out)
    finally:
        _write_manifest(out, asked, found)
    if found.bad and bad_files == "fail":
        raise FileError(next(iter(found.bad.values())))
    return found.summary()


class Fit(NamedTuple):
    """What ``fit_files`` made.

    Attributes
    ----------
    fitted : Detector or Fitted
        Of the rows of all files but the bad ones.
    files, rows : int
        How many files there are, the bad ones among them; how many rows were fitted on.
    lost : int
        How many rows were left out: null, or not finite.
    bad : dict
        File -> what is wrong with it.
    """

    fitted: Any
    files: int
    rows: int
    lost: int
    bad: dict[str, str]


def fit_files(
    source: Path,
    fitted: Detector | Fitted,
    *,
    workers: int | None = None,
    bad_files: str = "fail",
    progress: bool = True,
    **settings: Any,
) -> Fit:
    """A Detector, or a Fitted, of the rows of every Parquet file under a folder, on a pool of Ray actors.

    Each actor fits on a file, and what comes back is merged as it comes. A Detector of up to two million rows is to the
    bit that of one fit on them all, however they are split into files; of more it is a sketch, whose ranks are off by
    as little as ``fastood.Detector`` says. A Fitted is the same but for the rounding of its float64 sums.

    Parameters
    ----------
    source, workers, bad_files, progress
        As in ``score_files``.
    fitted : fastood.Detector or fastood.Fitted
        One with the settings that are wanted, and no rows yet. It stays as it is.
    **settings
        Of ``fastood.arrow.fit_file``: logits_key, feats_key, labels_key, nan, chunk_rows, device.

    Raises
    ------
    FileError
        A ValueError that names a bad file.

    Examples
    --------
    >>> import fastood
    >>> found = fastood.ray.fit_files("validation/", fastood.Detector("energy", norm=0.3))  # doctest: +SKIP
    >>> found.fitted.save("detector.safetensors")  # doctest: +SKIP
    """
    choice("bad_files", bad_files, BAD_FILES)
    flag("progress", progress)
    if not isinstance(fitted, Detector | Fitted):
        raise TypeError(f"fitted must be a fastood.Detector or a fastood.Fitted, got {type(fitted).__name__}")
    if fitted.rows:
        raise ValueError(f"fitted must have no rows yet, got {fitted!r}")
    source = _from_anywhere(source)
    files = _files(source)
    whole, lost, bad = copy.deepcopy(fitted), 0, {}
    work = _Fit(fitted, settings)
    gpu = str(settings.get("device", "cpu")).startswith("cuda")
    for record in _on_actors(work, files, workers, gpu=gpu, progress=progress):
        if record["error"] is None:
            part, its = pickle.loads(record["report"])
            lost += its
            if isinstance(part, Detector):
                part.successor = fitted.successor if isinstance(fitted, Detector) else None
            if part.rows:
                try:
                    whole = whole.merge(part) if whole.rows else part
                except ValueError as error:
                    path = _below(source, record["name"])
                    raise FileError(f"{path}: is unlike the files before it: {error}") from error
        elif not record["of_file"]:
            raise RuntimeError(record["error"])
        elif bad_files == "fail":
            raise FileError(record["error"])
        else:
            bad[_below(source, record["name"])] = record["error"]
    return Fit(whole, len(files), whole.rows, lost, bad)


class _Fit:
    """What an actor does with a file."""

    def __init__(self, fitted: Detector | Fitted, settings: Mapping[str, Any]) -> None:
        self._fitted, self._settings = fitted, settings

    def __call__(self, path: str, name: str) -> bytes:
        part, lost = fit_file(path, self._fitted, **self._settings)
        if isinstance(part, Detector):
            part.successor = None  # which the driver has, and may be large
        return pickle.dumps((part, lost))


class _Score:
    """What an actor does with a file."""

    def __init__(self, scorer: Scorer, out: Path, nan: str, chunk_rows: int | None) -> None:
        self._scorer, self._out, self._nan, self._chunk_rows = scorer, os.fspath(out), nan, chunk_rows

    def __call__(self, path: str, name: str) -> str:
        target = _below(self._out, name)
        with _surviving(path, target):
            report = score_file(path, target, self._scorer, nan=self._nan, chunk_rows=self._chunk_rows)
        return json.dumps(report._asdict())


@contextmanager
def _surviving(path: str, target: str) -> Iterator[None]:
    """A mark beside the target that stays where the process dies; a file that has left some of them is a bad one.

    An engine takes the death of a worker for the machine's fault, and tries again without end.
    """
    fs, goal = filesystem(target)
    folder, _, name = goal.rpartition("/")
    marks = [f"{folder}/.{name}.{i}{TEMPORARY}" for i in range(TRIES)]
    free = [x.path for x in fs.get_file_info(marks) if not x.is_file]
    if not free:
        raise FileError(f"{path}: {TRIES} workers that took it died, for want of memory or by a crash")
    fs.create_dir(folder, recursive=True)
    fs.open_output_stream(free[0]).close()
    try:
        yield
    finally:
        with suppress(OSError):
            fs.delete_file(free[0])


class _Tally:
    """What has become of each file so far."""

    def __init__(self, files: list[dict[str, str]]) -> None:
        self._paths = {file["name"]: file["path"] for file in files}
        self.reports: dict[str, Report] = {}
        self.bad: dict[str, str] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        if record["report"] is not None:
            self.reports[record["name"]] = Report(**json.loads(record["report"]))
        elif record["of_file"]:
            self.bad[record["name"]] = record["error"]
        else:
            raise RuntimeError(record["error"])

    def complete(self) -> bool:
        return len(self.reports) == len(self._paths)

    def summary(self) -> Summary:
        reports = self.reports.values()
        negative: Counter[str] = Counter()
        odd: dict[str, list[str]] = {}
        of_files = Counter(tuple(report.scores) for report in reports)
        of_most = max(of_files, key=lambda scores: of_files[scores], default=())
        for name, report in self.reports.items():
            negative.update(report.negative)
            if report.odd is not None:
                odd.setdefault(report.odd, []).append(self._paths[name])
            if tuple(report.scores) != of_most:  # by default, where it lacks feats and others do not
                own, others = (
                    some([x for x in these if x not in those])
                    for these, those in ((report.scores, of_most), (of_most, report.scores))
                )
                odd.setdefault(f"has scores called {own}, most files {others}", []).append(self._paths[name])
        accepted = [report.accepted for report in reports if report.accepted is not None]
        return Summary(
            files=len(self._paths),
            new=sum(report.new for report in reports),
            rows=sum(report.rows for report in reports),
            nan=sum(report.nan for report in reports),
            accepted=sum(accepted) if accepted else None,
            bad={self._paths[name]: error for name, error in self.bad.items()},
            negative=dict(negative),
            odd=odd,
        )


# ---- on Ray


def _on_actors(
    work: Any, files: list[dict[str, str]], workers: int | None, *, gpu: bool, progress: bool
) -> Iterator[dict[str, Any]]:
    """`work` of each file, in the order in which they are done."""
    ray = library("ray")
    data = library("ray.data")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level="error", log_to_driver=False)
    if workers is None:
        workers = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 0))
        if gpu and not workers:  # for which actors would wait without end
            raise ValueError("device: the Ray cluster has no GPU; where it will have some, workers says how many")
        workers = max(workers, 1)

    class Work:  # a class is what makes Ray Data keep an object per actor
        def __call__(self, file: dict[str, Any]) -> dict[str, Any]:
            return _record(work, file)

    with _quiet(data.DataContext.get_current()):
        # A file is a block, the unit that is sent out, and sent again where an actor or its node is lost.
        records = data.from_items(files, override_num_blocks=len(files)).map(
            Work,
            compute=data.ActorPoolStrategy(size=min(workers, len(files)), max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=1 if gpu else 0,
        )
        rows = records.iter_rows()
        yield from shown(rows, "files", len(files)) if progress else rows


def _record(work: Any, file: dict[str, Any]) -> dict[str, Any]:
    """What is sent back of a file: a report, or an error in words for people; Ray's own come with its stack."""
    done: dict[str, Any] = {"name": file["name"], "report": None, "error": None, "of_file": False}
    try:
        return {**done, "report": work(**file)}
    except Exception as error:
        reason = str(error) if isinstance(error, FileError) else f"{file['path']}: {error!r}"
        return {**done, "error": reason, "of_file": isinstance(error, FileError)}


@contextmanager
def _quiet(context: Any) -> Iterator[None]:
    """Ray Data without bars and plans of its own."""
    logger = logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)


# ---- folders


def _from_anywhere(path: Path) -> str:
    """What it is called in a process with another working directory."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)


def _files(source: Path, out: Path | None = None) -> list[dict[str, str]]:
    """The Parquet files below `source`: their paths, and what they are called from there. Large ones come first."""
    fs, top = filesystem(source)
    info = fs.get_file_info(top)
    if out is not None:
        out_fs, out_top = filesystem(out)
        if out_fs.get_file_info(out_top).type.name in ("File", "Unknown"):  # which a pipe or a device is
            raise FileError(f"{os.fspath(out)}: is no folder, which the files of scores are put into")
        if out_fs.equals(fs) and PurePosixPath(top) in (PurePosixPath(out_top), *PurePosixPath(out_top).parents):
            raise FileError(f"{os.fspath(out)}: must not be the folder that is scored, nor in it")
    if info.is_file:
        return [{"path": os.fspath(source), "name": info.base_name}]
    if info.type.name == "NotFound":
        raise FileError(f"{os.fspath(source)}: no such file or folder")
    selector = library("pyarrow.fs").FileSelector(top, recursive=True)
    found = [(x.size, x.path[len(top) :].lstrip("/")) for x in fs.get_file_info(selector) if x.is_file]
    # By the custom of data engines, names that begin with . or _ are no data.
    names = sorted(
        (-size, name)
        for size, name in found
        if name.endswith(".parquet") and not any(part[0] in "._" for part in name.split("/"))
    )
    if not names:
        raise FileError(f"{os.fspath(source)}: holds no .parquet files")
    return [{"path": _below(source, name), "name": name} for _, name in names]


def _below(folder: Path, name: str) -> str:
    """A path below a folder, which may be a URI with options after it."""
    text = os.fspath(folder)
    start, mark, options = text.partition("?") if "://" in text else (text, "", "")
    return f"{start.rstrip('/')}/{name}{mark}{options}"


def _refuse_others(out: Path, asked: dict[str, Any]) -> None:
    fs, path = filesystem(_below(out, MANIFEST))
    if not fs.get_file_info(path).is_file:
        return
    with fs.open_input_stream(path) as stream:
        before = json.loads(stream.read())["settings"]
    differing = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
    if differing:
        said = ", ".join(f"{name} {before.get(name)}, not {asked.get(name)}" for name in differing)
        raise FileError(f"{os.fspath(out)}: holds scores made with other settings ({said}); name another folder")


def _write_manifest(out: Path, asked: dict[str, Any], found: _Tally) -> None:
    files = {name: {"rows": report.rows, "nan": report.nan} for name, report in found.reports.items()}
    held = {
        "fastood": __version__,
        "settings": asked,
        "complete": found.complete(),
        "files": files,
        "bad": found.bad,
    }
    with atomically(*filesystem(_below(out, MANIFEST))) as stream:
        stream.write(json.dumps(held, indent=1).encode())


def _sweep(out: Path) -> None:
    """What killed workers have left behind."""
    fs, top = filesystem(out)
    for info in fs.get_file_info(library("pyarrow.fs").FileSelector(top, recursive=True)):
        if info.is_file and info.base_name.endswith(TEMPORARY):
            with suppress(OSError):
                fs.delete_file(info.path)

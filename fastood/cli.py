"""The command line: scores of files, detectors and their decisions, evaluation, a demonstration, what runs here."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from fastood import SCORES, SUCCESSORS, Detector, _columns, _data
from fastood._inputs import Order, choice, number, order_of

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from numpy import bool_
    from numpy.typing import NDArray
    from torch import Tensor

    from fastood.evaluation import Evaluation
    from fastood.files import Rows
    from fastood.successors import Fitted

    Columns = dict[str, NDArray[Any]]
    Chunks = Iterator[tuple[Tensor | None, Tensor | None]]
    _Odd = dict[str, list[Path]]


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run a command; what a user can cause ends in one line, without a traceback."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # typer ends these itself
            raise
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            typer.echo(f"error: {str(error).partition(chr(10))[0]}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help=(
        "Out-of-distribution scores from a classifier's logits and features.\n\n"
        "Files hold [bold]logits[/] \\[N, C] and [bold]feats[/] \\[N, D]: .npz, .npy (logits alone), .safetensors, .pt "
        "or .parquet (columns of lists, or of a number each: logit_0, logit_1, ...). They are read in chunks, so they "
        "may be larger than memory; .safetensors and .npy are the fastest. Every score is higher for in-distribution "
        "rows.\n\n"
        "[bold]To begin with:[/]  fastood demo"
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        from fastood import __version__

        typer.echo(f"fastood {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    pass


LogitsKey = Annotated[str | None, typer.Option(help="What the file calls the logits.", show_default="logits")]
FeatsKey = Annotated[str | None, typer.Option(help="What the file calls the features.", show_default="feats")]
Norm = Annotated[
    str | None,
    typer.Option(
        help="Order r of the ||h||_r that multiplies a V term: 0.3, 2, inf; 'none' for none.",
        show_default="0.3 with feats; none without, and for a score that is never above 0",
    ),
]
Temperature = Annotated[float, typer.Option(help="T > 0 of the softmax.")]
Bias = Annotated[bool, typer.Option("--bias", help="Count the last layer's bias: \\[h; 1] for h.")]
ChunkRows = Annotated[int | None, typer.Option(min=1, help="Rows read at a time.", show_default="64 MiB of them")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
Backend = Annotated[str, typer.Option(help="'auto', or one that 'fastood info' lists.")]
Nan = Annotated[
    str,
    typer.Option(
        metavar="drop|keep|fail",
        help="Rows that have a NaN score: drop them from every column; keep them, as NaN in a file and as the lowest "
        "score in eval, for which NaN >= threshold is false, too; or fail. They are counted in any case.",
    ),
]

HeadFile = Annotated[
    Path | None,
    typer.Option(
        "--head",
        metavar="FILE",
        help="The last layer, for scores that take it: 'weight' \\[C, D] and 'bias' \\[C], or the model's checkpoint.",
    ),
]
TrainFile = Annotated[
    Path | None,
    typer.Option(
        "--train",
        metavar="FILE",
        help="In-distribution rows, such as training rows, for scores that are fitted on some. knn, nnguide and vim "
        "hold all of their features in memory.",
    ),
]
TrainLabels = Annotated[
    str | None,
    typer.Option(help="What --train calls the true classes. Left out: those that the logits predict."),
]

Workers = Annotated[
    int | None, typer.Option(min=1, help="Ray: actors.", show_default="one per CPU, or per GPU with --device cuda")
]
BadFiles = Annotated[
    str, typer.Option(metavar="fail|skip", help="Ray: a file that cannot be read or holds something else; it is named.")
]

_DETECTORS_OWN = "method", "norm", "temperature", "bias", "log", "raw"


@app.command(no_args_is_help=True)
def score(
    ctx: typer.Context,
    source_uri: Annotated[str, typer.Argument(metavar="IN", help="Logits and features.")],
    out_uri: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="Scores: .csv, .parquet, .npz, .npy, .safetensors, .pt; /dev/stdout or a pipe for CSV."
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A score, repeatable: {', '.join((*SCORES, *SUCCESSORS))}; or 'all' that the files allow.",
            show_default="energy",
        ),
    ] = None,
    norm: Norm = None,
    temperature: Temperature = 1.0,
    bias: Bias = False,
    log: Annotated[
        bool, typer.Option("--log", help='log(U * V), finite where U * V overflows; columns are called "log ...".')
    ] = False,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help='The paper\'s signs: not every score is then higher = ID; columns are called "raw ...".'
        ),
    ] = False,
    logits_key: LogitsKey = None,
    feats_key: FeatsKey = None,
    id_key: Annotated[
        str | None, typer.Option(help="What the file calls the rows' IDs, to be written beside their scores.")
    ] = None,
    nan: Nan = "keep",
    detector_file: Annotated[
        Path | None,
        typer.Option(
            "--detector",
            metavar="FILE",
            help="Score and decide by what 'fastood fit' wrote, whose settings stand for the options above.",
        ),
    ] = None,
    head: HeadFile = None,
    train: TrainFile = None,
    train_labels_key: TrainLabels = None,
    chunk_rows: ChunkRows = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="ray",
            help="IN is a folder of .parquet files, partitioned or not, OUT one for files of the same names; both may "
            "be URIs such as s3://bucket/folder. All other columns are carried through. Run again after a failure, "
            "it goes on where it was.",
        ),
    ] = None,
    workers: Workers = None,
    bad_files: BadFiles = "fail",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Ray: score a column of images through a model, which this function, without arguments, makes.",
        ),
    ] = None,
    inputs_key: Annotated[str, typer.Option(help="Ray: the column that the model takes.")] = "image",
) -> None:
    """Score every row of a file, or decide about it.

    A column is called after what it holds: energy, energy*||h||_0.3, exgrad,
    ||h||_0.3, with raw and log before it: raw log exgrad. The metadata of
    .parquet and .safetensors say, as JSON, how the columns were made: fastood's
    version, method, norm, temperature, bias, log, oriented.

    With --detector there are two columns more: accept, whether to treat the row
    as in-distribution (true or false in .csv, a bool elsewhere; never true of a
    row with NaN), and p_value, by which 'accept' is p_value > 1 - tpr. The
    metadata then say the detector's settings, too.

    [bold]Examples[/]

    The default, energy times ||h||_0.3:

        fastood score val.npz scores.csv

    Two scores in one read, without the features' norm:

        fastood score val.pt scores.npz --method msp --method tv --norm none

    A table whose columns have names of their own, with the rows' IDs, without rows that have no score:

        fastood score val.parquet scores.csv --logits-key z --feats-key h --id-key image --nan drop

    Everything the file allows, on a GPU:

        fastood score val.npy scores.parquet --method all --device cuda

    A decision for every row:

        fastood score requests.npz decisions.csv --detector det.safetensors

    Scores that came after the paper, by the last layer and by training rows:

        fastood score val.npz scores.csv --method scale --method vim --head head.npz --train train.npz

    Without a file; what is said of them goes to standard error:

        fastood score val.npz /dev/stdout | gzip > scores.csv.gz

    A folder of Parquet files, on a Ray cluster:

        fastood score logits/ decisions/ --detector det.safetensors --engine ray
    """
    from fastood.files import open_rows, save_scores, writable

    source, out = Path(source_uri), Path(out_uri)
    _apart(ctx, out)
    given = _given(ctx, _DETECTORS_OWN)
    if detector_file and given:
        raise ValueError(f"--detector has settings of its own: leave out {', '.join(given)}")
    methods, later = _methods(method or ["energy"], norm is not None, head, train)
    if later and log:
        raise ValueError(f"--log: {later[0]} has no logarithm")
    order: Order = "auto" if norm is None else _order(norm)
    number("--temperature", temperature, above=0)
    choice("--nan", nan, tuple(_NAN))
    options: dict[str, Any] = {"temperature": temperature, "bias": bias, "log": log, "oriented": not raw}
    detector = Detector.load(detector_file) if detector_file else None
    if engine is not None:
        choice("--engine", engine, ("ray",))
        if id_key is not None:
            raise ValueError("--id-key: --engine ray carries every column through; leave it out")
        if later:
            raise ValueError(f"--engine ray scores {later[0]} by a --detector: 'fastood fit' makes one")
        scoring: dict[str, Any] = {"methods": methods or "all", "norm": order, **options}
        _score_on_ray(
            source_uri,
            out_uri,
            workers=workers,
            bad_files=bad_files,
            nan=nan,
            chunk_rows=chunk_rows,
            model=_Factory(model) if model else None,
            **{f"{name}_key": key for name, key in (("logits", logits_key), ("feats", feats_key)) if key},
            inputs_key=inputs_key,
            device=device,
            backend=backend,
            **({"detector": detector} if detector else scoring),
        )
        return
    if given := _given(ctx, ("workers", "bad_files", "model", "inputs_key")):
        raise ValueError(f"{', '.join(given)}: only with --engine ray")
    _refuse_folder(source)
    place = _device(device)
    inputs = [source, *filter(None, (detector_file, head, train))]

    odd: _Odd = {}
    nans, below_0, accepted = _Nans(), Counter[str](), 0
    with open_rows(source, logits_key, feats_key, id_key) as rows:
        if detector:
            _check_fits(rows, detector)
            work = _columns.of_detector(detector, backend)
        else:
            fitted = _successors(later, rows, head, train, train_labels_key, temperature, place, method)
            work = _columns.of_scores(rows.classes, rows.dim, methods, order, fitted, backend=backend, **options)
        with (
            save_scores(writable(out, *inputs), metadata=_columns.as_json(work.metadata), id_key=rows.id_key) as writer,
            _bars() as chunks_of,
        ):
            chunks = _on(place, _looked_at(chunks_of(rows, chunk_rows), rows, odd))
            for (logits, feats), ids in zip(chunks, rows.ids(chunk_rows), strict=True):
                columns = work.columns(logits, feats)
                scores = {label: columns[label] for label in work.labels}
                bad = nans.count(source, scores, fail=nan == "fail")
                if not log:  # a logarithm below 0 is of a positive score
                    below_0.update(_data.negative(scores))
                if detector:
                    accepted += int(columns["accept"].sum())
                if nan == "drop":
                    columns = {label: x[~bad] for label, x in columns.items()}
                    ids = None if ids is None else ids[~bad]
                writer.write(_as_written(columns, out), ids)
    _warn(odd, {source: _data.inverted(below_0, nans.seen)})
    written = nans.seen - (nans.rows if nan == "drop" else 0)
    decided = f", {accepted:,} of them accepted" if detector else ""
    typer.echo(f"{out}: {written:,} rows of {', '.join(work.labels)}{decided}")
    typer.echo(_contents(rows, work.used))
    nans.tell(source, _NAN[nan], log)


def _score_on_ray(source: str, out: str, *, bad_files: str, nan: str, **settings: Any) -> None:
    from fastood.ray import score_files

    choice("--bad-files", bad_files, ("fail", "skip"))
    found = score_files(source, out, bad_files=bad_files, nan=nan, **settings)
    _warn({}, {_data.some(paths): text for text, paths in found.odd.items()})
    _warn({}, {source: _data.inverted(found.negative, found.rows)})
    _warn_of_bad(found.bad, found.files)
    written = found.rows - (found.nan if nan == "drop" else 0)
    decided = "" if found.accepted is None else f", {found.accepted:,} of them accepted"
    typer.echo(f"{out}: {written:,} rows{decided}")
    good = found.files - len(found.bad)
    before = f", {good - found.new:,} of which had been scored before" if good > found.new else ""
    typer.echo(f"{source}: {good:,} files{before}")
    if found.nan:
        typer.echo(f"{source}: {found.nan:,} of {found.rows:,} rows have a NaN score and are {_NAN[nan]}")


def _warn_of_bad(bad: Mapping[str, str], files: int) -> None:
    if bad:
        _warn({}, {f"{len(bad):,} of {files:,} files are bad and left out": _data.some(bad.values())})


class _Factory:
    """A function by its name, MODULE:FUNCTION, that every worker imports for itself."""

    def __init__(self, text: str) -> None:
        module, _, name = text.partition(":")
        if not (module and name):
            raise ValueError(f"--model must be MODULE:FUNCTION, got {text!r}")
        self.__module__, self.__qualname__, self._folder = module, name, os.getcwd()
        self._function()  # here, too, so that a mistake is said at once

    def _function(self) -> Callable[[], Any]:
        if self._folder not in sys.path:
            sys.path.insert(0, self._folder)
        try:
            return getattr(import_module(self.__module__), self.__qualname__)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--model: {self.__module__}:{self.__qualname__} cannot be imported: {error}") from error

    def __call__(self) -> Any:
        return self._function()()


def _given(ctx: typer.Context, names: Iterable[str]) -> dict[str, Any]:
    """Those of these options that the command line has, as it writes them, and what they are."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    there = [name for name, origin in sources.items() if origin and origin.name == "COMMANDLINE"]
    return {f"--{name.replace('_', '-')}": ctx.params[name] for name in there}


def _refuse_folder(source: Path) -> None:
    if source.is_dir():
        raise ValueError(f"{source}: is a folder, which --engine ray takes, of .parquet files")


def _apart(ctx: typer.Context, *outputs: Path | None) -> None:
    """What a command says goes to standard error where standard output has a result."""
    from fastood.files import stream_of

    if any(path and stream_of(path) == 1 for path in outputs):
        ctx.with_resource(redirect_stdout(sys.stderr))


def _as_written(columns: Columns, out: Path) -> Columns:
    """A bool as the word that readers of CSV take for one."""
    import numpy as np

    from fastood.files import format_of

    if format_of(out) != ".csv":
        return columns
    return {k: np.where(x, "true", "false") if x.dtype == bool else x for k, x in columns.items()}


@app.command(no_args_is_help=True)
def fit(
    ctx: typer.Context,
    source_uri: Annotated[
        str, typer.Argument(metavar="ID", help="In-distribution logits and features, not of training data.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The detector: .safetensors.")],
    method: Annotated[str, typer.Option(help=f"A score: {', '.join((*SCORES, *SUCCESSORS))}.")] = "energy",
    norm: Norm = None,
    temperature: Temperature = 1.0,
    bias: Bias = False,
    tpr: Annotated[float, typer.Option(help="The share of in-distribution rows to accept.")] = 0.95,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="A threshold for every predicted class that has the rows for it.")
    ] = False,
    logits_key: LogitsKey = None,
    feats_key: FeatsKey = None,
    labels_key: Annotated[
        str | None,
        typer.Option(help="What the file calls the true classes: rows that the classifier gets wrong are left out."),
    ] = None,
    nan: Annotated[
        str, typer.Option(metavar="drop|fail", help="Rows whose score is not finite: leave them out, or fail.")
    ] = "fail",
    head: HeadFile = None,
    train: TrainFile = None,
    train_labels_key: TrainLabels = None,
    chunk_rows: ChunkRows = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    engine: Annotated[
        str | None,
        typer.Option(metavar="ray", help="ID is a folder of .parquet files, partitioned or not, or a URI of one."),
    ] = None,
    workers: Workers = None,
    bad_files: BadFiles = "fail",
) -> None:
    """Make a detector: the threshold that accepts a stated share of rows like these.

    Of new rows drawn like those of ID at least --tpr are accepted, on the average
    over such files (split conformal prediction). Nothing is promised about
    others: 'fastood eval --detector' says how many of some it accepts.

    Fit on what decisions will see: rows of the same dtype, on the same device.

    [bold]Examples[/]

    Energy times ||h||_0.3, accepting 95% of rows like these:

        fastood fit val.npz --out det.safetensors

    A threshold per predicted class that keeps 99% of the rows that the classifier gets right:

        fastood fit val.npz --out det.safetensors --method msp --norm none --tpr 0.99 --per-class --labels-key y

    Mahalanobis distances from the classes of the training rows, calibrated on others:

        fastood fit val.npz --out det.safetensors --method mahalanobis --train train.npz --train-labels-key labels

    And then:

        fastood score requests.npz decisions.csv --detector det.safetensors
    """
    from fastood.files import labels_of, open_rows, writable

    source = Path(source_uri)
    _apart(ctx, out)
    if method == "all":
        choice("--method", method, (*SCORES, *SUCCESSORS))
    _, later = _methods([method], norm is not None, head, train)
    choice("--nan", nan, ("drop", "fail"))
    number("--temperature", temperature, above=0)
    if not 0 < tpr < 1:
        raise ValueError(f"--tpr must be between 0 and 1, got {tpr}")
    writable(out, source, *filter(None, (head, train)), suffixes=(".safetensors",))
    order: Order = "auto" if norm is None else _order(norm)
    settings: Any = {"norm": order, "temperature": temperature, "bias": bias, "tpr": tpr, "per_class": per_class}
    if engine is not None:
        choice("--engine", engine, ("ray",))
        if backend != "auto":
            raise ValueError("--backend: --engine ray decides it for itself; leave it out")
        if later:
            raise ValueError(f"--engine ray does not fit {method}; fastood.ray.fit_files does, in Python")
        keys = {"logits_key": logits_key, "feats_key": feats_key, "labels_key": labels_key}
        reading = {name: key for name, key in keys.items() if key} | {"nan": nan, "chunk_rows": chunk_rows}
        found = Detector(method, **settings)
        _fit_on_ray(source_uri, out, found, bad_files, workers=workers, device=device, **reading)
        return
    if given := _given(ctx, ("workers", "bad_files")):
        raise ValueError(f"{', '.join(given)}: only with --engine ray")
    _refuse_folder(source)
    place = _device(device)

    odd: _Odd = {}
    below_0, seen, lost = Counter[str](), 0, 0
    with open_rows(source, logits_key, feats_key, labels_key) as rows, _bars() as chunks_of:
        made = _successors(later, rows, head, train, train_labels_key, temperature, place, [method])
        detector = Detector(made[0] if made else method, **settings)
        chunks: Iterator[tuple[Any, Any]] = _on(place, _looked_at(chunks_of(rows, chunk_rows), rows, odd))
        for (logits, feats), labels in zip(chunks, labels_of(rows, chunk_rows), strict=True):
            s = detector.score(logits, feats, backend=backend)
            finite = s.isfinite()
            if not finite.all():
                if nan == "fail":
                    first = seen + int(finite.int().argmin())
                    raise ValueError(f"{source}: the score of row {first}, counted from 0, is not finite; see --nan")
                lost += int((~finite).sum())
                logits, feats = (None if x is None else x[finite] for x in (logits, feats))
                labels = None if labels is None else labels[finite.cpu()]
            detector.partial_fit(logits, feats, labels, backend=backend)
            seen += len(s)
            below_0.update(_data.negative({detector._label(): s.cpu().numpy()}))
    said = _promise(detector)  # or which rows are lacking
    detector.save(out)
    _warn(odd, {source: _data.inverted(below_0, seen)})
    right = ", those that the classifier gets right" if labels_key else ""
    of = f" of {seen:,}" if detector.rows < seen else ""
    typer.echo(f"{out}: {detector._label()}, fitted on {detector.rows:,}{of} rows{right}")
    typer.echo(said)
    typer.echo(_contents(rows, _columns.read_by(detector), "labels"))
    if lost:
        typer.echo(f"{source}: {lost:,} of {seen:,} rows have a score that is not finite and are left out")


def _fit_on_ray(source: str, out: Path, detector: Detector, bad_files: str, **settings: Any) -> None:
    from fastood.ray import fit_files

    choice("--bad-files", bad_files, ("fail", "skip"))
    found = fit_files(source, detector, bad_files=bad_files, **settings)
    said = _promise(found.fitted)
    found.fitted.save(out)
    _warn_of_bad(found.bad, found.files)
    typer.echo(
        f"{out}: {found.fitted._label()}, fitted on {found.rows:,} rows of {found.files - len(found.bad):,} files"
    )
    typer.echo(said)
    if found.lost:
        typer.echo(f"{source}: {found.lost:,} rows are null, or have a score that is not finite, and are left out")


@app.command(no_args_is_help=True)
def inspect(
    source: Annotated[Path, typer.Argument(metavar="DETECTOR", help="What 'fastood fit' or Detector.save wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, every class's threshold among it.")] = False,
) -> None:
    """What is in a detector's file: settings, rows, thresholds, and what it promises.

    [bold]Example[/]

        fastood inspect det.safetensors --json
    """
    from safetensors import safe_open

    detector = Detector.load(source)
    with safe_open(source, "np") as file:
        header = json.loads(file.metadata()["fastood"])  # which load has checked
    facts = {"file": str(source), "format": header["version"], "fastood": header["fastood"], **_columns.facts(detector)}
    if as_json:
        typer.echo(json.dumps(_columns.finite({**facts, "threshold": _columns.thresholds(detector)}), indent=2))
        return
    facts["norm"] = "none" if facts["norm"] is None else f"{facts['norm']:g}"
    for name, fact in facts.items():
        if fact not in (None, {}):
            typer.echo(f"{name.replace('_', ' ')}: {fact}")
    typer.echo(_promise(detector))


@app.command("eval", no_args_is_help=True)
def evaluate(
    ctx: typer.Context,
    id_file: Annotated[Path, typer.Option("--id", metavar="FILE", help="In-distribution logits and features.")],
    ood: Annotated[list[str], typer.Option(metavar="[NAME=]FILE", help="An OOD set, repeatable.")],
    norm: Annotated[
        list[str] | None,
        typer.Option(
            help="Order of ||h||_r, or 'none'; repeatable.",
            show_default="none and 0.3; none for a score that is never above 0",
        ),
    ] = None,
    temperature: Temperature = 1.0,
    bias: Bias = False,
    method: Annotated[list[str] | None, typer.Option(help="A score, repeatable.", show_default="all")] = None,
    head: HeadFile = None,
    train: TrainFile = None,
    train_labels_key: TrainLabels = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the table as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the table as CSV.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a report as HTML.")] = None,
    logits_key: LogitsKey = None,
    feats_key: FeatsKey = None,
    nan: Nan = "drop",
    detector_file: Annotated[
        Path | None,
        typer.Option(
            "--detector",
            metavar="FILE",
            help="What 'fastood fit' wrote: also say which share of each set it accepts, of all rows, those with a NaN "
            "score among them.",
        ),
    ] = None,
    device: Device = "cpu",
    backend: Backend = "auto",
) -> None:
    """How well each score separates in-distribution rows from OOD ones.

    [bold]Examples[/]

    Two OOD sets and their average:

        fastood eval --id val.npz --ood svhn.npz --ood textures=dtd/out.npz

    One score, plain and times ||h||_2, with a report:

        fastood eval --id val.npz --ood svhn.npz --method msp --norm none --norm 2 --html a.html

    Tables whose columns have names of their own, NaN rows counted as rejected, on a GPU:

        fastood eval --id val.parquet --ood svhn.parquet --logits-key z --feats-key h --nan keep --device cuda

    What a detector accepts of each; --id should be rows that it was not fitted on:

        fastood eval --id test.npz --ood svhn.npz --detector det.safetensors --json table.json

    The paper's scores beside those that came after it, which need the last layer or training rows:

        fastood eval --id val.npz --ood svhn.npz --head head.npz --train train.npz --train-labels-key labels
    """
    from fastood.evaluation import evaluate as evaluation_of
    from fastood.evaluation import score_rows, settle_nan
    from fastood.files import open_rows, writable

    _apart(ctx, json_file, csv_file, html_file)
    files = _named_files(ood)
    for output, suffixes in ((json_file, (".json",)), (csv_file, (".csv",)), (html_file, (".html", ".htm"))):
        if output:
            writable(output, id_file, *files.values(), *filter(None, (detector_file,)), suffixes=suffixes)
    methods, later = _methods(method or ["all"], bool(norm), head, train)
    norms: Any = tuple(map(_order, norm)) if norm else "auto"
    number("--temperature", temperature, above=0)
    choice("--nan", nan, tuple(_NAN))
    place = _device(device)
    options: dict[str, Any] = {"temperature": temperature, "bias": bias, "backend": backend}
    detector = Detector.load(detector_file) if detector_file else None

    odd: _Odd = {}
    accepted = dict.fromkeys((None, *files), 0)  # None: the ID set
    scored, nans = [], []
    with ExitStack() as stack:
        sets = [stack.enter_context(open_rows(path, logits_key, feats_key)) for path in (id_file, *files.values())]
        every = [SCORES[name] for name in (SCORES if methods is None else methods)]
        orders: list[Any] = [("auto" if e.multiplied else None,) if norms == "auto" else norms for e in every]
        used = _columns.used_by((e, r) for e, of_it in zip(every, orders, strict=True) for r in of_it)
        used = used.union(*(SUCCESSORS[name].needs for name in later))
        _check_alike(sets, logits_key, feats_key, used)
        successors = _successors(later, sets[0], head, train, train_labels_key, temperature, place, method)
        if detector:
            for rows in sets:
                _check_fits(rows, detector)
        with _bars() as chunks_of:
            for name, rows in zip(accepted, sets, strict=True):
                chunks = _on(place, _looked_at(chunks_of(rows), rows, odd))
                if detector:
                    chunks = _decided(chunks, detector, backend, accepted, name)
                columns = score_rows(chunks, methods=methods, norms=norms, successors=successors, **options)
                counted = _Nans()
                bad = counted.count(rows.path, columns, fail=nan == "fail")
                if bad.all() and rows.rows and nan == "drop":
                    raise ValueError(f"{rows.path}: every row has a NaN score")
                nans.append(counted)
                scored.append(settle_nan(columns, nan))
        id_scores, *ood_scores = scored
        evaluation = evaluation_of(id_scores, dict(zip(files, ood_scores, strict=True)))
        _warn(odd, {id_file: _inverted(evaluation)})
        for rows, counted in zip(sets, nans, strict=True):
            typer.echo(_contents(rows, used))
            counted.tell(rows.path, _NAN_IN_EVAL[nan])
        print_table(evaluation)
        decided = {}
        if detector:
            shares = [n / rows.rows if rows.rows else None for n, rows in zip(accepted.values(), sets, strict=True)]
            decided = {
                "detector": {
                    **_columns.facts(detector),
                    "accepted": {"id": shares[0], "ood": dict(zip(files, shares[1:], strict=True))},
                }
            }
            typer.echo(f"\n{detector_file}: {detector._label()}, tpr {detector.tpr:.6g}, accepts")
            for (name, n), rows in zip(accepted.items(), sets, strict=True):
                share = f"{n / rows.rows:.6f}" if rows.rows else "-"
                typer.echo(f"  {share} of {'the ID set' if name is None else name}: {n:,} of {rows.rows:,} rows")
        if json_file:
            evaluation.to_json(json_file, **decided)
        if csv_file:
            evaluation.to_csv(csv_file)
        if html_file:
            from fastood.report import write_html

            figures = _heatmap(sets, list(files), place, nan=nan, **options)
            title = f"OOD detection: {id_file.stem} against {', '.join(files)}"
            decisions = None
            if detector:
                of = zip(("ID", *files), accepted.values(), sets, strict=True)
                decisions = detector, {name: (n, rows.rows) for name, n, rows in of}
            write_html(html_file, evaluation, title=title, figures=figures, decisions=decisions)


def _decided(
    chunks: Chunks, detector: Detector, backend: str, accepted: dict[str | None, int], name: str | None
) -> Chunks:
    """The same chunks; how many of their rows are accepted is added to those of `name`."""
    for logits, feats in chunks:
        f: Any = logits
        accepted[name] += int(detector.accept(f, feats, backend=backend).sum())
        yield logits, feats


def _check_alike(sets: list[Rows], logits_key: str | None, feats_key: str | None, used: set[str]) -> None:
    """FileError where a set cannot be of the first one's network, or lacks what a score takes from another."""
    from fastood.files import FileError

    of_logits = "logits", logits_key or "logits", [rows.classes for rows in sets]
    of_feats = "feats", feats_key or "feats", [rows.dim for rows in sets]
    for name, key, widths in (of_logits, of_feats):
        having = {rows.path: width for rows, width in zip(sets, widths, strict=True) if width is not None}
        if not having:
            continue
        first, wanted = next(iter(having.items()))
        for path, width in having.items():
            if width != wanted:
                raise FileError(f"{path}: {key!r} must have {wanted} columns as in {first}, got {width}")
        if name in used and None in widths:
            lacking = sets[widths.index(None)].path
            raise FileError(f"{lacking}: must hold {key!r} as {first} does, or --method and --norm do without")


def _heatmap(sets: list[Rows], names: list[str], device: torch.device, **options: Any) -> dict[str, Figure]:
    """Figure 2 of the ID set and the OOD sets called `names`, where all of them have logits and feats."""
    from fastood import plots
    from fastood.api import PAPER_V
    from fastood.evaluation import sweep_auroc

    if any(rows.classes is None or rows.dim is None for rows in sets):
        return {}
    with _bars() as chunks_of:
        inside, *outside = (_on(device, chunks_of(rows)) for rows in sets)
        chunks = dict(zip(names, outside, strict=True))
        auroc = sweep_auroc(inside, chunks, PAPER_V, plots.FIGURE_2_NORMS, **options)
    return {plots.FIGURE_2: plots.heatmap(auroc, PAPER_V, plots.FIGURE_2_NORMS)}


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("fastood-demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random numbers.")] = 0,
) -> None:
    """Train a small classifier, score in- and out-of-distribution data, and show what comes out.

    [bold]Example[/]

        fastood demo --out my-demo
    """
    from fastood.demo import conclusion, run

    evaluation, written, *_ = run(out, seed, lambda line: typer.echo(line, err=True))
    _warn({}, {"the ID set": _inverted(evaluation)})
    print_table(evaluation)
    typer.echo("Written:")
    for path in written:
        typer.echo(f"  {path}")
    typer.echo(conclusion(evaluation))


@app.command()
def reproduce(
    ctx: typer.Context,
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE]...", help="digits, offline, photos, paper, imagenet.", show_default="offline photos"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the page, its pictures and its numbers.")] = Path(
        "fastood-reproduce"
    ),
    cache: Annotated[
        Path | None, typer.Option(help="Where networks and their outputs are kept.", show_default="OUT/cache")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A folder to look for sets in, too.", show_default="data")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The network of photos and imagenet: efficientnet-lite0, timm:NAME, torchvision:NAME.",
            show_default="efficientnet-lite0, for photos",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many networks are trained for each set.")] = 3,
    rows: Annotated[
        int | None,
        typer.Option(help="Test images of each set, at most.", show_default="as in the paper, 500 for photos"),
    ] = None,
    deep_rows: Annotated[int, typer.Option(help="Those of them that gradients by all parameters are taken of.")] = 100,
    device: Device = "cpu",
) -> None:
    """Rebuild the tables and figures of the paper, and say how far each number is from the printed one.

    A suite is some sets of images, each an in-distribution set or out of another's
    distribution. digits takes a minute and scikit-learn; offline trains on
    Fashion-MNIST, 5,000 images of MNIST and those digits, which Debian and PyPI
    have; photos asks EfficientNet-Lite0, which knows ImageNet, about photographs
    that packages ship; paper is MNIST, SVHN and CIFAR-10, through torchvision;
    imagenet is Huang & Li's benchmark, from folders. What is missing is named, with
    what to fetch.

    Networks, logits, features and gradients are kept in --cache. A run that was
    stopped goes on where it was, and another one takes what is there.

    [bold]Examples[/]

    The page of the documentation, in some minutes:

        fastood reproduce

    With scikit-learn alone:

        fastood reproduce digits

    The paper's benchmark, with a network of timm's:

        fastood reproduce imagenet --data ~/ood --model timm:resnetv2_101x1_bit --device cuda
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fastood.reproduce import SUITES, run

    chosen = suites or ["offline", "photos"]
    for name in chosen:
        choice("SUITE", name, tuple(SUITES))
    place = _device(device)
    # For the page: what its numbers hang on. Others have other folders of data.
    options = _given(ctx, ("out", "model", "seeds", "rows", "deep_rows"))
    given = [text for option, x in options.items() for text in (option, str(x))]
    hidden = not sys.stderr.isatty()
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=None)

        def progress(what: str, new: bool, done: int, of: int) -> None:
            bar.update(task, completed=done, total=of, description=escape(what))
            if hidden and new:
                typer.echo(f"{done}/{of} {what}", err=True)

        written = run(
            out,
            chosen,
            cache=cache,
            data=data,
            model=model,
            seeds=seeds,
            rows=rows,
            deep_rows=deep_rows,
            device=place,
            command=["reproduce", *(suites or []), *given],
            progress=progress,
        )
    typer.echo("Written:")
    for path in written:
        typer.echo(f"  {path}")


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """What fastood runs on here: versions, backends, processor, GPUs. For bug reports, too.

    [bold]Example[/]

        fastood info --json
    """
    import numpy as np
    import torch

    import fastood
    from fastood.kernels import cpu

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    # A GPU's backends are asked about its tensors; they cannot serve the processor's anyway.
    devices = ["cpu", *(["cuda"] if gpus else [])]
    facts: dict[str, Any] = {
        "fastood": fastood.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        **({"C++_kernels": cpu._native.isa()} if cpu._native else {}),
        "threads": torch.get_num_threads(),
        "cuda": gpus,
        "backends": {
            device: {name: {"usable": s.usable, "why": s.why} for name, s in fastood.backends(device).items()}
            for device in devices
        },
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, fact in facts.items():
        if name == "backends":
            for device, backends in fact.items():
                for backend, status in backends.items():
                    usable = "usable" if status["usable"] else "not usable"
                    typer.echo(f"backend {backend} on {device}: {usable}: {status['why']}")
        else:
            typer.echo(f"{name.replace('_', ' ')}: {', '.join(fact) or 'none' if isinstance(fact, list) else fact}")


def print_table(evaluation: Evaluation) -> None:
    """An evaluation for people: one section per OOD set, the best AUROC of each marked; then what follows from it.

    The recommendation is last, where a terminal still shows it after a long table.
    """
    columns = {"auroc": "AUROC", "fpr95_in": "FPR95", "aupr_in": "AUPR-in", "aupr_out": "AUPR-out"}
    rows = evaluation.table()
    table = Table("OOD set")
    table.add_column("score", no_wrap=True)
    for title in columns.values():
        table.add_column(title, justify="right")
    for ood in dict.fromkeys(row["ood"] for row in rows):
        section = [row for row in rows if row["ood"] == ood]
        best = f"{max(row['auroc'] for row in section):.6f}"
        for i, row in enumerate(section):
            auroc, *others = (f"{row[key]:.6f}" for key in columns)
            # Bold is lost in a pipe, so there is a star as well; a space keeps the digits in line.
            table.add_row(
                escape(ood) if i == 0 else "",
                escape(row["score"]),
                auroc + ("*" if auroc == best else " "),
                *others,
                style="bold" if auroc == best else None,
            )
        table.add_section()
    console = Console()
    if not console.is_terminal:
        console.width = 400  # a file or a pipe has no edge to cut names off at
    console.print(table)
    typer.echo(
        "Scores are higher for in-distribution (ID) rows. FPR95: share of OOD rows accepted\n"
        "where 95% of ID rows are; lower is better. AUPR-in counts ID rows as positive,\n"
        "AUPR-out OOD rows. * marks the best AUROC of a set.\n"
    )
    # Broken between words on a terminal, not at all elsewhere.
    console.print(str(evaluation.recommendation), markup=False, highlight=False, soft_wrap=not console.is_terminal)


# ---- detectors


def _promise(detector: Detector) -> str:
    """What it accepts, and how many rows like those that it was fitted on."""
    from fastood._sample import rank

    n, limit = detector.rows, _columns.thresholds(detector)
    kept = f"at least {100 * detector.tpr:.6g}% of rows drawn like those that it was fitted on"
    if isinstance(limit, float):
        k = rank(n, detector.tpr)
        # Of one calibration set the share accepted is of Beta(n + 1 - k, k), where scores do not tie.
        spread = 100 * math.sqrt(k * (n + 1 - k) / (n + 2)) / (n + 1)
        return (
            f"accepts scores >= {limit:.6g}: {kept}, on the average over sets of {n:,}; "
            f"the share of one set has a standard deviation of {spread:.2g}%"
        )
    own = sum(detector._deciding(k) is not detector._all for k in range(len(limit)))
    rest = "" if own == len(limit) else f"; {len(limit) - own} have too few rows and go by the threshold of all"
    return (
        f"accepts scores >= that of the predicted class, {min(limit):.6g} to {max(limit):.6g}: {kept}, on the average "
        f"over such sets, in each of the {own} of {len(limit)} classes with a threshold of their own{rest}"
    )


def _check_fits(rows: Rows, detector: Detector) -> None:
    """FileError where the file lacks what the detector reads, or is of another network."""
    from fastood.files import FileError

    for name, width, wanted in (("logits", rows.classes, detector.classes), ("feats", rows.dim, detector.dim)):
        # Lists of no rows, in a table, have no width.
        if wanted is not None and width != wanted and (width is None or rows.rows):
            key = {"logits": rows.logits_key, "feats": rows.feats_key}[name] or name
            got = "none of them" if width is None else f"{width}"
            raise FileError(
                f"{rows.path}: {key!r} must have the {wanted} columns that the detector was fitted on, got {got}"
            )


# ---- what is said of the data

_NAN = {"keep": "kept", "drop": "left out", "fail": ""}
_NAN_IN_EVAL = _NAN | {"keep": "counted as the lowest score"}


class _Nans:
    """Counts the rows that have a NaN score, and says so."""

    def __init__(self) -> None:
        self.seen = self.rows = 0
        self.of = Counter[str]()

    def count(self, path: Path, columns: Mapping[str, NDArray[Any]], *, fail: bool) -> NDArray[bool_]:
        """Which rows of these further scores of a file, label -> [n], hold NaN. Where that is to fail, an error."""
        import numpy as np

        nan = {label: np.isnan(x) for label, x in columns.items()}
        self.of.update({label: int(x.sum()) for label, x in nan.items() if x.any()})
        bad: NDArray[bool_] = np.any([*nan.values()], axis=0)
        if fail and bad.any():
            first = self.seen + int(bad.argmax())
            raise ValueError(f"{path}: row {first}, counted from 0, has a NaN score; see --nan")
        self.seen, self.rows = self.seen + len(bad), self.rows + int(bad.sum())
        return bad

    def tell(self, path: Path, fate: str, log: bool = False) -> None:
        if self.rows:
            why = "they hold NaN, or logits that hold +inf or are all -inf" + (", or U * V < 0" if log else "")
            count = f"{self.rows:,} of {self.seen:,} rows have a NaN score"
            typer.echo(f"{path}: {count} ({_data.some(self.of)}) and are {fate}: {why}")


def _contents(rows: Rows, used: set[str], ids: str = "IDs") -> str:
    """One line on what was found in a file, under which names, and used; `ids` is what its third array is."""
    from fastood.files import listed

    said = []
    matrices = ("logits", rows.logits_key, rows.classes), ("feats", rows.feats_key, rows.dim)
    for name, key, width in matrices:
        if key is None:
            said.append(f"no {name} (--{name}-key names them)")
        else:
            called = "" if key == name else f" {key!r}"
            said.append(f"{name}{called} [{rows.rows}, {width}]" + ("" if name in used else " (not used)"))
    if rows.id_key is not None:
        said.append(f"{ids} {rows.id_key!r}")
    if rows.others:
        said.append(f"also holds {listed(rows.others)}")
    return f"{rows.path}: {', '.join(said)}"


def _looked_at(chunks: Chunks, rows: Rows, odd: _Odd) -> Chunks:
    """The same chunks; what the first one of them makes doubtful is noted in `odd`."""
    for i, (logits, feats) in enumerate(chunks):
        if i == 0:
            text = _data.oddity(logits, feats, rows.logits_key, rows.feats_key)
            if text:
                odd.setdefault(text, []).append(rows.path)
        yield logits, feats


def _inverted(evaluation: Evaluation) -> str | None:
    """On V terms times a norm that are negative in more than one of 100 in-distribution rows."""
    rows = evaluation.counts()["id"]
    below_0 = _data.negative(evaluation.id_scores)
    return _data.inverted({label: n for label, n in below_0.items() if 100 * n > rows}, rows)


def _warn(odd: _Odd, of_file: Mapping[Any, str | None]) -> None:
    of_files = [(", ".join(map(str, paths)), text) for text, paths in odd.items()]
    for where, text in (*of_files, *of_file.items()):
        if text:
            typer.echo(f"warning: {where}: {text}", err=True)


# ---- arguments and chunks


def _on(device: torch.device, chunks: Chunks) -> Chunks:
    for logits, feats in chunks:
        yield None if logits is None else logits.to(device), None if feats is None else feats.to(device)


def _device(text: str) -> torch.device:
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device must be a torch device such as cpu or cuda:0, got {text!r}") from None
    if device.type == "meta":
        raise ValueError(f"--device must be one that holds numbers, got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: torch finds no GPU here for {text!r}")
    return device


@contextmanager
def _bars() -> Iterator[Callable[..., Chunks]]:
    """A function of rows that gives their chunks, with a bar on the terminal where there is one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # rich's own idea of a terminal follows environment variables about colour, too.
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:

        def chunks_of(rows: Rows, chunk_rows: int | None = None) -> Chunks:
            task = progress.add_task(escape(rows.path.name), total=rows.rows)
            for logits, feats in rows.chunks(chunk_rows):
                yield logits, feats
                done = logits if logits is not None else feats
                assert done is not None
                progress.advance(task, len(done))
            progress.remove_task(task)

        yield chunks_of


def _methods(
    names: list[str], norm_given: bool, head: Path | None, train: Path | None
) -> tuple[list[str] | None, list[str]]:
    """The paper's scores among the names, None for every one that the inputs allow, and the successors."""
    from fastood.successors.files import names_of

    paper, later = names_of(names, head=head is not None, train=train is not None)
    if norm_given and paper is not None and all(SCORES[name].gradient for name in paper):
        raise ValueError(f"--norm: {', '.join(paper or later)} has a norm of its own, or none")
    return paper, later


def _successors(
    names: list[str],
    rows: Rows,
    head: Path | None,
    train: Path | None,
    labels_key: str | None,
    temperature: float,
    device: torch.device,
    asked: list[str] | None,
) -> list[Fitted]:
    """The successors called `names`, for rows like these; those that `asked` does not name may be left out."""
    from fastood.successors.files import from_files

    if not names:
        return []
    with _bars() as chunks_of:
        successors, left_out = from_files(
            names,
            rows,
            head=head,
            train=train,
            labels_key=labels_key,
            temperature=temperature,
            chunks_of=lambda known: _on(device, chunks_of(known)),
            whatever=not asked or "all" in asked,
        )
    for line in left_out:
        typer.echo(f"{train}: {line}")
    return successors


def _order(text: str) -> float | None:
    try:
        return None if text == "none" else order_of("--norm", float(text))
    except ValueError:
        raise ValueError(f"--norm must be a number >= 0, 'inf' or 'none', got {text!r}") from None


def _named_files(texts: list[str]) -> dict[str, Path]:
    """NAME=FILE by name; a file's own name may hold a "="."""
    files: dict[str, Path] = {}
    for text in texts:
        name, given, path = text.partition("=")
        if not given or os.path.exists(text):
            name, path = Path(text).stem, text
        if not (name and path):
            raise ValueError(f"--ood: {text!r} lacks the {'FILE' if name else 'NAME'} of NAME=FILE")
        if name in files:
            raise ValueError(f"--ood: {name!r} names two sets; give one another name with --ood NAME={path}")
        files[name] = Path(path)
    if len(files) > 1 and "average" in files:
        raise ValueError("--ood: 'average' is the mean over the sets; give this one another name with --ood NAME=FILE")
    return files

"""Scores of Arrow tables, as data engines pass them on, and of one Parquet file into another; no engine is needed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastood import _columns, _data
from fastood._inputs import _from_numpy, choice
from fastood.detector import Detector
from fastood.files import CHUNK_BYTES, FileError, library, listed, parquet_file
from fastood.successors.fitted import Fitted, _odd

FittedT = TypeVar("FittedT", bound=Detector | Fitted)
ArrowT = TypeVar("ArrowT")  # pyarrow.Table or pyarrow.RecordBatch, which come without types
Path = str | os.PathLike[str]

NAN = ("keep", "drop", "fail")


class Scorer:
    """What gives tables of rows their scores: made once, then called with an Arrow table at a time.

    Made for engines that keep an object per worker, so that a detector is read, and a model built, once in each:
    ``dataset.map_batches(fastood.ray.Scorer, fn_constructor_kwargs={...}, batch_format="pyarrow")`` of Ray Data.

    Parameters
    ----------
    methods : str or iterable of str
        As in ``fastood.scores``; "all" is every score that the table's columns allow.
    detector : Detector or path, optional
        Decide as well, by what ``Detector.save`` wrote; it has a method and settings of its own.
    model : callable, optional
        Makes a model: without arguments it gives an nn.Module that ``fastood.attach`` takes or gave, in eval mode,
        which is moved to `device`, or any callable. The model is called with the column `inputs_key` of each table,
        and gives logits [n, C] or (logits, feats [n, D], ...). A column of tensors or lists of numbers is given as
        one tensor [n, ...] on `device`; anything else, such as the bytes of image files, as a list of n.
    logits_key, feats_key, inputs_key : str
        Columns: FixedShapeTensor or lists of float16, float32 or float64 numbers, a vector per row.
    device : str
        Where to compute: "cpu", "cuda".
    backend, **options
        As in ``fastood.scores``: norm, temperature, bias, log, oriented.

    Raises
    ------
    TypeError, ValueError
        For settings that ``fastood.scores`` refuses. When called: where a column is missing, of another kind, or holds
        rows of several lengths.

    Notes
    -----
    Values are read where Arrow has them: no copy is made of columns without nulls.

    Examples
    --------
    >>> import fastood.arrow, pyarrow as pa
    >>> scorer = fastood.arrow.Scorer("msp")
    >>> table = pa.table({"image": ["a.png", "b.png", "c.png"], "logits": [[4.0, 0.0], [0.0, 0.0], None]})
    >>> scored = scorer(table)
    >>> scored.column_names, [round(x, 3) for x in scored["msp"].to_pylist()]
    (['image', 'msp'], [0.982, 0.5, nan])
    """

    def __init__(
        self,
        methods: str | Iterable[str] = "energy",
        *,
        detector: Detector | Path | None = None,
        model: Callable[[], Any] | None = None,
        logits_key: str = "logits",
        feats_key: str = "feats",
        inputs_key: str = "image",
        device: str = "cpu",
        backend: str = "auto",
        **options: Any,
    ) -> None:
        self._methods = [methods] if isinstance(methods, str) else list(methods)
        if detector is not None and (self._methods != ["energy"] or options):
            given = ["methods"] * (self._methods != ["energy"]) + list(options)
            raise ValueError(f"detector has settings of its own: leave out {', '.join(given)}")
        self.detector = detector if isinstance(detector, Detector | None) else Detector.load(detector)
        self._options = {"norm": "auto", "temperature": 1.0, "bias": False, "log": False, "oriented": True, **options}
        self._keys, self._inputs_key = _two_columns(logits_key, feats_key), inputs_key
        self.device, self._backend = torch.device(device), backend
        self._make_model, self._model = model, None
        self._works: dict[tuple[bool, bool], _columns.Work] = {}
        self._work(True, True)  # which refuses what will never do

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs, which makes a model of its own."""
        return {**self.__dict__, "_model": None, "_works": {}}

    @property
    def model(self) -> Any:
        """What `model` made, at the first use; None without one."""
        if self._model is None and self._make_model is not None:
            self._model = _made(self._make_model, self.device)
        return self._model

    def __call__(self, batch: ArrowT) -> ArrowT:
        """The same rows, in their order, with the columns of scores in place of those that they were computed from.

        Parameters
        ----------
        batch : pyarrow.Table or pyarrow.RecordBatch

        Returns
        -------
        pyarrow.Table or pyarrow.RecordBatch
            As `batch`: all other columns, then the scores, called as ``fastood score`` calls them: "energy",
            "energy*||h||_0.3". float32, float64 where an input is; with a detector also "accept" (bool) and "p_value"
            (float64). Higher = more in-distribution. A row that is null, or holds NaN, has the score NaN and is never
            accepted.
        """
        return self._scored(batch)[0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What it was made with, so far as the scores hang on it."""
        make = self._make_model
        named = make and f"{make.__module__}:{getattr(make, '__qualname__', '')}"
        columns = {**self._keys, "inputs": self._inputs_key}
        if self.detector is not None:
            own = self._work(True, True).metadata["detector"]
            return {"detector": own, "digest": _digest(self.detector), "columns": columns, "model": named}
        return {"methods": self._methods, **self._options, "columns": columns, "model": named}

    def _scored(self, batch: Any) -> tuple[Any, str | None]:
        """The table of ``__call__``, and what is odd about its first rows."""
        pa = library("pyarrow")
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        columns, odd = self._columns(pa, table)
        out = table.drop_columns([*self._read_or_dropped().intersection(table.column_names)])
        for label, x in columns.items():
            if label in out.column_names:
                raise ValueError(f"no column may be called as a score is, {label!r}")
            out = out.append_column(label, x)
        if isinstance(batch, pa.RecordBatch):
            arrays = [pa.concat_arrays(c.chunks) if c.num_chunks else pa.array([], c.type) for c in out.columns]
            out = pa.RecordBatch.from_arrays(arrays, schema=out.schema)
        return out, odd

    def _read_or_dropped(self) -> set[str]:
        return {*self._keys.values(), *([self._inputs_key] if self._make_model is not None else [])}

    def _to_read(self, names: Iterable[str]) -> list[str]:
        """Which of these columns of a file need to be read."""
        names = list(names)
        used = self._used(names)[1]
        return [name for name in names if name in used or name not in self._read_or_dropped()]

    def _used(self, names: Iterable[str]) -> tuple[_columns.Work, list[str]]:
        """What is computed from a table with these columns, and the columns that it is computed from."""
        names = list(names)
        if self._make_model is not None:
            if self._inputs_key not in names:
                raise ValueError(f"must hold {self._inputs_key!r}, found {listed(names) or 'no columns'}")
            return self._work(True, True), [self._inputs_key]
        has = {name: key in names for name, key in self._keys.items()}
        if not any(has.values()):
            wanted = " or ".join(map(repr, self._keys.values()))
            raise ValueError(f"must hold {wanted}, found {listed(names) or 'no columns'}")
        work = self._work(has["logits"], has["feats"])
        for name in sorted(work.used, reverse=True):
            if not has[name]:
                raise ValueError(f"must hold {self._keys[name]!r}, found {listed(names)}")
        return work, [self._keys[name] for name in ("logits", "feats") if name in work.used]

    def _work(self, logits: bool, feats: bool) -> _columns.Work:
        work = self._works.get((logits, feats))
        if work is None:
            if self.detector is not None:
                work = _columns.of_detector(self.detector, self._backend)
            else:
                methods = None if self._methods == ["all"] else self._methods
                order = self._options["norm"]
                rest = {name: x for name, x in self._options.items() if name != "norm"}
                widths = (1 if logits else None), (1 if feats else None)
                work = _columns.of_scores(*widths, methods, order, backend=self._backend, **rest)
            self._works[logits, feats] = work
        return work

    def _columns(self, pa: Any, table: Any) -> tuple[dict[str, Any], str | None]:
        work, names = self._used(table.column_names)
        table = table.select(names)
        if self._make_model is not None:
            table = table.combine_chunks()  # for batches of the size that was asked for
        parts, odd = [], None
        # Where a column's chunks end no rows are copied together.
        for i, part in enumerate(table.to_batches() or [_no_rows(pa, table.schema)]):
            held, valid = _without_nulls(pa, part)
            logits, feats = self._tensors(held)
            if i == 0 and self._make_model is None:
                odd = _data.oddity(logits, feats, self._keys["logits"], self._keys["feats"])
            with torch.inference_mode():
                found = work.columns(logits, feats)
            parts.append({label: _spread(x, valid) for label, x in found.items()})
        return {label: pa.chunked_array([part[label] for part in parts]) for label in parts[0]}, odd

    def _tensors(self, batch: Any) -> tuple[Tensor | None, Tensor | None]:
        if self._make_model is not None:
            return self._through_model(batch.column(0))
        return _matrices(batch, self._keys, self.device)

    def _through_model(self, column: Any) -> tuple[Tensor | None, Tensor | None]:
        pa = library("pyarrow")
        storage = column.type.storage_type if isinstance(column.type, pa.BaseExtensionType) else column.type
        if len(column) == 0:  # few models take no rows
            return torch.empty(0, 1), torch.empty(0, 1)
        number_lists = _is_list(pa, storage)
        inputs = _tensor(self._inputs_key, column).to(self.device) if number_lists else column.to_pylist()
        with torch.inference_mode():
            out = self.model(inputs)
        logits, feats = (out, None) if isinstance(out, Tensor) else out[:2]
        if feats is None and "feats" in self._work(True, True).used:
            raise ValueError("model must give (logits, feats), got no feats; norm=None leaves the norm out")
        if logits is not None and len(logits) != len(column):
            raise ValueError(f"model must give a row for each of {len(column)} inputs, got shape {list(logits.shape)}")
        return logits, feats


def score_batch(batch: ArrowT, methods: str | Iterable[str] = "energy", **settings: Any) -> ArrowT:
    """Scores of the rows of an Arrow table or record batch, beside its other columns.

    One call of a ``Scorer``, whose arguments these are; where there are many batches, make a ``Scorer`` and call that.

    Examples
    --------
    >>> import pyarrow as pa
    >>> from fastood.arrow import score_batch
    >>> score_batch(pa.table({"id": [7], "logits": [[4.0, 0.0]]}), ["msp", "tv"]).column_names
    ['id', 'msp', 'tv']
    >>> schema = score_batch(pa.schema({"id": pa.int64(), "logits": pa.list_(pa.float32())}).empty_table()).schema
    >>> schema.field("energy").type
    DataType(float)
    """
    return Scorer(methods, **settings)(batch)


def _made(model: Callable[[], Any], device: torch.device) -> Any:
    from fastood._collect import ready

    made = model()
    if isinstance(made, nn.Module):
        return ready(made).to(device)
    if not callable(made):
        raise TypeError(
            f"model must make a model: a function without arguments that gives one, got {type(made).__name__}"
        )
    return made


def _digest(detector: Detector) -> str:
    """Of what it scores by and of its calibration: equal where decisions and p-values are."""
    found = hashlib.sha256(detector.successor.digest().encode() if detector.successor else b"")
    for _, sample in sorted([(-1, detector._all), *detector._of_class.items()], key=lambda pair: pair[0]):
        for x in sample.ranked():
            found.update(np.ascontiguousarray(x).data)
    return found.hexdigest()


# ---- from Arrow to tensors


def _two_columns(logits_key: str, feats_key: str) -> dict[str, str]:
    if logits_key == feats_key:
        raise ValueError(f"logits_key and feats_key must name two columns, got {logits_key!r} for both")
    return {"logits": logits_key, "feats": feats_key}


def _is_list(pa: Any, kind: Any) -> bool:
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _tensor(key: str, column: Any) -> Tensor:
    """A column without nulls, of tensors of one shape or of lists of one length, [n, ...]: a view of its memory."""
    pa = library("pyarrow")
    n, kind = len(column), column.type
    values = column.storage if isinstance(column, pa.ExtensionArray) else column
    if not _is_list(pa, values.type):
        raise ValueError(f"{key!r} must be a column of tensors or of lists of numbers, got {kind}")
    widths: list[int] = []
    while _is_list(pa, values.type):
        flat = values.flatten()
        if pa.types.is_fixed_size_list(values.type):
            widths.append(values.type.list_size)
        else:
            lengths = np.unique(np.diff(values.offsets.to_numpy()))
            if len(lengths) > 1:
                raise ValueError(f"{key!r} must have rows of one length, got {lengths[0]} and {lengths[-1]}")
            widths.append(int(lengths[0]) if len(lengths) else 1)
        if len(flat) != len(values) * widths[-1]:
            raise ValueError(f"{key!r} must hold no nulls in place of a row's lists")
        values = flat
    shape = list(getattr(kind, "shape", None) or widths)  # an engine's own tensors are flat lists that know a shape
    permutation = getattr(kind, "permutation", None)
    if permutation and permutation != sorted(permutation):
        # pyarrow itself reads back something else than it was given where that is not its own inverse.
        raise ValueError(f"{key!r} must hold tensors in the order of their memory, got the permutation {permutation}")
    # A null among the numbers is NaN.
    return _from_numpy(key, values.to_numpy(zero_copy_only=False)).reshape(n, *shape)


def _matrices(batch: Any, keys: Mapping[str, str], device: torch.device | str) -> tuple[Tensor | None, Tensor | None]:
    """Logits and feats, those of them that are there: [n, columns]."""

    def matrix(key: str) -> Tensor | None:
        if key not in batch.schema.names:
            return None
        x = _tensor(key, batch.column(key))
        if x.ndim != 2:
            raise ValueError(f"{key!r} must hold a vector per row, got shape {list(x.shape)}")
        return x.to(device)

    return matrix(keys["logits"]), matrix(keys["feats"])


def _without_nulls(pa: Any, batch: Any) -> tuple[Any, Any]:
    """The rows without nulls, the batch itself where all are; and which they are, bool [n]."""
    valid = np.logical_and.reduce([c.is_valid().to_numpy(zero_copy_only=False) for c in batch.columns])
    if valid.all():
        return batch, valid
    return pa.RecordBatch.from_arrays([_filtered(pa, c, valid) for c in batch.columns], schema=batch.schema), valid


def _filtered(pa: Any, column: Any, valid: Any) -> Any:
    if isinstance(column, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(column.type, column.storage.filter(pa.array(valid)))
    return column.filter(pa.array(valid))


def _spread(x: Any, valid: Any) -> Any:
    """The results of the valid rows, and NaN or False for the others."""
    if len(x) == len(valid):
        return x
    out = np.full(len(valid), False if x.dtype == bool else np.nan, x.dtype)
    out[valid] = x
    return out


def _no_rows(pa: Any, schema: Any) -> Any:
    """A batch of none, which a table without rows need not have."""

    def column(kind: Any) -> Any:
        if isinstance(kind, pa.BaseExtensionType):
            return pa.ExtensionArray.from_storage(kind, pa.array([], kind.storage_type))
        return pa.array([], kind)

    return pa.RecordBatch.from_arrays([column(field.type) for field in schema], schema=schema)


# ---- files


class Report(NamedTuple):
    """What became of a file.

    Attributes
    ----------
    rows : int
        How many it has.
    nan : int
        How many of them have a NaN score.
    accepted : int or None
        How many a detector accepts.
    negative : dict
        Label of a V term times a norm -> the rows in which it is below 0.
    odd : str or None
        What makes the first rows look unlike logits and features.
    scores : list of str
        The columns of scores that it was given, which without feats are others.
    new : bool
        Whether it was scored by this call; False where it had been before.
    """

    rows: int
    nan: int
    accepted: int | None
    negative: dict[str, int]
    odd: str | None
    scores: list[str]
    new: bool


def score_file(
    source: Path, target: Path, scorer: Scorer, *, nan: str = "keep", chunk_rows: int | None = None
) -> Report:
    """Score a Parquet file into another, which appears whole or not at all; nothing is done where it is there already.

    It is there already where its footer says that it was made of this source, by size and time of change, with these
    settings. So a run over many files that failed or was killed is simply run again, by whatever engine.

    Parameters
    ----------
    source, target : path
        Local, or of a store that ``pyarrow.fs`` knows: "s3://bucket/a.parquet".
    scorer : Scorer
    nan : {"keep", "drop", "fail"}
        Rows with a NaN score: in the file as NaN, left out, or an error.
    chunk_rows : int, optional
        Rows in memory at a time. Left out: as many as take 64 MiB in the file, uncompressed.

    Raises
    ------
    FileError
        A ValueError that names the source: where it cannot be read, or holds what is no logits or feats.

    Examples
    --------
    >>> score_file("in/0.parquet", "out/0.parquet", Scorer("energy", norm=None))  # doctest: +SKIP
    Report(rows=50000, nan=0, accepted=None, negative={}, odd=None, scores=['energy'], new=True)
    """
    pa, pq = library("pyarrow"), library("pyarrow.parquet")
    choice("nan", nan, NAN)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    target_fs, target_path = filesystem(target)
    _ = scorer.model  # whose failure is no fault of the file's
    with ExitStack() as stack:
        with blaming(source):
            file, size, mtime = open_parquet(source, stack)
            names = file.schema_arrow.names
            work, _ = scorer._used(names)
        made_by = {
            **_columns.as_json({name: x for name, x in work.metadata.items() if name != "fastood"}),
            **_columns.as_json({"settings": {**scorer.settings, "nan": nan}, "source": {"size": size, "mtime": mtime}}),
        }
        if (before := _report_in(pq, target_fs, target_path, made_by)) is not None:
            return before

        def tables() -> Iterator[tuple[Any, str | None]]:
            # What goes wrong in here is the source's fault; what goes wrong in writing is not.
            with blaming(source):
                for batch in batches(file, scorer._to_read(names), chunk_rows):
                    yield scorer._scored(pa.Table.from_batches([batch]))

        found = _Found(source, work.labels, nan, decides=scorer.detector is not None)
        metadata = {**_columns.as_json({"fastood": work.metadata["fastood"]}), **made_by}
        with atomically(target_fs, target_path) as stream, ExitStack() as parquet:
            writer = None
            for table, odd in tables():
                table = found.counted(table, odd)
                if writer is None:
                    schema = table.schema.with_metadata({**(table.schema.metadata or {}), **metadata})
                    writer = parquet.enter_context(pq.ParquetWriter(stream, schema, write_page_checksum=True))
                writer.write_table(table)
            assert writer is not None  # `batches` gives one of no rows, too
            report = found.report()
            writer.add_key_value_metadata({_REPORT: json.dumps(report._asdict())})
    return report


def fit_file(
    source: Path,
    fitted: FittedT,
    *,
    logits_key: str = "logits",
    feats_key: str = "feats",
    labels_key: str | None = None,
    nan: str = "fail",
    chunk_rows: int | None = None,
    device: str = "cpu",
) -> tuple[FittedT, int]:
    """A copy of a Detector or a Fitted to which the rows of a Parquet file are added, and how many were left out.

    Those of several files are put together by ``merge``.

    Parameters
    ----------
    source : path
    fitted : fastood.Detector or fastood.Fitted
        One with the settings that are wanted; it stays as it is.
    logits_key, feats_key : str
        Columns, of which the file may lack one.
    labels_key : str, optional
        A column of integers, the true classes: ``partial_fit`` says what they do.
    nan : {"fail", "drop"}
        Rows that are null, or that cannot be fitted on for NaN or infinity.
    chunk_rows
        As in ``score_file``.
    device : str

    Raises
    ------
    FileError
        A ValueError that names the source.

    Examples
    --------
    >>> parts = [fit_file(path, fastood.Detector("energy"))[0] for path in paths]  # doctest: +SKIP
    >>> detector = functools.reduce(fastood.Detector.merge, parts)  # doctest: +SKIP
    """
    choice("nan", nan, ("fail", "drop"))
    keys = _two_columns(logits_key, feats_key)
    own = copy.deepcopy(fitted)
    lost = row = 0
    with ExitStack() as stack, blaming(source):
        file, _, _ = open_parquet(source, stack)
        found = file.schema_arrow.names
        names = [key for key in keys.values() if key in found]
        if labels_key is not None and labels_key not in found:
            raise ValueError(f"must hold {labels_key!r}, found {listed(found)}")
        if not names:
            raise ValueError(f"must hold {logits_key!r} or {feats_key!r}, found {listed(found) or 'no columns'}")
        for batch in batches(file, [*names, *([] if labels_key is None else [labels_key])], chunk_rows):
            held, good = _without_nulls(library("pyarrow"), batch)
            logits, feats = _matrices(held, keys, device)
            labels = None if labels_key is None else _labels(labels_key, held.column(labels_key))
            # The lists of no rows, as where all of a chunk are null, have no width to be asked about.
            usable = _usable(own, logits, feats) if len(held) else torch.ones(0, dtype=torch.bool)
            good[good] = usable.cpu().numpy()
            if not good.all():
                if nan == "fail":
                    raise ValueError(f"row {row + int(good.argmin())}, counted from 0, is null or not finite")
                lost += len(good) - int(good.sum())
                logits, feats = (x if x is None else x[usable] for x in (logits, feats))
                labels = None if labels is None else labels[usable.cpu()]
            row += len(good)
            if good.any():
                own.partial_fit(logits, feats, labels)
    return own, lost


def _labels(key: str, column: Any) -> Tensor:
    if not library("pyarrow").types.is_integer(column.type):
        raise ValueError(f"{key!r} must hold integers, the true classes, got {column.type}")
    return torch.from_numpy(column.to_numpy(zero_copy_only=False).astype(np.int64))


def _usable(fitted: Detector | Fitted, logits: Tensor | None, feats: Tensor | None) -> Tensor:
    """Which rows can be fitted on: bool [n]."""
    if isinstance(fitted, Detector):
        return fitted.score(logits, feats).isfinite()
    return ~_odd(logits, feats if "feats" in fitted.entry.fitted_on else None)


_REPORT = "fastood_report"


class _Found:
    """Counts over the tables of a file."""

    def __init__(self, source: Path, labels: list[str], nan: str, *, decides: bool) -> None:
        self._source, self._labels, self._nan = source, labels, nan
        self._rows = self._bad = 0
        self._accepted: int | None = 0 if decides else None
        self._negative: Counter[str] = Counter()
        self._odd: str | None = None

    def counted(self, table: Any, odd: str | None) -> Any:
        """The table as it is to be written, without the rows that are to be dropped."""
        if self._rows == 0:
            self._odd = odd
        columns = {label: table.column(label).to_numpy() for label in self._labels}
        bad = np.logical_or.reduce([np.isnan(x) for x in columns.values()])
        if self._nan == "fail" and bad.any():
            first = self._rows + int(bad.argmax())
            raise FileError(f"{os.fspath(self._source)}: row {first}, counted from 0, has a NaN score")
        self._rows, self._bad = self._rows + len(bad), self._bad + int(bad.sum())
        self._negative.update(_data.negative(columns))
        if self._accepted is not None:
            self._accepted += int(table.column("accept").to_numpy().sum())
        return table.filter(library("pyarrow").array(~bad)) if self._nan == "drop" and bad.any() else table

    def report(self) -> Report:
        return Report(self._rows, self._bad, self._accepted, dict(self._negative), self._odd, self._labels, True)


def _report_in(pq: Any, fs: Any, path: str, made_by: Mapping[str, str]) -> Report | None:
    """What the file's footer reports, if the file is there, whole, and was made by this."""
    if not fs.get_file_info(path).is_file:
        return None
    try:
        metadata = {k.decode(): x.decode() for k, x in (pq.read_metadata(path, filesystem=fs).metadata or {}).items()}
        if all(metadata.get(name) == x for name, x in made_by.items()):
            return Report(**json.loads(metadata[_REPORT]))._replace(new=False)
    except (library("pyarrow").ArrowException, OSError, ValueError, TypeError, KeyError):
        pass  # not one of ours
    return None


def filesystem(path: Path) -> tuple[Any, str]:
    """The file system of a path or URI, and what the path is called there."""
    fs = library("pyarrow.fs")
    text = os.fspath(path)
    if "://" in text:
        return fs.FileSystem.from_uri(text)
    return fs.LocalFileSystem(), os.path.abspath(text)


def open_parquet(source: Path, stack: ExitStack) -> tuple[Any, int, int]:
    """A pyarrow.parquet.ParquetFile, its size in bytes, and when it was changed, in nanoseconds."""
    fs, path = filesystem(source)
    info = fs.get_file_info(path)
    if not info.is_file:
        raise FileError("no such file")
    stream = stack.enter_context(fs.open_input_file(path))
    return stack.enter_context(parquet_file(stream)), info.size, info.mtime_ns


def batches(file: Any, names: list[str], rows: int | None) -> Iterator[Any]:
    """Record batches of these columns of a Parquet file; one of no rows where it has none."""
    pa, metadata = library("pyarrow"), file.metadata
    if metadata.num_rows == 0:
        yield _no_rows(pa, pa.schema([file.schema_arrow.field(name) for name in names], file.schema_arrow.metadata))
        return
    if rows is None:
        bytes_of_all = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        rows = max(CHUNK_BYTES * metadata.num_rows // max(bytes_of_all, 1), 1)
    yield from file.iter_batches(batch_size=min(rows, metadata.num_rows), columns=names)


@contextmanager
def blaming(source: Path) -> Iterator[None]:
    """Errors as FileErrors that name the source; not those of a machine without the memory."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the file, of Parquet, of the model: each has its own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FileError(f"{os.fspath(source)}: {reason}") from error


@contextmanager
def atomically(fs: Any, path: str) -> Iterator[Any]:
    """A stream to what becomes the file when the block ends, and vanishes if it raises."""
    folder, _, name = path.rpartition("/")
    fs.create_dir(folder, recursive=True)
    temporary = f"{folder}/.{name}.{secrets.token_hex(8)}{TEMPORARY}"
    try:
        with fs.open_output_stream(temporary) as stream:
            yield stream
        fs.move(temporary, path)
    except BaseException:
        with suppress(OSError):
            fs.delete_file(temporary)
        raise


TEMPORARY = ".fastood-tmp"
"""How the names of files end that are not whole yet."""

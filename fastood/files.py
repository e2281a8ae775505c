"""Logits and features from files in chunks, scores to files: what the command line reads and writes."""

from __future__ import annotations

import csv
import math
import os
import pickle
import secrets
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastood._inputs import FLOATS, _from_numpy

CHUNK_BYTES = 64 << 20

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


class FileError(ValueError):
    """What is wrong with a file, in words for whoever named it."""


# ---- reading


class _Array(NamedTuple):
    """A matrix in a file: what its header says, and `blocks(n)`, its rows in order, n at a time."""

    shape: tuple[int, ...]
    dtype: str
    blocks: Callable[[int], Iterator[Tensor]]


class Rows:
    """Logits and features of one file, read in chunks. A context manager; ``open_rows`` makes one.

    Attributes
    ----------
    path : Path
    rows : int
    classes, dim : int or None
        The columns of logits and of feats; None where the file has none of them.
    """

    def __init__(self, path: Path, logits: _Array | None, feats: _Array | None, resources: ExitStack) -> None:
        self.path = path
        self._arrays, self._resources = (logits, feats), resources
        self.rows = next(a.shape[0] for a in self._arrays if a)
        self.classes, self.dim = (a.shape[1] if a else None for a in self._arrays)

    def chunks(self, rows_per_chunk: int | None = None) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """(logits, feats) of consecutive rows, as CPU tensors in the file's dtype; not to be written to.

        Parameters
        ----------
        rows_per_chunk : int, optional
            Left out: as many as fit in 64 MiB.

        Examples
        --------
        >>> for logits, feats in open_rows("val.npz").chunks():  # doctest: +SKIP
        ...     print(fastood.score(logits, feats))
        """
        if rows_per_chunk is None:
            row_bytes = sum(a.shape[1] * _DTYPES[a.dtype].itemsize for a in self._arrays if a)
            rows_per_chunk = max(CHUNK_BYTES // max(row_bytes, 1), 1)
        if rows_per_chunk < 1:
            raise ValueError(f"rows_per_chunk must be at least 1, got {rows_per_chunk}")
        if self.rows == 0:
            # One empty chunk, so that even no rows get their scores' names.
            logits, feats = (torch.empty(0, a.shape[1], dtype=_DTYPES[a.dtype]) if a else None for a in self._arrays)
            yield logits, feats
            return
        with _reading(self.path):
            yield from zip(*(a.blocks(rows_per_chunk) if a else repeat(None) for a in self._arrays), strict=False)

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def open_rows(path: str | os.PathLike[str], logits_key: str | None = None, feats_key: str | None = None) -> Rows:
    """The logits [N, C] and feats [N, D] of a file, without reading them yet.

    Parameters
    ----------
    path
        .npz, .npy (logits alone), .safetensors, .pt or .pth (a dict of tensors, or logits alone) or
        .parquet (columns of tensors or of lists). Objects are never unpickled.
    logits_key, feats_key : str, optional
        What the file calls them. Left out: "logits" and "feats", of which one may be absent.

    Raises
    ------
    FileError
        Naming the file, the key, what was found and what was wanted.

    Examples
    --------
    >>> with open_rows("val.npz") as rows:  # doctest: +SKIP
    ...     print(rows.rows, rows.classes, rows.dim)
    50000 1000 2048
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    opener = _of_format(path, _OPENERS)
    resources = ExitStack()
    try:
        with _reading(path):
            arrays = opener(path, resources)
        logits = _pick(path, arrays, logits_key, "logits")
        feats = _pick(path, arrays, feats_key, "feats")
        if logits is None and feats is None:
            raise FileError(f"{path}: must hold 'logits' or 'feats', {_found(arrays)}")
        if logits and logits.shape[1] == 0:
            raise FileError(f"{path}: {logits_key or 'logits'!r} must have at least one class, got {_shown(logits)}")
        if logits and feats and logits.shape[0] != feats.shape[0]:
            raise FileError(
                f"{path}: {feats_key or 'feats'!r} must have the {logits.shape[0]} rows of "
                f"{logits_key or 'logits'!r}, got {_shown(feats)}"
            )
    except BaseException:
        resources.close()
        raise
    return Rows(path, logits, feats, resources)


def _pick(path: Path, arrays: Mapping[str, _Array], asked: str | None, default: str) -> _Array | None:
    key = asked or default
    if key not in arrays:
        if asked:
            raise FileError(f"{path}: must hold {key!r}, {_found(arrays)}")
        return None
    array = arrays[key]
    if len(array.shape) != 2:
        raise FileError(f"{path}: {key!r} must be 2-D, one row per sample, got {_shown(array)}")
    if array.dtype not in _DTYPES:
        raise FileError(f"{path}: {key!r} must hold {', '.join(_DTYPES)} numbers, got {array.dtype}")
    return array


def _found(arrays: Mapping[str, _Array]) -> str:
    return "found " + (", ".join(map(repr, arrays)) or "no arrays")


def _shown(array: _Array) -> str:
    return f"shape {list(array.shape)}"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except pickle.UnpicklingError as error:
        raise FileError(f"{path}: must hold tensors alone; pickled objects are never loaded") from error
    except Exception as error:  # every library has its own for a broken file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FileError(f"{path}: cannot be read as {path.suffix}: {reason}") from error


def _of_format(path: Path, formats: Mapping[str, Any]) -> Any:
    if path.suffix.lower() not in formats:
        raise FileError(f"{path}: unknown extension {path.suffix!r}; known are {', '.join(formats)}")
    return formats[path.suffix.lower()]


def library(module: str) -> Any:
    """A module that the base installation may lack."""
    try:
        return import_module(module)
    except ImportError:
        raise FileError(f'{module} is needed for this kind of file: pip install "fastood[cli]"') from None


def _npy(path: Path, resources: ExitStack) -> dict[str, _Array]:
    array = np.lib.format.open_memmap(path, mode="r")

    def blocks(n: int) -> Iterator[Tensor]:
        return (_from_numpy("logits", array[i : i + n]) for i in range(0, len(array), n))

    return {"logits": _Array(array.shape, array.dtype.name, blocks)}


def _npz(path: Path, resources: ExitStack) -> dict[str, _Array]:
    # np.load reads a member whole; a zip archive and the .npy header give it row by row.
    archive = resources.enter_context(zipfile.ZipFile(path))
    members = [name for name in archive.namelist() if name.endswith(".npy")]
    return {name.removesuffix(".npy"): _npz_member(path, archive, name, resources) for name in members}


def _npz_member(path: Path, archive: zipfile.ZipFile, member: str, resources: ExitStack) -> _Array:
    def header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        version = np.lib.format.read_magic(stream)
        # Version 3 differs from 2 in the names of structured fields, which no matrix has.
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(stream)

    with archive.open(member) as stream:
        shape, fortran, dtype = header(stream)

    def blocks(n: int) -> Iterator[Tensor]:
        if fortran:
            raise FileError(
                f"{path}: {member!r} is stored column by column and cannot be read row by row; "
                "save numpy.ascontiguousarray of it"
            )
        rows, width = shape
        # Closed with the file, for a chunk whose use failed leaves this generator waiting.
        stream = resources.enter_context(archive.open(member))
        header(stream)
        for i in range(0, rows, n):
            count = min(n, rows - i)
            data = stream.read(count * width * dtype.itemsize)
            if len(data) < count * width * dtype.itemsize:
                raise FileError(f"{path}: {member!r} ends before its {rows} rows do")
            if i + n >= rows:
                stream.read(1)  # the end of the member, where its checksum is compared
            yield _from_numpy(member, np.frombuffer(data, dtype).reshape(count, width))

    return _Array(shape, dtype.name, blocks)


def _safetensors(path: Path, resources: ExitStack) -> dict[str, _Array]:
    file = resources.enter_context(library("safetensors").safe_open(path, framework="pt"))
    arrays = {}
    for name in file.keys():  # noqa: SIM118 (not a dict)
        view = file.get_slice(name)
        shape = tuple(view.get_shape())
        dtype = str(view[:0].dtype).removeprefix("torch.") if shape else view.get_dtype()
        arrays[name] = _Array(shape, dtype, _slices(view, shape))
    return arrays


def _pt(path: Path, resources: ExitStack) -> dict[str, _Array]:
    if not zipfile.is_zipfile(path):  # torch's own words would advise an option of torch.save
        raise FileError(f"{path}: cannot be read as {path.suffix}: no file of torch.save (1.6 or later), or cut off")
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    tensors = held if isinstance(held, dict) else {"logits": held}
    return {
        str(name): _Array(tuple(x.shape), str(x.dtype).removeprefix("torch."), _slices(x.detach(), x.shape))
        for name, x in tensors.items()
        if isinstance(x, Tensor)
    }


def _slices(x: Any, shape: tuple[int, ...]) -> Callable[[int], Iterator[Tensor]]:
    return lambda n: (x[i : i + n] for i in range(0, shape[0], n))


def _parquet(path: Path, resources: ExitStack) -> dict[str, _Array]:
    file = resources.enter_context(library("pyarrow.parquet").ParquetFile(path, memory_map=True))
    return {field.name: _parquet_column(path, file, field) for field in file.schema_arrow}


def _parquet_column(path: Path, file: Any, field: Any) -> _Array:
    pa = library("pyarrow")

    def columns(n: int) -> Iterator[Any]:
        for batch in file.iter_batches(batch_size=n, columns=[field.name]):
            column = batch.column(0)
            yield column.storage if isinstance(column, pa.ExtensionArray) else column

    rows, kind = file.metadata.num_rows, field.type
    if isinstance(kind, pa.FixedShapeTensorType):
        width = kind.shape
    elif pa.types.is_fixed_size_list(kind):
        width = [kind.list_size]
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        # Only the rows say how long they are; of no rows, any width is right.
        width = [len(next(columns(1)).flatten()) if rows else 1]
    else:
        return _Array((rows,), str(kind), lambda n: iter(()))

    def blocks(n: int) -> Iterator[Tensor]:
        for column in columns(n):
            values = column.flatten()
            if column.null_count or values.null_count:
                raise FileError(f"{path}: {field.name!r} must hold no nulls")
            # An offset that is not i * width betrays a row of another length.
            if hasattr(column, "offsets"):
                lengths = np.diff(column.offsets.to_numpy())
                if (lengths != width[0]).any():
                    other = lengths[lengths != width[0]][0]
                    raise FileError(f"{path}: {field.name!r} must have rows of one length, got {width[0]} and {other}")
            yield _from_numpy(field.name, values.to_numpy(zero_copy_only=True).reshape(len(column), math.prod(width)))

    names = {"halffloat": "float16", "float": "float32", "double": "float64"}
    return _Array((rows, *width), names.get(str(kind.value_type), str(kind.value_type)), blocks)


_OPENERS: dict[str, Callable[[Path, ExitStack], dict[str, _Array]]] = {
    ".npz": _npz,
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".pt": _pt,
    ".pth": _pt,
    ".parquet": _parquet,
}


# ---- writing


def writable(path: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> Path:
    """`path`, if a file can be put there and it is none of `inputs`; FileError otherwise.

    Examples
    --------
    >>> from fastood.files import writable
    >>> writable("scores.npz").name
    'scores.npz'
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path}: is a folder, not a file to write")
    if not path.parent.is_dir():
        raise FileError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise FileError(f"{path}: the folder {path.parent} cannot be written to")
    if path.exists() and any(Path(x).exists() and path.samefile(x) for x in inputs):
        raise FileError(f"{path}: is an input; the output must be another file")
    return path


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends, and vanishes if it raises.

    Examples
    --------
    >>> from fastood.files import atomic
    >>> with atomic("scores.txt") as temporary:  # doctest: +SKIP
    ...     temporary.write_text("1.0")
    """
    path = writable(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


Columns = dict[str, np.ndarray]
Sink = Callable[[Columns], object]


class ScoreWriter:
    """Takes scores chunk by chunk; ``save_scores`` makes one."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.names: list[str] | None = None

    def write(self, scores: Mapping[str, Tensor | np.ndarray]) -> None:
        """Append rows: name -> [n], the same names every time."""
        columns = {k: x.detach().cpu().numpy() if isinstance(x, Tensor) else x for k, x in scores.items()}
        if self.names is None:
            self.names = list(columns)
        if list(columns) != self.names:
            raise ValueError(f"scores must be {self.names} in every chunk, got {list(columns)}")
        self._sink(columns)


@contextmanager
def save_scores(path: str | os.PathLike[str]) -> Iterator[ScoreWriter]:
    """A writer of scores to .npz, .npy (one score), .safetensors, .pt, .parquet or .csv.

    The file appears, whole, when the block ends; if it raises, nothing has changed.

    Examples
    --------
    >>> with open_rows("val.npz") as rows, save_scores("scores.parquet") as out:  # doctest: +SKIP
    ...     for logits, feats in rows.chunks():
    ...         out.write(fastood.scores(logits, feats))
    """
    path = Path(path)
    sink_of = _of_format(path, _SINKS)
    with atomic(path) as temporary, sink_of(temporary) as sink:
        writer = ScoreWriter(sink)
        yield writer
        if not writer.names:
            raise ValueError(f"{path}: no scores were written")


@contextmanager
def _csv(path: Path) -> Iterator[Sink]:
    with path.open("w", newline="") as file:
        out = csv.writer(file)

        def write(columns: Columns) -> None:
            if not file.tell():
                out.writerow(columns)
            # numpy's text of a number is the shortest that reads back as the same float32 or float64.
            out.writerows(zip(*(x.astype(str) for x in columns.values()), strict=True))

        yield write


@contextmanager
def _parquet_rows(path: Path) -> Iterator[Sink]:
    pa, pq = library("pyarrow"), library("pyarrow.parquet")
    with ExitStack() as stack:
        out = None

        def write(columns: Columns) -> None:
            nonlocal out
            table = pa.table(columns)
            if out is None:
                out = stack.enter_context(pq.ParquetWriter(path, table.schema))
            out.write_table(table)

        yield write


def _held(save: Callable[[Path, Columns], object]) -> Callable[[Path], AbstractContextManager[Sink]]:
    """For formats that say how many rows there are before the rows: scores are a few bytes a row, and kept."""

    @contextmanager
    def sink(path: Path) -> Iterator[Sink]:
        chunks: list[Columns] = []
        yield chunks.append
        save(path, {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]})

    return sink


def _save_npy(path: Path, columns: Columns) -> None:
    with path.open("wb") as file:
        np.save(file, next(iter(columns.values())))


@contextmanager
def _npy_score(path: Path) -> Iterator[Sink]:
    with _held(_save_npy)(path) as keep:

        def write(columns: Columns) -> None:
            if len(columns) > 1:
                raise FileError(f"a .npy file holds one score, got {', '.join(columns)}; a .npz file holds many")
            keep(columns)

        yield write


def _save_npz(path: Path, columns: dict[str, Any]) -> None:
    with path.open("wb") as file:  # given a name, numpy may append to it
        np.savez(file, **columns)


_SINKS: dict[str, Callable[[Path], AbstractContextManager[Sink]]] = {
    ".npz": _held(_save_npz),
    ".npy": _npy_score,
    ".safetensors": _held(lambda path, columns: path.write_bytes(library("safetensors.numpy").save(columns))),
    ".pt": _held(lambda path, columns: torch.save({k: torch.from_numpy(x) for k, x in columns.items()}, path)),
    ".parquet": _parquet_rows,
    ".csv": _csv,
}

"""Logits and features from files in chunks, scores to files: what the command line reads and writes."""

from __future__ import annotations

import csv
import math
import os
import pickle
import re
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastood._inputs import FLOATS, FP8, FP8_NAMES, _from_numpy, widened

CHUNK_BYTES = 64 << 20

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*FLOATS, *FP8)}


class FileError(ValueError):
    """What is wrong with a file, in words for whoever named it."""


# ---- reading

Block = Tensor | np.ndarray


class _Array(NamedTuple):
    """An array in a file: what its header says, and `blocks(n)`, its rows in order, n at a time."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    blocks: Callable[[int], Iterator[Block]]
    columns: Sequence[str] = ()  # what `key` stands for, where it is no name itself

    def whole(self) -> Tensor:
        """All of it at once."""
        if self.dtype not in _DTYPES:
            raise FileError(f"{self.key!r} must hold {', '.join(_DTYPES)} numbers, got {self.dtype}")
        blocks = self.blocks(max(1, self.shape[0]))
        return torch.cat([x if isinstance(x, Tensor) else _from_numpy(self.key, x.copy()) for x in blocks])


# By name; an array is looked at when it is asked for, so that one beside it may be of any kind.
_Contents = Mapping[str, Callable[[], _Array]]


class Rows:
    """Logits, features and IDs of one file, read in chunks. A context manager; ``open_rows`` makes one.

    Attributes
    ----------
    path : Path
    rows : int
    classes, dim : int or None
        The columns of logits and of feats; None where the file has none of them.
    logits_key, feats_key, id_key : str or None
        What the file calls them, "logit_0..9" for ten columns of a number each; None where there are none.
    others : list of str
        What other arrays the file holds.
    """

    def __init__(
        self,
        path: Path,
        logits: _Array | None,
        feats: _Array | None,
        ids: _Array | None,
        others: list[str],
        resources: ExitStack,
    ) -> None:
        self.path = path
        self._arrays, self._ids, self._resources = (logits, feats), ids, resources
        self.rows = next(a.shape[0] for a in self._arrays if a)
        self.classes, self.dim = (a.shape[1] if a else None for a in self._arrays)
        self.logits_key, self.feats_key, self.id_key = (a.key if a else None for a in (logits, feats, ids))
        self.others = others

    def chunks(self, rows_per_chunk: int | None = None) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """(logits, feats) of consecutive rows, as CPU tensors in the file's dtype, of FP8 in float16; not to write to.

        Parameters
        ----------
        rows_per_chunk : int, optional
            Left out: as many as fit in 64 MiB.

        Examples
        --------
        >>> for logits, feats in open_rows("val.npz").chunks():  # doctest: +SKIP
        ...     print(fastood.score(logits, feats))
        """
        n = self._rows_per_chunk(rows_per_chunk)
        if self.rows == 0:
            # One empty chunk, so that even no rows get their scores' names.
            none = (torch.empty(0, a.shape[1], dtype=_DTYPES[a.dtype]) if a else None for a in self._arrays)
            logits, feats = map(widened, none)
            yield logits, feats
            return

        def tensors(array: _Array | None) -> Iterator[Tensor | None]:
            if array is None:
                return repeat(None)
            return (widened(x) if isinstance(x, Tensor) else _from_numpy(array.key, x) for x in array.blocks(n))

        with _reading(self.path):
            yield from zip(*map(tensors, self._arrays), strict=False)

    def ids(self, rows_per_chunk: int | None = None) -> Iterator[np.ndarray | None]:
        """The IDs of the rows of each of ``chunks(rows_per_chunk)``: integers or, in an object array, str.

        None each time where the file was opened without `id_key`.

        Examples
        --------
        >>> with open_rows("val.parquet", id_key="image") as rows:  # doctest: +SKIP
        ...     for (logits, feats), ids in zip(rows.chunks(), rows.ids()):
        ...         print(dict(zip(ids, fastood.score(logits, feats))))
        """
        n = self._rows_per_chunk(rows_per_chunk)
        if self._ids is None:
            yield from repeat(None, max(math.ceil(self.rows / n), 1))
        elif self.rows == 0:
            yield np.empty(0, object if self._ids.dtype == "string" else self._ids.dtype)
        else:
            with _reading(self.path):
                for block in self._ids.blocks(n):
                    x = block.numpy() if isinstance(block, Tensor) else block
                    yield x.astype(object if x.dtype.kind == "U" else x.dtype.newbyteorder("="), copy=False)

    def _rows_per_chunk(self, asked: int | None) -> int:
        if asked is None:
            row_bytes = sum(a.shape[1] * _DTYPES[a.dtype].itemsize for a in self._arrays if a)
            return max(CHUNK_BYTES // max(row_bytes, 1), 1)
        if asked < 1:
            raise ValueError(f"rows_per_chunk must be at least 1, got {asked}")
        return min(asked, max(self.rows, 1))  # beyond that Parquet's reader would count in int64

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def open_rows(
    path: str | os.PathLike[str],
    logits_key: str | None = None,
    feats_key: str | None = None,
    id_key: str | None = None,
) -> Rows:
    """The logits [N, C] and feats [N, D] of a file, and IDs [N] of its rows, without reading them yet.

    Parameters
    ----------
    path
        .npz, .npy (logits alone), .safetensors, .pt or .pth (tensors in dicts and lists, or logits alone) or
        .parquet (columns of tensors or of lists, or a column of numbers per class and per feature).
        Objects are never unpickled.
    logits_key, feats_key : str, optional
        What the file calls them. Left out: "logits" and "feats", of which one may be absent, as it is where that name
        was given for the other.

        In a .pt file "a.b" is ["a"]["b"], and "0.b" is [0]["b"]. In a .parquet file without a column of that
        name, "logit" is the columns "logit_0", "logit_1" and so on, and "logits" those or "logits_0", ...;
        a null in one of them is NaN, as which pandas writes it.
    id_key : str, optional
        What the file calls the IDs: integers, or strings where the format holds them (.npz, .parquet and a
        list in .pt). Left out: no IDs.

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
            contents = opener(path, resources)
            logits = _matrix(path, contents, logits_key, "logits")
            feats = _matrix(path, contents, feats_key, "feats")
            ids = _vector_of_ids(path, contents, id_key)
        if logits and feats and logits.key == feats.key and None in (logits_key, feats_key):
            # What was named as the one is not the other by default, too.
            logits, feats = (None, feats) if logits_key is None else (logits, None)
        if logits is None and feats is None:
            raise FileError(f"{path}: must hold 'logits' or 'feats', {_found(contents)}")
        if logits and logits.shape[1] == 0:
            raise FileError(f"{path}: {logits.key!r} must have at least one class, got {_shown(logits)}")
        first, *others = (a for a in (logits, feats, ids) if a)
        for array in others:
            if array.shape[0] != first.shape[0]:
                raise FileError(
                    f"{path}: {array.key!r} must have the {first.shape[0]} rows of {first.key!r}, got {_shown(array)}"
                )
    except BaseException:
        resources.close()
        raise
    used = {name for a in (logits, feats, ids) if a for name in (a.key, *a.columns)}
    return Rows(path, logits, feats, ids, _ranges(name for name in contents if name not in used), resources)


def labels_of(rows: Rows, rows_per_chunk: int | None = None) -> Iterator[Tensor | None]:
    """The IDs of rows, chunk by chunk, that are their true classes: int64."""
    for ids in rows.ids(rows_per_chunk):
        if ids is not None and ids.dtype.kind not in "iu":
            raise FileError(f"{rows.path}: {rows.id_key!r} must hold integers, the true classes, got strings")
        yield None if ids is None else torch.from_numpy(ids.astype(np.int64))


@contextmanager
def arrays_of(path: Path) -> Iterator[_Contents]:
    """The arrays of a file by name, each looked at when it is called."""
    if not path.is_file():
        raise FileError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    opener = _of_format(path, _OPENERS)
    with ExitStack() as resources, _reading(path):
        yield opener(path, resources)


def _matrix(path: Path, contents: _Contents, asked: str | None, default: str) -> _Array | None:
    array = _named(path, contents, asked or default, asked is not None)
    if array is None:
        return None
    if len(array.shape) != 2:
        raise FileError(f"{path}: {array.key!r} must be 2-D, one row per sample, got {_shown(array)}")
    if array.dtype not in _DTYPES:
        raise FileError(f"{path}: {array.key!r} must hold {', '.join(_DTYPES)} numbers, got {array.dtype}")
    return array


def _vector_of_ids(path: Path, contents: _Contents, key: str | None) -> _Array | None:
    array = None if key is None else _named(path, contents, key, True)
    if array is None:
        return None
    if len(array.shape) != 1:
        raise FileError(f"{path}: {key!r} must be 1-D, one ID per row, got {_shown(array)}")
    if not re.fullmatch(r"u?int\d+|string", array.dtype):
        raise FileError(f"{path}: {key!r} must hold integers or strings as IDs, got {array.dtype}")
    return array


def _named(path: Path, contents: _Contents, key: str, required: bool) -> _Array | None:
    try:
        look = contents[key]
    except KeyError:
        if required:
            raise FileError(f"{path}: must hold {key!r}, {_found(contents)}") from None
        return None
    return look()


def _found(contents: _Contents) -> str:
    return "found " + (listed(_ranges(contents)) or "no arrays")


def listed(names: Sequence[str]) -> str:
    """Names in quotes; of very many, the first.

    Examples
    --------
    >>> from fastood.files import listed
    >>> listed(["logits", "labels"])
    "'logits', 'labels'"
    """
    more = len(names) - 20
    return ", ".join(map(repr, names[:20])) + (f" and {more} more" if more > 0 else "")


def _ranges(names: Iterable[str]) -> list[str]:
    """Three or more of a_0, a_1, ... become one, "a_0..9"."""
    names = list(names)
    numbers: dict[str, list[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            numbers.setdefault(match[1], []).append(int(match[2]))
    ranges: dict[str, None] = {}  # an ordered set
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match and len(found := numbers[match[1]]) > 2:
            name = _range(match[1], min(found), max(found))
        ranges[name] = None
    return list(ranges)


_NUMBERED = re.compile("(.+)_([0-9]{1,9})", re.DOTALL)


def _range(stem: str, first: int, last: int) -> str:
    return f"{stem}_{first}..{last}"


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
        name, _, _ = module.partition(".")
        extra = "ray" if name == "ray" else "cli"
        what = "this" if name == "ray" else "this kind of file"
        raise FileError(f'{module} is needed for {what}: pip install "fastood[{extra}]"') from None


def _npy_header(path: Path, key: str, stream: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype of a .npy stream of `size` bytes, which must hold all of it."""
    version = np.lib.format.read_magic(stream)
    # Version 3 differs from 2 in the names of structured fields, which no matrix has.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if any(n < 0 for n in shape):
        raise FileError(f"{path}: {key!r} must have no negative length, got shape {list(shape)}")
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > size - stream.tell():
        raise FileError(f"{path}: {key!r} ends before its shape {list(shape)} does")
    return shape, fortran, dtype


def _name_of(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind == "U" else dtype.name


def _npy(path: Path, resources: ExitStack) -> _Contents:
    def logits() -> _Array:
        with path.open("rb") as stream:
            _npy_header(path, "logits", stream, path.stat().st_size)
        array = np.lib.format.open_memmap(path, mode="r")
        return _Array("logits", array.shape, _name_of(array.dtype), _slices(array, array.shape))

    return {"logits": logits}


def _npz(path: Path, resources: ExitStack) -> _Contents:
    # np.load reads a member whole; a zip archive and the .npy header give it row by row.
    archive = resources.enter_context(zipfile.ZipFile(path))
    members = [name for name in archive.namelist() if name.endswith(".npy")]
    return {name.removesuffix(".npy"): partial(_npz_member, path, archive, name, resources) for name in members}


def _npz_member(path: Path, archive: zipfile.ZipFile, member: str, resources: ExitStack) -> _Array:
    key, size = member.removesuffix(".npy"), archive.getinfo(member).file_size
    with archive.open(member) as stream:
        shape, fortran, dtype = _npy_header(path, key, stream, size)

    def blocks(n: int) -> Iterator[np.ndarray]:
        if fortran and len(shape) > 1:
            raise FileError(
                f"{path}: {key!r} is stored column by column and cannot be read row by row; "
                "save numpy.ascontiguousarray of it"
            )
        rows, row_bytes = shape[0], math.prod(shape[1:]) * dtype.itemsize
        # Closed with the file, for a chunk whose use failed leaves this generator waiting.
        stream = resources.enter_context(archive.open(member))
        _npy_header(path, key, stream, size)
        for i in range(0, rows, n):
            count = min(n, rows - i)
            data = stream.read(count * row_bytes)
            if len(data) < count * row_bytes:
                raise FileError(f"{path}: {key!r} ends before its {rows} rows do")
            if i + n >= rows:
                stream.read(1)  # the end of the member, where its checksum is compared
            yield np.frombuffer(data, dtype).reshape(count, *shape[1:])

    return _Array(key, shape, _name_of(dtype), blocks)


def _safetensors(path: Path, resources: ExitStack) -> _Contents:
    file = resources.enter_context(library("safetensors").safe_open(path, framework="pt"))

    def tensor(name: str) -> _Array:
        view = file.get_slice(name)
        shape = tuple(view.get_shape())
        stored = view.get_dtype()
        dtype = _FP8.get(stored) or re.sub("^(BF|F|I|U)(?=[0-9]+$)", lambda kind: _SAFETENSORS[kind[0]], stored)
        return _Array(name, shape, dtype, _slices(view, shape))

    return {name: partial(tensor, name) for name in file.keys()}  # noqa: SIM118 (not a dict)


_FP8 = {name: str(dtype).removeprefix("torch.") for dtype, name in FP8_NAMES.items()}
_SAFETENSORS = {"BF": "bfloat", "F": "float", "I": "int", "U": "uint"}


def _pt(path: Path, resources: ExitStack) -> _Contents:
    if not zipfile.is_zipfile(path):  # torch's own words would advise an option of torch.save
        raise FileError(f"{path}: cannot be read as {path.suffix}: no file of torch.save (1.6 or later), or cut off")
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(held, Tensor):
        held = {"logits": held}
    return {key: partial(_pt_array, path, key, x) for key, x in _leaves(held, "", set())}


def _leaves(held: Any, key: str, seen: set[int]) -> Iterator[tuple[str, Block]]:
    """The arrays in dicts, lists and tuples of them, each by its way there: "a.b" is held["a"]["b"]."""
    if isinstance(held, Tensor):
        yield key, held
    elif isinstance(held, dict | list | tuple) and id(held) not in seen:  # which may hold itself
        seen.add(id(held))
        kinds = set() if isinstance(held, dict) else {type(x) for x in held}
        if kinds == {str} or kinds == {int}:
            yield key, np.array(held, object if str in kinds else None)
        else:
            for name, x in held.items() if isinstance(held, dict) else enumerate(held):
                yield from _leaves(x, f"{key}.{name}" if key else f"{name}", seen)


def _pt_array(path: Path, key: str, x: Block) -> _Array:
    if isinstance(x, np.ndarray):
        return _Array(key, x.shape, "string" if x.dtype == object else x.dtype.name, _slices(x, x.shape))
    dtype, layout = (str(kind).removeprefix("torch.") for kind in (x.dtype, x.layout))
    if x.is_nested or x.is_meta or layout != "strided":
        kind = "nested" if x.is_nested else "on no device" if x.is_meta else layout
        raise FileError(f"{path}: {key!r} must be a dense tensor, got one that is {kind}")
    if x.numel() * x.itemsize > x.untyped_storage().nbytes():
        raise FileError(f"{path}: {key!r} must hold every number of its shape {list(x.shape)}, got an expanded tensor")
    return _Array(key, tuple(x.shape), dtype, _slices(x.detach(), x.shape))


def _slices(x: Any, shape: Sequence[int]) -> Callable[[int], Iterator[Block]]:
    return lambda n: (x[i : i + n] for i in range(0, shape[0], n))


def _parquet(path: Path, resources: ExitStack) -> _Contents:
    file = resources.enter_context(parquet_file(path, memory_map=True))
    return _ParquetColumns(path, file)


def parquet_file(source: Any, **options: Any) -> Any:
    """A pyarrow.parquet.ParquetFile to read in pieces, which checks the pages that were written with a checksum."""
    # pre_buffer would hold the whole file in memory until its end.
    pq = library("pyarrow.parquet")
    return pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True, **options)


class _ParquetColumns(dict[str, Callable[[], _Array]]):
    def __init__(self, path: Path, file: Any) -> None:
        super().__init__({field.name: partial(_parquet_column, path, file, field) for field in file.schema_arrow})
        self._wide = partial(_parquet_wide, path, file)

    def __missing__(self, key: str) -> Callable[[], _Array]:
        for stem in dict.fromkeys((key, key.removesuffix("s"))):
            matches = [match for name in self if (match := _NUMBERED.fullmatch(name)) and match[1] == stem]
            if matches:
                return partial(self._wide, stem, sorted((int(match[2]), match[0]) for match in matches))
        raise KeyError(key)


_ARROW = {
    "halffloat": "float16",
    "float": "float32",
    "double": "float64",
    "large_string": "string",
    "string_view": "string",
}


def _parquet_wide(path: Path, file: Any, stem: str, numbered: list[tuple[int, str]]) -> _Array:
    """A column of numbers per class, or per feature, side by side."""
    for i, (number, name) in enumerate(numbered):
        if number != i:
            raise FileError(f"{path}: columns {stem}_0, {stem}_1, ... must have no gap, got {name!r} as number {i}")
    names = [name for _, name in numbered]
    key = _range(stem, 0, len(names) - 1)
    kinds = list(dict.fromkeys(str(file.schema_arrow.field(name).type) for name in names))
    if len(kinds) > 1:
        raise FileError(f"{path}: {key!r} must be columns of one type, got {' and '.join(kinds)}")

    def pieces(n: int) -> Iterator[np.ndarray]:
        for batch in file.iter_batches(batch_size=n, columns=names):
            yield np.column_stack([batch.column(name).to_numpy(zero_copy_only=False) for name in names])

    array = _parquet_array(path, key, (file.metadata.num_rows, len(names)), kinds[0], pieces)
    return array._replace(columns=names)


def _parquet_array(
    path: Path, key: str, shape: tuple[int, ...], kind: str, pieces: Callable[[int], Iterator[np.ndarray]]
) -> _Array:
    """Of pieces that are cut where the file's row groups or its dictionaries are, and not alike in each column."""

    def blocks(n: int) -> Iterator[np.ndarray]:
        held: list[np.ndarray] = []
        missing, lacking = n, shape[0]  # rows to the end of the block, and of the file
        for piece in pieces(n):
            lacking -= len(piece)
            while len(piece) >= missing:
                yield np.concatenate([*held, piece[:missing]]) if held else piece[:missing]
                piece, held, missing = piece[missing:], [], n
            if len(piece):
                held.append(piece)
                missing -= len(piece)
        if held:
            yield np.concatenate(held)
        if lacking:
            raise FileError(f"{path}: {key!r} must have the file's {shape[0]} rows, got {shape[0] - lacking}")

    return _Array(key, shape, _ARROW.get(kind, kind), blocks)


def _parquet_column(path: Path, file: Any, field: Any) -> _Array:
    pa = library("pyarrow")

    def columns(n: int) -> Iterator[Any]:
        for batch in file.iter_batches(batch_size=n, columns=[field.name]):
            column = batch.column(0)
            if column.null_count:
                raise FileError(f"{path}: {field.name!r} must hold no nulls")
            yield column.storage if isinstance(column, pa.ExtensionArray) else column

    def scalars(n: int) -> Iterator[np.ndarray]:
        for column in columns(n):
            plain = column.dictionary_decode() if pa.types.is_dictionary(field.type) else column
            yield plain.to_numpy(zero_copy_only=False)

    rows, kind = file.metadata.num_rows, field.type
    if isinstance(kind, pa.FixedShapeTensorType):
        width = kind.shape
    elif pa.types.is_fixed_size_list(kind):
        width = [kind.list_size]
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        # Only the rows say how long they are, empty ones among others being at fault; of no rows, any width is right.
        width = [next((n for column in columns(1) if (n := len(column.flatten()))), 0 if rows else 1)]
    else:
        name = str(kind.value_type if pa.types.is_dictionary(kind) else kind)
        return _parquet_array(path, field.name, (rows,), name, scalars)

    def matrices(n: int) -> Iterator[np.ndarray]:
        for column in columns(n):
            values = column.flatten()
            if values.null_count:
                raise FileError(f"{path}: {field.name!r} must hold no nulls")
            # An offset that is not i * width betrays a row of another length.
            if hasattr(column, "offsets"):
                lengths = np.diff(column.offsets.to_numpy())
                if (lengths != width[0]).any():
                    other = lengths[lengths != width[0]][0]
                    raise FileError(f"{path}: {field.name!r} must have rows of one length, got {width[0]} and {other}")
            yield values.to_numpy(zero_copy_only=True).reshape(len(column), math.prod(width))

    return _parquet_array(path, field.name, (rows, *width), str(kind.value_type), matrices)


_OPENERS: dict[str, Callable[[Path, ExitStack], _Contents]] = {
    ".npz": _npz,
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".pt": _pt,
    ".pth": _pt,
    ".parquet": _parquet,
}


# ---- writing


def writable(path: str | os.PathLike[str], *inputs: str | os.PathLike[str], suffixes: Sequence[str] = ()) -> Path:
    """`path`, if a file can be put there and it is none of `inputs`; FileError otherwise.

    Parameters
    ----------
    path : path
        A new file, a file to replace, or a device, a pipe, /dev/stdout or the like to write to.
    inputs : path
    suffixes : sequence of str, optional
        What the name of a file must end with one of; a device may be called anything.

    Examples
    --------
    >>> from fastood.files import writable
    >>> writable("scores.npz").name
    'scores.npz'
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path}: is a folder, not a file to write")
    if (n := stream_of(path)) is not None:
        try:
            os.write(n, b"")
        except OSError as error:
            raise FileError(f"{path}: cannot be written to: {error.strerror}") from error
    if path.exists():
        if any(Path(x).exists() and path.samefile(x) for x in inputs):
            raise FileError(f"{path}: is an input; the output must be another file")
        if not os.access(path, os.W_OK):
            raise FileError(f"{path}: cannot be written to")
    if not _is_stream(path):
        if suffixes and path.suffix.lower() not in suffixes:
            raise FileError(f"{path}: the file's name must end with {' or '.join(suffixes)}")
        folder = _target(path).parent
        if not folder.is_dir():
            raise FileError(f"{path}: there is no folder {folder}")
        if not os.access(folder, os.W_OK):
            raise FileError(f"{path}: the folder {folder} cannot be written to")
    return path


_STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}


def stream_of(path: Path) -> int | None:
    """The number of the open stream that /dev/stdout, /dev/fd/3 and the like are a name for; None of other paths.

    Examples
    --------
    >>> from fastood.files import stream_of
    >>> stream_of(Path("/dev/stdout")), stream_of(Path("scores.csv"))
    (1, None)
    """
    match = re.fullmatch(r"/dev/(?:(stdin|stdout|stderr)|fd/([0-9]+))|/proc/self/fd/([0-9]+)", path.as_posix())
    return _STREAMS[match[1]] if match and match[1] else int(match[2] or match[3]) if match else None


def _is_stream(path: Path) -> bool:
    """A device, a pipe, or whatever else can be opened and is no file; an open stream even where it leads to one."""
    return path.exists() and (not path.is_file() or stream_of(path) is not None)


def _stream(path: Path) -> IO[bytes]:
    """To write to. What is open is written to from where it stands: opened again, a file would begin anew."""
    n = stream_of(path)
    return path.open("wb") if n is None else os.fdopen(os.dup(n), "wb")


def format_of(path: Path) -> str:
    """Of scores written to `path`: its extension, or ".csv" of a stream that has none, such as /dev/stdout."""
    return path.suffix.lower() or (".csv" if _is_stream(path) else "")


def _target(path: Path) -> Path:
    """Where a link leads; a path that is none stays as it was given, for messages."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block ends, and vanishes if it raises.

    A link stays one: the file that it leads to is replaced. A file replaced keeps its mode and, where
    that is allowed, its owner. What is no file, such as a device or a pipe, is written to, all at once.

    Raises
    ------
    FileError
        As ``writable`` does.

    Examples
    --------
    >>> from fastood.files import atomic
    >>> with atomic("scores.txt") as temporary:  # doctest: +SKIP
    ...     temporary.write_text("1.0")
    """
    path = writable(path)
    if _is_stream(path):
        with TemporaryDirectory() as folder:
            temporary = Path(folder, f"output{path.suffix}")
            yield temporary
            with temporary.open("rb") as source, _stream(path) as sink:
                shutil.copyfileobj(source, sink)
        return
    target = _target(path)
    before = target.stat() if target.exists() else None
    temporary = target.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:  # which begins before there is the file: a signal may come in between
        try:
            # Until it has the old file's mode, nobody else may look into it.
            temporary.touch(0o666 if before is None else 0o600, exist_ok=False)
        except OSError as error:
            raise FileError(f"{path}: no file can be made in {target.parent}: {error.strerror}") from error
        yield temporary
        if before is not None:
            for uid, gid in ((-1, before.st_gid), (before.st_uid, -1)):
                with suppress(OSError, AttributeError):  # few may give a file away, and Windows has no chown
                    os.chown(temporary, uid, gid)
            temporary.chmod(stat.S_IMODE(before.st_mode))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


Columns = dict[str, np.ndarray]
Sink = Callable[[Columns], object]


class ScoreWriter:
    """Takes scores chunk by chunk; ``save_scores`` makes one."""

    def __init__(self, sink: Sink, id_key: str | None) -> None:
        self._sink, self._id_key = sink, id_key
        self.names: list[str] | None = None

    def write(self, scores: Mapping[str, Tensor | np.ndarray], ids: np.ndarray | None = None) -> None:
        """Append rows: name -> [n], the same names every time; and their IDs [n], where there is a name for them."""
        columns = {k: x.detach().cpu().numpy() if isinstance(x, Tensor) else x for k, x in scores.items()}
        for k, x in columns.items():
            if not isinstance(x, np.ndarray) or x.ndim != 1:
                got = f"shape {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
                raise ValueError(f"scores: {k!r} must be a tensor or an array [n], got {got}")
        if (ids is None) != (self._id_key is None):
            raise ValueError(f"ids must be given if save_scores was given id_key, got id_key={self._id_key!r}")
        if self.names is None:
            self.names = list(columns)
        if list(columns) != self.names:
            raise ValueError(f"scores must be {self.names} in every chunk, got {list(columns)}")
        if ids is not None and self._id_key is not None:
            if self._id_key in columns:
                raise FileError(f"the IDs must not be called as a score is, {self._id_key!r}")
            columns = {self._id_key: ids.astype(object) if ids.dtype.kind == "U" else ids, **columns}
        if len({x.shape for x in columns.values()}) > 1:
            raise ValueError(f"scores and ids must be of one length, got { {k: len(x) for k, x in columns.items()} }")
        self._sink(columns)


@contextmanager
def save_scores(
    path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None, id_key: str | None = None
) -> Iterator[ScoreWriter]:
    """A writer of scores to .npz, .npy (one score), .safetensors, .pt, .parquet or .csv.

    The file appears, whole, when the block ends; if it raises, nothing has changed.

    Parameters
    ----------
    path : path
        A pipe, a device or an open stream (/dev/stdout) without an extension is written CSV.
    metadata : mapping of str to str, optional
        How the scores were made. A .parquet file has it as its schema's metadata, a .safetensors file as
        ``__metadata__``; the other formats have no place for it and leave it out.
    id_key : str, optional
        The name of the first column, which holds the `ids` that each ``write`` is given. Strings are for
        .csv, .parquet and .npz, integers also for .safetensors and .pt; .npy holds one score and nothing else.

    Raises
    ------
    FileError
        Where there can be no such file, or its format cannot hold what is written.

    Examples
    --------
    >>> with open_rows("val.npz", id_key="image") as rows:  # doctest: +SKIP
    ...     with save_scores("scores.parquet", id_key=rows.id_key) as out:
    ...         for (logits, feats), ids in zip(rows.chunks(), rows.ids()):
    ...             out.write(fastood.scores(logits, feats), ids)
    """
    path = Path(path)
    sink_of = _SINKS.get(format_of(path)) or _of_format(path, _SINKS)
    with atomic(path) as temporary, sink_of(temporary, dict(metadata or {})) as sink:
        writer = ScoreWriter(sink, id_key)
        yield writer
        if not writer.names:
            raise ValueError(f"{path}: no scores were written")


Metadata = dict[str, str]


@contextmanager
def _csv(path: Path, metadata: Metadata) -> Iterator[Sink]:
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")

        def write(columns: Columns) -> None:
            if not file.tell():
                out.writerow(columns)
            # numpy's text of a number is the shortest that reads back as the same float32 or float64.
            out.writerows(zip(*(x.astype(str) for x in columns.values()), strict=True))

        yield write


@contextmanager
def _parquet_rows(path: Path, metadata: Metadata) -> Iterator[Sink]:
    pa, pq = library("pyarrow"), library("pyarrow.parquet")
    with ExitStack() as stack:
        out = None

        def write(columns: Columns) -> None:
            nonlocal out
            table = pa.table({k: pa.array(x, pa.string() if x.dtype == object else None) for k, x in columns.items()})
            table = table.replace_schema_metadata(metadata)
            if out is None:
                out = stack.enter_context(pq.ParquetWriter(path, table.schema, write_page_checksum=True))
            out.write_table(table)

        yield write


def _held(
    save: Callable[[Path, Columns, Metadata], object], accept: Callable[[Columns], object]
) -> Callable[[Path, Metadata], AbstractContextManager[Sink]]:
    """For formats that say how many rows there are before the rows: scores are a few bytes a row, and kept."""

    @contextmanager
    def sink(path: Path, metadata: Metadata) -> Iterator[Sink]:
        chunks: list[Columns] = []

        def write(columns: Columns) -> None:
            accept(columns)
            chunks.append(columns)

        yield write
        save(path, {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}, metadata)

    return sink


def _one_score(columns: Columns) -> None:
    if len(columns) > 1:
        raise FileError(f"a .npy file holds one score, got {', '.join(columns)}; a .npz file holds many")


def _numbers(columns: Columns) -> None:
    for name, x in columns.items():
        if x.dtype == object:
            raise FileError(f"tensors hold no strings, as {name!r} has; .csv, .parquet and .npz files do")


def _save_npy(path: Path, columns: Columns, metadata: Metadata) -> None:
    with path.open("wb") as file:
        np.save(file, next(iter(columns.values())), allow_pickle=False)


def _save_npz(path: Path, columns: Columns, metadata: Metadata) -> None:
    # As np.savez does, which has no room for an array called "file".
    with zipfile.ZipFile(path, "w") as archive:
        for name, x in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, x.astype(str) if x.dtype == object else x, allow_pickle=False)


def _save_safetensors(path: Path, columns: Columns, metadata: Metadata) -> None:
    path.write_bytes(library("safetensors.numpy").save(columns, metadata))


def _save_pt(path: Path, columns: Columns, metadata: Metadata) -> None:
    torch.save({k: torch.from_numpy(x) for k, x in columns.items()}, path)


_SINKS: dict[str, Callable[[Path, Metadata], AbstractContextManager[Sink]]] = {
    ".npz": _held(_save_npz, lambda columns: None),
    ".npy": _held(_save_npy, _one_score),
    ".safetensors": _held(_save_safetensors, _numbers),
    ".pt": _held(_save_pt, _numbers),
    ".parquet": _parquet_rows,
    ".csv": _csv,
}

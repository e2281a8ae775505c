"""Logits, features and labels of all rows that a DataLoader gives: in memory, or streamed to a file."""

from __future__ import annotations

import json
import operator
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor, nn

from fastood._attach import Attached, as_arguments, attach, device_of, require_eval
from fastood._fork import one_thread_if_forked
from fastood._inputs import FP8_NAMES, flag


class Collected(NamedTuple):
    """What ``collect`` gives, on the CPU: logits [N, C], feats [N, D], labels [N], or None where there are none."""

    logits: Tensor
    feats: Tensor
    labels: Tensor | None


@overload
def collect(model: nn.Module, loader: Iterable[Any], out: None = None, progress: bool = True) -> Collected: ...
@overload
def collect(model: nn.Module, loader: Iterable[Any], out: str | os.PathLike[str], progress: bool = True) -> None: ...
def collect(
    model: nn.Module, loader: Iterable[Any], out: str | os.PathLike[str] | None = None, progress: bool = True
) -> Collected | None:
    """Run a model over all batches of a loader, and keep its logits, its features and the labels.

    Parameters
    ----------
    model : nn.Module
        As ``attach`` made it, compiled or wrapped since or not; any other is attached to first. In eval mode. It runs
        where it is, under ``torch.inference_mode``, and batches are moved there; for half precision, call within
        ``torch.autocast``.
    loader : iterable
        A DataLoader or the like, of inputs, of (inputs, labels), or of dicts of the model's arguments, in which
        "labels" or "label" are no argument. Inputs are a tensor, or a tuple or dict of the model's arguments; labels
        are [n]: integers, or whatever else numbers can be.
    out : path, optional
        A .safetensors or .npz file to write to in place of memory: "logits", "feats" and, where there are labels,
        "labels", which is what ``fastood eval`` and ``fastood.files.open_rows`` read. No more than a batch is held in
        memory. The rows gather in a folder beside the file, and need its size twice on the disk for a moment; the file
        appears whole or not at all.
    progress : bool
        A bar on standard error where that is a terminal and rich is installed.

    Returns
    -------
    Collected
        (logits [N, C], feats [N, D], labels [N] or None), on the CPU, in the model's dtypes; None with `out`.

    Raises
    ------
    TypeError, ValueError
        Where the model is in training mode, a batch is something else, or there are none; and as ``attach`` does.
    FileError
        A ValueError: where there can be no such file, or .npz cannot hold bfloat16 or FP8, which numpy has not.

    Examples
    --------
    >>> import torch, fastood
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)).eval()
    >>> data = torch.utils.data.TensorDataset(torch.randn(100, 8), torch.randint(10, (100,)))
    >>> logits, feats, labels = fastood.collect(model, torch.utils.data.DataLoader(data, batch_size=32))
    >>> logits.shape, feats.shape, labels.shape
    (torch.Size([100, 10]), torch.Size([100, 16]), torch.Size([100]))
    """
    if out is None:
        held = _Held()
        for batch in run(model, loader, progress):
            held.add(batch)
        return held.all()
    from fastood.files import FileError, atomic

    path = Path(out)
    if path.suffix.lower() not in _WRITERS:
        raise FileError(f"{path}: unknown extension {path.suffix!r}; known are {', '.join(_WRITERS)}")
    # Beside the file, where there is room for it, rather than on what may be a small disk or memory.
    with atomic(path) as temporary, TemporaryDirectory(prefix=".fastood-", dir=temporary.parent) as folder:
        with ExitStack() as stack:
            spool = _Spool(Path(folder), stack)
            for batch in run(model, loader, progress):
                spool.add(batch)
        _WRITERS[path.suffix.lower()](path, temporary, spool.arrays)
    return None


def run(model: nn.Module, loader: Iterable[Any], progress: bool) -> Iterator[Collected]:
    """The batches of a loader, run through a model: where the model is, and only good until the next one."""
    one_thread_if_forked()
    flag("progress", progress)
    model = ready(model)
    device, labelled = device_of(model), None
    for batch in shown(loader, "batches") if progress else loader:
        inputs, labels = _parted(batch)
        arguments, named = as_arguments(_moved(inputs, device))
        with torch.inference_mode():
            logits, feats = model(*arguments, **named)[:2]
        if labels is not None:
            try:
                labels = torch.as_tensor(labels)
            except (TypeError, ValueError, RuntimeError) as error:  # text, say
                raise TypeError(f"labels must be numbers, one per row, got {type(labels).__name__}: {error}") from None
            if labels.shape != logits.shape[:1]:
                raise ValueError(f"labels must be [{len(logits)}], one per row, got shape {list(labels.shape)}")
        if labelled not in (None, labels is not None):
            raise ValueError("loader must give labels with every batch or with none")
        labelled = labels is not None
        yield Collected(logits, feats, labels)
    if labelled is None:
        raise ValueError("loader must give at least one batch, got none")


def ready(model: nn.Module) -> nn.Module:
    """`model`, attached to if it is not; an error where it is in training mode."""
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    inner = getattr(inner, "module", inner)  # of DataParallel
    if not isinstance(inner, Attached):
        model = inner = attach(model)
    require_eval(inner, "model")
    return model


def _parted(batch: Any) -> tuple[Any, Any]:
    """Inputs, and labels or None."""
    if isinstance(batch, Mapping):
        inputs = {name: x for name, x in batch.items() if name not in ("labels", "label")}
        return inputs, batch.get("labels", batch.get("label"))
    if not isinstance(batch, tuple | list):
        return batch, None
    if len(batch) == 1:
        return batch[0], None
    if len(batch) == 2:
        return batch[0], batch[1]
    raise TypeError(f"loader must give inputs or (inputs, labels), got a {type(batch).__name__} of {len(batch)}")


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)
    if isinstance(x, Mapping):
        return {name: _moved(part, device) for name, part in x.items()}
    return tuple(_moved(part, device) for part in x) if isinstance(x, tuple | list) else x


def shown(loader: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """`loader`, with a bar on the terminal where there is one."""
    if not (sys.stderr and sys.stderr.isatty()) or find_spec("rich") is None:
        return loader
    from rich.console import Console
    from rich.progress import track

    total = total or operator.length_hint(loader) or None  # an IterableDataset may not know
    return track(loader, what, total, console=Console(stderr=True), transient=True)


class _Held:
    def __init__(self) -> None:
        self.parts: list[list[Tensor]] = [[], [], []]

    def add(self, batch: Collected) -> None:
        for parts, x in zip(self.parts, batch, strict=True):
            if x is not None:
                # A copy even on the CPU: features may be a view of all tokens, or memory that a compiled model uses
                # again.
                parts.append(x.to("cpu", copy=True))

    def all(self) -> Collected:
        whole: list[Any] = []
        for parts in self.parts:
            whole.append(torch.cat(parts) if parts else None)
            parts.clear()
        return Collected(*whole)


class _Stored(NamedTuple):
    """The rows of one array, without a header."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Spool:
    """Rows that are written as they come, each array to a file of its own: how many there are is known at the end."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.files: dict[str, IO[bytes]] = {}
        self.arrays: dict[str, _Stored] = {}

    def add(self, batch: Collected) -> None:
        for name, x in batch._asdict().items():
            if x is None:
                continue
            before = self.arrays.get(name)
            if before is None:
                before = _Stored(self.folder / name, x.dtype, (0, *x.shape[1:]))
                self.files[name] = self.stack.enter_context(before.path.open("wb"))
            if (x.dtype, x.shape[1:]) != (before.dtype, before.shape[1:]):
                raise ValueError(
                    f"{name} must be {before.dtype} [n{''.join(f', {n}' for n in before.shape[1:])}] in every batch, "
                    f"got {x.dtype} {list(x.shape)}"
                )
            # A copy, for the stride of an axis of length 1 may be anything, and view would have it 1.
            rows = x.cpu().clone(memory_format=torch.contiguous_format)
            self.files[name].write(rows.view(torch.uint8).numpy().data)
            self.arrays[name] = before._replace(shape=(before.shape[0] + len(x), *x.shape[1:]))


Arrays = Mapping[str, _Stored]


def _write_npz(path: Path, temporary: Path, arrays: Arrays) -> None:
    from fastood.files import FileError

    with zipfile.ZipFile(temporary, "w") as archive:
        for name, x in arrays.items():
            try:
                dtype = torch.empty(0, dtype=x.dtype).numpy().dtype
            except TypeError:
                raise FileError(f"{path}: numpy has no {x.dtype}, as {name} are; a .safetensors file has") from None
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member, x.path.open("rb") as rows:
                header = {"descr": dtype.str, "fortran_order": False, "shape": x.shape}
                np.lib.format.write_array_header_2_0(member, header)
                shutil.copyfileobj(rows, member)


def _write_safetensors(path: Path, temporary: Path, arrays: Arrays) -> None:
    # By hand, for the library takes whole tensors: the length of the header, the header, the rows.
    from fastood.files import FileError

    header, end = {}, 0
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)  # every one aligned
    for name, x in ordered:
        if x.dtype not in _SAFETENSORS:
            raise FileError(f"{path}: safetensors has no {x.dtype}, as {name} are")
        begin, end = end, end + x.path.stat().st_size
        header[name] = {"dtype": _SAFETENSORS[x.dtype], "shape": x.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, x in ordered:
            with x.path.open("rb") as rows:
                shutil.copyfileobj(rows, file)


_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    **FP8_NAMES,
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_WRITERS: dict[str, Callable[[Path, Path, Arrays], None]] = {".npz": _write_npz, ".safetensors": _write_safetensors}

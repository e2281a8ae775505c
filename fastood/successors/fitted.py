"""Fitted: one successor, what it takes of the head, and what in-distribution rows left behind."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastood._inputs import (
    Array,
    ArrayT,
    choice,
    class_labels,
    flag,
    give,
    logits_and_feats,
    result_dtype,
    rows_along,
    take,
    temperature_of,
)
from fastood._version import __version__
from fastood.kernels import Backend, Run, select, supporting
from fastood.successors import scores as _scores  # noqa: F401 (declares them)
from fastood.successors.declaration import SUCCESSORS, Rows, Successor, wide

FILE_VERSION = 1
TILE = 1 << 20  # numbers of a row tile that are float64 at a time

Head = nn.Module | tuple[Any, Any]


class Fitted:
    """A score that came after the paper, with the last layer and the in-distribution rows that it goes by.

    ``fastood.SUCCESSORS`` lists them, docs/successors.md says what each is. A Fitted stands where a method's name does:
    ``fastood.score(logits, feats, fitted)``, ``fastood.Detector(fitted)``. Fit on rows of the classifier's *training*
    set, and calibrate a Detector on others, which the model has not been trained on.

    What rows leave behind are sums, in float64, and banks. ``partial_fit`` adds to them, ``merge`` adds two of them,
    and but for the rounding of float64 sums the result does not hang on how the rows were split, or in which order
    they came. "knn", "nnguide" and "vim" hold all features; the others keep nothing of a row beyond its sums.

    Parameters
    ----------
    method : str
        A name in ``fastood.SUCCESSORS``.
    head : nn.Linear, 1x1 nn.Conv2d, or (weight, bias), optional
        The last layer, as ``fastood.attach(model).head`` has it: weight [C, D], bias [C] or None. Given where
        ``SUCCESSORS[method].head`` says so.
    temperature : float
        T > 0 of the softmax and of the energy inside it.
    **params
        Parameters of the score: ``SUCCESSORS[method].params`` has them with their defaults.

    Attributes
    ----------
    rows : int
        How many rows it was fitted on.
    classes, dim : int or None
        The columns of logits and feats that it was fitted on, or that the head has; None where it knows of none.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was wanted.

    Examples
    --------
    >>> import torch, fastood
    >>> g = torch.Generator().manual_seed(0)
    >>> labels = torch.arange(300) % 3
    >>> feats = 4 * torch.eye(3, 8)[labels] + torch.randn(300, 8, generator=g)
    >>> fitted = fastood.Fitted("mahalanobis").fit(None, feats, labels)
    >>> fitted
    Fitted('mahalanobis'; fitted on 300 rows)
    >>> fastood.score(None, torch.eye(1, 8) * torch.tensor([[4.0], [40.0]]), fitted) > -50
    tensor([ True, False])
    """

    def __init__(self, method: str, *, head: Head | None = None, temperature: float = 1.0, **params: Any) -> None:
        self._settle(method, temperature, params)
        self._head = _head_of(head, self.entry)
        self._forget()

    def _settle(self, method: str, temperature: float, params: Mapping[str, Any]) -> None:
        entry = SUCCESSORS[choice("method", method, tuple(SUCCESSORS))]
        self.method, self.temperature = entry.name, temperature_of(temperature)
        for name in params:
            if name not in entry.params:
                has = ", ".join(entry.params) or "none"
                raise TypeError(f"{name}: no such parameter of {entry.name}, which has {has}")
        given = {name: x.item() if isinstance(x, np.generic) else x for name, x in params.items()}
        self.params = {**entry.params, **given}
        if entry.check:
            entry.check(**self.params)

    def _forget(self) -> None:
        weight, bias = self._head.get("weight"), self._head.get("bias")
        self.rows = 0
        self.classes = next((len(x) for x in (weight, bias) if x is not None), None)
        self.dim = None if weight is None else weight.shape[1]
        self._sums: dict[str, Tensor] = {}
        self._banks: dict[str, list[Tensor]] = {}
        self._states: dict[torch.device, dict[str, Tensor]] = {}
        self._runs: dict[Any, tuple[Any, Run]] = {}  # of a scaling: what backends made of a state, for sizes of rows

    @property
    def entry(self) -> Successor:
        """What ``fastood.SUCCESSORS`` declares of the method."""
        return SUCCESSORS[self.method]

    # ---- fitting

    def fit(self, logits: ArrayT | None, feats: ArrayT | None = None, labels: Array | None = None) -> Fitted:
        """Learn from in-distribution rows, in place of any that it was fitted on before.

        Parameters
        ----------
        logits : Tensor or ndarray [N, C]
        feats : Tensor or ndarray [N, D]
            None for what ``SUCCESSORS[method].fitted_on`` does not name.
        labels : Tensor or ndarray [N] of integers, optional
            The true classes. Left out: the predicted ones, the argmax of the logits. "she" learns from the rows alone
            that are predicted right. "kl_matching" always goes by the predicted class.

        Returns
        -------
        Fitted
            Itself.

        Raises
        ------
        ValueError
            Where a row holds NaN, infinite features or logits without a softmax: the message says how many do.

        Examples
        --------
        >>> import torch, fastood
        >>> head = torch.nn.Linear(8, 3)
        >>> feats = torch.randn(100, 8)
        >>> fastood.Fitted("nci", head=head).fit(head(feats), feats).rows
        100
        """
        self._forget()
        self.partial_fit(logits, feats, labels)
        self._state()  # or what is lacking
        return self

    def partial_fit(self, logits: ArrayT | None, feats: ArrayT | None = None, labels: Array | None = None) -> Fitted:
        """Add rows to those of earlier calls. What is lacking shows once it scores.

        The arguments are those of ``fit``, and so are its errors.

        Examples
        --------
        >>> import torch, fastood
        >>> fitted = fastood.Fitted("kl_matching")
        >>> for logits in torch.randn(100, 10).split(32):
        ...     _ = fitted.partial_fit(logits)
        >>> fitted.rows
        100
        """
        wanted = self.entry.fitted_on
        if not wanted:
            raise ValueError(f"{self.method} needs no fit: it is a formula of logits, feats and head")
        f, h, _ = logits_and_feats(logits, feats)
        x = f if f is not None else h
        assert x is not None
        for name, given in (("logits", f), ("feats", h)):
            if given is None and name in wanted:
                raise ValueError(f"{name} must be given to fit {self.method}")
        if f is None and ("correct" in wanted or ("classes" in wanted and labels is None)):
            also = "" if "correct" in wanted else " where there are no labels"
            raise ValueError(f"logits must be given to fit {self.method}{also}: they say what a row is predicted as")
        self._check(f, h)
        if not len(x):
            return self
        with torch.no_grad():
            f, h = (None if x is None else x.detach() for x in (f, h))
            _refuse_odd(f, h if "feats" in wanted else None)
            y = None
            if labels is not None:
                known = f.shape[1] if f is not None else self._classes_of(labels)
                y = class_labels("labels", labels, len(x), known).to(x.device)
            if "correct" in wanted and f is not None and y is not None:
                right = f.argmax(1) == y
                f, h, y = f[right], None if h is None else h[right], None
            K = f.shape[1] if f is not None else 1 + int(y.max()) if y is not None and len(y) else 0
            for part in _tiles(max(1, len(x) if f is None else len(f)), f, h):  # one even of no rows: sums of 0
                a, b, c = (None if v is None else v[part] for v in (f, h, y))
                self._add(Rows(a, b, self.temperature, labels=c), K)
        self.rows += len(x)
        self.classes = f.shape[1] if f is not None else self.classes
        self.dim = h.shape[1] if h is not None else self.dim
        self._states = {}
        return self

    def _classes_of(self, labels: Any) -> int:
        """How many classes labels speak of, where nothing else says it."""
        if self.classes is not None:
            return self.classes
        top = labels.max() if isinstance(labels, Tensor | np.ndarray) and labels.ndim and len(labels) else 0
        return 1 + max(int(top), 0)

    def _add(self, rows: Rows, K: int) -> None:
        if self.entry.sums:
            for name, x in self.entry.sums(rows, K, **self.params).items():
                self._sums[name] = _added(self._sums.get(name), x)
        if self.entry.bank:
            for name, x in self.entry.bank(rows, **self.params).items():
                self._banks.setdefault(name, []).append(x.to(rows.dtype, copy=True))

    def fit_loader(self, model: nn.Module, loader: Iterable[Any], *, progress: bool = True) -> Fitted:
        """``fit`` on all that a DataLoader gives, run through a model, with labels where it has them.

        The arguments are those of ``fastood.collect``, errors also those of ``fit``.

        Examples
        --------
        >>> import torch, fastood
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)).eval()
        >>> attached = fastood.attach(model, example=torch.randn(1, 8))
        >>> fastood.Fitted("fdbd", head=attached.head).fit_loader(attached, torch.randn(100, 8).split(32)).rows
        100
        """
        from fastood._collect import run

        self._forget()
        for logits, feats, labels in run(model, loader, progress):
            self.partial_fit(logits, feats, labels)
        self._state()  # or what is lacking
        return self

    def merge(self, other: Fitted) -> Fitted:
        """Add the rows that another one of the same settings and head was fitted on: shards, fitted in parallel.

        TypeError or ValueError where `other` is not such a one.

        Examples
        --------
        >>> import torch, fastood
        >>> a, b = (fastood.Fitted("kl_matching").partial_fit(torch.randn(50, 10)) for _ in range(2))
        >>> a.merge(b).rows
        100
        """
        if not isinstance(other, Fitted):
            raise TypeError(f"other must be a fastood.Fitted, got {type(other).__name__}")
        if other is self:
            raise ValueError("other must be another one, got the same one")
        theirs = other._settings()
        for name, x in self._settings().items():
            if theirs[name] != x and not (name in ("classes", "dim") and None in (x, theirs[name])):
                raise ValueError(f"other must have {name}={x!r}, got {name}={theirs[name]!r}")
        for name, x in self._head.items():
            if not torch.equal(x.cpu(), other._head[name].cpu()):
                raise ValueError(f"other must have the same head, its {name} differs")
        for name, x in other._sums.items():
            self._sums[name] = _added(self._sums.get(name), x)
        for name, bank in other._banks.items():
            self._banks.setdefault(name, []).extend(bank)
        self.rows += other.rows
        self.classes = other.classes if self.classes is None else self.classes
        self.dim = other.dim if self.dim is None else self.dim
        self._states = {}
        return self

    @property
    def needs_fit(self) -> bool:
        """Whether rows are still to come before it can score."""
        return bool(self.entry.fitted_on) and self.rows == 0

    @property
    def state(self) -> dict[str, Tensor]:
        """What the formula reads besides a row: named tensors, on the CPU."""
        return dict(self._state(torch.device("cpu")))

    def _state(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """On a device; left out: where the totals are."""
        if device is None:
            device = next((x.device for x in self._totals().values()), torch.device("cpu"))
        state = self._states.get(device)
        if state is None:
            finished = (*self._states.values(), None)[0]  # which torch 2.8 can trace
            state = {name: _moved(x, device) for name, x in (finished or self._finished()).items()}
            self._states = {**self._states, device: state}  # whole, for another thread may be reading
        return state

    def _finished(self) -> dict[str, Tensor]:
        if self.needs_fit:
            raise RuntimeError(
                f"{self.method} is not fitted: fastood.Fitted({self.method!r}, ...).fit(logits, feats, labels), on "
                "in-distribution rows, makes what scores by it"
            )
        if not self.entry.finish:
            return self._head
        totals = self._totals()
        place = next(iter(totals.values())).device
        head = {name: x.to(place) for name, x in self._head.items()}
        with torch.no_grad():
            return {**head, **self.entry.finish(totals, head, **self.params)}

    def _totals(self) -> dict[str, Tensor]:
        for name, bank in self._banks.items():
            if len(bank) > 1:
                self._banks[name] = [torch.cat([x.to(bank[0].device) for x in bank])]
        return {**self._sums, **{name: bank[0] for name, bank in self._banks.items()}}

    # ---- scoring

    def score(
        self,
        logits: ArrayT | None,
        feats: ArrayT | None = None,
        *,
        oriented: bool = True,
        backend: str = "auto",
        dim: int | None = None,
    ) -> ArrayT:
        """How in-distribution each row is: [N], higher = more in-distribution.

        Parameters
        ----------
        logits : Tensor or ndarray [N, C]
        feats : Tensor or ndarray [N, D]
            ``SUCCESSORS[method].needs`` says which of the two.
        oriented, backend, dim
            As in ``fastood.score``; the backend is that of the energy inside a score.

        Returns
        -------
        Tensor or ndarray [N]
            Of the kind and on the device of the inputs; float32, or float64 where an input is float64. NaN for a row
            with NaN, with infinite features, or with logits that have no softmax.

        Raises
        ------
        RuntimeError
            Where it is still to be fitted.
        TypeError, ValueError
            Naming the argument, what came and what was wanted.

        Notes
        -----
        Rows are taken a tile at a time, in float64 inside but for the energy. The bits of a row may depend on how many
        rows it comes with, where a product of matrices is in the formula.

        Examples
        --------
        >>> import torch, fastood
        >>> feats = torch.eye(4)[torch.arange(40) % 4] * torch.linspace(1, 2, 40)[:, None]
        >>> fitted = fastood.Fitted("class_cosine").fit(None, feats, torch.arange(40) % 4)
        >>> fitted.score(None, torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]]))
        tensor([1.0000, 0.7071])
        """
        if dim is not None:
            (f, h), shape = rows_along(dim, logits=logits, feats=feats)
            return self.score(f, h, oriented=oriented, backend=backend).reshape(shape)
        needs, oriented = self.entry.needs, flag("oriented", oriented)
        for name, given in (("logits", logits), ("feats", feats)):
            if given is None and name in needs:
                raise ValueError(f"{name} must be given: {self.method} = {self.entry.formula}")
        f, h, as_numpy = logits_and_feats(logits if "logits" in needs else None, feats if "feats" in needs else None)
        self._check(f, h)
        whole = Rows(f, h, self.temperature, backend)
        x = f if f is not None else h
        assert x is not None
        state = self._state(x.device)
        sign = -1 if oriented and self.entry.higher == "out" else 1
        if self.entry.scaling:
            chosen = select(backend, x.device, whole.dtype, f, h, state.get("bias"))
            return give(sign * self._run(chosen, state, f, h)(f, h), as_numpy)
        assert self.entry.score is not None
        parts = []
        for part in _tiles(x.shape[0], f, h):
            a, b = (None if v is None else v[part] for v in (f, h))
            rows = Rows(a, b, self.temperature, backend)
            raw = self.entry.score(rows, state, **self.params)
            parts.append(raw.masked_fill(_odd(rows.logits, rows.feats), math.nan))
        out = torch.cat(parts) if parts else x.new_empty(0)
        return give((sign * out).to(whole.dtype), as_numpy)

    def _run(self, chosen: Backend, state: dict[str, Tensor], f: Tensor | None, h: Tensor | None) -> Run:
        assert self.entry.scaling is not None
        if torch.compiler.is_compiling():  # what a graph may hold supports all of it
            return chosen.scaled(self.entry.scaling(state, self.temperature, **self.params))
        C, D = (0 if x is None else x.shape[1] for x in (f, h))
        known = self._runs.get((chosen, C, D))
        if known is None or known[0] is not state:
            scaling = self.entry.scaling(state, self.temperature, **self.params)
            known = self._runs[chosen, C, D] = state, supporting(chosen, scaling, C, D).scaled(scaling)
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": {}}  # copies and pickles make their own

    def _check(self, f: Tensor | None, h: Tensor | None) -> None:
        for name, x, what, wanted in (("logits", f, "classes", self.classes), ("feats", h, "features", self.dim)):
            if x is not None and wanted is not None and x.shape[1] != wanted:
                raise ValueError(f"{name} must have the {wanted} {what} of {self.method}, got shape {list(x.shape)}")
        if h is not None and h.shape[1] == 0:
            raise ValueError(f"feats must have at least one feature, got shape {list(h.shape)}")

    def __repr__(self) -> str:
        options = {"temperature": self.temperature, **self.params}
        defaults = {"temperature": 1.0, **self.entry.params}
        text = "".join(f", {name}={x!r}" for name, x in options.items() if x != defaults[name])
        state = "not fitted" if self.needs_fit else f"fitted on {self.rows} rows" if self.rows else "needs no fit"
        return f"Fitted({self.method!r}{text}; {state})"

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """To one .safetensors file, which ``Fitted.load`` reads: settings, head, sums and banks. It can be fitted on.

        Examples
        --------
        >>> fitted.save("mahalanobis.safetensors")  # doctest: +SKIP
        """
        from fastood.files import atomic, library, writable

        path = writable(path, suffixes=(".safetensors",))
        header = {"kind": "Fitted", "version": FILE_VERSION, "fastood": __version__, **self._header()}
        data = library("safetensors.torch").save(self._tensors(), metadata={"fastood": json.dumps(header)})
        with atomic(path) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fitted:
        """What ``save`` wrote, on the CPU. Nothing in the file is run, and all of it is checked: else a FileError.

        Examples
        --------
        >>> fitted = fastood.Fitted.load("mahalanobis.safetensors")  # doctest: +SKIP
        """
        from fastood.files import FileError, library

        safetensors = library("safetensors")
        if not os.path.isfile(path):
            raise FileError(f"{os.fspath(path)}: no such file")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("fastood", "")
                header = json.loads(text) if text.startswith("{") else {}
                if not isinstance(header, dict) or header.get("kind") != "Fitted":
                    raise ValueError("not a file that Fitted.save wrote")
                if header.get("version") != FILE_VERSION:
                    raise ValueError(f"format version {header.get('version')!r}, this reads version {FILE_VERSION}")
                return cls._restored(header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (ValueError, TypeError, KeyError, RecursionError, safetensors.SafetensorError) as error:
            missing = "it lacks " if isinstance(error, KeyError) else ""
            raise FileError(f"{os.fspath(path)}: cannot be read as a fitted score: {missing}{error}") from error

    def _settings(self) -> dict[str, Any]:
        settings = {"method": self.method, "temperature": self.temperature, "params": dict(self.params)}
        return {**settings, "classes": self.classes, "dim": self.dim}

    def _header(self) -> dict[str, Any]:
        return {**self._settings(), "rows": self.rows}

    def _tensors(self) -> dict[str, Tensor]:
        """All that a file holds, by name."""
        self._totals()  # banks in one piece
        parts = {"head": self._head, "sums": self._sums, "bank": {name: bank[0] for name, bank in self._banks.items()}}
        return {
            f"{part}.{name}": x.detach().cpu().contiguous() for part, held in parts.items() for name, x in held.items()
        }

    @classmethod
    def _restored(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Fitted:
        parts: dict[str, dict[str, Tensor]] = {"head": {}, "sums": {}, "bank": {}}
        for name, x in tensors.items():
            part, _, rest = name.partition(".")
            if part not in parts or not rest:
                raise ValueError(f"{name!r} must not be there")
            parts[part][rest] = x
        if not isinstance(header["params"], dict):
            raise ValueError(f"params must be an object, got {header['params']!r}")
        fitted = cls.__new__(cls)
        fitted._settle(header["method"], header["temperature"], header["params"])
        fitted._head = head = parts["head"]
        if head.keys() != set(fitted.entry.head):
            raise ValueError(f"its head must have {', '.join(fitted.entry.head) or 'nothing'}, got {', '.join(head)}")
        for name, x in head.items():
            if not x.is_floating_point() or x.ndim != (2 if name == "weight" else 1) or not len(x):
                raise ValueError(f"the head's {name} must not be {x.dtype}{list(x.shape)}")
        if len({len(x) for x in head.values()}) > 1:
            raise ValueError("the head's weight and bias must have as many classes")
        fitted._forget()
        rows, classes, dim = (header[name] for name in ("rows", "classes", "dim"))
        for name, x in (("rows", rows), ("classes", classes), ("dim", dim)):
            if not (x is None and name != "rows") and (type(x) is not int or x < 0):
                raise ValueError(f"{name} must be a whole number, got {x!r}")
        for name, here, there in (("classes", fitted.classes, classes), ("dim", fitted.dim, dim)):
            if here is not None and here != there:
                raise ValueError(f"{name} must be the head's {here}, got {there!r}")
        fitted.rows, fitted.classes, fitted.dim = rows, classes, dim
        fitted._sums, fitted._banks = parts["sums"], {name: [x] for name, x in parts["bank"].items()}
        fitted._check_totals()
        return fitted

    def _check_totals(self) -> None:
        """ValueError where sums and banks are not those that a fit of this score leaves."""
        if self.needs_fit or not self.entry.fitted_on:
            expected: dict[str, Any] = {}
        else:
            C, D = self.classes or 1, self.dim or 1
            rows = Rows(
                torch.zeros(1, C), torch.zeros(1, D), self.temperature, labels=torch.zeros(1, dtype=torch.int64)
            )
            expected = self.entry.sums(rows, C, **self.params) if self.entry.sums else {}
            expected |= self.entry.bank(rows, **self.params) if self.entry.bank else {}
        found = {**self._sums, **{name: bank[0] for name, bank in self._banks.items()}}
        if found.keys() != expected.keys():
            raise ValueError(f"it must hold {', '.join(expected) or 'no sums'}, got {', '.join(found) or 'none'}")
        for name, x in found.items():
            lead = (self.rows,) if name in self._banks else None
            shape = expected[name].shape
            free = name in self._sums and self.classes is None and shape[:1] == (1,)
            wanted = lead + tuple(shape[1:]) if lead else (x.shape[0], *shape[1:]) if free and x.ndim else tuple(shape)
            if tuple(x.shape) != tuple(wanted):
                raise ValueError(f"{name!r} must be {list(wanted)}, got {list(x.shape)}")
            if not x.isfinite().all():
                raise ValueError(f"{name!r} must be finite")

    def digest(self) -> str:
        """Of settings, head, sums and banks: equal where scores are the same to the bit."""
        found = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        for name, x in sorted(self._tensors().items()):
            found.update(name.encode())
            found.update(x.flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()


def successor_of(method: Any, head: Any, temperature: Any, params: Mapping[str, Any]) -> Fitted | None:
    """The Fitted behind a `method` of ``fastood.score``: one that was passed, or made of a name; None for others.

    Examples
    --------
    >>> import torch
    >>> from fastood.successors.fitted import successor_of
    >>> successor_of("scale", torch.nn.Linear(8, 3), 1.0, {"percentile": 0.9})
    Fitted('scale', percentile=0.9; needs no fit)
    """
    if isinstance(method, Fitted):
        for name, given in {"head": head is not None, **dict.fromkeys(params, True)}.items():
            if given:
                raise ValueError(f"{name} must not be given with a fastood.Fitted, which has its own")
        if temperature not in (1.0, method.temperature):
            raise ValueError(f"temperature must be that of method, {method.temperature:g}, got {temperature!r}")
        return method
    if not isinstance(method, str) or method not in SUCCESSORS:
        return None
    return Fitted(method, head=head, temperature=temperature, **params)


def _head_of(head: Any, entry: Successor) -> dict[str, Tensor]:
    """The parts of `head` that the score takes, detached."""
    if not entry.head:
        return {}
    if head is None:
        raise ValueError(
            f"head must be given: {entry.name} = {entry.formula}; it is the last layer: "
            "fastood.attach(model).head, or (weight, bias)"
        )
    if isinstance(head, nn.Module):
        weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
        if not isinstance(weight, Tensor) or weight.numel() != math.prod(weight.shape[:2]) or weight.ndim < 2:
            kind = f"{type(head).__module__}.{type(head).__name__}"  # torch's quantised layers are called Linear, too
            raise TypeError(f"head must be a Linear, a 1x1 Conv2d or (weight, bias), got {kind}")
        if type(weight).dequantize is not Tensor.dequantize:  # torchao's, which have few operations
            weight = weight.dequantize()
        _require_linear(head, weight, bias)
        weight = weight.flatten(1)
    elif isinstance(head, tuple | list) and len(head) == 2:
        weight, bias = head
    else:
        raise TypeError(f"head must be a Linear, a 1x1 Conv2d or (weight, bias), got {type(head).__name__}")
    if weight is None:
        raise TypeError("head: weight must be a torch tensor or a numpy array, got None")
    if bias is not None and getattr(bias, "ndim", 1) != 1:
        raise ValueError(f"head: bias must be [C], got shape {list(bias.shape)}")
    (w, b), _ = take(weight=weight, bias=None if bias is None else bias[None])
    assert w is not None
    if w.shape[0] == 0:
        raise ValueError(f"head: weight must be [C, D] of at least one class, got shape {list(w.shape)}")
    if b is None:
        b = w.new_zeros(1, w.shape[0])
    elif b.shape[1] != w.shape[0]:
        raise ValueError(f"head: bias must be [{w.shape[0]}], one number per class, got shape {list(b.shape[1:])}")
    parts = {"weight": w, "bias": b[0]}
    return {name: parts[name].detach().to(result_dtype(parts[name])) for name in entry.head}


def _require_linear(head: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """An adapter or a cosine has a weight, too, which is not all that it does."""
    inner = getattr(head, "_orig_mod", head)  # of torch.compile
    if type(inner).forward in (nn.Linear.forward, nn.Conv2d.forward) or torch.compiler.is_compiling():
        return
    h = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    name = type(inner).__name__
    try:
        with torch.no_grad():
            expected = nn.functional.linear(h, weight.flatten(1), bias)
            off = (inner(h[..., None, None] if weight.ndim == 4 else h).flatten(1) - expected).abs().max()
            same = bool(off <= 0.01 * expected.abs().max())  # TF32 is nearer than that
    except Exception as error:
        raise TypeError(f"head must be a linear layer, but {name} does not take feats [1, D] ({error})") from error
    if not same:
        raise ValueError(
            f"head must be a linear layer, but {name} gives something else than its weight and bias do: where that "
            "is linear too, as an adapter's, pass (weight, bias) of the whole"
        )


def _tiles(n: int, *columns: Tensor | None) -> Iterable[slice]:
    if torch.compiler.is_compiling():  # for any number of rows
        return (slice(None),)
    step = max(1, TILE // max(1, *(x.shape[1] for x in columns if x is not None)))
    return (slice(i, i + step) for i in range(0, n, step))


def _odd(f: Tensor | None, h: Tensor | None) -> Tensor:
    """Which rows have no score: NaN or infinite features, logits without a softmax."""
    odd = [] if f is None else [~(f.amax(1).abs() < math.inf)]
    if h is not None:
        odd.append(~h.isfinite().all(1))
    return odd[0] if len(odd) == 1 else odd[0] | odd[1]


def _refuse_odd(f: Tensor | None, h: Tensor | None) -> None:
    if f is None and h is None:
        return
    odd = _odd(f, h).nonzero()[:, 0].tolist()
    if odd:
        n = len(f if f is not None else h)  # type: ignore[arg-type]
        raise ValueError(
            f"logits, feats: {len(odd)} of {n} rows hold NaN, infinite features, or logits without a softmax, the "
            f"first of them row {odd[0]}: leave those rows out, knowingly"
        )


def _added(a: Tensor | None, b: Tensor) -> Tensor:
    """a + b on a's device, the shorter of [K, ...] with zeros for the classes that it has not seen."""
    if a is None:
        return b.clone()
    b = b.to(a.device)
    if a.shape != b.shape:
        if len(a) < len(b):
            a, b = b.clone(), a
        a = a.clone()
        a[: len(b)] += b
        return a
    return a + b


def _moved(x: Tensor, device: torch.device) -> Tensor:
    if device.type == "mps" and x.dtype == torch.float64:
        x = wide(x.float())
    return x.to(device)

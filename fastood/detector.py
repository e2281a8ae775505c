"""From scores to decisions: a threshold that keeps a stated share of in-distribution rows, saved and loaded."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastood._data import label_of
from fastood._fork import one_thread_if_forked
from fastood._inputs import Array, ArrayT, Order, class_labels, flag, logits_and_feats, number, rows_along, widened
from fastood._plan import Plan
from fastood._sample import Floats, Sample
from fastood._sample import rows_needed as rows_needed
from fastood._version import __version__
from fastood.api import _entry, refuse_factors, score
from fastood.api import _order as order_of_norm
from fastood.registry import Method
from fastood.successors.declaration import HeadMethod
from fastood.successors.fitted import Fitted, Head, successor_of

if TYPE_CHECKING:
    from fastood._choice import Choice

FILE_VERSION = 1
_OF_SUCCESSOR = "successor."  # before the names of its tensors in a file


class Detector:
    """A yes or no for every row: does it look like the data that the detector was fitted on?

    It scores rows as ``fastood.score`` does and compares with a threshold taken from in-distribution rows
    that the model was not trained on (split conformal prediction). With calibration scores s_1 ... s_n,
    a row of score s has the p-value ``(1 + #{s_i <= s}) / (n + 1)``, and is accepted where that is above
    ``1 - tpr``; in other words, where s is at least the k-th smallest s_i, with k the largest number for
    which ``k / (n + 1) <= 1 - tpr``.

    **What it promises.** Of new rows that are exchangeable with the calibration rows (drawn alike), a share
    of at least `tpr` is accepted, on the average over calibration sets, for every n and every score; ties
    between scores only raise it. Of one calibration set that share is a draw from (without ties)
    Beta(n + 1 - k, k): with n = 1000 and tpr = 0.95 it has a standard deviation of 0.7%. Nothing is
    promised about OOD rows: how many of them are refused depends on the score.

    Parameters
    ----------
    method, norm, temperature, bias
        As in ``fastood.score``. What `norm` stands for when it is left out is decided by the first fit. A
        ``fastood.Fitted`` as the method is one whose own fit is done, on training rows. The name of a score that has to
        be fitted, such as "mahalanobis", makes one at each ``fit``, of every other row, and calibrates on the rest.
    tpr : float
        Between 0 and 1: the share of in-distribution rows to accept. It takes at least
        ``1 / (1 - tpr) - 1`` rows: 19 for 0.95, 99 for 0.99.
    per_class : bool
        A threshold for every *predicted* class (argmax of the logits, so that calibration and decision
        go by the same), and the promise for each of them. A predicted class with fewer rows than `tpr`
        takes uses the threshold of all rows together, and has no promise of its own.
    head
        The last layer, as in ``fastood.score``, for the successors that take it.
    **params
        Parameters of the score itself: ``gamma`` and ``M`` of "gen".

    Attributes
    ----------
    rows : int
        How many rows it was fitted on; 0 before.
    classes, dim : int or None
        The columns of the logits and feats that it was fitted on; None for what its score does not read.
    choice : object or None
        What ``choose`` found out.
    successor : Fitted or None
        The score, where it came after the paper.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was wanted.

    Notes
    -----
    Fit on rows of the dtype, the device and the backend that decisions will see: a score differs in its last
    bits between them.

    Up to 2,000,000 rows every calibration score is kept, in float64, and the result does not depend on how
    the rows were split into batches or shards. Beyond that a KLL quantile sketch takes their place (this needs
    ``datasketches``), whose ranks are off by at most 0.01% of the rows, at 99% confidence. The threshold is
    then lowered, and p-values are raised, by that much, which keeps the promise. A sketch draws random
    numbers, so two fits on the same rows may differ by as much.

    Examples
    --------
    >>> import torch, fastood
    >>> g = torch.Generator().manual_seed(0)
    >>> validation = 5 * torch.randn(1000, 10, generator=g)
    >>> detector = fastood.Detector("energy", tpr=0.95).fit(validation)
    >>> detector
    Detector('energy', norm=None, tpr=0.95; fitted on 1000 rows, threshold=3.855)
    >>> detector.accept(torch.tensor([[20.0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0.2] * 10]))
    tensor([ True, False])
    >>> detector.save("detector.safetensors")  # doctest: +SKIP
    >>> detector = fastood.Detector.load("detector.safetensors")  # doctest: +SKIP
    """

    def __init__(
        self,
        method: Method | HeadMethod | Fitted = "energy",
        *,
        norm: Order = "auto",
        temperature: float = 1.0,
        bias: bool = False,
        tpr: float = 0.95,
        per_class: bool = False,
        head: Head | None = None,
        **params: Any,
    ) -> None:
        self.successor = successor_of(method, head, temperature, params)
        self._learns = bool(self.successor and self.successor.needs_fit)
        # Refuses what fastood.score would refuse.
        if self.successor:
            refuse_factors(self.successor.method, norm, bias, False)
            name, temperature, params = self.successor.method, self.successor.temperature, self.successor.params
            norm, needs = "auto", self.successor.entry.needs
        else:
            entry = _entry(method)
            name, needs = entry.name, entry.needs
            Plan([(entry, order_of_norm(entry, norm, True))], (-1,), temperature, bias, False, True, params)
        if not 0 < 1 - number("tpr", tpr, above=0) < 1:  # nor so near to 0 that float64 has 1 for the rest
            raise ValueError(f"tpr must be a number between 0 and 1, got {tpr!r}")
        self.method, self.norm, self.temperature, self.bias = name, norm, float(temperature), bool(bias)
        self.tpr, self.per_class = float(tpr), flag("per_class", per_class)
        self.params = {name: x.item() if isinstance(x, np.generic) else x for name, x in params.items()}
        self._by_logits, self._by_feats = "logits" in needs, self.successor is not None and "feats" in needs
        self.choice: Choice | None = None
        self._forget()

    def _forget(self) -> None:
        self.classes: int | None = None
        self.dim: int | None = None
        self._order: float | None = None  # of the norm, once it is decided
        self._options = {"norm": self.norm, "temperature": self.temperature, "bias": self.bias, **self.params}
        self._all = Sample()
        self._of_class: dict[int, Sample] = {}
        self._limits = self._none()

    @staticmethod
    def _none() -> tuple[dict[Any, Any], dict[Any, Any]]:
        """Limits of arrays and of tensors; torch 2.8 can trace no dict that has numpy's types among its keys."""
        return {}, {}

    # ---- calibration

    @property
    def rows(self) -> int:
        return self._all.n

    def fit(
        self,
        logits: ArrayT | None,
        feats: ArrayT | None = None,
        labels: Array | None = None,
        *,
        backend: str = "auto",
        dim: int | None = None,
    ) -> Detector:
        """Take the threshold from in-distribution rows, in place of any that it was fitted on before.

        Parameters
        ----------
        logits : Tensor or ndarray [N, C]
        feats : Tensor or ndarray [N, D], optional
        labels : Tensor or ndarray [N] of integers, optional
            The true classes. Given them, rows that the classifier gets wrong are left out, and the promise is about
            in-distribution rows that it gets *right*: a higher threshold, which refuses more of the mistakes.

        Returns
        -------
        Detector
            Itself.

        Raises
        ------
        ValueError
            Where a score is NaN or infinite (the message says how many are; the detector is then not fitted), or where
            the rows are too few for `tpr` (it says how many it takes).

        Warns
        -----
        UserWarning
            Where a norm multiplies V and a threshold is below 0: there V is negative, and a larger norm lowers the
            score, so what has small features, as noise often has, is accepted.

        Notes
        -----
        `backend` and `dim` as in ``fastood.score``; with `dim` labels are a class per position. The pixels of one image
        are alike, and so not exchangeable with those of the next: of pixels the promise holds roughly, and the better
        the more images there are.

        Examples
        --------
        >>> import torch, fastood
        >>> fastood.Detector("msp", tpr=0.99).fit(torch.randn(50, 10))
        Traceback (most recent call last):
        ...
        ValueError: tpr=0.99 takes at least 99 in-distribution rows, got 50
        """
        self._forget()
        logits, feats, labels = _unfolded(dim, logits, feats, labels)
        if self._learns:
            logits, feats, labels = self._learned(logits, feats, labels)
        self.partial_fit(logits, feats, labels, backend=backend)
        self._calibrate(" whose labels are the predicted classes" if labels is not None else "")
        self._warn_if_inverted()
        return self

    def partial_fit(
        self,
        logits: ArrayT | None,
        feats: ArrayT | None = None,
        labels: Array | None = None,
        *,
        backend: str = "auto",
        dim: int | None = None,
    ) -> Detector:
        """Add in-distribution rows to those of earlier calls; too few of them is an error only once it decides.

        The arguments are those of ``fit``. Where it raises an error, no row of the call counts.

        Examples
        --------
        >>> import torch, fastood
        >>> detector = fastood.Detector("energy")
        >>> for logits in torch.randn(100, 10).split(32):
        ...     _ = detector.partial_fit(logits)
        >>> detector.rows
        100
        """
        logits, feats, labels = _unfolded(dim, logits, feats, labels)
        if self.rows == 0:
            self._forget()  # what an empty batch may have left
            with self._all_or_none():
                self._decide_norm(
                    None if self.successor else order_of_norm(_entry(self.method), self.norm, feats is not None)
                )
                x, c = self._calibration(logits, feats, labels, backend)
            self.classes = logits.shape[1] if logits is not None and (self._by_logits or self.per_class) else None
            reads_feats = self._by_feats or self._order is not None
            self.dim = feats.shape[1] if feats is not None and reads_feats else None
        else:
            x, c = self._calibration(logits, feats, labels, backend)
        self._all.add(x)
        if self.per_class:
            order = np.argsort(c, kind="stable")
            present, starts = np.unique(c[order], return_index=True)
            for k, part in zip(present.tolist(), np.split(x[order], starts[1:]), strict=False):
                self._of_class.setdefault(k, Sample()).add(part)
        self._limits = self._none()
        return self

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """A fit that breaks off leaves a detector that is not fitted, rather than one that decides by some rows."""
        try:
            yield
        except BaseException:
            self._forget()
            raise

    def _calibration(self, logits: Any, feats: Any, labels: Any, backend: str) -> tuple[Floats, Any]:
        """The scores of rows to calibrate on; with `labels` or `per_class` also the predicted classes."""
        one_thread_if_forked()
        with torch.no_grad():
            s, c = self._scored(logits, feats, backend)
        x = _numpy(s).astype(np.float64)
        if odd := np.flatnonzero(~np.isfinite(x)).tolist():
            raise ValueError(
                f"logits, feats: the scores of {len(odd)} of {len(x)} rows are not finite, "
                f"the first of them {x[odd[0]]} in row {odd[0]}: leave those rows out, knowingly"
            )
        if labels is not None or self.per_class:
            if logits is None:
                raise ValueError("logits must be given with labels: they say which class a row is predicted to be")
            c = _numpy(widened(logits).argmax(1) if c is None else c)
            if labels is not None:
                right = c == _numpy(class_labels("labels", labels, *logits.shape))
                x, c = x[right], c[right]
        return x, c

    def _learned(self, logits: Any, feats: Any, labels: Any) -> tuple[Any, Any, Any]:
        """Fit the successor on every other row; the rows in between, to calibrate on."""
        assert self.successor is not None
        f, h, _ = logits_and_feats(logits, feats)  # or what is wrong with the whole of them
        if labels is not None:
            known = 1 << 62 if f is None else f.shape[1]
            labels = class_labels("labels", labels, len(h if f is None else f), known)  # type: ignore[arg-type]
        given = logits, feats, labels
        self.successor.fit(*(None if x is None else x[::2] for x in given))
        logits, feats, labels = (None if x is None else x[1::2] for x in given)
        return logits, feats, labels

    def fit_loader(self, model: nn.Module, loader: Iterable[Any], *, progress: bool = True) -> Detector:
        """``fit`` on all that a DataLoader gives, run through a model; a batch at a time is held in memory.

        Parameters
        ----------
        model, loader, progress
            As in ``fastood.collect``; the loader gives in-distribution inputs. Labels that it gives are not looked at:
            to leave out rows that the classifier gets wrong, ``collect`` them, and ``fit`` with labels.

        Returns
        -------
        Detector
            Itself.

        Raises
        ------
        TypeError, ValueError
            As ``fit`` and ``fastood.collect`` do.

        Examples
        --------
        >>> import torch, fastood
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)).eval()
        >>> detector = fastood.Detector("energy", norm=0.3).fit_loader(model, torch.randn(100, 8).split(32))
        >>> detector.rows, detector.classes, detector.dim
        (100, 10, 16)
        """
        from fastood._collect import run

        self._forget()
        with self._all_or_none():
            for logits, feats, _ in run(model, loader, progress):
                self.partial_fit(logits, feats)
        self._calibrate()
        self._warn_if_inverted()
        return self

    def merge(self, other: Detector) -> Detector:
        """Add the rows that another detector of the same settings was fitted on: shards, fitted in parallel.

        The result is that of one fit on all the rows together, in any order.

        Raises
        ------
        ValueError
            Where a setting, the number of classes or of features differs; the message names it.

        Examples
        --------
        >>> import torch, fastood
        >>> a, b = (fastood.Detector("energy").partial_fit(torch.randn(15, 10)) for _ in range(2))
        >>> a.merge(b).rows
        30
        """
        if not isinstance(other, Detector):
            raise TypeError(f"other must be a fastood.Detector, got {type(other).__name__}")
        if other is self:
            raise ValueError("other must be another detector, got the same one")
        self._fitted()
        other._fitted()
        theirs = other._settings()
        for name, x in self._settings().items():
            if theirs[name] != x:
                raise ValueError(f"other must have {name}={x!r}, got {name}={theirs[name]!r}")
        if self.successor and other.successor and self.successor.digest() != other.successor.digest():
            raise ValueError(f"other must score by the same fitted {self.method}: fit one, and give it to both")
        self._all.merge(other._all)
        for k, sample in other._of_class.items():
            self._of_class.setdefault(k, Sample()).merge(sample)
        self._limits = self._none()
        return self

    @classmethod
    def choose(
        cls,
        id: tuple[Any, Any],
        ood: Mapping[str, tuple[Any, Any]] | None = None,
        candidates: Iterable[Mapping[str, Any] | str] | None = None,
        *,
        tpr: float = 0.95,
        per_class: bool = False,
        seed: int = 0,
    ) -> Detector:
        """The detector whose score tells rows of `id` from outliers best, among candidates; fitted.

        A random half of the rows chooses, by AUROC (the mean over the outlier sets). The other half, which the
        choice has not seen, calibrates the threshold, so that its promise holds, and gives the figures in
        ``choice``. Keep your test set out of this altogether.

        Parameters
        ----------
        id : (logits [N, C], feats [N, D])
            In-distribution rows that the model was not trained on; feats may be None.
        ood : dict, optional
            Name of an outlier set -> (logits, feats). Without any, outliers are made of the rows of `id`, of two kinds
            (up to 5000 each): convex combinations of two rows of different predicted classes, and rows whose every
            column comes from another row. What is best for those need not be best for real ones: at the least, try
            the result on some.
        candidates : list, optional
            Settings of a Detector (dicts of method, norm, temperature, bias, ...) or names of methods. Left out: the V
            terms of fastood alone and, with feats, times ||h||_0.3, ||h||_1 and ||h||_2, at temperatures 1, 2 and 10;
            the norms; GradNorm and ExGrad. One that is not finite on some row of `id` is passed over.
        tpr, per_class
            Of the detector.
        seed : int
            Of the split and the synthetic outliers.

        Returns
        -------
        Detector
            With ``choice`` set: every candidate's AUROC, how many of them are as good for all one can tell, and the
            chosen one's AUROC and share of accepted outliers on the half that did not choose. It is not saved.

        Examples
        --------
        >>> import torch, fastood
        >>> g = torch.Generator().manual_seed(0)
        >>> inside = 8 * torch.eye(10)[torch.arange(400) % 10] + torch.randn(400, 10, generator=g)
        >>> noise = 2 * torch.randn(200, 10, generator=g)
        >>> detector = fastood.Detector.choose((inside, None), {"noise": (noise, None)}, ["energy", "msp", "tv"])
        >>> detector.method, detector.rows, round(detector.choice.auroc["noise"], 2)
        ('energy', 200, 1.0)
        """
        from fastood._choice import choose

        detector, choice = choose(id, ood, candidates, seed, tpr=tpr, per_class=per_class)
        detector.choice = choice
        return detector

    # ---- decisions

    def score(
        self, logits: ArrayT | None, feats: ArrayT | None = None, *, backend: str = "auto", dim: int | None = None
    ) -> ArrayT:
        """``fastood.score`` of the detector's method and settings: [N], higher = more in-distribution.

        A detector that is fitted checks the number of classes and of features. `backend` and `dim` are those of
        ``fastood.score``, in ``accept`` and ``p_value`` too.

        Examples
        --------
        >>> import torch, fastood
        >>> fastood.Detector("msp").score(torch.tensor([[4.0, 0.0]]))
        tensor([0.9820])
        """
        if dim is not None:
            (logits, feats), shape = rows_along(dim, logits=logits, feats=feats)
            return self.score(logits, feats, backend=backend).reshape(shape)
        if self.successor:
            s = self.successor.score(logits, feats, backend=backend)
        else:
            s = score(logits, feats, self.method, backend=backend, **self._options)
        if self.classes is not None and (logits is None or logits.shape[1] != self.classes):
            self._refuse("logits", logits, "classes", self.classes)
        if self.dim is not None and (feats is None or feats.shape[1] != self.dim):
            self._refuse("feats", feats, "features", self.dim)
        return s

    def accept(
        self, logits: ArrayT | None, feats: ArrayT | None = None, *, backend: str = "auto", dim: int | None = None
    ) -> ArrayT:
        """True for rows to treat as in-distribution: bool [N], of the kind and on the device of the inputs.

        A row is accepted where its score is finite and at least ``threshold`` (of its predicted class), which is to the
        bit where ``p_value > 1 - tpr``. A row whose score is NaN or infinite never is.
        ``torch.compile`` and ``torch.export`` take it.

        Raises
        ------
        RuntimeError
            Where the detector is not fitted.
        ValueError
            Where it was fitted on too few rows, or on another number of classes or features.

        Examples
        --------
        >>> import torch, fastood
        >>> detector = fastood.Detector("max_logit", tpr=0.5).fit(torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
        >>> detector.accept(torch.tensor([[1.9, 0], [2, 0], [float("nan"), 0]]))
        tensor([False,  True, False])
        """
        if dim is not None:
            (logits, feats), shape = rows_along(dim, logits=logits, feats=feats)
            return self.accept(logits, feats, backend=backend).reshape(shape)
        s, c = self._scored(logits, feats, backend)
        return accepted(s, c, self._limit(s))

    def p_value(
        self, logits: ArrayT | None, feats: ArrayT | None = None, *, backend: str = "auto", dim: int | None = None
    ) -> ArrayT:
        """How usual each row is among the calibration rows: float64 [N]. Higher = more in-distribution.

        (1 + #{s_i <= s}) / (n + 1), over the calibration rows of the predicted class where ``per_class``. Of rows
        exchangeable with those, a share of at most a has a p-value <= a, for every a. NaN where the score is NaN or
        infinite. Computed on the CPU.

        Examples
        --------
        >>> import torch, fastood
        >>> detector = fastood.Detector("max_logit", tpr=0.5).fit(torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
        >>> detector.p_value(torch.tensor([[0.5, 0], [2, 0], [9, 0]]))
        tensor([0.2500, 0.7500, 1.0000], dtype=torch.float64)
        """
        if dim is not None:
            (logits, feats), shape = rows_along(dim, logits=logits, feats=feats)
            return self.p_value(logits, feats, backend=backend).reshape(shape)
        return self._p_values(*self._scored(logits, feats, backend))

    def _p_values(self, s: Any, c: Any) -> Any:
        """Of scores, and with `per_class` the predicted classes."""
        self._calibrate()
        x = _numpy(s).astype(np.float64)
        finite = np.isfinite(x)
        if c is None:
            p: Any = self._all.p_value(x)
            p[~finite] = np.nan
        else:
            p, c = np.full(len(x), np.nan), _numpy(c)
            for k in np.unique(c[finite]).tolist():
                rows = finite & (c == k)
                p[rows] = self._deciding(k).p_value(x[rows])
        if isinstance(s, Tensor):
            p = torch.from_numpy(p).to(s.device)
        return p

    @property
    def threshold(self) -> float | Tensor:
        """The least score that is accepted; with ``per_class``, of every predicted class: float64 [C].

        Examples
        --------
        >>> import torch, fastood
        >>> fastood.Detector("max_logit", tpr=0.5).fit(torch.tensor([[1.0, 0], [2, 0], [3, 0]])).threshold
        2.0
        """
        limits = self._thresholds()
        return torch.from_numpy(limits.copy()) if self.per_class else float(limits[0])

    def _decide_norm(self, order: float | None) -> None:
        """From now on, so that leaving feats out later is noticed."""
        self._order = order
        if not (self.successor or _entry(self.method).gradient):  # which take no norm
            self._options["norm"] = order

    def _refuse(self, name: str, x: Any, what: str, wanted: int) -> None:
        got = "None" if x is None else f"shape {list(x.shape)}"
        raise ValueError(f"{name} must have the {wanted} {what} that the detector was fitted on, got {got}")

    def _scored(self, logits: Any, feats: Any, backend: str) -> tuple[Any, Any]:
        """Scores, and with `per_class` the predicted classes."""
        s = self.score(logits, feats, backend=backend)
        if not self.per_class:
            return s, None
        one_thread_if_forked()
        logits = widened(logits)
        if self._by_logits:
            return s, logits.argmax(1)
        if logits is None:
            raise ValueError("logits must be given: per_class goes by the predicted class, their argmax")
        c = logits.argmax(1)
        top = logits.amax(1) if isinstance(logits, Tensor) else logits.max(1)
        s[~(abs(top) < math.inf)] = math.nan  # there is no predicted class, which this score does not notice
        return s, c

    def _deciding(self, k: int) -> Sample:
        """The sample that decides about predicted class `k`."""
        sample = self._of_class.get(k)
        return self._all if sample is None or sample.kth(self.tpr) is None else sample

    def _limit(self, s: Any) -> Any:
        """What scores like `s` are compared with: a number, or with `per_class` a vector [C] of their kind."""
        of_array = isinstance(s, np.ndarray)
        kind = s.dtype if of_array or not self.per_class else (s.dtype, s.device)
        limit = self._limits[0 if of_array else 1].get(kind)
        if limit is None:
            self._calibrate()
            arrays, tensors = self._limits
            if not of_array and kind not in tensors:  # of another device
                tensors = {**tensors, kind: tensors[s.dtype, torch.device("cpu")].to(s.device)}
                self._limits = arrays, tensors
            limit = (arrays if of_array else tensors)[kind]
        return limit

    def _calibrate(self, which: str = "") -> None:
        """Work out ``_limits`` where that is not done yet; `which` rows an error says that there are too few of."""
        if self._limits[0]:
            return
        self._fitted()
        if self._all.kth(self.tpr) is None:
            raise ValueError(self._all.too_few(self.tpr) + which)
        samples = map(self._deciding, range(self.classes or 0)) if self.per_class else [self._all]
        wide = np.array([sample.kth(self.tpr) for sample in samples])
        # For float32 the next one up: what is at least that is at least the float64, and the other way round.
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float32)
        narrow = np.where(narrow < wide, np.nextafter(narrow, np.float32(np.inf)), narrow)
        # A number is compared the fastest as a scalar of numpy or a tensor without dimensions.
        pair = [(wide, torch.from_numpy(wide)), (narrow, torch.from_numpy(narrow))]
        if not self.per_class:
            pair = [(x[0], y[0]) for x, y in pair]
        arrays: dict[Any, Any] = {x.dtype: x for x, _ in pair}
        tensors: dict[Any, Any] = {(y.dtype, y.device) if self.per_class else y.dtype: y for _, y in pair}
        self._limits = arrays, tensors  # whole, for another thread may be reading

    def _thresholds(self) -> NDArray[np.float64]:
        """[1], or with `per_class` [C]."""
        self._calibrate()
        return np.atleast_1d(self._limits[0][np.dtype(np.float64)])

    def _warn_if_inverted(self) -> None:
        if self._order is None:
            return
        entry = _entry(self.method)
        if entry.gradient or not entry.stats:
            return  # no norm multiplies a V
        lowest = self._thresholds().min()
        if lowest < 0:
            warnings.warn(
                f"a threshold of {label_of(entry, self._order)} is {lowest:.4g}: below 0 a larger norm makes a row "
                "look less in-distribution, a smaller one is accepted; norm=None leaves the norm out",
                stacklevel=3,
            )

    def _label(self) -> str:
        """What its scores are called in a table."""
        return self.method if self.successor else label_of(_entry(self.method), self._order)

    def _fitted(self) -> None:
        if self.classes is None and self.dim is None:
            raise RuntimeError("the detector is not fitted: call fit, partial_fit or load first")

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """To one .safetensors file, which ``Detector.load`` reads: settings, and the calibration scores.

        The file appears whole or not at all. FileError (a ValueError) where it has another extension, or there can be
        no such file.

        Examples
        --------
        >>> detector.save("detector.safetensors")  # doctest: +SKIP
        """
        from fastood.files import atomic, library, writable  # which `import fastood` need not load

        self._fitted()
        path = writable(path, suffixes=(".safetensors",))
        samples = [self._all, *(self._of_class.get(k, Sample()) for k in range(self.classes or 0) if self.per_class)]
        ranked = [sample.ranked() for sample in samples]
        tensors = {
            "scores": np.concatenate([values for values, _ in ranked]),
            "counts": np.array([len(values) for values, _ in ranked], np.int64),
        }
        if any(sample.sketched for sample in samples):
            tensors["weights"] = np.concatenate([np.diff(upto, prepend=0) for _, upto in ranked])
        settings = self._settings()
        if self.successor:
            tensors |= {_OF_SUCCESSOR + name: x.numpy() for name, x in self.successor._tensors().items()}
            settings["successor"] = self.successor._header()
        if settings["norm"] == math.inf:
            settings["norm"] = "inf"  # which JSON has no number for
        header = {"kind": "Detector", "version": FILE_VERSION, "fastood": __version__, "rows": self.rows, **settings}
        with atomic(path) as temporary:  # safetensors' own files can be read by their owner alone
            temporary.write_bytes(
                library("safetensors.numpy").save(tensors, metadata={"fastood": json.dumps(header, allow_nan=False)})
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Detector:
        """What ``save`` wrote. Nothing in the file is run, and all of it is checked.

        Raises
        ------
        FileError
            A ValueError that says what is wrong with the file.

        Examples
        --------
        >>> detector = fastood.Detector.load("detector.safetensors")  # doctest: +SKIP
        """
        from fastood.files import FileError, library

        safetensors = library("safetensors")
        if not os.path.isfile(path):
            found = "is a folder, not a file" if os.path.isdir(path) else "no such file"
            raise FileError(f"{os.fspath(path)}: {found}")
        try:
            with safetensors.safe_open(path, framework="np") as file:
                header = (file.metadata() or {}).get("fastood", "")
                header = json.loads(header) if header.startswith("{") else {}
                if not isinstance(header, dict) or header.get("kind") != "Detector":
                    raise ValueError("not a file that Detector.save wrote")
                if header.get("version") != FILE_VERSION:
                    raise ValueError(
                        f"format version {header.get('version')!r}, written by fastood {header.get('fastood')}; "
                        f"this is fastood {__version__}, which reads version {FILE_VERSION}"
                    )
                return cls._restored(header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (ValueError, TypeError, KeyError, RecursionError, safetensors.SafetensorError) as error:
            missing = "it lacks " if isinstance(error, KeyError) else ""
            raise FileError(f"{os.fspath(path)}: cannot be read as a detector: {missing}{error}") from error

    @classmethod
    def _restored(cls, header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Detector:
        settings = {name: header[name] for name in ("method", "norm", "temperature", "bias", "tpr", "per_class")}
        if settings["norm"] == "inf":
            settings["norm"] = math.inf
        order = settings["norm"]
        own = {name: x for name, x in tensors.items() if not name.startswith(_OF_SUCCESSOR)}
        if "successor" in header:
            its = {name[len(_OF_SUCCESSOR) :]: torch.from_numpy(x) for name, x in tensors.items() if name not in own}
            detector = cls(
                Fitted._restored(header["successor"], its), tpr=settings["tpr"], per_class=settings["per_class"]
            )
            same = {"method": detector.method, "temperature": detector.temperature, "norm": None, "bias": False}
            if odd := [name for name, x in same.items() if settings[name] != x]:
                raise ValueError(f"{odd[0]} must be {same[odd[0]]!r}, as of its successor, got {settings[odd[0]]!r}")
        else:
            own = dict(tensors)
            if (entry := _entry(settings["method"])).gradient:
                order = settings.pop("norm")
                if order != entry.gradient["order"]:
                    raise ValueError(f"norm of {entry.name} must be {entry.gradient['order']}, got {order!r}")
            if not isinstance(header["params"], dict):
                raise ValueError(f"params must be an object, got {header['params']!r}")
            detector = cls(**settings, **header["params"])
        detector._decide_norm(order)
        for name in ("classes", "dim"):
            x = header[name]
            if x is not None and (type(x) is not int or x < 0):
                raise ValueError(f"{name} must be a number of columns or null, got {x!r}")
            setattr(detector, name, x)
        reads_feats = detector._by_feats or order is not None
        for name, used in (("classes", detector._by_logits or detector.per_class), ("dim", reads_feats)):
            if (header[name] is not None) != bool(used):
                raise ValueError(f"{name} must {'not ' if used else ''}be null for this score, got {header[name]!r}")
        detector._all, *of_class = Sample.all_of(own, 1 + (detector.classes or 0) * detector.per_class)
        detector._of_class = {k: sample for k, sample in enumerate(of_class) if sample.n}
        if header["rows"] != detector.rows:
            raise ValueError(f"it must hold {header['rows']!r} rows, found {detector.rows}")
        if of_class and sum(sample.n for sample in of_class) != detector.rows:
            raise ValueError(f"its classes must have {detector.rows} rows together")
        return detector

    def _settings(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "norm": self._order,
            "temperature": self.temperature,
            "bias": self.bias,
            "params": self.params,
            "tpr": self.tpr,
            "per_class": self.per_class,
            "classes": self.classes,
            "dim": self.dim,
        }

    def __repr__(self) -> str:
        norm = self._options["norm"]
        options = "" if norm == "auto" else f", norm={norm if norm is None else f'{norm:g}'}"
        options += "".join(
            f", {name}={x!r}"
            for name, x in {"temperature": self.temperature, "bias": self.bias, **self.params}.items()
            if (name, x) not in (("temperature", 1.0), ("bias", False))
        )
        options += f", tpr={self.tpr:g}"
        if self.classes is None and self.dim is None:
            state = "not fitted"
        elif self._all.kth(self.tpr) is None:
            state = self._all.too_few(self.tpr)
        elif self.per_class:
            own = sum(self._deciding(k) is not self._all for k in self._of_class)
            state = f"fitted on {self.rows} rows, {own} of {self.classes} classes with a threshold of their own"
        else:
            state = f"fitted on {self.rows} rows, threshold={self.threshold:.4g}"
        return f"Detector({self.method!r}{options}{', per_class=True' * self.per_class}; {state})"


def _unfolded(dim: int | None, logits: Any, feats: Any, labels: Any) -> tuple[Any, Any, Any]:
    """Where there is a `dim`, its positions as rows, and labels of their shape as those of rows."""
    if dim is not None:
        (logits, feats), shape = rows_along(dim, logits=logits, feats=feats)
        if isinstance(labels, (Tensor, np.ndarray)) and tuple(labels.shape) == shape:
            labels = labels.reshape(-1)  # others are refused where they are read
    return logits, feats, labels


def accepted(s: Any, c: Any, limit: Any) -> Any:
    """Scores against a threshold, or against that of predicted class c in [C] of them: bool [N]."""
    if isinstance(s, np.ndarray):
        return (s >= (limit if c is None else limit.take(c))) & (s < math.inf)
    if c is not None:
        limit = limit.index_select(0, c)  # an export to ONNX keeps the threshold's name, as after take it does not
    return s.nan_to_num(-math.inf, -math.inf, -math.inf) >= limit  # the same, quicker


def _numpy(x: Any) -> NDArray[Any]:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else x

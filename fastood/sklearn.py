"""fastood as a scikit-learn estimator: pipelines, cross-validation, grid search."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from fastood.detector import Detector, rows_needed
from fastood.successors import Fitted

__all__ = ["OODDetector"]


class OODDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn has no types
    """A scikit-learn outlier detector on what a classifier puts out: rows of logits, or of logits and features.

    ``fit`` takes in-distribution rows that the classifier was not trained on; ``predict`` then says +1 for rows
    to treat as in-distribution and -1 for the others. Of new rows drawn like those of ``fit`` at least `tpr` get +1:
    the threshold is that of ``fastood.Detector``, which has the details.

    Parameters
    ----------
    method : str or Fitted
        A name in ``fastood.SCORES``, or a ``fastood.Fitted``.
    norm : float, None or "auto"
        Order of the ||h||_r that multiplies a V term, None for V alone; "auto" for the default of ``fastood.score``.
    temperature, bias, tpr
        As in ``fastood.Detector``.
    n_classes : int, optional
        How many of the columns are logits; the rest are features, as in ``np.hstack([logits, feats])``. Left out:
        all of them are logits.

    Attributes
    ----------
    offset_ : float
        The threshold: ``decision_function`` is ``score_samples`` less it.
    detector_ : fastood.Detector
        Which can be saved on its own.
    n_features_in_ : int
        The columns that ``fit`` saw.

    Notes
    -----
    Rows must be finite, as everywhere in scikit-learn: for masked classes (logits of -inf) and half types, use
    ``fastood.Detector``. Fitted on fewer rows than `tpr` takes (19 for 0.95), it warns and accepts what is not below
    the lowest score it saw, which keeps n/(n + 1) of rows drawn alike.

    Examples
    --------
    >>> import numpy as np
    >>> from fastood.sklearn import OODDetector
    >>> rng = np.random.default_rng(0)
    >>> logits, feats = 5 * rng.normal(size=(200, 10)), rng.gamma(1.0, size=(200, 32))
    >>> detector = OODDetector("energy", n_classes=10).fit(np.hstack([logits, feats]))
    >>> detector.predict(np.hstack([logits[:3], 0.01 * feats[:3]]))
    array([-1, -1, -1])
    >>> OODDetector("max_logit").fit(logits).score_samples(np.eye(10)[:1])
    array([1.])
    """

    def __init__(
        self,
        method: str | Fitted = "energy",
        *,
        norm: float | Literal["auto"] | None = "auto",
        temperature: float = 1.0,
        bias: bool = False,
        tpr: float = 0.95,
        n_classes: int | None = None,
    ) -> None:
        self.method = method
        self.norm = norm
        self.temperature = temperature
        self.bias = bias
        self.tpr = tpr
        self.n_classes = n_classes

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Take the threshold from in-distribution rows.

        Parameters
        ----------
        X : array [N, n_classes + D] of finite numbers
            float32 is scored in float32, all else in float64.
        y : ignored

        Raises
        ------
        TypeError, ValueError
            Naming the parameter, what came and what was wanted.
        """
        rows = self._checked(X, reset=True)
        if self.n_classes is not None:
            if not isinstance(self.n_classes, Integral):
                raise TypeError(f"n_classes must be a whole number or None, got {self.n_classes!r}")
            if not 1 <= self.n_classes <= rows.shape[1]:
                raise ValueError(f"n_classes must be from 1 to the {rows.shape[1]} columns of X, got {self.n_classes}")
        tpr, n, least = self.tpr, len(rows), rows_needed(self._detector(self.tpr).tpr)
        if n < least:
            tpr = 1 - 1.5 / (n + 1)  # whose threshold is the lowest score
            what = "the threshold is the lowest score"
            warnings.warn(f"tpr={self.tpr:g} takes at least {least} rows, got {n}: {what}", stacklevel=2)
        detector = self._detector(tpr).fit(*self._split(rows))
        self.detector_ = detector
        self.offset_ = detector.threshold
        return self

    def score_samples(self, X: ArrayLike) -> NDArray[Any]:
        """``fastood.score`` of X [N, n_features_in_]: [N] of its type, higher = more in-distribution.

        As the other methods here, NotFittedError before ``fit``, ValueError of what scikit-learn does not take for X.
        """
        check_is_fitted(self)
        return self.detector_.score(*self._split(self._checked(X, reset=False)))

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """``score_samples(X) - offset_``: float64 [N], below 0 for OOD rows. -inf where the score is not finite."""
        s = self.score_samples(X).astype(np.float64)
        return np.where(np.isfinite(s), s - self.offset_, -np.inf)

    def predict(self, X: ArrayLike) -> NDArray[np.intp]:
        """+1 for rows of X [N, n_features_in_] to treat as in-distribution, -1 for the others: [N]."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def _checked(self, X: ArrayLike, reset: bool) -> NDArray[Any]:
        return validate_data(self, X, dtype=[np.float64, np.float32], reset=reset)

    def _detector(self, tpr: float) -> Detector:
        return Detector(self.method, norm=self.norm, temperature=self.temperature, bias=self.bias, tpr=tpr)

    def _split(self, X: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None]:
        C = self.n_classes
        return (X, None) if C in (None, X.shape[1]) else (X[:, :C], X[:, C:])

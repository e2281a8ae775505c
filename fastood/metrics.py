"""How well scores separate: AUROC, AUPR, FPR at 95% TPR, with scikit-learn as the engine.

Scores are oriented as everywhere in fastood: higher = more in-distribution. Which class counts as
positive changes AUPR and FPR, and packages differ in it, so each function says it in its name:
``_in`` takes in-distribution as positive, ``_out`` takes OOD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from fastood._inputs import vector

__all__ = ["METRICS", "aupr_in", "aupr_out", "auroc", "evaluate", "fpr95_in", "fpr95_out"]


def _ranks(id_scores: Any, ood_scores: Any) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Who is in-distribution, and every score's rank. All metrics here depend on the order alone,
    and unlike scores, ranks are finite (energy and ||h||_0.1 may be infinite)."""
    arrays = [vector("id_scores", id_scores), vector("ood_scores", ood_scores)]
    is_id = np.repeat([True, False], [a.size for a in arrays])
    return is_id, np.unique(np.concatenate(arrays), return_inverse=True)[1]


def auroc(id_scores: Any, ood_scores: Any) -> float:
    """Probability that an ID input scores above an OOD one, ties counted half. 1 is perfect, 0.5 chance.

    Symmetric in the two classes, hence no suffix.

    Parameters
    ----------
    id_scores, ood_scores : Tensor, ndarray or sequence [N], [M]
        Oriented scores, higher = more in-distribution. NaN raises ValueError, a masked array TypeError.

    Examples
    --------
    >>> from fastood import metrics
    >>> metrics.auroc([3.0, 2.0], [1.0, 2.0])
    0.875
    """
    return float(roc_auc_score(*_ranks(id_scores, ood_scores)))


def aupr_in(id_scores: Any, ood_scores: Any) -> float:
    """Area under precision-recall (average precision) with in-distribution as the positive class. 1 is perfect.

    The arguments are those of ``auroc``, and so are its errors.

    Examples
    --------
    >>> from fastood import metrics
    >>> metrics.aupr_in([3.0, 2.0], [1.0])
    1.0
    """
    return float(average_precision_score(*_ranks(id_scores, ood_scores)))


def aupr_out(id_scores: Any, ood_scores: Any) -> float:
    """Area under precision-recall (average precision) with OOD as the positive class. 1 is perfect.

    The arguments are those of ``auroc``, and so are its errors.

    Examples
    --------
    >>> from fastood import metrics
    >>> metrics.aupr_out([3.0, 2.0, 0.0], [1.0])
    0.5
    """
    is_id, ranks = _ranks(id_scores, ood_scores)
    return float(average_precision_score(~is_id, -ranks))


def fpr95_in(id_scores: Any, ood_scores: Any) -> float:
    """Share of OOD inputs accepted where at least 95% of ID inputs are (in-distribution positive). Lower is better.

    The convention of most OOD papers. The arguments are those of ``auroc``, and so are its errors.

    Examples
    --------
    >>> from fastood import metrics
    >>> metrics.fpr95_in([5.0, 4.0, 3.0], [3.5, 1.0])
    0.5
    """
    return _fpr95(*_ranks(id_scores, ood_scores))


def fpr95_out(id_scores: Any, ood_scores: Any) -> float:
    """Share of ID inputs rejected where at least 95% of OOD inputs are (OOD positive). Lower is better.

    The arguments are those of ``auroc``, and so are its errors.

    Examples
    --------
    >>> from fastood import metrics
    >>> metrics.fpr95_out([5.0, 4.0, 3.0], [3.5, 1.0])
    0.3333333333333333
    """
    is_id, ranks = _ranks(id_scores, ood_scores)
    return _fpr95(~is_id, -ranks)


def _fpr95(positive: NDArray[np.bool_], ranks: NDArray[np.intp]) -> float:
    fpr, tpr, _ = roc_curve(positive, ranks, drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "auroc": auroc,
    "fpr95_in": fpr95_in,
    "fpr95_out": fpr95_out,
    "aupr_in": aupr_in,
    "aupr_out": aupr_out,
}


def evaluate(id_scores: Any, ood_scores: Any) -> dict[str, float]:
    """All metrics of this module by name. The arguments are those of ``auroc``, and so are its errors.

    Examples
    --------
    >>> from fastood import metrics
    >>> metrics.evaluate([2.0, 3.0], [0.0, 1.0])["auroc"]
    1.0
    """
    return {name: metric(id_scores, ood_scores) for name, metric in METRICS.items()}

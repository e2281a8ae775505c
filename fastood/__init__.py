"""fastood: out-of-distribution scores from a classifier's logits and features.

``fastood.score(logits, feats)`` gives one number per row, higher = more in-distribution.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastood._attach import OODHead, attach
from fastood._batchgrad import BatchGrad, anchor_gradient, batchgrad
from fastood._collect import collect
from fastood.api import norms, row_stats, score, scores, sweep, warm_up
from fastood.deep import deep_batchgrad, deep_gradient_norm
from fastood.detector import Detector
from fastood.gradients import gradient_norm
from fastood.kernels import STATISTICS, backends
from fastood.linear import score_linear
from fastood.registry import SCORES, Score, register
from fastood.successors import SUCCESSORS, Fitted, Successor

if TYPE_CHECKING:
    from fastood import arrow as arrow
    from fastood import distributed as distributed
    from fastood import evaluation, metrics
    from fastood import peers as peers
    from fastood import ray as ray
    from fastood import sklearn as sklearn
    from fastood.monitor import Monitor

from fastood._version import __version__ as __version__

__all__ = [
    "SCORES",
    "STATISTICS",
    "SUCCESSORS",
    "BatchGrad",
    "Detector",
    "Fitted",
    "Monitor",
    "OODHead",
    "Score",
    "Successor",
    "anchor_gradient",
    "attach",
    "backends",
    "batchgrad",
    "collect",
    "deep_batchgrad",
    "deep_gradient_norm",
    "evaluation",
    "gradient_norm",
    "metrics",
    "norms",
    "register",
    "row_stats",
    "score",
    "score_linear",
    "scores",
    "sweep",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    # scikit-learn takes longer to import than all the rest of fastood: it loads when used. What is not in __all__ would
    # hide a namesake there.
    if name in ("arrow", "distributed", "evaluation", "metrics", "peers", "ray", "sklearn"):
        return import_module(f"fastood.{name}")
    if name == "Monitor":  # scipy is nearly as slow
        return import_module("fastood.monitor").Monitor
    raise AttributeError(f"module 'fastood' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

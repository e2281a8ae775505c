"""Detectors as other libraries want them; those libraries must be installed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastood.detector import Detector

__all__ = ["pytorch_ood"]


def pytorch_ood(detector: Detector, model: nn.Module | None = None) -> Any:
    """A detector with the interface of pytorch-ood, to stand among its own. **Higher = more OOD** there.

    Parameters
    ----------
    detector : Detector
        Need not be fitted: pytorch-ood asks a detector for scores alone. So its ``fit``, which it gives the *training*
        data, does nothing here; a threshold is fitted by ``detector.fit``, on data that the model has not seen. With
        ``norm=None`` the methods "msp", "energy", "max_logit" and "neg_entropy" rank as MaxSoftmax, EnergyBased,
        MaxLogit and Entropy do there.
    model : nn.Module, optional
        What ``predict`` runs: it gives logits, or ``(logits, feats)`` as what ``fastood.attach`` makes does.

    Returns
    -------
    pytorch_ood.api.LogitsDetector
        ``peer(x)`` and ``peer.predict(x)`` take the model's inputs, ``peer.predict_logits(logits, feats=None)`` what it
        gives. All of them give ``-detector.score``: [N], or [N, H, W] of logits [N, C, H, W]; float32 or float64.

    Raises
    ------
    RuntimeError
        Where pytorch_ood cannot be imported.

    Examples
    --------
    >>> import torch, fastood
    >>> from fastood.peers import pytorch_ood
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)).eval()
    >>> peer = pytorch_ood(fastood.Detector("energy", norm=0.3), fastood.attach(model))  # doctest: +SKIP
    >>> metrics = OODMetrics()  # doctest: +SKIP
    >>> for x, y in loader:  # doctest: +SKIP
    ...     metrics.update(peer(x), y)
    """
    if not isinstance(detector, Detector):
        raise TypeError(f"detector must be a fastood.Detector, got {type(detector).__name__}")
    return _peer()(detector, model)


@cache
def _peer() -> type:
    try:
        api: Any = import_module("pytorch_ood.api")
    except ImportError as missing:
        raise RuntimeError(f"pytorch_ood is needed: pip install pytorch-ood ({missing})") from missing

    class Peer(api.LogitsDetector):  # type: ignore[misc]
        def __init__(self, detector: Detector, model: nn.Module | None) -> None:
            super().__init__()
            self.detector, self.model = detector, model

        def predict(self, x: Tensor) -> Tensor:
            if self.model is None:
                raise api.ModelNotSetException
            with torch.no_grad():
                out = self.model(x if self.device is None else x.to(self.device))
            logits, feats = out[:2] if isinstance(out, tuple) else (out, None)
            return self.predict_logits(logits, feats)

        def predict_logits(self, logits: Tensor, feats: Tensor | None = None) -> Tensor:
            return -self.detector.score(logits, feats, dim=1)

    return Peer

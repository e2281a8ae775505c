"""How a successor is declared, and what its functions see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastood._inputs import result_dtype
from fastood.kernels import Scaling

State = Mapping[str, Tensor]


def wide(x: Tensor) -> Tensor:
    """`x` in float64, or in float32 on a device that has no float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


class Rows:
    """Some rows of a call.

    Attributes
    ----------
    logits, feats : Tensor
        [n, C] and [n, D] as they came, None where they did not; ``z`` and ``h`` are the same in float64.
    labels : Tensor or None
        int64 [n], of in-distribution rows: the true classes where they are known.
    T : float
        The temperature.
    """

    def __init__(
        self, logits: Tensor | None, feats: Tensor | None, T: float, backend: str = "auto", labels: Tensor | None = None
    ) -> None:
        self.logits: Any = logits
        self.feats: Any = feats
        self.T, self.backend, self.labels = T, backend, labels

    @property
    def z(self) -> Tensor:
        return wide(self.logits)

    @property
    def h(self) -> Tensor:
        return wide(self.feats)

    @property
    def dtype(self) -> torch.dtype:
        """Of the results: float64 where an input is float64, else float32."""
        return result_dtype(self.logits, self.feats)

    @property
    def predicted(self) -> Tensor:
        return self.logits.argmax(1)

    @property
    def classes(self) -> Tensor:
        """The true classes, or where they are not known the predicted ones."""
        return self.predicted if self.labels is None else self.labels

    def energy(self, logits: Tensor | None = None) -> Tensor:
        """T lse(logits / T) by the kernels, of these rows' logits or of others."""
        from fastood.api import score

        f = self.logits if logits is None else logits
        return wide(score(f, method="energy", norm=None, temperature=self.T, backend=self.backend))

    def energy_of_head(self, feats: Tensor, state: State) -> Tensor:
        """The energy of other features' logits, which are formed in tiles."""
        from fastood.linear import score_linear

        layer = state["weight"], state["bias"].to(state["weight"].dtype)
        return wide(score_linear(feats, *layer, norm=None, temperature=self.T, backend=self.backend))


@dataclass(frozen=True, eq=False)
class Successor:
    """One score of the successors' kind. ``SUCCESSORS[name]`` looks one up.

    Parameters
    ----------
    name : str
        What ``fastood.score(..., method=name)`` calls it.
    formula : str
        The raw formula, for people.
    source : str
        The paper that it is from.
    higher : {"in", "out"}
        Which rows the *raw* formula is larger for; ``fastood.score`` turns it.
    score : callable
        ``score(rows, state, **params)`` -> [n] raw scores.
    scaling : callable, optional
        In place of `score`: ``scaling(state, temperature, **params)`` -> ``kernels.Scaling``, which is a kernel's.
    needs : tuple of str
        What a row must have to be scored: "logits", "feats".
    head : tuple of str
        What it takes of the last layer: "weight" [C, D], "bias" [C]. They are in the state under these names.
    fitted_on : tuple of str
        What in-distribution rows must have for it to be fitted: "logits", "feats", "classes" (labels, or logits that
        predict them), "correct" (logits, and where there are labels the rows that are predicted right alone). Empty
        for a score that needs no fit.
    sums, bank : callable, optional
        ``sums(rows, K, **params)`` -> name to tensor: the contribution of a batch, [K, ...] for K classes. Sums are
        added, banks concatenated.
    finish : callable, optional
        ``finish(totals, state, **params)`` -> more of the state, from the sums and banks of all rows; `state` has the
        head. ValueError where the rows do not do.
    params : dict
        Parameters with their defaults, which ``check(**params)`` refuses by a ValueError or TypeError that names them.

    Examples
    --------
    The distance from the mean, a score of one's own:

    >>> import torch, fastood
    >>> fastood.SUCCESSORS["distance"] = fastood.Successor(
    ...     "distance", "||h - m||_2", source="mine", higher="out", needs=("feats",), fitted_on=("feats",),
    ...     sums=lambda rows, K: {"sum": rows.h.sum(0), "n": rows.h.new_tensor(len(rows.h))},
    ...     finish=lambda totals, state: {"mean": totals["sum"] / totals["n"]},
    ...     score=lambda rows, state: (rows.h - state["mean"]).norm(dim=1))
    >>> fastood.Fitted("distance").fit(None, torch.tensor([[0.0, 0], [2, 0]])).score(None, torch.tensor([[1.0, 3]]))
    tensor([-3.])
    >>> del fastood.SUCCESSORS["distance"]
    """

    name: str
    formula: str
    source: str
    higher: Literal["in", "out"]
    score: Callable[..., Tensor] | None = None
    scaling: Callable[..., Scaling] | None = None
    needs: tuple[str, ...] = ("logits", "feats")
    head: tuple[str, ...] = ()
    fitted_on: tuple[str, ...] = ()
    sums: Callable[..., dict[str, Tensor]] | None = None
    bank: Callable[..., dict[str, Tensor]] | None = None
    finish: Callable[..., dict[str, Tensor]] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[..., None] | None = None


SUCCESSORS: dict[str, Successor] = {}
"""The scores that came after the paper, by name. What has nothing in ``fitted_on`` scores without a ``Fitted``."""

# What completes as a method beside registry.Method, where a head may be given: those that need no fit.
HeadMethod = Literal["scale", "lts", "dml", "ash_p", "ash_b", "ash_s"]

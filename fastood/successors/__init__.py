"""The scores that came after the paper, from the same tensors: SCALE, ViM, Mahalanobis and their like.

A successor reads more than a row: the last layer (``head``), or what in-distribution rows left behind. So it is
declared in steps, in :mod:`fastood.successors.scores`, each a few lines:

* ``sums`` and ``bank`` say what a batch of in-distribution rows contributes: named tensors. Sums merge by addition, in
  float64, and a bank by concatenation, so batches and shards may come in any number and order.
* ``finish`` makes of their totals, by a closed form, the *state*: named tensors again (a mean, a whitening, a clip).
* ``score`` is a pure function of rows, state and parameters: ``score(rows, state, **params)`` -> [n], raw.

:class:`fastood.Fitted` holds one score's totals, merges them, saves and loads them. A score that needs no rows, such as
SCALE, has a state of the head alone, and ``fastood.score(logits, feats, "scale", head=head)`` is all there is to it.
"""

from fastood.successors.declaration import SUCCESSORS, Successor
from fastood.successors.fitted import Fitted

__all__ = ["SUCCESSORS", "Fitted", "Successor"]

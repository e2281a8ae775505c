"""Which score, norm and temperature: chosen on one half of the rows, calibrated and judged on the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastood._delong import TWO_SIDED_95, Floats, placements
from fastood._inputs import logits_and_feats
from fastood.detector import Detector, rows_needed
from fastood.registry import SCORES

Rows = tuple[Tensor, Tensor | None]

_MOST = 5000

SYNTHETIC = {
    "mixtures": "convex combinations of two rows of different predicted classes, weights 0.3 to 0.7; logits and feats "
    "alike, so that the one are still what the last layer makes of the other",
    "shuffled": "every column from another row, logits and feats alike",
}


@dataclass(frozen=True)
class Choice:
    """How ``Detector.choose`` came to its choice. ``print`` shows it in a few lines.

    Attributes
    ----------
    table : list of dict
        Every candidate, the best first: its settings; "auroc", the mean over the outlier sets on the choosing half;
        "behind", how much less that is than the best one's, and "stderr", the standard error of that (DeLong).
    auroc, stderr : dict
        Name of the outlier set -> AUROC of the chosen score on the half that did not choose, and its standard error.
    accepted : dict
        Name of the outlier set -> the share of its rows that the detector accepts, on the same half.
    rivals : int
        How many other candidates the 95% interval (1.96 "stderr") of what they are "behind" does not set apart from
        the best: the choice among them is luck.
    synthetic : bool
        Whether the outliers were made of the in-distribution rows.
    """

    table: list[dict[str, Any]]
    auroc: dict[str, float]
    stderr: dict[str, float]
    accepted: dict[str, float]
    rivals: int
    synthetic: bool

    def __str__(self) -> str:
        best = self.table[0]
        settings = ", ".join(f"{name}={x!r}" for name, x in best.items() if name not in ("auroc", "behind", "stderr"))
        lines = [
            f"{settings}: the best of {len(self.table)} candidates, AUROC {best['auroc']:.3f} on the rows that chose",
            f"{self.rivals} of the others are not set apart from it by a 95% interval",
        ]
        for name in self.auroc:
            figures = f"AUROC {self.auroc[name]:.3f} ± {self.stderr[name]:.3f}, {self.accepted[name]:.1%} accepted"
            what = f" ({SYNTHETIC[name]})" if self.synthetic else ""
            lines.append(f"on rows that did not choose, {name}{what}: {figures}")
        if self.synthetic:
            lines.append("these outliers are synthetic: what is best for them need not be best for yours")
        return "\n".join(lines)


def choose(
    inside: Any, outside: Mapping[str, Any] | None, candidates: Iterable[Any] | None, seed: int, **options: Any
) -> tuple[Detector, Choice]:
    """The work of ``Detector.choose``, whose docstring it has."""
    logits, feats = _rows("id", inside)
    needed = 2 * max(rows_needed(Detector(**options).tpr), 2)
    if len(logits) < needed:
        raise ValueError(
            f"id must have at least {needed} rows for tpr={options['tpr']:g}, half of them to choose and half to "
            f"calibrate, got {len(logits)}"
        )
    _refuse_odd(logits, feats)
    detectors = [Detector(**settings, **options) for settings in _listed(candidates, feats is not None)]
    if not detectors:
        raise ValueError("candidates must not be empty")
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed}")
    generator = torch.Generator("cpu").manual_seed(int(seed))
    choosing, judging = _halves((logits, feats), int(seed))
    if outside is None:
        sets = {
            name: (_synthetic(name, choosing, generator), _synthetic(name, judging, generator)) for name in SYNTHETIC
        }
    else:
        if not isinstance(outside, Mapping) or not outside:
            got = "an empty one" if isinstance(outside, Mapping) else type(outside).__name__
            raise TypeError(f"ood must be None or a dict of name -> (logits, feats), got {got}")
        sets, columns = {}, _columns((logits, feats))
        for name, x in outside.items():
            rows = _rows(f"ood[{name!r}]", x)
            if _columns(rows) != columns:
                raise ValueError(f"ood[{name!r}] must have the columns of id, {columns}, got {_columns(rows)}")
            if len(rows[0]) < 4:
                raise ValueError(f"ood[{name!r}] must have at least 4 rows, got {len(rows[0])}")
            sets[name] = _halves(rows, int(seed))
    placed = [_placements(d, choosing, [a for a, _ in sets.values()]) for d in detectors]
    aurocs = np.array([math.nan if p is None else p.auroc for p in placed])
    if np.isnan(aurocs).all():
        raise ValueError("candidates: none has a finite score on every row of id")
    best = int(np.nanargmax(aurocs))
    winner = placed[best]
    assert winner is not None
    table = []
    for d, p in zip(detectors, placed, strict=True):
        settings = {"method": d.method, "norm": d.norm, "temperature": d.temperature}
        settings |= {"bias": True} if d.bias else {}
        found = (p.auroc, winner.auroc - p.auroc, (winner - p).stderr) if p else (math.nan,) * 3
        table.append({**settings, **d.params, **dict(zip(("auroc", "behind", "stderr"), found, strict=True))})
    order = sorted(range(len(table)), key=lambda i: (math.isnan(aurocs[i]), -aurocs[i]))
    rivals = sum(row["behind"] <= TWO_SIDED_95 * row["stderr"] for row in table) - 1
    chosen = detectors[best].partial_fit(*judging)  # without the warning of fit: this score was measured
    figures = {name: _placements(chosen, judging, [b]) for name, (_, b) in sets.items()}
    choice = Choice(
        table=[table[i] for i in order],
        auroc={name: p.auroc for name, p in figures.items() if p},
        stderr={name: p.stderr for name, p in figures.items() if p},
        accepted={name: float(chosen.accept(*b).double().mean()) for name, (_, b) in sets.items()},
        rivals=rivals,
        synthetic=outside is None,
    )
    return chosen, choice


def _rows(name: str, x: Any) -> Rows:
    if not isinstance(x, tuple | list) or len(x) != 2:
        raise TypeError(f"{name} must be (logits, feats), of which feats may be None, got {type(x).__name__}")
    try:
        f, h, _ = logits_and_feats(*x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    if f is None:
        raise TypeError(f"{name}: logits must be a torch tensor or a numpy array, got None")
    return f.detach(), None if h is None else h.detach()


def _refuse_odd(logits: Tensor, feats: Tensor | None) -> None:
    """Before a candidate is passed over for them, or half of the rows is counted alone."""
    odd = ~logits.amax(1).isfinite()  # NaN among them, +inf, or -inf alone: no softmax
    if feats is not None and feats.shape[1]:
        odd |= ~feats.isfinite().all(1)
    if rows := odd.nonzero()[:, 0].tolist():
        raise ValueError(
            f"id: {len(rows)} of {len(logits)} rows hold NaN, infinite features, or logits without a softmax, the "
            f"first of them row {rows[0]}: leave those rows out, knowingly"
        )


def _listed(candidates: Iterable[Any] | None, with_feats: bool) -> list[dict[str, Any]]:
    if candidates is None:
        return default_candidates(with_feats)
    if isinstance(candidates, str | Mapping) or not isinstance(candidates, Iterable):
        raise TypeError(f"candidates must be a list of settings of a Detector, or of names, got {candidates!r}")
    listed = [{"method": x} if isinstance(x, str) else x for x in candidates]
    for x in listed:
        if not isinstance(x, Mapping):
            raise TypeError(f"candidates must be dicts of settings of a Detector, or names, got {x!r}")
        if own := {"tpr", "per_class"}.intersection(x):
            raise ValueError(f"candidates must leave {' and '.join(sorted(own))} to choose itself, got {x!r}")
    return [dict(x) for x in listed]


def default_candidates(with_feats: bool) -> list[dict[str, Any]]:
    """Every V term of fastood's own alone, times three norms, at three temperatures; gradient scores; norms."""
    orders = (None, 0.3, 1, 2) if with_feats else (None,)
    found: list[dict[str, Any]] = []
    for method in ("energy", "max_logit", "msp", "varsum", "tv", "kl_uniform", "neg_entropy", "gen"):
        for norm in orders if SCORES[method].positive else (None,):  # a larger U lowers a V below 0
            for temperature in (1.0,) if method == "max_logit" else (1.0, 2.0, 10.0):
                found.append({"method": method, "norm": norm, "temperature": temperature})
    if with_feats:
        found += [{"method": "gradnorm"}, {"method": "exgrad"}, *({"method": "norm", "norm": r} for r in orders if r)]
    return found


def _columns(rows: Rows) -> str:
    f, h = rows
    return f"{f.shape[1]} of logits and {'none' if h is None else h.shape[1]} of feats"


def _halves(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    """Sets of the same length are split alike, so that a corrupted copy of a row stays in the row's half."""
    n = len(rows[0])
    i = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return _at(rows, i[: n // 2]), _at(rows, i[n // 2 :])


def _at(rows: Rows, i: Tensor) -> Rows:
    f, h = rows
    i = i.to(f.device)
    return f[i], None if h is None else h[i]


def _synthetic(name: str, rows: Rows, generator: torch.Generator) -> Rows:
    """Outliers made of `rows`, as many but at most 5000."""
    f, h = rows
    n, m = len(f), min(len(f), _MOST)
    if name == "shuffled":
        i, j = (
            None if x is None else torch.randint(n, (m, x.shape[1]), generator=generator, device="cpu") for x in (f, h)
        )
        assert i is not None
        return f.gather(0, i.to(f.device)), None if h is None or j is None else h.gather(0, j.to(h.device))
    c = f.argmax(1).cpu()
    i, j = torch.randint(n, (2, 20 * m), generator=generator, device="cpu")
    differ = (c[i] != c[j]).nonzero()[:m, 0]
    if len(differ) < 2:
        raise ValueError("id must have rows of several predicted classes, to make outliers of; or give ood")
    weight = (0.3 + 0.4 * torch.rand(len(differ), 1, generator=generator, device="cpu")).to(f.device, f.dtype)
    (fi, hi), (fj, hj) = _at(rows, i[differ]), _at(rows, j[differ])
    # A sum of two products, for between two logits of -inf, torch.lerp would find NaN.
    mixed = [None if x is None or y is None else weight * x + (1 - weight) * y for x, y in ((fi, fj), (hi, hj))]
    assert mixed[0] is not None
    return mixed[0], mixed[1]


@dataclass(frozen=True)
class _Placements:
    """AUROC, the mean over the outlier sets, with its error."""

    inside: Floats
    outside: list[Floats]

    @property
    def auroc(self) -> float:
        return float(self.inside.mean())

    @property
    def stderr(self) -> float:
        variances = [np.var(self.inside, ddof=1) / len(self.inside)]
        variances += [np.var(x, ddof=1) / len(x) / len(self.outside) ** 2 for x in self.outside]
        return math.sqrt(sum(variances))

    def __sub__(self, other: _Placements) -> _Placements:
        return _Placements(
            self.inside - other.inside, [x - y for x, y in zip(self.outside, other.outside, strict=True)]
        )


def _placements(detector: Detector, inside: Rows, outside: list[Rows]) -> _Placements | None:
    """Of one score, averaged over the outlier sets; None where a row of `inside` has no finite score."""
    x = _scores(detector, inside)
    if not np.isfinite(x).all():
        return None
    # A row without a finite score is never accepted.
    ys = [np.where(np.isfinite(y), y, -np.inf) for y in (_scores(detector, rows) for rows in outside)]
    return _Placements(*placements(x, ys))


def _scores(detector: Detector, rows: Rows) -> NDArray[np.float64]:
    return detector.score(*rows).double().cpu().numpy()

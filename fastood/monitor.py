"""A detector in service: what it sees, how often it refuses, and whether that is still what it was fitted on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from hashlib import sha256
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln  # type: ignore[import-untyped]
from torch import Tensor

from fastood._fork import one_thread_if_forked
from fastood._inputs import Array, as_array, number
from fastood._sample import Floats, Ints, Sample, rank
from fastood.detector import Detector

__all__ = ["Monitor"]

STATE_VERSION = 1

_LENGTHS = 3  # of windows, each a tenth of the one before
_MOST = 2**53  # rows, of which no sum is past what int64 holds


class Monitor:
    """A running summary of the scores that a detector gives, and an alarm when they drift from its calibration.

    Give ``update`` every batch of scores. It keeps counts alone (some kilobytes, however long it runs), so that the
    monitors of several processes ``merge``. The alarm means that the rows of some window are not like the calibration
    rows: more of them look out-of-distribution, or fewer, or their scores are spread otherwise. What to do then is to
    look at the data, and to fit a new detector, and monitor, if the change is here to stay.

    **What it promises.** If the calibration rows and the rows seen are exchangeable (drawn alike and independently,
    say), the probability that it *ever* raises an alarm, however long it runs and however often one looks, is at most
    `alpha`; the same holds of ``drift_p_value <= a`` for every other a. The probability is over calibration sets,
    too: how far a finite calibration set may lie from the truth is part of the test, exactly, whatever the number of
    its rows and the distribution of the scores, ties among them. Of one given calibration set it may be more or less:
    it is above 10 alpha for at most one set in ten. A window of rows that depend on each other (frames of a video,
    one class at a time) is not exchangeable, and may well raise it.

    Parameters
    ----------
    detector : Detector
        As it is now; rows that it is fitted on later change nothing here.
    alpha : float
        Between 0 and 1: the promise about false alarms.
    window : int
        Every so many rows the test begins anew, and a second and third one every tenth and hundredth of that, so
        that a large change is found within the shortest of these windows, also after long peace, and a small one
        within the longest. A longer window finds smaller changes, down to what the calibration rows can tell: ten
        times their number is long enough.

    Attributes
    ----------
    rows, accepted, flagged, not_finite : int
        Rows seen; those accepted and those not; those whose score is NaN or infinite, which are flagged, too.
        These are left out of the test and of ``quantile``: a calibration row is never one of them.
    alpha, window
        As given.

    Notes
    -----
    The calibration scores cut the line into bins: at their deciles, and at the threshold. Of rows that are
    exchangeable with n calibration scores every row falls into the bins as from a Pólya urn, which begins with as
    many balls of each colour as the bin has of the n + 1 gaps between those scores; a row that equals a bin's edge
    is put on either side at random, by the chances of a tie broken fairly. For counts c_j out of an urn with a_j
    balls, the likelihood is that of Dirichlet(a), and the ratio

        E = DirMult(c; 1/2, ..., 1/2) / DirMult(c; a)

    is a martingale that begins at 1: a bet on every row. Another one bets on two bins alone, accepted or not, which
    finds a changed rate of refusals sooner; what is used is the mean of both. Such a martingale ever reaches x with
    a probability of at most 1/x (Ville's inequality), so the i-th window of each of the three lengths raises the alarm
    where its E >= 3 i (i + 1) / alpha, for 1/2 + 1/6 + 1/12 + ... = 1 (the union bound). ``drift_p_value`` is the
    smallest 3 i (i + 1) / E so far. See Vovk, Gammerman and Shafer, *Algorithmic Learning in a Random World*, on
    testing exchangeability; Ramdas et al., *Game-theoretic statistics and safe anytime-valid inference*.

    In a batch of 256 rows or more a row costs less than a microsecond (tests/test_monitor.py measures it); a smaller
    batch costs no more than that one.

    A detector that keeps a sketch (of more than two million rows) knows these gaps to 0.01% of the rows only, and
    the promise is as good as that.

    A detector fitted with `labels` was calibrated on rows that the classifier gets right, and rows in service are
    others as well: fit the one that is monitored without.

    Examples
    --------
    >>> import torch, fastood
    >>> g = torch.Generator().manual_seed(0)
    >>> detector = fastood.Detector("energy").fit(5 * torch.randn(1000, 10, generator=g))
    >>> monitor = fastood.Monitor(detector)
    >>> for batch in (5 * torch.randn(5000, 10, generator=g)).split(100):
    ...     monitor.update(detector.score(batch))
    >>> monitor
    Monitor(5000 rows, 5.56% flagged, 0 not finite; drift p-value 1, no alarm at 0.01)
    >>> monitor.update(detector.score(3 * torch.randn(1000, 10, generator=g)))
    >>> monitor.alarm
    True
    """

    def __init__(self, detector: Detector, *, alpha: float = 0.01, window: int = 10_000) -> None:
        if not isinstance(detector, Detector):
            raise TypeError(f"detector must be a fastood.Detector, got {type(detector).__name__}")
        limit = detector.threshold  # which refuses a detector that is not fitted
        self.alpha = number("alpha", alpha, above=0)
        if alpha >= 1:
            raise ValueError(f"alpha must be a number between 0 and 1, got {alpha!r}")
        self.window = int(number("window", window, at_least=1))
        if self.window != window or self.window > _MOST:
            raise ValueError(f"window must be a whole number of rows, at most 2**53, got {window!r}")
        self._threshold = None if isinstance(limit, Tensor) else limit

        n, sample = detector.rows, detector._all
        k = max(rank(n, detector.tpr) - sample.slack, 1)
        ranks = np.unique([k, *_share(n, np.arange(1, 10) / 10)])
        self._flag = int(ranks.searchsorted(k))  # the edge that is the threshold
        self._edges, self._ties = _edges(sample, ranks)
        self._edge_above = np.append(self._edges, math.nan)  # of each bin
        # Percentiles beside them, for quantiles; a score goes from among these to its bin by a table.
        fine, _ = _edges(sample, np.unique(_share(n, np.arange(1, 100) / 100)))
        self._fine = np.unique([*fine, *self._edges])
        self._bin_of = self._edges.searchsorted([*self._fine, math.inf])
        self._bins = _Bet(np.diff(ranks, prepend=0, append=n + 1))
        self._flags = _Bet(np.array([k, n + 1 - k]))

        self._random = np.random.default_rng()
        self._lock = Lock()
        self.rows = self.accepted = self.not_finite = 0
        self._sum, self._least, self._most = 0.0, math.inf, -math.inf
        self._histogram = np.zeros(len(self._fine) + 1, np.int64)
        self._windows = [_Window(self._length(i), np.zeros(len(self._edges) + 1, np.int64)) for i in range(_LENGTHS)]
        self._shards, self._lowest = 1, 1.0

    # ---- what comes in

    def update(self, scores: Array, accept: Array | None = None) -> None:
        """Add a batch of rows. Several threads may do so at once.

        Parameters
        ----------
        scores : Tensor or ndarray [N]
            What ``detector.score`` gives.
        accept : Tensor or ndarray of bool [N], optional
            What ``detector.accept`` gives. Left out: scores that are finite and at least the threshold. A ``per_class``
            detector does not decide by the score alone, so it must be given.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what came and what was wanted. Nothing of the batch is counted then.

        Examples
        --------
        >>> import torch, fastood
        >>> detector = fastood.Detector("max_logit", tpr=0.5).fit(torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
        >>> monitor = fastood.Monitor(detector)
        >>> monitor.update(torch.tensor([0.5, 2.5, 4.0, float("nan")]))
        >>> monitor.rows, monitor.accepted, monitor.flagged, monitor.not_finite
        (4, 2, 2, 1)
        """
        x = _vector("scores", scores, "floating-point numbers", "f").astype(np.float64, copy=False)
        finite = np.isfinite(x)
        if accept is not None:
            accepted = _vector("accept", accept, "bool", "b")
            if len(accepted) != len(x):
                raise ValueError(f"accept must have the {len(x)} rows of scores, got {len(accepted)}")
        elif self._threshold is None:
            raise ValueError("accept must be given: a per_class detector does not decide by the score alone")
        else:
            accepted = finite & (x >= self._threshold)
        rows = len(x)
        if not finite.all():
            x = x[finite]
        place = self._fine.searchsorted(x)
        with np.errstate(over="ignore"):
            total = float(x.sum())
        with self._lock:
            self.rows += rows
            self.accepted += int(np.count_nonzero(accepted))
            self.not_finite += rows - len(x)
            if len(x):
                self._sum += total
                self._least, self._most = min(self._least, float(x.min())), max(self._most, float(x.max()))
                self._histogram += np.bincount(place, minlength=len(self._histogram))
                self._test(self._ties_broken(x, self._bin_of[place]))

    def _ties_broken(self, x: Floats, bins: Ints) -> Ints:
        """The bin of every score: how many edges lie below it, where one that equals it may or may not."""
        tied = np.flatnonzero(x == self._edge_above[bins])
        if len(tied):
            below = self._ties < self._random.random((len(tied), 1))
            bins[tied] += (below & (self._edges == x[tied, None])).sum(1)
        return bins

    def _test(self, bins: Ints) -> None:
        numbers, counts = map(np.concatenate, zip(*(window.add(bins) for window in self._windows), strict=True))
        below = counts[:, : self._flag + 1].sum(1)
        flags = np.array([below, counts.sum(1) - below]).T
        log_e = np.logaddexp(self._bins.log_e(counts), self._flags.log_e(flags)) - math.log(2)
        log_p = float((np.log(_LENGTHS * numbers * (numbers + 1.0)) - log_e).min())
        self._lowest = min(self._lowest, math.exp(min(log_p, 0)))

    def _length(self, i: int) -> int:
        return -(-self.window // 10**i)

    def merge(self, other: Monitor) -> Monitor:
        """Add what another monitor of the same detector has seen: the monitor of another process, say.

        Counts add up. Every monitor tests its own rows, and the merged ``drift_p_value`` is the smallest of theirs
        times the number of monitors merged, itself included, even if it has seen no row (the union bound), which
        keeps the promise for all of them together where that number is fixed beforehand.

        Raises
        ------
        TypeError, ValueError
            Where it is no monitor, the same one, or one of another detector or window.

        Examples
        --------
        >>> import torch, fastood
        >>> detector = fastood.Detector("max_logit").fit(torch.randn(100, 10))
        >>> a, b = fastood.Monitor(detector), fastood.Monitor(detector)
        >>> a.update(torch.randn(30))
        >>> b.update(torch.randn(50))
        >>> a.merge(b).rows
        80
        """
        if not isinstance(other, Monitor):
            raise TypeError(f"other must be a fastood.Monitor, got {type(other).__name__}")
        if other is self:
            raise ValueError("other must be another monitor, got the same one")
        theirs = self._checked("other", other.state_dict())
        with self._lock:
            for name in ("rows", "accepted", "not_finite", "_sum", "_histogram", "_shards"):
                setattr(self, name, getattr(self, name) + theirs[name])
            self._least, self._most = min(self._least, theirs["_least"]), max(self._most, theirs["_most"])
            self._lowest = min(self._lowest, theirs["_lowest"])
        return self

    # ---- what it says

    @property
    def flagged(self) -> int:
        return self.rows - self.accepted

    @property
    def flag_rate(self) -> float:
        """The share of rows that were not accepted; NaN before the first one. Of the calibration's like: 1 - tpr."""
        with self._lock:
            return self.flagged / self.rows if self.rows else math.nan

    @property
    def drift_p_value(self) -> float:
        """The smaller, the surer that the rows have drifted; the smallest so far. Its promise is under ``Monitor``."""
        return min(self._shards * self._lowest, 1.0)

    @property
    def alarm(self) -> bool:
        """``drift_p_value <= alpha``. Once True, it stays so (but see ``merge``)."""
        return self.drift_p_value <= self.alpha

    def quantile(self, q: float) -> float:
        """The q-quantile of the finite scores seen, by interpolation; NaN where there are none.

        The true one lies between the same two percentiles of the calibration scores; below the first of them and above
        the last, between that and the least or the largest score seen.

        Examples
        --------
        >>> import torch, fastood
        >>> detector = fastood.Detector("max_logit").fit(torch.linspace(0, 1, 1000)[:, None])
        >>> monitor = fastood.Monitor(detector)
        >>> monitor.update(torch.linspace(0, 2, 1000))
        >>> round(monitor.quantile(0.25), 2)
        0.5
        """
        if not 0 <= number("q", q) <= 1:
            raise ValueError(f"q must be a number from 0 to 1, got {q!r}")
        with self._lock:
            upto, least, most = self._histogram.cumsum(), self._least, self._most
        if not upto[-1]:
            return math.nan
        points = np.clip([-math.inf, *self._fine, math.inf], least, most)
        return float(np.interp(q * upto[-1], [0, *upto], points))

    def collect(self) -> Iterator[Any]:
        """For ``prometheus_client.REGISTRY.register(monitor)``: metrics as they are when they are scraped.

        Counters ``fastood_rows_total{decision="accepted"|"flagged"}`` and ``fastood_not_finite_rows_total``, a
        histogram ``fastood_score`` with the bins of the test, gauges ``fastood_drift_p_value`` and
        ``fastood_drift_alarm`` (0 or 1).
        """
        from prometheus_client import metrics_core as families

        with self._lock:
            decisions = {"accepted": self.accepted, "flagged": self.flagged}
            not_finite, total, least = self.not_finite, self._sum, self._least
            upto = self._histogram.cumsum()
        rows = families.CounterMetricFamily(
            "fastood_rows", "Rows seen, by the detector's decision.", labels=["decision"]
        )
        for decision, count in decisions.items():
            rows.add_metric([decision], count)
        yield rows
        yield families.CounterMetricFamily(
            "fastood_not_finite_rows", "Rows whose score is NaN or infinite, which are flagged.", not_finite
        )
        edges = np.unique(self._edges)
        buckets = [(repr(float(x)), int(n)) for x, n in zip(edges, upto[self._fine.searchsorted(edges)], strict=True)]
        yield families.HistogramMetricFamily(
            "fastood_score",
            "Finite scores, higher = more in-distribution; between the bounds that the drift is tested by.",
            [*buckets, ("+Inf", int(upto[-1]))],
            total if least >= 0 else None,  # a sum that may fall is none for Prometheus
        )
        yield families.GaugeMetricFamily(
            "fastood_drift_p_value", "Ever <= a with probability <= a if nothing has drifted.", self.drift_p_value
        )
        yield families.GaugeMetricFamily("fastood_drift_alarm", f"1 where that is <= {self.alpha:g}.", self.alarm)

    def prometheus(self) -> str:
        """The metrics of ``collect`` in Prometheus' text format, by its official client library.

        Raises
        ------
        RuntimeError
            Where ``prometheus_client`` is not installed: ``pip install "fastood[monitor]"``.

        Examples
        --------
        >>> import torch, fastood
        >>> detector = fastood.Detector("max_logit").fit(torch.randn(100, 10))
        >>> text = fastood.Monitor(detector).prometheus()  # doctest: +SKIP
        """
        try:
            from prometheus_client import CollectorRegistry, generate_latest
        except ImportError:
            raise RuntimeError('prometheus_client is needed: pip install "fastood[monitor]"') from None
        registry = CollectorRegistry()
        registry.register(self)
        text: bytes = generate_latest(registry)
        return text.decode()

    # ---- to keep it

    def state_dict(self) -> dict[str, Any]:
        """All that it has counted, as numbers, strings and lists that JSON holds; the detector is saved apart.

        Examples
        --------
        >>> import json, torch, fastood
        >>> detector = fastood.Detector("max_logit").fit(torch.randn(100, 10))
        >>> monitor = fastood.Monitor(detector)
        >>> monitor.update(torch.randn(30))
        >>> text = json.dumps(monitor.state_dict())
        >>> fastood.Monitor(detector).load_state_dict(json.loads(text)).rows
        30
        """
        with self._lock:
            counted = bool(self._histogram.any())
            return {
                "kind": "Monitor",
                "version": STATE_VERSION,
                "window": self.window,
                "edges": self._fine.tolist(),
                "gaps": self._bins.a.tolist(),
                "rows": self.rows,
                "accepted": self.accepted,
                "not_finite": self.not_finite,
                "sum": self._sum,
                "least": self._least if counted else None,
                "most": self._most if counted else None,
                "histogram": self._histogram.tolist(),
                "windows": [[window.number, *window.counts.tolist()] for window in self._windows],
                "shards": self._shards,
                "lowest": self._lowest,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> Monitor:
        """Go on from what ``state_dict`` gave, in place of what was counted so far. Returns the monitor itself.

        Raises
        ------
        ValueError
            Where it is no such state, or one of another detector or window; nothing has changed then.
        """
        checked = self._checked("state", state)
        with self._lock:
            for name, x in checked.items():
                setattr(self, name, x)
        return self

    def _checked(self, name: str, state: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes that a state stands for."""
        if not isinstance(state, Mapping) or state.get("kind") != "Monitor":
            raise ValueError(f"{name} must be what Monitor.state_dict gives")
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"{name} must be of version {STATE_VERSION}, got {state.get('version')!r}")
        if state.get("window") != self.window:
            raise ValueError(f"{name} must be of window={self.window}, got {state.get('window')!r}")
        if state.get("edges") != self._fine.tolist() or state.get("gaps") != self._bins.a.tolist():
            raise ValueError(f"{name} must be of a monitor of the same detector; the calibration scores are others")
        try:
            whole = {x: _count(x, state[x]) for x in ("rows", "accepted", "not_finite", "shards")}
            histogram = _counts("histogram", state["histogram"], len(self._histogram))
            windows = [
                _Window(self._length(i), _counts("windows", counts, len(self._edges) + 1), _count("windows", number))
                for i, (number, *counts) in zip(range(_LENGTHS), state["windows"], strict=True)
            ]
            total, lowest = float(state["sum"]), float(state["lowest"])
            seen = int(histogram.sum())
            least, most = (float(state["least"]), float(state["most"])) if seen else (math.inf, -math.inf)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{name} is damaged: {error}") from error
        if (
            any(x.number < 1 or x.counts.sum() >= x.length for x in windows)
            or seen + whole["not_finite"] != whole["rows"]
            or whole["accepted"] > whole["rows"]
            or whole["shards"] < 1
            or not 0 <= lowest <= 1
            or (seen and not least <= most)
        ):
            raise ValueError(f"{name} is damaged: its counts contradict each other")
        shards = whole.pop("shards")
        return whole | {
            "_sum": total,
            "_least": least,
            "_most": most,
            "_histogram": histogram,
            "_windows": windows,
            "_shards": shards,
            "_lowest": lowest,
        }

    def __repr__(self) -> str:
        flagged = f"{100 * self.flag_rate:.3g}% flagged, {self.not_finite} not finite" if self.rows else "none flagged"
        alarm = "ALARM" if self.alarm else "no alarm"
        return (
            f"Monitor({self.rows} rows, {flagged}; drift p-value {self.drift_p_value:.2g}, {alarm} at {self.alpha:g})"
        )


class _Window:
    """Rows that are tested together, `length` at a time: the `number` of the open window, and its counts by bin."""

    def __init__(self, length: int, counts: Ints, number: int = 1) -> None:
        self.length, self.counts, self.number = length, counts, number

    def add(self, bins: Ints) -> tuple[Ints, Ints]:
        """Every window that these rows fall into: its number [W], and its counts up to now [W, bins]."""
        before, K = int(self.counts.sum()), len(self.counts)
        if before + len(bins) < self.length:  # the same as below, in less time than a request takes
            self.counts = self.counts + np.bincount(bins, minlength=K)
            return np.array([self.number]), self.counts[None]
        of_row = np.arange(before, before + len(bins)) // self.length
        W = int(of_row[-1]) + 1
        counts = np.bincount(of_row * K + bins, minlength=W * K).reshape(W, K)
        counts[0] += self.counts
        numbers = self.number + np.arange(W)
        is_full = before + len(bins) == W * self.length
        self.number += W if is_full else W - 1
        self.counts = np.zeros(K, np.int64) if is_full else counts[-1].copy()
        return numbers, counts


class _Bet:
    """The martingale of a Pólya urn that begins with `a` balls of each colour, against any other rates."""

    def __init__(self, a: Ints) -> None:
        self.a, self.total = a, float(a.sum())
        self._gammas = gammaln(a).sum() - gammaln(self.total) + gammaln(0.5 * len(a)) - len(a) * gammaln(0.5)

    def log_e(self, c: Ints) -> Floats:
        """Of `c` [W, colours] balls drawn of each colour, in any order: [W]."""
        t, a = c.sum(1), self.a
        bet: Floats = (gammaln(c + 0.5) - gammaln(c + a)).sum(1) - gammaln(t + 0.5 * len(a))
        return bet + gammaln(t + self.total) + self._gammas


def _share(n: int, shares: Floats) -> Ints:
    """The ranks from 1 to n nearest to these shares of the n + 1 gaps."""
    return np.clip(np.rint(shares * (n + 1)), 1, n).astype(np.int64)


def _edges(sample: Sample, ranks: Ints) -> tuple[Floats, Floats]:
    """The calibration scores of these increasing ranks, and the numbers in (0, 1) that break ties with each.

    With every row goes a uniform random number, and rows that tie are in the order of these. So among m tied rows
    those of the edges are order statistics of m uniform numbers, whose spacings are a Dirichlet draw. The scores are
    the seed: the monitors of several processes must cut alike.
    """
    values, upto = sample.ranked()
    edges = values[upto.searchsorted(ranks)]
    first, last = values.searchsorted(edges), values.searchsorted(edges, side="right")
    below, upto_tied = np.where(first > 0, upto[first - 1], 0), upto[last - 1]
    seed = sha256(values.tobytes() + upto.tobytes()).digest()
    random, ties = np.random.default_rng(int.from_bytes(seed)), np.empty(len(ranks))
    for i in np.unique(first):
        group = first == i
        m, places = upto_tied[group][0] - below[group][0], (ranks - below)[group]
        ties[group] = random.dirichlet(np.diff(places, prepend=0, append=m + 1))[:-1].cumsum()
    return edges, ties


def _vector(name: str, x: Any, what: str, kind: str) -> NDArray[Any]:
    one_thread_if_forked()
    x = as_array(x)
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a torch tensor or a numpy array, got {type(x).__name__}")
    if x.dtype.kind != kind:
        raise TypeError(f"{name} must be {what}, got {x.dtype}")
    if x.ndim != 1:
        raise ValueError(f"{name} must be [N], one for every row, got shape {list(x.shape)}")
    return x


def _count(name: str, x: Any) -> int:
    if type(x) is not int or not 0 <= x <= _MOST:
        raise ValueError(f"{name} must be whole numbers from 0 to 2**53, got {x!r}")
    return x


def _counts(name: str, x: Any, length: int) -> Ints:
    counts = np.array([_count(name, n) for n in x], np.int64)
    if len(counts) != length:
        raise ValueError(f"{name} must be {length} counts, got {len(counts)}")
    return counts

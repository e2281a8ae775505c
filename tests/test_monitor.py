"""A detector in service: counts against plain numpy, the alarm's promise by arithmetic and by simulation."""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom

from fastood import Detector, Monitor, _sample
from fastood.monitor import _Bet, _edges, _Window


def fitted(scores, **options):
    return Detector("max_logit", **options).fit(np.asarray(scores, float)[:, None])


def normal(n, seed=0):
    return np.random.default_rng(seed).normal(size=n)


# ---- the promise


@pytest.mark.parametrize(("k", "n"), [(1, 19), (5, 100), (3, 7), (50, 99)])
def test_the_bet_is_fair(k, n):
    """Its mean over what an urn may give is 1: k of n + 1 gaps are a beta-binomial with parameters k and n + 1 - k."""
    bet = _Bet(np.array([k, n + 1 - k]))
    for t in (1, 2, 10, 60):
        c = np.arange(t + 1)
        e = np.exp(bet.log_e(np.stack([c, t - c], 1)))
        assert (betabinom.pmf(c, t, k, n + 1 - k) * e).sum() == pytest.approx(1, rel=1e-9)
    assert e.max() > 1


@pytest.mark.parametrize("a", [(1, 2, 3), (1, 1, 18), (4, 7)])
def test_the_bet_is_the_product_of_its_steps(a):
    """Row by row, in exact fractions: the rate that is bet on over the rate of the urn; any order of the rows."""
    for colours in product(range(len(a)), repeat=4):
        e, c = Fraction(1), [0] * len(a)
        for t, j in enumerate(colours):
            e *= (Fraction(1, 2) + c[j]) / (Fraction(len(a), 2) + t) / Fraction(a[j] + c[j], sum(a) + t)
            c[j] += 1
        assert math.exp(_Bet(np.array(a)).log_e(np.array([c]))[0]) == pytest.approx(float(e), rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_rows_fall_into_bins_as_from_the_urn(ties):
    """First and second moments, over calibration sets: below the threshold lies a ball of k among n + 1."""
    rng = np.random.default_rng(3)
    n, t, k = 39, 40, 10
    first, second = [], []
    for _ in range(600):
        s = rng.normal(size=n + t)
        s = s.round() if ties else s
        monitor = Monitor(fitted(s[:n], tpr=0.75))
        monitor.update(s[n:])
        c = monitor._windows[0].counts[: monitor._flag + 1].sum()
        first.append(c / t)
        second.append(c * (c - 1) / (t * (t - 1)))
    for x, truth in ((first, k / (n + 1)), (second, k * (k + 1) / ((n + 1) * (n + 2)))):
        assert np.mean(x) == pytest.approx(truth, abs=4 * np.std(x) / math.sqrt(len(x)))


@pytest.mark.parametrize("ties", [False, True])
def test_false_alarms_are_as_rare_as_promised(ties):
    rng = np.random.default_rng(4)
    runs, lowest = 300, []
    for _ in range(runs):
        s = rng.gumbel(size=60 + 1200)
        s = s.round() if ties else s
        monitor = Monitor(fitted(s[:60], tpr=0.9), alpha=0.2, window=500)
        for batch in np.split(s[60:], 8):
            monitor.update(batch)
        lowest.append(monitor.drift_p_value)
    for a in (0.5, 0.2, 0.05):
        assert np.mean(np.array(lowest) <= a) <= a + 3 * math.sqrt(a * (1 - a) / runs)


def test_one_window_keeps_its_promise_and_is_not_idle():
    """Ville's inequality, row by row: the bet reaches 1/a with a probability of at most a, and not much less often."""
    rng = np.random.default_rng(5)
    a, runs = np.array([3, 10, 17]), 4000
    rates = rng.dirichlet(a, runs)  # an urn is a mixture of independent draws
    colour = (rng.random((runs, 300, 1)) > rates.cumsum(1)[:, None, :2]).sum(-1)
    counts = (colour[..., None] == np.arange(3)).cumsum(1)
    highest = np.exp(_Bet(a).log_e(counts.reshape(-1, 3))).reshape(runs, 300).max(1)
    for level in (0.5, 0.1, 0.05):
        share = np.mean(highest >= 1 / level)
        assert level / 10 < share <= level + 3 * math.sqrt(level * (1 - level) / runs)


@pytest.mark.parametrize(
    "drifted", [lambda x: x - 1, lambda x: x + 1, lambda x: 3 * x, lambda x: x / 3, lambda x: 0 * x]
)
@pytest.mark.parametrize("peace", [0, 35_050])
def test_drift_is_found_within_the_shortest_windows_also_after_long_peace(drifted, peace):
    monitor = Monitor(fitted(normal(2000)))
    monitor.update(normal(peace, 1))
    assert not monitor.alarm
    for i in range(30):
        monitor.update(drifted(normal(10, 2 + i)))
    assert monitor.alarm
    p = monitor.drift_p_value
    assert p <= 0.01
    monitor.update(normal(20_000, 3))  # and stays
    assert monitor.drift_p_value == p


def test_a_small_drift_is_found_within_the_longest_window():
    monitor = Monitor(fitted(normal(20_000)))
    monitor.update(normal(35_000, 1))
    assert not monitor.alarm
    monitor.update(normal(15_000, 2) - 0.15)
    assert monitor.alarm


def test_the_alarm_is_by_the_level_asked_for():
    monitor = Monitor(fitted(normal(500)), alpha=0.3)
    assert (monitor.drift_p_value, monitor.alarm, monitor.flag_rate) == (1, False, pytest.approx(math.nan, nan_ok=True))
    while monitor.drift_p_value > 0.3:
        assert not monitor.alarm
        monitor.update(np.array([-9.0]))
    assert monitor.alarm


def test_p_is_the_smallest_over_windows_of_three_lengths():
    """From the definition, by loops."""
    calibration, s = normal(99, 7), normal(2345, 8) - 0.3
    monitor = Monitor(fitted(calibration, tpr=0.9375), window=1000)
    ordered = np.sort(calibration)
    ranks = sorted({6, *range(10, 100, 10)})  # 6 of 100 gaps are below the threshold
    edges = ordered[[r - 1 for r in ranks]]
    bins, a = (edges < s[:, None]).sum(1), np.diff([0, *ranks, 100])
    p = 1.0
    for upto in (1000, 1500, 2345):
        monitor.update(s[monitor.rows : upto])
        for length in (1000, 100, 10):
            for i, start in enumerate(range(0, upto, length), 1):
                c = np.bincount(bins[start : min(start + length, upto)], minlength=len(a))
                two = np.array([c[0], c[1:].sum()])
                e = sum(math.exp(_Bet(x).log_e(y[None])[0]) for x, y in ((a, c), (np.array([6, 94]), two))) / 2
                p = min(p, 3 * i * (i + 1) / e)
        assert monitor.drift_p_value == pytest.approx(p, rel=1e-9, abs=0)
    assert p < 1


@given(st.lists(st.integers(-3, 3).map(float), min_size=3, max_size=40), st.data())
def test_edges_break_ties_in_the_order_of_the_ranks(calibration, data):
    sample = fitted(calibration, tpr=0.5)._all
    ranks = np.array(sorted(data.draw(st.sets(st.integers(1, len(calibration)), min_size=1))))
    edges, ties = _edges(sample, ranks)
    assert edges.tolist() == np.sort(calibration)[ranks - 1].tolist()
    assert ((ties > 0) & (ties < 1)).all()
    assert all(x < y for x, y in pairwise(zip(edges, ties, strict=True)))
    again = _edges(sample, ranks)
    assert again[1].tolist() == ties.tolist()


@given(st.integers(1, 7), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=5))
def test_windows_are_of_their_length_however_rows_come(length, batches):
    window = _Window(length, np.zeros(3, np.int64))
    whole, last = [], {}
    for batch in batches:
        numbers, counts = window.add(np.array(batch))
        last |= dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        whole += batch
    parts = [whole[i : i + length] for i in range(0, len(whole), length)]
    assert last == {i: np.bincount(part, minlength=3).tolist() for i, part in enumerate(parts, 1)}
    assert window.number == len(whole) // length + 1
    assert window.counts.sum() == len(whole) % length


# ---- counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_counts_are_those_of_the_decisions(dtype):
    logits = torch.from_numpy(normal(1000)[:, None]).to(dtype)
    found = Detector("max_logit", tpr=0.9).fit(logits)
    new = torch.from_numpy(normal(500, 1)[:, None]).to(dtype)
    new[3], new[5], new[7] = math.nan, math.inf, -math.inf
    s, accept = found.score(new), found.accept(new)
    monitors = [Monitor(found) for _ in range(4)]
    monitors[0].update(s)
    monitors[1].update(s, accept)
    monitors[2].update(s.numpy(), accept.numpy())
    for part in s.split(7):
        monitors[3].update(part)
    for monitor in monitors:
        assert (monitor.rows, monitor.accepted, monitor.not_finite) == (500, int(accept.sum()), 3)
        assert monitor.flagged == 500 - int(accept.sum())
        assert monitor.flag_rate == monitor.flagged / 500
    finite = s[s.isfinite()].double().numpy()
    state = monitors[0].state_dict()
    assert (state["least"], state["most"]) == (finite.min(), finite.max())
    assert state["sum"] == pytest.approx(finite.sum())
    bounds = [-math.inf, *state["edges"], math.inf]
    assert state["histogram"] == [int(((finite > x) & (finite <= y)).sum()) for x, y in pairwise(bounds)]
    same = ("histogram", "rows", "accepted", "not_finite", "least", "most")
    for monitor in monitors[1:]:
        assert {x: monitor.state_dict()[x] for x in same} == {x: state[x] for x in same}


def test_a_detector_by_class_says_what_it_accepts():
    logits = 3 * np.random.default_rng(0).normal(size=(300, 3))
    found = Detector("energy", per_class=True, tpr=0.8).fit(logits)
    monitor = Monitor(found)
    s, accept = found.score(logits), found.accept(logits)
    with pytest.raises(ValueError, match="accept must be given: a per_class detector"):
        monitor.update(s)
    monitor.update(s, accept)
    assert monitor.accepted == accept.sum()
    assert (accept != (s >= np.quantile(s, 0.2))).any()  # or the test could not tell


@pytest.mark.parametrize("scale", [0.5, 1, 1.5])
def test_quantiles_lie_between_the_calibrations_percentiles(scale):
    calibration = np.random.default_rng(0).gumbel(size=2000)
    s = scale * np.random.default_rng(1).gumbel(size=999)
    monitor = Monitor(fitted(calibration))
    assert math.isnan(monitor.quantile(0.5))
    monitor.update(np.array([math.nan]))
    assert math.isnan(monitor.quantile(0.5))
    monitor.update(s)
    assert (monitor.quantile(0), monitor.quantile(1)) == (s.min(), s.max())
    percentiles = np.sort(calibration)[np.rint(np.arange(1, 100) / 100 * 2001).astype(int) - 1]
    bounds = np.array([-math.inf, *percentiles, math.inf])
    for q in (0.01, 0.05, 0.3, 0.5, 0.9, 0.99):
        truth = np.sort(s)[math.ceil(q * len(s)) - 1]
        i = bounds.searchsorted(truth)
        assert bounds[i - 1] <= monitor.quantile(q) <= bounds[i]
    for q in (-0.1, 1.1):
        with pytest.raises(ValueError, match="q must be a number from 0 to 1"):
            monitor.quantile(q)


def test_threads_lose_no_row():
    found = fitted(normal(100))
    monitor = Monitor(found, window=1000)
    batches = [normal(37, i) for i in range(400)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(monitor.update, batches))
    s = np.concatenate(batches)
    assert (monitor.rows, monitor.accepted) == (len(s), (s >= found.threshold).sum())
    state = monitor.state_dict()
    assert sum(state["histogram"]) == len(s)
    assert [(n - 1) * length + sum(c) for length, (n, *c) in zip((1000, 100, 10), state["windows"], strict=True)] == (
        [len(s)] * 3
    )


def test_a_sum_that_overflows_loses_no_row():
    monitor = Monitor(fitted(normal(100)))
    for scores in (np.full(10, 1.7e308), np.full(10, -1.7e308)):
        monitor.update(scores)
    assert (monitor.rows, monitor.accepted, monitor.quantile(0)) == (20, 10, -1.7e308)
    assert Monitor(fitted(normal(100))).load_state_dict(monitor.state_dict()).rows == 20


def test_no_rows():
    monitor = Monitor(fitted(normal(100)))
    for _ in range(2):
        monitor.update(np.empty(0))
    assert monitor.rows == 0
    assert repr(monitor) == "Monitor(0 rows, none flagged; drift p-value 1, no alarm at 0.01)"


@pytest.mark.parametrize("n", [1, 2, 19, 100])
def test_few_calibration_rows(n):
    monitor = Monitor(fitted(normal(n), tpr=0.5 if n < 19 else 0.95))
    monitor.update(normal(1000, 1))
    assert monitor.rows == 1000
    assert 0 < monitor.drift_p_value <= 1


def test_a_sketch_will_do(monkeypatch):
    pytest.importorskip("datasketches", reason="needs datasketches")
    monkeypatch.setattr(_sample, "EXACT_ROWS", 1000)
    found = fitted(normal(50_000).round(2))
    assert found._all.sketched
    monitor = Monitor(found)
    gaps = monitor.state_dict()["gaps"]
    assert (gaps[0], sum(gaps)) == (2500 - 5, 50_001)  # lowered by what the sketch may be off
    monitor.update(normal(20_000, 1).round(2))
    assert monitor.drift_p_value > 0.05
    monitor.update(normal(200, 2) - 1)
    assert monitor.alarm


# ---- merge, state


def test_merged_counts_add_up_and_p_values_are_bonferronis():
    found = fitted(normal(500))
    parts = [normal(1200, 1), normal(50, 2), normal(400, 3) - 1.2]
    monitors = [Monitor(found) for _ in parts]
    for monitor, part in zip(monitors, parts, strict=True):
        monitor.update(part)
    together = Monitor(found)
    together.update(np.concatenate(parts))
    p = min(m.drift_p_value for m in monitors)
    assert p < 0.001
    a, b, c = monitors
    windows = a.state_dict()["windows"]
    assert a.merge(b.merge(c)) is a
    merged, state = a.state_dict(), together.state_dict()
    for name in ("rows", "accepted", "not_finite", "histogram", "least", "most"):
        assert merged[name] == state[name]
    assert a.drift_p_value == pytest.approx(3 * p, rel=1e-12, abs=0)
    assert a.quantile(0.3) == together.quantile(0.3)
    assert merged["windows"] == windows  # its own go on
    assert c.rows == 400


def test_merge_mistakes():
    found = fitted(normal(500))
    monitor = Monitor(found)
    with pytest.raises(TypeError, match=r"other must be a fastood\.Monitor, got dict"):
        monitor.merge(monitor.state_dict())
    with pytest.raises(ValueError, match="got the same one"):
        monitor.merge(monitor)
    with pytest.raises(ValueError, match="other must be of a monitor of the same detector"):
        monitor.merge(Monitor(fitted(normal(500, 1))))
    with pytest.raises(ValueError, match="other must be of window=10000, got 100"):
        monitor.merge(Monitor(found, window=100))


def test_a_state_goes_through_json_and_goes_on():
    found = fitted(normal(500))
    whole, first = Monitor(found, window=300), Monitor(found, window=300)
    s = normal(1000, 1) - 0.1
    for part in (s[:450], s[450:]):
        whole.update(part)
    first.update(s[:450])
    text = json.dumps(first.state_dict(), allow_nan=False)
    second = Monitor(found, window=300)
    assert second.load_state_dict(json.loads(text)) is second
    assert second.state_dict() == first.state_dict()
    second.update(s[450:])
    assert second.state_dict() == whole.state_dict()
    empty = json.dumps(Monitor(found, window=300).state_dict(), allow_nan=False)
    assert whole.load_state_dict(json.loads(empty)).rows == 0
    whole.update(s[:450])
    assert whole.state_dict() == first.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "Detector"}, r"state must be what Monitor\.state_dict gives"),
        ({"version": 2}, "state must be of version 1, got 2"),
        ({"window": 99}, "state must be of window=10000, got 99"),
        ({"edges": [0.0]}, "the calibration scores are others"),
        ({"rows": -1}, "damaged: rows must be whole numbers from 0 to .*, got -1"),
        ({"rows": 101}, "damaged: its counts contradict each other"),
        ({"accepted": 101}, "damaged: its counts"),
        ({"accepted": True}, "damaged: accepted must be"),
        ({"histogram": [100]}, r"damaged: histogram must be \d+ counts, got 1"),
        ({"windows": [[1, 0]] * 3}, "damaged: windows must be"),
        ({"windows": []}, "damaged"),
        ({"windows": 3}, "damaged"),
        ({"lowest": -1}, "damaged: its counts"),
        ({"lowest": math.nan}, "damaged: its counts"),
        ({"least": None}, "damaged"),
        ({"least": 99.0}, "damaged: its counts"),
        ({"shards": 0}, "damaged: its counts"),
        ({"sum": "much"}, "damaged"),
        (
            {"windows": [[1, *[2**62] * 11]] * 3},
            "damaged: windows must be whole numbers from 0",
        ),  # whose sum wraps round
    ],
)
def test_damaged_states_are_refused_whole(change, message):
    monitor = Monitor(fitted(normal(500)))
    monitor.update(normal(100, 1))
    before = monitor.state_dict()
    with pytest.raises(ValueError, match=message):
        monitor.load_state_dict(before | change)
    for name in before:
        with pytest.raises(ValueError, match="state"):
            monitor.load_state_dict({k: x for k, x in before.items() if k != name})
    with pytest.raises(ValueError, match="state must be"):
        monitor.load_state_dict(None)
    assert monitor.state_dict() == before


# ---- arguments


def test_mistakes():
    found = fitted(normal(100))
    with pytest.raises(TypeError, match=r"detector must be a fastood\.Detector, got str"):
        Monitor("det.safetensors")
    with pytest.raises(RuntimeError, match="the detector is not fitted"):
        Monitor(Detector())
    with pytest.raises(ValueError, match=r"tpr=0\.99 takes at least 99 in-distribution rows"):
        Monitor(Detector("max_logit", tpr=0.99).partial_fit(np.zeros((5, 1))))
    for alpha in (0, 1, -1, math.nan):
        with pytest.raises(ValueError, match="alpha must be"):
            Monitor(found, alpha=alpha)
    for window in (0, 1.5, math.inf, 1e30):
        with pytest.raises(ValueError, match="window must be"):
            Monitor(found, window=window)
    monitor = Monitor(found)
    for scores, accept, error, message in (
        ([1.0], None, TypeError, "scores must be a torch tensor or a numpy array, got list"),
        (np.ma.array([1.0]), None, TypeError, "scores must be a torch tensor or a numpy array, got MaskedArray"),
        (np.zeros(3, int), None, TypeError, "scores must be floating-point numbers, got int64"),
        (np.zeros((3, 1)), None, ValueError, r"scores must be \[N\], one for every row, got shape \[3, 1\]"),
        (torch.tensor(1.0), None, ValueError, r"scores must be \[N\], one for every row, got shape \[\]"),
        (np.zeros(3), np.zeros(2, bool), ValueError, "accept must have the 3 rows of scores, got 2"),
        (np.zeros(3), np.zeros(3), TypeError, "accept must be bool, got float64"),
    ):
        with pytest.raises(error, match=message):
            monitor.update(scores, accept)
    assert monitor.rows == 0


# ---- Prometheus


def families(text):
    from prometheus_client.parser import text_string_to_metric_families

    return {
        x.name: {(s.name, *s.labels.values()): s.value for s in x.samples} for x in text_string_to_metric_families(text)
    }


@pytest.mark.parametrize("shift", [0, 10])
def test_prometheus_text_says_the_same(shift):
    client = pytest.importorskip("prometheus_client", reason="needs prometheus_client")
    found = fitted(normal(1000) + shift)
    monitor = Monitor(found)
    s = normal(500, 1) + shift
    monitor.update(np.append(s, math.nan))
    text = monitor.prometheus()
    metrics = families(text)
    assert metrics["fastood_rows"] == {
        ("fastood_rows_total", "accepted"): monitor.accepted,
        ("fastood_rows_total", "flagged"): monitor.flagged,
    }
    assert metrics["fastood_not_finite_rows"] == {("fastood_not_finite_rows_total",): 1}
    assert metrics["fastood_drift_p_value"] == {("fastood_drift_p_value",): monitor.drift_p_value}
    assert metrics["fastood_drift_alarm"] == {("fastood_drift_alarm",): 0}
    histogram = metrics["fastood_score"]
    buckets = {float(key[1]): n for key, n in histogram.items() if key[0] == "fastood_score_bucket"}
    assert found.threshold in buckets
    assert len(buckets) == 11
    assert buckets == {x: (s <= x).sum() for x in buckets}
    if shift:
        assert histogram["fastood_score_count",] == 500
        assert histogram["fastood_score_sum",] == pytest.approx(s.sum())
    else:  # of negative scores the sum falls, which a counter must not
        assert ("fastood_score_sum",) not in histogram
    registry = client.CollectorRegistry()
    registry.register(monitor)
    monitor.update(s)
    scraped = families(client.generate_latest(registry).decode())
    assert scraped["fastood_rows"]["fastood_rows_total", "accepted"] == monitor.accepted


def test_without_prometheus_client_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(RuntimeError, match=r'prometheus_client is needed: pip install "fastood\[monitor\]"'):
        Monitor(fitted(normal(100))).prometheus()

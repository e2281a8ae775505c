"""What the right answer is, written from the definitions in numpy's long double, and how far off a result may be.

Nothing here imports fastood. A row is one vector; the functions take matrices and loop over rows.
"""

import decimal
import functools
import hashlib
import math
from decimal import Decimal

import numpy as np

LD = np.longdouble
EPS = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}


def widen(x):
    """Any tensor or array in long double; exact, for every input type."""
    if hasattr(x, "detach"):
        x = x.detach().double().numpy()
    return np.asarray(x).astype(LD)


def kept(most=None):
    """A function whose results are kept, all or the `most` latest: of the same rows for every backend."""

    def of(function):
        results = {}

        @functools.wraps(function)
        def once(*args):
            key = tuple(map(contents, args))
            if key not in results:
                if len(results) == most:
                    del results[next(iter(results))]
                results[key] = function(*args)
                for x in results[key] if isinstance(results[key], tuple) else (results[key],):
                    x.flags.writeable = False
            return results[key]

        return once

    return of


def contents(x):
    """What stands for an argument: for a tensor or an array its numbers."""
    if hasattr(x, "detach"):
        x = x.detach().double().numpy()
    if not isinstance(x, np.ndarray):
        return x
    parts = [x]
    if x.dtype == LD:  # which has bytes without a meaning
        with np.errstate(all="ignore"):
            parts = [x.astype(float), (x - x.astype(float)).astype(float)]
    return x.dtype, x.shape, *(hashlib.blake2b(part.tobytes()).digest() for part in parts)


@kept(most=8)
def softmax_row(f, T):
    """p, 1 - p and log p of one row; -inf is a masked class."""
    top = int(np.argmax(f))
    if np.isnan(f).any() or not np.isfinite(f[top]):
        bad = np.full_like(f, np.nan)
        return bad, bad, bad
    z = (f - f[top]) / LD(T)
    e = np.exp(z)
    rest = np.delete(e, top).sum()
    p = e / (1 + rest)
    not_p = 1 - p
    not_p[top] = rest / (1 + rest)
    return p, not_p, z - np.log1p(rest)


# The statistic that a V term is; of GEN see gen.
V_TERMS = {
    "msp": "msp",
    "energy": "energy",
    "varsum": "s2",
    "tv": "tv",
    "max_logit": "fmax",
    "neg_entropy": "plogp",
    "kl_uniform": "kl_uniform",
}


def row_stat(name, f, T):
    p, not_p, log_p = softmax_row(f, T)
    top = int(np.argmax(f))
    C = len(f)
    if name in ("energy", "lse"):
        if np.isnan(f).any() or not np.isfinite(f[top]):
            return f[top] if not np.isnan(f).any() else LD(np.nan)
        return f[top] - LD(T) * log_p[top] if name == "energy" else f[top] / LD(T) - log_p[top]
    if np.isnan(p).any():
        return LD(np.nan)
    others = np.arange(C) != top
    return {
        "fmax": lambda: f[top],
        "msp": lambda: p[top],
        "one_minus_msp": lambda: not_p[top],
        "log_msp": lambda: log_p[top],
        "s2": lambda: (p**2).sum(),
        "one_minus_s2": lambda: not_p[top] * p[top] + (p[others] * not_p[others]).sum(),
        "log_one_minus_s2": lambda: log_one_minus_s2(f, T, top),
        "tv": lambda: to_uniform(f, T, np.abs(LD(1) / C - p).sum() / 2, of_tv),
        "plogp": lambda: (p[p > 0] * log_p[p > 0]).sum(),
        "sumlogp": lambda: C * (log_p / C).sum(),
        "s2_sumlogp": lambda: (1 + (p**2).sum()) * (C * (log_p / C).sum()),
        "one": lambda: LD(1),
        "uniform": lambda: 1 / LD(C),
        "kl_uniform": lambda: to_uniform(f, T, -np.log(LD(C)) - (log_p / C).sum(), of_kl_uniform),
    }[name]()


def to_uniform(f, T, value, exact):
    """`value`, or where that is a difference of nearly equal numbers, what comes of the definition in enough digits."""
    if not value < 1 / 4:
        return value
    if (f == f[0]).all():
        return LD(0)
    values, times = np.unique(f, return_counts=True)
    apart = np.diff(values[np.isfinite(values)]).min(initial=LD(T))
    digits, far = 60 + 2 * math.ceil(np.log10(LD(T) / apart)), 10**9
    with decimal.localcontext(decimal.Context(digits, Emin=-far, Emax=far, traps=[])):
        z = [Decimal(x) / Decimal(float(T)) for x in values.astype(float).tolist()]
        z = [x - z[-1] for x in z]
        return LD(str(exact(z, [x.exp() for x in z], times.tolist(), Decimal(len(f)))))


def of_tv(z, e, times, C):
    total = weighted(e, times)
    return weighted([abs(x / total - 1 / C) for x in e], times) / 2


def of_kl_uniform(z, e, times, C):
    return (weighted(e, times) / C).ln() - weighted(z, times) / C


def weighted(x, times):
    return sum(a * n for a, n in zip(x, times, strict=True))


def log_one_minus_s2(f, T, top):
    """log(2 r + r^2 - r_2) - 2 log(1 + r), r and r_2 the sums of other classes' e^z and e^2z, beside the pivot's."""
    z = (np.delete(f, top) - f[top]) / LD(T)
    pivot = z.max(initial=-np.inf)
    if pivot == -np.inf:
        return pivot
    e = np.exp(z - pivot)
    r = e.sum() * np.exp(pivot)
    ratio = (e * e).sum() / e.sum() * np.exp(pivot)
    return pivot + np.log(e.sum()) + np.log(2 + (r - ratio)) - 2 * np.log1p(r)


@kept()
def stat(name, f, T=1.0):
    with np.errstate(all="ignore"):
        return np.array([row_stat(name, row, T) for row in widen(f)], dtype=LD)


@kept()
def gen(f, gamma, M, T=1.0):
    out = []
    for row in widen(f):
        p, not_p, _ = softmax_row(row, T)
        order = np.argsort(-p)[:M]
        out.append(np.sum((p[order] * not_p[order]) ** LD(gamma)))
    return np.array(out, dtype=LD)


@kept()
def norm(h, r, bias=False):
    """||h||_r of every row: [N]."""
    h = np.abs(widen(h))
    if bias:
        h = np.concatenate([h, np.ones((len(h), 1), LD)], 1)
    with np.errstate(all="ignore"):
        nan = np.isnan(h).any(1)
        if r == math.inf:
            u = h.max(1, initial=0)
        elif r == 0:
            u = (h != 0).sum(1).astype(LD)
        else:
            top = np.where(np.isfinite(h), h, 1).max(1, initial=0)
            unit = np.where((top > 0) & (r > 1), top, 1)  # even long double overflows in the 100th power
            u = unit * (((h / unit[:, None]) ** LD(r)) * (h != 0)).sum(1) ** (1 / LD(r))
            u[np.isinf(h).any(1)] = np.inf
    u[nan] = np.nan
    return u


@kept()
def batchgrad(f, h, G, T, bias, eps):
    """Equation 6 by its definition, class by class, [N]; and the error allowed."""
    z, h, G = widen(f), widen(h), widen(G)
    if bias:
        h = np.concatenate([h, np.ones((len(h), 1), LD)], 1)
    out = []
    with np.errstate(all="ignore"):
        for row, x in zip(z, h, strict=True):
            p, not_p, _ = softmax_row(row, T)
            away = np.abs(G - p[:, None] * x / T).sum(1)
            towards = np.abs(G + not_p[:, None] * x / T).sum(1)
            out.append((not_p * away + p * towards).sum())
        # p is exact to (32 + 4 |z|) units, which what depends on it by way of h inherits.
        size = np.abs(G).sum() + np.abs(h).sum(1) / T
        allowed = (64 + 4 * np.minimum(span(f) / T, 104)) * eps * size
    return np.array(out), allowed


@kept()
def gradient(f, labels, order, power, expectation, T, eps):
    """|| E_q[e_Y - p] ||^power or E_q[ || e_Y - p ||^power ] in long double, and the error allowed: two [N]."""
    values, allowed = [], []
    q = widen(labels) if not isinstance(labels, str) else None
    r, x = LD(order), LD(power)
    for i, (row, spread) in enumerate(zip(widen(f), span(f) / T, strict=True)):
        p, not_p, log_p = softmax_row(row, T)
        w = q[i] if q is not None else {"predicted": p, "log_predicted": log_p}.get(labels, np.full_like(p, 1) / len(p))

        def size(a):
            top = a.max()  # out of the powers, which otherwise vanish whatever their type
            return top if order == math.inf or not top > 0 else top * ((a / top) ** r).sum() ** (1 / r)

        relative = (64 + 8 * min(spread, 104)) * eps * max(1, 1 / r) * (1 + x)
        if expectation == "inside":
            away = np.abs(w - p)
            top = int(np.argmax(row))
            away[top] = abs((w[top] - 1) + not_p[top])
            # A difference is as good as its terms; a root of a small one is not.
            of_terms = np.where((np.arange(len(p)) == top) & (w == 1), 0, 4 * eps * np.maximum(w, p))
            value = size(away) ** x
            error = size(away + of_terms) ** x - value
        else:
            norms = [size(np.append(np.delete(p, y), not_p[y])) ** x for y in range(len(p))]
            value = sum((a * b for a, b in zip(w, norms, strict=True)), LD(0))
            error = 0
        values.append(value)
        allowed.append(error + relative * abs(value))
    return np.array(values), np.array(allowed)


# ---- tolerances of the numeric contract


@kept()
def span(f):
    """Largest minus smallest finite logit of each row."""
    f = widen(f)
    finite = np.isfinite(f)
    with np.errstate(all="ignore"):
        return np.where(finite, f, -np.inf).max(1) - np.where(finite, f, np.inf).min(1)


@kept()
def largest(f):
    """The largest finite |logit| of each row."""
    f = widen(f)
    return np.where(np.isfinite(f), np.abs(f), 0).max(1, initial=0)


def tolerance(name, truth, f, T, eps):
    """Absolute error allowed on the statistic or V term `name`."""
    with np.errstate(all="ignore"):
        size = largest(f)
        least = 2.0**-126 if eps > 1e-9 else 2.0**-1022
        relative_tail = (32 + 4 * np.minimum(span(f) / T, 104)) * eps
        return {
            "msp": lambda: 32 * eps * truth,
            "s2": lambda: 32 * eps * truth,
            "energy": lambda: 8 * eps * np.maximum(size, T * math.log(f.shape[1])) + 8 * eps * np.abs(truth),
            # To relative precision, down to the normal numbers.
            "tv": lambda: np.minimum(8 * eps, 64 * eps * truth) + 64 * eps * truth + least,
            "kl_uniform": lambda: relative_tail * np.abs(truth) + least,
            "one_minus_msp": lambda: relative_tail * truth,
            "one_minus_s2": lambda: relative_tail * truth,
            "log_msp": lambda: relative_tail * np.abs(truth),
            "log_one_minus_s2": lambda: np.where(np.isinf(truth), 0, relative_tail + 8 * eps * np.abs(truth)),
            "fmax": lambda: 0 * truth,
            # The contract names no bound for these: that of a sum of terms of one sign, down to the normal numbers of
            # the doubles that all are summed in.
            "plogp": lambda: relative_tail * np.abs(truth) + 1e-319,
            "sumlogp": lambda: 32 * eps * np.abs(truth),
            "s2_sumlogp": lambda: 32 * eps * np.abs(truth),
            "one": lambda: 0 * truth,
            "uniform": lambda: eps * truth,
            "lse": lambda: 8 * eps * np.maximum(size / T, math.log(f.shape[1])) + 8 * eps * np.abs(truth),
        }[name]()


def norm_tolerance(h, r, eps, bias=False):
    """Relative error allowed on ||h||_r, [N]."""
    h = np.abs(widen(h))
    if bias:
        h = np.concatenate([h, np.ones((len(h), 1), LD)], 1)
    with np.errstate(all="ignore"):
        logs = np.where((h > 0) & np.isfinite(h), np.abs(np.log(h)), 0).max(1, initial=0)
    if r in (0, math.inf):
        return np.full(len(h), eps, dtype=LD)
    return 16 * eps * max(1, 1 / r) + (eps * logs if r < 1 else 0)


def norm_and_error(h, r, eps, bias=False, log=False):
    """||h||_r or its logarithm, [N], and the absolute error allowed on it."""
    expected, relative = norm(h, r, bias), norm_tolerance(h, r, eps, bias)
    if not log:
        return expected, relative * expected
    with np.errstate(all="ignore"):
        logs = np.log(expected)
    return logs, relative + 2 * eps * np.where(np.isfinite(logs), np.abs(logs), 0)


def assert_close(got, truth, allowed, label=""):
    """|got - truth| <= allowed for every element; NaN, infinities and float32's own limits included."""
    got_type = np.asarray(got.detach() if hasattr(got, "detach") else got).dtype
    limits = np.finfo(got_type)
    got = widen(got)
    truth, allowed = np.broadcast_to(truth, got.shape), np.broadcast_to(allowed, got.shape)
    with np.errstate(all="ignore"):
        overflow = np.abs(truth) > LD(limits.max)
        near_limit = np.abs(np.abs(truth) - LD(limits.max)) <= allowed
        expected = np.where(overflow, np.sign(truth) * np.inf, truth)
        # A result type has a smallest step; below its normal numbers no relative bound can hold. In float64 the
        # arithmetic has the same steps, and a value may be rounded to them twice.
        slack = allowed + LD(limits.smallest_subnormal) * (2 if got_type == np.float64 else 1)
        good = (
            (np.isnan(expected) & np.isnan(got))
            | (got == expected)
            | (np.abs(got - truth) <= slack)
            | (near_limit & (np.abs(got) >= LD(limits.max)))
        )
    if not good.all():
        i = tuple(np.argwhere(~good)[0])
        error = np.abs(got[i] - truth[i])
        raise AssertionError(
            f"{label} at {i}: got {got[i]!r}, truth {truth[i]!r}, error {error!r}, allowed {slack[i]!r}"
            f" ({error / slack[i]:.3g} times)"
        )

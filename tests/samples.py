"""Rows for tests of several modules: of any size, type, scale and layout in memory, and of some kinds."""

import math

import numpy as np
import torch
import truth
from hypothesis import strategies as st

import fastood

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


V_TERMS = [name for name, entry in fastood.SCORES.items() if "logits" in entry.needs and not entry.gradient]
GRADIENTS = [name for name, entry in fastood.SCORES.items() if entry.gradient]


def eps_of(x):
    return truth.EPS[str(x.dtype).removeprefix("torch.")]


def laid_out(x, layout):
    """The values of `x` in another memory layout."""
    n, c = x.shape
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "columns of a wider tensor":
        wide = torch.full((n, c + 3), 7.0, dtype=x.dtype)
        wide[:, 1 : c + 1] = x
        return wide[:, 1 : c + 1]
    if layout == "every other column":
        wide = torch.full((n, 2 * c), 7.0, dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    if layout == "every other row":
        tall = torch.full((2 * n, c), 7.0, dtype=x.dtype)
        tall[::2] = x
        return tall[::2]
    if layout == "one row expanded":
        return x[:1].expand(n, c)
    return x


LAYOUTS = [
    "contiguous",
    "transposed",
    "columns of a wider tensor",
    "every other column",
    "every other row",
    "one row expanded",
]


@st.composite
def logits(draw, dtypes=DTYPES):
    # Around 8, 16 and 32: the widths of vector registers; 130 and 1025: more than one block of them.
    n, c = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3, 7, 8, 10, 15, 16, 17, 33, 100, 130, 1000, 1025]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1e-4, 0.1, 1.0, 10.0, 60.0, 1e4]))
    x = rng.standard_normal((n, c)) * scale + draw(st.sampled_from([0.0, 0.0, -20.0, 3e3, -5e4]))
    if draw(st.booleans()):  # a confident row: 1 - p_max down to 1e-38
        x[rng.integers(n), rng.integers(c)] += draw(st.sampled_from([5.0, 20.0, 69.0, 88.0]))
    if draw(st.booleans()):  # ties of the maximum
        x[:, rng.integers(c)] = x.max(1)
    if draw(st.booleans()):  # masked classes, never the whole row
        mask = rng.random((n, c)) < draw(st.sampled_from([0.1, 0.9]))
        mask[np.arange(n), rng.integers(c, size=n)] = False
        x[mask] = -np.inf
    dtype = draw(st.sampled_from(dtypes))
    limit = torch.finfo(dtype).max
    tensor = torch.from_numpy(np.where(np.isneginf(x), x, x.clip(-limit, limit))).to(dtype)
    return laid_out(tensor, draw(st.sampled_from(LAYOUTS)))


@st.composite
def feats(draw, rows=None, dtypes=DTYPES):
    n = rows or draw(st.integers(1, 5))
    d = draw(st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 33, 130, 1025, 8000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    decades = draw(st.sampled_from([0, 1, 10, 37]))
    x = rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-decades, decades, (n, d))
    if draw(st.booleans()):
        x = np.maximum(x, 0)  # after a ReLU: many exact zeros, perhaps a whole row of them
    if draw(st.booleans()):
        x[rng.integers(n)] = 0
    x *= draw(st.sampled_from([1.0, 1e-30, 1e-8, 1e6, 1e30]))
    dtype = draw(st.sampled_from(dtypes))
    limit = torch.finfo(dtype).max
    return laid_out(torch.from_numpy(x.clip(-limit, limit)).to(dtype), draw(st.sampled_from(LAYOUTS)))


temperatures = st.sampled_from([1.0, 1.0, 0.37, 10.0, 1000.0, 1e-3, 1e-10])


def rows_of(kind, g, N, C):
    """Logits of which p is anything, 0 and 1 in float32, 0 and 1 for all but masked classes, or 1/C."""
    f = torch.randn(N, C, generator=g)
    if kind == "certain":
        f[:, 0] += 1e3
    elif kind == "one class is not masked":
        f[:, 1:] = -math.inf
    return f * 0 if kind == "flat" else f


KINDS = ["any", "certain", "one class is not masked", "flat"]

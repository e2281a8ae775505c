"""The successors, each a declaration: from the head, from sums over in-distribution rows, from a bank of them.

z are the logits, h the features, W and b the last layer's weight and bias, y the predicted class. Formulas are raw, as
in their papers; ``higher`` says which way each points.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastood._inputs import number
from fastood.kernels import Scaling
from fastood.kernels.reference import factor
from fastood.successors.declaration import SUCCESSORS, Rows, State, Successor, wide
from fastood.successors.nearest import nearest


def _register(**declared: Any) -> None:
    entry = Successor(**declared)
    SUCCESSORS[entry.name] = entry


def _fraction(name: str, x: Any) -> float:
    x = number(name, x, at_least=0)
    if x > 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {x!r}")
    return x


def _whole(name: str, x: Any) -> None:
    number(name, x, at_least=1)
    if not isinstance(x, Integral):
        raise TypeError(f"{name} must be a whole number, got {x!r}")


# ---- from the logits, the features and the head


_register(
    name="scale",
    formula="energy of r (z - b) + b, r = exp(sum h / sum of the k largest h), k = (1 - percentile) D",
    source="SCALE, Xu et al. (2024), arXiv 2310.00227",
    higher="in",
    scaling=lambda state, T, percentile: Scaling(percentile, state["bias"], temperature=T),
    head=("bias",),
    params={"percentile": 0.85},
    check=lambda percentile: _fraction("percentile", percentile),
)


_register(
    name="lts",
    formula="energy of S z, S = (sum h+ / sum of the k largest h+)^2, h+ = max(h, 0), k = p D",
    source="LTS, Djurisic et al. (2024), arXiv 2409.01175",
    higher="in",
    scaling=lambda state, T, p: Scaling(1 - p, None, relu=True, square=True, temperature=T),
    params={"p": 0.05},
    check=lambda p: _fraction("p", p),
)


def _cosines(rows: Rows, state: State) -> Tensor:
    """The largest cosine of h with a class's weights, from the logits."""
    products = (rows.z - wide(state["bias"])).masked_fill(rows.z == -math.inf, -math.inf)
    norms = wide(state["weight"]).norm(dim=1).clamp(min=1e-12)  # a row of zeros is at a right angle to all
    return (products / norms).amax(1) / rows.h.norm(dim=1).clamp(min=1e-12)


_register(
    name="dml",
    formula="lam max_k cos(h, w_k) + ||h||_2",
    source="DML, Zhang & Xiang (2023): MaxCosine and MaxNorm; lam is to be chosen on data",
    higher="in",
    score=lambda rows, state, lam: lam * _cosines(rows, state) + rows.h.norm(dim=1),
    head=("weight", "bias"),
    params={"lam": 1.0},
    check=lambda lam: number("lam", lam, at_least=0),
)


# ---- with a product: the head once more, on features of another shape


def _topped(h: Tensor, k: int, values: Tensor | None = None) -> Tensor:
    """The k largest of each row, or `values` in their place, among zeros."""
    top = h.topk(k, 1, sorted=False)
    kept = top.values if values is None else values[:, None].expand(-1, k)
    return torch.zeros_like(h).scatter(1, top.indices, kept.to(h.dtype))


def _ash_p(rows: Rows, state: State, percentile: float) -> Tensor:
    h = rows.feats
    return rows.energy_of_head(_topped(h, Scaling(percentile, None).k(h.shape[1])), state)


def _ash_b(rows: Rows, state: State, percentile: float) -> Tensor:
    h = rows.feats.to(rows.dtype)
    k = Scaling(percentile, None).k(h.shape[1])
    return rows.energy_of_head(_topped(h, k, wide(h).sum(1) / k), state)


def _ash_s(rows: Rows, state: State, percentile: float) -> Tensor:
    h = rows.feats.to(rows.dtype)
    k = Scaling(percentile, None).k(h.shape[1])
    return rows.energy_of_head(_topped(h, k) * factor(Scaling(percentile, None), h)[:, None].to(h.dtype), state)


for _name, _formula, _percentile, _text in (
    ("ash_p", _ash_p, 0.6, "energy of W h' + b, h' the k largest of h among zeros, k = (1 - percentile) D"),
    ("ash_b", _ash_b, 0.65, "energy of W h' + b, h' = sum h / k where h is among its k largest, else 0"),
    ("ash_s", _ash_s, 0.9, "energy of r W h' + b, h' as in ash_p, r as in scale: the same where the rest of h is 0"),
):
    _register(
        name=_name,
        formula=_text,
        source="ASH, Djurisic et al. (2023), arXiv 2209.09858",
        higher="in",
        score=_formula,
        needs=("feats",),
        head=("weight", "bias"),
        params={"percentile": _percentile},
        check=lambda percentile: _fraction("percentile", percentile),
    )


# ReAct and RG clip at a quantile of all activations. To merge, they are counted by the first 20 bits of float32 (sign,
# exponent and 11 bits of the fraction): counts add up exactly, and a quantile is off by less than 2^-11 of itself.
_BITS = 20


def _activations(rows: Rows, K: int, percentile: float) -> dict[str, Tensor]:
    bits = (rows.feats.float() + 0.0).view(torch.int32)  # + 0: -0 is 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bins = (ordered >> (32 - _BITS)) + (1 << (_BITS - 1))
    return {"activations": torch.bincount(bins.flatten(), minlength=1 << _BITS)}


def _edge(i: int) -> float:
    """The least number of bin `i`."""
    ordered = torch.tensor((i - (1 << (_BITS - 1))) << (32 - _BITS), dtype=torch.int32)
    return float((ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32))


def _clip(totals: State, state: State, percentile: float) -> dict[str, Tensor]:
    """numpy.percentile of the activations, those of a bin spread evenly over it."""
    upto = totals["activations"].cpu().cumsum(0)
    place = percentile * (int(upto[-1]) - 1)
    around = []
    for rank in (math.floor(place), math.ceil(place)):
        i = int(torch.searchsorted(upto, rank, right=True))
        before = int(upto[i - 1]) if i else 0
        share = (rank - before + 0.5) / (int(upto[i]) - before)
        around.append(_edge(i) + share * (_edge(min(i + 1, (1 << _BITS) - 1)) - _edge(i)))
    low, high = around
    return {"clip": torch.tensor(low + (place - math.floor(place)) * (high - low), dtype=torch.float64)}


_register(
    name="react",
    formula="energy of W min(h, c) + b, c a quantile of all in-distribution activations",
    source="ReAct, Sun et al. (2021), arXiv 2111.12797",
    higher="in",
    score=lambda rows, state, percentile: rows.energy_of_head(
        rows.feats.to(rows.dtype).minimum(state["clip"].to(rows.dtype)), state
    ),
    needs=("feats",),
    head=("weight", "bias"),
    fitted_on=("feats",),
    sums=_activations,
    finish=_clip,
    params={"percentile": 0.9},
    check=lambda percentile: _fraction("percentile", percentile),
)
_register(
    name="rg",
    formula="||min(h, c)||_1 energy(z), c as in react",
    source="RG, Reactivate GradNorm (2022), OpenReview -hMNEMgT8Wd: the norm of the clipped features times the energy",
    higher="in",
    score=lambda rows, state, percentile: rows.h.minimum(state["clip"]).abs().sum(1) * rows.energy(),
    fitted_on=("feats",),
    sums=_activations,
    finish=_clip,
    params={"percentile": 0.9},
    check=lambda percentile: _fraction("percentile", percentile),
)


# ---- fitted on sums over in-distribution rows


def _mean_sums(rows: Rows, K: int, **params: Any) -> dict[str, Tensor]:
    return {"sum": rows.h.sum(0), "n": _count(rows.h)}


def _count(x: Tensor) -> Tensor:
    return x.new_tensor(float(len(x)))


def _class_sums(rows: Rows, K: int, **params: Any) -> dict[str, Tensor]:
    return {"class_sum": _by_class(rows.h, rows.classes, K), "class_n": _counted(rows.h, rows.classes, K)}


def _by_class(x: Tensor, classes: Tensor, K: int) -> Tensor:
    return x.new_zeros(K, x.shape[1]).index_add_(0, classes, x)


def _counted(x: Tensor, classes: Tensor, K: int) -> Tensor:
    return x.new_zeros(K).index_add_(0, classes, x.new_ones(len(x)))


def _class_means(totals: State) -> Tensor:
    """[K, D], NaN for a class that no row was of."""
    return totals["class_sum"] / totals["class_n"][:, None]


def _present(totals: State) -> Tensor:
    return totals["class_n"] > 0


def _nci_finish(totals: State, state: State, alpha: float) -> dict[str, Tensor]:
    mean = totals["sum"] / totals["n"]
    # w_y . (h - mean) = z_y - (b_y + w_y . mean)
    return {"mean": mean, "offset": wide(state["bias"]) + wide(state["weight"]) @ mean}


def _nci(rows: Rows, state: State, alpha: float) -> Tensor:
    along = rows.z.amax(1) - state["offset"][rows.predicted]
    away = (rows.h - state["mean"]).norm(dim=1)
    return torch.where(away > 0, along / away, 0) + alpha * rows.h.abs().sum(1)


_register(
    name="nci",
    formula="w_y . (h - m) / ||h - m||_2 + alpha ||h||_1, m the mean of h",
    source="NCI, Liu & Qin (2025), arXiv 2311.01479",
    higher="in",
    score=_nci,
    head=("weight", "bias"),
    fitted_on=("feats",),
    sums=_mean_sums,
    finish=_nci_finish,
    params={"alpha": 1e-4},
    check=lambda alpha: number("alpha", alpha, at_least=0),
)


def _fdbd_finish(totals: State, state: State) -> dict[str, Tensor]:
    w = wide(state["weight"])
    gram = w @ w.T
    squares = gram.diagonal()
    apart = squares[:, None] + squares - 2 * gram
    # What rounding leaves of two equal rows is no distance.
    apart = apart.masked_fill(apart <= 1e-12 * (squares[:, None] + squares), math.inf)
    return {"mean": totals["sum"] / totals["n"], "inverse": apart.rsqrt()}


def _fdbd(rows: Rows, state: State) -> Tensor:
    behind = rows.z.amax(1, keepdim=True) - rows.z
    behind = behind.masked_fill(behind == math.inf, 0)  # a masked class has no boundary
    mean = (behind * state["inverse"][rows.predicted]).sum(1) / max(rows.z.shape[1] - 1, 1)
    return mean / (rows.h - state["mean"]).norm(dim=1).clamp(min=1e-8)


_register(
    name="fdbd",
    formula="1/(C - 1) sum_k (z_y - z_k) / ||w_y - w_k||_2 / ||h - m||_2, m the mean of h",
    source="fDBD, Liu & Qin (2024), arXiv 2312.11536",
    higher="in",
    score=_fdbd,
    head=("weight",),
    fitted_on=("feats",),
    sums=_mean_sums,
    finish=_fdbd_finish,
)

_register(
    name="she",
    formula="h . S_y, S_k the mean of h over rows rightly predicted as k",
    source="SHE, Zhang et al. (2023), OpenReview KkazG4lgKL",
    higher="in",
    score=lambda rows, state: (rows.h * state["patterns"][rows.predicted]).sum(1),
    fitted_on=("feats", "correct"),
    sums=_class_sums,
    finish=lambda totals, state: {"patterns": _class_means(totals)},
)


def _posteriors(rows: Rows, K: int) -> dict[str, Tensor]:
    p = (rows.z / rows.T).softmax(1)
    return {"class_sum": _by_class(p, rows.predicted, K), "class_n": _counted(p, rows.predicted, K)}


def _kl_matching(rows: Rows, state: State) -> Tensor:
    log_p = (rows.z / rows.T).log_softmax(1)
    p = log_p.exp()
    return (torch.special.xlogy(p, p).sum(1, keepdim=True) - p @ state["log_posteriors"].T).amin(1)


_register(
    name="kl_matching",
    formula="min_k KL(p || d_k), d_k the mean of p over rows predicted as k",
    source="KL matching, Hendrycks et al. (2022), arXiv 1911.11132",
    higher="out",
    score=_kl_matching,
    needs=("logits",),
    fitted_on=("logits",),
    sums=_posteriors,
    finish=lambda totals, state: {
        # The least number in place of log 0: what puts any weight there is far away, what puts none is not.
        "log_posteriors": _class_means(totals)[_present(totals)].log().nan_to_num(neginf=torch.finfo(torch.float32).min)
    },
)

_register(
    name="class_cosine",
    formula="max_k cos(h, m_k), m_k the mean of h over class k",
    source="the nearest class mean by cosine; of the predicted class alone it is SHE with a cosine, as OpenOOD has it",
    higher="in",
    score=lambda rows, state: (_unit(rows.h) @ state["centres"].T).amax(1),
    needs=("feats",),
    fitted_on=("feats", "classes"),
    sums=_class_sums,
    finish=lambda totals, state: {"centres": _unit(_class_means(totals)[_present(totals)])},
)


def _unit(h: Tensor) -> Tensor:
    return h / h.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _second_sums(rows: Rows, K: int, **params: Any) -> dict[str, Tensor]:
    return {**_class_sums(rows, K), "second": rows.h.T @ rows.h}


def _shrinkage(x: Any) -> None:
    if x != "oas":
        if isinstance(x, str):
            raise ValueError(f"shrinkage must be 'oas' or a number from 0 to 1, got {x!r}")
        _fraction("shrinkage", x)


def _whitening(scatter: Tensor, n: float, shrinkage: float | str) -> Tensor:
    """A [D, D] with ||A^T x||^2 = x^T S^-1 x, S = (1 - rho) scatter/n + rho tr/D I the shrunk covariance."""
    covariance = (scatter + scatter.T) / (2 * n)
    D = len(covariance)
    mu = float(covariance.diagonal().mean()) if D else 0.0
    if not mu > 0:
        raise ValueError("feats must vary within classes: their covariance is 0")
    if isinstance(shrinkage, str):  # oracle approximating shrinkage, Chen et al. (2010), which needs but these sums
        second = float(covariance.square().mean())
        over = (n + 1) * (second - mu**2 / D)
        shrinkage = 1.0 if over <= 0 else min(1.0, (second + mu**2) / over)
    shrunk = (1 - shrinkage) * covariance + shrinkage * mu * torch.eye(D, dtype=scatter.dtype, device=scatter.device)
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    if int(failed):
        raise ValueError(
            f"feats have a singular covariance, which shrinkage={shrinkage:g} does not mend: take a larger one"
        )
    eye = torch.eye(D, dtype=scatter.dtype, device=scatter.device)
    return torch.linalg.solve_triangular(factor, eye, upper=False).T.contiguous()


def _mahalanobis_finish(totals: State, state: State, shrinkage: float | str) -> dict[str, Tensor]:
    n, kept = totals["class_n"], _present(totals)
    means, rows = _class_means(totals)[kept], float(n.sum())
    mean = totals["class_sum"].sum(0) / rows
    # About the mean of all rows, so that little cancels where it is far from 0.
    about = totals["second"] - rows * torch.outer(mean, mean)
    off = means - mean
    whitening = _whitening(about - (off * n[kept, None]).T @ off, rows, shrinkage)
    return {"mean": mean, "whitening": whitening, "centres": off @ whitening}


def _relative_finish(totals: State, state: State, shrinkage: float | str) -> dict[str, Tensor]:
    rows = float(totals["class_n"].sum())
    found = _mahalanobis_finish(totals, state, shrinkage)
    about = totals["second"] - rows * torch.outer(found["mean"], found["mean"])
    return {**found, "background": _whitening(about, rows, shrinkage)}


def _mahalanobis(rows: Rows, state: State, shrinkage: float | str) -> Tensor:
    x, centres = (rows.h - state["mean"]) @ state["whitening"], state["centres"]
    squares = x.square().sum(1, keepdim=True) + centres.square().sum(1) - 2 * x @ centres.T
    return squares.amin(1).clamp(min=0)


def _relative(rows: Rows, state: State, shrinkage: float | str) -> Tensor:
    whole = ((rows.h - state["mean"]) @ state["background"]).square().sum(1)
    return _mahalanobis(rows, state, shrinkage) - whole


for _name, _distance, _finish, _text, _source in (
    (
        "mahalanobis",
        _mahalanobis,
        _mahalanobis_finish,
        "min_k (h - m_k)^T S^-1 (h - m_k), S the shrunk covariance within classes",
        "Lee et al. (2018), arXiv 1807.03888; shrinkage of Chen et al. (2010), arXiv 0907.4698",
    ),
    (
        "relative_mahalanobis",
        _relative,
        _relative_finish,
        "mahalanobis - (h - m)^T S_0^-1 (h - m), m and S_0 the mean and shrunk covariance of all rows",
        "Ren et al. (2021), arXiv 2106.09022",
    ),
):
    _register(
        name=_name,
        formula=_text,
        source=_source,
        higher="out",
        score=_distance,
        needs=("feats",),
        fitted_on=("feats", "classes"),
        sums=_second_sums,
        finish=_finish,
        params={"shrinkage": "oas"},
        check=lambda shrinkage: _shrinkage(shrinkage),
    )


# ---- with a bank of in-distribution rows


def _vim_sums(rows: Rows, K: int, dim: int | None) -> dict[str, Tensor]:
    return {"sum": rows.h.sum(0), "second": rows.h.T @ rows.h, "n": _count(rows.h), "top": rows.z.amax(1).sum()}


def _vim_finish(totals: State, state: State, dim: int | None) -> dict[str, Tensor]:
    D, n, total = len(totals["sum"]), totals["n"], totals["sum"]
    if dim is None:  # the authors' choice
        dim = 1000 if D >= 2048 else 512 if D >= 768 else D // 2
    if dim >= D:
        raise ValueError(f"dim must be below the {D} features, got {dim}")
    if not state["bias"].isfinite().all():
        raise ValueError("head: bias must be finite, for u = -W^+ b is the origin of vim")
    origin = -torch.linalg.pinv(wide(state["weight"])) @ wide(state["bias"])
    crossed = torch.outer(total, origin)
    about = totals["second"] - crossed - crossed.T + n * torch.outer(origin, origin)
    residual = torch.linalg.eigh(about).eigenvectors[:, : D - dim].contiguous()  # of the smallest eigenvalues
    # Of norms there is no sum before the space is known: the bank is gone through once more.
    norms = sum(((wide(x) - origin) @ residual).norm(dim=1).sum() for x in totals["bank"].split(4096))
    if not norms**2 > 1e-14 * n * about.trace():  # what rounding leaves of float32 is no residual
        raise ValueError(f"dim={dim} directions leave nothing of {int(n)} rows: fit on more of them, or take fewer")
    return {"origin": origin, "residual": residual, "alpha": totals["top"] / norms}


_register(
    name="vim",
    formula="energy(z) - alpha ||R^T (h - u)||_2, u = -W^+ b, R the directions of least variance, "
    "alpha = sum of max z / sum of ||R^T (h - u)||_2",
    source="ViM, Wang et al. (2022), arXiv 2203.10807",
    higher="in",
    score=lambda rows, state, dim: (
        rows.energy() - state["alpha"] * ((rows.h - state["origin"]) @ state["residual"]).norm(dim=1)
    ),
    head=("weight", "bias"),
    fitted_on=("logits", "feats"),
    sums=_vim_sums,
    bank=lambda rows, dim: {"bank": rows.feats},
    finish=_vim_finish,
    params={"dim": None},
    check=lambda dim: None if dim is None else _whole("dim", dim),
)


def _enough(totals: State, k: int) -> Tensor:
    bank = totals["bank"]
    if len(bank) < k:
        raise ValueError(f"k={k} takes at least as many in-distribution rows, got {len(bank)}")
    return bank


def _knn_finish(totals: State, state: State, k: int) -> dict[str, Tensor]:
    bank = _enough(totals, k)
    # In float32 a row is not quite of length 1, which among near neighbours would count.
    squares = torch.cat([wide(x).square().sum(1) for x in bank.split(4096)])
    return {"bank": bank, "half_square": squares / 2}


def _knn(rows: Rows, state: State, k: int) -> Tensor:
    x, bank = _unit(rows.h), state["bank"]
    kth = nearest(x, bank, k, state["half_square"])[:, -1]
    return (x - bank[kth]).norm(dim=1)


_register(
    name="knn",
    formula="distance of h / ||h||_2 to the k-th nearest of such in-distribution rows",
    source="Deep nearest neighbours, Sun et al. (2022), arXiv 2204.06507",
    higher="out",
    score=_knn,
    needs=("feats",),
    fitted_on=("feats",),
    bank=lambda rows, k: {"bank": _unit(rows.h)},
    finish=_knn_finish,
    params={"k": 50},
    check=lambda k: _whole("k", k),
)


def _nnguide(rows: Rows, state: State, k: int) -> Tensor:
    x, bank = _unit(rows.h), state["bank"]
    near = nearest(x, bank, k)
    guidance = sum((x * bank[i]).sum(1) for i in near.unbind(1))
    return guidance / k * rows.energy()


_register(
    name="nnguide",
    formula="energy(z) times the mean of the k largest e_i cos(h, h_i), e_i the energy of in-distribution row i",
    source="NNGuide, Park et al. (2023), arXiv 2309.14888",
    higher="in",
    score=_nnguide,
    fitted_on=("logits", "feats"),
    bank=lambda rows, k: {"bank": _unit(rows.h) * rows.energy()[:, None]},
    finish=lambda totals, state, k: {"bank": _enough(totals, k)},
    params={"k": 10},
    check=lambda k: _whole("k", k),
)

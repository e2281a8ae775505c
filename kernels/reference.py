"""Plain PyTorch on any device: the definition, the fallback, and what compilers and autograd trace.

Row sums are float32 (float64 for float64 inputs); the O(N) algebra on top of them is float64.

The softmax is split into one maximum and the rest, and the rest has a pivot of its own:

    E_k = exp((f_k - pivot) / T) over all classes but one maximum, the pivot being the largest of those
    R_q = sum_k E_k^q,  r_q = exp(q (pivot - f_max) / T) R_q,  so that sum_k exp(z_k - z_max) = 1 + r_1

1 - p_max = r_1 / (1 + r_1) and its kin then keep their relative precision when p_max is 1 - 1e-30
and beyond, where a plain sum of exponentials has long been rounded to 1.

Nearly flat rows are read again, for what is a difference to the uniform distribution: see Level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastood.kernels.contract import NO_NORM, ONE, Anchors, Request, Run, Scaling, Work, result_dtype
from fastood.kernels.seam import traced
from fastood.kernels.statistics import FLAT_KL, FLAT_KL_SHARE, FLAT_TV, FORMULAS, UNSCALED, Statistic, rendered

LARGEST = float(torch.finfo(torch.float64).max)  # also stands for a norm of finite features beyond it
_TILE = 1 << 22  # elements of the largest temporary of what could need far larger ones


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def supports(work: Work, C: int, D: int) -> bool:
    return True


def compile(request: Request) -> Run:
    return Run(partial(scores, request))


def batchgrad(anchors: Anchors) -> Run:
    return Run(partial(expected_l1, anchors))


def scaled(scaling: Scaling) -> Run:
    return Run(partial(_scaled_energy, scaling))


def scores(request: Request, logits: Tensor | None, feats: Tensor | None, labels: Tensor | None = None) -> Tensor:
    """A request, carried out."""
    values = _values(request, logits, feats, labels)
    if request.columns:
        return multiplied(values, request, result_dtype(logits, feats))
    return torch.stack([x.double() for x in values])


def _values(request: Request, logits: Tensor | None, feats: Tensor | None, labels: Tensor | None) -> list[Tensor]:
    """The statistics of a request, then its norms, [N] each."""
    values: list[Tensor] = []
    T = request.temperature
    if request.stats:
        assert logits is not None
        rows = Softmax(logits, T)
        for stat in request.stats:
            if isinstance(stat, str):
                values.append(getattr(rows, stat))
            elif stat[0] == "gradient":
                values.append(gradient(logits, labels, T, *stat[1:]))
            else:
                values.append(getattr(rows, stat[0])(*stat[1:]))
    if request.orders:
        assert feats is not None
        values += norms_of(feats, request.orders, request.log, request.bias).unbind(-1)
    return values


def multiplied(values: Sequence[Tensor], request: Request, dtype: torch.dtype) -> Tensor:
    """The columns of a request, from its statistics and norms."""
    columns: list[Any] = []
    for terms, order, power, divisor in request.columns:
        parts: list[Any] = [
            x if i == ONE else values[i].double() if x == 1 else x * values[i].double() for i, x in terms
        ]
        v = parts[0]
        for part in parts[1:]:
            v = v + part
        if order != NO_NORM:
            u = values[len(request.stats) + order]
            v = times_norm(v, u, power, divisor, wide=dtype == torch.float64)
        columns.append(v)
    return arranged(columns, request.shape, dtype)


def arranged(columns: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Columns [N] as `shape`, in which -1 stands for the rows: it is the first or the last of it."""
    if len(shape) == 1:
        return columns[0].to(dtype, copy=True)  # of a statistic alone
    out = torch.stack(columns, -1 if shape[0] < 0 else 0)
    if len(shape) > 2:
        out = out.reshape([columns[0].shape[0] if n < 0 else n for n in shape])
    return out.to(dtype)


def times_norm(v: Tensor | float, u: Tensor, power: int, divisor: float, wide: bool) -> Tensor:
    """v (u / divisor)^power of a power 1 or 2; `wide` for results in float64."""

    def product(x: Any) -> Any:
        for _ in range(power):  # one by one, in an order in which nothing overflows before the score: 0 stays 0
            x = x * u / divisor if divisor < 1 else x * (u / divisor)
        return x

    raw = product(v)
    if not wide:
        return raw
    # What comes out next to 0 is formed again from a larger v, for a product on the way may have vanished.
    again = product(v * 2.0**600) * 2.0**-600
    raw = torch.where((raw.abs() < 2.0**-900) & again.isfinite(), again, raw)
    return torch.where(u == LARGEST, raw * LARGEST, raw)


def working(x: Tensor) -> Tensor:
    """`x` in its arithmetic type, the inner stride 1 so that every layout sums in the same order."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if x.stride(-1) == 1 else x.contiguous()


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last axis with the same bits for a row whatever batch it is in.

    torch splits the sum of a single long row over threads; fixed blocks take that choice away.
    """
    block = 1024
    if x.shape[-1] < 32 * block:
        return x.sum(-1)
    body = x.shape[-1] // block * block
    return row_sum(x[..., :body].unflatten(-1, (-1, block)).sum(-1)) + x[..., body:].sum(-1)


def row_mean(x: Tensor) -> Tensor:
    return row_sum(x) / x.shape[-1]


class lazy:
    """functools.cached_property without its lock, which torch.compile cannot trace (and Python 3.12 dropped)."""

    def __init__(self, compute: Callable[[Any], Tensor]) -> None:
        self.compute = compute
        self.name = compute.__name__

    def __get__(self, instance: Any, owner: type) -> Any:
        value = self.compute(instance)
        instance.__dict__[self.name] = value
        return value


class Softmax:
    """Statistics of softmax(logits / T), each computed when first asked for, float64 [N]."""

    def __init__(self, logits: Tensor, temperature: float) -> None:
        self.T = temperature
        self.f = working(logits)
        self.C = logits.shape[-1]
        self.f_max, self.argmax = self.f.max(-1)
        self.finite = self.f_max.isfinite()

    def _or_nan(self, stat: Tensor) -> Tensor:
        # A row that is all -inf, or holds +inf or NaN, has no softmax.
        return torch.where(self.finite, stat, math.nan)

    # ---- the pieces

    @lazy
    def f_rest(self) -> Tensor:
        """f, masked at the one maximum that does not belong to the rest."""
        # A tensor rather than a number: AOTInductor's C++ cannot spell -inf in a deterministic scatter.
        return self.f.scatter(-1, self.argmax[:, None], self.f.new_full((self.f.shape[0], 1), -math.inf))

    @lazy
    def pivot(self) -> Tensor:
        second = self.f_rest.amax(-1)
        # With no second class (C = 1, all others masked) any finite pivot does.
        return torch.where(second == -math.inf, self.f_max, second).detach()

    @lazy
    def z(self) -> Tensor:
        """(f_k - pivot) / T of the rest."""
        return relative(self.f_rest, self.pivot, self.T)

    @lazy
    def z_double(self) -> Tensor:
        """The same in float64, where float32 does not hold log p, or p counts that it does not hold."""
        return relative(self.f_rest.double(), self.pivot.double(), self.T)

    @lazy
    def e(self) -> Tensor:
        return self.z.exp()

    @lazy
    def gap(self) -> Tensor:
        """(pivot - f_max) / T <= 0, float64."""
        return (self.pivot.double() - self.f_max.double()) / self.T

    @lazy
    def weight(self) -> Tensor:
        return exp_quotient(self.pivot.double(), self.f_max.double(), self.T)

    @lazy
    def rest(self) -> Tensor:
        """R_1, float64."""
        return row_sum(self.e).double()

    @lazy
    def r1(self) -> Tensor:
        return self._or_nan(self.weight * self.rest)

    @lazy
    def log_r1(self) -> Tensor:
        return self._log_scaled(self.rest)

    def _log_scaled(self, x: Tensor) -> Tensor:
        """log(e^gap x), finite where e^gap is 0; without another class log 0, but no slope of it: that would be NaN."""
        alone = self.rest == 0
        return self._or_nan(torch.where(alone, -math.inf, self.gap + torch.where(alone, 1.0, x).log()))

    @lazy
    def rest_squares(self) -> Tensor:
        """r2 / e^gap, as the rest is r1 / e^gap."""
        return self.weight * row_sum(self.e.square()).double()

    @lazy
    def r2(self) -> Tensor:
        return self.weight * self.rest_squares

    @lazy
    def rest_z(self) -> Tensor:
        """r1's sum with each term times z relative to the maximum: all of one sign."""
        z = self.z.masked_fill(self.z == -math.inf, 0)  # 0 log 0 = 0
        gap = self.gap.clamp(min=-1e4)  # exp(-1e4) = 0, and 0 * -inf would be NaN
        return self.weight * (row_sum(self.e * z).double() + gap * self.rest)

    @lazy
    def log_sum(self) -> Tensor:
        return self.r1.log1p()

    @lazy
    def p_max(self) -> Tensor:
        return 1 / (1 + self.r1)

    @lazy
    def p_pivot(self) -> Tensor:
        """The probability at the pivot, so that p_k = p_pivot E_k."""
        return self.weight / (1 + self.r1)

    # ---- the statistics that are more than a formula; the others are added below

    msp: Tensor
    one_minus_msp: Tensor
    log_msp: Tensor

    @lazy
    def fmax(self) -> Tensor:
        return self._or_nan(self.f_max.double())

    @lazy
    def tv(self) -> Tensor:
        # p and 1/C both sum to 1, so half the absolute differences are the positive ones.
        above = row_sum((self.e * self._rows(self.p_pivot) - 1 / self.C).relu())
        tv = (self.msp - 1 / self.C) + above.double()
        return self._again(tv, tv < FLAT_TV, lambda level: level.tv)

    @lazy
    def mean_z(self) -> Tensor:
        """mean of (f_k - f_max) / T, float64: neither a term nor their sum overflows where the mean does not."""
        unit = 2.0 ** -self.C.bit_length() if self.T > 1e-100 else 1.0
        below = (self.f.double() * unit - self.f_max.double()[:, None] * unit) / self.T
        return row_sum(below) / (unit * self.C)

    @lazy
    def kl_uniform(self) -> Tensor:
        kl = (self.log_sum - math.log(self.C)) - self.mean_z
        return self._again(kl, (kl < FLAT_KL) | (kl < FLAT_KL_SHARE * -self.mean_z), lambda level: level.kl_uniform)

    def _again(self, stat: Tensor, flat: Tensor, exact: Callable[[Level], Tensor]) -> Tensor:
        """`stat`, but of rows that are `flat` what is `exact`."""
        if traced(self.f):  # which no size may depend on, and no gradient be NaN
            return torch.where(flat, exact(Level(self.f.where(flat[:, None], 0), self.T)), stat)
        if not flat.any():
            return stat
        rows = flat.nonzero()[:, 0]
        return stat.index_copy(0, rows, exact(Level(self.f[rows], self.T)))

    def power_sum(self, r: float) -> Tensor:
        return self.msp**r + self.power_sum_rest(r)

    def power_sum_rest(self, r: float) -> Tensor:
        """sum of p_k^r over all classes but one maximum."""
        # Of p itself where it is there: the error of r log p would grow with r log C.
        power = torch.where(self.p_pivot > 1e-290, Powers(self.p_pivot)(r), (r * (self.gap + self.log_msp)).exp())
        return power * row_sum((r * self.z).exp()).double()

    def gen(self, gamma: float, M: int) -> Tensor:
        z = self.z.topk(min(M, self.C) - 1, -1).values
        log_one_minus_p = (1 - z.exp() * self._rows(self.p_pivot)).log()
        unit = (gamma * (self.gap + self.log_msp)).exp()  # p_pivot^gamma
        of_rest = unit * row_sum((gamma * (z + log_one_minus_p)).exp()).double()
        return (gamma * (self.log_r1 + 2 * self.log_msp)).exp() + of_rest

    def _rows(self, stat: Tensor) -> Tensor:
        return stat.to(self.f.dtype)[:, None]

    def probabilities(self) -> tuple[Tensor, Tensor]:
        """p and 1 - p, [N, C] in the arithmetic type, both to relative precision."""
        p = self.e * self._rows(self.p_pivot)
        k = self.argmax[:, None]
        return p.scatter(-1, k, self._rows(self.msp)), (1 - p).scatter(-1, k, self._rows(self.one_minus_msp))

    # ---- last-layer gradients: grad_W log p_y = (1/T) (e_y - p) h^T, the factors that logits decide

    def gradient_inside(self, q: Tensor | str, order: float, power: float) -> Tensor:
        """|| E_q[e_Y - p] ||_order^power for a label distribution q: "uniform", "predicted" or [N, C]."""
        if isinstance(q, str):
            if q == "predicted":
                return 0 * self.msp  # E_p[e_Y - p] = 0, exactly
            q, q_max = torch.full_like(self.f, 1 / self.C), torch.full_like(self.msp, 1 / self.C)
            p = self.e * self._rows(self.p_pivot)
        else:  # in float64: p beyond float32 counts in orders near 0 where q is 0
            q, q_max = q.double(), self._at_max(q)
            p = self.z_double.exp() * self.p_pivot[:, None]
        # At that maximum q - p = (q - 1) + (1 - p) keeps 1 - p when q = 1, and q - p is 0 in a flat row.
        at_max = torch.where(self.msp > 0.5, q_max - 1 + self.one_minus_msp, q_max - self.msp)
        difference = (q - p).scatter(-1, self.argmax[:, None], at_max[:, None].to(p.dtype))
        norm = norms_of(difference, (order,))[:, 0]
        return Powers(norm.masked_fill(norm == LARGEST, math.inf))(power)

    def gradient_outside(self, q: Tensor | str, order: float, power: float) -> Tensor:
        """E_q[ || e_Y - p ||_order^power ]; "log_predicted" takes the weights log p_y for q."""
        # In float64: a small order's norm is beyond float32, and so may log p be.
        z, e = self.z_double, self.e.double()
        p = e * self.p_pivot[:, None]
        # ||e_y - p||_r = (1 - p_y) (1 + sum over the other classes of (p_k / (1 - p_y))^r)^(1/r): no ratio is
        # above 1, so that a high order does not underflow as a whole.
        norm = Powers(1 - p)(power)
        norm_of_max = (power * (self.log_r1 + self.log_msp)).exp()
        if order != math.inf:
            log_ratios = (z + self.gap[:, None]) * order  # log (p_k / p_max)^r
            others = 1 + row_sum(log_ratios.exp())[:, None] - log_ratios.exp()
            others = others * (order * (self.log_msp[:, None] - (-p).log1p())).exp()
            norm = norm * Powers(1 + others)(power / order)
            rest = self.rest.clamp(min=1)  # 0 where there is one class alone
            others_of_max = row_sum((order * (z - rest.log()[:, None])).exp())
            norm_of_max = norm_of_max * Powers(1 + others_of_max)(power / order)
        norm = norm.scatter(-1, self.argmax[:, None], 0)
        if isinstance(q, Tensor):
            return _weighed(self._at_max(q), norm_of_max) + row_sum(_weighed(q.double(), norm))
        if q == "uniform":
            return (norm_of_max + row_sum(norm)) / self.C
        if q == "predicted":
            return self.msp * norm_of_max + self.p_pivot * row_sum(_weighed(e, norm))
        log_p = z.scatter(-1, self.argmax[:, None], 0) + (self.gap + self.log_msp)[:, None]
        return self.log_msp * norm_of_max + row_sum(log_p * norm)

    def _at_max(self, q: Tensor) -> Tensor:
        """q of the one maximum that is not in the rest, float64."""
        return q.gather(-1, self.argmax[:, None])[:, 0].double()


# Here the rest comes in units of its weight, e^gap, in a logarithm alone.
_AS_IT_IS = {"rest": "r1", "rest_squares": "r2", "rest_log": "log_sum"}


def closed_form(s: Statistic) -> lazy:
    """A statistic from its formula in the table."""

    def text(formula: str, names: dict[str, str]) -> str:
        return rendered(
            formula, lambda name: f"self.{names.get(name, name)}", lambda x: f"self._log_scaled({text(x, {})})"
        )

    value = text(s.formula, _AS_IT_IS)
    if s.infinite:
        value = f"where(self.finite, {value}, self.f_max.double())"
    elif not s.sums:  # what no sum tells of a row without a softmax
        value = f"self._or_nan(self.finite.double() * ({value}))"
    compute = eval(f"lambda self: {value}", {"where": torch.where})
    compute.__name__ = s.name
    return lazy(compute)


for _s in FORMULAS.values():
    if _s.formula != _s.name:
        setattr(Softmax, _s.name, closed_form(_s))


class Level:
    """Nearly flat rows, by how far each logit is from the level, the one whose class would have p = 1/C, float64.

    With x_k = (f_k - level) / T,  p_k - 1/C = expm1(x_k) / C  and  KL(u || p) = mean(e^x_k - 1 - x_k),  in which
    nothing cancels.
    """

    def __init__(self, f: Tensor, T: float) -> None:
        self.f, self.T = f.double(), T
        level = self.f.detach().amax(-1)
        for _ in range(2):  # the second time for what the first rounded away
            away = row_mean(self._beside(level, self.f.detach()).expm1()).log1p()
            level = (level / 2 + T / 2 * away) * 2  # each of which may be twice beyond the type
        x = self._beside(level, self.f)
        self.x = x - row_mean(x.expm1()).log1p()[:, None]  # and for the rounding of the level itself

    def _beside(self, level: Tensor, f: Tensor) -> Tensor:
        if self.T <= 1:
            return (f - level[:, None]) / self.T
        return (f / 2 - level[:, None] / 2) / (self.T / 2)

    @property
    def tv(self) -> Tensor:
        return row_mean(self.x.expm1().relu())

    @property
    def kl_uniform(self) -> Tensor:
        return row_mean(exp_tail(self.x))


def exp_tail(x: Tensor) -> Tensor:
    """e^x - 1 - x in float64, to relative precision."""
    near, series = x.clamp(-1, 1), torch.zeros_like(x)
    for k in range(19, 1, -1):
        series = (series + 1) * near / k
    return torch.where(x.abs() < 1, series * near, x.expm1() - x)


def gradient(
    logits: Tensor, labels: Tensor | None, T: float, q: str, order: float, power: float, expectation: str
) -> Tensor:
    """|| E_q[e_Y - p] ||_order^power or E_q[ || e_Y - p ||_order^power ], [N] float64, some rows at a time."""
    given = q == "given"
    assert labels is not None or not given
    out = []
    for f, *of_labels in _some_rows(16 * logits.shape[1], logits, *((labels,) if given else ())):
        rows = Softmax(f, T)
        q_n = distribution(of_labels[0]).to(rows.f.dtype) if given else q
        out.append((rows.gradient_inside if expectation == "inside" else rows.gradient_outside)(q_n, order, power))
    return torch.cat(out)


def _some_rows(size: int, *tensors: Any) -> Iterable[tuple[Tensor, ...]]:
    """These tensors some rows at a time, where a row takes `size` elements of memory.

    All rows for a tracer, which may know no number of them: a loop would give it one.
    """
    if traced(*tensors):
        return [tensors]
    n = max(1, _TILE // size)
    return zip(*(x.split(n) for x in tensors), strict=True)


def distribution(labels: Tensor) -> Tensor:
    """Label probabilities, float32 or wider; NaN in place of a row that is not a distribution."""
    q = working(labels)
    good = (q >= 0).all(-1) & ((q.sum(-1) - 1).abs() < 1e-2)  # those in a half type do not sum to 1 exactly
    return torch.where(good[:, None], q, math.nan)


def relative(f: Tensor, to: Tensor, T: float) -> Tensor:
    """(f - to) / T, `to` one number per row."""
    # A scalar takes the tensor's type in a division: 0 or inf there would turn a 0 or -inf into NaN.
    limits = torch.finfo(f.dtype)
    divisor = min(max(T, limits.tiny), limits.max)
    # Subtracted before it is divided, or a small T overflows; halved where T is large, or the difference does.
    if divisor <= 1:
        return (f - to[:, None]) / divisor
    return (f / 2 - to[:, None] / 2) / (divisor / 2)


def exp_quotient(a: Tensor, b: Tensor, T: float) -> Tensor:
    """exp((a - b) / T) for a <= b in float64, its error not growing with the quotient.

    The quotient is taken to a few bits, so that its products with T's two parts are exact; what is left
    over is small. exp of both.
    """
    d = a - b
    minus_b = d - a  # as it was rounded
    lost = ((a - (d - minus_b)) - (b + minus_b)).nan_to_num(0, 0, 0)  # a - b = d + lost, exactly
    quotient = (d / T).clamp(min=-1100).mul(8192).round() / 8192  # exp(-1100) = 0
    mantissa, exponent = math.frexp(T)
    T_high = math.ldexp(round(mantissa * 2**26), exponent - 26)
    left = (d - quotient * T_high) - quotient * (T - T_high) + lost
    return quotient.exp() * (left / T).exp()


def norms_of(feats: Tensor, orders: tuple[float, ...], log: bool = False, bias: bool = False) -> Tensor:
    """||h||_r for each order, [N, P] float64; `log` for its logarithm, `bias` for [h; 1]."""
    h = extended(working(feats), bias)
    if h.shape[-1] == 0:
        return h.new_full((h.shape[0], len(orders)), -math.inf if log else 0, dtype=torch.float64)
    h = h.abs()
    largest = h.amax(-1)
    scale = torch.where((largest == 0) | largest.isinf(), 1.0, largest).detach()
    raw, scaled = Powers(h), Powers(h / scale[:, None])

    columns = []
    for r in orders:
        if r == math.inf:
            norm = largest.double()
            columns.append(norm.log() if log else norm)
        elif r == 0:
            norm = torch.where(largest.isnan(), math.nan, (h != 0).sum(-1).double())
            columns.append(norm.log() if log else norm)
        else:
            powers, unit = (scaled, scale.double()) if r > UNSCALED else (raw, torch.ones_like(scale).double())
            total = row_sum(powers(r)).double()
            if log:
                columns.append(unit.log() + total.log() / r)
            else:
                norm = unit * Powers(total)(1 / r)
                columns.append(norm.masked_fill(norm.isinf() & largest.isfinite(), LARGEST))
    return torch.stack(columns, -1)


class Powers:
    """x^r of x >= 0 for several r, sharing the logarithm."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __call__(self, r: float) -> Tensor:
        x = self.x
        if r in (1, 2, 3, 4, 5, 6, 10):
            return _integer_power(x, int(r))
        if torch.compiler.is_compiling() or x.requires_grad:
            # What every exporter and autograd know; at 0 the slope of r < 1 is taken as 0.
            return torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x) ** r)
        if r == 0.5:
            return x.sqrt()
        if r > 64:
            return (self.log * r).exp()
        # torch's pow rounds the last elements of a thread's share otherwise than the rest, so a row's
        # bits would depend on its batch. exp and log do not; the exponent, split off exactly, keeps
        # the error of r log x from growing with |log x|.
        high, low = _split_r_ln2(r, 12 if x.dtype == torch.float32 else 40)
        root = (self.exponent * (high / 2)).exp()  # multiplied in twice: the whole may leave the range early
        return root * (self.exponent * low + self.mantissa_log * r).exp() * root

    @lazy
    def log(self) -> Tensor:
        return self.x.log()

    @lazy
    def frexp(self) -> Any:
        return torch.frexp(self.x)  # 1/2 <= mantissa < 1; doubled below, so that 1^r is 1

    @lazy
    def mantissa_log(self) -> Tensor:
        return (2 * self.frexp.mantissa).log()

    @lazy
    def exponent(self) -> Tensor:
        return (self.frexp.exponent - 1).to(self.x.dtype)


def _integer_power(x: Tensor, n: int) -> Tensor:
    if n == 1:
        return x
    half = _integer_power(x, n // 2)
    return half * half * x if n % 2 else half * half


@lru_cache
def _split_r_ln2(r: float, bits: int) -> tuple[float, float]:
    """r ln 2 = high + low; high has so few bits that its product with an exponent is exact."""
    ln2 = Fraction(0.6931471805599453) + Fraction(2.3190468138462996e-17)
    product = Fraction(r) * ln2
    mantissa, exponent = math.frexp(float(product))
    high = math.ldexp(round(mantissa * 2**bits), exponent - bits)
    return high, float(product - Fraction(high))


# ---- BatchGrad


def expected_l1(anchors: Anchors, logits: Tensor | None, feats: Tensor | None, labels: None = None) -> Tensor:
    """anchors.sign times E_p || (1/T) (e_Y - p) h^T + G ||_1 of every row, [N], in tiles [n, c, D]."""
    assert logits is not None
    assert feats is not None
    T, G = anchors.temperature, anchors.G
    dtype = wanted = result_dtype(logits, feats, G)
    if not 2.0**-100 <= T <= 2.0**100:  # of which float32 may not hold the reciprocal, which is what CUDA multiplies by
        dtype = torch.float64
    p, one_minus_p = Softmax(logits.to(dtype), T).probabilities()
    G, x = G.to(dtype), extended(feats.to(dtype), anchors.bias)
    # c does not depend on N, so that a row's sum does not depend on its batch.
    c = max(1, min(G.shape[0], _TILE // max(1, G.shape[1])))
    sums = []
    for p_n, one_minus_p_n, x_n in _some_rows(max(1, c * G.shape[1]), p, one_minus_p, x):
        tiles = zip(p_n.split(c, -1), one_minus_p_n.split(c, -1), G.split(c), strict=True)
        nothing = x_n.new_zeros(x_n.shape[0], dtype=torch.float64)
        sums.append(sum((_expected_l1(*tile, x_n, T).double() for tile in tiles), start=nothing))
    out = torch.cat(sums) + 0 * p[:, 0]  # NaN without a softmax, also where no feature is weighed
    if x.shape[1] > 0:
        # Infinite or NaN where a feature is, even if p has rounded to 0 and 1: 0 times such a feature is not nothing.
        largest = x.abs().amax(-1).double()
        out = torch.where(largest.isfinite(), out, largest + 0 * p[:, 0])
    return (anchors.sign * out).to(wanted)


def _expected_l1(p: Tensor, one_minus_p: Tensor, g: Tensor, x: Tensor, T: float) -> Tensor:
    """Two rank-one updates of each row of G, weighed: p, one_minus_p [n, c], g [c, D], x [n, D] -> [n]."""
    # Weighed before they are added, and divided by T last: what is small as a whole has no part that overflows.
    move = (p * one_minus_p)[..., None] * x[:, None] / T
    away = (one_minus_p[..., None] * g - move).abs()
    towards = (p[..., None] * g + move).abs()
    return row_sum((away + towards).sum(-1))


def _weighed(p: Tensor, x: Tensor) -> Tensor:
    """p x, where what has no probability does not count even if it has overflowed."""
    return torch.where(p == 0, 0.0, p * x)


# ---- SCALE and its kin


def _scaled_energy(scaling: Scaling, logits: Tensor | None, feats: Tensor | None, labels: None = None) -> Tensor:
    """[N], some rows at a time."""
    assert logits is not None
    assert feats is not None
    dtype = result_dtype(logits, feats)

    def energy(f: Tensor, h: Tensor) -> Tensor:
        r, z = factor(scaling, h)[:, None].to(dtype), f.to(dtype)
        b = 0 if scaling.bias is None else scaling.bias.to(dtype)
        rows: Any = Softmax(((z - b) * r + b).masked_fill(z == -math.inf, -math.inf), scaling.temperature)
        odd = ~(f.amax(1).abs() < math.inf) | ~h.isfinite().all(1)
        return rows.energy.to(dtype).masked_fill(odd, math.nan)

    parts = _some_rows(logits.shape[1] + feats.shape[1], logits, feats)
    return torch.cat([energy(f, h) for f, h in parts])


def factor(scaling: Scaling, feats: Tensor) -> Tensor:
    """r of each row, float64."""
    h = feats.double() * 2.0**-64  # whose sums stay within the doubles
    h = h.relu() if scaling.relu else h
    total, largest = row_sum(h), row_sum(h.topk(scaling.k(h.shape[1]), 1, sorted=False).values)
    t = (total / largest).masked_fill((total == 0) & (largest == 0), 1)
    return t.square() if scaling.square else t.exp()


def extended(h: Tensor, bias: bool) -> Tensor:
    """[h; 1] where the last layer has a bias."""
    return torch.cat([h, h.new_ones(h.shape[0], 1)], -1) if bias else h

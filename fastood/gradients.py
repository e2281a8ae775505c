"""Gradient norms: of the last layer in closed form, of all parameters through torch.func, BatchGrad.

The gradient of log p_y by the last layer's weight W is (1/T) (e_y - p) h^T, an outer product, so its
entrywise norm of order r is (1/T) ||h||_r ||e_y - p||_r (Appendix B of the paper).
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastood._fork import one_thread_if_forked
from fastood._inputs import (
    ArrayT,
    choice,
    class_labels,
    flag,
    give,
    label_probabilities,
    logits_and_feats,
    number,
    order_of,
    result_dtype,
    take,
    temperature_of,
)
from fastood._plan import Plan, keep, known_plan
from fastood.kernels import Anchors, reference, select
from fastood.kernels.reference import Powers
from fastood.kernels.seam import traced
from fastood.registry import TABLE_1, Score

Labels = Literal["uniform", "predicted", "log_predicted"]
Expectation = Literal["inside", "outside"]


def gradient_norm(
    logits: ArrayT,
    feats: ArrayT,
    labels: Labels | ArrayT = "uniform",
    order: float = 1,
    power: float = 1,
    expectation: Expectation = "inside",
    *,
    temperature: float = 1.0,
    bias: bool = False,
    backend: str = "auto",
) -> ArrayT:
    """Norm of the last layer's gradient of log p_Y, in closed form: [N]. Raw, not oriented: Notes say which way.

    "inside" is ``|| E_q[grad log p_Y] ||_order ** power``, "outside" ``E_q[ || grad log p_Y ||_order ** power ]``
    (the rows of Table 1). The defaults are GradNorm, Eq. 2; "predicted" with "outside" is ExGrad, Eq. 3.

    Parameters
    ----------
    logits : Tensor or ndarray [N, C]
    feats : Tensor or ndarray [N, D]
    labels : str or Tensor or ndarray [N, C]
        The distribution q of the label Y: "uniform", "predicted" (p itself), or one row of probabilities
        per sample (a row that is not a distribution gives NaN). "log_predicted", with "outside" only,
        weighs each class by log p_y: Table 1's E_p[ (log p_Y / p_Y) ... ].
    order : float
        r > 0 or ``math.inf`` of the entrywise norm.
    power : float
        > 0.
    expectation : {"inside", "outside"}
        Where the expectation stands.
    temperature, bias, backend
        As in ``fastood.score``.

    Notes
    -----
    Uniform inside (GradNorm) is larger for in-distribution inputs, as is uniform outside; predicted
    outside (ExGrad) and log_predicted are larger for OOD inputs: where higher is to mean in-distribution, as in
    ``fastood.score``, take the negative of those. Code published for GradNorm takes the sum over classes
    in place of the mean: C times this value, so its thresholds do not carry over.

    Examples
    --------
    >>> import torch, fastood
    >>> logits, feats = torch.tensor([[4.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    >>> fastood.gradient_norm(logits, feats)  # 2 ||h||_1 TV
    tensor([6.7482])
    >>> fastood.gradient_norm(logits, feats, "predicted", expectation="outside")  # ExGrad
    tensor([0.4946])
    """
    for name, x in (("logits", logits), ("feats", feats), ("labels", labels)):
        _given(name, x)
    kind, q = (labels, None) if isinstance(labels, str) else (..., labels)
    numbers: tuple[Any, ...] = (order, power, temperature)
    key = ("gradient_norm", kind, expectation, *numbers, *map(type, numbers), bias, type(bias), backend)
    plan = known_plan(key)
    if plan is None:
        T, order, power = _gradient_arguments(labels, order, power, expectation, temperature)
        entry = _as_score("given" if kind is ... else kind, order, power, expectation)
        plan = keep(key, Plan([(entry, order)], (-1,), T, bias, log=False, oriented=False, params={}))
    return plan.run(logits, feats, backend, q)


def _as_score(q: str, order: float, power: float, expectation: Expectation) -> Score:
    """(||h|| / T)^power times || E_q[e_Y - p] ||^power or E_q[ ||e_Y - p||^power ], by the cheapest statistics."""
    gradient = {"labels": q, "order": order, "power": power, "expectation": expectation}
    for entry in TABLE_1:
        if entry.gradient == gradient:
            return entry
    score = Score(
        "gradient_norm",
        "(||h|| / T)^power V",
        "Table 1",
        "in",
        (("gradient", q, order, power, expectation),),
        gradient=gradient,
    )
    if (q, expectation) == ("predicted", "inside"):  # E_p[e_Y - p] = 0, exactly
        return replace(score, stats=("msp",), factor=0.0)
    if (q, expectation, order) == ("uniform", "inside", 1):  # ||u - p||_1 = 2 TV
        return replace(score, stats=("tv",), v=lambda s: Powers(2 * s["tv"])(power))
    return score


def anchor_gradient(
    logits: ArrayT, feats: ArrayT, labels: ArrayT, *, temperature: float = 1.0, bias: bool = False
) -> ArrayT:
    """G of BatchGrad: the last layer's gradient summed over in-distribution anchors, [C, D] ([C, D + 1] with bias).

    G = sum_i (1/T) (e_{y_i} - p(x_i)) h_i^T (Eq. 6 of the paper): a constant of the model, computed once.

    Parameters
    ----------
    logits : Tensor or ndarray [A, C]
    feats : Tensor or ndarray [A, D]
        Of A anchors, one or more of each class.
    labels : Tensor or ndarray [A]
        Their true classes, integers of any type in 0..C-1. A UserWarning says where classes have no anchor.
    temperature, bias
        As in ``fastood.score``.

    Examples
    --------
    >>> import torch, fastood
    >>> G = fastood.anchor_gradient(torch.eye(3), torch.ones(3, 2), torch.arange(3))
    >>> G.shape
    torch.Size([3, 2])
    """
    f, h, as_numpy = logits_and_feats(logits, feats)
    f, h = _given("logits", f), _given("feats", h)
    T = temperature_of(temperature)
    y = _classes("labels", labels, f.shape[0], f.shape[1], f.device)
    dtype = result_dtype(f, h)
    off = _off(reference.Softmax(f, T), y).to(dtype)
    with torch.autocast(f.device.type, enabled=False):
        G = (off.T @ reference.extended(h.to(dtype), bias)).double() / T
    return give(G.to(dtype), as_numpy)


def _off(rows: reference.Softmax, y: Tensor) -> Tensor:
    """e_y - p of the class y of each row, every entry to relative precision: the 1 - p_y of a sure row, too."""
    p, not_p = rows.probabilities()
    y = y[:, None]
    return (-p).scatter(-1, y, not_p.gather(-1, y))


class BatchGrad:
    """BatchGrad of the last layer (Eq. 6): the gradient of a sample beside that of a batch of in-distribution ones.

    E_p || (1/T) (e_Y - p) h^T + G ||_1
    = sum_c [ (1 - p_c) sum_d |G_cd - p_c h_d / T| + p_c sum_d |G_cd + (1 - p_c) h_d / T| ].

    The raw value is larger for OOD inputs. It costs O(C D) a sample, without autograd, and [N, C, D] is never built.
    A row of features that holds infinity has the raw value +inf, even where p is 0 and 1 and the sum would be
    0 times infinity; one that holds NaN, or logits without a softmax, gives NaN.

    Parameters
    ----------
    G : Tensor or ndarray [C, D] ([C, D + 1] with bias)
        ``fastood.anchor_gradient`` of the anchors; ``BatchGrad.from_anchors`` does both at once. Its numbers are
        finite (ValueError).
    temperature, bias
        As in ``fastood.score``, and as G was made with.

    Examples
    --------
    >>> import torch, fastood
    >>> detector = fastood.BatchGrad.from_anchors(torch.eye(3), torch.ones(3, 2), torch.arange(3))
    >>> detector
    BatchGrad(classes=3, features=2, temperature=1.0, bias=False, dtype=torch.float32, device='cpu')
    >>> detector.score(torch.zeros(1, 3), torch.ones(1, 2))
    tensor([-2.6667])
    """

    def __init__(self, G: Tensor | np.ndarray, *, temperature: float = 1.0, bias: bool = False) -> None:
        (g,), _ = take(G=G)
        g, bias = _given("G", g), flag("bias", bias)
        if g.shape[0] == 0 or g.shape[1] < bias:
            wanted = "[C, D + 1] with bias" if bias else "[C, D]"
            raise ValueError(f"G must be {wanted}, of at least one class, got shape {list(g.shape)}")
        if not traced() and not g.is_meta and not (finite := g.isfinite()).all():
            bad = g.numel() - int(finite.sum())
            hint = "anchors that are not finite make it so"
            raise ValueError(f"G must be finite, got {bad} of {g.numel()} numbers NaN or infinite; {hint}")
        g = g.clone(memory_format=torch.contiguous_format)
        self.anchors = Anchors(g, temperature_of(temperature), bias)
        self._oriented = Anchors(g, self.anchors.temperature, bias, sign=-1)

    def __repr__(self) -> str:
        G, bias = self.anchors.G, self.anchors.bias
        shape = f"classes={G.shape[0]}, features={G.shape[1] - bias}"
        options = f"temperature={self.anchors.temperature}, bias={bias}"
        return f"BatchGrad({shape}, {options}, dtype={G.dtype}, device={str(G.device)!r})"

    @classmethod
    def from_anchors(
        cls,
        logits: ArrayT,
        feats: ArrayT,
        labels: ArrayT,
        *,
        temperature: float = 1.0,
        bias: bool = False,
    ) -> BatchGrad:
        """From in-distribution samples, one or more of each class; the arguments are ``anchor_gradient``'s."""
        G = anchor_gradient(logits, feats, labels, temperature=temperature, bias=bias)
        return cls(G, temperature=temperature, bias=bias)

    def score(self, logits: ArrayT, feats: ArrayT, *, oriented: bool = True, backend: str = "auto") -> ArrayT:
        """[N], higher = more in-distribution; ``oriented=False`` for the raw value.

        Parameters
        ----------
        logits : Tensor or ndarray [N, C]
        feats : Tensor or ndarray [N, D]
            Either kind, whatever G was made of; the result is of this kind. On G's device.
        oriented, backend
            As in ``fastood.score``. float64 where an input or G is, else float32.
        """
        anchors = self._oriented if flag("oriented", oriented) else self.anchors
        way = None
        if isinstance(backend, str) and not torch.compiler.is_compiling():
            way = anchors.prepared.get(("way", backend))
        if way is not None:
            out = way(logits, feats, None)
            if out is not None:
                return out
        f, h, as_numpy = logits_and_feats(logits, feats)
        f, h = _given("logits", f), _given("feats", h)
        G = anchors.G
        for name, x, columns in (("logits", f, G.shape[0]), ("feats", h, G.shape[1] - int(anchors.bias))):
            if x.shape[1] != columns:
                raise ValueError(f"{name} must have {columns} columns, for G is {list(G.shape)}, got {list(x.shape)}")
        if G.device != f.device:
            raise ValueError(f"G must be on the device of logits, {f.device}, got {G.device}: BatchGrad.to moves it")
        dtype = result_dtype(f, h, G)
        chosen = select(backend, f.device, dtype)
        out = chosen.batchgrad(f, h, anchors).to(dtype)
        if not G.requires_grad:
            anchors.prepared["way", backend] = chosen.plain(anchors, (-1,))
        return give(out, as_numpy)

    def to(self, *args: Any, **kwargs: Any) -> BatchGrad:
        """This detector with G on another device or in another type; the arguments are ``Tensor.to``'s.

        Examples
        --------
        >>> import torch, fastood
        >>> fastood.BatchGrad(torch.ones(3, 2)).to(torch.float64).score(torch.zeros(1, 3), torch.ones(1, 2))
        tensor([-6.], dtype=torch.float64)
        """
        one_thread_if_forked()
        return BatchGrad(
            self.anchors.G.to(*args, **kwargs), temperature=self.anchors.temperature, bias=self.anchors.bias
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """To a .safetensors file, which ``BatchGrad.load`` reads."""
        from safetensors.torch import save  # which `import fastood` need not load

        from fastood.files import atomic

        if Path(path).suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors, which is what is written, got {os.fspath(path)!r}")
        options = {"temperature": repr(self.anchors.temperature), "bias": str(int(self.anchors.bias))}
        with atomic(path) as temporary:  # safetensors' own files can be read by their owner alone
            temporary.write_bytes(save({"G": self.anchors.G.detach()}, metadata={"fastood": "BatchGrad", **options}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> BatchGrad:
        """What ``save`` wrote, with G on `device`. ValueError where the file, or the device, is no such thing."""
        from safetensors import SafetensorError, safe_open

        one_thread_if_forked()
        try:
            with safe_open(path, framework="pt") as file:
                options, G = file.metadata() or {}, file.get_tensor("G")
            if missing := {"fastood", "temperature", "bias"} - options.keys():
                raise ValueError(f"its metadata lack {', '.join(sorted(missing))}")
            if options["fastood"] != "BatchGrad" or options["bias"] not in ("0", "1"):
                raise ValueError(f"its metadata are {options}")
            detector = cls(G, temperature=float(options["temperature"]), bias=options["bias"] == "1")
        except (SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"path must be a file that BatchGrad.save wrote, got {str(path)!r}: {error}") from None
        try:
            return detector.to(device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # an AssertionError of torch without CUDA
            reason = str(error).split("\n")[0]
            raise ValueError(f"device must be one that torch can use here, got {str(device)!r}: {reason}") from None


def batchgrad(
    logits: ArrayT,
    feats: ArrayT,
    G: ArrayT,
    *,
    temperature: float = 1.0,
    bias: bool = False,
    oriented: bool = True,
) -> ArrayT:
    """``BatchGrad(G, ...).score(logits, feats, ...)``, for one call: [N], higher = more in-distribution.

    Examples
    --------
    >>> import torch, fastood
    >>> G = fastood.anchor_gradient(torch.eye(3), torch.ones(3, 2), torch.arange(3))
    >>> fastood.batchgrad(torch.zeros(1, 3), torch.ones(1, 2), G)
    tensor([-2.6667])
    """
    return BatchGrad(G, temperature=temperature, bias=bias).score(logits, feats, oriented=oriented)


@torch.inference_mode(False)  # in which torch 2.8 gets gradients wrong
def deep_gradient_norm(
    model: nn.Module,
    inputs: Tensor,
    labels: Labels | Tensor = "uniform",
    order: float = 1,
    power: float = 1,
    expectation: Expectation = "inside",
    *,
    temperature: float = 1.0,
    max_bytes: int = 1 << 30,
) -> Tensor:
    """Norm of the gradient of log p_Y by *all* parameters, through autograd (Table 1, Deep): [N]. Raw, not oriented.

    The arguments, the quantity and which way it points are those of ``fastood.gradient_norm``, so that
    ``deep_gradient_norm(model, inputs, **fastood.SCORES["exgrad"].gradient)`` is the deep ExGrad.
    "inside" costs one backward pass per input, "outside" one per input and class.

    Parameters
    ----------
    model : nn.Module
        In eval mode; maps inputs [N, ...] to logits [N, C]. Parameters that need no gradient do not count.
    inputs : Tensor [N, ...]
        On the model's device.
    labels : str or Tensor [N, C]
    max_bytes : int
        About how much memory the per-sample gradients may take at a time; at least one gradient is held.

    Notes
    -----
    Of a model that is one linear layer this is ``fastood.gradient_norm``, however sure the model is. Entries of a
    gradient that are beyond the parameters' own type (below 1e-45 in float32) count as 0; an order below 0.3 can
    tell, and ``model.double()`` keeps them.

    Examples
    --------
    >>> import torch, fastood
    >>> model = torch.nn.Linear(4, 3, bias=False).eval()
    >>> x = torch.randn(5, 4)
    >>> with torch.no_grad():
    ...     shallow = fastood.gradient_norm(model(x), x)
    >>> torch.allclose(fastood.deep_gradient_norm(model, x), shallow, rtol=1e-4)
    True
    """
    T, order, power = _gradient_arguments(labels, order, power, expectation, temperature)
    params, fixed = _parameters(model, inputs)
    return _deep_norms(model, params, fixed, _normal(inputs), labels, order, power, expectation, T, max_bytes)


@torch.inference_mode(False)  # in which torch 2.8 gets gradients wrong
def deep_batchgrad(
    model: nn.Module,
    inputs: Tensor,
    anchors: Tensor,
    anchor_labels: Tensor,
    *,
    temperature: float = 1.0,
    max_bytes: int = 1 << 30,
    oriented: bool = True,
) -> Tensor:
    """BatchGrad by *all* parameters, through autograd (Table 3, Deep): [N]. Oriented: higher = more in-distribution.

    E_p || grad log p_Y(x) + sum_i grad log p_{y_i}(x_i) ||_1 (Eq. 6): one backward pass per input and class.

    Parameters
    ----------
    model, inputs, max_bytes
        As in ``fastood.deep_gradient_norm``.
    anchors : Tensor [A, ...]
        In-distribution inputs, one or more of each class.
    anchor_labels : Tensor or ndarray [A]
        Their true classes, integers of any type in 0..C-1. A UserWarning says where classes have no anchor.
    temperature, oriented
        As in ``fastood.score``.

    Examples
    --------
    >>> import torch, fastood
    >>> model = torch.nn.Linear(4, 3, bias=False).eval()
    >>> x, anchors, labels = torch.randn(5, 4), torch.randn(3, 4), torch.arange(3)
    >>> with torch.no_grad():
    ...     shallow = fastood.BatchGrad.from_anchors(model(anchors), anchors, labels).score(model(x), x)
    >>> torch.allclose(fastood.deep_batchgrad(model, x, anchors, labels), shallow, rtol=1e-4)
    True
    """
    T = temperature_of(temperature)
    params, fixed = _parameters(model, inputs)
    if not isinstance(anchors, Tensor):
        raise TypeError(f"anchors must be a torch tensor, got {type(anchors).__name__}")
    first = _logits(model, params, fixed, anchors[:1])
    labels = _classes("anchor_labels", anchor_labels, len(anchors), first.shape[1], first.device)
    constant = {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in params.items()}
    anchors = _normal(anchors)
    for i in range(0, len(anchors), 32):
        x, y = anchors[i : i + 32], labels[i : i + 32]
        logits, pull = torch.func.vjp(lambda params, x=x: _logits(model, params, fixed, x), params)[:2]
        off, size = _unit(_off(reference.Softmax(logits.double(), T), y))
        for name, g in pull(off.to(logits.dtype))[0].items():
            constant[name] += (g.double() * (size / T)).to(_wide(g))
    raw = _deep_norms(model, params, fixed, _normal(inputs), "predicted", 1.0, 1.0, "outside", T, max_bytes, constant)
    return -raw if oriented else raw


def _parameters(model: Any, inputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that gradients are taken by, and all else that the model holds."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            where = f"model.{name}" if name else "model"
            hint = f"{where}.module {'in its place' if name else 'is the model to pass'}"
            raise TypeError(f"{where} must not be a {type(module).__name__}, which splits what it is given: {hint}")
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a torch tensor, got {type(inputs).__name__}")
    one_thread_if_forked()
    if model.training:
        raise ValueError(
            "model must be in eval mode: call model.eval(), or its scores depend on the batch and on dropout"
        )
    params = {name: _normal(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model must have a parameter that requires a gradient")
    fixed = {name: _normal(p.detach()) for name, p in model.named_parameters() if not p.requires_grad}
    fixed.update({name: _normal(x) for name, x in model.named_buffers()})
    return params, fixed


def _normal(x: Tensor) -> Tensor:
    """`x`, also of inference mode, as a tensor that autograd can keep."""
    return x.clone() if x.is_inference() else x


def _logits(model: nn.Module, params: dict[str, Tensor], fixed: dict[str, Tensor], inputs: Tensor) -> Tensor:
    logits = torch.func.functional_call(model, (params, fixed), (inputs,))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError("model must map inputs [N, ...] to one tensor of logits [N, C]")
    return logits


def _deep_norms(
    model: nn.Module,
    params: dict[str, Tensor],
    fixed: dict[str, Tensor],
    inputs: Tensor,
    labels: Labels | Tensor,
    order: float,
    power: float,
    expectation: Expectation,
    T: float,
    max_bytes: int,
    constant: dict[str, Tensor] | None = None,
) -> Tensor:
    """Norms of gradients by all parameters, `constant` added to each gradient first, in bounded memory: [N]."""
    max_bytes = int(number("max_bytes", max_bytes, above=0))
    kind = labels if isinstance(labels, str) else "given"

    def norm_of(gradients: dict[str, Tensor]) -> Tensor:
        flat = [g.to(_wide(g)) for g in gradients.values() if g.numel()]
        if order == 1:
            return torch.stack([g.abs().sum().double() for g in flat]).sum()
        largest = torch.stack([g.abs().amax().double() for g in flat]).amax()
        if order == math.inf:
            return largest
        # As in norms_of: powers of a large order are of what is at most 1, those of a small one must not be.
        scale = torch.where((largest > 0) & largest.isfinite() & (order > 0.85), largest, 1.0)
        powers = [((g / scale.to(g.dtype)).abs() ** order).sum().double() for g in flat]
        return scale * torch.stack(powers).sum() ** (1 / order)

    def of_one(x: Tensor, q: Tensor | None, at_a_time: int) -> Tensor:
        def forward(params: dict[str, Tensor]) -> Tensor:
            return _logits(model, params, fixed, x[None])[0]

        logits, pull = torch.func.vjp(forward, params)[:2]
        # What is pulled back is e_y - p by its own size, in float64 until then: autograd through a softmax would
        # subtract a p_y that has rounded to 1, and the parameters' type may not hold what is left.
        rows = reference.Softmax(logits.double()[None], T)
        p = rows.probabilities()[0][0]
        top, log_not_p = rows.top, rows.log_r1[0] + rows.log_msp[0]
        others = (-rows.e[0] / rows.total.clamp(min=1)).scatter(-1, top, 1.0)  # (e_top - p) / (1 - p_top)

        def size(direction: Tensor, log_length: Tensor) -> Tensor:
            gradients = pull(direction.to(logits.dtype))[0]
            if constant is None:
                return (power * (norm_of(gradients).log() + log_length - math.log(T))).exp()
            length = log_length.exp() / T
            return norm_of({name: g * length.to(_wide(g)) + constant[name] for name, g in gradients.items()})

        w = torch.full_like(p, 1 / len(p)) if q is None else q
        if expectation == "inside":
            difference = (w - p).scatter(-1, top, w.gather(-1, top) - 1 + rows.one_minus_msp)
            direction, length = _unit(0 * p if kind == "predicted" else difference)  # E_p[e_Y - p] = 0, exactly
            return size(direction, length.log())

        def size_of_class(y: Tensor) -> Tensor:
            at_top = y == top[0]
            off = torch.where(at_top, others, _off(rows, y[None])[0])
            return size(off, torch.where(at_top, log_not_p, 0.0))

        if kind == "predicted":
            w = p
        elif kind == "log_predicted":
            w = (rows.z[0] + rows.gap + rows.log_msp).scatter(-1, top, rows.log_msp)
        classes = torch.arange(len(p), device=x.device)
        return (w * torch.func.vmap(size_of_class, chunk_size=at_a_time)(classes)).sum()

    # Each gradient at work is held about four times: itself, its absolute value, its power, autograd's share.
    held = 4 * sum(p.numel() * max(4, p.element_size()) for p in params.values())
    budget = max(1, max_bytes // held)
    if expectation == "inside":
        per_input = 1
    else:
        per_input = _logits(model, params, fixed, inputs[:1]).shape[-1] if len(inputs) else 1
    n, at_a_time = max(1, budget // per_input), min(per_input, budget)
    q = None
    if kind == "given":
        with torch.no_grad():
            logits = _logits(model, params, fixed, inputs[:1]).expand(len(inputs), -1)
            q = reference.distribution(label_probabilities(labels, logits, as_numpy=False)).double()
    batched = torch.func.vmap(lambda x, q: of_one(x, q, at_a_time), in_dims=(0, None if q is None else 0))
    chunks = [slice(i, i + n) for i in range(0, len(inputs), n)]
    norms = [batched(inputs[c], None if q is None else q[c]) for c in chunks]
    dtype = result_dtype(*params.values())
    return torch.cat(norms).to(dtype) if norms else inputs.new_zeros(0, dtype=dtype)


def _gradient_arguments(
    labels: Any, order: Any, power: Any, expectation: Any, temperature: Any
) -> tuple[float, float, float]:
    """temperature, order and power, all arguments of a gradient norm checked."""
    choice("expectation", expectation, ("inside", "outside"))
    if isinstance(labels, str):
        choice("labels", labels, ("uniform", "predicted", "log_predicted"))
        if labels == "log_predicted" and expectation == "inside":
            raise ValueError("labels='log_predicted' weighs the norms of gradients: it needs expectation='outside'")
    return (
        temperature_of(temperature),
        order_of("order", order, above=0),
        number("power", power, above=0),
    )


def _classes(name: str, labels: Any, n: int, C: int, device: torch.device) -> Tensor:
    """`labels` as n classes of C, int64 on `device`, with a warning where a class has none."""
    y = class_labels(name, labels, n, C)
    if isinstance(labels, np.ndarray):
        y = y.to(device)
    elif y.device != device:
        raise ValueError(f"{name} must be on the device of logits, {device}, got {y.device}")
    if missing := C - len(y.unique()):
        warnings.warn(
            f"{name}: {missing} of {C} classes have no anchor; BatchGrad (Eq. 6) takes one or more of each",
            stacklevel=3,
        )
    return y


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` over its largest absolute value, and that: what is small all over keeps its precision in a shorter type."""
    largest = x.abs().amax()
    return x / torch.where(largest > 0, largest, 1.0), largest


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _given(name: str, x: Any) -> Any:
    if x is None:
        raise TypeError(f"{name} must be a torch tensor or a numpy array, got None")
    return x

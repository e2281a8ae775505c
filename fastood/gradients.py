"""Gradient norms of the last layer, in closed form.

The gradient of log p_y by the last layer's weight W is (1/T) (e_y - p) h^T, an outer product, so its
entrywise norm of order r is (1/T) ||h||_r ||e_y - p||_r (Appendix B of the paper).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from fastood._inputs import ArrayT, choice, number, order_of, temperature_of
from fastood._plan import Plan, keep, key_of, known_plan, typed
from fastood.kernels import reference
from fastood.kernels.reference import Powers
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

    A row that holds NaN gives NaN, whatever 0 it is multiplied by. One whose features hold infinity gives the other
    factor times infinity: infinity, or NaN where that factor is 0, as in a flat row under "uniform" or a certain one
    under "predicted".

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
        required(name, x)
    kind, q = (labels, None) if isinstance(labels, str) else (..., labels)
    key = key_of(("gradient_norm", kind, expectation), True, typed((order, power)), backend, temperature, bias)
    plan = known_plan(key)
    if plan is None:
        T, order, power = arguments(labels, order, power, expectation, temperature)
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
        return replace(score, stats=("msp",), v=(0,))
    if (q, expectation, order) == ("uniform", "inside", 1):  # ||u - p||_1 = 2 TV
        return replace(score, stats=("tv",), v=lambda s: Powers(2 * s["tv"])(power))
    return score


def arguments(labels: Any, order: Any, power: Any, expectation: Any, temperature: Any) -> tuple[float, float, float]:
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


def label_minus_p(rows: reference.Softmax, y: Tensor) -> Tensor:
    """e_y - p of the class y of each row, every entry to relative precision: the 1 - p_y of a sure row, too."""
    p, one_minus_p = rows.probabilities()
    y = y[:, None]
    return (-p).scatter(-1, y, one_minus_p.gather(-1, y))


def required(name: str, x: Any) -> Any:
    if x is None:
        raise TypeError(f"{name} must be a torch tensor or a numpy array, got None")
    return x

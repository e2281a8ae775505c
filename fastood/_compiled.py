"""``fastood.score`` under torch.compile, by a short way.

Whatever Python torch.compile traces, it checks before each call of the compiled function: every global, default,
attribute, function and builtin on the way, some 0.1 us each, and five times as much where a model has just emptied the
caches. So all that is no tensor is worked out here by one function, which is called once, while tracing, and next to
nothing is traced: not even ``score``, each of whose default arguments would be two checks.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, is_grad_enabled

from fastood._inputs import FLOATS
from fastood._plan import Plan
from fastood.kernels import operator, operator_name
from fastood.kernels.seam import constant, differentiated, exporting
from fastood.registry import SCORES

F = TypeVar("F", bound=Callable[..., Any])

_whole: Any  # ``score``, to be traced as it is written
_scores = torch.ops.fastood.scores.no_grad
_OURS = dict(SCORES)  # which nothing replaces: a name that is taken is refused


def short_when_compiled(score: F) -> F:
    """A decorator for ``score``: torch.compile traces ``_traced`` in its place.

    By the attribute that torch.compile gives to the functions it returns. A torch that does not know it traces `score`,
    and so does 2.8, in whose vmap such a function has no name.
    """
    global _whole
    _whole = FunctionType(score.__code__, score.__globals__, score.__name__, score.__defaults__)
    _whole.__kwdefaults__ = score.__kwdefaults__
    if torch.__version__ >= "2.13":
        score._torchdynamo_inline = _traced  # type: ignore[attr-defined]
    return score


def _traced(logits: Any = None, feats: Any = None, *method: Any, **options: Any) -> Any:
    found = short_way(logits, feats, *method, **options)
    return _whole(logits, feats, *method, **options) if found is None else found


def short_way(logits: Any, feats: Any, *method: Any, **options: Any) -> Tensor | None:
    """The operator for what is asked of ``score``; None where the long way must be gone, which is to trace all of it.

    That way can say what is wrong with an argument, converts what can be converted, and knows of gradients.
    """
    for x in (logits, feats):
        if x is not None and (not isinstance(x, Tensor) or x.ndim != 2 or (x.requires_grad and is_grad_enabled())):
            return None
    if logits is not None and (logits.shape[1] == 0 or (feats is not None and feats.shape[0] != logits.shape[0])):
        return None
    asked: tuple[Any, ...] = ()
    for name, x in options.items():
        if not (x is None or isinstance(x, str) or x is True or x is False):
            if not (isinstance(x, float) or (isinstance(x, int) and -1e308 < x < 1e308)):  # which is no float
                return None
            x = (float(x).hex(),)  # as operator.text says: it may be a symbol
        asked = (*asked, (name, x))
    call = _work(
        method,
        asked,
        None if logits is None else (logits.dtype, logits.device, logits.layout, logits.is_nested),
        None if feats is None else (feats.dtype, feats.device, feats.layout, feats.is_nested),
    )
    if call is None:
        return None
    takes, work, own = call.split(":", 2)
    if own:
        id(SCORES.get(own))  # which is checked from now on: a score registered anew is seen
    return _scores(logits if "f" in takes else None, feats if "h" in takes else None, None, work)


@constant
def _work(positional: tuple[Any, ...], options: tuple[tuple[str, Any], ...], logits: Any, feats: Any) -> str | None:
    """Which tensors the operator takes, and what it is to do, for tensors of these types, devices and layouts."""
    from fastood.api import _entry, _order, score

    try:
        asked = signature(score).bind(logits, feats, *positional, **dict(options))
        asked.apply_defaults()
        _, _, method, norm, temperature, bias, log, oriented, backend, dim, head, params = asked.arguments.values()
        if params or dim is not None or head is not None or not isinstance(method, str):
            return None
        entry = _entry(method)
        order = _order(entry, _number(norm), feats is not None)
        plan = Plan([(entry, order)], (-1,), _number(temperature), bias, log, oriented, {})
        plan._check_given(logits, feats)
        dtypes, devices, layouts, nested = map(set, zip(*filter(None, (logits, feats)), strict=True))
        if (
            not plan.request.columns
            or not dtypes.issubset(FLOATS)
            or len(devices) > 1
            or layouts != {torch.strided}
            or any(nested)
        ):
            return None
        (device,), dtype = devices, torch.float64 if torch.float64 in dtypes else torch.float32
        if exporting() or differentiated():
            return None
        chosen = operator_name(backend, device, dtype)
    except (TypeError, ValueError, RuntimeError):  # the long way raises it anew
        return None
    if chosen == "reference" or (backend == "auto" and operator.is_light(plan.request)):
        return None
    takes = "f" * bool(plan.stats) + "h" * bool(plan.orders)
    own = "" if entry is _OURS.get(method) else method
    return f"{takes}:{operator.work_of(chosen, plan.request, dtype)}:{own}"


def _number(x: Any) -> Any:
    return float.fromhex(*x) if isinstance(x, tuple) else x

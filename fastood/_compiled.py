"""``fastood.score`` under torch.compile, by a short way.

Whatever Python torch.compile traces, it checks before each call of the compiled function: every global, default,
attribute and function on the way, some 0.1 us each, and more where a model has just emptied the caches. So all that is
no tensor is worked out here by one function, which is called once, while tracing, and next to nothing is traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from fastood._inputs import FLOATS
from fastood._plan import Plan
from fastood.kernels import operator, operator_name
from fastood.kernels.seam import constant, differentiated, exporting, forward
from fastood.registry import SCORES

_scores = torch.ops.fastood.scores.no_grad


def short_way(
    logits: Any, feats: Any, method: Any, norm: Any, temperature: Any, bias: Any, log: Any, oriented: Any, backend: Any
) -> Tensor | None:
    """The operator for what is asked of ``score``; None where the long way must be gone, which is to trace all of it.

    That way can say what is wrong with an argument, converts what can be converted, and knows of gradients.
    """
    given = [x for x in (logits, feats) if x is not None]
    for x in given:
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[0] != given[0].shape[0]:
            return None
        if x.requires_grad and is_grad_enabled():
            return None
    if forward._current_level >= 0 or (logits is not None and logits.shape[1] == 0) or not isinstance(method, str):
        return None
    if not (isinstance(temperature, float) or _is_int(temperature)):
        return None
    if not (norm is None or isinstance(norm, str)):
        if not (isinstance(norm, float) or _is_int(norm)):
            return None
        norm = (float(norm).hex(),)
    call = _work(
        id(SCORES.get(method)),  # so that a score registered anew is seen
        # Not key_of's, for nothing is kept under it: torch.compile itself guards what of it may change. The temperature
        # is written as operator.text says.
        (method, norm, float(temperature).hex(), bias, log, oriented, backend),
        None if logits is None else (logits.dtype, logits.device, logits.layout, logits.is_nested),
        None if feats is None else (feats.dtype, feats.device, feats.layout, feats.is_nested),
    )
    if call is None:
        return None
    takes, work = call.split(":")
    return _scores(logits if "f" in takes else None, feats if "h" in takes else None, None, work)


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and -1e308 < x < 1e308  # or it may be no float


@constant
def _work(registered: int, asked: tuple[Any, ...], logits: Any, feats: Any) -> str | None:
    """Which tensors the operator takes, and what it is to do, for tensors of these types, devices and layouts."""
    from fastood.api import _entry, _order

    method, norm, temperature, bias, log, oriented, backend = asked
    try:
        entry = _entry(method)
        order = _order(entry, float.fromhex(*norm) if isinstance(norm, tuple) else norm, feats is not None)
        plan = Plan([(entry, order)], (-1,), float.fromhex(temperature), bias, log, oriented, {})
        plan._check_given(logits, feats)
    except (TypeError, ValueError):
        return None
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
    try:
        chosen = operator_name(backend, device, dtype)
    except (ValueError, RuntimeError):
        return None
    if chosen == "reference" or (backend == "auto" and operator.is_light(plan.request)):
        return None
    takes = "f" * bool(plan.stats) + "h" * bool(plan.orders)
    return takes + ":" + operator.work_of(chosen, plan.request, dtype)

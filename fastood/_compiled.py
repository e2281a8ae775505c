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
from fastood.kernels import _name_of, operator
from fastood.kernels.seam import constant, differentiated, exporting, forward_mode
from fastood.registry import SCORES

_scores = torch.ops.fastood.scores.no_grad


def short_way(logits: Any, feats: Any, asked: tuple[Any, ...]) -> Tensor | None:
    """The operator for what is asked of ``score``; None where the long way must be gone, which is to trace all of it.

    That way can say what is wrong with an argument, converts what can be converted, and knows of gradients.
    """
    given = [x for x in (logits, feats) if x is not None]
    for x in given:
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[0] != given[0].shape[0]:
            return None
        if x.requires_grad and is_grad_enabled():
            return None
    if forward_mode() or (logits is not None and logits.shape[1] == 0):
        return None
    fixed: list[Any] = []
    for x in asked:
        if x is None or isinstance(x, (str, bool)):
            fixed.append(x)
        elif isinstance(x, (int, float)):
            fixed.append((float(x).hex(),))  # see operator.text
        else:
            return None
    registered = id(SCORES.get(asked[0]))  # so that a score registered anew is seen
    kinds = [None if x is None else (x.dtype, x.device, x.layout, x.is_nested) for x in (logits, feats)]
    call = _work(registered, tuple(fixed), *kinds)
    if call is None:
        return None
    takes, work = call.split(":")
    return _scores(logits if "f" in takes else None, feats if "h" in takes else None, None, work)


@constant
def _work(registered: int, fixed: tuple[Any, ...], logits: Any, feats: Any) -> str | None:
    """Which tensors the operator takes, and what it is to do, for tensors of these types, devices and layouts."""
    from fastood.api import _entry, _order

    asked: list[Any] = [float.fromhex(*x) if isinstance(x, tuple) else x for x in fixed]
    method, norm, temperature, bias, log, oriented, backend = asked
    try:
        entry = _entry(method)
        order = _order(entry, norm, feats is not None)
        plan = Plan([(entry, order)], (-1,), temperature, bias, log, oriented, {})
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
    chosen = "reference" if exporting() or differentiated() else _name_of(backend, device, dtype)
    light = backend == "auto" and operator.is_light(plan.request)
    if chosen == "reference" or device.type not in operator.DEVICES or light:
        return None
    takes = "f" * bool(plan.stats) + "h" * bool(plan.orders)
    return takes + ":" + operator.work_of(chosen, plan.request, dtype)

"""A classifier that hands out its features, and decisions, beside its logits: split before its last layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastood._fork import one_thread_if_forked
from fastood._inputs import did_you_mean, result_dtype
from fastood.detector import Detector, accepted

# What torchvision, timm, Hugging Face and many others call the part of a classifier that holds its last layer.
_NAMES = ("fc", "classifier", "head", "heads", "score", "classification_head", "last_linear")

_PAIR = "head=(body, head), two modules for which logits = head(feats) and feats = body(inputs)"


def attach(
    model: nn.Module,
    head: str | tuple[nn.Module, nn.Module] | None = None,
    detector: Detector | None = None,
    *,
    example: Any = None,
) -> Attached:
    """`model` as a module that gives ``(logits, feats)``, or with a detector ``(logits, feats, score, accept)``.

    The model is split at its head, the last layer: ``feats = body(inputs)``, ``logits = head(feats)``, where the body
    is the model with nothing in the head's place. That this gives the model's own logits, and that whatever follows
    the head is linear, is checked on the example, or else on the first call, which runs the model a few times.

    Parameters
    ----------
    model : nn.Module
        A classifier of N inputs that gives logits [N, C]: a tensor, what has them as ``.logits`` or ``["logits"]``,
        or a tuple that begins with them.
    head : str or (nn.Module, nn.Module), optional
        Where it is: a name as in ``model.get_submodule``; any module will do for which the above holds. Or the two
        parts, made by hand. Left out, it is what ``model.get_classifier()`` gives (timm); else the last Linear or 1x1
        Conv2d of the one among ``model.fc``, ``classifier``, ``head``, ``heads``, ``score``, ``classification_head``
        and ``last_linear`` that there is; else that of the model.
    detector : Detector, optional
        Fitted. Its score and decision, as ``Detector.accept`` gives them, are added to the output.
    example : optional
        What the model takes: a tensor, a tuple of arguments or a dict of them by name. To be given (or the first call
        to be made) before ``torch.export`` or ``torch.compile(..., fullgraph=True)``, which can check nothing.

    Returns
    -------
    Attached
        A module that takes what the model takes. logits are [N, C]; feats [N, D], those of a 1x1 convolution
        flattened; score float32 or float64 [N], higher = more in-distribution; accept bool [N].

    Raises
    ------
    TypeError, ValueError
        Where no head is found, or two are, or the split does not give the model's logits (a head that is called twice
        or never, a head per token, a soft cap or softmax after it). The message says what to pass.

    Notes
    -----
    The model is not changed: it has no hook and the same head as before. Parameters, buffers and all modules that the
    head is not inside of are shared with it. So ``to``, ``load_state_dict`` and training act on both; but call
    ``train`` and ``eval`` of the attached module: what the head is inside of is copied, and has a mode of its own.

    Examples
    --------
    >>> import torch, fastood
    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv, self.fc = torch.nn.Conv2d(3, 16, 3), torch.nn.Linear(16, 10)
    ...     def forward(self, images):
    ...         return self.fc(self.conv(images).relu().mean((2, 3)))
    >>> attached = fastood.attach(Net().eval())
    >>> logits, feats = attached(torch.randn(4, 3, 8, 8))
    >>> logits.shape, feats.shape
    (torch.Size([4, 10]), torch.Size([4, 16]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _refuse_wrapped(model)
    if detector is not None:
        _require_fitted(detector)
    if isinstance(head, tuple):
        if len(head) != 2 or not all(isinstance(part, nn.Module) for part in head):
            raise TypeError(f"head must be a name or {_PAIR}, got a tuple of {[type(x).__name__ for x in head]}")
        attached = Attached(*head, detector, "(body, head)", model)
    else:
        name = _find(model) if head is None else _checked_name(model, head)
        found = model.get_submodule(name)
        attached = Attached(replaced(model, found, _Hole()), found, detector, repr(name), None)
    attached.training = model.training
    if example is not None:
        arguments, named = as_arguments(example)
        with torch.no_grad():
            attached(*arguments, **named)
    return attached


class Attached(nn.Module):
    """What ``attach`` makes.

    Attributes
    ----------
    body, head : nn.Module
        ``feats = body(inputs)`` (before they are flattened), ``logits = head(feats)``.
    detector : Detector or None
    """

    def __init__(
        self, body: nn.Module, head: nn.Module, detector: Detector | None, name: str, model: nn.Module | None
    ) -> None:
        super().__init__()
        self.body, self.head, self.detector = body, head, detector
        self._name = name
        # Empty once the split is checked. A list, which replicas of DataParallel share, and which registers no module.
        self._unchecked = [model]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        one_thread_if_forked()
        if self._unchecked:
            self._check(args, kwargs)
        raw = _tensor_of(self.body(*args, **kwargs))
        logits, feats = _as_rows(_applied(self.head, raw)), _as_rows(raw)
        if self.detector is None:
            return logits, feats
        s, c = self.detector._scored(logits, feats, "auto")
        return logits, feats, s, accepted(s, c, self.detector._limit(s))

    def _check(self, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "the split is not checked yet, which a compiled or exported graph cannot do: "
                "call the attached module on some inputs first, or attach with example=inputs"
            )
        require_eval(self, "the attached module")
        pending = self._unchecked[:]
        if not pending:  # another thread has done it since
            return
        (model,) = pending
        with torch.no_grad():
            whole = self._with_head(self.head) if model is None else model
            output = whole(*args, **kwargs)
            expected = _tensor_of(output)
            if not isinstance(expected, Tensor):
                keys = f" of {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
                raise ValueError(
                    f"model must give logits [N, C], got {type(output).__name__}{keys}: pass a model that gives them "
                    "alone, as .logits or ['logits'], or first in a tuple"
                )
            if _as_rows(expected).ndim != 2:
                raise ValueError(
                    f"model must give logits [N, C], got shape {list(expected.shape)}: where it has a head per token "
                    "or pixel, pass a model that gives one row per input"
                )
            expected = _as_rows(expected)
            try:
                raw = _tensor_of(self.body(*args, **kwargs))
            except Exception as error:
                raise self._wrong(f"the model does not run without it ({type(error).__name__}: {error})") from error
            if not isinstance(raw, Tensor) or _as_rows(raw).ndim != 2:
                shape = f"shape {list(raw.shape)}" if isinstance(raw, Tensor) else type(raw).__name__
                raise self._wrong(f"feats must be [N, D], got {shape}")
            try:
                logits = _as_rows(_applied(self.head, raw))
            except Exception as error:
                reason = str(error).partition("\n")[0]  # torch may go on to list all backends that it has
                raise self._wrong(f"it does not take feats {list(raw.shape)} ({reason})") from error
            self._compare(logits, expected)
            if model is None:
                # Scaled to where a soft cap shows, and turned to where a ReLU does. A power of 2, so as to be exact.
                top = float(expected.double().abs().nan_to_num(0, 0, 0).max()) if expected.numel() else 0
                factor = -(2.0 ** min(math.floor(math.log2(1e4 / top)), 60)) if 0 < top < 1e4 else -1.0
                scaled = self._with_head(_Scaled(self.head, factor))
                self._compare(logits * factor, _as_rows(_tensor_of(scaled(*args, **kwargs))))
        if expected.isfinite().all(1).any():
            self._unchecked.clear()

    def _with_head(self, head: nn.Module) -> nn.Module:
        """The body with `head` in its place again: with the model's, the model."""
        return replaced(self.body, next(m for m in self.body.modules() if isinstance(m, _Hole)), head)

    def _compare(self, logits: Tensor, expected: Tensor) -> None:
        if logits.shape != expected.shape:
            raise self._wrong(f"head(feats) is {list(logits.shape)}, the model's logits are {list(expected.shape)}")
        # Of rows: a product of other shapes may be summed in another order, in float32 for the half types.
        eps = torch.finfo(expected.dtype).eps * (4 if expected.itemsize == 2 else 256)
        logits, expected = logits.double(), expected.double()
        scale = expected.abs().nan_to_num(0, 0, 0).amax(1, keepdim=True) if expected.numel() else expected
        same = (logits - expected).abs() <= eps * scale
        if not (same | (logits == expected) | (logits.isnan() & expected.isnan())).all():
            worst = float((logits - expected).abs().nan_to_num(0, 0, 0).max())
            raise self._wrong(
                f"head(feats) is off the model's logits by up to {worst:.2g}: something that is not linear follows it "
                "(a soft cap, a softmax: attach to the model without it, or to nn.Sequential(body, head)), or it is "
                "called more than once, or not last"
            )

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"head={self._name} does not split the model: {what}; pass head='its name', or {_PAIR}")


class OODHead(nn.Module):
    """The last layer and a decision in one module, to export: feats [N, D] -> {"logits", "score", "accept"}.

    The threshold is a buffer: it can be set in the module, in the state of an exported program, and in what runs it,
    without exporting again. ``nn.Sequential(attached.body, OODHead(attached.head, detector)).eval()`` is a whole model,
    where its body gives a tensor. docs/serving exports one for torch.export, AOTInductor and ONNX.

    Parameters
    ----------
    head : nn.Module
        logits [N, C] = head(feats), where a 1x1 Conv2d takes [N, D] and [N, D, 1, 1]. ``attach(model).head`` is one.
    detector : Detector
        Fitted.

    Attributes
    ----------
    threshold : Tensor
        The least score that is accepted, a number or with ``per_class`` [C]; float32, float64 for a head in float64.
        It stays so when the module is cast to a shorter type. Infinity accepts nothing, minus infinity every row, those
        with NaN, too.

    Raises
    ------
    TypeError, RuntimeError, ValueError
        Where head is no module, or detector none that is fitted.

    Examples
    --------
    >>> import torch, fastood
    >>> detector = fastood.Detector("msp", tpr=0.5).fit(torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
    >>> served = fastood.OODHead(torch.nn.Identity(), detector)
    >>> served(torch.tensor([[1.5, 0], [2.5, 0]]))["accept"]
    tensor([False,  True])
    >>> _ = served.threshold.fill_(0.8)
    >>> served(torch.tensor([[1.5, 0], [2.5, 0]]))["accept"]
    tensor([True, True])
    """

    threshold: Tensor

    def __init__(self, head: nn.Module, detector: Detector) -> None:
        super().__init__()
        if not isinstance(head, nn.Module):
            raise TypeError(f"head must be a torch.nn.Module, got {type(head).__name__}")
        _require_fitted(detector)
        self.head, self.detector, self.training = head, detector, head.training
        limit = detector._limit(torch.empty(0, dtype=result_dtype(*head.parameters()), device=device_of(head)))
        self.register_buffer("threshold", limit.to(device_of(head), copy=True))

    def forward(self, feats: Tensor) -> dict[str, Tensor]:
        one_thread_if_forked()
        logits = _as_rows(_applied(self.head, feats))
        s, c = self.detector._scored(logits, _as_rows(feats), "auto")
        return {"logits": logits, "score": s, "accept": accepted(s, c, self.threshold)}

    def _apply(self, fn: Any, recurse: bool = True) -> OODHead:
        threshold = self.threshold
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.threshold = threshold.to(self.threshold.device)  # not in a half type, in which scores never are
        return self


class _Hole(nn.Identity):
    """What stands in the body where the head was."""


class _Scaled(nn.Module):
    def __init__(self, head: nn.Module, factor: float) -> None:
        super().__init__()
        self.head, self.factor = head, factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.head(*args, **kwargs) * self.factor


def replaced(module: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """`module` with `new` wherever `old` was. Copied is only what `old` is inside of; the rest is shared.

    Examples
    --------
    >>> from fastood._attach import replaced
    >>> model = nn.Sequential(nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(2, 2)))
    >>> other = replaced(model, model[1][0], nn.Identity())
    >>> other[0] is model[0], type(other[1][0]).__name__, type(model[1][0]).__name__
    (True, 'Identity', 'Linear')
    """
    return _replaced(module, old, new, {})


def _replaced(module: nn.Module, old: nn.Module, new: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module is old:
        return new
    if module not in done:
        done[module] = module  # a module that has itself for a part ends here
        children = {k: x if x is None else _replaced(x, old, new, done) for k, x in module._modules.items()}
        if any(children[k] is not x for k, x in module._modules.items()):
            # Parameters, buffers and hooks stay in the dictionaries that the original has them in: what is put there
            # later, as `to` does with buffers, both have.
            copy = object.__new__(type(module))
            copy.__dict__ = {**module.__dict__, "_modules": children}
            done[module] = copy
    return done[module]


def _require_fitted(detector: Any) -> None:
    if not isinstance(detector, Detector):
        raise TypeError(f"detector must be a fastood.Detector, got {type(detector).__name__}")
    detector._calibrate()


def require_eval(model: nn.Module, what: str) -> None:
    # Modules that mode means nothing to are often made, by tracing or quantising, in the mode of training.
    kinds = nn.modules.dropout._DropoutNd | nn.modules.batchnorm._NormBase
    for name, module in model.named_modules():
        if module.training and (module is model or isinstance(module, kinds)):
            part = f", but its part {name!r} is not" if name else ""
            raise ValueError(f"{what} must be in eval mode{part}: call its eval()")


def device_of(model: nn.Module) -> torch.device:
    return next((x.device for tensors in (model.parameters(), model.buffers()) for x in tensors), torch.device("cpu"))


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: one argument, or a tuple or list of them, or a mapping of them by name."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def _refuse_wrapped(model: nn.Module) -> None:
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must not be scripted, got {kind}: nothing in it can be replaced")
    attribute = "_orig_mod" if hasattr(model, "_orig_mod") else "module"  # of torch.compile; of the others
    if attribute == "_orig_mod" or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(f"model must not be wrapped in {kind}: attach to model.{attribute}, then wrap the result")


def _find(model: nn.Module) -> str:
    """The name of the module that looks like the last layer."""
    names = {module: name for name, module in model.named_modules()}
    if callable(ask := getattr(model, "get_classifier", None)):
        given = ask()
        if isinstance(given, tuple | list | nn.ModuleList):
            raise _two([names.get(module, "?") for module in given])
        if isinstance(given, nn.Identity):
            raise ValueError(f"model must have a head, but {type(model).__name__}.get_classifier() is an Identity")
        if given in names and (inner := _last_linear(given)) is not None:
            return ".".join(filter(None, (names[given], inner)))
    known = {name: inner for name in _NAMES if (inner := _last_linear(getattr(model, name, None))) is not None}
    if len(known) > 1:
        raise _two([".".join(filter(None, pair)) for pair in known.items()])
    for name, inner in known.items():
        return ".".join(filter(None, (name, inner)))
    last = _last_linear(model)
    if not last:
        raise ValueError(
            f"model must have a head, but no Linear nor 1x1 Conv2d was found within {type(model).__name__}: pass its "
            f"name, or {_PAIR}"
        )
    return last


def _two(names: list[str]) -> ValueError:
    return ValueError(
        f"model has more than one head, {' and '.join(map(repr, names))}: where one alone gives the logits, pass its "
        f"name, head={names[0]!r}; else {_PAIR}"
    )


def _last_linear(module: Any) -> str | None:
    """The name in `module` of its last Linear or 1x1 Conv2d, "" where it is one itself, None where it has none."""
    if not isinstance(module, nn.Module):
        return None
    if _is_linear(module):
        return ""
    for name, child in reversed(list(module.named_children())):
        inner = _last_linear(child)
        if inner is not None:
            return f"{name}.{inner}" if inner else name
    return None


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return _is_1x1(module)
    return hasattr(module, "in_features") and hasattr(module, "out_features")  # quantised ones are no nn.Linear


def _is_1x1(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def _checked_name(model: nn.Module, head: Any) -> str:
    if not isinstance(head, str):
        raise TypeError(f"head must be a name or {_PAIR}, got {type(head).__name__}")
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if head not in names:
        short = ", ".join(name for name, _ in model.named_children())
        hint = did_you_mean(head, names)
        raise ValueError(f"head must name a module of the model ({short}, ...), got {head!r}{hint}")
    return head


def _tensor_of(output: Any) -> Any:
    """The logits (or what the body has in their place) in what a model gives."""
    if isinstance(output, Tensor):
        return output
    if (x := getattr(output, "logits", None)) is not None:
        return x
    if isinstance(output, Mapping):
        return output.get("logits")
    return output[0] if isinstance(output, tuple | list) and output else output


def _applied(head: nn.Module, raw: Tensor) -> Tensor:
    flattened = _is_1x1(head) and raw.ndim == 2
    return _tensor_of(head(raw[:, :, None, None] if flattened else raw))


def _as_rows(x: Tensor) -> Tensor:
    """[N, D] of [N, D, 1, 1]."""
    return x.flatten(1) if x.ndim > 2 and x.shape[2:].numel() == 1 else x

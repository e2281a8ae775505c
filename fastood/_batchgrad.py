"""BatchGrad: how far a row's gradient moves that of in-distribution anchors (Eq. 6 of the paper)."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastood._fork import one_thread_if_forked
from fastood._inputs import ArrayT, class_labels, flag, give, logits_and_feats, result_dtype, take, temperature_of
from fastood.gradients import label_minus_p, required
from fastood.kernels import Anchors, Run, reference, select, supporting
from fastood.kernels.seam import traced


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
    f, h = required("logits", f), required("feats", h)
    T = temperature_of(temperature)
    y = anchor_classes("labels", labels, f.shape[0], f.shape[1], f.device)
    dtype = result_dtype(f, h)
    off = label_minus_p(reference.Softmax(f, T), y).to(dtype)
    with torch.autocast(f.device.type, enabled=False):
        G = (off.T @ reference.extended(h.to(dtype), bias)).double() / T
    return give(G.to(dtype), as_numpy)


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
        g, bias = required("G", g), flag("bias", bias)
        if g.shape[0] == 0 or g.shape[1] < bias:
            wanted = "[C, D + 1] with bias" if bias else "[C, D]"
            raise ValueError(f"G must be {wanted}, of at least one class, got shape {list(g.shape)}")
        if not traced() and not g.is_meta and not (finite := g.isfinite()).all():
            bad = g.numel() - int(finite.sum())
            hint = "anchors that are not finite make it so"
            raise ValueError(f"G must be finite, got {bad} of {g.numel()} numbers NaN or infinite; {hint}")
        g = g.clone(memory_format=torch.contiguous_format)
        self.anchors = Anchors(g, temperature_of(temperature), bias)
        self._runs: dict[Any, Run] = {}  # as backends carry it out, by backend and sign
        self._quick: dict[Any, Any] = {}  # their short ways, by the backend asked for and `oriented`

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": {}, "_quick": {}}  # copies and pickles make their own

    def __repr__(self) -> str:
        G, bias = self.anchors.G, self.anchors.bias
        shape = f"classes={G.shape[0]}, features={G.shape[1] - bias}"
        options = f"temperature={self.anchors.temperature}, bias={bias}"
        return f"BatchGrad({shape}, {options}, dtype={G.dtype}, device={str(G.device)!r})"

    @classmethod
    def from_anchors(
        cls, logits: ArrayT, feats: ArrayT, labels: ArrayT, *, temperature: float = 1.0, bias: bool = False
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
        if isinstance(backend, str) and isinstance(oriented, bool) and not is_compiling():
            quick = self._quick.get((backend, oriented))
            out = quick and quick(logits, feats, None)
            if out is not None:
                return out
        oriented = flag("oriented", oriented)
        sign = -1 if oriented else 1
        f, h, as_numpy = logits_and_feats(logits, feats)
        f, h = required("logits", f), required("feats", h)
        G, T, bias, _ = self.anchors
        anchors = Anchors(G, T, bias, sign)  # _replace is beyond torch 2.8's compiler
        for name, x, columns in (("logits", f, G.shape[0]), ("feats", h, G.shape[1] - int(anchors.bias))):
            if x.shape[1] != columns:
                raise ValueError(f"{name} must have {columns} columns, for G is {list(G.shape)}, got {list(x.shape)}")
        if G.device != f.device:
            raise ValueError(f"G must be on the device of logits, {f.device}, got {G.device}: BatchGrad.to moves it")
        chosen = select(backend, f.device, result_dtype(f, h, G), f, h, G)
        if is_compiling():  # what a graph may hold supports all of it
            return give(chosen.batchgrad(anchors)(f, h), as_numpy)
        run = self._runs.get((chosen, sign))
        if run is None:
            by = supporting(chosen, anchors, f.shape[1], h.shape[1])
            run = self._runs[chosen, sign] = by.batchgrad(anchors)
        out = run(f, h)
        self._quick[backend, oriented] = None if G.requires_grad else run.quick  # which knows of no gradient for G
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
        if os.path.isdir(path):
            raise IsADirectoryError(f"path must be a file that BatchGrad.save wrote, {str(path)!r} is a directory")
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
    logits: ArrayT, feats: ArrayT, G: ArrayT, *, temperature: float = 1.0, bias: bool = False, oriented: bool = True
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


def anchor_classes(name: str, labels: Any, n: int, C: int, device: torch.device) -> Tensor:
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

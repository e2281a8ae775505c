"""The paper from data to number: its tables and figures rebuilt, and how far each cell is from the printed one.

``data`` knows the sets and which meet which, ``networks`` the classifiers, ``experiment`` what is computed once and
kept on the disk, ``tables`` the statistics and the paper's numbers, ``page`` what is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastood._fork import one_thread_if_forked
from fastood._inputs import choice
from fastood.files import FileError
from fastood.reproduce import page
from fastood.reproduce.data import SUITES, load
from fastood.reproduce.experiment import Experiment, Settings, carry_out

__all__ = ["SUITES", "run"]


def run(
    out: str | os.PathLike[str],
    suites: Sequence[str] = ("offline", "photos"),
    *,
    cache: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    model: str | None = None,
    seeds: int = 3,
    rows: int | None = None,
    deep_rows: int = 100,
    device: str | torch.device = "cpu",
    command: Sequence[str] = ("reproduce",),
    progress: Callable[[str, bool, int, int], object] = lambda what, new, done, of: None,
) -> list[Path]:
    """Rebuild the paper's tables and figures on one or more suites of sets, and write a page of what came out.

    What takes long, networks, their logits and features and the gradients by all parameters, is kept in files of a
    cache, named after the network and the images. A run that was killed goes on where it was.

    Parameters
    ----------
    out : path
        The folder for README.md, its pictures, results.csv and results.json.
    suites : sequence of str
        Names in ``SUITES``: "digits" (a minute, scikit-learn alone), "offline", "photos", and for those who have the
        data "paper" and "imagenet".
    cache : path, optional
        Its folder; left out, the folder "cache" in `out`.
    data : path, optional
        A folder in which sets are looked for, too.
    model : str, optional
        The network of "photos" and "imagenet": "efficientnet-lite0" (what "photos" takes by default),
        "timm:NAME", "torchvision:NAME".
    seeds : int
        How many networks are trained for each set.
    rows : int, optional
        How many test images of each set are scored at most; left out, as many as the paper has, and 500 in "photos".
    deep_rows : int
        Of how many of them the gradients by all parameters are taken.
    device : str or torch.device
        Where networks run.
    command : sequence of str
        What the page says it was written by.
    progress : callable
        Called after each step with what it is, whether it was made now (or was there), its number, and how many
        there are.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    FileError
        Where sets are missing: one error for all of them, with what to fetch and where to put it.
    ValueError, RuntimeError
        Where a suite or model is unknown, or a model's package is missing.

    Examples
    --------
    >>> from fastood import reproduce
    >>> reproduce.run("reproduced", ["digits"])  # doctest: +SKIP
    """
    one_thread_if_forked()
    out = Path(out)
    if out.is_file():
        raise FileError(f"{out}: is a file; a folder is wanted to write to")
    chosen = [SUITES[choice("suites", name, tuple(SUITES))] for name in dict.fromkeys(suites)]
    for name, value, least in (
        ("seeds", seeds, 1),
        ("rows", 50 if rows is None else rows, 50),
        ("deep_rows", deep_rows, 10),
    ):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    if model is None and any(suite.name == "imagenet" for suite in chosen):
        raise ValueError("model must be given for the suite 'imagenet': timm:NAME or torchvision:NAME")
    images = load((name for suite in chosen for name in suite.sets), None if data is None else Path(data))
    settings = Settings(Path(cache) if cache else out / "cache", seeds, rows, deep_rows, torch.device(device))
    experiments = [Experiment(suite, images, settings, model or "efficientnet-lite0") for suite in chosen]
    steps = [step for experiment in experiments for step in experiment.steps()]
    done = 0

    def after(what: str, new: bool) -> None:
        nonlocal done
        done += 1
        progress(what, new, done, len(steps))

    carry_out(steps, after)
    return page.write(out, experiments, command)

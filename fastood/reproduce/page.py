"""The page of results: every table and figure of the paper beside what came out, in Markdown with pictures."""

from __future__ import annotations

import csv
import json
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from fastood import plots
from fastood._version import __version__
from fastood.api import BEST_NORM, PAPER_V
from fastood.files import atomic
from fastood.recommendation import Estimate
from fastood.registry import SCORES
from fastood.reproduce.experiment import FITTED_ON, Experiment
from fastood.reproduce.tables import (
    CLAIMS,
    NAIVE,
    RESAMPLES,
    SHALLOW,
    TABLE_2,
    Pairs,
    deep,
    printed,
    printed_mean,
    same_rows,
    verdict,
)
from fastood.successors import SUCCESSORS

_SCALES = {"small": "small sets", "ImageNet": "ImageNet"}
FORMULAS = {
    "norm_eg_p_l2sq": "‖ E_p ∇ log p ‖₂²",
    "eg_u_l1": "E_u ‖ ∇ log p ‖₁",
    "eg_u_l2sq": "E_u ‖ ∇ log p ‖₂²",
    "gradnorm": "‖ ∇ E_u log p ‖₁ (GradNorm)",
    "eg_p_logp_l2sq": "E_p (log p / p) ‖ ∇ log p ‖₂²",
    "eg_p_l2sq": "E_p ‖ ∇ log p ‖₂²",
    "exgrad": "E_p ‖ ∇ log p ‖₁ (ExGrad)",
    "varsum": "Σ p (1 − p) (ExGrad's V)",
    "tv": "Σ \\|1/C − p\\| (GradNorm's V)",
    "batchgrad": "BatchGrad",
}


@dataclass
class Results:
    """An experiment, its pairs scored, and the cells that its tables came to."""

    experiment: Experiment
    pairs: Pairs
    cells: list[dict[str, Any]]

    @property
    def scale(self) -> str:
        return self.experiment.suite.scale

    @property
    def own(self) -> bool:
        return self.experiment.suite.own

    def note(
        self, table: str, pair: tuple[str, str], label: str, auroc: float, paper: float | None, **more: Any
    ) -> None:
        difference = None if paper is None else auroc - paper
        self.cells.append(
            {
                "suite": self.experiment.suite.name,
                "table": table,
                "id": pair[0],
                "ood": pair[1],
                "score": label,
                "auroc": auroc,
                "paper": paper,
                "difference": difference,
                **more,
            }
        )


def write(out: Path, experiments: Sequence[Experiment], command: Sequence[str]) -> list[Path]:
    """Score what the experiments have on disk, and write the page, its pictures and its numbers to a folder.

    Returns
    -------
    list of Path
        README.md, results.csv (a line per cell, with the paper's number and how far it is), results.json (the same,
        and every pair of every seed), and the pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = [Results(experiment, experiment.pairs(), []) for experiment in experiments]
    written: list[Path] = []

    def picture(figure: Figure, name: str, what: str) -> str:
        written.append(out / f"{name}.png")
        with atomic(written[-1]) as temporary:
            figure.savefig(temporary, dpi=80)
        return f"![{what}]({name}.png)"

    lines = [
        "# The paper, reproduced",
        "",
        *_paragraph(
            "Igoe et al., *How Useful are Gradients for OOD Detection Really?*: its tables and figures, from data to "
            "number. This page was written by"
        ),
        "```bash",
        shlex.join(["fastood", *command]),
        "```",
        "",
        *_paragraph(
            f"with fastood {__version__} and torch {torch.__version__}; `fastood reproduce --help` says what else it "
            "does. Every number is an AUROC, 1 is perfect and 0.5 is chance, with every score turned so that higher "
            "means in-distribution. *±* is the standard deviation over pairs, as in the paper. In brackets stands "
            f"what the paper has not: a 95% interval of the mean, by {RESAMPLES:,} bootstrap resamples in which the "
            "rows of every test set and the seeds are drawn anew (few seeds tell little of their spread; pairs are "
            "not drawn). Crops of one photograph are drawn together. All cells, and every pair of every seed: "
            "`results.csv` and `results.json` beside this page."
        ),
    ]
    for found in results:
        lines += _suite(found, picture)
    lines += ["## Figure 1", "", picture(plots.simplex(), "figure1", "V terms on the simplex of three classes"), ""]
    lines += _consistency()
    written += [out / "README.md", out / "results.csv", out / "results.json"]
    with atomic(out / "README.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_numbers(out, results)
    return sorted(written)


def _suite(found: Results, picture: Any) -> list[str]:
    suite = found.experiment.suite
    lines = [f"## {suite.title}", "", *_what_was_run(found)]
    lines += [f"### Which claims hold ({suite.name})", "", *_claims(found)]
    lines += [f"### Traps ({suite.name})", "", *_traps(found)]
    if suite.scale == "small":
        lines += [f"### Table 1 ({suite.name})", "", *_table_1(found)]
    lines += [f"### Table 2 ({suite.name})", "", *_table_2(found)]
    if suite.scale == "small":
        lines += [f"### Table 3 ({suite.name})", "", *_table_3(found)]
        lines += [f"### Appendix A ({suite.name})", "", *_appendix_a(found)]
    lines += [f"### Figure 2 and Appendix C ({suite.name})", "", *_heatmaps(found, picture)]
    lines += [f"### Every registered score ({suite.name})", "", *_every_score(found)]
    return lines


def _what_was_run(found: Results) -> list[str]:
    experiment, settings = found.experiment, found.experiment.settings
    rows = []
    for name, images in experiment.images.items():
        train = "" if images.train is None or experiment.spec else f"{len(images.train):,}"
        accuracies = [n.accuracy() for (inside, _), n in experiment.networks.items() if inside == name]
        shown = " / ".join(f"{a:.1%}" for a in accuracies if a is not None)
        rows.append([name, images.source, train, f"{len(images.test):,}", shown])
    lines = _table(["set", "what it is", "learned", "tested", "right, by seed"], rows)
    if experiment.spec:
        lines += _paragraph(f"The network is {experiment.spec}, as its package has it.")
    else:
        lines += _paragraph(
            f"A small convolutional network learns each ID set, for each of {settings.seeds} seeds; images of other "
            "sets are brought to its size and number of channels. Scores that take gradients by all parameters "
            f"(*Deep*) are of the first {settings.deep_rows} of the test images, all others of all."
        )
    if experiment.suite.name == "photos":
        lines += _paragraph(
            "These photographs are **not** ImageNet's validation images, and they are few: this shows a head of many "
            "classes at work on real images, and is no benchmark. `fastood reproduce imagenet` is one, for those who "
            "have the images."
        )
    if not found.own:
        lines += _paragraph(
            "The paper's sets and networks are others, so how far a number is from the paper's tells of both, and is "
            "no error of either."
        )
    return lines


def _claims(found: Results) -> list[str]:
    lines, told = [], []
    for claim in CLAIMS:
        scale = claim.comparisons[0].scale
        if scale != found.scale and not claim.everywhere:
            continue
        rows, verdicts = [], []
        for c in claim.comparisons:
            difference = found.pairs.difference(c.higher, c.lower)
            verdicts.append(verdict(difference))
            paper = "" if c.paper is None else f"{c.paper:+.3f}"
            rows.append([_name(c.higher), _name(c.lower), _estimate(difference, "+"), paper, verdicts[-1]])
        heading = ["better", "than", "difference of the means [95%]", f"the paper's, {_SCALES[scale]}", "here"]
        lines += [f"**{claim.text}.**", "", *_table(heading, rows)]
        counts = ", ".join(f"{v} in {verdicts.count(v)} of {len(rows)}" for v in dict.fromkeys(verdicts))
        elsewhere = f" (which the paper says of {_SCALES[scale]})" if scale != found.scale else ""
        told.append(_filled(f"- {claim.text}{elsewhere}: {counts}.", "  "))
    best = max(_comparable(found), key=found.pairs.mean)
    told.append(f"- Of all scores here, {_name(best)} has the highest mean, {found.pairs.mean(best):.3f}.")
    meaning = _paragraph(
        "A claim *holds* where the interval of the difference lies above 0; where it lies below, *the opposite* is so. "
        "Each comparison is a chance of error by itself."
    )
    return [*meaning, *told, "", *lines]


def _comparable(found: Results) -> list[str]:
    return [x for x in found.pairs.labels if not x.startswith(("deep", "same rows", "naive"))]


def _traps(found: Results) -> list[str]:
    pairs = found.pairs
    mean, noise = pairs.mean, pairs.estimate(NAIVE)
    zero, exgrad, norm = mean("norm_eg_p_l2sq"), mean("exgrad"), mean("||h||_1")
    of_paper = [printed("Table 1")["small", "average", x].auroc for x in ("norm_eg_p_l2sq", deep("norm_eg_p_l2sq"))]
    traps = [
        f"**The zero row.** {FORMULAS['norm_eg_p_l2sq']} is 0 for every input, E_p[e_Y − p] being 0: computed exactly, "
        f"its AUROC is {zero:.3f}. What autograd in float32 leaves of it, the rounding of sums that cancel, has "
        f"{_estimate(noise)} here, or {1 - noise.value:.3f} taken the other way round. The paper ranks by it: "
        f"{of_paper[0]:.3f}, and {of_paper[1]:.3f} Deep.",
        "**ExGrad's direction.** It is larger for OOD inputs, which the paper does not say. Turned, as here, it has "
        f"{exgrad:.3f}; read like GradNorm it would have {1 - exgrad:.3f}.",
        f"**‖h‖₁ × VarSum is not ExGrad turned round.** It has {mean('varsum*||h||_1'):.3f}, ExGrad {exgrad:.3f}, "
        f"VarSum alone {mean('varsum'):.3f}: in the one a larger norm speaks for a row, in the other against it.",
        f"**E_u ‖ ∇ log p ‖₁ is ‖h‖₁** times a constant, and knows nothing of the prediction: {mean('eg_u_l1'):.3f}, "
        f"and {norm:.3f} for ‖h‖₁.",
    ]
    if negative := _negative(found):
        traps.append(f"**Energies below 0**, where a larger norm lowers the product: {negative}.")
    return [*(_filled(f"- {trap}", "  ") for trap in traps), ""]


def _negative(found: Results) -> str:
    shares: dict[str, float] = {}
    for (inside, _), sets in found.pairs.scores.items():
        for name, columns in sets.items():
            where = f"{name} by the network of {inside}"
            shares[where] = max(float((columns["energy"] < 0).mean()), shares.get(where, 0))
    return ", ".join(f"{share:.1%} of {where}" for where, share in shares.items() if share)


def _table_1(found: Results) -> list[str]:
    rows = []
    for _, _, label in printed("Table 1"):
        name, is_deep = label.removeprefix("deep "), label.startswith("deep ")
        depth = "Deep" if is_deep else "Shallow" if name in SHALLOW else "N/A"
        rows.append([FORMULAS[name], depth, *_mean_cells(found, "Table 1", label)])
    return [
        "Rows in the paper's order, from its worst to its best.",
        "",
        *_table(["score", "gradient", *_MEAN, "by seed"], rows),
    ]


def _table_3(found: Results) -> list[str]:
    rows = [
        [f"{depth} BatchGrad", *_mean_cells(found, "Table 3", label)]
        for depth, label in (("Deep", deep("batchgrad")), ("Shallow", "batchgrad"))
    ]
    here = ["Shallow, on the rows of Deep", *_mean_cells(found, None, same_rows("batchgrad"))]
    return _table(["", *_MEAN, "by seed"], [*rows, here])


_MEAN = ("mean ± over pairs [95%]", "paper", "difference")


def _mean_cells(found: Results, table: str | None, label: str) -> list[str]:
    pairs, (scale, average) = found.pairs, (found.scale, "average")
    estimate, deviation = pairs.estimate(label), pairs.deviation(label)
    by_seed = " / ".join(f"{x:.3f}" for x in pairs.by_seed(label))
    paper = printed(table).get((scale, average, label)) if table else None
    if table:
        low, high = estimate.interval or (None, None)
        more = {"deviation": deviation, "low": low, "high": high, "paper_deviation": paper and paper.deviation}
        found.note(table, (scale, average), label, estimate.value, paper.auroc if paper else None, **more)
    shown, difference = "", ""
    if paper:
        shown = f"{paper.auroc:.3f}" + (f" ± {paper.deviation:.3f}" if paper.deviation else "")
        difference = f"{estimate.value - paper.auroc:+.3f}"
    return [f"{estimate.value:.3f} ± {deviation:.3f} {_interval(estimate)}", shown, difference, by_seed]


def _table_2(found: Results) -> list[str]:
    pairs, table = found.pairs, printed("Table 2")
    rows = []
    for i, pair in enumerate(pairs.pairs):
        values = {label: float(pairs.of_pairs(label)[i]) for label in TABLE_2}
        for label, value in values.items():
            paper = table.get((*pair, label)) if found.own else None
            found.note("Table 2", pair, label, value, paper.auroc if paper else None)
        best = max(f"{x:.3f}" for x in values.values())
        cells = [_against(x, table.get((*pair, label)) if found.own else None, best) for label, x in values.items()]
        rows.append([*pair, *cells])
    means = {label: pairs.estimate(label) for label in TABLE_2}
    for label, estimate in means.items():
        paper = table[found.scale, "average", label]
        low, high = estimate.interval or (None, None)
        found.note("Table 2", (found.scale, "average"), label, estimate.value, paper.auroc, low=low, high=high)
    rows.append(["**mean**", "", *(f"{x.value:.3f}" for x in means.values())])
    rows.append(["95% interval", "", *(_interval(x) for x in means.values())])
    rows.append([f"paper, {found.scale}", "mean", *(f"{table[found.scale, 'average', x].auroc:.3f}" for x in TABLE_2)])
    rows.append(
        ["difference", "", *(f"{means[x].value - table[found.scale, 'average', x].auroc:+.3f}" for x in TABLE_2)]
    )
    names = ["MSP", "Energy", "VarSum", "TV", "‖h‖₁ MSP", "‖h‖₁ Energy", "‖h‖₁ VarSum", "GradNorm", "ExGrad"]
    return _table(["ID", "OOD", *names], rows)


def _appendix_a(found: Results) -> list[str]:
    pairs, table = found.pairs, printed("Appendix A")
    labels = list(dict.fromkeys(label for _, _, label in table))
    rows = []
    for label in labels:
        name = label.removeprefix("deep ")
        depth = "Deep" if name != label else "Shallow" if name in (*SHALLOW, "batchgrad") else "N/A"
        cells = []
        for pair, value in zip(pairs.pairs, pairs.of_pairs(label), strict=True):
            paper = table.get((*pair, label)) if found.own else None
            found.note("Appendix A", pair, label, float(value), paper.auroc if paper else None)
            cells.append(_against(float(value), paper))
        rows.append([FORMULAS[name], depth, *cells])
    return _table(["ID → OOD", "gradient", *(f"{a} → {b}" for a, b in pairs.pairs)], rows)


def _against(value: float, paper: Any, best: str = "") -> str:
    shown = f"{value:.3f}"
    if shown == best:
        shown = f"**{shown}**"
    return shown if paper is None else f"{shown} ({value - paper.auroc:+.3f})"


def _heatmaps(found: Results, picture: Any) -> list[str]:
    pairs, suite, norms = found.pairs, found.experiment.suite, plots.FIGURE_2_NORMS
    labels = [[v if r is None else f"{v}*||h||_{r:g}" for r in norms] for v in PAPER_V]
    cells = np.array([[pairs.of_pairs(label) for label in row] for row in labels])
    mean = cells.mean(-1)
    for row, values in zip(labels, mean, strict=True):
        for label, value in zip(row, values, strict=True):
            paper = printed("Section 4.3").get((found.scale, "average", label))
            found.note("Figure 2", (found.scale, "average"), label, float(value), paper.auroc if paper else None)
    i, j = np.unravel_index(mean.argmax(), mean.shape)
    best, chosen = labels[int(i)][int(j)], "energy*||h||_0.3"
    lines = [
        *_paragraph(
            f"Mean over the pairs. The highest cell is {_name(best)}, {mean[i, j]:.3f}; {_name(chosen)}, which the "
            f"paper found best on ImageNet ({printed_mean('ImageNet', chosen):.3f}), has {pairs.mean(chosen):.3f} "
            f"here, and energy alone {pairs.mean('energy'):.3f}."
        ),
        picture(
            plots.heatmap(mean, PAPER_V, norms), f"{suite.name}-figure2", f"AUROC, mean over the pairs of {suite.name}"
        ),
        "",
        "And for each pair, ID → OOD, as in Appendix C:",
        "",
    ]
    for k, (inside, outside) in enumerate(pairs.pairs):
        for row, values in zip(labels, cells[..., k], strict=True):
            for label, value in zip(row, values, strict=True):
                found.note("Appendix C", (inside, outside), label, float(value), None)
        name = f"{suite.name}-{inside}-{outside}"
        figure = plots.heatmap(cells[..., k], PAPER_V, norms)
        lines += [f"{inside} → {outside}", "", picture(figure, name, f"AUROC, {inside} against {outside}"), ""]
    return lines


def _every_score(found: Results) -> list[str]:
    pairs, default = found.pairs, f"_{BEST_NORM:g}"
    multiplied = tuple(f"{name}*" for name in SCORES)
    labels = [
        x
        for x in _comparable(found)
        if x in (*SCORES, *SUCCESSORS, f"||h||{default}") or (x.startswith(multiplied) and x.endswith(default))
    ]
    rows = []
    for label in sorted(labels, key=pairs.mean, reverse=True):
        estimate = pairs.estimate(label)
        low, high = estimate.interval or (None, None)
        found.note("every score", (found.scale, "average"), label, estimate.value, None, low=low, high=high)
        cells = (f"{x:.3f}" for x in pairs.of_pairs(label))
        rows.append([_name(label), f"{estimate.value:.3f} {_interval(estimate)}", *cells])
    fitted = (
        "Those that are fitted on training images are missing, for there are none."
        if found.experiment.spec
        else f"What needs in-distribution rows is fitted on {FITTED_ON:,} training images, or all where they are fewer."
    )
    return [
        *_paragraph(
            "Those of `fastood.SCORES` alone, and where a norm multiplies them by default also times ‖h‖₀.₃; and those "
            f"that came after the paper, of `fastood.SUCCESSORS`, with their default parameters. {fitted}"
        ),
        *_table(["score", "mean [95%]", *(f"{a} → {b}" for a, b in pairs.pairs)], rows),
    ]


def _consistency() -> list[str]:
    """Whether the paper's Table 1 and Table 3 are the means of its own Appendix A, which they should be."""
    appendix, off = printed("Appendix A"), [0.0]
    for table in ("Table 1", "Table 3"):
        for (_, _, label), number in printed(table).items():
            of_pairs = [x.auroc for (_, _, other), x in appendix.items() if other == label]
            off += [abs(fmean(of_pairs) - number.auroc), abs(stdev(of_pairs) - (number.deviation or 0))]
    return [
        "## The paper's numbers",
        "",
        *_paragraph(
            "`fastood/reproduce/paper.csv` holds them as printed. The means and standard deviations (of a sample, n "
            f"− 1) of its Appendix A are those of its Tables 1 and 3 to within {max(off):.4f}."
        ),
    ]


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _paragraph(text: str) -> list[str]:
    return [_filled(text), ""]


def _name(label: str) -> str:
    for prefix, what in (("same rows ", " by the last layer"), ("deep ", " by all parameters")):
        if label.startswith(prefix):
            return f"`{label.removeprefix(prefix)}`{what}"
    return f"`{label.replace('||h||', '‖h‖')}`"


def _interval(x: Estimate) -> str:
    return f"[{x.interval[0]:.3f}, {x.interval[1]:.3f}]" if x.interval else ""


def _estimate(x: Estimate, sign: str = "") -> str:
    assert x.interval
    return f"{x.value:{sign}.3f} [{x.interval[0]:{sign}.3f}, {x.interval[1]:{sign}.3f}]"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


_COLUMNS = (
    "suite",
    "table",
    "id",
    "ood",
    "score",
    "auroc",
    "deviation",
    "low",
    "high",
    "paper",
    "paper_deviation",
    "difference",
)


def _write_numbers(out: Path, results: Sequence[Results]) -> None:
    with atomic(out / "results.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for found in results:
            for cell in found.cells:
                writer.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in cell.items()})
    suites = [
        {
            "suite": found.experiment.suite.name,
            "model": found.experiment.spec,
            "pairs": found.pairs.pairs,
            "auroc": {label: found.pairs.auroc(label).round(6).tolist() for label in found.pairs.labels},
        }
        for found in results
    ]
    document = {"fastood": __version__, "torch": torch.__version__, "auroc of": "[seed][pair]", "suites": suites}
    with atomic(out / "results.json") as temporary:
        temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

"""The report: every number, what to do first, and nothing that a browser would fetch."""

import re

import numpy as np
import pytest
import torch
from formulas import lse

import fastood
from fastood import plots
from fastood.evaluation import evaluate
from fastood.report import write_html

OOD = ("digits_7-9", "photos")


def references(html):
    """Whatever a browser would go and fetch."""
    found = re.findall(r"""(?:src|href|action|data|poster|srcset)\s*=\s*["']?([^"'\s>]+)""", html)
    found += re.findall(r"url\(([^)]*)\)", html)
    return [x for x in found if not x.startswith("data:image/png;base64,")]


def test_report_needs_nothing_else(demo_run):
    out = demo_run.out
    html = (out / "report.html").read_text(encoding="utf-8")
    assert references(html) == []
    assert "@import" not in html
    assert not re.search(r"https?:|//[a-z]", re.sub(r"data:image/png;base64,[^\"]*", "", html).replace("// ", ""))
    assert html.count("<img") == html.count("data:image/png;base64,")


def cells(html):
    """Summary of what unfolds, with the heading before it -> the rows of the table in it, as lists of text."""
    rows, heading = {}, ""
    for found in re.finditer(r"<h2>(.*?)</h2>|<details>\s*<summary>(.*?)</summary>(.*?)</details>", html, re.DOTALL):
        if found[1]:
            heading = found[1]
        else:
            lines = re.findall(r"<tr.*?>(.*?)</tr>", found[3], re.DOTALL)
            cell = r"<t[hd][^>]*>(?:<button>)?(.*?)(?:</button>)?</t[hd]>"
            rows[heading, found[2]] = [re.findall(cell, line) for line in lines]
    return rows


def test_report_shows_every_number(demo_run):
    evaluation, out = demo_run.found.evaluation, demo_run.out
    tables = cells((out / "report.html").read_text(encoding="utf-8"))
    n = len(evaluation.id_scores)
    where = {ood: (f"ID against {ood}", f"All metrics of {n} scores") for ood in OOD}
    where["average"] = "Scores to choose from", f"All metrics of {n} scores, mean over the OOD sets"
    metrics = ["auroc", "fpr95_in", "fpr95_out", "aupr_in", "aupr_out"]
    for ood, place in where.items():
        rows = [row for row in evaluation.table() if row["ood"] == ood]
        expected = [["score", *metrics], *([row["score"], *(f"{row[m]:.3f}" for m in metrics)] for row in rows)]
        assert tables[place] == expected
        assert [row["auroc"] for row in rows] == sorted((row["auroc"] for row in rows), reverse=True)
    glance = tables["Scores to choose from", f"AUROC of all {n} scores at a glance"]
    assert glance[0] == ["score", "average", *OOD]
    assert [row[1] for row in glance[1:]] == [
        f"{row['auroc']:.3f}" for row in evaluation.table() if row["ood"] == "average"
    ]


def stored(out, name):
    with np.load(out / f"{name}.npz") as file:
        return file["logits"]


def words(html):
    """What a reader reads, tags and doubled spaces gone."""
    body = re.sub(r"</?(span|code)>", "", html.partition("<body>")[2])
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_report_begins_with_what_to_do(demo_run):
    evaluation, out = demo_run.found.evaluation, demo_run.out
    html = (out / "report.html").read_text(encoding="utf-8")
    found, text = evaluation.recommendation, words(html)
    accepted = {ood: f"{found.accepted[ood]} of {n}" for ood, n in evaluation.counts()["ood"].items()}
    place = [
        text.index(x)
        for x in (
            f"Recommended: {found.score} AUROC {found.auroc['average']}, FPR95 {found.fpr95_in['average']}, mean over",
            f"≥ {found.threshold!r}, which keeps 481 of the 506 ID rows that it is made of",
            *(f"{ood} {found.auroc[ood]} {found.fpr95_in[ood]} {accepted[ood]}" for ood in OOD),
            "Scores to choose from",
            f"{found.tied[0]} may be as good {found.differences[found.tied[0]]:+}",
            f"energy*||h||_0.3 default of fastood.score {found.differences['energy*||h||_0.3']:+}",
            "at a glance",
            "What the numbers mean",
            "DeLong",
        )
    ]
    assert place == sorted(place)
    rows = re.findall(r'<tr class="(\w+)"><th scope="row">([^<]*)<', html)
    assert {label for mark, label in rows if mark == "chosen"} == {found.score}
    assert {label for mark, label in rows if mark == "tied"} == set(found.tied)


def test_report_shows_the_decision(demo_run):
    """Of a threshold that the ID images which it decides about had no part in."""
    out = demo_run.out
    detector = fastood.Detector.load(out / "detector.safetensors")
    names = ("id", "ood_digits_7-9", "ood_photos")
    energy = {name: lse(stored(out, name)) for name in names}
    fitted, unseen = energy["id"][::2], energy["id"][1::2]
    limit = np.sort(fitted)[int(0.05 * (len(fitted) + 1)) - 1]
    assert detector.threshold == pytest.approx(limit, rel=1e-6)
    text = words((out / "report.html").read_text(encoding="utf-8"))
    assert f"energy, fitted on 253 in-distribution rows, accepts scores ≥ {detector.threshold:.6g}" in text
    for name, s in {"ID": unseen, "digits_7-9": energy["ood_digits_7-9"], "photos": energy["ood_photos"]}.items():
        flagged = int((s < limit).sum())
        assert f"{name} {flagged / len(s):.1%} {flagged} of {len(s)}" in text
        assert flagged < 0.1 * len(s) if name == "ID" else flagged > 0.5 * len(s)


def test_report_of_a_detector_by_class(tmp_path):
    logits = 5 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    detector = fastood.Detector("energy", per_class=True).fit(logits)
    decisions = detector, {"ID": (190, 200), "none": (0, 0), "<o>": (1, 3)}
    write_html(tmp_path / "r.html", evaluate({"a": [3.0]}, {"o": {"a": [1.0]}}), decisions=decisions)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<o>" not in html
    text = words(html)
    assert "energy, fitted on 200 in-distribution rows, accepts scores ≥ the threshold of their predicted class" in text
    assert "ID 5.0% 10 of 200 none - 0 of 0 &lt;o&gt; 66.7% 2 of 3" in text


def test_histograms_are_of_the_scores_to_act_on(demo_run):
    evaluation, out = demo_run.found.evaluation, demo_run.out
    html = (out / "report.html").read_text(encoding="utf-8")
    for ood in OOD:
        wanted = {evaluation.recommendation.score, "energy*||h||_0.3", evaluation.best(1, ood)[0]}
        assert set(re.findall(rf'alt="Histograms of (\S+), ID and {ood}"', html)) == wanted


def test_report_on_few_rows_says_so(tmp_path):
    write_html(tmp_path / "r.html", evaluate({"a": [3.0, 4.0], "b": [1, 2]}, {"o": {"a": [1.0], "b": [3]}}))
    text = words((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "Recommended: a AUROC 1.000, FPR95 0.000. These are the rows that it was chosen by, which flatters" in text
    assert "difference" not in text
    assert "95% intervals" not in text.partition("What the numbers mean")[0]


def test_best_of_a_column_is_marked(tmp_path):
    evaluation = evaluate({"good": [3.0, 4.0], "bad": [0.0, 1.0]}, {"o": {"good": [1.0, 2.0], "bad": [0.5, 2.0]}})
    write_html(tmp_path / "r.html", evaluation)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "at a glance" not in html  # one set: its table says it all
    rows = dict(re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', html, re.DOTALL))
    # lowest false positive rate, highest of everything else
    assert re.findall(r'class="best">([\d.]+)', rows["good"]) == ["1.000", "0.000", "0.000", "1.000", "1.000"]
    assert 'class="best"' not in rows["bad"]


def test_what_looks_like_the_best_is_marked_too(tmp_path):
    inside, n = np.arange(2000.0), 2000
    outside = {"a": [-1.0], "b": [0.5]}  # AUROC 1 and 1 - 1/2000, both shown as 1.000
    evaluation = evaluate({"a": inside, "b": inside}, {"o": outside})
    assert [row["auroc"] for row in evaluation.table()] == [1, 1 - 1 / n]
    write_html(tmp_path / "r.html", evaluation)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    rows = dict(re.findall(r'<th scope="row">(\w+)</th>\s*(<td.*?>[\d.]+)', html.partition("<details>")[2]))
    assert rows == dict.fromkeys("ab", '<td class="best">1.000')


def test_report_escapes_names(tmp_path):
    name, label = '<script>alert("x")</script>', "a&b<i>"
    evaluation = evaluate({label: [1.0, 2.0]}, {name: {label: [0.0, 1.5]}, "o": {label: [0.0]}})
    figures = {'"><img src=x>': plots.heatmap([[0.5]], ["tv"], [1])}
    write_html(tmp_path / "r.html", evaluation, title="<b>t</b>", figures=figures)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert html.count("<script>") == 1  # the one that sorts
    assert "<i>" not in html
    assert "<b>" not in html
    assert "src=x>" not in html
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in html
    assert "<h1>&lt;b&gt;t&lt;/b&gt;</h1>" in html
    assert references(html.replace("src=x&gt;", "")) == []

"""The demo on real digits: what it writes, that its numbers are those of scikit-learn, and the report."""

import csv
import json
import re

import matplotlib.image
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

import fastood
from fastood import demo, plots
from fastood.evaluation import evaluate
from fastood.report import write_html

OOD = ("digits_7-9", "photos")
FILES = {
    "detector.safetensors",
    "figure1_simplex.png",
    "figure2_heatmap.png",
    "histograms.png",
    "id.npz",
    "ood_digits_7-9.npz",
    "ood_photos.npz",
    "report.html",
    "scores.csv",
    "scores.json",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    settings = torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.get_num_threads()  # noqa: NPY002
    said = []
    out.mkdir(parents=True)
    (out / "there before").touch()
    evaluation, written, *_ = demo.run(out, progress=said.append)
    (out / "there before").unlink()
    assert written == sorted(out.iterdir())
    assert torch.equal(torch.get_rng_state(), settings[0])
    assert np.random.get_state()[1].tolist() == settings[1]  # noqa: NPY002
    assert torch.get_num_threads() == settings[2]
    assert torch.is_grad_enabled()
    assert any("test images right" in line for line in said)
    return evaluation, out


def stored(out, name):
    with np.load(out / f"{name}.npz") as file:
        return file["logits"], file["feats"]


def softmax(f):
    e = np.exp(f.astype(np.float64) - f.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_all_files_and_no_others(digits):
    _, out = digits
    assert {p.name for p in out.iterdir()} == FILES
    for name in FILES:
        if name.endswith(".png"):
            image = matplotlib.image.imread(out / name)
            assert min(image.shape[:2]) > 300
            assert image[..., :3].std() > 0.05  # not one flat colour


def test_every_row_of_the_papers_tables(digits):
    evaluation, _ = digits
    labels = set(evaluation.id_scores)
    gradients = {name for name, entry in fastood.SCORES.items() if entry.gradient}
    assert labels >= gradients | {f"deep {name}" for name in gradients} | {"batchgrad", "||h||_0.3", "||h||_1"}
    assert labels >= {f"{v}{u}" for v in ("msp", "energy", "varsum", "tv") for u in ("", "*||h||_0.3", "*||h||_1")}
    assert [row["ood"] for row in evaluation.table()] == [ood for ood in ("average", *OOD) for _ in labels]


def test_it_tells_digits_from_other_images(digits):
    evaluation, out = digits
    logits, feats = stored(out, "id")
    assert logits.shape == (506, 7)
    assert feats.shape == (506, 64)
    assert (feats >= 0).all()
    for row in evaluation.table():
        if row["ood"] == "digits_7-9" and row["score"] in ("energy", "msp", "deep exgrad", "batchgrad"):
            assert row["auroc"] > 0.8, row
        if row["score"] in ("norm_eg_p_l2sq", "deep norm_eg_p_l2sq"):
            assert row["auroc"] == 0.5


def test_metrics_are_scikit_learns_on_float64_truth(digits):
    evaluation, out = digits
    truth = {
        "msp": lambda f, h: softmax(f).max(1),
        "energy": lambda f, h: np.log(np.exp(f.astype(np.float64)).sum(1)),
        "varsum": lambda f, h: 1 - (softmax(f) * (1 - softmax(f))).sum(1),
        "neg_entropy": lambda f, h: (softmax(f) * np.log(softmax(f))).sum(1),
        "tv*||h||_1": lambda f, h: np.abs(softmax(f) - 1 / 7).sum(1) / 2 * h.sum(1, dtype=np.float64),
        "||h||_0.3": lambda f, h: (h.astype(np.float64) ** 0.3).sum(1) ** (1 / 0.3),
    }
    rows = {(r["ood"], r["score"]): r for r in evaluation.table()}
    for ood in OOD:
        for label, of in truth.items():
            inside, outside = of(*stored(out, "id")), of(*stored(out, f"ood_{ood}"))
            is_id, s = np.repeat([1, 0], [len(inside), len(outside)]), np.concatenate([inside, outside])
            row = rows[ood, label]
            assert row["auroc"] == pytest.approx(roc_auc_score(is_id, s), abs=1e-6), (ood, label)
            assert row["aupr_in"] == pytest.approx(average_precision_score(is_id, s), abs=1e-6)
            assert row["aupr_out"] == pytest.approx(average_precision_score(1 - is_id, -s), abs=1e-6)


def test_tables_on_disk_are_the_evaluation(digits):
    evaluation, out = digits
    found = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert found["results"] == evaluation.table()
    assert b"\r" not in (out / "scores.csv").read_bytes()
    assert found["counts"] == {"id": 506, "ood": {"digits_7-9": 533, "photos": 300}}
    with (out / "scores.csv").open(newline="", encoding="utf-8") as file:
        assert [float(row["auroc"]) for row in csv.DictReader(file)] == [row["auroc"] for row in evaluation.table()]


def test_the_seed_decides(digits, tmp_path):
    _, out = digits
    torch.rand(3)  # the global generator has no say
    demo.run(tmp_path, progress=lambda line: None)
    assert (tmp_path / "scores.csv").read_bytes() == (out / "scores.csv").read_bytes()
    for name in ("id", "ood_digits_7-9", "ood_photos"):
        for x, y in zip(stored(tmp_path, name), stored(out, name), strict=True):
            np.testing.assert_array_equal(x, y)
    train, labels, *_ = demo._images(0)
    assert not torch.equal(demo._trained(train, labels, 0)[0].weight, demo._trained(train, labels, 1)[0].weight)
    assert not torch.equal(demo._images(1)[0], train)


def test_no_test_image_was_trained_on():
    train, train_labels, test, test_labels, ood = demo._images(0)
    seen = {row.tobytes() for row in train.numpy()}
    unseen = {row.tobytes() for row in torch.cat([test, ood["digits_7-9"]]).numpy()}
    assert not seen & unseen
    assert set(train_labels.tolist()) == set(test_labels.tolist()) == set(range(7))
    for images in (train, test, *ood.values()):
        assert images.min() >= 0
        assert images.max() <= 1


# ---- the report


def references(html):
    """Whatever a browser would go and fetch."""
    found = re.findall(r"""(?:src|href|action|data|poster|srcset)\s*=\s*["']?([^"'\s>]+)""", html)
    found += re.findall(r"url\(([^)]*)\)", html)
    return [x for x in found if not x.startswith("data:image/png;base64,")]


def test_report_needs_nothing_else(digits):
    _, out = digits
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


def test_report_shows_every_number(digits):
    evaluation, out = digits
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


def words(html):
    """What a reader reads, tags and doubled spaces gone."""
    body = re.sub(r"</?(span|code)>", "", html.partition("<body>")[2])
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_report_begins_with_what_to_do(digits):
    evaluation, out = digits
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


def test_report_shows_the_decision(digits):
    """Of a threshold that the ID images which it decides about had no part in."""
    _, out = digits
    detector = fastood.Detector.load(out / "detector.safetensors")
    names = ("id", "ood_digits_7-9", "ood_photos")
    energy = {name: np.log(np.exp(stored(out, name)[0].astype(np.float64)).sum(1)) for name in names}
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


def test_histograms_are_of_the_scores_to_act_on(digits):
    evaluation, out = digits
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


def test_conclusion_is_of_the_table(digits):
    evaluation, _ = digits
    mean = {row["score"]: row["auroc"] for row in evaluation.table() if row["ood"] == "average"}
    text = demo.conclusion(evaluation)
    assert f"energy alone {mean['energy']:.6f}; energy*||h||_0.3" in text
    assert text.endswith(f"{mean['energy*||h||_0.3']:.6f}.")


def test_heatmap_begins_with_v_alone(digits, tmp_path, monkeypatch):
    evaluation, _ = digits
    drawn = {}

    def heatmap(auroc, v, norms, of=plots.heatmap):
        drawn.update(cells=auroc, v=v, norms=norms)
        return of(auroc, v, norms)

    monkeypatch.setattr(plots, "heatmap", heatmap)
    demo.run(tmp_path, progress=lambda line: None)
    mean = {row["score"]: row["auroc"] for row in evaluation.table() if row["ood"] == "average"}
    assert drawn["norms"] == (None, *fastood.api.PAPER_NORMS)
    np.testing.assert_allclose(drawn["cells"][:, 0], [mean[name] for name in drawn["v"]], rtol=1e-12)


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

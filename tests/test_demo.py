"""The demo on real digits: what it writes, and that its numbers are those of scikit-learn."""

import csv
import json

import matplotlib.image
import numpy as np
import pytest
import torch
from formulas import lse, norm, softmax
from sklearn.metrics import average_precision_score, roc_auc_score

import fastood
from fastood import demo

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


def stored(out, name):
    with np.load(out / f"{name}.npz") as file:
        return file["logits"], file["feats"]


def test_all_files_and_no_others(demo_run):
    out = demo_run.out
    assert {p.name for p in out.iterdir()} == FILES | {"there before"}
    assert demo_run.found.written == sorted(out / name for name in FILES)
    assert any("test images right" in line for line in demo_run.said)
    for name in FILES:
        if name.endswith(".png"):
            image = matplotlib.image.imread(out / name)
            assert min(image.shape[:2]) > 300
            assert image[..., :3].std() > 0.05  # not one flat colour


def test_every_row_of_the_papers_tables(demo_run):
    evaluation = demo_run.found.evaluation
    labels = set(evaluation.id_scores)
    gradients = {name for name, entry in fastood.SCORES.items() if entry.gradient}
    assert labels >= gradients | {f"deep {name}" for name in gradients} | {"batchgrad", "||h||_0.3", "||h||_1"}
    assert labels >= {f"{v}{u}" for v in ("msp", "energy", "varsum", "tv") for u in ("", "*||h||_0.3", "*||h||_1")}
    assert [row["ood"] for row in evaluation.table()] == [ood for ood in ("average", *OOD) for _ in labels]


def test_it_tells_digits_from_other_images(demo_run):
    evaluation, out = demo_run.found.evaluation, demo_run.out
    logits, feats = stored(out, "id")
    assert logits.shape == (506, 7)
    assert feats.shape == (506, 64)
    assert (feats >= 0).all()
    for row in evaluation.table():
        if row["ood"] == "digits_7-9" and row["score"] in ("energy", "msp", "deep exgrad", "batchgrad"):
            assert row["auroc"] > 0.8, row
        if row["score"] in ("norm_eg_p_l2sq", "deep norm_eg_p_l2sq"):
            assert row["auroc"] == 0.5


def test_metrics_are_scikit_learns_on_float64_truth(demo_run):
    evaluation, out = demo_run.found.evaluation, demo_run.out
    truth = {
        "msp": lambda f, h: softmax(f).max(1),
        "energy": lambda f, h: lse(f),
        "varsum": lambda f, h: 1 - (softmax(f) * (1 - softmax(f))).sum(1),
        "neg_entropy": lambda f, h: (softmax(f) * np.log(softmax(f))).sum(1),
        "tv*||h||_1": lambda f, h: np.abs(softmax(f) - 1 / 7).sum(1) / 2 * norm(h, 1),
        "||h||_0.3": lambda f, h: norm(h, 0.3),
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


def test_tables_on_disk_are_the_evaluation(demo_run):
    evaluation, out = demo_run.found.evaluation, demo_run.out
    found = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert found["results"] == evaluation.table()
    assert b"\r" not in (out / "scores.csv").read_bytes()
    assert found["counts"] == {"id": 506, "ood": {"digits_7-9": 533, "photos": 300}}
    with (out / "scores.csv").open(newline="", encoding="utf-8") as file:
        assert [float(row["auroc"]) for row in csv.DictReader(file)] == [row["auroc"] for row in evaluation.table()]


def test_the_seed_decides_and_leaves_the_process_as_it_was(demo_run, tmp_path, monkeypatch):
    def one_of_the_deep(model, images):
        raw = fastood.deep_gradient_norm(model, images, **fastood.SCORES["gradnorm"].gradient)
        return {"deep gradnorm": raw.double().numpy()}

    monkeypatch.setattr(demo, "_deep_scores", one_of_the_deep)
    for name in ("write_html", "_save"):  # pictures are not what is compared
        monkeypatch.setattr(demo, name, lambda *args, **options: None)
    torch.rand(3)  # the global generator has no say
    settings = torch.get_rng_state(), np.random.get_state()[1].tolist(), torch.get_num_threads()  # noqa: NPY002
    demo.run(tmp_path / "made" / "here", progress=lambda line: None)
    assert torch.equal(torch.get_rng_state(), settings[0])
    assert np.random.get_state()[1].tolist() == settings[1]  # noqa: NPY002
    assert torch.get_num_threads() == settings[2]
    assert torch.is_grad_enabled()
    out, again = demo_run.out, tmp_path / "made" / "here"
    lines, those_again = ((folder / "scores.csv").read_text().splitlines() for folder in (out, again))
    assert those_again == [line for line in lines if ",deep " not in line or ",deep gradnorm," in line]
    for name in ("id", "ood_digits_7-9", "ood_photos"):
        for x, y in zip(stored(again, name), stored(out, name), strict=True):
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


def test_conclusion_is_of_the_table(demo_run):
    evaluation = demo_run.found.evaluation
    mean = {row["score"]: row["auroc"] for row in evaluation.table() if row["ood"] == "average"}
    text = demo.conclusion(evaluation)
    assert f"energy alone {mean['energy']:.6f}; energy*||h||_0.3" in text
    assert text.endswith(f"{mean['energy*||h||_0.3']:.6f}.")


def test_heatmap_begins_with_v_alone(demo_run):
    ((cells, v, norms),) = demo_run.drawn
    mean = {row["score"]: row["auroc"] for row in demo_run.found.evaluation.table() if row["ood"] == "average"}
    assert norms == (None, *fastood.api.PAPER_NORMS)
    np.testing.assert_allclose(cells[:, 0], [mean[name] for name in v], rtol=1e-12)

"""Detectors, attached models and heads that decide by a successor."""

import numpy as np
import pytest
import torch
from six_classes import C, D, N, fitted, rows

import fastood
from fastood import SUCCESSORS, Detector, Fitted


def test_a_detector_decides_by_one(tmp_path):
    train, calibration, new = rows(), rows(3), rows(1)
    for name in SUCCESSORS:
        made = fitted(name, train)
        detector = Detector(made, tpr=0.9)
        for part in np.array_split(np.arange(N), 3):
            detector.partial_fit(calibration[0][part], calibration[1][part])
        assert detector.rows == N
        np.testing.assert_array_equal(detector.score(*new[:2]), made.score(*new[:2]))
        share = detector.accept(*new[:2]).mean()
        assert 0.75 < share <= 1, name
        detector.save(tmp_path / "d.safetensors")
        loaded = Detector.load(tmp_path / "d.safetensors")
        np.testing.assert_array_equal(loaded.accept(*new[:2]), detector.accept(*new[:2]))
        np.testing.assert_array_equal(loaded.p_value(*new[:2]), detector.p_value(*new[:2]))
        assert repr(loaded) == repr(detector)
        assert (loaded.classes, loaded.dim) == (detector.classes, detector.dim)
        shard = Detector(fitted(name, train), tpr=0.9).partial_fit(*calibration[:2])
        assert shard.merge(loaded).rows == 2 * N


def test_a_detector_fits_its_own_on_every_other_row():
    z, h, y, _ = rows()
    by_name = Detector("mahalanobis", tpr=0.9).fit(z, h, y)
    fit = Fitted("mahalanobis").fit(z[::2], h[::2], y[::2])
    by_hand = Detector(fit, tpr=0.9).fit(z[1::2], h[1::2], y[1::2])
    assert by_name.threshold == by_hand.threshold
    assert by_name.successor.rows == N // 2
    assert by_name.fit(z[:100], h[:100]).successor.rows == 50  # anew
    with pytest.raises(RuntimeError, match="knn is not fitted"):
        Detector("knn").partial_fit(z, h)
    with pytest.raises(ValueError, match=r"labels must be \[240\]"):
        Detector("she").fit(z, h, y[:-1])
    other = Detector(Fitted("mahalanobis").fit(z, h, y), tpr=0.9).partial_fit(z, h)
    with pytest.raises(ValueError, match="by the same fitted mahalanobis"):
        other.merge(Detector(fit, tpr=0.9).partial_fit(z, h))
    pixels = Detector("knn", k=3, tpr=0.9).fit(
        z.reshape(4, 6, 10, C).transpose(0, 3, 1, 2), h.reshape(4, 6, 10, D).transpose(0, 3, 1, 2), dim=1
    )
    assert pixels.successor.rows == pixels.rows == N // 2


def test_each_class_has_its_threshold():
    z, h, _, _ = rows()
    detector = Detector(fitted("mahalanobis"), tpr=0.8, per_class=True).fit(*rows(3)[:2])
    assert detector.threshold.shape == (C,)
    odd = z.copy()
    odd[3] = np.nan
    assert not detector.accept(odd, h)[3]


def test_detectors_choose_among_them_and_stand_in_scikit_learn():
    from fastood.sklearn import OODDetector

    calibration, (z, h, _, head) = rows(3, n=400), rows(1)
    made = fitted("class_cosine")
    candidates = [{"method": made}, {"method": "scale", "head": head}, "msp"]
    detector = Detector.choose(calibration[:2], {"small": (0.1 * z, np.abs(h - h.mean()))}, candidates, tpr=0.9)
    assert {row["method"] for row in detector.choice.table} == {"class_cosine", "scale", "msp"}
    estimator = OODDetector(made, n_classes=C, tpr=0.9).fit(np.hstack(calibration[:2]))
    np.testing.assert_array_equal(estimator.score_samples(np.hstack([z, h])), made.score(z, h))


def test_an_attached_model_decides_by_one():
    model = torch.nn.Sequential(torch.nn.Linear(8, D), torch.nn.ReLU(), torch.nn.Linear(D, C)).eval()
    attached = fastood.attach(model, example=torch.randn(2, 8))
    x = torch.randn(300, 8)
    made = Fitted("vim", head=attached.head).fit_loader(attached, x.split(64), progress=False)
    detector = Detector(made, tpr=0.9).fit_loader(attached, torch.randn(300, 8).split(64), progress=False)
    with torch.inference_mode():
        logits, feats, s, accept = fastood.attach(model, detector=detector, example=x[:2])(x)
    torch.testing.assert_close(s, made.score(logits, feats), rtol=0, atol=0)
    assert 0.8 < accept.double().mean() <= 1


@pytest.mark.parametrize("name", ["scale", "mahalanobis", "knn"])
def test_a_head_that_decides_is_exported_for_any_number_of_rows(name):
    z, h, _, (w, b) = rows(1)
    linear = torch.nn.Linear(D, C).eval()
    linear.weight.data, linear.bias.data = torch.from_numpy(w).float(), torch.from_numpy(b).float()
    f, g = torch.from_numpy(z).float(), torch.from_numpy(h).float()
    served = fastood.OODHead(linear, Detector(fitted(name), tpr=0.9).fit(f, g))
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(served, (g[:7],), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for some in (g[:7], g):
            expected, got = served(some), exported(some)
            torch.testing.assert_close(got["score"], expected["score"], rtol=1e-5, atol=1e-5)

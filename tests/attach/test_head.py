"""OODHead: a last layer that decides."""

import io
import math

import pytest
import torch
from classifiers import (
    OPTIONS,
    BiT,
    ResNet,
    call,
    fitted,
    made,
)

import fastood


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", [ResNet, BiT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_head_and_decision(form, options, dtype):
    model, x = made(form, 40)
    model, x = model.to(dtype), x.to(dtype)
    attached = fastood.attach(model, detector=fitted(model, x, **options))
    logits, feats, score, accept = call(attached, x)
    got = call(fastood.OODHead(attached.head, attached.detector), feats)
    for name, wanted in {"logits": logits, "score": score, "accept": accept}.items():
        torch.testing.assert_close(got[name], wanted, rtol=0, atol=0)


def test_the_threshold_of_a_head_is_its_own():
    model, x = made(ResNet, 40)
    detector = fitted(model, x, method="energy")
    feats, before = model.features(x).detach(), detector.threshold
    head = fastood.OODHead(model.fc, detector)
    head.threshold.fill_(math.inf)
    assert not head(feats)["accept"].any()
    head.threshold.fill_(-math.inf)
    assert head(feats)["accept"].all()
    assert detector.threshold == before
    head = fastood.OODHead(model.fc, detector).bfloat16()
    assert head.threshold.dtype == torch.float32
    assert head.threshold.item() == pytest.approx(before, rel=1e-6)
    assert head(feats.bfloat16())["score"].dtype == torch.float32
    assert set(head.state_dict()) == {"head.weight", "head.bias", "threshold"}
    with pytest.raises(TypeError, match=r"head must be a torch\.nn\.Module, got str"):
        fastood.OODHead("fc", detector)
    with pytest.raises(RuntimeError, match="not fitted"):
        fastood.OODHead(model.fc, fastood.Detector("energy"))


@pytest.mark.skipif(
    torch.__version__ < "2.9", reason="needs torch 2.9: the format that 2.8 exports to has no infinite constants"
)
@pytest.mark.parametrize("per_class", [False, True])
def test_a_threshold_changed_after_export(per_class):
    model, x = made(ResNet, 40)
    feats = model.features(x).detach()
    head = fastood.OODHead(model.fc, fitted(model, x, method="energy", per_class=per_class))
    program = torch.export.export(head, (feats,), dynamic_shapes=({0: torch.export.Dim("n")},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    served, expected = torch.export.load(file).module(), call(head, feats[:9])
    got = served(feats[:9])
    torch.testing.assert_close([got["logits"], got["score"]], [expected["logits"], expected["score"]])
    limits = head.threshold[expected["logits"].argmax(1)] if per_class else head.threshold
    assert torch.equal(got["accept"], got["score"] >= limits)
    middle = got["score"].median()
    served.load_state_dict({**served.state_dict(), "threshold": torch.full_like(head.threshold, middle.item())})
    assert torch.equal(served(feats[:9])["accept"], got["score"] >= middle)

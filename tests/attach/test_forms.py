"""An attached model with a detector: compiled, exported, copied, quantised, in other types, in threads."""

import copy
import io
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from classifiers import (
    OPTIONS,
    Bert,
    BiT,
    Llama,
    ResNet,
    VisionTransformer,
    call,
    fitted,
    made,
    truth,
)
from torch import nn

import fastood


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", [ResNet, BiT, Bert])
def test_with_a_detector(form, options):
    model, inputs = made(form, 40)
    detector = fitted(model, inputs, **options)
    logits, feats, score, accept = call(fastood.attach(model, detector=detector), inputs)
    torch.testing.assert_close(score, detector.score(logits, feats), rtol=0, atol=0)
    assert torch.equal(accept, detector.accept(logits, feats))
    assert 0 < accept.sum() < 40
    if form is ResNet:
        inputs[7] = math.nan
        assert not call(fastood.attach(model, detector=detector), inputs)[3][7]


@pytest.mark.parametrize("form", [ResNet, BiT, VisionTransformer, Llama, Bert])
def test_compiled_whole(form):
    model, inputs = made(form, 40)
    attached = fastood.attach(model, detector=fitted(model, inputs, method="energy"), example=inputs)
    expected = call(attached, inputs)
    got = call(torch.compile(attached, backend="aot_eager", fullgraph=True), inputs)
    torch.testing.assert_close(got[:3], expected[:3])
    # The score's last bits are another backend's, and the threshold is the score of one of these rows.
    assert torch.equal(got[3], got[2] >= attached.detector.threshold)
    assert 0 < got[3].sum() < 40


def test_a_graph_cannot_check():
    model, x = made(ResNet)
    attached = fastood.attach(model)
    words = r"not checked yet.*example=inputs"
    with pytest.raises(Exception, match=words if torch.__version__ >= "2.9" else "Observed exception"):
        torch.compile(attached, backend="eager", fullgraph=True)(x)
    with pytest.raises(RuntimeError, match=words):
        torch.export.export(attached, (x,))
    torch._dynamo.reset()
    torch.testing.assert_close(call(torch.compile(attached, backend="eager"), x), truth(model, x))


@pytest.mark.skipif(
    torch.__version__ < "2.9", reason="needs torch 2.9: the format that 2.8 exports to has no infinite constants"
)
@pytest.mark.parametrize("form", [ResNet, BiT])
def test_exported(form):
    model, x = made(form, 40)
    attached = fastood.attach(model, detector=fitted(model, x, method="msp"), example=x)
    program = torch.export.export(attached, (x,), dynamic_shapes=(({0: torch.export.Dim("n")},),))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    got, expected = torch.export.load(file).module()(x[:9]), call(attached, x[:9])
    torch.testing.assert_close(got[:3], expected[:3])
    assert torch.equal(got[3], got[2] >= attached.detector.threshold)


@pytest.mark.parametrize("form", [ResNet, BiT, Llama])
def test_under_autocast(form):
    model, inputs = made(form)
    attached = fastood.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits, feats = call(attached, inputs)
        expected = truth(model, inputs)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(feats, expected[1], rtol=0, atol=0)
    assert not attached._unchecked


@pytest.mark.parametrize("options", OPTIONS)
def test_decisions_under_autocast(options):
    """Of logits in a half type, in which scores never are."""
    model, x = made(ResNet, 40)
    with torch.autocast("cpu", torch.bfloat16):
        logits, feats, score, accept = call(fastood.attach(model, detector=fitted(model, x, **options)), x)
        detector = fitted(model, x, **options)
    assert (logits.dtype, score.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(score, detector.score(logits, feats), rtol=0, atol=0)
    assert torch.equal(accept, detector.accept(logits, feats))
    assert 0 < accept.sum() < 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, x = made(ResNet)
    logits, feats = call(fastood.attach(model.to(dtype)), x.to(dtype))
    assert (logits.dtype, feats.dtype) == (dtype, dtype)
    torch.testing.assert_close(logits, call(model, x.to(dtype)), rtol=0, atol=0)


@pytest.mark.parametrize("checked", [False, True])
def test_copied_pickled_saved_and_wrapped(checked):
    model, x = made(ResNet, 40)
    expected = truth(model, x)
    attached = fastood.attach(model, detector=fitted(model, x, method="energy"), example=x if checked else None)
    file = io.BytesIO()
    torch.save(attached, file)
    file.seek(0)
    copies = [
        nn.DataParallel(attached),
        copy.deepcopy(attached),
        pickle.loads(pickle.dumps(attached)),
        torch.load(file, weights_only=False),
    ]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert call(copies[0], x)[0].eq(0).all()
    for other in copies[1:]:
        torch.testing.assert_close(call(other, x)[:2], expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, of its quantisation
@pytest.mark.parametrize("first", ["attached", "quantised"])
def test_a_quantised_head(first):
    model, x = made(ResNet)

    def quantised(module):
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, torch.qint8)

    expected = call(quantised(model), x)
    detector = fitted(model, x, method="energy")
    if first == "quantised":
        attached = fastood.attach(quantised(model), detector=detector)
    else:
        attached = quantised(fastood.attach(model, detector=detector, example=x))
    logits, feats, score, accept = call(attached, x)
    assert type(attached.head) is not nn.Linear
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(feats, model.features(x), rtol=0, atol=0)
    assert not torch.equal(logits, call(model, x))
    assert torch.equal(accept, detector.accept(logits, feats))
    torch.testing.assert_close(score, detector.score(logits, feats), rtol=0, atol=0)


def test_a_traced_graph():
    model, x = made(ResNet)
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(call(fastood.attach(graph), x), truth(model, x))
    torch.testing.assert_close(graph(x), model(x))


def test_threads_share_one():
    model, x = made(ResNet, 64)
    attached = fastood.attach(model, detector=fitted(model, x, method="energy"))
    parts = x.split(8) * 2
    with torch.no_grad():
        expected = [truth(model, part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda part: call(attached, part), parts))
    for one, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(one[:2], wanted)

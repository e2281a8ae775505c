"""attach splits a classifier where its logits are made, or says why it cannot."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from classifiers import (
    IMAGES,
    TEXTS,
    BiT,
    C,
    D,
    Distilled,
    Llama,
    MobileNet,
    PoolLast,
    ResNet,
    call,
    images,
    made,
    truth,
)
from torch import nn

import fastood


@pytest.mark.parametrize("form", IMAGES + TEXTS)
def test_the_models_own_logits_and_features(form):
    model, inputs = made(form)
    logits, feats = call(fastood.attach(model), inputs)
    expected_logits, expected_feats = truth(model, inputs)
    assert feats.shape == (6, D)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feats, expected_feats, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", IMAGES + TEXTS)
def test_the_model_stays_as_it_was(form):
    model, inputs = made(form)
    modules, state, before = dict(model.named_modules()), copy.deepcopy(model.state_dict()), call(model, inputs)
    attributes = {name: dict(m.__dict__) for name, m in modules.items()}
    attached = fastood.attach(model, example=inputs)
    call(attached, inputs)
    assert dict(model.named_modules()) == modules
    for name, m in modules.items():
        assert m.__dict__.keys() == attributes[name].keys()
        assert all(m.__dict__[k] is x for k, x in attributes[name].items())
        assert not m._forward_hooks
        assert not m._forward_pre_hooks
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name])
    after = call(model, inputs)
    if form in TEXTS:
        before, after = before.logits, after.logits
    assert torch.equal(after, before)
    assert {id(p) for p in attached.parameters()} == {id(p) for p in model.parameters()}
    assert {id(b) for b in attached.buffers()} == {id(b) for b in model.buffers()}
    assert len(attached.state_dict()) == len(state)


def test_parameters_and_buffers_stay_shared():
    model, x = made(ResNet)
    attached = fastood.attach(model, example=x)
    model.double()  # which puts another tensor in a buffer's place
    assert call(attached, x.double())[0].dtype == torch.float64
    torch.testing.assert_close(call(attached, x.double()), truth(model, x.double()))
    model.load_state_dict({name: y * 1.5 for name, y in model.state_dict().items()})
    torch.testing.assert_close(call(attached, x.double()), truth(model, x.double()))


def test_gradients_reach_the_model():
    model, x = made(ResNet)
    attached = fastood.attach(model, example=x)
    logits, feats = attached(x)
    (logits.sum() + feats.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


class Capped(ResNet):
    def forward(self, x):
        return 30 * torch.tanh(super().forward(x) / 30)


class Softmaxed(ResNet):
    def forward(self, x):
        return F.log_softmax(super().forward(x), 1)


class Rectified(ResNet):
    """Every logit of the first batch is above 0, where a ReLU does nothing."""

    def forward(self, x):
        return super().forward(x).relu()


class Body(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.features(x)


class Functional(ResNet):
    def forward(self, x):
        return F.linear(self.features(x), self.fc.weight, self.fc.bias)


class Unused(ResNet):
    """The head that is called is another."""

    def __init__(self):
        super().__init__()
        self.inner = [nn.Linear(D, C)]

    def forward(self, x):
        return self.inner[0](self.features(x))


class Twice(ResNet):
    def forward(self, x):
        return self.fc(self.features(x)) + self.fc(self.features(x.flip(-1)))


class PerToken(ResNet):
    def forward(self, x):
        return self.fc(self.body(x).flatten(2).mT)


class Pixels(PoolLast):
    def forward(self, x):
        return self.classifier(self.body(x))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Capped, "a soft cap"),
        (Softmaxed, "a softmax"),
        (Rectified, "not linear"),
        (Functional, "does not run without it .*weight"),
        (Unused, r"does not take feats|head\(feats\) is"),
        (Twice, "called more than once"),
        (PerToken, r"got shape \[6, 16, 5\].*per token"),
        (Pixels, r"got shape \[6, 5, 4, 4\].*per token or pixel"),
    ],
)
@pytest.mark.parametrize("small", [False, True])
def test_what_cannot_be_split_is_refused(form, message, small):
    model = form().eval()
    if form is Rectified:
        nn.init.constant_(model.fc.bias, 50.0)
    if small:  # a cap of 30 is then far beyond what any tolerance sees
        with torch.no_grad():
            for name, p in model.named_parameters():
                if form is not Rectified or name != "fc.bias":
                    p.mul_(0.05)
            if hasattr(model, "shift"):
                model.shift.mul_(0.05)
    with pytest.raises(ValueError, match=message):
        fastood.attach(model, example=images())
    attached = fastood.attach(model)
    for _ in range(2):  # it is not forgotten
        with pytest.raises(ValueError, match=message):
            attached(images())


def test_a_softmax_that_is_refused_is_left_out_as_the_message_says():
    model, x = Softmaxed().eval(), images()
    with pytest.raises(ValueError, match=r"attach to the model without it, or to nn\.Sequential\(body, head\)"):
        fastood.attach(model, example=x)

    whole = nn.Sequential(Body(model), model.fc).eval()
    logits, _ = call(fastood.attach(whole, example=x), x)
    torch.testing.assert_close(logits.log_softmax(1), call(model, x))


def test_several_outputs_without_logits_are_named():
    class Detects(ResNet):
        def forward(self, x):
            return {"class": super().forward(x), "box": x}

    with pytest.raises(ValueError, match=r"got dict of 'class', 'box': pass a model that gives them alone"):
        fastood.attach(Detects().eval(), example=images())


def test_heads_that_are_not_found_or_two():
    class Net(ResNet):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 3))

    net = Net().eval()
    with pytest.raises(ValueError, match=r"more than one head.*'fc'.*'head\.2'"):
        fastood.attach(net)
    with pytest.raises(ValueError, match=r"more than one head.*'head'.*'head_dist'"):
        fastood.attach(Distilled().eval())
    with pytest.raises(ValueError, match=r"head='head' does not split the model"):  # neither is
        fastood.attach(Distilled().eval(), "head", example=images())
    with pytest.raises(ValueError, match="no Linear nor 1x1 Conv2d"):
        fastood.attach(nn.Sequential(nn.Conv2d(3, C, 3), nn.Flatten()))
    headless = BiT().eval()
    headless.head.fc = nn.Identity()
    with pytest.raises(ValueError, match=r"BiT\.get_classifier\(\) is an Identity"):
        fastood.attach(headless)
    with pytest.raises(ValueError, match=r"\(body, fc, head, \.\.\.\), got 'fcc': did you mean 'fc'\?"):
        fastood.attach(net, "fcc")
    x = images()
    torch.testing.assert_close(call(fastood.attach(net, "fc", example=x), x), truth(net, x))


def test_a_module_that_is_no_linear_layer_by_its_name():
    model, x = made(MobileNet)
    logits, feats = call(fastood.attach(model, "classifier", example=x), x)
    torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(feats, model.body(x).mean((2, 3)))


def test_two_parts_made_by_hand():
    model, x = made(Distilled)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([model.head, model.head_dist])

        def forward(self, f):
            return sum(head(f) for head in self.heads) / 2

    torch.testing.assert_close(call(fastood.attach(model, (Body(model), Mean())), x), truth(model, x))
    with pytest.raises(ValueError, match=r"head=\(body, head\) does not split the model: head\(feats\) is off"):
        fastood.attach(model, (Body(model), model.head), example=x)
    for pair in ((Body(model),), (Body(model), model.features)):
        with pytest.raises(TypeError, match="head must be a name or"):
            fastood.attach(model, pair)


def test_one_head_by_two_names():
    class Net(ResNet):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([self.fc])

        def forward(self, x):
            return self.heads[0](self.features(x))

    net, x = made(lambda: Net(), 6)[0], images()
    torch.testing.assert_close(call(fastood.attach(net, "fc"), x), truth(net, x))


def test_a_weight_shared_with_the_embeddings():
    model, inputs = made(Llama)
    model.score = nn.Linear(D, 20, bias=False)
    model.score.weight = model.embed.weight
    logits, feats = call(fastood.attach(model), inputs)
    torch.testing.assert_close(logits, call(model, inputs).logits)
    torch.testing.assert_close(feats, model.features(**inputs))


def test_wrapped_models_and_other_arguments():
    model = ResNet()
    with pytest.raises(TypeError, match=r"OptimizedModule: attach to model\._orig_mod"):
        fastood.attach(torch.compile(model))
    with pytest.raises(TypeError, match=r"DataParallel: attach to model\.module"):
        fastood.attach(nn.DataParallel(model))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        fastood.attach(call)
    with pytest.raises(TypeError, match="head must be a name or"):
        fastood.attach(model, model.fc)
    with pytest.raises(TypeError, match=r"detector must be a fastood\.Detector, got str"):
        fastood.attach(model, detector="energy")
    with pytest.raises(RuntimeError, match="not fitted"):
        fastood.attach(model, detector=fastood.Detector("energy"))


def test_the_first_call_is_in_eval_mode():
    model, x = made(MobileNet)
    attached = fastood.attach(model.train())
    with pytest.raises(ValueError, match="the attached module must be in eval mode: call its"):
        attached(x)
    model.eval()  # which does not reach the attached module itself
    with pytest.raises(ValueError, match="the attached module must be in eval mode: call its"):
        attached(x)
    attached.eval()(x)
    attached.train()(x)  # once the split is checked, it is a module like any
    assert model.body.norm.training


def test_rows_without_logits_check_nothing():
    model, x = made(Capped)
    attached = fastood.attach(model, example=x[:0])
    attached(torch.full_like(x, math.nan))
    with pytest.raises(ValueError, match="a soft cap"):
        attached(x)

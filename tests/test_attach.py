"""attach splits a classifier where its logits are made; collect and fit_loader run one over a loader."""

import copy
import io
import math
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastood
from fastood.files import FileError, open_rows

C, D = 5, 8


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Conv(nn.Module):
    """Images to maps; what all models of vision here begin with."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, D, 3), nn.BatchNorm2d(D)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class ResNet(nn.Module):
    """torchvision's and timm's form, with a parameter and a buffer of the model's own."""

    def __init__(self, bias=True):
        super().__init__()
        self.body, self.fc = Conv(), nn.Linear(D, C, bias=bias)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(0.5))

    def features(self, x):
        return self.scale * self.body(x).mean((2, 3)) + self.shift

    def forward(self, x):
        return self.fc(self.features(x))


class MobileNet(nn.Module):
    """torchvision's: the last layer at the end of a Sequential, with layers before it that are part of the body."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = (
            Conv(),
            nn.Sequential(nn.Linear(D, D), nn.Hardswish(), nn.Dropout(), nn.Linear(D, C)),
        )

    def features(self, x):
        return self.classifier[:3](self.body(x).mean((2, 3)))

    def forward(self, x):
        return self.classifier(self.body(x).mean((2, 3)))


class VisionTransformer(nn.Module):
    """torchvision's: heads.head, and a view of one token of many."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = Conv(), nn.Sequential()
        self.heads.add_module("head", nn.Linear(D, C))
        self.class_token = nn.Parameter(torch.randn(D))

    def features(self, x):
        tokens = self.body(x).flatten(2).mT
        return torch.cat([tokens[:, :1] + self.class_token, tokens], 1)[:, 0]

    def forward(self, x):
        return self.heads(self.features(x))


class ClassifierHead(nn.Module):
    """timm's."""

    def __init__(self, conv):
        super().__init__()
        self.fc = nn.Conv2d(D, C, 1) if conv else nn.Linear(D, C)
        self.conv = conv

    def pooled(self, x):
        return x.mean((2, 3), keepdim=self.conv)

    def forward(self, x):
        return self.fc(self.pooled(x)).flatten(1)


class BiT(nn.Module):
    """timm's ResNetV2: a 1x1 convolution, and get_classifier. The linear layer registered last is not the head."""

    def __init__(self, conv=True):
        super().__init__()
        self.body, self.head = Conv(), ClassifierHead(conv)
        self.pretext = nn.Linear(D, 4)

    def get_classifier(self):
        return self.head.fc

    def features(self, x):
        return self.head.pooled(self.body(x)).flatten(1)

    def forward(self, x):
        return self.head(self.body(x))


class PoolLast(nn.Module):
    """A 1x1 convolution of the maps, and its mean: the head of the mean."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = Conv(), nn.Conv2d(D, C, 1)

    def features(self, x):
        return self.body(x).mean((2, 3))

    def forward(self, x):
        return self.classifier(self.body(x)).mean((2, 3), keepdim=True)


class Distilled(BiT):
    """timm's DeiT: the mean of two heads."""

    def __init__(self):
        super().__init__(conv=False)
        self.head, self.head_dist = nn.Linear(D, C), nn.Linear(D, C)

    def get_classifier(self):
        return self.head, self.head_dist

    def features(self, x):
        return self.body(x).mean((2, 3))

    def forward(self, x):
        f = self.features(x)
        return (self.head(f) + self.head_dist(f)) / 2


@dataclass
class Output:
    """Hugging Face's ModelOutput."""

    logits: torch.Tensor
    hidden_states: None = None


class Bert(nn.Module):
    """Hugging Face's: arguments by name, an object with .logits. RoBERTa's head is the last layer of a module."""

    def __init__(self, deep=False):
        super().__init__()
        self.embeddings, self.dropout = nn.Embedding(20, D), nn.Dropout()
        self.classifier = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, C)) if deep else nn.Linear(D, C)

    def features(self, input_ids, attention_mask):
        h = self.dropout((self.embeddings(input_ids) * attention_mask[..., None]).mean(1))
        return self.classifier[:2](h) if isinstance(self.classifier, nn.Sequential) else h

    def forward(self, input_ids, attention_mask):
        h = self.dropout((self.embeddings(input_ids) * attention_mask[..., None]).mean(1))
        return Output(logits=self.classifier(h))


class Llama(nn.Module):
    """Hugging Face's: the head is applied to every token, then the last token's row is taken."""

    def __init__(self):
        super().__init__()
        self.embed, self.score = nn.Embedding(20, D), nn.Linear(D, C, bias=False)

    def features(self, input_ids, attention_mask):
        return self.embed(input_ids)[torch.arange(len(input_ids)), attention_mask.sum(1) - 1]

    def forward(self, input_ids, attention_mask):
        logits = self.score(self.embed(input_ids))
        return Output(logits=logits[torch.arange(len(input_ids)), attention_mask.sum(1) - 1])


IMAGES = [ResNet, MobileNet, VisionTransformer, BiT, lambda: BiT(conv=False), PoolLast]
TEXTS = [Bert, lambda: Bert(deep=True), Llama]


def images(n=6):
    return torch.randn(n, 3, 6, 6)


def texts(n=6):
    mask = (torch.arange(7) < torch.randint(1, 8, (n, 1))).long()
    return {"input_ids": torch.randint(20, (n, 7)), "attention_mask": mask}


def made(form, n=6):
    """A model that has seen data, and inputs."""
    model, inputs = form(), texts(n) if form in TEXTS else images(n)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval(), inputs


def call(model, inputs):
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def truth(model, inputs):
    """Logits and feats as the model itself has them."""
    logits = call(model, inputs)
    with torch.no_grad():
        feats = model.features(**inputs) if isinstance(inputs, dict) else model.features(inputs)
    return (logits if isinstance(logits, torch.Tensor) else logits.logits).reshape(-1, C), feats


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

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.features(x)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([model.head, model.head_dist])

        def forward(self, f):
            return sum(head(f) for head in self.heads) / 2

    torch.testing.assert_close(call(fastood.attach(model, (Body(), Mean())), x), truth(model, x))
    with pytest.raises(ValueError, match=r"head=\(body, head\) does not split the model: head\(feats\) is off"):
        fastood.attach(model, (Body(), model.head), example=x)
    for pair in ((Body(),), (Body(), model.features)):
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


def fitted(model, inputs, **options):
    logits, feats = truth(model, inputs)
    return fastood.Detector(tpr=0.6, **options).fit(logits, feats)


OPTIONS = [
    {"method": "energy", "norm": 0.3},
    {"method": "msp", "norm": None, "per_class": True},
    {"method": "norm", "norm": 2, "per_class": True},
]


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
    with pytest.raises(Exception, match=r"not checked yet.*example=inputs"):
        torch.compile(attached, backend="eager", fullgraph=True)(x)
    with pytest.raises(RuntimeError, match=r"not checked yet.*example=inputs"):
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


# ---- OODHead


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


# ---- collect, fit_loader


def data(n=50, form=ResNet):
    model = form().eval()
    x, y = images(n), torch.randint(C, (n,))
    return model, x, y


@pytest.mark.parametrize("n", [1, 32, 50])
def test_collect_in_memory(n):
    model, x, y = data(n)
    got = fastood.collect(model, DataLoader(TensorDataset(x, y), batch_size=16))
    logits, feats = truth(model, x)
    torch.testing.assert_close(got.logits, logits)
    torch.testing.assert_close(got.feats, feats)
    assert torch.equal(got.labels, y)
    assert not any(t.is_inference() or t.requires_grad for t in got)


def test_collect_inputs_of_every_kind():
    model, x, y = data()
    expected = truth(model, x)
    for loader in (x.split(7), DataLoader(x, batch_size=7), DataLoader(TensorDataset(x), batch_size=7), iter([x])):
        got = fastood.collect(model, loader)
        assert got.labels is None
        torch.testing.assert_close(got[:2], expected)
    got = fastood.collect(model, [(x[:7], y[:7].tolist()), (x[7:], y[7:].numpy())])
    assert torch.equal(got.labels, y)
    bert, inputs = made(Bert)
    for extra in ({}, {"labels": y[:6]}, {"label": y[:6]}):
        got = fastood.collect(bert, [{**inputs, **extra}])
        torch.testing.assert_close(got[:2], truth(bert, inputs))
        assert (got.labels is None) == (not extra)
    assert torch.equal(fastood.collect(bert, [(inputs, y[:6])]).labels, y[:6])


def test_collect_with_what_attach_made():
    model, x, _ = data(40)
    expected = truth(model, x)
    attached = fastood.attach(model, detector=fitted(model, x, method="energy"), example=x)
    for made_of_it in (attached, nn.DataParallel(attached), torch.compile(attached, backend="eager")):
        torch.testing.assert_close(fastood.collect(made_of_it, x.split(9))[:2], expected)


def test_collect_keeps_no_view_and_no_memory_that_is_used_again():
    class Reusing(nn.Module):
        """As a compiled model does with CUDA graphs."""

        def __init__(self):
            super().__init__()
            self.fc, self.tokens = nn.Linear(D, C), torch.zeros(4, 100, D)

        def forward(self, x):
            self.tokens[:, 0] = x
            return self.fc(self.tokens[:, 0])

    model, x = Reusing().eval(), torch.randn(8, D)
    got = fastood.collect(model, x.split(4))
    assert torch.equal(got.feats, x)
    assert got.feats.untyped_storage().nbytes() == 8 * D * 4
    torch.testing.assert_close(got.logits, model.fc(x))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("labelled", [True, False])
def test_collect_to_a_file(tmp_path, suffix, dtype, labelled):
    model, x, y = data()
    model, x, path = model.to(dtype), x.to(dtype), tmp_path / f"val{suffix}"
    loader = DataLoader(TensorDataset(x, y) if labelled else x, batch_size=16)
    assert fastood.collect(model, loader, path) is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    expected = fastood.collect(model, loader)
    held = np.load(path) if suffix == ".npz" else {k: v.numpy() for k, v in load_file(path).items()}
    assert set(held) == {"logits", "feats", *["labels"] * labelled}
    for name in held:
        assert np.array_equal(held[name], getattr(expected, name).numpy())
        assert held[name].dtype == getattr(expected, name).numpy().dtype
    with open_rows(path, id_key="labels" if labelled else None) as rows:
        assert (rows.rows, rows.classes, rows.dim) == (50, C, D)
        for (logits, feats), ids in zip(rows.chunks(20), rows.ids(20), strict=True):
            assert len(logits) == len(feats)
            assert not labelled or len(ids) == len(logits)


def test_bfloat16_to_a_file(tmp_path):
    model, x, y = data()
    loader = [(x.bfloat16(), y.to(torch.uint8))]
    fastood.collect(model.bfloat16(), loader, tmp_path / "a.safetensors")
    held, expected = load_file(tmp_path / "a.safetensors"), fastood.collect(model, loader)
    assert held["labels"].dtype == torch.uint8
    for name in held:
        assert torch.equal(held[name], getattr(expected, name))
    with pytest.raises(FileError, match=r"numpy has no torch\.bfloat16"):
        fastood.collect(model, loader, tmp_path / "a.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"])
def test_fp8_to_a_file(tmp_path, kind):
    model, x, y = data()
    labels = y.to(getattr(torch, f"float8_{kind}"))
    fastood.collect(model, [(x, labels)], tmp_path / "a.safetensors")
    held = load_file(tmp_path / "a.safetensors")["labels"]
    assert held.dtype == labels.dtype
    assert torch.equal(held.float(), labels.float())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    model, x, y = data()

    def broken():
        yield x, y
        raise OSError("disk")

    path = tmp_path / "val.npz"
    with pytest.raises(OSError, match="disk"):
        fastood.collect(model, broken(), path)
    with pytest.raises(ValueError, match=r"logits must be torch\.float32 \[n, 108\] in every batch"):
        fastood.collect(fastood.attach(nn.Flatten(), (nn.Flatten(), nn.Identity())).eval(), [x, x[..., :3]], path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileError, match=r"unknown extension '\.npy'; known are \.npz, \.safetensors"):
        fastood.collect(model, [x], tmp_path / "val.npy")


def test_what_collect_refuses():
    model, x, y = data()
    with pytest.raises(ValueError, match="model must be in eval mode: call its eval"):
        fastood.collect(ResNet(), [x])
    half = ResNet().eval()
    half.body.norm.train()
    with pytest.raises(ValueError, match=r"eval mode, but its part .*norm' is not"):
        fastood.collect(half, [x])
    with pytest.raises(ValueError, match="at least one batch, got none"):
        fastood.collect(model, [])
    with pytest.raises(TypeError, match=r"inputs or \(inputs, labels\), got a tuple of 3"):
        fastood.collect(model, [(x, y, y)])
    with pytest.raises(ValueError, match=r"labels must be \[50\], one per row, got shape \[7\]"):
        fastood.collect(model, [(x, y[:7])])
    with pytest.raises(ValueError, match="labels with every batch or with none"):
        fastood.collect(model, [(x, y), x])
    with pytest.raises(TypeError, match="progress must be True or False"):
        fastood.collect(model, [x], progress=3)


class Endless(IterableDataset):
    """It does not know its length."""

    def __iter__(self):
        return iter(images(12))


def test_progress_on_a_terminal_alone(monkeypatch, capsys):
    model, x, _ = data()
    fastood.collect(model, x.split(7))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for loader in (x.split(7), DataLoader(Endless(), batch_size=5)):
        fastood.collect(model, loader)
        out, err = capsys.readouterr()
        assert not out
        assert "batches" in err
        fastood.collect(model, loader, progress=False)
        assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("fastood._collect.find_spec", lambda name: None)
    fastood.collect(model, x.split(7))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("options", OPTIONS)
def test_fit_loader_is_fit(options):
    model, x, y = data()
    detector = fastood.Detector(tpr=0.6, **options)
    detector.partial_fit(torch.randn(30, 3), torch.randn(30, 4))  # of before, to be forgotten
    assert detector.fit_loader(model, DataLoader(TensorDataset(x, y), batch_size=16)) is detector
    expected = fastood.Detector(tpr=0.6, **options).fit(*truth(model, x))
    assert detector.rows == 50
    torch.testing.assert_close(torch.as_tensor(detector.threshold), torch.as_tensor(expected.threshold))
    with pytest.raises(ValueError, match="takes at least 99 in-distribution rows, got 50"):
        fastood.Detector(tpr=0.99).fit_loader(model, x.split(16))


def test_fit_loader_holds_one_batch():
    model, _, _ = data()
    alive = SimpleNamespace(now=0, most=0)

    def batches():
        for _ in range(20):
            x = images(4)
            alive.now += 1
            alive.most = max(alive.most, alive.now)
            weakref.finalize(x, lambda: setattr(alive, "now", alive.now - 1))
            yield x
            del x

    fastood.Detector().fit_loader(model, batches())
    assert alive.most <= 2

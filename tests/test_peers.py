"""fastood among the detectors of other libraries: pytorch-ood's own, and a stand-in of OpenOOD's base class."""

import importlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastood
from fastood.peers import pytorch_ood

C, D = 10, 32


def network():
    """A classifier of rows [N, 8] that is sure of some and unsure of others, but never to within 1e-7."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, D), nn.ReLU(), nn.Linear(D, C)).eval()
    with torch.no_grad():
        model[-1].weight.mul_(4)
    return model


def rows(n):
    """In-distribution rows and those that are not, with labels: negative for the latter."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 8, generator=g)
    y = torch.randint(C, (n,), generator=g)
    y[::2] = -1
    x[::2] *= 0.7
    return x, y


def blocks():
    """The code of docs/peers.md."""
    page = (Path(__file__).parent.parent / "docs" / "peers.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


@pytest.fixture(scope="module")
def library():
    """pytorch-ood without its packages' __init__: they import torchvision, which none of what is used here needs."""
    if find_spec("pytorch_ood") is None:
        pytest.skip("needs pytorch-ood: pip install --no-deps pytorch-ood==0.4.0")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pytorch_ood", "pytorch_ood.detector", "pytorch_ood.utils"):
            spec = find_spec(name)
            bare = ModuleType(name)
            bare.__path__ = list(spec.submodule_search_locations)
            patch.setitem(sys.modules, name, bare)
        bare.__dict__.update(vars(importlib.import_module("pytorch_ood.utils.utils")))  # which detectors import from it
        yield lambda module: importlib.import_module(f"pytorch_ood.{module}")
        for name in [name for name in sys.modules if name.partition(".")[0] == "pytorch_ood"]:
            patch.delitem(sys.modules, name)
        fastood.peers._peer.cache_clear()


PEERS = {
    "msp": "detector.softmax.MaxSoftmax",
    "energy": "detector.energy.EnergyBased",
    "neg_entropy": "detector.entropy.Entropy",
    "max_logit": "detector.maxlogit.MaxLogit",
}


@pytest.mark.parametrize("method", PEERS)
def test_ranks_as_theirs(library, method):
    model, (x, y) = network(), rows(4000)
    module, _, name = PEERS[method].rpartition(".")
    theirs = getattr(library(module), name)(model)
    ours = pytorch_ood(fastood.Detector(method, norm=None), model)
    assert isinstance(ours, library("api").LogitsDetector)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
        logits = model(x)
    auroc = [roc_auc_score(y < 0, peer.predict_logits(logits)) for peer in (ours, theirs)]
    assert auroc[0] == pytest.approx(auroc[1], abs=1e-6)
    assert auroc[0] > 0.55  # the sign is theirs
    pixels = logits.reshape(10, 20, 20, C).movedim(-1, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours.predict_logits(pixels), theirs.predict_logits(pixels), rtol=1e-5, atol=1e-6)


def two_sets():
    """Training rows and new ones of a network: feats, logits, labels, and the head that makes logits of feats.

    The features are positive, so that no two are equal and a largest one is the same for both.
    """
    g = torch.Generator().manual_seed(0)
    head = nn.Linear(D, C)
    head.weight.data, head.bias.data = torch.randn(C, D, generator=g), torch.randn(C, generator=g)
    sets = []
    for n in (600, 300):
        y = torch.randint(C, (n,), generator=g)
        h = (head.weight.data[y] + torch.randn(n, D, generator=g)).relu() + 0.1 * torch.rand(n, D, generator=g)
        sets.append((h, head(h).detach(), y))
    return *sets, head


def of_maps(detector):
    return lambda h, z: detector.predict_feature_maps(h[:, :, None, None])


def of_features(detector, *fit):
    detector.fit_features(*fit)
    return lambda h, z: detector.predict_features(h)


def of_logits(detector, z, y):
    detector.fit_logits(z, y)
    return lambda h, z: detector.predict_logits(z)


def flat(head):
    return lambda x: head(x.flatten(1))


# name -> their score of (feats, logits), out of (library, training set, head); our parameters; ours out of theirs.
SUCCESSORS = {
    "scale": (lambda lib, t, f: of_maps(lib("detector.scale").SCALE(None, flat(f), 0.85)), {}, None),
    "lts": (lambda lib, t, f: of_features_alone(lib("detector.lts").LTS(None, f)), {}, None),
    "ash_p": (lambda lib, t, f: of_maps(lib("detector.ash").ASH(None, flat(f), "ash-p", 0.6)), {}, None),
    "ash_b": (lambda lib, t, f: of_maps(lib("detector.ash").ASH(None, flat(f), "ash-b", 0.65)), {}, None),
    "ash_s": (lambda lib, t, f: of_maps(lib("detector.ash").ASH(None, flat(f), "ash-s", 0.9)), {}, None),
    "react": (lambda lib, t, f: of_maps(reacted(lib, t, f)), {}, None),
    "nci": (lambda lib, t, f: of_features(lib("detector.nci").NCI(None, f, 0.01), t[0]), {"alpha": 0.01}, None),
    "fdbd": (lambda lib, t, f: of_features(lib("detector.fdbd").fDBD(None, f), t[0]), {}, None),
    "she": (lambda lib, t, f: of_features(lib("detector.she").SHE(None, f), t[0], t[2]), {}, None),
    "kl_matching": (lambda lib, t, f: of_logits(lib("detector.klmatching").KLMatching(None), t[1], t[2]), {}, None),
    # Theirs is half the distance by the sum of squares, not their mean, without shrinkage but for 1e-6.
    "mahalanobis": (
        lambda lib, t, f: of_features(lib("detector.mahalanobis").Mahalanobis(None), t[0], t[2]),
        {"shrinkage": 0},
        lambda theirs, n: 2 * n * theirs,
    ),
    "relative_mahalanobis": (
        lambda lib, t, f: of_features(lib("detector.rmd").RMD(None), t[0], t[2]),
        {"shrinkage": 0},
        lambda theirs, n: n * theirs,
    ),
    "vim": (
        lambda lib, t, f: of_features(lib("detector.vim").ViM(None, 12, f.weight, f.bias), t[0], t[2]),
        {"dim": 12},
        None,
    ),
    "knn": (lambda lib, t, f: of_features(lib("detector.knn").KNN(None, 20), t[0], t[2]), {"k": 20}, None),
    "nnguide": (lambda lib, t, f: of_features(lib("detector.nnguide").NNGuide(None, f, 5), t[0], t[2]), {"k": 5}, None),
}


def of_features_alone(detector):
    return lambda h, z: detector.predict_features(h)


def reacted(library, train, head):
    """Theirs by our threshold, which is within 2^-11 of theirs: that is kept as counts, theirs as all activations."""
    ours = fastood.Fitted("react", head=head).fit(None, train[0]).state["clip"]
    detector = library("detector.react").ReAct(lambda x: x, flat(head), percentile=0.9)
    detector.fit_feature_maps(train[0][:, :, None, None], train[2])
    assert float(ours) == pytest.approx(detector.threshold, rel=2**-11)
    detector.threshold = float(ours)
    return detector


@torch.no_grad()
@pytest.mark.parametrize("method", SUCCESSORS)
def test_successors_as_theirs(library, method):
    train, (h, z, _), head = two_sets()
    theirs, params, turned = SUCCESSORS[method]
    expected = theirs(library, train, head)(h, z).double()
    if turned:
        expected = turned(expected, len(train[0]))
    entry = fastood.SUCCESSORS[method]
    ours = fastood.Fitted(method, head=head if entry.head else None, **params)
    if entry.fitted_on:
        ours.fit(train[1], train[0], train[2])
    got = ours.score(z, h).double()
    torch.testing.assert_close(-got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().mean()))


def test_every_successor_of_theirs_is_compared():
    theirs_lacks = {"dml", "rg", "class_cosine"}
    assert SUCCESSORS.keys() | theirs_lacks == fastood.SUCCESSORS.keys()


def test_theirs_is_the_interface(library):
    model, (x, y) = network(), rows(400)
    detector = fastood.Detector("energy", norm=0.3)
    peer = pytorch_ood(detector, fastood.attach(model))
    logits, feats = fastood.attach(model)(x)
    torch.testing.assert_close(peer(x), -fastood.score(logits, feats, norm=0.3).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(peer.predict_logits(logits.detach(), feats.detach()), peer(x), rtol=0, atol=0)
    assert not peer(x).requires_grad
    loader = DataLoader(list(zip(x, y, strict=True)), batch_size=64)
    assert peer.fit(loader) is peer
    assert detector.rows == 0
    assert peer.to("cpu").device == torch.device("cpu")
    metrics = library("metrics").OODMetrics()
    for batch, labels in loader:
        metrics.update(peer(batch), labels)
    assert float(metrics.compute()["AUROC"]) == pytest.approx(roc_auc_score(y < 0, peer(x)), abs=1e-6)
    with pytest.raises(library("api").ModelNotSetException):
        pytorch_ood(detector)(x)


def test_the_page_runs(library, capsys):
    (block,) = (b for b in blocks() if "pytorch_ood" in b)
    x, y = rows(400)
    loader = DataLoader(list(zip(x, y, strict=True)), 64)
    exec(compile(block, "peers.md", "exec"), {"model": network(), "loader": loader})
    assert "AUROC" in capsys.readouterr().out


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(TypeError, match=r"detector must be a fastood\.Detector, got str"):
        pytorch_ood("energy")
    for name in ("pytorch_ood", "pytorch_ood.api"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(fastood.peers, "_peer", fastood.peers._peer.__wrapped__)
    with pytest.raises(RuntimeError, match="pytorch_ood is needed: pip install pytorch-ood"):
        pytorch_ood(fastood.Detector("energy"))


# ---- OpenOOD


class BasePostprocessor:
    """What an evaluator of OpenOOD 1.5 calls: `inference` collects predictions, confidences and labels of a loader."""

    def __init__(self, config):
        self.config = config

    def inference(self, net, data_loader, progress=True):
        predicted, confidence, labels = [], [], []
        for batch in data_loader:
            pred, conf = self.postprocess(net, batch["data"])
            predicted.append(pred.cpu())
            confidence.append(conf.cpu())
            labels.append(batch["label"])
        return [torch.cat(x).numpy() for x in (predicted, confidence, labels)]


class Evaluator:
    def __init__(self, net, loaders, postprocessor):
        assert isinstance(postprocessor, BasePostprocessor)
        assert not postprocessor.APS_mode
        postprocessor.setup(net, loaders["id"], loaders["ood"])
        self.net, self.loaders, self.postprocessor = net.eval(), loaders, postprocessor

    def eval_ood(self):
        inside = self.postprocessor.inference(self.net, self.loaders["id"]["test"])
        outside = self.postprocessor.inference(self.net, self.loaders["ood"]["far"])
        confidence = np.concatenate([inside[1], outside[1]])
        known = np.arange(len(confidence)) < len(inside[1])
        return {"AUROC": roc_auc_score(known, confidence), "ACC": (inside[0] == inside[2]).mean()}


class Images(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"data": self.x[i], "label": self.y[i], "image_name": f"{i}.png"}


def test_the_pages_openood_postprocessor_runs(monkeypatch):
    definition, use = (b for b in blocks() if "openood" in b)
    package, postprocessors = ModuleType("openood"), ModuleType("openood.postprocessors")
    postprocessors.BasePostprocessor = BasePostprocessor
    evaluation_api = ModuleType("openood.evaluation_api")
    evaluation_api.Evaluator = lambda net, id_name, postprocessor: Evaluator(net, loaders, postprocessor)
    for module in (package, postprocessors, evaluation_api):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    model, (x, y) = network(), rows(1200)
    with torch.no_grad():
        label = torch.where(y < 0, y, model(x).argmax(1))
    known, others = Images(x[1::2], label[1::2]), Images(x[::2], label[::2])
    loaders = {
        "id": {"val": DataLoader(Images(x[1::2] + 0.1, label[1::2]), 50), "test": DataLoader(known, 50)},
        "ood": {"far": DataLoader(others, 50)},
    }
    names = {"net": model.train()}
    exec(compile(definition, "peers.md", "exec"), names)
    exec(compile(use, "peers.md", "exec"), names)
    logits, feats = fastood.attach(model.eval())(x)
    expected = roc_auc_score(y >= 0, fastood.score(logits, feats, norm=0.3).detach())
    assert names["metrics"]["AUROC"] == pytest.approx(expected, abs=1e-6)
    assert names["metrics"]["AUROC"] > 0.55
    assert names["metrics"]["ACC"] == 1
    assert names["postprocessor"].detector.rows == 600

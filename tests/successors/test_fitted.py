"""Fits that merge, in any order; labels that are not there; what is refused."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from six_classes import C, D, N, fitted, rows

import fastood
from fastood import SUCCESSORS, Fitted


@pytest.mark.parametrize("name", [name for name, x in SUCCESSORS.items() if x.fitted_on])
@given(data=st.data())
@settings(max_examples=5)
def test_however_rows_are_split_and_ordered(name, data):
    z, h, y, head = rows()
    whole = fitted(name)
    order = np.array(data.draw(st.permutations(range(N))))
    cuts = sorted(data.draw(st.lists(st.integers(0, N), max_size=4)))
    shards = []
    for part in np.split(order, cuts):
        shard = Fitted(name, head=head if SUCCESSORS[name].head else None)
        for some in np.array_split(part, 2):
            shard.partial_fit(z[some], h[some], y[some])
        shards.append(shard)
    merged = shards.pop(data.draw(st.integers(0, len(shards) - 1)))
    for shard in shards:
        merged.merge(shard)
    assert merged.rows == N
    new = rows(1)
    np.testing.assert_allclose(merged.score(*new[:2]), whole.score(*new[:2]), rtol=1e-9, atol=1e-9)


def test_scores_of_both_kinds_from_one_call():
    z, h, _, head = rows()
    made = fitted("knn", k=7)
    found = fastood.scores(z, h, ["scale", "energy", made, "gen"], norm=None, head=head, percentile=0.5, M=3)
    assert list(found) == ["scale", "energy", "knn", "gen"]
    np.testing.assert_array_equal(found["scale"], fastood.score(z, h, "scale", head=head, percentile=0.5))
    np.testing.assert_array_equal(found["knn"], made.score(z, h))
    np.testing.assert_array_equal(found["gen"], fastood.score(z, h, "gen", M=3))
    with pytest.raises(TypeError, match="percentil: no such"):
        fastood.scores(z, h, ["scale"], head=head, percentil=0.5)
    volume = z.reshape(4, 60, C), h.reshape(4, 60, D)
    stacked = fastood.scores(*volume, ["scale", "msp"], head=head, dim=-1)
    assert {name: x.shape for name, x in stacked.items()} == {"scale": (4, 60), "msp": (4, 60)}


@pytest.mark.parametrize(
    ("labels", "error"),
    [(torch.tensor(3), ValueError), (np.array(3), ValueError), (3, TypeError), ([0] * N, TypeError)],
)
def test_labels_that_are_no_vector(labels, error):
    for made in (Fitted("mahalanobis"), fastood.Detector("mahalanobis")):
        with pytest.raises(error, match=r"^labels must be"):
            made.fit(None, rows()[1], labels)


def test_classes_without_rows_are_left_out():
    z, h, y, _ = rows()
    some = y != 2
    by_label = Fitted("mahalanobis").fit(z[some], h[some], y[some])
    renamed = np.array([0, 1, -1, 2, 3, 4])[y[some]]
    same = Fitted("mahalanobis").fit(None, h[some], renamed)
    np.testing.assert_allclose(by_label.score(None, h), same.score(None, h), rtol=1e-9)
    she = Fitted("she").fit(z[some], h[some], y[some])
    np.testing.assert_array_equal(np.isnan(she.score(z, h)), z.argmax(1) == 2)


def test_labels_without_logits_name_their_classes_as_they_come():
    _, h, y, _ = rows()
    order = np.argsort(y)
    streamed = Fitted("class_cosine")
    for part in np.array_split(order, 7):  # later batches have more classes
        streamed.partial_fit(None, h[part], y[part])
    np.testing.assert_allclose(streamed.score(None, h), fitted("class_cosine").score(None, h), rtol=1e-12)
    with pytest.raises(ValueError, match="logits must be given to fit mahalanobis where there are no labels"):
        Fitted("mahalanobis").fit(None, h)


def test_no_rows_and_none_that_is_right():
    z, h, y, _ = rows()
    made = Fitted("mahalanobis").partial_fit(z[:0], h[:0], y[:0])
    assert made.needs_fit
    assert made.partial_fit(z, h, y).merge(Fitted("mahalanobis")).rows == N
    np.testing.assert_array_equal(made.score(None, h), fitted("mahalanobis").score(None, h))
    wrong = (z.argmax(1) + 1) % C
    assert np.isnan(Fitted("she").fit(z, h, wrong).score(z, h)).all()


@pytest.mark.parametrize("merging", [False, True])
def test_rows_that_come_after_a_score_count(merging):
    _, h, y, _ = rows()
    made = Fitted("mahalanobis").fit(None, h[:100], y[:100])
    made.score(None, h)
    if merging:
        made.merge(Fitted("mahalanobis").partial_fit(None, h[100:], y[100:]))
    else:
        made.partial_fit(None, h[100:], y[100:])
    np.testing.assert_allclose(made.score(None, h), fitted("mahalanobis").score(None, h), rtol=1e-9)


def test_a_bank_is_no_view_of_what_it_was_fitted_on():
    z, h, _, head = rows()
    made, x = Fitted("vim", head=head), torch.from_numpy(h[:100].copy())
    made.partial_fit(z[:100], x.numpy())
    x.zero_()
    made.partial_fit(z[100:], h[100:])
    np.testing.assert_allclose(made.score(z, h), fitted("vim").score(z, h), rtol=1e-9)


def test_features_that_a_fit_has_no_use_for_may_be_nan():
    z, h, _, _ = rows()
    made = Fitted("kl_matching").fit(z, np.full_like(h, np.nan))
    np.testing.assert_array_equal(made.score(z), fitted("kl_matching").score(z))


def test_what_is_refused():
    z, h, _, head = rows()
    linear = torch.nn.Linear(D, C)

    def refused(match, *args, error=ValueError, **options):
        with pytest.raises(error, match=match):
            fastood.score(*args, **options)

    refused("head must be given: scale = energy of r", z, h, "scale")
    refused("feats must be given: scale", z, None, "scale", head=head)
    refused("logits must be given: scale", None, h, "scale", head=head)
    refused("mahalanobis is not fitted", z, h, "mahalanobis", error=RuntimeError)
    refused("did you mean 'scale'", z, h, "scal")
    refused("norm: scale takes none", z, h, "scale", head=head, norm=2)
    refused("log: scale takes none", z, h, "scale", head=head, log=True)
    refused("bias: scale takes none", z, h, "scale", head=head, bias=True)
    refused("oriented must be True or False", z, h, "scale", head=head, oriented=3, error=TypeError)
    refused("percentile must be a number from 0 to 1, got 1.5", z, h, "scale", head=head, percentile=1.5)
    refused("gamma: no such parameter of scale", z, h, "scale", head=head, gamma=1, error=TypeError)
    refused("logits must have the 6 classes of scale", z[:, :5], h, "scale", head=head)
    refused("feats must have the 24 features of dml", z, h[:, :5], "dml", head=head)
    refused("at least one feature", z, h[:, :0], "scale", head=head)
    refused("head must be a Linear", z, h, "scale", head=torch.nn.Conv2d(D, C, 3), error=TypeError)
    refused("head must be a Linear", z, h, "scale", head="fc", error=TypeError)
    with warnings.catch_warnings(action="ignore"):  # torch will drop them
        quantised = torch.ao.nn.quantized.dynamic.Linear(D, C)
    refused(r"got torch\.ao\.nn\.quantized\.dynamic\.\S*Linear$", z, h, "scale", head=quantised, error=TypeError)
    refused(r"head: bias must be \[6\]", z, h, "scale", head=(head[0], head[1][:3]))
    refused("must not be given with a fastood.Fitted", z, h, fitted("scale"), head=head)
    refused("temperature must be that of method, 1, got 2", z, h, fitted("scale"), temperature=2.0)
    with pytest.raises(ValueError, match="SCORES here, got 'scale'"):
        fastood.sweep(z, h, ["scale"])
    for bad, error, match in (
        ({"k": 0}, ValueError, "k must be a finite number >= 1"),
        ({"k": 5.0}, TypeError, "k must be a whole number"),
    ):
        with pytest.raises(error, match=match):
            Fitted("knn", **bad)
    with pytest.raises(ValueError, match="dim must be below the 24 features, got 24"):
        fitted("vim", dim=24)
    with pytest.raises(ValueError, match="shrinkage must be 'oas' or a number from 0 to 1"):
        Fitted("mahalanobis", shrinkage="lw")
    with pytest.raises(ValueError, match="scale needs no fit"):
        Fitted("scale", head=linear).fit(z, h)
    with pytest.raises(ValueError, match="feats must be given to fit nci"):
        Fitted("nci", head=linear).fit(z)
    spoiled = h.copy()
    spoiled[5, 3] = np.nan
    with pytest.raises(ValueError, match=r"1 of 240 rows hold NaN, infinite features, or logits .* row 5"):
        Fitted("knn").fit(z, spoiled)
    a = Fitted("knn").fit(z, h)
    for other, match in (
        (Fitted("knn", k=3).fit(z, h), "params"),
        (Fitted("knn").fit(z[:, :3], h[:, :5]), "dim=24|classes=6"),
    ):
        with pytest.raises(ValueError, match=match):
            a.merge(other)
    with pytest.raises(ValueError, match="the same head, its weight differs"):
        fitted("nci").merge(fitted("nci", head=linear))
    with pytest.raises(ValueError, match="got the same one"):
        a.merge(a)
    with pytest.raises(TypeError, match="other must be a fastood"):
        a.merge(3)


class Adapted(torch.nn.Linear):
    def forward(self, h):
        return super().forward(h) + h[:, : self.out_features]


class Cosine(torch.nn.Linear):
    def forward(self, h):
        return torch.nn.functional.linear(h / h.norm(dim=1, keepdim=True), self.weight, self.bias)


class Plain(torch.nn.Module):
    """A head of another library's, which is what its weight and bias are."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias, self.layer = layer.weight, layer.bias, layer

    def forward(self, h):
        return self.layer(h)


@pytest.mark.parametrize("kind", [Adapted, Cosine])
def test_a_head_that_does_more_than_its_weight_says_is_refused(kind):
    with pytest.raises(ValueError, match=f"head must be a linear layer, but {kind.__name__} gives something else"):
        Fitted("react", head=kind(D, C))


def test_heads_of_other_libraries():
    z, h, y = map(torch.as_tensor, rows()[:3])
    layer = torch.nn.Linear(D, C).to(h.dtype)
    expected = Fitted("react", head=layer).fit(z, h, y)
    convolution = torch.nn.utils.skip_init(torch.nn.Conv2d, D, C, 1).to(h.dtype)
    convolution.weight, convolution.bias = torch.nn.Parameter(layer.weight.detach()[..., None, None]), layer.bias
    for head in (Plain(layer), Plain(convolution), torch.compile(layer)):
        assert torch.equal(Fitted("react", head=head).fit(z, h, y).score(z, h), expected.score(z, h))
    odd = Plain(layer)
    odd.layer = torch.nn.Linear(D + 1, C)
    with pytest.raises(TypeError, match=r"but Plain does not take feats \[1, D\]"):
        Fitted("react", head=odd)


class Packed(torch.Tensor):
    """As torchao has its weights: few operations, and one that gives the numbers."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "norm" in function.__name__:
            raise NotImplementedError("Packed has no norm")
        return super().__torch_function__(function, types, args, kwargs or {})

    def dequantize(self):
        return self.as_subclass(torch.Tensor)


def test_a_quantised_weight_that_has_no_norm():
    z, h = map(torch.as_tensor, rows()[:2])
    layer, packed = torch.nn.Linear(D, C), torch.nn.Linear(D, C)
    del packed.weight
    packed.weight = layer.weight.detach().as_subclass(Packed)
    packed.bias = layer.bias
    assert torch.equal(fastood.score(z, h, "dml", head=packed), fastood.score(z, h, "dml", head=layer))

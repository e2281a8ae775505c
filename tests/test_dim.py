"""Segmentation and ensembles: scores and decisions of what has its classes along any dimension."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastood
from fastood._inputs import rows_along


def truths(x, dim):
    """Of float64: energy, MSP and sum p log p along `dim`, as one would write them."""
    log_p = x.double().log_softmax(dim)
    return {
        "energy": x.double().logsumexp(dim),
        "msp": log_p.exp().amax(dim),
        "neg_entropy": (log_p.exp() * log_p).sum(dim),
    }


@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=4),
    C=st.integers(1, 7),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_every_position_is_a_row(shape, C, data, dtype):
    dim = data.draw(st.integers(-len(shape) - 1, len(shape)), "dim")
    place = dim % (len(shape) + 1)
    order = data.draw(st.permutations(range(len(shape) + 1)), "strides")
    whole = [*shape[:place], C, *shape[place:]]
    x = torch.randn([whole[i] for i in order]).permute([order.index(i) for i in range(len(whole))]).to(dtype)
    assert list(x.shape) == whole
    for name, truth in truths(x, dim).items():
        got = fastood.score(x, method=name, dim=dim)
        assert got.shape == truth.shape
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
        if dtype != torch.bfloat16:
            as_numpy = fastood.score(x.numpy(), method=name, dim=dim)
            assert isinstance(as_numpy, np.ndarray)
            np.testing.assert_array_equal(as_numpy, got.numpy())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pixels_with_features(memory_format):
    logits = torch.randn(3, 19, 6, 8).contiguous(memory_format=memory_format)
    feats = torch.randn(3, 32, 6, 8).relu().contiguous(memory_format=memory_format)
    got = fastood.score(logits, feats, "energy", norm=0.3, dim=1)
    truth = logits.double().logsumexp(1) * feats.double().pow(0.3).sum(1).pow(1 / 0.3)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)
    every = fastood.scores(logits, feats, ["energy", "gradnorm"], norm=0.3, dim=1)
    torch.testing.assert_close(every["energy"], got, rtol=0, atol=0)
    assert every["gradnorm"].shape == (3, 6, 8)
    assert fastood.score(None, feats, "norm", norm=2, dim=1).shape == (3, 6, 8)
    torch.testing.assert_close(
        fastood.score(None, feats, "norm", norm=2, dim=1).double(), feats.double().norm(dim=1), rtol=1e-6, atol=1e-6
    )


def test_what_lies_pixel_by_pixel_is_not_copied():
    last = torch.randn(3, 19, 6, 8).contiguous(memory_format=torch.channels_last)
    single = torch.randn(1, 19, 6, 8)
    members = torch.randn(5, 12, 19)
    for x, dim in ((last, 1), (single, 1), (members, -1)):
        (rows, none), _ = rows_along(dim, logits=x, feats=None)
        assert rows.data_ptr() == x.data_ptr()
        assert none is None
    (rows, _), shape = rows_along(1, logits=last.numpy(), feats=None)
    assert np.shares_memory(rows, last.numpy())
    assert shape == (3, 6, 8)


def test_ensembles():
    members = 5 * torch.randn(4, 50, 10)
    feats = torch.randn(4, 50, 32)
    mean_of_scores = fastood.score(members, feats, norm=1, dim=-1).mean(0)
    truth = (members.double().logsumexp(-1) * feats.double().abs().sum(-1)).mean(0)
    torch.testing.assert_close(mean_of_scores.double(), truth, rtol=1e-5, atol=1e-5)
    # Those of the mean prediction, as the docstring has it.
    logits = members.log_softmax(-1).logsumexp(0)
    p = members.double().softmax(-1).mean(0)
    torch.testing.assert_close(fastood.score(logits, method="msp").double(), p.amax(-1), rtol=1e-5, atol=0)
    negative_entropy = (p * p.log()).sum(-1)
    torch.testing.assert_close(
        fastood.score(logits, method="neg_entropy").double(), negative_entropy, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(fastood.score(logits), torch.full([50], math.log(4)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_class", [False, True])
def test_a_detector_of_pixels(per_class):
    torch.manual_seed(0)  # of which energies stay above 0
    logits, labels = 5 * torch.randn(4, 7, 10, 12), torch.randint(7, (4, 10, 12))
    feats = torch.rand(4, 16, 10, 12)
    of_rows, of_pixels = (fastood.Detector("energy", norm=1, tpr=0.8, per_class=per_class) for _ in range(2))
    f, h = (x.movedim(1, -1).flatten(0, -2).contiguous() for x in (logits, feats))
    for y in (None, labels):
        of_rows.fit(f, h, None if y is None else y.flatten())
        of_pixels.fit(logits, feats, y, dim=1)
        assert of_rows.rows == of_pixels.rows
        torch.testing.assert_close(of_pixels.threshold, of_rows.threshold, rtol=0, atol=0)
    for name in ("score", "accept", "p_value"):
        got, wanted = getattr(of_pixels, name)(logits, feats, dim=1), getattr(of_rows, name)(f, h)
        torch.testing.assert_close(got, wanted.reshape(4, 10, 12), rtol=0, atol=0)
    assert 0.5 < of_pixels.accept(logits, feats, dim=1).double().mean() < 0.95
    with pytest.raises(ValueError, match=r"labels must be \[480\], one class per row, got shape \[4, 12, 10\]"):
        of_pixels.fit(logits, feats, labels.mT, dim=1)


def test_compiled():
    logits = torch.randn(2, 5, 4, 3)
    compiled = torch.compile(lambda x: fastood.score(x, method="msp", dim=1), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), fastood.score(logits, method="msp", dim=1))


@pytest.mark.filterwarnings("ignore")  # torch's own, in its compiler
def test_compiled_once_for_any_batch():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(f, h):
        return fastood.score(f, h, norm=0.3, dim=1)

    compiled = torch.compile(call, backend=keep, fullgraph=True, dynamic=True)
    for n in range(2, 13):  # torch gives up after 8 compilations
        f, h = torch.randn(n, 7, 4, n + 1), torch.randn(n, 9, 4, n + 1)
        torch.testing.assert_close(compiled(f, h), call(f, h))
    assert len(graphs) == 1
    with pytest.raises(ValueError, match=r"feats must have the positions of logits, \[5, 4, 5\], got \[5, 4, 6\]"):
        torch.compile(call, backend="eager", dynamic=True)(torch.randn(5, 7, 4, 5), torch.randn(5, 9, 4, 6))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_any_batch(strict):
    class Pixels(torch.nn.Module):
        def forward(self, f, h):
            return fastood.score(f, h, "tv", norm=2, dim=1)

    rows = {0: torch.export.Dim("n")}
    inputs = torch.randn(3, 7, 4, 5), torch.randn(3, 9, 4, 5)
    program = torch.export.export(Pixels(), inputs, dynamic_shapes={"f": rows, "h": rows}, strict=strict)
    for n in (2, 6):
        f, h = torch.randn(n, 7, 4, 5), torch.randn(n, 9, 4, 5)
        torch.testing.assert_close(program.module()(f, h), Pixels()(f, h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3), None, 2), ValueError, r"dim must be a dimension of logits, got dim=2 for shape \[2, 3\]"),
        ((torch.zeros(2, 3), None, -3), ValueError, "dim must be a dimension of logits"),
        ((torch.zeros(2, 3), None, True), TypeError, "dim must be a whole number, got True"),
        ((torch.zeros(2, 3), None, 1.0), TypeError, r"dim must be a whole number, got 1\.0"),
        ((None, None, 1), TypeError, "logits must be a torch tensor or a numpy array, got None"),
        (([[1.0]], None, 1), TypeError, "logits must be a torch tensor or a numpy array, got list"),
        ((torch.zeros(2, 3, dtype=torch.int64), None, 1), TypeError, r"logits must be float16.*got torch\.int64"),
        ((torch.zeros(2, 0, 4), None, 1), ValueError, "logits must have at least one class"),
        (
            (torch.zeros(2, 3, 8, 8), torch.zeros(2, 16, 4, 4), 1),
            ValueError,
            r"feats must have the positions of logits, \[2, 8, 8\], got \[2, 4, 4\]",
        ),
    ],
)
def test_mistakes(arguments, error, message):
    logits, feats, dim = arguments
    with pytest.raises(error, match=message):
        fastood.score(logits, feats, dim=dim)
    with pytest.raises(error, match=message):
        fastood.scores(logits, feats, ["energy"], dim=dim)


def test_every_option_reaches_the_rows():
    """Whatever score takes, it takes along a dimension too."""
    other = {"norm": 2, "temperature": 2.0, "bias": True, "log": True, "oriented": False, "backend": "reference"}
    keywords = {p.name for p in inspect.signature(fastood.score).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keywords == {*other, "dim", "head"}
    logits, feats = torch.randn(2, 6, 5) + 9, torch.rand(2, 8, 5)
    f, h = (x.movedim(1, -1).flatten(0, 1) for x in (logits, feats))
    head = torch.randn(6, 8), torch.randn(6)
    assert torch.equal(
        fastood.score(logits, feats, "scale", dim=1, head=head).flatten(), fastood.score(f, h, "scale", head=head)
    )
    for name, x in {**other, "M": 2}.items():
        method = "gen" if name == "M" else "exgrad" if name == "oriented" else "energy"
        got = fastood.score(logits, feats, method, dim=1, **{name: x})
        plain = fastood.score(f, h, method, **{name: x})
        torch.testing.assert_close(got.flatten(), plain, rtol=0, atol=0)
        if name != "backend":
            assert not torch.equal(plain, fastood.score(f, h, method))
        asked = fastood.scores(logits, feats, [method], dim=1, **{name: x})
        torch.testing.assert_close(asked[method].flatten(), plain, rtol=1e-6, atol=0)

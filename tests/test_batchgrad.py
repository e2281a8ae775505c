"""BatchGrad, Equation 6: against autograd and long double, its anchors, its files."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import truth
from by_autograd import head
from hypothesis import given
from hypothesis import strategies as st
from samples import DTYPES, KINDS, rows_of

import fastood


@pytest.mark.parametrize(("T", "bias"), [(1.0, False), (2.5, True)])
def test_batchgrad_is_equation_6(T, bias):
    """E_Y || grad_W ( log p_Y(x) + sum_i log p_{y_i}(x_i) ) ||_1, all by autograd."""
    h, W, f = head(5)
    anchors, _, _ = head(6, n=8)
    anchor_labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    b = torch.linspace(-1, 1, len(W), dtype=torch.float64)

    expected = []
    for row, p in zip(h, torch.softmax((f + b * bias) / T, -1), strict=True):
        total = 0.0
        for y in range(len(W)):
            Wb = torch.cat([W, b[:, None]], 1).requires_grad_() if bias else W.clone().requires_grad_()
            one = torch.ones(1, dtype=torch.float64)

            def log_p(x, label, Wb=Wb, one=one):
                return torch.log_softmax(Wb @ (torch.cat([x, one]) if bias else x) / T, -1)[label]

            loss = log_p(row, y) + sum(log_p(a, label) for a, label in zip(anchors, anchor_labels, strict=True))
            (g,) = torch.autograd.grad(loss, Wb)
            total += p[y] * g.abs().sum()
        expected.append(total)

    G = fastood.anchor_gradient(anchors @ W.T + b * bias, anchors, anchor_labels, temperature=T, bias=bias)
    got = fastood.batchgrad(f + b * bias, h, G, temperature=T, bias=bias, oriented=False)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-11, atol=0)
    assert torch.equal(fastood.batchgrad(f + b * bias, h, G, temperature=T, bias=bias), -got)


def test_batchgrad_in_tiles(monkeypatch):
    """Every branch of the tiling, and rows that do not depend on their batch."""
    g = torch.Generator().manual_seed(0)
    f, h, G = torch.randn(6, 11, generator=g), torch.randn(6, 9, generator=g), torch.randn(11, 9, generator=g)
    whole = fastood.batchgrad(f, h, G)
    for tile in (1, 9, 20, 99, 250):
        monkeypatch.setattr("fastood.kernels.reference._TILE", tile)
        got = fastood.batchgrad(f, h, G)
        torch.testing.assert_close(got, whole)
        assert torch.equal(fastood.batchgrad(f[2:3], h[2:3], G), got[2:3])


def test_the_gradient_of_a_sure_anchor_is_not_0():
    """1 - p of its label to relative precision, as p of the other one."""
    f, h = torch.tensor([[80.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0], [0.0]])
    G = fastood.anchor_gradient(f, h, torch.tensor([0, 1]))
    assert G[:, 0].tolist() == pytest.approx([2 * math.exp(-80), -2 * math.exp(-80)], rel=1e-5, abs=0)


def test_batchgrad_where_features_over_T_overflow():
    f, h = torch.tensor([[1e3, 0.0]]), torch.full((1, 2), 1e30)
    assert fastood.batchgrad(f, h, torch.ones(2, 2), temperature=1e-10, oriented=False).item() == 4


def test_batchgrad_arguments():
    f, h, y = torch.randn(4, 3), torch.randn(4, 2), torch.arange(4) % 3
    G = fastood.anchor_gradient(f, h, y)
    assert fastood.batchgrad(f[:0], h[:0], G).shape == (0,)
    assert isinstance(fastood.batchgrad(f.numpy(), h.numpy(), G.numpy()), np.ndarray)
    assert np.array_equal(fastood.anchor_gradient(f.numpy(), h.numpy(), y.numpy()), G.numpy())
    with pytest.raises(ValueError, match=r"feats must have 1 columns, for G is \[3, 2\], got \[4, 2\]"):
        fastood.batchgrad(f, h, G, bias=True)
    with pytest.raises(ValueError, match="G must be on the device of logits, cpu, got meta"):
        fastood.BatchGrad(G.to("meta")).score(f, h)
    with pytest.raises(ValueError, match=r"labels must be classes 0..2, got 0..3"):
        fastood.anchor_gradient(f, h, torch.arange(4))
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float32"):
        fastood.anchor_gradient(f, h, y.float())
    with pytest.raises(TypeError, match="labels must be a torch tensor or a numpy array of integers, got NoneType"):
        fastood.anchor_gradient(f, h, None)
    with pytest.raises(ValueError, match=r"labels must be \[4\], one class per row, got shape \[3\]"):
        fastood.anchor_gradient(f, h, y[:3])
    for bad in (math.nan, math.inf, -math.inf):
        G[1, 1] = bad
        with pytest.raises(ValueError, match="G must be finite, got 1 of 6 numbers NaN or infinite; anchors"):
            fastood.BatchGrad(G)
    for shape, bias in (((0, 2), False), ((3, 0), True)):
        with pytest.raises(ValueError, match=r"G must be \[C, D.*\].*, of at least one class, got shape \[[03], "):
            fastood.BatchGrad(torch.zeros(shape), bias=bias)


LABELS = np.array([0, 2, 1, 1])


SAME_LABELS = {
    **{name: LABELS.astype(name) for name in ("uint8", "int8", "uint16", "uint32", "uint64", ">i4", "<u2", ">u8")},
    "reversed": LABELS[::-1].copy()[::-1],
    "every second one": LABELS.repeat(2)[::2],
    "field of a structured array": np.array([(0.5, y) for y in LABELS], "f4, i2")["f1"],
    "read-only": np.frombuffer(LABELS.tobytes(), LABELS.dtype),
    **{str(x): torch.from_numpy(LABELS).to(x) for x in (torch.int32, torch.uint8, torch.uint16, torch.uint64)},
}


@pytest.mark.parametrize("kind", SAME_LABELS)
@pytest.mark.parametrize("default_device", ["cpu", "meta"])
def test_labels_of_anchors_are_integers_of_any_kind(kind, default_device):
    h, _, f = head(7, n=4, C=3)
    model = torch.nn.Linear(7, 3, bias=False).double().eval()
    labels, y = SAME_LABELS[kind], torch.from_numpy(LABELS)
    G = fastood.anchor_gradient(f, h, y)
    torch.set_default_device(default_device)
    try:
        assert torch.equal(fastood.anchor_gradient(f, h, labels), G)
        assert np.array_equal(fastood.anchor_gradient(f.numpy(), h.numpy(), labels), G.numpy())
        detector = fastood.BatchGrad.from_anchors(f.numpy(), h.numpy(), labels)
        assert np.array_equal(detector.score(f.numpy(), h.numpy()), fastood.batchgrad(f, h, G).numpy())
        deep = fastood.deep_batchgrad(model, h, h, labels)
        assert torch.equal(deep, fastood.deep_batchgrad(model, h, h, y))
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (np.ma.masked_array(LABELS, [0, 0, 0, 1]), TypeError, "labels must not be a masked array: leave those rows"),
        (LABELS.astype(float), TypeError, "labels must be integers, got numpy float64"),
        (LABELS > 0, TypeError, "labels must be integers, got numpy bool"),
        (torch.from_numpy(LABELS > 0), TypeError, r"labels must be integers, got torch\.bool"),
        (LABELS.astype(object), TypeError, "labels must be integers, got numpy object"),
        (LABELS.astype("uint64") - 1, ValueError, r"labels must be classes 0\.\.2, got -1\.\.1"),
        (LABELS[:, None], ValueError, r"labels must be \[4\], one class per row, got shape \[4, 1\]"),
        (LABELS.tolist(), TypeError, "labels must be a torch tensor or a numpy array of integers, got list"),
    ],
)
def test_bad_labels_of_anchors(labels, error, words):
    h, _, f = head(7, n=4, C=3)
    with pytest.raises(error, match=words):
        fastood.anchor_gradient(f, h, labels)
    with pytest.raises(error, match=words.replace("labels", "anchor_labels")):
        fastood.deep_batchgrad(torch.nn.Linear(7, 3).double().eval(), h, h, labels)


def test_classes_without_an_anchor_are_said():
    h, _, f = head(7, n=4, C=5)
    for y in (torch.tensor([0, 0, 3, 3]), np.array([0, 0, 3, 3])):
        with pytest.warns(UserWarning, match="^labels: 3 of 5 classes have no anchor; .* one or more") as said:
            fastood.anchor_gradient(f, h, y)
        assert said[0].filename == __file__
        with pytest.warns(UserWarning, match=r"^anchor_labels: 3 of 5 classes have no anchor"):
            fastood.deep_batchgrad(torch.nn.Linear(7, 5).double().eval(), h, h, y)
    with pytest.warns(UserWarning, match="labels: 5 of 5 classes"):
        assert (fastood.anchor_gradient(f[:0], h[:0], y[:0]) == 0).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    N=st.sampled_from([1, 3, 40]),
    C=st.sampled_from([1, 2, 5, 16, 17, 130]),
    D=st.sampled_from([0, 1, 15, 16, 17, 100, 1030]),
    scale=st.sampled_from([0.1, 1.0, 10.0, 100.0]),
    T=st.sampled_from([1.0, 0.2, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    relu=st.booleans(),
    bias=st.booleans(),
)
def test_batchgrad_on_every_backend(backend, seed, N, C, D, scale, T, dtype, relu, bias):
    g = torch.Generator().manual_seed(seed)
    f, h = torch.randn(N, C, generator=g) * scale, torch.randn(N, D, generator=g)
    f, h = f.to(dtype), (h.relu() if relu else h).to(dtype)
    G = torch.randn(C, D + bias, generator=g) * 10 ** torch.randn(C, 1, generator=g)
    detector = fastood.BatchGrad(G, temperature=T, bias=bias)
    got = detector.score(f, h, oriented=False, backend=backend)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, allowed = truth.batchgrad(f, h, G, T, bias, truth.EPS[str(dtype).removeprefix("torch.")])
    truth.assert_close(got, expected, allowed, "BatchGrad")
    assert torch.equal(detector.score(f[-1:], h[-1:], oriented=False, backend=backend), got[-1:])


def test_batchgrad_of_rows_that_are_not_finite(backend):
    f, h, G = torch.randn(6, 20), torch.randn(6, 33), torch.randn(20, 33)
    f[0, 3], f[1, 3], f[2] = math.nan, math.inf, -math.inf
    f[3, 3], h[4, 5], f[5, 3], h[5, 5] = -math.inf, math.nan, -math.inf, math.inf
    got = fastood.BatchGrad(G).score(f, h, oriented=False, backend=backend)
    assert got[[0, 1, 2, 4]].isnan().all()
    assert got[3].isfinite()  # a masked class
    assert got[5] == math.inf
    confident = torch.tensor([[1e4, 0.0]])
    assert fastood.BatchGrad(torch.ones(2, 1)).score(confident, torch.tensor([[5.0]]), backend=backend).item() == -2


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_batchgrad_is_float64_where_one_input_is(backend, wide):
    """Its arithmetic, and not the result's type alone."""
    given = [torch.randn(5, 7) * 3, torch.randn(5, 9), torch.randn(7, 9)]
    given[wide] = given[wide].double()
    f, h, G = given
    got = fastood.BatchGrad(G).score(f, h, oriented=False, backend=backend)
    assert got.dtype == torch.float64
    truth.assert_close(got, *truth.batchgrad(f, h, G, 1.0, False, 2**-53))


@pytest.mark.parametrize("bias", [False, True])
def test_batchgrad_without_features(backend, bias):
    f = torch.tensor([[1.0, 2, 0], [1, math.nan, 0], [math.inf, 0, 0], [-math.inf] * 3])
    detector = fastood.BatchGrad(torch.zeros(3, int(bias)), bias=bias)
    got = detector.score(f, torch.empty(4, 0), oriented=False, backend=backend)
    assert got[0] > 0 if bias else got[0] == 0
    assert got[1:].isnan().all()


@pytest.mark.parametrize("T", [0.01, 1.0])
def test_batchgrad_of_features_whose_sums_overflow(backend, T):
    """Those of a class that has hardly any probability: what is left of them is well within float32."""
    f, h, G = torch.tensor([[0.0, -40, -45]]) * T, torch.full((1, 40), 3e38), torch.ones(3, 40)
    got = fastood.BatchGrad(G, temperature=T).score(f, h, oriented=False, backend=backend)
    expected, _ = truth.batchgrad(f, h, G, T, False, 2**-24)
    truth.assert_close(got, expected, (64 + 4 * 45) * 2**-24 * expected)


@given(
    seed=st.integers(0, 2**32 - 1),
    C=st.sampled_from([1, 2, 5, 17, 130]),
    D=st.sampled_from([1, 3, 40, 1030]),
    kind=st.sampled_from(KINDS),
    T=st.sampled_from([1e-10, 0.1, 1.0, 1e10, 1e-40]),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_batchgrad_is_infinite_where_a_feature_is(backend, seed, C, D, kind, T, bad, bias, dtype):
    g = torch.Generator().manual_seed(seed)
    f, h = rows_of(kind, g, 4, C).to(dtype), torch.randn(4, D, generator=g).to(dtype)
    detector = fastood.BatchGrad(torch.randn(C, D + bias, generator=g), temperature=T, bias=bias)
    good = detector.score(f, h, oriented=False, backend=backend)
    assert not good.isnan().any()
    h[1, seed % D], h[2, seed % D] = bad, bad
    h[2, -1], f[3, seed % C] = math.nan, math.nan
    got = detector.score(f, h, oriented=False, backend=backend)
    assert torch.equal(got[0], good[0])
    assert got[1].isnan() if math.isnan(bad) else got[1] == math.inf
    assert got[2:].isnan().all()
    h[1:] = bad
    assert detector.score(f, h, oriented=False, backend=backend)[1:].isnan().tolist() == [math.isnan(bad)] * 2 + [True]


def test_batchgrad_copies_and_pickles_after_use():
    f, h = torch.randn(2, 3), torch.randn(2, 4)
    detector = fastood.BatchGrad(torch.randn(3, 4))
    score = detector.score(f, h)
    for copied in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert torch.equal(copied.score(f, h), score)


def test_batchgrad_is_never_below_the_norm_of_its_constant(backend):
    """E_p[e_Y - p] = 0, so by Jensen's inequality; and equal to it where the sample adds nothing."""
    f, h, G = torch.randn(20, 30) * 3, torch.randn(20, 50), torch.randn(30, 50)
    detector = fastood.BatchGrad(G)
    least = G.double().abs().sum()
    assert (detector.score(f.double(), h, oriented=False, backend=backend) >= least * (1 - 1e-12)).all()
    nothing = detector.score(f.double(), torch.zeros_like(h), oriented=False, backend=backend)
    torch.testing.assert_close(nothing, least.expand(20))


def test_batchgrad_bits_do_not_depend_on_threads():
    before = torch.get_num_threads()
    f, h, detector = torch.randn(3, 1000), torch.randn(3, 300), fastood.BatchGrad(torch.randn(1000, 300))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(detector.score(f, h))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_batchgrad_keeps_a_constant_of_its_own():
    f, h, G = torch.randn(3, 4), torch.randn(3, 5), torch.randn(4, 5)
    detector = fastood.BatchGrad(G)
    before = detector.score(f, h)
    G.zero_()
    assert torch.equal(detector.score(f, h), before)
    torch.testing.assert_close(detector.score(f, h, backend="reference"), before)


def test_batchgrad_is_saved_and_loaded(tmp_path):
    f, h, y = torch.randn(8, 4), torch.randn(8, 3), torch.arange(8) % 4
    made = fastood.BatchGrad.from_anchors(f, h, y, temperature=0.1, bias=True)
    path = tmp_path / "anchors.safetensors"
    made.save(path)
    (tmp_path / "any file").touch()
    assert path.stat().st_mode == (tmp_path / "any file").stat().st_mode
    loaded = fastood.BatchGrad.load(path)
    assert repr(loaded) == repr(made)
    assert torch.equal(loaded.score(f, h), made.score(f, h))
    for name in ("anchors.pt", "anchors", "anchors.safetensors.gz"):
        with pytest.raises(ValueError, match=rf"path must end in .safetensors, .*, got '.*{name}'"):
            made.save(tmp_path / name)
    with pytest.raises(ValueError, match=r"new.anchors.safetensors: there is no folder .*new$"):
        made.save(tmp_path / "new" / "anchors.safetensors")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["anchors.safetensors", "any file"]
    with pytest.raises(FileNotFoundError, match="missing"):
        fastood.BatchGrad.load(tmp_path / "missing")
    for device in ["gpu", *([] if torch.cuda.is_available() else ["cuda", torch.device("cuda", 3)])]:
        with pytest.raises(ValueError, match=rf"^device must be one that torch can use here, got '{device}': "):
            fastood.BatchGrad.load(path, device=device)


GOOD = {"fastood": "BatchGrad", "temperature": "2.0", "bias": "0"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"G": torch.ones(2, 2)}, None, "its metadata lack bias, fastood, temperature"),
        ({"G": torch.ones(2, 2)}, {"fastood": "BatchGrad", "bias": "0"}, "its metadata lack temperature"),
        ({"G": torch.ones(2, 2)}, {**GOOD, "fastood": "Other"}, "its metadata are .*Other"),
        ({"G": torch.ones(2, 2)}, {**GOOD, "bias": "True"}, "its metadata are .*'bias': 'True'"),
        ({"G": torch.ones(2, 2)}, {**GOOD, "temperature": "nan"}, "temperature must be a finite number > 0, got nan"),
        ({"G": torch.ones(2, 2)}, {**GOOD, "temperature": "hot"}, "could not convert"),
        ({"H": torch.ones(2, 2)}, GOOD, "G"),
        ({"G": torch.ones(2)}, GOOD, "G must be 2-D"),
        ({"G": torch.ones(2, 0)}, {**GOOD, "bias": "1"}, r"G must be \[C, D \+ 1\] with bias"),
        ({"G": torch.ones(2, 2).int()}, GOOD, "G must be float16, .*got torch.int32"),
        ({"G": torch.full((2, 2), math.nan)}, GOOD, "G must be finite, got 4 of 4 numbers"),
    ],
)
def test_only_what_was_saved_is_loaded(tmp_path, tensors, metadata, words):
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "other.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"path must be a file that BatchGrad.save wrote, got '.*other.*': .*{words}"):
        fastood.BatchGrad.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("content", [b"", b"no tensors, but more than eight bytes"])
def test_what_holds_no_tensors_is_not_loaded(tmp_path, content):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=r"path must be a file that BatchGrad.save wrote, got '.*text'"):
        fastood.BatchGrad.load(tmp_path / "text")


def test_batchgrad_answers_in_the_kind_that_it_is_asked_in(backend, tmp_path):
    f, h, y = torch.randn(8, 4), torch.randn(8, 3), torch.arange(8) % 4
    from_tensors = fastood.BatchGrad.from_anchors(f, h, y)
    from_arrays = fastood.BatchGrad.from_anchors(f.numpy(), h.numpy(), y.numpy())
    expected = from_tensors.score(f, h, backend=backend)
    from_arrays.save(tmp_path / "G.safetensors")
    for detector in (from_tensors, from_arrays, fastood.BatchGrad.load(tmp_path / "G.safetensors")):
        for _ in range(2):  # the long way and the short one
            assert torch.equal(detector.score(f, h, backend=backend), expected)
            of_arrays = detector.score(f.numpy(), h.numpy(), backend=backend)
            assert isinstance(of_arrays, np.ndarray)
            assert np.array_equal(of_arrays, expected.numpy())
    assert torch.equal(fastood.batchgrad(f, h, from_arrays.anchors.G.numpy()), from_tensors.score(f, h))


def test_batchgrad_in_another_type_and_place():
    f, h, G = torch.randn(8, 4), torch.randn(8, 3), torch.randn(4, 4)
    detector = fastood.BatchGrad(G, temperature=0.5, bias=True)
    wanted = "BatchGrad(classes=4, features=3, temperature=0.5, bias=True, dtype=torch.float32, device='cpu')"
    assert repr(detector) == wanted
    double = detector.to(torch.float64)
    assert repr(double) == wanted.replace("float32", "float64")
    assert double.score(f, h).dtype == torch.float64
    torch.testing.assert_close(double.score(f, h).float(), detector.score(f, h))
    assert detector.to("meta").anchors.G.device.type == "meta"
    with pytest.raises(ValueError, match=r"G must be on the device of logits, cpu, got meta: BatchGrad\.to moves it"):
        detector.to("meta").score(f, h)
    with pytest.raises(TypeError, match=r"G must be float16, .*, got torch\.int32"):
        detector.to(torch.int32)

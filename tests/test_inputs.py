"""What is taken, and what is refused and how: numpy, FP8, strides, and arguments that are wrong."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastood

F = torch.tensor([[4.0, 0.0, 1.0], [0.2, 0.1, 0.0]])
H = torch.tensor([[3.0, -4.0], [1.0, 0.0]])


def test_numpy_in_numpy_out():
    f, h = F.numpy(), H.numpy()
    for got, same in [
        (fastood.score(f, h), fastood.score(F, H)),
        (fastood.sweep(f, h), fastood.sweep(F, H)),
        (fastood.norms(h, [1]), fastood.norms(H, [1])),
        (fastood.scores(f, methods=["tv"])["tv"], fastood.score(F, method="tv")),
        (fastood.row_stats(f)["lse"], fastood.row_stats(F)["lse"]),
        (fastood.row_stats(f)["log_one_minus_s2"], fastood.row_stats(F)["log_one_minus_s2"]),
        (fastood.gradient_norm(f, h), fastood.gradient_norm(F, H)),
    ]:
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.float32
        assert np.array_equal(got, same.numpy())
    assert fastood.score(f.astype(np.float64)).dtype == np.float64
    assert fastood.score(f.astype(np.float16)).dtype == np.float32


def test_numpy_arrays_of_every_layout(tmp_path):
    expected = fastood.score(F).numpy()
    np.save(tmp_path / "f.npy", F.numpy())
    read_only = np.load(tmp_path / "f.npy", mmap_mode="r")
    swapped = F.numpy().astype(">f4")
    odd = np.zeros((2, 3), dtype=[("x", "i1"), ("f", "<f4")])
    odd["f"] = F.numpy()
    for array in (
        read_only,
        swapped,
        F.numpy()[::-1][::-1],
        np.asfortranarray(F.numpy()),
        odd["f"],
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_allclose(fastood.score(array), expected, rtol=1e-6)
    assert (read_only == F.numpy()).all()


@pytest.mark.parametrize("fields", [[("x", "i1"), ("f", "<f4")], [("x", "i1"), ("f", "<f4"), ("y", "i1", 3)]])
def test_numpy_arrays_of_one_row_or_one_column(fields):
    """A stride along an axis of length 1 means nothing, and may be anything; nor need memory be aligned."""
    records = np.zeros((3, 4), dtype=fields)
    records["f"] = np.arange(12).reshape(3, 4)
    for array in (records["f"], np.arange(12, dtype=np.float32).reshape(3, 4)):
        for rows in (slice(1), slice(0, None, 2), slice(None)):
            for columns in (slice(1), slice(None)):
                part = array[rows, columns]
                for view in (part, part[::-1], part[:, ::-1], part[::-1, ::-1]):
                    expected = fastood.score(torch.from_numpy(view.copy()))
                    assert np.array_equal(fastood.score(view), expected.numpy())


@given(
    shape=st.sampled_from([(0, 3), (1, 1), (1, 3), (3, 1), (2, 3)]),
    steps=st.tuples(st.sampled_from([1, -1, 2, -2]), st.sampled_from([1, -1, 2, -2])),
    dtype=st.sampled_from(["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"]),
    padding=st.integers(0, 3),
    order=st.sampled_from("CF"),
    read_only=st.booleans(),
)
def test_numpy_strides_of_every_kind(shape, steps, dtype, padding, order, read_only):
    """Steps of either sign, of an axis of any length, in records of any width: what numpy holds is what is scored."""
    whole = tuple(2 * n for n in shape)
    fields = [("before", f"V{padding}"), ("f", dtype)] if padding else [("f", dtype)]
    records = np.zeros(whole, dtype=fields, order=order)
    records["f"] = np.random.default_rng(0).standard_normal(whole)
    f = records["f"][:: steps[0], :: steps[1]][: shape[0], : shape[1]]
    f.flags.writeable = not read_only
    plain = np.array(f, dtype=f.dtype.newbyteorder("="), order="C", copy=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(fastood.score(f), fastood.score(plain))
        assert np.array_equal(fastood.norms(f, [2]), fastood.norms(plain, [2]))


def test_inputs_are_left_as_they_were():
    f, h = torch.randn(5, 7), torch.randn(5, 3)
    before = f.clone(), h.clone()
    fastood.scores(f, h)
    fastood.sweep(f, h)
    fastood.gradient_norm(f, h, "predicted", expectation="outside")
    assert torch.equal(f, before[0])
    assert torch.equal(h, before[1])


def test_half_types_give_float32_of_the_upcast_input():
    for dtype in (torch.float16, torch.bfloat16):
        f, h = F.to(dtype), H.to(dtype)
        assert torch.equal(fastood.score(f, h), fastood.score(f.float(), h.float()))
        assert fastood.score(f, h.double()).dtype == torch.float64


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", FP8)
def test_every_number_of_fp8_is_read_as_it_is(dtype):
    """All 256 of them, by what their sign, exponent and mantissa say."""
    byte = np.arange(256)
    bits = 2 if "e5m2" in str(dtype) else 3
    no_zero = "uz" in str(dtype)
    exponent, mantissa = (byte & 127) >> bits, byte % 2**bits / 2**bits
    bias = 2 ** (6 - bits) - 1 + no_zero
    x = np.ldexp((exponent > 0) + mantissa, np.maximum(exponent, 1) - bias)
    if dtype is torch.float8_e4m3fn:
        x[byte & 127 == 127] = math.nan
    elif not no_zero:
        x[exponent == 31] = np.where(mantissa[exponent == 31] == 0, math.inf, math.nan)
    x[byte > 127] *= -1
    x[128] = math.nan if no_zero else 0
    got = fastood.row_stats(torch.arange(256, dtype=torch.uint8).view(dtype)[:, None], ["energy"])["energy"]
    np.testing.assert_array_equal(got, x.astype(np.float32))


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_gives_float32_of_the_same_numbers(dtype):
    f, h, q = (F * 3).to(dtype), H.to(dtype), torch.eye(*F.shape).to(dtype)
    wide, classes = [x.float() for x in (f, h, q)], torch.arange(len(F)) % F.shape[1]
    calls = {
        "score": lambda f, h, q: fastood.score(f, h, "exgrad"),
        "scores": lambda f, h, q: torch.stack([*fastood.scores(f, h).values()]),
        "scores of a wider type": lambda f, h, q: fastood.score(f, h.double()),
        "sweep": lambda f, h, q: fastood.sweep(f, h),
        "norms": lambda f, h, q: fastood.norms(h, [0.3, 2, math.inf]),
        "row_stats": lambda f, h, q: fastood.row_stats(f, ["tv"])["tv"],
        "gradient_norm": lambda f, h, q: fastood.gradient_norm(f, h, q, 2),
        "anchor_gradient": lambda f, h, q: fastood.anchor_gradient(f, h, classes),
        "BatchGrad": lambda f, h, q: fastood.BatchGrad(torch.ones(f.shape[1], h.shape[1])).score(f, h),
        "G": lambda f, h, q: fastood.batchgrad(f, h, torch.ones(f.shape[1], h.shape[1]).to(h.dtype)),
        "reference": lambda f, h, q: fastood.score(f, h, "gradnorm", backend="reference"),
        "strides": lambda f, h, q: fastood.score(f[::2, 1:], h[::2, ::2]),
        "columns": lambda f, h, q: fastood.score(f.T),
        "none": lambda f, h, q: fastood.score(f[:0], h[:0]),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*classes have no anchor")
        for name, call in calls.items():
            got, expected = call(f, h, q), call(*wide)
            assert got.dtype == expected.dtype, name
            assert torch.equal(got, expected), name
    for detector in (
        fastood.Detector(per_class=True, tpr=0.5),
        fastood.Detector("norm", norm=2, per_class=True, tpr=0.5),
    ):
        rows = f.view(torch.uint8).repeat(9, 1).view(dtype), h.view(torch.uint8).repeat(9, 1).view(dtype)
        labels = rows[0].float().argmax(1)
        assert torch.equal(detector.fit(*rows, labels).accept(f, h), detector.accept(*wide[:2]))


def test_fp8_grows_and_compiles():
    f, h = F.to(torch.float8_e5m2).requires_grad_(), H.to(torch.float8_e5m2)
    wide = f.detach().float().requires_grad_()
    for x in (f, wide):
        fastood.score(x, h).sum().backward()
    torch.testing.assert_close(f.grad.float(), wide.grad, rtol=2**-3, atol=2**-17)  # rounded to the type of f
    torch._dynamo.reset()
    compiled = torch.compile(fastood.score, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(f.detach(), h), fastood.score(f.detach(), h))


# ---- what is refused


class Frame:
    """A data frame, as far as errors go."""

    def to_numpy(self):
        return F.numpy()


class Table:
    """An Arrow table."""

    def __array__(self, dtype=None, copy=None):
        return F.numpy()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"logits": [[1.0, 2.0]]}, TypeError, "logits must be a torch tensor or a numpy array, got list"),
        ({"logits": None}, ValueError, "logits must be given: energy = T log"),
        ({"logits": F[0]}, ValueError, r"logits must be 2-D.*got shape \[3\]; a single row is logits\[None\]"),
        ({"logits": F[None]}, ValueError, r"logits must be 2-D.*got shape \[1, 2, 3\]"),
        ({"logits": F.long()}, TypeError, "logits must be float16.*got torch.int64"),
        ({"logits": F.to(torch.complex64)}, TypeError, "logits must be float16.*got torch.complex64"),
        ({"logits": F.abs().to(torch.float8_e8m0fnu)}, TypeError, "float64 or FP8 .*got torch.float8_e8m0fnu"),
        ({"logits": F.numpy().astype(int)}, TypeError, "logits must be float16.*got torch.int64"),
        ({"logits": F.numpy().astype(np.longdouble)}, TypeError, "logits must hold float16.*got numpy .*128"),
        ({"logits": F.numpy().astype(str)}, TypeError, "logits must hold float16.*got numpy <U"),
        ({"logits": F.to_sparse()}, TypeError, r"logits must be a dense tensor, got torch\.sparse_coo"),
        ({"logits": F[:, :0]}, ValueError, r"logits must have at least one class, got shape \[2, 0\]"),
        ({"feats": H[:1]}, ValueError, r"feats must have the 2 rows of logits, got shape \[1, 2\]"),
        ({"feats": H.numpy()}, TypeError, "logits is a torch tensor, feats is a numpy array"),
        ({"feats": H.to("meta")}, ValueError, "feats must be on the device of logits, cpu, got meta"),
        ({"feats": H.int()}, TypeError, "feats must be float16.*got torch.int32"),
        ({"feats": None, "norm": 1}, ValueError, "feats must be given for norm=1"),
        ({"feats": None, "method": "gradnorm"}, ValueError, "feats must be given: gradnorm = "),
        ({"logits": F[None, None]}, ValueError, r"logits.movedim\(1, -1\).flatten\(0, -2\)"),
        (
            {"logits": F.numpy()[None, None]},
            ValueError,
            r"np.moveaxis\(logits, 1, -1\).reshape\(-1, logits.shape\[1\]\)",
        ),
        ({"logits": Frame()}, TypeError, r"got Frame; logits.to_numpy\(\) is one"),
        ({"logits": Table()}, TypeError, r"got Table; np.asarray\(logits\) is one"),
        ({"feats": np.ma.masked_array(H.numpy())}, TypeError, r"feats must not be a masked array: .*filled\(\)"),
        ({"method": "enrgy"}, ValueError, "method must be one of 'msp', .*got 'enrgy': did you mean 'energy'?"),
        ({"method": "MSP"}, ValueError, "got 'MSP': did you mean 'msp'?"),
        ({"method": "nearest"}, ValueError, "got 'nearest'$"),
        ({"temprature": 2}, TypeError, "nor a parameter of energy: did you mean 'temperature'?"),
        ({"method": "gradnorm", "norm": 2}, ValueError, "norm: gradnorm = .* has a norm of its own, got norm=2"),
        ({"method": "norm", "norm": None}, ValueError, "norm must be an order r >= 0 for 'norm', got None"),
        ({"norm": -1}, ValueError, "norm must be a number >= 0, got -1.0"),
        ({"norm": math.nan}, ValueError, "norm must be a number >= 0, got nan"),
        ({"norm": "0.3"}, TypeError, "norm must be a number, None or 'auto', got '0.3'"),
        ({"norm": True}, TypeError, "norm must be a number, got bool"),
        ({"temperature": 0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": -2.0}, ValueError, "temperature must be a finite number > 0, got -2.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite number > 0, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be a finite number > 0, got inf"),
        ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
        ({"method": "neg_entropy", "log": True}, ValueError, "log: neg_entropy is never above 0"),
        ({"backend": "cuda"}, ValueError, r"backend \(or FASTOOD_BACKEND\) must be 'auto' or one of .*, got 'cuda'"),
        ({"gama": 0.1}, TypeError, "gama: no such argument, nor a parameter of energy$"),
        ({"gama": 0.1, "method": "gen"}, TypeError, "nor a parameter of gen: did you mean 'gamma'?"),
        ({"method": "gen", "gamma": 0}, ValueError, "gamma must be a finite number > 0, got 0.0"),
        ({"method": "gen", "M": 2.5}, ValueError, "M must be a whole number of classes, got 2.5"),
        ({"method": "gen", "M": 0}, ValueError, "M must be a finite number >= 1, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        fastood.score(**{"logits": F, "feats": H, **arguments})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fastood.sweep(F, H, v="energy"), TypeError, "v must be a list, got 'energy'"),
        (lambda: fastood.sweep(F, H, v=["gradnorm"]), ValueError, "v must name V terms"),
        (lambda: fastood.sweep(F, H, v=[]), ValueError, "v must not be empty"),
        (lambda: fastood.sweep(F, H, norms=[]), ValueError, "norms must not be empty"),
        (lambda: fastood.sweep(F, None), ValueError, "feats must be given for norm=0"),
        (lambda: fastood.scores(F, methods="msp"), TypeError, "methods must be a list, got 'msp'"),
        (lambda: fastood.scores(F, methods=5), TypeError, "methods must be a list, got 5"),
        (lambda: fastood.scores(F, methods=["x"]), ValueError, "methods must be one of 'msp'"),
        (lambda: fastood.scores(None, None), TypeError, "logits must be a torch tensor or a numpy array, got None"),
        (lambda: fastood.sweep(F, H, norms=0.3), TypeError, "norms must be a list, got 0.3"),
        (lambda: fastood.norms(H, 2), TypeError, "orders must be a list, got 2"),
        (lambda: fastood.row_stats(F, "msp"), TypeError, "stats must be a list, got 'msp'"),
        (lambda: fastood.row_stats(F, [5]), ValueError, "stats must be one of 'fmax'.*got 5"),
        (lambda: fastood.score(F, method=np.array(["msp"])), ValueError, "method must be one of 'msp'"),
        (
            lambda: fastood.gradient_norm(F, H, torch.tensor([1, 2])),
            ValueError,
            r"labels must be \[2, 3\], a distribution per row, got \[2\]; .*torch.*one_hot\(labels, 3\).float\(\)",
        ),
        (
            lambda: fastood.gradient_norm(F.numpy(), H.numpy(), np.array([1, 2])),
            ValueError,
            r"got \[2\]; of classes one-hot: np.eye\(3\)\[labels\]",
        ),
        (lambda: fastood.register("x"), TypeError, "score must be a fastood.Score, got str"),
        (lambda: fastood.score(np.ma.masked_array(F.numpy())), TypeError, "logits must not be a masked array"),
        (
            lambda: fastood.score(torch.nested.nested_tensor([F[0], F[1]], layout=torch.jagged)),
            TypeError,
            "logits must be a dense tensor, got",
        ),
        (lambda: fastood.norms(H, []), ValueError, "orders must not be empty"),
        (lambda: fastood.norms(H, [1, -2]), ValueError, "orders must be a number >= 0, got -2.0"),
        (lambda: fastood.norms(None, [1]), TypeError, "feats must be a torch tensor"),
        (lambda: fastood.row_stats(None), TypeError, "logits must be a torch tensor"),
        (lambda: fastood.row_stats(F, ["entropy"]), ValueError, "stats must be one of 'fmax', .*got 'entropy'"),
        (lambda: fastood.row_stats(F, ["power_sum"]), ValueError, r"asked for as \('power_sum', r\)"),
        (lambda: fastood.row_stats(F, [("power_sum", 0)]), ValueError, "r of power_sum must be a finite number > 0"),
        (lambda: fastood.row_stats(F, [("gen", 0.1)]), ValueError, r"asked for as \('gen', gamma, M\)"),
        (lambda: fastood.row_stats(F, [("tv", 0.5)]), ValueError, r"tv takes no parameters, got \('tv', 0.5\)"),
    ],
)
def test_bad_arguments_elsewhere(call, error, words):
    with pytest.raises(error, match=words):
        call()


OF_SCORE = ("temperature", "norm", "bias", "log", "oriented")


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (lambda **x: fastood.score(F, H, **x), OF_SCORE),
        (lambda **x: fastood.score(F, method="gen", **x), ("gamma", "M")),
        (lambda **x: fastood.scores(F, H, ["energy"], **x), OF_SCORE),
        (lambda **x: fastood.scores(F, methods=["gen"], **x), ("gamma", "M")),
        (lambda **x: fastood.sweep(F, H, **x), ("temperature", "bias", "log", "oriented")),
        (lambda norms: fastood.sweep(F, H, norms=[norms]), ("norms",)),
        (lambda **x: fastood.norms(H, [1], **x), ("bias", "log")),
        (lambda orders: fastood.norms(H, [orders]), ("orders",)),
        (lambda **x: fastood.gradient_norm(F, H, **x), ("temperature", "order", "power", "bias")),
    ],
)
def test_what_equals_a_good_argument_is_refused_after_it(call, arguments):
    """True == 1, and a call that was seen before is looked up by its arguments."""
    for name in arguments:
        pairs = [(True, 1), (False, 0.0)] if name in ("bias", "log", "oriented") else [(1, True), (1.0, True)]
        for good, bad in pairs:
            call(**{name: good})
            with pytest.raises(TypeError, match=f"{name} must be"):
                call(**{name: bad})


def test_what_errors_advise_works():
    y, maps = torch.tensor([1, 2]), torch.randn(2, 3, 4, 5)
    rows = maps.movedim(1, -1).flatten(0, -2)
    scored = fastood.score(rows).reshape(2, 4, 5)
    assert torch.equal(scored[:, 3, 2], fastood.score(maps[:, :, 3, 2].contiguous()))
    assert np.array_equal(np.moveaxis(maps.numpy(), 1, -1).reshape(-1, maps.shape[1]), rows)
    one_hot = torch.nn.functional.one_hot(y, 3).float()
    of_numpy = fastood.gradient_norm(F.numpy(), H.numpy(), np.eye(3)[y.numpy()])
    np.testing.assert_allclose(fastood.gradient_norm(F, H, one_hot), of_numpy, rtol=1e-6)

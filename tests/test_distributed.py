"""fastood.distributed on real processes, gloo's: against truth in long double, and the same bits on every rank.

A test sends a function of this file to the three of processes.py. The numbers are test_slices.py's, in one process.
"""

import functools
import math
import re
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
import truth

import fastood
from fastood.registry import SCORES

gloo = dist.is_available() and dist.is_gloo_available()
pytestmark = pytest.mark.skipif(not gloo, reason="needs torch.distributed with gloo")

MARGIN = fastood.Score(
    "margin",
    formula="T lse - max f",
    source="here",
    higher="out",
    stats=("energy", "fmax"),
    v=lambda s: s["energy"] - s["fmax"],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """See processes.started, whose processes know a score of one's own too."""
    with processes.started(tmp_path_factory.mktemp("ranks")) as call:
        call(register_margin, processes.RANKS)
        yield call


def register_margin(rank, group):
    fastood.register(MARGIN)


def same_on_all(results):
    """The result of the first rank, once it is that of all, to the bit."""
    first, *others = results
    for other in others:
        assert first.keys() == other.keys()
        for name, x in first.items():
            assert x.tobytes() == other[name].tobytes(), name
    return first


def mine(rank, group, x, sizes, dim=1):
    return x.split(list(sizes), dim)[rank]


def as_numpy(found):
    return {name: x.numpy() for name, x in found.items()}


# ---- against truth

SIZES = {2: [(5, 7), (12, 0), (1, 11)], 3: [(4, 4, 4), (0, 11, 1), (7, 0, 5)]}
SPLITS = [(ranks, sizes) for ranks, of_ranks in SIZES.items() for sizes in of_ranks]


def special_rows(dtype):
    """Rows of 12 logits: random, sure of a class in one slice or another, flat, masked in part, without a softmax."""
    torch.manual_seed(0)
    f = torch.randn(14, 12, dtype=torch.float64) * 3
    f[1, 0] += 60
    f[2, 11] += 80
    f[3] = 5
    f[4] = 1 + f[4] / 4096
    f[5, :6] = -math.inf
    f[6, 2:] = -math.inf
    f[7] = -math.inf
    f[8, 3], f[9, 11], f[10, 1] = math.nan, math.inf, math.nan
    f[11] += 1000
    f[12, 5] = f[12, 8] = 9
    return f.to(dtype)


def random_rows(seed, dtype):
    """Of any size, scale and mask."""
    random = np.random.default_rng(seed)
    C, N = random.integers(1, 60), random.integers(1, 6)
    f = random.standard_normal((N, C)) * 10 ** random.uniform(-4, 3, (N, 1)) + random.choice([0, 0, 100])
    f[random.random((N, C)) < random.choice([0, 0.3])] = -math.inf
    f[:, random.integers(C)] = random.choice([0, 30])
    sizes = np.diff([0, *sorted(random.integers(0, C + 1, 2)), C])
    return torch.tensor(f).to(dtype), tuple(map(int, sizes)), float(random.choice([1, 0.1, 50, 1e6]))


def all_stats(rank, group, f, sizes, T):
    stats = fastood.distributed.row_stats(mine(rank, group, f, sizes), group=group, temperature=T)
    return as_numpy(stats)


def assert_stats(found, f, T):
    eps = truth.EPS[str(f.dtype).removeprefix("torch.")]
    for name, got in found.items():
        assert got.dtype == (np.float64 if f.dtype == torch.float64 else np.float32)
        expected = truth.stat(name, f, T)
        if name == "lse":  # which truth.py has no infinity for
            expected = np.where(np.isnan(expected), truth.stat("energy", f, T), expected)
        truth.assert_close(got, expected, truth.tolerance(name, expected, f, T, eps), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("ranks", "sizes"), SPLITS, ids=str)
def test_special_rows(run, ranks, sizes, dtype):
    f = special_rows(dtype)
    for T in (1.0, 0.25, 1e5):
        assert_stats(same_on_all(run(all_stats, ranks, f, sizes, T)), f, T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_random_rows(run, seed, dtype):
    f, sizes, T = random_rows(seed, dtype)
    assert_stats(same_on_all(run(all_stats, 3, f, sizes, T)), f, T)


def all_scores(rank, group, f, h, sizes, options):
    x = mine(rank, group, f, sizes)
    each = {name: fastood.distributed.score(x, h, name, group=group, **options) for name in SCORES}
    together = fastood.distributed.scores(x, h, group=group, **options)
    for name, s in each.items():
        torch.testing.assert_close(s, together[name], rtol=0, atol=0, equal_nan=True, msg=name)
    return as_numpy(each)


@pytest.mark.parametrize(("ranks", "sizes"), [(2, (5, 7)), (3, (0, 11, 1))], ids=str)
@pytest.mark.parametrize("T", [1.0, 7.0])
def test_every_score(run, ranks, sizes, T):
    """Table 1 and V terms times a norm, one of one's own among them, as the formulas in the README say."""
    f, h = special_rows(torch.float32), torch.randn(14, 20, generator=torch.Generator().manual_seed(1))
    got = same_on_all(run(all_scores, ranks, f, h, sizes, {"temperature": T, "oriented": False}))
    s = {name: truth.stat(name, f, T) for name in ("energy", "fmax", "msp", "s2", "one_minus_s2", "tv", "plogp")}
    s |= {name: truth.stat(name, f, T) for name in ("sumlogp", "kl_uniform")}
    u = {r: truth.norm(h, r) for r in (0.3, 1, 2)}
    C, nan = 12, 0 * s["msp"]
    expected = {
        "energy": s["energy"] * u[0.3],
        "msp": s["msp"] * u[0.3],
        "varsum": s["s2"] * u[0.3],
        "tv": s["tv"] * u[0.3],
        "max_logit": s["fmax"] * u[0.3],
        "kl_uniform": s["kl_uniform"] * u[0.3],
        "margin": s["energy"] - s["fmax"],
        "neg_entropy": s["plogp"],
        "gen": -truth.gen(f, 0.1, 100, T),
        "norm": u[0.3],
        "gradnorm": 2 / T * u[1] * s["tv"],
        "exgrad": 2 / T * u[1] * s["one_minus_s2"],
        "eg_u_l1": 2 / T * u[1] * (C - 1) / C + nan,
        "eg_u_l2sq": (u[2] / T) ** 2 * (1 - 2 / truth.LD(C) + s["s2"]),
        "eg_p_l2sq": (u[2] / T) ** 2 * s["one_minus_s2"],
        "eg_p_logp_l2sq": (u[2] / T) ** 2 * ((1 + s["s2"]) * s["sumlogp"] - 2 * s["plogp"]),
        "norm_eg_p_l2sq": nan,
    }
    assert set(got) == set(expected)
    for name, value in expected.items():
        allowed = np.abs(value) * 600 * 2.0**-24
        if name == "margin":  # a difference
            allowed = 16 * 2.0**-24 * (np.abs(s["energy"]) + np.abs(s["fmax"]))
        truth.assert_close(got[name], value, allowed, name)


def some_logs(rank, group, f, h, sizes):
    x = mine(rank, group, f, sizes)
    found = fastood.distributed.scores(x, h, ["msp", "varsum", "exgrad", "eg_p_l2sq"], group=group, log=True)
    return as_numpy(found | {"gen": fastood.distributed.score(x, method="gen", group=group, gamma=0.5, M=3)})


def test_logarithms_and_parameters(run):
    f, h = special_rows(torch.float32), torch.ones(14, 20)
    got = same_on_all(run(some_logs, 2, f, h, (5, 7)))
    rest, log_h = truth.stat("log_one_minus_s2", f), np.log(truth.LD(20))
    with np.errstate(all="ignore"):
        expected = {
            "msp": truth.stat("log_msp", f) + log_h / truth.LD(0.3),
            "exgrad": -(rest + np.log(2 * truth.LD(20))),
            "eg_p_l2sq": -(rest + log_h),
            "gen": -truth.gen(f, 0.5, 3),
        }
    for name, value in expected.items():
        truth.assert_close(got[name], value, np.abs(value) * 400 * 2.0**-24, name)


def along_dim(rank, group, f, h, sizes):
    s = fastood.distributed.score(f.split(list(sizes), 1)[rank], h, "msp", group=group, dim=1)
    array = fastood.distributed.score(f.split(list(sizes), 1)[rank].numpy(), h.numpy(), "msp", group=group, dim=1)
    assert np.array_equal(s.numpy(), array)
    return {"msp": array}


def test_pixels_and_arrays(run):
    f, h = torch.randn(2, 5, 3, 4), torch.randn(2, 6, 3, 4)
    got = same_on_all(run(along_dim, 2, f, h, (2, 3)))["msp"]
    np.testing.assert_allclose(got, fastood.score(f, h, "msp", dim=1), rtol=1e-6)


def few_rows(rank, group):
    empty = fastood.distributed.scores(torch.zeros(0, 3), torch.zeros(0, 2), group=group)
    one = torch.zeros(2, int(rank == 1))  # one class in all
    return as_numpy(empty) | as_numpy({f"one {k}": x for k, x in fastood.distributed.scores(one, group=group).items()})


def test_no_rows_and_one_class(run):
    got = same_on_all(run(few_rows, 3))
    assert got["gradnorm"].shape == (0,)
    assert got["one msp"].tolist() == [1, 1]
    assert got["one tv"].tolist() == got["one kl_uniform"].tolist() == [0, 0]


# ---- a layer


def of_layer(rank, group, h, w, b, sizes, predict):
    x = mine(rank, group, w, sizes, 0)
    y = None if b is None else mine(rank, group, b, sizes, 0)
    kwargs = {"group": group, "norm": None}
    layer = functools.partial(fastood.distributed.score_linear, h, x, y, **kwargs)
    found = {m: layer(m) for m in ("energy", "msp", "tv", "varsum", "max_logit", "kl_uniform", "neg_entropy")}
    found["gradnorm"] = fastood.distributed.score_linear(h, x, y, "gradnorm", group=group)
    predicted = layer("energy", predict=True)
    assert torch.equal(predicted.score, found["energy"])
    return as_numpy(found | {"classes": predicted.classes, "probability": predicted.probability})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("ranks", "sizes"), SPLITS, ids=str)
def test_layer(run, ranks, sizes, dtype):
    """Where no product rounds, the contract of the logits."""
    random = torch.Generator().manual_seed(0)
    h = torch.randint(-3, 4, (9, 16), generator=random).to(dtype)
    w = (torch.randint(-3, 4, (12, 16), generator=random) / 4).to(dtype)
    b = torch.randint(-9, 10, (12,), generator=random).to(dtype) / 4 if sum(sizes[1:]) > 5 else None
    h[1], h[2] = 0, 64 * h[2]
    if b is not None:
        b[:5] = -math.inf  # a slice of (5, 7), and the class that has most of the features
    f = h.double() @ w.double().T + (0 if b is None else b.double())
    got = same_on_all(run(of_layer, ranks, h, w, b, sizes, True))
    eps = truth.EPS[str(dtype).removeprefix("torch.")]
    assert np.array_equal(got.pop("classes"), f.argmax(-1))
    expected = 2 * truth.norm(h, 1) * truth.stat("tv", f)
    truth.assert_close(got.pop("gradnorm"), expected, 150 * eps * expected, "gradnorm")
    truth.assert_close(got.pop("probability"), truth.stat("msp", f), 32 * eps)
    names = {"varsum": "s2", "max_logit": "fmax", "neg_entropy": "plogp"}
    for name, x in got.items():
        stat = names.get(name, name)
        value = truth.stat(stat, f)
        truth.assert_close(x, value, truth.tolerance(stat, value, f, 1.0, eps), name)


# ---- DTensors


def of_dtensors(rank, group, f, h, w, b):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("tp",))
    split = distribute_tensor(f, mesh, [Shard(1)])
    whole = distribute_tensor(h, mesh, [Replicate()])
    local = split.to_local()
    with_plain_feats = fastood.distributed.score(split, h, "gradnorm")
    found = {"gradnorm": fastood.distributed.score(split, whole, "gradnorm")}
    assert isinstance(found["gradnorm"], DTensor)
    assert found["gradnorm"].placements == (Replicate(),)
    assert torch.equal(found["gradnorm"].to_local(), with_plain_feats.to_local())
    by_mesh = fastood.distributed.score(local, h, "gradnorm", group=mesh["tp"])
    assert torch.equal(by_mesh, with_plain_feats.to_local())
    weight, bias = (distribute_tensor(x, mesh, [Shard(0)]) for x in (w, b))
    found["layer"] = fastood.distributed.score_linear(whole, weight, bias, "msp", norm=None)
    found["plain"] = fastood.distributed.score_linear(h, weight, bias, "msp", norm=None)
    assert not isinstance(found["plain"], DTensor)
    errors = {}
    for name, call in {
        "whole logits": lambda: fastood.distributed.score(distribute_tensor(f, mesh, [Replicate()])),
        "split rows": lambda: fastood.distributed.score(distribute_tensor(f, mesh, [Shard(0)])),
        "group": lambda: fastood.distributed.score(split, group=mesh["tp"]),
        "feats": lambda: fastood.distributed.score(split, distribute_tensor(h, mesh, [Shard(1)])),
        "rows of feats": lambda: fastood.distributed.score(split, distribute_tensor(h, mesh, [Shard(0)])),
        "bias": lambda: fastood.distributed.score_linear(h, weight, distribute_tensor(b, mesh, [Replicate()])),
    }.items():
        errors[name] = error_of(call)
    return as_numpy({name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in found.items()}), errors


def error_of(call):
    try:
        return f"returned {call()}"
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_dtensors(run):
    torch.manual_seed(0)
    f, h, w, b = torch.randn(5, 10), torch.randn(5, 8), torch.randn(10, 8), torch.randn(10)
    results = run(of_dtensors, 3, f, h, w, b)
    got = same_on_all([found for found, _ in results])
    np.testing.assert_allclose(got["gradnorm"], fastood.score(f, h, "gradnorm"), rtol=1e-6)
    expected = fastood.score_linear(h, w, b, "msp", norm=None)
    for name in ("layer", "plain"):
        np.testing.assert_allclose(got[name], expected, rtol=1e-5)
    for _, errors in results:
        assert "logits must have its classes, dimension 1, as Shard" in errors["whole logits"]
        assert "logits must have its classes, dimension 1, as Shard" in errors["split rows"]
        assert "group must be left out where logits is a DTensor" in errors["group"]
        assert "feats must be whole on every rank" in errors["feats"]
        assert "feats must be whole on every rank" in errors["rows of feats"]
        assert "bias must be split as weight is" in errors["bias"]


def of_two_dimensions(rank, group, f, h):
    """Rows over one dimension, classes over the other; of one there is one rank, for want of four."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    found = {}
    for shape in ((1, 3), (3, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        split = distribute_tensor(f, mesh, [Shard(0), Shard(1)])
        feats = distribute_tensor(h, mesh, [Shard(0), Replicate()])
        s = fastood.distributed.score(split, feats)
        assert s.placements == (Shard(0), Replicate())
        assert s.shape == (len(f),)
        pixels = distribute_tensor(f.T.reshape(1, 10, 5, 1), mesh, [Shard(2), Shard(1)])
        there = fastood.distributed.score(pixels, method="msp", dim=1)
        assert there.placements == (Shard(1), Replicate())
        found |= {f"energy {shape}": s.full_tensor(), f"pixels {shape}": there.full_tensor()}
    summands = DTensor.from_local(f[:, :4], mesh, [Partial(), Shard(1)])
    errors = {
        "mesh": error_of(lambda: fastood.distributed.score(f, group=mesh)),
        "partial": error_of(lambda: fastood.distributed.score(summands)),
    }
    return as_numpy(found), errors


def test_rows_over_another_dimension_of_the_mesh(run):
    f, h = torch.randn(5, 10), torch.randn(5, 8)
    results = run(of_two_dimensions, 3, f, h)
    for name, got in same_on_all([found for found, _ in results]).items():
        expected = fastood.score(f, h) if "energy" in name else fastood.score(f, method="msp").reshape(1, 5, 1)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    for _, errors in results:
        assert "one dimension of the mesh, as mesh['tp'] is" in errors["mesh"]
        assert "no Partial" in errors["partial"]


def of_the_page(rank, group, page):
    names = {}
    for block in page:
        exec(compile(block, "docs/distributed.md", "exec"), names)
        if "logits" in names:
            logits = names.pop("logits").full_tensor()
            expected = fastood.score(logits, names["feats"], "gradnorm")
            torch.testing.assert_close(names["s"], expected)
            assert torch.equal(names["classes"], logits.argmax(-1))
    with torch.no_grad():  # which makes the head whole
        expected = fastood.score(names["head"](names["feats"]), names["feats"])
    torch.testing.assert_close(names["mine"], expected)


def test_the_page(run):
    page = (Path(__file__).parent.parent / "docs/distributed.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    run(of_the_page, 3, blocks)


def in_modes(rank, group, f):
    """In inference mode, of a type that differs between ranks, and inside what torch.compile is asked for."""
    x = f.chunk(3, 1)[rank]
    with torch.inference_mode():
        found = {"inference": fastood.distributed.score(x, method="tv")}
    found["mixed"] = fastood.distributed.score(x.double() if rank == 1 else x, method="tv")
    compiled = torch.compile(lambda x: fastood.distributed.score(x, method="tv"), fullgraph=True, backend="eager")
    try:
        compiled(x)
    except RuntimeError as error:
        return as_numpy(found), type(error).__name__
    return as_numpy(found), "compiled"


def test_modes(run):
    f = torch.randn(4, 12)
    results = run(in_modes, 3, f)
    got = same_on_all([found for found, _ in results])
    assert {name: x.dtype for name, x in got.items()} == {"inference": np.float32, "mixed": np.float64}
    for x in got.values():
        np.testing.assert_allclose(x, fastood.score(f, method="tv"), rtol=1e-6)
    assert all(error != "compiled" for _, error in results), results


# ---- collectives, and errors, which are every rank's


# Bytes of each rank and row, after the 512 in which they agree.
SENT = {
    "energy msp max_logit eg_u_l1": [16],
    "msp varsum exgrad eg_u_l2sq eg_p_l2sq": [24],
    "neg_entropy": [24],
    "eg_p_logp_l2sq": [40],
    "gen": [24 + 8 * 7],  # the classes of the larger slice are fewer than 100
    "tv": [24, 8],
    "gradnorm kl_uniform": [32, 8],
    "kl_uniform": [32],
}


def counted(rank, group, f, sizes):
    x = mine(rank, group, f, sizes)
    sent, before = [], dist.all_gather
    dist.all_gather = lambda to, x, *args, **options: sent.append(x.nbytes) or before(to, x, *args, **options)
    try:
        found = {}
        for methods in SENT:
            sent.clear()
            fastood.distributed.scores(x, torch.ones(len(f), 3), methods.split(), group=group)
            found[methods] = list(sent)
        sent.clear()
        fastood.distributed.score(x, torch.ones(len(f), 3), "exgrad", group=group, log=True)
        found["log"] = list(sent)
        sent.clear()
        fastood.distributed.score_linear(torch.ones(len(f), 3), torch.ones(2, 3), group=group, predict=True)
        return found | {"predict": list(sent)}
    finally:
        dist.all_gather = before


def test_what_travels(run):
    """How many collectives, and of how many bytes from each rank: the table of docs/distributed.md."""
    f = special_rows(torch.float32)
    expected = SENT | {"log": [32], "predict": [24]}
    expected = {methods: [512, *(n * len(f) for n in numbers)] for methods, numbers in expected.items()}
    assert run(counted, 2, f, (5, 7)) == [expected, expected]


BAD = {
    "method": lambda f, h, bad: fastood.distributed.score(f, method="energies" if bad else "energy"),
    "temperature": lambda f, h, bad: fastood.distributed.score(f, temperature=-1 if bad else 1.0),
    "another temperature": lambda f, h, bad: fastood.distributed.score(f, temperature=2.0 if bad else 1.0),
    "another function": lambda f, h, bad: (fastood.distributed.scores if bad else fastood.distributed.score)(f),
    "dtype": lambda f, h, bad: fastood.distributed.score(f.int() if bad else f),
    "None": lambda f, h, bad: fastood.distributed.score(None if bad else f),
    "rows": lambda f, h, bad: fastood.distributed.score(f[1:] if bad else f),
    "rows of feats": lambda f, h, bad: fastood.distributed.score(f, h[1:] if bad else h),
    "no feats": lambda f, h, bad: fastood.distributed.score(f, None if bad else h, "exgrad"),
    "columns of feats": lambda f, h, bad: fastood.distributed.score(f, h[:, 1:] if bad else h),
    "shape": lambda f, h, bad: fastood.distributed.score(f[0] if bad else f),
    "gradient": lambda f, h, bad: fastood.distributed.score(f.clone().requires_grad_(bad)),
    "backend": lambda f, h, bad: fastood.distributed.score(f, backend="triton" if bad else "auto"),
    "weight": lambda f, h, bad: fastood.distributed.score_linear(h, torch.ones(4, 3 if bad else 8)),
    "bias": lambda f, h, bad: fastood.distributed.score_linear(h, torch.ones(4, 8), torch.ones(4) if bad else None),
    "rows of a layer": lambda f, h, bad: fastood.distributed.score_linear(h[1:] if bad else h, torch.ones(4, 8)),
    "stats": lambda f, h, bad: fastood.distributed.row_stats(f, ["mps" if bad else "msp"]),
    "no class": lambda f, h, bad: fastood.distributed.score(f[:, :0]),
}


def with_bad_arguments(rank, group, case):
    f, h = torch.zeros(5, 4), torch.ones(5, 8)
    error = error_of(lambda: BAD[case](f, h, rank == 1))
    good = fastood.distributed.score(f, h)  # and all are where they were
    assert good.isfinite().all()
    return error


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_on_one_rank(run, case):
    errors = run(with_bad_arguments, 3, case)
    assert all(x.startswith(("ValueError", "TypeError", "RuntimeError")) for x in errors), errors
    wanted = {
        "method": "method must be one of",
        "temperature": "temperature must be a finite number > 0",
        "another temperature": "asked for the same",
        "another function": "asked for the same",
        "dtype": "logits must be float16",
        "None": "logits must be a torch tensor",
        "rows": "every rank must have the same rows, got [5, 4, 5]",
        "rows of feats": "feats must have the 5 rows of logits",
        "no feats": "feats must be given: exgrad",
        "columns of feats": "asked for the same",
        "shape": "logits must be 2-D",
        "gradient": "has no gradient",
        "backend": "triton",
        "weight": "weight must be [C, 8]",
        "bias": "asked for the same",
        "rows of a layer": "every rank must have the same rows, got [5, 4, 5]",
        "stats": "stats must be one of",
        "no class": "at least one class",
    }[case]
    assert all(wanted in x for x in errors), errors


def group_errors(rank, group):
    f, of_two = torch.zeros(2, 3), torch.distributed.new_group([0, 1])
    return {
        "kind": error_of(lambda: fastood.distributed.score(f, group="tp")),
        "absent": error_of(lambda: fastood.distributed.score(f, group=of_two)),
    }


def test_bad_groups(run):
    with pytest.raises(RuntimeError, match=r"init_process_group"):
        fastood.distributed.score(torch.zeros(2, 3))
    errors = run(group_errors, 3)
    assert all("group must be a torch.distributed process group" in x["kind"] for x in errors)
    assert ["group must have this rank in it" in x["absent"] for x in errors] == [False, False, True]

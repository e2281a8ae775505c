"""The operators of a compiled graph: on a CPU, and on a GPU where there is one (pytest -k "operator and cuda")."""

import contextlib
import itertools
import math
import shutil

import program
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastood
from fastood.kernels import Anchors, Column, Request, cpu, triton
from fastood.kernels.operator import work_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, in its compiler
if not fastood.backends("cpu")["cpu"].usable:
    pytest.skip("needs the C++ part, built where there is a C++ compiler", allow_module_level=True)

ops = torch.ops.fastood


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()  # which counts compilations of one function


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request):
    if not fastood.backends(request.param)[kernels_of(request.param)].usable:
        pytest.skip(f"needs the {kernels_of(request.param)} backend")
    return request.param


def kernels_of(device):
    return {"cpu": "cpu", "cuda": "triton"}[device]


def batch(n, device="cpu", C=12, D=9, dtype=torch.float32):
    return torch.randn(n, C, device=device).to(dtype), torch.randn(n, D, device=device).to(dtype)


def traced(call, *inputs, dynamic=None):
    """The operators of ours that torch.compile makes of a call, all operations, and the compiled call."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=keep)
    compiled(*inputs)
    (graph,) = graphs
    found = [getattr(x.target, "__name__", str(x.target)) for x in graph.graph.nodes if x.op.startswith("call")]
    ours = [str(x.target) for x in graph.graph.nodes if "fastood." in str(x.target)]
    return ours, found, compiled


CALLS = {
    "score": lambda f, h: fastood.score(f, h),
    "without features": lambda f, h: fastood.score(f, method="tv"),
    "log": lambda f, h: fastood.score(f, h, "gradnorm", temperature=2.0, bias=True),
    "infinite order": lambda f, h: fastood.score(f, h, "msp", norm=math.inf),
    "scores": lambda f, h: torch.stack([*fastood.scores(f, h, ["msp", "tv"], norm=2).values()]),
    "sweep": lambda f, h: fastood.sweep(f, h),
    "norms": lambda f, h: fastood.norms(h, [0.3, 2]),
    "gradient_norm": lambda f, h: fastood.gradient_norm(f, h, f.softmax(-1), 2, 2, "outside"),
}


@pytest.mark.parametrize("name", CALLS)
def test_operator_is_one(device, name):
    call = CALLS[name]
    ours, _, compiled = traced(call, *batch(5, device), dynamic=True)
    assert ours == ["fastood.scores.no_grad"]
    for n in (2, 7):
        f, h = batch(n, device)
        assert torch.equal(compiled(f, h), call(f, h))


def test_operator_equals_the_kernel_to_the_bit(device):
    asked = [
        (name, log)
        for name, entry in fastood.SCORES.items()
        for log in (False, True)
        if not log or (entry.positive and name != "norm_eg_p_l2sq")
    ]

    def every(f, h):
        return [fastood.score(f, h, name, log=log) for name, log in asked]

    ours, found, compiled = traced(every, *batch(5, device), dynamic=True)
    assert len(ours) == len(asked)
    assert not {"max", "amax", "exp", "sum", "abs"}.intersection(found)
    for n, dtype in itertools.product((3, 8), (torch.float32, torch.bfloat16)):
        f, h = batch(n, device, C=20, D=11, dtype=dtype)
        for of, got, expected in zip(asked, compiled(f, h), every(f, h), strict=True):
            if device == "cpu":
                assert torch.equal(got, expected), of
            else:  # formulas over several statistics are rounded to float64 by turns there
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, msg=lambda words, of=of: f"{of}: {words}")


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.append(str(operator))
        return operator(*args, **(kwargs or {}))


def test_operator_goes_to_the_dispatcher_where_something_looks_at_operations(device):
    """Else it goes past it, which takes less time."""
    f, h = batch(5, device)
    work = work_of(kernels_of(device), Request(("msp",), (2.0,), (Column(((0, 1.0),), 0),), (-1,)), torch.float32)
    expected = fastood.score(f, h, "msp", norm=2)
    with torch.profiler.profile() as profile:
        for _ in range(3):
            assert torch.equal(ops.scores.no_grad(f, h, None, work), expected)
    dispatched = sum(x.count for x in profile.key_averages() if x.key == "fastood::scores")
    # Of the first call alone. Before torch 2.10 no tensor is read in C++, and all go the long way.
    assert dispatched == (1 if hasattr(torch.Tensor, "__dlpack_c_exchange_api__") else 3)
    with Seen() as seen:
        assert torch.equal(ops.scores.no_grad(f, h, None, work), expected)
    assert "fastood.scores.no_grad" in seen.operators
    with FakeTensorMode() as fake:
        out = ops.scores.no_grad(fake.from_tensor(f), fake.from_tensor(h), None, work)
    assert (out.shape, out.device) == (expected.shape, f.device)
    of_each = torch.vmap(lambda f, h: ops.scores.default(f, h, None, work))(f[None], h[None])
    assert torch.equal(of_each, expected[None])
    with pytest.raises((TypeError, RuntimeError)):
        ops.scores.no_grad(f, h, None)


class Served(torch.nn.Module):
    def __init__(self, backend="auto", **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU())
        self.head = torch.nn.Linear(32, 100)
        self.options = {"backend": backend, **options}

    def forward(self, x):
        h = self.body(x)
        logits = self.head(h)
        return logits, fastood.score(logits, h, **self.options)


@pytest.mark.parametrize("autocast", [False, True])
def test_operator_compiled_whole_of_any_batch(device, autocast):
    model = Served().to(device).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    mode = torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.no_grad(), mode:
        for n in (4, 9, 33):
            x = torch.randn(n, 16, device=device)
            logits, score = compiled(x)
            assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
            assert score.dtype == torch.float32
            torch.testing.assert_close(score, model(x)[1], rtol=2e-2 if autocast else 1e-4, atol=0)


def test_operator_gradients_are_the_references(device):
    def call(f, h):
        return fastood.score(f, h, "tv", norm=2) + fastood.score(f, h, "eg_u_l2sq") + fastood.score(f, f, "exgrad")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for n in (4, 6):
        f, h = (x.requires_grad_() for x in batch(n, device))
        exact = [x.detach().double().requires_grad_() for x in (f, h)]
        truth = torch.autograd.grad(call(*exact).sum(), exact)
        got = torch.autograd.grad(compiled(f, h).sum(), (f, h))
        for g, t in zip(got, truth, strict=True):
            torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert not compiled(f, h).requires_grad


def test_operator_of_part_of_the_inputs_needs_grad(device):
    f, h = batch(4, device)
    h.requires_grad_()
    for name in ("energy", "eg_u_l2sq"):
        compiled = torch.compile(lambda f, h, name=name: fastood.score(f, h, name), fullgraph=True, backend="aot_eager")
        (got,) = torch.autograd.grad(compiled(f, h).sum(), h)
        (expected,) = torch.autograd.grad(fastood.score(f, h, name).sum(), h)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def some_work(device, shape=(-1, 2)):
    """An energy times ||h||_0.3 and alone, both by 2; and statistics and norms: as the schema says it."""
    columns = Column(((0, 2.0),), 0), Column(((0, 2.0),))
    orders = 0.3, math.inf
    return [
        work_of(kernels_of(device), request, torch.float32 if request.columns else torch.float64)
        for request in (
            Request(("energy",), orders, columns, shape, 1.5),
            Request(("energy", ("gradient", "uniform", 2.0, 1.0, "inside")), orders, (), (4, -1), 1.5),
        )
    ]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_operator_keeps_torchs_rules(device, requires_grad):
    f, h = (x.requires_grad_(requires_grad) for x in batch(5, device))
    for work in some_work(device):
        torch.library.opcheck(ops.scores.default, (f, h, None, work))
        if not requires_grad:
            torch.library.opcheck(ops.scores.no_grad, (f, h, None, work))


def test_operator_vmap_rule(device):
    f, h = torch.randn(3, 4, 12, device=device), torch.randn(4, 9, device=device)
    for shape in ((-1, 2), (2, -1)):

        def call(f, h, shape=shape):
            return ops.scores.default(f, h, None, some_work(device, shape)[0])

        each = torch.stack([call(x, h) for x in f])
        torch.testing.assert_close(each[0].flatten()[0], 2 * fastood.score(f[0], h, temperature=1.5)[0])
        assert torch.equal(torch.vmap(call, (0, None))(f, h), each)
        assert torch.equal(torch.vmap(call, (1, None))(f.movedim(0, 1), h), each)

    def stats(f):
        return ops.scores.default(f, h, None, some_work(device)[1])

    assert torch.equal(torch.vmap(stats)(f), torch.stack([*map(stats, f)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operator_of_batchgrad(dtype):
    f, h = batch(5, dtype=dtype)
    for bias in (False, True):
        anchors = torch.randn(12, 9 + bias)
        detector = fastood.BatchGrad(anchors, temperature=1.5, bias=bias)
        ours, _, compiled = traced(lambda f, h, detector=detector: detector.score(f, h), f, h)
        assert ours == ["fastood.batchgrad.no_grad"]
        assert torch.equal(compiled(f, h), detector.score(f, h))
        raw = f"cpu;{int(bias)};1;{(1.5).hex()}"
        if bias and dtype == torch.float32:
            inputs = [x.clone().requires_grad_() for x in (f, h, anchors)]
            torch.library.opcheck(ops.batchgrad.default, (*inputs, raw))
            torch.library.opcheck(ops.batchgrad.no_grad, (f, h, anchors, raw))
        many = torch.stack([anchors, 2 * anchors])
        got = torch.vmap(lambda G, raw=raw: ops.batchgrad.default(f, h, G, raw))(many)
        for each, G in zip(got, many, strict=True):
            assert torch.equal(each, fastood.BatchGrad(G, temperature=1.5, bias=bias).score(f, h, oriented=False))
        with torch.no_grad():  # what was made of G serves as long as G is what it was
            before = ops.batchgrad.no_grad(f, h, anchors, raw)
            anchors.mul_(2)
            assert torch.equal(ops.batchgrad.no_grad(f, h, anchors, raw), got[1])
            assert not torch.equal(before, got[1])


def test_operator_forgets_a_g_that_is_gone():
    from fastood.kernels.operator import _runs

    G, (f, h) = torch.randn(12, 9), batch(5)
    before = len(_runs)
    ops.batchgrad.no_grad(f, h, G, f"cpu;0;1;{(1.0).hex()}")
    assert len(_runs) == before + 1
    del G
    assert len(_runs) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["scale", "lts"])
def test_operator_of_scale_and_its_kin(method, dtype):
    f, h = batch(5, dtype=dtype)
    weight, bias = torch.randn(12, 9), torch.randn(12)
    scaled = fastood.Fitted(method, temperature=1.5, head=(weight, bias) if method == "scale" else None)
    for oriented in (True, False):
        ours, _, compiled = traced(lambda f, h, o=oriented: scaled.score(f, h, oriented=o), f, h, dynamic=True)
        assert ours == ["fastood.scaled.no_grad"]
        for n in (5, 8, 0):
            f, h = batch(n, dtype=dtype)
            assert torch.equal(compiled(f, h), scaled.score(f, h, oriented=oriented))


def test_operator_of_scale_is_one_of_torchs():
    f, h = batch(5)
    bias, raw = torch.randn(12), f"cpu;0;0;{(0.85).hex()};{(1.0).hex()}"
    for b in (bias, None):
        inputs = [x if x is None else x.clone().requires_grad_() for x in (f, h, b)]
        torch.library.opcheck(ops.scaled.default, (*inputs, raw))
        torch.library.opcheck(ops.scaled.no_grad, (f, h, b, raw))

    def of(b):
        return fastood.Fitted("scale", head=(torch.zeros(12, 9), b)).score(f, h)

    many = torch.stack([bias, 2 * bias])
    assert torch.equal(torch.vmap(lambda b: ops.scaled.default(f, h, b, raw))(many), torch.stack([*map(of, many)]))
    three = torch.vmap(lambda f, h: ops.scaled.default(f, h, None, raw))(f[:, None], h[:, None])
    assert torch.equal(three[:, 0], ops.scaled.no_grad(f, h, None, raw))
    with torch.no_grad():  # what was made of the bias serves as long as that is what it was
        ops.scaled.no_grad(f, h, bias, raw)
        bias.mul_(2)
        assert torch.equal(ops.scaled.no_grad(f, h, bias, raw), of(bias))


def test_operator_says_why_its_backend_cannot_serve_here(monkeypatch):
    """A graph that comes from a file may have been made where there was a backend, or for another device."""
    from fastood.kernels import operator

    f, h = batch(5)
    anchors = torch.randn(12, 9)
    work = some_work("cpu")[0]
    assert ops.scores.no_grad(f, h, None, work).shape == (5, 2)
    assert ops.batchgrad.no_grad(f, h, anchors, f"cpu;0;1;{(1.0).hex()}").shape == (5,)
    with FakeTensorMode():  # as the operator would be called with CUDA tensors, once it has served others
        there, it = batch(5, "cuda"), r"backend 'cpu' cannot serve torch\.float32 on cuda:0: it serves CPU tensors"
        with pytest.raises(RuntimeError, match=it):
            operator._scores(*there, None, work)
        with pytest.raises(RuntimeError, match=it):
            operator._batchgrad(*there, torch.empty(12, 9, device="cuda"), f"cpu;0;1;{(1.0).hex()}")
        apart = there[0], torch.empty(5, 9)
        for call in (
            lambda: operator._scores(*apart, None, work),
            lambda: operator._batchgrad(*apart, anchors, f"cpu;0;1;{(1.0).hex()}"),
        ):
            with pytest.raises(ValueError, match="must be on one device, got cuda:0, cpu"):
                call()
    operator._asked.cache_clear()
    monkeypatch.setattr(cpu, "_native", None)
    for name, why in (("cpu", r"its C\+\+ part was not built"), ("triton", "it (needs Triton|serves CUDA tensors)")):
        with pytest.raises(RuntimeError, match=rf"^backend '{name}' cannot serve torch\.float32 on cpu: {why}"):
            ops.scores.no_grad(f, h, None, work.replace("cpu", name))
        with pytest.raises(RuntimeError, match=rf"^backend '{name}' cannot serve torch\.float32 on cpu: {why}"):
            ops.batchgrad.no_grad(f, h, torch.randn(12, 9), f"{name};0;1;{(1.0).hex()}")


def test_operator_has_no_part_in_function_transforms(device):
    f, h = torch.randn(3, 4, 12, device=device), torch.randn(3, 4, 9, device=device)
    calls = (
        lambda f, h: torch.vmap(fastood.score)(f, h),
        lambda f, h: torch.func.grad(lambda x: fastood.score(x, h[0]).sum())(f[0]),
        lambda f, h: torch.func.jvp(lambda x: fastood.score(x, h[0]), (f[0],), (torch.ones_like(f[0]),))[1],
    )
    for call in calls:
        ours, _, compiled = traced(call, f, h)
        assert not ours
        torch.testing.assert_close(compiled(f, h), call(f, h), rtol=1e-4, atol=1e-4)


def test_operator_of_what_a_kernel_does_not_do(device):
    f, h = batch(5, device)
    for call in (
        lambda f, h: fastood.score(f, h, temperature=1e-35),
        lambda f, h: fastood.norms(h, [r / 10 for r in range(1, 80)]),
        lambda f, h: fastood.score(f, h[:, :0], norm=2),
        lambda f, h: fastood.score(f[:0], h[:0]),
        lambda f, h: fastood.score(f.T.contiguous().T, h[:, ::2]),
    ):
        ours, _, compiled = traced(call, f, h)
        assert len(ours) == 1
        torch.testing.assert_close(compiled(f, h), call(f, h), rtol=1e-6, atol=0)


def test_operator_gives_way_to_plain_operations(device):
    f, h = batch(5, device)
    by_name = {"backend": kernels_of(device)}
    calls = [
        lambda f, h: fastood.score(f, h, backend="reference"),
        lambda f, h: fastood.score(f, method="max_logit"),
        lambda f, h: fastood.row_stats(f, ["fmax"])["fmax"],
    ]
    for call in (
        lambda f, h: fastood.score(f, method="max_logit", **by_name),
        lambda f, h: fastood.score(f, **by_name),
    ):
        assert len(traced(call, f, h)[0]) == 1
    if device == "cuda":
        calls.append(lambda f, h: fastood.score(f.double(), h))
    for call in calls:
        ours, _, compiled = traced(call, f, h)
        assert not ours
        torch.testing.assert_close(compiled(f, h), call(f, h), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"^backend 'triton' cannot serve torch\.float64"):
        torch.compile(lambda f: fastood.score(f, backend="triton"), backend="eager")(f.double())


def test_operator_of_tensors_on_a_gpu_that_is_not_there(monkeypatch):
    """A trace looks at no memory, so what a graph of CUDA tensors holds shows anywhere; that it runs shows on a GPU."""
    monkeypatch.setattr(triton, "unusable", lambda device, dtype: None if device.type == "cuda" else "not its device")
    monkeypatch.setattr(triton, "missing", lambda: "")
    with FakeTensorMode():
        f, h = batch(5, "cuda")
        detector = fastood.BatchGrad.__new__(fastood.BatchGrad)
        detector.anchors = detector._oriented = Anchors(torch.empty(12, 9, device="cuda"), 1.5, False)
        for call, operator in (
            # But "scores", for torch looks for a GPU where one row of a result is taken.
            *((call, "fastood.scores.no_grad") for name, call in CALLS.items() if name != "scores"),
            (detector.score, "fastood.batchgrad.no_grad"),
        ):
            torch._dynamo.reset()
            ours, _, compiled = traced(call, f, h)
            assert ours == [operator]
            assert compiled(f, h).device.type == "cuda"


def test_operator_runs_the_kernels_of_triton(triton_device):
    """On a GPU, or interpreted."""
    (f, h), by_name = batch(5, triton_device), {"backend": "triton"}
    detector = fastood.BatchGrad(torch.randn(12, 9, device=triton_device))
    head = torch.randn(12, 9, device=triton_device), torch.randn(12, device=triton_device)
    scaled = fastood.Fitted("scale", head=head)
    for call in (
        lambda f, h: fastood.score(f.bfloat16(), h.half(), **by_name),
        lambda f, h: fastood.score(f, h, "msp", norm=2, log=True, **by_name),
        lambda f, h: fastood.score(f, method="gen", **by_name),
        lambda f, h: fastood.sweep(f, h, **by_name),
        lambda f, h: fastood.gradient_norm(f, h, f.softmax(-1), 2, 2, "outside", **by_name),
        lambda f, h: detector.score(f, h, **by_name),
        lambda f, h: scaled.score(f, h, **by_name),
    ):
        ours, _, compiled = traced(call, f, h, dynamic=True)
        assert len(ours) == 1
        others = batch(3, triton_device)
        assert torch.equal(compiled(*others), call(*others))


def test_operator_beside_cuda_graphs():
    """The compiler makes graphs of all but what keeps what it makes of a constant, of which a graph has copies."""
    for name in ("default", "no_grad"):
        assert torch.Tag.cudagraph_unsafe not in getattr(ops.scores, name).tags
        assert torch.Tag.cudagraph_unsafe in getattr(ops.batchgrad, name).tags
        assert torch.Tag.cudagraph_unsafe in getattr(ops.scaled, name).tags


@needs_gpu
@pytest.mark.parametrize("warm", [False, True])
def test_operator_in_cuda_graphs_on_cuda(warm):
    from torch._dynamo.utils import counters

    counters.clear()
    # Orders and a temperature of no other test: the kernels' constants are made in the graph's warm-up.
    model = Served(norm=1.7 if warm else 1.9, temperature=1.3).cuda().eval()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        if warm:
            model(torch.randn(64, 16, device="cuda"))
        for _ in range(5):
            x = torch.randn(64, 16, device="cuda")
            logits, score = (out.clone() for out in compiled(x))
            torch.testing.assert_close(score, model(x)[1], rtol=1e-4, atol=0)
            torch.testing.assert_close(logits, model(x)[0], rtol=1e-4, atol=1e-4)
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize(
    ("device", "form"),
    [
        pytest.param("cpu", "compiled", marks=pytest.mark.slow),
        pytest.param("cuda", "exported", marks=needs_gpu),
        pytest.param("cuda", "compiled", marks=[needs_gpu, pytest.mark.slow]),
    ],
    indirect=["device"],
)
def test_operator_asked_for_by_name_stays_in_an_artefact(device, form, tmp_path):
    """Which another process then runs; an exported one of a CPU is tests/test_export.py's."""
    if form == "compiled" and shutil.which("g++") is None:
        pytest.skip("needs g++, which AOTInductor compiles with")
    model = Served(kernels_of(device), norm=math.inf).to(device).eval()
    rows, x = {"x": {0: torch.export.Dim("n")}}, torch.randn(9, 16, device=device)
    with torch.no_grad():
        exported = torch.export.export(model, (x[:5],), dynamic_shapes=rows)
        torch.save((x, model(x)[1]), tmp_path / "rows.pt")
    assert "fastood.scores" in str(exported.graph)
    if form == "exported":
        torch.export.save(exported, tmp_path / "model.pt2")
    else:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    program.run("artefact_by_name", form, tmp_path / "model.pt2", tmp_path / "rows.pt")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which torch's compiler compiles with")
def test_operator_is_found_in_what_the_compiler_keeps_on_disk(tmp_path):
    first, second = (program.run("cached_graph", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).split() for _ in range(2))
    assert first == ["0", "0"]
    assert "0" not in second

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# Of the processes that share the cores here, a thread that waits is to sleep: read when torch is loaded, theirs too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from hypothesis import HealthCheck, currently_in_test_context, reject, settings

import fastood

if os.environ.get("TRITON_INTERPRET") == "1":
    import approximate

    approximate.install()

settings.register_profile("default", deadline=None, max_examples=60, print_blob=True)
# What test_triton.py runs in Triton's interpreter, which is much slower, with float64 left out.
settings.register_profile(
    "interpreter", settings.get_profile("default"), max_examples=8, suppress_health_check=list(HealthCheck)
)
# A fuzz of some minutes, before a release: see CONTRIBUTING.md.
settings.register_profile("fuzz", settings.get_profile("default"), max_examples=500)
settings.load_profile("default")


def as_triton_takes_it(function, on_gpu):
    """`function` on the GPU where there is one, for tensors on the CPU; and not for float64."""

    def there(x):
        if not isinstance(x, torch.Tensor):
            return x
        if x.dtype == torch.float64:
            if currently_in_test_context():
                reject()
            pytest.skip("float64 is left to the reference backend")
        if not on_gpu:
            return x
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).cuda()
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    def back(out):
        return {name: x.cpu() for name, x in out.items()} if isinstance(out, dict) else out.cpu()

    @functools.wraps(function)
    def moved(*args, **kwargs):
        return back(function(*map(there, args), **kwargs))

    return moved


def pytest_collection_modifyitems(items):
    """Triton's part is the contract; all else that takes a backend it leaves to the reference."""
    items[:] = [x for x in items if x.path.name == "test_contract.py" or parameters(x).get("backend") != "triton"]


def parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.fixture(scope="session", autouse=True)
def interpreter(request, tmp_path_factory):
    """The processes that test_in_the_interpreter waits for: begun at once, to run beside the other tests."""
    wanted = any(item.name == "test_in_the_interpreter" for item in request.session.items)
    if not wanted or os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    # The largest shapes, which take a minute, have smaller ones of their kind.
    chosen = "triton and not 33001 and not 70000 and not 1000003"
    command += ["--hypothesis-profile=interpreter", "-k"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}
    started = []
    halves = " and (norms or stat)", " and not (norms or stat)"
    for file, some in [("kernels/test_contract.py", ""), *(("test_triton.py", half) for half in halves)]:
        log = tmp_path_factory.mktemp("interpreter") / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, chosen + some, f"tests/{file}"],
                cwd=Path(__file__).parent.parent,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started.append((process, log))
    yield started
    for process, _ in started:
        process.kill()
        process.wait()


CPU_LEVELS = ["base", "avx2", "avx512"]


@pytest.fixture(scope="session", params=["reference", *(f"cpu on {level}" for level in CPU_LEVELS), "triton"])
def backend(request):
    """Every backend in turn, the C++ one on every instruction set: one parity suite for all of them."""
    name, _, level = request.param.partition(" on ")
    on_gpu = name == "triton" and torch.cuda.is_available()
    status = fastood.backends("cuda" if on_gpu else "cpu")[name]
    if not status.usable:
        pytest.skip(f"needs the {name} backend: {status.why}")
    if name == "triton":
        with pytest.MonkeyPatch.context() as patch:
            for function in (fastood.score, fastood.scores, fastood.sweep, fastood.norms, fastood.row_stats):
                patch.setattr(fastood, function.__name__, as_triton_takes_it(function, on_gpu))
            yield name
        return
    if not level:
        yield name
        return
    from fastood.kernels.cpu import _native

    if level not in _native.levels():
        pytest.skip(f"needs a processor with {level}")
    best = _native.level()
    _native.use_level(level)
    yield name
    _native.use_level(best)


@pytest.fixture(scope="session", autouse=True)
def _nan_in_unwritten_memory():
    """torch.empty holds NaN, so that an output element nobody wrote shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """The demo, run once: what it found and said, its folder, and what its heatmap was drawn of."""
    from fastood import demo, plots

    out, said, drawn, heatmap = tmp_path_factory.mktemp("demo"), [], [], plots.heatmap
    (out / "there before").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "heatmap", lambda *of: drawn.append(of) or heatmap(*of))
        found = demo.run(out, progress=said.append)
    return SimpleNamespace(found=found, out=out, said=said, drawn=drawn)

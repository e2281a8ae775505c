import functools
import json
import os
import random
from types import SimpleNamespace

import pytest

# Of the processes that share the cores here, a thread that waits is to sleep: read when torch is loaded, theirs too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import program
import torch
from hypothesis import HealthCheck, currently_in_test_context, reject, settings

import fastood

pytest_plugins = ["interpreter", "pytester"]

settings.register_profile("default", deadline=None, max_examples=60, print_blob=True)
# For Triton's interpreter, which is much slower, with float64 left out.
settings.register_profile(
    "interpreter", settings.get_profile("default"), max_examples=6, suppress_health_check=list(HealthCheck)
)
# A fuzz of some minutes, before a release: see CONTRIBUTING.md.
settings.register_profile("fuzz", settings.get_profile("default"), max_examples=500)
settings.load_profile("default")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """One seed for all tests: every backend is then asked about the same rows, whose truth is worked out once."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = random.randrange(2**32)


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


CPU_ISAS = ["base", "avx2", "avx512"]


@pytest.fixture(scope="session")
def starts():
    """What tests/programs/starts.py says of fastood's start, under several environments."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    from fastood.kernels.cpu import _native

    return json.loads(program.run("starts", *(_native.isas() if _native else [])))


@pytest.fixture(scope="session", params=["reference", *(f"cpu on {isa}" for isa in CPU_ISAS), "triton"])
def backend(request):
    """Every backend in turn, the C++ one on every instruction set: one parity suite for all of them."""
    name, _, isa = request.param.partition(" on ")
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
    if not isa:
        yield name
        return
    from fastood.kernels.cpu import _native

    if isa not in _native.isas():
        pytest.skip(f"needs a processor with {isa}")
    best = _native.isa()
    _native.use_isa(isa)
    yield name
    _native.use_isa(best)


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

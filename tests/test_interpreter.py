"""The plugin that has tests of Triton's kernels run in processes that interpret them (interpreter.py)."""

import os
from pathlib import Path

import pytest
import torch
from interpreter import needs_triton, only_compiled

pytestmark = [
    needs_triton,
    only_compiled,
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU, where tests are interpreted"),
]

CONFTEST = """
import interpreter
from hypothesis import settings

settings.register_profile("interpreter")
interpreter.PROCESSES, interpreter.SECONDS = 2, 10
"""


@pytest.fixture
def pytest_of(pytester, monkeypatch):
    """Runs pytest with the plugin on a file of tests."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    pytester.makeini("[pytest]\nfilterwarnings = error\naddopts = -p interpreter")
    pytester.makeconftest(CONFTEST)

    def run(tests, *options):
        pytester.makepyfile(tests)
        return pytester.runpytest_subprocess(*options)

    return run


def test_each_is_reported_by_itself(pytest_of):
    tests = """
        import os, time, pytest

        @pytest.mark.parametrize("x", [1, 2, 3])
        def test_there(triton_device, x):
            assert os.environ["TRITON_INTERPRET"] == "1"
            assert x != 2, "a reason to fail"
            if x == 3:
                pytest.skip("a reason to skip")

        def test_dies(triton_device):
            os.abort()

        def test_hangs(triton_device):
            time.sleep(600)

        def test_not_chosen(triton_device):
            raise SystemExit

        def test_here():
            assert "TRITON_INTERPRET" not in os.environ
    """
    run = pytest_of(tests, "-v", "-rs", "-k", "not chosen")
    run.assert_outcomes(passed=2, failed=3, skipped=1, deselected=1)
    run.stdout.fnmatch_lines(["*::test_here PASSED*", "*::test_there?1? PASSED*", "*::test_there?2? FAILED*"])
    run.stdout.fnmatch_lines(["*a reason to fail*"])
    run.stdout.fnmatch_lines(["*Fatal Python error: Aborted", "*in test_dies"])
    run.stdout.fnmatch_lines(["*Timeout*", "*in test_hangs"])
    run.stdout.fnmatch_lines(["SKIPPED*a reason to skip"])


@pytest.mark.slow
def test_nothing_runs_on_after_the_first_failure(pytest_of):
    tests = """
        import os, pathlib, time

        PID = pathlib.Path("pid")

        def test_fails(triton_device):
            while not PID.exists():
                time.sleep(0.1)
            assert False

        def test_hangs(triton_device):
            PID.write_text(str(os.getpid()))
            time.sleep(600)
    """
    pytest_of(tests, "-x").assert_outcomes(failed=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)

"""Tests of Triton's kernels where there is no GPU: processes with TRITON_INTERPRET=1 run them beside the other tests.

Such a process interprets all kernels and can compile none, so that no single one can run every test. What is taken
there is what has the fixture `triton_device`, or "triton" for its `backend`: the tests that this session chose, each
reported under its own name. The processes begin at once and share a folder: who creates a test's file runs the test,
and leaves the reports of it there. With TRITON_INTERPRET=1 for pytest itself all runs in its own process (--pdb).
"""

import faulthandler
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import fastood

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
PROCESSES = min(4, os.cpu_count() or 1)
SECONDS = 300  # after which a test hangs, and its process ends

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
only_compiled = pytest.mark.skipif(INTERPRETED, reason="needs a process that does not interpret")


@pytest.fixture(scope="session")
def triton_device():
    """Where the kernels run in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    status = fastood.backends(device)["triton"]
    if not status.usable:
        pytest.skip(f"needs a GPU or Triton's interpreter: {status.why}")
    return device


def backend_of(item):
    return item.callspec.params.get("backend") if hasattr(item, "callspec") else None


def needs_interpreter(item):
    return backend_of(item) == "triton" or "triton_device" in getattr(item, "fixturenames", ())


def skip_where_interpreted(backend="triton"):
    """For shapes over which the interpreter takes a minute, and that have smaller ones of their kind."""
    if INTERPRETED and backend == "triton":
        pytest.skip("needs a GPU: it is large for Triton's interpreter, which runs smaller ones of its kind")


def pytest_collection_modifyitems(items):
    """Triton's part is what is marked so; all else that takes a backend it leaves to the reference."""
    items[:] = [x for x in items if backend_of(x) != "triton" or x.get_closest_marker("every_backend")]


def pytest_addoption(parser):
    parser.addoption("--share", type=Path, metavar="FOLDER", help="of the processes that tests/interpreter.py starts")


def pytest_configure(config):
    config.addinivalue_line("markers", "every_backend: of tests with a backend, those that Triton's kernels take too")
    if INTERPRETED:
        import approximate

        approximate.hasten()
        approximate.install()
    folder = config.getoption("--share")
    if folder is not None:
        config.pluginmanager.register(Worker(config, folder))
    elif HAS_TRITON and not INTERPRETED and not torch.cuda.is_available() and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Deal(config))


class Deal:
    """Has the tests that need it interpreted, and reports what comes of them."""

    def __init__(self, config):
        self.config, self.files, self.processes = config, {}, []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items.sort(key=needs_interpreter)  # last, so that it waits for none while there is other work

    def pytest_collection_finish(self, session):
        items = [item for item in session.items if needs_interpreter(item)]
        if not items or self.config.option.collectonly:
            return
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        self.files = {item.nodeid: folder / f"{i}.json" for i, item in enumerate(items)}
        (folder / "tests").write_text(json.dumps(list(self.files)))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-m", ""]
        command += ["--hypothesis-profile=interpreter", f"--tb={self.config.option.tbstyle}", "--share", folder]
        command += sorted({str(item.path) for item in items})
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}
        path = [str(Path(fastood.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)  # the fastood that is tested here
        options = {"cwd": self.config.rootpath, "env": environment, "stderr": subprocess.STDOUT}
        for i in range(min(PROCESSES, len(items))):
            with (folder / f"log{i}").open("w") as log:
                self.processes.append(subprocess.Popen(command, stdout=log, **options))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if item.nodeid not in self.files:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def reports(self, item):
        file = self.files[item.nodeid]
        while not file.exists() and any(process.poll() is None for process in self.processes):
            time.sleep(0.05)
        if file.exists():
            return [self.report(data) for data in json.loads(file.read_text())]
        text = "The processes that interpret Triton's kernels ended without a word of it."
        for i, process in enumerate(self.processes):
            log = (file.parent / f"log{i}").read_text(errors="replace")
            text += f"\n\n---- exit status {process.returncode}, and what it printed:\n{log[-10_000:]}"
        return [pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")]

    def report(self, data):
        if isinstance(data["longrepr"], list):  # of a skip, a tuple before it was JSON
            data["longrepr"] = tuple(data["longrepr"])
        return self.config.hook.pytest_report_from_serializable(config=self.config, data=data)

    def pytest_sessionfinish(self):
        for process in self.processes:
            process.kill()
            process.wait()
        if self.processes:
            self.folder.cleanup()


class Worker:
    """In a process that interprets: runs those tests of the folder that no other process has begun."""

    def __init__(self, config, folder):
        self.config, self.folder, self.reports = config, folder, []
        self.parent, self.stderr = os.getppid(), os.dup(2)  # not what pytest captures

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        known = {item.nodeid: item for item in items}
        wanted = json.loads((self.folder / "tests").read_text())
        self.files = {nodeid: self.folder / f"{i}.json" for i, nodeid in enumerate(wanted)}
        items[:] = [known[nodeid] for nodeid in wanted if nodeid in known]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if session.testsfailed:
            return None  # to collect them: pytest says so
        for item in session.items:
            file = self.files[item.nodeid]
            if self.takes(file):
                faulthandler.dump_traceback_later(SECONDS, exit=True, file=self.stderr)
                item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
                part = file.with_suffix(".part")
                part.write_text(json.dumps(self.reports))
                part.rename(file)
                self.reports.clear()
        return True

    def takes(self, file):
        """Whether no other process did, and somebody waits for it."""
        try:
            file.with_suffix(".begun").touch(exist_ok=False)
        except FileExistsError:
            return False
        return os.getppid() == self.parent

    def pytest_runtest_logreport(self, report):
        self.reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

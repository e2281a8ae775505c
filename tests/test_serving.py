"""The handlers of docs/serving, on what its export.py writes: FastAPI's by its client, the others between stand-ins."""

import asyncio
import functools
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import fastood

SERVING = Path(__file__).parent.parent / "docs" / "serving"

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="needs torch 2.9: the format that 2.8 exports to has no infinite constants"
)


def loaded(path):
    """A file as a module, whatever was imported under its name before."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """What export.py writes, run as a command."""
    folder = tmp_path_factory.mktemp("artefacts")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(sys, "argv", ["export.py", str(folder)])
        runpy.run_path(str(SERVING / "export.py"), run_name="__main__")
    return folder


@pytest.fixture(scope="module")
def rows(artefacts):
    """Images of all digits and one that is NaN, with what the model and the detector say of them."""
    inputs = torch.from_numpy(load_digits().data[:120]).float() / 16
    inputs[5] = torch.nan
    export = loaded(SERVING / "export.py")
    with torch.random.fork_rng():
        model, _ = export.digits()
    logits = model(inputs).detach()
    detector = fastood.Detector.load(artefacts / "detector.safetensors")
    accept = detector.accept(logits)
    labels = torch.from_numpy(load_digits().target[:120])
    assert accept[labels < 7].double().mean() > 0.85
    assert accept[labels >= 7].double().mean() < 0.6
    return SimpleNamespace(inputs=inputs, logits=logits, score=detector.score(logits), accept=accept)


@pytest.fixture(autouse=True)
def _folder(artefacts, monkeypatch):
    monkeypatch.setenv("ARTEFACTS", str(artefacts))


def check(rows, classes, score, accept):
    known = ~rows.score.isnan()
    assert torch.equal(torch.as_tensor(classes)[known], rows.logits.argmax(1)[known])
    score = torch.tensor([float("nan") if s is None else s for s in score])
    torch.testing.assert_close(score, rows.score, rtol=1e-5, atol=0, equal_nan=True)
    assert torch.equal(torch.as_tensor(accept), rows.accept)


def check_monitor(rows, monitor, times=1):
    assert monitor.rows == 120 * times
    assert monitor.accepted == int(rows.accept.sum()) * times
    assert monitor.not_finite == times


def test_export_writes_both_files(artefacts):
    assert {path.name for path in artefacts.iterdir()} == {"served.pt2", "detector.safetensors"}


def test_no_folder_is_taken_for_triton():
    """Python looks for packages beside the file that it runs, and a folder is one: torch then fails to import."""
    assert not (SERVING / "triton").exists()


# Of FastAPI and its client, which have them when they are imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Using `httpx`")
def test_fastapi(rows):
    for name in ("fastapi", "httpx", "prometheus_client"):
        pytest.importorskip(name, reason=f"needs {name}")
    from fastapi.testclient import TestClient

    module = loaded(SERVING / "fastapi_app.py")
    client = TestClient(module.app)
    body = json.dumps({"inputs": rows.inputs.tolist()})  # NaN among them, as Python's clients would send it
    answer = client.post("/decide", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["score"][5] is None
    check(rows, found["class"], found["score"], found["accept"])
    check_monitor(rows, module.monitor)
    text = client.get("/metrics").text
    assert re.search(r"^fastood_\w+ ", text, re.MULTILINE)
    for inputs in ([], [[1.0] * 63], [[1.0] * 64, [1.0]], [["a"]], "no"):
        assert client.post("/decide", json={"inputs": inputs}).status_code == 422, inputs
    check_monitor(rows, module.monitor)


def stand_in(monkeypatch, name, **contents):
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_ray_serve(rows, monkeypatch):
    """`batch` takes a list of what single calls were made with, and gives each its own; what is no input is in none."""

    def batch(max_batch_size, batch_wait_timeout_s):
        def decorated(method):
            waiting = []

            @functools.wraps(method)
            async def one(self, row):
                future = asyncio.get_running_loop().create_future()
                waiting.append((row, future))
                await asyncio.sleep(batch_wait_timeout_s)
                if waiting:
                    now, waiting[:] = waiting[:max_batch_size], waiting[max_batch_size:]
                    for (_, done), out in zip(now, await method(self, [row for row, _ in now]), strict=True):
                        done.set_result(out)
                return await future

            return one

        return decorated

    def deployment(cls):
        cls.bind = classmethod(lambda cls, *args: (cls, args))
        return cls

    serve = stand_in(monkeypatch, "ray.serve", batch=batch, deployment=deployment)
    stand_in(monkeypatch, "ray", serve=serve)
    stand_in(monkeypatch, "starlette", __path__=[])
    stand_in(monkeypatch, "starlette.requests", Request=object)
    stand_in(monkeypatch, "starlette.responses", Response=object, JSONResponse=lambda content, status_code: status_code)
    deployed, args = loaded(SERVING / "ray_app.py").app
    replica = deployed(*args)

    class Request:
        def __init__(self, row):
            self.row = row

        async def json(self):
            return {"input": self.row}

    no_inputs = [[1.0] * 63, [[1.0] * 64], [1.0, [1.0]], "no", ["no"] * 64, [None] * 64, [10**400] * 64, None]

    async def every():
        return await asyncio.gather(*(replica(Request(row)) for row in [*no_inputs, *rows.inputs.tolist()]))

    answers = asyncio.run(every())
    found = answers[len(no_inputs) :]
    assert answers[: len(no_inputs)] == [422] * len(no_inputs)
    check(rows, *([row[name] for row in found] for name in ("class", "score", "accept")))
    check_monitor(rows, replica.monitor)
    assert replica.state()["rows"] == 120


def test_bentoml(rows, monkeypatch):
    """What is no input is refused before it is in a batch with others, which is where BentoML validates."""
    pytest.importorskip("pydantic", reason="needs pydantic")

    def decorator(**options):
        return lambda decorated: decorated

    stand_in(monkeypatch, "bentoml", service=decorator, api=decorator)
    module = loaded(SERVING / "bentoml_service.py")
    service = module.OOD()
    inputs = rows.inputs.numpy()
    for given in (inputs, inputs.astype(np.float64)):
        found = service.decide(module.checked(given))
        check(rows, *([row[name] for row in found] for name in ("class", "score", "accept")))
    check_monitor(rows, service.monitor, times=2)
    assert service.decide(module.checked(np.ones((1, 64), np.int64)))[0]["class"] in range(7)
    for given in (inputs[:, :63], inputs[0], inputs[:0], inputs.reshape(-1, 1, 64), inputs.astype(str), np.array([])):
        with pytest.raises(ValueError, match=r"inputs must be numbers \[n, 64\], got "):
            module.checked(given)


def test_triton_python_backend(rows, monkeypatch, artefacts, tmp_path):
    """Inputs and outputs are those of config.pbtxt, and every request gets its own rows."""

    class Tensor:
        def __init__(self, name, array):
            self.name, self.array = name, array

        def as_numpy(self):
            return self.array

    class InferenceResponse:
        def __init__(self, output_tensors):
            self.outputs = {tensor.name: tensor.as_numpy() for tensor in output_tensors}

    stand_in(
        monkeypatch,
        "triton_python_backend_utils",
        Tensor=Tensor,
        InferenceResponse=InferenceResponse,
        get_input_tensor_by_name=lambda request, name: request[name],
    )
    for path in (SERVING / "model_repository" / "ood" / "1" / "model.py", *artefacts.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = loaded(tmp_path / "model.py").TritonPythonModel()
    model.initialize({"model_name": "ood", "model_version": "1"})
    requests = [{"inputs": Tensor("inputs", x.numpy())} for x in rows.inputs.split([1, 50, 69])]
    responses = model.execute(requests)
    assert [len(response.outputs["score"]) for response in responses] == [1, 50, 69]

    config = (SERVING / "model_repository" / "ood" / "config.pbtxt").read_text(encoding="utf-8")
    declared = re.findall(r'name: "(\w+)", data_type: TYPE_(\w+), dims: \[ (\d+) \]', config)
    dtypes = {"FP32": np.float32, "BOOL": np.bool_}
    assert declared[0] == ("inputs", "FP32", "64")
    joined = {}
    for name, kind, columns in declared[1:]:
        joined[name] = np.concatenate([response.outputs[name] for response in responses])
        assert joined[name].dtype == dtypes[kind]
        assert joined[name].shape == (120, int(columns))
    check(rows, joined["logits"].argmax(1), joined["score"][:, 0], joined["accept"][:, 0])
    check_monitor(rows, model.monitor)

"""The recipes of docs/scale.md for other engines, as they stand there: between stand-ins, and on real ones."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats import fixed_shape
from formulas import lse, norm

import fastood

ROOT = Path(__file__).parent.parent
N, C, D = 300, 5, 7
RECIPES = dict(re.findall(r"```python\n# (\w+)\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL))


@pytest.fixture
def folder(tmp_path):
    """Three files of rows in `logits`, and a detector."""
    rng = np.random.default_rng(0)
    logits, feats = rng.normal(size=(N, C)).astype(np.float32) * 4, rng.normal(size=(N, D)).astype(np.float32)
    detector = fastood.Detector("energy", norm=2, tpr=0.8).fit(logits, feats)
    detector.save(tmp_path / "detector.safetensors")
    (tmp_path / "logits").mkdir()
    for i in range(0, N, 100):
        held = {"logits": fixed_shape(logits[i : i + 100]), "feats": fixed_shape(feats[i : i + 100])}
        pq.write_table(pa.table({"id": np.arange(i, i + 100), **held}), tmp_path / "logits" / f"{i}.parquet")
    return SimpleNamespace(path=tmp_path, logits=logits, feats=feats, detector=detector)


def check(folder):
    parts = [pq.ParquetFile(x).read() for x in (folder.path / "scores").rglob("*.parquet")]
    scored = pa.concat_tables(parts).sort_by("id")
    assert scored.column_names == ["id", "energy*||h||_2", "accept", "p_value"]
    assert scored["id"].to_pylist() == [*range(N)]
    rows = folder.logits, folder.feats
    expected = lse(folder.logits) * norm(folder.feats, 2)
    np.testing.assert_allclose(scored["energy*||h||_2"].to_numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(scored["accept"].to_numpy(), folder.detector.accept(*rows))
    np.testing.assert_array_equal(scored["p_value"].to_numpy(), folder.detector.p_value(*rows))


@pytest.mark.slow
@pytest.mark.parametrize("engine", RECIPES)
def test_recipe(engine, folder):
    package = {"spark": "pyspark"}.get(engine, engine)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install {package}")
    if engine == "spark" and shutil.which("java") is None:
        pytest.skip("needs Java")
    (folder.path / "recipe.py").write_text(RECIPES[engine])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where Spark looks for Python
    done = subprocess.run(
        [sys.executable, "recipe.py"],
        cwd=folder.path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check(folder)


class Frame:
    """Rows as Ray's and Spark's data sets hand them out and take them: batches of Arrow's, one after another."""

    def __init__(self, batches):
        self.batches = batches
        self.write = SimpleNamespace(parquet=self.write_parquet)

    @classmethod
    def read_parquet(cls, folder):
        return cls([x for path in Path(folder).glob("*.parquet") for x in pq.ParquetFile(path).read().to_batches(64)])

    def write_parquet(self, folder):
        Path(folder).mkdir()
        pq.write_table(pa.Table.from_batches(self.batches), Path(folder) / "part.parquet")

    def map_batches(self, worker, *, fn_constructor_kwargs, batch_format, batch_size, compute):
        assert batch_format == "pyarrow"
        scorer = worker(**fn_constructor_kwargs)
        return Frame([batch for x in self.batches for batch in scorer(pa.Table.from_batches([x])).to_batches()])

    def limit(self, rows):
        return Frame([x.slice(0, rows) for x in self.batches])

    def toArrow(self):
        return pa.Table.from_batches(self.batches)

    def mapInArrow(self, function, schema):
        frame = Frame([*function(iter(self.batches))])
        assert pa.Table.from_batches(frame.batches).schema.equals(schema)
        return frame


def stand_ins():
    """By name, modules with what the recipes use of Ray, Spark and Dask."""
    pool = SimpleNamespace(ActorPoolStrategy=lambda size: size, read_parquet=Frame.read_parquet)
    session = SimpleNamespace(read=SimpleNamespace(parquet=Frame.read_parquet))
    contents = {
        "ray": {"data": pool, "available_resources": lambda: {"CPU": 2.0}},
        "pyspark.sql": {"SparkSession": SimpleNamespace(builder=SimpleNamespace(getOrCreate=lambda: session))},
        "pyspark.sql.pandas.types": {"from_arrow_schema": lambda schema: schema},
        "dask": {"delayed": lambda function: function, "compute": lambda *done, scheduler: done},
    }
    for name in contents:
        module = ModuleType(name)
        vars(module).update(contents[name])
        yield name, module


@pytest.mark.parametrize("engine", RECIPES)
def test_recipe_between_stand_ins(engine, folder, monkeypatch):
    for name, module in stand_ins():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(folder.path)
    exec(compile(RECIPES[engine], f"docs/scale.md, {engine}", "exec"), {"__name__": "__main__"})
    check(folder)

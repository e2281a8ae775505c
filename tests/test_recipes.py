"""The recipes of docs/scale.md for other engines, as they stand there, on real ones where they are installed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fastood

ROOT = Path(__file__).parent.parent
N, C, D = 300, 5, 7


def recipe(engine):
    blocks = re.findall(r"```python\n# (\w+)\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.DOTALL)
    return dict(blocks)[engine]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "spark", "dask"])
def test_recipe(engine, tmp_path):
    package = {"spark": "pyspark"}.get(engine, engine)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install {package}")
    if engine == "spark" and shutil.which("java") is None:
        pytest.skip("needs Java")
    rng = np.random.default_rng(0)
    logits, feats = rng.normal(size=(N, C)).astype(np.float32) * 4, rng.normal(size=(N, D)).astype(np.float32)
    detector = fastood.Detector("energy", norm=2, tpr=0.8).fit(logits, feats)
    detector.save(tmp_path / "detector.safetensors")
    (tmp_path / "logits").mkdir()
    for i in range(0, N, 100):
        held = {"id": np.arange(i, i + 100)}
        for name, x in (("logits", logits[i : i + 100]), ("feats", feats[i : i + 100])):
            storage = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
            kind = pa.fixed_shape_tensor(pa.float32(), [x.shape[1]])
            held[name] = pa.ExtensionArray.from_storage(kind, storage)
        pq.write_table(pa.table(held), tmp_path / "logits" / f"{i}.parquet")
    (tmp_path / "recipe.py").write_text(recipe(engine))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where Spark looks for Python
    done = subprocess.run(
        [sys.executable, "recipe.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parts = [pq.ParquetFile(x).read() for x in (tmp_path / "scores").rglob("*.parquet")]
    scored = pa.concat_tables(parts).sort_by("id")
    assert scored.column_names == ["id", "energy*||h||_2", "accept", "p_value"]
    assert scored["id"].to_pylist() == [*range(N)]
    f, h = logits.astype(float), feats.astype(float)
    energy = np.log(np.exp(f).sum(-1))
    np.testing.assert_allclose(scored["energy*||h||_2"].to_numpy(), energy * np.sqrt((h * h).sum(-1)), rtol=1e-5)
    np.testing.assert_array_equal(scored["accept"].to_numpy(), detector.accept(logits, feats))
    np.testing.assert_array_equal(scored["p_value"].to_numpy(), detector.p_value(logits, feats))

"""What `import fastood` loads, and what loads when it is used."""

import subprocess
import sys


def test_parts_that_load_when_used_are_listed():
    code = """
import sys, fastood
assert {*fastood.__all__, "evaluation", "metrics"} <= {*dir(fastood)}
assert "sklearn" not in sys.modules
assert fastood.evaluation is __import__("fastood.evaluation").evaluation
assert fastood.metrics.auroc([1.0], [0.0]) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_is_light():
    """Plots, the command line, scikit-learn and Triton load when used."""
    heavy = ["sklearn", "scipy", "matplotlib", "typer", "rich", "jinja2", "safetensors", "pyarrow", "triton"]
    new = "{*sys.modules} - before"
    code = f"import sys, torch; before = {{*sys.modules}}; import fastood; print(({new}) & {{*{heavy}}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"

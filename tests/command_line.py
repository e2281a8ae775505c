"""fastood as typed, in this process: what tests of its commands share."""

import json

import numpy as np
import pyarrow.parquet as pq
import safetensors
from typer.testing import CliRunner

from fastood.cli import app

N, C, D = 40, 6, 9


def save(path, scale, seed, n=N, **more):
    rng = np.random.default_rng(seed)
    arrays = {"logits": rng.normal(size=(n, C)) * scale, "feats": rng.normal(size=(n, D)) * scale}
    np.savez(path, **arrays, **more)
    return arrays["logits"], arrays["feats"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def complaint(*arguments):
    """The one line on stderr with which a mistake ends."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def warnings(*arguments):
    """The lines on stderr of a run that ends well."""
    lines = run(*arguments).stderr.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    return lines


def metadata_of(path):
    if path.endswith(".parquet"):
        return {k.decode(): json.loads(v) for k, v in pq.read_schema(path).metadata.items()}
    with safetensors.safe_open(path, "np") as file:
        return {k: json.loads(v) for k, v in file.metadata().items()}

"""fastood demo, fastood info, --version and --help."""

import importlib
import json
import os

import numpy as np
import pytest
from command_line import complaint, run

import fastood
from fastood.cli import app


def test_demo_prints_the_table_and_the_files(data, monkeypatch):
    from fastood import demo
    from fastood.evaluation import evaluate

    def quick(out, seed, progress):
        progress("working")
        assert seed == 3
        inside = {"msp": [0.9, 0.8], "energy": [3.0, 1.0], "energy*||h||_0.3": [1.0, 2.0]}
        noise = {"msp": [0.7], "energy": [4.0], "energy*||h||_0.3": [0.5]}
        blur = {"msp": [0.7], "energy": [2.0], "energy*||h||_0.3": [1.5]}
        decided = fastood.Detector("energy"), {"ID": (19, 20), "noise": (1, 1), "blur": (0, 1)}
        return demo.Demo(evaluate(inside, {"noise": noise, "blur": blur}), [out / "picture.png"], *decided)

    monkeypatch.setattr(demo, "run", quick)
    result = run("demo", "--out", "here", "--seed", "3")
    assert "noise" in result.stdout
    assert "0.500000" in result.stdout
    assert os.path.join("here", "picture.png") in result.stdout
    assert result.stdout.endswith(
        "AUROC, mean over the OOD sets: energy alone 0.250000; "
        "energy*||h||_0.3, the default of fastood.score, 0.750000.\n"
    )
    assert result.stderr == "working\n"


def test_demo_wants_a_seed_that_all_its_libraries_take():
    for seed in ("-1", str(2**32)):
        assert "--seed" in run("demo", f"--seed={seed}", code=2).stderr


def test_demo_wants_a_folder(data):
    assert complaint("demo", "--out", "val.npz") == "error: val.npz: is a file; a folder is wanted to write to\n"


def test_info_and_version():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["fastood"] == fastood.__version__
    assert facts["numpy"] == np.__version__
    assert facts["threads"] >= 1
    assert facts["backends"]["cpu"]["reference"]["usable"] is True
    text = run("info").stdout
    for name in facts:
        assert name.removesuffix("s").replace("_", " ") in text
    if not facts["cuda"]:
        assert "cuda: none" in text
    native = importlib.import_module("fastood.kernels.cpu")._native
    assert facts.get("C++_kernels") == (native and native.isa())
    assert f"instruction set: {facts['instruction_set']}\n" in text
    assert run("--version").stdout == f"fastood {fastood.__version__}\n"


@pytest.mark.parametrize("command", [x.name or x.callback.__name__ for x in app.registered_commands])
def test_help_shows_examples(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run(command, "--help").stdout
    assert f"fastood {command}" in text
    assert "[bold]" not in text

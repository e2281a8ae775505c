"""Every example in a docstring or in the README runs and prints what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fastood

ROOT = Path(__file__).parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(fastood.__path__, "fastood.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("module", ["fastood", "fastood.kernels", "fastood.kernels.reference", *MODULES])
def test_docstrings(module):
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages(page, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    monkeypatch.setattr(fastood.registry, "SCORES", fastood.SCORES)
    before = dict(fastood.SCORES)
    try:
        for block in blocks:
            exec(compile(block, page, "exec"), {})
    finally:
        fastood.SCORES.clear()
        fastood.SCORES.update(before)


def test_readme_lists_every_score():
    table = (ROOT / "README.md").read_text()
    assert [name for name in fastood.SCORES if f"`{name}`" not in table] == []


def test_public_functions_are_documented():
    for name in fastood.__all__:
        public = getattr(fastood, name)
        if callable(public):
            assert ">>>" in public.__doc__ or name == "register", name

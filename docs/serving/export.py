"""A trained classifier and its detector as one program: python export.py FOLDER

Into the folder go served.pt2, which gives {"logits", "score", "accept"} and needs torch alone to run, and
detector.safetensors, for a monitor. Run as it is, it does so with a small network for handwritten digits; to use it,
call `export` with your model and inputs that it was not trained on.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastood


def export(model: nn.Module, validation: Iterable[Tensor], folder: Path) -> nn.Module:
    attached = fastood.attach(model.eval())
    detector = fastood.Detector("energy", norm=None, tpr=0.95).fit_loader(attached, validation)
    folder.mkdir(parents=True, exist_ok=True)
    detector.save(folder / "detector.safetensors")
    served = nn.Sequential(attached.body, fastood.OODHead(attached.head, detector)).eval()
    example = next(iter(validation))
    with torch.no_grad():
        program = torch.export.export(served, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, folder / "served.pt2")
    return served


def digits() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network for the digits 0 to 6, and batches of images of those that it has not seen: [N, 64] in 0..1."""
    images, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    known = labels < 7
    images, labels = images[known].float() / 16, labels[known]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 7))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[::2]), labels[::2]).backward()
        optimizer.step()
    return model, images[1::2].split(128)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python export.py FOLDER")
    export(*digits(), Path(sys.argv[1]))

"""From a model to a yes or no, on scikit-learn's handwritten digits: attach, fit, save, load, accept."""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastood

torch.manual_seed(0)
digits = load_digits()
X, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
known = y < 7  # the model learns 0 to 6; 7, 8 and 9 are what it has never seen
train, validation, test = torch.arange(len(X))[known][torch.randperm(int(known.sum()))].split([600, 350, 314])

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 7))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(60):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X[train]), y[train]).backward()
    optimizer.step()
model.eval()

with torch.inference_mode():
    logits, feats = fastood.attach(model)(X[validation])
detector = fastood.Detector("energy", norm=None, tpr=0.95).fit(logits, feats)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "detector.safetensors"
    detector.save(path)
    served = fastood.attach(model, detector=fastood.Detector.load(path))

with torch.inference_mode():
    *_, accept_known = served(X[test])
    *_, accept_new = served(X[~known])
print(f"threshold {detector.threshold:.3f}")
print(f"accepted of the digits 0 to 6: {accept_known.float().mean():.1%}; of 7 to 9: {accept_new.float().mean():.1%}")

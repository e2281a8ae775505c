"""What a researcher asks first: which score separates my in-distribution rows from my OOD rows?"""

import numpy as np

import fastood

rng = np.random.default_rng(0)


def rows(n: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits and features of a made-up network, which is surer of what it knows."""
    feats = np.maximum(rng.standard_normal((n, 64)) * strength, 0)
    logits = rng.standard_normal((n, 10))
    logits[np.arange(n), rng.integers(0, 10, n)] += 4 * strength
    return logits.astype(np.float32), feats.astype(np.float32)


id_rows, ood_rows = rows(2000, 1.0), rows(2000, 0.6)
known, new = (fastood.scores(*x, norm=0.3) for x in (id_rows, ood_rows))
auroc = {name: fastood.metrics.auroc(known[name], new[name]) for name in known}
for name, value in sorted(auroc.items(), key=lambda x: -x[1]):
    print(f"{name:16} AUROC {value:.3f}")

"""A score of one's own, beside those of the paper: the gap between energy and the largest logit."""

import numpy as np

import fastood

fastood.register(
    fastood.Score(
        "margin",
        formula="T log sum_k exp(f_k / T) - max_k f_k",
        source="this example",
        higher="out",  # the raw formula is larger where the classifier is unsure
        stats=("energy", "fmax"),
        v=(1, -1),  # kernels make that sum themselves; any other formula is a function, v=lambda s: s["energy"] / s.C
    )
)

rng = np.random.default_rng(0)
logits, feats = rng.standard_normal((4, 10)) * [[1], [2], [4], [8]], np.abs(rng.standard_normal((4, 64)))
for name, values in fastood.scores(logits, feats, ["margin", "msp", "gradnorm"], norm=None).items():
    print(f"{name:10}", np.round(values, 4))

"""score_linear against the product and what scores its logits: as fast where logits fit, and the one way where not.

"x" of "product + fastood.score" is what the logits' way through memory costs, or saves. Its product is float32's, of
halves widened, as score_linear's is.
"""

import pytest
import rivals
import torch
from harness import OURS

import fastood

THREADS = sorted({1, torch.get_num_threads()})
FORMULAS = {"energy": rivals.energy, "tv": rivals.tv}


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("shape", [(256, 1000, 2048), (4096, 1000, 512), (128, 131072, 512)], ids=str)
def test_score_linear(compare, method, shape, dtype, threads):
    N, C, D = shape
    torch.manual_seed(0)
    h, w = (torch.randn(*size).to(getattr(torch, dtype)) for size in ((N, D), (C, D)))
    w, b = w * (2 / D**0.5), torch.randn(C)

    def product(h):
        """In the arithmetic that score_linear promises; float64 where this is run for the truth."""
        wide = torch.promote_types(h.dtype, torch.float32)
        return torch.nn.functional.linear(h.to(wide), w.to(wide), b.to(wide))

    compare(
        f"{method} of a layer, C={C}",
        threads,
        {
            OURS: lambda h: fastood.score_linear(h, w, b, method, norm=None),
            "product + fastood.score": lambda h: fastood.score(product(h), method=method),
        },
        lambda h: FORMULAS[method](product(h)),
        feats=h,
    )

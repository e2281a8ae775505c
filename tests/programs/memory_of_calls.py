"""How many KiB of memory calls of the C++ backend take beyond logits of 19,500 KiB and features of 40,000."""

import resource

import torch

import fastood

N, C, D = 5000, 1000, 2048


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


torch.set_num_threads(2)
f, h = torch.randn(N, C), torch.randn(N, D)
fastood.sweep(f[:100], h[:100], backend="cpu")
grid = torch.empty(N, 4, 12).fill_(1.0), torch.empty(N, 4, 12, dtype=torch.float64).fill_(1.0)
del grid
before = peak()
fastood.score(f, h, backend="cpu")
fastood.score(f, h, "gradnorm", backend="cpu")
fastood.norms(h, [0.1, 0.3, 1, 2], backend="cpu")
fastood.score(f, h, "exgrad", log=True, backend="cpu")
fastood.row_stats(f, backend="cpu")
for q in (torch.full((1, C), 1 / C), torch.full((1, C), 1 / C).half()):
    fastood.gradient_norm(f, h, q.expand(N, C), backend="cpu")
    fastood.gradient_norm(f, h, q.expand(N, C), 3, 1, "outside", backend="cpu")
print(peak() - before)

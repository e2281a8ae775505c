"""Compiles a model's score and calls it, and prints how often torch's compiler found its graph on disk."""

import torch
from torch._dynamo.utils import counters

import fastood

torch.manual_seed(0)
head = torch.nn.Linear(9, 12)
rows = torch.randn(5, 9)
with torch.no_grad():
    found = torch.compile(lambda h: fastood.score(head(h), h), fullgraph=True)(rows)
    torch.testing.assert_close(found, fastood.score(head(rows), rows))
print(counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])

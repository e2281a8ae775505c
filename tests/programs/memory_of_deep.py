"""How many KiB of memory the process has held at most, after gradients of all parameters of 1, 64 and 128 inputs."""

import resource

import torch
from torch import nn

import fastood


def held(n):
    fastood.deep_gradient_norm(net, x[:n], **limit)
    fastood.deep_gradient_norm(net, x[:n], "predicted", expectation="outside", **limit)
    fastood.deep_batchgrad(net, x[:n], x[:40], torch.arange(40) % 10, **limit)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


torch.set_num_threads(1)
body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten())
net = nn.Sequential(body, nn.Linear(144, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
x, limit = torch.randn(128, 3, 16, 16), {"max_bytes": 16 << 20}
print(held(1), held(64), held(128))

"""Load: threads that share one attached model, its detector and a monitor, by batches small and large."""

import gc
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import fastood

THREADS = 6
C, D = 100, 256
SIZES = (1, 1, 1, 2, 7, 33, 256, 1999)


def resident():
    """Bytes of memory that the process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(32, D), nn.ReLU()), nn.Linear(D, C)

    def forward(self, x):
        return self.fc(self.body(x))


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize(("seconds", "ROWS"), [(0.3, 300), pytest.param(30, 6000, marks=pytest.mark.slow)])
def test_load(seconds, ROWS, per_class):
    """Every row comes back once, and with its own score and decision; in half a minute nothing leaks."""
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(ROWS, 32)
    x[::97] = torch.nan
    attached = fastood.attach(model, example=x[1:9])
    with torch.no_grad():
        logits, feats = attached(x)
    finite = ~logits.isnan().any(1)
    detector = fastood.Detector("energy", norm=0.3, tpr=0.8, per_class=per_class).fit(logits[finite], feats[finite])
    served, monitor = fastood.attach(model, detector=detector, example=x[1:9]), fastood.Monitor(detector)
    wanted = logits.double().logsumexp(1) * feats.double().pow(0.3).sum(1).pow(1 / 0.3)
    limit = detector.threshold[logits.argmax(1)] if per_class else torch.full((ROWS,), detector.threshold)
    sure = ((wanted - limit).abs() > 1e-4 * limit.abs()) | wanted.isnan()  # products of other shapes round otherwise
    seen, accepted, errors = np.zeros(ROWS, np.int64), [0] * THREADS, []
    begin, lock = time.monotonic(), threading.Lock()

    def work(k):
        random = np.random.default_rng(k)
        try:
            with torch.inference_mode():
                while time.monotonic() < begin + seconds and not errors:
                    rows = random.integers(0, ROWS, random.choice(SIZES))
                    f, h, s, accept = served(x[rows])
                    assert f.shape == (len(rows), C)
                    assert h.shape == (len(rows), D)
                    np.testing.assert_allclose(s, wanted[rows], rtol=1e-4)
                    certain = sure[rows]
                    assert torch.equal(accept[certain], (wanted >= limit)[rows][certain])
                    by_hand = detector.accept(f.numpy(), h.numpy())
                    np.testing.assert_array_equal(by_hand, accept)
                    monitor.update(s, accept)
                    accepted[k] += int(accept.sum())
                    with lock:
                        np.add.at(seen, rows, 1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(THREADS)]
    objects = len(gc.get_objects())  # not while threads run: it would hold tuples that are being made
    for thread in threads:
        thread.start()
    held = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(seconds / 50)
        held.append(resident())
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert seen.min() > 0
    assert monitor.rows == seen.sum()
    assert monitor.accepted == sum(accepted)
    assert monitor.not_finite == seen[::97].sum()
    if seconds < 30:
        return
    # From the second fifth to the last.
    before, after = (np.median(held[i * len(held) // 5 : (i + 1) * len(held) // 5]) for i in (1, 4))
    assert after - before < 16 << 20, f"{(after - before) / 2**20:.0f} MiB more"
    assert len(gc.get_objects()) - objects < 2000

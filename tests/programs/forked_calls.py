"""Everything that fastood exports, in a forked child as in its parent.

Each call is made in a child of its own, for the first call of a child is the one that could wait for ever. Ends with
the name of one that differs, or does not end in time.
"""

import os
import signal
import sys
import tempfile
import threading

import numpy as np
import torch

import fastood
from fastood import demo, evaluation, metrics

N, C, D = 40_000, 4, 6  # more rows than torch leaves to one thread, 32,768
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
f, h = torch.randn(N, C, generator=g) * 3, torch.randn(N, D, generator=g)
labels, q = torch.arange(N) % C, torch.randn(N, C, generator=g).softmax(-1)
net = torch.nn.Linear(D, C).eval()
anchors = torch.arange(8) % C
large = torch.randn(2 * D, N, generator=g).T  # a G that is not contiguous
wide = torch.randn(1, len(large), generator=g), torch.randn(1, 2 * D, generator=g)
detector = fastood.BatchGrad(torch.randn(C, D, generator=g))
folder = tempfile.mkdtemp()


def saved():
    first = fastood.BatchGrad(large)
    first.save(f"{folder}/{os.getpid()}.safetensors")
    return fastood.BatchGrad.load(f"{folder}/{os.getpid()}.safetensors").to(torch.float64).score(*wide)


def deterministic(f, h):
    torch.use_deterministic_algorithms(True)
    return fastood.score(f, h)


def detected(f, h, new):
    new.partial_fit(f[:16_000], h[:16_000], labels[:16_000])
    return {"accept": new.accept(f, h), "p": new.p_value(f, h)}


fitted = fastood.Detector(per_class=True).fit(f, h)
neighbours = fastood.Fitted("knn").fit(None, h[:50])

model = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ReLU(), torch.nn.Linear(D, C)).eval()
attached = fastood.attach(model, example=h[:2])
decided = fastood.Detector().fit(*(x.detach() for x in attached(h)))


@torch.no_grad()
def monitored():
    monitor = fastood.Monitor(fitted)
    monitor.update(fitted.score(f, h), fitted.accept(f, h))
    return {"rows": monitor.rows, "accepted": monitor.accepted, "median": monitor.quantile(0.5)}


EITHER = {  # of tensors and of arrays
    "scores": lambda f, h: fastood.scores(f, h),
    "scores log": lambda f, h: fastood.scores(f, h, log=True),
    "scores reference": lambda f, h: fastood.scores(f, h, backend="reference"),
    "sweep": lambda f, h: fastood.sweep(f, h),
    "score_linear": lambda f, h: fastood.score_linear(f, h[:50, : f.shape[1]], None, "msp", norm=None),
    "norms": lambda f, h: fastood.norms(h, [0.3, 2]),
    "norms log": lambda f, h: fastood.norms(h, [0.3, 2], log=True),
    "row_stats": lambda f, h: fastood.row_stats(f),
    "row_stats power sum": lambda f, h: fastood.row_stats(f, [("power_sum", r / 2) for r in range(1, 12)]),
    "gradient_norm": lambda f, h: fastood.gradient_norm(f, h, order=3, power=3),
    "gradient_norm outside": lambda f, h: fastood.gradient_norm(f, h, "predicted", 1.5, expectation="outside"),
    "anchor_gradient": lambda f, h: fastood.anchor_gradient(f, h, labels),
    "BatchGrad": lambda f, h: fastood.BatchGrad.from_anchors(f[:8], h[:8], anchors).score(f, h),
    "BatchGrad of the parent": lambda f, h: detector.score(f, h),
    "batchgrad": lambda f, h: fastood.batchgrad(f, h, detector.anchors.G),
    "Detector": lambda f, h: detected(f, h, fastood.Detector()),
    "Detector per class": lambda f, h: detected(f, h, fastood.Detector(per_class=True)),
    "Detector of the parent": lambda f, h: fitted.accept(f, h),
    "Fitted": lambda f, h: fastood.Fitted("mahalanobis").fit(f, h).score(f, h),
    "Fitted of the parent": lambda f, h: neighbours.score(f, h),
    "metrics": lambda f, h: metrics.evaluate(f[:, 0], f[:, 1]),
    "evaluation": lambda f, h: evaluation.evaluate({"f": f[:, 0]}, {"o": {"f": f[:, 1]}}).table()[0],
}
classes = torch.randn(2000, 1000, generator=g)
TENSORS = {
    "score of many classes": lambda: fastood.score(classes),
    "score deterministic": lambda: deterministic(f, h),
    "gradient_norm given": lambda: fastood.gradient_norm(f, h, q),
    "BatchGrad of many classes": saved,
    "BatchGrad.to": lambda: detector.to(torch.float64).score(f, h),
    "deep_gradient_norm": lambda: fastood.deep_gradient_norm(net, h),
    "deep_gradient_norm given": lambda: fastood.deep_gradient_norm(net, h, q),
    "deep_batchgrad": lambda: fastood.deep_batchgrad(net, h, h[:8], anchors),
    "warm_up": lambda: fastood.warm_up(N, N, methods=["gen", "eg_u_l2sq"], device="cpu"),
    "Detector.choose": lambda: fastood.Detector.choose((f, h), candidates=["msp", "tv"]).accept(f, h),
    "Monitor": monitored,
    "attach": lambda: torch.cat(fastood.attach(model, example=h)(h), 1).detach(),
    "attach before": lambda: torch.cat(attached(h), 1).detach(),
    "attach with a detector": lambda: fastood.attach(model, detector=decided)(h)[3],
    "OODHead": lambda: fastood.OODHead(model[2], decided)(h)["accept"],
    "collect": lambda: fastood.collect(model, [h])._asdict(),
    "score_rows": lambda: evaluation.score_rows([(f, h)]),
    "sweep_auroc": lambda: evaluation.sweep_auroc([(f, h)], {"o": [(q, h)]}, ["msp"], [None, 1]),
}
for name, entry in fastood.SCORES.items():
    for log in {False, entry.positive}:
        TENSORS[f"score {name} {log}"] = lambda name=name, log=log: fastood.score(f, h, name, log=log)
COMPILED = {  # in the parent, without loops of the compiler's own: what waits is what an operator of ours runs
    "score": lambda: fastood.score(f, h),
    "score at the end of the floats": lambda: fastood.score(f, h, temperature=1e-35),
    "score log": lambda: fastood.score(f, h, "msp", log=True),
    "norms of many orders": lambda: fastood.norms(h, [r / 10 for r in range(1, 40)]),
    "BatchGrad": lambda: detector.score(f, h),
}
for name, call in COMPILED.items():
    TENSORS[f"compiled {name}"] = torch.compile(call, backend="eager", fullgraph=True)
calls = {
    f"{name} {kind}": lambda c=c, x=x: c(*x)
    for name, c in EITHER.items()
    for kind, x in (("torch", (f, h)), ("numpy", (f.numpy(), h.numpy())))
} | TENSORS
nothing_to_run = {"SCORES", "STATISTICS", "SUCCESSORS", "Score", "Successor", "register", "backends"}
untested = set(fastood.__all__) - {name.split()[0] for name in calls} - nothing_to_run
assert not untested, untested


def same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return all(same(a[k], b[k]) for k in a)
    if a is None or isinstance(a, str):
        return a == b
    return type(a) is type(b) and np.allclose(np.asarray(a), np.asarray(b), 1e-5, 1e-5, equal_nan=True)


def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # which ends a child that hangs
        os._exit(0 if work() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def demo_takes_one_thread():
    def stop(line):
        raise InterruptedError

    try:
        demo.run(folder, progress=stop)
    except InterruptedError:
        return torch.get_num_threads() == 1


def in_threads(work):  # and in the one that lived through the fork after another one
    results = []
    other = threading.Thread(target=lambda: results.append(work()))
    other.start()
    other.join()
    return results[0] and work()


for name, call in calls.items():
    expected = call()
    torch.use_deterministic_algorithms(False)
    assert torch.get_num_threads() == 2
    (f.exp() + h[:, :1]).double().sum()  # torch's pool is there
    if code := in_child(lambda call=call, expected=expected: same(call(), expected)):
        sys.exit(f"{name}: {code}")
expected = calls["scores log torch"]()
assert in_child(lambda: in_threads(lambda: same(calls["scores log torch"](), expected))) == 0
assert in_child(demo_takes_one_thread) == 0
assert in_child(lambda: torch.get_num_threads() == 2) == 0  # of a child that has no use for fastood

"""Data that commands warn of: probabilities for logits, swapped names, norms that turn a score round."""

import numpy as np
import pytest
import torch
from command_line import C, D, N, warnings
from formulas import lse

from fastood._data import oddity


def test_scores_that_a_norm_inverts_are_warned_of(data):
    f, h = data
    for name, x in (("val", f - 60), ("ood", f / 3 - 60)):
        np.savez(name, logits=x, feats=h)
    sets = ["--id", "val.npz", "--ood", "ood.npz"]
    (line,) = warnings("eval", *sets)
    assert line == (
        f"warning: val.npz: negative energy*||h||_0.3, max_logit*||h||_0.3 in {N} of {N} rows, "
        "where a larger norm makes a row look less in-distribution; --norm none (of 'fastood fit', for a detector) "
        "leaves the norm out"
    )
    assert warnings("eval", *sets, "--norm", "none") == []
    assert warnings("eval", *sets, "--method", "gen", "--method", "msp") == []
    assert len(warnings("eval", *sets, "--method", "gen", "--norm", "2")) == 1
    (line,) = warnings("score", "val.npz", "out.npz")
    assert f"val.npz: negative energy*||h||_0.3 in {N} of {N} rows" in line
    assert warnings("score", "val.npz", "out.npz", "--norm", "none") == []
    assert warnings("score", "val.npz", "out.npz", "--method", "all", "--norm", "none") == []


def test_a_few_rows_below_0_matter_to_score_and_not_to_eval(data):
    f = np.full((200, C), 5.0)
    f[:2] -= 60
    np.savez("val.npz", logits=f, feats=np.ones((200, D)))
    one = ["--method", "energy"]
    assert "in 2 of 200 rows" in warnings("score", "val.npz", "out.npz")[0]
    assert warnings("eval", "--id", "val.npz", "--ood", "near.npz", *one) == []
    f[2] -= 60
    np.savez("val.npz", logits=f, feats=np.ones((200, D)))
    assert "in 3 of 200 rows" in warnings("eval", "--id", "val.npz", "--ood", "near.npz", *one)[0]
    # What OOD rows are below is no fault.
    assert warnings("eval", "--id", "near.npz", "--ood", "val.npz", *one, "--norm", "none") == []


def test_probabilities_and_log_probabilities_are_told_from_logits(data):
    f, _ = data
    log_p = f - lse(f)[:, None]
    for dtype in (np.float64, np.float32, np.float16):
        np.save("p.npy", np.exp(log_p).astype(dtype))
        np.save("log_p.npy", log_p.astype(dtype))
        np.save("f.npy", f.astype(dtype))
        (line,) = warnings("score", "p.npy", "out.npz", "--method", "tv")
        assert line.startswith("warning: p.npy: 'logits' looks like probabilities")
        (line,) = warnings("score", "log_p.npy", "out.npz", "--method", "tv")
        assert line.startswith("warning: log_p.npy: 'logits' looks like log-probabilities")
        assert warnings("score", "f.npy", "out.npz") == []
    (line,) = warnings("eval", "--id", "p.npy", "--ood", "a=p.npy", "--ood", "f.npy", "--method", "msp")
    assert line.startswith("warning: p.npy, p.npy: 'logits' looks like probabilities")


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("classes", [10, 80])
def test_swapped_names_are_told(relu, classes):
    """Features of both signs or after a ReLU, and a linear layer of them; the names right and swapped."""
    g = torch.Generator().manual_seed(5)
    h = torch.randn(120, 50, generator=g, dtype=torch.float64)
    h = h.relu() if relu else h
    f = h @ torch.randn(50, classes, generator=g, dtype=torch.float64) + 1
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        logits, feats = f.to(dtype), h.to(dtype)
        assert oddity(logits, feats, "z", "h") is None
        told = oddity(feats, logits, "z", "h")
        if classes == 80 and not relu:  # neither width nor sign tells
            assert told is None
        else:
            assert told is not None
            assert "'z' [N, 50] looks like the features of 'h'" in told


def test_a_swap_is_said_once(data):
    f, h = data
    np.savez("val.npz", logits=np.maximum(h, 0), feats=f)
    (line,) = warnings("eval", "--id", "val.npz", "--ood", "ood=val.npz", "--method", "msp", "--norm", "none")
    assert line.startswith("warning: val.npz, val.npz: 'logits' [N, 9] looks like the features of 'feats' [N, 6]")
    assert "--logits-key and --feats-key" in line


def test_an_unlike_first_chunk_is_no_reason_to_fail(data):
    for logits, feats in (
        (np.full((9, 12), np.nan), np.ones((9, 3))),
        (np.full((40, 12), -np.inf), np.ones((40, 3))),
        (np.zeros((40, 12)), np.zeros((40, 3))),
        (np.full((40, 12), 1e308), np.full((40, 3), -1e308)),
        (np.ones((40, 1)), np.full((40, 3), np.nan)),
        (np.zeros((0, 12)), np.zeros((0, 3))),
    ):
        np.savez("odd.npz", logits=logits, feats=feats)
        assert warnings("score", "odd.npz", "out.npz", "--method", "msp") == []

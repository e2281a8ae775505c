"""Formulas over rows in float64, for tests of whole files and tables; truth.py has those that numbers are held to."""

import numpy as np
from scipy import special


def lse(f):
    return special.logsumexp(np.asarray(f, np.float64), axis=-1)


def softmax(f):
    return special.softmax(np.asarray(f, np.float64), axis=-1)


def norm(h, r):
    return (np.abs(np.asarray(h, np.float64)) ** r).sum(-1) ** (1 / r)

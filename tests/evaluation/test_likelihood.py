"""Likelihoods of scores, against closed forms."""

import numpy as np
import pytest
import scipy.sparse as sp

from tpad_jax.data.sessions import Rows
from tpad_jax.evaluation import likelihood, metrics

V, R = 12, 400


def rows(scores, seed):
    """Targets drawn from a softmax of scores [V]."""
    share = np.exp(scores) / np.exp(scores).sum()
    target = 1 + np.random.default_rng(seed).choice(V, R, p=share)
    items = np.ones((R, 2), np.int32)
    return Rows(items, items, target, np.arange(R)), share


def test_the_temperature_of_a_recommender_is_found():
    truth = np.linspace(0, 2, V)
    valid, share = rows(truth, 0)

    def scorer(items):
        return np.tile(np.append(9, 4 * truth), (len(items), 1))  # item 0 has no meaning

    known = likelihood.calibrate(scorer, valid, V, rule=False)
    assert known.power == pytest.approx(0.25, abs=0.05)
    assert known.floor is None
    found = likelihood.nll(scorer, valid, V, known)
    assert found == pytest.approx(-np.log(share[valid.target - 1]).mean(), abs=0.01)
    assert found < likelihood.nll(scorer, valid, V, likelihood.Calibration())


def test_a_rule_gets_a_floor_below_items_it_never_saw():
    valid, _ = rows(np.append(np.full(3, 3.0), np.zeros(V - 3)), 1)
    seen = np.append(0, np.append(np.ones(3), np.zeros(V - 3)))

    def scorer(items):
        return metrics.Sparse(sp.csr_array(np.tile(seen, (len(items), 1)).astype(np.float32)),
                              np.zeros(V + 1, np.float32))

    known = likelihood.calibrate(scorer, valid, V, rule=True)
    high = np.isin(valid.target, (1, 2, 3))
    expected = -(high.mean() * np.log(high.mean() / 3)
                 + (~high).mean() * np.log((~high).mean() / (V - 3)))
    assert likelihood.nll(scorer, valid, V, known) == pytest.approx(expected, abs=0.02)

"""Ranks counted on the device against counts over all scores on the host."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from tpad_jax.distributed import devices
from tpad_jax.evaluation import metrics, scorers

V, N, D, R = 700, 5, 6, 45
ONE = devices.choose('jit', 1)


def last(weights, z, items):
    """An encoder: the last item's vector, turned."""
    at = jnp.maximum((items > 0).sum(axis=1) - 1, 0)
    return z[jnp.take_along_axis(items, at[:, None], axis=1)[:, 0]] @ weights['turn']


def draw(whole=True, seed=0):
    """Weights, z, items and targets; whole numbers, whose products are exact and often equal."""
    rng = np.random.default_rng(seed)
    if whole:
        weights = {'turn': rng.integers(-2, 3, (D, D)).astype(np.float32)}
        z = rng.integers(-2, 3, (V + 1, D)).astype(np.float32)
    else:
        weights = {'turn': rng.normal(size=(D, D)).astype(np.float32)}
        z = rng.normal(size=(V + 1, D)).astype(np.float32)
    items = rng.integers(1, V + 1, (R, N)) * (np.arange(N) < rng.integers(1, N + 1, (R, 1)))
    target = rng.integers(1, V + 1, R)
    target[:2] = 1, V
    return weights, z, items.astype(np.int32), target.astype(np.int32)


def counted(weights, z, items, target):
    """`metrics.counts` of the whole table of scores."""
    return metrics.counts(np.asarray(last(weights, z, items)) @ z.T, target)


@pytest.mark.parametrize(('chunk', 'rows'), [(0, 512), (64, 16), (7, 3), (701, 45), (300, 20)])
def test_counts_of_the_whole_catalogue(chunk, rows):
    """Ties, the last chunk that reaches back, the part that is filled up, padding left out."""
    weights, z, items, target = draw()
    z[0] = 9  # would stand above everything
    *found, nll = scorers.ranker(last, ONE, chunk=chunk)(weights, z, items, target, rows=rows,
                                                         power=0.5)
    expected = counted(weights, z, items, target)
    assert (expected[1] > 1).mean() > 0.5
    scores = 0.5 * np.asarray(last(weights, z, items)) @ z.T
    np.testing.assert_allclose(nll, -log_softmax(scores[:, 1:], axis=1)[np.arange(R), target - 1],
                               rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(metrics.nll(scores, target), nll, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('error', [0.0, 1e-3])
def test_the_targets_own_score_is_the_one_in_its_row(error, monkeypatch):
    """However far off the guess: an item equals itself, and what has the same vector."""
    weights, z, items, target = draw(whole=False)
    twins = np.setdiff1d(np.arange(1, V + 1), target)[:R]
    z[twins] = z[target]
    guess = jnp.diagonal
    monkeypatch.setattr(jnp, 'diagonal', lambda x: guess(x) + error)
    above, equal = scorers.ranker(last, ONE, chunk=100)(weights, z, items, target)
    same = (z[target][:, None] == z[None, 1:]).all(axis=2).sum(axis=1)
    np.testing.assert_array_equal(equal, same)
    scores = np.asarray(last(weights, z, items), np.float64) @ z.T.astype(np.float64)
    margin = scores[:, 1:] - scores[np.arange(R), target][:, None]
    np.testing.assert_array_equal(above, (margin > 1e-5).sum(axis=1))


@pytest.mark.parametrize(('way', 'count'), [('pmap', 8), ('shard_map', 4)])
def test_rows_spread_over_devices(way, count):
    weights, z, items, target = draw(seed=1)
    rank = scorers.ranker(last, devices.choose(way, count), chunk=64)
    for ours, theirs in zip(rank(weights, z, items, target, rows=20),
                            counted(weights, z, items, target), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_refuses_scores_that_are_not_finite(value):
    weights, z, items, target = draw(whole=False)
    z[33, 2] = value
    with pytest.raises(FloatingPointError, match=r'mine: the score of item 33 in row 0 is'):
        scorers.ranker(last, ONE)(weights, z, items, target, name='mine')


def test_large_scores_are_finite_too():
    """Sessions whose squared length overflows, and whose scores do not."""
    weights, z, items, target = draw()
    huge = {'turn': weights['turn'] * np.float32(2.0**64)}
    with np.errstate(over='ignore'):
        assert np.isinf((np.asarray(last(huge, z, items)) ** 2).sum(axis=1)).any()
    above, equal = scorers.ranker(last, ONE)(huge, z, items, target)
    expected = counted(weights, z, items, target)
    np.testing.assert_array_equal(above, expected[0])
    np.testing.assert_array_equal(equal, expected[1])

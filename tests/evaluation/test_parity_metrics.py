"""hit, MRR and NDCG equal to torchmetrics, on rankings without ties and, where it has a rule, with.

torchmetrics' NDCG counts tied items as the mean over their orders, as everything here does.
"""

import numpy as np
import pytest
import torch

from tpad_jax.evaluation import metrics

V, R = 60, 150
PEERS = {'hit': 'retrieval_hit_rate', 'mrr': 'retrieval_reciprocal_rank',
         'ndcg': 'retrieval_normalized_dcg'}


def drawn(levels=None, seed=0):
    """Scores [R, V + 1] and targets [R]: all different, or of a few levels."""
    rng = np.random.default_rng(seed)
    scores = np.stack([rng.permutation(V + 1) for _ in range(R)]).astype(np.float32)
    scores = scores if levels is None else scores % levels
    return scores, rng.integers(1, V + 1, R)


def peer(name, scores, target, k):
    """The library's figure of every row, float64 [R]."""
    from torchmetrics.functional import retrieval  # here, since it takes seconds to import
    gain = getattr(retrieval, PEERS[name])
    relevant = torch.zeros(R, V, dtype=torch.long)
    relevant[torch.arange(R), torch.from_numpy(target) - 1] = 1
    ranked = torch.from_numpy(scores[:, 1:] + 1)  # it never finds what scores 0
    return np.array([float(gain(s, t, top_k=k))
                     for s, t in zip(ranked, relevant, strict=True)])


@pytest.mark.parametrize('k', [1, 5, 20, V])
@pytest.mark.parametrize('name', PEERS)
def test_without_ties(name, k):
    scores, target = drawn()
    above, equal = metrics.counts(scores, target)
    assert (equal == 1).all()
    np.testing.assert_allclose(metrics.mean_gain(metrics.GAINS[name], above, equal, k),
                               peer(name, scores, target, k), atol=1e-6)


@pytest.mark.parametrize('levels', [1, 2, 7])
@pytest.mark.parametrize('k', [1, 5, 20])
def test_ndcg_with_ties(levels, k):
    scores, target = drawn(levels)
    above, equal = metrics.counts(scores, target)
    assert (equal > 1).all()
    np.testing.assert_allclose(metrics.mean_gain(metrics.GAINS['ndcg'], above, equal, k),
                               peer('ndcg', scores, target, k), atol=1e-6)


@pytest.mark.parametrize('name', PEERS)
def test_ties_are_the_mean_over_drawn_orders(name):
    """The library on many rankings, ties broken at random, comes to what ours says at once."""
    scores, target = drawn(4)
    above, equal = metrics.counts(scores, target)
    rng, orders = np.random.default_rng(1), 10
    broken = np.mean([peer(name, scores + rng.random(scores.shape).astype(np.float32), target, 10)
                      for _ in range(orders)], axis=0)
    difference = broken - metrics.mean_gain(metrics.GAINS[name], above, equal, 10)
    assert abs(difference.mean()) < 3.5 * difference.std() / R ** 0.5

"""What lists show beyond accuracy, against another implementation one item at a time."""

import itertools
import math

import numpy as np
import pytest

from tpad_jax.evaluation import lists, metrics


def test_random_lists_equal_an_independent_implementation():
    rng, total, size = np.random.default_rng(0), 60, 40
    found = np.array([rng.choice(np.arange(1, 45), 20, replace=False) for _ in range(size)])
    counts = np.append(0, rng.poisson(2.0, total))
    warm, target = counts > 0, rng.integers(0, total + 1, size)
    content = rng.normal(size=(total + 1, 2, 3))
    content[7] = 0
    got = lists.measured(found, target, counts, warm, content)
    exposure = [sum(int(item in row) for row in found) for item in range(1, total + 1)]
    unequal = sum(abs(a - b) for a in exposure for b in exposure)
    places = [int(item) for row in found for item in row]
    followed = [int(counts[item]) for item in target if item]

    def cosine(a, b):
        a, b = content[a].ravel(), content[b].ravel()
        norm = math.sqrt((a @ a) * (b @ b))
        return a @ b / norm if norm else 0.0

    pairs = [1 - cosine(a, b) for row in found for a, b in itertools.combinations(row, 2)]
    like = {'coverage': len(set(places)) / total, 'gini': unequal / (2 * total * sum(exposure)),
            'novelty': sum(-math.log2((counts[i] + 1) / (counts.sum() + total)) for i in places)
            / len(places), 'diversity': sum(pairs) / len(pairs),
            'popularity': sum(int(counts[i]) for i in places) / len(places)
            / (sum(followed) / len(followed)),
            'cold': sum(counts[i] == 0 for i in places) / len(places)}
    assert got == pytest.approx(like, abs=1e-9)
    none = lists.measured(found, np.zeros(size, int), counts, warm)
    assert none['diversity'] is none['popularity'] is None


@pytest.mark.parametrize('kind', [np.float32, np.float64])
def test_first_items_go_by_score_then_by_item(kind):
    scores = np.random.default_rng(0).integers(0, 4, (700, 31)).astype(kind)
    found = lists.first(lambda items: scores[items[:, 0]], np.arange(700)[:, None], 30)
    np.testing.assert_array_equal(found, metrics.top(scores, 20))


def test_reliability():
    rng = np.random.default_rng(0)
    confidence = rng.random(10_000)
    right = (rng.random(10_000) < confidence).astype(float)
    found = lists.reliability(confidence, right)
    assert found['error'] < 0.02
    assert [x['rows'] for x in found['curve']] == [1000] * 10
    assert found['curve'][0]['predicted'] == pytest.approx(np.sort(confidence)[:1000].mean())
    skewed = lists.reliability(confidence, np.ones(10_000))
    assert skewed['error'] == pytest.approx(1 - confidence.mean())

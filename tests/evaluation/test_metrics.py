"""Ranking metrics against hand-counted values, all orders of tied items and all targets."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from tpad_jax.evaluation import metrics

BY_HAND = {
    'hit': lambda place, k: float(place <= k),
    'mrr': lambda place, k: (place <= k) / place,
    'ndcg': lambda place, k: (place <= k) / np.log2(place + 1),
}
# rows without ties, with ties above, around and below the edge, and all alike; column 0 is padding
SCORES = np.array([[9, 5, 4, 3, 2, 1],
                   [9, 2, 2, 2, 1, 0],
                   [9, 3, 1, 1, 1, 0],
                   [9, 0, 7, 0, 7, 0],
                   [-9, 1, 1, 1, 1, 1]], np.float32)


def orders(row):
    """All rankings (tuples of ids) of a row of scores that its ties allow, equally likely."""
    items = range(1, len(row))
    every = itertools.permutations(items)
    return [order for order in every if all(row[a] >= row[b] for a, b in itertools.pairwise(order))]


def test_counts_by_hand_ignore_the_padding_column():
    above, equal = metrics.counts(SCORES, np.array([3, 3, 5, 4, 2]))
    assert above.tolist() == [2, 0, 4, 0, 0]
    assert equal.tolist() == [1, 3, 1, 2, 5]
    assert above.dtype == equal.dtype == np.int32


def test_counts_over_parts_of_a_catalogue_add_up():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (20, 41)).astype(np.float32)
    target = rng.integers(1, 11, 20)
    whole = metrics.counts(scores, target)
    own = np.take_along_axis(scores, target[:, None], 1)
    first = metrics.counts(scores[:, :11], target)
    # the other part, the target's score standing where its own column was
    rest = metrics.counts(np.concatenate([own, own, scores[:, 11:]], 1), np.ones(20, int))
    np.testing.assert_array_equal(whole[0], first[0] + rest[0])
    np.testing.assert_array_equal(whole[1], first[1] + rest[1] - 1)


@pytest.mark.parametrize('name', BY_HAND)
@pytest.mark.parametrize('k', [1, 2, 3, 5, 20])
def test_a_tied_target_counts_as_the_mean_over_all_orders(name, k):
    for row in SCORES:
        for target in range(1, len(row)):
            mean = np.mean([BY_HAND[name](order.index(target) + 1, k) for order in orders(row)])
            above, equal = metrics.counts(row[None], np.array([target]))
            found = getattr(metrics, name)(above, equal, k)
            np.testing.assert_allclose(found, [mean], atol=1e-12)


def test_known_values():
    assert metrics.mrr(2, 1, 20) == pytest.approx(1 / 3)
    assert metrics.ndcg(2, 1, 20) == pytest.approx(0.5)
    assert metrics.mrr(1, 2, 2) == pytest.approx((1 / 2 + 0) / 2)
    assert metrics.hit(19, 4, 20) == pytest.approx(1 / 4)
    assert metrics.hit(20, 1, 20) == 0


def test_several_k_broadcast():
    above, equal = np.array([0, 4, 30]), np.array([3, 1, 2])
    curve = metrics.ndcg(above[:, None], equal[:, None], np.arange(1, 51))
    assert curve.shape == (3, 50)
    for k in (1, 5, 31, 50):
        np.testing.assert_allclose(curve[:, k - 1], metrics.ndcg(above, equal, k))


@pytest.mark.parametrize('depth', [1, 2, 3, 4, 7])
def test_places_are_means_over_all_orders(depth):
    weights = np.random.default_rng(1).random((2, *SCORES.shape))
    found = metrics.places(SCORES, weights, depth)
    assert found.shape == (2, len(SCORES), depth)
    for table, result in zip(weights, found, strict=True):
        for row, weight, places in zip(SCORES, table, result, strict=True):
            mean = np.mean([weight[list(order)] for order in orders(row)], axis=0)
            np.testing.assert_allclose(places, np.append(mean, np.zeros(7))[:depth], atol=1e-12)


@pytest.mark.parametrize('name', BY_HAND)
def test_expected_is_the_sum_over_all_targets(name):
    """E[metric] = sum over targets of P(target) metric(target): no place is named there."""
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 12, (30, 61)).astype(np.float32)
    truth = rng.dirichlet(np.full(60, 0.3), 30)
    truth = np.pad(truth, ((0, 0), (1, 0)))
    for k in (1, 7, 20):
        total = 0
        for target in range(1, 61):
            above, equal = metrics.counts(scores, np.full(30, target))
            total += truth[:, target] * metrics.mean_gain(metrics.GAINS[name], above, equal, k)
        placed = metrics.places(scores, [truth], 20)[0]
        found = metrics.expected(metrics.GAINS[name], placed, k)
        np.testing.assert_allclose(found, total, atol=1e-12)
    whole = metrics.places(scores, [truth], 60)[0]
    np.testing.assert_allclose(metrics.expected(metrics.GAINS['hit'], whole, 60), 1)


def test_every_part_has_one_shape_and_every_row_comes_once():
    items = np.arange(1, 12)[:, None].astype(np.int32)
    shapes = []

    def scorer(part):
        shapes.append(part.shape)
        return jnp.asarray(part[:, :1] * np.ones((1, 4)), jnp.bfloat16)

    rows = np.zeros(11)
    for part, scores in metrics.scored(scorer, items, 3, chunk=4):
        assert scores.dtype == np.float32
        rows[part] += scores[:, 1]
    np.testing.assert_array_equal(rows, items[:, 0])
    assert shapes == [(4, 1)] * 3


@pytest.mark.parametrize(('rows', 'items', 'expected'), [
    (6, 600, {512}),  # one compiled shape
    (700, 600, {512}),
    (24, 1_000_000, {24}),  # 512 rows would be 2 GB
    (100, 1_000_000, {67}),
])
def test_few_rows_of_a_large_catalogue_are_not_filled_up(rows, items, expected, monkeypatch):
    monkeypatch.setattr(metrics, 'CHUNK', 512)
    shapes = set()

    def scorer(part):
        shapes.add(len(part))
        return metrics.Sparse(sp.csr_array((len(part), items + 1), dtype=np.float32),
                              np.zeros(items + 1, np.float32))

    every = [part for part, _ in metrics.scored(scorer, np.ones((rows, 2), np.int32), items)]
    assert shapes == expected
    assert sum(part.stop - part.start for part in every) == rows


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_names_the_model(bad):
    def scorer(items):
        scores = np.zeros((len(items), 6))
        scores[:, 0] = np.nan  # padding may hold anything
        scores[items[:, 0] == 5, 3] = bad
        return scores

    items = np.arange(1, 9, dtype=np.int32)[:, None]
    with pytest.raises(FloatingPointError, match='gnn: the score of item 3 in row 4'):
        metrics.ranks(scorer, items, np.ones(8, int), 5, chunk=3, name='gnn')
    assert metrics.ranks(scorer, items[:4], np.ones(4, int), 5)[1].tolist() == [5] * 4


def test_scores_of_a_wrong_shape_name_the_model():
    with pytest.raises(ValueError, match=r'gnn: scores of shape \(2, 5\)'):
        metrics.ranks(lambda items: np.zeros((len(items), 5)), np.ones((2, 3), np.int32),
                      np.ones(2, int), 5, chunk=2, name='gnn')


def drawn_sparse(seed, rows=40, items=30, levels=4):
    """Sparse scores of few different values: ties, explicit zeros, cells of padding."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.integers(-levels, levels + 1, shape) / 10).astype(np.float32)

    table = draw(rows, items + 1)
    held = rng.random(table.shape) < rng.random((rows, 1))  # from empty rows to full ones
    row, item = np.nonzero(held)
    order = rng.permutation(len(row))  # csr cells stand in any order
    order = order[np.argsort(row[order], kind='stable')]
    found = sp.csr_array((table[row, item][order], item[order],
                          np.append(0, np.cumsum(held.sum(1)))), shape=table.shape)
    background = draw(items + 1)
    return metrics.Sparse(found, background), table * held + background


@pytest.mark.parametrize('seed', range(4))
def test_sparse_scores_count_as_their_dense_table(seed):
    scores, table = drawn_sparse(seed)
    np.testing.assert_array_equal(metrics.dense(scores), table)
    equals = set()
    for target in range(1, 31):
        target = np.full(40, target)
        for found, expected in zip(metrics.counts(scores, target), metrics.counts(table, target),
                                   strict=True):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == np.int32
        equals |= set(expected)
    assert len(equals) > 5


def test_sparse_sums_tie_where_float32_ties_them():
    """1e8 + 1 is 1e8 in float32: the found cell does not lift its item."""
    scores = metrics.Sparse(sp.csr_array(np.array([[0, 1, 0, 0]], np.float32)),
                            np.array([0, 1e8, 1e8, 1], np.float32))
    assert [int(count[0]) for count in metrics.counts(scores, np.array([2]))] == [0, 2]
    assert [int(count[0]) for count in metrics.counts(scores, np.array([3]))] == [2, 1]


def test_sparse_scores_are_read_and_placed_as_dense_ones():
    scores, table = drawn_sparse(7, rows=12)
    items = np.arange(12, dtype=np.int32)[:, None]
    target = np.random.default_rng(0).integers(1, 31, 12)

    def sparse(part):
        return metrics.Sparse(scores.found[part[:, 0]].astype(float), scores.background)

    for found, expected in zip(metrics.ranks(sparse, items, target, 30, chunk=5),
                               metrics.counts(table, target), strict=True):
        np.testing.assert_array_equal(found, expected)
    for part, read in metrics.scored(sparse, items, 30, chunk=5):
        assert isinstance(read, metrics.Sparse)
        np.testing.assert_array_equal(metrics.dense(read), table[part])
        assert metrics.dense(read).dtype == np.float32
    weights = np.random.default_rng(1).random((1, *table.shape))
    np.testing.assert_array_equal(metrics.places(scores, weights, 9),
                                  metrics.places(table, weights, 9))


def test_unusable_sparse_scores_name_the_model():
    items, target = np.ones((2, 1), np.int32), np.ones(2, int)

    def ranked(found, background):
        scores = metrics.Sparse(sp.csr_array(np.array(found, float)), np.array(background))
        return metrics.ranks(lambda _: scores, items, target, 2, chunk=2, name='sr')

    ranked([[np.nan, 1, 0], [0, 0, 0]], [np.inf, 0, 0])  # padding may hold anything
    with pytest.raises(FloatingPointError, match='sr: the score of item 2 in row 1 is inf'):
        ranked([[0, 0, 0], [0, 0, np.inf]], [0, 0, 0])
    with pytest.raises(FloatingPointError, match='sr: the score of item 1 in row 0 is nan'):
        ranked([[0, 0, 0], [0, 0, 1]], [0, np.nan, 0])
    with pytest.raises(FloatingPointError, match='sr: the score of item 2 in row 1 is inf'):
        ranked([[0, 0, 0], [0, 0, 3e38]], [0, 0, 3e38])
    with pytest.raises(ValueError, match=r'sr: scores of shape \(2, 2\)'):
        ranked([[0, 0], [0, 1]], [0, 0, 0])
    with pytest.raises(ValueError, match=r'sr: scores of shape \(2,\)'):
        ranked([[0, 0, 0], [0, 0, 1]], [0, 0])

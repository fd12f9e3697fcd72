"""Session neighbours against loops written from the papers' equations."""

import math

import numpy as np
import pytest

from tpad_jax.baselines import neighbours as neighbours_lib
from tpad_jax.data.sessions import Sessions, rows
from tpad_jax.evaluation import metrics

V = 15  # 14 and 15 stay cold


def sessions(lists, ordered=True):
    lengths = [len(items) for items in lists]
    start = np.arange(len(lists)) if ordered else np.zeros(len(lists), int)
    return Sessions(np.concatenate(lists).astype(np.int32),
                    np.append(0, np.cumsum(lengths)).astype(np.int64), start)


def drawn(seed, count, items=V - 2, longest=9):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, items + 1, rng.integers(1, longest)).tolist() for _ in range(count)]


LISTS = drawn(0, 60)
TRAIN = sessions(LISTS)
HELD = rows(sessions(drawn(1, 25, items=V)), 7).items
LAST_PLACE = [{item: place for place, item in enumerate(items, 1)} for items in LISTS]


def prefix(row):
    """The items of a padded row with their last places, and its length."""
    items = [int(item) for item in row if item]
    return {item: place for place, item in enumerate(items, 1)}, len(items)


def idf(item, weight):
    held = sum(item in places for places in LAST_PLACE)
    return 1 + weight * math.log(len(LISTS) / held)


def neighbours(row, similarity, k, sample_size):
    """[(similarity, places, shared items by recency in the prefix)] of the k nearest sessions."""
    places, _ = prefix(row)
    candidates = [n for n, held in enumerate(LAST_PLACE) if places.keys() & held.keys()]
    candidates = candidates[-sample_size:]
    found = []
    for n in candidates:
        shared = sorted(places.keys() & LAST_PLACE[n].keys(), key=lambda item: -places[item])
        found.append((similarity(n, shared), n, shared))
    return sorted(found, key=lambda one: (-one[0], -one[1]))[:k]


def assert_proportional(found, expected):
    """Equal row by row up to a positive factor, and zero in the same places."""
    found, expected = found.astype(np.float64), np.array(expected)
    np.testing.assert_array_equal(found != 0, expected != 0)
    top = expected.max(axis=1, keepdims=True)
    ratio = np.where(top > 0, found.max(axis=1, keepdims=True) / np.where(top > 0, top, 1), 1)
    assert (ratio > 0).all()
    np.testing.assert_allclose(found, expected * ratio, rtol=1e-5, atol=1e-7)


def vsknn_loop(row, k, sample_size, position_power, cosine, step_power, idf_weight, repeats):
    places, length = prefix(row)

    def similarity(n, shared):
        total = sum((places[item] / length) ** position_power for item in shared)
        return total / math.sqrt(len(LAST_PLACE[n])) if cosine else total

    scores = np.zeros(V + 1)
    for similar, n, shared in neighbours(row, similarity, k, sample_size):
        steps = length - places[shared[0]] + 1
        for item in LAST_PLACE[n]:
            if repeats or item not in places:
                scores[item] += similar * steps ** -step_power * idf(item, idf_weight)
    return scores


@pytest.mark.parametrize('options', [
    dict(k=5, sample_size=12, position_power=1.0, cosine=False, step_power=1.0, idf_weight=0.0,
         repeats=True),
    dict(k=1000, sample_size=1000, position_power=1.0, cosine=False, step_power=0.0,
         idf_weight=0.0, repeats=True),
    dict(k=7, sample_size=1000, position_power=0.4, cosine=True, step_power=2.0, idf_weight=1.5,
         repeats=False),
], ids=['paper', 'all', 'options'])
def test_vsknn_by_loops(options):
    found = metrics.dense(neighbours_lib.fit_vsknn(TRAIN, V, **options)(HELD))
    assert_proportional(found, [vsknn_loop(row, **options) for row in HELD])


def stan_loop(row, k, sample_size, lambda1, lambda2, lambda3, lambda4=math.inf, idf_weight=0.0,
              after=False, repeats=True):
    places, length = prefix(row)

    def similarity(n, shared):
        total = sum(math.exp((places[item] - length) / lambda1) for item in shared)
        total /= math.sqrt(length * len(LAST_PLACE[n]))
        return total * math.exp(-(len(LISTS) - n) / len(LISTS) / lambda2)

    scores = np.zeros(V + 1)
    for similar, n, shared in neighbours(row, similarity, k, sample_size):
        star = LAST_PLACE[n][shared[0]]
        step = math.exp((places[shared[0]] - length) / lambda4)
        for item, place in LAST_PLACE[n].items():
            if (repeats or item not in places) and (place > star or not after):
                scores[item] += similar * step * math.exp(-abs(place - star) / lambda3) * idf(
                    item, idf_weight)
    return scores


STAN = dict(k=6, sample_size=15, lambda1=1.3, lambda2=0.4, lambda3=2.05)
SEQUENTIAL = dict(lambda4=1.7, idf_weight=2.0, after=True, repeats=False)


def test_stan_by_loops():
    found = metrics.dense(neighbours_lib.fit_stan(TRAIN, V, **STAN)(HELD))
    assert_proportional(found, [stan_loop(row, **STAN) for row in HELD])
    whole = STAN | dict(k=1000, sample_size=1000, repeats=False)
    found = metrics.dense(neighbours_lib.fit_stan(TRAIN, V, **whole)(HELD))
    assert_proportional(found, [stan_loop(row, **whole) for row in HELD])


@pytest.mark.parametrize('changed', [{}, dict(after=False), dict(repeats=True)], ids=str)
def test_vstan_by_loops(changed):
    options = STAN | SEQUENTIAL | changed
    found = metrics.dense(neighbours_lib.fit_vstan(TRAIN, V, **options)(HELD))
    assert_proportional(found, [stan_loop(row, **options) for row in HELD])


def test_without_its_additions_vstan_is_stan():
    stan = neighbours_lib.fit_stan(TRAIN, V, **STAN)(HELD)
    plain = neighbours_lib.fit_vstan(TRAIN, V, **STAN, lambda4=np.inf, idf_weight=0.0)(HELD)
    np.testing.assert_array_equal(metrics.dense(plain), metrics.dense(stan))


def test_a_recent_session_weighs_more_and_an_old_one_is_not_sampled():
    train = sessions([[1, 2], [1, 3], [1, 4]])
    row = np.array([[1]], np.int32)
    score = metrics.dense(neighbours_lib.fit_stan(train, 4, lambda2=0.5)(row))[0]
    assert score[4] > score[3] > score[2] > 0
    assert score[3] / score[4] == pytest.approx(math.exp(-1 / 3 / 0.5))
    score = metrics.dense(neighbours_lib.fit_vsknn(train, 4, sample_size=2)(row))[0]
    assert score[2] == 0 < score[3]
    # of equally similar ones the more recent
    assert metrics.dense(neighbours_lib.fit_vsknn(train, 4, k=1)(row))[0, 2:].argmax() == 2


def test_however_steep_the_recency_the_latest_candidate_counts():
    train = sessions([[1, 2], *[[3, 4]] * 5000])
    recommend = neighbours_lib.fit_stan(train, 4, lambda2=1e-4)
    score = metrics.dense(recommend(np.array([[1]], np.int32)))
    assert score[0, 2] > 0


def test_an_item_far_behind_is_found_however_steep_the_weights():
    row = np.array([[1, *[9] * 60]], np.int32)  # no session holds 9
    steep = neighbours_lib.fit_vstan(sessions([[1, 2], [3, 4]]), 9, lambda1=0.3, lambda4=0.3)
    assert metrics.dense(steep(row))[0, 2] > 0.01
    vanishing = neighbours_lib.fit_vstan(sessions([[1, 2], [3, 4]]), 9, lambda1=0.01, lambda4=0.01)
    assert np.isfinite(metrics.dense(vanishing(row))).all()


def test_where_the_order_means_nothing_recency_is_off():
    lists = [[1, 2], [1, 3], [1, 4]] * 20
    row = np.array([[1]], np.int32)
    unordered = sessions(lists, ordered=False)
    for fit in (neighbours_lib.fit_stan, neighbours_lib.fit_vstan):
        score = metrics.dense(fit(unordered, 4)(row))[0]
        assert score[2] == score[3] == score[4] > 0
        same = fit(sessions(lists), 4, ordered=False)(row)
        np.testing.assert_array_equal(metrics.dense(same)[0], score)
        assert len(set(metrics.dense(fit(sessions(lists), 4)(row))[0, 2:])) == 3
    # the last sessions are sampled no more often than the first
    blocks = sessions([[1, 2]] * 200 + [[1, 3]] * 200, ordered=False)
    score = metrics.dense(neighbours_lib.fit_vsknn(blocks, 3, k=100, sample_size=100)(row))[0]
    assert 0.5 < score[2] / score[3] < 2
    latest = neighbours_lib.fit_vsknn(blocks, 3, k=100, sample_size=100, ordered=True)(row)
    assert metrics.dense(latest)[0, 2] == 0


@pytest.mark.parametrize('fit', [neighbours_lib.fit_vsknn, neighbours_lib.fit_stan,
                                 neighbours_lib.fit_vstan])
def test_rows_without_neighbours_score_nothing(fit):
    scorer = fit(TRAIN, V)
    alone = metrics.dense(scorer(np.array([[V, 0], [V - 1, V]], np.int32)))
    assert alone.shape == (2, V + 1)
    assert not alone.any()
    among = metrics.dense(scorer(np.array([[1, 2], [V, 0], [3, 0]], np.int32)))
    assert among.any(axis=1).tolist() == [True, False, True]


def test_latest_places():
    row, item, place, length = neighbours_lib.latest_places(
        np.array([[4, 2, 4, 0], [7, 0, 0, 0], [1, 1, 1, 1]], np.int32))
    assert row.tolist() == [0, 0, 1, 2]
    assert item.tolist() == [4, 2, 7, 1]
    assert place.tolist() == [3, 2, 1, 4]
    assert length.tolist() == [3, 3, 1, 4]


@pytest.mark.parametrize('fit', [neighbours_lib.fit_stan, neighbours_lib.fit_vstan])
def test_a_long_session_makes_few_cells(fit, monkeypatch):
    """Memory grows with a session's length, not with its square."""
    made = []
    event_items = neighbours_lib._event_items
    monkeypatch.setattr(neighbours_lib, '_event_items',
                        lambda *a: made.append(event_items(*a)) or made[0])
    length = 2000
    train = sessions([[1, 2], list(range(1, length + 1))])
    scores = metrics.dense(fit(train, length)(np.array([[1000]], np.int32)))[0]
    assert made[0].nnz < length * (2 * neighbours_lib.WINDOW + 1) + 9
    # what is near the shared item is scored as without the limit
    near = np.arange(950, 1051)
    expected = np.exp(-np.abs(near - 1000) / 4.0)
    np.testing.assert_allclose(scores[near] / scores[1000], expected, rtol=1e-4)


def test_the_limit_leaves_shorter_sessions_and_wide_lambdas_alone():
    train = sessions([list(range(1, 91)), list(range(100, 800))])
    index = neighbours_lib._index(train, 800, True)
    for lambda3 in (0.3, 4.0, 30.0):
        table = neighbours_lib._event_items(index, lambda3, 0.0, False).toarray()
        assert (table[:90, 1:91] > 0).all()
    assert (table[90, 100:600] > 0).all()  # exp(-500 / 30) is more than float32 resolves

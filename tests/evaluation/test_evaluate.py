"""Evaluation: slices by hand, independence of chunks, and the planted catalogue's oracle."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tpad_jax.baselines import rules
from tpad_jax.data.sessions import Rows, Sessions, rows, warm_items
from tpad_jax.data.synthetic import planted as planted_lib
from tpad_jax.errors import InputError
from tpad_jax.evaluation import evaluate, metrics, slices

V = 120


def as_sessions(padded):
    lengths = (padded > 0).sum(1)
    return Sessions(padded[padded > 0].astype(np.int32),
                    np.append(0, np.cumsum(lengths)).astype(np.int64), np.arange(len(padded)))


def split(planted, count, seed, warm_only=False):
    rng = np.random.default_rng(seed)
    return as_sessions(planted_lib.sample_sessions(planted, count, rng, warm_only))


@pytest.fixture(scope='module')
def world():
    """(train, test rows, warm, probabilities) of a small planted catalogue."""
    planted = planted_lib.draw(0, V)
    train = split(planted, 800, 1, warm_only=True)
    asins = ['', *(planted_lib.asin(item) for item in range(1, V + 1))]
    probabilities = planted_lib.catalogue_probabilities(planted, asins)
    return train, rows(split(planted, 300, 2), 8), warm_items(train, V), probabilities


def noise(items, salt=0):
    """Scores with many ties that depend on the last item only."""
    last = np.take_along_axis(items, np.count_nonzero(items, axis=1)[:, None] - 1, axis=1)
    return ((last * 7919 + np.arange(V + 1) * (104729 + salt)) % 17).astype(np.float32)


def by_hand():
    """Four items, of which 4 is cold; a scorer that always ranks 1, 2, 3, 4."""
    made = Rows(items=np.array([[1, 0, 0], [1, 2, 0], [3, 1, 2], [2, 0, 0]], np.int32),
                next=np.zeros((4, 3), np.int32), target=np.array([2, 1, 4, 4], np.int32),
                session=np.arange(4, dtype=np.int32))
    warm = np.array([False, True, True, True, False])
    return made, warm, lambda items: np.tile([0., 4, 3, 2, 1], (len(items), 1))


def test_slices_by_hand():
    made, warm, scorer = by_hand()
    result, places = evaluate.evaluate(scorer, made, warm, ks=(1, 2))
    assert places['above'].tolist() == [1, 0, 3, 3]
    assert places['equal'].tolist() == [1, 1, 1, 1]
    parts = result['slices']
    assert {name: part['rows'] for name, part in parts.items()} == {
        'warm': 2, 'cold': 2, 'repeat': 1, 'new': 3, 'length_1': 2, 'length_2': 1,
        'length_3-5': 1, 'length_6+': 0}
    assert (result['rows'], result['tied_share']) == (4, 0)
    assert result['hit@1'] == 1 / 4
    assert result['mrr@2'] == pytest.approx((1 / 2 + 1) / 4)
    assert parts['warm']['hit@1'] == 1 / 2
    assert parts['warm']['ndcg@2'] == pytest.approx((1 / np.log2(3) + 1) / 2)
    assert parts['cold']['mrr@2'] == 0
    assert parts['repeat']['hit@1'] == 1
    assert parts['length_1']['hit@2'] == 1 / 2
    assert parts['length_6+']['hit@1'] is None
    assert not any(key.startswith('expected') for key in result)
    json.dumps(result, allow_nan=False)


def test_expected_hits_by_hand():
    made, warm, scorer = by_hand()
    truth = np.array([[0, .1, .2, .3, .4], [0, .7, .1, .1, .1], [0, .25, .25, .25, .25],
                      [0, 0, .5, .5, 0]])

    def probabilities(items):
        return truth[[made.items.tolist().index(row) for row in items.tolist()]]

    result, _ = evaluate.evaluate(scorer, made, warm, ks=(2, 4),
                                  probabilities=probabilities)
    assert result['expected_hit@2'] == pytest.approx((.3 + .8 + .5 + .5) / 4)
    assert result['expected_mrr@2'] == pytest.approx((.2 + .75 + .375 + .25) / 4)
    assert result['expected_hit@4'] == pytest.approx(1)
    parts = result['slices']
    # item slices: probability found over probability there, in all four rows
    assert parts['warm']['expected_hit@2'] == pytest.approx(2.1 / (.6 + .9 + .75 + 1))
    assert parts['cold']['expected_hit@2'] == 0
    assert parts['cold']['expected_hit@4'] == pytest.approx(1)
    # prefixes hold {1}, {1, 2}, {1, 2, 3}, {2}
    assert parts['repeat']['expected_hit@2'] == pytest.approx((.1 + .8 + .5 + .5) /
                                                               (.1 + .8 + .75 + .5))
    assert parts['new']['expected_hit@2'] == pytest.approx((.2 + 0) / (.9 + .2 + .25 + .5))
    # row slices: the mean over their rows
    assert parts['length_1']['expected_hit@2'] == pytest.approx((.3 + .5) / 2)
    assert parts['length_6+']['expected_hit@2'] is None


def test_without_cold_items_the_cold_slice_is_empty(world):
    _, test, _, probabilities = world
    warm = np.arange(V + 1) > 0
    result, _ = evaluate.evaluate(noise, test, warm, probabilities=probabilities)
    assert result['slices']['cold']['rows'] == 0
    assert result['slices']['cold']['expected_hit@20'] is None
    assert result['slices']['warm']['expected_hit@20'] == result['expected_hit@20']


def test_popularity_quartiles_by_hand():
    # sorted by count: 1 1 | 2 | 4 | 8 of 16 events; their middles: 1, 3, 6 and 12
    counts = np.array([0, 8, 0, 1, 4, 1, 2])
    assert slices.popularity_quartiles(counts).tolist() == [0, 4, 0, 1, 2, 1, 1]
    made, warm, scorer = by_hand()
    result, _ = evaluate.evaluate(scorer, made, warm, ks=(1, 2), counts=np.array([0, 1, 2, 9, 0]))
    parts = {name: result['slices'][name] for name in slices.QUARTILES}
    # targets 2, 1, 4, 4: item 1 and 2 lie in the first quartile of 12 events, 4 is cold
    assert [part['rows'] for part in parts.values()] == [2, 0, 0, 0]
    assert parts['popularity_q1']['hit@1'] == 1 / 2
    assert parts['popularity_q4']['hit@1'] is None


def test_popularity_quartiles_hold_a_quarter_of_the_events_each():
    counts = np.append(0, np.random.default_rng(0).zipf(1.5, 5000) % 200)
    quartile = slices.popularity_quartiles(counts)
    assert ((quartile == 0) == (counts == 0)).all()
    held = np.bincount(quartile, counts)[1:] / counts.sum()
    assert abs(held - 1 / 4).max() < 0.02
    order = np.argsort(counts)
    assert (np.diff(quartile[order]) >= 0).all()
    for count in np.unique(counts):
        assert len(set(quartile[counts == count])) == 1


def test_popularity_slices_partition_the_warm_rows_and_their_truth(world):
    train, test, warm, probabilities = world
    counts = np.bincount(train.items, minlength=V + 1)
    result, _ = evaluate.evaluate(noise, test, warm, probabilities=probabilities, counts=counts)
    plain, _ = evaluate.evaluate(noise, test, warm, probabilities=probabilities)
    parts = [result['slices'].pop(name) for name in slices.QUARTILES]
    assert result == plain
    assert sum(part['rows'] for part in parts) == result['slices']['warm']['rows']
    assert all(part['rows'] for part in parts)
    assert sum(part['rows'] * part['hit@20'] for part in parts) == pytest.approx(
        result['slices']['warm']['hit@20'] * result['slices']['warm']['rows'])
    # the slice of items: probability found in it over probability there
    truth, scores = probabilities(test.items), noise(test.items)
    inside = truth * (slices.popularity_quartiles(counts) == 2)
    found = metrics.places(scores, [inside], 20)[0].sum() / inside.sum()
    assert parts[1]['expected_hit@20'] == pytest.approx(found)


def test_chunks_change_nothing(world, monkeypatch):
    _, test, warm, probabilities = world
    monkeypatch.setattr(metrics, 'CHUNK', 4096)
    whole, places = evaluate.evaluate(noise, test, warm, probabilities=probabilities)
    assert whole['tied_share'] > 0.9
    for chunk in (7, 512):
        monkeypatch.setattr(metrics, 'CHUNK', chunk)
        parts, same = evaluate.evaluate(noise, test, warm, probabilities=probabilities)
        assert parts == whole
        np.testing.assert_array_equal(same['above'], places['above'])
        np.testing.assert_array_equal(same['equal'], places['equal'])


def test_slices_partition_the_rows(world):
    _, test, warm, probabilities = world
    result, places = evaluate.evaluate(noise, test, warm, probabilities=probabilities)
    parts = result['slices']
    for names in (('warm', 'cold'), ('repeat', 'new'), slices.LENGTHS):
        assert sum(parts[name]['rows'] for name in names) == result['rows'] == len(test.target)
        mean = sum(parts[name]['rows'] * parts[name]['mrr@20'] for name in names)
        assert mean / result['rows'] == pytest.approx(result['mrr@20'])
    assert result['hit@10'] == pytest.approx(
        metrics.hit(places['above'], places['equal'], 10).mean())


def test_a_jax_scorer_counts_as_a_numpy_one(world):
    _, test, warm, _ = world
    plain, _ = evaluate.evaluate(noise, test, warm)
    assert evaluate.evaluate(lambda items: jnp.asarray(noise(items)), test, warm)[0] == plain


def test_the_oracle_exceeds_every_scorer(world):
    train, test, warm, probabilities = world
    best, _ = evaluate.evaluate(probabilities, test, warm, probabilities=probabilities)
    scorers = {f'noise {salt}': lambda items, salt=salt: noise(items, salt) for salt in range(3)}
    for name, (fit, _) in rules.BASELINES.items():
        extra = {'features': np.eye(V + 1)} if name in rules.CONTENT else {}
        scorers[name] = fit(train, V, **extra)
    scorers['blurred'] = lambda items: np.sqrt(probabilities(items)) + noise(items) * 1e-3
    for name, scorer in scorers.items():
        result, _ = evaluate.evaluate(scorer, test, warm, probabilities=probabilities, name=name)
        for key in [key for key in best if key.startswith('expected')]:
            assert result[key] < best[key], (name, key)
    # any increasing function of the truth is as good
    logits, _ = evaluate.evaluate(lambda items: np.log(probabilities(items) + 1e-9), test, warm,
                                  probabilities=probabilities)
    assert logits['expected_hit@20'] == pytest.approx(best['expected_hit@20'])


def test_expected_and_sampled_hits_agree(world):
    """On a slice, too: targets are drawn from the distribution the expectation is under."""
    _, test, warm, probabilities = world
    result, _ = evaluate.evaluate(probabilities, test, warm, probabilities=probabilities)
    for part in (result, *(result['slices'][name] for name in ('warm', 'cold', 'new'))):
        for metric in ('hit@5', 'hit@20', 'mrr@20', 'ndcg@20'):
            error = 0.5 / np.sqrt(part['rows'])  # at most: gains lie in 0..1
            assert abs(part[metric] - part[f'expected_{metric}']) < 3.5 * error, metric


def test_a_cold_share_may_exceed_the_oracles(world):
    _, test, warm, probabilities = world
    best, _ = evaluate.evaluate(probabilities, test, warm, probabilities=probabilities)
    result, _ = evaluate.evaluate(lambda items: probabilities(items) + ~warm, test, warm,
                                  probabilities=probabilities)
    assert result['slices']['cold']['expected_hit@20'] > best['slices']['cold']['expected_hit@20']
    assert result['expected_hit@20'] < best['expected_hit@20']


def test_errors_name_the_model(world):
    _, test, warm, _ = world
    with pytest.raises(FloatingPointError, match='sr_gnn: the score of item 1 in row 0 is nan'):
        evaluate.evaluate(lambda items: np.full((len(items), V + 1), np.nan), test, warm,
                          name='sr_gnn')
    empty = rows(as_sessions(np.array([[3, 0]])), 8)
    with pytest.raises(InputError, match='sr_gnn cannot be evaluated'):
        evaluate.evaluate(noise, empty, warm, name='sr_gnn')

"""Baselines against plain loops over sessions."""

import inspect
import itertools
import tracemalloc

import numpy as np
import pytest

from tpad_jax.baselines import rules
from tpad_jax.baselines.tune import check_space
from tpad_jax.data.sessions import Sessions, rows
from tpad_jax.errors import InputError
from tpad_jax.evaluation import metrics

V = 12


def sessions(lists):
    lengths = [len(items) for items in lists]
    return Sessions(np.concatenate(lists).astype(np.int32),
                    np.append(0, np.cumsum(lengths)).astype(np.int64), np.arange(len(lists)))


def drawn(seed, count, items=V - 2, longest=14):
    """Random sessions with repeats; items V - 1 and V stay cold."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, items + 1, rng.integers(2, longest)) for _ in range(count)]


LISTS = drawn(0, 40)
TRAIN = sessions(LISTS)
PREFIXES = np.array([[3, 0, 0, 0, 0], [1, 2, 3, 0, 0], [4, 4, 9, 4, 2], [12, 0, 0, 0, 0],
                     [5, 11, 7, 10, 0]], np.int32)
FEATURES = np.random.default_rng(1).normal(size=(V + 1, 4))
POPULARITY = np.bincount(np.concatenate(LISTS), minlength=V + 1) / sum(map(len, LISTS))


def prefix_weights(prefix, decay):
    """[(item, decay^steps)] of one padded prefix; decay 0 is the last item alone."""
    items = [item for item in prefix if item]
    return [(item, decay ** (len(items) - 1 - k)) for k, item in enumerate(items)]


def rule_scores(pair_weight, longest, decay, backoff, both=False):
    """Rules by loops -> [R, V + 1]."""
    rule = np.zeros((V + 1, V + 1))
    for session in LISTS:
        for a in range(len(session)):
            for b in range(a + 1, min(a + longest + 1, len(session))):
                rule[session[a], session[b]] += pair_weight(b - a)
                if both:
                    rule[session[b], session[a]] += pair_weight(b - a)
    out = []
    for prefix in PREFIXES:
        scores = np.zeros(V + 1)
        for item, weight in prefix_weights(prefix, decay):
            if POPULARITY[item]:
                scores += weight * rule[item] / np.sqrt(POPULARITY[item])
        if scores.sum():
            scores *= (1 - backoff) / scores.sum()
        out.append(scores + backoff * POPULARITY)
    return np.array(out)


def spread(scorer):
    """The scorer with its scores as tables."""
    return lambda items: metrics.dense(scorer(items))


def fitted(name, train=TRAIN):
    fit, _ = rules.BASELINES[name]
    return spread(fit(train, V, FEATURES) if name in rules.CONTENT else fit(train, V))


def test_pop_is_the_share_of_events():
    scores = fitted('pop')(PREFIXES)
    np.testing.assert_allclose(scores, np.tile(POPULARITY, (5, 1)), rtol=1e-6)


def test_repeat_last_ranks_the_latest_first():
    scores = fitted('repeat_last')(PREFIXES)[:, 1:]
    ranked = [[item + 1 for item in np.argsort(-row, kind='stable') if row[item]] for row in scores]
    assert ranked == [[3], [3, 2, 1], [2, 4, 9], [12], [10, 7, 11, 5]]


def test_markov_counts_neighbours():
    expected = rule_scores(lambda lag: 1, 1, 0, 0.25)
    found = spread(rules.fit_markov(TRAIN, V, 0.25))(PREFIXES)
    np.testing.assert_allclose(found, expected, atol=1e-7)
    seen = np.array([b for s in LISTS for a, b in itertools.pairwise(s) if a == 3])
    np.testing.assert_allclose(spread(rules.fit_markov(TRAIN, V, 0))(PREFIXES)[0],
                               np.bincount(seen, minlength=V + 1) / len(seen), atol=1e-7)


@pytest.mark.parametrize('lag_power', [0, 1, 2])
@pytest.mark.parametrize('decay', [0.0, 0.5, 1.0])
def test_rules_by_loops(decay, lag_power):
    for fit, both in ((rules.fit_sr, False), (rules.fit_ar, True)):
        expected = rule_scores(lambda lag: lag ** -float(lag_power), rules.LONGEST_RULE, decay,
                               0.1, both)
        fitted = fit(TRAIN, V, decay=decay, lag_power=lag_power, backoff=0.1)
        found = spread(fitted)(PREFIXES)
        np.testing.assert_allclose(found, expected, atol=1e-7)


def test_association_rules_are_blind_to_order_and_sequential_ones_are_not():
    backwards = sessions([items[::-1] for items in LISTS])
    np.testing.assert_array_equal(fitted('ar')(PREFIXES), fitted('ar', backwards)(PREFIXES))
    assert not np.allclose(fitted('sr')(PREFIXES), fitted('sr', backwards)(PREFIXES))


@pytest.mark.parametrize('repeats', [False, True])
@pytest.mark.parametrize('shrink', [0, 20])
def test_item_knn_is_the_cosine_of_sessions(shrink, repeats):
    held = [set(items.tolist()) for items in LISTS]
    n = [sum(item in s for s in held) for item in range(V + 1)]
    expected = np.zeros((len(PREFIXES), V + 1))
    for row, prefix in enumerate(PREFIXES):
        for item, weight in prefix_weights(prefix, 0.5):
            for other in range(1, V + 1):
                both = sum(item in s and other in s for s in held)
                if both and (repeats or item != other):
                    expected[row, other] += weight * both / np.sqrt(
                        (n[item] + shrink) * (n[other] + shrink))
    scorer = rules.fit_item_knn(TRAIN, V, decay=0.5, shrink=shrink, repeats=repeats)
    np.testing.assert_allclose(spread(scorer)(PREFIXES), expected, atol=1e-6)


@pytest.mark.parametrize('repeats', [False, True])
def test_content_knn_is_the_cosine_of_features(repeats):
    def cosine(a, b):
        return FEATURES[a] @ FEATURES[b] / np.linalg.norm(FEATURES[a]) / np.linalg.norm(FEATURES[b])

    expected = [[sum(weight * cosine(item, other) for item, weight in prefix_weights(prefix, 0.5)
                     if repeats or item != other) for other in range(1, V + 1)]
                for prefix in PREFIXES]
    found = rules.fit_content_knn(TRAIN, V, FEATURES, decay=0.5, repeats=repeats)(PREFIXES)
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-6)


def test_content_knn_ties_equal_features_exactly_and_survives_missing_ones():
    rng = np.random.default_rng(3)
    features = np.tile(rng.normal(size=(1, 37)), (V + 1, 1))
    features[1:4] = rng.normal(size=(3, 37))
    features[4] = 0
    scores = rules.fit_content_knn(TRAIN, V, features)(np.array([[1, 2], [4, 0]], np.int32))
    assert len(np.unique(scores[0, 5:])) == 1
    assert (scores[1] == 0).all()


@pytest.mark.parametrize('cells', [1, 7, 40])
def test_content_knn_in_parts_scores_the_same(monkeypatch, cells):
    expected = rules.fit_content_knn(TRAIN, V, FEATURES)(PREFIXES)
    monkeypatch.setattr(rules, 'CELLS', cells)
    np.testing.assert_array_equal(rules.fit_content_knn(TRAIN, V, FEATURES)(PREFIXES), expected)


def test_content_knn_needs_little_more_than_its_scores():
    items = 100_000
    scorer = rules.fit_content_knn(TRAIN, items, np.ones((items + 1, 2)))
    prefixes = np.ones((64, 3), np.int32)
    tracemalloc.start()
    scores = scorer(prefixes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scores.nbytes < peak < 2.5 * scores.nbytes


@pytest.mark.parametrize('near', [4, V + 1])
def test_content_rules_are_rules_between_smoothed_items(monkeypatch, near):
    monkeypatch.setattr(rules, 'ALIKE', near)
    features = FEATURES.copy()
    features[[0, 7]] = 0  # padding, and an item without content
    known = features.any(axis=1)
    unit = np.where(known[:, None], features - features[known].mean(axis=0), 0)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    kernel = np.zeros((V + 1, V + 1))
    for item, cosines in enumerate(unit @ unit.T):
        cosines[item] = 1
        for other in np.argsort(-cosines, kind='stable')[:near]:
            kernel[item, other] = np.exp(5 * cosines[other]) if cosines[other] > 0 else 0
    smooth = 0.7 * np.eye(V + 1) + 0.3 * kernel / kernel.sum(axis=1, keepdims=True)
    pairs = np.zeros((V + 1, V + 1))
    for one in LISTS:
        for a, b in itertools.combinations(range(len(one)), 2):
            pairs[one[a], one[b]] += (b - a <= rules.LONGEST_RULE) / (b - a)
    scale = 1 / np.sqrt(np.maximum(POPULARITY * sum(map(len, LISTS)), 1))
    expected = np.array([sum(weight * smooth[item] for item, weight in prefix_weights(prefix, 0.5))
                         for prefix in PREFIXES]) @ (scale[:, None] * pairs) @ smooth
    expected = 0.9 * expected / expected.sum(axis=1, keepdims=True) + 0.1 * POPULARITY
    for given in (features, rules.similar(features)):
        scorer = rules.fit_content_rules(TRAIN, V, given, decay=0.5, ordered_pairs=True,
                                         smoothing=0.3, sharpness=5)
        np.testing.assert_allclose(spread(scorer)(PREFIXES), expected, atol=1e-6)
    assert expected[:, V].all()  # a cold item is reached


def test_item_knn_pairs_the_latest_events_of_a_long_session(monkeypatch):
    monkeypatch.setattr(rules, 'LONGEST_SESSION', 3)
    long = [1, 2, 3, 4, 5, 6, 7]
    whole = spread(rules.fit_item_knn(sessions([long, [1, 2]]), V))
    cut = spread(rules.fit_item_knn(sessions([long[-3:], [1, 2]]), V))
    np.testing.assert_array_equal(whole(PREFIXES), cut(PREFIXES))


@pytest.mark.parametrize('name', rules.BASELINES)
@pytest.mark.parametrize('lengths', [[2, 0, 3], [0, 0], [], [1, 1]], ids=str)
def test_empty_and_short_sessions_are_no_fault(name, lengths):
    """Warnings are errors in these tests."""
    train = Sessions(np.arange(1, sum(lengths) + 1, dtype=np.int32),
                     np.append(0, np.cumsum(lengths)).astype(np.int64), np.arange(len(lengths)))
    scores = fitted(name, train)(PREFIXES)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize('name', rules.BASELINES)
def test_scores_depend_on_their_row_alone(name):
    scorer = fitted(name)
    held = rows(sessions(drawn(5, 60, items=V)), 9)
    together = scorer(held.items)
    assert together.shape == (len(held.items), V + 1)
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    order = np.random.default_rng(0).permutation(len(held.items))
    np.testing.assert_array_equal(scorer(held.items[order]), together[order])
    for row in (0, 7, 100):
        np.testing.assert_array_equal(scorer(held.items[row:row + 1])[0], together[row])
    wider = np.pad(held.items, ((0, 0), (0, 3)))
    np.testing.assert_array_equal(scorer(wider), together)


@pytest.mark.parametrize('name', sorted(rules.BASELINES.keys() - set(rules.CONTENT)))
def test_all_but_content_is_sparse(name):
    fit, _ = rules.BASELINES[name]
    scores = fit(TRAIN, V)(PREFIXES)
    assert isinstance(scores, metrics.Sparse)
    assert (scores.found.dtype, scores.background.dtype) == (np.float32, np.float32)
    for found, expected in zip(metrics.counts(scores, np.array([3, 4, 9, 12, 1])),
                               metrics.counts(metrics.dense(scores), np.array([3, 4, 9, 12, 1])),
                               strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('name', ['pop', 'markov', 'sr', 'ar', 'item_knn', 'vsknn', 'stan',
                                  'vstan'])
def test_cold_items_get_nothing(name):
    assert not fitted(name)(PREFIXES)[:, V - 1:].any()


@pytest.mark.parametrize('name', rules.BASELINES)
def test_every_space_holds_the_defaults(name):
    fit, space = rules.BASELINES[name]
    keywords = inspect.signature(fit).parameters
    check_space(space, {key: keywords[key].default for key in space})
    free = {key for key, keyword in keywords.items() if keyword.default is not keyword.empty}
    assert free - {'ordered'} == space.keys()  # all there is to choose is searched


def test_tune_finds_the_best_it_tries(monkeypatch):
    monkeypatch.setattr(rules, 'TUNED_AT', 3)  # of so few items 20 are nearly all
    valid = rows(sessions(drawn(9, 30)), 9)
    tuned = rules.tune('markov', TRAIN, valid, V, trials=8)
    seen = {}
    for one in tuned.record['tried']:
        scorer = rules.fit_markov(TRAIN, V, **one['params'])
        counted = metrics.counts(scorer(valid.items), valid.target)
        seen[one['params']['backoff']] = metrics.hit(*counted, 3).mean()
        assert one['values'] == pytest.approx({'hit@3': seen[one['params']['backoff']],
                                               'mrr@3': metrics.mrr(*counted, 3).mean()})
    assert len(set(seen.values())) > 1
    assert next(iter(seen)) == 0.1  # the default
    assert tuned.valid['hit@3'] == pytest.approx(max(seen.values()))
    assert seen[tuned.params['backoff']] == max(seen.values())
    assert (tuned.record['trials'], tuned.record['rows']) == (8, len(valid.target))
    found = rules.fit_markov(TRAIN, V, **tuned.params)
    np.testing.assert_array_equal(spread(tuned.scorer)(PREFIXES), spread(found)(PREFIXES))


def test_a_budget_of_one_is_the_defaults():
    valid = rows(sessions(drawn(9, 30)), 9)
    for name, expected in (('sr', dict(decay=0.6, lag_power=1, backoff=0.1)), ('pop', {})):
        tuned = rules.tune(name, TRAIN, valid, V, trials=1)
        assert tuned.params == expected
        assert tuned.record['trials'] == 1


def test_tune_reads_a_sample_of_many_rows(monkeypatch):
    monkeypatch.setattr(rules, 'TUNED_ROWS', 100)
    valid = rows(sessions(drawn(9, 60)), 9)
    tuned = rules.tune('ar', TRAIN, valid, V, trials=1, seed=3)
    assert tuned.record['rows'] == 100
    chosen = np.random.default_rng(3).choice(len(valid.target), 100, replace=False)
    counted = metrics.ranks(fitted('ar'), valid.items[chosen], valid.target[chosen], V)
    assert tuned.valid['hit@20'] == pytest.approx(metrics.hit(*counted, 20).mean())


def test_tune_goes_on_from_its_journal(tmp_path, monkeypatch):
    valid = rows(sessions(drawn(9, 30)), 9)
    whole = rules.tune('markov', TRAIN, valid, V, trials=4)
    stored = dict(storage=tmp_path / 'search.journal')
    rules.tune('markov', TRAIN, valid, V, trials=2, **stored)
    counted = []
    ranks = metrics.ranks
    monkeypatch.setattr(metrics, 'ranks', lambda *a, **b: counted.append(1) or ranks(*a, **b))
    resumed = rules.tune('markov', TRAIN, valid, V, trials=4, **stored)
    assert len(counted) == 2
    assert resumed.record == whole.record


def test_tune_learns_that_only_the_last_item_matters(monkeypatch):
    monkeypatch.setattr(rules, 'TUNED_AT', 1)
    rng = np.random.default_rng(0)
    step = rng.permutation(30) + 1  # the successor of each item, among noise that goes before

    def chained(count):
        noise = rng.integers(1, 31, (count, 6))
        return sessions([np.append(row, step[row[-1] - 1]) for row in noise])

    train, valid = chained(400), rows(chained(100), 8, every_prefix=False)
    tuned = rules.tune('sr', train, valid, 30, trials=12)
    assert tuned.params['decay'] < 0.3
    usual = rules.tune('sr', train, valid, 30, trials=1)
    both_ways = rules.tune('ar', train, valid, 30, trials=12)
    assert tuned.valid['hit@1'] > 0.8 > usual.valid['hit@1']
    assert tuned.valid['hit@1'] > both_ways.valid['hit@1']


@pytest.mark.parametrize('name', rules.CONTENT)
def test_tune_passes_features_on(name):
    valid = rows(sessions(drawn(9, 10)), 9)
    tuned = rules.tune(name, TRAIN, valid, V, trials=3, features=FEATURES)
    expected = spread(rules.BASELINES[name][0](TRAIN, V, FEATURES, **tuned.params))(PREFIXES)
    np.testing.assert_array_equal(spread(tuned.scorer)(PREFIXES), expected)


def test_tune_fits_the_chosen_parameters_on_the_final_sessions():
    both = sessions([*LISTS, *drawn(9, 30)])
    valid = rows(sessions(drawn(9, 30)), 9)
    tuned = rules.tune('sr', TRAIN, valid, V, trials=3, final=both)
    assert tuned.valid['hit@20'] == rules.tune('sr', TRAIN, valid, V, trials=3).valid['hit@20']
    expected = rules.fit_sr(both, V, **tuned.params)
    np.testing.assert_array_equal(spread(tuned.scorer)(PREFIXES), spread(expected)(PREFIXES))


def test_tune_says_whether_the_order_of_sessions_is_known():
    valid = rows(sessions(drawn(9, 30)), 9)
    for ordered in (False, True):
        tuned = rules.tune('stan', TRAIN, valid, V, trials=1, ordered=ordered)
        expected = rules.BASELINES['stan'][0](TRAIN, V, ordered=ordered)
        np.testing.assert_array_equal(spread(tuned.scorer)(PREFIXES), spread(expected)(PREFIXES))
    rules.tune('sr', TRAIN, valid, V, trials=1, ordered=False)  # which reads no such thing


def test_tune_refuses_what_it_cannot_use():
    valid = rows(sessions(drawn(9, 5)), 9)
    with pytest.raises(InputError, match=r"unknown baseline 'fpmc'. Expected one of pop,"):
        rules.tune('fpmc', TRAIN, valid, V, trials=1)
    with pytest.raises(InputError, match='content_knn needs item features'):
        rules.tune('content_knn', TRAIN, valid, V, trials=1)
    with pytest.raises(InputError, match='sr reads no item features'):
        rules.tune('sr', TRAIN, valid, V, trials=1, features=FEATURES)
    with pytest.raises(InputError, match='validation split has no rows'):
        rules.tune('sr', TRAIN, rows(sessions([np.array([1])]), 9), V, trials=1)
    with pytest.raises(InputError, match='sr: trials=0: too few'):
        rules.tune('sr', TRAIN, valid, V, trials=0)

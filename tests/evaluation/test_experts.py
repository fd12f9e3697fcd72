"""Experts: the evidence of rules, by brute force; the weights, by the likelihood they reach."""

import itertools

import jax
import numpy as np
import pytest

from tpad_jax.data import item_graphs
from tpad_jax.data.sessions import Rows, Sessions
from tpad_jax.evaluation import experts as fitting
from tpad_jax.models import experts

V, S, N = 30, 60, 6
evidence = jax.jit(experts.evidence)  # or each of its operations were compiled by itself


def drawn(seed=0, count=S):
    """Sessions of an item and its followers on a ring, some events at random."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        steps = rng.choice([1, 1, 1, 7], rng.integers(2, N))
        rows.append(1 + (rng.integers(V // 2) + np.append(0, np.cumsum(steps))) % V)
    offsets = np.append(0, np.cumsum([len(row) for row in rows]))
    return Sessions(np.concatenate(rows).astype(np.int32), offsets, np.arange(count))


def prefixes(sessions):
    items = np.zeros((len(sessions.lengths), N), np.int32)
    target = np.zeros(len(items), np.int32)
    for row, session in enumerate(np.split(sessions.items, sessions.offsets[1:-1])):
        items[row, :len(session) - 1], target[row] = session[:-1], session[-1]
    return Rows(items, items, target, np.arange(len(items)))


def shares_of(train, prefix, decay):
    """The evidence of the rules about a prefix, and whether it holds an item: [V + 1, 5]."""
    sessions = np.split(train.items, train.offsets[1:-1])
    last = prefix[prefix > 0][::-1][:experts.LATEST]
    weight = decay ** np.arange(len(last))
    out = np.zeros((V + 1, 5))
    holds = np.array([np.bincount(np.unique(x), minlength=V + 1) for x in sessions])
    together = holds.T @ holds
    size = np.sqrt(np.diag(together) + 20)
    for item, w in zip(last, weight, strict=True):
        for session in sessions:
            for i, j in itertools.combinations(range(len(session)), 2):
                out[session[j], 0] += (session[i] == last[0] == item) * (j == i + 1)
                out[session[j], 1] += w * (session[i] == item) / (j - i)
        beside = together[item] / size[item] / size
        beside[item] = 0
        out[:, 2] += w * beside
    similar = np.array([sum(w * (item in x) for item, w in zip(last, weight, strict=True))
                        / np.sqrt(len(np.unique(x))) for x in sessions])
    for n in np.lexsort((-np.arange(S), -similar))[:experts.NEAREST]:
        session = sessions[n]
        if similar[n]:
            newest = next(item for item in last if item in session)
            anchor = np.flatnonzero(session == newest)[-1]
            for place, item in enumerate(session):
                out[item, 3] += similar[n] * np.exp(-abs(place - anchor) / experts.REACH)
    out[:, :4] /= np.maximum(out[:, :4].sum(axis=0), 1e-30)
    out[prefix[prefix > 0], 4] = 1
    return out


def test_evidence_equals_brute_force(monkeypatch):
    monkeypatch.setattr(item_graphs, 'PART', 7)  # tables are filled in several parts
    train, rows, decay = drawn(), prefixes(drawn(1, 12)), experts.DECAYS[1]
    table = item_graphs.rules(train, V, holders=S) | {'decay': np.float32(decay)}
    moved = rows.items[:, :2], np.full((12, 2), 0.5, np.float32)
    ids, shares = evidence(table, rows.items, moved)
    for row in range(12):
        cells = np.zeros((V + 1, 6))
        np.add.at(cells, ids[row], np.asarray(shares[row]))
        expected = shares_of(train, rows.items[row], decay)
        np.testing.assert_allclose(cells[:, :5], expected, atol=1e-6)
        assert cells[0].sum() == 0
        assert cells[:, 5].sum() == pytest.approx(0.5 * (moved[0][row] > 0).sum())
        some = np.asarray(ids[row])[np.asarray(shares[row]).any(axis=1)]
        assert len(set(some.tolist())) == len(some)  # one place per item


def test_only_the_most_recent_holders_are_kept():
    table = item_graphs.rules(drawn(), V, holders=2)
    item = drawn().items[0]
    held = [n for n in range(S) if item in np.split(drawn().items, drawn().offsets[1:-1])[n]]
    expected = [np.split(drawn().items, drawn().offsets[1:-1])[n] for n in sorted(held)[-2:][::-1]]
    for number, session in zip(table['holders'][item], expected, strict=True):
        stored = table['sessions'][number]
        np.testing.assert_array_equal(stored[stored > 0], session)


def mixed(fit, table, items, model=None):
    """The log-probabilities that a fit gives, with numpy: [R, V + 1]."""
    w, cold = fit.weights, np.asarray(table['events']) == 0
    ids, shares = map(np.asarray, evidence(table | {'decay': np.float32(fit.decay)}, items))
    scores = w['popularity'] * np.log1p(np.asarray(table['events'])) + w['cold'] * cold
    new = (cold[items] & (items > 0)).sum(axis=1) / (items > 0).sum(axis=1)
    scores = scores + w['cold_prefix'] * new[:, None] * cold
    if model is not None:
        scores = scores + w['model'] * model
    for e, rule in enumerate(experts.RULES):
        shift = w[rule] * np.log1p(shares[..., e] * np.exp(-w[f'floor_{rule}']))
        np.add.at(scores, (np.arange(len(items))[:, None], ids), shift)
    np.add.at(scores, (np.arange(len(items))[:, None], ids), w['held'] * shares[..., 4])
    scores[:, 0] = -np.inf
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def test_a_fit_is_the_likelihood_it_reports_and_beats_every_part(monkeypatch):
    monkeypatch.setattr(fitting, 'PART_CELLS', 13 * (V + 1))  # 100 rows do not divide into parts
    train, valid = drawn(0, 200), prefixes(drawn(1, 100))
    table = fitting.tables(train, V, None, ordered=True)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(V + 1, V + 1)).astype(np.float32)
    scores[np.arange(V), 1 + np.arange(V)] += 2  # knows the ring

    def model(items):
        last = items[np.arange(len(items)), np.maximum((items > 0).sum(axis=1) - 1, 0)]
        return scores[last]

    every = fitting.fit(model, table, valid, fitting.NAMES)
    probabilities = mixed(every, table, valid.items, model(valid.items))
    nll = -probabilities[np.arange(100), valid.target].mean()
    assert every.nll == pytest.approx(nll, abs=1e-4)
    assert every.rows == 100
    for names in (['model'], ['followers'], [n for n in fitting.NAMES if n != 'model']):
        part = fitting.fit(model, table, valid, names)
        assert every.nll < part.nll + 1e-3
        assert all(x == 0 for name, x in part.weights.items()
                   if fitting.WEIGHTS[name][3] not in names)


def test_a_useless_model_gets_no_weight_and_a_small_validation_keeps_the_prior():
    train, valid = drawn(0, 200), prefixes(drawn(1, 200))
    table = fitting.tables(train, V, None, ordered=True)

    def noise(items):
        return np.random.default_rng(1).normal(size=(len(items), V + 1)).astype(np.float32)

    assert fitting.fit(noise, table, valid, fitting.NAMES).weights['model'] < 0.15
    # a target that is not ranked has no likelihood
    two = valid.take(slice(2))._replace(target=np.array([valid.target[0], 0]))
    few = fitting.fit(noise, table, two, fitting.NAMES)
    assert few.rows == 1
    few = few.weights
    assert all(abs(few[name] - mean) < spread
               for name, (mean, spread, _, _) in fitting.WEIGHTS.items())


def test_content_that_follows_reaches_items_without_sessions():
    """Items 21..30 have no sessions, but the content of 1..10: a follower's twin gets a score."""
    train = Sessions(np.tile(np.arange(1, 21, dtype=np.int32), 10), np.arange(0, 201, 20),
                     np.arange(10))
    features = np.random.default_rng(0).normal(size=(V + 1, 40))
    features[21:] = features[1:11]
    table = fitting.tables(train, V, features, ordered=True)
    weights = {name: 0.0 for name in fitting.WEIGHTS} | {'following': 5.0}
    rules, columns = fitting.mixture(fitting.Fit(weights, 0.0, 1, 0.6), table)
    items = np.array([[3, 4, 0]], np.int32)
    h = experts.session_columns(rules, np.zeros((1, 0), np.float32), columns[items, 1:], items)
    scores = np.asarray(h @ columns.T)[0]
    assert 25 in np.argsort(-scores)[:2]  # item 5 follows item 4, and 25 is its twin
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), table))


def test_validation_chooses_how_fast_a_prefix_is_forgotten_and_knows_who_looks_at_new_items():
    """Items that follow are those of the first item, or of the last; new items follow new items."""
    rng = np.random.default_rng(0)
    train = Sessions(np.stack([1 + np.arange(200) % 10, 11 + np.arange(200) % 10], 1).reshape(-1)
                     .astype(np.int32), np.arange(0, 401, 2), np.arange(200))
    table = fitting.tables(train, V, None, ordered=True)

    def chosen(place):
        items = np.zeros((200, N), np.int32)
        items[:, :3] = 1 + rng.permuted(np.tile(np.arange(10), (200, 1)), axis=1)[:, :3]
        return fitting.fit(lambda x: np.zeros((len(x), V + 1), np.float32), table, Rows(
            items, items, items[:, place] + 10, np.arange(200)), ['companions'])

    assert (chosen(2).decay, chosen(0).decay) == experts.DECAYS
    items = np.zeros((200, N), np.int32)
    items[:, 0] = rng.integers(1, V + 1, 200)
    target = np.where(items[:, 0] > 20, rng.integers(21, V + 1, 200), rng.integers(1, 21, 200))
    fit = fitting.fit(lambda x: np.zeros((len(x), V + 1), np.float32), table, Rows(
        items, items, target.astype(np.int32), np.arange(200)), fitting.NAMES)
    assert fit.weights['cold_prefix'] > 2

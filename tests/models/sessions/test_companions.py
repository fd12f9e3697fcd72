"""Companions: the counts and what they add by plain loops, and ranks and lists that have it."""

from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from tests.job.test_mixture import N, V, part
from tpad_jax import config as base
from tpad_jax.data import item_graphs
from tpad_jax.data.sessions import Sessions
from tpad_jax.distributed import devices
from tpad_jax.errors import InputError
from tpad_jax.evaluation import metrics
from tpad_jax.evaluation.scorers import scorer, session_encoder, session_shifts
from tpad_jax.job import validate
from tpad_jax.models import tpad
from tpad_jax.models.sessions import companions
from tpad_jax.serving import topk

STRENGTH, DECAY, MOST = 0.6, 0.4, 4


@pytest.fixture(scope='module')
def train():
    """Sessions with items that come again; item V is in none, and the last one is alone."""
    rng = np.random.default_rng(0)
    each = [rng.integers(1, V, rng.integers(2, 6)) for _ in range(25)] + [np.array([V - 1])]
    offsets = np.cumsum([0, *map(len, each)])
    return Sessions(np.concatenate(each).astype(np.int32), offsets, np.arange(len(each)))


@pytest.fixture(scope='module')
def company(train):
    return item_graphs.companions(train, V, most=MOST)


def prefixes(count=16):
    rng = np.random.default_rng(5)
    items = rng.integers(1, V + 1, (count, N)) * (np.arange(N) < rng.integers(1, N + 1, (count, 1)))
    return items.astype(np.int32)


def added(company, items):
    """[B, V + 1] by loops, in float64."""
    ids, lift = company
    out = np.zeros((len(items), V + 1))
    for row, prefix in zip(out, items, strict=True):
        held = [int(i) for i in prefix if i]
        shares = np.array([DECAY ** (len(held) - 1 - n) for n in range(len(held))])
        for item, share in zip(held, shares / shares.sum(), strict=True):
            for other, by in zip(ids[item], lift[item], strict=True):
                row[other] += share * float(by)
        row[[0, *held]] = 0
    return STRENGTH * np.log(1 + out)


def test_companions_by_plain_loops(train, company):
    ids, lift = company
    sessions = [set(train.items[a:b].tolist())
                for a, b in zip(train.offsets, train.offsets[1:], strict=False)]
    held = Counter(item for session in sessions for item in session)
    for item in range(V + 1):
        shared = Counter(o for s in sessions if item in s for o in s - {item})
        ranked = sorted(((n / held[o] ** 0.5, -o) for o, n in shared.items()), reverse=True)[:MOST]
        assert ids[item].tolist() == [-o for _, o in ranked] + [0] * (MOST - len(ranked))
        total = sum(w for w, _ in ranked)
        np.testing.assert_allclose(lift[item, :len(ranked)], [V * w / total for w, _ in ranked],
                                   rtol=1e-6)
        assert not lift[item, len(ranked):].any()


@pytest.mark.slow
def test_what_is_added_by_plain_loops(company):
    items = prefixes()
    items[0, :3] = 3, 4, 3  # one that comes again counts in both places
    found, shift = companions.shifts(*map(jnp.asarray, company), items, strength=STRENGTH,
                                   decay=DECAY)
    out = np.zeros((len(items), V + 1))
    for row, ids, by in zip(out, np.asarray(found), np.asarray(shift), strict=True):
        moved = ids[by != 0]
        assert len(set(moved.tolist())) == len(moved)  # an item in one place only
        row[moved] = by[by != 0]
    np.testing.assert_allclose(out, added(company, items), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_scores_ranks_and_lists_have_it(company):
    """Of two recommenders, one of which shifts repeats, too."""
    specs, params, rows = zip(*(part(kind, 4, i, i == 0, together=MOST, together_strength=STRENGTH,
                                     together_decay=DECAY)
                                for i, kind in enumerate(('sr_gnn', 'attention'))), strict=True)
    rows = tuple(row | dict(zip(tpad.COMPANY, map(jnp.asarray, company), strict=True))
                 for row in rows)
    items = prefixes()
    target = np.random.default_rng(6).integers(1, V + 1, len(items)).astype(np.int32)
    score = scorer(specs, devices.choose('jit', 1))(params, rows)
    plain = [replace(spec, together=()) for spec in specs]
    without = scorer(tuple(plain), devices.choose('jit', 1))(params, rows)(items)
    wanted = without + 2 * added(company, items)
    wanted[:, 0] = 0
    np.testing.assert_allclose(score(items), wanted, rtol=1e-5, atol=1e-5)
    for found, counted in zip(score.ranks(items, target, rows=8),
                              metrics.counts(score(items), target), strict=True):
        np.testing.assert_array_equal(found, counted)
    weights = tuple(zip(score.bound.params, score.bound.near, strict=True)), None
    z = np.pad(score.bound.z, ((0, topk.rounded(V + 1) - V - 1), (0, 0)))
    _, best = topk.searcher(session_encoder(specs), session_shifts(specs))(
        weights, z, V + 1, items, k=6)
    np.testing.assert_array_equal(best, np.argsort(-score(items)[:, 1:], kind='stable')[:, :6] + 1)


@pytest.mark.parametrize(('key', 'value', 'told'), [
    ('together', -1, 'model.together=-1'), ('together_strength', -0.5, 'together_strength=-0.5'),
    ('together_decay', 0.0, 'together_decay=0.0')])
def test_the_config_is_checked(key, value, told):
    c = base.get_config()
    c.model[key] = value
    with pytest.raises(InputError, match=told):
        validate.check(c)

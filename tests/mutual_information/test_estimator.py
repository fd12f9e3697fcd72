"""The estimator: figures and errors against plain numpy, honest errors, warnings, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpad_jax.errors import InputError
from tpad_jax.mutual_information import estimator as mi
from tpad_jax.mutual_information.critics import Critic, Score

SMALL = dict(hidden=32, width=8, batch=128, steps=400, learning_rate=1e-2)


def pairs(seed, count, rho, width=2):
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(2, count, width)).astype(np.float32)
    return x, rho * x + np.sqrt(1 - rho**2) * noise


def bilinear(scale):
    return Score(Critic('bilinear', 2), {'w': {'kernel': scale * jnp.eye(2)}})


def by_numpy(bound, table, shift, group):
    """A bound of a square score matrix, its diagonal the pairs."""
    own, off = np.diag(table), table[group[:, None] != group]
    return {'mine': lambda: own.mean() - np.log(np.exp(off).mean()),
            'nwj': lambda: 1 + (own - shift).mean() - np.exp(off - shift).mean(),
            'smile': lambda: own.mean() - np.log(np.exp(np.clip(off, -2, 2)).mean()),
            'jsd': lambda: -np.log1p(np.exp(-own)).mean() - np.log1p(np.exp(off)).mean(),
            'vclub': lambda: own.mean() - off.mean()}[bound]()


@pytest.mark.parametrize(('group', 'other_group'), [
    (np.arange(17), np.arange(11)), (np.arange(17) ** 2 % 7, np.arange(11) // 2)])
def test_figures_and_errors_against_numpy(group, other_group):
    """Values over all pairs of two groups, errors by leaving out one group after the other."""
    critic = Critic('bilinear', 4)
    params = critic.init(jax.random.key(1), jnp.ones((1, 2)), jnp.ones((1, 2)))['params']
    score = Score(critic, jax.tree.map(lambda x: 1.5 * x, params))
    x, y = pairs(0, 17, 0.6)
    seen = pairs(1, 11, 0.6)
    table, other = (np.asarray(score(*p), np.float64) for p in ((x, y), seen))
    negative = group[:, None] != group
    shift = np.log(np.exp(other[other_group[:, None] != other_group]).mean())
    count = len(set(group))
    for bound in ('mine', 'nwj', 'smile', 'jsd', 'vclub'):
        found = mi.report(bound, score, x, y, groups=group, seen=(*seen, other_group), clip=2.0,
                          chunk=5)
        without = [by_numpy(bound, table[np.ix_(rest, rest)], shift, group[rest])
                   for rest in (group != i for i in set(group))]
        variance = (count - 1) * np.var(without)
        if bound in ('mine', 'nwj'):  # what the joint pairs say of the partition's variance
            off = np.exp(table[negative]).mean()
            missed = np.exp(np.diag(table)).mean() / off / (count * (count - 1))
            variance += missed * ((off / np.exp(shift)) ** 2 if bound == 'nwj' else 1)
        assert found.value == pytest.approx(by_numpy(bound, table, shift, group), abs=2e-5)
        assert found.error == pytest.approx(variance**0.5, rel=1e-3)


def test_pairs_that_are_there_several_times_count_once():
    """By groups; without them, copies are false negatives and the error is half as large."""
    x, y = pairs(0, 200, 0.7)
    once, again = mi.report('mine', bilinear(0.7), x, y), np.repeat(np.arange(200), 4)
    found = mi.report('mine', bilinear(0.7), x[again], y[again], groups=again)
    assert found[1:3] == pytest.approx(once[1:3], rel=1e-4)
    assert found.interval == pytest.approx(once.interval, rel=1e-4)  # of 199 degrees of freedom
    assert mi.report('mine', bilinear(0.7), x[again], y[again]).error < 0.6 * once.error


def test_infonce_has_no_negatives_of_its_own_group():
    """Batch by batch against numpy; groups are numbers of any kind."""
    (x, y), groups = pairs(0, 41, 0.7), np.repeat([5, -2, 8, 1], [9, 12, 3, 17])
    found, values = mi.report('infonce', bilinear(0.7), x, y, groups=groups, batch=20), []
    for part in (slice(0, 20), slice(20, 40)):
        exp = np.exp(0.7 * x[part].astype(np.float64) @ y[part].T / 2**0.5)
        candidates = (groups[part, None] != groups[part]) | np.eye(20, dtype=bool)
        mean = np.where(candidates, exp, 0).sum(axis=1) / candidates.sum(axis=1)
        values.append(np.log(np.diag(exp) / mean).mean())
    assert found.value == pytest.approx(np.mean(values), abs=1e-5)
    assert found.error == pytest.approx(np.std(values, ddof=1) / 2**0.5, rel=1e-3)


@pytest.mark.slow
def test_an_estimate_by_groups_knows_how_few_there_are():
    x, y = pairs(0, 1500, 0.8)
    groups = np.repeat(np.arange(1500), 4)
    x = x[groups] + np.random.default_rng(1).normal(0, 0.02, (6000, 2)).astype(np.float32)
    found, without = (mi.estimate(jax.random.key(0), x, y[groups], groups=g, **SMALL)
                      for g in (groups, None))
    assert found.value == pytest.approx(-np.log(1 - 0.64), rel=0.15)
    assert found.error > 1.4 * without.error


def test_errors_are_honest():
    """Over many samples the estimates spread as one sample says, or less."""
    for bound in ('mine', 'infonce'):
        found = [mi.report(bound, bilinear(0.7), *pairs(seed, 200, 0.7), batch=20)
                 for seed in range(120)]
        spread, said = np.std([f.value for f in found]), np.mean([f.error for f in found])
        assert 0.9 < said / spread < 1.4
        covered = np.mean([f.interval[0] < np.mean([f.value for f in found]) < f.interval[1]
                           for f in found])
        assert covered > 0.88


@pytest.mark.parametrize('bound', ['mine', pytest.param('vclub', marks=pytest.mark.slow)])
def test_estimate_finds_what_is_known(bound):
    x, y = pairs(0, 6000, 0.8)
    found = mi.estimate(jax.random.key(0), x, y, bound=bound, **SMALL)
    wanted = 2 * 0.64 / 0.36 if bound == 'vclub' else -np.log(1 - 0.64)
    assert found.value == pytest.approx(wanted, rel=0.15)
    assert found.pairs == 1800
    assert found.warning == ''
    assert found.interval[0] < found.value < found.interval[1]
    assert found.curve['step'][-1] == 400
    assert (found.likelihood is not None) == (bound == 'vclub')


@pytest.mark.slow
def test_it_warns_where_a_bound_cannot_reach():
    x, y = pairs(0, 3000, 0.8)
    same = mi.estimate(jax.random.key(0), x, x + 0.01 * y, bound='infonce', **SMALL)
    assert 'reads at most 4.85 nats' in same.warning
    assert same.value < np.log(128)
    assert 'dominate the partition' in mi.report('mine', bilinear(12.0), x, y).warning
    assert 'does not bound' in mi.report('jsd', bilinear(1.0), x, y).warning
    tails = mi.estimate(jax.random.key(0), x, y**5, bound='vclub', **SMALL)
    assert 'does not fit' in tails.warning


@pytest.mark.parametrize(('changes', 'says'), [
    (dict(bound='club'), "bound='club': unknown"), (dict(critic='euclid'), "critic='euclid'"),
    (dict(batch=600), '1000 pairs are too few'), (dict(y=np.ones((7, 2))), 'not pairs in rows'),
    (dict(y=np.full((1000, 2), np.nan)), 'not finite'), (dict(groups=np.ones(7)), 'one for each'),
    (dict(groups=np.arange(1000) // 20), 'one has 20 pairs')])
def test_refusals(changes, says):
    x, y = pairs(0, 1000, 0.5)
    with pytest.raises(InputError, match=says):
        mi.estimate(jax.random.key(0), **{'x': x, 'y': y, 'batch': 64, **changes})

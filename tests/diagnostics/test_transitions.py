"""The comparison of k and r: the ridge against an explicit one, and jobs whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from tpad_jax.data import sessions
from tpad_jax.data.synthetic import planted
from tpad_jax.diagnostics import transitions


def test_the_ridge_chooses_its_penalty_by_leaving_rows_out():
    rng = np.random.default_rng(0)
    x, weight = 3 + rng.normal(size=(25, 4)) * [1, 5, 0.1, 2], rng.integers(1, 4, 25).astype(float)
    y = x @ rng.normal(size=(4, 2)) + 2 * rng.normal(size=(25, 2))

    def fitted(rows, penalty):
        """(new, rows) -> guesses; features standardised over all rows, as is stated."""
        mean, offset = np.average(x, 0, weight), np.average(y, 0, weight)
        scale = np.average((x - mean) ** 2, 0, weight) ** 0.5
        z, w = (x - mean) / scale, np.diag(weight / weight.mean())[np.ix_(rows, rows)]
        gram = z[rows].T @ w @ z[rows] + penalty * np.eye(4)
        return offset + z @ np.linalg.solve(gram, z[rows].T @ w @ (y - offset)[rows])

    errors = [sum(weight[i] * ((y - fitted(np.delete(np.arange(25), i), penalty))[i] ** 2).sum()
                  for i in range(25)) for penalty in 25 * transitions.PENALTIES]
    best = 25 * transitions.PENALTIES[np.argmin(errors)]
    assert 0 < np.argmin(errors) < len(errors) - 1  # a real choice
    np.testing.assert_allclose(transitions.ridge(x, y, weight, x), fitted(np.arange(25), best))


def test_shares_of_variance_and_their_interval():
    rng = np.random.default_rng(1)
    target, weight = rng.normal(size=(400, 3)), rng.integers(1, 5, 400).astype(float)
    guess = target + rng.normal(size=(400, 3)) * 0.5
    found = transitions.score(target, guess, weight)
    mean = np.average(target, 0, weight)
    expected = 1 - np.average(((target - guess) ** 2).sum(1), weights=weight) / np.average(
        ((target - mean) ** 2).sum(1), weights=weight)
    assert found['r2'] == pytest.approx(expected)
    low, high = found['interval']
    assert low < 0.75 < high
    assert high - low < 0.12
    assert transitions.score(target, np.tile(mean, (400, 1)), weight)['r2'] == pytest.approx(0)


def job(k, r, world=None, train=None):
    items = len(k) - 1
    out = SimpleNamespace(config=SimpleNamespace(seed=0, diagnostics=1), planted=world,
                          catalogue={'k': k, 'r': r},
                          data=SimpleNamespace(num_items=items, train=train, warm=None))
    if world is not None:
        hot = np.concatenate([np.eye(1 + values.max())[values] for values in world.attributes.T], 1)
        names = ['', *map(planted.asin, range(1, items + 1))]
        out.catalogue['true'] = np.pad(hot, ((1, 0), (0, 0)))
        out.data.warm = np.pad(~world.cold, (1, 0))
        out.probabilities = planted.catalogue_probabilities(world, names)
    return out


def test_rows_that_know_the_transitions_of_planted_items():
    """Attributes as k know most of what follows; r is noise, or what follows itself."""
    world = planted.draw(0, 400)
    run = job(np.zeros((401, 38)), np.random.default_rng(0).normal(size=(401, 20)), world)
    run.catalogue['k'] = run.catalogue['true']
    found = transitions.measured(run)
    probe = found['transition_probe']
    assert 0.7 < probe['k']['r2'] < 0.9
    assert probe['r']['r2'] < 0.1
    assert probe['r']['rows'] == world.cold.sum()
    assert found['cka_k_r'] < 0.2
    follow = run.probabilities(np.arange(1, 401)[:, None]) @ run.catalogue['true']
    run.catalogue['r'] = np.pad(follow, ((1, 0), (0, 0)))
    assert transitions.measured(run)['transition_probe']['r']['r2'] > 0.999
    assert 'CKA(k, r)' in transitions.line(found)


def test_rows_that_know_the_transitions_of_counted_sessions():
    rng = np.random.default_rng(0)
    k = rng.normal(size=(201, 2, 4)).astype(np.float32)
    items = np.arange(1, 201, dtype=np.int32)  # one session: every item is followed by the next
    train = sessions.Sessions(items, np.array([0, 200]), np.zeros(1, int))
    found = transitions.measured(job(k, np.roll(k, -1, 0).reshape(201, 8), None, train))
    assert found['transition_probe']['k']['r2'] < 0.1
    assert found['transition_probe']['r']['r2'] > 0.999

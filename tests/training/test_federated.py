"""Federated rounds: against plain steps, each other, and numbers by hand."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tpad_jax import config as config_lib
from tpad_jax.data.batches import Cut
from tpad_jax.errors import InputError
from tpad_jax.training import federated
from tpad_jax.training.step import StepSpec
from tpad_jax.types import State

RATE, CLIENTS, LOCAL = 0.1, 3, 2
X = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
W = jnp.array([0.5, -1.0, 2.0])


def config_of(optimiser='sgd', steps=1000, **options):
    c = config_lib.get_config()
    c.stages = 'knowledge,teach'
    c.federated.update(stages='teach', clients=CLIENTS, local=LOCAL, **options)
    c.stage.teach.update(optimiser=optimiser, learning_rate=RATE, steps=steps, epochs=0.0,
                         warmup=0.0, clip=1e9, weight_decay=0.0)
    return c


def made(**options):
    """The rounds of a config, at a constant rate, and the first state."""
    data = SimpleNamespace(side_sizes=(), train=SimpleNamespace(
        items=np.ones(240, int), offsets=np.arange(0, 241, 2)))
    spec = StepSpec(None, (), frozenset(), None, 0)
    c = config_of(**options)
    assert federated.with_rounds(spec, c, 'recommend', data) is spec
    spec = federated.with_rounds(spec, c, 'teach', data)
    assert sum(spec.rounds.weights) == pytest.approx(1)
    rounds = replace(spec.rounds, weights=(1 / CLIENTS,) * CLIENTS, factor=lambda _: 1.0)
    return rounds, spec.tx, State(jnp.int32(0), {'w': W}, {}, spec.tx.init({'w': W}), {})


def one(state, x, tx):
    """A step of linear regression to 1."""
    value, grads = jax.value_and_grad(lambda p: 0.5 * ((x @ p['w'] - 1)**2).mean())(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                         opt_state=opt_state), {'loss': value}


def rounds_of(number, x=X, local=LOCAL, weights=None, **options):
    """The parameters after each round."""
    rounds, tx, state = made(**options)
    rounds = replace(rounds, local=local, weights=weights or rounds.weights)
    run = jax.jit(partial(federated.run, rounds, tx, partial(one, tx=rounds.tx)))
    out = []
    for _ in range(number):
        state, logged = run(state, x)
        assert logged['loss'].shape == ()
        out.append(np.asarray(state.params['w']))
    return out


def plain(x, steps):
    """Gradient steps of all rows by hand."""
    w = np.asarray(W, np.float64)
    for _ in range(steps):
        w = w - RATE * ((x @ w - 1)[:, None] * x).mean(axis=0)
    return w


def test_one_step_of_every_client_is_a_step_of_all_rows():
    np.testing.assert_allclose(rounds_of(4, local=1)[-1], plain(X, 4), atol=1e-6)


def test_clients_move_apart_and_count_by_their_rows():
    parts = X.reshape(CLIENTS, LOCAL, -1, 3)
    moved = []
    for part in parts:
        w = np.asarray(W, np.float64)
        for x in part:
            w = w - RATE * ((x @ w - 1)[:, None] * x).mean(axis=0)
        moved.append(w)
    weights = 0.2, 0.3, 0.5
    np.testing.assert_allclose(rounds_of(1, weights=weights)[0], weights @ np.array(moved),
                               atol=1e-6)


def test_scaffold_is_averaging_where_clients_are_alike_and_better_where_they_are_not():
    same = np.tile(X[:4], (CLIENTS * LOCAL, 1))
    np.testing.assert_allclose(rounds_of(3, same, rule='scaffold'), rounds_of(3, same), atol=1e-6)
    parts = X.reshape(CLIENTS, LOCAL, -1, 3)
    apart = parts[:, :1].repeat(20, axis=1).reshape(-1, 3)  # each has its own rows, many steps
    mine = parts[:, 0].reshape(-1, 3)
    best = np.linalg.lstsq(mine, np.ones(len(mine)), rcond=None)[0]
    left = [np.abs(rounds_of(60, apart, local=20, rule=rule)[-1] - best).max()
            for rule in ('avg', 'scaffold')]
    assert left[1] < 0.1 * left[0]


def test_a_pull_keeps_clients_near():
    far, near = (rounds_of(1, proximal=pull)[0] for pull in (0.0, 5.0))
    assert np.linalg.norm(near - W) < np.linalg.norm(far - W)


@pytest.mark.parametrize(('rule', 'expected'), [
    # m = .1 d, v = .99 tau^2 + .01 d^2; m = .9 m + .1 d and so on; x -= rate m / (sqrt(v) + tau)
    ('adam', lambda d, v: 0.99 * v + 0.01 * d * d),
    ('yogi', lambda d, v: v - 0.01 * d * d * np.sign(v - d * d)),
    ('avgm', None)])
def test_rules_of_the_server_by_hand(rule, expected):
    tx = federated.server(rule, 0.5, 0.9, CLIENTS)
    x, state = {'w': jnp.array([1.0, 2.0])}, tx.init({'w': jnp.zeros(2)})
    w, m, v = np.array([1.0, 2.0]), 0.0, np.full(2, 1e-6)
    for d in ([0.3, -0.01], [0.1, 0.02], [-0.2, 0.0]):
        updates, state = tx.update({'w': jnp.array(d)}, state, x)
        x, d = optax.apply_updates(x, updates), np.array(d)
        if expected is None:
            m = 0.9 * m + d
            w = w - 0.5 * m
        else:
            m, v = 0.9 * m + 0.1 * d, expected(d, v)
            w = w - 0.5 * m / (np.sqrt(v) + 1e-3)
    np.testing.assert_allclose(x['w'], w, rtol=1e-5)


def test_every_part_of_a_batch_holds_rows_of_one_client():
    owner = np.random.default_rng(0).integers(-1, 3, 200)
    groups = tuple(np.flatnonzero(owner == n) for n in range(3))
    cut = Cut(3 * 2 * 5, seed=1, shards=6, groups=groups)
    seen = np.stack([cut.own_rows(step, 200) for step in range(40)])
    assert (owner[seen].reshape(40, 3, 10) == np.arange(3)[:, None]).all()
    for number, group in enumerate(groups):  # once per epoch
        mine = seen.reshape(40, 3, 10)[:, number].ravel()[:len(group)]
        assert sorted(mine) == sorted(group)
    np.testing.assert_array_equal(np.concatenate(list(cut.parts(200, 0))).ravel(), seen[0])


def test_clients_differ_more_at_a_smaller_concentration():
    items = np.random.default_rng(0).integers(1, 5, 4000)
    data = SimpleNamespace(side_sizes=(5,), side=np.arange(5)[:, None], num_items=4,
                           train=SimpleNamespace(items=items, offsets=np.arange(0, 4001, 2)))
    label = items[1::2]

    def spread(concentration):
        owner = federated.owners(data, config_of(concentration=concentration), items=False)
        shares = [np.bincount(label[owner == n], minlength=5) / (owner == n).sum()
                  for n in range(CLIENTS)]
        return np.std(shares, axis=0).mean()

    assert spread(0.3) > 5 * spread(1000.0)
    alone = federated.owners(data, config_of(only='2'), items=False)
    assert set(alone) == {-1, 2}


@pytest.mark.parametrize(('change', 'text'), [
    ({'federated.rule': 'scaffold', 'stage.teach.optimiser': 'adamw'}, 'optimiser'),
    ({'stage.teach.epochs': 2.0}, 'steps are rounds'), ({'skip_not_finite': 3}, 'skip_not_finite'),
    ({'federated.only': '7'}, 'below clients=3'),
    ({'stages': 'knowledge'}, 'teach is not among')])
def test_what_rounds_cannot_keep_is_refused(change, text):
    c = config_of()
    c.update_from_flattened_dict(change)
    with pytest.raises(InputError, match=text):
        federated.check(c, 1)
    with pytest.raises(InputError, match='devices: 2'):
        federated.check(config_of(), 2)

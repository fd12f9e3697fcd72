"""The optimiser of a stage: its schedule, and learning rates of their own."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tpad_jax import config
from tpad_jax.errors import InputError
from tpad_jax.training import optimizer

PARAMS = {'club/w': jnp.ones((2, 2)), 'critic/align/w': jnp.full((3, 2), 2.0),
          'other/b': jnp.ones(2)}
GRADS = {'club/w': jnp.full((2, 2), 0.3), 'critic/align/w': jnp.full((3, 2), -0.1),
         'other/b': jnp.full(2, 0.2)}


def stage(**changes):
    return config.stage(steps=10, warmup=0.0, **changes)


def steps(tx, count=3):
    """Parameters after a few updates by constant gradients."""
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(count):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_the_rate_rises_over_the_warm_up_and_falls_to_nothing_at_the_last_step():
    """A fifth of ten steps is warm-up; then half a cosine, or the same rate to the end."""
    settings = dict(steps=10, warmup=0.2, learning_rate=0.5)
    rate = optimizer.schedule(config.stage(**settings))
    falls = 0.25 * (1 + np.cos(np.pi * np.arange(9) / 8))
    np.testing.assert_allclose([rate(n) for n in range(11)], [0, 0.25, *falls], atol=1e-7)
    rate = optimizer.schedule(config.stage(**settings, schedule='constant'))
    np.testing.assert_allclose([rate(n) for n in range(11)], [0, 0.25, *[0.5] * 9], atol=1e-7)


@pytest.mark.parametrize('optimiser', ['sgd', 'adam', 'adamw'])
def test_a_rate_is_a_learning_rate_of_its_own(optimiser):
    """Without decay and clip parameters do not know each other: any other rate for all of them."""
    own = dict(optimiser=optimiser, weight_decay=0.0, clip=1e9, schedule='constant')
    plain = steps(optimizer.optimizer(stage(**own, learning_rate=1e-3)))
    tenfold = steps(optimizer.optimizer(stage(**own, learning_rate=1e-2)))
    found = steps(optimizer.optimizer(stage(**own, learning_rate=1e-3, rates=(('^club/', 10.0),))))
    for path, expected in dict(plain, **{'club/w': tenfold['club/w']}).items():
        np.testing.assert_allclose(found[path], expected, rtol=1e-5)


def test_parameters_that_learn_later_stand_still_until_then():
    tx = optimizer.optimizer(stage(optimiser='sgd', learning_rate=1.0, later=(('^critic/', 0.2),)))
    plain = steps(optimizer.optimizer(stage(optimiser='sgd', learning_rate=1.0)), 1)
    for count, moved in ((2, 0), (3, 1), (5, 3)):  # a fifth of ten steps
        found = steps(tx, count)
        np.testing.assert_allclose(found['club/w'], 1 - 0.3 * count, rtol=1e-5)
        np.testing.assert_allclose(found['critic/align/w'], 2 + 0.1 * moved, rtol=1e-5)
    np.testing.assert_allclose(plain['critic/align/w'], 2.1)


def test_rates_of_several_patterns_multiply():
    tx = optimizer.rated(optax.sgd(1.0), (('^c', 2.0), ('align', 0.25)))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    for path, factor in {'club/w': 2, 'critic/align/w': 0.5, 'other/b': 1}.items():
        np.testing.assert_allclose(updates[path], -factor * GRADS[path], rtol=1e-6)


def test_a_rate_of_nothing_is_refused():
    tx = optimizer.optimizer(stage(rates=(('^clubs/', 10.0),)))
    with pytest.raises(InputError, match=r"rates: the pattern '\^clubs/' matches no trained"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)

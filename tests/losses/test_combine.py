"""What stands between a loss function and a stage: combining, the configured names, positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpad_jax import losses
from tpad_jax.errors import InputError
from tpad_jax.losses import LossSpec, Out
from tpad_jax.nn import linear
from tpad_jax.types import Batch, Loss


def per_row(out, batch, *, a: Out = Out('a')):
    return out[a]


def stateful(out, batch, *, state=None, key=None, a: Out = Out('a')):
    weight = jnp.array([[1.0, 0.5], [0.0, 2.0], [1.0, 1.0]])
    value = jnp.array([[4.0, 2.0], [jnp.inf, 1.0], [jnp.nan, 7.0]])  # row 2 is not valid
    draw = jnp.broadcast_to(jax.random.uniform(key), value.shape)
    return Loss(value, weight, {'seen': state['seen'] + 1}, {'double': 2 * value, 'draw': draw})


def test_combine_averages_weighs_logs_and_carries_state():
    batch = Batch(items=np.ones((3, 2), np.int32), next=None, target=None,
                  valid=np.array([True, True, False]), row=np.arange(3))
    out = {'a': jnp.array([1.0, 3.0, 100.0]), 'b': jnp.array([5.0, 5.0, 0.0])}
    specs = (LossSpec('first', per_row, 0.5), LossSpec('again', per_row, 2.0, {'a': 'b'}),
             LossSpec('last', stateful, 3.0), LossSpec('lastly', stateful, 0.0))
    state = {'last': {'seen': 4}, 'lastly': {'seen': 0}, 'other': {'kept': 1}}
    total, new, logged = losses.combine(specs, out, batch, state, key=jax.random.key(0))
    mean = (4 * 1 + 2 * 0.5 + 1 * 2) / 3.5
    assert logged.keys() == {'first', 'again', 'last', 'lastly', 'double/last', 'double/lastly',
                             'draw/last', 'draw/lastly', 'loss'}
    assert float(logged['first']) == pytest.approx(2)
    assert float(logged['again']) == pytest.approx(5)
    assert float(logged['last']) == pytest.approx(mean)
    assert float(logged['double/last']) == pytest.approx(2 * mean)
    assert float(total) == pytest.approx(0.5 * 2 + 2 * 5 + 3 * mean)
    assert float(logged['loss']) == float(total)
    assert logged['draw/last'] != logged['draw/lastly']  # each loss draws for itself
    assert new == {'last': {'seen': 5}, 'lastly': {'seen': 1}, 'other': {'kept': 1}}
    assert state['last'] == {'seen': 4}


def test_a_loss_draws_the_same_beside_any_other_losses():
    batch = Batch(items=np.ones((3, 2), np.int32), next=None, target=None,
                  valid=np.array([True, True, False]), row=np.arange(3))
    out, state = {'a': jnp.array([1.0, 3.0, 100.0])}, {'last': {'seen': 4}}
    first, last = LossSpec('first', per_row), LossSpec('last', stateful)
    draws = [float(losses.combine(specs, out, batch, state, key=jax.random.key(0))[2]['draw/last'])
             for specs in ((last,), (first, last), (last, first))]
    assert draws[0] == draws[1] == draws[2]


@pytest.mark.parametrize('replicas', [1, 2])
def test_a_row_weight_below_zero_is_reported_as_not_finite(replicas):
    """A mean with negative weights has no bounds: that of ones would be 1.5 here."""
    def fn(out, batch, *, weight: Out = Out('w')):
        return Loss(jnp.ones_like(out[weight]), out[weight])

    out = {'w': jnp.array([1.0, -0.5, 0.5, -1.0])}
    batch = Batch(items=np.ones((4, 1), np.int32), next=None, target=None,
                  valid=np.array([True, True, True, False]), row=10 * np.arange(4))

    def logged(out, batch, axis):
        return losses.combine((LossSpec('mine', fn),), out, batch, {}, axis=axis, rows=True)[2]

    if replicas == 1:
        found = logged(out, batch, None)
    else:
        parts = jax.tree.map(lambda x: x.reshape(replicas, -1, *x.shape[1:]), (out, batch))
        found = jax.vmap(lambda o, b: logged(o, b, 'data'), axis_name='data')(*parts)
        found = jax.tree.map(lambda x: x[0], found)
    assert np.isnan(found['mine'])
    np.testing.assert_array_equal(found['not_finite'][:, 0], [-1, 10, -1, -1])


def test_mine_counts_an_outlying_batch_up_to_its_limit():
    rng = np.random.default_rng(0)
    out = {n: jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32) for n in 'kc'}
    out |= {'items': jnp.arange(1, 9).reshape(4, 2), 'critic.align': lambda x, y: 50 + x @ y.T}
    batch = Batch(items=out['items'], next=None, target=None, valid=jnp.ones(4, bool), row=None)
    state = {'log_average': jnp.float32(0)}
    for limit in (1.0, 2.0):
        new = losses.mine(out, batch, state=state, limit=limit).state['log_average']
        np.testing.assert_allclose(new, np.log(0.99 + 0.01 * np.exp(limit)), rtol=1e-5)
    assert float(losses.mine(out, batch, state=state).state['log_average']) < 0.1


def test_resolve_finds_own_and_foreign_functions():
    assert losses.resolve('align', 'infonce') is losses.infonce
    assert losses.resolve('mine_own', 'tpad_jax.mutual_information.critics:unit') is linear.unit


@pytest.mark.parametrize('fn', ['info_nce', 'no_such_package.x:f', 'tpad_jax.losses:nothing', ''])
def test_resolve_refuses_what_is_not_there(fn):
    with pytest.raises(InputError, match=r"config\.losses\.align\.fn=.*cannot be found"):
        losses.resolve('align', fn)


def test_needs_names_the_outputs_a_loss_reads():
    assert LossSpec('align', losses.infonce).needs == {'k', 'c', 'items', 'critic.align'}
    entry = {'x': 'r_next', 'y': 'p', 'ids': 'next', 'critic': 'critic.distil', 'temperature': 0.2}
    assert LossSpec('distil', losses.infonce, 1.0, entry).needs == {
        'r_next', 'p', 'next', 'critic.distil'}
    assert LossSpec('rec', losses.next_item, 1.0, {'dtype': 'bfloat16'}).needs == {
        'h', 'z', 'warm', 'repeat'}


@pytest.mark.parametrize('keyword', ['temperatur', 'axis', 'batch', 'state'])
def test_needs_refuses_a_keyword_that_is_not_the_configs(keyword):
    with pytest.raises(InputError, match=rf"losses\.align: mine.*decay.* argument '{keyword}'"):
        LossSpec('align', losses.mine, 1.0, {keyword: 'k'})


@pytest.mark.parametrize('name', ['next_item', 'sampled_next_item'])
@pytest.mark.parametrize('room', [None, 9, 12])
def test_every_position_predicts_as_a_row_of_its_own(name, room):
    """h_each at the places of items: the loss of each is that of a row with this h and target."""
    rng = np.random.default_rng(0)
    items = np.array([[1, 2, 3], [4, 0, 0], [5, 6, 0], [2, 2, 1]], np.int32)
    following = np.where(items > 0, rng.integers(1, 8, items.shape), 0).astype(np.int32)
    h = rng.normal(size=(4, 3, 5)).astype(np.float32)
    shared = {'z': jnp.asarray(rng.normal(size=(8, 5)), jnp.float32), 'warm': jnp.arange(8) > 0,
              'popularity': jnp.ones(8), 'repeat': None}
    at = np.flatnonzero(items)
    places = None if room is None else np.pad(at, (0, room - len(at)), constant_values=-1)
    valid = np.ones(4, bool)
    batch = Batch(items=jnp.asarray(items), next=jnp.asarray(following), target=None,
                  valid=jnp.asarray(valid), row=None,
                  places=None if room is None else jnp.asarray(places))
    fn, key = getattr(losses, name), jax.random.key(0)
    keywords = {'key': key, 'samples': 16, 'z': 'z'} if 'sampled' in name else {}
    found = fn({**shared, 'h': jnp.asarray(h)}, batch, **keywords)
    rows = batch.replace(target=jnp.asarray(following.ravel()[at]))
    expected = fn({**shared, 'h': jnp.asarray(h.reshape(-1, 5)[at])}, rows, **keywords)
    np.testing.assert_allclose(found.value.ravel()[at], expected, rtol=1e-5)
    np.testing.assert_array_equal(found.weight, items > 0)

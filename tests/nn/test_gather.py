"""Rows taken from a table that is read whole too: values and gradients are those of indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpad_jax.models.fusion import Fusion, blank
from tpad_jax.nn.gather import take, totals


def test_take_is_indexing():
    """Ids that repeat, twice in a row, with a reader of the whole table behind them."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)
    first, second = np.array([[1, 4, 1], [0, 4, 6]]), np.array([2, 1])
    weight = jnp.asarray(rng.normal(size=(2, 3, 3)), jnp.float32)

    def taken(table):
        whole, rows = take(table, first)
        whole, more = take(whole, second)
        return (rows * weight).sum() + (more**2).sum() + jnp.tanh(whole).sum()

    def indexed(table):
        return ((table[first] * weight).sum() + (table[second]**2).sum() + jnp.tanh(table).sum())

    for ours, plain in zip(jax.value_and_grad(taken)(table), jax.value_and_grad(indexed)(table),
                           strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-6)


def test_the_whole_catalogue_is_every_item():
    """ids=None gives what all ids give, with dropout by item and without."""
    rng, ids = np.random.default_rng(0), jnp.arange(6)
    warm, side = jnp.array([0, 1, 1, 0, 1, 1], bool), jnp.asarray(rng.integers(0, 3, (6, 1)))
    features = [jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)]
    for rate in (0.0, 0.5):
        fusion = Fusion(5, 3, side_sizes=(3,), id_dropout=rate, feature_dropout=rate)
        params = fusion.init(jax.random.key(0), ids, warm, features, side)
        for key in (None, jax.random.key(1)):
            np.testing.assert_array_equal(
                fusion.apply(params, None, warm, features, side, key),
                fusion.apply(params, ids, warm, features, side, key))


def test_without_id_dropout_cold_items_have_no_vector_of_their_own():
    ids, warm = jnp.arange(6), jnp.array([0, 1, 1, 0, 1, 1], bool)
    fusion, side = Fusion(5, 3), jnp.zeros((6, 0), jnp.int32)
    params = fusion.init(jax.random.key(0), ids, warm, [], side)['params']
    z = fusion.apply({'params': blank(params, warm)}, None, warm, [], side)
    np.testing.assert_array_equal(np.abs(z).max(axis=1) > 0, warm)
    assert 'shared' not in params


@pytest.mark.parametrize('length', [1, 2, 7, 64, 65])
@pytest.mark.parametrize('more', [(), (3,)])
def test_totals_are_the_sums_of_each_id(length, more):
    rng = np.random.default_rng(length)
    ids = rng.integers(0, 5, (4, length)).astype(np.int32)
    values = rng.normal(size=(4, length, *more)).astype(np.float32)
    found, sums, last = map(np.asarray, jax.jit(totals)(ids, values))
    for row in range(4):
        np.testing.assert_array_equal(found[row], np.sort(ids[row]))
        assert set(found[row][last[row]]) == set(ids[row])
        assert last[row].sum() == len(set(ids[row]))
        for item, total in zip(found[row][last[row]], sums[row][last[row]], strict=True):
            np.testing.assert_allclose(total, values[row][ids[row] == item].sum(axis=0), atol=1e-5)


def test_totals_have_gradients_of_sums():
    ids = jnp.array([[2, 1, 2, 2]])
    pull = jax.grad(lambda x: jnp.where(totals(ids, x)[2], totals(ids, x)[1], 0)[0]
                    @ jnp.arange(4.0))(jnp.ones((1, 4)))
    np.testing.assert_allclose(pull, [[3, 0, 3, 3]])

"""The chunked log-partition against the whole one, and the proposal's draws against its weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpad_jax.nn import softmax

B, D = 6, 5


def make(items, seed=0):
    """h, z and warm of a catalogue with large and small scores and a tenth of it cold."""
    rng = np.random.default_rng(seed)
    h, z = rng.normal(size=(B, D)) * 3, rng.normal(size=(items + 1, D)) * 3
    warm = rng.random(items + 1) < 0.9
    warm[0] = False
    return *(x.astype(np.float32) for x in (h, z)), warm


def reference(h, z, warm, slope):
    """Value and gradients in float64, item by item."""
    h, z = np.float64(h), np.float64(z[:])
    scores = np.where(warm, h @ z.T, -np.inf)
    value = np.logaddexp.reduce(scores, axis=1)
    share = np.exp(scores - value[:, None]) * slope[:, None]
    return value, share @ z, share.T @ h


def value_and_pull(h, z, warm, slope, **kw):
    fn = jax.jit(lambda h, z: jax.vjp(partial(softmax.log_partition, warm=warm, **kw), h, z)[0])
    back = jax.jit(lambda h, z: jax.vjp(
        partial(softmax.log_partition, warm=warm, **kw), h, z)[1](slope))
    return fn(h, z), *back(h, z)


# one chunk, several equal ones, a last one of a single row, a chunk larger than the catalogue
@pytest.mark.parametrize(('items', 'chunk'), [(20, 0), (20, 21), (20, 7), (20, 4), (20, 64),
                                              (1, 8), (999, 128)])
def test_value_and_gradients_are_those_of_the_whole(items, chunk):
    h, z, warm = make(items)
    warm[1] = True
    slope = np.linspace(-1, 2, B).astype(np.float32)
    expected = reference(h, z, warm, slope)
    found = value_and_pull(h, z, warm, slope, chunk=chunk)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())
    assert (np.asarray(found[2])[~warm] == 0).all()


@pytest.mark.parametrize('chunk', [0, 128])
def test_bfloat16_operands_are_summed_in_float32(chunk):
    h, z, warm = make(999)
    slope = np.ones(B, np.float32)
    expected = reference(*(np.asarray(jnp.bfloat16(x), np.float32) for x in (h, z)), warm, slope)
    value, to_h, to_z = value_and_pull(h, z, warm, slope, chunk=chunk, dtype='bfloat16')
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    for got, want in ((to_h, expected[1]), (to_z, expected[2])):
        assert got.dtype == np.float32
        assert 1e-5 < np.abs(got - want).max() / np.abs(want).max() < 1e-2


@pytest.mark.parametrize('chunk', [0, 8])
def test_a_cold_item_may_score_anything(chunk):
    """Not even an overflow of it shows."""
    h, z, warm = make(20)
    z[5], warm[5] = 1e6 * np.sign(h[0]), False
    found = value_and_pull(h, z, warm, np.ones(B, np.float32), chunk=chunk)
    assert all(np.isfinite(x).all() for x in found)
    np.testing.assert_allclose(found[0], reference(h, z, warm, np.ones(B))[0], rtol=2e-6)


@pytest.mark.parametrize('chunk', [0, 8])
def test_nothing_warm_is_minus_infinity_and_pulls_nowhere(chunk):
    h, z, _ = make(20)
    value, to_h, to_z = value_and_pull(h, z, np.zeros(21, bool), np.ones(B, np.float32),
                                       chunk=chunk)
    assert (np.asarray(value) == -np.inf).all()
    assert (np.asarray(to_h) == 0).all()
    assert (np.asarray(to_z) == 0).all()


def test_no_scores_of_the_whole_catalogue_live():
    """Temporaries of forward and backward: the gradient and a few chunks, not [B, V]."""
    rows, items, chunk = 256, 40_000, 1_000
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, 8), (items, 8))]
    warm = np.ones(items, bool)

    def temporary(chunk):
        fn = jax.grad(lambda h, z: softmax.log_partition(h, z, warm, chunk=chunk).sum(), (0, 1))
        return jax.jit(fn).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * rows * items
    assert temporary(0) >= scores
    assert temporary(chunk) < 4 * 4 * rows * chunk + 2 * 4 * items * 8


@pytest.mark.parametrize('power', [0.0, 0.75, 1.0])
def test_weights_are_the_proposal(power):
    rng = np.random.default_rng(0)
    warm = np.arange(1001) % 10 > 0
    counts = rng.integers(1, 10_000, 1001).astype(np.float32)
    weight = softmax.weights(warm, counts, power)
    wanted = np.where(warm, counts.astype(float) ** power, 0)
    share = np.asarray(weight, np.float64)
    assert share.sum() == softmax.TOTAL
    assert share[0] < 2e-4 * softmax.TOTAL
    wanted *= share[1:].sum() / wanted.sum()
    np.testing.assert_allclose(share[1:], wanted[1:], rtol=1e-5, atol=0.6)  # to the integer
    log = softmax.log_probability(weight, jnp.arange(1001))
    np.testing.assert_allclose(np.exp(log), share / softmax.TOTAL, rtol=1e-5)


@pytest.mark.parametrize('items', [1, 2, 1000, 1_000_000])
def test_weights_never_overrun(items):
    """The rarest item gets its one part, and what is left for padding stays small."""
    counts = jnp.ones(items + 1).at[1].set(1e9)
    weight = np.asarray(softmax.weights(jnp.arange(items + 1) > 0, counts, 1.0), np.int64)
    assert weight.sum() == softmax.TOTAL
    assert weight[1:].min() >= 1
    assert weight[0] < 1e-3 * softmax.TOTAL


def test_draws_follow_their_weights():
    """Chi-square of 200,000 draws; what has no weight is never drawn."""
    weight = softmax.weights(jnp.arange(8) % 7 > 0, jnp.array([0, 5, 3, 1, 10, 1, 100, 9]), 1.0)
    ids = np.asarray(softmax.draw(jax.random.key(0), weight, 200_000))
    count = np.bincount(ids, minlength=8)
    expected = 200_000 * np.float64(weight) / np.float64(weight.sum())
    assert (count[expected == 0] == 0).all()
    some = expected > 0
    assert ((count - expected)[some] ** 2 / expected[some]).sum() < 22.5  # 99.9 % of 6 degrees


@pytest.mark.slow
def test_ten_million_items_can_all_be_drawn():
    """A float32 uniform would reach 8.4 of them, so that fewer draws were different."""
    items, draws = 10_000_000, 1_000_000
    weight = softmax.weights(jnp.arange(items + 1) > 0, jnp.ones(items + 1), 0.0)
    ids = np.asarray(softmax.draw(jax.random.key(0), weight, draws))
    assert (ids == 0).mean() < 0.01
    different = items * -np.expm1(-(ids > 0).sum() / items)
    assert abs(len(np.unique(ids[ids > 0])) - different) < 1500
    assert np.abs(np.histogram(ids, 10, (1, items))[0] / (ids > 0).sum() - 0.1).max() < 0.002

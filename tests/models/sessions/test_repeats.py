"""The shift of a prefix's own items: where it stands, in the loss, in scores and in ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluation.test_device_ranks import ONE, D, N, draw, last
from tpad_jax import losses
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.evaluation import metrics, scorers
from tpad_jax.models.sessions import repeats
from tpad_jax.nn.gather import at_last
from tpad_jax.types import Batch

TABLE = np.array([-1.5, 0.5, 2.0, -0.25, 1.0], np.float32)


def looped(items):
    """`repeats.shifts` by its words: each different item of a prefix once, where it is last met."""
    found = np.zeros((len(items), N, N), np.float32)
    for row, prefix in enumerate(items):
        for end in range(N):
            for item in set(prefix[:end + 1].tolist()) - {0}:
                at = max(place for place in range(end + 1) if prefix[place] == item)
                found[row, end, at] = TABLE[end - at]
    return found


ITEMS = np.array([[3, 3, 3, 1, 3], [1, 2, 1, 2, 4], [5, 0, 0, 0, 0], [4, 4, 0, 0, 0]], np.int32)


def test_shifts_by_plain_loops():
    found = np.asarray(repeats.shifts(TABLE, ITEMS))
    real = ITEMS > 0  # a prefix that ends in padding is none
    np.testing.assert_array_equal(found[real], looped(ITEMS)[real])
    np.testing.assert_array_equal(at_last(found, ITEMS),
                                  looped(ITEMS)[np.arange(4), real.sum(axis=1) - 1])


def shifted(scores, items, shift):
    """Scores [R, V + 1] with the shift added by hand."""
    scores = np.array(scores)
    for row, (prefix, by) in enumerate(zip(items, shift, strict=True)):
        for item, amount in zip(prefix, by, strict=True):
            if item:
                scores[row, item] += amount
    return scores


def shift_of(weights, z, items):
    """Items and shifts in whole numbers, so that ties are many."""
    return items, jnp.round(4 * at_last(repeats.shifts(jnp.asarray(TABLE), items), items))


@pytest.mark.parametrize(('way', 'chunk', 'rows'), [('jit', 0, 512), ('jit', 64, 16),
                                                    ('jit', 701, 45), ('pmap', 64, 24)])
def test_ranks_of_shifted_scores(way, chunk, rows):
    """Some targets stand in their own prefix."""
    weights, z, items, target = draw()
    target[::3] = items[::3, 0]
    devices = ONE if way == 'jit' else devices_lib.choose(way, 8)
    *found, nll = scorers.ranker(last, devices, shifts=shift_of, chunk=chunk)(
        weights, z, items, target, rows=rows, power=0.5)
    scores = shifted(np.asarray(last(weights, z, items)) @ z.T, *shift_of(None, z, items))
    plain = scorers.ranker(last, ONE)(weights, z, items, target)
    assert (found[0] != plain[0]).any()
    np.testing.assert_allclose(nll, metrics.nll(0.5 * scores, target), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, metrics.counts(scores, target), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('places', [False, True])
@pytest.mark.parametrize(('smoothing', 'chunk'), [(0.0, 0), (0.3, 4)])
def test_the_loss_is_the_softmax_of_shifted_logits(places, smoothing, chunk):
    """After every position; against the whole table in float64."""
    rng, count = np.random.default_rng(0), 9
    h, z = rng.normal(size=(4, N, D)), rng.normal(size=(count, D))
    following = np.where(ITEMS > 0, rng.integers(1, count, ITEMS.shape), 0).astype(np.int32)
    following[0, 1] = 3  # a repeat is a target too
    warm = np.arange(count) > 0
    warm[2] = False
    at = np.flatnonzero(ITEMS)
    batch = Batch(items=jnp.asarray(ITEMS), next=jnp.asarray(following), target=None,
                  valid=jnp.ones(4, bool), row=None,
                  places=jnp.asarray(np.pad(at, (0, 3), constant_values=-1)) if places else None)
    out = {'h': jnp.float32(h), 'z': jnp.float32(z), 'warm': jnp.asarray(warm),
           'repeat': repeats.shifts(TABLE, ITEMS)}
    found = losses.next_item(out, batch, smoothing=smoothing, chunk=chunk, temperature=0.5)
    scores = shifted((h.reshape(-1, D) / 0.5) @ z.T, np.repeat(ITEMS, N, axis=0),
                     looped(ITEMS).reshape(-1, N))
    log_whole = np.log(np.exp(scores[:, warm]).sum(axis=1))
    own = scores[np.arange(4 * N), following.ravel()]
    wanted = log_whole - (1 - smoothing) * own - smoothing * scores[:, warm].mean(axis=1)
    np.testing.assert_allclose(np.ravel(found.value)[at], wanted[at], rtol=2e-5)


def test_a_session_made_of_nothing_else_has_a_finite_gradient():
    """The prefix's item holds all of the partition, and its shift takes it away."""
    batch = Batch(items=jnp.array([[1]]), next=jnp.array([[2]]), target=jnp.array([2]),
                  valid=jnp.ones(1, bool), row=None)

    def value(table):
        out = {'h': jnp.array([[60.0, 0.0]]), 'z': jnp.eye(3, 2, k=-1), 'warm': jnp.arange(3) > 0,
               'repeat': repeats.shifts(table, batch.items)}
        return losses.next_item(out, batch)[0]

    measured = jax.jit(jax.value_and_grad(value))
    for shift in (-100.0, 0.0, 5.0):
        found, slope = measured(jnp.array([shift]))
        assert np.isfinite(found)
        assert np.isfinite(slope).all()

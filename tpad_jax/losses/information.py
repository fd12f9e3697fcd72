"""Mutual information and discrepancies between features, as losses on a batch's positions."""

import jax
import jax.numpy as jnp

from tpad_jax import collectives
from tpad_jax.models import bounds
from tpad_jax.models.critics import unit
from tpad_jax.types import Loss


def infonce(out, batch, *, axis=None, x='k', y='c', ids='items', critic='critic.align',
            temperature=1.0):
    """Minus the InfoNCE lower bound of I(x; y), negatives from every replica. -> Loss [B, N]

    van den Oord et al. 2018. Positions that hold the same item (by `ids`) are not negatives of each
    other in the loss; the estimate that is logged keeps them, or it were no bound. It cannot exceed
    the log of the candidates' number: the metric `room` is what is left.
    """
    scores, own, negative, other, weight = _pairs(out, batch, axis, x, y, ids, critic)
    bound = bounds.infonce(scores / temperature, own, negative)
    estimate = bounds.infonce(jax.lax.stop_gradient(scores) / temperature, own, other)
    room = jnp.log(other.sum(axis=1) + 1.0) - estimate
    shape = weight.shape
    return Loss(-bound.reshape(shape), weight,
                metrics={'mi': estimate.reshape(shape), 'room': room.reshape(shape)})


def mine(out, batch, *, axis=None, state=None, x='k', y='c', ids='items', critic='critic.align',
         decay=0.99):
    """Minus the Donsker-Varadhan bound of I(x; y) (MINE, Belghazi et al. 2018). -> Loss [B, N]

    The gradient of the log partition is corrected by a moving average of the partition, which is
    this loss's state: {'log_average': float32 []}.
    """
    scores, own, negative, other, weight = _pairs(out, batch, axis, x, y, ids, critic)
    partition = bounds.log_partition(scores, negative, axis)
    past = jnp.float32(-jnp.inf) if state is None else state['log_average']
    corrected, new = bounds.moving_partition(partition, past, decay)
    new = jnp.where(collectives.total(negative.sum(), axis) > 0, new, past)
    bound = bounds.donsker_varadhan(scores, own, corrected).reshape(weight.shape)
    fixed = jax.lax.stop_gradient(scores)
    estimate = bounds.donsker_varadhan(fixed, own, bounds.log_partition(fixed, other, axis))
    return Loss(-bound, weight, {'log_average': new}, {'mi': estimate.reshape(weight.shape)})


mine.initial_state = lambda: {'log_average': jnp.float32(-jnp.inf)}


def vclub(out, batch, *, axis=None, x='c', y='p', ids='items', club='club'):
    """vCLUB upper bound of I(x; y) (Cheng et al. 2020), q held fixed. -> Loss [B, N]

    An upper bound only while q(y|x) is good: see `club_fit`'s value beside it. Where the batch's
    estimate is negative, which no mutual information is, it stops pulling.
    """
    frozen = jax.lax.stop_gradient(out[club])
    scores, own, negative, other, weight = _pairs({**out, 'q': frozen}, batch, axis, x, y, ids, 'q')

    def bound(scores, against):
        count = jnp.maximum(against.sum(axis=1), 1)
        mean = jnp.where(against, scores, 0).sum(axis=1) / count
        return (scores[jnp.arange(len(own)), own] - mean).reshape(weight.shape)

    value = bound(scores, negative)
    mean = collectives.total((value * weight).sum(), axis)
    pulled = jnp.where(jax.lax.stop_gradient(mean) > 0, value, jax.lax.stop_gradient(value))
    return Loss(pulled, weight, metrics={'mi': bound(jax.lax.stop_gradient(scores), other)})


def club_fit(out, batch, *, axis=None, x='c', y='p', club='club'):
    """Minus the log-likelihood of q(y|x), on features that get no gradient. -> Loss [B, N]

    The metric `log_q` is what q makes of x: nats per dimension above the diagonal Gaussian of y's
    own mean and variances over the batch [ours; a standard normal is beaten by knowing the mean].
    Where it is not above 0, no vCLUB figure made with this q is a bound.
    """
    c, p = (jax.lax.stop_gradient(out[n]) for n in (x, y))
    shape = c.shape[:2]
    c, p = (a.reshape(-1, a.shape[-1]) for a in (c, p))
    q = jax.vmap(lambda a, b: out[club](a[None], b[None])[0, 0])
    value = -q(c, p).reshape(shape) / p.shape[-1]
    weight = batch.mask.astype(jnp.float32)
    share = weight.reshape(-1, 1) / jnp.maximum(collectives.total(weight.sum(), axis), 1)
    square = (p - collectives.total((share * p).sum(axis=0), axis)) ** 2
    variance = jnp.maximum(collectives.total((share * square).sum(axis=0), axis), 1e-6)
    marginal = 0.5 * (square / variance + jnp.log(variance)).mean(axis=-1)
    return Loss(value, weight, metrics={'log_q': marginal.reshape(shape) - value})


def mmd(out, batch, *, axis=None, x='r', y='t', widths=4):
    """Squared maximum mean discrepancy between two normalised clouds. -> Loss [B, N]

    Gretton et al. 2012, the biased estimate, with the mean of `widths` Gaussian kernels of
    deviation 2, 1, 1/2, ... One point of each cloud per position, so that the value does not
    depend on how a batch is divided.
    """
    weight = batch.mask.astype(jnp.float32)
    a, b = (unit(out[n]).reshape(-1, out[n].shape[-1]) for n in (x, y))
    all_a, all_b = collectives.gather(a, axis), collectives.gather(b, axis)
    everyone = collectives.gather(weight.reshape(-1), axis)
    share = everyone / jnp.maximum(everyone.sum(), 1)

    def kernel(u, v):
        square = jnp.maximum(2 - 2 * u @ v.T, 0)  # the points have length one
        parts = [jnp.exp(-square / 8)]
        for _ in range(widths - 1):
            parts.append(parts[-1] ** 4)  # half the deviation, without another exponential
        return sum(parts) / widths

    value = (kernel(a, all_a) - kernel(a, all_b) - kernel(b, all_a) + kernel(b, all_b)) @ share
    return Loss(value.reshape(weight.shape), weight)


def _pairs(out, batch, axis, x, y, ids, critic):
    """Scores of this replica's positions against everyone's.

    Returns:
      scores [A, G], own int32 [A], weight [B, N], with A = B N; bool [A, G] negative (pairs of
      different items, for losses) and other (all pairs but a position with itself, for
      estimates).
    """
    weight = batch.mask
    x, y = (out[n].reshape(-1, out[n].shape[-1]) for n in (x, y))
    ids = jnp.where(weight, out[ids], 0).reshape(-1)
    everyone = collectives.gather(ids, axis)
    scores = out[critic](x, collectives.gather(y, axis))
    own = collectives.offset(x.shape[0], axis) + jnp.arange(x.shape[0])
    negative = (everyone[None] > 0) & (everyone[None] != ids[:, None]) & (ids[:, None] > 0)
    weight &= negative.any(axis=1).reshape(weight.shape)  # without one a bound says nothing
    other = (everyone[None] > 0) & (ids[:, None] > 0)
    other &= own[:, None] != jnp.arange(len(everyone))
    return scores, own, negative, other, weight.astype(jnp.float32)

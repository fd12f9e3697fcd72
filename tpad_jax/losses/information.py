"""Mutual information between features, as losses on a batch's positions.

Lower bounds have a minus sign, so that a loss is always minimised. In a loss, positions of padding
and pairs of positions with the same item (by `ids`) are never negatives. The logged estimate keeps
pairs of equal items as negatives; without them it would not be a bound. Negatives come from every
replica. Positions of one session depend on each other; `by_session` takes those of a row out of
the negatives of its positions, in losses and estimates. A row is a session in stage transfer; where
every prefix is a row, other prefixes of the session stay. With `chunk`, values and gradients are
the same.
"""

import jax
import jax.numpy as jnp

from tpad_jax.distributed import collectives
from tpad_jax.losses.contract import Out
from tpad_jax.losses.pairs import flat, positions, scaled, score_pairs
from tpad_jax.mutual_information import bounds
from tpad_jax.types import Loss


def infonce(out, batch, *, axis=None, x: Out = Out('k'), y: Out = Out('c'), ids: Out = Out('items'),
            critic: Out = Out('critic.align'), temperature=1.0, chunk=0, by_session=False):
    """Return minus the InfoNCE lower bound of I(x; y) (van den Oord et al. 2018).

    The estimate cannot exceed the log of the number of candidates; the metric `room` is the
    difference.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      x: float32 [B, N, I]. Output with one feature of each pair.
      y: float32 [B, N, J]. Output with the other.
      ids: int32 [B, N]. Output with the items of the positions.
      critic: Output with the score of pairs.
      temperature: divides the scores.
      chunk: rows whose scores exist at the same time, 0: all.
      by_session: whether positions of one row are never negatives of each other.

    Returns:
      Loss [B, N].
    """
    pairs = score_pairs(out, batch, axis, x, y, ids, out[critic], chunk, scale=1 / temperature,
                        by_session=by_session)
    estimate = bounds.infonce(*pairs.every)
    return _lower(bounds.infonce(*pairs.differ), pairs.at.weight, estimate,
                  room=jnp.log(pairs.at.others + 1.0) - estimate)


def mine(out, batch, *, axis=None, state=None, x: Out = Out('k'), y: Out = Out('c'),
         ids: Out = Out('items'), critic: Out = Out('critic.align'), decay=0.99, limit=1.0,
         chunk=0, by_session=False):
    """Return minus the Donsker-Varadhan bound of I(x; y) (MINE, Belghazi et al. 2018).

    The gradient of the log partition is corrected by a moving average of the partition, the state
    of this loss.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      state: {'log_average': float32 []}.
      x: float32 [B, N, I]. Output with one feature of each pair.
      y: float32 [B, N, J]. Output with the other.
      ids: int32 [B, N]. Output with the items of the positions.
      critic: Output with the score of pairs.
      decay: of the moving average.
      limit: nats above the average that a batch counts for; see `bounds.moving_partition` [ours].
        The value does not change; its gradient stays below exp(limit) times that of the batch.
      chunk: rows whose scores exist at the same time, 0: all.
      by_session: whether positions of one row are never negatives of each other.

    Returns:
      Loss [B, N].
    """
    pairs = score_pairs(out, batch, axis, x, y, ids, out[critic], chunk, by_session=by_session)
    rows = bounds.log_rows(*pairs.differ)
    past = jnp.float32(-jnp.inf) if state is None else state['log_average']
    corrected, new = bounds.moving_partition(bounds.partition(rows, axis), past, decay, limit)
    new = jnp.where(collectives.total(rows.count.sum(), axis) > 0, new, past)
    return _lower(rows.own - corrected, pairs.at.weight,
                  bounds.donsker_varadhan(*pairs.every, axis=axis), state={'log_average': new})


mine.initial_state = lambda: {'log_average': jnp.float32(-jnp.inf)}


def nwj(out, batch, *, axis=None, x: Out = Out('k'), y: Out = Out('c'), ids: Out = Out('items'),
        critic: Out = Out('critic.align'), chunk=0):
    """Return minus the bound of Nguyen, Wainwright and Jordan 2010 of I(x; y).

    Its critic learns 1 + the log density ratio, with the constant. float32 overflows at a score
    above 88, which a critic of bounded scores does not reach.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      x: float32 [B, N, I]. Output with one feature of each pair.
      y: float32 [B, N, J]. Output with the other.
      ids: int32 [B, N]. Output with the items of the positions.
      critic: Output with the score of pairs.
      chunk: rows whose scores exist at the same time, 0: all.

    Returns:
      Loss [B, N].
    """
    pairs = score_pairs(out, batch, axis, x, y, ids, out[critic], chunk)
    return _lower(bounds.nwj(*pairs.differ, axis=axis), pairs.at.weight,
                  bounds.nwj(*pairs.every, axis=axis))


def jsd(out, batch, *, axis=None, x: Out = Out('k'), y: Out = Out('c'), ids: Out = Out('items'),
        critic: Out = Out('critic.align'), chunk=0):
    """Return minus the Jensen-Shannon objective (Hjelm et al. 2019).

    It is not a bound of I(x; y), but its critic learns the log density ratio. The logged estimate
    is the Donsker-Varadhan bound by that critic.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      x: float32 [B, N, I]. Output with one feature of each pair.
      y: float32 [B, N, J]. Output with the other.
      ids: int32 [B, N]. Output with the items of the positions.
      critic: Output with the score of pairs.
      chunk: rows whose scores exist at the same time, 0: all.

    Returns:
      Loss [B, N].
    """
    pairs = score_pairs(out, batch, axis, x, y, ids, out[critic], chunk)
    return _lower(bounds.jsd(*pairs.differ, axis=axis), pairs.at.weight,
                  bounds.donsker_varadhan(*pairs.every, axis=axis))


def smile(out, batch, *, axis=None, x: Out = Out('k'), y: Out = Out('c'), ids: Out = Out('items'),
          critic: Out = Out('critic.align'), clip=5.0, chunk=0):
    """Return minus SMILE (Song and Ermon 2020), which is not a bound of I(x; y).

    The value is SMILE's and the gradient that of `jsd`, as its authors train it.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      x: float32 [B, N, I]. Output with one feature of each pair.
      y: float32 [B, N, J]. Output with the other.
      ids: int32 [B, N]. Output with the items of the positions.
      critic: Output with the score of pairs.
      clip: limit of the scores in the partition, nats.
      chunk: rows whose scores exist at the same time, 0: all.

    Returns:
      Loss [B, N].
    """
    pairs = score_pairs(out, batch, axis, x, y, ids, out[critic], chunk)
    value = jax.lax.stop_gradient(bounds.smile(*pairs.differ, axis=axis, clip=clip))
    trains = bounds.jsd(*pairs.differ, axis=axis)
    return _lower(value + trains - jax.lax.stop_gradient(trains), pairs.at.weight,
                  bounds.smile(*pairs.every, axis=axis, clip=clip))


def vclub(out, batch, *, axis=None, x: Out = Out('c'), y: Out = Out('p'), ids: Out = Out('items'),
          club: Out = Out('club'), chunk=0, scale=False):
    """Return the vCLUB upper bound of I(x; y) (Cheng et al. 2020), with q held fixed.

    It is an upper bound only while q(y|x) is good: see the value of `club_fit`. If the batch's
    estimate is negative, which mutual information cannot be, its gradient is zero. A q with factors
    needs no matrix: the mean of its scores is the score of the mean [ours].

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      x: float32 [B, N, I]. Output with one feature of each pair.
      y: float32 [B, N, J]. Output with the other.
      ids: int32 [B, N]. Output with the items of the positions.
      club: Output with the density q.
      chunk: rows whose scores exist at the same time, 0: all.
      scale: whether q is of features with mean 0 and variance 1, see `club_fit`.

    Returns:
      Loss [B, N].
    """
    out = scaled(out, batch, axis, x, y) if scale else out
    q = jax.lax.stop_gradient(out[club])
    factors = q.factors(flat(out[x]), flat(out[y])) if hasattr(q, 'factors') else None
    if factors is None:
        pairs = score_pairs(out, batch, axis, x, y, ids, q, chunk)
        return _upper(bounds.vclub(*pairs.differ), pairs.at.weight, bounds.vclub(*pairs.every),
                      axis)
    at = positions(out, batch, axis, ids)
    a, b = factors
    everyone = collectives.gather(jnp.where(at.item[:, None] > 0, b, 0), axis)
    _, group = jnp.unique(at.everyone, size=len(everyone), return_inverse=True)
    same = jax.ops.segment_sum(everyone, group, len(everyone))[group[at.own]]
    total = everyone.sum(axis=0)

    def bound(rest, count):
        return (a * (b - rest / jnp.maximum(count, 1)[:, None])).sum(-1)

    return _upper(bound(total - same, at.different), at.weight, bound(total - b, at.others), axis)


def l1out(out, batch, *, axis=None, x: Out = Out('c'), y: Out = Out('p'), ids: Out = Out('items'),
          club: Out = Out('club'), chunk=0, scale=False):
    """Return the leave-one-out upper bound of I(x; y) (Poole et al. 2019), with q held fixed.

    The negatives of a position are the x of others for its y. As in `vclub` it is a bound only
    while q(y|x) is good, and its gradient is zero if the batch's estimate is negative.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      x: float32 [B, N, I]. Output with one feature of each pair.
      y: float32 [B, N, J]. Output with the other.
      ids: int32 [B, N]. Output with the items of the positions.
      club: Output with the density q.
      chunk: rows whose scores exist at the same time, 0: all.
      scale: whether q is of features with mean 0 and variance 1, see `club_fit`.

    Returns:
      Loss [B, N].
    """
    out = scaled(out, batch, axis, x, y) if scale else out
    q = jax.lax.stop_gradient(out[club])
    pairs = score_pairs(out, batch, axis, x, y, ids, q, chunk, flip=True)
    return _upper(bounds.l1out(*pairs.differ), pairs.at.weight, bounds.l1out(*pairs.every), axis)


def club_fit(out, batch, *, axis=None, x: Out = Out('c'), y: Out = Out('p'),
             club: Out = Out('club'), scale=False):
    """Return minus the log-likelihood of q(y|x), on features that get no gradient.

    The metric `log_q` is the gain of knowing x: nats per dimension above the diagonal Gaussian of
    y's mean and variances over the batch [ours; knowing the mean is enough to beat a standard
    normal]. Where it is not above 0, no vCLUB value of this q is a bound.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      x: float32 [B, N, I]. Output with one feature of each pair.
      y: float32 [B, N, J]. Output with the other.
      club: Output with the density q.
      scale: whether q is of features with mean 0 and variance 1 over the batch, so that a q which
        starts as a standard normal starts where `log_q` is 0. The losses that use q need the same.

    Returns:
      Loss [B, N].
    """
    out = scaled(out, batch, axis, x, y) if scale else out
    c, p = (flat(jax.lax.stop_gradient(out[n])) for n in (x, y))
    weight = batch.mask.astype(jnp.float32)
    value = -out[club].own(c, p).reshape(weight.shape) / p.shape[-1]
    share = weight.reshape(-1, 1) / jnp.maximum(collectives.total(weight.sum(), axis), 1)
    square = (p - collectives.total((share * p).sum(axis=0), axis)) ** 2
    variance = jnp.maximum(collectives.total((share * square).sum(axis=0), axis), 1e-6)
    marginal = 0.5 * (square / variance + jnp.log(variance)).mean(axis=-1)
    return Loss(value, weight, metrics={'log_q': marginal.reshape(weight.shape) - value})


def _lower(bound, weight, estimate, state=None, **metrics):
    """Make a loss of a lower bound [A]: minus the bound; the estimate is logged."""
    metrics = {name: jax.lax.stop_gradient(value).reshape(weight.shape)
               for name, value in dict(mi=estimate, **metrics).items()}
    return Loss(-bound.reshape(weight.shape), weight, state, metrics)


def _upper(bound, weight, estimate, axis):
    """Make a loss of an upper bound [A], without a gradient if its mean is below zero."""
    value = bound.reshape(weight.shape)
    mean = collectives.total((value * weight).sum(), axis)
    pulled = jnp.where(jax.lax.stop_gradient(mean) > 0, value, jax.lax.stop_gradient(value))
    estimate = jax.lax.stop_gradient(estimate).reshape(weight.shape)
    return Loss(pulled, weight, metrics={'mi': estimate})

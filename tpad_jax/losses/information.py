"""Mutual information between features, as losses on a batch's positions.

Lower bounds come with a minus, so that a loss is always made small. Pairs of positions that hold
the same item (by `ids`) and padding are never negatives in a loss; the estimate that is logged
keeps equal items, or it were no bound. Negatives come from every replica. `chunk` is the number of
rows whose scores exist at once, 0: all; values and gradients are the same.
"""

import jax
import jax.numpy as jnp

from tpad_jax.distributed import collectives
from tpad_jax.losses.contract import Out
from tpad_jax.losses.pairs import flat, positions, scaled, score_pairs
from tpad_jax.mutual_information import bounds
from tpad_jax.types import Loss


def infonce(out, batch, *, axis=None, x: Out = Out('k'), y: Out = Out('c'), ids: Out = Out('items'),
            critic: Out = Out('critic.align'), temperature=1.0, chunk=0):
    """Minus the InfoNCE lower bound of I(x; y), negatives from every replica. -> Loss [B, N]

    van den Oord et al. 2018. The estimate cannot exceed the log of the candidates' number: the
    metric `room` is what is left.
    """
    pairs = score_pairs(out, batch, axis, x, y, ids, out[critic], chunk, scale=1 / temperature)
    estimate = bounds.infonce(*pairs.every)
    return _lower(bounds.infonce(*pairs.differ), pairs.at.weight, estimate,
                  room=jnp.log(pairs.at.others + 1.0) - estimate)


def mine(out, batch, *, axis=None, state=None, x: Out = Out('k'), y: Out = Out('c'),
         ids: Out = Out('items'), critic: Out = Out('critic.align'), decay=0.99, limit=1.0,
         chunk=0):
    """Minus the Donsker-Varadhan bound of I(x; y) (MINE, Belghazi et al. 2018). -> Loss [B, N]

    The gradient of the log partition is corrected by a moving average of the partition, which is
    this loss's state: {'log_average': float32 []}.
    limit: nats above the average that a batch counts for; see `bounds.moving_partition`.
    """
    pairs = score_pairs(out, batch, axis, x, y, ids, out[critic], chunk)
    rows = bounds.log_rows(*pairs.differ)
    past = jnp.float32(-jnp.inf) if state is None else state['log_average']
    corrected, new = bounds.moving_partition(bounds.partition(rows, axis), past, decay,
                                              limit)
    new = jnp.where(collectives.total(rows.count.sum(), axis) > 0, new, past)
    return _lower(rows.own - corrected, pairs.at.weight,
                  bounds.donsker_varadhan(*pairs.every, axis=axis), state={'log_average': new})


mine.initial_state = lambda: {'log_average': jnp.float32(-jnp.inf)}


def nwj(out, batch, *, axis=None, x: Out = Out('k'), y: Out = Out('c'), ids: Out = Out('items'),
        critic: Out = Out('critic.align'), chunk=0):
    """Minus the bound of Nguyen, Wainwright and Jordan 2010 of I(x; y). -> Loss [B, N]

    Its critic learns 1 + the log density ratio, constant and all. A score above 88 is too much for
    float32, which a critic of bounded scores does not reach.
    """
    pairs = score_pairs(out, batch, axis, x, y, ids, out[critic], chunk)
    return _lower(bounds.nwj(*pairs.differ, axis=axis), pairs.at.weight,
                  bounds.nwj(*pairs.every, axis=axis))


def jsd(out, batch, *, axis=None, x: Out = Out('k'), y: Out = Out('c'), ids: Out = Out('items'),
        critic: Out = Out('critic.align'), chunk=0):
    """Minus the Jensen-Shannon objective (Hjelm et al. 2019). -> Loss [B, N]

    No bound of I(x; y), but its critic learns the log density ratio, and the estimate beside it is
    Donsker and Varadhan's by that critic.
    """
    pairs = score_pairs(out, batch, axis, x, y, ids, out[critic], chunk)
    return _lower(bounds.jsd(*pairs.differ, axis=axis), pairs.at.weight,
                  bounds.donsker_varadhan(*pairs.every, axis=axis))


def smile(out, batch, *, axis=None, x: Out = Out('k'), y: Out = Out('c'), ids: Out = Out('items'),
          critic: Out = Out('critic.align'), clip=5.0, chunk=0):
    """Minus SMILE (Song and Ermon 2020), no bound of I(x; y). -> Loss [B, N]

    The value is SMILE's and the gradient `jsd`'s, as its authors train it.
    """
    pairs = score_pairs(out, batch, axis, x, y, ids, out[critic], chunk)
    value = jax.lax.stop_gradient(bounds.smile(*pairs.differ, axis=axis, clip=clip))
    trains = bounds.jsd(*pairs.differ, axis=axis)
    return _lower(value + trains - jax.lax.stop_gradient(trains), pairs.at.weight,
                  bounds.smile(*pairs.every, axis=axis, clip=clip))


def vclub(out, batch, *, axis=None, x: Out = Out('c'), y: Out = Out('p'), ids: Out = Out('items'),
          club: Out = Out('club'), chunk=0, scale=False):
    """vCLUB upper bound of I(x; y) (Cheng et al. 2020), q held fixed. -> Loss [B, N]

    An upper bound only while q(y|x) is good: see `club_fit`'s value beside it. Where the batch's
    estimate is negative, which no mutual information is, it stops pulling. A q with factors needs
    no matrix: the mean of its scores is the score of the mean [ours]. scale: see `club_fit`.
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
    """Leave-one-out upper bound of I(x; y) (Poole et al. 2019), q held fixed. -> Loss [B, N]

    A position's negatives are the x of others for its own y. As `vclub` it is a bound only while
    q(y|x) is good, and stops pulling where the batch's estimate is negative. scale: see
    `club_fit`.
    """
    out = scaled(out, batch, axis, x, y) if scale else out
    q = jax.lax.stop_gradient(out[club])
    pairs = score_pairs(out, batch, axis, x, y, ids, q, chunk, flip=True)
    return _upper(bounds.l1out(*pairs.differ), pairs.at.weight, bounds.l1out(*pairs.every), axis)


def club_fit(out, batch, *, axis=None, x: Out = Out('c'), y: Out = Out('p'),
             club: Out = Out('club'), scale=False):
    """Minus the log-likelihood of q(y|x), on features that get no gradient. -> Loss [B, N]

    The metric `log_q` is what q makes of x: nats per dimension above the diagonal Gaussian of y's
    own mean and variances over the batch [ours; a standard normal is beaten by knowing the mean].
    Where it is not above 0, no vCLUB figure made with this q is a bound.

    scale: q is of both features at mean 0 and variance 1 over the batch, so that one which starts
    as a standard normal starts where `log_q` is 0; the losses that use q have to be told, too.
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
    """A lower bound [A] as a loss: minus it, and the estimate that is logged beside it."""
    metrics = {name: jax.lax.stop_gradient(value).reshape(weight.shape)
               for name, value in dict(mi=estimate, **metrics).items()}
    return Loss(-bound.reshape(weight.shape), weight, state, metrics)


def _upper(bound, weight, estimate, axis):
    """An upper bound [A] as a loss that stops pulling where its mean is below zero."""
    value = bound.reshape(weight.shape)
    mean = collectives.total((value * weight).sum(), axis)
    pulled = jnp.where(jax.lax.stop_gradient(mean) > 0, value, jax.lax.stop_gradient(value))
    estimate = jax.lax.stop_gradient(estimate).reshape(weight.shape)
    return Loss(pulled, weight, metrics={'mi': estimate})

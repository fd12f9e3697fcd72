"""The pairs of a batch's positions: which are negatives, and how a critic scores them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tpad_jax.distributed import collectives
from tpad_jax.mutual_information import bounds


class Positions(NamedTuple):
    """The items at the A = B N positions of this replica and the G of all replicas.

    Attributes:
      own: int32 [A]. The index of each position among all.
      item: int32 [A]. Items of this replica's positions, 0 for padding.
      everyone: int32 [G]. Items of all positions, 0 for padding.
      weight: float32 [B, N]. 1 where a position holds an item and has a negative, else 0: a
        bound is not defined for the others.
      different: int32 [A]. How many positions hold another item.
      others: int32 [A]. How many other positions hold an item. By session, both count positions of
        other rows alone.
    """

    own: jax.Array
    item: jax.Array
    everyone: jax.Array
    weight: jax.Array
    different: jax.Array
    others: jax.Array


class Pairs(NamedTuple):
    """A replica's positions against those of all replicas, as every bound takes them.

    Attributes:
      differ: (scores [A, G], own [A], negative [A, G]), or (`bounds.Blocks`,), for losses.
        Negatives are pairs of different items, by session also of different rows.
      every: the same for estimates, whose gradient the caller stops. Negatives are all pairs of
        different positions, by session of different rows.
      at: `Positions`.
    """

    differ: tuple
    every: tuple
    at: Positions


def scaled(out, batch, axis, *names) -> dict:
    """Give some features [B, N, D] mean 0 and variance 1 in every dimension [ours].

    Moments are those of the positions of all replicas: to one batch this is an affine map, which
    changes no mutual information. The moments get their gradient; otherwise a loss could shrink
    features without limit.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      *names: of the features.

    Returns:
      `out` with these features scaled.
    """
    weight = batch.mask.astype(jnp.float32)[..., None]
    count = jnp.maximum(collectives.total(weight.sum(), axis), 1)

    def mean(x):
        return collectives.total((weight * x).sum(axis=(0, 1)), axis) / count

    maps = {}
    for name in names:
        x = out[name] - mean(out[name])
        # Twice: the rounding of a mean of 50 deviations moves every position alike, and with them
        # a bound that is a difference of large numbers. The gradient stays complete.
        x -= jax.lax.stop_gradient(mean(x))
        maps[name] = x * jax.lax.rsqrt(mean(x**2) + 1e-6)
    return {**out, **maps}


def positions(out, batch, axis, ids, by_session=False) -> Positions:
    """Return `Positions` by the items out[ids] int32 [B, N]."""
    item = jnp.where(batch.mask, out[ids], 0).reshape(-1)
    everyone = collectives.gather(item, axis)
    own = collectives.offset(len(item), axis) + jnp.arange(len(item))
    order = jnp.sort(everyone)
    same = (jnp.searchsorted(order, item, side='right')
            - jnp.searchsorted(order, item, side='left'))
    real = (everyone > 0).sum()
    others = real - 1
    if by_session:  # the others of a row are counted out
        rows = item.reshape(batch.mask.shape)
        unlike = (rows[:, :, None] != rows[:, None]) & (rows[:, None] > 0)
        same += unlike.sum(axis=-1).reshape(-1)
        others = jnp.repeat(real - (rows > 0).sum(axis=1), rows.shape[1])
    different = jnp.where(item > 0, real - same, 0)
    weight = (different > 0).reshape(batch.mask.shape).astype(jnp.float32)
    return Positions(own, item, everyone, weight, different, jnp.where(item > 0, others, 0))


def score_pairs(out, batch, axis, x, y, ids, score, chunk, *, scale=1.0, flip=False,
                by_session=False) -> Pairs:
    """Score the pairs of two features.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      x: name of a feature [B, N, I].
      y: name of a feature [B, N, J].
      ids: name of the items int32 [B, N].
      score: (x [A, I], y [G, J]) -> [A, G]. If it has `factors` (see `critics.Score`), these are
        gathered instead of the features, and no replica computes another's.
      chunk: rows whose scores exist at the same time, 0: all.
      scale: factor of the scores.
      flip: whether rows are y and columns x.
      by_session: whether positions of one row are never negatives of each other.
    """
    at = positions(out, batch, axis, ids, by_session)
    width = batch.mask.shape[1] if by_session else 1
    row = jnp.arange(len(at.everyone)) // width
    x, y = flat(out[x]), flat(out[y])
    factors = score.factors(x, y) if hasattr(score, 'factors') else None
    if factors is not None:
        x, y = factors[0] * scale, factors[1]
    here, there = (y, x) if flip else (x, y)
    there = collectives.gather(there, axis)

    def scores(here):
        if factors is not None:
            return here @ there.T
        return (score(there, here).T if flip else score(here, there)) * scale

    def against(is_negative):
        def block(part):
            here, own, item = part
            real = (item[:, None] > 0) & (at.everyone > 0)
            return scores(here), own, real & is_negative(own[:, None], item[:, None])

        rows = here, at.own, at.item
        return (bounds.Blocks(block, rows, chunk),) if chunk else block(rows)

    return Pairs(against(lambda own, item: (item != at.everyone) & (own // width != row)),
                 against(lambda own, item: own // width != row), at)


def flat(x):
    """Reshape [B, N, D] -> [B N, D]."""
    return x.reshape(-1, x.shape[-1])

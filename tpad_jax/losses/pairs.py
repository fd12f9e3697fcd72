"""Which positions of a batch are a pair, which are negatives, and how a critic scores them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tpad_jax.distributed import collectives
from tpad_jax.mutual_information import bounds


class Positions(NamedTuple):
    """Who stands where, A = B N positions of this replica and G of all.

    Attributes:
      own: int32 [A], each position's place among all. item: int32 [A] and everyone: int32 [G],
        what stands there, 0 for padding.
      weight: float32 [B, N], whether a position counts and has a negative: a bound says nothing of
        others. different, others: int32 [A], how many positions hold another item, and how many
        there are beside this one.
    """

    own: jax.Array
    item: jax.Array
    everyone: jax.Array
    weight: jax.Array
    different: jax.Array
    others: jax.Array


class Pairs(NamedTuple):
    """A replica's positions against everyone's, as every bound takes them.

    Attributes:
      differ: (scores [A, G], own [A], negative [A, G]), or (`bounds.Blocks`,); negatives are pairs
        of different items, for losses.
      every: the same, negatives being all but a position's own, for estimates (whose gradient the
        caller stops).
      at: `Positions`.
    """

    differ: tuple
    every: tuple
    at: Positions


def scaled(out, batch, axis, *names) -> dict:
    """`out` with some features [B, N, D] at mean 0 and variance 1 in every dimension [ours].

    Moments are those of all replicas' positions: to one batch this is an affine map, which changes
    no mutual information. They get their gradient, or a loss could make features smaller for ever.
    """
    weight = batch.mask.astype(jnp.float32)[..., None]
    count = jnp.maximum(collectives.total(weight.sum(), axis), 1)

    def mean(x):
        return collectives.total((weight * x).sum(axis=(0, 1)), axis) / count

    maps = {}
    for name in names:
        x = out[name] - mean(out[name])
        # Again: where a mean is 50 deviations large, what it was rounded by moves every position
        # alike, and a bound that is a difference of large numbers with them. No gradient is lost.
        x -= jax.lax.stop_gradient(mean(x))
        maps[name] = x * jax.lax.rsqrt(mean(x**2) + 1e-6)
    return {**out, **maps}


def positions(out, batch, axis, ids) -> Positions:
    """`Positions` by the items out[ids] int32 [B, N]."""
    item = jnp.where(batch.mask, out[ids], 0).reshape(-1)
    everyone = collectives.gather(item, axis)
    own = collectives.offset(len(item), axis) + jnp.arange(len(item))
    order = jnp.sort(everyone)
    same = (jnp.searchsorted(order, item, side='right')
            - jnp.searchsorted(order, item, side='left'))
    real = (everyone > 0).sum()
    different = jnp.where(item > 0, real - same, 0)
    weight = (different > 0).reshape(batch.mask.shape).astype(jnp.float32)
    return Positions(own, item, everyone, weight, different, jnp.where(item > 0, real - 1, 0))


def score_pairs(out, batch, axis, x, y, ids, score, chunk, *, scale=1.0, flip=False) -> Pairs:
    """`Pairs` of the features x [B, N, I] and y [B, N, J] of `out`.

    score: (x [A, I], y [G, J]) -> [A, G]; where it has `factors` (see models.critics.Score), these
      are gathered and not the features, and no replica computes another's.
    chunk: rows whose scores exist at once, 0: all. scale: of the scores. flip: rows are y, and
      columns x.
    """
    at = positions(out, batch, axis, ids)
    x, y = flat(out[x]), flat(out[y])
    factors = score.factors(x, y) if hasattr(score, 'factors') else None
    if factors is not None:
        x, y = factors[0] * scale, factors[1]
    here, there = (y, x) if flip else (x, y)
    there = collectives.gather(there, axis)

    def scores(here):
        if factors is not None:
            return here @ there.T
        found = score(there, here).T if flip else score(here, there)
        return found if scale == 1.0 else found * scale

    def differ(part):
        here, own, item = part
        return scores(here), own, real(item) & (item[:, None] != at.everyone)

    def every(part):
        here, own, item = part
        return scores(here), own, real(item) & (own[:, None] != jnp.arange(len(at.everyone)))

    def real(item):
        return (item[:, None] > 0) & (at.everyone > 0)

    rows = here, at.own, at.item
    if chunk:
        return Pairs(*((bounds.Blocks(make, rows, chunk),) for make in (differ, every)), at)
    return Pairs(differ(rows), every(rows), at)


def flat(x):
    """[B, N, D] -> [B N, D]."""
    return x.reshape(-1, x.shape[-1])

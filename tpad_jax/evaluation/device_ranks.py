"""Exact ranks on the device: the scores of a whole catalogue are counted where they are made.

What travels to the host is two numbers per row, not V. Scores exist for one chunk of the catalogue
at a time, small enough to stay in a processor's cache, and every item takes part: nothing is
sampled and nothing is approximated.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.distributed import collectives
from tpad_jax.distributed.devices import Devices

MOST = 2**15 - 1  # items of a chunk: two counts share one int32
LANES = 256  # items that every product computes alike, whatever their number
PARTS = 8  # that one call ranks: the host's work for a call is in no part's way


def ranker(encode: Callable, devices: Devices, *, shifts: Callable | None = None,
           chunk: int = 0) -> Callable:
    """Ranks of targets in the whole catalogue, equal to `metrics.counts` of the same scores.

    Args:
      encode: (weights, z, items int32 [B, N]) -> h float32 [B, D]; an item's score is <h, z_v>.
      shifts: (weights, items) -> items int32 [B, M] and float32 [B, M], which is added to their
        scores; 0 on padding, and on all but one place of an item. None: nothing is.
      devices: rows are spread over them; encode is compiled once per size of a part.
      chunk: items at a time, at most 32,767; 0: on CPU 2 ** 18 over a part's rows but at least
        1,024, elsewhere as many as can be.

    Returns:
      rank(weights, z, items, target, *, rows=512, name='model') -> (above, equal) int32 [R]: items
      that score above the target and items that score the same, the target among them. `weights`:
      any tree. z: float32 [V+1, D], row 0 being padding. items: int32 [R, N], target: int32 [R],
      ids 1..V; `rows` of them at a time. It raises FloatingPointError, by `name`, where a score is
      not finite.
    """

    def part(batch, shared):
        h = encode(shared['weights'], shared['z'], batch.items)
        fits = max(1024, 2**18 // len(h)) if jax.default_backend() == 'cpu' else MOST
        moved = shifts(shared['weights'], batch.items) if shifts else None
        counted = count(h, shared['z'], batch.target, chunk=chunk or fits, moved=moved)
        return (*counted, bounded(h, shared['largest']))

    def several(_, batch, shared, *, axis):
        """The first `shared['parts']` of PARTS parts, one after the other."""
        parts = jax.tree.map(lambda x: x.reshape(PARTS, -1, *x.shape[1:]), batch)
        held = parts.target.shape

        def one(k, found):
            made = part(jax.tree.map(lambda x: x[k], parts), shared)
            return tuple(x.at[k].set(new) for x, new in zip(found, made, strict=True))

        found = jax.lax.fori_loop(0, shared['parts'], one, (
            jnp.zeros(held, jnp.int32), jnp.zeros(held, jnp.int32), jnp.ones(held, bool)))
        return tuple(collectives.gather(x.reshape(-1), axis) for x in found)

    lifted = devices.lift(several)

    def rank(weights, z, items, target, *, rows=512, name='model'):
        each = -(-rows // devices.shards)  # rows of a part on one device
        size = devices.shards, PARTS, each
        shared = devices.share({'weights': weights, 'z': z, 'largest': largest(z)})
        found = []
        for begin in range(0, len(items), devices.shards * PARTS * each):
            # calls are queued one behind the other; nothing waits for a result before the end
            batch, parts = _several(items[begin:], target[begin:], size)
            given = shared | devices.share({'parts': np.int32(parts)})
            found.append(lifted({}, devices.place(batch), given))
        above, equal, finite = (
            np.concatenate([x.reshape(size).swapaxes(0, 1).reshape(-1) for x in call])[:len(items)]
            for call in zip(*jax.device_get(found), strict=True))
        for row in np.flatnonzero(~finite):
            _check(np.asarray(encode(weights, z, items[row:row + 1])), z, row, name)
        return above, equal

    return rank


def count(h, z, target, *, chunk: int, moved=None):
    """Items that score above and equal to each row's target, scores being <h, z>. Pure.

    The target's own score has to be the very number that stands in its row, which may differ in
    the last bit from the same product computed by itself. So it is guessed by such a product, all
    is counted against the guess, the target's score is picked up where it is met, and if the guess
    was off, in any row, all is counted once more.

    Args:
      h: float32 [B, D]. z: float32 [V+1, D]; row 0 is not ranked. target: int32 [B].
      chunk: items at a time, at most MOST.
      moved: (items int32 [B, M], what is added to their scores [B, M]), or None.

    Returns:
      above, equal: int32 [B]. A row with a score that is not finite means nothing.
    """
    total = len(z)
    chunk = _even(total, min(max(chunk, len(h)), MOST))
    place, nothing = jnp.arange(chunk), jnp.zeros(len(h), jnp.int32)
    wanted, lift = target[:, None], 0.0
    if moved is not None:
        items, shift = moved
        wanted = jnp.concatenate([wanted, items], axis=1)
        lift = jnp.where(items == target[:, None], shift, 0).sum(axis=1)

    def body(k, carry):
        own, seen, above, level = carry
        start = jnp.minimum(k * chunk, total - chunk)
        s = _scores(h, jax.lax.dynamic_slice(z, (start, 0), (chunk, z.shape[1])))
        at = wanted - start
        value = jnp.take_along_axis(s, jnp.clip(at, 0, chunk - 1), axis=1)
        seen = jnp.where((at >= 0) & (at < chunk), value, seen)
        # the last chunk reaches back over items that were counted before; item 0 never counts
        new = jnp.where(start + place >= jnp.maximum(k * chunk, 1), -1, 0)
        # both counts in one sum: half the time of two
        bar = (own + lift)[:, None]
        code = (s > bar) + (s >= bar) * jnp.int32(2**16)
        code = (code & new).sum(axis=1)
        return own, seen, above + code % 2**16, level + code // 2**16

    def again(carry):
        number, own, seen, _, _ = carry
        return (number < 2) & (own != seen[:, 0]).any()

    def once(carry):
        number, _, seen, _, _ = carry
        first = seen[:, 0], seen, nothing, nothing
        return number + 1, *jax.lax.fori_loop(0, -(-total // chunk), body, first)

    few = -(-len(h) // LANES) * LANES
    guess = jnp.diagonal(_scores(h, z[jnp.resize(target, few)]))
    guess = jnp.broadcast_to(jnp.resize(guess, len(h))[:, None], wanted.shape)
    _, own, seen, above, level = jax.lax.while_loop(
        again, once, (0, jnp.full(len(h), jnp.nan), guess, nothing, nothing))
    if moved is not None:  # these items were counted where their vectors put them
        was, bar = seen[:, 1:], (own + lift)[:, None]
        now = was + shift
        above += (now > bar).sum(axis=1) - (was > bar).sum(axis=1)
        level += (now >= bar).sum(axis=1) - (was >= bar).sum(axis=1)
    return above, level - above


def _even(total, most):
    """Items of a chunk, at most `most`: parts of one size, whole multiples of LANES.

    What a product leaves over behind whole lanes is computed by another loop, whose last bits may
    differ from the guess, and then all is counted once more.
    """
    most = most // LANES * LANES or most
    even = -(-total // -(-total // most))
    return min(-(-even // LANES) * LANES, most, total)


def _scores(h, z):
    return h @ z.T


@jax.jit
def largest(z):
    """The longest item vector's norm, not finite if any vector is not. z [V+1, D] -> []"""
    return jnp.sqrt((z[1:] ** 2).sum(axis=1).max())


def bounded(h, longest):
    """Bool [B]: whether every score of a row is finite for certain, by its vectors' norms."""
    return jnp.isfinite(jnp.sqrt((h ** 2).sum(axis=1)) * longest)


def _several(items, target, size) -> tuple[dict, int]:
    """The batch of a call, filled up with copies of the last row, and how many parts have rows.

    size: devices, PARTS, rows of a part on one device. Rows follow each other within a part, over
    all devices; a batch is cut in one piece per device.
    """
    shards, parts, each = size
    room = shards * parts * each
    items, target = items[:room], target[:room]
    held = -(-len(items) // (shards * each))

    def laid(x):
        x = np.pad(x, [(0, room - len(x))] + [(0, 0)] * (x.ndim - 1), mode='edge')
        x = x.reshape(parts, shards, each, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(room, *x.shape[3:])

    items, target = laid(items), laid(target)
    return dict(items=items, next=np.zeros_like(items), target=target, valid=np.ones(room, bool),
                row=np.zeros(room, np.int32)), held


def _check(h, z, row, name):
    """Refuse a row one of whose scores is not finite; h [1, D]."""
    with np.errstate(over='ignore', invalid='ignore'):
        scores = (h @ np.asarray(z).T)[0]
    broken = np.flatnonzero(~np.isfinite(scores[1:])) + 1
    if len(broken):
        raise FloatingPointError(
            f'{name}: the score of item {broken[0]} in row {row} is {scores[broken[0]]}, and so '
            f'are {len(broken) - 1} others of this row; every score must be finite.')

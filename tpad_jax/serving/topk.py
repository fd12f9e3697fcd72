"""The exact first K of a whole catalogue, on the device, a chunk of items at a time.

Nothing is sampled or approximated, and ties go by item id, as evaluation orders them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

CHUNK = 8192  # items whose scores exist at a time, for every row
STEP = 1024  # the length of a shorter table is a multiple of it
LOWEST = -jnp.inf  # of what is no item; a score is finite


def rounded(rows: int, chunk: int = CHUNK) -> int:
    """Rows of the least table `top_k` takes that has room for so many."""
    step = chunk if rows > chunk else min(chunk, STEP)
    return -(-rows // step) * step


def top_k(h, z, count, k: int, *, chunk: int = CHUNK, moved=None):
    """The K items that score highest, scores being <h, z>. Pure.

    A chunk's items lie in groups of neighbours. The K best items of a chunk are in its K best
    groups by their best item (one outside of them would have K items before it), so only these are
    looked into: a maximum costs next to nothing, and choosing is a tenth of the work.

    Args:
      h: float32 [B, D]. z: float32 [R, D], R as `rounded` makes it; row 0 and
        those from `count` on are no items.
      count: int [], 1 + the number of items. k: at most the number of items.
      chunk: items at a time.
      moved: (items int32 [B, M], what is added to their scores [B, M]), or None.

    Returns:
      scores float32 [B, k], falling, and items int32 [B, k]; equal scores by rising item.
    """
    total, size = len(z), len(h)
    chunk = min(chunk, total)
    group = _group(chunk, k)
    place = jnp.arange(chunk, dtype=jnp.int32)

    def body(n, best):
        start = n * chunk
        s = h @ jax.lax.dynamic_slice(z, (start, 0), (chunk, z.shape[1])).T
        if moved is not None:
            at = moved[0] - start  # what lies outside of this chunk is dropped
            at = jnp.where(at < 0, chunk, at)
            s = s.at[jnp.arange(size)[:, None], at].add(moved[1], mode='drop')
        item = start + place
        s = jnp.where((item > 0) & (item < count), s, LOWEST)
        item = jnp.broadcast_to(item, s.shape)
        if group > 1:
            s, item = (x.reshape(size, chunk // group, group) for x in (s, item))
            _, chosen = jax.lax.top_k(s.max(axis=2), k)
            chosen = jnp.sort(chosen, axis=1)[:, :, None]  # so that candidates rise by item
            s, item = (jnp.take_along_axis(x, chosen, axis=1).reshape(size, k * group)
                       for x in (s, item))
        s, item = (jnp.concatenate(pair, axis=1) for pair in zip(best, (s, item), strict=True))
        s, order = jax.lax.top_k(s, k)  # of equals the earlier one
        return s, jnp.take_along_axis(item, order, axis=1)

    none = jnp.full((size, k), LOWEST, h.dtype), jnp.zeros((size, k), jnp.int32)
    return jax.lax.fori_loop(0, -(-total // chunk), body, none)


def searcher(encode: Callable, shifts: Callable | None = None) -> Callable:
    """(weights, z, count, items int32 [B, N], *, k) -> scores, items [B, k] of `top_k`. Pure.

    Args:
      encode: (weights, z, items) -> h. shifts: (weights, items) -> items [B, M] and what is added
        to their scores, or None; see `ranking.ranker`.
    """
    def search(weights, z, count, items, *, k):
        moved = None if shifts is None else shifts(weights, items)
        return top_k(encode(weights, z, items), z, count, k, moved=moved)

    return search


def _group(chunk, k):
    """Items of a group: a power of two near the square root of chunk / k that divides a chunk."""
    group = 1
    while chunk % (2 * group) == 0 and (2 * group) ** 2 * k <= chunk:
        group *= 2
    return group

"""The exact first K of a whole catalogue, on the device, a chunk of items at a time.

The lists are exact, not sampled or approximated. Ties are ordered by item, as in evaluation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 8192  # items scored at a time, which bounds the scores in memory
STEP = 1024  # the length of a shorter table is a multiple of it
LOWEST = -jnp.inf  # score of a row that is not an item; the score of an item is finite


def rounded(rows: int, chunk: int = CHUNK) -> int:
    """Return the number of rows of the smallest table for `top_k` with room for `rows`.

    Args:
      rows: rows needed.
      chunk: items scored at a time.
    """
    step = chunk if rows > chunk else min(chunk, STEP)
    return -(-rows // step) * step


def packed(mask: np.ndarray, block: int = STEP) -> np.ndarray:
    """Pack a mask of a table's rows into bits, as `top_k` reads them.

    Bit n of byte i of a block is its row n * block / 8 + i, so that a device unpacks whole lanes.

    Args:
      mask: bool [R], R a multiple of the block. More rows may follow in the table.
      block: the smaller one of STEP and the chunk.

    Returns:
      uint8 [R / 8].
    """
    return np.packbits(mask.reshape(-1, 8, block // 8), axis=1, bitorder='little').reshape(-1)


def unpacked(bits: np.ndarray, block: int = STEP) -> np.ndarray:
    """Return the mask bool [R] of `packed` bits uint8 [R / 8]."""
    lanes = np.unpackbits(bits.reshape(-1, 1, block // 8), axis=1, bitorder='little')
    return lanes.reshape(-1).astype(bool)


def clear(bits: np.ndarray, rows: np.ndarray, block: int = STEP) -> None:
    """Forbid some rows of a table in `packed` bits, in place.

    Args:
      bits: uint8 [R / 8].
      rows: int [n]. Rows may repeat.
      block: as for `packed`.
    """
    begin, place = np.divmod(rows, block)
    lane, byte = np.divmod(place, block // 8)
    np.bitwise_and.at(bits, begin * (block // 8) + byte, ~(1 << lane).astype(np.uint8))


def top_k(h, z, count, k: int, *, chunk: int = CHUNK, moved=None, allowed=None):
    """Return the K items with the highest scores <h, z>. Pure.

    A chunk is divided into groups of neighbouring items. The K best items of a chunk are in the K
    groups with the highest maximum: an item outside of them has K better items. Only these groups
    are searched, which is a tenth of the work.

    Args:
      h: float32 [B, D]. Session vectors.
      z: float32 [R, D]. Item vectors, R as `rounded` returns it. Row 0 and the rows from `count` on
        are not items.
      count: int []. 1 + the number of items.
      k: length of a list, at most the number of items.
      chunk: items scored at a time.
      moved: (int32 [B, M] items, float32 [B, M] shifts of their scores), or None.
      allowed: uint8 [B, R / 8] of `packed`: the items that a row's list may hold; None: all.

    Returns:
      scores float32 [B, k], falling, and items int32 [B, k]; equal scores by rising item. Places
      of a list that has fewer items have the score LOWEST.
    """
    total, size = len(z), len(h)
    chunk = min(chunk, total)
    group = _group(chunk, k)
    place = jnp.arange(chunk, dtype=jnp.int32)

    def body(n, best):
        start = n * chunk
        s = h @ jax.lax.dynamic_slice(z, (start, 0), (chunk, z.shape[1])).T
        if moved is not None:
            at = moved[0] - start  # items outside of this chunk are dropped
            at = jnp.where(at < 0, chunk, at)
            s = s.at[jnp.arange(size)[:, None], at].add(moved[1], mode='drop')
        item = start + place
        counts = (item > 0) & (item < count)
        if allowed is not None:
            bits = jax.lax.dynamic_slice(allowed, (0, start // 8), (size, chunk // 8))
            bits = bits.reshape(size, -1, 1, min(chunk, STEP) // 8)
            bits = bits >> jnp.arange(8, dtype=jnp.uint8)[:, None] & 1
            counts &= bits.reshape(size, chunk) > 0
        s = jnp.where(counts, s, LOWEST)
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


def searcher(encode: Callable, shifts: Callable) -> Callable:
    """Return a pure function that encodes sessions and searches their lists.

    It maps (weights, z, count, items, allowed=None, boosts=None, *, k) to the scores and items
    [B, k] of `top_k`. `boosts` are further (items, shifts of their scores).

    Args:
      encode: (weights, z, items int32 [B, N]) -> h float32 [B, D].
      shifts: (weights, z, items) -> (items [B, M], shifts of their scores [B, M]) or None; see
        `scorers.ranker`.
    """
    def search(weights, z, count, items, allowed=None, boosts=None, *, k):
        moved = [pair for pair in (shifts(weights, z, items), boosts) if pair is not None]
        moved = tuple(jnp.concatenate(x, axis=1) for x in zip(*moved, strict=True)) or None
        return top_k(encode(weights, z, items), z, count, k, moved=moved, allowed=allowed)

    return search


def _group(chunk, k):
    """Return the size of a group: a power of two near sqrt(chunk / k) that divides a chunk."""
    group = 1
    while chunk % (2 * group) == 0 and (2 * group) ** 2 * k <= chunk:
        group *= 2
    return group

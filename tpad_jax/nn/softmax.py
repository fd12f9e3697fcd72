"""Softmax over a large catalogue without [B, V] scores: its log-partition, and a proposal.

`log_partition` reads the item table in chunks. The backward pass computes the scores of a chunk
again, as attention kernels do (Dao et al. 2022). This costs less than storing and loading them.
`draw` and `log_probability` are the proposal of a sampled softmax.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from tpad_jax.nn import branches

TOTAL = 2**31  # a proposal's integer weights sum to this
SOME, FAR = 1024, 60.0  # a share of exp(-60) is far from underflow


def log_partition(h, z, warm, *, chunk=0, dtype='float32'):
    """Compute log sum exp <h, z_v> over the items v that `warm` allows.

    Args:
      h: float32 [B, D].
      z: float32 [V+1, D]. The catalogue.
      warm: bool [V+1].
      chunk: items at a time, for example 4096. Scores then need [chunk, B] instead of [V+1, B].
        0: all at once.
      dtype: of both operands of every product, 'float32' or 'bfloat16'. Sums are float32.

    Returns:
      float32 [B], differentiable in h and z. -inf without warm items.
    """
    if not chunk:
        return _whole(h, z, warm, dtype)
    return _chunked(h, z, warm, min(chunk, len(z)), dtype)


# Scores are [V, B] or [C, B] below: all three products then have the shapes that XLA's CPU kernels
# compute fastest.

@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _whole(h, z, warm, dtype):
    return _whole_forward(h, z, warm, dtype)[0]


def _whole_forward(h, z, warm, dtype):
    h, z = h.astype(dtype), z.astype(dtype)
    scores = _product(z, _transpose(h))

    def masked(count=None):
        return jnp.where(warm[:count, None], scores[:count], -jnp.inf).max(axis=0)

    # A mask before the maximum takes one more pass over the scores. Without it no share overflows,
    # and all of them vanish only where a cold item is far above every warm one.
    largest = scores.max(axis=0)
    near = (largest <= masked(SOME) + FAR).all()
    if branches.may_differ():
        largest = jax.lax.cond(near, lambda: largest, masked)
    else:
        largest = jnp.where(near, largest, masked())
    largest = jnp.maximum(largest, jnp.finfo(jnp.float32).min)
    share = jnp.where(warm[:, None], jnp.exp(scores - largest), 0)
    total = share.sum(axis=0)
    return largest + jnp.log(total), (h, z, share, total)


def _whole_backward(dtype, saved, slope):
    h, z, share, total = saved
    share, slope = share.astype(dtype), jnp.where(total > 0, slope / total, 0)[:, None]
    to_z = _product(share, (h * slope).astype(dtype))
    to_h = jax.lax.dot_general(share, z, (((0,), (0,)), ((), ())),
                               preferred_element_type=jnp.float32)
    return to_h * slope, to_z, None


_whole.defvjp(_whole_forward, _whole_backward)


# In the loops, no product contracts the first axis of its left operand. In bfloat16 that is four
# times slower.

@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked(h, z, warm, chunk, dtype):
    return _forward(h, z, warm, chunk, dtype)[0]


def _forward(h, z, warm, chunk, dtype):
    transposed = _transpose(h.astype(dtype))

    def body(i, carry):
        largest, total = carry
        _, items, allowed = _chunk(z, warm, i, chunk, dtype)
        scores = jnp.where(allowed[:, None], _product(items, transposed), -jnp.inf)
        new = jnp.maximum(largest, scores.max(axis=0))
        return new, total * jnp.exp(largest - new) + jnp.exp(scores - new).sum(axis=0)

    first = jnp.full(len(h), jnp.finfo(jnp.float32).min), jnp.zeros(len(h))
    largest, total = jax.lax.fori_loop(0, _count(z, chunk), body, first)
    result = largest + jnp.log(total)
    return result, (h, z, warm, result)


def _backward(chunk, dtype, saved, slope):
    h, z, warm, result = saved
    count, narrow = _count(z, chunk), h.astype(dtype)
    transposed = _transpose(narrow)

    def body(k, carry):
        to_h, to_z = carry
        # From the last chunk to the first: the last chunk overlaps the one before it and writes 0
        # to the shared rows, which that one then overwrites.
        start, items, allowed = _chunk(z, warm, count - 1 - k, chunk, dtype)
        share = jnp.exp(_product(items, transposed) - result) * slope
        share = jnp.where(allowed[:, None], share, 0).astype(dtype)
        to_z = jax.lax.dynamic_update_slice(to_z, _product(share, narrow), (start, 0))
        return to_h + _product(_transpose(items), share), to_z

    first = jnp.zeros(h.shape[::-1]), jnp.zeros(z.shape)
    to_h, to_z = jax.lax.fori_loop(0, count, body, first)
    return to_h.T, to_z, None


_chunked.defvjp(_forward, _backward)


def _count(z, chunk):
    return -(-len(z) // chunk)


def _chunk(z, warm, i, chunk, dtype):
    """Return where chunk i starts, its rows of z [C, D], and which of them count [C].

    The last chunk starts early enough to be full. Its rows that belong to the chunk before it do
    not count.
    """
    start = jnp.minimum(i * chunk, len(z) - chunk)
    rows = jax.lax.dynamic_slice(z, (start, 0), (chunk, z.shape[1])).astype(dtype)
    allowed = jax.lax.dynamic_slice(warm, (start,), (chunk,))
    return start, rows, allowed & (start + jnp.arange(chunk) >= i * chunk)


def _product(a, b):
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _transpose(x):
    # without the barrier, the compiler folds the transposition into the product
    return jax.lax.optimization_barrier(x.T)


def weights(warm, popularity, power):
    """Compute integer weights over the warm items, in proportion to popularity ** power.

    A float32 uniform number has 2 ** 23 values. With ten million items it would never draw some of
    them, and draw others twice as often as it should. Integers do not have this problem.

    Args:
      warm: bool [V+1].
      popularity: float32 [V+1]. Counts, at least 1 for warm items.
      power: 0 is uniform, 1 is popularity.

    Returns:
      uint32 [V+1] with the sum 2 ** 31: at least 1 for a warm item, 0 for a cold one. Padding has
      the rest, about a ten-thousandth. A draw of padding does not count.
    """
    plain = jnp.where(warm, jnp.maximum(popularity, 1) ** power, 0)
    scaled = jnp.round(plain * ((0.9999 * TOTAL - len(warm)) / plain.sum())).astype(jnp.uint32)
    weight = jnp.where(warm, jnp.maximum(scaled, 1), 0)
    return weight.at[0].set(jnp.uint32(TOTAL) - weight.sum())


def draw(key, weight, samples):
    """Draw item ids int32 [samples] with replacement by `weights`. 0 does not count."""
    at = jax.random.bits(key, (samples,), jnp.uint32) >> 1
    return jnp.searchsorted(jnp.cumsum(weight), at, side='right').astype(jnp.int32)


def log_probability(weight, ids):
    """Return the log probability that one draw is each of `ids`, float32 of their shape."""
    return jnp.log(weight[ids].astype(jnp.float32)) - math.log(TOTAL)

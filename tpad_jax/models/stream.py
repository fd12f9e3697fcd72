"""The input of a decoder: tokens of every kind, joined end to end.

Text tokens, image tokens and learned vectors become parts of one `Stream`. Prompts join parts and
never count positions. The position moves by `advance` after every token that exists, so padding and
missing images may be anywhere: a row of an item without an image has the positions of a prompt
that never mentioned the image.
"""

import flax
import jax
import jax.numpy as jnp

from tpad_jax.nn.linear import IMAGE, OTHER, TEXT


@flax.struct.dataclass
class Stream:
    """Tokens [..., L] of width D, in the order the decoder sees them.

    An image token's position has three coordinates, (time, row, column), counted from where its
    image begins (Qwen2-VL, arXiv 2409.12191, M-RoPE); any other token's three are equal.
    """

    x: jax.Array  # [..., L, D] embeddings
    mask: jax.Array  # bool [..., L], False: there is no token
    advance: jax.Array  # int32 [..., L], how far the position moves after the token
    offset: jax.Array  # int32 [..., L, 3], of the token's position from where its image begins
    kind: jax.Array  # int32 [..., L] of linear.KINDS, which adapters by kind read
    deep: jax.Array | None = None  # [..., L, n, D] added after the first n layers (DeepStack)


def plain(x, mask=True, kind=OTHER):
    """Make a stream of x [..., L, D] that each take one position; mask bool [..., L]."""
    mask = jnp.broadcast_to(mask, x.shape[:-1])
    return Stream(x, mask, jnp.ones(mask.shape, jnp.int32), jnp.zeros((*mask.shape, 3), jnp.int32),
                  jnp.full(mask.shape, kind, jnp.int32))


def say(base, tokens, mask=None) -> Stream:
    """Make a stream of an MLLM's token ids int32 [..., T] and mask bool; None: ids >= 0."""
    mask = tokens >= 0 if mask is None else mask
    return plain(base.words(jnp.maximum(tokens, 0)), mask, TEXT)


def fixed(base, ids, *lead: int, mask=None):
    """Make a stream [*lead, L] of the same L token ids of an MLLM everywhere."""
    return base.say(jnp.broadcast_to(jnp.array(ids, jnp.int32), (*lead, len(ids))), mask)


def grid(x, mask, rows: int, columns: int, deep=None):
    """Make a stream of an image's tokens, row by row, as one block of M-RoPE positions.

    The block moves the position by its longer side, for any number of tokens.

    Args:
      x: [..., rows columns, D].
      mask: bool [...] or [..., rows columns].
      rows: of the grid.
      columns: of the grid.
      deep: [..., rows columns, n, D], see `Stream`, or None.
    """
    mask = jnp.broadcast_to(mask, x.shape[:-1])
    place = jnp.arange(rows * columns)
    advance = jnp.where(place == rows * columns - 1, max(rows, columns), 0)
    offset = jnp.stack([place * 0, place // columns, place % columns], axis=-1)
    return plain(x, mask, IMAGE).replace(
        advance=jnp.broadcast_to(advance, mask.shape),
        offset=jnp.broadcast_to(offset, (*mask.shape, 3)), deep=deep)


def join(*parts: Stream) -> Stream:
    """Join parts with equal leading axes end to end; a part without deep features gets zeros."""
    depth = max((p.deep.shape[-2] for p in parts if p.deep is not None), default=0)
    if depth:
        parts = [p if p.deep is not None else p.replace(deep=jnp.zeros(
            (*p.mask.shape, depth, p.x.shape[-1]), p.x.dtype)) for p in parts]
    axis = parts[0].mask.ndim - 1
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis), *parts)


def rows(stream: Stream, which) -> Stream:
    """Select rows `which` int32 [...] of a stream [U, L, ...] -> [..., L, ...]."""
    return jax.tree.map(lambda a: a[which], stream)


def flatten(stream: Stream) -> Stream:
    """Reshape [B, N, L, ...] -> [B, N L, ...]."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0], -1, *a.shape[3:]), stream)


def positions(stream: Stream):
    """Compute M-RoPE positions int32 [..., L, 3]; without an image, all three count tokens."""
    moved = stream.advance * stream.mask
    start = jnp.cumsum(moved, axis=-1) - moved
    return start[..., None] + stream.offset

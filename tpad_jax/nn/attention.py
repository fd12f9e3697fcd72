"""Multi-head attention with rotary positions, and dropout with one key per row."""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.nn.linear import Linear


def rotate(x, positions, theta=10_000.0):
    """Apply rotary positions (Su et al. 2021).

    Args:
      x: float [B, L, H, D].
      positions: int32 [B, L].
      theta: base of the frequencies.

    Returns:
      float [B, L, H, D].
    """
    half = x.shape[-1] // 2
    angle = positions[:, :, None, None] * theta ** -(jnp.arange(half) / half)
    sin, cos = jnp.sin(angle).astype(x.dtype), jnp.cos(angle).astype(x.dtype)
    x1, x2 = x[..., :half], x[..., half:]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


class Attention(nn.Module):
    """Self-attention over a padded sequence.

    Attributes:
      heads: number of heads H. It divides the width.
      causal: whether a position attends only to itself and earlier positions.
    """

    heads: int
    causal: bool = True

    @nn.compact
    def __call__(self, x, mask, positions):
        """Attend.

        Args:
          x: float [B, L, D].
          mask: bool [B, L]. False is padding.
          positions: int32 [B, L].
        """
        width = x.shape[-1]
        split = '... (h d) -> ... h d'
        q, k, v = (einops.rearrange(Linear(width, name=n)(x), split, h=self.heads) for n in 'qkv')
        q, k = rotate(q, positions), rotate(k, positions)
        allowed = mask[:, None, None, :]
        if self.causal:
            allowed = allowed & jnp.tril(jnp.ones((x.shape[1],) * 2, bool))[None, None]
        # A padded first position would see no key, and its softmax would be NaN. It sees itself.
        allowed = allowed | jnp.eye(x.shape[1], dtype=bool)[None, None]
        y = jax.nn.dot_product_attention(q, k, v, mask=allowed)
        return Linear(width, name='o')(einops.rearrange(y, '... h d -> ... (h d)'))


def row_keys(key, rows):
    """Derive a key per row from its number, so that draws do not depend on the device count.

    Args:
      key: a typed key.
      rows: int32 [B].

    Returns:
      Keys [B].
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def dropout(x, rate, keys, number):
    """Apply inverted dropout with one key per row.

    Args:
      x: float [B, ...].
      rate: share of the numbers that become zero.
      keys: [B]. None: no dropout.
      number: of this use among those of the keys, which are folded by it.
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(
        jax.random.fold_in(key, number), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)

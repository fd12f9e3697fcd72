"""A session encoder by attention whose output is a weighted mean of the session's items.

A session's meaning stays in the space of the items: attention only decides how much each item
counts. [source] That idea is CORE's (Hou et al. 2022, "CORE: Simple and Effective Session-based
Recommendation within Consistent Representation Space"). [ours] The weights: causal attention, so
that one pass over a session gives every prefix's h; an item's distance and whether it is the same
item are biases of the attention's scores.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.nn.attention import dropout
from tpad_jax.nn.gather import at_last
from tpad_jax.nn.linear import Linear

NEVER = -1e9  # score of a hidden position; finite, so that padded rows stay finite


class SessionAttention(nn.Module):
    """Causal transformer layers, then one attention that weighs the items themselves.

    Attributes:
      layers: of the transformer that computes the weights.
      heads: number of heads H; the width must be a multiple.
      max_length: longest prefix N, for the distances' table.
      rate: dropout inside the layers.
      item_rate: dropout on the item vectors.
    """

    layers: int = 1
    heads: int = 2
    max_length: int = 20
    rate: float = 0.0
    item_rate: float = 0.0

    @nn.compact
    def positions(self, z, items, keys=None):
        """Encode every prefix of every row.

        Args:
          z: item vectors [B, N, D].
          items: int32 [B, N], 0 pads at the end.
          keys: a key per row [B] for dropout, or None (evaluation).

        Returns:
          [B, N, D]: at position j the encoding of items 0..j; on padding something finite.
        """
        size, length, width = z.shape
        place = jnp.arange(length)
        back = jnp.maximum(place[:, None] - place, 0)
        past = place[:, None] >= place
        same = (items[:, :, None] == items[:, None, :]).astype(z.dtype)

        def scores(q, k, heads, name):
            """Compute [B, H, N, N]: the attention of position i to position j <= i."""
            distance = self.param(f'{name}_distance', nn.initializers.zeros,
                                  (heads, self.max_length))
            repeat = self.param(f'{name}_repeat', nn.initializers.zeros, (heads,))
            s = jnp.einsum('bihd,bjhd->bhij', q, k) / q.shape[-1] ** 0.5
            s += distance[:, back] + repeat[:, None, None] * same[:, None]
            return jax.nn.softmax(jnp.where(past, s, NEVER), axis=-1)

        norm = nn.LayerNorm
        z = dropout(jnp.where((items > 0)[:, :, None], z, 0), self.item_rate, keys, 0)
        x = norm(name='enter')(z)
        for n in range(self.layers):
            y = norm(name=f'norm_{n}')(x)
            q, k, v = (Linear(width, use_bias=True, name=f'{p}_{n}')(y).reshape(
                size, length, self.heads, -1) for p in 'qkv')
            y = jnp.einsum('bhij,bjhd->bihd', scores(q, k, self.heads, f'layer_{n}'), v)
            y = Linear(width, use_bias=True, name=f'o_{n}')(y.reshape(z.shape))
            x += dropout(y, self.rate, keys, 2 * n + 1)
            y = Linear(2 * width, use_bias=True, name=f'up_{n}')(norm(name=f'norm_up_{n}')(x))
            y = Linear(width, use_bias=True, name=f'down_{n}')(nn.gelu(y))
            x += dropout(y, self.rate, keys, 2 * n + 2)
        y = norm(name='leave')(x)
        q, k = (Linear(width, use_bias=True, name=p)(y)[:, :, None] for p in ('query', 'key'))
        return jnp.einsum('bhij,bjd->bid', scores(q, k, 1, 'weight'), z)

    def __call__(self, z, items, keys=None):
        """Encode sessions: z [B, N, D], items int32 [B, N], keys [B] or None -> h [B, D]."""
        return at_last(self.positions(z, items, keys), items)

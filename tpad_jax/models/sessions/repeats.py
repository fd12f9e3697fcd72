"""A learned shift of the scores of items that a session already holds [ours].

A session's vector is close to the vectors of its items, whether or not people return to them. One
learned number per distance corrects that, and the vectors are free to express similarity.
RepeatNet (Ren et al. 2019) separates repeating from exploring.
"""

import jax.numpy as jnp


def shifts(table, items):
    """Compute the shift of the score of every item a prefix holds, at each of its positions.

    Args:
      table: float32 [N], by the steps since the item was last met; 0: it is the prefix's last item.
      items: int32 [B, N], left aligned, 0 pads.

    Returns:
      float32 [B, N, N]: [b, i, j] belongs to item j of row b, for the prefix of items 0..i; 0 where
      j is padding, comes after i, or is met again up to i, so that no item is shifted twice.
    """
    place = jnp.arange(items.shape[1])
    again = (items[:, :, None] == items[:, None, :]) & (place[:, None] < place)
    until = jnp.where(again.any(axis=2), jnp.argmax(again, axis=2), items.shape[1])
    steps = place[:, None] - place
    latest = (items > 0)[:, None] & (steps >= 0) & (place[:, None] < until[:, None])
    return jnp.where(latest, table[jnp.maximum(steps, 0)], 0)

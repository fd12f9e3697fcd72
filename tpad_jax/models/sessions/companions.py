"""Items that were often in one session with the items of a prefix get higher scores [ours].

A recommender's vectors forget rare pairs; neighbourhood methods remember them and know little else.
Their product has both: to the score of item i is added

    strength * log(1 + sum over the prefix's places n of a_n * lift(i | item n)),
    a_n = decay^(steps from the end), scaled to sum to 1.

lift is how many times more often than by chance the sessions that hold item n hold i, for the few
items that are stored for each (see data/item_graphs.py). Without the shift the score is the log of
a probability up to a constant, so this is a product of experts (Hinton 2002), the second of them
item-kNN. The shift is not trained: a training session would find its target in the counts.
"""

import jax.numpy as jnp

from tpad_jax.nn.gather import totals


def shifts(ids, lift, items, *, strength: float, decay: float):
    """Compute the shift of the scores of a prefix's companions.

    Args:
      ids: int32 [V+1, K]. The companions of every item, 0 where there are fewer.
      lift: float32 [V+1, K]. Of each companion.
      items: int32 [B, N], left aligned, 0 pads.
      strength: factor of the shift.
      decay: of an item's share, per step from the end.

    Returns:
      items int32 [B, N K] and the shift of each, float32 [B, N K]: 0 on padding, on the prefix's
      items, and on all but one place of an item.
    """
    here = items > 0
    steps = here.sum(axis=1, keepdims=True) - 1 - jnp.arange(items.shape[1])
    share = jnp.where(here, decay ** jnp.maximum(steps, 0).astype(jnp.float32), 0)
    share /= jnp.maximum(share.sum(axis=1, keepdims=True), 1e-9)
    near = ids[items]
    own = (near[..., None] == items[:, None, None]).any(axis=-1)
    parts = jnp.where(own | (near == 0), 0, share[..., None] * lift[items])
    near, parts = (x.reshape(len(items), -1) for x in (near, parts))
    near, total, last = totals(near, parts)
    return near, jnp.where(last, strength * jnp.log1p(total), 0)

"""Items that were often in one session with those of a prefix score higher than their vectors say
[ours].

A recommender's vectors forget rare pairs; neighbourhood methods remember them and know little else.
Their product says both: to the score of item i is added

    strength * log(1 + sum over the prefix's places n of a_n * lift(i | item n)),
    a_n = decay^(steps from the end), scaled to sum to 1,

lift being how many times more often than by chance i is held by the sessions that hold item n, of
the few items that are kept for each (see data/graph.py). Without a word of it the score is the log
of a probability but for a constant; so this is a product of experts (Hinton 2002), the second of
them item-kNN. Nothing of it is trained: a training session would find its own target in the counts.
"""

import jax
import jax.numpy as jnp


def shifts(ids, lift, items, *, strength: float, decay: float):
    """What is added to the scores of a prefix's companions.

    Args:
      ids: int32 [V+1, K], the companions kept of every item, 0 where there are fewer. lift: float32
        [V+1, K], of each. items: int32 [B, N], left aligned, 0 pads.

    Returns:
      items int32 [B, N K] and what is added to each, float32 [B, N K]: 0 on padding, on the
      prefix's own items, and on all but one place of an item.
    """
    here = items > 0
    steps = here.sum(axis=1, keepdims=True) - 1 - jnp.arange(items.shape[1])
    share = jnp.where(here, decay ** jnp.maximum(steps, 0).astype(jnp.float32), 0)
    share /= jnp.maximum(share.sum(axis=1, keepdims=True), 1e-9)
    found = ids[items]
    own = (found[..., None] == items[:, None, None]).any(axis=-1)
    parts = jnp.where(own | (found == 0), 0, share[..., None] * lift[items])
    found, parts = (x.reshape(len(items), -1) for x in (found, parts))
    order = jnp.argsort(found, axis=1)  # stable: an item's parts are summed in the prefix's order
    found, parts = (jnp.take_along_axis(x, order, axis=1) for x in (found, parts))
    first = jnp.pad(found[:, 1:] != found[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=True)

    def joined(a, b):
        """Sums that begin anew where an item begins."""
        return a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1])

    _, total = jax.lax.associative_scan(joined, (first, parts), axis=1)
    return found, jnp.where(last, strength * jnp.log1p(total), 0)

"""A loss on a session as a whole: its distribution over item clusters."""

import jax
import jax.numpy as jnp

from tpad_jax.losses.contract import Out


def clusters(out, batch, *, x: Out = Out('interest'), cluster: Out = Out('cluster')):
    """Return the KL divergence of a session's predicted clusters from its true ones.

    P2Rec (arXiv 2406.00333). [paper] a pre-task per user, not per prefix: the model reads the
    complete sequence and predicts how its interactions are distributed over k-means clusters of
    item embeddings. [ours] the clusters are of the Knowledge-MLLM's features (P2Rec's come from a
    trained recommender); the distribution is of the prefix and the item that follows; a divergence
    instead of a regression's square.

    Args:
      out: {name: output}.
      batch: types.Batch.
      x: float32 [B, C]. Output with the logits, one prediction per session.
      cluster: int32 [V+1]. Output with every item's cluster.

    Returns:
      [B].
    """
    items = jnp.concatenate([batch.items, batch.target[:, None]], axis=1)
    held = jax.nn.one_hot(out[cluster][items], out[x].shape[-1]) * (items > 0)[..., None]
    share = held.sum(axis=1) / jnp.maximum((items > 0).sum(axis=1, keepdims=True), 1)
    surprise = jnp.log(jnp.where(share > 0, share, 1)) - jax.nn.log_softmax(out[x])
    return (share * surprise).sum(axis=-1)

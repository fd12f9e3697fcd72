"""What an MLLM learns from a session as a whole."""

import jax
import jax.numpy as jnp

from tpad_jax.losses.contract import Out


def clusters(out, batch, *, x: Out = Out('interest'), cluster: Out = Out('cluster')):
    """KL of a session's predicted distribution over item clusters from the true one. -> [B]

    P2Rec (arXiv 2406.00333). [paper] a pre-task per user, not per prefix: the model parses the
    whole sequence and tells how its interactions are distributed over k-means clusters of item
    embeddings. [ours] the clusters are of the Knowledge-MLLM's features (its own come from a
    trained recommender); the distribution is of the prefix and the item that follows; a divergence
    in place of a regression's square.

    x: logits [B, C], one prediction per session. cluster: int32 [V+1], every item's cluster.
    """
    items = jnp.concatenate([batch.items, batch.target[:, None]], axis=1)
    held = jax.nn.one_hot(out[cluster][items], out[x].shape[-1]) * (items > 0)[..., None]
    share = held.sum(axis=1) / jnp.maximum((items > 0).sum(axis=1, keepdims=True), 1)
    surprise = jnp.log(jnp.where(share > 0, share, 1)) - jax.nn.log_softmax(out[x])
    return (share * surprise).sum(axis=-1)

"""GCE-GNN: a session's graph, and the graph over items of all training sessions.

Source: Wang et al. 2020, "Global Context Enhanced Graph Neural Networks for Session-based
Recommendation": the global item graph (section 3.1), the two attentions (4.1 and 4.2), the readout
with positions counted from the session's end (4.3). [ours] dropout keyed by row.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.nn.attention import dropout
from tpad_jax.nn.linear import Linear, uniform

NEVER = -1e9
SLOPE = 0.2  # of the leaky rectifier, the paper's


def relations(items):
    """Compute how the session's graph relates position i to position j.

    Args:
      items: int32 [B, N], 0 pads at the end.

    Returns:
      int32 [B, N, N]: 0 none, 1 the same item, 2 i goes to j, 3 j goes to i, 4 both.
    """
    real = items > 0
    same = (items[:, :, None] == items[:, None, :]) & real[:, :, None]
    step = jnp.eye(items.shape[1], k=1, dtype=bool) & real[:, :, None] & real[:, None, :]
    s = same.astype(jnp.float32)
    goes = s @ (step.astype(jnp.float32) @ s) > 0  # a place of i's item is before a place of j's
    back = goes.swapaxes(1, 2)
    tie = jnp.where(goes & back, 4, jnp.where(goes, 2, jnp.where(back, 3, 0)))
    return jnp.where(same, 1, tie).astype(jnp.int32)


class GlobalGraphGNN(nn.Module):
    """One layer of session graph attention, one of global graph attention, and the readout.

    Attributes:
      max_length: longest prefix N, for the positions' table.
      rate: dropout on the global part and on the result.
      item_rate: dropout on the item vectors.
    """

    max_length: int = 20
    rate: float = 0.0
    item_rate: float = 0.0

    @nn.compact
    def __call__(self, z, items, keys=None, near=None):
        """Encode sessions.

        Args:
          z: item vectors of the prefix [B, N, D].
          items: int32 [B, N], 0 pads at the end.
          keys: a key per row [B] for dropout, or None (evaluation).
          near: global neighbours of every item of the prefix: their vectors [B, N, S, D] and
            weights [B, N, S], 0 where there is none; see `data.item_graphs`.

        Returns:
          h [B, D].
        """
        width = z.shape[-1]
        real = (items > 0)[:, :, None]
        share = real / jnp.maximum(real.sum(axis=1, keepdims=True), 1)

        z = dropout(jnp.where(real, z, 0), self.item_rate, keys, 0)
        x = self._local(z, items)
        if near is not None:
            x += dropout(self._global(z, (z * share).sum(axis=1), *near), self.rate, keys, 1)
        x = jnp.where(real, x, 0)
        table = self.param('position', uniform(width ** -0.5), (self.max_length, width))
        last = jnp.maximum((items > 0).sum(axis=1) - 1, 0)
        position = table[jnp.maximum(last[:, None] - jnp.arange(items.shape[1]), 0)]
        y = jnp.tanh(Linear(width, use_bias=True, name='w3')(
            jnp.concatenate([x, position], axis=-1)))
        y = Linear(width, use_bias=True, name='w4')(y)
        y += Linear(width, name='w5')((x * share).sum(axis=1))[:, None]
        weight = Linear(1, name='q2')(nn.sigmoid(y))
        return dropout(jnp.where(real, weight * x, 0).sum(axis=1), self.rate, keys, 2)

    def _local(self, z, items):
        """Attend along the session's transitions (paper, equations 9-11); returns [B, N, D]."""
        tie = relations(items)
        kinds = self.param('relations', uniform(z.shape[-1] ** -0.5), (4, z.shape[-1]))
        # one plain product per kind: [B, N, 4 D] x [B, N, D]
        e = jnp.einsum('bikd,bjd->bkij', z[:, :, None] * kinds, z)
        e = jnp.take_along_axis(e, jnp.maximum(tie - 1, 0)[:, None], axis=1)[:, 0]
        e = jnp.where(tie > 0, nn.leaky_relu(e, SLOPE), NEVER)
        return jax.nn.softmax(e, axis=-1) @ z

    def _global(self, z, mean, vectors, weights):
        """Attend to global neighbours by closeness to the session (5-8); returns [B, N, D]."""
        width = z.shape[-1]
        pairs = jnp.concatenate([mean[:, None, None] * vectors, weights[..., None]], axis=-1)
        e = nn.leaky_relu(Linear(width, name='w1')(pairs), SLOPE)
        e = jnp.where(weights > 0, Linear(1, name='q1')(e)[..., 0], NEVER)
        found = (weights > 0).any(axis=-1, keepdims=True)
        share = jnp.where(found, jax.nn.softmax(e, axis=-1), 0)
        around = jnp.einsum('bns,bnsd->bnd', share, vectors)
        return nn.relu(Linear(width, name='w2')(jnp.concatenate([z, around], axis=-1)))

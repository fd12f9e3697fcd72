"""The session GNN: a gated graph network over a session's items, and a readout of the whole
session.

Source: Wu et al. 2019, "Session-based Recommendation with Graph Neural Networks" (SR-GNN),
equations 1-7. The graph is built on the device from padded ids: nothing but the ids travels.
[ours] positions counted from both ends enter the readout's attention, and dropout, keyed by row.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.models.attention import dropout
from tpad_jax.models.lora import Linear, uniform


def session_graph(items):
    """The session graph of each row, from ids alone.

    Nodes are the different items of a row; node j stands at the position where its item is first
    met, so no compaction is needed. A repeated transition counts as often as it occurs, and rows
    are
    normalised: entry [b, i, j] of `outgoing` is the share of departures from i that go to j.

    Args:
      items: int32 [B, N], 0 pads at the end.

    Returns:
      alias: int32 [B, N], the node of each position; padding has one of its own, without edges.
      outgoing, incoming: float32 [B, N, N].
    """
    width = items.shape[1]
    alias = jnp.argmax(items[:, :, None] == items[:, None, :], axis=-1)
    real = (items > 0).astype(jnp.float32)
    node = jax.nn.one_hot(alias, width) * real[:, :, None]
    edges = jnp.einsum('bji,bjk->bik', node[:, :-1], node[:, 1:])
    outgoing = edges / jnp.maximum(edges.sum(axis=2, keepdims=True), 1)
    backward = edges.swapaxes(1, 2)
    incoming = backward / jnp.maximum(backward.sum(axis=2, keepdims=True), 1)
    return alias.astype(jnp.int32), outgoing, incoming


class SessionGNN(nn.Module):
    """Gated graph network and soft-attention readout.

    Attributes:
      steps: rounds of message passing.
      max_length: longest prefix N, for the positions' table.
      positions: whether the readout knows positions [ours]; SR-GNN itself does not.
      rate: dropout on item vectors and on the readout.
    """

    steps: int = 1
    max_length: int = 20
    positions: bool = True
    rate: float = 0.0

    @nn.compact
    def __call__(self, z, items, keys=None):
        """Encode sessions.

        Args:
          z: item vectors of the prefix [B, N, D].
          items: int32 [B, N], 0 pads at the end.
          keys: a key per row [B] for dropout, or None (evaluation).

        Returns:
          h [B, D].
        """
        width = z.shape[-1]
        keys = (None, None) if keys is None else (
            jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys),
            jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys))
        real = (items > 0)[:, :, None]
        z = dropout(jnp.where(real, z, 0), self.rate, keys[0])
        alias, outgoing, incoming = session_graph(items)
        node = jnp.take_along_axis(z, alias[:, :, None], axis=1)  # repeats share one dropout mask
        flat = nn.initializers.lecun_uniform()  # SR-GNN, too, draws every weight uniformly
        cell = nn.GRUCell(width, kernel_init=flat, recurrent_kernel_init=flat, name='cell')
        leave = Linear(width, use_bias=True, name='out')
        arrive = Linear(width, use_bias=True, name='in')
        for _ in range(self.steps):
            message = jnp.concatenate([outgoing @ leave(node), incoming @ arrive(node)], axis=-1)
            node, _ = cell(node, message)
        s = jnp.take_along_axis(node, alias[:, :, None], axis=1)
        last = jnp.maximum((items > 0).sum(axis=1) - 1, 0)
        s_last = jnp.take_along_axis(s, last[:, None, None], axis=1)[:, 0]
        mix = Linear(width, use_bias=True, name='w1')(s_last)[:, None]
        mix += Linear(width, use_bias=True, name='w2')(s)
        if self.positions:
            table = uniform(0.03)
            from_start = self.param('from_start', table, (self.max_length, width))
            from_end = self.param('from_end', table, (self.max_length, width))
            place = jnp.arange(items.shape[1])
            mix += from_start[place] + from_end[jnp.maximum(last[:, None] - place, 0)]
        weight = Linear(1, name='q')(nn.sigmoid(mix))
        s_global = jnp.where(real, weight * s, 0).sum(axis=1)
        h = Linear(width, use_bias=True, name='w3')(jnp.concatenate([s_last, s_global], axis=-1))
        return dropout(h, self.rate, keys[1])

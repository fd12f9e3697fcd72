"""The session GNN: a gated graph network over a session's items, and a readout.

Source: Wu et al. 2019, "Session-based Recommendation with Graph Neural Networks" (SR-GNN),
equations 1-7, computed as in the authors' published code where the two differ: an edge counts
once for any number of steps along it, the reset gate is applied after its product, the update gate
keeps the old state, the edges' products have one bias inside the sum over neighbours and one
outside, and every parameter starts uniform in +-1 / sqrt(D). The graph is built on the device from
padded ids; only the ids are transferred.
[ours] Optional: positions counted from both ends enter the readout's attention; dropout, keyed by
row.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.nn import branches
from tpad_jax.nn.attention import dropout
from tpad_jax.nn.linear import uniform

# Prefixes are short and N is the longest: a batch that holds no more than this share of [B, N]
# positions, or than this many a row, is computed at that size (four items of twenty is the mean of
# public click data; where sessions end at seven, the mean prefix holds three). Most batches of a
# hundred rows fit three quarters of it.
PACKED, PACKED_ROW, MOST = 0.3, 3.5, 0.75
FEW = 512  # positions: compiling more than one size would take longer than it ever saves


def rooms(size: int, length: int) -> tuple[int, ...]:
    """Return the numbers of positions at which a batch [size, length] may be computed, ascending.

    A batch is computed at the first that holds its items. Small batches have one.
    """
    if size * length <= FEW:
        return (size * length,)
    packed = size * min(length, max(PACKED * length, PACKED_ROW))
    return tuple(sorted({max(1, int(MOST * packed)), max(1, int(packed)), size * length}))


def session_graph(items):
    """Build the session graph of each row as a list of edges, one per step to the next position.

    Nodes are the different items of a row; node j is the position where its item is first met, so
    no compaction is needed. Steps that repeat an edge have weight 0.

    Args:
      items: int32 [B, N], 0 pads at the end.

    Returns:
      alias: int32 [B, N], the node of each position; padding is a separate node.
      from_node: float32 [B, N], weight of the step from position j to j + 1 at the node where it
        starts, 1 / the number of different nodes that follow it; 0 where there is no such step.
      to_node: float32 [B, N], likewise at the node where it ends, 1 / the nodes that lead there.
    """
    same = items[:, :, None] == items[:, None, :]
    after = jnp.pad(items[:, 1:], ((0, 0), (0, 1)))
    goes = after > 0
    same_after = after[:, :, None] == after[:, None, :]
    earlier = jnp.tri(items.shape[1], k=-1, dtype=bool)
    new = goes & ~(same & same_after & earlier).any(axis=2)

    def share(alike):
        count = (alike & new[:, None, :]).sum(axis=2)
        return jnp.where(new, 1 / jnp.maximum(count, 1), 0).astype(jnp.float32)

    return jnp.argmax(same, axis=2).astype(jnp.int32), share(same), share(same_after)


class SessionGNN(nn.Module):
    """Gated graph network and soft-attention readout.

    Attributes:
      steps: rounds of message passing.
      max_length: longest prefix N, for the positions' table.
      positions: whether the readout knows positions [ours]; SR-GNN itself does not.
      rate: dropout on the result [ours].
      item_rate: dropout on the item vectors [ours].
    """

    steps: int = 1
    max_length: int = 20
    positions: bool = False
    rate: float = 0.0
    item_rate: float = 0.0

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
        size, length, width = z.shape

        flat = uniform(width ** -0.5)

        def layer(name, fan_in, fan_out):
            return (self.param(f'{name}_kernel', flat, (fan_in, fan_out)),
                    self.param(f'{name}_bias', flat, (fan_out,)))

        params = {
            # products that read the same vectors are one: edges out, edges in, the three gates
            'node': layer('node', width, 5 * width),
            'message': layer('message', 2 * width, 3 * width),
            'edge': self.param('edge_bias', flat, (2 * width,)),
            'w1': layer('w1', width, width), 'w2': layer('w2', width, width),
            'q': self.param('q_kernel', flat, (width, 1)), 'w3': layer('w3', 2 * width, width)}
        if self.positions:
            for name in ('from_start', 'from_end'):
                params[name] = self.param(name, uniform(0.03), (self.max_length, width))
        z = dropout(z, self.item_rate, keys, 0)
        graph = session_graph(items)
        sizes = rooms(size, length) if branches.may_differ() else (size * length,)

        def encode(room):
            # computed again in the backward pass: cheaper than room for every branch's values
            return jax.checkpoint(lambda *a: _encode(*a, steps=self.steps, room=room))

        which = ((items > 0).sum() > jnp.asarray(sizes[:-1], jnp.int32)).sum()
        h = jax.lax.switch(which, [encode(room) for room in sizes], params, z, items, graph)
        return dropout(h, self.rate, keys, 1)


def _encode(params, z, items, graph, *, steps, room):
    """Compute h [B, D] from vectors z [B, N, D], over the first `room` positions with an item.

    Rows follow one another without their padding, K = room positions in all, each with its node's
    state, which all positions of an item share.
    """
    size, length, width = z.shape
    held = items > 0
    lengths = held.sum(axis=1)
    begin = jnp.cumsum(lengths) - lengths  # where each row starts among the K
    place = jnp.flatnonzero(held, size=room)  # index of each of the K in [B, N]; then zeros
    real = jnp.arange(room) < lengths.sum()
    row = place // length
    alias, leaving, arriving = (x.reshape(-1)[place] for x in graph)
    node = begin[row] + alias
    leaving, arriving = (jnp.where(real, x, 0)[:, None] for x in (leaving, arriving))
    state = jnp.where(real[:, None], z.reshape(-1, width)[row * length + alias], 0)

    def gathered(values, at):
        """Sum values [K, D] per node and return the sum at every position of the node."""
        return jnp.zeros_like(values).at[at].add(values)[node]

    def dense(name, x):
        kernel, bias = params[name]
        return x @ kernel + bias

    for _ in range(steps):
        leave, arrive, gates = jnp.split(dense('node', state), (width, 2 * width), axis=1)
        # eq 1; the last position's step has weight zero
        forth = gathered(leaving * jnp.roll(leave, -1, axis=0), node)
        back = gathered(arriving * arrive, jnp.roll(node, -1))
        message = jnp.concatenate([back, forth], axis=1) + params['edge']
        state = gated(dense('message', message), gates, state)

    last = jnp.where((lengths > 0)[:, None], state[begin + jnp.maximum(lengths - 1, 0)], 0)
    mix = dense('w1', last)[row] + dense('w2', state)  # eq 6
    if 'from_start' in params:
        at = place % length
        mix += params['from_start'][at] + params['from_end'][lengths[row] - 1 - at]
    weight = jnp.where(real[:, None], nn.sigmoid(mix) @ params['q'], 0)
    whole = jnp.zeros((size, width)).at[row].add(weight * state)
    return dense('w3', jnp.concatenate([whole, last], axis=1))  # eq 7


def gated(message, old, state):
    """Compute a gated recurrent unit's new state (equations 2-5).

    Args:
      message: float [K, 3 D]. Product of the input: reset, update, candidate.
      old: float [K, 3 D]. Product of the state, likewise.
      state: float [K, D].
    """
    reset, update, new = jnp.split(message, 3, axis=1)
    reset_old, update_old, new_old = jnp.split(old, 3, axis=1)
    new = jnp.tanh(new + nn.sigmoid(reset + reset_old) * new_old)
    return new + nn.sigmoid(update + update_old) * (state - new)

"""Reading of times, kinds and earlier sessions next to a session encoder (data/events.py) [ours].

It is independent of the encoder. Before it, an embedding of each event's gap and kind is added to
the item's vector. After it, an MLP reads the last item, its gap and kind, the date of the target
and the mean of the visitor's earlier items, and adds to the session's vector: an MLP, since a kind
may change what follows an item. It adds zero at first.

Gaps are bucketed logarithmically, as in Time-LSTM's and TiSASRec's variants that clip intervals
(Li et al. 2020). In training `UNKNOWN` of the rows are read without their context, so that
sessions without times, kinds or visitor have an encoding, too.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.data import events
from tpad_jax.nn.linear import Linear

UNKNOWN = 0.1
SIZES = {'gap': events.GAPS, 'kind': events.KINDS, 'date': events.PERIODS + 1}


def codes(reads, items, context, keys=None):
    """Return the columns of rows by name.

    Args:
      reads: names of columns.
      items: int32 [B, N].
      context: int32 [B, C], or [B, 0]: nothing is known.
      keys: a key per row [B] in training, or None.

    Returns:
      {name: int32 [B, width]}. Where nothing is known, 0, and the date is now.
    """
    where = events.columns(reads, items.shape[1])
    width = max(part.stop for part in where.values())
    blank = jnp.zeros((len(items), width), jnp.int32)
    if 'date' in where:
        blank = blank.at[:, where['date']].set(events.NOW)
    if not context.shape[1]:
        context = blank
    elif keys is not None:
        drop = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 7), UNKNOWN))(keys)
        context = jnp.where(drop[:, None], blank, context)
    return {name: context[:, part] for name, part in where.items()}


class Events(nn.Module):
    """Embeddings of the columns, and the MLP.

    Attributes:
      reads: names of columns.
      width: D.
    """

    reads: tuple[str, ...]
    width: int

    def setup(self):
        """Make the embeddings and the layers."""
        self.tables = {name: nn.Embed(size, self.width, embedding_init=nn.initializers.normal(0.1))
                       for name, size in SIZES.items() if name in self.reads}
        self.inner = Linear(2 * self.width, use_bias=True)
        self.outer = nn.Dense(self.width, kernel_init=nn.initializers.zeros)

    def enter(self, z, known):
        """Add the embeddings of gaps and kinds to item vectors z [B, N, D]."""
        return z + sum((self.tables[name](known[name]) for name in ('gap', 'kind')
                        if name in known), jnp.zeros(()))

    def leave(self, h, z, known, past):
        """Add what the last event and the visitor say to h.

        Args:
          h: [B, N, D], or [B, 1, D] for the last position alone.
          z: item vectors of these positions, as `enter` returns them.
          known: of `codes`.
          past: [B, D]. Mean of the vectors of the visitor's earlier items, or None.
        """
        parts = [z]
        if 'date' in known:  # interpolated: the end of training has a vector, too
            at = (known['date'] - 1) / events.STEPS
            before = jnp.clip(at.astype(int), 0, events.PERIODS - 1)
            share = (at - before)[..., None]
            parts.append((1 - share) * self.tables['date'](before)
                         + share * self.tables['date'](before + 1))
        if past is not None:
            parts.append(past[:, None])
        parts = [jnp.broadcast_to(x, h.shape) for x in parts]
        return h + self.outer(nn.gelu(self.inner(jnp.concatenate(parts, axis=-1))))

    def __call__(self, z, known, past):
        """Make all parameters."""
        return self.leave(z, self.enter(z, known), known, past)

"""Item vectors z: id embedding, content features and side features in one [ours]."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.nn.attention import dropout, row_keys
from tpad_jax.nn.linear import MLP, Linear, uniform


class Fusion(nn.Module):
    """z = id + W f + side.

    Items that no training session holds have no trained id embedding: they share a learned one. Id
    dropout gives it to warm items too, so that it is trained. Without id dropout it would stay
    untrained; then the rows of cold items are zero (see `blank`), and a step neither copies the
    table nor masks its gradient.

    Attributes:
      items: V.
      width: D of z.
      use_id: whether z has an id embedding; False: content only.
      side_sizes: vocabulary size of each side feature; (): none.
      id_dropout: share of warm items, drawn per step, that get the shared embedding.
      feature_dropout: dropout on the content features.
      hidden: of an MLP added to each feature, as in `heads.Adapter`; 0: none.
    """

    items: int
    width: int
    use_id: bool = True
    side_sizes: tuple[int, ...] = ()
    id_dropout: float = 0.0
    feature_dropout: float = 0.0
    hidden: int = 0

    @nn.compact
    def __call__(self, ids, warm, features, side, key=None):
        """Fuse.

        Args:
          ids: int32 [..., ]; None: the whole catalogue, [V+1], whose table is then not copied.
          warm: bool, same shape: whether the item has its own id embedding.
          features: list of float [..., F] content features (may be empty).
          side: int32 [..., S].
          key: for dropout, drawn per item so that an item is the same all over a batch; or None.

        Returns:
          z [..., D].
        """
        small = uniform(self.width ** -0.5)  # as SR-GNN draws its items
        parts = []
        flat = jnp.arange(self.items + 1) if ids is None else ids.reshape(-1)
        if self.use_id:
            table = self.param('id', small, (self.items + 1, self.width))
            rows = table if ids is None else table[ids]
            if self.id_dropout:
                shared, own = self.param('shared', small, (self.width,)), warm
                if key is not None:
                    keys = row_keys(jax.random.fold_in(key, 0), flat)
                    draw = jax.vmap(jax.random.uniform)(keys).reshape(warm.shape)
                    own = own & (draw >= self.id_dropout)
                rows = jnp.where(own[..., None], rows, shared)
            parts.append(rows)
        for i, feature in enumerate(features):
            x = nn.LayerNorm(name=f'feature_norm_{i}')(feature)
            keys = None if key is None else row_keys(jax.random.fold_in(key, i + 1), flat)
            x = dropout(x.reshape(len(flat), -1), self.feature_dropout, keys).reshape(x.shape)
            if self.hidden:
                x += MLP(self.hidden, x.shape[-1], name=f'mlp_{i}')(x)
            parts.append(Linear(self.width, use_bias=True, name=f'feature_{i}')(x))
        for i, size in enumerate(self.side_sizes):
            table = self.param(f'side_{i}', small, (size, self.width))
            # value 0 is "unknown": it adds nothing
            parts.append(jnp.where(side[..., i, None] > 0, table[side[..., i]], 0))
        return sum(parts)


def blank(params, warm):
    """Set the id rows of cold items, and of padding, in a fusion's first parameters to zero.

    Without id dropout they stay zero: no session holds these items, and they are never negatives.

    Args:
      params: of `Fusion.init`.
      warm: bool [V+1].
    """
    if 'id' not in params:
        return params
    return {**params, 'id': jnp.where(warm[:, None], params['id'], 0)}

"""Residual k-means codes of items: the rows 'codes', by which a few sessions say much [ours].

Each level clusters what the levels before left of k (residual quantisation, as in the semantic ids
of Rajput et al. 2023, arXiv 2305.05065). Items with one code share what is learnt of it. Codes need
no session, so cold and new items have them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.nn.linear import unit

PATH = 'codes/centres'  # among a run's parameters, which no stage trains


def centres(k, levels: int, size: int, seed: int) -> np.ndarray:
    """Fit the centres of every level.

    Args:
      k: float32 [V+1, M, D]. Features, each scaled to length one; row 0 is padding.
      levels: number of levels.
      size: centres of a level.
      seed: of the first centres.

    Returns:
      float32 [levels, size, M D].
    """
    from sklearn.cluster import KMeans  # slow to import

    rest, out = np.asarray(unit(jnp.asarray(k))).reshape(len(k), -1)[1:], []
    for level in range(levels):
        fitted = KMeans(size, n_init=1, random_state=seed + level).fit(rest)
        out.append(fitted.cluster_centers_)
        rest = rest - out[-1][fitted.labels_]
    return np.stack(out).astype(np.float32)


def rows(k, centres) -> jax.Array:
    """Return the codes of items, one-hot, level after level: float32 [V, levels * size]."""
    rest, out = unit(k).reshape(len(k), -1), []
    for level in centres:
        code = ((level**2).sum(-1) - 2 * rest @ level.T).argmin(-1)
        rest = rest - level[code]
        out.append(jax.nn.one_hot(code, len(level)))
    return jnp.concatenate(out, axis=-1)

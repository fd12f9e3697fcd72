"""The shapes of compiled calls: few sizes, so that little is compiled."""

import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.models.experts import BY_ITEM
from tpad_jax.serving import topk

SIZES = 1, 16, 256  # rows of a compiled call; the smallest that is large enough is used
MAX_K = 1000  # items of a list at most
LENGTHS = 20, 50, 100, 200, 500, MAX_K  # of a compiled list; the smallest that is large enough


def parts(x) -> list:
    """Split rows into the parts of compiled calls; no rows are one part."""
    return np.split(x, range(SIZES[-1], len(x), SIZES[-1]))


def filled(x, value=0):
    """Pad rows to one of SIZES."""
    size = next(size for size in SIZES if size >= len(x))
    return np.pad(x, ((0, size - len(x)), *((0, 0),) * (x.ndim - 1)), constant_values=value)


def padded(z, weights, count: int) -> tuple:
    """Give arrays room up to a whole chunk, so that most new items compile nothing.

    Args:
      z: float32 [V+1, D]. Item vectors.
      weights: of the recommenders and the experts, see `scorers.session_encoder`.
      count: rows that are needed.

    Returns:
      z and weights.
    """
    length = topk.rounded(count)

    def fill(x):
        return jnp.pad(x, ((0, length - len(x)), *((0, 0),) * (x.ndim - 1)))

    models, experts = weights
    models = tuple((jax.device_put(params), {name: fill(x) for name, x in near.items()})
                   for params, near in models)
    if experts is not None:
        tables = {name: fill(x) if name in BY_ITEM else x
                  for name, x in experts['tables'].items()}
        experts = jax.device_put({'weights': experts['weights'], 'tables': tables})
    return fill(z), (models, experts)


def finish(rows, items, scores, popular) -> tuple[np.ndarray, np.ndarray]:
    """Return the wanted rows on the host; an empty session gets the popular items.

    Args:
      rows: int32 [s, N]. Prefixes.
      items: int32 [S, K] of the device.
      scores: float32 [S, K] of the device.
      popular: int32 [k].

    Returns:
      Items int32 [s, k] and scores float32 [s, k].
    """
    items, scores = (np.array(x)[:len(rows), :len(popular)] for x in (items, scores))
    empty = rows[:, 0] == 0
    items[empty], scores[empty] = popular, np.nan
    broken = np.flatnonzero(~(np.isfinite(scores).all(axis=1) | empty))
    if len(broken):
        raise FloatingPointError(f'the scores of session {broken[0]} of this call are not finite')
    return items, scores

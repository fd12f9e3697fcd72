"""Scores of the whole catalogue for prefixes: what evaluation ranks and a shop serves."""

from collections.abc import Callable
from functools import lru_cache

import jax.numpy as jnp
import numpy as np

from tpad_jax.models import tpad
from tpad_jax.parallel import compiled


@lru_cache(maxsize=16)  # one compilation however many validations ask
def scorer(spec: tpad.TPAD) -> Callable[[dict, dict], Callable]:
    """(nested params, catalogue) -> (prefixes int32 [B, N] -> scores float32 [B, V+1]).

    No MLLM runs: items are read from the catalogue's rows. Compiled once per chunk size; the item
    vectors are computed once per call of the outer function.
    """
    table = compiled(lambda params, catalogue: tpad.z_table(spec, params, catalogue))

    @compiled
    def score(params, z, items):
        h = tpad.encode_sessions(spec, params, items, z)
        return (h @ z.T).at[:, 0].set(0)

    def bind(params, catalogue):
        recommender = {'recommender': params['recommender']}
        z = table(recommender, catalogue)
        return lambda items: np.asarray(score(recommender, z, jnp.asarray(items)))

    return bind


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Item ids int32 [B, k] of the highest scores [B, V+1], best first; padding is never one."""
    order = np.argsort(-scores[:, 1:], axis=1, kind='stable')[:, :k]
    return (order + 1).astype(np.int32)

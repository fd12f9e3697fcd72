"""Scores of the whole catalogue for prefixes: what evaluation ranks and a shop serves."""

from collections.abc import Callable
from functools import lru_cache, partial

import jax.numpy as jnp
import numpy as np

from tpad_jax.models import tpad
from tpad_jax.parallel import Devices, compiled
from tpad_jax.ranking import ranker


@lru_cache(maxsize=16)  # one compilation however many validations ask
def scorer(spec: tpad.TPAD, devices: Devices) -> Callable[[dict, dict], Callable]:
    """(nested params, catalogue) -> (prefixes int32 [B, N] -> scores float32 [B, V+1]).

    No MLLM runs: items are read from the catalogue's rows. Compiled once per chunk size; the item
    vectors are computed once per call of the outer function. What it returns moreover has `ranks`:
    (items [R, N], target [R], *, rows, name) -> (above, equal) int32 [R], counted on `devices`,
    see `ranking.ranker`.
    """
    table = compiled(lambda params, catalogue: tpad.z_table(spec, params, catalogue))

    def encode(weights, z, items):
        params, near = weights
        return tpad.encode_sessions(spec, params, items, z, near)

    def repeat(weights, items):
        return tpad.repeat_shift(spec, weights[0], items)

    @compiled
    def score(weights, z, items):
        scores = encode(weights, z, items) @ z.T
        if spec.repeats:
            scores = scores.at[jnp.arange(len(items))[:, None], items].add(repeat(weights, items))
        return scores.at[:, 0].set(0)

    rank = ranker(encode, devices, repeat=repeat if spec.repeats else None)

    def bind(params, catalogue):
        recommender = {'recommender': params['recommender']}
        z = table(recommender, catalogue)
        weights = recommender, {n: catalogue[n] for n in tpad.GRAPH if n in catalogue}

        def scores(items):
            return np.asarray(score(weights, z, jnp.asarray(items)))

        scores.ranks = partial(rank, weights, z)
        return scores

    return bind


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Item ids int32 [B, k] of the highest scores [B, V+1], best first; padding is never one."""
    order = np.argsort(-scores[:, 1:], axis=1, kind='stable')[:, :k]
    return (order + 1).astype(np.int32)

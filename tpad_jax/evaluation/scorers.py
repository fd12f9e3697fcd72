"""Scores of the whole catalogue for prefixes: what evaluation ranks and a shop serves."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tpad_jax.distributed.devices import Devices, compiled
from tpad_jax.evaluation.device_ranks import ranker
from tpad_jax.models import outputs, tpad
from tpad_jax.types import Batch


class Bound(NamedTuple):
    """What a scorer was bound to, of one recommender or of several whose scores are added.

    specs: of each. params: of each, nested, all of them. near: of each its rows of the graphs over
    items, or {}. z: float32 [V+1, D], the item vectors of all of them laid end to end.
    """

    specs: tuple[tpad.TPAD, ...]
    params: tuple[dict, ...]
    near: tuple[dict, ...]
    z: jnp.ndarray


def session_encoder(specs: tuple[tpad.TPAD, ...]) -> Callable:
    """(weights, z [V+1, D], items int32 [B, N]) -> h [B, D], such that <h, z> scores an item. Pure.

    weights: of each spec the pair ({'recommender': parameters}, rows of the graphs or {}).
    The sum of scores is the product of vectors laid end to end.
    """
    def encode(weights, z, items):
        own, begin, here = [], 0, z[items]
        for spec, (params, near) in zip(specs, weights, strict=True):
            cut = slice(begin, begin + spec.fusion.width)
            begin = cut.stop
            # only the global graph reads the others' vectors
            rows = z[:, cut] if tpad.GRAPH[0] in near else None
            own.append(tpad.encode_sessions(spec, params, items, rows, near, z=here[..., cut]))
        return jnp.concatenate(own, axis=1)

    return encode


def session_shifts(specs: tuple[tpad.TPAD, ...]) -> Callable | None:
    """(weights, items int32 [B, N]) -> items [B, M] and what is added to their scores [B, M].

    It is 0 on padding, and on all but one place of an item. None: nothing is added to any.
    """
    repeats = [i for i, spec in enumerate(specs) if spec.repeats]
    together = [i for i, spec in enumerate(specs) if spec.together]

    def shifts(weights, items):
        found = []
        if repeats:
            found.append((items, sum(tpad.repeat_shift(specs[i], weights[i][0], items)
                                     for i in repeats)))
        if together:  # all of them have the same rows, and so the same items in the same places
            each = [tpad.company_shift(specs[i], weights[i][1], items) for i in together]
            found.append((each[0][0], sum(shift for _, shift in each)))
        return tuple(jnp.concatenate(x, axis=1) for x in zip(*found, strict=True))

    return shifts if repeats or together else None


@lru_cache(maxsize=16)  # one compilation however many validations ask
def scorer(specs: tpad.TPAD | tuple[tpad.TPAD, ...], devices: Devices) -> Callable:
    """(params, catalogue) -> (prefixes int32 [B, N] -> scores float32 [B, V+1]).

    No MLLM runs: items are read from the catalogue's rows. Compiled once per chunk size; the item
    vectors are computed once per call of the outer function. What it returns moreover has `ranks`:
    (items [R, N], target [R], *, rows, name) -> (above, equal) int32 [R], counted on `devices`,
    see `ranking.ranker`; and `bound`, see `Bound`.

    Args:
      specs: of one recommender, or of several whose scores are added; then the function returned
        takes as many nested params and catalogues, in tuples.
    """
    several = isinstance(specs, tuple)
    if not several:
        specs = (specs,)

    @partial(compiled, precision=devices.precision)
    def table(params, catalogues):
        return jnp.concatenate([tpad.z_table(spec, *own) for spec, *own in
                                zip(specs, params, catalogues, strict=True)], axis=1)

    encode, shifts = session_encoder(specs), session_shifts(specs)

    @partial(compiled, precision=devices.precision)
    def score(weights, z, items):
        scores = encode(weights, z, items) @ z.T
        if shifts is not None:
            at, shift = shifts(weights, items)
            scores = scores.at[jnp.arange(len(items))[:, None], at].add(shift)
        return scores.at[:, 0].set(0)

    rank = ranker(encode, devices, shifts=shifts)

    def bind(params, catalogue):
        given = (params, catalogue) if several else ((params,), (catalogue,))
        recommenders = tuple({'recommender': own['recommender']} for own in given[0])
        z = table(recommenders, given[1])
        near = tuple({n: rows[n] for n in tpad.GRAPHS if n in rows} for rows in given[1])
        weights = tuple(zip(recommenders, near, strict=True))

        def scores(items):
            return np.asarray(score(weights, z, jnp.asarray(items)))

        scores.ranks = partial(rank, weights, z)
        scores.bound = Bound(specs, given[0], near, z)
        return scores

    return bind


@lru_cache(maxsize=4)
def foretold(spec: tpad.TPAD) -> Callable:
    """(params, catalogue) -> (prefixes int32 [B, N] -> scores float32 [B, V+1]) of T itself.

    An item's score is what critic `distil` makes of p at the prefix's last position and the item's
    r: how well the Transfer-MLLM foretells, before any recommender [ours]. The catalogue's k and r
    are read; T reads the whole prefix.
    """
    needs = frozenset({'p', 'critic.distil'})

    @compiled
    def score(params, catalogue, items):
        here, rows = items > 0, jnp.arange(len(items))
        batch = Batch(items=items, next=items, target=items[:, 0], valid=here[:, 0], row=rows)
        out = outputs.forward(spec, params, batch, catalogue, needs, frozenset())
        r = tpad.flat(catalogue['r'][None])[0]
        return out['critic.distil'](r, out['p'][rows, batch.last]).T.at[:, 0].set(0)

    def bind(params, catalogue):
        read = {n: catalogue[n] for n in ('k', 'r', 'warm')}
        return lambda items: np.asarray(score(params, read, jnp.asarray(items)))

    return bind


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Item ids int32 [B, k] of the highest scores [B, V+1], best first; padding is never one."""
    order = np.argsort(-scores[:, 1:], axis=1, kind='stable')[:, :k]
    return (order + 1).astype(np.int32)

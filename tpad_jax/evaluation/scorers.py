"""Scores of the whole catalogue for prefixes, which evaluation ranks and serving returns."""

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
    """The models of a scorer: one recommender, or several whose scores are added.

    Attributes:
      specs: of each recommender.
      params: of each, nested and complete.
      near: of each, its rows of the graphs over items, or {}.
      z: float32 [V+1, D]. The item vectors of all recommenders, concatenated.
    """

    specs: tuple[tpad.TPAD, ...]
    params: tuple[dict, ...]
    near: tuple[dict, ...]
    z: jnp.ndarray


def session_encoder(specs: tuple[tpad.TPAD, ...]) -> Callable:
    """Make the function that encodes sessions: <h, z> is an item's score. Pure.

    The sum of several recommenders' scores is the product of their concatenated vectors.

    Args:
      specs: of each recommender.

    Returns:
      (weights, z [V+1, D], items int32 [B, N]) -> h [B, D]. `weights` has for each spec the pair
      ({'recommender': parameters}, rows of the graphs or {}).
    """
    def encode(weights, z, items):
        parts, begin, item_vectors = [], 0, z[items]
        for spec, (params, near) in zip(specs, weights, strict=True):
            cut = slice(begin, begin + spec.fusion.width)
            begin = cut.stop
            # only the global graph reads the others' vectors
            rows = z[:, cut] if tpad.GRAPH[0] in near else None
            parts.append(tpad.encode_sessions(spec, params, items, rows, near,
                                              z=item_vectors[..., cut]))
        return jnp.concatenate(parts, axis=1)

    return encode


def session_shifts(specs: tuple[tpad.TPAD, ...]) -> Callable | None:
    """Make the function that shifts scores of items in or near the session.

    Args:
      specs: of each recommender.

    Returns:
      (weights, items int32 [B, N]) -> items [B, M] and the shifts of their scores [B, M]. A shift
      is 0 on padding and on all places of an item except one. None: no recommender shifts scores.
    """
    repeats = [i for i, spec in enumerate(specs) if spec.repeats]
    together = [i for i, spec in enumerate(specs) if spec.together]

    def shifts(weights, items):
        parts = []
        if repeats:
            parts.append((items, sum(tpad.repeat_shift(specs[i], weights[i][0], items)
                                     for i in repeats)))
        if together:  # all of them read the same rows, so their items have the same places
            each = [tpad.company_shift(specs[i], weights[i][1], items) for i in together]
            parts.append((each[0][0], sum(shift for _, shift in each)))
        return tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))

    return shifts if repeats or together else None


@lru_cache(maxsize=16)  # one compilation for all validations of a recommender
def scorer(specs: tpad.TPAD | tuple[tpad.TPAD, ...], devices: Devices) -> Callable:
    """Make the function that binds parameters to a scorer.

    No MLLM runs: items are read from the catalogue's rows. The scorer is compiled once per chunk
    size, and the item vectors are computed once per binding.

    Args:
      specs: of one recommender, or of several whose scores are added. The returned function then
        takes tuples of nested params and of catalogues.
      devices: that `ranks` counts on.

    Returns:
      (params, catalogue) -> scorer: prefixes int32 [B, N] -> scores float32 [B, V+1]. The scorer
      has `ranks`: (items [R, N], target [R], *, rows, name) -> (above, equal) int32 [R], see
      `device_ranks.ranker`, and `bound`, a `Bound`.
    """
    several = isinstance(specs, tuple)
    if not several:
        specs = (specs,)

    @partial(compiled, precision=devices.precision)
    def table(params, catalogues):
        return jnp.concatenate([tpad.z_table(spec, *inputs) for spec, *inputs in
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
        every, catalogues = (params, catalogue) if several else ((params,), (catalogue,))
        recommenders = tuple({'recommender': tree['recommender']} for tree in every)
        z = table(recommenders, catalogues)
        near = tuple({n: rows[n] for n in tpad.GRAPHS if n in rows} for rows in catalogues)
        weights = tuple(zip(recommenders, near, strict=True))

        def scores(items):
            return np.asarray(score(weights, z, jnp.asarray(items)))

        scores.ranks = partial(rank, weights, z)
        scores.bound = Bound(specs, every, near, z)
        return scores

    return bind


@lru_cache(maxsize=4)
def transfer_scorer(spec: tpad.TPAD) -> Callable:
    """Make the function that binds parameters to a scorer of the Transfer-MLLM alone [ours].

    An item's score is critic `distil` of p at the prefix's last position and the item's r. It
    measures the Transfer-MLLM before any recommender. The catalogue's k and r are read; T reads the
    whole prefix.

    Returns:
      (params, catalogue) -> scorer: prefixes int32 [B, N] -> scores float32 [B, V+1].
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

"""Scores of the whole catalogue for prefixes, which serving returns and `ranker` counts exactly.

Ranks are counted on the device that computes the scores: two numbers per row are copied to the
host, not V. Scores exist for one chunk of the catalogue at a time, small enough for a processor's
cache. Every item is ranked; no step samples or approximates.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.distributed import collectives
from tpad_jax.distributed.devices import Devices, compiled
from tpad_jax.evaluation import metrics
from tpad_jax.models import experts, outputs, tpad
from tpad_jax.nn.gather import totals
from tpad_jax.types import Batch

MOST = 2**15 - 1  # items of a chunk: two counts share one int32
LANES = 256  # a product of whole multiples of these items computes all of them alike


class Bound(NamedTuple):
    """The models of a scorer: one recommender, or several whose scores are added.

    Attributes:
      specs: of each recommender.
      params: of each, nested and complete.
      near: of each, its rows of the graphs over items, or {}.
      z: float32 [V+1, D]. The item vectors of all recommenders, concatenated, and the columns of
        experts.
      experts: of models/experts.py, {'weights', 'tables'}, or None.
    """

    specs: tuple[tpad.TPAD, ...]
    params: tuple[dict, ...]
    near: tuple[dict, ...]
    z: jnp.ndarray
    experts: dict | None = None


def session_encoder(specs: tuple[tpad.TPAD, ...]) -> Callable:
    """Make the function that encodes sessions: <h, z> is an item's score. Pure.

    The sum of several recommenders' scores is the product of their concatenated vectors.

    Args:
      specs: of each recommender.

    Returns:
      (weights, z [V+1, D], items int32 [B, N]) -> h [B, D]. The context of the prefixes
      (data/events.py) may follow as further columns of `items`. `weights` is a pair: for each spec
      ({'recommender': parameters}, rows of the graphs or {}), and {'weights', 'tables'} of the
      experts, which add columns to h and z, or None.
    """
    def encode(weights, z, items):
        models, rules = weights
        h = jnp.concatenate(_vectors(specs, models, z, items), axis=1)
        items = items[:, :specs[0].encoder.max_length]
        if rules is None:
            return h
        return experts.session_columns(rules, h, z[items][..., h.shape[1] + 1:], items)

    return encode


def _vectors(specs, models, z, items):
    """Return the vectors h [B, D] of sessions by each recommender."""
    parts, begin, item_vectors = [], 0, z[items[:, :specs[0].encoder.max_length]]
    for spec, (params, near) in zip(specs, models, strict=True):
        cut = slice(begin, begin + spec.fusion.width)
        begin = cut.stop
        # only the global graph and the earlier sessions read the others' vectors
        rows = z[:, cut] if tpad.GRAPH[0] in near or spec.events is not None else None
        parts.append(tpad.encode_sessions(spec, params, items, rows, near,
                                          z=item_vectors[..., cut]))
    return parts


def session_shifts(specs: tuple[tpad.TPAD, ...]) -> Callable:
    """Make the function that shifts scores of items in or near the session.

    Args:
      specs: of each recommender.

    Returns:
      (weights, z [V+1, D], items int32 [B, N]) -> items [B, M] and the shifts of their scores
      [B, M], or None without any; arguments as of `session_encoder`. A shift is 0 on padding and
      on all places of an item except one.
    """
    repeats = [i for i, spec in enumerate(specs) if spec.repeats]
    together = [i for i, spec in enumerate(specs) if spec.together]

    def shifts(weights, z, items):
        parts, (models, rules) = [], weights
        items, wide = items[:, :specs[0].encoder.max_length], items
        if repeats:
            parts.append((items, sum(tpad.repeat_shift(specs[i], models[i][0], items)
                                     for i in repeats)))
        if together:  # all of them read the same rows, so their items have the same places
            each = [tpad.company_shift(specs[i], models[i][1], items) for i in together]
            parts.append((each[0][0], sum(shift for _, shift in each)))
        if remembering := [i for i, (params, _) in enumerate(models)
                           if 'memory' in params['recommender']]:
            from tpad_jax.models import memory  # only where there is one

            h = _vectors(specs, models, z, wide)  # compiled once with those of the encoder
            parts += [memory.shifts(models[i][0]['recommender']['memory'], h[i], specs[i].memory)
                      for i in remembering]
        moved = tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)) or None
        if remembering:  # it may retrieve an item that another shift moves, too
            ids, sums, last = totals(*moved)
            moved = ids, jnp.where(last, sums, 0)
        if rules is None:
            return moved
        ids, shares = experts.evidence(rules['tables'], items, moved)
        return ids, experts.shift(rules['weights'], shares)

    return shifts


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
      (params, catalogue, mixture) -> scorer: prefixes int32 [B, N] -> scores float32 [B, V+1]. The
      mixture is of `experts.mixture`, or None. The scorer has `ranks`: (items [R, N], target [R],
      *, rows, name, power) -> (above, equal) int32 [R] and, with a power, nll, see `ranker`,
      and `bound`, a `Bound`.
    """
    several = isinstance(specs, tuple)
    specs = specs if several else (specs,)

    @partial(compiled, precision=devices.precision)
    def table(params, catalogues):
        return jnp.concatenate([tpad.z_table(spec, *inputs) for spec, *inputs in
                                zip(specs, params, catalogues, strict=True)], axis=1)

    encode, shifts = session_encoder(specs), session_shifts(specs)

    @partial(compiled, precision=devices.precision, seldom=True)  # see metrics.HELD
    def score(weights, z, items):
        scores = encode(weights, z, items) @ z.T
        if (moved := shifts(weights, z, items)) is not None:
            at, shift = moved
            scores = scores.at[jnp.arange(len(items))[:, None], at].add(shift)
        return scores.at[:, 0].set(0)

    rank = ranker(encode, devices, shifts=shifts)

    def bind(params, catalogue, mixture=None):
        every, catalogues = (params, catalogue) if several else ((params,), (catalogue,))
        recommenders = tuple({'recommender': tree['recommender']} for tree in every)
        z = table(recommenders, catalogues)
        near = tuple({n: rows[n] for n in tpad.GRAPHS if n in rows} for rows in catalogues)
        rules = None
        if mixture is not None:
            rules, columns = mixture
            z = jnp.concatenate([z, columns], axis=1)
        weights = tuple(zip(recommenders, near, strict=True)), rules

        def scores(items):
            return np.asarray(score(weights, z, jnp.asarray(items)))

        scores.ranks = partial(rank, weights, z)
        scores.bound = Bound(specs, every, near, z, rules)
        # what `Rows.read_by` gives it next to the prefixes
        scores.reads = 'context' if any(spec.events is not None for spec in specs) else None
        return scores

    return bind


@lru_cache(maxsize=4)
def transfer_scorer(spec: tpad.TPAD, devices: Devices, fresh: frozenset = frozenset()) -> Callable:
    """Make the function that binds parameters to a scorer of the Transfer-MLLM alone [ours].

    It measures the Transfer-MLLM without a recommender; T reads the whole prefix. See `_ranked` of
    outputs.py for an item's score.

    Args:
      spec: of the model.
      devices: that `ranks` counts on.
      fresh: {'r'}: r are A of the catalogue's k. Empty: the catalogue's r are read.

    Returns:
      (params, catalogue) -> scorer as of `scorer`, without `bound`.
    """
    def forward(name, weights, items):
        params, catalogue = weights
        here, rows = items > 0, jnp.arange(len(items))
        batch = Batch(items=items, next=items, target=items[:, 0], valid=here[:, 0], row=rows)
        return outputs.forward(spec, params, batch, catalogue, frozenset({name}), fresh)[name]

    def encode(weights, z, items):
        del z
        return forward('teach.last', weights, items)

    table = compiled(partial(forward, 'teach.z'), precision=devices.precision)
    rank = ranker(encode, devices)

    @partial(compiled, precision=devices.precision, seldom=True)  # see metrics.HELD
    def score(weights, z, items):
        return (encode(weights, z, items) @ z.T).at[:, 0].set(0)

    def bind(params, catalogue):
        weights = ({n: x for n, x in params.items() if n != 'recommender'}, {
            n: catalogue[n] for n in ('k', 'r', 'warm', 'popularity', 'codes', 'words')
            if n in catalogue.keys() - fresh})
        z = table(weights, jnp.zeros((1, 1), jnp.int32))

        def scores(items):
            return np.asarray(score(weights, z, jnp.asarray(items)))

        scores.ranks = partial(rank, weights, z)
        return scores

    return bind


def ranker(encode: Callable, devices: Devices, *, shifts: Callable | None = None,
           chunk: int = 0) -> Callable:
    """Make a function that ranks targets in the catalogue as `metrics.counts` of the scores does.

    Args:
      encode: (weights, z, items int32 [B, N]) -> h float32 [B, D]; an item's score is <h, z_v>.
      devices: rows are distributed over them; encode is compiled once per size of a part.
      shifts: (weights, z, items) -> items int32 [B, M] and float32 [B, M], added to their scores.
        The shift is 0 on padding and on all places of an item except one. None: no shifts.
      chunk: items at a time, at most 32,767. 0: on a CPU 2**18 divided by a part's rows, at least
        1,024; elsewhere the largest number.

    Returns:
      rank(weights, z, items, target, *, rows=512, name='model', power=None) -> (above, equal) int32
      [R]: the numbers of items that score above the target and that score the same, itself
      included. With a `power` also nll float32 [R], the negative log of the target's share in a
      softmax of power * score over the whole catalogue.
      `weights` is any tree, z float32 [V+1, D] with padding in row 0, items int32 [R, N] and target
      int32 [R], ids 1..V. `rows` of them are ranked at a time. It raises FloatingPointError, with
      `name`, where a score is not finite.
    """

    def part(_, batch, shared, *, axis):
        h = encode(shared['weights'], shared['z'], batch.items)
        fits = max(1024, 2**18 // len(h)) if jax.default_backend() == 'cpu' else MOST
        moved = shifts(shared['weights'], shared['z'], batch.items) if shifts else None
        counted = count(h, shared['z'], batch.target, chunk=chunk or fits, moved=moved,
                        power=shared['power'])
        # the score of a row is certainly finite where the product of the norms is
        out = *counted, jnp.isfinite(jnp.sqrt((h ** 2).sum(axis=1)) * shared['largest'])
        return tuple(collectives.gather(x, axis) for x in out)

    lifted = devices.lift(part)

    def rank(weights, z, items, target, *, rows=512, name='model', power=None):
        rows = -(-rows // devices.shards) * devices.shards  # as many on each device
        shared = devices.share({'weights': weights, 'z': z, 'largest': largest(z),
                                'power': jnp.float32(0 if power is None else power)})
        calls = []
        for begin in range(0, len(items), rows):
            part = np.minimum(np.arange(begin, begin + rows), len(items) - 1)  # the last row fills
            batch = dict(items=items[part], next=np.zeros_like(items[part]), target=target[part],
                         valid=np.ones(rows, bool), row=np.zeros(rows, np.int32))
            # calls are queued; the host waits for results only at the end
            calls.append(lifted({}, devices.place(batch), shared))
        above, equal, nll, finite = (np.concatenate(parts)[:len(items)]
                                for parts in zip(*jax.device_get(calls), strict=True))
        for row in np.flatnonzero(~finite):
            h = np.asarray(encode(weights, z, items[row:row + 1]))
            with np.errstate(over='ignore', invalid='ignore'):
                metrics.check_finite(h @ np.asarray(z).T, row, name)
        return (above, equal) if power is None else (above, equal, nll)

    return rank


def count(h, z, target, *, chunk: int, moved=None, power=1.0):
    """Count the items above and equal to each row's target, and its likelihood. Pure.

    The target has to be compared by its score in the row, which may differ in the last bit from the
    same product computed alone. So the score is guessed by such a product, all items are counted
    against the guess, and the target's score is read where it occurs. If the guess is wrong in any
    row, all items are counted again.

    Args:
      h: float32 [B, D].
      z: float32 [V+1, D]. Row 0 is not ranked.
      target: int32 [B].
      chunk: items at a time, at most MOST.
      moved: (items int32 [B, M], shifts of their scores [B, M]), or None.
      power: float32 []. Factor of the scores in the likelihood. 0: no likelihood is computed.

    Returns:
      above, equal: int32 [B]. A row with a score that is not finite has no meaning.
      nll: float32 [B]. The log of the sum of exp(power * score) over the items, less that of the
        target. Without meaning where `power` is 0.
    """
    total = len(z)
    chunk = _even(total, min(max(chunk, len(h)), MOST))
    place, nothing = jnp.arange(chunk), jnp.zeros(len(h), jnp.int32)
    wanted, lift = target[:, None], 0.0
    if moved is not None:
        items, shift = moved
        wanted = jnp.concatenate([wanted, items], axis=1)
        lift = jnp.where(items == target[:, None], shift, 0).sum(axis=1)

    def body(k, carry):
        score, seen, above, level, top, share = carry
        start = jnp.minimum(k * chunk, total - chunk)
        s = h @ jax.lax.dynamic_slice(z, (start, 0), (chunk, z.shape[1])).T
        at = wanted - start
        value = jnp.take_along_axis(s, jnp.clip(at, 0, chunk - 1), axis=1)
        seen = jnp.where((at >= 0) & (at < chunk), value, seen)
        # the last chunk overlaps items that were counted before; item 0 never counts
        new = jnp.where(start + place >= jnp.maximum(k * chunk, 1), -1, 0)
        # both counts in one sum take half the time of two sums
        bar = (score + lift)[:, None]
        code = (s > bar) + (s >= bar) * jnp.int32(2**16)
        code = (code & new).sum(axis=1)
        # the partition costs as much as the counts
        top, share = jax.lax.cond(power > 0, grown, lambda _, new, *old: old, s, new, top, share)
        return score, seen, above + code % 2**16, level + code // 2**16, top, share

    def grown(s, new, top, share):
        logits = jnp.where(new < 0, power * s, -jnp.inf)
        peak = jnp.maximum(top, logits.max(axis=1))
        return peak, share * jnp.exp(top - peak) + jnp.exp(logits - peak[:, None]).sum(axis=1)

    def again(carry):
        number, score, seen, *_ = carry
        return (number < 2) & (score != seen[:, 0]).any()

    def once(carry):
        number, _, seen, *_ = carry
        first = seen[:, 0], seen, nothing, nothing, *empty
        return number + 1, *jax.lax.fori_loop(0, -(-total // chunk), body, first)

    empty = jnp.full(len(h), -jnp.inf), jnp.zeros(len(h))
    few = -(-len(h) // LANES) * LANES
    guess = jnp.diagonal(h @ z[jnp.resize(target, few)].T)
    guess = jnp.broadcast_to(jnp.resize(guess, len(h))[:, None], wanted.shape)
    _, score, seen, above, level, top, share = jax.lax.while_loop(
        again, once, (0, jnp.full(len(h), jnp.nan), guess, nothing, nothing, *empty))
    if moved is not None:  # these items were counted by their scores without the shift
        was, bar = seen[:, 1:], (score + lift)[:, None]
        now = was + shift
        above += (now > bar).sum(axis=1) - (was > bar).sum(axis=1)
        level += (now >= bar).sum(axis=1) - (was >= bar).sum(axis=1)
        logits = power * jnp.stack([now, was]) - top[:, None]
        share += jnp.subtract(*jnp.exp(logits)).sum(axis=1)
    nll = top + jnp.log(jnp.maximum(share, 1e-12)) - power * (score + lift)
    return above, level - above, nll


def _even(total, most):
    """Choose the items of a chunk, at most `most`: equal parts, whole multiples of LANES.

    A product computes the items after the last whole lane by another loop. Its last bits may differ
    from the guess, and then all items are counted again.
    """
    most = most // LANES * LANES or most
    even = -(-total // -(-total // most))
    return min(-(-even // LANES) * LANES, most, total)


@jax.jit
def largest(z):
    """Compute the largest norm of an item vector; not finite if a vector is not. [V+1, D] -> []."""
    return jnp.sqrt((z[1:] ** 2).sum(axis=1).max())

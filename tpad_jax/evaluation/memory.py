"""Makes the memory of a trained recommender, see models/memory.py.

The gate learns on training prefixes, each with its own session left out, and the strength on
validation, which no session of the memory is of.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from tpad_jax.data import sessions
from tpad_jax.data.sessions import Rows, Sessions
from tpad_jax.distributed.devices import compiled
from tpad_jax.evaluation import metrics
from tpad_jax.models import memory as lookup, tpad
from tpad_jax.nn.linear import unit

ENTRIES = 2**18  # of a memory at most, the latest
ROWS = 256  # prefixes at a time
QUERIES, STEPS, RATE = 8192, 200, 3e-3  # training prefixes that the gate learns from
CELLS, LEAST = 2**22, 512  # scores that the strength is fitted on, or those of LEAST rows


def remembered(spec: tpad.TPAD, params: dict, catalogue: dict, train: Sessions, valid: Rows,
               scorer: metrics.Scorer, *, fitted: dict | None = None, seed: int = 0) -> dict:
    """Make the memory of a trained recommender.

    Args:
      spec: its modules.
      params: nested.
      catalogue: rows per item.
      train: S training sessions, the memory.
      valid: validation rows.
      scorer: of the recommender, without a memory.
      fitted: a memory whose strength and floor are taken. None: validation chooses them.
      seed: of all draws.
    """
    encode = encoder(spec, params, catalogue)
    out = entries(encode, train, spec.encoder.max_length)
    out['gate'] = gate(out, spec.memory, seed=seed)
    if fitted:
        return out | {name: fitted[name] for name in ('strength', 'floor')}
    items = len(catalogue['warm']) - 1
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(valid.target))
    rows = valid.take(drawn[:max(LEAST, CELLS // items)])
    scores = np.concatenate([
        part for _, part in metrics.scored(scorer, rows.read_by(scorer), items)])
    return out | strength(out, spec.memory, scores, encode(rows.items), rows.target)


def encoder(spec: tpad.TPAD, params: dict, catalogue: dict) -> Callable:
    """Make the function that encodes prefixes int32 [R, N] as float32 [R, D] of length one."""
    params = {'recommender': params['recommender']}
    z = compiled(partial(tpad.z_table, spec))(params, catalogue)
    encode = compiled(lambda params, catalogue, z, items: unit(
        tpad.encode_sessions(spec, params, items, z, catalogue)))
    return partial(by_part, partial(encode, params, catalogue, z))


def entries(encode: Callable, train: Sessions, longest: int) -> dict:
    """Make the entries of a memory: 'h', 'next' and 'session'.

    Args:
      encode: of `encoder`.
      train: S sessions.
      longest: items of a prefix.
    """
    rows = sessions.rows(train, longest).take(slice(-ENTRIES, None))
    return {'h': jnp.asarray(encode(rows.items)), 'next': jnp.asarray(rows.target),
            'session': jnp.asarray(rows.session)}


def gate(memory: dict, most: int, *, seed: int = 0) -> dict:
    """Train a gate by the binary cross entropy of g against next_m = target [paper].

    Args:
      memory: of `entries`. Its entries are the queries, too, each without its own session.
      most: entries that a prefix retrieves.
      seed: of the queries and of the first parameters.

    Returns:
      Parameters of models.memory.GATE.
    """
    rng, total = np.random.default_rng(seed), len(memory['next'])
    drawn = np.resize(rng.permutation(total), -(-min(QUERIES, total) // ROWS) * ROWS)
    find = compiled(partial(lookup.nearest, most=most))
    parts = [(part, *find(memory, memory['h'][part], session=memory['session'][part]))
             for part in np.split(drawn, len(drawn) // ROWS)]
    width = memory['h'].shape[1] + 2
    params = lookup.GATE.init(jax.random.key(seed), jnp.zeros((1, width)))['params']
    tx = optax.adamw(optax.cosine_decay_schedule(RATE, STEPS), weight_decay=0.01)

    def loss(gate, memory, part, entry, cosine, age):
        right = memory['next'][entry] == memory['next'][part][:, None]
        there = jnp.isfinite(cosine)
        logits = lookup.logits(memory | {'gate': gate}, memory['h'][part], entry, cosine, age)
        each = optax.sigmoid_binary_cross_entropy(jnp.where(there, logits, 0), right)
        return jnp.where(there, each, 0).sum() / there.sum()

    @compiled
    def step(params, state, *inputs):
        updates, state = tx.update(jax.grad(loss)(params, *inputs), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for place in rng.integers(len(parts), size=STEPS):
        params, state = step(params, state, memory, *parts[place])
    return params


def strength(memory: dict, most: int, scores: np.ndarray, h: np.ndarray, target: np.ndarray
             ) -> dict:
    """Fit strength and floor by the likelihood of validation, at a free temperature.

    Args:
      memory: with its gate, or without one.
      most: entries that a prefix retrieves.
      scores: float32 [R, V+1]. Of the recommender without a memory.
      h: float32 [R, D]. Vectors of the prefixes.
      target: int32 [R].

    Returns:
      {'strength', 'floor'}.
    """
    find = compiled(partial(lookup.evidence, most=most))
    items, sums = by_part(lambda h: find(memory, h), h)
    # the evidence of a retrieved item, on average, is where the shift begins to grow slowly
    start = np.array([0.3, np.log(sums[sums > 0].mean()), 0])

    def loss(x, scores, items, sums, target):
        row, power = jnp.arange(len(scores)), jnp.exp(x[2])
        shift = x[0] * jnp.log1p(sums * jnp.exp(-x[1]))
        logits = (power * scores.at[row[:, None], items].add(shift)).at[:, 0].set(-jnp.inf)
        nll = jax.nn.logsumexp(logits, axis=1) - logits[row, target]
        return nll.sum() + ((x - start) ** 2).sum() / 2  # a small validation stays near the start

    slope = compiled(jax.value_and_grad(loss))
    best = scipy.optimize.minimize(
        lambda x: [np.asarray(value, float) for value in slope(x, scores, items, sums, target)],
        start, jac=True, method='L-BFGS-B', bounds=[(0, None), (None, None), (None, None)]).x
    return {'strength': jnp.float32(best[0]), 'floor': jnp.float32(np.exp(best[1]))}


def by_part(read, x):
    """Call read(part) with ROWS rows at a time; the last part is filled up."""
    parts = np.split(np.resize(x, (-(-len(x) // ROWS) * ROWS, *x.shape[1:])), -(-len(x) // ROWS))
    return jax.tree.map(lambda *out: np.concatenate(out)[:len(x)], *(read(part) for part in parts))

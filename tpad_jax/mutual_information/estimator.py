"""Mutual information of two features from pairs alone, in nats, with an error and a warning.

A critic is fitted to one part of the pairs. All estimates come from pairs it never saw, because a
bound of training pairs is not a bound.

    >>> import jax, numpy as np
    >>> from tpad_jax.mutual_information import estimate
    >>> x, noise = np.random.default_rng(0).normal(size=(2, 8000, 2)).astype('float32')
    >>> result = estimate(jax.random.key(0), x, 0.8 * x + 0.6 * noise, bound='nwj', steps=500)
    >>> round(result.value, 1)  # -ln(1 - 0.8 ** 2) = 1.02
    1.0

`fit` and `report` are its two halves, for a critic that several bounds read.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tpad_jax.core.precision import exact_products
from tpad_jax.errors import refuse_if
from tpad_jax.mutual_information import bounds
from tpad_jax.mutual_information.critics import KINDS, Critic, GaussianQ, Score
from tpad_jax.mutual_information.held_out import BOUNDS, UPPER, Estimate, Settings, in_batch, report

# The objective that trains a critic before a bound reads it. NWJ reads MINE's critic plus a
# constant from training pairs. SMILE reads jsd's, as its authors do. q is fitted by its likelihood.
OBJECTIVE = {'infonce': 'infonce', 'mine': 'mine', 'nwj': 'mine', 'jsd': 'jsd', 'smile': 'jsd',
             'vclub': 'likelihood', 'l1out': 'likelihood'}
CLIP = 1.0  # largest norm of a gradient
DECAY = 0.9  # of MINE's moving average
CHECKS = 40  # points of the curve
SCALES = 1.0, 8.0, 64.0  # at which a critic reads standardised columns, see `Critic.scales`


def estimate(key, x, y, *, bound='infonce', critic='separable', **settings) -> Estimate:
    """Fit a critic to one part of the pairs and report a bound of I(x; y) on another.

    Args:
      key: a typed key of the split, the first parameters and the batches.
      x: float [P, I]. Independent pairs in rows. Columns are standardised.
      y: float [P, J].
      bound: one of BOUNDS. LOWER and UPPER are bounds in expectation, NEITHER are estimates.
      critic: one of critics.KINDS, or a linen module (x, y) -> scores. For UPPER it is q: another
        module than GaussianQ, or any name for GaussianQ.
      **settings: fields of `Settings`.

    Raises:
      InputError: the bound or critic is unknown, the arrays do not fit, or there are too few pairs.
    """
    s = Settings(**settings)
    x, y = _checked(x, y, bound, s)
    fitted = module(bound, critic, s.hidden, s.width)
    split, train = jax.random.split(key)
    order = np.asarray(jax.random.permutation(split, len(x)))
    fresh, choose, rest = np.split(order, np.cumsum(
        [int(s.held_out * len(x)), int(0.1 * (1 - s.held_out) * len(x))]))
    x, y = (_standard(part, part[rest]) for part in (x, y))
    pairs = {'train': (x[rest], y[rest]), 'check': (x[choose], y[choose])}
    score, curve = fit(train, pairs, OBJECTIVE[bound], fitted, s)
    seen = tuple(part[rest[:len(fresh)]] for part in (x, y))
    return report(bound, score, x[fresh], y[fresh], seen=seen, curve=curve, **settings)


def module(bound, critic, hidden, width):
    """Return the linen module of a critic's name. A module is returned unchanged."""
    if isinstance(critic, nn.Module):
        return critic
    refuse_if(critic not in KINDS, f'critic={critic!r}: unknown critic. Expected a linen module or '
              f'one of {", ".join(KINDS)}. Fix: choose one of these')
    if bound in UPPER:
        return GaussianQ(hidden, limit=10.0)
    return Critic(critic, width, hidden, normalise=False, scales=SCALES)


def from_pairs(key, data, step, batch):
    """Take the next rows of arrays: the default `draw` of `fit`.

    A batch never has a row twice, because a repeated row would be a joint pair among the negatives.
    Every point of the curve starts a new order.
    """
    del key
    at = step % (len(data['train'][0]) // batch) * batch
    return tuple(jax.lax.dynamic_slice_in_dim(part, at, batch) for part in data['train'])


@partial(jax.jit, static_argnames=('objective', 'critic', 'settings', 'draw'))
@exact_products
def fit(key, data, objective: str, critic: nn.Module, settings: Settings,
        draw: Callable = from_pairs):
    """Train a critic as one compiled program.

    Args:
      key: a typed key of all draws.
      data: {'check': (x, y), ...}. 'check' draws the curve, and `draw` reads the rest. Pairs under
        'train' are shuffled for every point of the curve.
      objective: 'infonce', 'mine', 'jsd' or 'likelihood'.
      critic: the module.
      settings: how to train.
      draw: (key, data, step, batch) -> x [batch, I], y [batch, J].

    Returns:
      The Score at the best step on data['check'], and the curve {'step', 'value'}.
    """
    first, keys = jax.random.split(key)
    check = data['check']
    params = critic.init(first, *(part[:2] for part in check))['params']
    steps, warmup = settings.steps, settings.steps // 20 + 1
    each = max(steps // CHECKS, 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup,
                                              max(steps, warmup + 1))
    tx = optax.chain(optax.clip_by_global_norm(CLIP),
                     optax.adamw(rate, weight_decay=settings.weight_decay))

    def loss(params, pairs, average):
        return _loss(objective, Score(critic, params), *pairs, average)

    def step(data, carry, number):
        params, opt, average = carry
        pairs = draw(keys, data, number, settings.batch)
        grads, average = jax.grad(loss, has_aux=True)(params, pairs, average)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt, average), None

    def stretch(carry, start):
        inner, best, best_params = carry
        mixed = dict(data)
        if 'train' in data:
            order = jax.random.permutation(jax.random.fold_in(keys, start), len(data['train'][0]))
            mixed['train'] = tuple(part[order] for part in data['train'])
        inner, _ = jax.lax.scan(partial(step, mixed), inner, start + jnp.arange(each))
        value = -loss(inner[0], check, jnp.float32(-jnp.inf))[0]
        best_params = jax.tree.map(lambda new, old: jnp.where(value > best, new, old), inner[0],
                                   best_params)
        return (inner, jnp.maximum(value, best), best_params), value

    starts = jnp.arange(0, max(steps // each, 1)) * each
    begin = (params, tx.init(params), jnp.float32(-jnp.inf))
    (_, _, best_params), values = jax.lax.scan(stretch, (begin, -jnp.inf, params), starts)
    return Score(critic, best_params), {'step': starts + each, 'value': values}


def _loss(objective, score, x, y, average):
    """Return the value to minimise and MINE's moving average."""
    if objective == 'likelihood':
        return -score.own(x, y).mean(), average
    scores, own, negative = in_batch(score, x, y)
    if objective == 'mine':
        rows = bounds.log_rows(scores, own, negative)
        corrected, average = bounds.moving_partition(bounds.partition(rows), average, DECAY,
                                                     most=1.0)
        return -(rows.own - corrected).mean(), average
    return -getattr(bounds, objective)(scores, own, negative).mean(), average


def _standard(x, by):
    return ((x - by.mean(axis=0)) / (by.std(axis=0) + 1e-6)).astype(np.float32)


def _checked(x, y, bound, s):
    """Return arrays that can be split.

    Raises:
      InputError: an argument is unusable.
    """
    x, y = (np.asarray(part, np.float32) for part in (x, y))
    refuse_if(bound not in BOUNDS, f'bound={bound!r}: unknown bound. Expected one of '
              f'{", ".join(BOUNDS)}. Fix: choose one of these')
    refuse_if(x.ndim != 2 or y.ndim != 2 or len(x) != len(y), f'x {x.shape}, y {y.shape}: these '
              'are not pairs in rows. Expected [P, I] and [P, J]. Fix: reshape them')
    refuse_if(not (np.isfinite(x).all() and np.isfinite(y).all()),
              'x, y: some are not finite. Expected finite numbers. Fix: drop these rows')
    least = int(np.ceil(2 * s.batch / min(s.held_out, 0.9 * (1 - s.held_out)))) + 1
    refuse_if(not 0 < s.held_out < 1 or len(x) < least, f'x, y: {len(x)} pairs are too few for '
              f'held_out={s.held_out}, batch={s.batch}. Expected at least {least}. Fix: add pairs, '
              'or lower batch')
    return x, y

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
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import stdtrit  # scipy.stats takes a second to import

from tpad_jax.core.precision import exact_products
from tpad_jax.errors import refuse_if
from tpad_jax.mutual_information import bounds
from tpad_jax.mutual_information.critics import KINDS, Critic, GaussianQ, Score

LOWER, UPPER, NEITHER = ('infonce', 'mine', 'nwj'), ('vclub', 'l1out'), ('jsd', 'smile')
BOUNDS = (*LOWER, *UPPER, *NEITHER)
ROOM = 1.0  # nats below log N from which InfoNCE saturates
NOISE = 0.1  # deviation of the log partition from which its bounds are unreliable
FITS = 0.25  # largest relative error of the squares and fourth powers of q's residuals
# The objective that trains a critic before a bound reads it. NWJ reads MINE's critic plus a
# constant from training pairs. SMILE reads jsd's, as its authors do. q is fitted by its likelihood.
OBJECTIVE = {'infonce': 'infonce', 'mine': 'mine', 'nwj': 'mine', 'jsd': 'jsd', 'smile': 'jsd',
             'vclub': 'likelihood', 'l1out': 'likelihood'}
CLIP = 1.0  # largest norm of a gradient
DECAY = 0.9  # of MINE's moving average
CHECKS = 40  # points of the curve
SCALES = 1.0, 8.0, 64.0  # at which a critic reads standardised columns, see `Critic.scales`


class Estimate(NamedTuple):
    """The value of a bound on pairs that no critic saw.

    Attributes:
      bound: its name.
      value: in nats.
      error: standard error in nats.
      interval: (low, high) at `level`.
      level: of the interval.
      pairs: number of fresh pairs.
      curve: {'step', 'value'}. The objective during training, on pairs that are not trained on.
      warning: reason to doubt the value, or ''.
      score: the critic.
      likelihood: q's mean log-likelihood on the same pairs, nats per pair, or None.
    """

    bound: str
    value: float
    error: float
    interval: tuple[float, float]
    level: float
    pairs: int
    curve: dict
    warning: str
    score: Score
    likelihood: float | None = None


@dataclass(frozen=True)
class Settings:
    """Options of `estimate` and `report`.

    Attributes:
      hidden: of the critic's MLPs.
      width: of the outputs of the critic's MLPs.
      batch: pairs per step, and per batch of InfoNCE and L1Out.
      steps: of training.
      learning_rate: at its peak.
      weight_decay: of AdamW.
      held_out: share of the pairs that the estimate reads. A tenth of the others draws the curve
        and selects the best step.
      level: of the interval.
      clip: of SMILE.
      chunk: pairs whose scores with all others exist at a time.
    """

    hidden: int = 256
    width: int = 64
    batch: int = 256
    steps: int = 4000
    learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    held_out: float = 0.3
    level: float = 0.95
    clip: float = 5.0
    chunk: int = 1024


def estimate(key, x, y, *, groups=None, bound='infonce', critic='separable',
             **settings) -> Estimate:
    """Fit a critic to one part of the pairs and report a bound of I(x; y) on another.

    Args:
      key: a typed key of the split, the first parameters and the batches.
      x: float [P, I]. Pairs in rows. Columns are standardised.
      y: float [P, J].
      groups: [P]. Pairs with the same value, such as positions of one session, depend on each
        other. They are in the same part, are never negatives of each other, and are left out
        together for the error. None: all pairs are independent.
      bound: one of BOUNDS. LOWER and UPPER are bounds in expectation, NEITHER are estimates.
      critic: one of critics.KINDS, or a linen module (x, y) -> scores. For UPPER it is q: another
        module than GaussianQ, or any name for GaussianQ.
      **settings: fields of `Settings`.

    Raises:
      InputError: the bound or critic is unknown, the arrays do not fit, or there are too few pairs.
    """
    s = Settings(**settings)
    x, y, group = _checked(x, y, groups, bound, s)
    fitted = module(bound, critic, s.hidden, s.width)
    split, train = jax.random.split(key)
    place = np.argsort(np.asarray(jax.random.permutation(split, group.max() + 1)))[group]
    order = np.argsort(place, kind='stable')  # group after group
    place = place[order]
    ends = np.cumsum([int(s.held_out * len(x)), int(0.1 * (1 - s.held_out) * len(x))])
    fresh, choose, rest = np.split(order, np.searchsorted(place, place[ends]))
    x, y = (_standard(part, part[rest]) for part in (x, y))
    parts = (x, y) if groups is None else (x, y, group)
    pairs = {'train': tuple(part[rest] for part in parts),
             'check': tuple(part[choose] for part in parts)}
    score, curve = fit(train, pairs, OBJECTIVE[bound], fitted, s)
    seen = tuple(part[rest[:len(fresh)]] for part in (x, y, group))
    return report(bound, score, x[fresh], y[fresh], groups=group[fresh], seen=seen, curve=curve,
                  **settings)


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
        'train' are shuffled for every point of the curve. A third array holds their groups.
      objective: 'infonce', 'mine', 'jsd' or 'likelihood'.
      critic: the module.
      settings: how to train.
      draw: (key, data, step, batch) -> x [batch, I], y [batch, J], and groups [batch] or nothing.

    Returns:
      The Score at the best step on data['check'], and the curve {'step', 'value'}.
    """
    first, keys = jax.random.split(key)
    check = data['check']
    params = critic.init(first, *(part[:2] for part in check[:2]))['params']
    steps, warmup = settings.steps, settings.steps // 20 + 1
    each = max(steps // CHECKS, 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup,
                                              max(steps, warmup + 1))
    tx = optax.chain(optax.clip_by_global_norm(CLIP),
                     optax.adamw(rate, weight_decay=settings.weight_decay))

    def loss(params, pairs, average):
        return _loss(objective, Score(critic, params), *pairs, average=average)

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


def _loss(objective, score, x, y, group=None, *, average):
    """Return the value to minimise and MINE's moving average."""
    if objective == 'likelihood':
        return -score.own(x, y).mean(), average
    scores, own, negative = _in_batch(score, x, y, group)
    if objective == 'mine':
        rows = bounds.log_rows(scores, own, negative)
        corrected, average = bounds.moving_partition(bounds.partition(rows), average, DECAY,
                                                     most=1.0)
        return -(rows.own - corrected).mean(), average
    return -getattr(bounds, objective)(scores, own, negative).mean(), average


def _standard(x, by):
    return ((x - by.mean(axis=0)) / (by.std(axis=0) + 1e-6)).astype(np.float32)


def _checked(x, y, groups, bound, s):
    """Return arrays that can be split, groups as numbers from 0.

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
    group = np.arange(len(x)) if groups is None else _numbered(groups, len(x))
    largest = np.bincount(group).max(initial=0)
    refuse_if(groups is not None and largest > s.batch / 8, f'groups: one has {largest} pairs. '
              f'Expected at most an eighth of batch={s.batch}. Fix: raise batch, or split it')
    least = int(np.ceil((2 * s.batch + largest - 1) / min(s.held_out, 0.9 * (1 - s.held_out)))) + 1
    refuse_if(not 0 < s.held_out < 1 or len(x) < least, f'x, y: {len(x)} pairs are too few for '
              f'held_out={s.held_out}. Expected at least {least}. Fix: add pairs or lower batch')
    return x, y, group


def _numbered(groups, count):
    """Number the groups of pairs from 0: int32 [count]."""
    refuse_if(np.shape(groups) != (count,), f'groups {list(np.shape(groups))}: expected one for '
              f'each of the {count} pairs. Fix: reshape them')
    return np.unique(groups, return_inverse=True)[1].astype(np.int32)


def report(bound, score, x, y, *, groups=None, seen=None, curve=None, **settings) -> Estimate:
    """Compute a bound of I(x; y) with a fitted critic on fresh pairs.

    InfoNCE and L1Out are means over batches, and their error is that of the batches' mean. The
    other bounds take product samples from all n (n - 1) off-diagonal pairs, those within a group
    excepted. These pairs share points, so they are not independent. The error is that of the
    jackknife, which omits a pair, or a group of pairs, with its rows and columns. It is
    conservative for such a U-statistic (Efron and Stein 1981).

    Where the partition is a mean of exp(score), rare pairs dominate it, and a sample may miss them
    without a trace. The joint pairs visit that region. Their mean of exp(score) is the variance of
    the partition at the best critic [ours], and it is added to the square of the error.

    Args:
      bound: one of BOUNDS.
      score: the critic, (x, y) -> scores.
      x: float [n, I].
      y: float [n, J].
      groups: see `estimate`. Batches hold whole groups where those of a group are neighbours.
      seen: training pairs (x, y) or (x, y, groups). Their partition is NWJ's constant.
      curve: of `fit`.
      **settings: fields of `Settings`.
    """
    s = Settings(**settings)
    batch, level = s.batch, s.level
    group = np.arange(len(x), dtype=np.int32) if groups is None else _numbered(groups, len(x))
    if bound in ('infonce', 'l1out'):
        values = np.asarray(_in_batches(bound, score, x, y, group, batch), np.float64)
        value, error, noise = values.mean(), values.std(ddof=1) / len(values)**0.5, 0.0
        freedom = len(values) - 1
    else:
        value, error, noise = _paired(bound, score, x, y, group, seen, s)
        freedom = group.max()
    reach = error * stdtrit(freedom, 0.5 + level / 2)
    likelihood, warning = None, ''
    if bound in UPPER and isinstance(score, Score):
        likelihood, warning = _likelihood(score, x, y)
    elif bound in NEITHER:
        warning = f'{bound} does not bound the information; use it to train a critic'
    elif bound == 'infonce' and value > np.log(batch) - ROOM:
        warning = (f'InfoNCE in batches of {batch} reads at most {np.log(batch):.2f} nats: the '
                   'information may be much larger; choose a larger batch, mine or nwj')
    elif noise > NOISE:
        warning = (f'rare pairs dominate the partition: {bound} may be wrong by {noise:.2f} nats; '
                   'use more pairs, or infonce')
    curve = {name: np.asarray(values) for name, values in (curve or {}).items()}
    interval = float(value - reach), float(value + reach)
    return Estimate(bound, value, error, interval, level, len(x), curve, warning, score, likelihood)


def _in_batch(score, x, y, group=None):
    """Score a batch. Every pair of two groups is a negative."""
    rows = jnp.arange(len(x))
    group = rows if group is None else group
    return score(x, y), rows, group[:, None] != group


@partial(jax.jit, static_argnames=('bound', 'batch'))
@exact_products
def _in_batches(bound, score, x, y, group, batch):
    def mean(pairs):
        scores, own, negative = _in_batch(score, *pairs)
        return getattr(bounds, bound)(scores.T if bound == 'l1out' else scores, own,
                                      negative).mean()

    count = len(x) // batch
    parts = tuple(part[:count * batch].reshape(count, batch, *part.shape[1:])
                  for part in (x, y, group))
    return jax.lax.map(mean, parts)


def _paired(bound, score, x, y, group, seen, s):
    """Return the value, its standard error and the deviation of the log partition."""
    of = {'smile': 'clipped', 'jsd': 'softplus', 'vclub': 'score'}.get(bound, 'exp')
    own, row, column = (np.asarray(part, np.float64)
                        for part in bounds.off_diagonal(score, x, y, group, of, s.clip, s.chunk))
    n, held = len(own), np.bincount(group)
    count = len(held)
    if bound == 'nwj':
        other, sizes = row, held
        if seen is not None:
            x, y, theirs = (*seen, np.arange(len(seen[0])))[:3]
            theirs = _numbered(theirs, len(x))
            other = np.asarray(bounds.off_diagonal(score, x, y, theirs, 'exp', s.clip, s.chunk)[1],
                               np.float64)
            sizes = np.bincount(theirs)
        shift = np.logaddexp.reduce(other) - np.log(len(other)**2 - (sizes**2).sum())
        own, row, column = own - shift, row - shift, column - shift
    if bound == 'jsd':
        own = -np.logaddexp(0, -own)
    logs, top = of in ('exp', 'clipped'), row.max()
    if logs:
        row, column = np.exp(row - top), np.exp(column - top)
    # of all pairs, then without each group
    sums = row.sum() - np.append(0, np.bincount(group, row + column))
    size = n - np.append(0, held)
    products = size**2 - (held**2).sum() + np.append(0, held**2)
    mean = (own.sum() - np.append(0, np.bincount(group, own))) / size
    rest = (np.maximum(sums, 1e-12 * sums[0]) if logs else sums) / products
    partition = np.log(rest) + top if logs else rest  # of vCLUB and jsd the mean itself
    theta = mean - (np.exp(partition) - 1 if bound == 'nwj' else partition)
    variance = (count - 1) * theta[1:].var()
    noise = 0.0
    if bound in ('mine', 'nwj'):
        # of the log partition, where exp(score) is the ratio of the densities; the pairs of two
        # groups count as one
        missed = np.exp(np.logaddexp.reduce(own) - np.log(n) - partition[0]) / count / (count - 1)
        noise = ((count - 1) * partition[1:].var() + missed)**0.5
        variance += missed * (np.exp(2 * partition[0]) if bound == 'nwj' else 1.0)
    return float(theta[0]), float(variance**0.5), float(noise)


def _likelihood(score, x, y):
    """Return the mean log-likelihood of q on fresh pairs, and reasons to doubt that q is p(y|x)."""
    width = y.shape[1]
    constant = width / 2 * np.log(2 * np.pi)
    mean = float(np.asarray(score.own(x, y), np.float64).mean() - constant)
    alone = float(-constant - 0.5 * (width + np.log(np.var(y, axis=0)).sum()))
    if mean < alone:
        return mean, (f'q is less likely than a Gaussian that does not read x ({mean:.2f} and '
                      f'{alone:.2f} nats per pair): its bounds are invalid')
    if not isinstance(score.module, GaussianQ):
        return mean, ''
    half, centre, _ = np.split(np.asarray(score.factors(x, y)[0], np.float64),
                               [width, 2 * width], axis=1)  # -precision / 2, precision * mean
    square = (y + 0.5 * centre / half)**2 * -2 * half
    spread, tail = square.mean(), (square**2).mean() / square.mean()**2
    if abs(spread - 1) > FITS or abs(tail / 3 - 1) > FITS:
        return mean, (f'q does not fit: its residuals have squares of {spread:.2f}, not 1, and '
                      f'fourth powers of {tail * spread**2:.2f}, not 3; its bounds are invalid')
    return mean, ''

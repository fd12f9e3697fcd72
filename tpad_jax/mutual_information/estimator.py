"""Mutual information of two features from pairs alone, in nats, with an error and a warning.

A critic is fitted on one part of the pairs and every figure is of pairs it never saw: a bound read
off its own training pairs is no bound.

    >>> import jax, numpy as np
    >>> from tpad_jax.mutual_information import estimate
    >>> x, noise = np.random.default_rng(0).normal(size=(2, 8000, 2)).astype('float32')
    >>> found = estimate(jax.random.key(0), x, 0.8 * x + 0.6 * noise, bound='nwj', steps=500)
    >>> round(found.value, 1)  # -ln(1 - 0.8 ** 2) = 1.02
    1.0

`fit` and `report` are its two halves, for a critic that several bounds are to read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from tpad_jax.core.precision import exact_products
from tpad_jax.errors import InputError
from tpad_jax.mutual_information import bounds
from tpad_jax.mutual_information.critics import KINDS, Critic, GaussianQ, Score

LOWER, UPPER, NEITHER = ('infonce', 'mine', 'nwj'), ('vclub', 'l1out'), ('jsd', 'smile')
BOUNDS = (*LOWER, *UPPER, *NEITHER)
# What a critic is trained by before a bound reads it. NWJ reads MINE's, made its own by a constant
# from training pairs; SMILE reads jsd's, as its authors do; q is fitted by its likelihood.
OBJECTIVE = {'infonce': 'infonce', 'mine': 'mine', 'nwj': 'mine', 'jsd': 'jsd', 'smile': 'jsd',
             'vclub': 'likelihood', 'l1out': 'likelihood'}
SCALES = 1.0, 8.0, 64.0  # of what a critic reads of standardised columns, see `Critic.scales`
ROOM = 1.0  # nats below log N, from where on InfoNCE says little
NOISE = 0.1  # of the log partition's deviation, from where on its bounds say little
FITS = 0.25  # by what share squares and fourth powers of q's residuals may be off


class Estimate(NamedTuple):
    """What a bound reads on pairs that no critic saw.

    Attributes:
      bound, value (nats), error (standard), interval (low, high) at `level`.
      pairs: how many it was read on. curve: {'step', 'value'}, the objective during training, on
        pairs that were not trained on. warning: why not to believe the value; '' if nothing speaks
        against it. score: the critic. likelihood: q's mean log-likelihood on the same pairs, nats a
        pair; None where there is no q.
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
class Training:
    """How a critic is fitted; static. `objective`: infonce, mine, jsd or likelihood.

    batch: pairs a step, of which every other one of the batch is a negative. decay: of MINE's
    moving average. checks: how often the curve is read.
    """

    objective: str
    critic: nn.Module
    batch: int = 256
    steps: int = 4000
    learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    clip: float = 1.0
    decay: float = 0.9
    checks: int = 40


def estimate(key, x, y, *, bound='infonce', critic='separable', hidden=256, width=64, batch=256,
             steps=4000, learning_rate=5e-3, weight_decay=1e-4, held_out=0.3, level=0.95, clip=5.0,
             chunk=1024) -> Estimate:
    """Fit a critic on one part of the pairs and report a bound of I(x; y) on another.

    Args:
      key: of the split, the first parameters and the batches.
      x, y: float [P, I], [P, J], independent pairs in rows. Columns are standardised.
      bound: one of BOUNDS; LOWER and UPPER are bounds in expectation, NEITHER are none.
      critic: one of critics.KINDS or a linen module (x, y) -> scores; for UPPER q, a GaussianQ or
        a module of your own, whatever is said here as a kind.
      hidden, width: of its MLPs. batch, steps, learning_rate (peak), weight_decay: see `Training`.
      held_out: share of the pairs the figure is of; a tenth of the others draws the curve and
        chooses the step whose critic is kept.
      level: of the interval. clip: smile's. chunk: pairs whose scores with all others exist at once
        when a partition is taken.

    Raises:
      InputError: an unknown bound or critic, arrays that do not go together, too few pairs.
    """
    x, y = _checked(x, y, bound, batch, held_out)
    fitted = module(bound, critic, hidden, width)
    split, train = jax.random.split(key)
    order = np.asarray(jax.random.permutation(split, len(x)))
    fresh, choose, rest = np.split(order, np.cumsum(
        [int(held_out * len(x)), int(0.1 * (1 - held_out) * len(x))]))
    x, y = (_standard(part, part[rest]) for part in (x, y))
    spec = Training(OBJECTIVE[bound], fitted, batch, steps, learning_rate, weight_decay)
    pairs = {'train': (x[rest], y[rest]), 'check': (x[choose], y[choose])}
    score, curve = fit(train, pairs, spec, from_pairs)
    seen = tuple(part[rest[:len(fresh)]] for part in (x, y))
    return report(bound, score, x[fresh], y[fresh], batch=batch, seen=seen, curve=curve,
                  level=level, clip=clip, chunk=chunk)


def module(bound, critic, hidden, width):
    """The linen module of a critic's name; a module stays what it is."""
    if isinstance(critic, nn.Module):
        return critic
    if critic not in KINDS:
        raise InputError(f'critic={critic!r} is neither a linen module nor one of '
                         f'{", ".join(KINDS)}; name one of these')
    if bound in UPPER:
        return GaussianQ(hidden, limit=10.0)
    return Critic(critic, width, hidden, normalise=False, scales=SCALES)


def from_pairs(key, data, step, batch):
    """`draw` of `fit` from arrays: the next rows, none twice in a batch (a joint pair it would be).

    They are in a new order for every point of the curve.
    """
    del key
    at = step % (len(data['train'][0]) // batch) * batch
    return tuple(jax.lax.dynamic_slice_in_dim(part, at, batch) for part in data['train'])


@partial(jax.jit, static_argnames=('spec', 'draw'))
@exact_products
def fit(key, data, spec: Training, draw: Callable = from_pairs):
    """Train a critic; one compiled program.

    Args:
      key: of everything. data: {'check': (x, y) to draw the curve, and what `draw` reads}; pairs
        under 'train' are shuffled again and again.
      draw: (key, data, step, batch) -> x [batch, I], y [batch, J].

    Returns:
      Score of the step that was best on data['check'], and the curve {'step', 'value'}.
    """
    first, keys = jax.random.split(key)
    check = data['check']
    params = spec.critic.init(first, *(part[:2] for part in check))['params']
    each = max(spec.steps // spec.checks, 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, spec.learning_rate, spec.steps // 20 + 1,
                                              max(spec.steps, spec.steps // 20 + 2))
    tx = optax.chain(optax.clip_by_global_norm(spec.clip),
                     optax.adamw(rate, weight_decay=spec.weight_decay))

    def objective(params, pairs, average):
        return _objective(spec, Score(spec.critic, params), *pairs, average)

    def step(data, carry, number):
        params, opt, average = carry
        pairs = draw(keys, data, number, spec.batch)
        grads, average = jax.grad(objective, has_aux=True)(params, pairs, average)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt, average), None

    def stretch(carry, start):
        inner, best, kept = carry
        mixed = dict(data)
        if 'train' in data:
            order = jax.random.permutation(jax.random.fold_in(keys, start), len(data['train'][0]))
            mixed['train'] = tuple(part[order] for part in data['train'])
        inner, _ = jax.lax.scan(partial(step, mixed), inner, start + jnp.arange(each))
        value = -objective(inner[0], check, jnp.float32(-jnp.inf))[0]
        kept = jax.tree.map(lambda new, old: jnp.where(value > best, new, old), inner[0], kept)
        return (inner, jnp.maximum(value, best), kept), value

    starts = jnp.arange(0, max(spec.steps // each, 1)) * each
    begin = (params, tx.init(params), jnp.float32(-jnp.inf))
    (_, _, kept), values = jax.lax.scan(stretch, (begin, -jnp.inf, params), starts)
    return Score(spec.critic, kept), {'step': starts + each, 'value': values}


def _objective(spec, score, x, y, average):
    """What is made small, and MINE's moving average."""
    if spec.objective == 'likelihood':
        return -score.own(x, y).mean(), average
    scores, own, negative = _batch(score, x, y)
    if spec.objective == 'mine':
        rows = bounds.log_rows(scores, own, negative)
        corrected, average = bounds.moving_partition(bounds.partition(rows), average, spec.decay,
                                                     most=1.0)
        return -(rows.own - corrected).mean(), average
    return -getattr(bounds, spec.objective)(scores, own, negative).mean(), average


def _batch(score, x, y):
    return score(x, y), jnp.arange(len(x)), ~jnp.eye(len(x), dtype=bool)


def report(bound, score, x, y, *, batch=256, seen=None, curve=None, level=0.95, clip=5.0,
           chunk=1024) -> Estimate:
    """A bound of I(x; y) by a fitted critic on fresh pairs x [n, I], y [n, J].

    InfoNCE and L1Out are means over batches of `batch` pairs, and their error that of the batches'
    mean. The others take product samples from all n (n - 1) off-diagonal pairs. These share points,
    so they are no independent sample: the error is the delete-one jackknife's (of a pair with its
    row and column), which is conservative for such a U-statistic (Efron and Stein 1981). Where the
    partition is a mean of exp(score), rare pairs carry it and may be missing from the sample
    without a trace; the joint pairs visit that region, so their own mean of exp(score), which at
    the best critic gives the variance of the partition [ours], is added to the square of the error.

    Args:
      seen: training pairs, as many or fewer, whose partition makes NWJ's constant.
    """
    if bound in ('infonce', 'l1out'):
        value, error, freedom = _batched(bound, score, x, y, batch)
        noise = 0.0
    else:
        value, error, noise = _paired(bound, score, x, y, seen, clip, chunk)
        freedom = len(x) - 1
    reach = error * stats.t.ppf(0.5 + level / 2, freedom)
    likelihood, warning = None, ''
    if bound in UPPER and isinstance(score, Score):
        likelihood, warning = _likelihood(score, x, y)
    elif bound in NEITHER:
        warning = f'{bound} is no bound of the information: it trains a critic well'
    elif bound == 'infonce' and value > np.log(batch) - ROOM:
        warning = (f'InfoNCE in batches of {batch} reads at most {np.log(batch):.2f} nats and has '
                   f'{np.log(batch) - value:.2f} left: the information may lie far above; take a '
                   'larger batch, mine or nwj')
    elif noise > NOISE:
        warning = (f'rare pairs carry the partition, whose log is uncertain by about {noise:.2f} '
                   f'nats: {bound} may read high or low by as much; take more pairs, or infonce')
    curve = {name: np.asarray(found) for name, found in (curve or {}).items()}
    return Estimate(bound, value, error, (value - reach, value + reach), level, len(x), curve,
                    warning, score, likelihood)


@partial(jax.jit, static_argnames=('bound', 'batch'))
@exact_products
def _in_batches(bound, score, x, y, batch):
    def one(pairs):
        scores, own, negative = _batch(score, *pairs)
        return getattr(bounds, bound)(scores.T if bound == 'l1out' else scores, own,
                                      negative).mean()

    count = len(x) // batch
    parts = tuple(part[:count * batch].reshape(count, batch, -1) for part in (x, y))
    return jax.lax.map(one, parts)


def _batched(bound, score, x, y, batch):
    values = np.asarray(_in_batches(bound, score, x, y, batch), np.float64)
    return values.mean(), values.std(ddof=1) / len(values)**0.5, len(values) - 1


class Sums(NamedTuple):
    """Over all off-diagonal pairs, float32 [n] each; logs of sums where scores are exponents."""

    own: Any  # scores of the joint pairs
    row: Any
    column: Any


@partial(jax.jit, static_argnames=('of', 'chunk'))
@exact_products
def off_diagonal(score, x, y, of='exp', clip=5.0, chunk=1024) -> Sums:
    """Sums of a function of f(x_i, y_j) over the j != i of each i, and over the i of each j.

    of: 'exp' or 'clipped' (exp of scores cut to +-clip), whose sums come as logs; 'softplus' or
    'score', as they are.
    """
    n, chunk = len(x), min(chunk, len(x))
    count = -(-n // chunk)
    factors = score.factors(x, y)
    if of == 'score' and factors is not None:  # a sum of products is the product of a sum
        a, b = factors
        own = (a * b).sum(-1)
        return Sums(own, a @ b.sum(axis=0) - own, b @ a.sum(axis=0) - own)
    rows = jnp.pad(x if factors is None else factors[0], ((0, count * chunk - n), (0, 0)))
    rows = rows.reshape(count, chunk, -1), jnp.arange(count * chunk).reshape(count, chunk)
    logs = of in ('exp', 'clipped')

    def block(carry, part):
        top, column = carry
        a, at = part
        scores = score(a, y) if factors is None else a @ factors[1].T
        outside = (at[:, None] == jnp.arange(n)) | (at[:, None] >= n)
        own = jnp.where(at[:, None] == jnp.arange(n), scores, 0).sum(axis=1)
        if not logs:
            value = jnp.where(outside, 0, jax.nn.softplus(scores) if of == 'softplus' else scores)
            return (top, column + value.sum(axis=0)), (own, value.sum(axis=1))
        scores = jnp.clip(scores, -clip, clip) if of == 'clipped' else scores
        scores = jnp.where(outside, -jnp.inf, scores)
        new = jnp.maximum(top, scores.max())
        value = jnp.exp(scores - new)
        column = column * jnp.exp(top - new) + value.sum(axis=0)
        return (new, column), (own, jnp.log(value.sum(axis=1)) + new)

    start = (jnp.float32(jnp.finfo(jnp.float32).min), jnp.zeros(n))
    (top, column), (own, row) = jax.lax.scan(block, start, rows)
    column = jnp.log(column) + top if logs else column
    return Sums(own.reshape(-1)[:n], row.reshape(-1)[:n], column)


def _paired(bound, score, x, y, seen, clip, chunk):
    """Value, its standard error, and the deviation of the log partition."""
    of = {'smile': 'clipped', 'jsd': 'softplus', 'vclub': 'score'}.get(bound, 'exp')
    own, row, column = (np.asarray(part, np.float64)
                        for part in off_diagonal(score, x, y, of, clip, chunk))
    n = len(own)
    if bound == 'nwj':
        other = row if seen is None else np.asarray(
            off_diagonal(score, *seen, 'exp', clip, chunk).row, np.float64)
        shift = np.logaddexp.reduce(other) - np.log(len(other)) - np.log(len(other) - 1)
        own, row, column = own - shift, row - shift, column - shift
    if bound == 'jsd':
        own = -np.logaddexp(0, -own)
    if of in ('exp', 'clipped'):
        top = row.max()
        row, column = np.exp(row - top), np.exp(column - top)
    sums = row.sum() - np.append(0, row + column)  # of all pairs, and without each
    size = np.append(n, np.full(n, n - 1))
    mean = np.append(own.mean(), (own.sum() - own) / (n - 1))
    rest = np.maximum(sums, 1e-12 * sums[0]) if of in ('exp', 'clipped') else sums
    rest = rest / size / (size - 1)
    if bound in ('mine', 'smile'):
        theta = mean - np.log(rest) - top
    elif bound == 'nwj':
        theta = 1 + mean - rest * np.exp(top)
    else:
        theta = mean - rest
    variance = (n - 1) / n * ((theta[1:] - theta[1:].mean())**2).sum()
    noise = 0.0
    if bound in ('mine', 'nwj'):
        partition = np.log(rest) + top
        # of the log partition, where exp(score) is the ratio of the densities
        missed = np.exp(np.logaddexp.reduce(own) - np.log(n) - partition[0]) / n / (n - 1)
        noise = ((n - 1) * partition[1:].var() + missed)**0.5
        variance += missed * (np.exp(2 * partition[0]) if bound == 'nwj' else 1.0)
    return float(theta[0]), float(variance**0.5), float(noise)


def _likelihood(score, x, y):
    """q's mean log-likelihood on fresh pairs, and what speaks against taking q for p(y|x)."""
    width = y.shape[1]
    constant = width / 2 * np.log(2 * np.pi)
    mean = float(np.asarray(score.own(x, y), np.float64).mean() - constant)
    alone = float(-constant - 0.5 * (width + np.log(np.var(y, axis=0)).sum()))
    if mean < alone:
        return mean, (f'q is less likely than one that does not read x ({mean:.2f} and {alone:.2f} '
                      'nats a pair): its bounds are none')
    if not isinstance(score.module, GaussianQ):
        return mean, ''
    half, centre, _ = np.split(np.asarray(score.factors(x, y)[0], np.float64),
                               [width, 2 * width], axis=1)  # -precision / 2, precision * mean
    square = (y + 0.5 * centre / half)**2 * -2 * half
    spread, tail = square.mean(), (square**2).mean() / square.mean()**2
    if abs(spread - 1) > FITS or abs(tail / 3 - 1) > FITS:
        return mean, ('q does not fit: squares and fourth powers of its residuals, which should be '
                      f'1 and 3, are {spread:.2f} and {tail * spread**2:.2f}; its bounds are none '
                      'where y given x is no such Gaussian')
    return mean, ''


def _standard(x, by):
    return ((x - by.mean(axis=0)) / (by.std(axis=0) + 1e-6)).astype(np.float32)


def _checked(x, y, bound, batch, held_out):
    """Arrays that can be split, or a refusal."""
    x, y = (np.asarray(part, np.float32) for part in (x, y))
    if bound not in BOUNDS:
        raise InputError(f'bound={bound!r} is unknown; name one of {", ".join(BOUNDS)}')
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise InputError(f'x {x.shape} and y {y.shape} are no pairs in rows; give [P, I] and '
                         '[P, J]')
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError('x or y holds numbers that are not finite; leave these rows out')
    least = int(np.ceil(2 * batch / min(held_out, 0.9 * (1 - held_out)))) + 1
    if not 0 < held_out < 1 or len(x) < least:
        raise InputError(f'{len(x)} pairs cannot be split into parts of two batches of {batch} '
                         f'each (held_out={held_out}); give {least} or more, or a smaller batch')
    return x, y

"""Read a bound of the mutual information on pairs that its critic never saw, with an error."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import stdtrit  # scipy.stats takes a second to import

from tpad_jax.core.precision import exact_products
from tpad_jax.mutual_information import bounds
from tpad_jax.mutual_information.critics import GaussianQ, Score

LOWER, UPPER, NEITHER = ('infonce', 'mine', 'nwj'), ('vclub', 'l1out'), ('jsd', 'smile')
BOUNDS = (*LOWER, *UPPER, *NEITHER)
ROOM = 1.0  # nats below log N from which InfoNCE saturates
NOISE = 0.1  # deviation of the log partition from which its bounds are unreliable
FITS = 0.25  # largest relative error of the squares and fourth powers of q's residuals


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


def in_batch(score, x, y):
    """Score a batch. Every pair except a row's own is a negative."""
    return score(x, y), jnp.arange(len(x)), ~jnp.eye(len(x), dtype=bool)


def report(bound, score, x, y, *, seen=None, curve=None, **settings) -> Estimate:
    """Compute a bound of I(x; y) with a fitted critic on fresh pairs.

    InfoNCE and L1Out are means over batches, and their error is that of the batches' mean. The
    other bounds take product samples from all n (n - 1) off-diagonal pairs. These pairs share
    points, so they are not independent. The error is that of the delete-one jackknife, which omits
    a pair with its row and column. It is conservative for such a U-statistic (Efron and Stein
    1981).

    Where the partition is a mean of exp(score), rare pairs dominate it, and a sample may miss them
    without a trace. The joint pairs visit that region. Their mean of exp(score) is the variance of
    the partition at the best critic [ours], and it is added to the square of the error.

    Args:
      bound: one of BOUNDS.
      score: the critic, (x, y) -> scores.
      x: float [n, I].
      y: float [n, J].
      seen: training pairs (x, y), at most n. Their partition is NWJ's constant.
      curve: of `fit`.
      **settings: fields of `Settings`.
    """
    s = Settings(**settings)
    batch, level = s.batch, s.level
    if bound in ('infonce', 'l1out'):
        values = np.asarray(_in_batches(bound, score, x, y, batch), np.float64)
        value, error, noise = values.mean(), values.std(ddof=1) / len(values)**0.5, 0.0
        freedom = len(values) - 1
    else:
        value, error, noise = _paired(bound, score, x, y, seen, s)
        freedom = len(x) - 1
    reach = error * stdtrit(freedom, 0.5 + level / 2)
    likelihood, warning = None, ''
    if bound in UPPER and isinstance(score, Score):
        likelihood, warning = _likelihood(score, x, y)
    elif bound in NEITHER:
        warning = f'{bound} does not bound the information; use it to train a critic'
    elif bound == 'infonce' and value > np.log(batch) - ROOM:
        warning = (f'InfoNCE in batches of {batch} reads at most {np.log(batch):.2f} nats and is '
                   f'{np.log(batch) - value:.2f} nats below that: the information may be much '
                   'larger; choose a larger batch, mine or nwj')
    elif noise > NOISE:
        warning = (f'rare pairs dominate the partition, whose log is uncertain by about '
                   f'{noise:.2f} nats: {bound} may be wrong by as much; use more pairs, or infonce')
    curve = {name: np.asarray(values) for name, values in (curve or {}).items()}
    interval = float(value - reach), float(value + reach)
    return Estimate(bound, value, error, interval, level, len(x), curve, warning, score, likelihood)


@partial(jax.jit, static_argnames=('bound', 'batch'))
@exact_products
def _in_batches(bound, score, x, y, batch):
    def mean(pairs):
        scores, own, negative = in_batch(score, *pairs)
        return getattr(bounds, bound)(scores.T if bound == 'l1out' else scores, own,
                                      negative).mean()

    count = len(x) // batch
    parts = tuple(part[:count * batch].reshape(count, batch, -1) for part in (x, y))
    return jax.lax.map(mean, parts)


@partial(jax.jit, static_argnames=('of', 'chunk'))
@exact_products
def off_diagonal(score, x, y, of='exp', clip=5.0, chunk=1024):
    """Sum a function of f(x_i, y_j) over the j != i of each i, and over the i != j of each j.

    Args:
      score: the critic.
      x: float [n, I].
      y: float [n, J].
      of: 'exp' or 'clipped' (exp of scores limited to +-clip) give logs of sums. 'softplus' and
        'score' give sums.
      clip: limit of 'clipped'.
      chunk: rows, then columns, whose scores exist at a time.

    Returns:
      float32 [n] each: the scores of the joint pairs; the sum of each row, or its log; the same of
      each column.
    """
    n, factors = len(x), score.factors(x, y)
    if of == 'score' and factors is not None:  # a sum of products is a product with a sum
        a, b = factors
        own = (a * b).sum(-1)
        return own, a @ b.sum(axis=0) - own, b @ a.sum(axis=0) - own
    score, x, y = (score, x, y) if factors is None else (lambda a, b: a @ b.T, *factors)

    def summed(scores, place):
        others = jnp.arange(n) != place
        if of in ('exp', 'clipped'):
            scores = jnp.clip(scores, -clip, clip) if of == 'clipped' else scores
            return jax.nn.logsumexp(scores, where=others)
        return jnp.where(others, jax.nn.softplus(scores) if of == 'softplus' else scores, 0).sum()

    def row_sum(part):
        scores = score(part[0][None], y)[0]
        return scores[part[1]], summed(scores, part[1])

    def column_sum(part):
        return summed(score(x, part[0][None])[:, 0], part[1])

    own, row = jax.lax.map(row_sum, (x, jnp.arange(n)), batch_size=min(chunk, n))
    return own, row, jax.lax.map(column_sum, (y, jnp.arange(n)), batch_size=min(chunk, n))


def _paired(bound, score, x, y, seen, s):
    """Return the value, its standard error and the deviation of the log partition."""
    of = {'smile': 'clipped', 'jsd': 'softplus', 'vclub': 'score'}.get(bound, 'exp')
    own, row, column = (np.asarray(part, np.float64)
                        for part in off_diagonal(score, x, y, of, s.clip, s.chunk))
    n = len(own)
    if bound == 'nwj':
        other = row if seen is None else np.asarray(
            off_diagonal(score, *seen, 'exp', s.clip, s.chunk)[1], np.float64)
        shift = np.logaddexp.reduce(other) - np.log(len(other)) - np.log(len(other) - 1)
        own, row, column = own - shift, row - shift, column - shift
    if bound == 'jsd':
        own = -np.logaddexp(0, -own)
    if of in ('exp', 'clipped'):
        top = row.max()
        row, column = np.exp(row - top), np.exp(column - top)
    sums = row.sum() - np.append(0, row + column)  # of all pairs, then without each
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
        return mean, ('q does not fit: squares and fourth powers of its residuals should be 1 and '
                      f'3, but are {spread:.2f} and {tail * spread**2:.2f}; its bounds are invalid '
                      'unless y given x is such a Gaussian')
    return mean, ''

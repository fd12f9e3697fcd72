"""Bounds and estimates of mutual information, and discrepancies between clouds of features.

A bound is a pure function `bound(scores, own, negative, axis=None)` of a score matrix.

    scores    [A, G]. f(x_i, y_j) of this replica's A rows and all G gathered columns.
    own       int32 [A]. The column of each row's own pair, a draw from the joint distribution.
    negative  bool [A, G]. Pairs that are draws from the product of the marginals.

It returns one value per row, [A]. The mean over all rows and replicas is the bound in nats. A term
of the batch is repeated in every row. Losses maximise lower bounds and minimise upper bounds; they
choose the sign. `Blocks` replaces the matrix where 32k rows leave no memory for it.

Poole et al. 2019, "On Variational Bounds of Mutual Information", has most bounds in one notation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpad_jax.core.precision import exact_products
from tpad_jax.distributed import collectives
from tpad_jax.nn.gather import by_chunk


class Blocks(NamedTuple):
    """A score matrix of which one block of rows exists at a time, in both passes.

    Every bound accepts it instead of `scores`, own and negative, and gives the same values and
    gradients. The backward pass computes the scores of a block again, as attention kernels do.

    Attributes:
      make: rows of a block -> (scores [C, G], own [C], negative [C, G]).
      rows: the input of `make` for all rows, a tree of arrays [A, ...].
      chunk: C, rows of a block.
    """

    make: Callable
    rows: Any
    chunk: int

    def each(self, reduce):
        """Apply reduce(scores, own, negative) -> tree of [C] to all blocks: tree of [A]."""
        chunk = min(self.chunk, len(jax.tree.leaves(self.rows)[0]))
        return by_chunk(lambda part: reduce(*self.make(part)), self.rows, chunk)


class Rows(NamedTuple):
    """The parts of each row that a bound needs: own score [A], sum over negatives, their number."""

    own: jax.Array
    rest: jax.Array
    count: jax.Array


def infonce(scores, own=None, negative=None, axis=None):
    """Compute InfoNCE (van den Oord et al. 2018), [A]: a lower bound.

    It is at most the log of the number of candidates, which are a row's own column and its
    negatives. Near that limit it saturates and does not show larger values.
    """
    own, rest, count = log_rows(scores, own, negative)
    return own - jnp.logaddexp(own, rest) + jnp.log(count + 1.0)


def donsker_varadhan(scores, own=None, negative=None, axis=None):
    """Compute Donsker-Varadhan (MINE, Belghazi et al. 2018), [A]: own score - log partition.

    A lower bound in expectation over enough samples. A small batch reads high, because the log of a
    mean of few numbers is low on average. From about log G nats on, few pairs dominate the mean of
    exp(score), and the bound fails. MINE corrects its gradient, see `moving_partition`.
    """
    rows = log_rows(scores, own, negative)
    return rows.own - partition(rows, axis)


def nwj(scores, own=None, negative=None, axis=None):
    """Compute the bound of Nguyen, Wainwright and Jordan 2010 (MINE-f), [A].

    The own score minus the mean of exp(score - 1): a lower bound at any sample size. It is tight if
    the critic is 1 + log density ratio, so unlike Donsker-Varadhan it needs the right constant. Its
    variance grows as exp of the information.
    """
    rows = log_rows(scores, own, negative)
    return rows.own - jnp.exp(partition(rows, axis) - 1)


def jsd(scores, own=None, negative=None, axis=None):
    """Compute the Jensen-Shannon objective (Nowozin et al. 2016; Hjelm et al. 2019), [A].

    -softplus(-own) minus the mean of softplus(score): at most 0. Its optimum is twice the
    Jensen-Shannon divergence of joint and product, less log 4. It trains a critic to the log
    density ratio with a small variance. The value does not bound the mutual information and is flat
    from about 3 nats on.
    """
    own, rest, count = _each(partial(_sum, of=jax.nn.softplus), scores, own, negative)
    mean = (collectives.total(rest.sum(), axis)
            / jnp.maximum(collectives.total(count.sum(), axis), 1))
    return -jax.nn.softplus(-own) - mean


def smile(scores, own=None, negative=None, axis=None, clip=5.0):
    """Compute SMILE (Song and Ermon 2020), [A]: clipped scores in the partition.

    Compared with Donsker-Varadhan it has less variance and a bias of either sign, so it is not a
    bound. It reads high where the partition's mass is above `clip`. Scores above the clip get no
    gradient, so train its critic with `jsd`.

    Args:
      scores: see the module.
      own: see the module.
      negative: see the module.
      axis: of the replicas.
      clip: the partition's scores are limited to +-clip.
    """
    rows = _each(partial(_log_sum, clip=clip), scores, own, negative)
    return rows.own - partition(rows, axis)


def vclub(scores, own=None, negative=None, axis=None):
    """Compute vCLUB (Cheng et al. 2020), [A]: own score minus the mean over the row's negatives.

    Scores are log q(y|x). An upper bound while q is nearer to the joint distribution than to the
    product of the marginals. It is far above I even then (Gaussians: d rho^2 / (1 - rho^2)). If q
    does not fit, the value can be anywhere, also below zero. Check q's likelihood on fresh pairs.
    """
    own, rest, count = _each(_sum, scores, own, negative)
    return own - rest / jnp.maximum(count, 1)


def l1out(scores, own=None, negative=None, axis=None):
    """Compute leave-one-out (Poole et al. 2019, section 2.4), [A].

    The own score minus log mean exp of the row's negatives. Rows are the y here: scores[i, j] =
    log q(y_i | x_j), and the negatives are other x for the same y. An upper bound if q is the true
    p(y|x). It fails as vCLUB does. It also reads far too high where no other x of the batch could
    have produced y_i, because it grows faster with I than G can.
    """
    own, rest, count = log_rows(scores, own, negative)
    return own - rest + jnp.log(jnp.maximum(count, 1))


def log_rows(scores, own=None, negative=None):
    """Return each row's own score, log sum exp(score) over its negatives, and their number.

    The log is about -87 for a row without negatives.
    """
    return _each(_log_sum, scores, own, negative)


def partition(rows, axis=None):
    """Return the log of the mean of exp(score) over the negatives of all replicas, a scalar.

    Args:
      rows: result of `log_rows`.
      axis: of the replicas.
    """
    rest = jnp.where(rows.count > 0, rows.rest, -jnp.inf)
    top = collectives.maximum(jnp.max(rest), axis)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    mass = collectives.total(jnp.exp(rest - top).sum(), axis)
    count = collectives.total(rows.count.sum(), axis)
    tiny = jnp.finfo(rest.dtype).tiny
    return jnp.log(jnp.maximum(mass, tiny)) + top - jnp.log(jnp.maximum(count, 1))


def moving_partition(log_mean_exp, log_average, decay, most=jnp.inf):
    """Apply MINE's corrected gradient (Belghazi et al. 2018, section 3.2).

    The value stays `log_mean_exp`. Its gradient is that of the mean divided by a moving average of
    the mean, instead of the batch's mean.

    Args:
      log_mean_exp: log of the batch's mean.
      log_average: log of the moving average. -inf before the first step.
      decay: of the average.
      most: nats above the average that a batch counts for at most [ours]. Without a limit, one pair
        of score 50 outweighs hundreds of batches, in which nothing then limits the scores.

    Returns:
      The corrected log_mean_exp and the new log_average.
    """
    now = jax.lax.stop_gradient(log_mean_exp)
    past = jnp.where(jnp.isneginf(log_average), now, log_average)
    counted = jnp.minimum(now, past + most)
    new = jnp.logaddexp(jnp.log(decay) + past, jnp.log1p(-decay) + counted)
    share = jnp.exp(counted - new)
    return share * (log_mean_exp - now) + now, new


@partial(jax.jit, static_argnames=('of', 'chunk'))
@exact_products
def off_diagonal(score, x, y, group, of='exp', clip=5.0, chunk=1024):
    """Sum a function of f(x_i, y_j) over the j outside i's group, and over the i outside j's.

    Args:
      score: the critic.
      x: float [n, I].
      y: float [n, J].
      group: int32 [n], in 0..n-1. Pairs within a group are not negatives.
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
        inside = partial(jax.ops.segment_sum, segment_ids=group, num_segments=n)
        return (own, (a * (b.sum(axis=0) - inside(b)[group])).sum(-1),
                (b * (a.sum(axis=0) - inside(a)[group])).sum(-1))
    score, x, y = (score, x, y) if factors is None else (lambda a, b: a @ b.T, *factors)

    def summed(scores, place):
        others = group != group[place]
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


def alignment(x, y, power=2.0):
    """Compute the distance of each pair to a power (Wang and Isola 2020), [A].

    Minimise it. Alone it is optimal if all vectors are equal, see `uniformity`.

    Args:
      x: float [A, D]. Vectors of length one.
      y: float [A, D]. Vectors of length one.
      power: of the distance.
    """
    square = jnp.maximum(((x - y) ** 2).sum(-1), 1e-12)  # a finite slope of every power at zero
    return square ** (power / 2)


def uniformity(similarity, own=None, negative=None, axis=None, sharpness=2.0):
    """Compute log mean exp(-sharpness * distance^2) over a cloud's pairs (Wang and Isola 2020).

    Minimise it; 0 is a collapsed cloud. It is the limit of InfoNCE's second term. It does not
    estimate mutual information, and it separates similar items as readily as others.

    Args:
      similarity: [A, G] or `Blocks`. <x_i, x_j> of vectors of length one.
      own: see the module.
      negative: see the module.
      axis: of the replicas.
      sharpness: of the kernel.

    Returns:
      A scalar.
    """
    rows = _each(lambda s, o, n: _log_sum(2 * sharpness * (s - 1), o, n), similarity, own, negative)
    return partition(rows, axis)


def mmd(a, b, all_a, all_b, share, widths=4, chunk=0):
    """Compute rows [A] whose mean is the squared maximum mean discrepancy of two clouds.

    This is the biased estimate of Gretton et al. 2012, at least 0, with the mean of several
    Gaussian kernels of deviation 2, 1, 1/2, ... It compares distributions, not pairs: the order of
    the points does not matter, and the value does not estimate mutual information.

    Args:
      a: float [A, D]. This replica's points of the first cloud, of length one.
      b: float [A, D]. This replica's points of the second cloud, of length one.
      all_a: float [G, D]. The points of all replicas.
      all_b: float [G, D]. The points of all replicas.
      share: float [G]. Weights of the points, with sum one.
      widths: number of kernels.
      chunk: rows whose kernels exist at a time. 0: all.
    """
    def kernel(u, v):
        square = jnp.maximum(2 - 2 * u @ v.T, 0)  # the points have length one
        parts = [jnp.exp(-square / 8)]
        for _ in range(widths - 1):
            parts.append(parts[-1] ** 4)  # half the deviation, without a second exponential
        return sum(parts) / widths

    def rows(a, b):
        return (kernel(a, all_a) - kernel(a, all_b) - kernel(b, all_a) + kernel(b, all_b)) @ share

    return Blocks(lambda part: part, (a, b), chunk).each(rows) if chunk else rows(a, b)


def _each(reduce, scores, own, negative):
    return scores.each(reduce) if isinstance(scores, Blocks) else reduce(scores, own, negative)


def _own(scores, own):
    # XLA fuses a comparison with its neighbours; the gradient of a gather is a separate matrix
    return jnp.where(own[:, None] == jnp.arange(scores.shape[1]), scores, 0).sum(axis=1)


def _log_sum(scores, own, negative, clip=None):
    """Return `Rows` with the log of the sum of exp(score) as `rest`."""
    cut = scores if clip is None else jnp.clip(scores, -clip, clip)
    masked = jnp.where(negative, cut, -jnp.inf)
    top = jax.lax.stop_gradient(masked.max(axis=1))
    top = jnp.where(jnp.isfinite(top), top, 0)
    mass = jnp.exp(masked - top[:, None]).sum(axis=1)
    rest = jnp.log(jnp.maximum(mass, jnp.finfo(scores.dtype).tiny)) + top
    return Rows(_own(scores, own), rest, negative.sum(axis=1))


def _sum(scores, own, negative, of=lambda x: x):
    return Rows(_own(scores, own), jnp.where(negative, of(scores), 0).sum(axis=1),
                negative.sum(axis=1))

"""Bounds and estimates of mutual information, and discrepancies between clouds of features.

A bound is a pure function `bound(scores, own, negative, axis=None)` of a score matrix: scores
[A, G] hold f(x_i, y_j) of this replica's A rows against the G gathered ones; `own` int32 [A] is
each row's own column, a draw from the joint distribution, and `negative` bool [A, G] says which
pairs are draws from the product of the marginals. It returns one value per row, [A], whose mean
over all rows and replicas is the bound in nats; a batch-level term stands in every row alike. A
lower bound is to be made large and an upper bound small: signs are the caller's affair. Where 32k
rows leave no room for a matrix, `Blocks` stands in its place.

Poole et al. 2019, "On Variational Bounds of Mutual Information", has most of these in one notation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpad_jax.distributed import collectives


class Blocks(NamedTuple):
    """A score matrix of which one block of rows exists at a time, in both passes.

    Every bound takes it in place of `scores`, without own and negative, and gives the same values
    and gradients: a block is scored again in the backward pass, as attention kernels do.

    Attributes:
      make: rows of a block -> (scores [C, G], own [C], negative [C, G]).
      rows: what it takes of all rows, a tree of arrays [A, ...]; the last block is filled up with
        zeros, whose results are dropped.
      chunk: C, rows of a block.
    """

    make: Callable
    rows: Any
    chunk: int

    def each(self, reduce):
        """reduce(scores, own, negative) -> tree of [C], over all blocks: tree of [A]."""
        total = len(jax.tree.leaves(self.rows)[0])
        chunk = min(self.chunk, total)
        count = -(-total // chunk)
        rows = jax.tree.map(lambda x: jnp.pad(
            x, ((0, count * chunk - total), *((0, 0),) * (x.ndim - 1))
        ).reshape(count, chunk, *x.shape[1:]), self.rows)
        found = jax.lax.map(jax.checkpoint(lambda part: reduce(*self.make(part))), rows)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], found)


class Rows(NamedTuple):
    """What a bound keeps of each row: its own score [A], a sum over negatives, and their number."""

    own: jax.Array
    rest: jax.Array
    count: jax.Array


def infonce(scores, own=None, negative=None, axis=None):
    """InfoNCE (van den Oord et al. 2018): lower bound, at most the log of the candidates' number.

    A row's candidates are its own column and its negatives. Fails by saturating: near its limit it
    says nothing of what lies above. -> [A]
    """
    own, rest, count = log_rows(scores, own, negative)
    return own - jnp.logaddexp(own, rest) + jnp.log(count + 1.0)


def donsker_varadhan(scores, own=None, negative=None, axis=None):
    """Donsker-Varadhan (MINE, Belghazi et al. 2018): own score minus the log partition. -> [A]

    Lower bound in expectation over enough samples; a small batch reads high, because the log of
    a mean of few is low on average. Fails where the mean of exp(score) hangs on a few pairs, as it
    does from about log G nats on. MINE corrects its gradient, see `moving_partition`.
    """
    rows = log_rows(scores, own, negative)
    return rows.own - partition(rows, axis)


def nwj(scores, own=None, negative=None, axis=None):
    """Nguyen, Wainwright and Jordan 2010 (f-GAN's KL, MINE-f): own - mean of exp(score - 1). -> [A]

    Lower bound of any sample size, tight at a critic of 1 + log density ratio: unlike DV it must
    get the constant right. Fails by a variance that grows as exp of the information.
    """
    rows = log_rows(scores, own, negative)
    return rows.own - jnp.exp(partition(rows, axis) - 1)


def jsd(scores, own=None, negative=None, axis=None):
    """Jensen-Shannon objective (Nowozin et al. 2016; Hjelm et al. 2019). -> [A]

    -softplus(-own) minus the mean of softplus(score): at most 0, at its best twice the
    Jensen-Shannon divergence of joint and product, less log 4. Trains a critic to the log density
    ratio with small variance; as a figure it is no bound of the mutual information, and it is flat
    from about 3 nats on.
    """
    own, rest, count = _each(_softplus_sum, scores, own, negative)
    mean = (collectives.total(rest.sum(), axis)
            / jnp.maximum(collectives.total(count.sum(), axis), 1))
    return -jax.nn.softplus(-own) - mean


def smile(scores, own=None, negative=None, axis=None, clip=5.0):
    """SMILE (Song and Ermon 2020): Donsker-Varadhan with scores of the partition cut to +-clip.

    Less variance for bias of either sign: no bound. Fails silently, by reading high where the
    partition's mass lies above `clip`. It does not train a critic (scores above the clip get no
    push), `jsd` does. -> [A]
    """
    rows = _each(lambda s, o, n: _log_sum(s, o, n, clip), scores, own, negative)
    return rows.own - partition(rows, axis)


def vclub(scores, own=None, negative=None, axis=None):
    """vCLUB (Cheng et al. 2020) of scores log q(y|x): own - mean over the row's negatives. -> [A]

    Upper bound while q is nearer to the joint distribution than to the product of the marginals;
    lies far above I even then (Gaussians: d rho^2 / (1 - rho^2)). Fails where q does not fit: the
    value may then lie anywhere, below zero too. Watch q's likelihood on fresh pairs.
    """
    own, rest, count = _each(_sum, scores, own, negative)
    return own - rest / jnp.maximum(count, 1)


def club(scores, own=None, negative=None, axis=None):
    """CLUB (Cheng et al. 2020, eq. 6): as `vclub`, its mean over the row's own pair as well. -> [A]

    An upper bound where scores are the true log p(y|x), times (G - 1) / G, since the own pair adds
    nothing; `vclub` leaves it out and is unbiased.
    """
    own, rest, count = _each(_sum, scores, own, negative)
    return own - (rest + own) / (count + 1)


def l1out(scores, own=None, negative=None, axis=None):
    """Leave-one-out (Poole et al. 2019, section 2.4): own - log mean exp of the row's negatives.

    Rows are the y here: scores[i, j] = log q(y_i | x_j), the negatives other x for the same y. An
    upper bound where q is the true p(y|x). Fails as vCLUB does where q is not, and reads far too
    high where no other x of the batch could have led to y_i: it grows with I faster than G can
    follow. -> [A]
    """
    own, rest, count = log_rows(scores, own, negative)
    return own - rest + jnp.log(jnp.maximum(count, 1))


def log_partition(scores, own=None, negative=None, axis=None):
    """log of the mean of exp(score) over the negatives of every replica, a scalar."""
    return partition(log_rows(scores, own, negative), axis)


def log_rows(scores, own=None, negative=None):
    """A row's own score, the log of the sum of exp(score) over its negatives, and their number.

    The log is about -87 where there are none.
    """
    return _each(_log_sum, scores, own, negative)


def partition(rows, axis=None):
    """`log_partition` from `log_rows`."""
    rest = jnp.where(rows.count > 0, rows.rest, -jnp.inf)
    top = collectives.maximum(jnp.max(rest), axis)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    mass = collectives.total(jnp.exp(rest - top).sum(), axis)
    count = collectives.total(rows.count.sum(), axis)
    tiny = jnp.finfo(rest.dtype).tiny
    return jnp.log(jnp.maximum(mass, tiny)) + top - jnp.log(jnp.maximum(count, 1))


def moving_partition(log_mean_exp, log_average, decay, most=jnp.inf):
    """MINE's corrected gradient (Belghazi et al. 2018, section 3.2).

    The value stays `log_mean_exp`; its gradient is that of the mean divided by a moving average of
    the mean instead of the batch's own. Both in logs; log_average is -inf before the first step.

    most: nats above the average that a batch counts for [ours]. Without a limit one pair of score
    50 outweighs hundreds of batches, in which nothing then holds the scores down.

    Returns:
      the corrected log_mean_exp and the new log_average.
    """
    now = jax.lax.stop_gradient(log_mean_exp)
    past = jnp.where(jnp.isneginf(log_average), now, log_average)
    counted = jnp.minimum(now, past + most)
    new = jnp.logaddexp(jnp.log(decay) + past, jnp.log1p(-decay) + counted)
    share = jnp.exp(counted - new)
    return share * (log_mean_exp - now) + now, new


def alignment(x, y, power=2.0):
    """Distance to the power of each pair of vectors of length one [A, D] (Wang and Isola 2020).

    To be made small. By itself it is best where all vectors are one: see `uniformity`. -> [A]
    """
    square = jnp.maximum(((x - y) ** 2).sum(-1), 1e-12)  # a finite slope of every power at zero
    return square ** (power / 2)


def uniformity(similarity, own=None, negative=None, axis=None, sharpness=2.0):
    """log mean exp(-sharpness * distance^2) over a cloud's pairs (Wang and Isola 2020). Scalar.

    similarity: <x_i, x_j> of vectors of length one, a matrix or `Blocks`. To be made small; 0 is a
    collapsed cloud. It is the limit of InfoNCE's second term; no mutual information, and it pushes
    apart what alike items have in common as readily as the rest.
    """
    rows = _each(lambda s, o, n: _log_sum(2 * sharpness * (s - 1), o, n), similarity, own, negative)
    return partition(rows, axis)


def mmd(a, b, all_a, all_b, share, widths=4, chunk=0):
    """Rows whose mean is the squared maximum mean discrepancy of two clouds. -> [A]

    Gretton et al. 2012, the biased estimate, at least 0, with the mean of `widths` Gaussian kernels
    of deviation 2, 1, 1/2, ... It compares distributions and not pairs: no mutual information, and
    clouds that match point for point in the wrong order are as good to it.

    Args:
      a, b: [A, D], this replica's points, of length one. all_a, all_b: [G, D], everyone's.
      share: [G], their weights, of sum one. chunk: rows whose kernels exist at once, 0: all.
    """
    def kernel(u, v):
        square = jnp.maximum(2 - 2 * u @ v.T, 0)  # the points have length one
        parts = [jnp.exp(-square / 8)]
        for _ in range(widths - 1):
            parts.append(parts[-1] ** 4)  # half the deviation, without another exponential
        return sum(parts) / widths

    def rows(a, b):
        return (kernel(a, all_a) - kernel(a, all_b) - kernel(b, all_a) + kernel(b, all_b)) @ share

    return Blocks(lambda part: part, (a, b), chunk).each(rows) if chunk else rows(a, b)


def _each(reduce, scores, own, negative):
    return (scores.each(reduce) if isinstance(scores, Blocks)
            else reduce(scores, own, negative))


def _own(scores, own):
    # a comparison is fused with its neighbours; a gather's gradient is a matrix of its own
    return jnp.where(own[:, None] == jnp.arange(scores.shape[1]), scores, 0).sum(axis=1)


def _log_sum(scores, own, negative, clip=None):
    """`rest`: the log of the sum of exp(score), about -87 for a row without negatives."""
    cut = scores if clip is None else jnp.clip(scores, -clip, clip)
    masked = jnp.where(negative, cut, -jnp.inf)
    top = jax.lax.stop_gradient(masked.max(axis=1))
    top = jnp.where(jnp.isfinite(top), top, 0)
    mass = jnp.exp(masked - top[:, None]).sum(axis=1)
    rest = jnp.log(jnp.maximum(mass, jnp.finfo(scores.dtype).tiny)) + top
    return Rows(_own(scores, own), rest, negative.sum(axis=1))


def _sum(scores, own, negative):
    return Rows(_own(scores, own), jnp.where(negative, scores, 0).sum(axis=1),
                negative.sum(axis=1))


def _softplus_sum(scores, own, negative):
    return Rows(_own(scores, own), jnp.where(negative, jax.nn.softplus(scores), 0).sum(axis=1),
                negative.sum(axis=1))

"""Mutual-information bounds.

A bound is a pure function of a score matrix: scores [A, G] hold f(x_i, y_j) of this replica's A
rows against the G gathered ones; `own` [A] is each row's own column, and `negative` bool [A, G]
says which pairs are draws from the product of the marginals. Poole et al. 2019, "On Variational
Bounds of Mutual Information", has them all. Units are nats. Each returns one value per row whose
mean is the bound.
"""

import jax
import jax.numpy as jnp

from tpad_jax import collectives


def infonce(scores, own, negative):
    """InfoNCE (van den Oord et al. 2018): lower bound, at most the log of the candidates' number.

    A row's candidates are its own column and its negatives. -> [A]
    """
    rows = jnp.arange(scores.shape[0])
    candidate = negative.at[rows, own].set(True)
    masked = jnp.where(candidate, scores, -jnp.inf)
    return scores[rows, own] - jax.nn.logsumexp(masked, axis=1) + jnp.log(candidate.sum(axis=1))


def donsker_varadhan(scores, own, log_mean_exp):
    """Donsker-Varadhan (MINE, Belghazi et al. 2018): own score minus the log partition. -> [A]

    Lower bound in expectation over enough samples; a small batch reads high. The partition comes in
    as `log_mean_exp` (see `log_partition`), so that a caller decides how its gradient is corrected.
    """
    rows = jnp.arange(scores.shape[0])
    return scores[rows, own] - log_mean_exp


def log_partition(scores, negative, axis=None):
    """log of the mean of exp(score) over the negatives of every replica, a scalar."""
    masked = jnp.where(negative, scores, -jnp.inf)
    top = collectives.maximum(jnp.max(masked), axis)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    mass = collectives.total(jnp.exp(masked - top).sum(), axis)
    count = collectives.total(negative.sum(), axis)
    tiny = jnp.finfo(scores.dtype).tiny
    return jnp.log(jnp.maximum(mass, tiny)) + top - jnp.log(jnp.maximum(count, 1))


def moving_partition(log_mean_exp, log_average, decay):
    """MINE's corrected gradient (Belghazi et al. 2018, section 3.2).

    The value stays `log_mean_exp`; its gradient is that of the mean divided by a moving average of
    the mean instead of the batch's own. Both in logs; log_average is -inf before the first step.

    Returns:
      the corrected log_mean_exp and the new log_average.
    """
    now = jax.lax.stop_gradient(log_mean_exp)
    first = jnp.isneginf(log_average)
    past = jnp.where(first, now, log_average)
    new = jnp.logaddexp(jnp.log(decay) + past, jnp.log1p(-decay) + now)
    share = jnp.exp(now - new)
    return share * log_mean_exp + (1 - share) * now, new

"""Critics, mutual-information bounds and the disentangling heads.

A bound is a pure function of a score matrix: scores [A, G] hold f(x_i, y_j) of this replica's A
rows against the G gathered ones; `own` [A] is each row's own column, and `negative` bool [A, G]
says which pairs are draws from the product of the marginals. Poole et al. 2019, "On Variational
Bounds of Mutual Information", has them all. Units are nats. Each returns one value per row whose
mean is the bound.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax import collectives
from tpad_jax.models.lora import Linear

KINDS = ('dot', 'bilinear', 'separable', 'concatenated')  # of critics


class MLP(nn.Module):
    """Two layers. [..., I] -> [..., features]."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, x):
        """Apply to the last axis of x."""
        x = nn.gelu(Linear(self.hidden, use_bias=True, name='in')(x))
        return Linear(self.features, use_bias=True, name='out')(x)


class Critic(nn.Module):
    """Score function f(x, y). x [A, I], y [G, J] -> [A, G].

    Attributes:
      kind: 'dot' (cosine, I = J), 'bilinear', 'separable' (an MLP each, then the scaled dot
        product)
        or 'concatenated' (one MLP on the pair: A G passes).
      width: width of the MLPs.
    """

    kind: str
    width: int

    @nn.compact
    def __call__(self, x, y):
        """Score every pair."""
        match self.kind:
            case 'dot':
                return unit(x) @ unit(y).T
            case 'bilinear':
                return Linear(y.shape[-1], name='w')(x) @ y.T / y.shape[-1] ** 0.5
            case 'separable':
                x = unit(MLP(self.width, self.width, name='x')(x))
                y = unit(MLP(self.width, self.width, name='y')(y))
                return x @ y.T * jnp.exp(self.param('log_scale', nn.initializers.constant(2.3), ()))
            case 'concatenated':
                shape = (x.shape[0], y.shape[0])
                pair = jnp.concatenate([jnp.broadcast_to(x[:, None], (*shape, x.shape[-1])),
                                        jnp.broadcast_to(y[None], (*shape, y.shape[-1]))], axis=-1)
                return MLP(self.width, 1, name='pair')(pair)[..., 0]
        raise ValueError(f'no critic {self.kind!r}: {", ".join(KINDS)}')


def unit(x):
    """x scaled to length one along its last axis; zero stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


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


class GaussianQ(nn.Module):
    """q(p | c), a diagonal Gaussian: the variational family of vCLUB (Cheng et al. 2020)."""

    hidden: int

    @nn.compact
    def __call__(self, c, p):
        """log q(p_j | c_i) up to a constant. c [A, D], p [G, D] -> [A, G]."""
        mean, log_var = jnp.split(MLP(self.hidden, 2 * p.shape[-1], name='moments')(c), 2, axis=-1)
        log_var = 4 * jnp.tanh(log_var / 4)
        precision = jnp.exp(-log_var)
        square = precision @ (p * p).T - 2 * (precision * mean) @ p.T
        return -0.5 * (square + (precision * mean * mean + log_var).sum(-1)[:, None])


class Disentangle(nn.Module):
    """c = f_c(t), consistent with item knowledge, and p = f_p(t), the transition part [ours]."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, t):
        """t [..., D] -> c [..., D], p [..., D], each of mean square one."""
        parts = (MLP(self.hidden, self.features, name=n)(t) for n in ('consistent', 'transition'))
        return tuple(unit(x) * self.features**0.5 for x in parts)


class Adapter(nn.Module):
    """r = A(k): one vector over the modalities, of mean square one. [..., M, D] -> [..., D]."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, k):
        """Apply to k [..., M, D]; a linear path beside the MLP keeps what k says."""
        x = k.reshape(*k.shape[:-2], -1)
        y = Linear(self.features, name='skip')(x) + MLP(self.hidden, self.features, name='mlp')(x)
        return unit(y) * self.features**0.5

"""Critics, which score pairs, and the variational family of vCLUB."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.linen.initializers import constant

from tpad_jax.nn.linear import MLP, Linear, unit

KINDS = ('dot', 'cosine', 'bilinear', 'separable', 'concatenated')  # of critics


class Critic(nn.Module):
    """Score function f(x, y). x [A, I], y [G, J] -> [A, G].

    Attributes:
      kind: 'dot' (of vectors of length one, I = J), 'cosine' (the same times a learned scale),
        'bilinear', 'separable' (an MLP each, then the scaled dot
        product) or 'concatenated' (one MLP for each of the A G pairs).
      width: of the MLPs' outputs.
      hidden: of the MLPs' hidden layer. 0: width.
      normalise: whether 'separable' compares vectors of length one, times a learned scale. Scores
        then stay within +- that scale. An estimate of many nats needs False.
      scales: MLPs read asinh(s x) / asinh(s) for each s, which shows both heavy tails and values
        near zero. (): they read x.
    """

    kind: str
    width: int
    hidden: int = 0
    normalise: bool = True
    scales: tuple[float, ...] = ()

    @nn.compact
    def __call__(self, x, y, factors=False):
        """Score every pair.

        Args:
          x: float [A, I].
          y: float [G, J].
          factors: whether to return a [A, F] and b [G, F] with scores = a b^T, so that a caller
            does not need all scores at once. Every kind except 'concatenated' has factors.

        Raises:
          ValueError: the kind is unknown or has no factors.
        """
        hidden = self.hidden or self.width
        if self.scales and self.kind in ('separable', 'concatenated'):
            x, y = (jnp.concatenate([jnp.arcsinh(s * n) / math.asinh(s) for s in self.scales], -1)
                    for n in (x, y))
        match self.kind:
            case 'dot':
                a, b = unit(x), unit(y)
            case 'cosine':
                a, b = unit(x) * jnp.exp(self.param('log_scale', constant(2.66), ())), unit(y)
            case 'bilinear':
                a, b = Linear(y.shape[-1], name='w')(x) / y.shape[-1] ** 0.5, y
            case 'separable':
                a, b = MLP(hidden, self.width, name='x')(x), MLP(hidden, self.width, name='y')(y)
                if not self.normalise:
                    a = a / self.width**0.5
                else:
                    scale = self.param('log_scale', constant(2.3), ())
                    a, b = unit(a) * jnp.exp(scale), unit(b)
            case 'concatenated' if not factors:
                shape = (x.shape[0], y.shape[0])
                pair = jnp.concatenate([jnp.broadcast_to(x[:, None], (*shape, x.shape[-1])),
                                        jnp.broadcast_to(y[None], (*shape, y.shape[-1]))], axis=-1)
                return MLP(hidden, 1, name='pair')(pair)[..., 0]
            case _:
                raise ValueError(f'kind={self.kind!r}: unknown critic. Expected one of '
                                 f'{", ".join(KINDS)}; the last has no factors')
        return (a, b) if factors else a @ b.T


class GaussianQ(nn.Module):
    """q(p | c), a diagonal Gaussian: the variational family of vCLUB (Cheng et al. 2020).

    [ours] It starts as a standard normal for every c, so it learns the distribution of p first.

    Attributes:
      hidden: width of the MLP of its moments.
      limit: largest absolute value of the log variances.
    """

    hidden: int
    limit: float = 4.0

    @nn.compact
    def __call__(self, c, p, factors=False):
        """Compute log q(p_j | c_i) up to a constant, [A, G], or its factors.

        Args:
          c: float [A, D].
          p: float [G, D].
          factors: see `Critic`.
        """
        moments = MLP(self.hidden, 2 * p.shape[-1], out=nn.initializers.zeros, name='moments')
        mean, log_var = jnp.split(moments(c), 2, axis=-1)
        log_var = self.limit * jnp.tanh(log_var / self.limit)
        precision = jnp.exp(-log_var)
        rest = (precision * mean * mean + log_var).sum(-1, keepdims=True)
        a = jnp.concatenate([-0.5 * precision, precision * mean, -0.5 * rest], axis=-1)
        b = jnp.concatenate([p * p, p, jnp.ones_like(p[:, :1])], axis=-1)
        return (a, b) if factors else a @ b.T


@struct.dataclass
class Score:
    """A critic with its parameters bound: x [A, I], y [G, J] -> [A, G]."""

    module: nn.Module = struct.field(pytree_node=False)
    params: Any

    def __call__(self, x, y) -> Any:
        """Score every pair."""
        return self.module.apply({'params': self.params}, x, y)

    def factors(self, x, y):
        """Return a [A, F] and b [G, F] with scores = a b^T, None if the critic has no factors."""
        if not isinstance(self.module, GaussianQ | Critic) or (
                getattr(self.module, 'kind', '') == 'concatenated'):
            return None
        return self.module.apply({'params': self.params}, x, y, factors=True)

    def own(self, x, y):
        """Score only the pairs themselves, x [A, I], y [A, J] -> [A]."""
        factors = self.factors(x, y)
        if factors is None:
            return jax.vmap(lambda a, b: self(a[None], b[None])[0, 0])(x, y)
        return (factors[0] * factors[1]).sum(-1)

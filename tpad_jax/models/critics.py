"""Critics: score functions of pairs, and vCLUB's variational family."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.models.lora import Linear

KINDS = ('dot', 'bilinear', 'separable', 'concatenated')  # of critics


class MLP(nn.Module):
    """Two layers. [..., I] -> [..., features]."""

    hidden: int
    features: int
    out: Callable = nn.initializers.lecun_uniform()  # of the second layer's kernel

    @nn.compact
    def __call__(self, x):
        """Apply to the last axis of x."""
        x = nn.gelu(Linear(self.hidden, use_bias=True, name='in')(x))
        return Linear(self.features, use_bias=True, kernel=self.out, name='out')(x)


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


def unit(x):
    """x scaled to length one along its last axis; zero stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)

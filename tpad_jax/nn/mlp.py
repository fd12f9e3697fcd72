"""Perceptrons, and scaling to length one."""

from collections.abc import Callable

import flax.linen as nn
import jax

from tpad_jax.nn.linear import Linear


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


def gated(x, hidden, activation=nn.silu, use_bias=False):
    """Apply new layers 'gate', 'up' and 'down' of the calling module (SwiGLU) to x [..., D]."""
    y = activation(Linear(hidden, use_bias, name='gate')(x))
    y = y * Linear(hidden, use_bias, name='up')(x)
    return Linear(x.shape[-1], use_bias, name='down')(y)


def unit(x):
    """Scale x to length one along its last axis. Zero stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)

"""The heads: the parts of a session feature and the distilled vector [ours]."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.nn.linear import MLP, Linear, unit


class Disentangle(nn.Module):
    """c = f_c(t), consistent with item knowledge, and p = f_p(t), the transition part [ours].

    With a bottleneck p ~ N(f_p(t), exp(f_s(t))) (Alemi et al. 2017, arXiv 1612.00410), which starts
    with a small deviation, e^-2.

    Attributes:
      hidden: width of the MLPs.
      features: D.
      bottleneck: whether p is drawn; in evaluation it is the mean.
    """

    hidden: int
    features: int
    bottleneck: bool = False

    @nn.compact
    def __call__(self, t, keys=None):
        """Split a session's features.

        Args:
          t: float [B, N, D].
          keys: of the draws, [B], or None: p is the mean.

        Returns:
          c and p [B, N, D], each of mean square one. With a bottleneck p is as large as its
          distribution has it, and the distribution's mean and log variance follow, [B, N, D] each.
        """
        c, p = (MLP(self.hidden, self.features, name=n)(t) for n in ('consistent', 'transition'))
        c = unit(c) * self.features**0.5
        if not self.bottleneck:
            return c, unit(p) * self.features**0.5
        log_variance = MLP(self.hidden, self.features, nn.initializers.zeros, name='spread')(t) - 4
        drawn = p
        if keys is not None:
            noise = jax.vmap(lambda key: jax.random.normal(key, p.shape[1:]))(keys)
            drawn = p + jnp.exp(log_variance / 2) * noise
        return c, drawn, p, log_variance


class Adapter(nn.Module):
    """r = A(k): one vector over the modalities, of mean square one. [..., M, D] -> [..., M D].

    [ours] It starts as k itself and learns what to add, so r does not have to learn k again.
    """

    hidden: int

    @nn.compact
    def __call__(self, k):
        """Apply to k [..., M, D]."""
        x, zeros = k.reshape(*k.shape[:-2], -1), nn.initializers.zeros
        wide = x.shape[-1]
        y = (x + Linear(wide, kernel=zeros, name='linear')(x)
             + MLP(self.hidden, wide, out=zeros, name='mlp')(x))
        return unit(y) * wide**0.5

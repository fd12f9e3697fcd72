"""The heads: the parts of a session feature and the distilled vector [ours]."""

import flax.linen as nn

from tpad_jax.nn.linear import MLP, Linear, unit


class Disentangle(nn.Module):
    """c = f_c(t), consistent with item knowledge, and p = f_p(t), the transition part [ours]."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, t):
        """Apply to t [..., D] -> c [..., D], p [..., D], each of mean square one."""
        parts = (MLP(self.hidden, self.features, name=n)(t) for n in ('consistent', 'transition'))
        return tuple(unit(x) * self.features**0.5 for x in parts)


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

"""The heads between the MLLMs: what a session feature splits into, and the distilled vector."""

import flax.linen as nn

from tpad_jax.models.critics import MLP, unit
from tpad_jax.models.lora import Linear


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

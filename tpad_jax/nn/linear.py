"""Low-rank adapters (Hu et al. 2021) in a variable collection of their own.

`Linear` is the one place that knows of adapters: where the collection 'lora' holds a pair (a, b)
for it, it adds x a b to its output. A model therefore runs with or without any adapter by what is
passed to `apply`, and several adapters share one frozen base.
"""

import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax.errors import InputError


def uniform(bound):
    """Initialiser: uniform in -bound..bound, which compiles faster than a normal draw."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound)


class Linear(nn.Module):
    """y = x W (+ bias) (+ x a b where an adapter is given). [..., I] -> [..., features]."""

    features: int
    use_bias: bool = False
    kernel: Callable = nn.initializers.lecun_uniform()

    @nn.compact
    def __call__(self, x):
        """Apply the layer to x [..., I]."""
        kernel = self.param('kernel', self.kernel, (x.shape[-1], self.features))
        dtype = x.dtype
        lead = x.shape[:-1]
        # one plain matrix product: on CPU twice as fast as one with batch axes
        x = x.reshape(-1, x.shape[-1])
        y = x @ kernel.astype(dtype)
        if self.use_bias:
            y += self.param('bias', nn.initializers.zeros, (self.features,)).astype(dtype)
        if self.has_variable('lora', 'a'):
            a, b = self.get_variable('lora', 'a'), self.get_variable('lora', 'b')
            y += (x @ a.astype(dtype)) @ b.astype(dtype)
        return y.reshape(*lead, self.features)


def init(key, base, *, rank, targets):
    """A fresh adapter for every kernel of `base` whose path matches the regex `targets`.

    a is uniform with variance 1 / I, b is zero: the adapter starts as nothing. Kernels stacked over
    scanned layers, [layers, I, O], get stacked adapters.

    Raises:
      InputError: the regex matches no kernel.
    """
    flat = {path[:-1]: w for path, w in flatten_dict(base).items()
            if path[-1] == 'kernel' and re.search(targets, '/'.join(path[:-1]))}
    if not flat:
        raise InputError(f'config.model.lora_targets={targets!r} matches no kernel of the base')
    out = {}
    for i, (path, w) in enumerate(sorted(flat.items())):
        *stack, fan_in, fan_out = w.shape
        a = uniform((3 / fan_in) ** 0.5)(jax.random.fold_in(key, i), (*stack, fan_in, rank))
        out[*path, 'a'], out[*path, 'b'] = a, jnp.zeros((*stack, rank, fan_out))
    return unflatten_dict(out)


def scaled(adapter, scale):
    """The adapter with its effect multiplied by `scale` (alpha / rank)."""
    flat = flatten_dict(adapter)
    return unflatten_dict({p: w * scale if p[-1] == 'b' else w for p, w in flat.items()})

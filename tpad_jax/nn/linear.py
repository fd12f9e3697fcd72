"""Dense layers with low-rank adapters (Hu et al. 2021), and perceptrons of them.

Adapters are a separate variable collection that only `Linear` reads. Where the collection 'lora'
has a pair (a, b) for a layer, the layer adds x a b to its output. The variables passed to `apply`
therefore choose the adapter, and several adapters share one frozen base.
"""

import contextlib
import contextvars
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax.errors import refuse_if

KINDS = TEXT, IMAGE, OTHER = range(3)  # of a token: a word, a part of a picture, a learned vector
_ROUTES = contextvars.ContextVar('routes', default=())
# Arguments of nn.scan and nn.vmap for modules whose parameters are stacked on axis 0.
STACKED = dict(variable_axes={'params': 0, 'lora': 0, 'intermediates': 0},
               split_rngs={'params': True})


def uniform(bound):
    """Return an initialiser, uniform in -bound..bound. It compiles faster than a normal draw."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound)


class Linear(nn.Module):
    """y = x W (+ bias) (+ x a b where an adapter is given). [..., I] -> [..., features].

    An adapter a [KINDS, I, r], b [KINDS, r, O] has one pair per kind of token (DAMC, arXiv
    2402.12750), see `routed`.
    """

    features: int
    use_bias: bool = False
    kernel: Callable = nn.initializers.lecun_uniform()

    @nn.compact
    def __call__(self, x):
        """Apply the layer to x [..., I]."""
        kernel = self.param('kernel', self.kernel, (x.shape[-1], self.features))
        dtype = x.dtype
        lead = x.shape[:-1]
        # a matrix product without batch axes is twice as fast on CPU
        x = x.reshape(-1, x.shape[-1])
        y = x @ kernel.astype(dtype)
        if self.use_bias:
            y += self.param('bias', nn.initializers.zeros, (self.features,)).astype(dtype)
        if self.has_variable('lora', 'a'):
            a, b = (self.get_variable('lora', name).astype(dtype) for name in 'ab')
            y += (x @ a) @ b if a.ndim == 2 else _by_kind(x, a, b, lead)
        return y.reshape(*lead, self.features)


@contextlib.contextmanager
def routed(*kinds):
    """Tell the layers that are called inside which kind each token is.

    Args:
      *kinds: int32 [B, L] each, of KINDS. A layer takes the one that is as long as its input.
    """
    token = _ROUTES.set(kinds)
    try:
        yield
    finally:
        _ROUTES.reset(token)


def _by_kind(x, a, b, lead):
    """The effect of an adapter by kind on tokens x [R, I], whose leading axes are `lead`."""
    kind = next((kind for kind in _ROUTES.get() if kind.shape == lead), None)
    refuse_if(kind is None, 'config.model.lora_by_kind: the input of a layer has no kinds of '
              'tokens. Expected layers of the decoder. Fix: narrow config.model.lora_targets.')
    chosen = jax.nn.one_hot(kind.reshape(-1), len(KINDS), dtype=x.dtype)
    return jnp.einsum('nkr,kro->no', jnp.einsum('ni,kir->nkr', x, a) * chosen[..., None], b)


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


def init(key, base, *, rank, targets, by_kind=False):
    """Make an adapter for every kernel of `base` whose path matches a regular expression.

    a is uniform with variance 1 / I and b is zero, so a new adapter changes nothing. Kernels that
    are stacked over layers, [layers, I, O], get stacked adapters.

    Args:
      key: a typed key.
      base: parameters, nested.
      rank: width of the adapters.
      targets: the regular expression.
      by_kind: whether every kind of token has a separate adapter, see `Linear`.

    Raises:
      InputError: the expression matches no kernel.
    """
    flat = {path[:-1]: w for path, w in flatten_dict(base).items()
            if path[-1] == 'kernel' and re.search(targets, '/'.join(path[:-1]))}
    refuse_if(not flat, f'config.model.lora_targets={targets!r}: matches no kernel. Expected a '
              'regular expression of paths such as decoder/layers/attention/q. Fix: widen it')
    out = {}
    for i, (path, w) in enumerate(sorted(flat.items())):
        *stack, fan_in, fan_out = w.shape
        stack += [len(KINDS)] * by_kind
        a = uniform((3 / fan_in) ** 0.5)(jax.random.fold_in(key, i), (*stack, fan_in, rank))
        out[*path, 'a'], out[*path, 'b'] = a, jnp.zeros((*stack, rank, fan_out))
    return unflatten_dict(out)


def scaled(adapter, scale):
    """Multiply the effect of an adapter by `scale`, which is alpha / rank."""
    flat = flatten_dict(adapter)
    return unflatten_dict({p: w * scale if p[-1] == 'b' else w for p, w in flat.items()})


def misfits(params: dict, shapes: dict) -> str:
    """Describe which parameters are missing, unexpected or of another shape. '': none.

    Args:
      params: {path: array}.
      shapes: {path: its shape}.
    """
    actual = {path: list(x.shape) for path, x in params.items()}
    rule = {path: list(shape) for path, shape in shapes.items()}
    return '; '.join(f'{path} is {actual.get(path, "missing")}, not {rule.get(path, "expected")}'
                     for path in sorted(actual.keys() | rule.keys())
                     if actual.get(path) != rule.get(path))

"""One causal decoder for Llama, Qwen2, Qwen3 and the Qwen-VL families; layers are scanned.

RMSNorm, grouped-query attention with rotary positions in one coordinate or three, SwiGLU. What a
family adds is a field of spec.Decoder. Parameters may be stored in any dtype; the dtype of the
embeddings is that of the computation, norms and softmax being float32.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.models.hf import spec as specs
from tpad_jax.models.hf.layers import attend, rematerialised, rotate
from tpad_jax.nn.linear import Linear
from tpad_jax.nn.transformer import RMSNorm


def coordinates(spec: specs.Decoder) -> np.ndarray:
    """Which position coordinate turns each rotary frequency, int [hd / 2].

    Blocks of `sections` (Qwen2-VL, arXiv 2409.12191), or alternating t h w t h w ... for as long as
    rows and columns have frequencies left (Qwen3-VL); 0 without M-RoPE.
    """
    half = spec.head_dim // 2
    if not spec.sections:
        return np.zeros(half, int)
    if not spec.interleaved:
        return np.repeat(np.arange(3), spec.sections)
    out = np.zeros(half, int)
    for axis in (1, 2):
        out[axis:3 * spec.sections[axis]:3] = axis
    return out


def angles(spec: specs.Decoder, positions):
    """cos and sin [B, L, 1, hd / 2] float32 of positions int32 [B, L, 3]."""
    half = spec.head_dim // 2
    frequency = spec.theta ** -(np.arange(half) / half)
    turned = positions[..., coordinates(spec)].astype(jnp.float32) * frequency.astype(np.float32)
    return jnp.cos(turned)[:, :, None], jnp.sin(turned)[:, :, None]


def tokens_at(x, at, axis: int = 1):
    """Tokens at int32 [B, n] of x, [B, L, ...] for axis 1; None: all of them."""
    if at is None:
        return x
    where = at.reshape(len(at), *(1,) * (axis - 1), -1, *(1,) * (x.ndim - axis - 1))
    return jnp.take_along_axis(x, where, axis)


class Attention(nn.Module):
    """Grouped-query self-attention; with a cache, over what was read before as well."""

    spec: specs.Decoder
    how: str

    @nn.compact
    def __call__(self, x, cos, sin, allowed, cache, number, index, at=None):
        """x [B, L, D], allowed bool [B, 1, L, S]; cache (k, v) of all layers, of which this is
        layer `number`, or None; at int32 [B, n]: the tokens whose result is wanted, None: all.
        """
        s = self.spec

        def heads(name, count, x):
            y = Linear(count * s.head_dim, s.qkv_bias, name=name)(x)
            return einops.rearrange(y, 'b l (h d) -> b l h d', h=count)

        q = heads('q', s.heads, tokens_at(x, at))
        k, v = heads('k', s.kv_heads, x), heads('v', s.kv_heads, x)
        if s.qk_norm:
            q, k = RMSNorm(s.eps, name='q_norm')(q), RMSNorm(s.eps, name='k_norm')(k)
        q, k = rotate(q, tokens_at(cos, at), tokens_at(sin, at)), rotate(k, cos, sin)
        allowed = tokens_at(allowed, at, axis=2)
        if cache is not None:
            cache = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype),
                                             (number, 0, index, 0, 0))
                for old, new in zip(cache, (k, v), strict=True))
            k, v = (jax.lax.dynamic_index_in_dim(c, number, keepdims=False) for c in cache)
        y = attend(q, k.astype(q.dtype), v.astype(q.dtype), allowed, self.how)
        return Linear(s.width, name='o')(einops.rearrange(y, 'b l h d -> b l (h d)')), cache


class Block(nn.Module):
    """One layer, written as a scan body: carry (x, cache of all layers, number).

    The cache is carried, not scanned over: so a step writes one token into it in place.
    """

    spec: specs.Decoder
    how: str
    every: bool

    @nn.compact
    def __call__(self, carry, cos, sin, allowed, deep, index, at=None):
        """-> (x, cache, number + 1), states before the deep features or None; of tokens at int32
        [B, n] alone, where that is given.
        """
        (x, cache, number), s = carry, self.spec
        attention = Attention(s, self.how, name='attention')
        y, cache = attention(RMSNorm(s.eps, name='attention_norm')(x), cos, sin, allowed, cache,
                             number, index, at)
        x = tokens_at(x, at) + y
        y = RMSNorm(s.eps, name='mlp_norm')(x)
        y = nn.silu(Linear(s.hidden, name='gate')(y)) * Linear(s.hidden, name='up')(y)
        x = x + Linear(s.width, name='down')(y)
        state = x if self.every else None
        if deep is not None:
            depth = deep.shape[2]
            own = jax.lax.dynamic_index_in_dim(deep, jnp.minimum(number, depth - 1), 2, False)
            own = tokens_at(own, at)
            x = x + jnp.where(number < depth, own, 0).astype(x.dtype)
        return (x, cache, number + 1), state


class Decoder(nn.Module):
    """All layers and the last norm.

    Attributes:
      spec: sizes. how: attention, see layers.ATTENTION. remat: see layers.REMAT.
    """

    spec: specs.Decoder
    how: str = 'xla'
    remat: str = 'none'

    @nn.compact
    def __call__(self, x, positions, allowed, deep=None, cache=None, index=0, every=False,
                 at=None):
        """Decode.

        Args:
          x: [B, L, D]. positions: int32 [B, L, 3]. allowed: bool [B, 1, L, S], what a token sees.
          deep: [B, L, n, D], added to the states behind the first n layers, or None.
          cache: (k, v), each [layers, B, S, KV, hd], written at `index`, or None: then S = L.
          every: also return the states behind each layer.
          at: int32 [B, n], the tokens whose states are wanted, which spares the last layer the
            others; None: all. Not with a cache or `every`.

        Returns:
          states [B, L or n, D] after the last norm, states behind each layer [layers, B, L, D] or
          None (before deep features are added, as transformers counts them), the cache.
        """
        cos, sin = angles(self.spec, positions)
        if at is not None and not self.is_initializing():
            x = self._read_at(x, at, cos, sin, allowed, deep)
            return RMSNorm(self.spec.eps, name='norm')(x), None, None
        block = nn.scan(rematerialised(Block, self.remat), length=self.spec.layers,
                        variable_axes={'params': 0, 'lora': 0}, split_rngs={'params': True},
                        in_axes=nn.broadcast)
        (x, cache, _), states = block(self.spec, self.how, every, name='layers')(
            (x, cache, jnp.int32(0)), cos, sin, allowed, deep, index)
        return tokens_at(RMSNorm(self.spec.eps, name='norm')(x), at), states, cache

    def _read_at(self, x, at, *shared):
        """States [B, n, D] behind the last layer, which computes only these tokens' queries."""
        stacked = {kind: self.variables[kind]['layers'] for kind in ('params', 'lora')
                   if 'layers' in self.variables.get(kind, ())}
        block, last = Block(self.spec, self.how, every=False, parent=None), self.spec.layers - 1

        def layer(x, number, at=None):
            own = jax.tree.map(lambda leaf: leaf[number], stacked)  # read in place, never copied
            (x, *_), _ = block.apply(own, (x, None, number), *shared, 0, at)
            return x, None

        x, _ = jax.lax.scan(rematerialised(layer, self.remat, jax.checkpoint), x, jnp.arange(last))
        return layer(x, last, at)[0]

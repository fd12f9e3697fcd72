"""One causal decoder for Llama, Qwen2, Qwen3 and the Qwen-VL families, with scanned layers.

RMSNorm, grouped-query attention with rotary positions in one or three coordinates, SwiGLU. The
fields of spec.Decoder describe the differences between families. Parameters may have any dtype. The
computation has the dtype of the embeddings; norms and softmax are float32.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.models.hf import spec as specs
from tpad_jax.models.hf.layers import attend, rematerialised
from tpad_jax.nn.attention import RMSNorm, received, rotate
from tpad_jax.nn.linear import STACKED, Linear, gated


def coordinates(spec: specs.Decoder) -> np.ndarray:
    """Return the position coordinate that each rotary frequency uses, int [hd / 2].

    Qwen2-VL (arXiv 2409.12191) has blocks of `sections`. Qwen3-VL alternates t h w t h w ... while
    rows and columns have frequencies left. Without M-RoPE all are 0.
    """
    if spec.sections and not spec.interleaved:
        return np.repeat(np.arange(3), spec.sections)
    out = np.zeros(spec.head_dim // 2, int)
    for axis in (1, 2) if spec.sections else ():
        out[axis:3 * spec.sections[axis]:3] = axis
    return out


def angles(spec: specs.Decoder, positions):
    """Return cos and sin float32 [B, L, 1, hd / 2] of positions int32 [B, L, 3]."""
    half = spec.head_dim // 2
    frequency = spec.theta ** -(np.arange(half) / half)
    angle = positions[..., coordinates(spec)].astype(jnp.float32) * frequency.astype(np.float32)
    return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def tokens_at(x, at, axis: int = 1):
    """Select tokens of x.

    Args:
      x: [B, L, ...] for axis 1.
      at: int32 [B, n]. None: all tokens.
      axis: of the tokens.
    """
    if at is None:
        return x
    index = at.reshape(len(at), *(1,) * (axis - 1), -1, *(1,) * (x.ndim - axis - 1))
    return jnp.take_along_axis(x, index, axis)


class Attention(nn.Module):
    """Grouped-query self-attention, also over the tokens in a cache."""

    spec: specs.Decoder
    how: str

    @nn.compact
    def __call__(self, x, cos, sin, allowed, cache, number, index, at=None):
        """Attend.

        Args:
          x: float [B, L, D].
          cos: of `angles`.
          sin: of `angles`.
          allowed: bool [B, 1, L, S].
          cache: (k, v) of all layers, or None.
          number: of this layer.
          index: tokens in the cache.
          at: int32 [B, n]. The tokens whose result is needed. None: all.

        Returns:
          float [B, L or n, D], and the cache with the new tokens.
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
            cache = tuple(jax.lax.dynamic_update_slice(
                old, new[None].astype(old.dtype), (number, 0, index, 0, 0))
                for old, new in zip(cache, (k, v), strict=True))
            k, v = (jax.lax.dynamic_index_in_dim(c, number, keepdims=False) for c in cache)
        if self.is_mutable_collection('intermediates') and cache is None and at is None:
            self.sow('intermediates', 'received', received(q, k, allowed))
        y = attend(q, k.astype(q.dtype), v.astype(q.dtype), allowed, self.how)
        return Linear(s.width, name='o')(einops.rearrange(y, 'b l h d -> b l (h d)')), cache


class Block(nn.Module):
    """One layer, a scan body with carry (x, cache of all layers, number).

    The scan carries the cache, so a step writes one token into it in place.
    """

    spec: specs.Decoder
    how: str

    @nn.compact
    def __call__(self, carry, cos, sin, allowed, deep, index, at=None):
        """Apply the layer.

        Args:
          carry: (x, cache, number).
          cos: of `angles`.
          sin: of `angles`.
          allowed: bool [B, 1, L, S].
          deep: see `Decoder`.
          index: tokens in the cache.
          at: int32 [B, n]. The tokens whose states are needed. None: all.

        Returns:
          (x, cache, number + 1), and None. As in transformers, 'state' in the collection
          'intermediates' is x before deep features are added.
        """
        (x, cache, number), s = carry, self.spec
        attention = Attention(s, self.how, name='attention')
        y, cache = attention(RMSNorm(s.eps, name='attention_norm')(x), cos, sin, allowed, cache,
                             number, index, at)
        x = tokens_at(x, at) + y
        x = x + gated(RMSNorm(s.eps, name='mlp_norm')(x), s.hidden)
        self.sow('intermediates', 'state', x)
        if deep is not None:
            depth = deep.shape[2]
            extra = jax.lax.dynamic_index_in_dim(deep, jnp.minimum(number, depth - 1), 2, False)
            x = x + jnp.where(number < depth, tokens_at(extra, at), 0).astype(x.dtype)
        return (x, cache, number + 1), None


class Decoder(nn.Module):
    """All layers and the final norm.

    Attributes:
      spec: sizes.
      how: of attention, one of layers.ATTENTION.
      remat: one of layers.REMAT.
    """

    spec: specs.Decoder
    how: str = 'xla'
    remat: str = 'none'

    @nn.compact
    def __call__(self, x, positions, allowed, deep=None, cache=None, index=0, at=None):
        """Decode.

        Args:
          x: float [B, L, D].
          positions: int32 [B, L, 3].
          allowed: bool [B, 1, L, S]. The tokens that each token sees.
          deep: float [B, L, n, D]. Features that are added after the first n layers. None: none.
          cache: (k, v), each [layers, B, S, KV, hd]. None: S = L.
          index: where new tokens are written to the cache.
          at: int32 [B, n]. The tokens whose states are needed. The last layer computes only these.
            None: all. Not with a cache.

        Returns:
          States [B, L or n, D] after the final norm, and the cache.
        """
        cos, sin = angles(self.spec, positions)
        if at is not None and not self.is_initializing():
            x = self._read_at(x, at, cos, sin, allowed, deep)
            return RMSNorm(self.spec.eps, name='norm')(x), None
        block = nn.scan(rematerialised(Block, self.remat), length=self.spec.layers,
                        in_axes=nn.broadcast, **STACKED)
        (x, cache, _), _ = block(self.spec, self.how, name='layers')(
            (x, cache, jnp.int32(0)), cos, sin, allowed, deep, index)
        return tokens_at(RMSNorm(self.spec.eps, name='norm')(x), at), cache

    def _read_at(self, x, at, *shared):
        """Return states [B, n, D] after the last layer, which computes only these queries."""
        stacked = {kind: self.variables[kind]['layers'] for kind in ('params', 'lora')
                   if 'layers' in self.variables.get(kind, ())}
        block, last = Block(self.spec, self.how, parent=None), self.spec.layers - 1

        def layer(x, number, at=None):
            variables = jax.tree.map(lambda leaf: leaf[number], stacked)  # XLA does not copy them
            (x, *_), _ = block.apply(variables, (x, None, number), *shared, 0, at)
            return x, None

        x, _ = jax.lax.scan(rematerialised(layer, self.remat, jax.checkpoint), x, jnp.arange(last))
        return layer(x, last, at)[0]

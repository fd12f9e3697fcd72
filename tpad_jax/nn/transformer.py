"""A pre-norm transformer: RMSNorm, attention, SwiGLU. A scan compiles its layers once."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.nn.attention import Attention
from tpad_jax.nn.linear import STACKED
from tpad_jax.nn.mlp import gated


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32. [..., D] -> [..., D]."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        """Normalise the last axis of x."""
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


class Block(nn.Module):
    """One layer; written as a scan body: carry (x, mask, positions) -> same."""

    heads: int
    hidden: int
    causal: bool

    @nn.compact
    def __call__(self, carry, _):
        """Apply the layer to x [B, L, D]."""
        x, mask, positions = carry
        attention = Attention(self.heads, self.causal, name='attention')
        x = x + attention(RMSNorm(name='attention_norm')(x), mask, positions)
        x = x + gated(RMSNorm(name='mlp_norm')(x), self.hidden)
        return (x, mask, positions), None


class Transformer(nn.Module):
    """Blocks and a final norm.

    Attributes:
      layers: number of blocks.
      heads: attention heads per block.
      hidden: inner width of the SwiGLU.
      causal: whether a position sees only itself and earlier positions.
    """

    layers: int
    heads: int
    hidden: int
    causal: bool = True

    @nn.compact
    def __call__(self, x, mask):
        """Encode x [B, L, D] with mask bool [B, L] -> [B, L, D]. Positions skip padding."""
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        layers = nn.scan(Block, length=self.layers, **STACKED)(
            self.heads, self.hidden, self.causal, name='layers')
        (x, _, _), _ = layers((x, mask, positions), None)
        return RMSNorm(name='norm')(x)

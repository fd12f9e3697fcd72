"""The vision tower of the small base: a convolutional stem, then a short transformer.

A ViT of this size does not learn shapes from some ten thousand images. With the stem it does
[ours].
"""

import einops
import flax.linen as nn
import jax.numpy as jnp

from tpad_jax.nn.transformer import Transformer


class VisionTower(nn.Module):
    """Image -> image tokens.

    Attributes:
      channels: widths of the stem's stages, each halving the resolution.
      layers: of the transformer over the cells.
      heads: of the transformer over the cells.
    """

    channels: tuple[int, ...] = (32, 64, 128)
    layers: int = 1
    heads: int = 4

    @nn.compact
    def __call__(self, image):
        """Encode image uint8 [B, H, W, 3] -> [B, P, channels[-1]], P = H W / 4^stages."""
        x = image.astype(jnp.float32) / 127.5 - 1
        for i, width in enumerate(self.channels):
            x = nn.Conv(width, (3, 3), strides=2, name=f'conv_{i}')(x)
            x = nn.silu(nn.GroupNorm(num_groups=8, name=f'norm_{i}')(x))
        cells = x.shape[1:3]
        place = self.param('place', nn.initializers.normal(0.02), (*cells, self.channels[-1]))
        x = einops.rearrange(x + place, 'b h w d -> b (h w) d')
        width = self.channels[-1]
        encoder = Transformer(self.layers, self.heads, 2 * width, causal=False, name='encoder')
        return encoder(x, jnp.ones(x.shape[:2], bool))

"""The vision transformers of CLIP and SigLIP, up to the states that a projector reads."""

import flax.linen as nn
import jax.numpy as jnp

from tpad_jax.models.hf import spec
from tpad_jax.models.hf.layers import attend, layer_norm, perceptron, rematerialised
from tpad_jax.nn.linear import STACKED, Linear, uniform


class Attention(nn.Module):
    """Attention of every token to all tokens. [B, P, W] -> [B, P, W]."""

    heads: int
    how: str

    @nn.compact
    def __call__(self, x):
        """Attend among x [B, P, W]."""
        width = x.shape[-1]
        q, k, v = (Linear(width, use_bias=True, name=n)(x).reshape(*x.shape[:2], self.heads, -1)
                   for n in 'qkv')
        y = attend(q, k, v, None, self.how).reshape(x.shape)
        return Linear(width, use_bias=True, name='o')(y)


class Block(nn.Module):
    """One pre-norm layer, a scan body with carry x [B, P, W]."""

    tower: spec.Tower
    how: str

    @nn.compact
    def __call__(self, x, _):
        """Apply the layer to x."""
        tower = self.tower
        y = layer_norm(x, tower.eps, 'norm1')
        x = x + Attention(tower.heads, self.how, name='attention')(y)
        y = layer_norm(x, tower.eps, 'norm2')
        return x + perceptron(y, tower.hidden, tower.width, tower.activation), None


class VisionTransformer(nn.Module):
    """The first `tower.layers` blocks of a tower, without its final norm and its pooling.

    Attributes:
      tower: sizes.
      how: of attention, one of layers.ATTENTION.
      remat: one of layers.REMAT.
    """

    tower: spec.Tower
    how: str = 'xla'
    remat: str = 'none'

    @nn.compact
    def __call__(self, patches):
        """Encode patches of normalised pixels in their dtype.

        Args:
          patches: float [B, P, 3 p p].

        Returns:
          [B, P, W], or [B, 1 + P, W] with the class token first if tower.keep_class.
        """
        tower, clip = self.tower, self.tower.kind == 'clip'
        x = Linear(tower.width, use_bias=not clip, name='patch')(patches)
        if clip:
            first = self.param('class', uniform(0.02), (tower.width,)).astype(x.dtype)
            first = jnp.broadcast_to(first, (x.shape[0], 1, tower.width))
            x = jnp.concatenate([first, x], axis=1)
        # positions of the native size; an image of another size fails to broadcast
        count = (tower.image // tower.patch) ** 2 + clip
        x += self.param('place', uniform(0.02), (count, tower.width)).astype(x.dtype)
        if clip:
            x = layer_norm(x, tower.eps, 'pre_norm')
        scanned = nn.scan(rematerialised(Block, self.remat), length=tower.layers, **STACKED)
        x, _ = scanned(tower, self.how, name='layers')(x, None)
        return x[:, 1:] if clip and not tower.keep_class else x

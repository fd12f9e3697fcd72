"""The small multimodal language model of the default base: vision tower, projector, decoder.

`hf.vlm.VLM` has the same methods and replaces it when a checkpoint is used. Both readers call only
these methods.
"""

import einops
import flax.linen as nn
import jax.numpy as jnp

from tpad_jax.core.precision import mllm_precision
from tpad_jax.models import stream as streams
from tpad_jax.nn.attention import Transformer
from tpad_jax.nn.linear import IMAGE, Linear, routed


class VisionTower(nn.Module):
    """Image -> image tokens: a convolutional stem, then a short transformer.

    A ViT of this size does not learn shapes from some ten thousand images. With the stem it does
    [ours].

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


class MLLM(nn.Module):
    """Image and text tokens in one causal decoder. Input and output share the embedding.

    Attributes:
      vocab: number of tokens.
      width: of the decoder's states.
      layers: of the decoder.
      heads: of the decoder and the vision tower.
      hidden: inner width of the decoder's SwiGLU.
      channels: of the vision tower's stem.
      vision_layers: of the vision tower.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    hidden: int
    channels: tuple[int, ...]
    vision_layers: int
    before = between = end = ()  # token ids around the content; a checkpoint's VLM has some

    def setup(self):
        """Build the parts."""
        self.vision = VisionTower(tuple(self.channels), self.vision_layers, self.heads)
        self.projector = [Linear(self.width, use_bias=True), Linear(self.width, use_bias=True)]
        self.embed = nn.Embed(self.vocab, self.width,
                              embedding_init=nn.initializers.normal(self.width**-0.5))
        self.decoder = Transformer(self.layers, self.heads, self.hidden)

    @mllm_precision
    def frame(self, image, there) -> streams.Stream:
        """Encode images as tokens [B, P, D].

        Args:
          image: uint8 [B, H, W, 3].
          there: bool [B]. Whether an item has an image.

        Images of side 0 are none: the result has no tokens.
        """
        if not image.shape[1]:
            return streams.plain(jnp.zeros((len(there), 0, self.width)))
        x = self.projector[1](nn.gelu(self.projector[0](self.vision(image))))
        return streams.plain(x, there[:, None], IMAGE)

    def grid(self, side: int) -> tuple[int, int, int]:
        """Return the index of an image's first cell in `frame`, and the rows and columns."""
        cells = -(-side // 2 ** len(self.channels))
        return 0, cells, cells

    def words(self, tokens):
        """Embed token ids int32 [...] -> [..., D]."""
        return self.embed(tokens)

    say = streams.say

    @mllm_precision
    def __call__(self, stream: streams.Stream, at=None):
        """Read a stream [B, L].

        Args:
          stream: the tokens.
          at: int32 [B, n]. The tokens whose states are needed. None: all.

        Returns:
          States [B, L or n, D] after the final norm.
        """
        with routed(stream.kind):
            h = self.decoder(stream.x, stream.mask)
        return h if at is None else jnp.take_along_axis(h, at[:, :, None], axis=1)

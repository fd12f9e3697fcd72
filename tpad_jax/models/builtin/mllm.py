"""The small multimodal language model of the default base: vision tower, projector, decoder.

`hf.vlm.VLM` has the same methods and replaces it when a checkpoint is used. Both readers call only
these methods.
"""

import flax.linen as nn
import jax.numpy as jnp

from tpad_jax.core.precision import mllm_precision
from tpad_jax.models import stream as streams
from tpad_jax.models.builtin.vision import VisionTower
from tpad_jax.models.stream import Stream
from tpad_jax.nn.linear import Linear
from tpad_jax.nn.transformer import Transformer


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
      before: token ids before the content of an item or a session; none.
      between: token ids between parts; none.
      end: token ids after the content; none.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    hidden: int
    channels: tuple[int, ...]
    vision_layers: int
    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def setup(self):
        """Build the parts."""
        self.vision = VisionTower(tuple(self.channels), self.vision_layers, self.heads)
        self.projector = [Linear(self.width, use_bias=True), Linear(self.width, use_bias=True)]
        self.embed = nn.Embed(self.vocab, self.width,
                              embedding_init=nn.initializers.normal(self.width**-0.5))
        self.decoder = Transformer(self.layers, self.heads, self.hidden)

    @mllm_precision
    def frame(self, image, there) -> Stream:
        """Encode images as tokens [B, P, D].

        Args:
          image: uint8 [B, H, W, 3].
          there: bool [B]. Whether an item has an image.
        """
        x = self.projector[1](nn.gelu(self.projector[0](self.vision(image))))
        return streams.plain(x, there[:, None])

    def grid(self, side: int) -> tuple[int, int, int]:
        """Return the index of an image's first cell in `frame`, and the rows and columns."""
        cells = -(-side // 2 ** len(self.channels))
        return 0, cells, cells

    def words(self, tokens):
        """Embed token ids int32 [...] -> [..., D]."""
        return self.embed(tokens)

    def say(self, tokens, mask) -> Stream:
        """Make a part of a stream from token ids int32 [..., T] and mask bool [..., T]."""
        return streams.plain(self.words(tokens), mask)

    @mllm_precision
    def __call__(self, stream: Stream, at=None):
        """Read a stream [B, L].

        Args:
          stream: the tokens.
          at: int32 [B, n]. The tokens whose states are needed. None: all.

        Returns:
          States [B, L or n, D] after the final norm.
        """
        h = self.decoder(stream.x, stream.mask)
        return h if at is None else jnp.take_along_axis(h, at[:, :, None], axis=1)

"""The small multimodal language model of the default base: vision tower, projector, decoder.

It has the same few methods as `hf.vlm.VLM`, which stands in its place with a real checkpoint: both
readers are written against these.
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
    """Image and text tokens in one causal decoder; the output embedding is the input's, tied.

    Attributes:
      vocab: size of the token vocabulary.
      width, layers, heads, hidden: the decoder.
      channels, vision_layers: the vision tower (see VisionTower).
      before, between, end: token ids around an item's or a session's content: none.
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
        """Images uint8 [B, H, W, 3], there bool [B] -> their tokens [B, P, D]."""
        x = self.projector[1](nn.gelu(self.projector[0](self.vision(image))))
        return streams.plain(x, there[:, None])

    def grid(self, side: int) -> tuple[int, int, int]:
        """Where in `frame` an image's cells begin, and how many rows and columns they have."""
        cells = -(-side // 2 ** len(self.channels))
        return 0, cells, cells

    def words(self, tokens):
        """Token ids int32 [...] -> embeddings [..., D]."""
        return self.embed(tokens)

    def say(self, tokens, mask) -> Stream:
        """Token ids int32 [..., T], mask bool [..., T] -> their part of a stream."""
        return streams.plain(self.words(tokens), mask)

    @mllm_precision
    def __call__(self, stream: Stream, at=None):
        """Read a stream [B, L] -> hidden states [B, L, D] after the last norm, or of tokens at
        int32 [B, n] alone, [B, n, D].
        """
        h = self.decoder(stream.x, stream.mask)
        return h if at is None else jnp.take_along_axis(h, at[:, :, None], axis=1)

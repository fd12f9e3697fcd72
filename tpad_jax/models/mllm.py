"""The multimodal language model both encoders share: vision tower, projector, decoder."""

import flax.linen as nn

from tpad_jax.models.lora import Linear
from tpad_jax.models.transformer import Transformer
from tpad_jax.models.vision import VisionTower


class MLLM(nn.Module):
    """Image and text tokens in one causal decoder; the output embedding is the input's, tied.

    Attributes:
      vocab: size of the token vocabulary; token 0 is padding.
      width, layers, heads, hidden: the decoder.
      channels, vision_layers: the vision tower (see VisionTower).
    """

    vocab: int
    width: int
    layers: int
    heads: int
    hidden: int
    channels: tuple[int, ...]
    vision_layers: int

    def setup(self):
        """Build the parts."""
        self.vision = VisionTower(tuple(self.channels), self.vision_layers, self.heads)
        self.projector = [Linear(self.width, use_bias=True), Linear(self.width, use_bias=True)]
        self.embed = nn.Embed(self.vocab, self.width,
                              embedding_init=nn.initializers.normal(self.width**-0.5))
        self.decoder = Transformer(self.layers, self.heads, self.hidden)

    def see(self, image):
        """Image uint8 [B, H, W, 3] -> image tokens [B, P, D]."""
        return self.projector[1](nn.gelu(self.projector[0](self.vision(image))))

    def words(self, tokens):
        """Token ids int32 [B, T] -> embeddings [B, T, D]."""
        return self.embed(tokens)

    def __call__(self, x, mask):
        """Decode embeddings x [B, L, D], mask bool [B, L] -> hidden states [B, L, D]."""
        return self.decoder(x, mask)

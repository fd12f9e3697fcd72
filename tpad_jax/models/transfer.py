"""Transfer-MLLM: reads a session item by item, yields a transition-aware feature at each position.

[paper] a Transfer-MLLM reads sessions beside the Knowledge-MLLM.
[ours] the two share one frozen base and differ in their adapters; an item is fed as a few tokens
made from its knowledge features ('compressed') or as its image and text tokens ('full'); a summary
token after each item has seen i_1..i_j only; the next item's text is written from that token alone.
"""

import einops
import flax.linen as nn
import jax.numpy as jnp

from tpad_jax.models.knowledge import MODALITIES, Writer, masked_mean
from tpad_jax.models.lora import Linear, uniform
from tpad_jax.models.mllm import MLLM
from tpad_jax.models.transformer import RMSNorm


class TransferMLLM(nn.Module):
    """Session -> t, and t -> the next item's text.

    Attributes:
      base: the shared MLLM (its parameters stand under 'base').
      features: width D of t.
    """

    base: MLLM
    features: int

    def setup(self):
        """Build the heads."""
        small = uniform(0.03)
        self.prompt = self.param('prompt', small, (1, self.base.width))
        self.summary = self.param('summary', small, (1, self.base.width))
        self.into = [Linear(self.base.width, use_bias=True) for _ in MODALITIES]
        self.norm = RMSNorm()
        self.head = Linear(self.features, use_bias=True)
        self.writer = Writer()

    def compress(self, k):
        """Knowledge features k [..., M, D] -> item tokens [..., M, width]."""
        return jnp.stack([into(k[..., m, :]) for m, into in enumerate(self.into)], axis=-2)

    def unfold(self, image, has_image, tokens):
        """An item's image and text tokens and their mask: [U, P + T, width], bool [U, P + T]."""
        seen = self.base.see(image)
        image_mask = jnp.broadcast_to(has_image[:, None], seen.shape[:2])
        x = jnp.concatenate([seen, self.base.words(tokens)], axis=1)
        return x, jnp.concatenate([image_mask, tokens > 0], axis=1)

    def __call__(self, x, token_mask, mask):
        """Read sessions.

        Args:
          x: item tokens [B, N, L, width] from `compress` or `unfold`.
          token_mask: bool [B, N, L], tokens that exist; mask: bool [B, N], positions that do.

        Returns:
          t [B, N, D]; t[:, j] depends on positions up to j alone.
        """
        rows, positions = mask.shape
        summary = jnp.broadcast_to(self.summary, (rows, positions, 1, self.base.width))
        x = jnp.concatenate([x, summary], axis=2)
        token_mask = jnp.concatenate([token_mask, jnp.ones((rows, positions, 1), bool)], axis=2)
        token_mask = token_mask & mask[:, :, None]
        prompt = jnp.broadcast_to(self.prompt, (rows, *self.prompt.shape))
        flat = jnp.concatenate([prompt, einops.rearrange(x, 'b n l d -> b (n l) d')], axis=1)
        flat_mask = jnp.concatenate([jnp.ones((rows, 1), bool),
                                     einops.rearrange(token_mask, 'b n l -> b (n l)')], axis=1)
        h = self.base(flat, flat_mask)[:, 1:]
        h = einops.rearrange(h, 'b (n l) d -> b n l d', n=positions)
        skip = masked_mean(h[:, :, :-1], token_mask[:, :, :-1])
        return self.head(self.norm(h[:, :, -1] + skip))

    def foretell(self, t, tokens, keep):
        """Hidden states [B, T, width] that predict the next item's tokens [B, T] from t [B, D]."""
        return self.writer(self.base, t[:, None], tokens, keep)

    def everything(self, k, mask, image, has_image, tokens):
        """Touch every parameter once: what initialisation calls."""
        self.unfold(image, has_image, tokens)
        x = self.compress(k)
        t = self(x, jnp.ones(x.shape[:3], bool), mask)
        return self.foretell(t[:, 0], tokens, tokens > 0)

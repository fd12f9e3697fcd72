"""Knowledge-MLLM: reads one item, yields knowledge-aware features, one vector per modality.

[paper] a Knowledge-MLLM reads items by image and text and learns by a generation task.
[ours] one summary token per modality closes the prompt; a feature is read from its hidden state
plus the mean over its modality's tokens (without that skip the summary tokens stayed empty); and
the description is written by a second pass of the decoder that is given the features alone, so that
whatever the description needs has to pass through them.
"""

import flax.linen as nn
import jax.numpy as jnp

from tpad_jax.models.lora import Linear
from tpad_jax.models.mllm import MLLM
from tpad_jax.models.transformer import RMSNorm

MODALITIES = ('image', 'text')


def masked_mean(x, mask):
    """Mean of x [..., L, D] over mask bool [..., L] -> [..., D]; zero where nothing is unmasked."""
    weight = mask[..., None].astype(x.dtype)
    return (x * weight).sum(-2) / jnp.maximum(weight.sum(-2), 1)


class Writer(nn.Module):
    """Turns features into the hidden states that predict a text. [B, K, D] -> [B, T, width].

    The decoder sees the K feature tokens and the words before; `keep` withholds some of those
    words.
    """

    @nn.compact
    def __call__(self, base, features, tokens, keep):
        """Write tokens int32 [B, T] from features [B, K, D]; keep bool [B, T]: words it may see."""
        prefix = Linear(base.width, use_bias=True, name='prefix')(features)
        blank = self.param('blank', nn.initializers.normal(0.02), (base.width,))
        words = jnp.where(keep[..., None], base.words(tokens), blank)[:, :-1]
        x = jnp.concatenate([prefix, words], axis=1)
        seen = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), tokens[:, :-1] > 0], axis=1)
        return base(x, seen)[:, prefix.shape[1] - 1:]


class KnowledgeMLLM(nn.Module):
    """Item -> features k, and k -> the item's description.

    Attributes:
      base: the shared MLLM (its parameters stand under 'base').
      features: width D of a modality's feature.
    """

    base: MLLM
    features: int

    def setup(self):
        """Build the heads."""
        small = nn.initializers.normal(0.02)
        self.prompt = self.param('prompt', small, (1, self.base.width))
        self.summary = self.param('summary', small, (len(MODALITIES), self.base.width))
        self.norm = RMSNorm()
        self.head = [Linear(self.features, use_bias=True) for _ in MODALITIES]
        self.writer = Writer()

    def __call__(self, image, has_image, tokens, keep=None):
        """Read items.

        Args:
          image: uint8 [U, H, W, 3]; has_image: bool [U], False: the image is not looked at.
          tokens: int32 [U, T], 0 pads.
          keep: bool [U, T], False: the word is withheld; None: the whole text is given.

        Returns:
          k [U, M, D].
        """
        seen, words = self.base.see(image), self.base.words(tokens)
        rows = image.shape[0]
        image_mask = jnp.broadcast_to(has_image[:, None], seen.shape[:2])
        text_mask = tokens > 0 if keep is None else (tokens > 0) & keep
        ends = (rows, len(MODALITIES), self.base.width)
        start = jnp.broadcast_to(self.prompt, (rows, *self.prompt.shape))
        x = jnp.concatenate([start, seen, words, jnp.broadcast_to(self.summary, ends)], axis=1)
        mask = jnp.concatenate([jnp.ones((rows, 1), bool), image_mask, text_mask,
                                jnp.ones(ends[:2], bool)], axis=1)
        h = self.base(x, mask)
        split = 1 + seen.shape[1]
        pooled = (masked_mean(h[:, 1:split], image_mask),
                  masked_mean(h[:, split:-len(MODALITIES)], text_mask))
        ends = h[:, -len(MODALITIES):]
        return jnp.stack([head(self.norm(ends[:, m] + pooled[m]))
                          for m, head in enumerate(self.head)], axis=1)

    def describe(self, k, tokens, keep):
        """Hidden states [B, T, width] that predict tokens int32 [B, T] from k [B, M, D] alone."""
        return self.writer(self.base, k, tokens, keep)

    def everything(self, image, has_image, tokens):
        """Touch every parameter once: what initialisation calls."""
        k = self(image, has_image, tokens)
        return self.describe(k, tokens, tokens > 0)

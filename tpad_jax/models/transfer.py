"""Transfer-MLLM: reads a session item by item, yields a transition-aware feature at each position.

[paper] a Transfer-MLLM reads sessions, next to the Knowledge-MLLM.
[ours] the two share one frozen base and differ in their adapters; an item is fed as a few tokens
made from its knowledge features ('compressed') or as its image and text tokens ('full'); a summary
token after each item has seen i_1..i_j only; the next item's text is written from that token alone.
"""

import einops
import flax.linen as nn
import jax.numpy as jnp

from tpad_jax.models import stream as streams
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.models.knowledge import MODALITIES, Writer, masked_mean, opening
from tpad_jax.models.stream import Stream
from tpad_jax.nn.attention import RMSNorm
from tpad_jax.nn.linear import Linear, uniform


class TransferMLLM(nn.Module):
    """Session -> t, and t -> the next item's text.

    Attributes:
      base: the shared MLLM; its parameters are stored under 'base'.
      features: width D of t.
      clusters: C of the head that predicts a session's clusters (the loss `clusters`), 0: none.
    """

    base: MLLM | VLM
    features: int
    clusters: int = 0

    def setup(self):
        """Build the heads."""
        small = uniform(0.03)
        if not self.base.before:
            self.prompt = self.param('prompt', small, (1, self.base.width))
        self.summary = self.param('summary', small, (1, self.base.width))
        self.into = [Linear(self.base.width, use_bias=True) for _ in MODALITIES]
        self.norm = RMSNorm()
        self.head = Linear(self.features, use_bias=True)
        self.writer = Writer()
        if self.clusters:
            self.to_clusters = Linear(self.clusters, use_bias=True)

    def compress(self, k) -> Stream:
        """Turn knowledge features k [..., M, D] into item tokens [..., M, width]."""
        x = jnp.stack([into(k[..., m, :]) for m, into in enumerate(self.into)], axis=-2)
        return streams.plain(x)

    def unfold(self, image, has_image, tokens) -> Stream:
        """Turn content into an item's image and text tokens, [U, P + T, width]."""
        parts = [self.base.frame(image, has_image), self.base.say(tokens)]
        if self.base.between:
            parts.append(streams.fixed(self.base, self.base.between, len(tokens)))
        return streams.join(*parts)

    def __call__(self, items: Stream, mask):
        """Read sessions.

        Args:
          items: tokens [B, N, L, width] from `compress` or `unfold`.
          mask: bool [B, N], positions that hold an item.

        Returns:
          t float32 [B, N, D]; t[:, j] depends on positions up to j alone.
        """
        rows, positions = mask.shape
        summary = jnp.broadcast_to(self.summary, (rows, positions, 1, self.base.width))
        x = streams.join(items, streams.plain(summary))
        x = x.replace(mask=x.mask & mask[:, :, None])
        start = opening(self, rows)
        h = self.base(streams.join(start, streams.flatten(x)))[:, start.x.shape[1]:]
        h = einops.rearrange(h.astype(jnp.float32), 'b (n l) d -> b n l d', n=positions)
        skip = masked_mean(h[:, :, :-1], x.mask[:, :, :-1])
        return self.head(self.norm(h[:, :, -1] + skip))

    def foretell(self, t, tokens, keep):
        """Compute states [B, T, width] that predict the next item's tokens [B, T] from t [B, D]."""
        return self.writer(self.base, t[:, None], tokens, keep)

    def interest(self, t):
        """Compute logits [..., C] of a session's distribution over clusters, from t [..., D]."""
        return self.to_clusters(t)

    def everything(self, k, mask, image, has_image, tokens):
        """Use every parameter once, for initialisation."""
        self.unfold(image, has_image, tokens)
        t = self(self.compress(k), mask)
        if self.clusters:
            self.interest(t)
        return self.foretell(t[:, 0], tokens, tokens >= 0)

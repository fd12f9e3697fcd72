"""The readers: a Knowledge-MLLM of items and a Transfer-MLLM of sessions, on one frozen base.

[paper] A Knowledge-MLLM reads items by image and text and learns by a generation task; a
Transfer-MLLM reads sessions. [ours] The two differ in their adapters.

Knowledge-MLLM [ours]: one summary token per modality closes the prompt. A feature is read from its
hidden state plus the mean over its modality's tokens; without that skip the summary tokens stayed
empty. A second pass of the decoder writes the description from the features alone, so that they
have to hold all that the description needs. A real checkpoint may instead be read as is common: at
the prompt's last token, or by the mean over its tokens.

Transfer-MLLM [ours]: an item is fed as a few tokens made from its knowledge features
('compressed') or as its image and text tokens ('full'). A summary token after each item has seen
i_1..i_j only. The next item's text is written from that token alone.

A text encoder may read the items instead [ours]. It writes no text, so the Transfer-MLLM has a
separate small base, and reads the encoder's vectors.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.models import stream as streams
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.hf.bert import Bert
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.nn.attention import RMSNorm, Transformer
from tpad_jax.nn.linear import TEXT, Linear, uniform, unit

MODALITIES = ('image', 'text')
OWN_WIDTH = 128  # of a decoder of sessions alone
MEMORY = 4  # tokens by which a block of items is remembered
# how an item's features are read off its states; 'cls' is for text encoders
POOLING = ('summary', 'last', 'mean', 'cls')


def masked_mean(x, mask):
    """Compute the mean of x [..., L, D] over mask bool [..., L], [..., D]; zero without tokens."""
    weight = mask[..., None].astype(x.dtype)
    return (x * weight).sum(-2) / jnp.maximum(weight.sum(-2), 1)


class Writer(nn.Module):
    """Turns features into the hidden states that predict a text. [B, K, D] -> [B, T, width].

    The decoder sees the K feature tokens and the earlier words; `keep` withholds some of these
    words.
    """

    width: int

    def setup(self):
        """Build the map of the features and the blank."""
        self.prefix = Linear(self.width, use_bias=True)
        self.blank = self.param('blank', nn.initializers.normal(0.02), (self.width,))

    def __call__(self, base, features, tokens, keep):
        """Write a text.

        Args:
          base: the MLLM.
          features: float32 [B, K, D].
          tokens: int32 [B, T], -1 pads.
          keep: bool [B, T]. Words that it may see.
        """
        prefix = self.prefix(features)
        words = jnp.where(keep[..., None], base.words(jnp.maximum(tokens, 0)), self.blank)[:, :-1]
        written = streams.plain(words, tokens[:, :-1] >= 0, TEXT)
        return base(streams.join(streams.plain(prefix), written))[:, prefix.shape[1] - 1:]


def opening(module, rows):
    """Begin a prompt of `rows` rows: with the checkpoint's tokens, else with a learned vector."""
    base = module.base
    if isinstance(base, VLM):
        return streams.fixed(base, base.before, rows)
    return streams.plain(jnp.broadcast_to(module.prompt, (rows, *module.prompt.shape)))


class KnowledgeMLLM(nn.Module):
    """Item -> features k, and k -> the item's description.

    Attributes:
      base: the shared MLLM; its parameters are stored under 'base'.
      features: width D of a modality's feature.
      pooling: see POOLING. 'summary': a learned token per modality at the end, plus the mean over
        the modality's tokens; 'last': the last token's state, the same for both; 'mean': the means
        alone.
      raw: whether a feature is the state itself, for a checkpoint that is not trained. There are no
        heads.
    """

    base: MLLM | VLM
    features: int
    pooling: str = 'summary'
    raw: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(M, D) of k."""
        return len(MODALITIES), self.features

    def setup(self):
        """Build the heads."""
        small = nn.initializers.normal(0.02)
        if not isinstance(self.base, VLM):
            self.prompt = self.param('prompt', small, (1, self.base.width))
        if self.pooling == 'summary':
            self.summary = self.param('summary', small, (len(MODALITIES), self.base.width))
        self.norm = RMSNorm()
        if not self.raw:
            self.head = [Linear(self.features, use_bias=True) for _ in MODALITIES]
        self.writer = Writer(self.base.width)

    def __call__(self, image, has_image, tokens, keep=None):
        """Read items.

        Args:
          image: uint8 [U, H, W, 3].
          has_image: bool [U], False: the image is not read.
          tokens: int32 [U, T], -1 pads.
          keep: bool [U, T], False: the word is withheld; None: the text is complete.

        Returns:
          k float32 [U, M, D].
        """
        parts, begin, split = self._content(
            image, has_image, tokens, tokens >= 0 if keep is None else (tokens >= 0) & keep)
        _, seen, words = parts
        if self.base.end:
            parts.append(streams.fixed(self.base, self.base.end, len(tokens)))
        if self.pooling == 'summary':
            parts.append(streams.plain(
                jnp.broadcast_to(self.summary, (len(tokens), *self.summary.shape))))
        stream = streams.join(*parts)
        if self.pooling == 'last':
            last = stream.mask.shape[1] - 1 - stream.mask[:, ::-1].argmax(axis=1, keepdims=True)
            h = self.base(stream, at=last).astype(jnp.float32)
            states = [h[:, 0]] * len(MODALITIES)
        else:
            h = self.base(stream).astype(jnp.float32)
            states = [masked_mean(h[:, begin:split], seen.mask),
                      masked_mean(h[:, split:split + tokens.shape[1]], words.mask)]
        if self.pooling == 'summary':
            states = [h[:, m - len(MODALITIES)] + pooled for m, pooled in enumerate(states)]
        states = [self.norm(state) for state in states]
        if not self.raw:
            states = [head(state) for head, state in zip(self.head, states, strict=True)]
        return jnp.stack(states, axis=1)

    def _content(self, image, has_image, tokens, mask):
        """Return a prompt's opening, image and text, and where the latter two begin."""
        start, seen = opening(self, len(tokens)), self.base.frame(image, has_image)
        begin = start.x.shape[1]
        return [start, seen, self.base.say(tokens, mask)], begin, begin + seen.x.shape[1]

    def states(self, image, has_image, tokens):
        """Compute the hidden states of an item's prompt that predict its tokens; all words visible.

        Args:
          image: uint8 [U, H, W, 3].
          has_image: bool [U].
          tokens: int32 [U, T], -1 pads.

        Returns:
          [U, P, width] at the image's P cells, row by row; [U, T, width] that predict each token
          from the tokens before it, the first from the image or, without one, the opening.
        """
        parts, begin, split = self._content(image, has_image, tokens, tokens >= 0)
        h = self.base(streams.join(*parts))
        first, rows, columns = self.base.grid(image.shape[1])
        # without an opening, the first token's own state
        before = jnp.where(has_image[:, None], h[:, max(split - 1, 0)], h[:, max(begin - 1, 0)])
        words = jnp.concatenate([before[:, None], h[:, split:split + tokens.shape[1] - 1]], axis=1)
        return h[:, begin + first:begin + first + rows * columns], words

    def describe(self, k, tokens, keep):
        """Compute the states [B, T, width] that predict tokens [B, T] from k [B, M, D] alone."""
        return self.writer(self.base, k, tokens, keep)

    def mention(self, k):
        """Compute the state [B, width] that predicts the words of an item from k [B, M, D]."""
        state = self.writer.prefix(k).mean(1)
        return unit(state) * jnp.sqrt(state.shape[-1])

    def everything(self, image, has_image, tokens):
        """Use every parameter once, for initialisation."""
        k = self(image, has_image, tokens)
        return self.describe(k, tokens, tokens >= 0)


class TextReader(nn.Module):
    """Item -> the vector that a text encoder makes of its text, unchanged. It has no parameters.

    Attributes:
      base: the encoder; its parameters are stored under 'base'.
    """

    base: Bert
    raw = True

    @property
    def shape(self) -> tuple[int, int]:
        """(M, D) of k: the text is the only modality."""
        return 1, self.base.width

    @property
    def pooling(self) -> str:
        """How the vector is read off the states."""
        return self.base.pooling + ', normalised' * self.base.normalise

    def __call__(self, image, has_image, tokens, keep=None):
        """Read the texts of items; arguments as of `KnowledgeMLLM`, pictures are not read.

        Returns:
          k float32 [U, 1, D].
        """
        del image, has_image
        seen = tokens >= 0 if keep is None else (tokens >= 0) & keep
        before, end = (jnp.broadcast_to(jnp.array(ids, jnp.int32), (len(tokens), len(ids)))
                       for ids in (self.base.before, self.base.end))
        mask = jnp.pad(seen, ((0, 0), (before.shape[1], end.shape[1])), constant_values=True)
        h = self.base(jnp.concatenate([before, jnp.maximum(tokens, 0), end], axis=1), mask)
        h = h.astype(jnp.float32)
        x = h[:, 0] if self.base.pooling == 'cls' else masked_mean(h, mask)
        if self.base.normalise:
            x /= jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return x[:, None]

    everything = __call__


class TransferMLLM(nn.Module):
    """Session -> t, and t -> the next item's text.

    Attributes:
      base: the MLLM; its parameters are stored under 'base'.
      features: width D of t.
      clusters: C of the head that predicts a session's clusters (the loss `clusters`), 0: none.
      modalities: M of k.
      whole: whether an item is one token, in which its summary token is added.
      layers: of a small decoder that reads sessions in place of the base, from random parameters;
        0: the base reads them.
      block: items that are read at a time, after a memory of what came before; 0: all at once.
      codes: width of the items' codes (features/codes.py) and words, which are read and predicted;
        0: none.
    """

    base: MLLM | VLM
    features: int
    clusters: int = 0
    modalities: int = len(MODALITIES)
    whole: bool = False
    layers: int = 0
    block: int = 0
    codes: int = 0

    def setup(self):
        """Build the heads."""
        small, width = uniform(0.03), OWN_WIDTH if self.layers else self.base.width
        if self.layers:
            self.own = Transformer(self.layers, heads=4, hidden=2 * width)
        elif not isinstance(self.base, VLM):
            self.prompt = self.param('prompt', small, (1, width))
        self.summary = self.param('summary', small, (1, width))
        if self.block:
            self.memory = self.param('memory', small, (MEMORY, width))
        self.into = [Linear(width, use_bias=True) for _ in range(self.modalities)]
        self.norm = RMSNorm()
        self.head = Linear(self.features, use_bias=True)
        self.writer = Writer(self.base.width)
        if self.clusters:
            self.to_clusters = Linear(self.clusters, use_bias=True)
        if self.codes:
            self.from_codes = Linear(width)
            self.to_codes = Linear(self.codes, kernel=nn.initializers.zeros)

    def compress(self, k, codes=None) -> streams.Stream:
        """Turn knowledge features k [..., M, D] into item tokens, [..., M or 1, width].

        Args:
          k: float [..., M, D].
          codes: float [..., C], or None without codes.
        """
        x = jnp.stack([into(k[..., m, :]) for m, into in enumerate(self.into)], axis=-2)
        if codes is not None:
            x += self.from_codes(codes)[..., None, :]
        return streams.plain(x.sum(-2, keepdims=True) + self.summary if self.whole else x)

    def unfold(self, image, has_image, tokens) -> streams.Stream:
        """Turn content into an item's image and text tokens, [U, P + T, width]."""
        parts = [self.base.frame(image, has_image), self.base.say(tokens)]
        if self.base.between:
            parts.append(streams.fixed(self.base, self.base.between, len(tokens)))
        return streams.join(*parts)

    def __call__(self, items: streams.Stream, mask):
        """Read sessions.

        Args:
          items: tokens [B, N, L, width] from `compress` or `unfold`.
          mask: bool [B, N], positions that hold an item.

        Returns:
          t float32 [B, N, D]; t[:, j] depends on positions up to j alone.
        """
        rows, positions = mask.shape
        x = items
        if not self.whole:
            summary = jnp.broadcast_to(self.summary, (rows, positions, *self.summary.shape))
            x = streams.join(items, streams.plain(summary))
        x = x.replace(mask=x.mask & mask[:, :, None])
        h = self._by_blocks(x) if self.block else self._read(streams.flatten(x))
        h = einops.rearrange(h.astype(jnp.float32), 'b (n l) d -> b n l d', n=positions)
        skip = masked_mean(h[:, :, :-1], x.mask[:, :, :-1])  # zero where an item is one token
        return self.head(self.norm(h[:, :, -1] + skip))

    def _read(self, flat):
        """Read a stream [B, L] -> its states [B, L, width]."""
        if self.layers:
            return self.own(flat.x, flat.mask)
        start = opening(self, len(flat.mask))
        return self.base(streams.join(start, flat))[:, start.x.shape[1]:]

    def _by_blocks(self, x):
        """Read blocks of items one after the other, each after the memory of those before.

        The memory are the states of MEMORY learned tokens at the end of a block; the first block
        has none. So memory use does not grow with the session but by these (MLLM-MSR, arXiv
        2408.09698, section 3.2, where the memory is a text).

        Args:
          x: stream [B, N, L].

        Returns:
          States [B, N L, width].
        """
        rows, positions, tokens = x.mask.shape
        blocks = -(-positions // self.block)
        fill = blocks * self.block - positions
        cut = jax.tree.map(lambda a: jnp.moveaxis(jnp.pad(
            a, ((0, 0), (0, fill), *[(0, 0)] * (a.ndim - 2))).reshape(
                rows, blocks, self.block * tokens, *a.shape[3:]), 1, 0), x)
        ask = streams.plain(jnp.broadcast_to(self.memory, (rows, *self.memory.shape)))

        def read(module, carry, part):
            memory, there = carry
            before = streams.plain(memory, there[:, None])
            h = module._read(streams.join(before, part, ask))
            used = part.mask.any(axis=1)
            memory = jnp.where(used[:, None, None], h[:, -MEMORY:].astype(memory.dtype), memory)
            return (memory, there | used), h[:, MEMORY:-MEMORY]

        scan = nn.scan(nn.remat(read), variable_broadcast=('params', 'lora'),
                       split_rngs={'params': False})
        nothing = jnp.zeros(ask.x.shape, ask.x.dtype), jnp.zeros(rows, bool)
        _, h = scan(self, nothing, cut)
        return jnp.moveaxis(h, 0, 1).reshape(rows, -1, h.shape[-1])[:, :positions * tokens]

    def foretell(self, t, tokens, keep):
        """Compute states [B, T, width] that predict the next item's tokens [B, T] from t [B, D]."""
        return self.writer(self.base, t[:, None], tokens, keep)

    def interest(self, t):
        """Compute logits [..., C] of a session's distribution over clusters, from t [..., D]."""
        return self.to_clusters(t)

    def next_codes(self, p):
        """Compute logits [A, C] of the codes of the item that follows, from p [A, D]."""
        return self.to_codes(p)

    def everything(self, k, mask, tokens):
        """Use every parameter once, for initialisation."""
        codes = jnp.zeros((*mask.shape, self.codes)) if self.codes else None
        t = self(self.compress(k, codes), mask)
        if self.codes:
            self.next_codes(t[:, 0])
        if self.clusters:
            self.interest(t)
        return self.foretell(t[:, 0], tokens, tokens >= 0)

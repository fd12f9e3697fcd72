"""A language model in one module: vision transformer and projector, if any, and decoder.

It reads a `Stream` (see stream.py), so a prompt may have any number of images, learned vectors and
absent parts. It also makes the parts: `see` of images, `say` of tokens, `prompt` of both.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.core.precision import mllm_precision
from tpad_jax.models import stream as streams
from tpad_jax.models.hf import spec as specs, vit
from tpad_jax.models.hf.decoder import Decoder
from tpad_jax.models.hf.layers import perceptron
from tpad_jax.nn.linear import IMAGE, Linear, routed


class Projector(nn.Module):
    """Two layers from tower width to decoder width (LLaVA). [..., W] -> [..., D]."""

    width: int
    act: str
    bias: bool

    @nn.compact
    def __call__(self, x):
        """Apply to the last axis of x."""
        return perceptron(x, self.width, self.width, self.act, self.bias)


class VLM(nn.Module):
    """A model of one of the families in spec.FAMILIES.

    Attributes:
      spec: sizes and choices, from spec.read.
      side: height and width of every image in pixels. 0: texts alone.
      how: of attention, one of layers.ATTENTION.
      remat: one of layers.REMAT.
      dtype: of the computation, 'float32' or 'bfloat16'.
      before: token ids before the content of an item or a session, see prompts.
      between: token ids between its parts.
      end: token ids after it.
    """

    spec: specs.Spec
    side: int
    how: str = 'xla'
    remat: str = 'none'
    dtype: str = 'float32'
    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def setup(self):
        """Build the parts."""
        s = self.spec
        if isinstance(s.vision, specs.Tower):
            self.vision = vit.VisionTransformer(s.vision, self.how, self.remat)
            self.projector = (Projector(s.decoder.width, s.projector, s.projector_bias)
                              if s.projector else Linear(s.decoder.width))
            if s.newline:
                self.newline = self.param('newline', nn.initializers.normal(s.decoder.width**-0.5),
                                          (s.decoder.width,))
        elif s.vision:
            cells = tuple(n * s.vision.merge for n in s.cells(self.side))
            self.vision = vit.GridTransformer(s.vision, cells, self.how, self.remat)
        self.embed = nn.Embed(s.decoder.vocab, s.decoder.width,
                              embedding_init=nn.initializers.normal(0.02))
        self.decoder = Decoder(s.decoder, self.how, self.remat)
        if not s.decoder.tied:
            self.head = Linear(s.decoder.vocab)

    @property
    def width(self):
        """D, the width of the decoder."""
        return self.spec.decoder.width

    @mllm_precision
    def see(self, image, there) -> streams.Stream:
        """Encode images as tokens [..., P, D].

        Args:
          image: uint8 [..., side, side, 3].
          there: bool [...]. Whether there is an image.
        """
        s, lead = self.spec, image.shape[:-3]
        x = vit.normalise(image.reshape(-1, *image.shape[-3:]), s.mean, s.std, self.dtype)
        x = vit.patches(x, s.vision.patch)
        mask = jnp.broadcast_to(there[..., None], (*lead, s.image_tokens(self.side)))
        if isinstance(s.vision, specs.Tower):
            x = self.projector(self.vision(x))
            if s.newline:
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 0))).at[:, -1].set(self.newline.astype(x.dtype))
            return streams.plain(x.reshape(*lead, *x.shape[1:]), mask, IMAGE)
        x, deep = self.vision(x)
        deep = None if deep is None else deep.reshape(*lead, *deep.shape[1:])
        return streams.grid(x.reshape(*lead, *x.shape[1:]), mask, *s.cells(self.side), deep)

    def words(self, tokens):
        """Embed token ids int32 [...] -> [..., D]."""
        return self.embed.embedding[tokens].astype(self.dtype)

    say = streams.say

    def frame(self, image, there) -> streams.Stream:
        """Call `see`, and add the tokens that the family puts before and after an image.

        Images of side 0 are none: the result has no tokens.
        """
        if not image.shape[-2]:
            return streams.plain(jnp.zeros((*there.shape, 0, self.width), self.dtype))
        start, end = (streams.fixed(self, ids, *there.shape, mask=there[..., None])
                      for ids in (self.spec.start_ids, self.spec.end_ids))
        return streams.join(start, self.see(image, there), end)

    def grid(self, side: int) -> tuple[int, int, int]:
        """Return the index of an image's first cell in `frame`, and the rows and columns."""
        return len(self.spec.start_ids) + self.spec.class_tokens, *self.spec.cells(side)

    def prompt(self, tokens, mask, image) -> streams.Stream:
        """Combine tokens and the images that their placeholders represent.

        Args:
          tokens: int32 [B, S]. Every image of a row has spec.image_tokens(side) placeholders.
          mask: bool [B, S].
          image: uint8 [B, n, side, side, 3]. In the order of the placeholders. A row may use fewer
            than n images.
        """
        visual = (tokens == self.spec.image_id) & mask
        words = self.say(jnp.where(visual, 0, tokens), mask)
        if 0 in image.shape:
            return words
        images = streams.flatten(self.see(image, jnp.ones(image.shape[:2], bool)))
        slot = jnp.maximum(jnp.cumsum(visual, axis=1) - 1, 0)
        images = jax.vmap(streams.rows)(images, slot)
        if images.deep is not None:
            words = words.replace(deep=jnp.zeros_like(images.deep))
        out = jax.tree.map(lambda a, b: jnp.where(
            visual.reshape(*visual.shape, *(1,) * (a.ndim - 2)), a, b), images, words)
        return out.replace(mask=mask)

    @mllm_precision
    def __call__(self, stream: streams.Stream, at=None):
        """Read a stream [B, L].

        Args:
          stream: the tokens.
          at: int32 [B, n]. The tokens whose states are needed. None: all.

        Returns:
          States [B, L or n, D] after the final norm.
        """
        kinds = [stream.kind]
        if at is not None:  # the last layer reads these tokens alone
            kinds.append(jnp.take_along_axis(stream.kind, at, axis=1))
        with routed(*kinds):
            return self.decoder(stream.x.astype(self.dtype), streams.positions(stream),
                                _allowed(stream.mask, jnp.arange(stream.mask.shape[1])),
                                stream.deep, at=at)[0]

    @mllm_precision
    def decode(self, stream: streams.Stream, cache: dict, index):
        """Read more tokens after those in a cache.

        Args:
          stream: [B, L]. The new tokens.
          cache: of `empty_cache` or an earlier call. The compiled caller donates it.
          index: int32. Tokens in the cache, the same for all rows.

        Returns:
          States [B, L, D], and the cache with the new tokens.
        """
        mask = jax.lax.dynamic_update_slice_in_dim(cache['mask'], stream.mask, index, axis=1)
        allowed = _allowed(mask, index + jnp.arange(stream.mask.shape[1]))
        positions = streams.positions(stream) + cache['position'][:, None, None]
        with routed(stream.kind):
            h, (k, v) = self.decoder(stream.x.astype(self.dtype), positions, allowed, stream.deep,
                                     (cache['k'], cache['v']), index)
        moved = (stream.advance * stream.mask).sum(-1)
        return h, dict(k=k, v=v, mask=mask, position=cache['position'] + moved)

    def empty_cache(self, rows: int, length: int) -> dict:
        """Make a cache for `length` tokens of `rows` rows."""
        s = self.spec.decoder
        shape = (s.layers, rows, length, s.kv_heads, s.head_dim)
        return dict(k=jnp.zeros(shape, self.dtype), v=jnp.zeros(shape, self.dtype),
                    mask=jnp.zeros((rows, length), bool), position=jnp.zeros(rows, jnp.int32))

    @mllm_precision
    def logits(self, h):
        """Compute logits float32 [..., V] of states [..., D]."""
        if self.spec.decoder.tied:
            table = self.embed.embedding.astype(h.dtype)
            return jnp.matmul(h, table.T, preferred_element_type=jnp.float32)
        return self.head(h).astype(jnp.float32)

    def everything(self):
        """Use every parameter once, for initialisation."""
        image = jnp.zeros((1, 1, self.side, self.side, 3), jnp.uint8)
        tokens = jnp.full((1, self.spec.image_tokens(self.side) or 1), self.spec.image_id)
        return self.logits(self(self.prompt(tokens, jnp.ones(tokens.shape, bool), image)))


def _allowed(mask, place):
    """Return which keys [S] the queries at `place` [L] see, bool [B, 1, L, S]."""
    key = jnp.arange(mask.shape[1])
    # a padded token that would see nothing sees itself, or its softmax would be NaN
    return (mask[:, None, None] & (key <= place[:, None])) | (key == place[:, None])


def shapes(spec: specs.Spec) -> dict:
    """Return the shapes of all parameters, nested, with dtype float32."""
    model = VLM(spec, spec.unit)
    return jax.eval_shape(partial(model.init, method='everything'), jax.random.key(0))['params']

"""A vision-language model: tower or grid, projector, decoder, in one module.

It reads a `Stream` (see stream.py), so a prompt may hold any number of images, learned vectors and
absent parts, and makes its own parts: `see` images, `say` tokens, or both by `prompt`.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.core.precision import mllm_precision
from tpad_jax.models import stream as streams
from tpad_jax.models.hf import pixels
from tpad_jax.models.hf import spec as specs
from tpad_jax.models.hf.decoder import Decoder
from tpad_jax.models.hf.grid_vit import GridTransformer
from tpad_jax.models.hf.layers import activation
from tpad_jax.models.hf.vit import VisionTransformer
from tpad_jax.models.stream import Stream
from tpad_jax.nn.linear import Linear


class Projector(nn.Module):
    """Tower width -> decoder width, two layers (LLaVA). [..., W] -> [..., D]."""

    width: int
    act: str
    bias: bool

    @nn.compact
    def __call__(self, x):
        """Apply to the last axis of x."""
        x = activation(self.act)(Linear(self.width, self.bias, name='fc1')(x))
        return Linear(self.width, self.bias, name='fc2')(x)


class VLM(nn.Module):
    """A model of one of the families of spec.FAMILIES.

    Attributes:
      spec: sizes and choices, from spec.read.
      side: pixels of every image's height and width.
      how, remat: attention and rematerialisation, see layers.py.
      dtype: of the computation, 'float32' or 'bfloat16'.
      before, between, end: token ids around an item's or a session's content, see prompts.
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
            self.vision = VisionTransformer(s.vision, self.how, self.remat)
            self.projector = Projector(s.decoder.width, s.projector, s.projector_bias)
            if s.newline:
                self.newline = self.param('newline', nn.initializers.normal(s.decoder.width**-0.5),
                                          (s.decoder.width,))
        else:
            cells = tuple(n * s.vision.merge for n in s.cells(self.side))
            self.vision = GridTransformer(s.vision, cells, self.how, self.remat)
        self.embed = nn.Embed(s.decoder.vocab, s.decoder.width,
                              embedding_init=nn.initializers.normal(0.02))
        self.decoder = Decoder(s.decoder, self.how, self.remat)
        if not s.decoder.tied:
            self.head = Linear(s.decoder.vocab)

    @property
    def width(self):
        """D, of the decoder."""
        return self.spec.decoder.width

    @mllm_precision
    def see(self, image, there) -> Stream:
        """Images uint8 [..., side, side, 3], there bool [...] -> their tokens [..., P, D]."""
        s, lead = self.spec, image.shape[:-3]
        flat = image.reshape(-1, *image.shape[-3:])
        x = pixels.normalise(flat, s.mean, s.std, jnp.dtype(self.dtype))
        x = pixels.patches(x, s.vision.patch)
        mask = jnp.broadcast_to(there[..., None], (*lead, s.image_tokens(self.side)))
        if isinstance(s.vision, specs.Tower):
            x = self.projector(self.vision(x))
            if s.newline:
                line = jnp.broadcast_to(self.newline.astype(x.dtype), (len(x), 1, x.shape[-1]))
                x = jnp.concatenate([x, line], axis=1)
            return streams.plain(x.reshape(*lead, *x.shape[1:]), mask)
        x, deep = self.vision(x)
        deep = None if deep is None else deep.reshape(*lead, *deep.shape[1:])
        return streams.grid(x.reshape(*lead, *x.shape[1:]), mask, *s.cells(self.side), deep)

    def words(self, tokens):
        """Token ids int32 [...] -> embeddings [..., D]."""
        table = self.embed.embedding
        return table[tokens].astype(self.dtype)

    def say(self, tokens, mask) -> Stream:
        """Token ids int32 [..., T], mask bool [..., T] -> their part of a stream."""
        return streams.plain(self.words(tokens), mask)

    def frame(self, image, there) -> Stream:
        """`see`, between the tokens the family puts before and behind an image."""
        def say(ids):
            ids = jnp.broadcast_to(jnp.array(ids, jnp.int32), (*there.shape, len(ids)))
            return self.say(ids, there[..., None])

        return streams.join(say(self.spec.start_ids), self.see(image, there),
                            say(self.spec.end_ids))

    def grid(self, side: int) -> tuple[int, int, int]:
        """Where in `frame` an image's cells begin, and how many rows and columns they have."""
        v = self.spec.vision
        lead = isinstance(v, specs.Tower) and v.keep_class  # a class token stands first
        return len(self.spec.start_ids) + int(lead), *self.spec.cells(side)

    def prompt(self, tokens, mask, image) -> Stream:
        """Tokens with placeholders and the images these stand for.

        Args:
          tokens: int32 [B, S]; every image of a row has spec.image_tokens(side) placeholders.
          mask: bool [B, S]. image: uint8 [B, n, side, side, 3], in the order of the placeholders;
            a row may hold fewer than n.
        """
        held = (tokens == self.spec.image_id) & mask
        said = self.say(jnp.where(held, 0, tokens), mask)
        if image.shape[1] == 0:
            return said
        seen = streams.flatten(self.see(image, jnp.ones(image.shape[:2], bool)))
        slot = jnp.maximum(jnp.cumsum(held, axis=1) - 1, 0)
        seen = jax.vmap(streams.rows)(seen, slot)
        if seen.deep is not None:
            said = said.replace(deep=jnp.zeros_like(seen.deep))
        out = jax.tree.map(lambda a, b: jnp.where(held.reshape(*held.shape, *(1,) * (a.ndim - 2)),
                                                  a, b), seen, said)
        return out.replace(mask=mask)

    @mllm_precision
    def __call__(self, stream: Stream, every=False, at=None):
        """Read a stream [B, L]. -> states [B, L, D] after the last norm; every: and behind each
        layer, [layers, B, L, D]; at int32 [B, n]: of these tokens alone, [B, n, D].
        """
        length = stream.x.shape[1]
        order = jnp.tril(jnp.ones((length, length), bool))
        # a padded token that sees nothing may see itself; nobody reads it
        allowed = (stream.mask[:, None, None] & order) | jnp.eye(length, dtype=bool)
        h, states, _ = self.decoder(stream.x.astype(self.dtype), streams.positions(stream), allowed,
                                    stream.deep, every=every, at=at)
        return (h, states) if every else h

    @mllm_precision
    def decode(self, stream: Stream, cache: dict, index):
        """Read on where a cache ends.

        Args:
          stream: [B, L] of new tokens; `cache`: from `empty_cache` or an earlier call, donated by
            whoever compiles this; index: int32, tokens the cache holds, the same for all rows.

        Returns:
          states [B, L, D], the cache with these tokens in.
        """
        length = stream.mask.shape[1]
        mask = jax.lax.dynamic_update_slice_in_dim(cache['mask'], stream.mask, index, axis=1)
        place = index + jnp.arange(length)
        key = jnp.arange(mask.shape[1])
        allowed = (mask[:, None, None] & (key <= place[:, None])) | (key == place[:, None])
        positions = streams.positions(stream) + cache['position'][:, None, None]
        h, _, (k, v) = self.decoder(stream.x.astype(self.dtype), positions, allowed, stream.deep,
                                    (cache['k'], cache['v']), index)
        moved = (stream.advance * stream.mask).sum(-1)
        return h, dict(k=k, v=v, mask=mask, position=cache['position'] + moved)

    def empty_cache(self, rows: int, length: int) -> dict:
        """Room for `length` tokens of `rows` rows."""
        s = self.spec.decoder
        shape = (s.layers, rows, length, s.kv_heads, s.head_dim)
        return dict(k=jnp.zeros(shape, self.dtype), v=jnp.zeros(shape, self.dtype),
                    mask=jnp.zeros((rows, length), bool), position=jnp.zeros(rows, jnp.int32))

    @mllm_precision
    def logits(self, h):
        """States [..., D] -> float32 [..., V]."""
        if self.spec.decoder.tied:
            table = self.embed.embedding.astype(h.dtype)
            return jnp.matmul(h, table.T, preferred_element_type=jnp.float32)
        return self.head(h).astype(jnp.float32)

    def everything(self):
        """Touch every parameter once: what initialisation calls."""
        image = jnp.zeros((1, 1, self.side, self.side, 3), jnp.uint8)
        tokens = jnp.full((1, self.spec.image_tokens(self.side)), self.spec.image_id)
        return self.logits(self(self.prompt(tokens, jnp.ones(tokens.shape, bool), image)))


def shapes(spec: specs.Spec, side: int) -> dict:
    """Shapes of all parameters, nested; dtypes are float32."""
    model = VLM(spec, side)
    return jax.eval_shape(partial(model.init, method='everything'), jax.random.key(0))['params']


def size(tree) -> int:
    """Number of parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))

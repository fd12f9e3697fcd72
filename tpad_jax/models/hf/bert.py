"""BERT and its relatives as readers of texts, with scanned layers (Devlin et al. 2018)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.core.precision import mllm_precision
from tpad_jax.models.hf import layers, vit
from tpad_jax.models.hf.sentence import TextEncoder
from tpad_jax.nn.linear import STACKED


class Block(nn.Module):
    """One layer, a scan body with carry x [B, L, W]. Norms follow the sums."""

    spec: TextEncoder
    how: str

    @nn.compact
    def __call__(self, x, mask):
        """Apply the layer.

        Args:
          x: float [B, L, W].
          mask: bool [B, 1, 1, L]. False is padding.

        Returns:
          The states and None. They are 'state' in the collection 'intermediates', too.
        """
        s = self.spec
        y = vit.Attention(s.heads, self.how, name='attention')(x, None, None, mask)
        x = layers.layer_norm(x + y, s.eps, 'norm1')
        y = layers.perceptron(x, s.hidden, s.width, s.activation)
        x = layers.layer_norm(x + y, s.eps, 'norm2')
        self.sow('intermediates', 'state', x)
        return x, None


class Bert(nn.Module):
    """A text encoder.

    Attributes:
      spec: sizes, from spec.read.
      how: of attention, one of layers.ATTENTION.
      remat: one of layers.REMAT.
      dtype: of the computation, 'float32' or 'bfloat16'.
      before: token ids before a text, the class token first.
      end: token ids after it.
      pooling: how a text's vector is read off, see sentence.POOLING.
      normalise: whether the vector is scaled to length one.
    """

    spec: TextEncoder
    how: str = 'xla'
    remat: str = 'none'
    dtype: str = 'float32'
    before: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    pooling: str = 'mean'
    normalise: bool = False
    between = ()  # a session's items are not read together

    @property
    def width(self):
        """W, the width of the states."""
        return self.spec.width

    @mllm_precision
    @nn.compact
    def __call__(self, tokens, mask):
        """Read texts.

        Args:
          tokens: int32 [B, L].
          mask: bool [B, L]. False: the token does not exist, and positions skip it.

        Returns:
          States [B, L, W] after the last layer.
        """
        s, small = self.spec, nn.initializers.normal(0.02)
        position = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) + s.first
        x = nn.Embed(s.vocab, s.width, embedding_init=small, name='embed')(tokens)
        x += self.param('place', small, (s.places, s.width))[position]
        x += self.param('kind', small, (s.kinds, s.width))[0]
        x = layers.layer_norm(x.astype(self.dtype), s.eps, 'norm')
        block = nn.scan(layers.rematerialised(Block, self.remat), length=s.layers,
                        in_axes=nn.broadcast, **STACKED)
        return block(s, self.how, name='layers')(x, mask[:, None, None])[0]


def shapes(spec: TextEncoder) -> dict:
    """Return the shapes of all parameters, nested, with dtype float32."""
    one = jnp.ones((1, 1), jnp.int32)
    return jax.eval_shape(Bert(spec).init, jax.random.key(0), one, one > 0)['params']

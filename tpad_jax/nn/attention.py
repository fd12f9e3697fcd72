"""A pre-norm transformer with rotary positions, and dropout with one key per row.

A scan compiles the layers of the transformer once.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.nn.linear import STACKED, Linear, gated

THETA = 10_000.0  # base of the rotary frequencies


def rotate(x, cos, sin):
    """Apply rotary positions to half heads (Su et al. 2021).

    Args:
      x: float [B, L, H, hd].
      cos: float32 [B or 1, L, 1, hd / 2], of the angles.
      sin: of the same angles.
    """
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def received(q, k, allowed):
    """Compute the attention that each token receives, the mean over heads and queries: [B, L].

    Args:
      q: float [B, L, H, hd].
      k: float [B, L, KV, hd].
      allowed: bool [B, 1, L, L]. The tokens that each token sees.
    """
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum('blhd,bshd->bhls', q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed, scores * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores).mean(axis=(1, 2))


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32. [..., D] -> [..., D]."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        """Normalise the last axis of x."""
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


class Attention(nn.Module):
    """Self-attention over a padded sequence.

    Attributes:
      heads: number of heads H. It divides the width.
      causal: whether a position attends only to itself and earlier positions.
    """

    heads: int
    causal: bool = True

    @nn.compact
    def __call__(self, x, mask, positions):
        """Attend.

        Args:
          x: float [B, L, D].
          mask: bool [B, L]. False is padding.
          positions: int32 [B, L].
        """
        width = x.shape[-1]
        split = '... (h d) -> ... h d'
        q, k, v = (einops.rearrange(Linear(width, name=n)(x), split, h=self.heads) for n in 'qkv')
        half = q.shape[-1] // 2
        angle = positions[:, :, None, None] * THETA ** -(jnp.arange(half) / half)
        q, k = (rotate(x, jnp.cos(angle), jnp.sin(angle)) for x in (q, k))
        allowed = mask[:, None, None, :]
        if self.causal:
            allowed = allowed & jnp.tril(jnp.ones((x.shape[1],) * 2, bool))[None, None]
        # A padded first position would see no key, and its softmax would be NaN. It sees itself.
        allowed = allowed | jnp.eye(x.shape[1], dtype=bool)[None, None]
        if self.is_mutable_collection('intermediates'):  # only where somebody looks
            self.sow('intermediates', 'received', received(q, k, allowed))
        y = jax.nn.dot_product_attention(q, k, v, mask=allowed)
        return Linear(width, name='o')(einops.rearrange(y, '... h d -> ... (h d)'))


class Block(nn.Module):
    """One layer; written as a scan body: carry (x, mask, positions) -> same."""

    heads: int
    hidden: int
    causal: bool

    @nn.compact
    def __call__(self, carry, _):
        """Apply the layer to x [B, L, D]."""
        x, mask, positions = carry
        attention = Attention(self.heads, self.causal, name='attention')
        x = x + attention(RMSNorm(name='attention_norm')(x), mask, positions)
        x = x + gated(RMSNorm(name='mlp_norm')(x), self.hidden)
        return (x, mask, positions), None


class Transformer(nn.Module):
    """Blocks and a final norm.

    Attributes:
      layers: number of blocks.
      heads: attention heads per block.
      hidden: inner width of the SwiGLU.
      causal: whether a position sees only itself and earlier positions.
    """

    layers: int
    heads: int
    hidden: int
    causal: bool = True

    @nn.compact
    def __call__(self, x, mask):
        """Encode x [B, L, D] with mask bool [B, L] -> [B, L, D]. Positions skip padding."""
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        layers = nn.scan(Block, length=self.layers, **STACKED)(
            self.heads, self.hidden, self.causal, name='layers')
        (x, _, _), _ = layers((x, mask, positions), None)
        return RMSNorm(name='norm')(x)


def row_keys(key, rows):
    """Derive a key per row from its number, so that draws do not depend on the device count.

    Args:
      key: a typed key.
      rows: int32 [B].

    Returns:
      Keys [B].
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def dropout(x, rate, keys, number=None):
    """Apply inverted dropout with one key per row.

    Args:
      x: float [B, ...].
      rate: share of the numbers that become zero.
      keys: [B]. None: no dropout.
      number: of this use among those of the keys, which are folded by it. None: the only use.
    """
    if keys is None or rate == 0.0:
        return x
    if number is not None:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


def kept(key, rows, tokens, rate):
    """Bool like tokens [B, T]: words that stay visible, drawn per row number; None: all of them."""
    if key is None:
        return tokens >= 0
    keys = row_keys(key, rows)
    return jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, tokens.shape[1:]))(keys)

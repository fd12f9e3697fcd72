"""Norm, activations and attention that all the families share; statistics in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

ATTENTION = ('xla', 'cudnn')  # what config.mllm.attention may name
REMAT = ('none', 'dots', 'full')  # what config.mllm.remat may name: what a backward pass recomputes


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias over the last axis, in float32. [..., D] -> [..., D]."""

    eps: float

    @nn.compact
    def __call__(self, x):
        """Normalise the last axis of x."""
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


def activation(name: str):
    """The function a config.json names; 'gelu' is the exact one."""
    return {'silu': nn.silu, 'gelu': lambda x: nn.gelu(x, approximate=False),
            'gelu_pytorch_tanh': nn.gelu, 'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x)}[name]


def attend(q, k, v, mask, how: str):
    """Scaled dot-product attention; query head h reads key head h // (H / KV).

    Args:
      q: [B, L, H, hd]. k, v: [B, S, KV, hd]. mask: bool [B or 1, 1, L, S] or None: all to all.
      how: 'xla', anywhere; 'cudnn', fused, on NVIDIA GPUs in 16 bits.

    Returns:
      [B, L, H, hd].
    """
    if how == 'cudnn':
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='cudnn')
    # Heads first, so that both products are plain batches of matrices, and the query heads that
    # share a key head are rows of one: on CPU twice as fast as jax.nn.dot_product_attention.
    (rows, length, heads, size), shared = q.shape, k.shape[2]
    q = q.reshape(rows, length, shared, -1, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, shared, -1, size)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum('bhqd,bhkd->bhqk', q, k, preferred_element_type=jnp.float32) * size**-0.5
    if mask is not None:
        apart = scores.reshape(rows, shared, -1, length, k.shape[2])
        apart = jnp.where(mask[:, :, None], apart, jnp.finfo(jnp.float32).min)
        scores = apart.reshape(scores.shape)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum('bhqk,bhkd->bhqd', weights, v).reshape(rows, shared, -1, length, size)
    return y.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, size)


def rematerialised(block, how: str, lift=nn.remat):
    """The scan body `block` (a module class) as config.mllm.remat says; the values are the same.

    `lift`: jax.checkpoint where it is a function.

    'none' keeps every intermediate of the forward pass, 'dots' the matrix products' results, 'full'
    only a layer's input.
    """
    if how == 'none':
        return block
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if how == 'dots' else None
    return lift(block, policy=policy, prevent_cse=False)


def rotate(x, cos, sin):
    """Rotary positions by half heads. x [B, L, H, hd]; cos, sin [B or 1, L, 1, hd / 2] float32."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)

"""Norm, activations and attention of all families. Statistics are float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.nn.linear import Linear

ATTENTION = ('xla', 'cudnn')  # choices of config.mllm.attention
REMAT = ('none', 'dots', 'full')  # choices of config.mllm.remat, see `rematerialised`


def layer_norm(x, eps: float, name: str):
    """Normalise the last axis of x with a new nn.LayerNorm. Statistics are float32."""
    return nn.LayerNorm(eps, dtype=x.dtype, use_fast_variance=False, name=name)(x)


def activation(name: str):
    """Return the activation that a config.json names. 'gelu' is the exact one."""
    return {'silu': nn.silu, 'gelu': lambda x: nn.gelu(x, approximate=False),
            'gelu_pytorch_tanh': nn.gelu, 'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x)}[name]


def perceptron(x, hidden: int, features: int, act: str, use_bias: bool = True):
    """Apply new layers 'fc1' and 'fc2' of the calling module to x [..., D]."""
    x = activation(act)(Linear(hidden, use_bias, name='fc1')(x))
    return Linear(features, use_bias, name='fc2')(x)


def attend(q, k, v, mask, how: str):
    """Compute scaled dot-product attention. Query head h reads key head h // (H / KV).

    Args:
      q: float [B, L, H, hd].
      k: float [B, S, KV, hd].
      v: float [B, S, KV, hd].
      mask: bool [B or 1, 1, L, S]. None: every query reads every key.
      how: 'xla' on any device, or 'cudnn', a fused kernel for 16 bits on NVIDIA GPUs.

    Returns:
      [B, L, H, hd].
    """
    if how == 'cudnn':
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='cudnn')
    # Heads come first, so both products are batches of matrices. Query heads that share a key head
    # are rows of one matrix. On CPU this is twice as fast as jax.nn.dot_product_attention.
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
    """Set how much of a scan body the backward pass computes again. Values do not change.

    Args:
      block: a module class, or a function.
      how: 'none' saves every intermediate of the forward pass, 'dots' the results of matrix
        products, 'full' only the input of a layer.
      lift: nn.remat for a module class, jax.checkpoint for a function.
    """
    if how == 'none':
        return block
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if how == 'dots' else None
    return lift(block, policy=policy, prevent_cse=False)

"""Reductions over an axis name that become the identity where there is none (axis=None)."""

import jax
import jax.numpy as jnp


def total(x, axis):
    """Sum of x over the replicas of `axis`; x itself without one."""
    return x if axis is None else jax.lax.psum(x, axis)


def mean(x, axis):
    """Mean of x over the replicas of `axis`; x itself without one."""
    return x if axis is None else jax.lax.pmean(x, axis)


def gather(x, axis):
    """Rows of every replica, [B, ...] -> [replicas * B, ...], in replica order; differentiable."""
    return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)


def offset(rows, axis):
    """Where this replica's `rows` rows begin in what `gather` returns."""
    return 0 if axis is None else jax.lax.axis_index(axis) * rows


def maximum(x, axis):
    """Elementwise maximum over the replicas of `axis`, without gradient."""
    x = jax.lax.stop_gradient(x)
    return x if axis is None else jnp.max(jax.lax.all_gather(x, axis), axis=0)

"""Reductions over a named axis. With axis=None they return their input."""

import jax
import jax.numpy as jnp


def total(x, axis):
    """Sum x over the replicas of `axis`."""
    return x if axis is None else jax.lax.psum(x, axis)


def mean(x, axis):
    """Average x over the replicas of `axis`."""
    return x if axis is None else jax.lax.pmean(x, axis)


def gather(x, axis):
    """Join the rows of all replicas in their order, [B, ...] -> [replicas * B, ...]."""
    return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)


def offset(rows, axis):
    """Return the index of this replica's first row in the result of `gather`."""
    return 0 if axis is None else jax.lax.axis_index(axis) * rows


def maximum(x, axis):
    """Take the elementwise maximum over the replicas of `axis`, without gradient."""
    x = jax.lax.stop_gradient(x)
    return x if axis is None else jnp.max(jax.lax.all_gather(x, axis), axis=0)

"""Gather rows of a table that a softmax also reads completely, and sum values by id."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def take(table, ids):
    """Gather rows with a cheap gradient; return the table for dense reads.

    The rows are `table[ids]`. Their gradient is added in place to the gradient of the returned
    table. Without this, the compiler fills a second table with zeros, scatters the rows into it and
    adds both, which takes three passes over V rows.

    Args:
      table: float [V, ...].
      ids: int [...].

    Returns:
      The table and its rows [..., ...]. Dense reads must use the returned table.
    """
    return table, table[ids]


def _forward(table, ids):
    return take(table, ids), ids


def _backward(ids, slopes):
    table, rows = slopes
    return table.at[ids].add(rows), None


take.defvjp(_forward, _backward)


def totals(ids, values):
    """Sum the values of equal ids in each row, in the order in which they come.

    Args:
      ids: int32 [B, M].
      values: float [B, M, ...].

    Returns:
      ids [B, M] in ascending order, running sums [B, M, ...] of each id's values, and last: bool
      [B, M], the places that hold an id's whole sum.
    """
    order = jnp.argsort(ids, axis=1)  # stable
    ids = jnp.take_along_axis(ids, order, axis=1)
    values = jnp.take_along_axis(values, order.reshape(order.shape + (1,) * (values.ndim - 2)),
                                 axis=1)
    first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=True)

    def joined(a, b):
        """Add the sums of two runs; a sum starts over where an item begins."""
        new = b[0].reshape(b[0].shape + (1,) * (values.ndim - 2))
        return a[0] | b[0], jnp.where(new, b[1], a[1] + b[1])

    _, sums = jax.lax.associative_scan(joined, (first, values), axis=1)
    return ids, sums, last

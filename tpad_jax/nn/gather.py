"""Rows: gathered from a table, computed in chunks, summed by id, the last one of a prefix."""

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


def by_chunk(function, rows, chunk):
    """Apply a function to a chunk of rows at a time; a backward pass computes each chunk again.

    Args:
      function: tree of [C, ...] -> tree of [C, ...].
      rows: tree of arrays [A, ...]. The last chunk is padded with zeros, whose results are dropped.
      chunk: C.

    Returns:
      Tree of [A, ...].
    """
    total = len(jax.tree.leaves(rows)[0])
    count = -(-total // chunk)
    rows = jax.tree.map(lambda x: jnp.pad(
        x, ((0, count * chunk - total), *((0, 0),) * (x.ndim - 1))
    ).reshape(count, chunk, *x.shape[1:]), rows)
    out = jax.lax.map(jax.checkpoint(function), rows)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], out)


def at_last(x, items):
    """Select of x [B, N, ...] what is at the last item of each prefix int32 [B, N]: [B, ...]."""
    at = jnp.maximum((items > 0).sum(axis=1) - 1, 0)
    return jnp.take_along_axis(x, at.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)[:, 0]


def totals(ids, values):
    """Sum the values of equal ids in each row.

    The sums of runs of 1, 2, 4 ... places are added in turn (Hillis and Steele 1986), in a loop
    whose body is compiled once. `jax.lax.associative_scan` adds less, but each of its many sizes of
    parts is compiled.

    Args:
      ids: int32 [B, M].
      values: float [B, M, ...].

    Returns:
      ids [B, M] in ascending order, running sums [B, M, ...] of each id's values in the order in
      which they come, and last: bool [B, M], the places that hold an id's whole sum.
    """
    order = jnp.argsort(ids, axis=1)  # stable
    more = (1,) * (values.ndim - 2)
    ids = jnp.take_along_axis(ids, order, axis=1)
    values = jnp.take_along_axis(values, order.reshape(order.shape + more), axis=1)
    first = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    place = jnp.arange(ids.shape[1])
    begin = jax.lax.cummax(jnp.where(first, place, 0), axis=1)  # of the id's run

    def doubled(step, sums):
        """Add to each sum that of the places before its own: they end `reach` places back."""
        reach = 1 << step
        inside = (place - reach >= begin).reshape(ids.shape + more)
        return sums + jnp.where(inside, jnp.roll(sums, reach, axis=1), 0)

    return ids, jax.lax.fori_loop(0, (ids.shape[1] - 1).bit_length(), doubled, values), last

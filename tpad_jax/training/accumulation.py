"""The gradient of losses over a whole batch, with the activations of one part at a time.

A loss that compares the rows of a batch is not a sum over parts of the batch, so gradients of parts
do not add up to its gradient. Outputs can be computed in parts. All parts are computed once without
a gradient, and the losses see the outputs of the whole batch. The gradient with respect to each
output then goes back through its part, which is computed again (Gao et al. 2021, "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup"). Value and gradient are exact for every
loss, and every part is computed twice. Random draws are keyed by example, so dropout is the same
both times.
"""

import jax
import jax.numpy as jnp

# Fields of a batch whose values are row numbers of another field.
POINTERS = {'slots': 'ids', 'next_slots': 'ids'}


def gradient(outputs, loss, params, batch, parts=1):
    """Differentiate loss(outputs) with respect to the parameters.

    Args:
      outputs: (params, batch) -> (rows, rest), pytrees of arrays. Each row of rows [B, ...] depends
        on one row of the batch; rest depends on the parameters alone.
      loss: (rows, rest, batch) -> (scalar, auxiliaries), of all rows.
      params: pytree of arrays.
      batch: types.Batch of `parts` equal parts. Places and slots count within a part, as
        data/batches.py makes them for as many devices.
      parts: 1 computes the whole batch at once, with all activations.

    Returns:
      The gradient, as `params`, and the auxiliaries.
    """
    if parts == 1:
        return jax.grad(lambda p: loss(*outputs(p, batch), batch), has_aux=True)(params)
    # no -1: pictures of side 0, which are none, have no elements
    cut = jax.tree.map(lambda x: x.reshape(parts, len(x) // parts, *x.shape[1:]), batch)
    rows = jax.lax.map(lambda part: outputs(params, part)[0], cut)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    first = jax.tree.map(lambda x: x[0], cut)
    rest = outputs(params, first)[1]  # the compiler drops the rows of that part
    (floats, shared), restore = zip(*map(_floats, (rows, rest)), strict=True)

    def whole_loss(floats, shared):
        return loss(restore[0](floats), restore[1](shared), joined(cut))

    (to_rows, to_rest), aux = jax.grad(whole_loss, (0, 1), has_aux=True)(floats, shared)
    to_rows = [x.reshape(parts, -1, *x.shape[1:]) for x in to_rows]

    def add(total, inputs):
        i, part, slopes = inputs
        _, pullback = jax.vjp(lambda p: [_floats(x)[0] for x in outputs(p, part)], params)
        # rest is the same in every part, so its gradient counts once
        grads, = pullback([slopes, [jnp.where(i == 0, x, 0) for x in to_rest]])
        return jax.tree.map(jnp.add, total, grads), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), cut, to_rows))
    return total, aux


def joined(cut):
    """Join parts into one batch, whose places and slots count over all rows.

    Args:
      cut: types.Batch with fields [parts, rows, ...].

    Returns:
      types.Batch with fields [parts * rows, ...].
    """
    shift = {name: getattr(cut, of).shape[1] for name, of in POINTERS.items()
             if getattr(cut, of) is not None}
    shift['places'] = cut.items.shape[1] * cut.items.shape[2]
    part = jnp.arange(len(cut.items))

    def moved(x, step):
        return x + jnp.where(x < 0, 0, (part * step).reshape(-1, *(1,) * (x.ndim - 1)))

    fields = {name: moved(getattr(cut, name), step) for name, step in shift.items()
              if getattr(cut, name) is not None}
    return jax.tree.map(lambda x: jax.lax.collapse(x, 0, 2), cut.replace(**fields))


def _floats(tree):
    """The floating point arrays of a tree, and the function that replaces them."""
    leaves, structure = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def restore(floats):
        floats = iter(floats)
        return structure.unflatten([next(floats) if chosen else x
                                    for x, chosen in zip(leaves, is_float, strict=True)])

    return [x for x, chosen in zip(leaves, is_float, strict=True) if chosen], restore

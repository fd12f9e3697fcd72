"""The gradient of losses over a whole batch, with the activations of a part of it at a time.

A loss that compares the rows of a batch with each other is no sum over its parts, so gradients of
parts do not add up to its own. Outputs do: all parts are read once without a gradient, the losses
see the outputs of the whole batch, and what they want of each output goes back through the part it
came from, which is read again (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup"). Value and gradient are exact for every loss, at the price of a second
reading; draws are keyed by example, so both readings see the same dropout.
"""

import jax
import jax.numpy as jnp

POINTERS = {'slots': 'ids', 'next_slots': 'ids'}  # fields that count the rows of another


def gradient(outputs, loss, params, batch, parts=1):
    """Gradient of loss(outputs) in the parameters, and what else the loss returns.

    Args:
      outputs: (params, batch) -> (rows, rest), trees of arrays: rows [B, ...] depend on their own
        row of the batch alone, rest on the parameters alone.
      loss: (rows, rest, batch) -> (scalar, auxiliaries), of all rows.
      params: tree. batch: types.Batch of `parts` equal parts, each with places and slots of its
        own, as data/batches.py cuts it for as many devices.
      parts: 1 reads the batch once, with all its activations.
    """
    if parts == 1:
        return jax.grad(lambda p: loss(*outputs(p, batch), batch), has_aux=True)(params)
    cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    rows = jax.lax.map(lambda part: outputs(params, part)[0], cut)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    first = jax.tree.map(lambda x: x[0], cut)
    rest = outputs(params, first)[1]  # the compiler leaves out that part's rows
    (own, shared), form = zip(*map(_floats, (rows, rest)), strict=True)

    def whole(own, shared):
        return loss(*(put(x) for put, x in zip(form, (own, shared), strict=True)),
                    joined(cut))

    (to_rows, to_rest), aux = jax.grad(whole, (0, 1), has_aux=True)(own, shared)
    to_rows = [x.reshape(parts, -1, *x.shape[1:]) for x in to_rows]

    def add(total, given):
        i, part, slopes = given
        _, back = jax.vjp(lambda p: [_floats(x)[0] for x in outputs(p, part)], params)
        # what depends on the parameters alone is the same in every part, and counts once
        found, = back([slopes, [jnp.where(i == 0, x, 0) for x in to_rest]])
        return jax.tree.map(jnp.add, total, found), None

    none = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, none, (jnp.arange(parts), cut, to_rows))
    return total, aux


def joined(cut):
    """A batch of parts [parts, ...] as one, [parts * ..., ...], whose places and slots count
    through.
    """
    moved = {name: getattr(cut, of) for name, of in POINTERS.items()}
    shift = {name: x.shape[1] for name, x in moved.items() if x is not None}
    shift['places'] = cut.items.shape[1] * cut.items.shape[2]
    part = jnp.arange(len(cut.items))
    fields = {}
    for name, step in shift.items():
        x = getattr(cut, name)
        if x is not None:
            x += jnp.where(x < 0, 0, (part * step).reshape(-1, *(1,) * (x.ndim - 1)))
        fields[name] = x
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), cut.replace(**fields))


def _floats(tree):
    """The leaves a gradient is taken in, and a function that puts others in their place."""
    leaves, form = jax.tree.flatten(tree)
    real = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def put(found):
        found = iter(found)
        return form.unflatten([next(found) if r else x
                               for x, r in zip(leaves, real, strict=True)])

    return [x for x, r in zip(leaves, real, strict=True) if r], put

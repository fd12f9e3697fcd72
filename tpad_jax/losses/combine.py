"""`combine`: masks, averages, weighs and logs all losses of a stage; and their own parameters."""

from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.tree_util import Partial

from tpad_jax.distributed import collectives
from tpad_jax.errors import InputError, refuse_if
from tpad_jax.losses.contract import label
from tpad_jax.types import Loss


def combine(losses, out, batch, state, *, axis=None, key=None, step=None, heads=None, rows=False):
    """Compute the weighted sum of losses, each the mean of its values over all replicas.

    A row weight below 0 counts as NaN: so does the loss, and the row is reported.

    Args:
      losses: tuple of `LossSpec`.
      out: {name: output}.
      batch: types.Batch.
      state: {name: state} of the losses that have one.
      axis: name of the replicas' axis, or None.
      key: the step's key. A loss gets it folded by its name, so that no other loss changes it.
      step: the stage's step, for schedules.
      heads: {name: module with its parameters bound}, see `bound`.
      rows: whether metrics get 'not_finite', int32 [all rows, losses]: the row's number (batch.row)
        where a loss's value is not finite, -1 elsewhere.

    Returns:
      The total (scalar); the new state; and metrics {name: scalar}: every loss unweighted, 'loss'
      the total, each loss's metrics as '<metric>/<name>', an estimate of mutual information as
      'mi_<name>', a weight with a schedule as 'weight/<name>'.

    Raises:
      InputError: `out` lacks an output that a loss reads, or a result breaks the contract.
    """
    total, new_state, logged, broken = 0.0, dict(state), {}, []
    for spec in losses:
        name, weight = spec.name, spec.weight_at(step)
        if spec.schedule:
            logged[f'weight/{name}'] = weight
        drawn = None if key is None else jax.random.fold_in(key, spec.hash)
        result = call(spec, out, batch, axis=axis, state=state.get(name), key=drawn,
                      head=(heads or {}).get(name))
        valid = batch.valid.reshape(-1, *(1,) * (result.value.ndim - 1))
        w = jnp.where(result.weight < 0, jnp.nan, result.weight)  # a mean has no negative weights
        w = jnp.where(valid, w, 0)
        mass = jnp.maximum(collectives.total(w.sum(), axis), jnp.finfo(jnp.float32).tiny)

        def average(value, w=w, mass=mass):
            # the inner `where` keeps the gradient of a value that is not finite out of the sum
            value = jnp.where(w > 0, jnp.where(w > 0, value, 0) * w, 0)
            return collectives.total(value.sum(), axis) / mass

        logged[name] = average(result.value)
        total += weight * logged[name]
        for metric, value in result.metrics.items():
            logged[f'mi_{name}' if metric == 'mi' else f'{metric}/{name}'] = average(value)
        if result.state is not None:
            new_state[name] = result.state
        if rows:
            bad = valid & ~(jnp.isfinite(w) & ((w == 0) | jnp.isfinite(result.value)))
            broken.append(jnp.where(bad.reshape(len(bad), -1).any(axis=1), batch.row, -1))
    logged['loss'] = total
    if rows:
        logged['not_finite'] = collectives.gather(jnp.stack(broken, axis=1), axis)
    return total, new_state, jax.lax.stop_gradient(logged)


def call(spec, out, batch, **provided) -> Loss:
    """Call one loss.

    Args:
      spec: its `LossSpec`.
      out: {name: output}.
      batch: types.Batch.
      **provided: axis, state, key and head; the function gets those that it takes.

    Raises:
      InputError: while tracing, before the first step; see `combine`.
    """
    option, fn, rows = f'config.losses.{spec.name}', label(spec.fn), len(batch.valid)
    absent = sorted(spec.needs - out.keys())
    refuse_if(absent, f'{option}: it reads {", ".join(absent)}, which this stage does not compute. '
              f'Expected {", ".join(sorted(out))}. Fix: name another output.')
    provided = {n: x for n, x in provided.items() if spec.takes(n)}
    try:
        result = spec.fn(out, batch, **spec.keywords, **provided)
    except KeyError as error:
        if error.args[0] in out:
            raise
        raise InputError(f'{option}: {fn} reads out[{error.args[0]!r}], which no keyword names. '
                         f"Fix: write {fn}(out, batch, *, x: Out = Out('r'))") from error
    except Exception as error:
        error.add_note(f'This is {option} on a batch of {rows} rows.')
        raise
    loss, is_loss = (result, True) if isinstance(result, Loss) else (Loss(result, result), False)
    value, weight = loss[:2]
    shown = f'Loss(value {_form(value)}, weight {_form(weight)})' if is_loss else _form(value)
    refuse_if(not (hasattr(value, 'shape') and hasattr(weight, 'shape')
                   and value.shape == weight.shape and value.shape[:1] == (rows,)
                   and (is_loss or value.ndim == 1) and jnp.issubdtype(value.dtype, jnp.floating)),
              f'{option}: {fn} returned {shown}. Expected one value per row, float [{rows}], or '
              f'Loss(value, weight) of one shape [{rows}, ...]. Fix: change what {fn} returns.')
    for metric, x in loss.metrics.items():
        refuse_if(getattr(x, 'shape', None) not in ((), value.shape),
                  f'{option}: the metric {metric!r} of {fn} is {_form(x)}. Expected the '
                  f"value's shape, {list(value.shape)}, or a scalar. Fix: change the metric.")
    return loss if is_loss else Loss(value, jnp.ones_like(value))


def _form(x):
    """'float32 [16, 3]', or the type of what is not an array."""
    return f'{x.dtype} {list(x.shape)}' if hasattr(x, 'shape') else type(x).__name__


def bound(losses, params: dict) -> dict:
    """Bind parameters to the losses' modules: {name: head}, each a jax.tree_util.Partial.

    Args:
      losses: tuple of `LossSpec`.
      params: nested; those of a loss are stored under 'loss', then its name.
    """
    return {spec.name: Partial(partial(_apply, spec.module),
                               params.get('loss', {}).get(spec.name, {}))
            for spec in losses if spec.module}


def first_parameters(losses, outputs, args, seed: int) -> dict:
    """Draw the first parameters of losses with a module: {'loss/<name>/<path>': array}.

    They depend on the seed and the loss's name alone, so no other draw changes. Tracing the loss's
    function once shows what its module is given: every call of the head adds the parameters that
    no earlier call made.

    Args:
      losses: tuple of `LossSpec`, each with a module.
      outputs: args -> (out, batch).
      args: of `outputs`; only their shapes matter.
      seed: of the run.

    Raises:
      InputError: a module has more than parameters, or the function never calls its head.
    """
    calls = {spec.name: [] for spec in losses}
    keys = {spec.name: jax.random.fold_in(jax.random.key(seed), spec.hash) for spec in losses}

    def record(spec, *args, rngs=None, **kwargs):
        draws = dict.fromkeys(('params', *(rngs or ())), keys[spec.name])
        calls[spec.name].append((jax.tree.map(_shape, (args, kwargs)), draws))
        return spec.module.init_with_output(draws, *args, **kwargs)[0]

    def follow(*args):
        out, batch = outputs(*args)
        return combine(losses, out, batch, first_states(losses), key=jax.random.key(0), step=0,
                       heads={spec.name: partial(record, spec) for spec in losses})[0]

    jax.eval_shape(follow, *args)
    params = {}
    for spec in losses:
        option = f'config.losses.{spec.name}.module'
        refuse_if(not calls[spec.name], f'{option}: the function never calls head. '
                  'Expected a call of it. Fix: call head, or remove the module.')
        for (args, kwargs), draws in calls[spec.name]:
            init = partial(spec.module.lazy_init, **kwargs)
            variables = jax.jit(lambda draws, init=init, args=args: init(draws, *args))(draws)
            refuse_if(variables.keys() - {'params'}, f'{option}: it has {", ".join(variables)}. '
                      'Expected parameters alone. Fix: remove its other variables.')
            drawn = {'loss': {spec.name: variables.get('params', {})}}
            params = {**flatten_dict(drawn, sep='/'), **params}
    return params


def first_states(losses) -> dict:
    """Return {name: state before the first step} of the losses that have one."""
    return {spec.name: spec.fn.initial_state() for spec in losses
            if hasattr(spec.fn, 'initial_state')}


def _apply(module, params, *args, **kwargs):
    return module.apply({'params': params}, *args, **kwargs)


def _shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, 'dtype') else x

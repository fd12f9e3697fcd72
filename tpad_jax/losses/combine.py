"""`combine`: masks, averages, weighs and logs all losses of a stage; and their own parameters."""

import inspect
import zlib
from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.tree_util import Partial

from tpad_jax.distributed import collectives
from tpad_jax.errors import InputError
from tpad_jax.losses.contract import checked, label, needs


def combine(losses, out, batch, state, *, axis=None, key=None, step=None, heads=None, rows=False):
    """Weighted sum of a stage's losses, each the mean of its values over all replicas.

    Args:
      losses: tuple of (name, function, weight, keywords); a weight may be a function of the step
        (see `contract.weigh`).
      out, batch: what the functions read. state: {name: state} of the stateful ones.
      key, step: of the stage's step. heads: {name: module with its parameters bound}.
      rows: whether metrics get 'not_finite', int32 [all rows, losses]: the row's number (batch.row)
        where a loss's value is not finite, -1 elsewhere.

    Returns:
      total (scalar), new state, metrics {name: scalar}: every loss unweighted, 'loss' the total,
      and each loss's own metrics as '<metric>/<name>', an estimate of mutual information as
      'mi_<name>', a weight that changes as 'weight/<name>'.

    Raises:
      InputError: a loss reads a name that `out` lacks, or returns what its contract does not say.
    """
    total, new_state, logged, broken = 0.0, dict(state), {}, []
    for i, (name, fn, weight, keywords) in enumerate(losses):
        if callable(weight):
            weight = logged[f'weight/{name}'] = weight(step)
        result = called(name, fn, keywords, out, batch, axis, state.get(name),
                         None if key is None else jax.random.fold_in(key, i),
                         (heads or {}).get(name))
        valid = batch.valid.reshape(-1, *(1,) * (result.value.ndim - 1))
        w = jnp.where(valid, result.weight, 0)
        mass = jnp.maximum(collectives.total(w.sum(), axis), jnp.finfo(jnp.float32).tiny)

        def average(value, w=w, mass=mass):
            return collectives.total(jnp.where(w > 0, value * w, 0).sum(), axis) / mass

        logged[name] = average(jnp.where(w > 0, result.value, 0))
        total += weight * logged[name]
        for metric, value in result.metrics.items():
            shown = f'mi_{name}' if metric == 'mi' else f'{metric}/{name}'
            logged[shown] = average(jnp.where(w > 0, value, 0))
        if result.state is not None:
            new_state[name] = result.state
        if rows:
            bad = valid & ~(jnp.isfinite(result.weight) & ((w <= 0) | jnp.isfinite(result.value)))
            broken.append(jnp.where(bad.reshape(len(bad), -1).any(axis=1), batch.row, -1))
    logged['loss'] = total
    if rows:
        logged['not_finite'] = collectives.gather(jnp.stack(broken, axis=1), axis)
    return total, new_state, jax.lax.stop_gradient(logged)


def called(name, fn, keywords, out, batch, axis, state, key, head):
    """What one loss returns, as a `Loss`.

    Raises:
      InputError: while tracing, before the first step; see `combine`.
    """
    signature = inspect.signature(fn).parameters
    absent = sorted(needs(name, fn, keywords) - out.keys())
    if absent:
        raise InputError(f'config.losses.{name} reads {", ".join(absent)}, which this stage '
                         f'does not compute; it has {", ".join(sorted(out))}')
    own = {n: x for n, x in dict(state=state, key=key, head=head).items() if n in signature}
    try:
        result = fn(out, batch, axis=axis, **{**keywords, **own})
    except KeyError as error:
        if error.args[0] in out:
            raise
        raise InputError(f'config.losses.{name}: {label(fn)} reads out[{error.args[0]!r}] without '
                         'saying so; an output is computed where a keyword names it, as in '
                         f"def {label(fn)}(out, batch, *, axis=None, x='r')") from error
    except Exception as error:
        error.add_note(f'This is config.losses.{name} on a batch of {len(batch.valid)} rows.')
        raise
    return checked(name, fn, result, len(batch.valid))


def bound(modules, params):
    """{name: head}: each loss's module (name, module) with its parameters, a jax.tree_util.Partial.

    Args:
      params: nested; those of a loss stand under 'loss', then its name.
    """
    return {name: Partial(partial(_apply, module), params.get('loss', {}).get(name, {}))
            for name, module in modules}


def first_parameters(modules, losses, outputs, args, seed):
    """The losses' own parameters at the start: {'loss/<name>/<path>': array}.

    They are drawn from the seed and the loss's name alone, so no other draw is shifted. What a
    module is given is found by following the loss's function once, without computing: every call
    of its head adds the parameters that no earlier call made.

    Args:
      modules: tuple of (name, module). losses: as in `combine`, theirs among them.
      outputs: args -> (out, batch). seed: of the run.

    Raises:
      InputError: a module keeps more than parameters, or the function never calls its head.
    """
    calls = {name: [] for name, _ in modules}
    keys = {name: jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) >> 1)
            for name, _ in modules}

    def seen(name, module, *args, rngs=None, **kwargs):
        draws = dict.fromkeys(('params', *(rngs or ())), keys[name])
        calls[name].append((jax.tree.map(_shape, (args, kwargs)), draws))
        return module.init_with_output(draws, *args, **kwargs)[0]

    def follow(*args):
        out, batch = outputs(*args)
        chosen = tuple(loss for loss in losses if loss[0] in calls)
        state = {name: fn.initial_state() for name, fn, _, _ in chosen
                 if hasattr(fn, 'initial_state')}
        return combine(chosen, out, batch, state, key=jax.random.key(0), step=0,
                       heads={name: partial(seen, name, module) for name, module in modules})[0]

    jax.eval_shape(follow, *args)
    found = {}
    for name, module in modules:
        if not calls[name]:
            raise InputError(f'config.losses.{name} names a module, but its function never calls '
                             'head; call it, or leave the module out')
        for (args, kwargs), draws in calls[name]:
            variables = jax.jit(lambda d, m=module, a=args, k=kwargs: m.init(
                d, *jax.tree.map(_ones, a), **jax.tree.map(_ones, k)))(draws)
            if variables.keys() - {'params'}:
                raise InputError(f'config.losses.{name}.module keeps '
                                 f'{", ".join(sorted(variables))}; it may have parameters alone')
            drawn = flatten_dict({'loss': {name: variables.get('params', {})}}, sep='/')
            found = {**drawn, **found}
    return found


def _apply(module, params, *args, **kwargs):
    return module.apply({'params': params}, *args, **kwargs)


def _shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, 'dtype') else x


def _ones(x):
    return jnp.ones(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

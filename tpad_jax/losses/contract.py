"""The contract of a loss: how a config names one, what it reads, and `combine`."""

import importlib
import inspect

import jax
import jax.numpy as jnp

from tpad_jax import collectives
from tpad_jax.errors import InputError
from tpad_jax.types import Loss

PROVIDED = ('axis', 'state', 'key')  # what `combine` passes by itself
PLAIN = ('dtype', 'kind')  # keywords that are strings but no names of outputs
HOME = 'tpad_jax.losses'  # where a name without a module is looked up


def resolve(name, fn):
    """The function a config names: one of this module's, or 'package.module:function'.

    Raises:
      InputError: there is no such function.
    """
    module, _, function = fn.rpartition(':')
    try:
        found = getattr(importlib.import_module(module or HOME), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f'config.losses.{name}.fn={fn!r} cannot be found ({error}); name a '
                         'function of tpad_jax/losses/ or package.module:function') from error
    if not callable(found):
        raise InputError(f'config.losses.{name}.fn={fn!r} is no function but a '
                         f'{type(found).__name__}; name a function')
    return found


def needs(name, fn, keywords):
    """Names of the outputs a loss reads: its string keywords (but `PLAIN`), by config or default.

    Raises:
      InputError: a keyword the function does not take.
    """
    signature = inspect.signature(fn).parameters
    known = [p for p in signature if p not in ('out', 'batch', *PROVIDED)]
    unknown = sorted(set(keywords) - set(known))
    if unknown:
        raise InputError(f'config.losses.{name}: {fn.__name__} takes no {", ".join(unknown)}; it '
                         'takes ' + ', '.join(known))
    merged = {**{n: p.default for n, p in signature.items()}, **keywords}
    return frozenset(v for n, v in merged.items() if isinstance(v, str) and n not in PLAIN)


def combine(losses, out, batch, state, *, axis=None, key=None):
    """Weighted sum of a stage's losses, each the mean of its values over all replicas.

    Args:
      losses: tuple of (name, function, weight, keywords).
      out, batch: what the functions read. state: {name: state} of the stateful ones.

    Returns:
      total (scalar), new state, metrics {name: scalar}: every loss unweighted, 'loss' the total,
      and each loss's own metrics as '<metric>/<name>', an estimate of mutual information as
      'mi_<name>'.

    Raises:
      InputError: a loss reads a name that `out` lacks.
    """
    total, new_state, logged = 0.0, dict(state), {}
    for i, (name, fn, weight, keywords) in enumerate(losses):
        signature = inspect.signature(fn).parameters
        absent = sorted(needs(name, fn, keywords) - out.keys())
        if absent:  # while tracing, before the first step
            raise InputError(f'config.losses.{name} reads {", ".join(absent)}, which this stage '
                             f'does not compute; it has {", ".join(sorted(out))}')
        extra = dict(keywords)
        if 'state' in signature:
            extra['state'] = state.get(name)
        if 'key' in signature:
            extra['key'] = None if key is None else jax.random.fold_in(key, i)
        result = fn(out, batch, axis=axis, **extra)
        if not isinstance(result, Loss):
            result = Loss(result, jnp.ones_like(result))
        rows = batch.valid.reshape(-1, *(1,) * (result.value.ndim - 1))
        w = jnp.where(rows, result.weight, 0)
        mass = jnp.maximum(collectives.total(w.sum(), axis), jnp.finfo(jnp.float32).tiny)

        def average(value, w=w, mass=mass):
            return collectives.total(jnp.where(w > 0, value * w, 0).sum(), axis) / mass

        logged[name] = average(jnp.where(w > 0, result.value, 0))
        total += weight * logged[name]
        for metric, value in result.metrics.items():
            label = f'mi_{name}' if metric == 'mi' else f'{metric}/{name}'
            logged[label] = average(jnp.where(w > 0, value, 0))
        if result.state is not None:
            new_state[name] = result.state
    logged['loss'] = total
    return total, new_state, jax.lax.stop_gradient(logged)

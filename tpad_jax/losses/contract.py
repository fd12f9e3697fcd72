"""The contract of a loss: how a config names one, what it reads, what it may return.

An entry of config.losses holds `fn`, `weight` and `stages`; maybe `schedule`, which the weight is
multiplied by, `module` and `fields`, a flax module whose parameters are the loss's own; and the
function's own keywords.
"""

import difflib
import importlib
import inspect
from functools import partial
from itertools import pairwise
from numbers import Real

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from tpad_jax.errors import InputError
from tpad_jax.types import Loss

PROVIDED = ('axis', 'state', 'key', 'head')  # what `combine` passes by itself
PLAIN = ('dtype', 'kind')  # keywords that are strings but no names of outputs
ENTRY = ('fn', 'weight', 'stages', 'schedule', 'module', 'fields')  # keys that are no keywords
HOME = 'tpad_jax.losses'  # where a name without a module is looked up


def resolve(name, fn):
    """The function a config names: one of this package's, or 'package.module:function'.

    Raises:
      InputError: there is no such function.
    """
    found = _find(f'config.losses.{name}.fn={fn!r}', fn,
                  'a function of tpad_jax/losses/ or package.module:function')
    if not callable(found) or isinstance(found, type):
        raise InputError(f'config.losses.{name}.fn={fn!r} is no function but a '
                         f'{type(found).__name__}; name a function')
    return found


def needs(name, fn, keywords):
    """Names of the outputs a loss reads: its string keywords (but `PLAIN`), by config or default.

    Raises:
      InputError: a keyword the function does not take.
    """
    signature = inspect.signature(fn).parameters
    known = [n for n, p in signature.items()
             if n not in ('out', 'batch', *PROVIDED) and p.kind is not p.VAR_KEYWORD]
    unknown = sorted(set(keywords) - set(known))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        raise InputError(f'config.losses.{name}: {label(fn)} takes no {", ".join(unknown)}; it '
                         f'takes {", ".join(known) or "none of its own"}')
    merged = {**{n: p.default for n, p in signature.items()}, **keywords}
    return frozenset(v for n, v in merged.items() if isinstance(v, str) and n not in PLAIN)


def check_call(name, fn, keywords, head=False):
    """Refuse a function that `combine` could not call; `head`: the entry names a module.

    Raises:
      InputError: it does not begin with (out, batch), takes no axis, has a keyword that nobody
        gives, or one of the entry's module and the function's `head` is without the other.
    """
    signature = inspect.signature(fn)
    shown = f'config.losses.{name}: {label(fn)}{signature}'
    wanted = f'write it as {label(fn)}(out, batch, *, axis=None), with keywords of its own behind'
    if list(signature.parameters)[:2] != ['out', 'batch']:
        raise InputError(f'{shown} does not begin with (out, batch); {wanted}')
    provided = {n: None for n in PROVIDED if n == 'axis' or n in signature.parameters}
    try:
        signature.bind({}, None, **{**keywords, **provided})
    except TypeError as error:
        raise InputError(f'{shown} cannot be called as a loss is ({error}); {wanted}, each with a '
                         'default or a value in the config') from error
    asks = 'head' in signature.parameters
    if head and not asks:
        raise InputError(f'{shown} takes no head, but the config names a module; add the keyword '
                         'head=None, which is the module with its parameters')
    if asks and not head and signature.parameters['head'].default is inspect.Parameter.empty:
        raise InputError(f'{shown} wants a head; name its module in the config, '
                         "module='package.module:Class'")


def own_module(name, module, fields):
    """The flax module of an entry, whose parameters are the loss's own.

    Args:
      module: 'package.module:Class', a flax.linen.Module. fields: its dataclass fields.

    Raises:
      InputError: no such class, or fields it does not take.
    """
    at = f'config.losses.{name}.module={module!r}'
    found = _find(at, module, 'package.module:Class')
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f'{at} is no flax.linen.Module but {label(found)}; name such a class')
    try:
        return found(**fields)
    except TypeError as error:
        raise InputError(f'{at} cannot be made with fields={fields} ({error}); give its dataclass '
                         'fields') from error


def weigh(name, weight, schedule=()):
    """A weight as `combine` takes it: a number, or a function of the stage's step.

    Args:
      schedule: ((step, factor), ...) with rising steps: the weight is multiplied by the factor,
        linear between two points and constant outside (numpy.interp); () leaves it a number.

    Raises:
      InputError: a schedule that is not of this form.
    """
    if not len(schedule):
        return weight
    numbers = all(isinstance(point, tuple | list) and len(point) == 2
                  and all(isinstance(x, Real) and np.isfinite(x) for x in point)
                  for point in schedule)
    if not numbers or any(a[0] >= b[0] for a, b in pairwise(schedule)):
        raise InputError(f'config.losses.{name}.schedule={tuple(schedule)!r} must hold pairs '
                         '(step, factor) with rising steps, as in ((0, 0.0), (100, 1.0))')
    return partial(_scheduled, weight, *np.float32(schedule).T)


def checked(name, fn, result, rows):
    """What a loss returned, as a `Loss`; `rows`: of the batch.

    Raises:
      InputError: it has another form than the contract says.
    """
    whole = result if isinstance(result, Loss) else Loss(result, 1.0)
    value, weight = whole.value, whole.weight if isinstance(result, Loss) else whole.value
    fits = all(hasattr(x, 'shape') for x in (value, weight))
    fits = fits and value.shape == weight.shape and value.shape[:1] == (rows,) and (
        jnp.issubdtype(value.dtype, jnp.floating)
        and (value.ndim == 1 or isinstance(result, Loss)))
    if not fits:
        found = (f'Loss(value {_shown(result.value)}, weight {_shown(result.weight)})'
                 if isinstance(result, Loss) else _shown(result))
        raise InputError(f'config.losses.{name}: {label(fn)} returned {found}; a loss returns one '
                         f'value per row, float [{rows}], or Loss(value, weight) of one shape '
                         f'[{rows}, ...]')
    if not isinstance(result, Loss):
        return Loss(value, jnp.ones_like(value))
    for metric, x in whole.metrics.items():
        if not hasattr(x, 'shape') or x.shape not in ((), value.shape):
            raise InputError(f'config.losses.{name}: the metric {metric!r} of {label(fn)} is '
                             f'{_shown(x)}; it must have the shape of the value, '
                             f'{list(value.shape)}')
    return whole


def label(fn):
    """What a message calls a function or a class."""
    return getattr(fn, '__name__', repr(fn))


def _find(at, path, wanted):
    """What 'package.module:name' leads to; `at`: the config's words for it."""
    module, _, attribute = path.rpartition(':')
    try:
        home = importlib.import_module(module or HOME)
    except ModuleNotFoundError as error:
        raise InputError(f'{at} cannot be found ({error}); name {wanted}') from error
    except Exception as error:  # whatever a file of the user's raises
        where = f', line {error.lineno}' if isinstance(error, SyntaxError) else ''
        raise InputError(f'{at} cannot be found: {module} does not import '
                         f'({type(error).__name__}: {error}{where}); mend it') from error
    if not attribute or not hasattr(home, attribute):
        near = difflib.get_close_matches(attribute, vars(home), 1)
        raise InputError(f'{at} cannot be found: {home.__name__} has no {attribute!r}'
                         + (f', but {near[0]!r}' if near else '') + f'; name {wanted}')
    return getattr(home, attribute)


def _scheduled(weight, steps, factors, step):
    return weight * jnp.interp(jnp.asarray(step, jnp.float32), steps, factors)


def _shown(x):
    """float32 [16, 3], or the type of what is no array."""
    if hasattr(x, 'shape') and hasattr(x, 'dtype'):
        return f'{x.dtype} {list(x.shape)}'
    return type(x).__name__

"""The contract of a loss: how a config names one, what it reads, what it may return.

An entry of config.losses holds `fn`, `weight` and `stages`; optionally `schedule`, which the
weight is multiplied by, and `module` and `fields`, a flax module whose parameters belong to the
loss; and the function's keywords. `from_entry` turns it into a `LossSpec`.

A function without a keyword of type `Out` is read in the old form: a keyword whose default, or
whose value in the config where it has no default, is the name of an output names an output.
"""

import inspect
import pkgutil
import typing
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from tpad_jax.errors import refuse_if, refusing
from tpad_jax.models import outputs

PROVIDED = ('axis', 'state', 'key', 'head')  # keywords that `combine` passes if a function has them
ENTRY = ('fn', 'weight', 'stages', 'schedule', 'module', 'fields')  # keys that are not keywords
HOME = 'tpad_jax.losses'  # where a name without a module is looked up


class Out(str):
    """The name of an output, as a keyword's type and default: `x: Out = Out('r')`."""

    __slots__ = ()


@dataclass(frozen=True)
class LossSpec:
    """A loss of a stage: complete, hashable, refused while it is made if it cannot be called.

    Attributes:
      name: of its entry in config.losses; its draws and first parameters depend on it.
      fn: (out, batch, **keywords) -> one value per row, or `Loss`.
      weight: what its mean is multiplied by.
      keywords: {keyword: value}, hashable at any depth: lists become tuples, dicts FrozenDicts.
      schedule: ((step, factor), ...) with rising steps: the weight is multiplied by the factor,
        linear between two points and constant outside (numpy.interp); (): constant.
      module: the flax module of its `head`, or None.

    Raises:
      InputError: the function cannot be called like this, a keyword is not one of its keywords,
        or the schedule has another form.
    """

    name: str
    fn: Callable
    weight: float = 1.0
    keywords: FrozenDict = field(default_factory=FrozenDict)
    schedule: tuple = ()
    module: nn.Module | None = None

    def __post_init__(self):
        option = f'config.losses.{self.name}'
        object.__setattr__(self, 'keywords', _frozen(option, dict(self.keywords)))
        object.__setattr__(self, 'schedule', _frozen(f'{option}.schedule', self.schedule))
        _check_signature(option, self.fn, self.keywords, self.module is not None)
        _check_schedule(option, self.schedule)
        for keyword, output in self.reads.items():
            refuse_if(not isinstance(output, str | None), f'{option}.{keyword}={output!r}: '
                      f'{keyword} names an output. Expected a string. Fix: write a name.')

    @cached_property
    def reads(self) -> dict:
        """The outputs by keyword, from the config or the defaults: {keyword: name of an output}."""
        parameters = _parameters(self.fn)
        values = {n: self.keywords.get(n, p.default) for n, p in parameters.items()}
        marked = [n for n, p in parameters.items() if _is_output(p)]
        return {n: values[n] for n in marked or [  # else the old form
            n for n, p in parameters.items()
            if outputs.is_known(values[n] if p.default is p.empty else p.default)]}

    @property
    def needs(self) -> frozenset:
        """Names of the outputs it reads."""
        return frozenset(self.reads.values()) - {None}

    @property
    def is_old_form(self) -> bool:
        """Whether its outputs are recognised by their names instead of by `Out`."""
        return bool(self.reads) and not any(map(_is_output, _parameters(self.fn).values()))

    @property
    def hash(self) -> int:
        """A number that depends on the name alone, for `jax.random.fold_in`."""
        return zlib.crc32(self.name.encode()) >> 1  # fold_in takes 31 bits from a Python int

    def takes(self, keyword: str) -> bool:
        """Whether the function has this keyword."""
        return keyword in inspect.signature(self.fn).parameters

    def weight_at(self, step):
        """The weight in a stage's step: a number, or an array if there is a schedule."""
        if not self.schedule:
            return self.weight
        steps, factors = np.float32(self.schedule).T
        return self.weight * jnp.interp(jnp.asarray(step, jnp.float32), steps, factors)


def from_entry(name: str, entry, weight: float | None = None) -> LossSpec:
    """Make the `LossSpec` of an entry of config.losses.

    Args:
      name: of the entry.
      entry: mapping with the keys above.
      weight: in place of the entry's.

    Raises:
      InputError: the function or the module does not exist; see `LossSpec`.
    """
    module, fields = entry.get('module'), entry.get('fields', {})
    return LossSpec(
        name, resolve(name, entry['fn']), entry.get('weight', 1.0) if weight is None else weight,
        {n: x for n, x in entry.items() if n not in ENTRY}, entry.get('schedule', ()),
        make_module(f'config.losses.{name}', module, fields) if module else None)


def resolve(name: str, fn: str) -> Callable:
    """Find the function that a config names: of this package, or 'package.module:function'.

    Raises:
      InputError: there is no such function.
    """
    option = f'config.losses.{name}.fn={fn!r}'
    function = _find(option, fn, 'a function of tpad_jax/losses/ or package.module:function')
    refuse_if(not callable(function) or isinstance(function, type), f'{option}: it is not a '
              f'function but a {type(function).__name__}. Expected a function. Fix: name one.')
    return function


def label(fn) -> str:
    """Return what a message calls a function or a class."""
    return getattr(fn, '__name__', repr(fn))


def _parameters(fn):
    """The parameters that a config may set."""
    return {n: p for n, p in inspect.signature(fn).parameters.items()
            if n not in ('out', 'batch', *PROVIDED) and p.kind is not p.VAR_KEYWORD}


def _is_output(parameter):
    kind, default = parameter.annotation, parameter.default
    # a string after `from __future__ import annotations`
    named = isinstance(kind, str) and 'Out' in kind.replace('.', ' ').split()
    return named or isinstance(default, Out) or Out in (kind, *typing.get_args(kind))


def _check_signature(option, fn, keywords, has_module):
    signature = inspect.signature(fn)
    shown = f'{option}: {label(fn)}{signature}'
    form = f'Expected {label(fn)}(out, batch, *, ...)'
    refuse_if(list(signature.parameters)[:2] != ['out', 'batch'],
              f'{shown} does not begin with (out, batch). {form}. Fix: change the signature.')
    # a name that `combine` provides is refused in the config, as it would be given twice
    provided = {n: None for n in PROVIDED if n in keywords or (
        has_module if n == 'head' else n in signature.parameters)}
    with refusing(TypeError, f'{shown} cannot be called as a loss',
                  f'{form}, each keyword with a default or a value in the config, and with head '
                  'only if the config names a module. Fix: change the entry or the signature.'):
        signature.bind({}, None, **keywords, **provided)


def _check_schedule(option, schedule):
    with refusing((TypeError, ValueError), f'{option}.schedule={schedule!r}: it is not a schedule',
                  'Expected pairs with rising steps. Fix: write it as in ((0, 0.0), (100, 1.0)).'):
        points = np.asarray(schedule).reshape(len(schedule), 2)
        if not np.isfinite(points).all() or (np.diff(points[:, 0]) <= 0).any():
            raise ValueError('steps do not rise, or a number is not finite')


def make_module(option, module, fields):
    """Make the flax module of an entry.

    Args:
      option: how messages name it.
      module: 'package.module:Class'.
      fields: its dataclass fields.

    Raises:
      InputError: there is no such class, or it does not take these fields.
    """
    option = f'{option}.module={module!r}'
    kind = _find(option, module, 'package.module:Class')
    refuse_if(not (isinstance(kind, type) and issubclass(kind, nn.Module)), f'{option}: it is not '
              f'a flax.linen.Module but {label(kind)}. Expected such a class. Fix: name one.')
    fields = {n: _frozen(f'{option}, fields.{n}', x) for n, x in fields.items()}
    with refusing(TypeError, f'{option}: it cannot be made with fields={fields}',
                  'Expected its dataclass fields. Fix: change fields.'):
        return kind(**fields)


def _frozen(option, value):
    """The value with tuples for lists and FrozenDicts for dicts, at any depth."""
    if hasattr(value, 'items'):  # a dict, or a ConfigDict
        return FrozenDict({n: _frozen(f'{option}.{n}', x) for n, x in value.items()})
    if isinstance(value, list | tuple):
        return tuple(_frozen(option, x) for x in value)
    if isinstance(value, set):
        return frozenset(value)
    with refusing(TypeError, f'{option}={value!r}: a {type(value).__name__} is not hashable',
                  'Expected numbers, strings, None, lists and dicts. Fix: convert it.'):
        hash(value)
    return value


def _find(option, path, expected):
    """What 'package.module:name' leads to."""
    # anything that a user's file raises
    with refusing(Exception, f'{option}: it cannot be found',
                  f'Expected {expected}. Fix: change the name, or repair the module.'):
        return pkgutil.resolve_name(path if ':' in path else f'{HOME}:{path or None}')

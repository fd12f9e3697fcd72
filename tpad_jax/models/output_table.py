"""The form of an output and its registration. `outputs.py` has the outputs.

An entry of the table names what it needs: other outputs, values that only makers read (their names
begin with '_'), and `SOURCES`, which a stage may lack. All else is derived from the table: what a
stage can compute, what a loss may name, what `tpad_jax.losses check` tries a loss on.
"""

import graphlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from tpad_jax.errors import InputError, refuse_if
from tpad_jax.models.tpad import TPAD, ItemVectors

# Every draw of a step is keyed by (step key, purpose, row or item): the order below is part of a
# run.
PURPOSES = ('withhold', 'describe_words', 'foretell_words', 'pick', 'fusion', 'encoder')

# Sources that a stage may lack: images and words of a batch's items; the clusters of
# config.model.clusters; features r that a loss may train; the MLLM of config.mllm.teacher; rows of
# the features that config.model.recommend names; an encoder that reads all prefixes at once; the
# distribution of config.model.bottleneck.
SOURCES = ('content', 'clusters', 'trained r', 'teacher', 'features', 'prefixes', 'bottleneck')

# Letters of a shape: those of types.py; W words, C clusters, and width of the MLLM's states.
SIZES = ('B', 'N', 'V+1', 'D', 'M D', 'T', 'P', 'W', 'C', 'width')
KINDS = {'float32': jnp.floating, 'int32': jnp.integer, 'bool': jnp.bool_}  # of a declared dtype
OPTIONAL = ('repeat',)  # outputs that may be None


class Plan(NamedTuple):
    """The options that decide which values an output needs.

    Attributes:
      form: see `TPAD`.
      recommend: see `TPAD`.
      reread: see `TPAD`.
      fresh: features ('k', 'r') computed from content.
    """

    form: str
    recommend: tuple[str, ...]
    reread: bool
    fresh: frozenset


@dataclass(frozen=True)
class Inputs:
    """The inputs of every maker.

    Attributes:
      spec: the modules.
      params: nested.
      batch: types.Batch.
      catalogue: rows per item.
      fresh: features ('k', 'r') computed from content.
      keys: {purpose: key}, None in evaluation: then nothing is dropped or withheld.
      table: whether the recommender's vectors of the whole catalogue are needed, or only some.
    """

    spec: TPAD
    params: dict
    batch: Any
    catalogue: dict
    fresh: frozenset
    keys: dict
    table: bool = True

    @property
    def rows(self):
        """int32 [B]: 0, 1, 2, ..."""
        return jnp.arange(self.batch.items.shape[0])

    @property
    def sizes(self):
        """Sizes of a shape that are known before anything is computed: {letter: size}."""
        rows, positions = self.batch.items.shape
        return {'B': rows, 'N': positions, **(
            {'V+1': len(self.catalogue['warm'])} if 'warm' in self.catalogue else {})}

    @property
    def content(self):
        """(image, has_image, tokens) of the batch's items."""
        return self.batch.image, self.batch.has_image, self.batch.tokens

    def stored(self, name):
        """Rows of the catalogue.

        Raises:
          InputError: there are none.
        """
        refuse_if(name not in self.catalogue, f'output {name}: the catalogue has no rows of it. '
                  f'Fix: run the stage that makes them, or add {name!r} to config.stage.*.fresh')
        return self.catalogue[name]


@dataclass(frozen=True)
class Output:
    """An entry of the table.

    Attributes:
      make: (Inputs, *values of its needs without sources) -> array.
      needs: Plan -> names.
      shape: the sizes as in types.py, as 'B, N, D'.
      dtype: of its values.
      doc: one line.
      is_table: it depends on the parameters and the catalogue alone, not on a batch's rows.
      module: that adds it.
    """

    make: Callable
    needs: Callable
    shape: str
    dtype: str
    doc: str
    is_table: bool
    module: str

    @property
    def form(self):
        """Dtype and shape in words."""
        return f'{self.dtype} [{self.shape}]'


OUTPUTS: dict[str, Output] = {}  # in the order in which a step computes them


def output(name, shape='', needs=(), *, dtype='float32', is_table=False, doc=None):
    """Add the decorated maker to the table; its docstring's first line describes the output.

    Args:
      name: of the output; one that begins with '_' is read by makers only.
      shape: see `Output`, and likewise needs, dtype and is_table.
      needs: names, or Plan -> names.
      dtype: see `Output`.
      is_table: see `Output`.
      doc: in place of the docstring.

    Raises:
      InputError: another module has an output of this name, or it cannot have this shape or dtype.
    """
    frame = sys._getframe(1)
    while frame.f_globals is globals():  # `split`
        frame = frame.f_back
    module, sizes = frame.f_globals['__name__'], shape.split(', ')
    earlier = OUTPUTS[name].module if name in OUTPUTS else module
    refuse_if(earlier != module, f'output {name!r} of {module} is there already, in {earlier}. '
              'Fix: give it another name')
    if name[0] != '_':
        refuse_if(shape and not {*sizes} <= {*SIZES}, f'output {name!r}: shape={shape!r}. Expected '
                  f"some of {', '.join(SIZES)}, as in 'B, N, D'. Fix: D is any number of features")
        refuse_if((sizes[0] == 'B') == is_table, f'output {name!r}: shape={shape!r} with is_table='
                  f'{is_table}. Expected B, the rows, first, or is_table=True for what is the same '
                  'for every batch. Fix: change one of the two')
        refuse_if(dtype not in KINDS, f'output {name!r}: dtype={dtype!r}. Expected one of '
                  f'{", ".join(KINDS)}. Fix: change it')

    def add(make):
        text = (doc or make.__doc__ or '').splitlines() or ['']
        OUTPUTS[name] = Output(make, needs if callable(needs) else lambda _: needs, shape, dtype,
                               text[0], is_table, module)
        return make

    return add


def split(name, shape, needs=(), **docs):
    """Add the values of the tuple `name` as outputs {their name: docstring}."""
    for i, (part, doc) in enumerate(docs.items()):
        output(part, shape, (name, *needs), doc=doc)(lambda at, values, i=i: values[i])


def required(wanted, plan: Plan) -> set[str]:
    """Collect all that outputs need, directly or not, `SOURCES` and themselves included.

    Raises:
      InputError: an output needs a name that does not exist, or itself. This is looked up here as
        an output may be added before the one that it needs.
    """
    todo, result = list(wanted), {}
    while todo:
        name = todo.pop()
        if name not in result:
            needs = result[name] = OUTPUTS[name].needs(plan) if name in OUTPUTS else ()
            unknown = [n for n in needs if n not in OUTPUTS and n not in SOURCES]
            refuse_if(unknown, f'output {name!r}: its needs name {", ".join(unknown)}. Expected '
                      f'outputs, values of makers or {", ".join(map(repr, SOURCES))}. Fix: correct '
                      'the name, or import the module that adds it')
            todo += needs
    try:
        graphlib.TopologicalSorter(result).prepare()
    except graphlib.CycleError as error:
        circle = ' needs '.join(error.args[1][::-1])
        raise InputError(f'outputs need one another: {circle}. Expected no circle. Fix: take one '
                         'of these needs away') from None
    return set(result)


def checked(name: str, value, inputs: Inputs):
    """Return what a maker returned, if its entry declares it so: known while a step is traced.

    Args:
      name: of the output; those of makers only declare nothing.
      value: of the maker.
      inputs: of the maker, for the sizes.

    Raises:
      InputError: it has another shape or kind of dtype.
    """
    entry, sizes = OUTPUTS[name], inputs.sizes
    if not entry.shape or isinstance(value, ItemVectors) or (value is None and name in OPTIONAL):
        return value
    letters, shape = entry.shape.split(', '), getattr(value, 'shape', None)
    came = type(value).__name__ if shape is None else f'{value.dtype} {list(shape)}'
    # an unknown letter takes its first size
    right = shape is not None and len(shape) == len(letters) and jnp.issubdtype(
        value.dtype, KINDS[entry.dtype]) and all(
            sizes.setdefault(n, size) == size for n, size in zip(letters, shape, strict=True))
    known = ', '.join(f'{n}={sizes[n]}' for n in dict.fromkeys(letters) if n in inputs.sizes)
    refuse_if(not right, f'output {name!r} of {entry.module} is {came}. Expected {entry.form} as '
              f'declared{f", {known}" * bool(known)}. Fix: change what the maker returns, or its '
              'declared shape or dtype')
    return value


def split_tables(out: dict) -> tuple[dict, dict]:
    """Split outputs into those of the batch's rows and those that are the same for every batch.

    Args:
      out: from `outputs.forward`.
    """
    tables = {n: x for n, x in out.items() if n.startswith('critic.') or OUTPUTS[n].is_table}
    return {n: x for n, x in out.items() if n not in tables}, tables

"""The form of an output and its registration. `outputs.py` has the outputs.

An entry of the table names what it needs: other outputs, values that only makers read (their names
begin with '_'), and `SOURCES`, which a stage may lack. All else is derived from the table: what a
stage can compute, what a loss may name, what `tpad_jax.losses check` tries a loss on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from tpad_jax.errors import refuse_if
from tpad_jax.models.tpad import TPAD

# Every draw of a step is keyed by (step key, purpose, row or item): the order below is part of a
# run.
PURPOSES = ('withhold', 'describe_words', 'foretell_words', 'pick', 'fusion', 'encoder')

# Sources that a stage may lack: images and words of a batch's items; the clusters of
# config.model.clusters; features r that a loss may train; the MLLM of config.mllm.teacher; rows of
# the features that config.model.recommend names; an encoder that reads all prefixes at once; the
# distribution of config.model.bottleneck.
SOURCES = ('content', 'clusters', 'trained r', 'teacher', 'features', 'prefixes', 'bottleneck')


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
    """

    make: Callable
    needs: Callable
    shape: str
    dtype: str
    doc: str
    is_table: bool


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
      InputError: another module has an output of this name.
    """
    def add(make):
        earlier = OUTPUTS[name].make if name in OUTPUTS else make
        refuse_if(earlier.__module__ != make.__module__, f'output {name!r} of {make.__module__} '
                  f'is there already, in {earlier.__module__}. Fix: give it another name')
        text = (doc or make.__doc__ or '').splitlines() or ['']
        OUTPUTS[name] = Output(make, needs if callable(needs) else lambda _: needs, shape, dtype,
                               text[0], is_table)
        return make

    return add


def split(name, shape, needs=(), **docs):
    """Add the values of the tuple `name` as outputs {their name: docstring}."""
    for i, (part, doc) in enumerate(docs.items()):
        output(part, shape, (name, *needs), doc=doc)(lambda at, values, i=i: values[i])


def required(wanted, plan: Plan) -> set[str]:
    """Collect all that outputs need, directly or not, `SOURCES` and themselves included."""
    todo, result = list(wanted), set()
    while todo:
        name = todo.pop()
        if name not in result:
            result.add(name)
            todo += OUTPUTS[name].needs(plan) if name in OUTPUTS else ()
    return result


def split_tables(out: dict, rows: int) -> tuple[dict, dict]:
    """Split outputs into those of the batch's rows and those that are the same for every batch.

    Args:
      out: from `outputs.forward`.
      rows: of the batch.

    Raises:
      ValueError: an output that is not a table has another first axis.
    """
    tables = {n: x for n, x in out.items() if n.startswith('critic.') or OUTPUTS[n].is_table}
    of_rows = {n: x for n, x in out.items() if n not in tables}
    for name, x in of_rows.items():
        if x is not None and x.shape[:1] != (rows,):
            raise ValueError(f'output {name}: {list(x.shape)}. Expected {rows} rows, as the batch '
                             'has. Fix: if every batch has the same, give its entry is_table=True.')
    return of_rows, tables

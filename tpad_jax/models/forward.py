"""`forward`: computes the outputs that are asked for, from a table of makers (`outputs.py`).

An entry of the table names what it needs: other outputs, values that only makers read (their names
begin with '_'), and `SOURCES`, which a stage may lack. All else is derived from the table: what a
stage can compute, what a loss may name, what `tpad_jax.losses check` tries a loss on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpad_jax.errors import InputError
from tpad_jax.models.tpad import TPAD
from tpad_jax.mutual_information.critics import Score

# Every draw of a step is keyed by (step key, purpose, row or item): the order below is part of a
# run.
PURPOSES = ('withhold', 'describe_words', 'foretell_words', 'pick', 'fusion', 'encoder')

SOURCES = {
    'content': 'images and words of the items of a batch',
    'clusters': 'the clusters of config.model.clusters',
    'trained r': 'features r that a loss may train',
    'teacher': 'the MLLM of config.mllm.teacher',
    'features': 'rows of the features that config.model.recommend names',
    'prefixes': 'an encoder that reads all prefixes of a session at once',
}


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
    """

    spec: TPAD
    params: dict
    batch: Any
    catalogue: dict
    fresh: frozenset
    keys: dict

    @property
    def rows(self):
        """int32 [B]: 0, 1, 2, ..."""
        return jnp.arange(self.batch.items.shape[0])

    def stored(self, name):
        """Rows of the catalogue.

        Raises:
          InputError: there are none.
        """
        if name not in self.catalogue:
            raise InputError(f'output {name}: the catalogue has no rows of it. Expected rows that '
                             'an earlier stage computed, or a fresh feature. Fix: run that stage, '
                             f'or add {name!r} to config.stage.*.fresh.')
        return self.catalogue[name]


@dataclass(frozen=True)
class Output:
    """An entry of the table.

    Attributes:
      make: (Inputs, *values of its needs without sources) -> array.
      needs: names, or Plan -> names.
      shape: the sizes as in types.py, as 'B, N, D'.
      dtype: of its values.
      doc: one line.
      is_table: it depends on the parameters and the catalogue alone, not on a batch's rows.
    """

    make: Callable
    needs: tuple[str, ...] | Callable
    shape: str
    dtype: str
    doc: str
    is_table: bool

    def needs_in(self, plan: Plan) -> tuple[str, ...]:
        """Names of what it needs."""
        return self.needs(plan) if callable(self.needs) else self.needs


OUTPUTS: dict[str, Output] = {}  # in the order in which a step computes them


def output(name, shape='', needs=(), *, dtype='float32', is_table=False, doc=None):
    """Add the decorated maker to the table; its docstring's first line describes the output.

    Args:
      name: of the output; one that begins with '_' is read by makers only.
      shape: see `Output`, and likewise needs, dtype and is_table.
      needs: see `Output`.
      dtype: see `Output`.
      is_table: see `Output`.
      doc: in place of the docstring.
    """
    def add(make):
        text = (doc or make.__doc__ or '').splitlines() or ['']
        OUTPUTS[name] = Output(make, needs, shape, dtype, text[0], is_table)
        return make

    return add


def is_known(name) -> bool:
    """Whether this names an output that `forward` may compute: of the table, or a critic."""
    return isinstance(name, str) and (
        name.startswith('critic.') or (name in OUTPUTS and name[0] != '_'))


def names(critics=()) -> list[str]:
    """List the outputs a loss may name, with one per critic."""
    return sorted([*filter(is_known, OUTPUTS), *(f'critic.{name}' for name in critics)])


def required(wanted, plan: Plan) -> set[str]:
    """Collect all that outputs need, directly or not, `SOURCES` and themselves included."""
    todo, result = list(wanted), set()
    while todo:
        name = todo.pop()
        if name not in result:
            result.add(name)
            todo += OUTPUTS[name].needs_in(plan) if name in OUTPUTS else ()
    return result


def forward(spec: TPAD, params: dict, batch, catalogue: dict, needs: frozenset, fresh: frozenset,
            key=None) -> dict:
    """Compute the named outputs of a batch.

    Args:
      spec: the modules, see `tpad.build`.
      params: nested, see `tpad.init`.
      batch: types.Batch.
      catalogue: rows per item, read only.
      needs: names of outputs.
      fresh: features ('k', 'r') computed from content.
      key: the step's key, or None for evaluation: then nothing is dropped or withheld.

    Returns:
      {name: output} of the needed outputs; `outputs.py` has their shapes.
    """
    keys = dict.fromkeys(PURPOSES) if key is None else dict(
        zip(PURPOSES, jax.random.split(key, len(PURPOSES)), strict=True))
    inputs = Inputs(spec, params, batch, catalogue, fresh, keys)
    plan = Plan(spec.form, spec.recommend, spec.reread, fresh)
    values = {}

    def value(name):
        if name not in values:
            entry = OUTPUTS[name]
            values[name] = entry.make(inputs, *(
                value(n) for n in entry.needs_in(plan) if n not in SOURCES))
        return values[name]

    out = {name: value(name) for name in OUTPUTS if name in needs}
    for name, critic in spec.critics:
        if f'critic.{name}' in needs:
            out[f'critic.{name}'] = Score(critic, params['critic'][name])
    return out


def split_tables(out: dict, rows: int) -> tuple[dict, dict]:
    """Split outputs into those of the batch's rows and those that are the same for every batch.

    Args:
      out: from `forward`.
      rows: of the batch.

    Raises:
      ValueError: an output that is not a table has another first axis.
    """
    tables = {n: x for n, x in out.items() if n.startswith('critic.') or OUTPUTS[n].is_table}
    of_rows = {n: x for n, x in out.items() if n not in tables}
    for name, x in of_rows.items():
        if x is not None and x.shape[:1] != (rows,):
            raise ValueError(f'output {name}: its shape is {list(x.shape)}. Expected one row for '
                             f'each of the {rows} of the batch. Fix: if it is the same for every '
                             'batch, add is_table=True to its entry.')
    return of_rows, tables

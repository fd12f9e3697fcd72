"""The table of all models on the test rows, and shares of the oracle."""

import math

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement

from tpad_jax.core import console as console_lib

# part of the targets -> where a model's test metrics hold it
PARTS = {'all': (), 'warm': ('slices', 'warm'), 'cold': ('slices', 'cold')}
WIDEST = 10_000  # characters of a table at most


def columns(results: dict) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Lay out the columns of a table of all models.

    They are the metrics at 20. A planted catalogue adds the expected hit and its shares of the
    oracle over all, warm and cold targets; other data add hit at 20 of warm and cold targets.

    Args:
      results: as in results.json.

    Returns:
      {head: keys that lead to a share in a model's test metrics}, and {head: part of the targets}
      of `shares`.
    """
    tests = [model.get('test', {}) for model in results['models'].values()]
    paths = {name: (name,) for test in tests for name in test
             if name.endswith('@20') and not name.startswith('expected_')}
    if any('expected_hit@20' in test for test in tests):
        return (paths | {'expected': ('expected_hit@20',)},
                {'of oracle': 'all', 'warm': 'warm', 'cold': 'cold'})
    return paths | {f'hit {part}': (*PARTS[part], 'hit@20') for part in ('warm', 'cold')}, {}


def shares(results: dict) -> dict[str, dict[str, float]]:
    """Compute each model's share of the expected hits that the oracle reaches.

    Args:
      results: as in results.json.

    Returns:
      {model: {'all' | 'warm' | 'cold': share}}, expected_hit@20 over the oracle's; NaN where either
      is missing or the oracle has 0.
    """
    oracle = _expected(results.get('oracle') or {})
    return {name: {part: value / oracle[part] if oracle[part] > 0 else math.nan
                   for part, value in _expected(model.get('test', {})).items()}
            for name, model in results['models'].items()}


def table(results: dict) -> console_lib.Table:
    """Format all models' metrics on the test rows in percent.

    The best value of a column except the oracle's is bold; see `columns`.

    Args:
      results: as in results.json.
    """
    paths, parts = columns(results)

    def row(scores, share):
        values = [_at(scores, path) for path in paths.values()]
        return [100 * value for value in (*values, *(share[part] for part in parts.values()))]

    rows = {name: row(results['models'][name].get('test', {}), share)
            for name, share in shares(results).items()}
    out = console_lib.table('Test rows, %', ('model', *paths, *parts), header_style='bold')
    best = [max((f'{value:.2f}' for value in column if math.isfinite(value)), key=float,
                default=None) for column in zip(*rows.values(), strict=True)]
    for name, values in rows.items():
        cells = map(_cell, values)
        out.add_row(escape(name), *(f'[bold]{cell}[/]' if cell == top else cell
                                    for cell, top in zip(cells, best, strict=True)))
    if parts and results.get('oracle'):
        values = row(results['oracle'], dict.fromkeys(PARTS, 1.0))
        out.add_row('oracle', *map(_cell, values), style='dim')
    return out


# key of a model's test metrics -> head of a column
LISTS = {**{('lists', name): name for name in (
    'coverage', 'gini', 'novelty', 'diversity', 'popularity', 'cold')},
    ('reliability', 'error'): 'calibration error'}


def beyond(results: dict) -> console_lib.Table:
    """Format what the first 20 items of the test rows show beyond accuracy, see lists.py.

    Args:
      results: as in results.json.
    """
    return console_lib.table('First 20 items of the test rows', ('model', *LISTS.values()), (
        (escape(name), *(_cell(_at(model.get('test', {}), path)) for path in LISTS))
        for name, model in results['models'].items()), header_style='bold')


def show(results: dict, console: Console) -> None:
    """Print the tables with all columns, also where the console is narrower; none without models.

    Args:
      results: as in results.json.
      console: where to print.
    """
    if not results['models']:
        return
    for out in (table(results), beyond(results)):
        out.width = Measurement.get(console, console.options.update(width=WIDEST), out).maximum
        # rich would shorten the cells to `console.width`, which is 80 in a pipe
        console.print(out, crop=False)


def _at(scores, path):
    """The number at the end of a path of keys; nan without one."""
    for key in path:
        scores = (scores or {}).get(key)
    return math.nan if scores is None else scores


def _expected(scores):
    return {part: _at(scores, (*path, 'expected_hit@20')) for part, path in PARTS.items()}


def _cell(value):
    return f'{value:.2f}' if math.isfinite(value) else '-'

"""The table of all models on the test rows, and shares of the oracle."""

import math

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

PARTS = ('all', 'warm', 'cold')
WIDEST = 10_000  # characters of a table at most


def metric_names(scores: dict) -> list[str]:
    """List a result's metrics at 20 in the order of results.json, expectations left out."""
    return [name for name in scores if name.endswith('@20') and not name.startswith('expected_')]


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


def table(results: dict) -> Table:
    """Format all models' metrics on the test rows in percent.

    The columns are the metrics at 20. A planted catalogue adds the expected hit and its shares of
    the oracle over all, warm and cold targets; other data add hit at 20 of warm and cold targets.
    The best value of a column except the oracle's is bold.

    Args:
      results: as in results.json.
    """
    tests = {name: model.get('test', {}) for name, model in results['models'].items()}
    planted = any('expected_hit@20' in test for test in tests.values())
    heads = list(dict.fromkeys(name for test in tests.values() for name in metric_names(test)))
    names = heads + (['expected', 'of oracle', 'warm', 'cold'] if planted else
                     ['hit warm', 'hit cold'])

    def row(scores, share):
        values = [scores.get(name) for name in heads]
        if planted:
            values += [scores.get('expected_hit@20'), *(share[part] for part in PARTS)]
        else:
            values += [_part(scores, part).get('hit@20') for part in PARTS[1:]]
        return [math.nan if value is None else 100 * value for value in values]

    rows = {name: row(tests[name], share) for name, share in shares(results).items()}
    out = Table(title='Test rows, %', title_justify='left', header_style='bold', box=None)
    out.add_column('model', no_wrap=True)
    for name in names:
        out.add_column(name, justify='right', no_wrap=True)
    best = [max((f'{value:.2f}' for value in column if math.isfinite(value)), key=float,
                default=None) for column in zip(*rows.values(), strict=True)]
    for name, values in rows.items():
        cells = map(_cell, values)
        out.add_row(escape(name), *(f'[bold]{cell}[/]' if cell == top else cell
                                    for cell, top in zip(cells, best, strict=True)))
    if planted and results.get('oracle'):
        values = row(results['oracle'], dict.fromkeys(PARTS, 1.0))
        out.add_row('oracle', *map(_cell, values), style='dim')
    return out


def show(results: dict, console: Console) -> None:
    """Print `table` with all its columns, also where the console is narrower; none without models.

    Args:
      results: as in results.json.
      console: where to print.
    """
    if not results['models']:
        return
    out = table(results)
    out.width = Measurement.get(console, console.options.update(width=WIDEST), out).maximum
    # rich would shorten the cells to `console.width`, which is 80 in a pipe
    console.print(out, crop=False)


def _part(scores, part):
    return scores if part == 'all' else (scores.get('slices') or {}).get(part) or {}


def _expected(scores):
    values = {part: _part(scores, part).get('expected_hit@20') for part in PARTS}
    return {part: math.nan if value is None else value for part, value in values.items()}


def _cell(value):
    return f'{value:.2f}' if math.isfinite(value) else '-'

"""The table of all models on the test rows, and shares of the oracle."""

import math

from rich.markup import escape
from rich.table import Table


def shares(results):
    """Each model's share of what the oracle can hit: {model: {"all" | "warm" | "cold": share}}.

    A share is expected_hit@20 over the oracle's; NaN where either is missing or the oracle has 0.
    """
    oracle = _expected(results.get('oracle') or {})
    return {
        name: {
            key: value / oracle[key] if oracle[key] > 0 else math.nan
            for key, value in _expected(model.get('test', {})).items()
        }
        for name, model in results['models'].items()
    }


def table(results):
    """All models of `results` (as in results.json) on the test rows, a rich Table, in percent.

    hit, mrr, ndcg at 20; where the catalogue is planted, expected hit and shares of the oracle over
    all, warm and cold targets; else hit at 20 of warm and cold targets. The best of a column but
    the oracle's is bold.
    """
    tests = {name: model.get('test', {}) for name, model in results['models'].items()}
    planted = any('expected_hit@20' in test for test in tests.values())
    rows = {name: _row(test, planted) for name, test in tests.items()}
    if planted:
        for name, share in shares(results).items():
            rows[name] += [100 * share[key] for key in ('all', 'warm', 'cold')]
    heads = ['hit@20', 'mrr@20', 'ndcg@20']
    if planted:
        heads += ['expected', 'of oracle', 'warm', 'cold']
    else:
        heads += ['hit warm', 'hit cold']
    made = Table(title='Test rows, %', title_justify='left', header_style='bold', box=None)
    made.add_column('model', no_wrap=True)
    for head in heads:
        made.add_column(head, justify='right', no_wrap=True)
    best = [
        max((f'{value:.2f}' for value in column if math.isfinite(value)), key=float, default=None)
        for column in zip(*rows.values(), strict=True)
    ]
    for name, row in rows.items():
        cells = [_cell(value) for value in row]
        bold = [f'[bold]{c}[/]' if c == b else c for c, b in zip(cells, best, strict=True)]
        made.add_row(escape(name), *bold)
    if planted and results.get('oracle'):
        row = [*_row(results['oracle'], planted), 100.0, 100.0, 100.0]
        made.add_row('oracle', *[_cell(value) for value in row], style='dim')
    return made


def _expected(scores):
    slices = scores.get('slices') or {}
    parts = {'all': scores, 'warm': slices.get('warm') or {}, 'cold': slices.get('cold') or {}}
    return {key: _or_nan(part.get('expected_hit@20')) for key, part in parts.items()}


def _row(scores, planted):
    row = [_or_nan(scores.get(key)) for key in ('hit@20', 'mrr@20', 'ndcg@20')]
    if planted:
        row.append(_or_nan(scores.get('expected_hit@20')))
    else:
        slices = scores.get('slices') or {}
        row += [_or_nan((slices.get(key) or {}).get('hit@20')) for key in ('warm', 'cold')]
    return [100 * value for value in row]


def _or_nan(value):
    return math.nan if value is None else value


def _cell(value):
    return f'{value:.2f}' if math.isfinite(value) else '-'

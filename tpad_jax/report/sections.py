"""What stands in the sections of a page: tables by group, differences in words, the gallery."""

import numpy as np

from tpad_jax.evaluation import compare, tables
from tpad_jax.report.gallery import MODELS
from tpad_jax.report.values import NONE, Values

SELECT = 'hit@20'
SLICES = {
    'target': {'warm': 'a warm target', 'cold': 'a cold target',
               'new': 'a new target', 'repeat': 'a repeated one'},
    'prefix': {'length_1': 'one item read', 'length_2': 'two', 'length_3-5': 'three to five',
               'length_6+': 'six or more'},
    'popularity of a warm target': {'popularity_q1': 'rarest quarter', 'popularity_q2': 'second',
                                 'popularity_q3': 'third', 'popularity_q4': 'most frequent'}}
MINUS = '\N{MINUS SIGN}'


def first(models: dict, trained: list[str]) -> str:
    """The model a page speaks of first: TPAD, what a run of ids serves, or the best there is."""
    for name in ('tpad', 'mixture'):
        if name in models:
            return name
    return best(models, trained or list(models))


def best(models: dict, names: list[str]) -> str:
    """The one of some models that did best on validation."""
    return max(names, key=lambda name: models[name]['valid'][SELECT])


def difference(ranks: compare.Run, main: str, other: str) -> dict:
    """hit@20 of one model minus another's on the same rows, in words, from `compare`."""
    found = compare.compare([ranks], [ranks], (main, other), sliced=False)['slices']['all']
    return {'other': other, **told(found[SELECT])}


def told(cell: dict) -> dict:
    """A difference of `compare` in points: figure, interval, p, and whether there is one."""
    edges = cell['difference_interval']
    return {'figure': f'{100 * cell["difference"]:+.2f}'.replace('-', MINUS),
            'interval': edges and ' to '.join(f'{100 * x:+.2f}' for x in edges).replace('-', MINUS),
            'p': 'p\xa0<\xa0.001' if cell['p'] < 0.001 else f'p\xa0=\xa0{cell["p"]:.3f}',
            'sure': bool(edges) and edges[0] * edges[1] > 0}


def table(v: Values, trained: list[str], searched: list[str], colour: dict) -> dict:
    """The headline table: its heads and, by group, rows of (cell, whether it is the best)."""
    planted = v.get('oracle') is not None
    columns = {SELECT: lambda n: v.pct(*v.test(n, SELECT)),
               '95 %': lambda n: v.interval(*v.test(n, 'interval', SELECT))}
    metrics = tables.metric_names(v.get(*v.test((trained or searched)[0])))
    columns |= {metric: lambda n, metric=metric: v.pct(*v.test(n, metric))
                for metric in metrics if metric != SELECT}
    if planted:
        columns |= {'expected': lambda n: v.pct(*v.test(n, 'expected_hit@20')),
                    'of oracle': lambda n: v.share(n), 'warm': lambda n: v.share(n, 'warm'),
                    'cold': lambda n: v.share(n, 'cold')}
    else:
        columns |= {'warm hit': lambda n: v.pct(*v.test(n, 'slices', 'warm', 'hit@20')),
                    'cold hit': lambda n: v.pct(*v.test(n, 'slices', 'cold', 'hit@20'))}
    columns = {head: cell for head, cell in columns.items()
               if any(cell(name) not in ('', NONE) for name in (*trained, *searched))}
    top = {head: max((_number(cell(name)) for name in (*trained, *searched)), default=0)
           for head, cell in columns.items()}

    def row(name):
        return {'name': name, 'colour': colour.get(name, 6), 'cells': [
            (cell(name), name != 'oracle' and _number(cell(name)) == top[head] > -1)
            for head, cell in columns.items()]}

    groups = {'trained here': trained, 'baselines, tuned on validation': searched,
              'the most there is': ['oracle'] if planted else []}
    return {'heads': list(columns), 'groups': [(group, [row(name) for name in names])
                                               for group, names in groups.items() if names]}


def _number(cell):
    """What a cell shows, -1 where that is no number by itself."""
    try:
        return float(cell.striptags())
    except ValueError:
        return -1.0


def most(parts: list[dict]) -> float:
    """Where a scale of hit@20 ends: the next tenth above some parts and their intervals."""
    edges = [((part.get('interval') or {}).get(SELECT) or [0.0])[-1] for part in parts]
    largest = max(*(part.get(SELECT) or 0.0 for part in parts), *edges)
    return min(1.0, float(np.floor(10 * largest) + 1) / 10)


def slices(parts: dict) -> list[tuple]:
    """The slices of SLICES that have rows, by group, where a group has two or more."""
    groups = [(group, [(name, words) for name, words in own.items()
                       if parts.get(name, {}).get('rows')]) for group, own in SLICES.items()]
    return [(group, own) for group, own in groups if len(own) > 1]


def gallery(found: dict | None) -> dict:
    """The gallery as the page shows it, and what its script reads of it."""
    if not found or not found['sessions']:
        return {'gallery': None, 'asked': None, 'without': 0}
    sessions = [{**one, 'models': {name: {
        'first': model['first'], **_rank(model['above'], model['equal'])}
        for name, model in one['models'].items() if name in MODELS}} for one in found['sessions']]
    items = found['items']
    return {'gallery': {**found, 'sessions': sessions},
            'without': sum('picture' in x and x['picture'] is None for x in items.values()),
            'asked': {'items': items, 'sides': found.get('sides', []),
                      'why': [{'prefix': one['prefix'], 'of': one['why']} for one in sessions]}}


def _rank(above, equal, k=20):
    kind = 'hit' if above + equal <= k else 'miss' if above >= k else 'tied'
    return {'kind': kind,
            'rank': f'{above + 1}' if equal == 1 else f'{above + 1} to {above + equal}'}

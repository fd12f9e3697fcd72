"""The page of one run, and the page that compares several: sections, numbers and the file.

Every number of results.json is an element that names its place in the file:

    <data value="0.655498" data-from="models > tpad > test > hit@20" data-scale="100">65.55</data>

tests/report/test_report.py compares every number of a page with results.json by these names.
"""

import base64
import contextlib
import functools
import hashlib
import json
import math
import operator
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tpad_jax.config import STAGES
from tpad_jax.core import files
from tpad_jax.data import audit
from tpad_jax.errors import InputError, refuse_if
from tpad_jax.evaluation import compare, tables
from tpad_jax.report import curves, stored

FILE = Path('report') / 'index.html'
SECTIONS = {'results': 'Results', 'audit': 'Audit', 'gallery': 'Sessions', 'hits': 'hit@K',
            'slices': 'Slices', 'training': 'Training', 'information': 'Information',
            'features': 'Features', 'made': 'How it was made'}
SELECT = 'hit@20'
SLICES = {
    'target': {'warm': 'a warm target', 'cold': 'a cold target',
               'new': 'a new target', 'repeat': 'a repeated one'},
    'prefix': {'length_1': 'one item read', 'length_2': 'two', 'length_3-5': 'three to five',
               'length_6+': 'six or more'},
    'popularity of a warm target': {'popularity_q1': 'rarest quarter', 'popularity_q2': 'second',
                                    'popularity_q3': 'third', 'popularity_q4': 'most frequent'}}
COMPARED_SECTIONS = {'results': 'Results', 'differences': 'Differences', 'hits': 'hit@K',
            'training': 'Training', 'configs': 'Configs', 'runs': 'Runs'}
METRICS = 'hit@20', 'mrr@20', 'ndcg@20'
MINUS = '\N{MINUS SIGN}'
BETWEEN = ' > '
NONE = Markup('<span class="none" title="nothing to average over">\N{EN DASH}</span>')


class Values:
    """One run's results as elements of a page."""

    def __init__(self, results: dict, run: int | None = None):
        """Wrap a run's results; `run` is its number on a page of several."""
        self.results, self._before = results, () if run is None else (f'run {run}',)
        self._shares = tables.shares(results)

    def get(self, *path: Any) -> Any:
        """Look up a path of keys and places in the results; None where it is missing."""
        with contextlib.suppress(KeyError, IndexError, TypeError):
            return functools.reduce(operator.getitem, path, self.results)
        return None

    def test(self, model: str, *path: Any) -> tuple:
        """Return the path to a model's test metrics; 'oracle' is a model, too."""
        return ('oracle', *path) if model == 'oracle' else ('models', model, 'test', *path)

    def num(self, *path: Any, form: str = '.2f', scale: int = 1) -> Markup:
        """Show a number times `scale` in a format of Python's."""
        value = self.get(*path)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return NONE
        return Markup('<data value="{}" data-from="{}" data-scale="{}">{}</data>').format(
            json.dumps(value), BETWEEN.join(map(str, (*self._before, *path))), scale,
            format(scale * value, form))

    def pct(self, *path: Any, digits: int = 2) -> Markup:
        """Show a share in percent, without the sign."""
        return self.num(*path, form=f'.{digits}f', scale=100)

    def count(self, *path: Any) -> Markup:
        """Show a whole number with a comma between thousands."""
        return self.num(*path, form=',')

    def interval(self, *path: Any, digits: int = 1) -> Markup:
        """Show [low, high] in percent, or an empty text without an interval."""
        if not self.get(*path):
            return Markup('')
        low, high = (self.pct(*path, place, digits=digits) for place in (0, 1))
        return Markup('<span class="interval">{}\N{EN DASH}{}</span>').format(low, high)

    def share(self, model: str, of: str = 'all') -> Markup:
        """Show a model's share of the oracle's hits in percent; of: 'all', 'warm' or 'cold'."""
        share = 100.0 if model == 'oracle' else 100 * self._shares[model][of]
        if math.isnan(share):
            return NONE
        return Markup('<data value="{}" data-share="{}">{}</data>').format(
            share, BETWEEN.join((*self._before, model, of)), f'{share:.2f}')


def write(workdir: str | Path) -> Path:
    """Write a finished run's page to workdir/report/index.html from the files of the workdir.

    Raises:
      InputError: there are no results, or a file of the workdir is damaged.
    """
    run = stored.read(workdir)
    return save(run.path / FILE, 'run.html', context(run))


def save(file: Path, template: str, values: dict) -> Path:
    """Fill a template and write the page completely or not at all."""
    jinja = environment()
    style, script = (jinja.loader.get_source(jinja, name)[0] for name in ('style.css', 'page.js'))
    files.write_text(file, jinja.get_template(template).render(
        values, style=Markup(style), style_hash=_digest(style), script=Markup(script),
        script_hash=_digest(script)))
    return file


@functools.cache
def environment() -> jinja2.Environment:
    """Prepare the templates. Every text is escaped: titles come from an untrusted catalogue."""
    jinja = jinja2.Environment(loader=jinja2.PackageLoader('tpad_jax.report'), autoescape=True,
                               undefined=jinja2.StrictUndefined, trim_blocks=True,
                               lstrip_blocks=True)
    jinja.filters |= {'shown': curves.shown, 'points': curves.points, 'rank': _rank}
    return jinja


def context(run: stored.Run) -> dict:
    """Collect the values that fill `run.html`."""
    v = Values(run.results)
    models = run.results['models']
    searched = [name for name, model in models.items() if 'search' in model]
    trained = [name for name in models if name not in searched]
    main = first(models, trained)
    oracle = [run.results['oracle']] if run.results.get('oracle') else []
    others = [name for name in ('knowledge_only', 'id_only') if name in models and name != main]
    best = [name for name in (searched and [_best(models, searched)]) if name != main]
    known = [main, *others, *(n for n in trained if n not in (main, *others)), *best]
    colour = curves.colours(known)
    drawn = {n: colour[n] for n in [main, *others, *best]} | ({'oracle': 0} if oracle else {})
    measured = run.results.get('diagnostics', {})
    diagnostics = {stage: measured[stage] for stage in STAGES if stage in measured}
    probed = {(stage, side): probes for stage, moments in diagnostics.items()
              for side, probes in moments.get('after', {}).get('probes', {}).items() if probes}
    parts = [models[name]['test'] for name in drawn if name in models] + oracle
    training, clouds = curves.training(run), curves.clouds(run)
    features = [(stage, moments) for stage, moments in diagnostics.items()
                if moments.get('after', {}).get('features')]
    # the page shows the audit's warnings and its verdict first
    findings = audit.describe(run.results['audit']) if run.results.get('audit') else []
    out = {
        'v': v, 'name': run.name, 'main': main, 'best': best, 'colour': colour,
        'most': most([model['test'] for model in models.values()] + oracle),
        'differences': [{'other': other, **in_points(run.ranks, run.ranks, (main, other))[SELECT]}
                        for other in [*others, *best] if run.ranks is not None],
        **_table(v, trained, searched, colour),
        'lists': {path: x for path, x in tables.LISTS.items()
                  if any(v.get(*v.test(name, *path)) is not None for name in models)},
        'audit': [line for line in findings if not line.startswith(('Warning: ', 'Verdict: '))],
        'hits': curves.hits(run, [n for n in known if n not in ('tpad_recommend', 'tpad_joint')]),
        'sliced': drawn, 'slices': _slices(models[main]['test']['slices']),
        'slices_most': most([part for of in parts for part in of['slices'].values()]),
        'training': training, 'information': curves.information(run), 'clouds': clouds,
        'features': features, 'probed': list(probed),
        'transitions': list(measured.get('transition_probe', {})),
        'attributes': list(dict.fromkeys(name for x in probed.values() for name in x)),
        'searched': searched, 'config': sorted(stored.flat_config(run).items()),
        **_gallery(run.gallery)}
    return {**out, 'sections': filled(SECTIONS, {
        **out, 'training': any(training.values()), 'features': features or clouds})}


def compared(runs: list[stored.Run]) -> dict:
    """Collect the values that fill `compare.html`.

    Raises:
      InputError: there are more runs than colours, or a run is named twice.
    """
    refuse_if(len(runs) > curves.MOST,
              f'{len(runs)} runs are too many. Expected at most {curves.MOST} on a page')
    refuse_if(len({run.path.resolve() for run in runs}) < len(runs),
              f'{", ".join(str(run.path) for run in runs)}: a run is named twice. Name it once')
    names = labels(runs)
    models = list(dict.fromkeys(name for run in runs for name in run.results['models']))
    searched = [name for name in models if any(
        'search' in run.results['models'].get(name, {}) for run in runs)]
    trained = [name for name in models if name not in searched]
    known = runs[0].results['models']
    main = first(known, [name for name in trained if name in known])
    out = {
        'names': names, 'main': main, 'metrics': METRICS,
        'runs': [(name, run, Values(run.results, place))
                 for place, (name, run) in enumerate(zip(names, runs, strict=True))],
        'groups': [(title, group) for title, group in (
            ('trained', trained), ('baselines, tuned on validation', searched)) if group],
        'most': most([model['test'] for run in runs for model in run.results['models'].values()]),
        'oracles': all(run.results.get('oracle') for run in runs),
        'data': len({run.results['data'].get('fingerprint') for run in runs}),
        'differences': differences(runs, names, trained, searched),
        'hits': _hits(runs, names, main), 'training': _training(runs, names),
        'configs': configs(runs)}
    return {**out, 'sections': filled(COMPARED_SECTIONS, out)}


def labels(runs: list[stored.Run]) -> list[str]:
    """Name the runs by their folders, or by their paths where two folders have the same name."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def differences(runs: list[stored.Run], names: list[str], trained: list[str],
                searched: list[str]) -> list[dict]:
    """Subtract the first run from every other, model by model, on the same rows.

    Args:
      runs: two or more.
      names: of the runs.
      trained: models to subtract.
      searched: baselines, subtracted where two runs have no other model in common.

    Returns:
      One dict per run except the first: its 'name', 'rows' [(model, `in_points`)], and
      'why', a sentence on why there are no rows.
    """
    out, first = [], runs[0].ranks
    for run, name in zip(runs[1:], names[1:], strict=True):
        rows, why = [], f'{compare.FILE} is missing.'
        if first and run.ranks:
            common = first.ranks.keys() & run.ranks.ranks.keys()
            shared = [n for n in trained if n in common] or [n for n in searched if n in common]
            try:
                rows = [(model, in_points(run.ranks, first, (model, model))) for model in shared]
                why = '' if rows else 'they have no model in common.'
            except InputError as error:
                why = str(error)
        out.append({'name': name, 'rows': rows, 'why': why})
    return out


def configs(runs: list[stored.Run]) -> list[tuple]:
    """List (key, value of each run) of every key of the config that differs between runs."""
    flat = [stored.flat_config(run) for run in runs]
    keys = sorted({key for config in flat for key in config})
    return [(key, [config.get(key) for config in flat]) for key in keys
            if any(config.get(key) != flat[0].get(key) for config in flat)]


def _hits(runs, names, main):
    drawn = [curves.hit_curve(run.ranks, main, name=name, colour=n, source=f'run {n} {main}')
             for n, (run, name) in enumerate(zip(runs, names, strict=True))
             if run.ranks and main in run.ranks.ranks]
    title = f'hit@K of {main}'
    return drawn and curves.chart(title, drawn, x='K', unit='%', wide=True, at=curves.AT)


def _training(runs, names):
    """Draw hit@20 on validation and then the loss, a chart for every stage that logs it."""
    out = []
    stages = list(dict.fromkeys(stage for run in runs for stage in run.log))
    for logged, title, unit in ((f'valid/hit@{curves.AT}', 'validation hit@20', '%'),
                                ('loss', 'loss', '')):
        for stage in stages:
            drawn = [curves.Curve(name, *run.log[stage][logged], n, f'run {n} {stage} {logged}')
                     for n, (run, name) in enumerate(zip(runs, names, strict=True))
                     if logged in run.log.get(stage, {})]
            if drawn:
                out.append(curves.chart(f'{stage}: {title}', drawn, unit=unit))
    return out


def filled(known: dict[str, str], content: dict) -> list[tuple]:
    """List (id, title) of the sections that have content; those without a key have it always."""
    return [(name, title) for name, title in known.items() if content.get(name, True)]


def first(models: dict, trained: list[str]) -> str:
    """Choose the model that a page shows first: TPAD, a sum of two, or the best."""
    main = [name for name in ('tpad', 'mixture') if name in models]
    return (main or [_best(models, trained or list(models))])[0]


def _best(models: dict, names: list[str]) -> str:
    """Choose the model with the best validation."""
    return max(names, key=lambda name: models[name]['valid'][SELECT])


def in_points(first: compare.Run, second: compare.Run, models: tuple[str, str]) -> dict:
    """Subtract model B of `second` from model A of `first` on the same rows, in points.

    Returns:
      {metric: {'number', 'interval', 'p', and 'sure': whether the interval excludes zero}}.
    """
    result = compare.compare([first], [second], models, sliced=False)

    def shown(cell):
        number, *edges = (f'{100 * x:+.2f}'.replace('-', MINUS)
                          for x in (cell['difference'], *(cell['difference_interval'] or ())))
        low, high = cell['difference_interval'] or (0, 0)
        return {'number': number, 'interval': ' to '.join(edges), 'sure': low * high > 0,
                'p': 'p\xa0<\xa0.001' if cell['p'] < 0.001 else f'p\xa0=\xa0{cell["p"]:.3f}'}

    return {metric: shown(result['slices']['all'][metric]) for metric in result['metrics']}


def _table(v: Values, trained: list[str], searched: list[str], colour: dict) -> dict:
    """Lay out the main table: 'heads', and rows of (cell, whether it is the best) by group."""
    models = [*trained, *searched]
    columns = {SELECT: lambda n: v.pct(*v.test(n, SELECT)),
               '95 %': lambda n: v.interval(*v.test(n, 'interval', SELECT))}
    paths, parts = tables.columns(v.results)
    columns |= {head: lambda n, path=path: v.pct(*v.test(n, *path)) for head, path in paths.items()}
    columns |= {head: lambda n, part=part: v.share(n, part) for head, part in parts.items()}
    columns = {head: cell for head, cell in columns.items()
               if any(cell(name) not in ('', NONE) for name in models)}
    top = {head: max(_number(cell(name)) for name in models) for head, cell in columns.items()}

    def row(name):
        return {'name': name, 'colour': colour.get(name, 6), 'cells': [
            (cell(name), name != 'oracle' and _number(cell(name)) == top[head] > -1)
            for head, cell in columns.items()]}

    groups = {'trained': trained, 'baselines, tuned on validation': searched,
              'the most that is possible': ['oracle'] if v.get('oracle') else []}
    return {'heads': list(columns), 'groups': [(group, [row(name) for name in names])
                                               for group, names in groups.items() if names]}


def _number(cell):
    """The number of a cell, or -1 where a cell is not one number."""
    text = cell.striptags()
    return float(text) if text.replace('.', '', 1).isdigit() else -1.0


def most(parts: list[dict]) -> float:
    """Choose the end of a scale of hit@20: the next tenth above some parts and their intervals."""
    edges = [((part.get('interval') or {}).get(SELECT) or [0.0])[-1] for part in parts]
    largest = max(*(part.get(SELECT) or 0.0 for part in parts), *edges)
    return min(1.0, (math.floor(10 * largest) + 1) / 10)


def _slices(parts: dict) -> list[tuple]:
    """List the slices of SLICES that have rows, by group, where a group has two or more."""
    groups = {group: [(name, title) for name, title in names.items()
                      if parts.get(name, {}).get('rows')] for group, names in SLICES.items()}
    return [(group, names) for group, names in groups.items() if len(names) > 1]


def _gallery(stored: dict | None) -> dict:
    """Prepare the gallery for the template, and the part that the page's script reads."""
    if not stored or not stored['sessions']:
        return {'gallery': None}
    why = [{'prefix': x['prefix'], 'of': x['why']} for x in stored['sessions']]
    return {'gallery': stored,
            'without': sum(x.get('picture', '') is None for x in stored['items'].values()),
            'asked': {'items': stored['items'], 'sides': stored.get('sides', []), 'why': why}}


def _rank(model: dict) -> tuple[str, str]:
    """Put a target's rank among a model's recommendations into words: ('hit', '3')."""
    first, last = model['above'] + 1, model['above'] + model['equal']
    return ('hit' if last <= curves.AT else 'miss' if first > curves.AT else 'tied',
            f'{first}' if first == last else f'{first} to {last}')


def _digest(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

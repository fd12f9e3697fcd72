"""The page of several runs: models by run, paired differences, curves over each other, configs."""

from collections import Counter

from flax.traverse_util import flatten_dict

from tpad_jax.errors import InputError
from tpad_jax.evaluation import compare
from tpad_jax.report import charts, curves, sections
from tpad_jax.report.stored import Run, hit_curve
from tpad_jax.report.values import Values

SECTIONS = {'results': 'Results', 'differences': 'Differences', 'hits': 'hit@K',
            'training': 'Training', 'configs': 'Configs', 'runs': 'Runs'}
METRICS = 'hit@20', 'mrr@20', 'ndcg@20'
MOST = curves.MOST  # runs, as many as there are colours


def context(runs: list[Run]) -> dict:
    """What `compare.html` is filled with.

    Raises:
      InputError: more runs than there are colours, or one is named twice.
    """
    if len(runs) > MOST:
        raise InputError(f'{len(runs)} runs are too many for one page; name at most {MOST}')
    twice = [str(path) for path, n in Counter(run.path.resolve() for run in runs).items() if n > 1]
    if twice:
        raise InputError(f'{twice[0]} is named twice; name each run once')
    names = labels(runs)
    values = [Values(run.results, place) for place, run in enumerate(runs)]
    models = list(dict.fromkeys(name for run in runs for name in run.results['models']))
    searched = [n for n in models if any('search' in run.results['models'].get(n, {})
                                         for run in runs)]
    trained = [n for n in models if n not in searched]
    main = sections.first(runs[0].results['models'], [n for n in trained
                                                  if n in runs[0].results['models']])
    out = {
        'names': names, 'runs': list(zip(names, runs, values, strict=True)), 'main': main,
        'groups': [(words, own) for words, own in (
            ('trained', trained), ('baselines, tuned on validation', searched)) if own],
        'metrics': METRICS, 'most': sections.most([model['test'] for run in runs
                                               for model in run.results['models'].values()]),
        'oracles': all(run.results.get('oracle') for run in runs),
        'data': len({run.results['data'].get('fingerprint') for run in runs}),
        'differences': differences(runs, names, trained, searched),
        'hits': _hits(runs, names, main), 'training': _training(runs, names),
        'configs': configs(runs)}
    empty = {name for name in SECTIONS if name in out and not out[name]}
    return {**out, 'sections': [(name, words) for name, words in SECTIONS.items()
                                if name not in empty]}


def labels(runs: list[Run]) -> list[str]:
    """The runs' folders, or their whole paths where two folders are called alike."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def differences(runs: list[Run], names: list[str], trained: list[str],
                searched: list[str]) -> list[dict]:
    """Every run minus the first, model by model, on the same rows.

    Of `trained` models; of `searched` baselines where two runs have no other in common.

    Returns:
      One dict a run but the first: its 'name' and 'rows', a list of
      (model, {metric: `sections.told`}), or 'why', a sentence on why there are none.
    """
    out = []
    for run, name in zip(runs[1:], names[1:], strict=True):
        first = runs[0]
        if first.ranks is None or run.ranks is None:
            out.append({'name': name, 'rows': [], 'why': f'{compare.FILE} is not there.'})
            continue
        both = first.ranks.ranks.keys() & run.ranks.ranks.keys()
        shared = [n for n in trained if n in both] or [n for n in searched if n in both]
        try:
            rows = []
            for model in shared:
                found = compare.compare([run.ranks], [first.ranks], (model, model),
                                        sliced=False)['slices']['all']
                rows.append((model, {metric: sections.told(found[metric]) for metric in METRICS}))
            out.append({'name': name, 'rows': rows, 'why': '' if rows else
                        'they have no model in common.'})
        except InputError as error:
            out.append({'name': name, 'rows': [], 'why': str(error)})
    return out


def configs(runs: list[Run]) -> list[tuple]:
    """(key, value of each run) of every key of the config that is not the same in all."""
    flat = [flatten_dict(run.results['provenance']['config'], sep='.') for run in runs]
    keys = sorted({key for one in flat for key in one})
    return [(key, [one.get(key) for one in flat]) for key in keys
            if any(one.get(key) != flat[0].get(key) for one in flat)]


def _hits(runs, names, main):
    drawn = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        if run.ranks is not None and main in run.ranks.ranks:
            ks = curves.KS[curves.KS <= run.ranks.items]
            drawn.append(charts.Curve(name, ks.tolist(), (100 * hit_curve(
                run.ranks, main, ks)).tolist(), place, source=f'run {place} {main}'))
    if not drawn:
        return None
    return charts.chart(f'hit@K of {main}', drawn, x='K', unit='%', wide=True, low=0,
                        at=min(curves.AT, max(len(curve.x) for curve in drawn)))


def _training(runs, names):
    """A chart for every stage and what is logged of it: hit@20 on validation, then the loss."""
    out = []
    stages = list(dict.fromkeys(stage for run in runs for stage in run.log))
    for logged, words, unit in ((f'valid/hit@{curves.AT}', 'validation hit@20', '%'),
                                ('loss', 'loss', '')):
        for stage in stages:
            drawn = []
            for place, (run, name) in enumerate(zip(runs, names, strict=True)):
                if logged in run.log.get(stage, {}):
                    steps, found = run.log[stage][logged]
                    drawn.append(charts.Curve(name, list(steps), [
                        (100 if unit else 1) * y for y in found], place,
                        source=f'run {place} {stage} {logged}'))
            if drawn:
                out.append(charts.chart(f'{stage}: {words}', drawn, unit=unit,
                                        low=0 if unit else None))
    return out

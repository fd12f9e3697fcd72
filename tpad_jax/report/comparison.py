"""The page of several runs: models by run, paired differences, joint curves, configs."""

from tpad_jax.errors import InputError, refuse_if
from tpad_jax.evaluation import compare
from tpad_jax.report import charts, curves, page
from tpad_jax.report.stored import Run, flat_config

SECTIONS = {'results': 'Results', 'differences': 'Differences', 'hits': 'hit@K',
            'training': 'Training', 'configs': 'Configs', 'runs': 'Runs'}
METRICS = 'hit@20', 'mrr@20', 'ndcg@20'
MOST = curves.MOST  # runs, as many as there are colours


def context(runs: list[Run]) -> dict:
    """Collect the values that fill `compare.html`.

    Raises:
      InputError: there are more runs than colours, or a run is named twice.
    """
    refuse_if(len(runs) > MOST, f'{len(runs)} runs are too many. Expected at most {MOST} on a page')
    refuse_if(len({run.path.resolve() for run in runs}) < len(runs),
              f'{", ".join(str(run.path) for run in runs)}: a run is named twice. Name it once')
    names = labels(runs)
    models = list(dict.fromkeys(name for run in runs for name in run.results['models']))
    searched = [name for name in models if any(
        'search' in run.results['models'].get(name, {}) for run in runs)]
    trained = [name for name in models if name not in searched]
    first = runs[0].results['models']
    main = page.first(first, [name for name in trained if name in first])
    out = {
        'names': names, 'main': main, 'metrics': METRICS,
        'runs': [(name, run, page.Values(run.results, place))
                 for place, (name, run) in enumerate(zip(names, runs, strict=True))],
        'groups': [(title, group) for title, group in (
            ('trained', trained), ('baselines, tuned on validation', searched)) if group],
        'most': page.most([model['test'] for run in runs
                               for model in run.results['models'].values()]),
        'oracles': all(run.results.get('oracle') for run in runs),
        'data': len({run.results['data'].get('fingerprint') for run in runs}),
        'differences': differences(runs, names, trained, searched),
        'hits': _hits(runs, names, main), 'training': _training(runs, names),
        'configs': configs(runs)}
    return {**out, 'sections': page.filled(SECTIONS, out)}


def labels(runs: list[Run]) -> list[str]:
    """Name the runs by their folders, or by their paths where two folders have the same name."""
    names = [run.path.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def differences(runs: list[Run], names: list[str], trained: list[str],
                searched: list[str]) -> list[dict]:
    """Subtract the first run from every other, model by model, on the same rows.

    Args:
      runs: two or more.
      names: of the runs.
      trained: models to subtract.
      searched: baselines, subtracted where two runs have no other model in common.

    Returns:
      One dict per run except the first: its 'name', 'rows' [(model, `page.differences`)], and
      'why', a sentence on why there are no rows.
    """
    out, first = [], runs[0].ranks
    for run, name in zip(runs[1:], names[1:], strict=True):
        rows, why = [], f'{compare.FILE} is missing.'
        if first and run.ranks:
            common = first.ranks.keys() & run.ranks.ranks.keys()
            shared = [n for n in trained if n in common] or [n for n in searched if n in common]
            try:
                rows = [(model, page.differences(run.ranks, first, (model, model)))
                        for model in shared]
                why = '' if rows else 'they have no model in common.'
            except InputError as error:
                why = str(error)
        out.append({'name': name, 'rows': rows, 'why': why})
    return out


def configs(runs: list[Run]) -> list[tuple]:
    """List (key, value of each run) of every key of the config that differs between runs."""
    flat = [flat_config(run) for run in runs]
    keys = sorted({key for config in flat for key in config})
    return [(key, [config.get(key) for config in flat]) for key in keys
            if any(config.get(key) != flat[0].get(key) for config in flat)]


def _hits(runs, names, main):
    drawn = [curves.hit_curve(run.ranks, main, name=name, colour=n, source=f'run {n} {main}')
             for n, (run, name) in enumerate(zip(runs, names, strict=True))
             if run.ranks and main in run.ranks.ranks]
    return drawn and charts.chart(f'hit@K of {main}', drawn, x='K', unit='%', wide=True,
                                  at=curves.AT)


def _training(runs, names):
    """Draw hit@20 on validation and then the loss, a chart for every stage that logs it."""
    out = []
    stages = list(dict.fromkeys(stage for run in runs for stage in run.log))
    for logged, title, unit in ((f'valid/hit@{curves.AT}', 'validation hit@20', '%'),
                                ('loss', 'loss', '')):
        for stage in stages:
            drawn = [charts.Curve(name, *run.log[stage][logged], n, f'run {n} {stage} {logged}')
                     for n, (run, name) in enumerate(zip(runs, names, strict=True))
                     if logged in run.log.get(stage, {})]
            if drawn:
                out.append(charts.chart(f'{stage}: {title}', drawn, unit=unit))
    return out

"""What finished runs of configs/sessions.py show: `python -m benchmarks.sessions RUN [RUN ...]`.

A cell is one run: the model beside every baseline tuned on the same rows, test figures with their
intervals over sessions, and the paired difference to the best baseline by each metric. Cells are
kept in `benchmarks/sessions.json` with the commit, the seed and the config's name that made them;
runs named again replace their cell. Prints one table per data set.
"""

import json
from pathlib import Path

from absl import app
from rich.console import Console
from rich.table import Table

from tpad_jax.baselines import rules
from tpad_jax.core import files
from tpad_jax.errors import InputError
from tpad_jax.evaluation import compare
from tpad_jax.job import recommenders

METRICS = ('hit@20', 'mrr@20')
KEPT = Path(__file__).with_suffix('.json')


def cell(directory: Path) -> dict:
    """One run's figures and its model's differences to the best baseline by each metric.

    Raises:
      InputError: no finished run of ready-made sessions stands there.
    """
    file = directory / 'results.json'
    if not file.is_file():
        raise InputError(f'{file} does not exist: finish the run with launch.py first')
    found = json.loads(file.read_text())
    made, config = found['provenance'], found['provenance']['config']
    if not config['data']['npz']:
        raise InputError(f'{file} is of a run on raw files; this table is of ready-made sessions')
    own = recommenders.NAME if config.get('partner') else config['model']['encoder']
    run, difference = [compare.read(directory)], {}
    for metric in METRICS:
        best = max((n for n in found['models'] if n in rules.BASELINES),
                   key=lambda name, m=metric: found['models'][name]['test'][m])
        both = compare.compare(run, run, (own, best))['slices']['all'][metric]
        difference[metric] = {'to': best, **{n: both[n] for n in (
            'difference', 'difference_interval', 'p')}}
    return {'data': Path(config['data']['npz']).stem, 'protocol': config['data']['protocol'],
            'config': config['name'], 'own': own, 'seed': made['seed'], 'commit': made['commit'],
            'date': made['date'], 'rows': found['models'][own]['test']['rows'],
            'seconds': found['seconds'],
            'verdict': found['audit']['verdict'], 'shuffle': found['audit'].get('shuffle'),
            'difference': difference,
            'models': {name: {'test': {m: model['test'][m] for m in METRICS},
                              'interval': {m: model['test']['interval'][m] for m in METRICS},
                              'valid': {m: model['valid'][m] for m in METRICS},
                              'search': model.get('search', {}).get('params')}
                       for name, model in found['models'].items()}}


def show(one: dict) -> Table:
    """A cell as a table, in percent."""
    gap = '; '.join(
        f'{metric} {100 * d["difference"]:+.2f} [{100 * d["difference_interval"][0]:+.2f}, '
        f'{100 * d["difference_interval"][1]:+.2f}] to {d["to"]}'
        for metric, d in one['difference'].items())
    table = Table(title=f'{one["config"]} on {one["data"]}, {one["protocol"]} protocol, '
                  f'{one["rows"]:,} rows, seed {one["seed"]}, commit {one["commit"][:7]}\n{gap}',
                  title_justify='left', box=None)
    for head in ('model', *(f'{part} {m}' for m in METRICS for part in ('valid', 'test', '95 %'))):
        table.add_column(head, justify='left' if head == 'model' else 'right', no_wrap=True)
    for model, held in one['models'].items():
        shown = []
        for metric in METRICS:
            low, high = held['interval'][metric]
            shown += [f'{100 * held["valid"][metric]:.2f}', f'{100 * held["test"][metric]:.2f}',
                      f'{100 * low:.1f}-{100 * high:.1f}']
        table.add_row(model, *shown, style='bold' if model == one['own'] else None)
    return table


def main(argv):
    """Read the runs, keep their cells, print all that are kept."""
    cells = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for directory in map(Path, argv[1:]):
        one = cell(directory)
        cells[f'{one["config"]}, seed {one["seed"]}'] = one
    files.write_json(KEPT, cells)
    for one in cells.values():
        Console(width=120).print(show(one), '')
        print(one['verdict'], '\n')


if __name__ == '__main__':
    app.run(main)

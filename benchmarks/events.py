"""What time, kinds and history are worth: `python -m benchmarks.events --seeds=0,1,2`.

On each variant of the planted catalogue (data/synthetic/variants.py) the recommender on the true
attributes is trained with and without what the variant is about, on the same sessions. Prints the
expected hit@20 of both and of the oracle, and the share of the gap between them that reading
closes; the bar is half. With `--films=DIR` it compares hit@20, paired over sessions, with and
without times and earlier sessions on the ratings of DIR/interactions.npz (arrays user, item and
timestamp in seconds); item ids alone are read. Each cell is a run in a separate workdir, so the
same command resumes; benchmarks/events.json is written after each.
"""

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
from absl import app, flags
from rich.console import Console
from rich.table import Table

from tpad_jax import config as config_lib
from tpad_jax.core import files, startup
from tpad_jax.data import sessions as sessions_lib
from tpad_jax.errors import Stopped

FLAGS = flags.FLAGS
FILE = Path(__file__).with_suffix('.json')
BAR = 0.5
# variant: its options, and the options of the model that reads it
# the test of a drift is short, as the date is read as a part of the training period
VARIANTS = {'drift': ({'drift': 2.5, 'train': 12000, 'valid': 200, 'test': 600},
                      {'event_time': True}),
            'kinds': ({'kinds': 2}, {'event_kind': True}),
            'visitors': ({'visitors': 900, 'train': 24000}, {'history': True})}


def films() -> Path:
    """Cut the ratings of films into sessions with times and opaque visitors, once."""
    file = Path(FLAGS.workdir) / 'films.npz'
    if file.is_file():
        return file
    with np.load(Path(FLAGS.films) / 'interactions.npz', allow_pickle=False) as arrays:
        item = np.unique(arrays['item'], return_inverse=True)[1] + 1
        ratings = pl.DataFrame({'user': arrays['user'], 'item': item, 'time': arrays['timestamp']})
    sessions = sessions_lib.cut(ratings, gap_seconds=86_400, seed=0)
    train, valid, test = sessions_lib.split(sessions, 0.1, 0.1)
    parts = {'train': sessions_lib.join(train, valid), 'test': test}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{f'{name}_{key}': getattr(part, key) for name, part in parts.items()
                      for key in ('items', 'offsets', 'time', 'visitor')})
    return file


def configured(variant: str, seed: int, reads: bool):
    """The config of a cell: stage recommend alone, without baselines and experts."""
    c = config_lib.get_config()
    c.name, c.seed, c.stages, c.diagnostics = f'events_{variant}', seed, 'recommend', 0
    c.baselines = c.experts = ''
    c.rivals = {}
    c.stage.recommend.update(steps=6000, eval_every=1000, weight_decay=0.1)
    if variant == 'films':
        c.data.npz, c.model.recommend, c.model.use_side = str(films()), '', False
        c.model.update(event_time=reads, history=reads)
        return c
    options, model = VARIANTS[variant]
    c.data.planted.update(seed=seed, **options)
    c.model.recommend, c.model.use_side = 'true', False
    c.model.update(**{name: value and reads for name, value in model.items()})
    return c


def measured(variant: str, cells: dict) -> dict:
    """Both models and the oracle of one seed, from the results of both runs."""
    key = 'hit@20' if variant == 'films' else 'expected_hit@20'
    out = {name: cell['models']['tpad']['test'][key] for name, cell in cells.items()}
    out |= {'commit': cells['with']['provenance']['commit'],
            'seconds': {name: cell['seconds']['total'] for name, cell in cells.items()}}
    if variant != 'films':
        out['oracle'] = cells['with']['oracle'][key]
        out['closed'] = (out['with'] - out['without']) / (out['oracle'] - out['without'])
    return out


def shown(content: dict) -> Table:
    """All cells, in percent."""
    table = Table(title='expected hit@20 (films: hit@20), %', title_justify='left', box=None)
    for head in ('variant', 'seed', 'without', 'with', 'oracle', 'gap closed'):
        table.add_column(head, justify='left' if head == 'variant' else 'right')
    for variant, seeds in content.items():
        for seed, cell in seeds.items():
            values = [cell.get(name) for name in ('without', 'with', 'oracle', 'closed')]
            table.add_row(variant, seed, *('' if x is None else f'{100 * x:.1f}' for x in values))
    return table


def main(argv):
    """Run the cells, print the table, write the JSON."""
    del argv
    stopping = startup.begin('')
    from tpad_jax.evaluation import compare
    from tpad_jax.job import job

    variants = FLAGS.variants + ['films'] * bool(FLAGS.films)
    for seed in FLAGS.seeds:
        for variant in variants:
            cells, where = {}, {}
            for name in ('without', 'with'):
                where[name] = Path(FLAGS.workdir) / f'{variant}_{seed}_{name}'
                where[name].mkdir(parents=True, exist_ok=True)
                try:
                    cells[name] = job.run(configured(variant, int(seed), name == 'with'),
                                          where[name], stopping)
                except Stopped:
                    sys.exit(75)
            cell = measured(variant, cells)
            if variant == 'films':
                pair = [[compare.read(where[name])] for name in ('with', 'without')]
                paired = compare.compare(*pair, ('tpad', 'tpad'))['slices']['all']['hit@20']
                cell['paired'] = {key: paired[key] for key in ('difference', 'difference_interval',
                                                               'p')}
            # read here, for several commands may run at the same time
            content = json.loads(FILE.read_text()) if FILE.is_file() else {}
            content.setdefault(variant, {})[seed] = cell
            files.write_json(FILE, content)
    Console(width=100).print(shown(content))
    worst = min(cell['closed'] for seeds in content.values() for cell in seeds.values()
                if 'closed' in cell)
    print(f'the smallest share of a gap that is closed: {100 * worst:.0f} % (bar {100 * BAR:.0f})')


if __name__ == '__main__':
    flags.DEFINE_list('variants', list(VARIANTS), 'variants of the planted catalogue')
    flags.DEFINE_list('seeds', '0,1,2', 'seeds of the catalogue, parameters and batch order')
    flags.DEFINE_string('films', '', 'directory of interactions.npz of films')
    flags.DEFINE_string('workdir', 'runs/events', 'where the runs are')
    app.run(main)

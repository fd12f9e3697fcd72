"""Every session baseline over a whole test set: `python -m benchmarks.session_knn --data FILE.npz`.

The file holds ready-made sessions (`data/sources/ids.py`). Rows are every prefix of every test
session, ranked exactly against the whole catalogue; baselines are fitted on all training sessions
and, with --trials above 1, tuned before on the last tenth of them (a drawn tenth with --noordered).
Each runs in a process of its own, on one thread: on a quiet machine its seconds on the wall are
those on the processor (CPU). Prints them with figures and peak memory, and writes all of it to
`benchmarks/session_knn.json`. Bar: V-SKNN and STAN in under 3 minutes each.
"""

import multiprocessing
import os
import platform
import resource
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from tpad_jax.baselines import rules
from tpad_jax.core import files
from tpad_jax.data.sessions import rows
from tpad_jax.data.sources import ids
from tpad_jax.evaluation import metrics

FLAGS = flags.FLAGS
METHODS = [name for name in rules.BASELINES if name not in rules.CONTENT]  # there is no content
BAR = {'vsknn': 180, 'stan': 180}  # seconds


def measure(name: str, path: str, ordered: bool, trials: int) -> dict:
    """Fits (tunes first, with `trials` above 1) and ranks every test row."""
    train, test, *_ = ids.read(path)
    num_items = int(max(train.items.max(), test.items.max()))
    held = rows(test, max_length=int(np.diff(test.offsets).max()))
    kept, valid = ids.hold_out(train, ordered=ordered, valid=0.1, seed=0)
    began = clock()
    tuned = rules.tune(name, kept, rows(valid, max_length=held.items.shape[1]), num_items,
                           trials=trials, final=train, ordered=ordered)
    searched = clock()
    fit, _ = rules.BASELINES[name]
    extra = {'ordered': ordered} if name in ('vsknn', 'stan', 'vstan') else {}
    scorer = fit(train, num_items, **extra, **tuned.params)
    fitted = clock()
    above, equal = metrics.ranks(scorer, held.items, held.target, num_items, name=name)
    ranked = clock()
    return {'rows': len(held.target), 'train_sessions': len(train.start), 'items': num_items,
            'search_seconds': searched - began, 'fit_seconds': fitted - searched,
            'rank_seconds': ranked - fitted,
            **{f'{metric}@20': float(metrics.mean_gain(gain, above, equal, 20).mean())
               for metric, gain in metrics.GAINS.items()},
            'tied_share': float((equal > 1).mean()),
            'peak_gib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            'valid_hit@20': tuned.valid['hit@20'],
            'trials': tuned.record['trials'], 'params': tuned.params}


def clock() -> np.ndarray:
    """Seconds since some moment: [on the wall, on this process's processors]."""
    return np.array([time.perf_counter(), time.process_time()])


def main(argv):
    """Measure each method, print the table, write the JSON."""
    del argv
    table = Table(title_justify='left', box=None)
    for head in ('method', 'fit s', 'rank s', 'CPU s', 'rows/s', 'hit@20', 'mrr@20', 'peak GiB'):
        table.add_column(head, justify='left' if head == 'method' else 'right', no_wrap=True)
    cells = {}
    for name in FLAGS.methods:
        with multiprocessing.get_context('spawn').Pool(1) as pool:  # a fresh process: its own peak
            cells[name] = cell = pool.apply(measure, (name, FLAGS.data, FLAGS.ordered,
                                                      FLAGS.trials))
        spent = np.add(cell['fit_seconds'], cell['rank_seconds'])
        shown = (*(f'{cell[key][0]:.1f}' for key in ('fit_seconds', 'rank_seconds')),
                 f'{spent[1]:.1f}', f'{cell["rows"] / cell["rank_seconds"][0]:,.0f}',
                 *(f'{100 * cell[key]:.2f}' for key in ('hit@20', 'mrr@20')),
                 f'{cell["peak_gib"]:.2f}')
        table.add_row(name, *shown)
        print(name, *shown, flush=True)
        if spent[0] > BAR.get(name, np.inf):
            print(f'{name} took {spent[0]:.0f} s, above its bar of {BAR[name]} s')
        files.write_json(FLAGS.out, {
            'seconds': ['wall', 'CPU'], 'data': Path(FLAGS.data).name, 'ordered': FLAGS.ordered,
            'cpus': os.cpu_count(), 'machine': platform.machine(),
            'python': platform.python_version(), 'numpy': np.__version__, 'methods': cells})
    one = next(iter(cells.values()))
    table.title = (f'{Path(FLAGS.data).stem}: {one["rows"]:,} test rows, {one["items"]:,} items, '
                   f'{one["train_sessions"]:,} training sessions')
    Console(width=100).print(table)


if __name__ == '__main__':
    flags.DEFINE_string('data', None, 'ready-made sessions, an .npz', required=True)
    flags.DEFINE_bool('ordered', True, 'the training sessions stand in the order of time')
    flags.DEFINE_integer('trials', 1, 'budget of each search; 1: the defaults')
    flags.DEFINE_list('methods', METHODS, 'which')
    flags.DEFINE_string('out', str(Path(__file__).parent / 'session_knn.json'), 'where to write')
    app.run(main)

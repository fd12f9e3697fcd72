"""The default job on several planted seeds: `python -m benchmarks.planted --seeds=0,1,2`.

Each seed is one run of `launch.py` in a workdir of its own, so a stopped benchmark goes on where it
was. Prints every model's share of the oracle's expected hit@20 over all, warm and cold targets, and
writes the shares, with commit, seconds and peak memory, to `benchmarks/planted.json`.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

from tpad_jax.core import files
from tpad_jax.evaluation import tables

FLAGS = flags.FLAGS
HERE = Path(__file__).parent
BARS = {'warm': 0.75, 'cold': 0.35}  # what TPAD has to reach of the oracle,
OF_TRUE = {'warm': 0.9, 'cold': 0.75}  # and of the same recommender on the true attributes


def run(seed: int, workdir: Path) -> dict:
    """One seed's results.json, running or resuming its job first."""
    subprocess.run([sys.executable, 'launch.py', '--config=configs/amazon.py',
                    f'--config.data.planted.seed={seed}', f'--workdir={workdir}'],
                   cwd=HERE.parent, check=True)
    return json.loads((workdir / 'results.json').read_text())


def main(argv):
    """Run the seeds, print the table, write the JSON."""
    del argv
    table = Table(title='share of the oracle, %: all / warm / cold', title_justify='left', box=None)
    table.add_column('model')
    seeds, cells, rows = [int(s) for s in FLAGS.seeds], [], {}
    for seed in seeds:
        results = run(seed, Path(FLAGS.workdir) / f'seed{seed}')
        shares = tables.shares(results)
        cells.append({'planted_seed': seed, 'commit': results['provenance']['commit'],
                      'date': results['provenance']['date'], 'seconds': results['seconds'],
                      'shares': shares, 'probes': results['probes'],
                      'oracle_expected_hit@20': results['oracle']['expected_hit@20']})
        table.add_column(f'seed {seed}', justify='right')
        for name, share in shares.items():
            shown = ' / '.join(f'{100 * share[key]:.1f}' for key in ('all', 'warm', 'cold'))
            rows.setdefault(name, []).append(shown)
    for name, shown in rows.items():
        table.add_row(name, *shown)
    Console(width=120).print(table)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    worst = {key: min(c['shares']['tpad'][key] for c in cells) for key in BARS}
    near = {key: min(c['shares']['tpad'][key] / c['shares']['true_attributes'][key]
                     for c in cells) for key in OF_TRUE}
    seconds = ', '.join(f'{c["seconds"]["total"]:.0f}' for c in cells)
    print(f'TPAD at least {worst} of the oracle (bars {BARS}), {near} of true_attributes (bars '
          f'{OF_TRUE}); seconds {seconds}; peak memory {peak:.2f} GiB')
    files.write_json(HERE / 'planted.json', {'cells': cells, 'peak_gib': peak})


if __name__ == '__main__':
    flags.DEFINE_list('seeds', '0,1,2', 'planted seeds')
    flags.DEFINE_string('workdir', 'runs/planted', 'where the runs live')
    app.run(main)

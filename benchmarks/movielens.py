"""TPAD on films and their posters: `python -m benchmarks.movielens --data=DIR --seeds=0,1,2`.

Each seed is one run of `launch.py --config=configs/movielens.py` in a workdir of its own, so a
stopped benchmark goes on where it was, and `--finished` only reads what is there. Prints every
model's test hit@20 and mrr@20 over all prefixes, means over seeds, and TPAD's paired difference
to each with its interval and p-value over sessions; writes them, with the commit and the date of
every run, to `benchmarks/movielens.json`.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

from tpad_jax.core import files
from tpad_jax.evaluation import compare

FLAGS = flags.FLAGS
HERE = Path(__file__).parent
METRICS = ('hit@20', 'mrr@20')
OWN = 'tpad_recommend'


def run(seed: int, workdir: Path) -> None:
    """Run or resume one seed."""
    subprocess.run([sys.executable, 'launch.py', '--config=configs/movielens.py',
                    f'--config.data.ready={FLAGS.data}', f'--config.seed={seed}',
                    f'--workdir={workdir}'], cwd=HERE.parent, check=True)


def gather(workdirs: list[Path]) -> dict:
    """What benchmarks/movielens.json holds, of finished runs."""
    found = [json.loads((d / 'results.json').read_text()) for d in workdirs]
    runs = [compare.read(d) for d in workdirs]
    models = {}
    for name in found[0]['models']:
        if name == 'tpad':
            continue  # the same as OWN
        one = {part: {m: [f['models'][name][part][m] for f in found] for m in METRICS}
               for part in ('valid', 'test')}
        one['search'] = [f['models'][name].get('search', {}).get('params') for f in found]
        if name != OWN:
            paired = compare.compare(runs, runs, (OWN, name))['slices']['all']
            one['tpad_minus_it'] = {m: {k: paired[m][k] for k in (
                'difference', 'difference_interval', 'p', 'per_seed')} for m in METRICS}
        models[name] = one
    return {
        'machine': platform.processor() or platform.machine(),
        'rows': found[0]['models'][OWN]['test']['rows'], 'data': found[0]['data'],
        'audit': found[0]['audit']['verdict'],
        'runs': [{'seed': f['provenance']['seed'], 'commit': f['provenance']['commit'],
                  'date': f['provenance']['date'], 'seconds': f['seconds']} for f in found],
        'config': found[0]['provenance']['config'], 'models': models}


def show(found: dict) -> Table:
    """Test figures in percent, means over seeds, and how far TPAD is above."""
    table = Table(title=f'{found["rows"]:,} test rows, {len(found["runs"])} seed(s), %',
                  title_justify='left', box=None)
    for head in ('model', *METRICS, *(f'TPAD minus it, {m}' for m in METRICS)):
        table.add_column(head, justify='left' if head == 'model' else 'right', no_wrap=True)
    for name, one in found['models'].items():
        cells = [f'{100 * sum(one["test"][m]) / len(one["test"][m]):.2f}' for m in METRICS]
        for m in METRICS:
            gap = one.get('tpad_minus_it', {}).get(m)
            if gap is not None:
                low, high = gap['difference_interval']
                cells.append(f'{100 * gap["difference"]:+.2f} ({100 * low:+.2f} to '
                             f'{100 * high:+.2f}), p {gap["p"]:.3f}')
        table.add_row(name, *cells)
    return table


def main(argv):
    """Run the seeds, print the table, write the JSON after each."""
    del argv
    workdirs = []
    for seed in FLAGS.seeds:
        workdir = Path(FLAGS.workdir) / f'seed{seed}'
        if not FLAGS.finished:
            run(int(seed), workdir)
        if (workdir / 'results.json').is_file():
            workdirs.append(workdir)
            files.write_json(HERE / 'movielens.json', gather(workdirs))
    if workdirs:
        Console(width=140).print(show(gather(workdirs)))


if __name__ == '__main__':
    flags.DEFINE_string('data', '', 'directory of sessions.npz, items.jsonl.gz and images.zip')
    flags.DEFINE_list('seeds', '0,1,2', 'seeds of parameters, draws and batch order')
    flags.DEFINE_string('workdir', 'runs/movielens', 'where the runs live')
    flags.DEFINE_bool('finished', False, 'run nothing, read the runs that are finished')
    app.run(main)

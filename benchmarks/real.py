"""The default configs on real and planted data: `python -m benchmarks.real --gift=DIR ...`.

Nothing is tuned per data set, and all items are ranked (config.data.catalogue=all). Each cell is
one run of launch.py in a workdir of its own, so a stopped benchmark resumes where it was; sets
without a directory are skipped, and --planted= skips the planted ones. Prints hit@20, mrr@20 and
nll of every model on the test rows, means over the seeds, and the paired difference of TPAD and
each other model with its interval and the p-value over sessions, corrected over the whole table
(Holm). Writes them to benchmarks/real.json.

    --gift=DIR      raw Amazon files        --office=DIR    sessions.npz and items.jsonl.gz
    --films=DIR     the same, with images   --sessions=DIR  diginetica.npz and others
    --features=DIR  rows of a text encoder, office_minilm.npy and films_minilm.npy, read in place of
                    content: by --office, and by --films_cold=DIR, where no training session holds
                    the newest films
    --checkpoint=DIR  a text-only decoder, frozen, that reads the items of --office and --films
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks import hierarchical
from tpad_jax.core import files
from tpad_jax.evaluation import compare

FLAGS = flags.FLAGS
HERE = Path(__file__).parent
FILMS = ['--config.data.words=genres,year,title,tags,overview', '--config.data.sides=year,genres']
METRICS = 'hit@20', 'mrr@20'
FILE = HERE / 'real.json'


def sets() -> dict[str, list[str]]:
    """{name of a data set: options of its runs}, of those whose directory is given."""
    amazon = '--config=configs/amazon.py'
    published = ['--config.data.protocol=published', '--config.data.published_last_only=True']
    out = {}
    if FLAGS.gift:
        out['gift_cards'] = [amazon, f'--config.data.raw_dir={FLAGS.gift}']
    if FLAGS.office:
        out['office'] = [amazon, f'--config.data.ready={FLAGS.office}', *published,
                         '--config.data.words=title,brand,description', '--config.data.sides=brand']
    if FLAGS.films:
        out['films'] = [amazon, f'--config.data.ready={FLAGS.films}', *FILMS]
    if FLAGS.features:
        given = ['--config.stages=recommend', '--config.model.recommend=given',
                 f'--config.data.features={FLAGS.features}/']
        if FLAGS.office:
            out['office_minilm'] = [*out['office'], *given[:2], f'{given[2]}office_minilm.npy']
        if FLAGS.films_cold:
            out['films_cold'] = [amazon, f'--config.data.ready={FLAGS.films_cold}', *FILMS,
                                 '--config.data.valid=575', *given[:2],
                                 f'{given[2]}films_minilm.npy']
    if FLAGS.checkpoint:  # its states as they are, the mean over the text
        width = json.loads((Path(FLAGS.checkpoint) / 'config.json').read_text())['hidden_size']
        reads = [f'--config.mllm.checkpoint={FLAGS.checkpoint}', '--config.mllm.text_length=64',
                 '--config.mllm.pooling=mean', f'--config.model.features={width}',
                 '--config.stage.knowledge.steps=0', '--config.stages=knowledge,recommend',
                 '--config.model.recommend=k']
        out |= {f'{name}_checkpoint': [*out[name], *reads] for name in ('office', 'films')
                if name in out}
    for seed in FLAGS.planted:
        out[f'planted_{seed}'] = [amazon, f'--config.data.planted.seed={seed}']
    if FLAGS.sessions:
        out |= {file.stem: ['--config=configs/sessions.py', f'--config.data.npz={file}']
                for file in sorted(Path(FLAGS.sessions).glob('*.npz'))}
    return {name: [*options, '--config.data.catalogue=all'] for name, options in out.items()
            if not FLAGS.only or name in FLAGS.only}


def gather(workdirs: list[Path]) -> dict:
    """What the file holds of a data set, by its finished runs."""
    results = [json.loads((workdir / 'results.json').read_text()) for workdir in workdirs]
    runs = [compare.read(workdir) for workdir in workdirs]
    models = {}
    for name in results[0]['models']:
        tests = [result['models'][name]['test'] for result in results]
        models[name] = {metric: [test[metric] for test in tests] for metric in (*METRICS, 'nll')}
        models[name] |= {f'{part} hit@20': [test['slices'][part]['hit@20'] for test in tests]
                         for part in ('warm', 'cold')}
        models[name]['valid hit@20'] = [r['models'][name]['valid']['hit@20'] for r in results]
        if name != 'tpad':
            paired = compare.compare(runs, runs, ('tpad', name))['slices']['all']
            models[name]['tpad_minus_it'] = {metric: {
                key: paired[metric][key] for key in ('difference', 'difference_interval', 'p')}
                for metric in METRICS}
    first = results[0]
    return {'rows': first['models']['tpad']['test']['rows'], 'data': first['data'],
            'is': [result['models']['tpad']['is'] for result in results],
            'experts': [result['models']['tpad'].get('experts') for result in results],
            'runs': [{'seed': r['provenance']['seed'], 'commit': r['provenance']['commit'],
                      'date': r['provenance']['date'], 'seconds': r['seconds']['total']}
                     for r in results], 'models': models}


def corrected(content: dict) -> None:
    """Add Holm's p-values over all differences of the table, in place."""
    cells = [gap for cell in content.values() for model in cell['models'].values()
             for gap in model.get('tpad_minus_it', {}).values() if gap['p'] is not None]
    for gap, p in zip(cells, hierarchical.holm([gap['p'] for gap in cells]), strict=True):
        gap['p_holm'] = p


def show(name: str, cell: dict) -> Table:
    """Format one data set."""
    table = Table(title=f'{name}: {cell["rows"]:,} test rows, {len(cell["runs"])} seed(s), %',
                  title_justify='left', box=None)
    for head in ('model', *METRICS, 'nll', *(f'tpad minus it, {metric}' for metric in METRICS)):
        table.add_column(head, justify='left' if head == 'model' else 'right', no_wrap=True)
    for model, values in cell['models'].items():
        row = [f'{100 * sum(values[m]) / len(values[m]):.2f}' for m in METRICS]
        row.append('-' if None in values['nll'] else f'{np.mean(values["nll"]):.3f}')
        for gap in values.get('tpad_minus_it', {}).values():
            low, high = (100 * edge for edge in gap['difference_interval'])
            row.append(f'{100 * gap["difference"]:+.2f} [{low:+.2f}, {high:+.2f}] '
                       f'p {gap["p_holm"]:.3f}')
        table.add_row(model, *row)
    return table


def main(argv):
    """Run the cells, write the JSON after each, print the table."""
    del argv
    content = json.loads(FILE.read_text()) if FILE.is_file() else {}
    for name, options in sets().items():
        workdirs = [Path(FLAGS.workdir) / f'{name}_seed{seed}' for seed in FLAGS.seeds]
        for seed, workdir in zip(FLAGS.seeds, workdirs, strict=True):
            if not FLAGS.finished:
                subprocess.run([sys.executable, 'launch.py', *options, f'--config.seed={seed}',
                                f'--workdir={workdir}'], cwd=HERE.parent, check=True)
            done = [directory for directory in workdirs if (directory / 'results.json').is_file()]
            if done:
                content[name] = gather(done)
                corrected(content)
                files.write_json(FILE, content)
    for name, cell in content.items():
        Console(width=140).print(show(name, cell))


if __name__ == '__main__':
    for flag in ('gift', 'office', 'films', 'sessions', 'features', 'films_cold',
                 'checkpoint'):
        flags.DEFINE_string(flag, '', 'directory of the data, see the head of this file')
    flags.DEFINE_list('planted', '0,1,2', 'planted seeds')
    flags.DEFINE_list('seeds', '0,1,2', 'seeds of parameters, draws and batch order')
    flags.DEFINE_list('only', '', 'names of data sets; all if empty')
    flags.DEFINE_string('workdir', 'runs/real', 'where the runs live')
    flags.DEFINE_bool('finished', False, 'run nothing, read the runs that are finished')
    app.run(main)

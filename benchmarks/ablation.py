"""TPAD's parts put to the test: `python -m benchmarks.ablation [--study=claim] [--seeds=0,1]`.

A cell is one name of configs/ablations.py on one seed (of the planted catalogue and of the run)
and one number of training sessions. It trains in a workdir of its own, on the knowledge stage that
the cells of a seed share, and goes on from its checkpoints where it was stopped. Finished cells are
kept in `benchmarks/ablation/` with the commit that made them and are not run again; with them stand
each test session's sums, so that any two names can be compared row by row.

Prints the share of the oracle's expected hit@20 over all, warm and cold targets, and each name's
paired difference to the study's reference with an interval over sessions, tested by flipping the
signs of whole sessions within their seed (Smucker et al. 2007), corrected by Holm over the table.
Such an interval says what other test sessions would do to these very models; what other seeds would
do is said below the table, by the differences seed by seed and a t-test over them.
"""

import base64
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

from tpad_jax.core.cli import STOPPED
from tpad_jax.core.startup import begin
from tpad_jax.errors import Stopped

FLAGS = flags.FLAGS
KEPT = Path(__file__).with_suffix('')
LEVEL = 0.05
SUMS = 'hit@20', 'mrr@20', 'expected_hit@20', 'expected_hit@20 cold'  # kept of every test session
DIGITS = 9000  # a session's sums, at most 7, are kept as 16-bit multiples of 1 / DIGITS
# What the knowledge stage depends on, besides the losses and settings that carry its name.
READS = ('features', 'lora_rank', 'lora_alpha', 'lora_targets', 'lora_by_kind', 'withhold',
         'word_dropout', 'modality_dropout')
PARTS = ('full', 'without_transfer', 'adapter_only', 'random_adapter', 'merging',
         'without_generation', 'without_disentanglement', 'without_alignment',
         'without_distillation', 'without_discrepancy', 'strong_disentanglement',
         'longer_knowledge', 'longer_transfer', 'joint')
# A study: its names, the first being what the others are compared with, training sessions, seeds.
STUDIES = {
    'claim': dict(names=('without_transfer', 'true_attributes',
                         *(n for n in PARTS if n != 'without_transfer')),
                  sizes=(500, 1500, 6000), seeds=range(5)),
    'parts': dict(names=(*PARTS, 'without_knowledge', 'frozen_raw', 'id_only', 'content_only',
                         'true_attributes'), sizes=(6000,), seeds=range(3)),
    # options of the taught form, added one at a time, with the default job's recommend stage
    'teacher': dict(names=('taught', 'taught_bottleneck', 'taught_groups', 'taught_codes',
                           'taught_words'),
                    sizes=(100, 500, 1500), seeds=range(4), changes={
                        'stage.recommend.batch_size': 256, 'stage.recommend.steps': 6000,
                        'stage.recommend.epochs': 6.0, 'stage.recommend.eval_every': 1000,
                        'stage.recommend.patience': 3, 'stage.recommend.weight_decay': 0.1}),
}


def make_config(study: str, name: str, size: int, seed: int):
    """The config of a cell."""
    from configs import ablations

    c = ablations.get_config(name)
    c.seed = c.data.planted.seed = seed
    c.update_from_flattened_dict(STUDIES[study].get('changes', {}))
    c.diagnostics = 0  # no cell keeps them
    c.data.planted.train = size
    return c


def knowledge(config, workdir: Path, stopping) -> Path:
    """The run that holds this config's knowledge stage, trained if there is none yet."""
    from configs import ablations

    own = ablations.get_config('full')
    own.update(stages='knowledge', seed=config.seed, diagnostics=config.diagnostics)
    own.data, own.mllm = config.data, config.mllm  # placeholders cannot be updated by each other
    own.model.update({name: config.model[name] for name in READS})
    own.stage.knowledge = config.stage.knowledge
    own.losses.update({n: e for n, e in config.losses.items() if 'knowledge' in e.stages})
    told = json.dumps(own.to_dict(), default=str, sort_keys=True)
    where = workdir / 'knowledge' / hashlib.sha256(told.encode()).hexdigest()[:12]
    train(own, where, stopping, ('knowledge',))
    return where


def after_knowledge(config, own: Path, workdir: Path, stopping) -> None:
    """Fill the workdir `own` with the data and the knowledge stage that runs of `workdir` share."""
    shutil.rmtree(own, ignore_errors=True)  # a copy that was cut short
    source = knowledge(config, workdir, stopping)
    for part in ('raw', 'data', 'stages/knowledge', 'features/knowledge'):
        if part.endswith('knowledge') <= ('knowledge' in config.stages.split(',')):
            shutil.copytree(source / part, own / part)


def train(config, workdir: Path, stopping, stages):
    """The job of `config` with its stages done."""
    made = opened(config, workdir, stopping, stages)
    try:
        for stage in stages:
            made.pause()
            made.run_stage(stage)
    finally:
        made.writer.close()
    return made


def opened(config, workdir: Path, stopping, stages):
    """The job of `config`, built for these stages, with an open log."""
    from tpad_jax.core import log
    from tpad_jax.job import job, validate
    from tpad_jax.training import workdir as workdir_lib

    validate.check(config)
    made = job.Job(config, workdir, stopping)
    workdir_lib.claim(workdir, config.to_dict(), made.data.fingerprint)
    made.build(stages, Console(quiet=True))
    made.writer = log.Writer(workdir)
    return made


def cell(study: str, name: str, size: int, seed: int, workdir: Path, stopping) -> dict:
    """Run or resume a cell to its end."""
    from tpad_jax.job import results

    config = make_config(study, name, size, seed)
    stages = tuple(config.stages.split(','))
    own = workdir / study / f'seed{seed}_{size}' / name
    if not (own / 'config.json').is_file():
        after_knowledge(config, own, workdir, stopping)
    begun = time.perf_counter()
    job = train(config, own, stopping, stages)
    found = scores(job)
    made = results.provenance(job)
    return {'study': study, 'name': name, 'sessions': size, 'seed': seed, 'commit': made['commit'],
            'device': made['device'], 'date': made['date'], 'seconds': time.perf_counter() - begun,
            'chosen': job.record['chosen'], 'valid': job.record['valid'], **found}


def scores(job) -> dict:
    """A job's test figures, its share of the oracle's expected hit@20, and its sessions' sums.

    With it the share of the Transfer-MLLM's own lists, where a critic was taught to make them.
    """
    from tpad_jax.evaluation.scorers import scorer, transfer_scorer

    rows, c = job.test, job.config
    scored = {'own': scorer(job.spec, job.devices)(job.nested(), job.catalogue),
              'oracle': job.probabilities}
    if 'transfer' in c.stages and c.losses.distil.weight and c.model.form != 'full':
        bind = transfer_scorer(job.spec, job.devices.own)
        scored['transfer'] = bind(job.nested(), job.catalogue)
    earned = {who: earnings(job, score) for who, score in scored.items()}
    sums = by_session(rows, earned['own'])
    whole = {who: found.sum(axis=0) for who, found in earned.items()}
    own, best, total = whole.pop('own'), whole.pop('oracle'), len(rows.target)

    def share(found):
        return {'all': found[2] / best[2], 'cold': found[3] / best[3],
                'warm': (found[2] - found[3]) / (best[2] - best[3])}

    return {'test': {name: own[i] / total for i, name in enumerate(SUMS[:3])}, 'share': share(own),
            'foretold': {who: share(found) for who, found in whole.items()},
            'oracle': {'all': best[2], 'cold': best[3]}, 'rows': total, 'sums': pack(sums)}


def earnings(job, score):
    """What a scorer earns on every test row: float64 [R, len(SUMS)]."""
    import numpy as np

    from tpad_jax.evaluation import metrics

    rows, cold, kept = job.test, ~job.data.warm, []
    cold[0] = False
    hit, mrr = metrics.GAINS['hit'], metrics.GAINS['mrr']
    for part, found in metrics.scored(score, rows.items, job.data.num_items):
        truth = job.probabilities(rows.items[part])
        placed = metrics.places(found, [truth, truth * cold], 20)
        above, equal = metrics.counts(found, rows.target[part])
        kept.append([metrics.mean_gain(hit, above, equal, 20),
                     metrics.mean_gain(mrr, above, equal, 20),
                     *metrics.expected(hit, placed, 20)])
    return np.concatenate(kept, axis=1).T


def by_session(rows, earned):
    """Sums of earnings [R, n] over the sessions of rows: float64 [n, S]."""
    import numpy as np

    session = np.unique(rows.session, return_inverse=True)[1]
    return np.stack([np.bincount(session, column) for column in earned.T])


def pack(sums) -> str:
    """float [len(SUMS), S], or other rows of S, as text."""
    import numpy as np

    whole = np.round(sums * DIGITS).astype('<u2')
    return base64.b64encode(zlib.compress(whole.tobytes(), 9)).decode()


def unpack(text: str, rows: int = len(SUMS)):
    """What `pack` was given: float64 [rows, S]."""
    import numpy as np

    whole = np.frombuffer(zlib.decompress(base64.b64decode(text)), '<u2')
    return whole.reshape(rows, -1) / DIGITS


def read(study: str, size: int) -> dict:
    """Finished cells {(name, seed): cell}."""
    file = KEPT / f'{study}_{size}.json'
    cells = json.loads(file.read_text())['cells'] if file.is_file() else []
    return {(one['name'], one['seed']): one for one in cells}


def keep(study: str, size: int, one: dict) -> None:
    """Add a cell to the finished ones, whatever another process added meanwhile."""
    from tpad_jax.core import files

    cells = read(study, size) | {(one['name'], one['seed']): one}
    KEPT.mkdir(exist_ok=True)
    files.write_json(KEPT / f'{study}_{size}.json',
                       {'cells': [cells[key] for key in sorted(cells)]})


def differences(cells: dict, name: str, reference: str) -> dict | None:
    """A name against the reference over the seeds both have: share by share, paired by session.

    Returns:
      {'all' | 'warm' | 'cold': (difference of shares, low, high, p)}, and 'seeds', the difference
      of each over all targets.
    """
    import numpy as np

    from tpad_jax.evaluation import statistics

    seeds = [seed for other, seed in cells if other == name and (reference, seed) in cells]
    if not seeds or name == reference:
        return None
    apart, best, each = [], {'all': 0.0, 'cold': 0.0}, []
    for seed in seeds:
        a, b = (unpack(cells[who, seed]['sums']) for who in (name, reference))
        best = {key: best[key] + cells[name, seed]['oracle'][key] for key in best}
        gap = (a - b)[2:]
        each.append(float(gap[0].sum() / cells[name, seed]['oracle']['all']))
        apart.append(np.stack([gap[0], gap[0] - gap[1], gap[1]], axis=1))
    apart = np.concatenate(apart)  # [S, 3]: a session of another seed is another session
    scale = np.array([best['all'], best['all'] - best['cold'], best['cold']])
    drawn = statistics.bootstrap(apart[:, None], np.ones((len(apart), 1)))[:, 0] * len(apart)
    low, high = np.quantile(drawn / scale, [LEVEL / 2, 1 - LEVEL / 2], axis=0)
    p = statistics.sign_flip(apart)
    out = {key: tuple(float(x[i]) for x in (apart.sum(axis=0) / scale, low, high, p))
           for i, key in enumerate(('all', 'warm', 'cold'))}
    return {**out, 'seeds': each}


def show(study: str, size: int, console: Console) -> None:
    """The table of one size of a study."""
    from scipy.stats import ttest_1samp

    from benchmarks.hierarchical import holm

    cells, names = read(study, size), STUDIES[study]['names']
    found = {name: differences(cells, name, names[0]) for name in names}
    told = [(name, key) for name in names if found[name] for key in ('all', 'warm', 'cold')]
    corrected = dict(zip(told, holm([found[n][key][3] for n, key in told]), strict=True))
    table = Table(title=f'{study}, {size} training sessions: share of the oracle, %, and '
                        f'difference to {names[0]}', title_justify='left', box=None)
    for head in ('name', 'seeds', 'all', 'warm', 'cold', 'all -', 'warm -', 'cold -', 'T'):
        table.add_column(head, justify='left' if head == 'name' else 'right', no_wrap=True)
    for name in names:
        own = [one for (who, _), one in cells.items() if who == name]
        if not own:
            continue
        shares = [f'{100 * sum(one["share"][key] for one in own) / len(own):.1f}'
                  for key in ('all', 'warm', 'cold')]
        gaps = [''] * 3
        if found[name]:
            gaps = ['{:+.1f} [{:+.1f}, {:+.1f}]{}'.format(
                *(100 * x for x in found[name][key][:3]),
                '*' if corrected[name, key] < LEVEL else ' ') for key in ('all', 'warm', 'cold')]
        foretold = [one['foretold']['transfer']['all'] for one in own if one['foretold']]
        table.add_row(name, str(len(own)), *shares, *gaps,
                      f'{100 * sum(foretold) / len(foretold):.1f}' if foretold else '')
    console.print(table)
    for name in filter(found.get, names):
        each = found[name]['seeds']
        p = f', p = {ttest_1samp(each, 0).pvalue:.2f}' if len(each) > 1 else ''
        console.print(f'{name} - {names[0]}, all, seed by seed: '
                      f'{" ".join(f"{100 * x:+.1f}" for x in each)}{p}', highlight=False)
    console.print('[low, high]: 95 % by bootstrap over sessions; *: p < 0.05 by sign flips of '
                  'sessions, Holm over the table; T: the share of the Transfer-MLLM itself',
                  markup=False, highlight=False)


def main(argv):
    """Run what is missing, seed by seed and the most telling names first; print the tables."""
    del argv
    # cells are many and alike: what one compiles the others find
    compiled = Path(FLAGS.workdir, 'compiled').absolute()
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(compiled))
    stopping = begin('')
    study = STUDIES[FLAGS.study]
    seeds = [int(s) for s in FLAGS.seeds] or list(study['seeds'])
    sizes = [int(s) for s in FLAGS.sizes] or list(study['sizes'])
    names = FLAGS.names or study['names']
    try:
        for name in () if FLAGS.show else names:
            for size in sizes:
                for seed in seeds:
                    if (name, seed) not in read(FLAGS.study, size):
                        print(f'{FLAGS.study}: {name}, {size} sessions, seed {seed}', flush=True)
                        keep(FLAGS.study, size,
                             cell(FLAGS.study, name, size, seed, Path(FLAGS.workdir), stopping))
    except Stopped as stopped:
        print(f'benchmarks.ablation: {stopped}; the same command goes on', file=sys.stderr)
        sys.exit(STOPPED)
    for size in sizes:
        show(FLAGS.study, size, Console(width=132))


if __name__ == '__main__':
    flags.DEFINE_enum('study', 'parts', list(STUDIES), 'which table')
    flags.DEFINE_list('seeds', '', 'only these')
    flags.DEFINE_list('sizes', '', 'only these numbers of training sessions')
    flags.DEFINE_list('names', '', 'only these of configs/ablations.py')
    flags.DEFINE_bool('show', False, 'print the tables of what is finished, run nothing')
    flags.DEFINE_string('workdir', 'runs/ablation', 'where the runs live')
    app.run(main)

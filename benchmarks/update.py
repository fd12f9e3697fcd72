"""Weekly updates of a drifting catalogue: `python -m benchmarks.update --json=FILE`.

    python -m benchmarks.update --config=configs/amazon.py:tiny --items=120 --sessions=60

A planted world whose popularity moves every week, and in which some items appear every week. A run
is trained on the first weeks. Every later week is added by `python -m tpad_jax.update`, and
next to it all weeks so far are trained again. Three artefacts are measured on fresh sessions of
that week: the run as it was (`stale`), updated and retrained. The share of the oracle is hit@20
over that of the exact distribution on the same rows.

Seconds are those of training steps and of reading items; `apart` has start-up and compilation.
Every part writes a JSON into WORKDIR/cells and is not computed again.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.checkout import ROOT, commit
from tpad_jax.core.startup import begin
from tpad_jax.data.synthetic import planted, rendering, wording

FLAGS = flags.FLAGS
WEEK = 7 * 86_400  # seconds
LAUNCHED = 0.04  # of the items, each week
STAYS, SIGMA = 0.9, 0.5  # correlation of an item's log popularity from week to week, and its spread


class World:
    """A planted world over weeks; all is a function of the seed.

    Args:
      seed: of the world.
      items: V, with those of all weeks.
      weeks: how many there are.
      first: weeks of the run; the others bring new items.
    """

    def __init__(self, seed: int, items: int, weeks: int, first: int):
        self.seed, drawn, rng = seed, planted.draw(seed, items), np.random.default_rng([seed, 77])
        later = np.repeat(np.arange(first, weeks), max(1, round(LAUNCHED * items)))[:items // 2]
        self.launch = np.zeros(items, int)
        self.launch[rng.permutation(items)[:len(later)]] = later
        level, self.of_week = SIGMA * rng.standard_normal(items), []
        for week in range(weeks):
            shares = np.exp(level) * (self.launch <= week)
            self.of_week.append(drawn._replace(popularity=shares / shares.sum(),
                                               cold=self.launch > week))
            level = STAYS * level + np.sqrt(1 - STAYS ** 2) * SIGMA * rng.standard_normal(items)
        self.words = wording.texts(drawn.attributes, np.random.default_rng([seed, 78]))
        self.pictures = rendering.render(drawn.attributes, np.random.default_rng([seed, 79]), 0.12)

    def sessions(self, week: int, count: int, stream: int) -> np.ndarray:
        """Draw sessions of a week, int32 [count, 8]."""
        return planted.sample_sessions(self.of_week[week], count, np.random.default_rng(
            [self.seed, stream, week]), warm_only=True)

    def write(self, directory: Path, weeks, count: int) -> None:
        """Write weeks as raw Amazon files; their items are those that appear in them."""
        (directory / 'images').mkdir(parents=True)
        new = [item for item in range(len(self.launch)) if self.launch[item] in (
            range(max(weeks) + 1) if 0 in weeks else weeks)]
        planted._write_lines(directory / 'meta_Planted.jsonl', (
            planted._metadata(item + 1, *(column[item] for column in self.words)) for item in new))
        for item in new:
            data = io.BytesIO()
            Image.fromarray(self.pictures[item]).save(data, 'JPEG', quality=90)
            (directory / 'images' / f'{planted.asin(item + 1)}.jpg').write_bytes(data.getvalue())
        planted._write_lines(directory / 'Planted.jsonl', (
            planted._review(week * count + n, item,
                            planted.START + week * WEEK + n * (WEEK // count) + 60 * place)
            for week in weeks for n, row in enumerate(self.sessions(week, count, 1).tolist())
            for place, item in enumerate(row) if item))


def measured(world: World, run: Path, week: int, count: int) -> dict:
    """Measure the served artefact of a run on fresh sessions of a week."""
    from tpad_jax.evaluation import metrics
    from tpad_jax.job import updating
    from tpad_jax.serving import artifact
    from tpad_jax.serving.recommender import Recommender

    served = artifact.read(run)
    drawn, lists = world.sessions(week, count, 2), []
    prefixes = [(row[:end], row[end]) for row in drawn for end in range(1, np.count_nonzero(row))]
    items = np.zeros((len(prefixes), drawn.shape[1] - 1), np.int32)
    for row, (prefix, _) in zip(items, prefixes, strict=True):
        row[:len(prefix)] = prefix
    target = np.array([target for _, target in prefixes])
    shop = Recommender(served)
    number = np.array([0, *(shop.table.number.get(planted.asin(n + 1), 0)
                            for n in range(len(world.launch)))])
    known = [[n for n in number[row] if n] or [1] for row in items]  # an unknown item is left out
    rows = np.zeros((len(known), served.about['max_length']), np.int32)
    for row, prefix in zip(rows, known, strict=True):
        row[:len(prefix)] = prefix
    scorer = updating.scorer(shop)
    for _, scores in metrics.scored(scorer, rows, len(shop.ids) - 1):
        scores[:, 0] = -np.inf
        lists.append(np.argsort(-scores, axis=1, kind='stable')[:, :20])
    hits = (np.concatenate(lists) == number[target][:, None]).any(axis=1)
    best = planted.probabilities(world.of_week[week], items, warm_only=True)
    oracle = (np.argsort(-best, axis=1, kind='stable')[:, :20] == target[:, None] - 1).any(axis=1)
    return {'rows': len(rows), 'hit@20': float(hits.mean()), 'oracle': float(oracle.mean()),
            'share': float(hits.mean() / oracle.mean())}


def trained(run: Path) -> dict:
    """Seconds of a finished run: of steps and of reading items, and those apart."""
    results = json.loads((run / 'results.json').read_text())
    spent = results['spent'].values()
    compiled = sum(x['compile'] for x in spent)
    read = sum(x for name, x in results['seconds'].items() if name.endswith('_encode'))
    return {'work': sum(x['all'] for x in spent) - compiled + read, 'apart': compiled}


def train(run: Path, raw: Path) -> None:
    """Train a run on raw files, in a separate process; a killed one resumes."""
    subprocess.run([sys.executable, ROOT / 'launch.py', f'--config={FLAGS.config}',
                    f'--config.data.raw_dir={raw}', '--config.data.core=1', '--config.rivals={}',
                    '--config.baselines=', '--config.diagnostics=0', f'--workdir={run}',
                    f'--config.seed={FLAGS.seed}', *FLAGS.more], cwd=ROOT, check=True,
                   stdout=sys.stderr)


def run_all(workdir: Path) -> dict:
    """Compute the missing cells; {name: cell}."""
    weeks = FLAGS.first + FLAGS.weeks
    world = World(FLAGS.seed, FLAGS.items, weeks, FLAGS.first)
    raws = {week: workdir / f'week{week}' for week in range(FLAGS.first, weeks)}
    raws[0] = workdir / 'weeks'
    for week, raw in raws.items():
        if not (raw / 'Planted.jsonl').is_file():
            shutil.rmtree(raw, ignore_errors=True)
            world.write(raw, range(FLAGS.first) if not week else [week], FLAGS.sessions)
    run, cells = workdir / 'run', {}

    def cell(name, make):
        file = workdir / 'cells' / f'{name}.json'
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            made = json.dumps(make(), indent=1)
            file.with_suffix('.partial').write_text(made)
            os.replace(file.with_suffix('.partial'), file)
        cells[name] = json.loads(file.read_text())

    def begin_run():
        train(run, raws[0])
        return trained(run)

    def stale(week):
        (run / 'current').unlink(missing_ok=True)
        return measured(world, run, week, FLAGS.test)

    def update(week):
        if not (run / 'updates' / f'{week - FLAGS.first + 1:04d}').is_dir():
            subprocess.run([sys.executable, '-m', 'tpad_jax.update', run, '--new', raws[week]],
                           cwd=ROOT, check=True)
        folder = run / 'updates' / f'{week - FLAGS.first + 1:04d}'
        drift = json.loads((folder / 'drift.json').read_text())
        seconds, apart = drift['seconds'], ('load', 'compile_encode', 'compile_train')
        return {**measured(world, run, week, FLAGS.test), 'drift': drift,
                'work': seconds.get('encode', 0.0) + seconds['train'] + seconds['count'],
                'apart': sum(seconds.get(name, 0.0) for name in apart)}

    def retrain(week):
        own, raw = workdir / f'run{week}', workdir / f'weeks{week}'
        if not raw.is_dir():
            world.write(raw.with_suffix('.partial'), range(week + 1), FLAGS.sessions)
            raw.with_suffix('.partial').rename(raw)
        train(own, raw)
        return {**measured(world, own, week, FLAGS.test), **trained(own)}

    cell('run', begin_run)
    for week in range(FLAGS.first, weeks):
        cell(f'stale{week}', lambda week=week: stale(week))
    for week in range(FLAGS.first, weeks):
        if week > FLAGS.first:  # of a benchmark that was killed
            (run / 'current').write_text(f'updates/{week - FLAGS.first:04d}\n')
        cell(f'updated{week}', lambda week=week: update(week))
    for week in range(FLAGS.first, weeks):
        cell(f'retrained{week}', lambda week=week: retrain(week))
    return cells


def show(cells: dict) -> None:
    """Print the table."""
    table = Table('week', 'stale %', 'updated %', 'retrained %', 'work s', 'of retraining',
                  'apart s', title='share of the oracle (hit@20), and seconds')
    for week in range(FLAGS.first, FLAGS.first + FLAGS.weeks):
        old, new, again = (cells[f'{name}{week}'] for name in ('stale', 'updated', 'retrained'))
        table.add_row(str(week), *(f'{100 * x["share"]:.1f}' for x in (old, new, again)),
                      f'{new["work"]:.1f}', f'{new["work"] / again["work"]:.1%}',
                      f'{new["apart"]:.1f}')
    Console().print(table)


def main(_) -> None:
    """Compute, print and write the JSON."""
    begin()
    workdir = Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    cells = run_all(workdir)
    show(cells)
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps({'commit': commit('tpad_jax'), **cells}, indent=1))


if __name__ == '__main__':
    flags.DEFINE_string('config', 'configs/amazon.py', 'Config of the run.')
    flags.DEFINE_string('workdir', 'runs/update', 'Directory of all files.')
    flags.DEFINE_string('json', '', 'File of all numbers.')
    flags.DEFINE_integer('seed', 0, 'Of the world and the run.')
    flags.DEFINE_integer('items', 600, 'With those of all weeks.')
    flags.DEFINE_integer('first', 10, 'Weeks of the run.')
    flags.DEFINE_integer('weeks', 5, 'Weeks that are added.')
    flags.DEFINE_integer('sessions', 600, 'Of a week.')
    flags.DEFINE_integer('test', 400, 'Fresh sessions that measure a week.')
    flags.DEFINE_multi_string('more', [], 'Further arguments of the trainings.')
    app.run(main)

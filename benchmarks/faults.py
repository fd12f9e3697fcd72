"""Nothing is lost by a kill: `python -m benchmarks.faults [--runs=50] [--seed=0]`.

The job of configs/amazon.py:tiny, started by launch.py, is killed by SIGKILL at a drawn moment and
started again. Two fifths of the moments lie between two steps of a stage, by the time they took in
an uninterrupted run; two fifths inside a save, while its folder has its temporary name, from empty
to nearly whole; the rest where no step is taken: preparing, compiling, encoding, measuring. What
has to hold of every run:

    resumed     the second sitting begins each stage behind its last whole checkpoint
    again       it computes at most `save_every` steps again; twice that where the last save that
                was due had not been committed
    log         line by line the log of the uninterrupted run: each step stands once
    params      all arrays of all checkpoints the uninterrupted run keeps, optimiser and all, and
                the stored features, bit by bit
    results     those of the uninterrupted run, but for dates and seconds

A finished run goes at once into `benchmarks/faults.json` with the commit that made it; the same
command goes on with what is missing, and leaves with status 1 where anything failed (the workdir of
such a run is kept). `--show` prints what is there.
"""

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from benchmarks.checkout import commit

FLAGS = flags.FLAGS
ROOT, KEPT = Path(__file__).parents[1], Path(__file__).with_suffix('.json')
KINDS = 'training', 'save', 'training', 'save', 'between'  # of every five runs
POLL = 0.003  # seconds between two looks at a run
SAVE_EVERY = 5  # steps: the stages of :tiny are short
ENTRIES = 10  # of the dozen files and folders of a save, how many may be there when it is killed
PROPERTIES = 'resumed', 'again', 'log', 'params', 'results'


def start(workdir: Path) -> subprocess.Popen:
    """The job in a process of its own, with what earlier ones compiled."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    compiled = Path(FLAGS.workdir, 'compiled').absolute()
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(compiled),
           'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    with open(f'{workdir}.out', 'a') as out:
        return subprocess.Popen(
            [sys.executable, 'launch.py', '--config=configs/amazon.py:tiny',
             f'--config.save_every={SAVE_EVERY}', f'--workdir={workdir.absolute()}'],
            cwd=ROOT, env=env, stdout=out, stderr=out)


def follow(process, workdir: Path):
    """Yields (seconds since the start, lines in the log) until it ends."""
    begun, file = time.perf_counter(), workdir / 'log.jsonl'
    seen, lines = None, 0
    while process.poll() is None:
        if file.is_file():
            about = file.stat()
            if (about.st_ino, about.st_size) != seen:
                seen, lines = (about.st_ino, about.st_size), file.read_bytes().count(b'\n')
        yield time.perf_counter() - begun, lines
        time.sleep(POLL)


def folders(workdir: Path) -> dict[str, list[str]]:
    """{stage: names of the folders of its checkpoints, temporary ones among them}."""
    found = {}
    for stage in workdir.glob('stages/*'):
        try:
            found[stage.name] = sorted(os.listdir(stage))
        except OSError:
            continue
    return found


def unfinished(names) -> list[int]:
    """Steps whose folders have a temporary name."""
    return [int(name.split('.')[0]) for name in names if '.partial' in name and '-old' not in name]


def whole() -> tuple[Path, dict]:
    """The uninterrupted run of this commit, and what was seen of it, made where there is none.

    Where nothing is compiled yet it is made twice: the second is what the others will be like.

    Returns:
      Its workdir and {'commit', 'lines': seconds of every log line and of the end, 'saves':
      [[stage, step]]}.
    """
    root = Path(FLAGS.workdir)
    about, workdir = root / 'whole.json', root / 'whole'
    if about.is_file():
        seen = json.loads(about.read_text())
        if seen['commit'] == commit('tpad_jax', 'configs', 'launch.py'):
            return workdir, seen
    for _ in range(1 if (root / 'compiled').is_dir() else 2):
        shutil.rmtree(workdir, ignore_errors=True)
        process, lines, saves = start(workdir), [], []
        for now, number in follow(process, workdir):
            lines += [now] * (number - len(lines))
            for stage, names in folders(workdir).items():
                saves += [[stage, step] for step in unfinished(names) if [stage, step] not in saves]
        if process.returncode:
            sys.exit(f'{workdir}.out: the uninterrupted run left with {process.returncode}')
        lines.append(now)
    seen = {'commit': commit('tpad_jax', 'configs', 'launch.py'), 'lines': lines, 'saves': saves}
    about.write_text(json.dumps(seen))
    return workdir, seen


def moment(number: int, expected: list[dict], seen: dict, attempt: int) -> dict:
    """When run `number` is killed.

    Args:
      expected: the lines of its log. seen: of the uninterrupted run.

    Returns:
      {'kind', 'line', 'seconds' to wait after so many lines stand in the log}, or in the place of
      the seconds 'entries' of the folder in which the 'stage' saves 'step'.
    """
    rng = np.random.default_rng([FLAGS.seed, number, attempt])
    kind, share = KINDS[number % len(KINDS)], rng.random()
    if kind == 'save':
        stage, step = seen['saves'][rng.integers(len(seen['saves']))]
        lines = [(line['stage'], line['step']) for line in expected]
        return {'kind': kind, 'line': lines.index((stage, step)) + 1, 'stage': stage, 'step': step,
                'entries': int(share * ENTRIES)}
    times = np.diff([0.0, *seen['lines']])  # before every line, and behind the last
    inside = np.array([False, *(a['stage'] == b['stage'] for a, b in pairwise(expected)), False])
    weights = np.where(inside == (kind == 'training'), times, 0)
    line = int(rng.choice(len(times), p=weights / weights.sum()))
    return {'kind': kind, 'line': line, 'seconds': share * float(times[line])}


def kill(workdir: Path, when: dict) -> bool:
    """Start a run and kill it; whether it had not ended before."""
    process, due = start(workdir), None
    for now, lines in follow(process, workdir):
        if lines < when['line']:
            continue
        if when['kind'] == 'save':
            stage, step = workdir / 'stages' / when['stage'], when['step']
            there = [sum(len(dirs) + len(files) for _, dirs, files in os.walk(stage / name))
                     for name in os.listdir(stage) if step in unfinished([name])]
            if (there and there[0] >= when['entries']) or (stage / str(step)).is_dir():
                break
        else:
            due = due or now + when['seconds']
            if now >= due or lines > when['line']:
                break
    process.kill()
    return process.wait() == -signal.SIGKILL


def run(number: int, reference: Path, seen: dict) -> dict:
    """One run, killed and taken up again, and what was found of it."""
    began = time.perf_counter()
    workdir = Path(FLAGS.workdir, f'run_{FLAGS.seed}_{number}')
    expected = log(reference)
    last = steps(expected)
    for attempt in range(5):
        shutil.rmtree(workdir, ignore_errors=True)
        when = moment(number, expected, seen, attempt)
        if not kill(workdir, when):
            continue
        before, left = log(workdir), folders(workdir)
        logged = steps(before)
        saved = {stage: max([int(n) for n in names if n.isdigit()], default=0)
                 for stage, names in left.items()}
        writing = {stage: unfinished(names) for stage, names in left.items() if unfinished(names)}
        at = before[-1]['stage'] if before else None
        where = ('save' if writing else 'between' if at is None or saved.get(at, 0) == last[at]
                 or when['kind'] == 'between' else 'training')
        if 'between' in (when['kind'], where) and when['kind'] != where:
            continue  # too late for what was drawn
        break
    else:
        sys.exit(f'run {number} missed its moment five times')
    events = set(workdir.glob('events/*/*'))
    status = start(workdir).wait()
    failed = {name: [] for name in PROPERTIES}
    if status:
        failed['resumed'].append(f'the second sitting left with status {status}')
    again = {}
    for stage, end in last.items():
        files = set((workdir / 'events' / stage).glob('*')) - events
        computed = sorted({step for file in files for step in written(file)})
        first = saved.get(stage, 0) + 1
        if computed != list(range(first, end + 1)):
            failed['resumed'].append(f'{stage}: steps {computed} after a checkpoint of '
                                     f'{first - 1}, to {end}')
        lost = logged.get(stage, 0) - (first - 1)
        if lost > 0:
            again[stage] = lost
            pending = logged[stage] // SAVE_EVERY * SAVE_EVERY >= first
            if lost > SAVE_EVERY * (1 + pending):
                failed['again'].append(f'{stage}: {lost}')
    if not status:
        failed |= compare(reference, workdir)
    wrong = {name: told for name, told in failed.items() if told}
    if not wrong:
        shutil.rmtree(workdir)
        Path(f'{workdir}.out').unlink()
    return {'seed': FLAGS.seed, 'run': number, 'moment': when, 'hit': where, 'stage': at,
            'logged': logged, 'saved': saved, 'writing': writing, 'again': again, 'failed': wrong,
            'seconds': time.perf_counter() - began, 'commit': commit(),
            'date': datetime.now(UTC).strftime('%Y-%m-%d')}


def compare(one: Path, two: Path) -> dict[str, list[str]]:
    """What differs between two finished runs, by property."""
    out = {'log': [], 'params': [], 'results': []}
    a, b = log(one), log(two)
    out['log'] += [f'line {i}' for i, (x, y) in enumerate(zip(a, b, strict=False), 1) if x != y]
    if len(a) != len(b):
        out['log'].append(f'{len(a)} lines and {len(b)}')
    kept = checkpoints(one)  # a kill may leave one more in the other, that was to be deleted
    for told, x, y in (('params', kept, checkpoints(two, set(kept))),
                       ('params', stored(one), stored(two)),
                       ('results', results(one), results(two))):
        out[told] += [name for name in sorted(x.keys() | y.keys()) if x.get(name) != y.get(name)]
    return out


def checkpoints(workdir: Path, wanted: set[str] | None = None) -> dict[str, str]:
    """{stage/step: digest of all its arrays, optimiser and all, and of what was noted with it}."""
    import jax
    from orbax.checkpoint import v1 as ocp

    out = {}
    for folder in sorted(path for path in workdir.glob('stages/*/*') if path.name.isdigit()):
        name = f'{folder.parent.name}/{folder.name}'
        if wanted is not None and name not in wanted:
            continue
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for path, x in
                ocp.checkpointables_metadata(folder).metadata['state'].items()}
        arrays = ocp.load_checkpointables(folder, {'state': like})['state']
        meta = json.loads((folder / 'meta.json').read_text())['meta']
        meta = {name: x for name, x in meta.items() if name not in ('seconds', 'spent')}
        digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
        for path, x in sorted(arrays.items()):
            digest.update(f'{path} {x.dtype} {x.shape} '.encode() + np.asarray(x).tobytes())
        out[name] = digest.hexdigest()
    return out


def stored(workdir: Path) -> dict[str, str]:
    """{file: digest} of the features a run leaves behind."""
    return {str(file.relative_to(workdir)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in workdir.glob('features/*/*')}


def results(workdir: Path) -> dict:
    """What results.json holds, but for when and how long."""
    found = json.loads((workdir / 'results.json').read_text())
    return {name: x for name, x in found.items() if name not in ('provenance', 'seconds', 'spent')}


def log(workdir: Path) -> list[dict]:
    """The whole lines of a run's log."""
    file = workdir / 'log.jsonl'
    text = file.read_text() if file.is_file() else ''
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]


def steps(lines: list[dict]) -> dict[str, int]:
    """{stage: its last step in these lines of a log}."""
    return {line['stage']: line['step'] for line in lines}


def written(file: Path) -> set[int]:
    """The training steps an event file tells of."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return {event.step for event in LegacyEventFileLoader(str(file)).Load()
            if any(value.tag == 'loss' for value in event.summary.value)}


def read() -> dict:
    """Finished runs {(seed, number): run}."""
    kept = json.loads(KEPT.read_text())['runs'] if KEPT.is_file() else []
    return {(one['seed'], one['run']): one for one in kept}


def show(runs: list[dict], console: Console) -> bool:
    """The table of finished runs; whether every property held."""
    table = Table(title='Killed by SIGKILL and started again, by where it hit', box=None,
                  title_justify='left')
    for head in ('hit', 'runs', 'steps again', 'most', *PROPERTIES):
        table.add_column(head, justify='left' if head == 'hit' else 'right', no_wrap=True)
    for hit in ('training', 'save', 'between'):
        own = [one for one in runs if one['hit'] == hit]
        again = [sum(one['again'].values()) for one in own]
        held = (f'{sum(name not in one["failed"] for one in own)}/{len(own)}'
                for name in PROPERTIES)
        table.add_row(hit, str(len(own)), str(sum(again)), str(max(again, default=0)), *held)
    console.print(table)
    places = Counter(one['stage'] or 'before the first' for one in runs)
    console.print('stage: ' + ', '.join(f'{n} {stage}' for stage, n in places.most_common()),
                  highlight=False)
    for one in runs:
        for name, told in one['failed'].items():
            console.print(f'FAILED run {one["run"]}, seed {one["seed"]}: {name}: {told[:5]}',
                          markup=False)
    return not any(one['failed'] for one in runs)


def main(argv):
    """Kill and resume what is missing, run by run; print all that is there."""
    del argv
    wanted = [(FLAGS.seed, number) for number in range(FLAGS.runs)]
    missing = [] if FLAGS.show else [key for key in wanted if key not in read()]
    if missing:
        import jax

        from tpad_jax.core import files as files_lib

        jax.config.update('jax_platforms', 'cpu')
        logging.set_verbosity(logging.WARNING)
        reference, seen = whole()
        for _, number in missing:
            one = run(number, reference, seen)
            print(f'run {number}: {one["moment"]} hit {one["hit"]} in {one["stage"]}, again '
                  f'{one["again"]}, failed {one["failed"]}, {one["seconds"]:.0f} s', flush=True)
            runs = read() | {(one['seed'], one['run']): one}
            files_lib.write_json(KEPT, {
                'machine': platform.machine(), 'cpus': os.cpu_count(), 'jax': jax.__version__,
                'save_every': SAVE_EVERY, 'runs': [runs[key] for key in sorted(runs)]})
    found = read()
    if not show([found[key] for key in wanted if key in found], Console(width=110)):
        sys.exit(1)


if __name__ == '__main__':
    flags.DEFINE_integer('runs', 50, 'how many')
    flags.DEFINE_integer('seed', 0, 'of the moments')
    flags.DEFINE_string('workdir', 'runs/faults', 'where the runs live')
    flags.DEFINE_bool('show', False, 'print what is there, run nothing')
    app.run(main)

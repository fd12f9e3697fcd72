"""Hosts that encode one catalogue together: `python -m benchmarks.hosts [--out FILE.json]`.

Each host is a process on this machine, and the processes share only a directory. The job is
configs/amazon.py:tiny with short stages and small parts, started by launch.py, and
`python -m tpad_jax.encode` helps it. First the run and then the helper is killed with SIGKILL once
a few parts of stage knowledge exist. The other process must finish both stores. The stores must
hold the same files, byte for byte, as those of one uninterrupted process.

The cost of leases is measured without a model in one process: the processor time of 200 parts of
1,920 rows of 2 x 64 numbers, in turns with the store of an earlier commit (`--before`).
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.checkout import ROOT, commit
from tpad_jax.features import store

FLAGS = flags.FLAGS
PARTS, ROWS, WIDTH = 200, 1920, (2, 64)
KILLED_AT = 3  # files of parts
OPTIONS = ('--config=configs/amazon.py:tiny', '--config.stages=knowledge,teach,transfer',
           '--config.stage.knowledge.steps=2', '--config.stage.teach.steps=2',
           '--config.stage.transfer.steps=2', '--config.stage.transfer.eval_every=0',
           '--config.stage.knowledge.eval_every=0', '--config.mllm.encode_rows=8',
           '--config.mllm.encode_part=8', '--config.baselines=', '--config.diagnostics=0',
           '--config.rivals={}', '--config.mllm.encode_lease=15')


def start(directory: Path, name: str, *command) -> subprocess.Popen:
    """Start a command of the package; its output is in DIRECTORY/NAME.out."""
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    with open(directory / f'{name}.out', 'a') as out:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=out,
                                stderr=out)


def launch(directory, name):
    """Start the job in DIRECTORY/NAME."""
    return start(directory, name, 'launch.py', *OPTIONS, f'--workdir={directory / name}')


def stores(workdir: Path) -> dict[str, bytes]:
    """Every file of the stores of a run."""
    return {str(file.relative_to(workdir)): file.read_bytes()
            for file in workdir.glob('features/*/*')}


def made(workdir, stage) -> int:
    """Number of the parts of a stage that exist."""
    return len(list((workdir / 'features' / stage).glob('[kr].[0-9]*.npy')))


def until(condition, process, seconds=900):
    """Wait for a condition, or for the process to end."""
    begun = time.monotonic()
    while not condition() and process.poll() is None:
        if time.monotonic() - begun > seconds:
            raise TimeoutError
        time.sleep(0.002)


def ended(process, directory, name, expected=0):
    """Wait for a process, and raise with its output if it did not end well."""
    if process.wait(900) != expected:
        raise RuntimeError((directory / f'{name}.out').read_text()[-3000:])


def together(directory: Path, name: str, killed: str) -> dict:
    """One run and one helper, of which `killed` is killed in stage knowledge."""
    workdir = directory / name
    run = launch(directory, name)
    until((workdir / 'config.json').is_file, run)
    helper = start(directory, f'{name}.helper', '-m', 'tpad_jax.encode', workdir)
    victim, other = (run, helper) if killed == 'run' else (helper, run)
    until(lambda: made(workdir, 'knowledge') >= KILLED_AT, run)
    if killed == 'helper':  # it begins later than the run, which rests until it holds a lease
        run.send_signal(signal.SIGSTOP)
        until(lambda: any(x.read_text().split()[1:2] == [str(helper.pid)] for x in
                          workdir.glob('features/knowledge/*.lease.partial') if x.exists()), helper)
    victim.kill()  # and is not waited for: to the other it may be alive, as a host that is lost
    parts = made(workdir, 'knowledge')
    os.kill(run.pid, signal.SIGCONT)
    if killed == 'run':
        until((workdir / 'features/knowledge/k.npy').is_file, other)
        run = launch(directory, name)  # trains stage transfer, and finds stage knowledge complete
        ended(run, directory, name)
        ended(helper, directory, f'{name}.helper')
    else:
        ended(run, directory, name)
    return {'killed': killed, 'parts_then': parts,
            'same': stores(workdir) == stores(directory / 'one')}


def timed(module, directory, **options) -> float:
    """Processor seconds in which a module's `fill` writes PARTS parts of ready rows."""
    ids = np.array_split(np.arange(1, 1 + PARTS * ROWS), PARTS)
    rows = {'k': np.ones((ROWS, *WIDTH), np.float32)}
    shutil.rmtree(directory, ignore_errors=True)
    begun = time.process_time()
    module.fill(directory, lambda numbers, *_: ((n, rows) for n in numbers), parts=ids,
                shapes={'k': WIDTH}, made_by={'k': {}}, **options)
    return time.process_time() - begun


def main(argv):
    """Kill, compare, time, print and write."""
    del argv
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        code = subprocess.run(['git', 'show', f'{FLAGS.before}:tpad_jax/features/store.py'],
                              cwd=ROOT, capture_output=True, text=True, check=True).stdout
        (directory / 'store_before.py').write_text(code)
        spec = importlib.util.spec_from_file_location('before', directory / 'store_before.py')
        before = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(before)
        seconds = {'before': [], 'leases': []}
        for _ in range(FLAGS.turns):
            seconds['before'].append(timed(before, directory / 'before'))
            seconds['leases'].append(timed(store, directory / 'leases'))
        record = {'commit': commit('tpad_jax'), 'parts': PARTS}
        if FLAGS.turns:
            best = {name: min(x) for name, x in seconds.items()}
            record |= {'processor_seconds': seconds, 'ratio': best['leases'] / best['before'],
                       'ms_per_part': 1e3 * (best['leases'] - best['before']) / PARTS}
            print(json.dumps(record))
        if FLAGS.kills:
            ended(launch(directory, 'one'), directory, 'one')
            record['kills'] = [together(directory, f'{killed}_killed', killed)
                               for killed in ('run', 'helper')]
            print(json.dumps(record['kills'], indent=1))
    if FLAGS.out:
        file = Path(FLAGS.out)
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | record, indent=1) + '\n')
    return 0 if all(kill['same'] for kill in record.get('kills', ())) else 1


if __name__ == '__main__':
    flags.DEFINE_string('out', '', 'File for the record; parts that did not run stay.')
    flags.DEFINE_string('before', '7f49730', 'Commit whose store has no leases.')
    flags.DEFINE_integer('turns', 3, 'How often each of the two stores is timed; 0: not.')
    flags.DEFINE_boolean('kills', True, 'Also run the job, and kill its processes.')
    app.run(main)

"""Tables by Apache Beam against those without it: `python -m benchmarks.prepare_beam`.

The raw files of `benchmarks.prepare`, odd lines included, are prepared in this order: without Beam;
by Beam's DirectRunner with two worker processes, which is killed (SIGKILL) when the first range of
items or users has been written; by the same command again. All files of the last two folders of
tables are then compared byte by byte. CPU seconds and memory are of all processes of a command;
memory is the peak of the largest one.

    --reviews=1000000 --items=200000   the size that is aimed at; flags are those of
                                       benchmarks.prepare
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.checkout import ROOT, commit
from benchmarks.prepare import generate
from tpad_jax.core import files
from tpad_jax.data.sources import amazon_tables

FLAGS = flags.FLAGS
EVENTS = 5_000_000  # of the last step alone
# the last step of either side, on integers: its peak of memory, in bytes per event above none
CUT = """
import re, sys
import numpy as np
import polars as pl
from tpad_jax.data import sessions
def peak():  # of getrusage it would be that of the process before it became this one
    return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024
begun, count = peak(), int(sys.argv[1])
rng = np.random.default_rng(0)
events = pl.DataFrame({'user': np.sort(rng.integers(0, count // 5, count)),
                       'item': rng.integers(1, count // 10, count, np.int32),
                       'time': rng.integers(1_600_000_000, 1_600_500_000, count)})
train, _, _ = sessions.split(sessions.cut(events, gap_seconds=86400, seed=0), 0.1, 0.1)
sessions.k_core(train, 5)
sessions.time_ties(events, gap_seconds=86400)
print((peak() - begun) / count)
"""
BEAM = ('--runner=DirectRunner', '--beam_option=direct_running_mode=multi_processing')

flags.DEFINE_integer('workers', 2, 'processes of Beam', lower_bound=1)


def prepare(folder: Path, tables: Path, *options: str, kill: bool = False) -> dict:
    """Run the command, to its end or until it has written a range.

    Args:
      folder: of raw files.
      tables: to write.
      *options: of the command.
      kill: whether to kill it.
    """
    begun = time.perf_counter()
    with tables.with_suffix('.log').open('ab') as log:
        process = subprocess.Popen(
            [sys.executable, '-m', 'tpad_jax.data.prepare', folder, tables, *options], cwd=ROOT,
            env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=log, stderr=log)
        while kill and process.poll() is None:
            if any((tables / amazon_tables.Amazon.name).glob('*/*.arrow')):
                process.kill()
            time.sleep(0.02)
        _, status, usage = os.wait4(process.pid, 0) if not kill else (0, process.wait(), None)
    if usage is None:
        return {'status': status}
    assert status == 0, tables.with_suffix('.log').read_text()[-2000:]
    return {'seconds': time.perf_counter() - begun, 'cpu': usage.ru_utime + usage.ru_stime,
            'peak': usage.ru_maxrss * 1024}


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob('*') if path.is_file()}


def measure(folder: Path) -> dict:
    """Prepare the files of FLAGS three times and compare.

    Args:
      folder: empty; takes the files.
    """
    size = generate(folder / 'raw', FLAGS.reviews, FLAGS.items, FLAGS.gz)
    beam = (*BEAM, f'--beam_option=direct_num_workers={FLAGS.workers}')
    sides = {'without Beam': prepare(folder / 'raw', folder / 'alone')}
    killed = prepare(folder / 'raw', folder / 'beam', *beam, kill=True)
    left = {str(path.relative_to(folder / 'beam')) for path in (folder / 'beam').rglob('*')
            if path.suffix != '.arrow'}
    sides[f'DirectRunner, {FLAGS.workers} processes'] = prepare(
        folder / 'raw', folder / 'beam', *beam)
    cut = subprocess.run([sys.executable, '-c', CUT, str(EVENTS)], cwd=ROOT, check=True,
                         env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE)
    alone, beamed = (tree(folder / name) for name in ('alone', 'beam'))
    return {'commit': commit(), 'reviews': FLAGS.reviews, 'items': FLAGS.items, 'bytes': size,
            'packed': FLAGS.gz, 'cores': len(os.sched_getaffinity(0)), 'sides': sides,
            'cut_bytes_per_event': float(cut.stdout), 'files': len(alone), 'equal': alone == beamed,
            'killed': killed['status'] == -signal.SIGKILL,
            'table_after_kill': any('.array_record' in name or name == amazon_tables.FINISHED
                                    for name in left)}


def main(_) -> None:
    """Measure, print the table and write JSON."""
    with tempfile.TemporaryDirectory() as place:
        record = measure(Path(place) / 'files')
    table = Table('', 'seconds', 'CPU seconds', 'peak of a process, MB',
                  title=f'{record["reviews"]:,} reviews, {record["items"]:,} items, '
                        f'{record["bytes"] / 1e6:,.0f} MB')
    for name, side in record['sides'].items():
        table.add_row(name, f'{side["seconds"]:.1f}', f'{side["cpu"]:.1f}',
                      f'{side["peak"] / 1e6:.0f}')
    Console().print(table)
    print(f'{record["files"]} files equal: {record["equal"]}; killed midway: {record["killed"]}, '
          f'table there after it: {record["table_after_kill"]}')
    print(f'bytes of memory per event when sessions are cut: {record["cut_bytes_per_event"]:.0f}')
    if FLAGS.out:
        files.write_json(FLAGS.out, record)


if __name__ == '__main__':
    app.run(main)

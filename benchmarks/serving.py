"""Sessions by the million through `python -m tpad_jax.recommend`: speed, memory, exactness.

    python -m benchmarks.serving --run=runs/amazon
    python -m benchmarks.serving --run=runs/amazon --sessions=1000000 --items=100000 --json=FILE

The run's recommender is given a catalogue of `--items` items: its own, and behind them others whose
vectors are drawn around its own. A process of its own reads `--sessions` sessions from a JSONL file
and writes their first 20; its memory is looked at every second. Then the lists of 500 of the
sessions are compared with the order of all scores, each computed by itself in float64.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.checkout import ROOT, commit

K, CHECKED = 20, 500


def enlarged(run, directory, items):
    """A copy of what a run is served from, with a catalogue of `items` items and the same model."""
    import polars as pl
    from safetensors.numpy import load_file, save_file

    from tpad_jax.core import files
    from tpad_jax.serving import artifact

    shutil.copytree(run / artifact.FOLDER, directory / artifact.FOLDER)
    for name in ('config.json', 'results.json'):
        shutil.copy(run / name, directory)
    folder = directory / artifact.FOLDER
    about = json.loads((folder / artifact.ABOUT).read_text())
    arrays, table = load_file(folder / artifact.MODEL), pl.read_parquet(folder / artifact.ITEMS)
    rng, own = np.random.default_rng(0), about['items']
    drawn = rng.integers(1, own + 1, items - own)
    z = arrays['z'][drawn] + 0.05 * rng.normal(size=(len(drawn), arrays['z'].shape[1]))
    norm = np.linalg.norm(arrays['z'][drawn], axis=1, keepdims=True)
    z = (z * norm / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    arrays['z'] = np.concatenate([arrays['z'], z])
    arrays['events'] = np.pad(arrays['events'], (0, len(drawn)))
    save_file(arrays, folder / artifact.MODEL)
    more = [f'N{n:09d}' for n in range(len(drawn))]
    # brand, category and price are those of the items that they are drawn from
    pl.concat([table, table[drawn - 1].with_columns(item_id=pl.Series(more), title=pl.Series(more))
               ]).write_parquet(folder / artifact.ITEMS)
    about['items'] = items
    about['digests'] = {name: files.sha256(folder / name) for name in about['digests']}
    (folder / artifact.ABOUT).write_text(json.dumps(about))


def write_sessions(file, ids, count, longest):
    """Sessions of 1 to `longest` items, drawn with the first items more often than the last."""
    rng = np.random.default_rng(1)
    with file.open('w') as out:
        for begin in range(0, count, 10_000):
            size = min(10_000, count - begin)
            lengths = rng.integers(1, longest + 1, size)
            items = (len(ids) * rng.random((size, longest)) ** 2).astype(int)
            for row, length in zip(items.tolist(), lengths.tolist(), strict=True):
                out.write(json.dumps({'session': [ids[n] for n in row[:length]]}) + '\n')


def watched(command, every=1.0):
    """Run a command -> (seconds, [(second, MiB resident)])."""
    begun, found = time.monotonic(), []
    with subprocess.Popen(command, cwd=ROOT) as process:
        own = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                found.append((round(time.monotonic() - begun, 1),
                              round(own.memory_info().rss / 2**20, 1)))
            except psutil.NoSuchProcess:
                break
            time.sleep(every)
    if process.returncode:
        sys.exit(process.returncode)
    return time.monotonic() - begun, found


def differing(directory, sessions, answers):
    """How many lists of the first CHECKED sessions are not the order of all scores, by float64.

    Where two of the scores are within 1e-5 of each other, float32 may order them either way.
    """
    import tpad_jax

    shop = tpad_jax.load(directory)
    with sessions.open() as file:
        asked = [json.loads(next(file))['session'] for _ in range(CHECKED)]
    with answers.open() as file:
        found = [json.loads(next(file))['items'] for _ in range(CHECKED)]
    scores = shop.embed_sessions(asked).astype(np.float64) @ shop.embed_items().astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind='stable')[:, :K]
    number = {name: n - 1 for n, name in enumerate(shop.ids)}
    wrong = close = 0
    for row, (names, best) in enumerate(zip(found, order, strict=True)):
        own = np.array([number[name] for name in names])
        if not np.array_equal(own, best):
            apart = np.abs(scores[row, own] - scores[row, best]).max()
            close, wrong = close + (apart <= 1e-5), wrong + (apart > 1e-5)
    return {'lists': len(found), 'wrong': wrong, 'order of scores within 1e-5 differs': int(close)}


def main():
    """Measure, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--run', type=Path, required=True, help='workdir of a finished run')
    parser.add_argument('--sessions', type=int, default=20_000)
    parser.add_argument('--items', type=int, default=100_000)
    parser.add_argument('--json', type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        enlarged(given.run, scratch, given.items)
        import tpad_jax

        shop = tpad_jax.load(scratch)
        file, answers = scratch / 'sessions.jsonl', scratch / 'answers.jsonl'
        write_sessions(file, shop.ids[1:], given.sessions, shop.max_length)
        load = os.getloadavg()[0]
        seconds, memory = watched([sys.executable, '-m', 'tpad_jax.recommend', str(scratch),
                                   '--sessions', str(file), '--k', str(K), '--out', str(answers)])
        found = differing(scratch, file, answers)
    tenth = max(1, len(memory) // 10)
    early, late = (max(mib for _, mib in part) for part in
                   (memory[tenth:2 * tenth] or memory, memory[-tenth:]))
    out = {'commit': commit('tpad_jax'), 'date': datetime.date.today().isoformat(),
           'machine': f'{platform.machine()}, {os.cpu_count()} cores',
           'load average': [round(load, 1), round(os.getloadavg()[0], 1)],
           'sessions': given.sessions, 'items': given.items, 'k': K, 'seconds': round(seconds, 1),
           'sessions per second': round(given.sessions / seconds, 1),
           'MiB in the second tenth': early, 'MiB in the last tenth': late, 'exact': found,
           'memory': memory[::max(1, len(memory) // 100)]}
    for name, value in out.items():
        if name != 'memory':
            print(f'{name:<26} {value}')
    if given.json is not None:
        given.json.write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    main()

"""What `python -m tpad_jax.export` writes, used without this package; and approximate lists.

    python -m benchmarks.exported --run=runs/amazon --json=FILE

The run's artefact is loaded in a new virtual environment that holds jax and flatbuffers alone, and
its lists of the first test sessions are compared with the run's own. Then, in a catalogue of
`--items` items (see benchmarks/serving.py), the first 20 by faiss' graph are compared with the
exact ones: recall, and sessions per second of each.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy as np

from benchmarks import serving
from benchmarks.checkout import commit

K, ASKED, ROWS = 20, 512, 64
LISTS = '''
import sys
rows = np.array(json.load(sys.stdin), np.int32)
found = [recommend(weights, part)[1].tolist() for part in rows.reshape(-1, *{shape})]
print(json.dumps(sum(found, [])))
'''


def rows_of(shop, count):
    """Item numbers int32 [count, N] of sessions that are drawn, as benchmarks/serving.py does."""
    rng = np.random.default_rng(2)
    rows = 1 + (shop.trained * rng.random((count, shop.max_length)) ** 2).astype(np.int32)
    rows[np.arange(shop.max_length) >= rng.integers(1, shop.max_length + 1, (count, 1))] = 0
    return rows


def alone(shop, run, scratch):
    """Lists that differ between the run and its artefact in an environment of its own."""
    out = scratch / 'export'
    subprocess.run([sys.executable, '-m', 'tpad_jax.export', str(run), str(out), '--k', str(K),
                    '--rows', str(ROWS)], check=True, stdout=subprocess.DEVNULL)
    venv.create(scratch / 'venv', with_pip=True)
    python = scratch / 'venv' / 'bin' / 'python'
    subprocess.run([python, '-m', 'pip', 'install', '-q', 'jax', 'flatbuffers'], check=True,
                   stderr=subprocess.DEVNULL)
    held = subprocess.run([python, '-m', 'pip', 'list', '--format=freeze'], check=True, text=True,
                          capture_output=True).stdout.split()
    code = re.search(r'```python\n(.*?)```', (out / 'README.md').read_text(), re.S)[1]
    rows = rows_of(shop, ASKED)
    done = subprocess.run([python, '-c', code + LISTS.format(shape=(ROWS, shop.max_length))],
                          cwd=out, input=json.dumps(rows.tolist()), text=True, check=True,
                          capture_output=True)
    found = np.array(json.loads(done.stdout.splitlines()[-1]))
    return {'packages': held, 'lists': ASKED,
            'differ': int((found != shop.first(rows, K)[0]).any(axis=1).sum())}


def approximate(shop):
    """Recall of the graph, and sessions per second of both."""
    from tpad_jax.serving import ann

    begun = time.perf_counter()
    index = ann.build(shop.embed_items())
    built, out = time.perf_counter() - begun, []
    rows = rows_of(shop, ASKED)
    h = shop.embed_sessions([[shop.ids[n] for n in row if n] for row in rows.tolist()])
    shop.first(rows, K)
    begun = time.perf_counter()
    exact, _ = shop.first(rows, K)
    speed = ASKED / (time.perf_counter() - begun)
    for looked in (32, 64, 128, ann.SEARCH):
        index.hnsw.efSearch = looked
        begun = time.perf_counter()
        found, _ = ann.search(index, h, K)
        out.append({'looked at': looked, 'recall@20': round(ann.recall(found, exact), 4),
                    'sessions per second': round(ASKED / (time.perf_counter() - begun))})
    return {'items': shop.trained, 'seconds to build': round(built, 1),
            'exact sessions per second, the encoder among them': round(speed), 'graph': out}


def main():
    """Measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--run', type=Path, required=True, help='workdir of a finished run')
    parser.add_argument('--items', type=int, default=100_000)
    parser.add_argument('--json', type=Path)
    given = parser.parse_args()
    import tpad_jax

    out = {'commit': commit('tpad_jax'), 'date': datetime.date.today().isoformat(),
           'machine': f'{platform.machine()}, {os.cpu_count()} cores',
           'load average': round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        out['jax alone'] = alone(tpad_jax.load(given.run), given.run.resolve(), scratch)
        (scratch / 'large').mkdir()
        serving.enlarged(given.run, scratch / 'large', given.items)
        out['approximate'] = approximate(tpad_jax.load(scratch / 'large'))
    print(json.dumps(out, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    main()

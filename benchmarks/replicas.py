"""The same twenty steps, however they are spread: `python -m benchmarks.replicas`.

Every stage of the smallest TPAD, dropout on, plain SGD, so that a gradient that is N times too
large shows: on one device; on eight by pmap and by shard_map; on 4 x 2 and 2 x 4, a part of the
MLLM on each of the second axis; on one that reads its rows in four parts; in two processes of four
devices each. Beside each: the largest difference to one device of what is logged in any step
(relative above 1) and of any parameter at the end, and how far the parameters had gone. Leaves with
1 where a parameter differs by more than 1e-5 or none went 1e-2. tests/test_step.py and
tests/test_processes.py hold the same to it, but for what compiles longest.
"""

import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.checkout import ROOT, commit

sys.path.insert(0, str(ROOT / 'tests'))
import conftest  # eight fake devices and a quick compiler, before jax
import jax
import numpy as np
from absl import app, logging
from rich.console import Console
from rich.table import Table
from test_processes import together
from tiny_stages import STAGES, STEPS, WAYS, Run, model

from tpad_jax import writers

assert conftest.FLAGS[0] in os.environ['XLA_FLAGS']
KEPT = Path(__file__).with_suffix('.json')
MOST, LEAST = 1e-5, 1e-2


def differences(one: Run, metrics: dict, params: dict, rows: dict) -> dict[str, float]:
    """Of what another way of computing `one` logged and left."""
    assert metrics.keys() == one.metrics.keys() == set(range(1, STEPS + 1))
    logged = [(value, metrics[step][name]) for step, values in one.metrics.items()
              for name, value in values.items()]
    left = [(x, params[path]) for path, x in one.params.items()]
    left += [(x, rows[name]) for name, x in one.rows.items()]
    left = [tuple(map(np.asarray, both)) for both in left]  # from wherever they lie
    moved = [np.abs(x - model()[1][path]).max() for path, x in one.params.items()]
    # numpy's maximum of a nan is one, and is above every bar
    return {'logged': float(np.max([abs(a - b) / max(1.0, abs(a)) for a, b in logged])),
            'parameters': float(np.max([np.abs(a - b).max() for a, b in left])),
            'moved': float(np.max(moved))}


def main(argv):
    """Run every stage every way, print and write."""
    del argv
    logging.set_verbosity(logging.WARNING)
    cells, table = [], Table('stage', 'way', 'logged', 'parameters', 'moved')
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / 'pair').mkdir()
        pair = together(folder / 'pair', *STAGES)
        for stage in STAGES:
            one = Run(stage, 'jit', folder / stage)
            found = {way: Run(stage, way, folder / f'{stage}-{way}')
                     for way in WAYS if way not in ('jit', 'processes')}
            found = {way: (run.metrics, run.params, run.rows) for way, run in found.items()}
            found |= {f'process {i}': process[stage][:3] for i, process in enumerate(pair)}
            for way, values in found.items():
                cell = {'stage': stage, 'way': way, **differences(one, *values)}
                cells.append(cell)
                table.add_row(stage, way, *(f'{cell[n]:.1e}'
                                            for n in ('logged', 'parameters', 'moved')))
                print(cell, flush=True)
            jax.clear_caches()
    Console(width=100).print(table)
    writers.write_json(KEPT, {
        'commit': commit(), 'date': datetime.now(UTC).strftime('%Y-%m-%d'),
        'machine': platform.machine(), 'cpus': os.cpu_count(), 'jax': jax.__version__,
        'cells': cells})
    if not all(c['parameters'] <= MOST and c['moved'] >= LEAST for c in cells):
        sys.exit(1)


if __name__ == '__main__':
    app.run(main)

"""The same twenty steps, however they are spread: `python -m benchmarks.replicas`.

Every stage of the smallest TPAD, dropout on, plain SGD, so that a gradient that is N times too
large shows: on one device; on eight by pmap and by shard_map; on 4 x 2 and 2 x 4, a part of the
MLLM on each of the second axis; on one that reads its rows in four parts; in two processes of four
devices each. Beside each: the largest difference to one device of what is logged in any step
(as a share of 1 and the value) and of any parameter at the end, and how far the parameters had
gone. Leaves with 1 where either is above 1e-5 or no parameter went 1e-2.
tests/training/test_step.py and tests/distributed/test_hosts.py hold all but
what compiles longest to the same.
"""

import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.checkout import ROOT, commit

sys.path.insert(0, str(ROOT / 'tests'))
from tests.eight_devices import environment

os.environ.update(environment())
import jax
from absl import app, logging
from rich.console import Console
from rich.table import Table

from tests.distributed.test_hosts import together
from tests.tiny_stages import STAGES, WAYS, Run, agree, differences
from tpad_jax.core import files

KEPT = Path(__file__).with_suffix('.json')


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
            found = {way: (run.metrics, run.params, run.rows, run.traces)
                     for way, run in found.items()}
            found |= {f'process {i}': process[stage] for i, process in enumerate(pair)}
            for way, values in found.items():
                cell = {'stage': stage, 'way': way, **differences(one, *values)}
                cells.append(cell)
                table.add_row(stage, way, f'{cell["logged"][0]:.1e}', f'{cell["left"][0]:.1e}',
                              f'{cell["moved"]:.1e}')
                print(cell, flush=True)
            jax.clear_caches()
    Console(width=100).print(table)
    files.write_json(KEPT, {
        'commit': commit(), 'date': datetime.now(UTC).strftime('%Y-%m-%d'),
        'machine': platform.machine(), 'cpus': os.cpu_count(), 'jax': jax.__version__,
        'cells': cells})
    if not all(map(agree, cells)):
        sys.exit(1)


if __name__ == '__main__':
    app.run(main)

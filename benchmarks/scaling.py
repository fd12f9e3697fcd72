"""Step time and traffic over devices at fixed work on each: `python -m benchmarks.scaling`.

The recommend and the transfer step of the default model on the planted catalogue, on 1, 2, 4 and 8
devices with 16 rows each. Where devices are faked on a CPU they share its cores, so time per device
is shown beside time per step; it says what spreading costs and nothing of real devices. What a
device's part in each collective is, in bytes (of what it adds up or scatters, of what it gets to
see), is read from the compiled program. It stands beside what the algorithm cannot do without: the
gradient of every trained parameter once, and of the features that losses compare over the whole
batch what is gathered on the way there and scattered on the way back. Each cell is written to
`benchmarks/scaling.json` and is not measured again at the same commit.
"""

import json
import math
import os
import platform
import re
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '')
                           + ' --xla_force_host_platform_device_count=8').strip()

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, logging
from rich.console import Console

from benchmarks.checkout import commit
from tpad_jax import config as base
from tpad_jax.core import files
from tpad_jax.data import batches
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.job.job import Job
from tpad_jax.training import step as step_lib
from tpad_jax.types import State

KEPT = Path(__file__).with_suffix('.json')
COUNTS, ROWS, STAGES = (1, 2, 4, 8), 16, ('recommend', 'transfer')
KINDS = 'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute'
SIZES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4}
LINE = ('{stage:10} {devices} devices  {milliseconds:8.1f} ms a step, {each:7.1f} per device   kB: '
        '{moved}   needed: {needed}   {ratio}')


def moved(text: str, count: int) -> dict[str, int]:
    """Bytes of a device in the collectives of a program compiled for `count`, {kind: bytes}."""
    found = {}
    for line in text.splitlines():
        match = re.search(rf'= (.+?) ({"|".join(KINDS)})(-start)?\(', line)
        if match:
            size = sum(SIZES[kind] * math.prod(int(n) for n in shape.split(',') if n)
                       for kind, shape in re.findall(r'(\w+)\[([\d,]*)\]', match[1]))
            size *= count if match[2] == 'reduce-scatter' else 1  # a part of what went in comes out
            found[match[2]] = found.get(match[2], 0) + size
    return found


def needed(stage: str, state: State, model, rows: int, positions: int) -> dict[str, int]:
    """Bytes that the algorithm needs, see above; `rows`: of all devices."""
    out = {'all-reduce': sum(x.nbytes for x in state.params.values())}
    if stage == 'transfer':  # a float32 of each for every position of the batch
        wide, width = model.club.hidden, dict(model.critics)['align'].width
        compared = 2 * width + 2 * wide + 2 * wide + 1  # both critics, both clouds, q's factors
        out['all-gather'] = out['reduce-scatter'] = 4 * rows * positions * compared
    return out


def prepare(folder) -> Job:
    """The model in the paper's form, not trained, and its data."""
    job = Job(base.get_config(), Path(folder), lambda: False)
    job.build(STAGES, Console(quiet=True))
    rng = np.random.default_rng(0)
    for name, shape in (('k', (2, 64)), ('r', (128,))):
        rows = rng.normal(size=(job.data.num_items + 1, *shape))
        job.catalogue[name] = jnp.asarray(rows, jnp.float32)
    return job


def measure(job: Job, stage: str, count: int, turns: int = 7) -> dict:
    """One cell of the table."""
    config, devices = job.config, devices_lib.choose('jit' if count == 1 else 'shard_map', count)
    spec = step_lib.make_spec(config, stage, job.spec, config.seed)
    state = step_lib.start(spec, jax.tree.map(jnp.copy, job.params), config.stage[stage].train)
    drawn = batches.session_batches(
        job.data, content=job.content if stage == 'transfer' else None, batch_size=ROWS * count,
        max_length=job.max_length, every_prefix=config.stage[stage].every_prefix, seed=0,
        shards=count, steps=config.stage[stage].steps)
    batch, catalogue = devices.place(next(drawn)), devices.share(job.catalogue)
    drawn.close()
    wanted = needed(stage, state, job.spec, ROWS * count, job.max_length) if count > 1 else {}
    state = devices.share(state)
    step = devices.lift(partial(step_lib.train_step, spec=spec)).lower(
        state, batch, catalogue).compile()
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch, catalogue))
        times.append(1e3 * (time.perf_counter() - began))
    spent = float(np.median(times[1:]))
    return {'stage': stage, 'devices': count, 'rows': ROWS * count, 'milliseconds': spent,
            'each': spent / count, 'moved': moved(step.as_text(), count), 'needed': wanted}


def shown(cell: dict) -> str:
    """A cell as a line of the table."""
    words = {key: ', '.join(f'{kind} {size / 1e3:.0f}' for kind, size in cell[key].items()) or '-'
             for key in ('moved', 'needed')}
    least = sum(cell['needed'].values())
    ratio = f'{sum(cell["moved"].values()) / least:.3f} of it' if least else ''
    return LINE.format(**{**cell, **words, 'ratio': ratio})


def main(argv):
    """Measure what is not there yet, print and write, cell by cell."""
    del argv
    logging.set_verbosity(logging.WARNING)
    about = {'commit': commit(), 'date': datetime.now(UTC).strftime('%Y-%m-%d'),
             'machine': platform.machine(), 'cpus': os.cpu_count(), 'jax': jax.__version__}
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    cells = kept['cells'] if kept.get('commit') == about['commit'] else []
    with tempfile.TemporaryDirectory() as folder:
        job = None
        for stage in STAGES:
            for count in COUNTS:
                cell = next((c for c in cells if (c['stage'], c['devices']) == (stage, count)),
                            None)
                if cell is None:
                    job = job or prepare(folder)
                    cell = measure(job, stage, count)
                    cells.append(cell)
                    files.write_json(KEPT, about | {'cells': cells})
                print(shown(cell), flush=True)


if __name__ == '__main__':
    app.run(main)

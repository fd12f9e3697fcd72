"""One training step over 10,000 to 10,000,000 items: `python -m benchmarks.catalogue`.

Looks up a prefix in the item table, takes its softmax loss over the catalogue (whole, in chunks, in
chunks of bfloat16, or over samples) and updates the table by AdamW: width 128, batch 512. Every
cell has a process of its own; its memory is its highest resident size less that of jax at rest, its
seconds the median of the steps after the first two.

Beside what is measured stands what the compiler plans (arguments, results and temporaries), and ten
million items are calculated only: memory as planned, seconds as ten times those of a million. Both
rules can be checked on the measured cells of the same table. Writes `benchmarks/catalogue.json`.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from absl import app, flags
from rich.console import Console
from rich.table import Table

FLAGS = flags.FLAGS
HERE = Path(__file__).parent
WIDTH, BATCH, PREFIX = 128, 512, 10
FORMS = {  # function of tpad_jax.losses and its keywords
    'whole': ('next_item', {}),
    'chunked': ('next_item', {'chunk': 4096}),
    'chunked bfloat16': ('next_item', {'chunk': 4096, 'dtype': 'bfloat16'}),
    'sampled': ('sampled_next_item', {'samples': 8192}),
}
MEASURED, CALCULATED = (10_000, 100_000, 1_000_000), 10_000_000


def peak():
    """Highest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cell(items: int, form: str, steps: int) -> dict:
    """One cell, in this process: what is planned, and what `steps` steps took (0: none is run)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from tpad_jax import losses
    from tpad_jax.distributed import devices
    from tpad_jax.nn.gather import take

    name, keywords = FORMS[form]
    loss = partial(getattr(losses, name), **keywords)
    tx = optax.adamw(1e-3)

    def step(table, moments, number, prefix, target, catalogue):
        extra = {'key': jax.random.fold_in(jax.random.key(0), number)} if 'sampled' in form else {}

        def objective(table):
            whole, rows = take(table, prefix)
            out = {'h': rows.mean(axis=1), 'z': whole, 'repeat': None, **catalogue}
            return loss(out, SimpleNamespace(target=target), **extra).mean()

        value, slope = jax.value_and_grad(objective)(table)
        updates, moments = tx.update(slope, moments, table)
        return optax.apply_updates(table, updates), moments, number + 1, value

    make = devices.compiled(lambda key: 0.1 * jax.random.normal(key, (items + 1, WIDTH)))
    shape = jax.eval_shape(make, jax.random.key(0))
    ids = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((BATCH, PREFIX), (BATCH,))]
    catalogue = {'warm': np.arange(items + 1) > 0, 'popularity': np.ones(items + 1, np.float32)}
    run = devices.compiled(step, donate_argnums=(0, 1, 2)).lower(
        shape, jax.eval_shape(tx.init, shape), jax.ShapeDtypeStruct((), jnp.int32), *ids,
        catalogue).compile()
    plan = run.memory_analysis()
    found = {'items': items, 'form': form, 'planned_bytes': (
        plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes)}
    if not steps:
        return found
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, items + 1, x.shape).astype(np.int32) for x in ids]
    before = peak()
    table, catalogue = make(jax.random.key(0)), jax.device_put(catalogue)
    state = table, jax.jit(tx.init)(table), jnp.int32(0)
    del table
    wall, busy = [], []
    for _ in range(steps + 2):
        begun = time.perf_counter(), time.process_time()
        *state, value = jax.block_until_ready(run(*state, *ids, catalogue))
        wall.append(time.perf_counter() - begun[0])
        busy.append(time.process_time() - begun[1])
    assert np.isfinite(float(value))
    return found | {'bytes': peak() - before, 'seconds': statistics.median(wall[2:]),
                    'cpu_seconds': statistics.median(busy[2:]), 'steps': steps}


def apart(items: int, form: str, steps: int) -> dict:
    """`cell` in a process of its own."""
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.catalogue', f'--items={items}', f'--form={form}',
         f'--steps={steps}'], cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    return json.loads(done.stdout.splitlines()[-1])


def show(cells: list[dict]) -> Table:
    """The cells as a table; calculated figures carry a tilde."""
    table = Table(title=f'one training step, width {WIDTH}, batch {BATCH}', title_justify='left',
                  box=None)
    for column in ('items', 'softmax', 'memory GB', 'planned GB', 's per step', 'CPU s per step'):
        table.add_column(column, justify='left' if column == 'softmax' else 'right')
    for c in cells:
        guess = '' if 'bytes' in c else '~'
        memory = c.get('bytes', c['planned_bytes'])
        table.add_row(f'{c["items"]:,}', c['form'], f'{guess}{memory / 1e9:.2f}',
                      f'{c["planned_bytes"] / 1e9:.2f}', f'{guess}{c["seconds"]:.3f}',
                      f'{guess}{c["cpu_seconds"]:.3f}')
    return table


def main(argv):
    """Measure a cell, or all of them; print the table and write the JSON."""
    del argv
    if FLAGS.form:
        print(json.dumps(cell(FLAGS.items, FLAGS.form, FLAGS.steps)))
        return
    cells = []
    for items in MEASURED:
        cells += [apart(items, form, FLAGS.steps) for form in FORMS]
        print(f'{items:,} items done', file=sys.stderr)
    for c in cells[-len(FORMS):]:
        planned = apart(CALCULATED, c['form'], 0)
        cells.append(planned | {n: c[n] * CALCULATED / MEASURED[-1]
                                for n in ('seconds', 'cpu_seconds')})
    Console(width=100).print(show(cells))
    million = {c['form']: c for c in cells if c['items'] == MEASURED[-1]}
    said = (f'{n} {c["bytes"] / 1e9:.2f} GB and {c["seconds"]:.2f} s' for n, c in million.items())
    print('1M items, width 128, batch 512 on CPU, one training step:', ', '.join(said))
    about = {'cores': os.cpu_count(), 'load': os.getloadavg()[0],
             'date': datetime.now(UTC).date().isoformat()}
    (HERE / 'catalogue.json').write_text(json.dumps({**about, 'cells': cells}, indent=1) + '\n')


if __name__ == '__main__':
    flags.DEFINE_integer('items', 10_000, 'of the one cell that --form names')
    flags.DEFINE_enum('form', None, list(FORMS), 'measure this cell alone and print it as JSON')
    flags.DEFINE_integer('steps', 3, 'measured steps per cell', lower_bound=0)
    app.run(main)

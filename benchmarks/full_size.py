"""The joint step at full size, run on one device at hand: `python -m benchmarks.full_size`.

Qwen3-VL-2B's sizes in bfloat16 under three adapters and a catalogue of 100,000 items, all losses of
stage joint, on random parameters and random content: what `benchmarks.tpu_compile` compiles for
TPUs, here taken for real. Prints and writes to full_size.json what compiling took, the compiler's
memory, peak use beside `tpad_jax.job.memory_plan`'s sums, seconds a step, the operations of
its products and their share of the device's peak. `--small` is a model that a CPU can run, to try
this out; nothing is written then.
"""

import json
import math
import os
import platform
import time
import zlib
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import tpu_compile
from benchmarks.checkout import commit
from tpad_jax.job.memory_plan import gib
from tpad_jax.training import loop, profiling

FLAGS = flags.FLAGS
FILE = Path(__file__).with_suffix('.json')
SPREAD = 0.02  # standard deviation of random kernels


def filled(tree):
    """Arrays for shapes: kernels random, scales one, the rest 0."""
    def one(path, x):
        name = jax.tree_util.keystr(path)
        if name.endswith(("scale']", "weight']")) or x.dtype == bool:
            return jnp.ones(x.shape, x.dtype)
        if not jnp.issubdtype(x.dtype, jnp.floating) or 'opt_state' in name:
            return jnp.zeros(x.shape, x.dtype)
        key = jax.random.key(zlib.crc32(name.encode()))  # the same in every process
        return (SPREAD * jax.random.normal(key, x.shape)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(lambda path, x: jax.jit(partial(one, path, x))(), tree)


def drawn(batch, items: int, vocab: int):
    """A batch of random sessions, all of full length, and random content."""
    rng = np.random.default_rng(0)
    seen = len(batch.ids)
    limits = dict(items=(1, items), next=(1, items), target=(1, items), ids=(1, items),
                  slots=(1, seen), next_slots=(1, seen), tokens=(0, vocab), image=(0, 256),
                  valid=(1, 2), has_image=(1, 2), row=(0, items))
    return jax.tree.map(jnp.asarray, batch.replace(**{
        name: rng.integers(*limits[name], x.shape).astype(x.dtype)
        for name, x in vars(batch).items() if x is not None}))


def measure(rows: int, chunk: int, remat: str, small: bool) -> dict:
    """One cell."""
    changes = {'model_shards': 1, 'mllm.chunk': chunk, 'mllm.remat': remat,
               'stage.joint.batch_size': rows}
    step, arguments, planned, spec = tpu_compile.parts(
        jax.local_devices()[:1], changes, FLAGS.items, small, 'jit')
    state, batch, shared = arguments
    counted = profiling.operations(partial(loop.lean_step, spec=spec, axis=None), *arguments)
    begun = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    seconds, memory = time.perf_counter() - begun, compiled.memory_analysis()
    state, shared = filled(state), filled(shared)
    batch = drawn(batch, FLAGS.items, 1000)
    held = sum(x.nbytes for x in jax.tree.leaves((state, batch, shared)))
    times = []
    for _ in range(FLAGS.steps + 1):
        begun = time.perf_counter()
        state, logged = jax.block_until_ready(compiled(state, batch, shared))
        times.append(time.perf_counter() - begun)
    each = float(np.median(times[1:]))
    losses = {name: float(x) for name, x in logged.items() if x.ndim == 0}
    bad = sorted(name for name, x in losses.items() if not math.isfinite(x))
    if bad:
        print(f'Warning: not finite on these random parameters: {", ".join(bad)}')
    device = jax.local_devices()[0]
    most, what = profiling.peak(device)
    used, whose = profiling.memory([device])
    return {'rows': rows, 'chunk': chunk, 'remat': remat, 'items': FLAGS.items,
            'device': device.device_kind, 'compile_seconds': seconds, 'held': held,
            'temporary': memory.temp_size_in_bytes + memory.output_size_in_bytes
            - memory.alias_size_in_bytes, 'used': used, 'used by': whose,
            'plan': planned | {'total': sum(planned.values())}, 'seconds': each, 'times': times,
            'operations': counted, 'peak': most, 'peak of': what,
            'share': counted / each / most, 'not finite': bad}


def shown(c: dict) -> str:
    """A cell in words."""
    planned = c['plan']['total'] - c['plan']['batches'] // 2  # one batch is here, not two
    return (f'{c["rows"]} sessions, chunk {c["chunk"]}, remat {c["remat"]}, {c["device"]}: '
            f'{c["seconds"]:.2f} s a step, {c["operations"] / 1e12:.1f} TFLOP in products, '
            f'{100 * c["share"]:.1f} % of the {c["peak of"]}; GiB held {gib(c["held"])} + '
            f'temporary {gib(c["temporary"])} (planned {gib(planned)}, '
            f'{planned / (c["held"] + c["temporary"]):.2f} of it), in use at most '
            f'{gib(c["used"])}; compiled in {c["compile_seconds"]:.0f} s')


def main(argv):
    """Measure the cells asked for, print and write each at once."""
    del argv
    cells = []
    for asked in FLAGS.cells:
        rows, chunk, remat = asked.split(':')
        cells.append(measure(int(rows), int(chunk), remat, FLAGS.small))
        print(shown(cells[-1]), flush=True)
        if not FLAGS.small:
            FILE.write_text(json.dumps({
                'machine': platform.machine(), 'cpus': os.cpu_count(), 'jax': jax.__version__,
                'commit': commit(), 'date': datetime.now(UTC).date().isoformat(),
                'cells': cells}, indent=1) + '\n')


if __name__ == '__main__':
    flags.DEFINE_list('cells', '16:64:full,16:64:dots', 'sessions:chunk:remat of each')
    flags.DEFINE_integer('items', 100_000, 'of the catalogue')
    flags.DEFINE_integer('steps', 3, 'that are timed')
    flags.DEFINE_bool('small', False, 'a small model; nothing is written')
    app.run(main)

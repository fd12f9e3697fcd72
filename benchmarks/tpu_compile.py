"""The joint step at full size, compiled for TPUs that are not there.

    python -m benchmarks.tpu_compile [--cells=v5e-8,v6e-8,export,smolvlm,...] [--again]

Qwen3-VL-2B's sizes in bfloat16 under three adapters, a catalogue of 100,000 items, all losses of
stage joint: the step a run takes, lifted by `parallel.Devices` over the devices of a topology, and
compiled by the TPU's own compiler on this CPU, of shapes alone: no parameter is ever held. Beside
the compiler's memory stands `tpad_jax.job.memory_plan`'s. `export` lowers the step for 'cuda' and
'tpu' by `jax.export`, which compiles nothing. Each smaller family has a cell, at the sizes of
SmolVLM-256M, SmolLM2-135M and MiniLM-L6.

It needs the libtpu that goes with this jax (`pip install "jax[tpu]"`), no accelerator, some 10 GB
and a quarter of an hour of a CPU core for a compile. Every cell has a process of its own; what
tpu_compile.json holds of the same versions is not computed again. `--small` is a model that
compiles sooner, to try this out.
"""

import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.checkout import commit

FLAGS = flags.FLAGS
HERE = Path(__file__).parent
FILE = HERE / 'tpu_compile.json'
HALF = (0.5,) * 3
SIDES = (500, 200, 11)  # brands, categories and price levels
# libtpu asks a machine that is no TPU's what kind of one it is, unless told
AWAY = {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
SMALLER = {'model_shards': 1, 'mllm.chunk': 32, 'stage.joint.batch_size': 64}
CELLS = {  # topology, what its config is changed to, and the config's variant of configs/amazon.py
    'v5e-8': ('v5e:2x4', SMALLER | {'model_shards': 2}, 'qwen3vl_2b'),
    'v6e-8': ('v6e:2x4', SMALLER, 'qwen3vl_2b'),
    'export': ('v5e:2x4', SMALLER | {'model_shards': 2}, 'qwen3vl_2b'),
    'smolvlm': ('v5e:2x4', SMALLER, 'smolvlm'),
    'text_decoder': ('v5e:2x4', SMALLER, 'smolvlm'),
    # it writes no text
    'text_encoder': ('v5e:2x4', SMALLER | {'stage.joint.weights.gen_knowledge': 0.0},
                     'text_encoder'),
}
PACKAGES = 'jax', 'jaxlib', 'libtpu', 'flax', 'optax'


def sizes(small: bool):
    """Qwen3-VL-2B as its config.json has it, or the family in sizes that compile sooner."""
    from dataclasses import replace

    from tpad_jax.models.hf import spec as specs
    decoder = specs.Decoder(151936, 2048, 28, 16, 8, 128, 6144, 1e-6, 5e6, False, True,
                            (24, 20, 20), True, True)
    grid = specs.Grid('qwen3', 1024, 24, 16, 4096, 16, 2, 2048, 'gelu_pytorch_tanh', 1e-6, 48, 0,
                      (), (5, 11, 17))
    if small:
        decoder = replace(decoder, vocab=1024, width=256, layers=2, heads=4, kv_heads=2,
                          head_dim=64, hidden=512, sections=(12, 10, 10))
        grid = replace(grid, width=128, layers=3, heads=4, hidden=256, out=256, deep=(0, 1))
    return specs.Spec('qwen3_vl', decoder, grid, '', True, False, decoder.vocab - 1,
                      (decoder.vocab - 2,), (decoder.vocab - 3,), HALF, HALF)


def smaller(name: str, small: bool):
    """Return the base of a smaller family as its config.json has it, and the side of its images."""
    from tpad_jax.models.hf import sentence, spec as specs
    from tpad_jax.models.hf.bert import Bert
    from tpad_jax.models.hf.vlm import VLM
    layers = 2 if small else 30
    if name == 'text_encoder':
        return Bert(sentence.TextEncoder('bert', 30522, 384, 2 if small else 6, 12, 1536, 'gelu',
                                         1e-12, 512, 0, 2), before=(101,), end=(102,)), 0
    decoder = specs.Decoder(49280, 576, layers, 9, 3, 64, 1536, 1e-5, 1e5, False, False, (), False,
                            True)
    tower = specs.Tower('idefics3', 768, 12, 12, 12, 3072, 512, 16, 'gelu_pytorch_tanh', 1e-6,
                        False, 4)
    spec = specs.Spec('idefics3', decoder, tower, '', False, False, 49190, (49189,), (49189,), HALF,
                      HALF)
    if name == 'text_decoder':
        spec = specs.Spec('llama', decoder, None, '', False, False, -1, (), (), HALF, HALF)
    side = 512 if spec.vision else 0
    return VLM(spec, side, before=(1, 2, 3), between=(4,), end=(5, 6, 7)), side


def parts(there, changes: dict, items: int, small: bool, how: str = 'shard_map',
          name: str = 'v5e-8'):
    """The lifted step, its arguments as shapes that know their devices, and what is planned.

    Args:
      there: the devices. changes: of the config. how: see `parallel.choose`. name: of CELLS.
    """
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict

    from configs import amazon
    from tpad_jax.distributed import devices as devices_lib
    from tpad_jax.job import memory_plan
    from tpad_jax.models import tpad
    from tpad_jax.models.hf.vlm import VLM
    from tpad_jax.training import loop, step as step_lib
    from tpad_jax.types import Batch

    variant = CELLS[name][2]
    c = amazon.get_config(variant)
    c.update_from_flattened_dict(changes)
    c.data.raw_dir = 'X'  # a real catalogue has no true attributes
    devices = devices_lib.choose(how, c.devices, c.model_shards, there)
    side, text, n = c.mllm.image_size, c.mllm.text_length, c.data.max_length
    base = VLM(sizes(small), side, c.mllm.attention, c.mllm.remat, c.mllm.dtype, (1, 2, 3), (4,),
               (5, 6, 7))
    if variant != 'qwen3vl_2b':
        base, side = smaller(name, small)
    model = tpad.build(base, c.model, recommend=('r',), items=items, max_length=n,
                       side_sizes=SIDES, pooling=c.mllm.pooling, chunk=c.mllm.chunk)
    catalogue = memory_plan.rows(c, items, len(SIDES), model.knowledge.shape)
    shapes = jax.eval_shape(
        partial(tpad.init, spec=model, rank=c.model.lora_rank, targets=c.model.lora_targets,
                image_shape=(side, side, 3), text_length=text),
        jax.random.key(0), catalogue=catalogue)
    held = jnp.dtype(c.mllm.param_dtype)
    flat = {path: x.update(dtype=held) if path.startswith('base/') else x
            for path, x in flatten_dict(shapes, sep='/').items()}
    spec = step_lib.make_spec(c, 'joint', model, c.seed)
    state = jax.eval_shape(
        partial(step_lib.start, spec, pattern=c.stage.joint.train, shapes=True), flat)
    rows = c.stage.joint.batch_size
    seen = devices.shards * (1 + rows // devices.shards * (n + 1))
    ints = dict(items=(rows, n), next=(rows, n), target=(rows,), row=(rows,), slots=(rows, n),
                next_slots=(rows, n), ids=(seen,), tokens=(seen, text))
    batch = Batch(valid=jax.ShapeDtypeStruct((rows,), bool),
                  has_image=jax.ShapeDtypeStruct((seen,), bool),
                  image=jax.ShapeDtypeStruct((seen, side, side, 3), jnp.uint8),
                  **{name: jax.ShapeDtypeStruct(x, jnp.int32) for name, x in ints.items()})

    def placed(tree):
        return jax.tree.map(lambda x, where: x.update(sharding=where), tree,
                            devices.shardings(tree))

    arguments = (placed(state.replace(frozen={})),
                 jax.tree.map(lambda x: x.update(sharding=devices.split()), batch),
                 placed({'catalogue': catalogue, 'frozen': state.frozen}))
    planned = memory_plan.stage_plan(memory_plan.Subject(
        c, lambda base, c: model, base, flat, catalogue, devices, n, side), 'joint')
    return devices.lift(partial(loop.lean_step, spec=spec)), arguments, planned, spec


def cell(name: str, items: int, small: bool) -> dict:
    """One cell, in this process."""
    import jax
    from jax import export
    from jax.experimental import topologies

    topology, changes, _ = CELLS[name]
    there = topologies.get_topology_desc(topology, 'tpu').devices
    step, arguments, planned, _ = parts(there, changes, items, small, name=name)
    begun = time.process_time()
    found = {'cell': name, 'topology': topology, 'config': changes, 'items': items, 'small': small}
    if name == 'export':
        for where in ('cuda', 'tpu'):
            made = export.export(step, platforms=[where])(*arguments)
            found[where] = {'devices': made.nr_devices, 'bytes': len(made.mlir_module_serialized),
                            'outputs': len(jax.tree.leaves(made.out_avals))}
    else:
        lowered = step.trace(*arguments).lower(lowering_platforms=('tpu',))
        memory = lowered.compile().memory_analysis()
        # what a device holds is more than what its program reads: in stage joint k is fresh
        held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                   for x in jax.tree.leaves(arguments))
        found |= {'held': held, 'compiler': {
            part: getattr(memory, f'{part}_size_in_bytes')
            for part in ('argument', 'output', 'alias', 'temp', 'generated_code')},
            'plan': planned}
    return found | {'cpu_seconds': time.process_time() - begun,
                    'resident': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def apart(name: str) -> dict:
    """`cell` in a process of its own; what its compiler refuses is said, not raised."""
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.tpu_compile', f'--cell={name}',
         f'--items={FLAGS.items}', f'--small={FLAGS.small}'], cwd=HERE.parent,
        stdout=subprocess.PIPE, text=True, env={**os.environ, **AWAY}, check=False)
    if done.returncode:
        sys.exit(f'{name} failed with status {done.returncode}; its reason stands above')
    return json.loads(done.stdout.splitlines()[-1])


def show(cells: list[dict]) -> Table:
    """The cells as a table, GiB per device."""
    from tpad_jax.job.memory_plan import KINDS
    table = Table(title='stage joint, GiB per device', title_justify='left', box=None)
    for column in ('devices', 'data x model', 'of', 'held', 'planned', 'temporary', 'planned',
                   'program', 'plan / compiler', 'CPU s'):
        table.add_column(column, justify='left' if column == 'devices' else 'right')
    for c in cells:
        if c['cell'] == 'export':
            continue
        p, own, shards = c['plan'], c['compiler'], c['config']['model_shards']
        # the plan has the next batch, too, and no program
        held = sum(p[part] for part in ('frozen', 'trained', 'optimiser', 'catalogue'))
        held, beside = held + p['batches'] // 2, p['temporary']
        temp = own['temp'] + own['output'] - own['alias']
        table.add_row(c['cell'], f'{8 // shards} x {shards}', f'{KINDS[c["topology"][:3]]}', *(
            f'{x / 2**30:.2f}' for x in (c['held'], held, temp, beside, own['generated_code'])),
            f'{(held + beside) / (c["held"] + temp):.2f}', f'{c["cpu_seconds"]:.0f}')
    return table


def about() -> dict:
    """Where, when and with what this is computed."""
    return {'machine': platform.machine(), 'cores': os.cpu_count(),
            'date': datetime.now(UTC).date().isoformat(), 'commit': commit(),
            'versions': {name: metadata.version(name) for name in PACKAGES}}


def main(argv):
    """Compute a cell, or all that are asked for; print the table and write the JSON."""
    del argv
    if FLAGS.cell:
        print(json.dumps(cell(FLAGS.cell, FLAGS.items, FLAGS.small)))
        return
    kept = []
    for name in FLAGS.cells:
        kept = json.loads(FILE.read_text())['cells'] if FILE.is_file() else []
        told = about()
        asked = {'config': CELLS[name][1], 'items': FLAGS.items, 'small': FLAGS.small}
        if not FLAGS.again and any(
                c['cell'] == name and asked.items() <= c.items()
                and c['about']['versions'] == told['versions'] for c in kept):
            continue
        found = apart(name) | {'about': told}
        kept = json.loads(FILE.read_text())['cells'] if FILE.is_file() else []  # another's, too
        kept = [c for c in kept if c['cell'] != name] + [found]
        kept.sort(key=lambda c: list(CELLS).index(c['cell']))
        if not FLAGS.small:
            FILE.write_text(json.dumps({'cells': kept}, indent=1) + '\n')
    console = Console(width=120)
    console.print(show(kept))
    for c in kept:
        for where in ('cuda', 'tpu') if c['cell'] == 'export' else ():
            console.print(f'exported for {where}: {c[where]["devices"]} devices, '
                          f'{c[where]["bytes"] / 1e6:.1f} MB, {c[where]["outputs"]} outputs')


if __name__ == '__main__':
    flags.DEFINE_list('cells', list(CELLS), f'some of {", ".join(CELLS)}')
    flags.DEFINE_enum('cell', None, list(CELLS), 'compute this one here and print it as JSON')
    flags.DEFINE_integer('items', 100_000, 'of the catalogue')
    flags.DEFINE_bool('small', False, 'a small model; nothing is written')
    flags.DEFINE_bool('again', False, 'also what is there')
    app.run(main)

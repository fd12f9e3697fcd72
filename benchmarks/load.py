"""Reading a checkpoint: memory, seconds, and namings: `python -m benchmarks.load`.

Writes a random LLaVA-shaped checkpoint of about `--gb` bfloat16 gigabytes into a temporary
directory, as one file and in shards. A fresh process then reads it into bfloat16 or float32 and
runs a forward pass that touches every tensor. Its highest resident size (VmHWM), less that of a
process that imports the same and reads nothing, is given as a multiple of the parameters' bytes in
the dtype they are read into. A small checkpoint under each of LLaVA's four namings must give the
same bits. Writes JSON to `--out`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

FLAGS = flags.FLAGS
HERE = Path(__file__).parent
LIMIT = 1.35  # times the parameters' bytes
SIDE, WIDTH, HIDDEN, VOCAB = 56, 1024, 2816, 32064
NAMINGS = {  # text, output embedding, tower, the rest
    'transformers 5, in memory': ('model.language_model.', 'lm_head.', 'model.vision_tower.',
                                  'model.'),
    'transformers 4.52': ('model.language_model.', 'lm_head.', 'model.vision_tower.vision_model.',
                          'model.'),
    'before 4.52': ('language_model.model.', 'language_model.lm_head.',
                    'vision_tower.vision_model.', ''),
    'transformers 5, on disk': ('language_model.model.', 'language_model.lm_head.',
                                'vision_tower.', ''),
}


def write(directory: Path, layers: int, naming: str, shard_bytes: int | None, *, width=WIDTH):
    """Write a random bfloat16 LLaVA of `layers` decoder layers, in one file or in shards."""
    from tpad_jax.models.hf import keys, spec as specs

    directory.mkdir()
    (directory / 'config.json').write_text(json.dumps({
        'architectures': ['LlavaForConditionalGeneration'], 'model_type': 'llava',
        'image_token_index': 3, 'vision_feature_layer': -2, 'projector_hidden_act': 'gelu',
        'vision_feature_select_strategy': 'default', 'tie_word_embeddings': False,
        'vision_config': {
            'model_type': 'clip_vision_model', 'hidden_size': width // 2,
            'intermediate_size': 2 * width, 'num_hidden_layers': 7, 'num_attention_heads': 8,
            'image_size': SIDE, 'patch_size': 14, 'hidden_act': 'quick_gelu'},
        'text_config': {
            'model_type': 'llama', 'vocab_size': VOCAB, 'hidden_size': width,
            'intermediate_size': HIDDEN * width // WIDTH, 'num_hidden_layers': layers,
            'num_attention_heads': 16, 'num_key_value_heads': 16, 'rms_norm_eps': 1e-5,
            'rope_theta': 1e4}}))
    text, head, tower, rest = NAMINGS[naming]
    shapes = {}
    for entry in keys.table(specs.read(directory)):
        for name in entry.names:
            for old, new in (('model.language_model.', text), ('lm_head.', head),
                             ('model.vision_tower.', tower), ('model.', rest)):
                if name.startswith(old):
                    shapes[new + name.removeprefix(old)] = entry.stored
                    break
    files, size = [{}], 0
    for name, shape in shapes.items():
        if shard_bytes and size > shard_bytes:
            files, size = [*files, {}], 0
        files[-1][name] = shape
        size += 2 * int(np.prod(shape))
    # one block of random numbers, from anywhere in which a tensor begins
    rng = np.random.default_rng(0)
    block = (0.02 * rng.standard_normal(1 << 22, np.float32)).astype(ml_dtypes.bfloat16)
    block, index = np.tile(block.view(np.uint8), 2), {}
    for i, shapes in enumerate(files):
        file = f'model-{i + 1:05}-of-{len(files):05}.safetensors'
        file = file if shard_bytes else 'model.safetensors'
        index |= dict.fromkeys(shapes, file)
        _write_file(directory / file, shapes, block, rng)
    if shard_bytes:
        (directory / 'model.safetensors.index.json').write_text(json.dumps(
            {'metadata': {}, 'weight_map': index}))


def _write_file(file, shapes, block, rng):
    header, at = {'__metadata__': {'format': 'pt'}}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {'dtype': 'BF16', 'shape': shape, 'data_offsets': [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(file, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for shape in shapes.values():
            left = 2 * int(np.prod(shape))
            while left:
                start = 2 * int(rng.integers(len(block) // 4))
                left -= f.write(block[start:start + min(left, len(block) // 2)].data)


def high() -> int:
    """Highest resident size of this process so far, bytes."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(s for s in lines if s.startswith('VmHWM')).split()[1])


def cell(directory, dtype: str) -> dict:
    """In this process: read a checkpoint and run it once; dtype '': neither, only import."""
    import jax
    import jax.numpy as jnp

    from tpad_jax.models.hf import load, spec as specs
    from tpad_jax.models.hf.vlm import VLM

    spec = specs.read(directory)
    jnp.zeros(1).block_until_ready()
    found = {'rest': high()}
    if not dtype:
        return found
    begun = time.perf_counter()
    params = load.load(directory, spec, dtype=dtype)
    found['seconds'] = time.perf_counter() - begun
    found['params'] = sum(x.nbytes for x in jax.tree.leaves(params))
    found['loaded'] = high()
    model = VLM(spec, SIDE, dtype=dtype)
    # XLA on CPU multiplies in float32, and would turn all layers' kernels before the loop over them
    run = jax.jit(lambda p: model.apply({'params': p}, method='everything'), compiler_options={
        'xla_disable_hlo_passes': 'while-loop-invariant-code-motion',
        'xla_backend_optimization_level': 1})
    assert jnp.isfinite(run(params)).all()
    return found | {'run': high()}


def apart(directory, dtype: str) -> dict:
    """`cell` in a process of its own."""
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.load', f'--directory={directory}', f'--dtype={dtype}'],
        cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
    return json.loads(done.stdout.splitlines()[-1])


def equal_namings(parent: Path) -> bool:
    """Whether one small checkpoint gives the same bits under every naming."""
    import jax

    from tpad_jax.models.hf import load, spec as specs

    first = None
    for i, naming in enumerate(NAMINGS):
        write(parent / str(i), 2, naming, None, width=128)
        params = load.load(parent / str(i), specs.read(parent / str(i)), dtype='bfloat16')
        bits = [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]
        first = first or bits
        if bits != first:
            return False
    return True


def show(cells: list[dict]) -> Table:
    """The cells as a table."""
    table = Table(title='reading a bfloat16 checkpoint', title_justify='left', box=None)
    for column in ('files', 'into', 'parameters GB', 'read s', 'peak, read', 'peak, run'):
        table.add_column(column, justify='left' if column in ('files', 'into') else 'right')
    for c in cells:
        table.add_row(c['files'], c['dtype'], f'{c["params"] / 1e9:.2f}', f'{c["seconds"]:.1f}',
                      f'{c["read_times"]:.3f} x', f'{c["run_times"]:.3f} x')
    return table


def main(argv):
    """Measure, print the table and write the JSON; fail where memory or bits do not hold."""
    del argv
    if FLAGS.directory:
        print(json.dumps(cell(FLAGS.directory, FLAGS.dtype)))
        return
    layer = 2 * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN)
    layers = max(1, round((FLAGS.gb * 1e9 - 4 * WIDTH * VOCAB) / layer))
    cells = []
    with tempfile.TemporaryDirectory() as parent:
        parent = Path(parent)
        same = equal_namings(parent)
        for files, shard in (('single', None), ('sharded', int(FLAGS.gb * 1e9 / 4))):
            write(parent / files, layers, 'transformers 4.52', shard)
            rest = apart(parent / files, '')['rest']
            for dtype in ('bfloat16', 'float32'):
                c = apart(parent / files, dtype)
                cells.append({'files': files, 'dtype': dtype, 'rest': rest, **c,
                              'read_times': (c['loaded'] - rest) / c['params'],
                              'run_times': (c['run'] - rest) / c['params']})
    Console(width=100).print(show(cells))
    worst = max(c['run_times'] for c in cells)
    print(f'highest peak above an idle process: {worst:.3f} times the parameters (limit {LIMIT}); '
          f'the four namings give {"the same bits" if same else "DIFFERENT bits"}')
    about = {'cores': os.cpu_count(), 'load': os.getloadavg()[0],
             'date': datetime.now(UTC).date().isoformat(), 'gb': FLAGS.gb, 'limit': LIMIT}
    Path(FLAGS.out).write_text(json.dumps(
        {**about, 'namings_equal': same, 'cells': cells}, indent=1) + '\n')
    if worst > LIMIT or not same:
        sys.exit(1)


if __name__ == '__main__':
    flags.DEFINE_float('gb', 1.0, 'size of the checkpoint, gigabytes', lower_bound=0.01)
    flags.DEFINE_string('out', str(HERE / 'load.json'), 'where the figures go')
    flags.DEFINE_string('directory', None, 'measure this checkpoint alone and print it as JSON')
    flags.DEFINE_string('dtype', '', 'what --directory is read into; empty: nothing is read')
    app.run(main)

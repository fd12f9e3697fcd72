"""Items read per second, here and by torch: `python -m benchmarks.encode [--out FILE.json]`.

One random Qwen3-VL of about a hundred million parameters reads items of one image and a text, on
both sides in float32, with the same tokens and pixels, in turns within one run; the best turn of
each counts. Torch is `transformers`' own class with its fastest attention on this machine ('sdpa').
What a plain matrix product reaches beside says how much of the machine either uses. Host decoding
is timed by itself: JPEGs of 600 x 600 pixels to 256, on one core.

    --shape=2b --dtype=bfloat16   Qwen3-VL-2B's sizes, for an accelerator; torch joins with CUDA
"""

import io
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax.traverse_util import flatten_dict
from PIL import Image
from rich.console import Console
from rich.table import Table

from tpad_jax.data import images
from tpad_jax.distributed import collectives, devices as devices_lib
from tpad_jax.models.hf import spec as specs
from tpad_jax.models.hf.vlm import VLM, shapes

FLAGS = flags.FLAGS
CORES = len(os.sched_getaffinity(0))
SIDE, TEXT, IMAGE_ID, START, END = 256, 128, 3, 4, 5
SIZES = {  # decoder; vision
    '100m': (dict(vocab_size=32_000, hidden_size=640, intermediate_size=1728, num_hidden_layers=12,
                  num_attention_heads=10, num_key_value_heads=5, head_dim=64),
             dict(depth=8, hidden_size=512, intermediate_size=2048, num_heads=8,
                  out_hidden_size=640, deepstack_visual_indexes=[2, 5])),
    '2b': (dict(vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
                num_attention_heads=16, num_key_value_heads=8, head_dim=128),
           dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16,
                out_hidden_size=2048, deepstack_visual_indexes=[5, 11, 17])),
}


def config(shape: str) -> dict:
    """config.json of a Qwen3-VL of SIZES."""
    text, vision = SIZES[shape]
    half = text['head_dim'] // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    return {'model_type': 'qwen3_vl', 'tie_word_embeddings': True, 'image_token_id': IMAGE_ID,
            'vision_start_token_id': START, 'vision_end_token_id': END, 'text_config': {
                'model_type': 'qwen3_vl_text', 'hidden_act': 'silu', 'rms_norm_eps': 1e-6,
                'max_position_embeddings': 4096, **text,
                'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e6,
                                    'mrope_section': sections, 'mrope_interleaved': True}},
            'vision_config': {'model_type': 'qwen3_vl', 'hidden_act': 'gelu_pytorch_tanh',
                              'patch_size': 16, 'spatial_merge_size': 2, 'in_channels': 3,
                              'temporal_patch_size': 2, 'num_position_embeddings': 2304, **vision}}


def operations(spec: specs.Spec) -> float:
    """Multiplications and additions of one item's matrix products, attention's among them."""
    d, v = spec.decoder, spec.vision
    tokens = TEXT + 2 + spec.image_tokens(SIDE)
    patches = spec.image_tokens(SIDE) * v.merge**2
    layer = d.width * d.head_dim * (2 * d.heads + 2 * d.kv_heads) + 3 * d.width * d.hidden
    block = 4 * v.width**2 + 2 * v.width * v.hidden
    joined = v.width * v.merge**2
    mergers = (1 + len(v.deep)) * joined * (joined + v.out)
    return 2.0 * (d.layers * tokens * (layer + 2 * tokens * d.heads * d.head_dim)
                  + v.layers * patches * (block + 2 * patches * v.width)
                  + patches // v.merge**2 * mergers + patches * v.width * 3 * v.patch**2)


def inputs(spec: specs.Spec, rows: int):
    """Tokens int32 [B, S] of an image and TEXT words each, and images uint8 [B, 1, ...]."""
    rng = np.random.default_rng(0)
    held = spec.image_tokens(SIDE)
    tokens = rng.integers(10, spec.decoder.vocab, (rows, TEXT + held + 2)).astype(np.int32)
    tokens[:, 0], tokens[:, 1:1 + held], tokens[:, 1 + held] = START, IMAGE_ID, END
    return tokens, rng.integers(0, 256, (rows, 1, SIDE, SIDE, 3)).astype(np.uint8)


def parameters(spec: specs.Spec, dtype):
    """Random parameters by fan-in, made where they stay."""
    def draw(key):
        leaves, tree = jax.tree.flatten(shapes(spec))
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(tree, [
            jax.random.normal(k, x.shape, dtype) * jnp.asarray(x.shape[-2] ** -0.5, dtype)
            if x.ndim > 1 else jnp.ones(x.shape, dtype)
            for k, x in zip(keys, leaves, strict=True)])

    return jax.jit(draw)(jax.random.key(0))


def ours(spec, params, tokens, image, dtype, how):
    """A function that reads the rows once and waits."""
    model = VLM(spec, SIDE, how, dtype=dtype)
    devices = devices_lib.choose('auto', 0)

    def last(module, tokens, image):
        here = jnp.full((len(tokens), 1), tokens.shape[1] - 1)
        return module(module.prompt(tokens, jnp.ones(tokens.shape, bool), image), at=here)[:, 0]

    def read(_, batch, params, *, axis):
        x = model.apply({'params': params}, batch.tokens, batch.image, method=last)
        return collectives.gather(x.astype(jnp.float32), axis)

    lifted, params = devices.lift(read), devices.share(params)
    fill = np.zeros(len(tokens), np.int32)
    fixed = dict(items=fill, next=fill, target=fill, valid=fill, row=fill)

    def work():
        batch = devices.place({**fixed, 'tokens': tokens, 'image': image})
        return np.asarray(lifted({}, batch, params))

    return work


def torch_side(directory, params, spec, tokens, image, dtype, threads):
    """The same by torch: our parameters, exported; None without torch (or, off the CPU, CUDA)."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    on_cpu = jax.default_backend() == 'cpu'
    if not on_cpu and not torch.cuda.is_available():
        return None
    from safetensors.numpy import save_file

    from tpad_jax.models.hf import keys
    device = 'cpu' if on_cpu else 'cuda'
    torch.set_num_threads(threads)
    whole = transformers.AutoConfig.from_pretrained(directory)
    whole._attn_implementation = 'sdpa'
    flat, stored = flatten_dict(params, sep='/'), {}
    for entry in keys.table(spec):
        value = np.asarray(flat[entry.path])
        for name, layer in zip(entry.names, [value] if entry.layers is None else value,
                               strict=True):
            stored[name] = np.ascontiguousarray(entry.there(layer))
    save_file(stored, directory / 'model.safetensors', metadata={'format': 'pt'})
    kind = transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(directory, config=whole, dtype=getattr(torch, dtype))
    model = model.to(device).eval().model
    merge, grid = spec.vision.merge, SIDE // spec.vision.patch

    def pixels():
        x = (torch.from_numpy(image[:, 0]).to(device).float() / 255 - 0.5) / 0.5
        p = spec.vision.patch
        x = x.reshape(len(x), grid // merge, merge, p, grid // merge, merge, p, 3)
        x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)[:, :, :, :, :, :, None].expand(
            *(-1,) * 6, 2, -1, -1)
        return x.reshape(-1, 3 * 2 * p * p).to(getattr(torch, dtype))

    ids = torch.from_numpy(tokens).long().to(device)
    fixed = dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                 mm_token_type_ids=(ids == IMAGE_ID).int(),
                 image_grid_thw=torch.tensor([[1, grid, grid]] * len(ids), device=device))

    def read():
        with torch.inference_mode():
            out = model(pixel_values=pixels(), **fixed).last_hidden_state[:, -1]
            return out.float().cpu().numpy()

    return read


def product(dtype) -> float:
    """Operations per second of a plain matrix product, 2048 x 2048 x 2048 (8192 off the CPU)."""
    n = 2048 if jax.default_backend() == 'cpu' else 8192
    x = jnp.ones((n, n), dtype)
    multiply = jax.jit(jnp.matmul)
    return 2 * n**3 / best(lambda: multiply(x, x).block_until_ready(), 5)


def best(work, turns) -> float:
    """Least seconds of a call; one more before is not counted."""
    work()
    seconds = []
    for _ in range(turns):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def decoding(count=60) -> float:
    """Images per second and core: JPEG of 600 x 600 pixels to SIDE."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (75, 75, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    smooth.resize((600, 600), Image.Resampling.BICUBIC).save(buffer, 'JPEG', quality=90)
    data = buffer.getvalue()
    begun = time.process_time()
    for _ in range(count):
        assert images.decode(data, SIDE) is not None
    return count / (time.process_time() - begun)


def main(argv):
    """Time both sides in turns, print a table, write JSON."""
    del argv
    # a core is a device with items of its own, and none waits for the other within a product
    jax.config.update('jax_num_cpu_devices', CORES)
    threads = CORES
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / 'config.json').write_text(json.dumps(config(FLAGS.shape)))
        spec = specs.read(folder)
        params = parameters(spec, jnp.dtype(FLAGS.dtype))
        tokens, image = inputs(spec, FLAGS.rows)
        sides = {'tpad_jax': ours(spec, params, tokens, image, FLAGS.dtype, FLAGS.attention),
                 'torch': torch_side(folder, params, spec, tokens, image, FLAGS.dtype, threads)}
    sides = {name: work for name, work in sides.items() if work}
    results = {name: work() for name, work in sides.items()}
    seconds = {name: [] for name in sides}
    for _ in range(FLAGS.turns):
        for name, work in sides.items():
            seconds[name].append(best(work, 1))
    rate, per_item = product(jnp.dtype(FLAGS.dtype)), operations(spec)
    out = {'shape': FLAGS.shape, 'parameters': sum(x.size for x in jax.tree.leaves(params)),
           'rows': FLAGS.rows, 'tokens': tokens.shape[1], 'dtype': FLAGS.dtype, 'threads': threads,
           'device': jax.devices()[0].device_kind, 'date': datetime.now(UTC).isoformat()[:16],
           'jax': jax.__version__, 'gflop_per_item': per_item / 1e9, 'product_gflops': rate / 1e9,
           'decoded_per_second_and_core': decoding(),
           'sides': {name: {'items_per_second': FLAGS.rows / min(s), 'turns': s,
                            'share_of_product': FLAGS.rows / min(s) * per_item / rate}
                     for name, s in seconds.items()}}
    table = Table(title=f'{out["parameters"] / 1e6:.0f} M parameters, {out["tokens"]} tokens and a '
                  f'{SIDE} px image per item, {FLAGS.rows} items, {FLAGS.dtype}', box=None)
    for head in ('', 'items/s', 'share of a plain product'):
        table.add_column(head, justify='right')
    for name, side in out['sides'].items():
        table.add_row(name, f'{side["items_per_second"]:.2f}', f'{side["share_of_product"]:.2f}')
    Console().print(table)
    if 'torch' in sides:
        out['ratio'] = (out['sides']['tpad_jax']['items_per_second']
                        / out['sides']['torch']['items_per_second'])
        one, two = results.values()
        out['max_rel_diff'] = float(np.abs(one - two).max() / np.sqrt((two**2).mean()))
        print(f'ratio {out["ratio"]:.2f}, last states differ by {out["max_rel_diff"]:.1e} of RMS')
    print(f'host decoding: {out["decoded_per_second_and_core"]:.0f} images/s per core')
    if FLAGS.out:
        Path(FLAGS.out).write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    flags.DEFINE_enum('shape', '100m', list(SIZES), 'sizes of the model')
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'of both sides')
    flags.DEFINE_string('attention', 'xla', 'ours, see models/hf/layers.py')
    flags.DEFINE_integer('rows', 32, 'items of a call')
    flags.DEFINE_integer('turns', 8, 'turns of each side')
    flags.DEFINE_string('out', '', 'JSON file to write')
    app.run(main)

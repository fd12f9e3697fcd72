"""Parameters back into a Hugging Face directory that transformers loads.

The new directory is the source's with other numbers: every file is copied, and of the weights the
data of each parameter's tensors is written over. So names, dtypes, shards and whatever is not a
parameter here (configs, tokenizer, tensors that no forward pass reads) stay as they were.
"""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax.errors import InputError
from tpad_jax.models.hf import keys, load
from tpad_jax.models.hf import spec as specs

# Weights in another form, which would not be those exported.
OTHER = {'.safetensors', '.bin', '.pt', '.pth', '.gguf', '.h5', '.msgpack', '.onnx', '.ckpt'}


def export(params, source_directory, out_directory) -> Path:
    """Write `params` as the checkpoint `source_directory` is, in its dtypes; all or nothing.

    Args:
      params: tree of `load`, of any float dtype; all of it must be within this process's reach.
      source_directory: the checkpoint the parameters came from.
      out_directory: must not exist.

    Returns:
      The path of out_directory.

    Raises:
      InputError: out_directory exists, params do not fit the source, or as spec.read and load say.
    """
    source, out = Path(source_directory), Path(out_directory)
    if out.exists():
        raise InputError(f'{out} exists already; give a directory that does not')
    spec = specs.read(source)
    found, table = load.bind(source, spec), keys.table(spec)
    flat = flatten_dict(params, sep='/')
    _fits(flat, [e for e in table if e.names[0] in found], source)
    writes = [(found[name], entry, i if entry.layers else None)
              for entry in table if entry.path in flat for i, name in enumerate(entry.names)]
    head = found.get('lm_head.weight')
    if spec.decoder.tied and head is not None:
        # a copy of the input's embedding, and it stays one
        writes.append((head, next(e for e in table if e.name == load.EMBED), None))
    part = out.with_name(f'{out.name}.part-{os.getpid()}')
    try:
        _copy(source, part, {t.file for t in load.stored(source)})
        for tensor, entry, layer in writes:
            # one layer at a time: whole stacks would stay in the host's memory
            value = flat[entry.path] if layer is None else flat[entry.path][layer]
            data = entry.there(np.asarray(value)).astype(tensor.dtype)
            with open(part / tensor.file.name, 'r+b') as f:
                f.seek(tensor.start)
                f.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def merge(params, lora, scale: float) -> dict:
    """Every kernel that has an adapter plus scale * a b, summed in float32; dtypes stay.

    Args:
      params: nested dict. lora: nested dict of pairs a [.., I, r], b [.., r, O] (models/lora.py).
      scale: alpha / rank.

    Raises:
      InputError: an adapter belongs to no kernel, or is of another shape.
    """
    flat, pairs = flatten_dict(params), flatten_dict(lora)
    out = dict(flat)
    for path in sorted({p[:-1] for p in pairs}):
        kernel, where = flat.get((*path, 'kernel')), '/'.join(path)
        if kernel is None:
            raise InputError(f'the adapter has {where}, which is no kernel of the model; merge it '
                             'into the model it was made for')
        a, b = pairs[*path, 'a'], pairs[*path, 'b']
        if (*a.shape[:-1], b.shape[-1]) != kernel.shape or a.shape[-1] != b.shape[-2]:
            raise InputError(f'the adapter\'s {where} is {list(a.shape)} by {list(b.shape)}, the '
                             f'kernel {list(kernel.shape)}; merge it into the model it was made '
                             'for')
        out[*path, 'kernel'] = _merged(kernel, a, b, scale)
    return unflatten_dict(out)


@jax.jit
def _merged(kernel, a, b, scale):
    def one(layer):
        w, a, b = (x.astype(jnp.float32) for x in layer)
        return (w + scale * jnp.matmul(a, b, precision='highest')).astype(kernel.dtype)

    # layer by layer, so that no whole stack is held in float32
    return one((kernel, a, b)) if kernel.ndim == 2 else jax.lax.map(one, (kernel, a, b))


def _fits(flat, table, source):
    faults = [f'{e.path} is missing' for e in table if e.path not in flat]
    faults += [f'{path} is not of it' for path in sorted(flat.keys() - {e.path for e in table})]
    faults += [f'{e.path} is {list(np.shape(flat[e.path]))}, not {list(e.shape)}'
               for e in table if e.path in flat and np.shape(flat[e.path]) != e.shape]
    if faults:
        raise InputError(f'these are not the parameters of {source}: {"; ".join(faults)}; export '
                         'to the checkpoint they were loaded from')


def _copy(source, part, weights):
    """All files of `source` but hidden ones and weights other than `weights`, with subfolders."""
    part.mkdir(parents=True)
    for file in sorted(source.rglob('*')):
        name = file.relative_to(source)
        if not file.is_file() or any(p.startswith('.') for p in name.parts):
            continue
        if file in weights or file.suffix not in OTHER:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, part / name)

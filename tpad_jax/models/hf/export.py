"""Write parameters to a Hugging Face directory that transformers loads.

Every file of the source directory is copied. Then the data of each parameter's tensors is replaced.
Names, dtypes, shards, configs, tokenizer and tensors that are not parameters here stay the same.
"""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax.errors import refuse_if
from tpad_jax.models.hf import keys, load
from tpad_jax.models.hf import spec as specs
from tpad_jax.nn import linear

# Suffixes of weights.
OTHER = {'.safetensors', '.bin', '.pt', '.pth', '.gguf', '.h5', '.msgpack', '.onnx', '.ckpt'}


def export(params, source_directory, out_directory) -> Path:
    """Write parameters in the form and the dtypes of a checkpoint, completely or not at all.

    Args:
      params: tree of `load`, of any float dtype. This process must be able to read all of it.
      source_directory: the checkpoint that the parameters came from.
      out_directory: must not exist.

    Returns:
      The path of out_directory.

    Raises:
      InputError: out_directory exists, or the parameters or the source are unusable.
    """
    source, out = Path(source_directory), Path(out_directory)
    refuse_if(out.exists(), f'{out}: exists already. Expected a new directory. Fix: choose another')
    spec = specs.read(source)
    tensors, table, flat = load.bind(source, spec), keys.table(spec), flatten_dict(params, sep='/')
    faults = linear.misfits(flat, {e.path: e.shape for e in table if e.names[0] in tensors})
    refuse_if(faults, f'{source}: the parameters are not those of this checkpoint: {faults}. '
              'Expected its parameters. Fix: export to the checkpoint they come from')
    writes = [(tensors[name], entry, i if entry.layers else None)
              for entry in table if entry.path in flat for i, name in enumerate(entry.names)]
    head = tensors.get('lm_head.weight')
    if spec.decoder.tied and head is not None:
        # the tied output embedding stays a copy of the input embedding
        writes.append((head, next(e for e in table if e.name == load.EMBED), None))
    part = out.with_name(f'{out.name}.part-{os.getpid()}')
    try:
        weights = {t.file for t in tensors.values()}
        shutil.copytree(
            source, part, copy_function=shutil.copyfile, ignore_dangling_symlinks=True,
            ignore=lambda folder, names: [
                # hidden files, and weights that differ from the exported ones
                name for name in names if name.startswith('.') or (
                    Path(name).suffix in OTHER and Path(folder, name) not in weights)])
        for tensor, entry, layer in writes:
            # one layer at a time: complete stacks would fill the host's memory
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
    """Add scale * a b to every kernel that has an adapter. Sums are float32, dtypes stay.

    Args:
      params: nested dict.
      lora: nested dict of pairs a [.., I, r], b [.., r, O], see nn/linear.py.
      scale: alpha / rank.

    Raises:
      InputError: an adapter does not fit a kernel.
    """
    flat, pairs = flatten_dict(params), flatten_dict(lora)
    out = dict(flat)
    for path in sorted({p[:-1] for p in pairs}):
        kernel, a, b = flat.get((*path, 'kernel')), pairs[*path, 'a'], pairs[*path, 'b']
        shape = 'missing' if kernel is None else list(kernel.shape)
        refuse_if([*a.shape[:-1], b.shape[-1]] != shape or a.shape[-1] != b.shape[-2],
                  f'{"/".join(path)}: an adapter {list(a.shape)} by {list(b.shape)} does not fit '
                  f'the kernel ({shape}). Expected an adapter of this model. Fix: merge it into '
                  'the model it was made for')
        out[*path, 'kernel'] = _merged(kernel, a, b, scale)
    return unflatten_dict(out)


@jax.jit
def _merged(kernel, a, b, scale):
    def add(layer):
        w, a, b = (x.astype(jnp.float32) for x in layer)
        return (w + scale * jnp.matmul(a, b, precision='highest')).astype(kernel.dtype)

    # one layer at a time, so that only one is float32
    return add((kernel, a, b)) if kernel.ndim == 2 else jax.lax.map(add, (kernel, a, b))

"""Write parameters and adapters in the forms of Hugging Face, and read adapters.

Export: every file of the source directory is copied. Then the data of each parameter's tensors is
replaced. Names, dtypes, shards, configs, tokenizer and tensors that are not parameters here stay
the same.

Adapters have the files of the `peft` library. An adapter must never silently do nothing: a tensor
without a kernel, a layer without its tensor and an option that would change the sum are refused by
name.
"""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from tpad_jax.errors import refuse_if, refusing
from tpad_jax.models.hf import keys, load, spec as specs
from tpad_jax.nn import linear

# Suffixes of weights.
OTHER = {'.safetensors', '.bin', '.pt', '.pth', '.gguf', '.h5', '.msgpack', '.onnx', '.ckpt'}
CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
NAME = re.compile(r'(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight')
# Options of LoraConfig that change the result of an adapter if they are set.
OPTIONS = ('use_dora', 'lora_bias', 'modules_to_save', 'rank_pattern', 'alpha_pattern',
           'trainable_token_indices', 'target_parameters', 'layer_replication', 'use_qalora',
           'alora_invocation_tokens', 'use_bdlora', 'arrow_config', 'kasa_config',
           'velora_config', 'monteclora_config', 'megatron_config')
ALLOWED = {**dict.fromkeys(OPTIONS, (None, False, [], {})),
           'peft_type': ('LORA',), 'bias': (None, 'none'),
           # the other values also change the base
           'init_lora_weights': (None, True, False, 'gaussian', 'eva', 'orthogonal')}


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
    if head is not None and spec.decoder.tied:
        # the tied output embedding stays a copy of the input embedding
        writes.append((head, next(e for e in table if e.path == 'embed/embedding'), None))
    part = out.with_name(f'{out.name}.part-{os.getpid()}')
    try:
        weights = {t.file for t in tensors.values()}
        shutil.copytree(
            source, part, copy_function=shutil.copyfile, ignore_dangling_symlinks=True,
            ignore=lambda folder, names: [
                # hidden files, linked folders, and weights that differ from the exported ones
                file.name for file in (Path(folder, name) for name in names)
                if file.name.startswith('.') or (file.is_symlink() and file.is_dir())
                or (file.suffix in OTHER and file not in weights)])
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
                  f'{"/".join(path)}: {list(a.shape)} by {list(b.shape)} does not fit the kernel '
                  f'({shape}). Expected its adapter. Fix: merge it into the model it was made for')
        out[*path, 'kernel'] = _merged(kernel, a, b, scale)
    return unflatten_dict(out)


@jax.jit
def _merged(kernel, a, b, scale):
    def add(layer):
        w, a, b = (x.astype(jnp.float32) for x in layer)
        return (w + scale * jnp.matmul(a, b, precision='highest')).astype(kernel.dtype)

    # one layer at a time, so that only one is float32
    return add((kernel, a, b)) if kernel.ndim == 2 else jax.lax.map(add, (kernel, a, b))


def save_adapter(directory, lora_tree, spec, rank: int, alpha: float, base_name: str):
    """Write an adapter that `peft` loads onto a transformers model.

    Args:
      directory: created if it does not exist.
      lora_tree: nested dict of pairs a [.., I, r], b [.., r, O], see nn/linear.py.
      spec: of the base.
      rank: r.
      alpha: the effect is scaled by alpha / rank.
      base_name: name of the base in peft, a hub id or a directory.

    Raises:
      InputError: a pair does not fit a dense layer of the base.
    """
    pairs, entries = flatten_dict(lora_tree, sep='/'), _dense(spec)
    tensors, modules = {}, []
    for path in sorted({p.rpartition('/')[0] for p in pairs}):
        refuse_if(path not in entries, f'{path}: peft cannot store this adapter. Expected dense '
                  'layers of the model. Fix: train with other config.model.lora_targets')
        entry = entries[path]
        # float32 and contiguous: safetensors writes the memory of an array unchanged
        a, b = (np.asarray(pairs[f'{path}/{x}'], np.float32) for x in 'ab')
        refuse_if(
            (*a.shape[:-1], b.shape[-1]) != entry.shape or {a.shape[-1], b.shape[-2]} != {rank},
            f'{path}: an adapter {list(a.shape)} by {list(b.shape)} does not fit. Expected rank '
            f'{rank} for a kernel {list(entry.shape)}. Fix: give rank and base of its training')
        for i, name in enumerate(entry.names):
            modules.append(name.removesuffix('.weight'))
            for letter, x in (('A', a), ('B', b)):
                x = x if entry.layers is None else x[i]
                tensors[f'{PREFIX}{_lora(name, letter)}.weight'] = np.ascontiguousarray(x.T)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={'format': 'pt'})
    # full paths, because 'q_proj' would also match the vision tower's layers
    config = {'peft_type': 'LORA', 'task_type': None, 'base_model_name_or_path': str(base_name),
              'inference_mode': True, 'r': rank, 'lora_alpha': alpha, 'lora_dropout': 0.0,
              'bias': 'none', 'fan_in_fan_out': False, 'use_rslora': False, 'use_dora': False,
              'target_modules': modules}
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + '\n')


def load_adapter(directory, spec) -> tuple[dict, float]:
    """Read an adapter that `peft` wrote.

    Args:
      directory: of the adapter.
      spec: of the base, whose tensors may follow any naming.

    Returns:
      (tree, scale). tree: nested dict of pairs a [.., I, r], b [.., r, O] float32. scale: alpha /
      rank, or alpha / sqrt(rank) with use_rslora.

    Raises:
      InputError: a file is missing or damaged, an option is not implemented, or tensors do not fit
        the dense layers of the base.
    """
    directory = Path(directory)
    rank, scale = _config(directory / CONFIG)
    file, pickled = directory / WEIGHTS, directory / 'adapter_model.bin'
    refuse_if(pickled.is_file() and not file.is_file(), f'{pickled}: pickled. Expected '
              'safetensors. Fix: convert it: python -c "import torch, safetensors.torch as s; '
              f's.save_file(torch.load(\'{pickled}\', weights_only=True), \'{file}\')"')
    entries = _dense(spec)
    want = {_lora(name, letter) for e in entries.values() for name in e.names for letter in 'AB'}
    bound, unbound = {}, []
    for tensor in load.header(file):
        name = NAME.fullmatch(tensor.name)
        module = name and keys.canonical(f'{name[1]}.weight', spec)
        if module and keys.needless(module, spec) and module != 'lm_head.weight':
            continue  # neither peft nor this package reads the states of this layer
        key = module and _lora(module, name[2])
        if key not in want or tensor.dtype is None or key in bound:
            unbound.append(tensor.name)
        else:
            bound[key] = tensor
    refuse_if(unbound or not bound, f'{file}: {len(unbound) or "all"} of its tensors do not fit a '
              f'dense layer of this model: {", ".join(sorted(unbound)) or "the file is empty"}. '
              'Expected an adapter of this base. Fix: choose another adapter')
    tree = {}
    for path, entry in entries.items():
        pair = {letter: [_lora(name, letter) for name in entry.names] for letter in 'AB'}
        if bound.keys().isdisjoint(pair['A'] + pair['B']):
            continue
        for letter, names in pair.items():
            shape = (rank, entry.stored[1]) if letter == 'A' else (entry.stored[0], rank)
            layers = [_read(file, name, bound.get(name), shape) for name in names]
            tree[f'{path}/{letter.lower()}'] = jnp.asarray(
                np.stack(layers) if entry.layers else layers[0])
    return unflatten_dict(tree, sep='/'), scale


def _dense(spec):
    """Return the kernel's entry of every dense layer by its path."""
    return {e.path.removesuffix('/kernel'): e for e in keys.table(spec) if e.form == 'linear'}


def _lora(name, letter):
    """Return the name of an adapter's tensor for the kernel `name`, without '.weight'."""
    return f'{name.removesuffix(".weight")}.lora_{letter}'


def _read(file, name, tensor, shape):
    """Read a [I, r] or b [r, O] of one layer."""
    problem = 'is missing' if tensor is None else f'has shape {list(tensor.shape)}'
    refuse_if(tensor is None or tensor.shape != shape, f'{file}: {name} {problem}. Expected '
              f'{list(shape)} in every layer. Fix: choose an adapter of all layers of this base')
    return load.mapped(tensor).astype(np.float32).T


def _config(file):
    """Read (rank, scale) from an adapter_config.json."""
    with refusing((OSError, ValueError, KeyError, TypeError, AttributeError),
                  f'{file}: r and lora_alpha cannot be read', 'Expected the config of a LoRA '
                  'adapter. Fix: correct the path, or write it again with peft'):
        config = json.loads(file.read_text())
        rank, alpha = int(config['r']), float(config['lora_alpha'])
        if rank < 1:
            raise ValueError(f'r={rank}')
        options = {option: config.get(option) for option in ALLOWED}
    wrong = ', '.join(f'{option}={json.dumps(value)}' for option, value in options.items()
                      if value not in ALLOWED[option])
    refuse_if(wrong, f'{file}: {wrong} is not implemented. Expected a plain LoRA adapter. Fix: '
              'merge it into its base with peft (merge_and_unload) and use the merged model')
    return rank, alpha / (rank**0.5 if config.get('use_rslora') else rank)

"""Low-rank adapters from and to the files of the `peft` library.

An adapter that silently does nothing is the failure to fear, so a tensor that belongs to no kernel
here, a layer without its tensor, or an option that would change the sum is refused by name.
"""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from tpad_jax.errors import InputError
from tpad_jax.models.hf import keys, load
from tpad_jax.models.hf.spec import Spec

CONFIG, WEIGHTS, PICKLE = ('adapter_config.json', 'adapter_model.safetensors',
                           'adapter_model.bin')
PREFIX = 'base_model.model.'
NAME = re.compile(r'(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight')
# Options of LoraConfig that change what an adapter computes; unset, nothing is changed.
OPTIONS = ('use_dora', 'lora_bias', 'modules_to_save', 'rank_pattern', 'alpha_pattern',
           'trainable_token_indices', 'target_parameters', 'layer_replication', 'use_qalora',
           'alora_invocation_tokens', 'use_bdlora', 'arrow_config', 'kasa_config',
           'velora_config', 'monteclora_config', 'megatron_config')
STARTS = (None, True, False, 'gaussian', 'eva', 'orthogonal')  # others change the base, too


def save_adapter(directory, lora_tree, spec: Spec, rank: int, alpha: float, base_name: str):
    """Write an adapter so that `peft` loads it onto the transformers model `base_name`.

    Args:
      directory: made if it is not there.
      lora_tree: nested dict of pairs a [.., I, r], b [.., r, O], see models/lora.py.
      spec: of the base. rank: r. alpha: the effect is scaled by alpha / rank.
      base_name: what peft shall call the base, a hub id or a directory.

    Raises:
      InputError: a pair is of no dense layer of the base, or of another shape.
    """
    pairs, entries = flatten_dict(lora_tree, sep='/'), _dense(spec)
    tensors, modules = {}, []
    for path in sorted({p.rpartition('/')[0] for p in pairs}):
        entry = entries.get(path)
        if entry is None:
            raise InputError(f'the adapter has {path}, which peft cannot hold: it is no dense '
                             'layer of the model; train one with other config.model.lora_targets')
        # float32 and contiguous: safetensors writes an array's memory as it lies
        a, b = (np.asarray(pairs[f'{path}/{x}'], np.float32) for x in 'ab')
        if (*a.shape[:-1], b.shape[-1]) != entry.shape or {a.shape[-1], b.shape[-2]} != {rank}:
            raise InputError(f'the adapter\'s {path} is {list(a.shape)} by {list(b.shape)}, which '
                             f'is not of rank {rank} for a kernel {list(entry.shape)}')
        for i, name in enumerate(entry.names):
            module = name.removesuffix('.weight')
            modules.append(module)
            for letter, x in (('A', a), ('B', b)):
                x = x if entry.layers is None else x[i]
                tensors[f'{PREFIX}{module}.lora_{letter}.weight'] = np.ascontiguousarray(x.T)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={'format': 'pt'})
    # full paths: a bare 'q_proj' would also adapt the vision tower's
    config = {'peft_type': 'LORA', 'task_type': None, 'base_model_name_or_path': str(base_name),
              'inference_mode': True, 'r': rank, 'lora_alpha': alpha, 'lora_dropout': 0.0,
              'bias': 'none', 'fan_in_fan_out': False, 'use_rslora': False, 'use_dora': False,
              'target_modules': modules}
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + '\n')


def load_adapter(directory, spec: Spec) -> tuple[dict, float]:
    """An adapter that `peft` wrote, for the model of `spec`; the base may be of any naming.

    Returns:
      (tree, scale): nested dict of pairs a [.., I, r], b [.., r, O] float32, and alpha / rank (or
      alpha / sqrt(rank), where the config says so).

    Raises:
      InputError: a file is missing or damaged, an option is not implemented, a tensor belongs to
        no dense layer or is of another shape, or a layer lacks one.
    """
    directory = Path(directory)
    rank, scale = _config(directory / CONFIG)
    file = directory / WEIGHTS
    if not file.is_file():
        if (directory / PICKLE).is_file():
            raise InputError(
                f'{directory / PICKLE} is pickled, which is not read; convert it: python -c '
                '"import torch, safetensors.torch as s; s.save_file(torch.load('
                f'\'{directory / PICKLE}\', weights_only=True), \'{file}\')"')
        raise InputError(f'{directory} holds no {WEIGHTS}; give the directory of a peft adapter')
    entries = _dense(spec)
    want = {f'{name.removesuffix(".weight")}.lora_{letter}': (path, letter, i)
            for path, e in entries.items() for i, name in enumerate(e.names) for letter in 'AB'}
    found, unbound = {}, []
    for tensor in load.header(file).values():
        name = NAME.fullmatch(tensor.name)
        module = name and keys.canonical(f'{name[1]}.weight', spec)
        if module and keys.needless(module, spec) and module != 'lm_head.weight':
            continue  # of a layer whose states nothing reads, with peft as here
        key = module and f'{module.removesuffix(".weight")}.lora_{name[2]}'
        if key not in want or tensor.dtype is None or want[key] in found:
            unbound.append(tensor.name)
        else:
            found[want[key]] = tensor
    if unbound or not found:
        raise InputError(f'{file}: {len(unbound) or "all"} of its tensors belong to no dense layer '
                         f'of this model: {", ".join(sorted(unbound)) or "there are none"}; use '
                         'an adapter of this base')
    tree = {}
    with open(file, 'rb', buffering=0) as f:
        for path in sorted({p for p, _, _ in found}):
            for letter in 'AB':
                layers = [_read(f, found.get((path, letter, i)), entries[path], name, letter, rank)
                          for i, name in enumerate(entries[path].names)]
                whole = np.stack(layers) if entries[path].layers else layers[0]
                tree[f'{path}/{letter.lower()}'] = jnp.asarray(whole)
    return unflatten_dict(tree, sep='/'), scale


def _dense(spec):
    """Path of a dense layer -> its kernel's entry."""
    return {e.path.removesuffix('/kernel'): e for e in keys.table(spec) if e.form == 'linear'}


def _read(file, tensor, entry, name, letter, rank):
    """One layer's a [I, r] or b [r, O]."""
    if tensor is None:
        raise InputError(f'{file.name} has no lora_{letter} of {name.removesuffix(".weight")}, '
                         'though the other layers have one; adapters of some layers only are not '
                         'implemented')
    rows, columns = entry.stored
    shape = (rank, columns) if letter == 'A' else (rows, rank)
    if tensor.shape != shape:
        raise InputError(f'{file.name}: {tensor.name} is {list(tensor.shape)}, not {list(shape)}; '
                         'use an adapter of this base')
    array = np.empty(shape, tensor.dtype)
    load.read_into(array, tensor, file)
    return array.astype(np.float32).T


def _config(file):
    """(rank, scale) of an adapter_config.json."""
    try:
        found = json.loads(file.read_text())
        kind, rank, alpha = found.get('peft_type'), int(found['r']), float(found['lora_alpha'])
        if rank < 1:
            raise ValueError(rank)
    except FileNotFoundError as error:
        raise InputError(f'{file.parent} holds no {CONFIG}; give the directory of a peft '
                         'adapter') from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{file} is no config of a LoRA adapter: r and lora_alpha cannot be '
                         'read; write it anew with peft') from error
    wrong = {o: found[o] for o in OPTIONS if found.get(o)}
    if kind != 'LORA':
        wrong['peft_type'] = kind
    if found.get('bias', 'none') != 'none':
        wrong['bias'] = found['bias']
    if found.get('init_lora_weights') not in STARTS:
        wrong['init_lora_weights'] = found['init_lora_weights']
    if wrong:
        options = ', '.join(f'{o}={json.dumps(value)}' for o, value in wrong.items())
        raise InputError(f'{file} asks for what is not implemented: {options}; merge the adapter '
                         'into its base with peft (merge_and_unload) and use the merged model')
    return rank, alpha / (rank**0.5 if found.get('use_rslora') else rank)

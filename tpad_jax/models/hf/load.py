"""Read the parameters of a checkpoint directory in their dtype onto their devices.

Names and headers are checked first, and one error lists all faults. Files are then read in small
pieces into the array that a device needs (its layers and its rows of them). They are never mapped
or read completely, so a process uses little more memory than its parameters.
"""

import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from tpad_jax.errors import refuse_if, refusing
from tpad_jax.models.hf import keys
from tpad_jax.models.hf.sentence import TextEncoder
from tpad_jax.models.hf.spec import Spec

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLES = ('*.bin', '*.pt', '*.pth')
FLOATS = {'F64': np.dtype('float64'), 'F32': np.dtype('float32'), 'F16': np.dtype('float16'),
          'BF16': np.dtype('bfloat16')}
PIECE = 256 << 10  # bytes a thread reads at a time, which fit into its cache
THREADS = 8  # that read the layers of one stack
ALIGNED = 64  # bytes of alignment with which JAX on CPU does not copy an array


@dataclass(frozen=True)
class Tensor:
    """The place of one tensor.

    Attributes:
      file: that holds it.
      name: in the file.
      dtype: None if it is not a float.
      shape: of the tensor.
      start: byte of the file at which its data starts.
    """

    file: Path
    name: str
    dtype: np.dtype | None
    shape: tuple[int, ...]
    start: int


def load(directory, spec: Spec | TextEncoder, *, dtype, sharding=None) -> dict:
    """Read the parameters of a checkpoint.

    A checkpoint of a bare model has no output embedding. The result then has no 'head', even if the
    Spec does not tie it.

    Args:
      directory: with config.json and model.safetensors or model.safetensors.index.json.
      spec: of its config.json, see spec.read.
      dtype: of all parameters, for example 'bfloat16'.
      sharding: a Sharding for all parameters, or a tree of them. None: the first device.

    Returns:
      Nested dict of arrays with the paths and shapes of `keys.table`.

    Raises:
      InputError: files are missing or damaged, tensors are missing, unexpected or of another shape,
        or an output embedding differs from the one it is tied to.
    """
    tensors = bind(directory, spec)
    if not isinstance(sharding, dict):
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        sharding = {entry.path: sharding for entry in keys.table(spec)}
    sharding = flatten_dict(sharding, sep='/')
    return unflatten_dict({e.path: _placed(e, tensors, np.dtype(dtype), sharding[e.path])
                           for e in keys.table(spec) if e.names[0] in tensors}, sep='/')


def _placed(entry, tensors, dtype, sharding):
    """Read a parameter onto its devices. Devices with the same part of it share one array."""
    @cache
    def part(span):
        """Read the part `span`, a (start, stop) per axis."""
        out = _empty([stop - start for start, stop in span], dtype)
        layers, names = out[None], entry.names
        if entry.layers is not None:
            layers, names, span = out, names[slice(*span[0])], span[1:]
        with ThreadPoolExecutor(min(THREADS, os.cpu_count())) as pool:
            # the list raises the error of a thread
            list(pool.map(lambda x, name: _fill(x, entry, span, tensors[name]), layers, names))
        return out

    def at(index):
        return part(tuple(s.indices(n)[:2] for s, n in zip(index, entry.shape, strict=True)))

    array = jax.make_array_from_callback(entry.shape, sharding, at, dtype=dtype)
    # wait: a device may still be copying from the host's array
    return array.block_until_ready()


def _fill(out, entry, span, tensor):
    """Read the part `span` of one layer into `out`, in pieces of complete rows of the file."""
    turned = entry.form != 'plain'
    first, last = span[-1] if turned else span[0]
    rest = tuple(slice(*s) for s in (span[:-1] if turned else span[1:]))
    if tensor.dtype == out.dtype == ml_dtypes.bfloat16:
        # numpy copies native types faster
        out, tensor = out.view(np.uint16), replace(tensor, dtype=np.dtype(np.uint16))
    row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    step = max(1, PIECE // max(1, row))
    with open(tensor.file, 'rb', buffering=0) as file:
        file.seek(tensor.start + first * row)
        for begin in range(0, last - first, step):
            rows = read_rows(file, tensor, min(step, last - first - begin))
            if turned:
                out[..., begin:begin + step] = entry.here(rows)[rest]
            else:
                out[begin:begin + step] = rows[:, *rest]


def read_rows(file, tensor, count):
    """Read the next `count` rows of a tensor from its file.

    Raises:
      InputError: the file ends before.
    """
    shape = count, *tensor.shape[1:]
    size = math.prod(shape) * tensor.dtype.itemsize
    data = np.fromfile(file, np.uint8, size)
    refuse_if(len(data) < size, f'{tensor.file}: became shorter while it was read. Expected a '
              'complete file. Fix: copy it again')
    return data.view(tensor.dtype).reshape(shape)


def mapped(tensor):
    """Map a complete tensor into memory, read only."""
    return np.memmap(tensor.file, tensor.dtype, 'r', tensor.start, tensor.shape)


def _empty(shape, dtype):
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start:start + size].view(dtype).reshape(shape)


def bind(directory, spec: Spec | TextEncoder) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by canonical name, including needless ones.

    Raises:
      InputError: see `load`.
    """
    directory = Path(directory)
    want = {name: entry for entry in keys.table(spec) for name in entry.names}
    bound, tensors = {}, stored(directory)
    faults = {kind: [] for kind in ('missing', 'unexpected', 'of another shape', 'not a float')}
    for tensor in tensors:
        name = keys.canonical(tensor.name, spec)
        if name in bound:
            faults['unexpected'].append(f'{tensor.name} (in addition to {bound[name].name})')
        elif name not in want and not keys.needless(name, spec):
            faults['unexpected'].append(tensor.name)
        elif name in want and tensor.shape != want[name].stored:
            faults['of another shape'].append(
                f'{tensor.name} {list(tensor.shape)}, not {list(want[name].stored)}')
        elif name in want and tensor.dtype is None:
            faults['not a float'].append(tensor.name)
        bound.setdefault(name, tensor)
    missing = sorted(want.keys() - bound.keys())
    if missing != ['lm_head.weight'] or not _bare(directory, tensors):
        faults['missing'] = missing
    listed = '; '.join(f'{kind} {", ".join(sorted(names))}'
                       for kind, names in faults.items() if names)
    refuse_if(listed, f'{directory}: its tensors do not fit its config.json: {listed}. Expected '
              'the config.json they were saved with. Fix: download both again')
    if isinstance(spec, TextEncoder):
        return bound
    embed = bound[keys.embed(spec)]
    head = bound.get('lm_head.weight', embed)
    refuse_if(spec.decoder.tied and head is not embed and not _equal(head, embed),
              f'{directory}: {head.name} differs from {embed.name}. Expected equal tensors, as '
              'config.json ties them. Fix: set tie_word_embeddings to false')
    return bound


def _equal(first, second):
    """Whether two tensors have the same bytes; a complete comparison would take their memory."""
    return (first.dtype, first.shape) == (second.dtype, second.shape) and all(
        a.tobytes() == b.tobytes() for a, b in zip(mapped(first), mapped(second), strict=True))


def _bare(directory, tensors):
    """Whether a checkpoint is that of a model without its output embedding."""
    names = json.loads((Path(directory) / 'config.json').read_text()).get('architectures') or []
    generates = not names or any(
        n.endswith(('ForConditionalGeneration', 'ForCausalLM')) for n in names)
    # only the names of a bare model's text start so
    return not generates or any(re.match(r'(language_model\.)?embed_tokens\.', t.name)
                                for t in tensors)


def stored(directory) -> list[Tensor]:
    """List all tensors of a checkpoint directory from its index and its headers.

    Raises:
      InputError: there are no safetensors, a shard is missing or damaged, or the index is unusable.
    """
    directory = Path(directory)
    if (directory / SINGLE).is_file():
        return header(directory / SINGLE)
    pickles = sorted(p.name for kind in PICKLES for p in directory.glob(kind))
    refuse_if(
        pickles and not (directory / INDEX).is_file(), f'{directory}: its weights are pickled '
        f'({", ".join(pickles)}), and reading those can run any code. Expected safetensors. Fix: '
        'if you trust them, convert them: python -c "from transformers import '
        f'AutoModelForImageTextToText as M; M.from_pretrained(\'{directory}\', dtype=\'auto\')'
        f'.save_pretrained(\'{directory}\')"')
    with refusing((OSError, ValueError, KeyError, TypeError, AttributeError),
                  f'{directory}: has neither {SINGLE} nor a usable {INDEX}',
                  'Expected a weight_map from names to files. Fix: download the weights again'):
        shards = sorted(set(json.loads((directory / INDEX).read_text())['weight_map'].values()))
        if any(Path(s).name != s for s in shards):
            raise ValueError('a file of another directory')
    lost = [s for s in shards if not (directory / s).is_file()]
    refuse_if(lost, f'{directory}: lacks {len(lost)} of {len(shards)} files: {", ".join(lost)}. '
              'Expected all files of its index. Fix: download them')
    return [t for s in shards for t in header(directory / s)]


def header(file: Path) -> list[Tensor]:
    """Read the tensors' places from the header of a safetensors file.

    Raises:
      InputError: the file is truncated or not a safetensors file.
    """
    with (refusing((SafetensorError, OSError, ValueError), f'{file}: damaged',
                   'Expected safetensors. Fix: download it again'), safe_open(file, 'numpy')):
        pass  # this checks the header against the file's size, and every tensor's
    with open(file, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')
        entries = json.loads(f.read(size))
    return [Tensor(file, name, FLOATS.get(entry['dtype']), tuple(entry['shape']),
                   8 + size + entry['data_offsets'][0])
            for name, entry in entries.items() if name != '__metadata__']

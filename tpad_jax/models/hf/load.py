"""Read the parameters of a checkpoint directory in their dtype onto their devices.

Names and headers are checked first, and one error lists all faults. Files are then read in small
pieces into the array that a device needs (its layers and its rows of them). They are never mapped
or read completely, so a process uses little more memory than its parameters.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax.errors import InputError
from tpad_jax.models.hf import keys
from tpad_jax.models.hf.spec import Spec

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
EMBED = 'model.language_model.embed_tokens.weight'
PICKLES = ('*.bin', '*.pt', '*.pth')
FLOATS = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
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


def load(directory, spec: Spec, *, dtype, sharding=None) -> dict:
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
    dtype = np.dtype(dtype)
    each = flatten_dict(sharding, sep='/') if isinstance(sharding, dict) else None
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    out = {}
    with ExitStack() as stack:
        files = {f: stack.enter_context(open(f, 'rb', buffering=0))
                 for f in {t.file for t in tensors.values()}}
        for entry in keys.table(spec):
            if entry.names[0] in tensors:
                out[entry.path] = _placed(entry, tensors, files, dtype,
                                          each[entry.path] if each else sharding)
    return unflatten_dict(out, sep='/')


def _placed(entry, tensors, files, dtype, sharding):
    pieces = {}  # devices with the same part share one array

    def part(index):
        span = tuple(s.indices(n)[:2] for s, n in zip(index, entry.shape, strict=True))
        if span not in pieces:
            pieces[span] = _part(entry, span, tensors, files, dtype)
        return pieces[span]

    made = jax.make_array_from_callback(entry.shape, sharding, part, dtype=dtype)
    # wait: a device may still be copying from the host's array
    return made.block_until_ready()


def _part(entry, span, tensors, files, dtype):
    """Read the part `span`, a (start, stop) per axis, of a parameter."""
    out = _empty([stop - start for start, stop in span], dtype)
    if entry.layers is None:
        tensor = tensors[entry.name]
        _fill(out, entry, span, tensor, files[tensor.file])
        return out

    def read_layer(i):
        tensor = tensors[entry.names[span[0][0] + i]]
        _fill(out[i], entry, span[1:], tensor, files[tensor.file])

    with ThreadPoolExecutor(min(THREADS, os.cpu_count())) as pool:
        list(pool.map(read_layer, range(len(out))))  # raises the error of a thread
    return out


def _fill(out, entry, span, tensor, file):
    """Read the part `span` of one layer into `out`, in pieces of complete rows of the file."""
    turned = entry.form != 'plain'
    first, last = span[-1] if turned else span[0]
    rest = tuple(slice(*s) for s in (span[:-1] if turned else span[1:]))
    dtype, plain = tensor.dtype, tensor.dtype == out.dtype
    if plain and out.dtype == ml_dtypes.bfloat16:
        out, dtype = out.view(np.uint16), np.dtype(np.uint16)  # numpy copies native types faster
    row = math.prod(tensor.shape[1:])
    step = max(1, PIECE // max(1, row * dtype.itemsize))
    for begin in range(first, last, step):
        end = min(begin + step, last)
        rows = np.empty((end - begin, *tensor.shape[1:]), dtype)
        read_into(rows, tensor, file, begin * row * dtype.itemsize)
        piece = slice(begin - first, end - first)
        if turned:
            out[..., piece] = entry.here(rows)[rest]
        else:
            out[piece] = rows[(slice(None), *rest)]


def read_into(array, tensor, file, skip=0):
    """Fill a contiguous array from a tensor's data.

    Args:
      array: to fill.
      tensor: to read.
      file: of the tensor, open and unbuffered.
      skip: bytes of the tensor to skip.

    Raises:
      InputError: the file ends before.
    """
    view = memoryview(array.reshape(-1).view(np.uint8))
    position = tensor.start + skip
    while view:
        count = os.preadv(file.fileno(), [view], position)
        if not count:
            raise InputError(f'{tensor.file}: became shorter while it was read. Expected a '
                             'complete file. Fix: copy it again')
        view, position = view[count:], position + count


def equal(first, second):
    """Whether two tensors have the same bytes, read row by row."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with open(first.file, 'rb', buffering=0) as f, open(second.file, 'rb', buffering=0) as g:
        rows = np.empty((2, *first.shape[1:]), first.dtype)
        for i in range(first.shape[0]):
            for row, tensor, file in zip(rows, (first, second), (f, g), strict=True):
                read_into(row, tensor, file, i * row.nbytes)
            if rows[0].tobytes() != rows[1].tobytes():
                return False
    return True


def _empty(shape, dtype):
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start:start + size].view(dtype).reshape(shape)


def bind(directory, spec: Spec) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by canonical name, including needless ones.

    Raises:
      InputError: see `load`.
    """
    directory = Path(directory)
    want = {name: entry for entry in keys.table(spec) for name in entry.names}
    bound, unexpected, shapes, kinds = {}, [], [], []
    tensors = stored(directory)
    for tensor in tensors:
        name = keys.canonical(tensor.name, spec)
        if name in bound:
            unexpected.append(f'{tensor.name} (in addition to {bound[name].name})')
        elif name not in want and not keys.needless(name, spec):
            unexpected.append(tensor.name)
        elif name in want and tensor.shape != want[name].stored:
            shapes.append(f'{tensor.name} {list(tensor.shape)}, not {list(want[name].stored)}')
        elif name in want and tensor.dtype is None:
            kinds.append(tensor.name)
        bound.setdefault(name, tensor)
    missing = sorted(want.keys() - bound.keys())
    if missing == ['lm_head.weight'] and _bare(directory, tensors):
        missing = []
    faults = [f'{what} {", ".join(names)}' for what, names in (
        ('missing', missing), ('unexpected', sorted(unexpected)),
        ('of another shape', sorted(shapes)), ('not a float', sorted(kinds))) if names]
    if faults:
        raise InputError(f'{directory}: its tensors do not fit its config.json: '
                         f'{"; ".join(faults)}. Expected the config.json they were saved with. '
                         'Fix: download both again')
    head, embed = bound.get('lm_head.weight'), bound[EMBED]
    if spec.decoder.tied and head is not None and not equal(head, embed):
        raise InputError(f'{directory}: {head.name} differs from {embed.name}. Expected equal '
                         'tensors, because config.json ties them. Fix: set tie_word_embeddings to '
                         'false')
    return {name: t for name, t in bound.items() if name in want or keys.needless(name, spec)}


def _bare(directory, tensors):
    """Whether a checkpoint is that of a model without its output embedding."""
    try:
        names = json.loads((directory / 'config.json').read_text()).get('architectures') or []
    except (OSError, ValueError, AttributeError):
        names = []
    generates = not names or any(n.endswith('ForConditionalGeneration') for n in names)
    # only the names of a bare model's text start so
    return not generates or any(t.name.startswith('language_model.embed_tokens.') for t in tensors)


def stored(directory) -> list[Tensor]:
    """List all tensors of a checkpoint directory from its index and its headers.

    Raises:
      InputError: there are no safetensors, a shard is missing or damaged, or the index is unusable.
    """
    directory = Path(directory)
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return list(header(single).values())
    if not index.is_file():
        pickles = sorted(p.name for kind in PICKLES for p in directory.glob(kind))
        if pickles:
            raise InputError(
                f'{directory}: its weights are pickled ({pickles[0]}), and reading those can run '
                'any code. Expected safetensors. Fix: if you trust them, convert them: python -c '
                f'"from transformers import AutoModelForImageTextToText as M; M.from_pretrained('
                f'\'{directory}\', dtype=\'auto\').save_pretrained(\'{directory}\')"')
        raise InputError(f'{directory}: has neither {SINGLE} nor {INDEX}. Expected one of them. '
                         'Fix: download the weights')
    try:
        shards = sorted(set(json.loads(index.read_text())['weight_map'].values()))
        sound = all(Path(s).name == s for s in shards)
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f'{index}: damaged. Expected a weight_map from names to files of this '
                         'directory. Fix: download it again')
    lost = [s for s in shards if not (directory / s).is_file()]
    if lost:
        raise InputError(f'{directory}: lacks {len(lost)} of {len(shards)} files: '
                         f'{", ".join(lost)}. Expected all files of its index. Fix: download them')
    return [t for s in shards for t in header(directory / s).values()]


def header(file) -> dict[str, Tensor]:
    """Read the header of a safetensors file: {name: Tensor}.

    Raises:
      InputError: the file is truncated or not a safetensors file.
    """
    file = Path(file)
    total = file.stat().st_size
    with open(file, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')
        if total < 8 or size > total - 8:
            raise InputError(f'{file}: damaged, its header is longer than its {total} bytes. '
                             'Expected a safetensors file. Fix: download it again')
        text = f.read(size)
    try:
        out, end = {}, 8 + size
        for name, about in json.loads(text).items():
            if name == '__metadata__':
                continue
            dtype = FLOATS.get(about['dtype'])
            dtype = None if dtype is None else np.dtype(dtype)
            shape, (first, last) = tuple(about['shape']), about['data_offsets']
            if dtype is not None and last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(name)
            out[name] = Tensor(file, name, dtype, shape, 8 + size + first)
            end = max(end, 8 + size + last)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{file}: damaged. Expected the header of a safetensors file. Fix: '
                         'download it again') from error
    if end != total:
        raise InputError(f'{file}: damaged, it has {total} bytes. Expected {end}, as its header '
                         'describes. Fix: download it again')
    return out

"""Parameters from a checkpoint directory, straight into their dtype and onto their devices.

Everything that can be wrong is said from names and headers, in one error, before a byte of data is
read. Files are then read by small pieces into the array a device needs (its layers and
its rows of them), never mapped and never whole: a process holds little more than its parameters.
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
PIECE = 256 << 10  # bytes a thread reads at once: what its cache holds
THREADS = 8  # that read layers of one stack
ALIGNED = 64  # where an array must begin for jax on CPU to take it without a copy


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: its file, its name there, dtype (None: no float) and place."""

    file: Path
    name: str
    dtype: np.dtype | None
    shape: tuple[int, ...]
    start: int


def load(directory, spec: Spec, *, dtype, sharding=None) -> dict:
    """The parameters of a checkpoint.

    A checkpoint saved from a bare model has no output embedding; then there is no 'head', though
    the Spec does not tie it.

    Args:
      directory: with config.json and model.safetensors or model.safetensors.index.json.
      spec: of its config.json, see spec.read.
      dtype: of all parameters, e.g. 'bfloat16'.
      sharding: None (the first device), a Sharding for all, or a tree of them like the parameters.

    Returns:
      Nested dict of arrays; tree and shapes are those of `keys.table`.

    Raises:
      InputError: no safetensors, a file that is missing or damaged, or tensors that are missing,
        unexpected or of another shape; all of these are listed. An output embedding that differs
        from the one it is tied to.
    """
    found = bind(directory, spec)
    dtype = np.dtype(dtype)
    each = flatten_dict(sharding, sep='/') if isinstance(sharding, dict) else None
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    out = {}
    with ExitStack() as stack:
        files = {f: stack.enter_context(open(f, 'rb', buffering=0))
                 for f in {t.file for t in found.values()}}
        for entry in keys.table(spec):
            if entry.names[0] in found:
                out[entry.path] = _placed(entry, found, files, dtype,
                                          each[entry.path] if each else sharding)
    return unflatten_dict(out, sep='/')


def _placed(entry, found, files, dtype, sharding):
    pieces = {}  # devices that hold the same part share one reading

    def part(index):
        span = tuple(s.indices(n)[:2] for s, n in zip(index, entry.shape, strict=True))
        if span not in pieces:
            pieces[span] = _part(entry, span, found, files, dtype)
        return pieces[span]

    made = jax.make_array_from_callback(entry.shape, sharding, part, dtype=dtype)
    # one after the other: a device may still be copying from the host's array
    return made.block_until_ready()


def _part(entry, span, found, files, dtype):
    """The part `span`, a (start, stop) per axis, of a parameter."""
    out = _empty([stop - start for start, stop in span], dtype)
    if entry.layers is None:
        tensor = found[entry.name]
        _fill(out, entry, span, tensor, files[tensor.file])
        return out

    def one(i):
        tensor = found[entry.names[span[0][0] + i]]
        _fill(out[i], entry, span[1:], tensor, files[tensor.file])

    with ThreadPoolExecutor(min(THREADS, os.cpu_count())) as pool:
        for _ in pool.map(one, range(len(out))):  # which also raises what a thread raised
            pass
    return out


def _fill(out, entry, span, tensor, file):
    """Read the part `span` of one layer into `out`, by pieces of whole rows of the file."""
    turned = entry.form != 'plain'
    first, last = span[-1] if turned else span[0]
    rest = tuple(slice(*s) for s in (span[:-1] if turned else span[1:]))
    dtype, plain = tensor.dtype, tensor.dtype == out.dtype
    if plain and out.dtype == ml_dtypes.bfloat16:
        out, dtype = out.view(np.uint16), np.dtype(np.uint16)  # numpy copies its own types faster
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
    """Fill the contiguous `array` from a tensor's data, `skip` bytes into it.

    Raises:
      InputError: the file ends before.
    """
    view = memoryview(array.reshape(-1).view(np.uint8))
    at = tensor.start + skip
    while view:
        count = os.preadv(file.fileno(), [view], at)
        if not count:
            raise InputError(f'{tensor.file} became shorter while it was read; copy it again')
        view, at = view[count:], at + count


def equal(one, two):
    """Whether two tensors hold the same bytes, read row by row."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    with open(one.file, 'rb', buffering=0) as f, open(two.file, 'rb', buffering=0) as g:
        row = np.empty(one.shape[1:], one.dtype), np.empty(one.shape[1:], one.dtype)
        for i in range(one.shape[0]):
            for array, tensor, file in zip(row, (one, two), (f, g), strict=True):
                read_into(array, tensor, file, i * array.nbytes)
            if row[0].tobytes() != row[1].tobytes():
                return False
    return True


def _empty(shape, dtype):
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNED, np.uint8)
    start = -room.ctypes.data % ALIGNED
    return room[start:start + size].view(dtype).reshape(shape)


def bind(directory, spec: Spec) -> dict[str, Tensor]:
    """The tensors a checkpoint has of a Spec's table, by canonical name; needless ones too.

    Raises:
      InputError: as `load` says.
    """
    directory = Path(directory)
    want = {name: entry for entry in keys.table(spec) for name in entry.names}
    found, unexpected, shapes, kinds = {}, [], [], []
    tensors = stored(directory)
    for tensor in tensors:
        name = keys.canonical(tensor.name, spec)
        if name in found:
            unexpected.append(f'{tensor.name} (beside {found[name].name})')
        elif name not in want and not keys.needless(name, spec):
            unexpected.append(tensor.name)
        elif name in want and tensor.shape != want[name].stored:
            shapes.append(f'{tensor.name} {list(tensor.shape)}, not {list(want[name].stored)}')
        elif name in want and tensor.dtype is None:
            kinds.append(tensor.name)
        found.setdefault(name, tensor)
    missing = sorted(want.keys() - found.keys())
    if missing == ['lm_head.weight'] and _bare(directory, tensors):
        missing = []
    faults = [f'{what} {", ".join(names)}' for what, names in (
        ('missing', missing), ('unexpected', sorted(unexpected)),
        ('of another shape', sorted(shapes)), ('of no float dtype', sorted(kinds))) if names]
    if faults:
        raise InputError(f'{directory}: its tensors are not those its config.json asks for: '
                         f'{"; ".join(faults)}; use the config.json they were saved with')
    head, embed = found.get('lm_head.weight'), found[EMBED]
    if spec.decoder.tied and head is not None and not equal(head, embed):
        raise InputError(f'{directory}: {head.name} differs from {embed.name}, which config.json '
                         'ties it to (tie_word_embeddings); set that to false where it stands')
    return {name: t for name, t in found.items() if name in want or keys.needless(name, spec)}


def _bare(directory, tensors):
    """Whether a checkpoint is of a model without its output embedding."""
    try:
        names = json.loads((directory / 'config.json').read_text()).get('architectures') or []
    except (OSError, ValueError, AttributeError):
        names = []
    whole = not names or any(n.endswith('ForConditionalGeneration') for n in names)
    # only a bare model's text has a name that begins so
    return not whole or any(t.name.startswith('language_model.embed_tokens.') for t in tensors)


def stored(directory) -> list[Tensor]:
    """All tensors of a checkpoint directory, from its index and its headers.

    Raises:
      InputError: no safetensors, a shard that is missing or damaged, or an unusable index.
    """
    directory = Path(directory)
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return list(header(single).values())
    if not index.is_file():
        pickles = sorted(p.name for kind in PICKLES for p in directory.glob(kind))
        if pickles:
            raise InputError(
                f'{directory} holds pickled weights ({pickles[0]}), which can run any code when '
                'read; convert them where you trust them: python -c "from transformers import '
                f'AutoModelForImageTextToText as M; M.from_pretrained(\'{directory}\', '
                f'dtype=\'auto\').save_pretrained(\'{directory}\')"')
        raise InputError(f'{directory} holds neither {SINGLE} nor {INDEX}; download them')
    try:
        shards = sorted(set(json.loads(index.read_text())['weight_map'].values()))
        sound = all(Path(s).name == s for s in shards)
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f'{index} is damaged: it has no weight_map of names to files beside it; '
                         'download it again')
    lost = [s for s in shards if not (directory / s).is_file()]
    if lost:
        raise InputError(f'{directory} lacks {len(lost)} of the {len(shards)} files its index '
                         f'names: {", ".join(lost)}; download them')
    return [t for s in shards for t in header(directory / s).values()]


def header(file) -> dict[str, Tensor]:
    """Name -> Tensor of one safetensors file; only its header is read.

    Raises:
      InputError: the file is truncated or no safetensors file.
    """
    file = Path(file)
    total = file.stat().st_size
    with open(file, 'rb') as f:
        size = int.from_bytes(f.read(8), 'little')
        if total < 8 or size > total - 8:
            raise InputError(f'{file} is damaged: its header does not fit into its {total} bytes; '
                             'download it again')
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
        raise InputError(f'{file} is damaged: its header is not that of a safetensors file; '
                         'download it again') from error
    if end != total:
        raise InputError(f'{file} is damaged: its header describes {end} bytes, but it has '
                         f'{total}; download it again')
    return out

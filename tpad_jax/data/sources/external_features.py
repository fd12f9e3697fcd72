"""Item features that were computed elsewhere: a file of rows keyed by item id -> rows by number.

    features.npy            [N, D], and beside it features.npy.ids: a text file, line n the id of
                            row n (UTF-8; an empty line: the row is of no item)
    features.safetensors    tensor 'features' [N, D], and the ids: either a tensor 'ids', uint8, the
                            same text as bytes, or metadata 'ids', a JSON list of strings
    features.parquet        a row per item: column item_id (string), column features (a list or an
                            array of numbers)
"""

import json
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # before safetensors, which cannot read bfloat16 without it
import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open

from tpad_jax.data.untrusted import DAMAGE
from tpad_jax.errors import InputError

SHOWN = 5  # ids an error names
# what the readers raise on damage; polars panics on some, which is no Exception
FAILURES = (OSError, *DAMAGE, SafetensorError, pl.exceptions.PolarsError,
            pl.exceptions.PanicException)
MAX_WIDTH = 65_536  # numbers per item; MLLMs have some thousand


@dataclass(frozen=True)
class Given:
    """Rows of the catalogue, and what the file held besides.

    Attributes:
      rows: float32 [V+1, D], row 0 zero.
      unknown: how many of the file's ids no item has; some: the first of them.
      repeated: how many rows said again what an earlier row of their item had said.
    """

    rows: np.ndarray
    unknown: int
    some: tuple[str, ...]
    repeated: int


def read(file, asins: list[str]) -> Given:
    """The rows of a file in the catalogue's order.

    Args:
      file: .npy, .safetensors or .parquet, see above.
      asins: the items' ids by number; [0] is the padding item and is not looked up.

    Raises:
      InputError: the file cannot be read; an item has no row, or two that differ; a number is not
        finite.
    """
    file = Path(file)
    readers = {'.npy': _npy, '.safetensors': _safetensors, '.parquet': _parquet}
    if file.suffix not in readers:
        raise InputError(f'{file}: features are read from {", ".join(readers)}; give one of these')
    if not file.is_file():
        raise InputError(f'{file} does not exist; give a file of item features')
    try:
        ids, found = readers[file.suffix](file)
    except InputError:
        raise
    except FAILURES as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f'{file} cannot be read as {file.suffix[1:]} of item features: '
                         f'{why}; see tpad_jax/data/sources/external_features.py') from error
    if found.ndim != 2 or not 0 < found.shape[1] <= MAX_WIDTH or found.dtype.kind not in 'fiu':
        raise InputError(f'{file}: features are {found.dtype} {list(found.shape)}, but must be '
                         f'numbers [items, width], the width at most {MAX_WIDTH}')
    if len(ids) != len(found):
        raise InputError(f'{file}: {len(ids)} ids for {len(found)} rows; give every row its id')
    return _align(file, ids, found, asins)


def width(file) -> int:
    """How many numbers an item has in a file, from its header alone.

    Args:
      file: .npy, .safetensors or .parquet, see above.

    Raises:
      InputError: the file has no such header.
    """
    file = Path(file)
    try:
        if file.suffix == '.npy':
            return np.load(file, mmap_mode='r', allow_pickle=False).shape[1]
        if file.suffix == '.safetensors':
            with safe_open(file, framework='np') as tensors:
                return tensors.get_slice('features').get_shape()[1]
        return len(pl.scan_parquet(file).select('features').head(1).collect().item())
    except (*FAILURES, IndexError) as error:
        raise InputError(f'{file}: the width of its features cannot be read '
                         f'({type(error).__name__}). Expected a .npy, .safetensors or .parquet of '
                         'item features. Fix: give such a file') from error


def _align(file, ids, found, asins) -> Given:
    number = {asin: item for item, asin in enumerate(asins) if item}
    row_of, unknown, repeats = np.full(len(asins), -1), [], []
    for row, name in enumerate(ids):
        item = number.get(name)
        if item is None:
            unknown += [name] if name else []
        elif row_of[item] < 0:
            row_of[item] = row
        else:
            repeats.append((row_of[item], row))
    absent = [asins[item] for item in np.flatnonzero(row_of[1:] < 0) + 1]
    if absent:
        raise InputError(f'{file} lacks {len(absent)} of {len(number)} items: {_first(absent)}; '
                         'add their rows')
    differing = [ids[b] for a, b in repeats if not np.array_equal(found[a], found[b])]
    if differing:
        raise InputError(f'{file}: {len(differing)} rows differ from an earlier row of their item: '
                         f'{_first(differing)}; leave one row for each')
    rows = np.zeros((len(asins), found.shape[1]), np.float32)
    with np.errstate(over='ignore'):  # a float64 too large becomes inf, and is named below
        rows[1:] = found[row_of[1:]]
    broken = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(broken):
        raise InputError(f'{file}: features of {len(broken)} items are not finite: '
                         f'{_first([asins[item] for item in broken])}; compute these anew')
    return Given(rows, len(unknown), tuple(unknown[:SHOWN]), len(repeats))


def _first(names) -> str:
    return ', '.join(names[:SHOWN]) + (', ...' if len(names) > SHOWN else '')


def _npy(file):
    beside = file.with_name(file.name + '.ids')
    if not beside.is_file():
        raise InputError(f'{file} has no {beside.name} beside it; write one, a line with its item '
                         'id for every row')
    found = np.load(file, mmap_mode='r', allow_pickle=False)
    if not isinstance(found, np.ndarray):
        raise ValueError('it is an .npz by another name')
    return _lines(beside.read_bytes()), found


def _safetensors(file):
    with safe_open(file, framework='np') as tensors:
        names, about = tensors.keys(), tensors.metadata() or {}
        if 'features' not in names or not ('ids' in names or 'ids' in about):
            raise InputError(f'{file} holds {", ".join(sorted(names)) or "nothing"}; it needs the '
                             "tensor 'features' and the ids, as a tensor or in its metadata")
        if 'ids' in names:
            ids = _lines(tensors.get_tensor('ids').astype(np.uint8).tobytes())
        else:
            ids = [str(name) for name in json.loads(about['ids'])]
        try:
            found = tensors.get_tensor('features')
        except AttributeError as error:  # a number's form that numpy does not have
            raise ValueError(str(error)) from error
        # numpy itself cannot tell whether a bfloat16 is a number
        return ids, found.astype(np.float32) if found.dtype == ml_dtypes.bfloat16 else found


def _parquet(file):
    table = pl.read_parquet(file)
    absent = [name for name in ('item_id', 'features') if name not in table.columns]
    if absent:
        raise InputError(f'{file} has the columns {", ".join(table.columns)}; it lacks '
                         f'{", ".join(absent)}')
    ids, column = table['item_id'].cast(pl.String).fill_null('').to_list(), table['features']
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    lengths = column.list.len()
    if lengths.null_count() or lengths.n_unique() > 1:
        raise InputError(f'{file}: features of one width are needed, but there are lists of '
                         f'{lengths.min()} to {lengths.max()} numbers or none')
    flat = column.explode().cast(pl.Float32).to_numpy()  # a missing number becomes NaN
    return ids, flat.reshape(len(ids), -1)


def _lines(text: bytes) -> list[str]:
    """Lines, the last one ended or not; only a newline ends one."""
    lines = text.decode('utf-8-sig').split('\n')
    return [line.rstrip('\r') for line in (lines[:-1] if lines[-1] == '' else lines)]

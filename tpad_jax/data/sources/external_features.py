"""Item features computed elsewhere: a file of rows keyed by item id -> rows by item number.

- features.npy: [N, D], and next to it features.npy.ids, a text file whose line n is the id of row n
  (UTF-8; an empty line: the row belongs to no item).
- features.safetensors: tensor 'features' [N, D], and the ids, either as a tensor 'ids', uint8, of
  that text, or as metadata 'ids', a JSON list of strings.
- features.parquet: a row per item with the columns item_id (string) and features (a list or an
  array of numbers).
"""

import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # before safetensors, which cannot read bfloat16 without it
import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open

from tpad_jax.data.untrusted import DAMAGE, shown
from tpad_jax.errors import refuse_if, refusing

# raised by the readers on damage; a panic of polars is a BaseException, and safetensors raises
# AttributeError where numpy does not have a dtype
FAILURES = (OSError, AttributeError, *DAMAGE, SafetensorError, pl.exceptions.PolarsError,
            pl.exceptions.PanicException)
MAX_WIDTH = 65_536  # numbers per item; MLLMs have some thousand


class Given(NamedTuple):
    """Rows of the catalogue, and counts of the others.

    Attributes:
      rows: float32 [V+1, D], row 0 zero.
      unknown: how many of the file's ids belong to no item.
      some: the first of these ids.
      repeated: how many rows repeat an earlier row of their item.
    """

    rows: np.ndarray
    unknown: int
    some: tuple[str, ...]
    repeated: int


def read(file, asins: list[str]) -> Given:
    """Read the rows of a file in the catalogue's order.

    Args:
      file: .npy, .safetensors or .parquet, see above.
      asins: the items' ids by number; [0] is the padding item and is not looked up.

    Returns:
      The rows and counts.

    Raises:
      InputError: the file cannot be read; an item has no row, or two that differ; a number is not
        finite.
    """
    file = Path(file)
    readers = {'.npy': _npy, '.safetensors': _safetensors, '.parquet': _parquet}
    refuse_if(file.suffix not in readers,
              f'{file}: not a file of features. Expected {", ".join(readers)}. Fix: convert it.')
    refuse_if(not file.is_file(),
              f'{file} does not exist. Expected a file of item features. Fix: correct the path.')
    with refusing(FAILURES, f'{file} cannot be read as {file.suffix[1:]} of features', 'Expected a '
                  'form of data/sources/external_features.py. Fix: save it so.'):
        ids, features = readers[file.suffix](file)
    numeric = features.ndim == 2 and features.dtype.kind in 'fiu'
    refuse_if(not numeric or not 0 < features.shape[1] <= MAX_WIDTH,
              f'{file}: features are {features.dtype} {list(features.shape)}. Expected numbers '
              f'[items, width], the width at most {MAX_WIDTH}. Fix: convert them.')
    refuse_if(len(ids) != len(features), f'{file}: {len(ids)} ids for {len(features)} rows. '
              'Expected one for each. Fix: give every row its id.')
    number = {asin: item for item, asin in enumerate(asins) if item}
    item_of = np.array([number.get(name, 0) for name in ids], int)
    unknown = [name for name, item in zip(ids, item_of, strict=True) if name and not item]
    row_of = np.full(len(asins), -1)
    known = np.flatnonzero(item_of)[::-1]
    row_of[item_of[known]] = known  # of several rows the first, which is assigned last
    repeats = [row for row in known[::-1] if row_of[item_of[row]] != row]
    absent = [asins[item] for item in np.flatnonzero(row_of[1:] < 0) + 1]
    refuse_if(absent, f'{file} lacks {len(absent)} of {len(number)} items: {shown(absent)}. '
              'Expected a row for each. Fix: add their rows.')
    differing = [ids[row] for row in repeats
                 if not np.array_equal(features[row], features[row_of[item_of[row]]])]
    refuse_if(differing, f'{file}: {len(differing)} rows differ from an earlier row of their item: '
              f'{shown(differing)}. Expected one row per item. Fix: remove the others.')
    rows = np.zeros((len(asins), features.shape[1]), np.float32)
    with np.errstate(over='ignore'):  # a float64 too large becomes inf, and is named below
        rows[1:] = features[row_of[1:]]
    broken = [asins[item] for item in np.flatnonzero(~np.isfinite(rows).all(1))]
    refuse_if(broken, f'{file}: features of {len(broken)} items are not finite: {shown(broken)}. '
              'Expected finite numbers. Fix: compute these again.')
    return Given(rows, len(unknown), tuple(unknown[:5]), len(repeats))


def width(file) -> int:
    """Read how many numbers an item has, from the header of a file alone.

    Args:
      file: .npy, .safetensors or .parquet, see above.

    Returns:
      The width.

    Raises:
      InputError: the file has no such header.
    """
    file = Path(file)
    with refusing((*FAILURES, IndexError), f'{file}: its width cannot be read',
                  'Expected a .npy, .safetensors or .parquet. Fix: give such a file.'):
        if file.suffix == '.npy':
            return np.load(file, mmap_mode='r', allow_pickle=False).shape[1]
        if file.suffix == '.safetensors':
            with safe_open(file, framework='np') as tensors:
                return tensors.get_slice('features').get_shape()[1]
        return len(pl.scan_parquet(file).select('features').head(1).collect().item())


def _npy(file):
    ids = file.with_name(file.name + '.ids')
    refuse_if(not ids.is_file(), f'{file}: there is no {ids.name} next to it. Expected the item id '
              'of every row, one per line. Fix: write that file.')
    features = np.load(file, mmap_mode='r', allow_pickle=False)
    if not isinstance(features, np.ndarray):
        raise ValueError('it is an .npz with another ending')
    return _lines(ids.read_bytes()), features


def _safetensors(file):
    with safe_open(file, framework='np') as tensors:
        names, metadata = tensors.keys(), tensors.metadata() or {}
        refuse_if('features' not in names or 'ids' not in {*names, *metadata},
                  f'{file} holds {", ".join(sorted(names)) or "no tensor"}. Expected the tensor '
                  "'features' and the ids, as a tensor or in its metadata. Fix: save both.")
        if 'ids' in names:
            ids = _lines(tensors.get_tensor('ids').astype(np.uint8).tobytes())
        else:
            ids = [str(name) for name in json.loads(metadata['ids'])]
        features = tensors.get_tensor('features')
        # to numpy bfloat16 is not a numeric dtype
        bfloat16 = features.dtype == ml_dtypes.bfloat16
        return ids, features.astype(np.float32) if bfloat16 else features


def _parquet(file):
    table = pl.read_parquet(file)
    absent = [name for name in ('item_id', 'features') if name not in table.columns]
    refuse_if(absent, f'{file} has the columns {", ".join(table.columns)}. Expected also '
              f'{", ".join(absent)}. Fix: rename or add them.')
    ids, column = table['item_id'].cast(pl.String).fill_null('').to_list(), table['features']
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    lengths = column.list.len()
    refuse_if(lengths.null_count() or lengths.n_unique() > 1, f'{file}: lists of {lengths.min()} '
              f'to {lengths.max()} numbers, or none. Expected one length. Fix: correct these rows.')
    flat = column.explode().cast(pl.Float32).to_numpy()  # a missing number becomes NaN
    return ids, flat.reshape(len(ids), -1)


def _lines(text: bytes) -> list[str]:
    """Lines, the last one ended or not; only a newline ends one."""
    lines = text.decode('utf-8-sig').removesuffix('\n').split('\n')
    return [line.rstrip('\r') for line in lines]

"""Sessions of item ids without content, the form of most public benchmarks: one .npz.

    train_items, test_items      int, ids 1..V, all sessions one after the other
    train_offsets, test_offsets  int, session k is items[offsets[k]:offsets[k + 1]]
    train_time, train_kind       optional, int, one per item: milliseconds since 1970 and the number
                                 of the event's kind; train_visitor: one per session, an opaque
                                 number; test_... likewise. Read by data/events.py

The file has no validation part. If the training sessions are in the order of time
(`ordered`), validation is the last of them. Otherwise it is a seeded draw, and claims about time
cannot be made.
"""

import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from tpad_jax.data import sessions as sessions_lib
from tpad_jax.data.catalogue import Data
from tpad_jax.data.sessions import Sessions
from tpad_jax.data.sources import Source
from tpad_jax.data.untrusted import DAMAGE, PACKINGS
from tpad_jax.errors import refuse_if, refusing

PARTS = 'train', 'test'
MAX_ARRAYS = 2**32  # bytes of all arrays; fifty times the largest public benchmark
# The catalogue is every id up to the largest, so ids may have gaps. Refused are more ids than the
# first number, if they are also this many times those that occur: most items would have no session.
MAX_ITEMS, MAX_GAPS = 1_000_000, 20


def load(path, *, ordered: bool, valid: float, seed: int) -> Data:
    """Read a file and hold out validation; the catalogue is every id up to the largest.

    Args:
      path: the .npz. A pickle in it is never read.
      ordered: the training sessions are in the order of time.
      valid: share (or, from 1 on, number) of the training sessions held out for validation.
      seed: of the draw where `ordered` is False.

    Returns:
      Data without content and audit: titles and texts are empty, item k is called str(k).

    Raises:
      InputError: naming the file, the array in it and what is wrong.
    """
    train, test, digest, empty = read(path)
    loaded = data(*hold_out(train, ordered=ordered, valid=valid, seed=seed), test)
    lines = {**loaded.lines, 'read': loaded.lines['read'] + empty,
             'rejected': {'empty_session': empty} if empty else {}}
    identity = f'{digest} {ordered} {valid} {seed}'
    return replace(loaded, lines=lines, fingerprint=hashlib.sha256(identity.encode()).hexdigest())


def data(train: Sessions, valid: Sessions, test: Sessions) -> Data:
    """Make data without content of three splits.

    Args:
      train: training sessions.
      valid: validation sessions.
      test: test sessions.

    Returns:
      Data whose catalogue is every id up to the largest, without audit and fingerprint.
    """
    splits = train, valid, test
    rows = 1 + int(max(part.items.max(initial=0) for part in splits))
    count = sum(len(part.start) for part in splits)
    return Data(['', *map(str, range(1, rows))], titles=[''] * rows, texts=[''] * rows,
                image_bytes=None, has_image=np.zeros(rows, bool), side_sizes=(),
                side=np.zeros((rows, 0), np.int32), train=train, valid=valid, test=test,
                warm=sessions_lib.warm_items(train, rows - 1), audit={}, fingerprint='', form='npz',
                lines={'read': count, 'kept': count, 'rejected': {}})


def read(path) -> tuple[Sessions, Sessions, str, int]:
    """Read both parts of a file; sessions without items are dropped.

    Args:
      path: the .npz.

    Returns:
      Training sessions, test sessions, the sha256 of the file and the number of empty sessions.

    Raises:
      InputError: as `load`.
    """
    path = Path(path)
    arrays, digest = unpack(path)
    for name in (f'{part}_{what}' for part in PARTS for what in ('items', 'offsets')):
        refuse_if(name not in arrays, f'{path} has no array {name}. Expected train_items, '
                  'train_offsets, test_items and test_offsets. Fix: save all four.')
    parts = [_sessions(path, name, arrays) for name in PARTS]
    empty = sum(int((part.lengths == 0).sum()) for part in parts)
    parts = [sessions_lib.take(part, np.flatnonzero(part.lengths)) for part in parts]
    largest = max(part.items.max() for part in parts)
    if largest > MAX_ITEMS:
        different = len(np.unique(np.concatenate([part.items for part in parts])))
        refuse_if(largest > MAX_GAPS * different, f'{path}: the largest item id is {largest}, but '
                  f'only {different} ids occur. Expected no gaps. Fix: number the items 1..V.')
    return *parts, digest, empty


def unpack(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Read the arrays of an .npz.

    Args:
      path: the file.

    Returns:
      {name: array} and the sha256 of the file.

    Raises:
      InputError: it cannot be read, or holds something else than arrays, or too much.
    """
    with refusing((OSError, *DAMAGE), f'{path} is not a usable .npz', 'Expected a readable file of '
                  'arrays, without pickled objects. Fix: save it by numpy.savez.'):
        if not path.is_file():  # reading a pipe would wait
            raise ValueError('no such file')
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as packed:  # members never unpack to more
            members = packed.infolist()
        size = sum(member.file_size for member in members)
        if size > MAX_ARRAYS:
            raise ValueError(f'its arrays would take {size / 2**30:.0f} GiB')
        if any(member.compress_type not in PACKINGS for member in members):
            raise ValueError('packed otherwise than by deflate')
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):  # numpy returns other members as bytes
                raise ValueError(f'{name} in it is not an array')
    return arrays, hashlib.sha256(content).hexdigest()


def hold_out(train: Sessions, *, ordered: bool, valid: float, seed: int
             ) -> tuple[Sessions, Sessions]:
    """Split off validation: the last sessions, or a seeded draw.

    Args:
      train: sessions.
      ordered: they are in the order of time.
      valid: share or number of sessions to hold out.
      seed: of the draw.

    Returns:
      The sessions that remain, and validation.

    Raises:
      InputError: one of the two would be empty.
    """
    total = len(train.start)
    held_out = round(valid if valid >= 1 else valid * total)
    refuse_if(not 0 < held_out < total, f'config.data.valid={valid}: it holds out {held_out} of '
              f'{total} sessions. Expected some for both. Fix: choose another share or number.')
    order = np.arange(total) if ordered else np.random.default_rng(seed).permutation(total)
    return tuple(sessions_lib.take(train, np.sort(part))
                 for part in (order[:-held_out], order[-held_out:]))


def _sessions(path, name: str, arrays: dict) -> Sessions:
    """Check and wrap one part."""
    for key in (f'{name}_items', f'{name}_offsets'):
        array = arrays[key]
        refuse_if(array.ndim != 1 or array.dtype.kind not in 'iu', f'{path}: {key} is '
                  f'{array.dtype} {list(array.shape)}. Expected one row of integers. Fix: convert.')
    items, offsets = arrays[f'{name}_items'], arrays[f'{name}_offsets']
    # checked before they are converted: a large id or offset would wrap around
    sessions = Sessions(items, offsets, np.zeros(max(len(offsets) - 1, 0), np.int64))
    sessions_lib.check(sessions, f'{path}: {name}', 2**31 - 2)
    more, lengths = {}, {'time': len(items), 'kind': len(items), 'visitor': len(offsets) - 1}
    for key, length in lengths.items():
        array = arrays.get(f'{name}_{key}')
        if array is not None:
            refuse_if(array.shape != (length,) or array.dtype.kind not in 'iu', f'{path}: '
                      f'{name}_{key} is {array.dtype} {list(array.shape)}. Expected {length} '
                      'integers. Fix: correct the array, or leave it out.')
            more[key] = array.astype(np.int32 if key == 'kind' else np.int64)
    return Sessions(items.astype(np.int32), offsets.astype(np.int64), sessions.start, **more)


def _check(config) -> None:
    refuse_if(not Path(config.data.npz).is_file(), f'config.data.npz={config.data.npz!r}: not a '
              'file. Expected an .npz of sessions, see data/sources/ids.py. Fix: correct the path.')


def _load(config, _workdir: Path) -> Data:
    c = config.data
    return load(c.npz, ordered=c.ordered, valid=c.valid, seed=c.seed)


SOURCE = Source(load=_load, check=_check, content=False, timed=False)

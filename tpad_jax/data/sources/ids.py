"""Ready-made sessions of item ids, the form most public benchmarks come in: one .npz, no content.

    train_items, test_items      int, ids 1..V, all sessions behind each other
    train_offsets, test_offsets  int, session k is items[offsets[k]:offsets[k + 1]]

There is no validation part and there are no times. Where the training sessions stand in the order
they happened (`ordered`), validation is the last of them and a session's place stands for its
time; where they do not, it is a seeded draw and nothing can be said about time.
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
from tpad_jax.errors import InputError

PARTS = 'train', 'test'
MAX_ARRAYS = 2**32  # bytes of all arrays; fifty times the largest public benchmark
# the catalogue is every id up to the largest, so ids may leave gaps, but not such that most of it
# would be items of no session: more ids than the first, and this many times those that occur
MAX_ITEMS, MAX_GAPS = 1_000_000, 20


def load(path, *, ordered: bool, valid: float, seed: int) -> Data:
    """Reads a file and holds out validation; the catalogue is every id up to the largest.

    Args:
      path: the .npz. No pickle in it is ever read.
      ordered: the training sessions stand in the order of time.
      valid: share (or, from 1 on, number) of the training sessions held out for validation.
      seed: of the draw where `ordered` is False.

    Returns:
      pipeline.Data without content: titles and texts are empty, item k is called str(k).

    Raises:
      InputError: naming the file, the array in it and what is wrong.
    """
    train, test, digest, empty = read(path)
    train, held = hold_out(train, ordered=ordered, valid=valid, seed=seed)
    found = data(train, held, test)
    options = f'{ordered} {valid} {seed}'
    return replace(found, lines=counted(found.lines, empty),
                   fingerprint=hashlib.sha256(f'{digest} {options}'.encode()).hexdigest())


def data(train: Sessions, valid: Sessions, test: Sessions) -> Data:
    """-> pipeline.Data of the sessions, as `load` returns it but for the audit."""
    num_items = int(max(part.items.max() for part in (train, valid, test)))
    names = ['', *map(str, range(1, num_items + 1))]
    count = sum(len(part.start) for part in (train, valid, test))
    return Data(asins=names, titles=[''] * len(names), texts=[''] * len(names), image_bytes=None,
                has_image=np.zeros(len(names), bool), side=np.zeros((len(names), 0), np.int32),
                side_sizes=(), train=train, valid=valid, test=test,
                warm=sessions_lib.warm_items(train, num_items),
                lines={'read': count, 'kept': count, 'rejected': {}}, audit={}, fingerprint='',
                form='npz')


def counted(lines: dict, empty: int) -> dict:
    """Add the sessions without items, which `read` drops, to the counts of `data`."""
    rejected = {'empty_session': empty} if empty else {}
    return {**lines, 'read': lines['read'] + empty, 'rejected': rejected}


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
        if name not in arrays:
            raise InputError(f'{path} has no array {name}; it must hold '
                             'train_items, train_offsets, test_items and test_offsets')
    parts = [_sessions(path, name, arrays) for name in PARTS]
    empty = sum(int((np.diff(part.offsets) == 0).sum()) for part in parts)
    parts = [sessions_lib.take(part, np.flatnonzero(np.diff(part.offsets))) for part in parts]
    largest = max(part.items.max() for part in parts)
    if largest > MAX_ITEMS:
        there = len(np.unique(np.concatenate([part.items for part in parts])))
        if largest > MAX_GAPS * there:
            raise InputError(f'{path}: the largest item id is {largest}, but only {there} ids '
                             'occur; number the items 1..V')
    return *parts, digest, empty


def unpack(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """-> the arrays of an .npz by name, and the sha256 of the file.

    Raises:
      InputError: it cannot be read, or holds something else than arrays, or too much.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError(0, 'no such file')
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as packed:  # never reads past what this says
            size = sum(member.file_size for member in packed.infolist())
            if size > MAX_ARRAYS:
                raise ValueError(f'its arrays would take {size / 2**30:.0f} GiB')
            if any(m.compress_type not in PACKINGS for m in packed.infolist()):
                raise ValueError('packed otherwise than by deflate')
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        for name, found in arrays.items():
            if not isinstance(found, np.ndarray):  # numpy gives what is no array as bytes
                raise ValueError(f'{name} in it is no array')
    except OSError as error:
        raise InputError(f'{path} cannot be read ({error.strerror}); give an .npz of sessions with '
                         '--config.data.npz=FILE') from error
    except DAMAGE as error:
        raise InputError(f'{path} is no usable .npz ({error}); save it with numpy.savez, without '
                         'pickled objects') from error
    return arrays, hashlib.sha256(content).hexdigest()


def hold_out(train: Sessions, *, ordered: bool, valid: float, seed: int
             ) -> tuple[Sessions, Sessions]:
    """Training sessions -> (what stays, validation): the last ones, or a seeded draw.

    Raises:
      InputError: one of the two would be empty.
    """
    total = len(train.start)
    held = round(valid if valid >= 1 else valid * total)
    if not 0 < held < total:
        raise InputError(f'config.data.valid={valid} of {total} training sessions leaves '
                         'validation or training empty; choose another share or number')
    order = np.arange(total) if ordered else np.random.default_rng(seed).permutation(total)
    kept = np.sort(order[:-held])
    return sessions_lib.take(train, kept), sessions_lib.take(train, np.sort(order[-held:]))


def _sessions(path, name: str, arrays: dict) -> Sessions:
    """Checks and wraps one part."""
    items, offsets = arrays[f'{name}_items'], arrays[f'{name}_offsets']
    for key, array in ((f'{name}_items', items), (f'{name}_offsets', offsets)):
        if array.ndim != 1 or array.dtype.kind not in 'iu':
            raise InputError(f'{path}: {key} is {array.dtype} {list(array.shape)}; it must be one '
                             'row of integers')
    # checked before they are converted: a large id or offset would wrap around
    sessions = Sessions(items, offsets, np.zeros(max(len(offsets) - 1, 0), np.int64))
    sessions_lib.check(sessions, f'{path}: {name}', 2 ** 31 - 2)
    return Sessions(items.astype(np.int32), offsets.astype(np.int64), sessions.start)


def _check(config) -> None:
    if not Path(config.data.npz).is_file():
        raise InputError(f'config.data.npz={config.data.npz!r}: not a file. Expected an .npz of '
                         'sessions, see tpad_jax/data/sources/ids.py. Fix: correct the path.')


def _load(config, workdir: Path) -> Data:
    del workdir
    c = config.data
    return load(c.npz, ordered=c.ordered, valid=c.valid, seed=c.seed)


SOURCE = Source(load=_load, check=_check, content=False, timed=False)

"""The item-feature store: rows per item, float32 [V+1, ...], in files that record their origin.

A store is a directory. For every name it holds

    <name>.manifest.json    shape, dtype, parts, the fingerprint of the rows' origin, counts
    <name>.00007.npy        the rows of one part's items and a digest, while parts are missing
    7.lease.partial         which process makes part 7
    <name>.npy              [V+1, ...] by item id with row 0 zero, once all parts exist

A file appears when it is complete. No file holds a time or a process number. So a store that was
killed and resumed ends with the same bytes as one that was not.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tpad_jax.core.files import PARTIAL, replacing
from tpad_jax.errors import Stopped, refuse_if, refusing
from tpad_jax.features.leases import Leases

LEASE = 600.0  # seconds without a sign of life after which another process makes a part


def fill(directory, make: Callable[[Iterator[int], list[int]], Iterable], *,
         parts: Sequence[np.ndarray], shapes: dict[str, tuple], made_by: dict[str, dict],
         counts: dict | None = None, lease: float = LEASE,
         stopping: Callable[[], bool] = lambda: False) -> None:
    """Compute the missing parts, then join them. A finished store stays as it is.

    Any number of processes may fill one directory of a shared file system. Each takes a lease of a
    part before it makes it, and of the joining, see `leases.Leases`. They end when the store is
    finished, and take over the parts of a lost process. A part is the same from every process, and
    appears at once, so two processes may make it.

    Args:
      directory: of the store.
      make: (numbers of parts, which are taken while they are iterated; all that were missing)
        -> iterator of (number, {name: float [len(parts[number]), ...]}), and of (number, None) as a
        sign of life.
      parts: int [.] each. The item ids of every part; together 1..V, each once.
      shapes: {name: shape of one item's row}.
      made_by: {name: fingerprint}, a flat JSON-able dict of everything that the rows depend on.
      counts: more facts for the manifest, which are not compared.
      lease: seconds without a sign of life after which another process makes a part.
      stopping: asked while other processes make the last parts.

    Raises:
      InputError: the directory holds rows of another origin.
      Stopped: `stopping` answered True.
    """
    directory, total, leases = Path(directory), 1 + sum(map(len, parts)), Leases(directory, lease)
    layout = hashlib.sha256(b''.join(b'%d:' % len(p) + np.asarray(p, '<i8').tobytes()
                                     for p in parts)).hexdigest()[:16]
    manifests = {name: _manifest((total, *shape), made_by[name], counts, len(parts), layout)
                 for name, shape in shapes.items()}

    def finished():
        return all((directory / f'{name}.npy').is_file() for name in shapes)

    def absent(number):  # a part that was just removed is in the whole file
        return any(not _complete(_part(directory, name, number)) and
                   not (directory / f'{name}.npy').is_file() for name in shapes)

    def taken(numbers):
        for number in numbers:
            if not leases.take(str(number)):
                continue
            if absent(number):
                yield number
            else:  # another process made it since
                leases.free(str(number))

    _claim(directory, manifests, leases.token)
    waiting = False
    try:
        while not finished():
            missing = [i for i in range(len(parts)) if absent(i)]
            numbers = taken(missing)
            first = next(numbers, None)
            if first is not None:
                for number, rows in make(itertools.chain([first], numbers), missing):
                    leases.renew()
                    if rows is not None:
                        _save_part(directory, number, rows, parts, manifests, leases.token)
                        leases.free(str(number))
            elif not missing and leases.take('join'):
                _claim(directory, manifests)  # of two origins at once, the later one remains
                _join(directory, parts, manifests, leases)
                leases.free('join')
            else:
                if not waiting:
                    waiting = not print(f'{directory}: waits for other processes, which make '
                                        f'{len(missing)} parts', file=sys.stderr)
                if stopping():
                    raise Stopped('stopped while other processes encode')
                time.sleep(min(1.0, lease / 4))
    except FileNotFoundError:  # another process took a part over, and removed what is not needed
        if not finished():
            raise
    finally:
        leases.free()
    for pattern in (*(f'{name}.{end}' for name in shapes for end in ('[0-9]*.npy', f'*{PARTIAL}')),
                    f'*.lease*{PARTIAL}'):
        for leftover in directory.glob(pattern):
            leftover.unlink(missing_ok=True)
    _claim(directory, manifests)


def write(directory, name: str, rows: np.ndarray, made_by: dict, counts: dict | None = None):
    """Store complete rows as float32 with row 0 zero.

    Args:
      directory: of the store.
      name: of the rows.
      rows: float [V+1, ...].
      made_by: the fingerprint, see `fill`.
      counts: more facts for the manifest.

    Raises:
      InputError: the directory holds rows of this name and of another origin.
    """
    directory = Path(directory)
    _claim(directory, {name: _manifest(rows.shape, made_by, counts, 0, '')})
    rows = np.array(rows, np.float32)
    rows[0] = 0
    _save(directory / f'{name}.npy', rows)


def manifest(directory, name: str) -> dict:
    """Read <name>.manifest.json: shape, dtype, parts, layout, fingerprint, counts.

    Raises:
      InputError: the file is missing or damaged.
    """
    file = _manifest_file(directory, name)
    refuse_if(not file.exists(), f'{directory}: holds no features {name!r}. Expected the file '
              f'{file.name}. Fix: run the stage that makes them')
    with refusing((ValueError, KeyError, TypeError, AttributeError), f'{file}: damaged', 'Expected '
                  f'a manifest. Fix: delete {directory}/{name}.* and encode again'):
        about = json.loads(file.read_text())
        about['fingerprint'].items(), about['shape'], about['parts'], about['layout']
    return about


def read(directory, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
    """Map the rows of a finished store from its file.

    Args:
      directory: of the store.
      name: of the rows.
      rows: the rows to return. A slice is mapped; an array of ids is copied. None: all.

    Returns:
      float32 [V+1, ...], or the chosen rows.

    Raises:
      InputError: the rows are missing, unfinished or damaged.
    """
    file, about = Path(directory) / f'{name}.npy', manifest(directory, name)
    count = len(list(Path(directory).glob(f'{name}.[0-9]*.npy')))
    refuse_if(not file.is_file(), f'{file}: not finished, {count} of {about["parts"]} parts exist. '
              'Expected all parts. Fix: run the command that makes it again, which resumes')
    with refusing((ValueError, EOFError, OSError), f'{file}: damaged', 'Expected an array. Fix: '
                  f'delete {directory}/{name}.* and encode again'):
        table = np.load(file, mmap_mode='r', allow_pickle=False)
    return table if rows is None else table[rows]


class _Damaged(Exception):
    """A part is not as it was written, and was removed."""


def _join(directory, parts, manifests, leases):
    """Copy the parts of a name into one file, where none is damaged; damaged ones are removed."""
    for name, about in manifests.items():
        file, damaged = directory / f'{name}.npy', False
        if file.is_file():
            continue
        with contextlib.suppress(_Damaged), replacing(file, leases.token) as partial:
            # a new file is all zeros, so row 0 is
            table = np.lib.format.open_memmap(partial, mode='w+', dtype=np.float32,
                                              shape=tuple(about['shape']))
            if hasattr(os, 'posix_fallocate'):  # else a full disk ends the process by a bus error
                with partial.open('r+b') as target:
                    os.posix_fallocate(target.fileno(), 0, partial.stat().st_size)
            for number, ids in enumerate(parts):
                leases.renew()
                part = _part(directory, name, number)
                rows = _as_written(part, len(ids), about)
                if rows is not None:
                    table[ids] = rows
                    continue
                print(f'{part}: damaged, or of another origin; its items are encoded again',
                      file=sys.stderr)
                part.unlink(missing_ok=True)
                damaged = True
            table.flush()
            del table
            if damaged:
                raise _Damaged


def _claim(directory, manifests, token=''):
    """Compare with the manifests that exist, and write those that do not."""
    for name, new in manifests.items():
        file = _manifest_file(directory, name)
        # complete, or a part; looked for first, as another process writes its manifest before
        rows = next(directory.glob(f'{name}.*npy'), None)
        if file.is_file():
            changes = '; '.join(_changes(manifest(directory, name), new))
            refuse_if(changes, f'{file}: these are other features: {changes}. Expected the same. '
                      f'Fix: choose another directory, or delete {directory}/{name}.* to encode '
                      'again')
            continue
        refuse_if(rows, f'{rows}: there is no {file.name}. Expected a manifest, which names its '
                  f'origin. Fix: choose another directory, or delete {directory}/{name}.*')
        with replacing(file, token) as partial:
            partial.write_text(json.dumps(new, indent=1, sort_keys=True) + '\n')


def _changes(old, new) -> Iterator[str]:
    """Yield 'key was x and is now y' for every difference."""
    before, now = ({**{key: about[key] for key in ('shape', 'parts', 'layout')},
                    **about['fingerprint']} for about in (old, new))
    for key in sorted(before.keys() | now.keys()):
        was, is_now = (json.dumps(d[key]) if key in d else 'absent' for d in (before, now))
        if was != is_now:
            yield f'{key} was {was} and is now {is_now}'


def _manifest(shape, made_by, counts, parts, layout) -> dict:
    about = {'shape': list(shape), 'dtype': 'float32', 'parts': parts, 'layout': layout,
             'fingerprint': made_by, 'counts': counts or {}}
    return json.loads(json.dumps(about))  # JSON turns tuples into lists


def _manifest_file(directory, name) -> Path:
    return Path(directory) / f'{name}.manifest.json'


def _part(directory, name, number) -> Path:
    return Path(directory) / f'{name}.{number:05d}.npy'


def _complete(file) -> bool:
    """Whether a part is complete. A full disk, for example, cuts one short."""
    try:
        return np.load(file, mmap_mode='r', allow_pickle=False) is not None
    except (OSError, ValueError, EOFError):
        return False


def _save_part(directory, number, rows, parts, manifests, token):
    """Write a part of every name, followed by its digest."""
    for name, about in manifests.items():
        part = np.asarray(rows[name], np.float32, order='C')
        expected = (len(parts[number]), *about['shape'][1:])
        if part.shape != expected:
            raise ValueError(f'part {number} of {name!r} has rows {list(part.shape)}, expected '
                             f'{list(expected)}')
        _save(_part(directory, name, number), part, token, _mark(part, about))


def _mark(rows, about) -> bytes:
    """Return the digest of a part and of its origin, so that a part of another one differs."""
    origin = json.dumps([about['fingerprint'], about['layout']], sort_keys=True)
    digest = hashlib.sha256(origin.encode())
    digest.update(rows)
    return digest.digest()


def _as_written(file, size, about) -> np.ndarray | None:
    """Map the rows of a part; None where its bytes are not those that were written."""
    try:
        rows = np.load(file, mmap_mode='r', allow_pickle=False)
        with file.open('rb') as opened:
            opened.seek(rows.offset + rows.nbytes)
            end = opened.read()
    except (OSError, ValueError, EOFError):
        return None
    fits = rows.shape == (size, *about['shape'][1:]) and rows.dtype == np.float32
    return rows if fits and end == _mark(rows, about) else None


def _save(file, rows, token='', end=b''):
    with replacing(file, token) as partial, partial.open('wb') as target:
        np.save(target, rows)
        target.write(end)
        target.flush()
        os.fsync(target.fileno())  # else a power cut could keep the name without the bytes

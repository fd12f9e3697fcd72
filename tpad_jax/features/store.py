"""The item-feature store: rows per item, float32 [V+1, ...], in files that record their origin.

A store is a directory. For every name it holds

    <name>.manifest.json    shape, dtype, parts, the fingerprint of the rows' origin, counts
    <name>.00007.npy        the rows of one part's items, while parts are missing
    <name>.npy              [V+1, ...] by item id with row 0 zero, once all parts exist

A file appears when it is complete. No file holds a time or a process number. So a store that was
killed and resumed ends with the same bytes as one that was not.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tpad_jax.core.files import PARTIAL, replacing, write_text
from tpad_jax.data.untrusted import shown
from tpad_jax.errors import refuse_if, refusing


def fill(directory, make: Callable[[list[int]], Iterable], *, parts: Sequence[np.ndarray],
         shapes: dict[str, tuple], made_by: dict[str, dict], counts: dict | None = None,
         process: tuple[int, int] = (0, 1), meet: Callable = contextlib.nullcontext) -> None:
    """Compute the missing parts, then join them. A finished store stays as it is.

    Several processes fill one directory of a shared file system. Process i % processes makes part
    i, and process 0 joins the parts.

    Args:
      directory: of the store.
      make: part numbers -> iterator of (number, {name: float [len(parts[number]), ...]}).
      parts: int [.] each. The item ids of every part; together 1..V, each once.
      shapes: {name: shape of one item's row}.
      made_by: {name: fingerprint}, a flat JSON-able dict of everything that the rows depend on.
      counts: more facts for the manifest, which are not compared.
      process: number of this process, and of all.
      meet: (name) -> context manager that ends when it has ended in all processes, see
        `hosts.joined`.

    Raises:
      InputError: the directory holds rows of another origin, or parts of other processes are
        missing.
    """
    directory, total, (own, processes) = Path(directory), 1 + sum(map(len, parts)), process
    layout = hashlib.sha256(b''.join(b'%d:' % len(p) + np.asarray(p, '<i8').tobytes()
                                     for p in parts)).hexdigest()[:16]
    manifests = {name: _manifest((total, *shape), made_by[name], counts, len(parts), layout)
                 for name, shape in shapes.items()}
    with meet('features claimed'):
        _claim(directory, manifests, writes=own == 0)
    with meet('features filled'):
        _claim(directory, manifests, writes=False)  # every process has the same fingerprints
        numbers = [i for i in _missing(directory, shapes, parts) if i % processes == own]
        for number, rows in make(numbers) if numbers else ():
            for name, shape in shapes.items():
                part, expected = np.asarray(rows[name], np.float32), (len(parts[number]), *shape)
                if part.shape != expected:
                    raise ValueError(f'part {number} of {name!r} has rows {list(part.shape)}, '
                                     f'expected {list(expected)}')
                _save(_part(directory, name, number), part)
    with meet('features joined'):
        if own == 0:
            _join(directory, parts, shapes, processes)


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
    _claim(directory, {name: _manifest(rows.shape, made_by, counts, 0, '')}, writes=True)
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


def _missing(directory, names, parts) -> list[int]:
    """Return the numbers of the parts that are not complete for every name."""
    unfinished = [name for name in names if not (directory / f'{name}.npy').is_file()]
    return [i for i in range(len(parts))
            if not all(_complete(_part(directory, name, i)) for name in unfinished)]


def _join(directory, parts, shapes, processes):
    """Copy the parts into one file per name and remove them."""
    absent = _missing(directory, shapes, parts)
    refuse_if(absent, f'{directory}: {len(absent)} of {len(parts)} parts are missing ('
              f'{shown(map(str, absent))}) after all {processes} processes. Expected one file '
              'system that all share. Fix: use one, and run this command again')
    for name, shape in shapes.items():
        file = directory / f'{name}.npy'
        if file.is_file():
            continue
        with replacing(file) as partial:
            # a new file is all zeros, so row 0 is
            table = np.lib.format.open_memmap(partial, mode='w+', dtype=np.float32,
                                              shape=(1 + sum(map(len, parts)), *shape))
            if hasattr(os, 'posix_fallocate'):  # else a full disk ends the process by a bus error
                with partial.open('r+b') as target:
                    os.posix_fallocate(target.fileno(), 0, partial.stat().st_size)
            for number, ids in enumerate(parts):
                table[ids] = np.load(_part(directory, name, number), allow_pickle=False)
            table.flush()
            del table
    for name in shapes:
        for leftover in (*directory.glob(f'{name}.[0-9]*.npy'),
                         *directory.glob(f'{name}.*{PARTIAL}')):
            leftover.unlink()


def _claim(directory, manifests, writes):
    """Compare with the manifests that exist. Write those that do not, if `writes`."""
    for name, new in manifests.items():
        file = _manifest_file(directory, name)
        if file.is_file():
            changes = '; '.join(_changes(manifest(directory, name), new))
            refuse_if(changes, f'{file}: these are other features: {changes}. Expected the same. '
                      f'Fix: choose another directory, or delete {directory}/{name}.* to encode '
                      'again')
            continue
        rows = next(directory.glob(f'{name}.*npy'), None)  # complete, or a part
        refuse_if(rows, f'{rows}: there is no {file.name}. Expected a manifest, which names its '
                  f'origin. Fix: choose another directory, or delete {directory}/{name}.*')
        if writes:
            write_text(file, json.dumps(new, indent=1, sort_keys=True) + '\n')


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


def _save(file, rows):
    with replacing(file) as partial, partial.open('wb') as target:
        np.save(target, rows)
        target.flush()
        os.fsync(target.fileno())  # else a power cut could keep the name without the bytes

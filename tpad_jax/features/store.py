"""The item-feature store: rows per item, float32 [V+1, ...], in files that say what made them.

A store is a directory. Of every name it holds

    <name>.manifest.json    shape, dtype, parts, the fingerprint of what made the rows, counts
    <name>.00007.npy        the rows of one part's items, while parts are missing
    <name>.npy              [V+1, ...] by item id, row 0 zero, once none is

A file appears when it is whole. None of them holds a time or a process number, so a store that was
killed and taken up again ends with the bytes of one that was not.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tpad_jax.data.sources import external_features
from tpad_jax.errors import InputError

PARTIAL = '.partial'  # ends the names of files that are being written
SHOWN = 5  # part numbers an error names

read_external = external_features.read  # rows computed elsewhere, in a file of another form


def fill(directory, make: Callable[[list[int]], Iterable], *, parts: Sequence[np.ndarray],
         shapes: dict[str, tuple], made_by: dict[str, dict], counts: dict | None = None,
         process: int = 0, processes: int = 1, barrier: Callable = lambda name: None) -> None:
    """Compute the parts that are not there yet, then join them; a finished store is left as it is.

    Several processes fill one directory of a shared file system: part i is made by process
    i % processes, and process 0 joins.

    Args:
      make: part numbers -> iterator of (number, {name: float [len(parts[number]), ...]}).
      parts: the item ids of every part, int [.]; together 1..V, each once.
      shapes: {name: shape of one item's row}.
      made_by: {name: fingerprint}, a flat dict of what the rows depend on; JSON-able.
      counts: more facts for the manifest, which are not compared.
      process, processes: this one's number, and how many there are.
      barrier: called with a name; returns when all processes have called it.

    Raises:
      InputError: the directory holds rows that something else made, or parts of other processes
        are missing.
    """
    directory, total = Path(directory), 1 + sum(map(len, parts))
    layout = hashlib.sha256(b''.join(b'%d:' % len(p) + np.asarray(p, '<i8').tobytes()
                                     for p in parts)).hexdigest()[:16]
    manifests = {name: _manifest((total, *shape), made_by[name], counts, len(parts), layout)
                 for name, shape in shapes.items()}
    _claim(directory, manifests, writes=process == 0)
    barrier('features claimed')
    if processes > 1:  # the others' fingerprints have to be this one's, too
        _claim(directory, manifests, writes=False)
    like = {name: [(len(ids), *shape) for ids in parts] for name, shape in shapes.items()}
    own = [i for i in missing(directory, like) if i % processes == process]
    for number, rows in make(own) if own else ():
        for name in shapes:
            _save(_part(directory, name, number), _checked(rows[name], like[name][number]))
    barrier('features filled')
    if process == 0:
        _join(directory, parts, like, processes)
    barrier('features joined')


def write(directory, name: str, rows: np.ndarray, made_by: dict, counts: dict | None = None):
    """Store rows [V+1, ...] that are all there as float32; row 0 is made zero.

    Raises:
      InputError: the directory holds rows of this name that something else made.
    """
    directory = Path(directory)
    _claim(directory, {name: _manifest(rows.shape, made_by, counts, 0, '')}, writes=True)
    rows = np.array(rows, np.float32)
    rows[0] = 0
    _save(directory / f'{name}.npy', rows)


def manifest(directory, name: str) -> dict:
    """What <name>.manifest.json holds: shape, dtype, parts, layout, fingerprint, counts.

    Raises:
      InputError: there is none, or it is damaged.
    """
    file = _manifest_file(directory, name)
    try:
        found = json.loads(file.read_text())
        found['fingerprint'].items(), found['shape'], found['parts'], found['layout']
    except FileNotFoundError as error:
        raise InputError(f'{directory} holds no features {name!r}: there is no {file.name}; run '
                         'the stage that makes them') from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{file} is damaged ({type(error).__name__}); delete {directory}/{name}.* '
                         'and encode again') from error
    return found


def read(directory, name: str, rows: slice | np.ndarray | None = None) -> np.ndarray:
    """The rows of a finished store, float32 [V+1, ...], mapped from the file.

    Args:
      rows: only these; a slice is mapped, too.

    Raises:
      InputError: there are none, or they are not finished.
    """
    file, about = Path(directory) / f'{name}.npy', manifest(directory, name)
    if not file.is_file():
        there = len(list(Path(directory).glob(f'{name}.[0-9]*.npy')))
        raise InputError(f'{file} is not finished: {there} of {about["parts"]} parts are there; '
                         'run the command that makes it again, it goes on from there')
    try:
        whole = np.load(file, mmap_mode='r', allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f'{file} is damaged ({error}); delete {directory}/{name}.* and encode '
                         'again') from error
    return whole if rows is None else whole[rows]


def missing(directory, like: dict[str, list[tuple]]) -> list[int]:
    """Numbers of the parts that are not there whole, of {name: [shape of every part]}."""
    directory = Path(directory)
    open_names = [name for name in like if not (directory / f'{name}.npy').is_file()]
    count = len(next(iter(like.values())))
    return [i for i in range(count)
            if not all(_whole(_part(directory, name, i), like[name][i]) for name in open_names)]


def _join(directory, parts, like, processes):
    """Lay the parts into one file per name and remove them."""
    absent = missing(directory, like)
    if absent:
        shown = ', '.join(map(str, absent[:SHOWN])) + (', ...' if len(absent) > SHOWN else '')
        raise InputError(
            f'{directory}: {len(absent)} of {len(parts)} parts are missing ({shown}) after all '
            f'{processes} processes should be done; give them one shared file system, let the '
            'others end, and run this one again')
    for name, shapes in like.items():
        file = directory / f'{name}.npy'
        if file.is_file():
            continue
        partial = file.with_name(file.name + PARTIAL)
        # a new file is all zeros, row 0 among them
        whole = np.lib.format.open_memmap(partial, mode='w+', dtype=np.float32, shape=(
            1 + sum(map(len, parts)), *shapes[0][1:]))
        if hasattr(os, 'posix_fallocate'):  # else a full disk shows as a bus error, without a word
            with partial.open('r+b') as target:
                os.posix_fallocate(target.fileno(), 0, partial.stat().st_size)
        for number, ids in enumerate(parts):
            whole[ids] = np.load(_part(directory, name, number), allow_pickle=False)
        whole.flush()
        del whole
        os.replace(partial, file)
    for name in like:
        for leftover in (*directory.glob(f'{name}.[0-9]*.npy'),
                         *directory.glob(f'{name}.*{PARTIAL}')):
            leftover.unlink()


def _claim(directory, manifests, writes):
    """Compare with the manifests that are there; write those that are not, if `writes`."""
    for name, own in manifests.items():
        file = _manifest_file(directory, name)
        if file.is_file():
            found = manifest(directory, name)
            changes = list(_changes(found, own))
            if changes:
                raise InputError(
                    f'{file} is of other features: {"; ".join(changes)}; choose another directory, '
                    f'or delete {directory}/{name}.* to encode anew')
        elif (directory / f'{name}.npy').exists():
            raise InputError(f'{directory}/{name}.npy has no {file.name}, which says what made it; '
                             f'choose another directory, or delete {directory}/{name}.*')
        elif writes:
            directory.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(file.name + PARTIAL)
            partial.write_text(json.dumps(own, indent=1, sort_keys=True) + '\n')
            os.replace(partial, file)


def _changes(found, own) -> Iterator[str]:
    """'key was x and is now y', for what differs."""
    before, now = ({**{key: about[key] for key in ('shape', 'parts', 'layout')},
                    **about['fingerprint']} for about in (found, own))
    for key in sorted(before.keys() | now.keys()):
        was, is_now = (json.dumps(d[key]) if key in d else 'absent' for d in (before, now))
        if was != is_now:
            yield f'{key} was {was} and is now {is_now}'


def _manifest(shape, made_by, counts, parts, layout) -> dict:
    about = {'shape': list(shape), 'dtype': 'float32', 'parts': parts, 'layout': layout,
             'fingerprint': made_by, 'counts': counts or {}}
    return json.loads(json.dumps(about))  # tuples are lists there


def _manifest_file(directory, name) -> Path:
    return Path(directory) / f'{name}.manifest.json'


def _part(directory, name, number) -> Path:
    return Path(directory) / f'{name}.{number:05d}.npy'


def _whole(file, shape) -> bool:
    """Whether a part is there; one that was cut short, say by a full disk, is not."""
    try:
        found = np.load(file, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return found.shape == shape and found.dtype == np.float32


def _checked(rows, shape) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    if rows.shape != shape:
        raise ValueError(f'rows of a part are {list(rows.shape)} and not {list(shape)}')
    return rows


def _save(file, rows):
    partial = file.with_name(file.name + PARTIAL)
    with partial.open('wb') as target:
        np.save(target, rows)
        target.flush()
        os.fsync(target.fileno())  # else a power cut could leave the name without the bytes
    os.replace(partial, file)

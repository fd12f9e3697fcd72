"""Ready-made sessions whose items have content: a directory of three files.

    sessions.npz          as in `npz`; moreover, if it is there, `catalog_item` int [V + 1]: which
                          item of the next file an id 1..V is (without it, id k is item k)
    items.jsonl[.gz]      one JSON object per line: `item`, a number that no other line has; fields
                          of words; if it has a picture, `image`, the name of its file
    images.zip or images/ the pictures, by these names; may be missing

Items that no session names are not in the catalogue. Nothing is unpacked to the disk, and no link
out of the directory is followed. A picture that cannot be read is counted with its reason, but a
line that cannot refuses the directory.
"""

import hashlib
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from tpad_jax.config import names as fields_of
from tpad_jax.data import images, text
from tpad_jax.data.catalogue import Data
from tpad_jax.data.sources import Source
from tpad_jax.data.sources import ids as ids_lib
from tpad_jax.data.untrusted import DAMAGE, PACKINGS, Lines, Reason, stay_inside
from tpad_jax.errors import InputError

SESSIONS, ITEMS, IMAGES = 'sessions.npz', ('items.jsonl', 'items.jsonl.gz'), 'images'


class Pictures(Sequence):
    """The encoded images by item id; b'' for the padding item 0 and where there is none.

    Args:
      place: a zip file or a folder. names: per item id the file in it, '' for none.
    """

    def __init__(self, place: Path | None, names: Sequence[str]):
        self._place, self._names, self._lock = place, list(names), threading.Lock()
        self._zip = zipfile.ZipFile(place) if place and place.is_file() else None

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, item: int) -> bytes:
        return self._bytes(self._names[item])

    def _bytes(self, name):
        if not name:
            return b''
        try:
            if self._zip is None:
                return (self._place / name).read_bytes()
            with self._lock, self._zip.open(name) as file:  # one file position for all threads
                data = file.read(images.MAX_BYTES)  # its own word for its size may be false
                return b'' if file.read(1) else data
        except (OSError, *DAMAGE):
            return b''  # counted with the broken images when it is decoded


def load(directory, *, words: Iterable[str], sides: Iterable[str], ordered: bool, valid: float,
         seed: int) -> Data:
    """Reads the directory and holds out validation, as `npz.load` does.

    Args:
      directory: see above.
      words: fields whose words make an item's text, in this order; a list's are put in a row.
      sides: fields that are side features: equal values of two or more warm items share an id. A
        field of lists becomes a side feature for each of its values, 1 where the list holds it.
      ordered, valid, seed: see `npz.load`.

    Returns:
      pipeline.Data; item k is called by its `item` of items.jsonl, and `titles` are `title`.

    Raises:
      InputError: naming the file and what in it is wrong.
    """
    directory, words, sides = Path(directory), tuple(words), tuple(sides)
    stay_inside(directory / SESSIONS, directory)
    train, test, digest, _ = ids_lib.read(directory / SESSIONS)
    train, held = ids_lib.hold_out(train, ordered=ordered, valid=valid, seed=seed)
    found = ids_lib.data(train, held, test)
    numbers = _numbers(directory / SESSIONS, found.num_items)
    file = next((directory / name for name in ITEMS if (directory / name).is_file()), None)
    if file is None:
        raise InputError(f'{directory} holds no items.jsonl or items.jsonl.gz; put the items '
                         'there, a JSON object per line, see tpad_jax/data/sources/folder.py')
    stay_inside(file, directory)
    items, read, blank = _items(file)
    absent = [n for n in numbers[1:] if n not in items]
    if absent:
        raise InputError(f'{file} lacks {len(absent)} of {len(numbers) - 1} items of the sessions, '
                         f'{absent[0]} among them; add their lines')
    own = [{}, *(items[n] for n in numbers[1:])]
    for field in (*words, *sides):
        if not any(field in one for one in own):
            raise InputError(f'{file}: no item has the field {field!r} that config.data.words or '
                             'config.data.sides names; name others')
    place = next((p for p in (directory / f'{IMAGES}.zip', directory / IMAGES)
                  if p.is_file() or p.is_dir()), None)
    if place is not None:
        stay_inside(place, directory)
    names, unused = _image_names(place, directory, own)
    warm = np.append(found.warm, np.zeros(len(own) - len(found.warm), bool))
    columns = [column for field in sides
               for column in _columns([one.get(field) for one in own[1:]], warm[1:])]
    side = np.zeros((len(own), len(columns)), np.int32)
    if columns:
        side[1:] = np.stack([ids for ids, _ in columns], axis=1)
    whole = hashlib.sha256(f'{digest} {words} {sides} {ordered} {valid} {seed}'.encode())
    for path in (file, place):
        if path is not None and path.is_file():
            with path.open('rb') as packed:
                while block := packed.read(2**20):
                    whole.update(block)
    if place is not None and place.is_dir():
        for name in filter(None, names):
            whole.update(name.encode(errors='surrogateescape') + (place / name).read_bytes())
    return replace(
        found, asins=['', *map(str, numbers[1:])],
        titles=[text.said(one.get('title')) for one in own],
        texts=[text.joined(one.get(field) for field in words) for one in own],
        image_bytes=Pictures(place, names), has_image=np.array([bool(n) for n in names]),
        side=side, side_sizes=tuple(size for _, size in columns), warm=warm,
        lines={'read': read, 'kept': len(own) - 1,
               'rejected': {'in no session': len(items) - len(own) + 1, **blank},
               'unused': unused},
        fingerprint=whole.hexdigest())


def _columns(values, warm):
    """[(ids int32 [V], how many there are)] of a field: one column, but of lists one per value.

    Args:
      values: per item, None for none. warm: bool [V].
    """
    if not any(isinstance(value, list) for value in values):
        return [text.value_ids([text.said(value) for value in values], warm)]
    held = [{text.said(x) for x in (value if isinstance(value, list) else [value])} - {''}
            for value in values]
    counts = Counter(x for own, seen in zip(held, warm, strict=True) if seen for x in own)
    return [(np.array([x in own for own in held], np.int32), 2)
            for x in sorted(x for x, count in counts.items() if count > 1)]


def _numbers(file, last):
    """The `item` of every id, int [V + 1]; [0] means nothing."""
    found = ids_lib.unpack(file)[0].get('catalog_item')
    if found is None:
        return list(range(last + 1))
    if found.ndim != 1 or found.dtype.kind not in 'iu' or len(found) <= last:
        raise InputError(f'{file}: catalog_item is {found.dtype} {list(found.shape)}; it must be '
                         f'integers, one for every id 0..{last}')
    twice = len(found) - 1 - len(np.unique(found[1:]))
    if twice:
        raise InputError(f'{file}: catalog_item names {twice} items for more than one id; leave '
                         'one id for each')
    return found.tolist()


def _items(file):
    """-> {number: object}, how many lines were read, and {reason: lines} of those left out."""
    lines, out = Lines(file), {}
    for one in lines:
        item = one.get('item')
        if not isinstance(item, int) or isinstance(item, bool) or item in out:
            raise InputError(f'{file}, line {lines.number}: every line is an object whose `item` '
                             'is a number that no other line has')
        out[item] = one
    if lines.damaged:
        number, reason = lines.damaged[0]
        raise InputError(f'{file}, line {number} cannot be read ({reason}); it must be JSON in '
                         'UTF-8, an object per line')
    return out, lines.number, dict(lines.rejected)


def _image_names(place, directory, items):
    """The picture's file of every item, '' where there is none, and {reason: such pictures}.

    Folders inside a zip file do not matter.
    """
    named = [str(one.get('image') or '') for one in items]
    if place is None:
        there = {}
    elif place.is_dir():
        there = {path.name: images.unusable(path, directory) or path.name
                 for path in place.iterdir()}
    else:
        try:
            with zipfile.ZipFile(place) as file:
                members = {member.filename: _usable(member) for member in file.infolist()}
        except (OSError, *DAMAGE) as error:
            raise InputError(f'{place} is no usable zip file ({error}); pack the pictures anew or '
                             'put them into a folder images/') from error
        there = {PurePosixPath(name).name: found for name, found in members.items()} | members
    found = [there.get(name, Reason(images.NOT_THERE)) if name else '' for name in named]
    unused = Counter(str(one) for one in found if isinstance(one, Reason))
    return ['' if isinstance(one, Reason) else one for one in found], dict(sorted(unused.items()))


def _usable(member):
    """A zip file's member by its name, or why it is not read."""
    if member.is_dir():
        return Reason('image_not_a_file')
    if member.flag_bits & 1 or member.compress_type not in PACKINGS:
        return Reason('image_packed_otherwise')  # encrypted, or not by deflate
    if member.file_size > images.MAX_BYTES:
        return Reason('image_too_large')
    return member.filename


def _check(config) -> None:
    if not Path(config.data.ready).is_dir():
        raise InputError(f'config.data.ready={config.data.ready!r}: not a directory. Expected one '
                         'with sessions.npz and items.jsonl, see tpad_jax/data/sources/folder.py. '
                         'Fix: correct the path.')


def _load(config, workdir: Path) -> Data:
    del workdir
    c = config.data
    return load(c.ready, words=fields_of(c.words), sides=fields_of(c.sides), ordered=c.ordered,
                valid=c.valid, seed=c.seed)


SOURCE = Source(load=_load, check=_check, timed=False)

"""Sessions whose items have content: a directory of three files.

    sessions.npz          as in `ids`; moreover, optionally, `catalog_item` int [V + 1]: which
                          item of the next file an id 1..V is (without it, id k is item k)
    items.jsonl[.gz]      one JSON object per line: `item`, a number that no other line has; fields
                          of words; for an item with a picture `image`, the name of its file
    images.zip or images/ the pictures, by these names; optional

Items that no session names are not in the catalogue. Files are not unpacked to the disk, and links
out of the directory are not followed. A picture that cannot be read is counted with its reason, but
a line that cannot be read refuses the directory.
"""

import hashlib
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from tpad_jax.config import names as names_in
from tpad_jax.data import images, text
from tpad_jax.data.catalogue import Data
from tpad_jax.data.sources import Source, amazon_fields, ids as ids_lib
from tpad_jax.data.untrusted import DAMAGE, PACKINGS, Lines, Reason, stay_inside
from tpad_jax.errors import InputError, refuse_if, refusing

SESSIONS, ITEMS, IMAGES = 'sessions.npz', ('items.jsonl', 'items.jsonl.gz'), 'images'


class Pictures(Sequence):
    """The encoded images by item id; b'' where there is none or it cannot be read."""

    def __init__(self, place: Path | None, names: Sequence[str]):
        """Open a place.

        Args:
          place: a zip file or a folder; None: there is none.
          names: per item id the file in it, '' for none.
        """
        self._place, self._names, self._lock = place, list(names), threading.Lock()
        self._zip = zipfile.ZipFile(place) if place and place.is_file() else None

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, item: int) -> bytes:
        name = self._names[item]
        if not name:
            return b''
        try:
            if self._zip is None:
                return (self._place / name).read_bytes()
            with self._lock, self._zip.open(name) as file:  # one file position for all threads
                data = file.read(images.MAX_BYTES)  # the size in its head may be false
                return b'' if file.read(1) else data
        except (OSError, *DAMAGE):
            return b''  # counted with the broken images when it is decoded


def load(directory, *, words: Iterable[str], sides: Iterable[str], ordered: bool, valid: float,
         seed: int) -> Data:
    """Read the directory and hold out validation, as `ids.load` does.

    Args:
      directory: see above.
      words: fields whose words make an item's text, in this order; those of a list are joined.
      sides: fields that are side features: equal values of two or more warm items share an id. A
        field of lists becomes a side feature for each of its values, 1 where the list holds it.
      ordered: see `ids.load`.
      valid: see `ids.load`.
      seed: see `ids.load`.

    Returns:
      Data without audit; item k is called by its `item` of items.jsonl, and `titles` are `title`.

    Raises:
      InputError: naming the file and what in it is wrong.
    """
    directory, words, sides = Path(directory), tuple(words), tuple(sides)
    sessions = directory / SESSIONS
    stay_inside(sessions, directory)
    loaded = ids_lib.load(sessions, ordered=ordered, valid=valid, seed=seed)
    arrays, digest = ids_lib.unpack(sessions)
    numbers = _numbers(sessions, arrays.get('catalog_item'), loaded.num_items)
    file = next((directory / name for name in ITEMS if (directory / name).is_file()), None)
    refuse_if(file is None, f'{directory} holds no items.jsonl or items.jsonl.gz. Expected a JSON '
              'object per item, see tpad_jax/data/sources/folder.py. Fix: write the file.')
    stay_inside(file, directory)
    records, lines = _items(file)
    absent = set(numbers[1:]) - records.keys()
    refuse_if(absent, f'{file} lacks {len(absent)} of {len(numbers) - 1} items of the sessions, '
              f'{min(absent, default=0)} among them. Expected a line for each. Fix: add the lines.')
    items = [{}, *(records[number] for number in numbers[1:])]
    for field in (*words, *sides):
        refuse_if(not any(field in item for item in items), f'{file}: no item has the field '
                  f'{field!r}. Expected fields in config.data.words and sides. Fix: correct it.')
    place = next((path for path in (directory / f'{IMAGES}.zip', directory / IMAGES)
                  if path.is_file() or path.is_dir()), None)
    if place is not None:
        stay_inside(place, directory)
    names, unused = _image_names(place, directory, items)
    texts = ['. '.join(filter(None, (text.counted_words(item, field, unused) for field in words)))
             for item in items]
    warm = np.append(loaded.warm, np.zeros(len(items) - len(loaded.warm), bool))
    columns = [column for field in sides
               for column in _columns([item.get(field) for item in items[1:]], warm[1:])]
    side = np.zeros((len(items), len(columns)), np.int32)
    side[1:] = np.reshape([ids for ids, _ in columns], (len(columns), len(items) - 1)).T
    rejected = {**loaded.lines['rejected'], 'in no session': len(records) - len(items) + 1,
                **lines.rejected}
    return replace(
        loaded, asins=['', *map(str, numbers[1:])],
        titles=[text.words_of(item.get('title')) for item in items],
        texts=texts,
        image_bytes=Pictures(place, names), has_image=np.array([bool(name) for name in names]),
        attributes=_attributes(items),
        side=side, side_sizes=tuple(size for _, size in columns), warm=warm,
        lines=dict(read=lines.number, kept=len(items) - 1, rejected=rejected,
                   unused=dict(sorted((+unused).items()))),
        fingerprint=_digest(f'{digest} {words} {sides} {ordered} {valid} {seed}', file, place,
                            names))


def _attributes(items: list[dict]) -> dict[str, list]:
    """The fields brand, category and price of the items."""
    words = {name: [text.words_of(item.get(name)) for item in items]
             for name in ('brand', 'category')}
    return words | {'price': [amazon_fields.amount(item.get('price')) for item in items]}


def _digest(options: str, file: Path, place: Path | None, names: list[str]) -> str:
    """sha256 (hex) of options, items and pictures."""
    digest = hashlib.sha256(options.encode())
    for path in (file, place):
        if path is not None and path.is_file():
            with path.open('rb') as opened:
                hashlib.file_digest(opened, lambda: digest)  # updates this digest
    if place is not None and place.is_dir():
        for name in filter(None, names):
            digest.update(name.encode(errors='surrogateescape') + (place / name).read_bytes())
    return digest.hexdigest()


def _columns(values: list, warm: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """The side features of a field: one, but of lists one per value.

    Args:
      values: per item, None for none.
      warm: bool [V].

    Returns:
      (ids int32 [V], how many there are) of each.
    """
    if not any(isinstance(value, list) for value in values):
        return [text.value_ids([text.words_of(value) for value in values], warm)]
    members = [{text.words_of(x) for x in (value if isinstance(value, list) else [value])} - {''}
               for value in values]
    counts = Counter(x for item, seen in zip(members, warm, strict=True) if seen for x in item)
    return [(np.array([x in item for item in members], np.int32), 2)
            for x in sorted(x for x, count in counts.items() if count > 1)]


def _numbers(file: Path, numbers: np.ndarray | None, last: int) -> list[int]:
    """The `item` of every id, int [V + 1]; [0] is not read."""
    if numbers is None:
        return list(range(last + 1))
    refuse_if(numbers.ndim != 1 or numbers.dtype.kind not in 'iu' or len(numbers) <= last,
              f'{file}: catalog_item is {numbers.dtype} {list(numbers.shape)}. Expected integers, '
              f'one for every id 0..{last}. Fix: correct the array.')
    repeated = len(numbers) - 1 - len(np.unique(numbers[1:]))
    refuse_if(repeated, f'{file}: catalog_item names {repeated} items for more than one id. '
              'Expected one id for each. Fix: remove the others.')
    return numbers.tolist()


def _items(file: Path) -> tuple[dict[int, dict], Lines]:
    """-> {number: object} and the lines; refuses a damaged line."""
    lines, records = Lines(file), {}
    for record in lines:
        item = record.get('item')
        refuse_if(type(item) is not int or item in records, f'{file}, line {lines.number}: `item` '
                  f'is {item!r}. Expected a number that no other line has. Fix: correct the line.')
        records[item] = record
    for number, reason in lines.damaged:
        raise InputError(f'{file}, line {number} cannot be read ({reason}). Expected a JSON object '
                         'in UTF-8 per line. Fix: correct the line.')
    return records, lines


def _image_names(place: Path | None, directory: Path, items: list[dict]
                 ) -> tuple[list[str], Counter]:
    """The picture's file of every item, '' where there is none, and {reason: such pictures}.

    Folders inside a zip file do not matter.
    """
    wanted = [str(item.get('image') or '') for item in items]
    if place is None:
        present = {}
    elif place.is_dir():
        present = {path.name: images.unusable(path, directory) or path.name
                   for path in place.iterdir()}
    else:
        with (refusing((OSError, *DAMAGE), f'{place} is not a usable zip file', 'Expected the '
                       'pictures. Fix: pack them again, or use a folder images/.'),
              zipfile.ZipFile(place) as file):
            members = {member.filename: _usable(member) for member in file.infolist()}
        present = {PurePosixPath(name).name: usable for name, usable in members.items()} | members
    outcomes = [present.get(name, Reason(images.NOT_THERE)) if name else '' for name in wanted]
    unused = Counter(str(name) for name in outcomes if isinstance(name, Reason))
    return (['' if isinstance(name, Reason) else name for name in outcomes],
            unused)


def _usable(member: zipfile.ZipInfo) -> str | Reason:
    """A zip file's member by its name, or why it is not read."""
    if member.is_dir():
        return Reason('image_not_a_file')
    if member.flag_bits & 1 or member.compress_type not in PACKINGS:
        return Reason('image_packed_otherwise')  # encrypted, or not by deflate
    if member.file_size > images.MAX_BYTES:
        return Reason('image_too_large')
    return member.filename


def _check(config) -> None:
    refuse_if(not Path(config.data.ready).is_dir(), f'config.data.ready={config.data.ready!r}: not '
              'a directory. Expected one with sessions.npz and items.jsonl. Fix: correct the path.')


def _load(config, _workdir: Path) -> Data:
    c = config.data
    return load(c.ready, words=names_in(c.words), sides=names_in(c.sides), ordered=c.ordered,
                valid=c.valid, seed=c.seed)


SOURCE = Source(load=_load, check=_check, timed=False)

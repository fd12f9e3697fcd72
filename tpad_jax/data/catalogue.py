"""A catalogue and its sessions in memory, and the catalogue's pixels and tokens.

Needs neither TensorFlow nor a tokenizer to be imported; the pixels are decoded once into a file.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tpad_jax.core import files
from tpad_jax.data import images, sessions, text
from tpad_jax.data.untrusted import SHOWN, reasons
from tpad_jax.errors import refuse_if

CATALOGUES = 'all', 'reviewed', 'sessions'  # values of config.data.catalogue
DECODE_CHUNK = 512  # images decoded before any is written
BAD_IMAGES = 'bad_images.txt'  # the items whose images could not be decoded, and why
DECODED = 1  # an image's outcome; larger ones are positions in REASONS
REASONS = ('', '', *images.REASONS)


@dataclass(frozen=True, eq=False)
class Data:
    """One catalogue of V items and its sessions; every per-item table has V + 1 rows.

    Attributes:
      asins: list of str, [0] being ''. External ids.
      titles: list of str, [0] being ''.
      texts: list of str, [0] being ''. The MLLMs read these.
      image_bytes: encoded images by item id, b'' where there is none; None: no item has one.
      has_image: bool [V + 1]. A picture was found.
      side: int32 [V + 1, S]. Ids of side features, of raw files brand, category and price level.
      side_sizes: how many ids each side feature has (see `text.side_features`).
      train: training sessions.
      valid: validation sessions, later than those in `train`.
      test: test sessions, later than those in `valid`.
      warm: bool [V + 1]. The item occurs in a training session.
      lines: counts of raw lines read, kept and rejected, and, under 'unused', of images that are
        not among `image_bytes`, by reason (image_...).
      audit: see `audit.audit`; {} is filled in by `sources.load`.
      fingerprint: sha256 of the input and options; '' is filled in by `sources.load`.
      form: '2018', '2023', or another word for the kind of source.
      vocabulary: of the side features, see `text.side_vocabulary`; {} where none is kept.
      kinds: names of the kinds of events, if there are any.
      reviewed: bool [V + 1]. The item has an event before validation; None: as `warm`.
      choices: {value of config.data.catalogue: number of its items}; {} is filled in by `restrict`.
      attributes: {'brand' | 'category' | 'price': V + 1 values}, '' or None where an item has none.
        Lists under conditions read them.
      events: events.Events, if more is read of the events than their items.
    """

    asins: list[str]
    titles: list[str]
    texts: list[str]
    image_bytes: Sequence[bytes] | None
    has_image: np.ndarray
    side: np.ndarray
    side_sizes: tuple[int, ...]
    train: sessions.Sessions
    valid: sessions.Sessions
    test: sessions.Sessions
    warm: np.ndarray
    lines: dict
    audit: dict
    fingerprint: str
    form: str
    vocabulary: dict = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    reviewed: np.ndarray | None = None
    choices: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, list] = field(default_factory=dict)
    events: Any = None

    @property
    def num_items(self) -> int:
        """V, the padding item not counted."""
        return len(self.asins) - 1


class _Chosen(Sequence):
    """Some entries of a sequence that is read on demand."""

    def __init__(self, entries: Sequence, index: np.ndarray):
        self._entries, self._index = entries, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, item: int):
        return self._entries[int(self._index[item])]


def restrict(data: Data, choice: str) -> Data:
    """Keep the items that are read and ranked; what decides is known before validation begins.

    Events of other items are dropped from validation. In the test sessions they are item 0, a miss
    of every model, see `sessions.rows`.

    Args:
      data: of a source.
      choice: 'sessions': the items of the training sessions; 'reviewed': those with any event
        before validation; 'all': all items of the source.

    Returns:
      The data with renumbered items, and `choices`.

    Raises:
      InputError: no validation session has two of these items.
    """
    every = np.arange(data.num_items + 1) > 0
    reviewed = data.warm if data.reviewed is None else data.reviewed | data.warm
    members = dict(zip(CATALOGUES, (every, reviewed, data.warm), strict=True))
    data = replace(data, choices={name: int(part.sum()) for name, part in members.items()})
    if choice == 'all':
        return data
    index = np.append(0, np.flatnonzero(members[choice]))
    number = np.zeros(len(every), np.int32)  # 0 for an item that is not kept
    number[index] = np.arange(len(index))
    train, valid, test = (part._replace(items=number[part.items])
                          for part in (data.train, data.valid, data.test))
    valid = sessions.known(valid)
    sessions.check(valid, f'config.data.catalogue={choice!r}: valid', len(index) - 1)
    lists = {name: [getattr(data, name)[item] for item in index]
             for name in ('asins', 'titles', 'texts')}
    arrays = {name: getattr(data, name)[index] for name in ('has_image', 'side', 'warm')}
    chosen = {name: [values[item] for item in index] for name, values in data.attributes.items()}
    pictures = data.image_bytes and _Chosen(data.image_bytes, index)
    identity = hashlib.sha256(f'{data.fingerprint} {choice}'.encode()).hexdigest()
    return replace(data, **lists, **arrays, image_bytes=pictures, train=train, valid=valid,
                   test=test, fingerprint=identity, reviewed=reviewed[index], attributes=chosen)


def windowed(data: Data, options, timed: bool) -> Data:
    """Divide the sessions again: the test is one window of days, and what is later is dropped.

    Args:
      data: of a source.
      options: config.data, with `window`, the number of the window from the last day on, its
        `window_days`, and `valid` for the sessions before it.
      timed: whether the sessions' start times are times, if their events have none.

    Returns:
      The data, without an audit.

    Raises:
      InputError: there are no times, or the window or the time before it has no sessions.
    """
    every = sessions.join(sessions.join(data.train, data.valid), data.test)
    name = f'config.data.window={options.window}'
    refuse_if(every.time is None and not timed, f'{name}: the sessions have no times. Expected '
              'data with times. Fix: set it to 0.')
    start = every.start if every.time is None else every.time[every.offsets[:-1]] // 1000
    every = sessions.take(every._replace(start=start), np.argsort(start, kind='stable'))
    day = every.start // sessions.DAY - every.start[-1] // sessions.DAY  # 0 is the last
    first = 1 - options.window * options.window_days
    kept = np.flatnonzero(day < first + options.window_days)
    tested = int((day[kept] >= first).sum())
    refuse_if(not 0 < tested < len(kept), f'{name} of config.data.window_days='
              f'{options.window_days}: {tested} sessions are in its days and {len(kept) - tested} '
              f'before them, of {1 - day[0]} days in all. Expected some in both. Fix: lower one.')
    parts = sessions.split(sessions.take(every, kept), options.valid, tested)
    warm = sessions.warm_items(parts[0], data.num_items)
    identity = f'{data.fingerprint} {options.window} {options.window_days}'
    return replace(data, **dict(zip(('train', 'valid', 'test'), parts, strict=True)), warm=warm,
                   reviewed=None, audit={},
                   fingerprint=data.fingerprint and hashlib.sha256(identity.encode()).hexdigest())


@dataclass(frozen=True, eq=False)
class Content:
    """Pixels and tokens of the catalogue, by item id.

    Attributes:
      image: uint8 [V + 1, H, W, 3], mapped from a file; zeros where there is none.
      has_image: bool [V + 1], False where there is none or it is broken.
      tokens: int32 [V + 1, T].
      broken: how many images could not be decoded.
      pictures: 'read' = 'kept' + sum of 'rejected' {reason: count}, of all images found.
    """

    image: np.ndarray
    has_image: np.ndarray
    tokens: np.ndarray
    broken: int
    pictures: dict = field(default_factory=dict)


def content(data: Data, data_dir, *, image_size: int, tokenizer_dir, text_length: int,
            bad_share: float = 1.0) -> Content:
    """Decode the catalogue's pixels, on the first call into a file of data_dir, and its tokens.

    The file holds (V + 1) * image_size^2 * 3 bytes and is mapped, not read. bad_images.txt next to
    it lists the items whose images could not be decoded and why, one per line; such an item has no
    image. One process at a time may call this.

    Args:
      data: the catalogue.
      data_dir: directory of the file, made if absent.
      image_size: height and width in pixels. 0: no picture is read.
      tokenizer_dir: local directory of a Hugging Face tokenizer.
      text_length: T, tokens per item.
      bad_share: share of the images, in 0..1, that may be damaged. An image without item, or one
        that is named and missing, is not damaged.

    Returns:
      Pixels, tokens and counts.

    Raises:
      InputError: no usable tokenizer; more damaged images than that; no room on the disk.
    """
    tokens = text.tokenize(data.texts, tokenizer_dir, text_length)
    if not image_size:
        return Content(np.zeros((len(tokens), 0, 0, 3), np.uint8), data.has_image, tokens, 0,
                       {'read': 0, 'kept': 0, 'rejected': {}})
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    stem = Path(data_dir) / f'pixels-{image_size}-{data.fingerprint[:16]}'
    image_file, outcome_file = stem.with_suffix('.npy'), stem.with_suffix('.outcome.npy')
    if not (image_file.is_file() and outcome_file.is_file()):
        _decode(data, image_size, image_file, outcome_file)
    outcome = np.load(outcome_file, allow_pickle=False)
    pictures = _count(data, outcome, image_file.with_name(BAD_IMAGES), bad_share)
    decoded = outcome == DECODED
    return Content(image=np.load(image_file, mmap_mode='r', allow_pickle=False), has_image=decoded,
                   tokens=tokens, broken=int((data.has_image & ~decoded).sum()), pictures=pictures)


def _count(data: Data, outcome: np.ndarray, listed: Path, bad_share: float) -> dict:
    """Count images by outcome, uint8 [V + 1] -> {'read', 'kept', 'rejected'}."""
    bad = np.flatnonzero(data.has_image & (outcome != DECODED))
    unread = {why: n for why, n in data.lines.get('unused', {}).items() if why.startswith('image_')}
    rejected = Counter(unread) + Counter(REASONS[outcome[item]] for item in bad)
    kept = int((outcome == DECODED).sum())
    damaged = Counter({why: n for why, n in rejected.items() if why not in images.WHOLE})
    tried = kept + damaged.total()
    first = ', '.join(f'{data.asins[item]} {REASONS[outcome[item]]}' for item in bad[:SHOWN])
    refuse_if(damaged.total() > bad_share * tried,
              f'{damaged.total()} of {tried} images cannot be used '
              f'({"; first ".join(filter(None, (reasons(damaged), first)))}). Expected a share of '
              f'at most config.data.bad_share={bad_share}. Fix: correct or remove them ({listed} '
              'lists those that cannot be decoded), or raise the share to use the texts alone.')
    return {'read': kept + rejected.total(), 'kept': kept,
            'rejected': dict(sorted(rejected.items()))}


def _decode(data: Data, size: int, image_file: Path, outcome_file: Path) -> None:
    """Write pixels uint8 [V + 1, size, size, 3] and their outcomes uint8 [V + 1].

    An outcome is DECODED, 0 without an image, else its reason's position in REASONS.
    """
    free = shutil.disk_usage(image_file.parent).free
    needed = int(data.has_image.sum()) * size * size * 3
    # a mapped file on a full disk ends the process by a bus error
    refuse_if(needed > free, f'{image_file.parent}: {free:,} bytes are free. Expected {needed:,} '
              'for the decoded pictures. Fix: make room, or lower config.mllm.image_size.')
    outcome = np.zeros(data.num_items + 1, np.uint8)
    with files.replacing(image_file) as partial, images.quiet(), ThreadPoolExecutor() as pool:
        # a new file is all zeros and takes no disk space until a row is written
        pixels = np.lib.format.open_memmap(partial, mode='w+', dtype=np.uint8,
                                           shape=(data.num_items + 1, size, size, 3))
        present = np.flatnonzero(data.has_image).tolist()
        for begin in range(0, len(present), DECODE_CHUNK):
            chunk = present[begin:begin + DECODE_CHUNK]
            # decoding releases the interpreter's lock
            decoded = pool.map(lambda item: images.read(data.image_bytes[item], size), chunk)
            for item, found in zip(chunk, decoded, strict=True):
                if isinstance(found, images.Reason):
                    outcome[item] = REASONS.index(found)
                else:
                    pixels[item], outcome[item] = found, DECODED
        pixels.flush()
    bad = np.flatnonzero(outcome > DECODED)
    files.write_text(image_file.with_name(BAD_IMAGES), ''.join(
        f'{data.asins[item]}\t{REASONS[outcome[item]]}\n' for item in bad))
    with files.replacing(outcome_file) as partial, partial.open('wb') as file:
        np.save(file, outcome, allow_pickle=False)

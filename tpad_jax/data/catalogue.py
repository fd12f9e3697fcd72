"""Prepared tables -> what a run keeps in memory, and the catalogue's pixels and tokens.

Needs neither TensorFlow nor a tokenizer to be imported; the pixels are decoded once into a file.
"""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tpad_jax.data import images, text
from tpad_jax.data.sessions import Sessions
from tpad_jax.data.untrusted import SHOWN, reasons
from tpad_jax.errors import InputError

DECODE_CHUNK = 512  # images held encoded at a time, twice
BAD_IMAGES = 'bad_images.txt'  # the items whose images could not be decoded, and why
DECODED = 1  # an image's outcome; larger ones are places in REASONS
REASONS = ('', '', *images.REASONS)


@dataclass(frozen=True, eq=False)
class Data:
    """One prepared catalogue of V items and its sessions; every per-item table has V + 1 rows.

    asins, titles, texts: lists of str, [0] being ''. image_bytes: encoded images by item id.
    has_image: bool [V + 1], a file was there. side: int32 [V + 1, 3], ids of brand, category and
    price level, and side_sizes how many of each (see `text.side_features`).
    train, valid, test: sessions, each split later than the one before.
    warm: bool [V + 1], the item occurs in a training session.
    lines: counts of raw lines read, kept and rejected, and, under 'unused', of images that are not
    among `image_bytes`, by reason (image_...). audit: see `audit.audit`.
    fingerprint: sha256 of raw files and options. form: '2018' or '2023'.
    vocabulary: of the side features, see `text.side_vocabulary`; {} where none was kept.
    """

    asins: list[str]
    titles: list[str]
    texts: list[str]
    image_bytes: Sequence[bytes] | None
    has_image: np.ndarray
    side: np.ndarray
    side_sizes: tuple[int, int, int]
    train: Sessions
    valid: Sessions
    test: Sessions
    warm: np.ndarray
    lines: dict
    audit: dict
    fingerprint: str
    form: str
    vocabulary: dict = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        """V, the padding item not counted."""
        return len(self.asins) - 1


@dataclass(frozen=True, eq=False)
class Content:
    """Pixels and tokens of the catalogue, by item id.

    image: uint8 [V + 1, H, W, 3], mapped from a file; zeros where there is none.
    has_image: bool [V + 1], False where there is none or it is broken.
    tokens: int32 [V + 1, T]. broken: how many images could not be decoded.
    pictures: 'read' = 'kept' + sum of 'rejected' {reason: count}, of all images that were found.
    """

    image: np.ndarray
    has_image: np.ndarray
    tokens: np.ndarray
    broken: int
    pictures: dict = field(default_factory=dict)


def content(data: Data, data_dir, *, image_size: int, tokenizer_dir, text_length: int,
            bad_share: float = 1.0) -> Content:
    """The catalogue's pixels, decoded on the first call into a file of data_dir, and its tokens.

    The file holds (V + 1) * image_size^2 * 3 bytes and is mapped, not read. Processes that share
    data_dir may call this at once: they write the same bytes, each to a file of its own first.
    bad_images.txt beside it lists the items whose images could not be decoded and why, a line for
    each; such an item has no image.

    Args:
      data: of `load(data_dir)`.
      data_dir: as there; must be writable on the first call with this image_size.
      image_size: height and width in pixels.
      tokenizer_dir: local directory of a Hugging Face tokenizer.
      text_length: T, tokens per item.
      bad_share: of the images, in 0..1, that may be damaged. An image of no item is not, nor is
        one that is named and not there.

    Raises:
      InputError: no usable tokenizer; more damaged images than that.
    """
    tokens = text.tokenize(data.texts, tokenizer_dir, text_length)
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
    """-> {'read', 'kept', 'rejected'}: images by outcome, uint8 [V + 1] as `_decode` leaves it."""
    bad = np.flatnonzero(data.has_image & (outcome != DECODED))
    unread = {why: n for why, n in data.lines.get('unused', {}).items() if why.startswith('image_')}
    rejected = Counter(unread) + Counter(REASONS[outcome[item]] for item in bad)
    kept = int((outcome == DECODED).sum())
    damaged = {why: n for why, n in rejected.items() if why not in images.WHOLE}
    tried = kept + sum(damaged.values())
    if sum(damaged.values()) > bad_share * tried:
        first = ', '.join(f'{data.asins[item]} {REASONS[outcome[item]]}' for item in bad[:SHOWN])
        raise InputError(f'{sum(damaged.values())} of {tried} images cannot be used '
                         f'({reasons(damaged)}{"; first " + first if first else ""}); {listed} '
                         'lists those that cannot be decoded; mend or remove them, or raise '
                         f'config.data.bad_share={bad_share} to go on with the words alone')
    return {'read': kept + rejected.total(), 'kept': kept,
            'rejected': dict(sorted(rejected.items()))}


def _decode(data: Data, size: int, image_file: Path, outcome_file: Path) -> None:
    """Writes pixels uint8 [V + 1, size, size, 3] and their outcome, uint8 [V + 1].

    An outcome is DECODED, 0 without an image, else its reason's place in REASONS.
    """
    part_image, part_outcome = (path.with_suffix(f'.{os.getpid()}.partial')
                                for path in (image_file, outcome_file))
    room = shutil.disk_usage(image_file.parent).free
    if (need := int(data.has_image.sum()) * size * size * 3) > room:  # else it ends by a bus error
        raise InputError(f'{image_file.parent}: the decoded pictures take {need:,} bytes and '
                         f'{room:,} are free; make room, or have them decoded smaller')
    # a new file is all zeros and takes no disk space until a row is written
    pixels = np.lib.format.open_memmap(part_image, mode='w+', dtype=np.uint8,
                                       shape=(data.num_items + 1, size, size, 3))
    outcome = np.zeros(data.num_items + 1, np.uint8)
    there = np.flatnonzero(data.has_image)
    chunks = [there[begin:begin + DECODE_CHUNK] for begin in range(0, len(there), DECODE_CHUNK)]
    # decoding releases the interpreter's lock; a chunk is read while the one before is decoded
    with images.quiet(), ThreadPoolExecutor() as pool, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(data.image_bytes.read, chunks[0]) if chunks else None
        for number, chunk in enumerate(chunks, 1):
            encoded = ahead.result()
            if number < len(chunks):
                ahead = reader.submit(data.image_bytes.read, chunks[number])
            for item, found in zip(chunk, pool.map(lambda data: images.read(data, size), encoded),
                                   strict=True):
                if isinstance(found, images.Reason):
                    outcome[item] = REASONS.index(found)
                else:
                    pixels[item], outcome[item] = found, DECODED
    pixels.flush()
    part_list, bad = part_image.with_suffix('.list'), np.flatnonzero(outcome > DECODED)
    part_list.write_text(''.join(f'{data.asins[k]}\t{REASONS[outcome[k]]}\n' for k in bad))
    os.replace(part_list, image_file.with_name(BAD_IMAGES))
    with part_outcome.open('wb') as file:
        np.save(file, outcome, allow_pickle=False)
    os.replace(part_image, image_file)
    os.replace(part_outcome, outcome_file)

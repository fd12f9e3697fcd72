"""Encoded images to pixels, and why there are none."""

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from tpad_jax.data.untrusted import Reason, inside

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF')  # of the content of a file; its name does not matter
ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.gif')  # of file names, in any case
MAX_PIXELS = 40_000_000  # 120 MB decoded; a product photo has a tenth of it
MAX_BYTES = 32 * 2**20  # of a file; a product photo has a hundredth of it
MAX_SCANS = 200  # of a progressive JPEG; each goes over all pixels, and genuine ones have ten or so
LARGE = 4_000_000  # pixels; larger images are decoded one at a time, by one thread

# the outcomes of `read` other than pixels
EMPTY, UNKNOWN, TOO_MANY_PIXELS, DAMAGED = REASONS = tuple(map(Reason, (
    'image_empty_or_unreadable', 'image_of_unknown_format', 'image_of_too_many_pixels',
    'image_damaged')))
NOT_THERE, WITHOUT_ITEM, REPEATED = 'image_not_there', 'image_without_item', 'image_repeated'
WHOLE = frozenset({NOT_THERE, WITHOUT_ITEM, REPEATED})  # reasons that do not mean damage
# raised by Pillow on damaged bytes of these formats; its own size guard warns, then raises
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError,
           RuntimeError, OverflowError, MemoryError, struct.error, zlib.error,
           Image.DecompressionBombError, Warning)
# EXIF orientation -> how viewers turn the picture
_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), start=2))
# one thread in place of a lock: memory that an image took stays with the thread that decoded it
_alone = ThreadPoolExecutor(1)


def decode(data: bytes, size: int) -> np.ndarray | None:
    """Decode an image as `read` does, with None in place of a reason."""
    pixels = read(data, size)
    return None if isinstance(pixels, Reason) else pixels


def read(data: bytes, size: int) -> np.ndarray | Reason:
    """Decode an image to a square of RGB pixels.

    The whole picture is resized to the square without bars, so its aspect is not kept; transparent
    parts turn white, as on a shop's page. A picture that has this size already keeps its pixels.
    A file that ends early is damaged, however much of the picture is there. The picture is turned
    as its EXIF orientation asks for, as viewers do.

    Args:
      data: bytes of a JPEG, PNG, WebP or GIF (first frame) file.
      size: height and width of the result in pixels.

    Returns:
      uint8 [size, size, 3], or one of REASONS: the bytes are no such image, a damaged one or one
      of more than MAX_PIXELS pixels.
    """
    if not data:
        return EMPTY
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return TOO_MANY_PIXELS
            if image.format in ('JPEG', 'MPO') and data.count(b'\xff\xda') > MAX_SCANS:
                return DAMAGED
            if image.width * image.height > LARGE:
                return _alone.submit(_square, image, size).result()
            return _square(image, size)
    except UnidentifiedImageError:
        return UNKNOWN
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return TOO_MANY_PIXELS
    except _DAMAGE:
        return DAMAGED


def encode(pixels: np.ndarray, form: str, **options) -> bytes:
    """Encode pixels uint8 [H, W, 3] as a file of a format of Pillow, with its options."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings about a file's metadata; the pixels may be undamaged.

    Use it around the threads that call `read`, not inside them: the filters are the process's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', category=UserWarning, module=r'PIL\.')
        yield


def by_stem(folder: Path) -> dict[str, list[Path]]:
    """List the pictures of a folder by their names without ending.

    Args:
      folder: the folder. Files that are not finished or whose name ends otherwise are not listed.

    Returns:
      {stem: paths in the order of ENDINGS}, sorted.
    """
    paths = folder.iterdir() if folder.is_dir() else ()  # unlike glob, it raises without access
    pictures = [path for path in paths if path.suffix.lower() in ENDINGS]
    pictures.sort(key=lambda path: (path.stem, ENDINGS.index(path.suffix.lower()), path))
    return {stem: list(paths) for stem, paths in groupby(pictures, key=lambda path: path.stem)}


def unusable(path: Path, folder: Path) -> Reason | None:
    """Check path, kind and size of an image file, without opening it.

    Args:
      path: the file.
      folder: links out of it are not followed.

    Returns:
      The reason why the file is not read, None if it is.
    """
    if not path.is_file():
        return Reason('image_not_a_file')  # a folder, a pipe, links in a circle
    if not inside(path, folder):
        return Reason('image_link_outside')
    if not os.access(path, os.R_OK):
        return EMPTY
    return Reason('image_too_large') if path.stat().st_size > MAX_BYTES else None


def _square(image, size):
    """Resize an opened image to a square of RGB pixels, turned upright."""
    # JPEG only: decodes at a half, quarter or eighth, about twice as fast, but never below
    # 1.1 times the size. A photograph of 128 pixels or more is then within 36 dB of the full
    # decoding, a difference like that between bilinear and bicubic. The box ends where the
    # picture ends inside the last pixel, which covers fewer pixels than the others
    drafted = image.draft('RGB', (11 * size // 10, 11 * size // 10))
    box = drafted and drafted[1]
    turn = _turn(image)
    if image.mode.startswith('I;16'):  # Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    if image.mode != 'RGB':  # else a copy, a tenth of the time
        image = image.convert('RGB')
    image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(image.transpose(turn) if turn is not None else image)


def _turn(image) -> Image.Transpose | None:
    """The transposition that an image's EXIF orientation asks for; None without one."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except _DAMAGE:  # metadata may be damaged where the pixels are not
        return None

"""Encoded images to pixels."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF')  # whatever the file is called
MAX_PIXELS = 40_000_000  # 120 MB decoded; a product photo has a tenth of it


def decode(data: bytes, size: int) -> np.ndarray | None:
    """Decodes an image to a square of RGB pixels.

    The whole picture is resized to the square without bars, so its aspect is not kept; transparent
    parts turn white, as on a shop's page. A picture that has this size already keeps its pixels.

    Args:
      data: bytes of a JPEG, PNG, WebP or GIF (first frame) file.
      size: height and width of the result in pixels.

    Returns:
      uint8 [size, size, 3], or None if the bytes are no image, a damaged one or one of more than
      MAX_PIXELS pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            # JPEG only: decodes at a half, quarter or eighth, about twice as fast, but never below
            # 1.1 times the size: a photograph at 128 pixels or more is 36 dB or more from what the
            # whole would have given, where bilinear for bicubic costs as much. The box says where
            # the picture ends in the last pixel, which stands for fewer than the others
            drafted = image.draft('RGB', (11 * size // 10, 11 * size // 10))
            box = drafted and drafted[1]
            if image.mode.startswith('I;16'):  # Pillow's own conversion clips at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert('RGBA')
                white = Image.new('RGBA', image.size, 'white')
                image = Image.alpha_composite(white, image)
            if image.mode != 'RGB':  # else a copy, a tenth of the time
                image = image.convert('RGB')
            square = image.resize((size, size), Image.Resampling.BICUBIC, box)
    # what Pillow raises on damaged bytes of these formats; its own size guard warns, then raises
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error,
            Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    return np.asarray(square)
